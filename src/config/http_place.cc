// Where the HTTP checks of a deployment ask.
#include "config/deployment.h"
#include "sys/net.h"

namespace rehome {
namespace {

struct Url {
  std::string host;      // with its port where one is written
  std::string address;   // host:port
  std::string path;
};

// `url`: an http:// one, as the reader accepts it.
Url parse_url(const std::string& url) {
  std::string rest = url.substr(url.find("://") + 3);
  auto end = rest.find_first_of("/?#");
  Url u;
  u.host = rest.substr(0, end);
  u.path = end == std::string::npos ? "" : rest.substr(end, rest.find('#') - end);
  if (!u.path.starts_with('/')) u.path = "/" + u.path;
  auto colon = u.host.rfind(':');
  bool port = colon != std::string::npos && (u.host[0] != '[' || u.host.find(']') < colon);
  u.address = port ? u.host : u.host + ":80";
  return u;
}

bool leads_to(const std::string& url_address, const std::string& address) {
  return !address.empty() && reach_the_same(Address::parse(url_address), Address::parse(address));
}

// A path is asked for at the first front door.
std::string url_at(const Deployment& d, const CheckConfig& check, Side side) {
  if (!check.url.starts_with("/")) return check.url;
  for (const auto& t : d.traffic)
    if (const std::string& front = t.on[side].front; !front.empty()) return "http://" + parse_url(front).host + check.url;
  return "http://" + check.url;
}

}  // namespace

const TrafficConfig* traffic_of(const Deployment& d, const CheckConfig& check, Side side) {
  std::string address = parse_url(url_at(d, check, side)).address;
  for (const auto& t : d.traffic)
    if (leads_to(address, t.on[side].application)) return &t;
  for (const auto& t : d.traffic)
    if (leads_to(address, t.on[side].listen) || (!t.on[side].front.empty() && leads_to(address, parse_url(t.on[side].front).address))) return &t;
  return nullptr;
}

HttpPlace http_place(const Deployment& d, const CheckConfig& check, Side side, bool past_gate) {
  Url u = parse_url(url_at(d, check, side));
  HttpPlace place{.address = u.address, .host = u.host, .path = u.path};
  const TrafficConfig* t = traffic_of(d, check, side);
  if (!t) return place;
  const std::string& application = t->on[side].application;
  if (past_gate) place.address = application;
  // Where its port is redirected, the gate takes what is asked there, and writes the header itself.
  if (t->take != TrafficConfig::Take::redirect && (past_gate || leads_to(u.address, application))) place.proxy_protocol = t->proxy_protocol;
  return place;
}

}  // namespace rehome
