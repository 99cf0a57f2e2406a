// As much HTTP/1.1 as the test service and its load need: requests and answers with a length or in chunks.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "sys/net.h"

namespace rehome::testing {

struct Message {
  std::string first[3];                        // method, target, version; or version, status, reason
  std::map<std::string, std::string> headers;  // names in lower case
  std::string header(const std::string& name) const;
  bool keeps_alive() const;  // what this side of the connection allows
};

// The start line and the headers; nullopt when the stream ends cleanly before them.
std::optional<Message> read_head(Reader& in, Deadline deadline);
// Hands the body's bytes on as they come. An answer without length or chunks is read to the stream's end only by
// those who ask for it; here it counts as empty.
void read_body(const Message& head, Reader& in, Deadline deadline, const std::function<void(std::string_view)>& to);
std::string read_body(const Message& head, Reader& in, Deadline deadline);

std::string answer(int status, std::string_view body, bool keep_alive, std::string_view type = "application/json");

}  // namespace rehome::testing
