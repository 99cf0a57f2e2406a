// docs/rehome.schema.json and the reader must say the same of the same files, as far as a schema can say it. The judge of
// the schema is python3-jsonschema.
#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include <functional>
#include <regex>
#include <set>

#include "base/json.h"
#include "config/config.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

Json to_json(const YAML::Node& n) {
  if (n.IsMap()) {
    Json out = Json::object();
    for (const auto& pair : n) out[pair.first.Scalar()] = to_json(pair.second);
    return out;
  }
  if (n.IsSequence()) {
    Json out = Json::array();
    for (const auto& item : n) out.push_back(to_json(item));
    return out;
  }
  if (n.IsNull()) return nullptr;
  const std::string& s = n.Scalar();
  if (n.Tag() == "!") return s;
  if (s == "true" || s == "false") return s == "true";
  if (std::regex_match(s, std::regex("[-+]?\\d+"))) return std::stoll(s);
  if (std::regex_match(s, std::regex("[-+]?\\d+\\.\\d+"))) return std::stod(s);
  return s;
}

const std::string kHead = "name: a\nsource: {ssh: h}\ntarget: local\n", kStores = "stores: [{name: f, files: {path: /f}}]\n";
std::string store(const std::string& s) { return kHead + "stores: [{name: f, " + s + "}]\n"; }
std::string more(const std::string& s) { return kHead + kStores + s + "\n"; }
std::string check(const std::string& s) { return kHead + "stores: [{name: d, postgres: {databases: [x]}}]\nchecks: [{name: c, " + s + "}]\n"; }

// What python3-jsonschema says of every value: true where it is accepted.
std::vector<bool> judged(const std::vector<std::string>& files) {
  Json values = Json::array();
  for (const auto& f : files) values.push_back(to_json(YAML::Load(f)));
  TempDir dir;
  write_durably(dir.path() + "/values.json", values.dump());
  const char* program =
      "import json, sys, jsonschema\n"
      "schema = json.load(open(sys.argv[1]))\n"
      "judge = jsonschema.Draft202012Validator\n"
      "judge.check_schema(schema)\n"
      "print(json.dumps([judge(schema).is_valid(v) for v in json.load(open(sys.argv[2]))]))\n";
  Outcome o = run({.argv = {"python3", "-c", program, REHOME_DOCS "/rehome.schema.json", dir.path() + "/values.json"}}, Deadline::in(Millis(60000)));
  EXPECT_TRUE(o.ok()) << o.err << "\nscripts/install-deps --check installs python3-jsonschema";
  if (!o.ok()) return std::vector<bool>(files.size());
  return Json::parse(o.out).get<std::vector<bool>>();
}

std::vector<bool> read(const std::vector<std::string>& files) {
  std::vector<bool> out;
  for (const auto& f : files) {
    std::vector<ConfigProblem> problems;
    read_deployment("t.yaml", f, problems);
    out.push_back(problems.empty());
  }
  return out;
}

TEST(Schema, BothAcceptWhatIsRight) {
  std::vector<std::string> files{
      read_file(REHOME_DOCS "/example.yaml"), read_file(REHOME_CONFIG_TESTDATA "/everything.yaml"), kHead + kStores,
      store("postgres: {databases: all, password: pgpass, host: \"::1\"}"), store("files: {path: /a, target: /b}"),
      more("max_pause: 1.5 s\nlimits: {wal_kept: 20000000, bandwidth: 1 MiB}"), more("services: []\ntraffic: []\nchecks: []"),
      more("services: [{name: s, source: {systemd: a.service}, target: {systemd: b.service}}]"),
      more("traffic: [{name: t, gate: {source: {listen: \"a:1\", application: \"b:1\"}, target: {listen: \"a:2\", application: \"b:2\"}}}]"),
      check("sql: select 1, store: d, expect: true"), check("http: \"http://x\", canary: [], body: 5"), check("http: \"http://[::1]:80\", canary: [read, write]"), check("sql: select 1, store: d, canary: write"),
      check("command: [x], canary: [write]"), more("services: [{name: s, systemd: s.service, warm: false, start_time: 500ms}]"),
  };
  auto by_reader = read(files), by_schema = judged(files);
  for (std::size_t i = 0; i < files.size(); i++) {
    EXPECT_TRUE(by_reader[i]) << "reader: " << files[i];
    EXPECT_TRUE(by_schema[i]) << "schema: " << files[i];
  }
}

TEST(Schema, BothRefuseWhatIsWrong) {
  std::vector<std::string> files{
      "[]", "{}", kHead, kHead + "stores: []", kHead + "stores:", more("x: 1"), more("link: {}\nlimit: {}"),
      "name: A\nsource: {ssh: h}\ntarget: local\n" + kStores, "name: 5\nsource: {ssh: h}\ntarget: local\n" + kStores, "name: a\nsource: remote\ntarget: local\n" + kStores,
      "name: a\nsource: {ssh: h, port: \"22\"}\ntarget: local\n" + kStores, "name: a\nsource: {ssh: h, port: 0}\ntarget: local\n" + kStores,
      "name: a\nsource: {ssh: h, local: true}\ntarget: local\n" + kStores, "name: a\nsource: {ssh: h}\ntarget: {local: false}\n" + kStores,
      "name: a\nsource: {ssh: h}\ntarget: {local: true, key: /k}\n" + kStores, "name: a\nsource: {ssh: -x}\ntarget: local\n" + kStores,
      "name: a\nsource: {ssh: h, options: [x]}\ntarget: local\n" + kStores, "name: a\nsource: {ssh: h, boot: upstart}\ntarget: local\n" + kStores,
      "name: a\nsource: {ssh: h, key: k}\ntarget: local\n" + kStores, "name: a\nsource: {ssh: h, state: ~/s}\ntarget: local\n" + kStores,
      store("files: {path: f}"), store("files: {path: /f/../g}"), store("files: {}"), store("files: {source: /a}"), store("files: {path: /a, source: /a, target: /b}"),
      store("files: {path: /a, owner: uid}"), store("files: {path: /a, exclude: x}"), store("files: {path: /a, exclude: []}"), store("files: {path: /a, merge: true}"),
      store("files: {path: /a}, postgres: {databases: all}"), store("file: {path: /a}"), kHead + "stores: [{files: {path: /a}}]", kHead + "stores: [f]",
      store("postgres: {}"), store("postgres: {databases: shop}"), store("postgres: {databases: []}"), store("postgres: {databases: [a, a]}"), store("postgres: {databases: [template1]}"),
      store("postgres: {databases: all, password: x}"), store("postgres: {databases: all, password: {env: a b}}"), store("postgres: {databases: all, password: {env: A, file: /a}}"),
      store("postgres: {databases: all, password: {}}"), store("postgres: {databases: all, host: \"a:5\"}"), store("postgres: {databases: all, host: \"postgres://x\"}"),
      store("postgres: {databases: all, source: {databases: all}}"), store("postgres: {databases: all, ddl: allow}"), store("postgres: {databases: all, roles: \"true\"}"),
      more("services: [{name: s}]"), more("services: [{name: s, systemd: s}]"), more("services: [{name: s, systemd: a/s.service}]"), more("services: [{name: s, command: {start: [a], stop: [b]}}]"),
      more("services: [{name: s, command: {start: a, stop: [b], pid_file: /p}}]"), more("services: [{name: s, systemd: s.service, command: {start: [a], stop: [b], pid_file: /p}}]"),
      more("services: [{name: s, target: {systemd: s.service}}]"), more("services: [{name: s, systemd: s.service, warm: 1}]"), more("services: [{name: s, systemd: s.service, start_timeout: 5}]"),
      more("services: {name: s}"), more("traffic: [{name: t}]"), more("traffic: [{name: t, gate: {listen: 80, application: \"a:1\"}}]"),
      more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"/run/a\"}}]"), more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\", take: it}}]"),
      more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\", files: [/a]}}]"), more("traffic: [{name: t, nginx: {gate: \"a:1\", application: \"a:2\", files: [a]}}]"),
      more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\", front: a}}]"), more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\"}, max_waiting: 0}]"),
      more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\"}, longer_requests: wait}]"),
      more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\"}, proxy_protocol: v3}]"), more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\"}, refuse_with: 503}]"),
      more("traffic: [{name: t, nginx: {files: [/a], gate: \"a:1\", application: \"a:2\"}, accept_proxy: true}]"),
      check("http: ftp://x"), check("http: \"https://x\""), check("http: \"http://x:y/\""), check("sql: x, store: d, canary: read"), check("command: [x], canary: [write, read]"),
      more("traffic: [{name: t, gate: {listen: \"a:1\", application: \"a:2\", front: \"https://a/\"}}]"), more("services: [{name: s, systemd: s.service, warm: false, start_time: 5}]"), check("http: \"http://u:p@x\""), check("http: \"http://x\", status: 99"), check("http: \"http://x\", sql: y"), check("sql: x"), check("sql: x, store: d, status: 200"),
      check("command: x"), check("command: [x], expect: 1"), check("http: \"http://x\", canary: maybe"), check("http: \"http://x\", where: here"), check("http: \"http://x\", timeout: 5"),
      check("http: \"http://x\", body: [a]"), more("max_pause: 5"), more("max_pause: fast"), more("limits: {jobs: 0}"), more("limits: {jobs: 1.5}"), more("limits: {wal_kept: much}"), more("limits: []"),
  };
  auto by_reader = read(files), by_schema = judged(files);
  for (std::size_t i = 0; i < files.size(); i++) {
    EXPECT_FALSE(by_reader[i]) << "reader: " << files[i];
    EXPECT_FALSE(by_schema[i]) << "schema: " << files[i];
  }
}

// What looks at two places of the file at once is the reader's alone.
TEST(Schema, OnlyTheReaderSeesWhatDoesNotFitTogether) {
  std::vector<std::string> files{
      "name: a\nsource: local\ntarget: local\n" + kStores, "name: a\nsource: {ssh: h}\ntarget: {ssh: i}\n" + kStores, kHead + "stores: [{name: f, files: {path: /a}}, {name: f, files: {path: /b}}]",
      check("sql: x, store: e"), check("sql: x, store: d, database: y"), check("http: /x"), more("traffic: [{name: t, gate: {listen: \"a:1\"}}]"), more("services: [{name: s, systemd: s.service, warm: false}]"),
      more("services: [{name: s, systemd: s.service, start_time: 1s}]"),
      store("postgres: {databases: all, host: h, os_user: x}"), check("command: [x, --password=y]"),
  };
  auto by_reader = read(files), by_schema = judged(files);
  for (std::size_t i = 0; i < files.size(); i++) {
    EXPECT_FALSE(by_reader[i]) << files[i];
    EXPECT_TRUE(by_schema[i]) << files[i];
  }
}

// The reader accepts the file with every key, so a key of the schema that is not in it is one the reader may not know.
TEST(Schema, KnowsNoKeyThatTheReaderDoesNot) {
  std::set<std::string> used, known;
  std::function<void(const Json&)> keys = [&](const Json& j) {
    if (j.is_object())
      for (auto& [key, value] : j.items()) used.insert(key), keys(value);
    if (j.is_array())
      for (const auto& item : j) keys(item);
  };
  keys(to_json(YAML::Load(read_file(REHOME_CONFIG_TESTDATA "/everything.yaml"))));
  std::function<void(const Json&)> properties = [&](const Json& j) {
    if (j.is_array())
      for (const auto& item : j) properties(item);
    if (!j.is_object()) return;
    for (auto& [key, value] : j.items()) {
      if (key == "properties")
        for (auto& [name, schema] : value.items()) known.insert(name);
      properties(value);
    }
  };
  properties(Json::parse(read_file(REHOME_DOCS "/rehome.schema.json")));
  EXPECT_EQ(used, known);
}

// Every key has its place in the manual.
TEST(Schema, TheManualNamesEveryKey) {
  std::string manual = read_file(REHOME_DOCS "/CONFIG.md");
  std::function<void(const Json&)> properties = [&](const Json& j) {
    if (j.is_array())
      for (const auto& item : j) properties(item);
    if (!j.is_object()) return;
    for (auto& [key, value] : j.items()) {
      if (key == "properties") {
        for (auto& [name, schema] : value.items()) EXPECT_NE(manual.find("`" + name + "`"), std::string::npos) << name;
      }
      properties(value);
    }
  };
  properties(Json::parse(read_file(REHOME_DOCS "/rehome.schema.json")));
}

}  // namespace
}  // namespace rehome
