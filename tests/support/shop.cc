// rehome-shop: a small web shop with the habits of real services. An order is acknowledged only when its rows are
// committed and its receipt file is durable; a repeated request with the same key finds the first one's result.
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/json.h"
#include "base/text.h"
#include "support/http.h"
#include "support/options.h"
#include "support/pg.h"
#include "support/receipt.h"
#include "support/shop_schema.h"
#include "sys/fs.h"
#include "sys/net.h"

namespace rehome::testing {
namespace {

struct Line {
  int product = 1;
  int quantity = 1;
};

struct Reply {
  int status = 200;
  std::string body;
};

Reply refusal(int status, const std::string& message) { return {status, dump_line({{"error", message}})}; }

bool usable_key(const std::string& key) {
  return !key.empty() && key.size() <= 100 && key[0] != '.' && std::all_of(key.begin(), key.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '-' || c == '_' || c == '.';
  });
}

std::vector<Line> lines_of(const std::string& key, const std::string& body) {
  std::map<int, int> by_product;  // ordered: all orders lock products in the same order, so none deadlocks
  if (!body.empty()) {
    Json j = parse_json(body, "the order");
    if (j.contains("lines"))
      for (auto& l : j.at("lines"))
        by_product[static_cast<int>(get_int(l, "product"))] += static_cast<int>(get_int(l, "quantity", 1));
  }
  if (by_product.empty()) {
    const std::uint32_t h = key_hash(key);
    for (unsigned i = 0; i < 1 + h % 3; ++i) by_product[static_cast<int>(1 + (h / 7 + i * 31) % kProducts)] = 1 + static_cast<int>(i);
  }
  std::vector<Line> lines;
  for (auto [product, quantity] : by_product) lines.push_back({product, quantity});
  return lines;
}

// A file that is whole and durable once this returns; several threads may write the same one at once.
void save_file(const std::string& directory, const std::string& name,
               const std::function<void(const Fd&, const std::string&)>& write) {
  static std::atomic<unsigned> count{0};
  if (!exists(directory)) {
    make_directories(directory, 0755);
    fsync_directory(parent_path(directory));
  }
  const std::string temp = directory + "/.new." + std::to_string(::getpid()) + "." + std::to_string(++count);
  Fd fd(::open(temp.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (!fd) throw errno_error(errno, "create", temp);
  try {
    write(fd, temp);
    if (::fsync(fd.get()) != 0) throw errno_error(errno, "fsync", temp);
    if (::rename(temp.c_str(), (directory + "/" + name).c_str()) != 0) throw errno_error(errno, "rename", temp);
  } catch (...) {
    ::unlink(temp.c_str());
    throw;
  }
  fsync_directory(directory);
}

class Orders {
 public:
  Orders(std::string conninfo, std::string files) : db_(std::move(conninfo)), files_(std::move(files)) {}

  Reply place(const std::string& key, const std::string& body) {
    if (!usable_key(key)) return refusal(400, "an Idempotency-Key of letters, digits and -_. is required");
    std::vector<Line> lines;
    try {
      lines = lines_of(key, body);
    } catch (const Error& e) {
      return refusal(400, e.what());
    }
    bool created = false;
    std::string id;
    db_.begin();
    try {
      long long total = 0;
      std::vector<long long> prices;
      for (auto& l : lines) {
        auto r = db_.run("SELECT price FROM products WHERE id = $1", {std::to_string(l.product)});
        if (PQntuples(r.get()) == 0 || l.quantity < 1) {
          db_.rollback();
          return refusal(400, "no product " + std::to_string(l.product));
        }
        prices.push_back(std::stoll(value(r, 0, 0)));
        total += prices.back() * l.quantity;
      }
      const auto customer = 1 + key_hash(key) % kCustomers;
      auto r = db_.run("INSERT INTO orders (key, customer, total) VALUES ($1, $2, $3) ON CONFLICT (key) DO NOTHING "
                       "RETURNING id", {key, std::to_string(customer), std::to_string(total)});
      if (PQntuples(r.get()) == 1) {
        created = true;
        id = value(r, 0, 0);
        for (std::size_t i = 0; i < lines.size(); ++i) {
          const std::string product = std::to_string(lines[i].product), quantity = std::to_string(lines[i].quantity);
          db_.run("INSERT INTO order_lines (order_id, line, product, quantity, price) VALUES ($1, $2, $3, $4, $5)",
                  {id, std::to_string(i + 1), product, quantity, std::to_string(prices[i])});
          db_.run("UPDATE products SET stock = stock - $2 WHERE id = $1", {product, quantity});
        }
        db_.run("INSERT INTO outbox (key, payload) VALUES ($1, jsonb_build_object('order', $2::bigint))", {key, id});
        db_.commit();
      } else {
        auto old = db_.run("SELECT id FROM orders WHERE key = $1", {key});
        if (PQntuples(old.get()) != 1) throw SqlError("the order is being taken back", "40001");
        id = value(old, 0, 0);
        db_.commit();
      }
    } catch (...) {
      db_.rollback();
      throw;
    }
    // The receipt comes after the commit: a receipt without an order would be a lie, an order without a receipt is
    // mended by the repeated request, which the missing answer asks for.
    const std::string receipt = dump_line({{"key", key}, {"order", std::stoll(id)}});
    const std::string directory = receipt_directory(files_, key);
    if (!created && exists(receipt_path(files_, key)))
      fsync_directory(directory);  // another thread may have renamed it and not got further
    else
      save_file(directory, key + ".json", [&](const Fd& fd, const std::string& what) { write_all(fd.get(), receipt, what); });
    return {created ? 201 : 200, receipt};
  }

  Reply show(const std::string& key) {
    auto r = db_.run("SELECT o.id, o.total, o.total_text, (SELECT count(*) FROM order_lines WHERE order_id = o.id) "
                     "FROM orders o WHERE key = $1", {key});
    if (PQntuples(r.get()) == 0) return refusal(404, "no such order");
    return {200, dump_line({{"key", key},
                            {"order", std::stoll(value(r, 0, 0))},
                            {"total", std::stoll(value(r, 0, 1))},
                            {"total_text", value(r, 0, 2)},
                            {"lines", std::stoll(value(r, 0, 3))},
                            {"receipt", exists(receipt_path(files_, key))}})};
  }

  Reply health() {
    try {
      db_.run("SELECT id FROM products LIMIT 1");
      return {200, "ok"};
    } catch (const SqlError& e) {
      return {503, e.what()};
    }
  }

  void close() { db_.close(); }

 private:
  Session db_;
  std::string files_;
};

struct Connection {
  explicit Connection(Fd f) : fd(std::move(f)), in(fd) {}
  Fd fd;
  Reader in;
};

class Shop {
 public:
  Shop(Fd listener, std::string conninfo, std::string files)
      : listener_(std::move(listener)),
        poll_(::epoll_create1(EPOLL_CLOEXEC)),
        wake_(::eventfd(0, EFD_CLOEXEC)),
        conninfo_(std::move(conninfo)),
        files_(std::move(files)) {
    ::fcntl(listener_.get(), F_SETFL, O_NONBLOCK);
    watch(listener_.get(), &listener_, EPOLL_CTL_ADD);
    epoll_event e{.events = EPOLLIN, .data = {.ptr = &wake_}};
    ::epoll_ctl(poll_.get(), EPOLL_CTL_ADD, wake_.get(), &e);
  }

  void start(long long threads) {
    for (long long i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  // Requests that have begun are finished; idle connections end with the process.
  void stop() {
    stopping_ = true;
    const std::uint64_t one = 1;
    if (::write(wake_.get(), &one, sizeof one) < 0) std::perror("rehome-shop: wake");
    for (auto& w : workers_) w.join();
  }

 private:
  void watch(int fd, void* what, int operation) {
    // One shot: an event is one worker's until it asks for the next, so no two serve one connection.
    epoll_event e{.events = EPOLLIN | EPOLLRDHUP | EPOLLONESHOT, .data = {.ptr = what}};
    if (::epoll_ctl(poll_.get(), operation, fd, &e) != 0) throw errno_error(errno, "epoll_ctl", "a connection");
  }

  void work() {
    Orders orders(conninfo_, files_);
    while (!stopping_) {
      epoll_event e;
      if (::epoll_wait(poll_.get(), &e, 1, 1000) != 1 || e.data.ptr == &wake_) continue;
      if (e.data.ptr == &listener_) {
        accept_all();
        continue;
      }
      std::unique_ptr<Connection> c(static_cast<Connection*>(e.data.ptr));
      try {
        bool keep = true;
        while (keep && !stopping_) {
          keep = serve(c, orders);
          if (keep && !c->in.has_buffered()) {
            watch(c->fd.get(), c.get(), EPOLL_CTL_MOD);
            (void)c.release();  // the poll set owns it now
            keep = false;
          }
        }
      } catch (const std::exception&) {
        // A client that breaks off is no event worth a line.
      }
    }
  }

  void accept_all() {
    for (;;) {
      Fd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!fd) {
        if (errno == EMFILE || errno == ENFILE) system_clock().sleep(Millis(20));
        break;
      }
      auto c = std::make_unique<Connection>(std::move(fd));
      watch(c->fd.get(), c.get(), EPOLL_CTL_ADD);
      (void)c.release();
    }
    watch(listener_.get(), &listener_, EPOLL_CTL_MOD);
  }

  // One request; false when the connection is done with.
  bool serve(std::unique_ptr<Connection>& c, Orders& orders) {
    const Deadline deadline = Deadline::in(Millis(30'000));
    auto head = read_head(c->in, deadline);
    if (!head) return false;
    const std::string &method = head->first[0], &target = head->first[1];
    const std::string path = target.substr(0, target.find('?'));
    if (head->header("expect") == "100-continue") send_all(c->fd, "HTTP/1.1 100 Continue\r\n\r\n", deadline);
    const bool keep = head->keeps_alive() && !stopping_;
    Reply reply;
    try {
      const std::string body = read_body(*head, c->in, deadline);
      if (method == "POST" && path == "/order") reply = orders.place(head->header("idempotency-key"), body);
      else if (method == "GET" && path.rfind("/order/", 0) == 0) reply = orders.show(path.substr(7));
      else if (method == "GET" && path == "/health") reply = orders.health();
      else reply = refusal(404, "nothing here");
    } catch (const SqlError& e) {
      complain(e.what());
      reply = refusal(503, e.what());
    } catch (const Error& e) {
      if (e.code == Code::unreachable || e.code == Code::timeout) throw;
      complain(e.what());
      reply = refusal(503, e.what());
    }
    send_all(c->fd, answer(reply.status, reply.body, keep, path == "/health" ? "text/plain" : "application/json"), deadline);
    return keep;
  }

  // At most one line a second: a refused write repeats hundreds of times.
  void complain(const char* what) {
    std::lock_guard lock(mutex_);
    const Ticks now = system_clock().now();
    if (now - last_complaint_ < 1'000'000'000) return;
    last_complaint_ = now;
    std::fprintf(stderr, "rehome-shop: %s\n", what);
  }

  Fd listener_, poll_, wake_;
  std::string conninfo_, files_;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  Ticks last_complaint_ = -1'000'000'000;
};

// While `log` exists: appends to the side's own file in the tree, over and over, and writes down what came of it. It is frozen, closed
// out and moved with the service, as its receipts are; what two sides have written down shows whether both could write at once.
void probe_files(const std::string& files, const std::string& side, const std::string& log, const std::atomic<bool>& stop) {
  for (; !stop; system_clock().sleep(Millis(20))) {
    Fd out(::open(log.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
    if (!out) continue;
    const std::int64_t start = system_clock().now() / 1000;
    Json line = {{"side", side}, {"start_us", start}};
    std::string outcome = "refused";
    try {
      make_directories(files + "/probe", 0755);
      const std::string path = files + "/probe/" + side;
      Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
      if (!fd) throw errno_error(errno, "open", path);
      outcome = "unknown";
      write_all(fd.get(), "\n" + std::to_string(start) + "\n", path);  // a full disk may have left half a line
      if (::fdatasync(fd.get()) != 0) throw errno_error(errno, "fsync", path);
      outcome = "accepted";
    } catch (const Error& e) {
      line["reason"] = e.message;
    }
    line["end_us"] = system_clock().now() / 1000;
    line["outcome"] = outcome;
    try {
      write_all(out.get(), dump_line(line) + "\n", log);
    } catch (const Error& e) {
      std::fprintf(stderr, "rehome-shop: %s\n", e.what());
    }
  }
}

int run_shop(int argc, char** argv) {
  Options o(argc, argv,
            {"listen", "db", "files", "threads", "pid-file", "tables", "rows", "large-objects", "probe-side", "probe-log"},
            {"init", "unlogged", "keyless"});
  if (o.has("init")) {
    Session db(o.need("db"));
    create_schema(db, {.extra_tables = o.number("tables", 0),
                       .history_orders = o.number("rows", 0),
                       .large_objects = o.number("large-objects", 0),
                       .unlogged = o.has("unlogged"),
                       .keyless = o.has("keyless")});
    return 0;
  }
  ::umask(022);
  // Blocked before any thread starts, so that only the wait below sees them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  Address where = Address::parse(o.need("listen"));
  const std::string files = o.need("files");
  make_directories(files, 0755);
  Fd listener = listen_on(where, 0666);
  if (!where.is_unix()) where.port = local_port(listener);
  Shop shop(std::move(listener), o.need("db"), files);
  shop.start(std::max(1LL, o.number("threads", 8)));
  if (o.has("pid-file")) write_durably(o.need("pid-file"), std::to_string(::getpid()) + "\n", 0644);
  std::printf("listening on %s\n", where.text().c_str());
  std::fflush(stdout);
  std::atomic<bool> stop{false};
  std::jthread prober;
  if (o.has("probe-side"))
    prober = std::jthread([&stop, files, side = o.need("probe-side"), log = o.need("probe-log")] { probe_files(files, side, log, stop); });
  int signal = 0;
  ::sigwait(&signals, &signal);
  stop = true;
  shop.stop();
  if (o.has("pid-file")) ::unlink(o.need("pid-file").c_str());
  return 0;
}

}  // namespace
}  // namespace rehome::testing

int main(int argc, char** argv) {
  try {
    return rehome::testing::run_shop(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rehome-shop: %s\n", e.what());
    return 2;
  }
}
