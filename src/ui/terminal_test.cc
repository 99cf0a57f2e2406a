#include "ui/terminal.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <sstream>

#include "ui/text_view.h"

namespace rehome::ui {
namespace {

class StoppedClock : public Clock {
 public:
  Ticks now() override { return t; }
  std::int64_t wall_us() override { return t / 1000; }
  void sleep(Millis d) override { t += d.count() * 1'000'000; }
  Ticks t = 1'000'000'000;
};

Json copying(std::int64_t done, std::int64_t total, const std::string& detail = "") {
  return {{"kind", "progress"}, {"store", "db"}, {"phase", "copy"}, {"done", done}, {"total", total}, {"unit", "bytes"}, {"detail", detail}};
}

std::function<Window()> window(std::size_t columns, std::size_t rows = 0) {
  return [=] { return Window{columns, rows}; };
}

struct Screen {
  std::string out, err;
  bool alive = true;
  int writes = 0;
  StoppedClock clock;
  Terminal::Sink to_out() {
    return [this](std::string_view s) {
      writes++;
      if (alive) out += s;
      return alive;
    };
  }
  Terminal::Sink to_err() {
    return [this](std::string_view s) {
      err += s;
      return true;
    };
  }
};

// What a terminal shows after these bytes: cursor up, carriage return, clear to the end.
std::vector<std::string> shown(const std::string& bytes) {
  std::vector<std::string> lines{""};
  std::size_t at = 0;
  for (std::size_t i = 0; i < bytes.size(); i++) {
    if (bytes[i] == '\x1b') {
      std::size_t end = i + 2;
      std::size_t n = 0;
      while (std::isdigit(static_cast<unsigned char>(bytes[end]))) n = n * 10 + static_cast<std::size_t>(bytes[end++] - '0');
      if (bytes[end] == 'A') {
        EXPECT_LE(n, at) << "the block is erased beyond the screen's first line";
        at -= n;
      } else if (bytes[end] == 'J') {
        lines.resize(at + 1);
        lines[at].clear();
      }
      i = end;
    } else if (bytes[i] == '\n') {
      if (++at == lines.size()) lines.emplace_back();
    } else if (bytes[i] != '\r') {
      lines[at] += bytes[i];
    }
  }
  return lines;
}

TEST(Terminal, PlainLinesComeEveryTenSecondsAndAtTheEnd) {
  Screen s;
  Terminal t({}, s.to_out(), s.to_err(), window(0), s.clock);
  for (int i = 0; i <= 250; i++) {
    t(copying(i * 4'000'000, 1'000'000'000));
    s.clock.sleep(Millis(100));
  }
  t(copying(1'000'000'000, 1'000'000'000));
  EXPECT_EQ(std::count(s.out.begin(), s.out.end(), '\n'), 4) << s.out;
  EXPECT_NE(s.out.find("40.0 MB/s  15.0 s left"), std::string::npos) << s.out;
  EXPECT_NE(s.out.find("100 %"), std::string::npos) << s.out;
  EXPECT_EQ(s.out.find('\x1b'), std::string::npos);
}

TEST(Terminal, TheBlockIsRedrawnAndNewsScrollAboveIt) {
  Screen s;
  {
    Terminal t({}, s.to_out(), s.to_err(), window(80), s.clock);
    t({{"kind", "step"}, {"id", "link"}, {"title", "connect the two agents"}, {"state", "started"}});
    t({{"kind", "step"}, {"id", "link"}, {"title", "connect the two agents"}, {"state", "done"}});
    t({{"kind", "step"}, {"id", "copy db"}, {"title", "copy db"}, {"state", "started"}});
    for (int i = 1; i <= 50; i++) {
      s.clock.sleep(Millis(200));
      t(copying(i * 10'000'000, 1'000'000'000, std::string(200, 'x')));
    }
    auto lines = shown(s.out);
    ASSERT_EQ(lines.size(), 4u) << s.out;
    EXPECT_EQ(lines[0], "  ✓ connect the two agents");
    EXPECT_EQ(lines[1], "  … copy db");
    EXPECT_NE(lines[2].find("50 %"), std::string::npos) << lines[2];
    EXPECT_LE(columns(lines[2]), 79u);
    t({{"kind", "step"}, {"id", "copy db"}, {"title", "copy db"}, {"state", "done"}});
    t({{"kind", "result"}, {"what", "begin"}, {"text", "everything follows"}});
  }
  EXPECT_EQ(shown(s.out), (std::vector<std::string>{"  ✓ connect the two agents", "  ✓ copy db", "begin: everything follows", ""}));
}

TEST(Terminal, TheBlockIsNotRedrawnMoreThanTenTimesASecond) {
  Screen s;
  Terminal t({}, s.to_out(), s.to_err(), window(80), s.clock);
  for (int i = 0; i < 10000; i++) {
    t(copying(i, 10000));
    s.clock.t += 100'000;
  }
  EXPECT_LE(s.writes, 12);
}

TEST(Terminal, WideCharactersTakeTwoColumnsAndCombiningOnesNone) {
  EXPECT_EQ(columns("\u8868\uff21\uac00"), 6u);
  EXPECT_EQ(columns("e\u0301\u2026\u2588"), 3u);
  Screen s;
  Terminal t({}, s.to_out(), s.to_err(), window(40), s.clock);
  std::string table;
  for (int i = 0; i < 60; i++) table += "\u8868";
  t(copying(1, 2, table));
  for (const auto& line : shown(s.out)) EXPECT_LE(columns(line), 39u) << line;
}

TEST(Terminal, TheBlockFollowsTheWindow) {
  Screen s;
  Window now{.columns = 100, .rows = 8};
  Terminal t({}, s.to_out(), s.to_err(), [&] { return now; }, s.clock);
  auto all = [&] {
    for (int i = 0; i < 12; i++) {
      s.clock.sleep(Millis(200));
      t({{"kind", "progress"}, {"store", "db" + std::to_string(i)}, {"phase", "copy"}, {"done", 1}, {"total", 2}, {"detail", std::string(200, 'x')}});
    }
    s.clock.sleep(Millis(200));
    t(copying(1, 2));
    return shown(s.out);
  };
  auto lines = all();
  EXPECT_EQ(lines.size(), 8u);
  EXPECT_NE(lines[6].find("7 lines more"), std::string::npos) << lines[6];
  now = {.columns = 50, .rows = 20};
  lines = all();
  EXPECT_EQ(lines.size(), 14u);
  for (const auto& line : lines) EXPECT_LE(columns(line), 49u) << line;
}

TEST(Terminal, AStatusReplacesTheOneBeforeIt) {
  Screen s;
  {
    Terminal t({}, s.to_out(), s.to_err(), window(80), s.clock);
    t({{"kind", "status"}, {"name", "shop"}, {"phase", "following"}, {"serves", "source"}, {"source", {{"link", {{"up", true}}}}}});
    t({{"kind", "status"}, {"name", "shop"}, {"phase", "switched"}, {"serves", "target"}});
  }
  EXPECT_EQ(shown(s.out), (std::vector<std::string>{"shop: switched; the target serves", ""}));
}

TEST(Terminal, JsonIsOneObjectALineAndNothingElse) {
  Screen s;
  Terminal t({.json = true}, s.to_out(), s.to_err(), window(80), s.clock);
  t(copying(1, 2));
  t({{"kind", "message"}, {"text", "two\nlines"}});
  t.error(Error(Code::verify, "the sites differ"));
  EXPECT_TRUE(s.err.empty());
  std::istringstream in(s.out);
  std::string line;
  int n = 0;
  while (std::getline(in, line)) {
    EXPECT_TRUE(Json::parse(line).contains("kind"));
    n++;
  }
  EXPECT_EQ(n, 3);
}

TEST(Terminal, QuietKeepsResultsAndErrors) {
  Screen s;
  Terminal t({.quiet = true}, s.to_out(), s.to_err(), window(0), s.clock);
  t(copying(1, 2));
  t({{"kind", "message"}, {"text", "hm"}});
  t({{"kind", "result"}, {"what", "switch"}, {"pause_ms", 83.4}});
  t.error(Error(Code::backed_out, "backed out", "try again"));
  EXPECT_EQ(s.out, "switch: done; the pause was 83 ms\n");
  EXPECT_EQ(s.err, "rehome: backed out\n  try again\n  (backed-out, exit status 10)\n");
}

TEST(Terminal, AClosedTerminalIsWrittenToOnce) {
  Screen s;
  s.alive = false;
  Terminal t({}, s.to_out(), s.to_err(), window(0), s.clock);
  for (int i = 0; i < 5; i++) t({{"kind", "serves"}, {"side", "target"}});
  EXPECT_EQ(s.writes, 1);
}

TEST(Terminal, TextFromTheSitesCannotMoveTheCursor) {
  Screen s;
  Terminal t({}, s.to_out(), s.to_err(), window(80), s.clock);
  t({{"kind", "verify"}, {"store", "f"}, {"equal", false}, {"compared", 1}, {"differences", {{{"object", "a\x1b[2J\nb\xc2\x9b" "2J"}, {"what", "differs"}}}}});
  EXPECT_NE(s.out.find("a\\x1b[2J\\x0ab\\x9b2J: differs"), std::string::npos) << s.out;
}

TEST(Terminal, OddObjectsAreNoError) {
  for (const char* kind : {"status", "plan", "result", "finding", "step", "progress", "message", "verify", "check", "canary", "serves", "pause", "error", "unheard of", ""}) {
    Screen s;
    Terminal t({}, s.to_out(), s.to_err(), window(80), s.clock);
    t({{"kind", kind}});
    t({{"kind", kind}, {"stores", 3}, {"steps", {1, 2}}, {"phases", {{"a", 1}}}, {"error", "x"}, {"ms", "y"}, {"differences", {{"a", 2}}}, {"left", {1}}, {"ledger", 7}, {"source", "s"}, {"pause", 1}, {"traffic", {{"a", 1}}}});
  }
  Screen s;
  Terminal t({}, s.to_out(), s.to_err(), window(80), s.clock);
  t(Json(3));
}

// A pseudo terminal that nobody reads is one that was stopped.
TEST(Terminal, AStoppedTerminalStopsNothing) {
  int master = ::posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(master, 0);
  ASSERT_EQ(::grantpt(master), 0);
  ASSERT_EQ(::unlockpt(master), 0);
  int slave = ::open(::ptsname(master), O_RDWR | O_NOCTTY);
  ASSERT_GE(slave, 0);
  int kept = ::dup(STDOUT_FILENO);
  ::dup2(slave, STDOUT_FILENO);
  auto from = std::chrono::steady_clock::now();
  {
    Terminal t({});
    for (int i = 0; i < 500; i++) t({{"kind", "serves"}, {"side", std::string(200, 'x') + std::to_string(i)}});
  }
  auto took = std::chrono::steady_clock::now() - from;
  ::dup2(kept, STDOUT_FILENO);
  ::close(kept);
  ::close(slave);
  ::close(master);
  EXPECT_LT(took, std::chrono::seconds(6));
}

TEST(TextView, ConfigErrorsStartWithTheirPlaces) {
  auto lines = error_lines(Error(Code::config, "a.yaml:1:2: one\na.yaml:3:4: two", "see the manual"));
  EXPECT_EQ(lines[0], "a.yaml:1:2: one");
  EXPECT_EQ(lines[1], "a.yaml:3:4: two");
}

TEST(TextView, StatusTellsOfTheGatesClients) {
  Json routes = Json::array({{{"name", "a"}, {"resets", 2}, {"to_peer_last_minute", 3}, {"in_flight_to_peer", 1}}, {{"name", "b"}, {"resets", 1}}});
  Json status{{"kind", "status"}, {"name", "shop"}, {"phase", "switched"}, {"source", {{"gate", {{"state", "OPEN_PEER"}, {"in_flight", 4}, {"waiting", 0}, {"routes", routes}, {"longer", "2 connections are open"}}}}}};
  std::string all;
  for (const auto& line : status_lines(status)) all += line + "\n";
  EXPECT_NE(all.find("gate OPEN_PEER: 4 in flight, 0 waiting, 3 reset since it started\n"), std::string::npos) << all;
  EXPECT_NE(all.find("3 connections came to this address in the last minute, or are open, and are led to the other side\n"), std::string::npos) << all;
  EXPECT_NE(all.find("2 connections are open\n"), std::string::npos) << all;
  // What was led away before a way back is led nowhere now.
  status["source"]["gate"]["state"] = "OPEN_LOCAL";
  for (const auto& line : status_lines(status)) EXPECT_EQ(line.find("led to the other side"), std::string::npos) << line;
}

TEST(TextView, StatusTellsOfADeadServiceAndOfWhatGoesOn) {
  std::string all;
  for (const auto& line : status_lines({{"name", "shop"}, {"phase", "begun"}, {"serves", "source"}, {"source", {{"gate", {{"none", true}}}}},
                                        {"services", {{"web", {{"running", false}}}, {"worker", {{"running", true}}}}},
                                        {"steps", {{{"title", "copy files"}, {"state", "failed"}, {"error", {{"code", "interrupted"}, {"message", "stopped"}}}}}}}))
    all += line + "\n";
  EXPECT_NE(all.find("service web does NOT run on the source, which serves\n"), std::string::npos) << all;
  EXPECT_EQ(all.find("worker"), std::string::npos) << all;
  EXPECT_NE(all.find("interrupted, rehome resume goes on: copy files\n"), std::string::npos) << all;
  EXPECT_EQ(all.find("FAILED"), std::string::npos) << all;
  EXPECT_NE(all.find("no gate yet\n"), std::string::npos) << all;
}

TEST(TextView, StatusSaysThatNobodyServesAndWhatIsLeftToDo) {
  auto lines = status_lines({{"name", "shop"}, {"phase", "following"}, {"serves", "neither"}, {"why", {{"message", "attempt 3 is decided"}, {"hint", "the agents finish it"}}}});
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0], "shop: following; NEITHER SIDE SERVES");
  EXPECT_EQ(lines[2], "  the agents finish it");
  lines = status_lines({{"name", "shop"}, {"phase", "cancelling"}, {"serves", "source"}});
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_NE(lines[1].find("rehome cancel"), std::string::npos);
}

TEST(TextView, NumbersForPeople) {
  EXPECT_EQ(grouped(0), "0");
  EXPECT_EQ(grouped(-1234567), "-1,234,567");
  EXPECT_EQ(exact_ms(4.26), "4.3 ms");
  EXPECT_EQ(exact_ms(211.6), "212 ms");
}

}  // namespace
}  // namespace rehome::ui
