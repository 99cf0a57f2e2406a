// An application, an nginx and clients for tests.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "sys/fs.h"
#include "sys/net.h"
#include "sys/process.h"
#include "sys/testing/free_port.h"

namespace rehome::testing {


// Threads of which the finished ones are joined as others are added.
class Sessions {
 public:
  ~Sessions();
  void add(std::function<void()> work);

 private:
  struct Session {
    std::atomic<bool> done{false};
    std::thread thread;
  };
  std::list<Session> sessions_;
};

// Answers every request with "NAME METHOD TARGET host=HOST body=BYTES". Of /slow?MS it waits first, /events sends a line
// each 20 ms for ever, an Upgrade becomes an echo.
class Application {
 public:
  Application(std::string name, const Address& at);
  ~Application();
  std::atomic<std::int64_t> connections{0}, requests{0};

 private:
  void serve(const Fd& fd);
  std::string name_;
  Fd listener_;
  std::atomic<bool> stop_{false};
  Sessions sessions_;
  std::thread thread_;
};

struct Answer {
  int status = 0;  // 0: no answer
  std::string head, body;
};

// One request on a connection that stays usable afterwards; status 0 when the connection breaks.
class Browser {
 public:
  explicit Browser(const Address& at) : at_(at) {}
  Answer ask(const std::string& target, const std::string& headers = {}, const std::string& body = {}, Millis wait = Millis(15000));
  void connect();
  bool connected() const { return bool(fd_); }
  void close() { in_.reset(), fd_.reset(); }
  Fd& fd() { return fd_; }
  Reader& in() { return *in_; }

 private:
  Address at_;
  Fd fd_;
  std::optional<Reader> in_;
};

Answer ask_once(const Address& at, const std::string& target = "/", const std::string& headers = {}, const std::string& body = {});

// Clients that ask without pause, each request on a connection of its own, or all of a client's on one.
class Load {
 public:
  Load(const Address& at, int clients, bool keep_alive, std::string headers = {});
  ~Load() { stop(); }
  void stop();
  std::atomic<std::int64_t> good{0}, bad{0}, broken{0};  // broken: the connection ended before an answer
  std::atomic<std::int64_t> longest_us{0};
  std::string first_bad();
  std::map<std::string, std::int64_t> by_name();         // first word of the body -> answers

 private:
  void client(const Address& at, bool keep_alive, const std::string& headers);
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::string first_bad_;
  std::map<std::string, std::int64_t> by_name_;
  std::vector<std::thread> threads_;
};

// nginx with `site` inside its http block, in a directory of its own; its files are DIR/nginx.conf and DIR/site.conf.
class Nginx {
 public:
  explicit Nginx(const std::string& site, const std::string& http = {});
  ~Nginx();
  std::string conf() const { return dir_.path() + "/nginx.conf"; }
  std::string site() const { return dir_.path() + "/site.conf"; }
  std::string errors() const { return read_file(dir_.path() + "/error.log"); }

 private:
  TempDir dir_;
  std::unique_ptr<Child> child_;
};

}  // namespace rehome::testing
