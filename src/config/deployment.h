// config: rehome.yaml becomes a Deployment, or a list of everything that is wrong with it. Nothing here talks to a site.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"

namespace rehome {

enum class Side { source, target };
inline Side other(Side s) { return s == Side::source ? Side::target : Side::source; }
inline std::string_view side_name(Side s) { return s == Side::source ? "source" : "target"; }

// Two of a kind, one a side.
template <class T>
struct BySide {
  T source{}, target{};
  T& operator[](Side s) { return s == Side::source ? source : target; }
  const T& operator[](Side s) const { return s == Side::source ? source : target; }
};

struct SshHost {
  std::string host;                  // user@host, as ssh takes it
  int port = 0;                      // 0: ssh's own choice
  std::string key;                   // identity file; empty: ssh's own choice
  std::vector<std::string> options;  // -o values
};

// Where a secret comes from; its value never is in this structure.
struct SecretRef {
  enum class From { none, environment, file, pgpass } from = From::none;
  std::string name;  // variable or path
};

struct SiteConfig {
  bool local = true;
  SshHost ssh;            // when not local
  std::string state;      // empty: the default place, see docs/PROTOCOL.md
  std::string boot;       // "", "systemd", "cron", "none" or "directory:/path": what brings the supervisor back
  std::string psql;       // program path where it is not in PATH
};

struct LinkConfig {
  Side initiator = Side::target;  // the site that can reach the other
  SshHost ssh;                    // the other site as seen from the initiator; no host: both are this machine
};

struct FilesConfig {
  BySide<std::string> path;           // absolute directories
  std::vector<std::string> include;   // rsync patterns
  std::vector<std::string> exclude;
  bool owner_by_name = true;          // else by number
  bool merge = false;                 // a target that has files is an error unless set (left for later: refused)
};

struct PostgresServer {
  std::string host;      // numeric or name as seen from that site, or a socket directory starting with '/'
  int port = 5432;
  std::string user = "postgres";
  std::string os_user;   // connect as this account (peer authentication)
  SecretRef password;
  std::string admin_database = "postgres";
};

struct PostgresConfig {
  BySide<PostgresServer> server;
  std::vector<std::string> databases;  // empty: all of the cluster
  enum class Ddl { refuse, block } ddl = Ddl::refuse;
  bool roles = true;
};

struct StoreConfig {
  std::string name;
  enum class Kind { files, postgres } kind = Kind::files;
  FilesConfig files;
  PostgresConfig postgres;
};

struct ServiceSide {
  std::string unit;                  // systemd
  std::vector<std::string> start, stop;  // command
  std::string pid_file;              // command: whose processes are frozen
};

struct ServiceConfig {
  std::string name;
  enum class Runtime { systemd, command } runtime = Runtime::command;
  BySide<ServiceSide> on;
  bool warm = true;                  // the target's starts before the pause
  Millis start_time{2000};           // where it is not warm: what its start is expected to add to the pause
  Millis start_timeout{30000};
};

struct TrafficSide {
  std::string listen;                // gate: where clients, or the proxy, arrive
  std::string application;           // where the application listens
  std::vector<std::string> files;    // nginx: configuration files whose upstreams are edited
  std::string nginx = "nginx";       // program
  std::string nginx_conf;            // main configuration file, empty: the built-in one
  std::string front;                 // URL of the site's own front door, for the canary
};

struct TrafficConfig {
  std::string name;
  enum class Kind { gate, nginx } kind = Kind::gate;
  // gate: how the application's own address comes to the gate.
  enum class Take { listen, redirect, unix_socket } take = Take::listen;
  BySide<TrafficSide> on;
  int proxy_protocol = 0;            // version of the header that tells the application the client's address; 0: none
  bool accept_proxy = false;         // clients come from a proxy that sends such a header, of either version
  int max_waiting = 10000;
  Millis max_wait{30000};
  bool refuse_with_503 = true;       // what is beyond these; else its connection is closed without an answer
  enum class Longer { back_out, cut } longer_requests = Longer::back_out;
};

struct CheckConfig {
  std::string name;
  enum class Kind { http, sql, command } kind = Kind::http;
  enum class Where { source, target, both } where = Where::both;
  std::string url;                   // a path alone ("/health") is asked for at the site's own front door: http_place()
  int status = 200;
  std::string body;                  // a substring; empty: any
  std::string store, database, sql;
  std::optional<std::string> expect; // what sql must answer; none: anything but an error
  std::vector<std::string> command;
  Millis timeout{5000};
  bool canary = false;               // also run inside the pause (read) ...
  bool write_canary = false;         // ... or after the commit, its failure reverses
};

struct Limits {
  std::int64_t wal_kept = 10'000'000'000;  // bytes the run's slots may hold back on the source
  std::int64_t bandwidth = 0;              // bytes a second; 0: none
  int jobs = 4;                            // parallel copies
};

struct Deployment {
  std::string name;
  std::string file;        // the path it was read from
  std::string hash;        // SHA-256 of the file, hex
  BySide<SiteConfig> site;
  LinkConfig link;
  std::vector<StoreConfig> stores;
  std::vector<ServiceConfig> services;
  std::vector<TrafficConfig> traffic;
  std::vector<CheckConfig> checks;
  Millis max_pause{1000};
  Millis drain_deadline{10000};
  Limits limits;

  // One store's part of limits.bandwidth, for they copy side by side; 0: no limit.
  std::int64_t store_bandwidth() const { return limits.bandwidth / std::max<std::int64_t>(1, static_cast<std::int64_t>(stores.size())); }
};

// What the services that are not warm are expected to add to a pause: they start one after the other. And the same in words.
Millis cold_start_time(const Deployment& d);
std::vector<std::string> cold_starts(const Deployment& d);

// Where an HTTP check asks at a site.
struct HttpPlace {
  std::string address;      // host:port or unix:/path, to connect to
  std::string host, path;   // of the request
  int proxy_protocol = 0;   // version of the PROXY header that is expected there; 0: none
};
// The check's URL, or its path at the site's first front door. `past_gate`: at the application behind it instead, where
// traffic_of() knows one: the gate leads to the side that serves.
HttpPlace http_place(const Deployment& d, const CheckConfig& check, Side side, bool past_gate);
// The traffic entry whose application, gate or front door the check's URL names by host and port, in this order; null: none.
const TrafficConfig* traffic_of(const Deployment& d, const CheckConfig& check, Side side);

}  // namespace rehome
