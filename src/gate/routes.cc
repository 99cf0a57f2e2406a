#include "gate/routes.h"

#include <fcntl.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <set>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace rehome {
namespace {

Address address(const Json& j, const char* key, bool required) {
  std::string text = get_string(j, key, "");
  if (text.empty() && !required) return {};
  return Address::parse(text);
}

RouteConfig parse_route(const Json& j) {
  RouteConfig r;
  r.name = get_string(j, "name");
  // The name becomes a part of NAME.marked and of LISTEN_FDNAMES.
  if (r.name.empty() || r.name.find_first_of(":./ \n") != std::string::npos)
    throw Error(Code::config, "'" + r.name + "' cannot be a route's name", "use letters, digits, - and _");
  r.listen = address(j, "listen", true);
  r.marked = address(j, "marked", false);
  r.local = resolved(address(j, "local", true));
  r.peer = address(j, "peer", false);
  if (is_set(r.peer)) r.peer = resolved(r.peer);
  if (auto it = j.find("proxy_protocol"); it != j.end() && it->is_string())
    r.proxy_protocol = *it == "v1" ? 1 : *it == "v2" ? 2 : throw Error(Code::config, "proxy_protocol is v1, v2 or false");
  else
    r.proxy_protocol = get_bool(j, "proxy_protocol", false);
  r.accept_proxy = get_bool(j, "accept_proxy", false);
  std::string refuse = get_string(j, "refuse_with", "http_503");
  if (refuse != "http_503" && refuse != "close") throw Error(Code::config, "refuse_with is http_503 or close");
  r.refuse_with_503 = refuse == "http_503";
  r.transparent = get_bool(j, "transparent", false);
  std::int64_t waiting = get_int(j, "max_waiting", 10000), wait = get_int(j, "max_wait_ms", 30000);
  std::int64_t mark = get_int(j, "mark", 0), mode = get_int(j, "mode", 0666);
  if (waiting < 0 || wait < 0 || mark < 0 || mark > 0xffffffffLL || mode < 0 || mode > 0777)
    throw Error(Code::config, "max_waiting, max_wait_ms, mark or mode is out of range");
  r.max_waiting = static_cast<std::size_t>(waiting);
  r.max_wait = Millis(wait);
  r.mark = static_cast<std::uint32_t>(mark);
  r.listen_mode = static_cast<unsigned>(mode);
  return r;
}

}  // namespace

std::vector<RouteConfig> parse_routes(std::string_view json) {
  Json j = parse_json(json, "gate.json");
  if (!j.is_object() || !j.contains("routes") || !j["routes"].is_array())
    throw Error(Code::config, "gate.json has no list of routes");
  std::vector<RouteConfig> out;
  std::set<std::string> names;
  for (const Json& one : j["routes"]) {
    try {
      out.push_back(parse_route(one));
    } catch (const Error& e) {
      throw Error(Code::config, e.message, e.hint).in("gate.json, route " + std::to_string(out.size() + 1));
    }
    if (!names.insert(out.back().name).second)
      throw Error(Code::config, "gate.json has two routes named '" + out.back().name + "'");
  }
  return out;
}

std::map<std::string, Fd> inherited_listeners() {
  std::map<std::string, Fd> out;
  const char* count_text = std::getenv("LISTEN_FDS");
  const char* names_text = std::getenv("LISTEN_FDNAMES");
  const char* pid_text = std::getenv("LISTEN_PID");
  if (count_text && names_text && (!pid_text || std::to_string(::getpid()) == pid_text)) {
    int count = 0;
    std::string_view t = count_text;
    std::from_chars(t.data(), t.data() + t.size(), count);
    std::vector<std::string> names = split(names_text, ':');
    for (int i = 0; i < count && i < static_cast<int>(names.size()); i++) {
      int fd = 3 + i;
      int flags = ::fcntl(fd, F_GETFD);
      if (flags < 0) continue;
      ::fcntl(fd, F_SETFD, flags | FD_CLOEXEC);
      out[names[static_cast<std::size_t>(i)]] = Fd(fd);
    }
  }
  ::unsetenv("LISTEN_FDS");
  ::unsetenv("LISTEN_FDNAMES");
  ::unsetenv("LISTEN_PID");
  return out;
}

}  // namespace rehome
