// The agent's messages on a socket: one JSON object a line, a request and its answer. docs/PROTOCOL.md lists them.
#pragma once

#include <string>

#include "base/json.h"
#include "sys/net.h"

namespace rehome {

// Longest message in bytes, either way.
inline constexpr std::size_t kLongestMessage = 64u << 20;

void send_json(const Fd& fd, const Json& message, Deadline deadline);

// An answer line: an error answer is thrown as the Error it is.
Json parse_answer(std::string_view line);
// Reads one. A closed connection is Error(unreachable).
Json read_answer(Reader& in, Deadline deadline);
// The same without reading one byte beyond its newline: what follows is a raw stream.
Json read_answer_exactly(const Fd& fd, Deadline deadline);

}  // namespace rehome
