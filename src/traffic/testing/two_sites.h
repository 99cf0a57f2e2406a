// Both sites with an application behind an nginx each, and the nginx driver between them.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "traffic/testing/web.h"
#include "traffic/testing/world.h"

namespace rehome::testing {

inline Address loopback(std::uint16_t port) { return {.host = "127.0.0.1", .port = port}; }
inline std::string text(std::uint16_t port) { return loopback(port).text(); }

struct Ports {
  std::uint16_t front = free_port(), application = free_port(), gate = free_port();
};

inline std::string usual_site(const Ports& p) {
  return "# the shop\nupstream shop {\n  server " + text(p.application) + ";  # one\n  keepalive 16;\n}\n"
         "map $http_upgrade $upgrade { default upgrade; '' ''; }\n"
         "server {\n  listen " + text(p.front) + ";\n  client_max_body_size 8m;\n  location / {\n    proxy_http_version 1.1;\n    proxy_set_header Connection \"\";\n"
         "    proxy_set_header Host $host;\n    proxy_pass http://shop;\n  }\n"
         "  location /ws {\n    proxy_http_version 1.1;\n    proxy_set_header Upgrade $http_upgrade;\n    proxy_set_header Connection $upgrade;\n"
         "    proxy_pass http://shop;\n  }\n  location /events { proxy_pass http://shop; proxy_buffering off; }\n"
         "  location /streamed { proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_request_buffering off; proxy_pass http://shop; }\n}\n";
}

// Both sites with an application "source" or "target" behind an nginx each.
struct TwoSites {
  explicit TwoSites(const std::function<std::string(const Ports&)>& site = usual_site)
      : nginx{std::make_unique<Nginx>(site(ports.source)), std::make_unique<Nginx>(site(ports.target))},
        applications{std::make_unique<Application>("source", loopback(ports.source.application)),
                     std::make_unique<Application>("target", loopback(ports.target.application))} {
    Deployment d;
    d.name = "test";
    TrafficConfig t;
    t.name = "web";
    t.kind = TrafficConfig::Kind::nginx;
    for (Side s : {Side::source, Side::target}) {
      t.on[s].listen = text(ports[s].gate);
      t.on[s].application = text(ports[s].application);
      t.on[s].files = {nginx[s]->site()};
      t.on[s].nginx_conf = nginx[s]->conf();
    }
    d.traffic.push_back(t);
    d.drain_deadline = Millis(1500);
    world = std::make_unique<World>(d);
    traffic = std::move(make_traffic(world->deployment).at(0));
  }
  Address front(Side s) { return loopback(ports[s].front); }
  std::string lines() {
    std::string all;
    for (const auto& l : world->lines) all += l + "\n";
    return all;
  }

  BySide<Ports> ports;
  BySide<std::unique_ptr<Nginx>> nginx;
  BySide<std::unique_ptr<Application>> applications;
  std::unique_ptr<World> world;
  std::unique_ptr<Traffic> traffic;
};

}  // namespace rehome::testing
