// Bytes as text, for JSON: base64 and what UTF-8 is.
#pragma once

#include <string>
#include <string_view>

namespace rehome {

// Bytes as text and back. from_base64 throws Error(io) for anything that is not base64.
std::string to_base64(std::string_view bytes);
std::string from_base64(std::string_view text);
// True when JSON can carry the bytes as they are.
bool is_utf8(std::string_view bytes);

}  // namespace rehome
