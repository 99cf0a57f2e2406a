#include "stores/postgres/testing/load.h"

#include <random>

namespace rehome::testing {

std::string Load::schema(int tables) {
  std::string sql =
      "CREATE TABLE history(token text PRIMARY KEY, n bigserial, amount bigint NOT NULL);"
      "CREATE TABLE account(id int PRIMARY KEY, balance bigint NOT NULL);"
      "INSERT INTO account SELECT i, 0 FROM generate_series(0, 999) i;"
      "CREATE TABLE log(at timestamptz DEFAULT now(), line text);"   // keyless
      "CREATE TABLE churn(id bigserial PRIMARY KEY, body text);";
  for (int i = 0; i < tables; i++)
    sql += "CREATE TABLE filler_" + std::to_string(i) + "(id bigserial PRIMARY KEY, a int, b text);";
  return sql;
}

Load::Load(std::vector<const PgServer*> servers, std::string database, int threads)
    : servers_(std::move(servers)), database_(std::move(database)) {
  for (int i = 0; i < threads; i++) threads_.emplace_back([this, i] { client(i); });
}

void Load::stop() {
  stop_ = true;
  threads_.clear();
}

double Load::longest_gap() {
  std::lock_guard lock(mutex_);
  return std::exchange(gap_, 0);
}

void Load::client(int number) {
  std::mt19937 random(static_cast<unsigned>(number) * 7919 + 1);
  std::unique_ptr<PgSession> session;
  std::size_t at = 0;
  std::int64_t i = 0;
  Ticks last = system_clock().now();
  while (!stop_) {
    std::size_t to = to_;
    try {
      if (!session || session->broken() || at != to) {
        session.reset();
        session = servers_[to]->session(database_, "load");
        session->exec("SET search_path = public; SET synchronous_commit = on");
        at = to;
      }
    } catch (const Error&) {
      broken_++;
      system_clock().sleep(Millis(5));
      continue;
    }
    std::string token = std::to_string(number) + "-" + std::to_string(i++);
    std::int64_t amount = static_cast<std::int64_t>(random() % 1000);
    std::string account = std::to_string(random() % 1000);
    std::string sql = "BEGIN; INSERT INTO history(token, amount) VALUES ('" + token + "', " + std::to_string(amount) +
                      "); UPDATE account SET balance = balance + " + std::to_string(amount) + " WHERE id = " + account + ";";
    if (i % 4 == 0) sql += "INSERT INTO log(line) VALUES ('" + token + "');";
    if (i % 3 == 0) sql += "INSERT INTO churn(body) VALUES (repeat('" + token + "', 50)); DELETE FROM churn WHERE id IN (SELECT id FROM churn ORDER BY id LIMIT 1);";
    sql += "COMMIT";
    try {
      session->exec(sql);
      acknowledged_++;
      Ticks now = system_clock().now();
      std::lock_guard lock(mutex_);
      gap_ = std::max(gap_, ms_between(last, now));
      last = now;
      amounts_[token] = amount;
    } catch (const PgError& e) {
      if (session->broken()) {
        broken_++;
        std::lock_guard lock(mutex_);
        unknown_.insert(token);
      } else {
        refused_++;
        try {
          session->exec("ROLLBACK");
        } catch (const Error&) {
        }
      }
    } catch (const Error&) {
      broken_++;
      std::lock_guard lock(mutex_);
      unknown_.insert(token);
      session.reset();
    }
  }
}

std::vector<std::string> Load::judge(const PgServer& server) {
  std::vector<std::string> wrong;
  auto s = server.session(database_);
  std::map<std::string, std::int64_t> there;
  std::int64_t sum = 0;
  for (auto& r : s->query("SELECT token, amount FROM public.history")) {
    there[*r[0]] = std::stoll(*r[1]);
    sum += std::stoll(*r[1]);
  }
  std::lock_guard lock(mutex_);
  for (auto& [token, amount] : amounts_) {
    auto it = there.find(token);
    if (it == there.end())
      wrong.push_back("acknowledged write " + token + " is lost");
    else if (it->second != amount)
      wrong.push_back("write " + token + " has another amount");
  }
  for (auto& [token, amount] : there)
    if (!amounts_.contains(token) && !unknown_.contains(token)) wrong.push_back("refused write " + token + " is there");
  // The other table of the same transactions: applied exactly once.
  std::int64_t balance = s->number("SELECT sum(balance) FROM public.account");
  if (balance != sum) wrong.push_back("balances are " + std::to_string(balance) + ", history says " + std::to_string(sum));
  return wrong;
}

}  // namespace rehome::testing
