#pragma once

namespace rehome::cli {

// Opens /dev/null for each of the descriptors 0 to 2 that is closed: else the next socket would take its place and get our lines.
void ensure_standard_streams();

}  // namespace rehome::cli
