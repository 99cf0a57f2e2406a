#include "traffic/testing/web.h"

#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "base/error.h"
#include "base/text.h"

namespace rehome::testing {
namespace {

// The value of a header in a head, empty when it is not there.
std::string header(const std::string& head, std::string name) {
  for (const auto& line : split(head, '\n')) {
    auto colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::string key = line.substr(0, colon);
    std::transform(key.begin(), key.end(), key.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (key == name) return std::string(trim(std::string_view(line).substr(colon + 1)));
  }
  return {};
}

std::optional<std::string> read_head(Reader& in, Deadline deadline) {
  std::string head;
  while (auto line = in.line(deadline)) {
    if (line->empty() || *line == "\r") return head;
    head += *line + "\n";
  }
  return std::nullopt;
}

std::string read_chunks(Reader& in, Deadline deadline) {
  std::string body;
  while (auto size = in.line(deadline)) {
    std::size_t n = std::stoul(*size, nullptr, 16);
    body += in.exactly(n, deadline);
    in.line(deadline);
    if (n == 0) break;
  }
  return body;
}

}  // namespace


Sessions::~Sessions() {
  for (auto& s : sessions_) s.thread.join();
}

void Sessions::add(std::function<void()> work) {
  std::erase_if(sessions_, [](Session& s) {
    if (!s.done) return false;
    s.thread.join();
    return true;
  });
  Session& s = sessions_.emplace_back();
  s.thread = std::thread([&s, work = std::move(work)] {
    work();
    s.done = true;
  });
}

Application::Application(std::string name, const Address& at) : name_(std::move(name)), listener_(listen_on(at, 0666)) {
  thread_ = std::thread([this] {
    while (auto fd = accept_from(listener_, {}, &stop_)) {
      connections++;
      sessions_.add([this, fd = std::make_shared<Fd>(std::move(*fd))] {
        try {
          serve(*fd);
        } catch (const Error&) {
        }
      });
    }
  });
}

Application::~Application() {
  stop_ = true;
  thread_.join();
}

void Application::serve(const Fd& fd) {
  Reader in(fd);
  while (!stop_) {
    std::optional<std::string> head;
    try {
      head = read_head(in, Deadline::in(Millis(200)));
    } catch (const Error& e) {
      if (e.code == Code::timeout) continue;
      throw;
    }
    if (!head) return;
    requests++;
    auto words = split(head->substr(0, head->find('\n')), ' ');
    std::string target = words.size() > 1 ? words[1] : "";
    std::string body;
    if (auto length = header(*head, "content-length"); !length.empty())
      body = in.exactly(std::stoul(length), Deadline::in(Millis(20000)));
    if (header(*head, "transfer-encoding") == "chunked") body = read_chunks(in, Deadline::in(Millis(20000)));
    if (!header(*head, "upgrade").empty()) {
      send_all(fd, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
      send_all(fd, in.take_buffered());
      char chunk[4096];
      while (!stop_) {
        ssize_t n = ::recv(fd.get(), chunk, sizeof chunk, MSG_DONTWAIT);
        if (n == 0) return;
        if (n < 0)
          system_clock().sleep(Millis(2));
        else
          send_all(fd, {chunk, static_cast<std::size_t>(n)});
      }
      return;
    }
    if (target == "/events") {
      send_all(fd, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Accel-Buffering: no\r\nConnection: close\r\n\r\n");
      while (!stop_) {
        send_all(fd, "data: tick " + name_ + "\n\n");
        system_clock().sleep(Millis(20));
      }
      return;
    }
    if (target.starts_with("/slow?"))
      for (long left = std::stol(target.substr(6)); left > 0 && !stop_; left -= 20) system_clock().sleep(Millis(20));
    std::string text = name_ + " " + words[0] + " " + target + " host=" + header(*head, "host") + " body=" + std::to_string(body.size());
    bool close = header(*head, "connection") == "close" || words.back().starts_with("HTTP/1.0");
    std::string extra = target == "/moved" ? "Location: http://" + header(*head, "host") + "/there\r\n" : "";
    send_all(fd, std::string("HTTP/1.1 ") + (extra.empty() ? "200 OK" : "302 Found") + "\r\n" + extra + "Content-Length: " + std::to_string(text.size()) + "\r\n" +
                     (close ? "Connection: close\r\n" : "") + "\r\n" + text);
    if (close) return;
  }
}

void Browser::connect() {
  close();
  fd_ = connect_to(at_, Deadline::in(Millis(5000)));
  in_.emplace(fd_);
}

Answer Browser::ask(const std::string& target, const std::string& headers, const std::string& body, Millis wait) {
  Answer a;
  try {
    if (!fd_) connect();
    Deadline deadline = Deadline::in(wait);
    std::string request = (body.empty() ? "GET " : "POST ") + target + " HTTP/1.1\r\nHost: test\r\n" + headers;
    if (!body.empty()) request += "Content-Length: " + std::to_string(body.size()) + "\r\n";
    send_all(fd_, request + "\r\n" + body, deadline);
    auto head = read_head(*in_, deadline);
    if (!head || head->size() < 12) {
      close();
      return a;
    }
    a.head = *head;
    if (auto length = header(a.head, "content-length"); !length.empty())
      a.body = in_->exactly(std::stoul(length), deadline);
    else if (header(a.head, "transfer-encoding") == "chunked")
      a.body = read_chunks(*in_, deadline);
    a.status = std::stoi(a.head.substr(9, 3));
    if (header(a.head, "connection") == "close") close();
  } catch (const Error&) {
    a.status = 0;
    close();
  }
  return a;
}

Answer ask_once(const Address& at, const std::string& target, const std::string& headers, const std::string& body) {
  return Browser(at).ask(target, "Connection: close\r\n" + headers, body);
}

Load::Load(const Address& at, int clients, bool keep_alive, std::string headers) {
  if (!keep_alive) headers += "Connection: close\r\n";
  for (int i = 0; i < clients; i++) threads_.emplace_back([this, at, keep_alive, headers] { client(at, keep_alive, headers); });
}

void Load::stop() {
  stop_ = true;
  for (auto& t : threads_) t.join();
  threads_.clear();
}

std::string Load::first_bad() {
  std::lock_guard lock(mutex_);
  return first_bad_;
}

std::map<std::string, std::int64_t> Load::by_name() {
  std::lock_guard lock(mutex_);
  return by_name_;
}

void Load::client(const Address& at, bool keep_alive, const std::string& headers) {
  Browser browser(at);
  while (!stop_) {
    if (!keep_alive) browser.close();
    Ticks from = system_clock().now();
    Answer a = browser.ask("/", headers);
    auto us = (system_clock().now() - from) / 1000;
    std::int64_t longest = longest_us;
    while (us > longest && !longest_us.compare_exchange_weak(longest, us)) {
    }
    if (a.status == 200) {
      good++;
      std::lock_guard lock(mutex_);
      by_name_[a.body.substr(0, a.body.find(' '))]++;
    } else {
      (a.status == 0 ? broken : bad)++;
      std::lock_guard lock(mutex_);
      if (a.status != 0 && first_bad_.empty()) first_bad_ = a.head + a.body;
    }
    system_clock().sleep(Millis(1));
  }
}

Nginx::Nginx(const std::string& site, const std::string& http) : dir_("rehome-nginx") {
  // Workers run as another account and must reach the directory's sockets and logs.
  ::chmod(dir_.path().c_str(), 0755);
  std::string d = dir_.path();
  write_durably(d + "/nginx.conf", "user root;\nworker_processes 2;\npid " + d + "/nginx.pid;\nerror_log " + d +
                                       "/error.log;\nevents { worker_connections 512; }\nhttp {\n  access_log off;\n  keepalive_timeout 60;\n" +
                                       "  client_body_temp_path " + d + "/body; proxy_temp_path " + d + "/proxy; fastcgi_temp_path " + d + "/f; uwsgi_temp_path " + d +
                                       "/u; scgi_temp_path " + d + "/s;\n" + http + "  include site.conf;\n}\n");
  write_durably(d + "/site.conf", site, 0640);
  child_ = std::make_unique<Child>(Command{.argv = {"nginx", "-c", conf(), "-g", "daemon off;"}}, Child::Pipes{});
  Deadline start = Deadline::in(Millis(5000));
  while (!exists(d + "/nginx.pid") || trim(read_file(d + "/nginx.pid")).empty()) {
    if (start.passed() || child_->poll()) throw Error(Code::io, "nginx does not start: " + errors());
    system_clock().sleep(Millis(10));
  }
}

Nginx::~Nginx() {
  // Politely to the master: its workers would outlive its group's end otherwise.
  child_->kill(15);
  try {
    child_->wait(Deadline::in(Millis(5000)));
  } catch (const Error&) {
  }
}

}  // namespace rehome::testing
