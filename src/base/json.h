// JSON values and their strict accessors. Errors name the key; whoever reads a file or a peer adds where it came from.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"

namespace rehome {

using Json = nlohmann::json;

// Parses one JSON text. Throws Error(io) naming `what` and the byte at which the text stops being JSON.
Json parse_json(std::string_view text, std::string_view what);

// The member `key` of object `j`; throws Error(io) when it is missing or of another type.
std::string get_string(const Json& j, const char* key);
std::int64_t get_int(const Json& j, const char* key);
bool get_bool(const Json& j, const char* key);
// The same with a value for a missing (or null) member; a member of another type still throws.
std::string get_string(const Json& j, const char* key, std::string_view fallback);
std::int64_t get_int(const Json& j, const char* key, std::int64_t fallback);
bool get_bool(const Json& j, const char* key, bool fallback);

// One line, no newline inside, invalid UTF-8 replaced: what goes over a socket or into the journal.
std::string dump_line(const Json& j);

// An Error as it crosses a wire or lands in a journal, and back, whole.
Json error_to_json(const Error& e);
Error error_from_json(const Json& j);

}  // namespace rehome
