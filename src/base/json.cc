#include "base/json.h"

namespace rehome {
namespace {

const Json* find(const Json& j, const char* key) {
  if (!j.is_object()) throw Error(Code::io, std::string("expected an object with '") + key + "'");
  auto it = j.find(key);
  return it == j.end() || it->is_null() ? nullptr : &*it;
}

const Json& need(const Json& j, const char* key) {
  const Json* v = find(j, key);
  if (!v) throw Error(Code::io, std::string("'") + key + "' is missing");
  return *v;
}

Error wrong_type(const char* key, const char* wanted) {
  return Error(Code::io, std::string("'") + key + "' is not " + wanted);
}

std::string as_string(const Json& v, const char* key) {
  if (!v.is_string()) throw wrong_type(key, "a string");
  return v.get<std::string>();
}
std::int64_t as_int(const Json& v, const char* key) {
  if (!v.is_number_integer()) throw wrong_type(key, "an integer");
  return v.get<std::int64_t>();
}
bool as_bool(const Json& v, const char* key) {
  if (!v.is_boolean()) throw wrong_type(key, "true or false");
  return v.get<bool>();
}

}  // namespace

Json parse_json(std::string_view text, std::string_view what) {
  try {
    return Json::parse(text);
  } catch (const nlohmann::json::parse_error& e) {
    throw Error(Code::io, std::string(what) + " is not JSON at byte " + std::to_string(e.byte));
  }
}

std::string get_string(const Json& j, const char* key) { return as_string(need(j, key), key); }
std::int64_t get_int(const Json& j, const char* key) { return as_int(need(j, key), key); }
bool get_bool(const Json& j, const char* key) { return as_bool(need(j, key), key); }

std::string get_string(const Json& j, const char* key, std::string_view fallback) {
  const Json* v = find(j, key);
  return v ? as_string(*v, key) : std::string(fallback);
}
std::int64_t get_int(const Json& j, const char* key, std::int64_t fallback) {
  const Json* v = find(j, key);
  return v ? as_int(*v, key) : fallback;
}
bool get_bool(const Json& j, const char* key, bool fallback) {
  const Json* v = find(j, key);
  return v ? as_bool(*v, key) : fallback;
}

std::string dump_line(const Json& j) { return j.dump(-1, ' ', false, Json::error_handler_t::replace); }

Json error_to_json(const Error& e) {
  Json j{{"code", error_info(e.code).name}, {"message", e.message}};
  if (!e.context.empty()) j["context"] = e.context;
  if (!e.hint.empty()) j["hint"] = e.hint;
  if (e.retryable) j["retryable"] = true;
  return j;
}

Error error_from_json(const Json& j) {
  Error e(code_from_name(get_string(j, "code")), get_string(j, "message"), get_string(j, "hint", ""),
          get_bool(j, "retryable", false));
  std::string context = get_string(j, "context", "");
  return context.empty() ? e : e.in(context);
}

}  // namespace rehome
