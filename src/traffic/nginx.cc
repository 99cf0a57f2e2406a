// nginx stays in front, with TLS, keep-alive and headers; its configuration leads to the gate instead of to the
// application. One reload at begin, one at complete, none in between.
//
// STATE/traffic/NAME/ at a site: N.original and N.edited of each file, and manifest.json, which is written before the
// first file is changed and removed after the last one is back.
#include <algorithm>
#include <set>

#include "base/text.h"
#include "sys/fs.h"
#include "traffic/gates.h"
#include "traffic/nginx_conf.h"

namespace rehome {
namespace {

struct Worker {
  std::int64_t pid = 0;
  std::string title;
  bool leaving() const { return title.find("shutting down") != std::string::npos; }
};

// nginx's worker processes: children of the master. Titles are nginx's own, and the same since its first version.
constexpr char kWorkers[] = R"sh(master=$1
for d in /proc/[0-9]*; do
  { read -r line <"$d/stat"; } 2>/dev/null || continue
  set -- ${line##*) }
  [ "$2" = "$master" ] || continue
  title=$(tr '\0' ' ' <"$d/cmdline") 2>/dev/null
  case $title in *"worker process"*) echo "${d#/proc/} $title" ;; esac
done
)sh";

// Replaces $2 by the content of $1 in one step, with owner, mode, ACL and times of $3.
constexpr char kReplace[] = R"sh(set -e
# Hidden, so that an include of * does not read it.
new=$(dirname "$2")/.rehome-new.$(basename "$2")
trap 'rm -f -- "$new"' EXIT
cp --preserve=all --attributes-only "$3" "$new"
cat "$1" >"$new"
[ "$1" != "$3" ] || touch -r "$3" "$new"
sync "$new"
mv -f -T "$new" "$2"
sync "$(dirname "$2")"
)sh";

std::string manifest_path(const Site& site, const std::string& name) { return site.state() + "/traffic/" + name + "/manifest.json"; }

class NginxTraffic : public Traffic {
 public:
  NginxTraffic(const Deployment& d, const TrafficConfig& t) : deployment_(d), t_(t) {}
  const std::string& name() const override { return t_.name; }

  std::vector<Finding> preflight(TrafficContext& ctx) override {
    std::vector<Finding> found;
    for (Side s : {Side::source, Side::target}) {
      std::string object = ctx.at(s).label() + ": traffic " + t_.name;
      try {
        Site& site = ctx.at(s);
        Look look = look_at(site, s);
        for (const auto& p : look.plan.problems)
          found.push_back({p.fatal ? Finding::Level::error : Finding::Level::warning, p.id, ctx.at(s).label() + ": " + p.where, p.message, p.mend});
        if (workers(site, master(site, s, look.plan.pid_file)).empty())
          found.push_back({Finding::Level::error, "nginx.workers", object, "nginx has no worker processes, so it cannot be reloaded without a gap",
                           "set master_process on"});
      } catch (const Error& e) {
        found.push_back({Finding::Level::error, "nginx", object, e.what(), e.hint});
      }
    }
    find_application(ctx.source, t_, found);
    return found;
  }

  std::vector<std::string> plan_notes() override {
    auto notes = common_notes(deployment_, t_, Front::nginx);
    notes.insert(notes.begin(), {
        "nginx is reloaded once at begin and once at complete, at either site; nothing is reloaded while a switch pauses",
        "clients' keep-alive connections to nginx stay open over a switch; a reload closes them, and one that sends at that very moment "
        "sees a reset (116 of 321,000 requests, nginx 1.22): counted and shown",
        "until complete, nginx connects to the application anew for each request (through the gate): its upstream keepalive is out",
        "websockets of before begin live on in nginx's old workers, past the gate, and are listed; they end when the yielding side's application does",
    });
    return notes;
  }

  void prepare(TrafficContext& ctx) override {
    raise_gates(ctx, t_, {{t_.on.source.listen, t_.on.source.application}, {t_.on.target.listen, t_.on.target.application}});
    // The side without clients first: what is wrong with a configuration shows there.
    for (Side s : {Side::target, Side::source}) {
      stop_if_cancelled(ctx);
      lead_through(ctx, s);
    }
  }

  std::vector<std::string> astray(TrafficContext& ctx, Side s) override {
    Site& site = ctx.at(s);
    std::vector<std::string> all;
    Json m = manifest_of(site, t_.name);
    if (!get_bool(m, "reloaded", false)) all.push_back(site.label() + ": nginx was never led through the gate to the end");
    std::set<std::string> kept;
    for (const auto& f : m.at("files")) {
      kept.insert(get_string(f, "path"));
      if (!leads(site, f)) all.push_back(site.label() + ": " + get_string(f, "path") + " was changed since begin led it through the gate");
    }
    if (!all.empty()) return all;
    try {
      Look look = look_at(site, s);
      for (const auto& [path, text] : look.plan.edited)
        if (!kept.contains(look.real.at(path))) all.push_back(site.label() + ": " + path + " leads past the gate");
      for (const auto& p : look.plan.problems)
        if (p.id == "nginx.other_file" || p.id == "nginx.no_way" || p.id == "nginx.not_read") all.push_back(site.label() + ": " + p.where + ": " + p.message + " (" + p.mend + ")");
    } catch (const Error& e) {
      if (e.code != Code::config) throw;
      all.push_back(e.what());
    }
    return all;
  }

  void withdraw(TrafficContext& ctx) override {
    at_both(ctx, [&](Side s) { put_back(ctx, s); });
  }

  std::int64_t from_old_address(TrafficContext& ctx, Side old_side) override { return clients_at(ctx, old_side, t_.name); }

  std::vector<std::string> leftovers(TrafficContext& ctx) override {
    std::vector<std::string> left;
    for (Side s : {Side::source, Side::target}) {
      if (!ctx.has(s)) continue;
      Site& site = ctx.at(s);
      if (!there(site, manifest_path(site, t_.name))) continue;
      Json m = parse_json(get_text(site, manifest_path(site, t_.name)), "manifest.json");
      for (const auto& f : m.at("files"))
        left.push_back(site.label() + ": nginx's " + get_string(f, "path") + " leads through the gate; its original is " + get_string(f, "original"));
    }
    return left;
  }

 private:
  struct Look {
    NginxPlan plan;
    std::map<std::string, std::string> real;  // as nginx names a file -> without symbolic links
    NginxFiles files;
  };

  std::vector<std::string> nginx(Side s, std::vector<std::string> more) const {
    std::vector<std::string> argv{t_.on[s].nginx};
    if (!t_.on[s].nginx_conf.empty()) argv.insert(argv.end(), {"-c", t_.on[s].nginx_conf});
    argv.insert(argv.end(), more.begin(), more.end());
    return argv;
  }

  // What nginx reads, and what must change in it; changes nothing.
  Look look_at(Site& site, Side s) {
    Look look;
    Outcome dump = site.exec({.argv = nginx(s, {"-T"})});
    if (!dump.ok())
      throw Error(Code::config, "nginx's configuration is not valid: " + last_words(dump.err), "mend it until nginx -t says that it is successful").in(site.label());
    look.files = split_nginx_dump(dump.out);
    std::vector<std::string> argv{"readlink", "-f", "--"};
    std::vector<std::string> names;
    for (const auto& [path, text] : look.files.text) names.push_back(path);
    names.insert(names.end(), t_.on[s].files.begin(), t_.on[s].files.end());
    argv.insert(argv.end(), names.begin(), names.end());
    auto lines = split(trim(site.exec_ok({.argv = argv}, Deadline::in(Millis(10000)), "readlink").out), '\n');
    if (lines.size() != names.size())
      throw Error(Code::config, "one of nginx's files cannot be found: " + join(t_.on[s].files, ", "), "correct `files`").in(site.label());
    // A file that leads through the gate already is planned as what it was.
    std::map<std::string, std::string> originals;
    const Json m = manifest_of(site, t_.name);
    for (const auto& f : m.at("files"))
      if (leads(site, f)) originals[get_string(f, "path")] = get_string(f, "original");
    std::map<std::string, std::string> by_real;
    for (std::size_t i = 0; i < look.files.text.size(); i++) {
      look.real[names[i]] = lines[i];
      // One file under two names is edited once.
      if (auto [first, fresh] = by_real.emplace(lines[i], names[i]); !fresh) look.files.same_as[names[i]] = first->second;
    }
    std::vector<std::string> editable;
    for (std::size_t i = look.files.text.size(); i < names.size(); i++) {
      auto known = by_real.find(lines[i]);
      editable.push_back(known == by_real.end() ? names[i] : known->second);
      // The dump ends each file with a newline of its own; places are counted in the file itself.
      if (known != by_real.end()) look.files.text[known->second] = get_text(site, originals.contains(lines[i]) ? originals[lines[i]] : lines[i]);
    }
    look.plan = plan_nginx(look.files, editable, Address::parse(t_.on[s].application), Address::parse(t_.on[s].listen),
                           std::max(t_.max_wait, deployment_.max_pause), nginx_keeps_upstreams(site.exec({.argv = {t_.on[s].nginx, "-v"}}).err));
    return look;
  }

  static std::string last_words(const std::string& err) {
    auto text = trim(err);
    if (text.size() > 800) text.remove_prefix(text.size() - 800);
    return std::string(text);
  }

  // The pid of the running master, from the file of the `pid` directive, or the built-in one; Error(state) when there is none.
  std::int64_t master(Site& site, Side s, std::string path) {
    std::string built_in, prefix = "/";
    std::string version = site.exec({.argv = {t_.on[s].nginx, "-V"}}).err;
    for (const auto& word : split(version, ' ')) {
      if (word.starts_with("--pid-path=")) built_in = trim(word.substr(11));
      if (word.starts_with("--prefix=")) prefix = trim(word.substr(9));
    }
    if (path.empty()) path = built_in.empty() ? prefix + "/logs/nginx.pid" : built_in;
    if (!path.starts_with('/')) path = prefix + "/" + path;
    Error none(Code::state, "nginx does not run: " + path + " names no process", "start it (systemctl start nginx)");
    if (!there(site, path)) throw none.in(site.label());
    std::string pid(trim(get_text(site, path)));
    if (pid.empty() || pid.find_first_not_of("0123456789") != std::string::npos || !there(site, "/proc/" + pid + "/stat")) throw none.in(site.label());
    return std::stoll(pid);
  }

  std::vector<Worker> workers(Site& site, std::int64_t master) {
    std::vector<Worker> all;
    Outcome o = site.exec_ok({.argv = {"sh", "-c", kWorkers, "sh", std::to_string(master)}}, Deadline::in(Millis(20000)), "listing nginx's workers");
    for (const auto& line : split(trim(o.out), '\n')) {
      auto space = line.find(' ');
      if (space != std::string::npos) all.push_back({std::stoll(line.substr(0, space)), std::string(trim(line.substr(space)))});
    }
    return all;
  }

  // Resets that this host has sent since it started; every program's.
  std::int64_t resets(Site& site) {
    auto lines = split(site.exec({.argv = {"cat", "/proc/net/snmp"}}).out, '\n');
    for (std::size_t i = 1; i < lines.size(); i++) {
      if (!lines[i].starts_with("Tcp:") || !lines[i - 1].starts_with("Tcp:")) continue;
      auto names = split(lines[i - 1], ' '), values = split(lines[i], ' ');
      for (std::size_t k = 0; k < names.size() && k < values.size(); k++)
        if (names[k] == "OutRsts") return std::stoll(values[k]);
    }
    return 0;
  }

  // One reload: new workers with the configuration on disk, then no old ones, or their names. Throws Error(state) when
  // nginx goes on with its old configuration.
  void reload(TrafficContext& ctx, Side s, const std::string& pid_file) {
    Site& site = ctx.at(s);
    std::int64_t pid = master(site, s, pid_file);
    std::set<std::int64_t> old;
    for (const auto& w : workers(site, pid)) old.insert(w.pid);
    std::int64_t resets_before = resets(site);
    Ticks from = system_clock().now();
    site.exec_ok({.argv = nginx(s, {"-s", "reload"})}, Deadline::in(Millis(20000)), "nginx -s reload");
    std::vector<Worker> left;
    // No new worker is a configuration that passed the test and was refused all the same (an address in use).
    Deadline fresh_by = Deadline::in(Millis(10000));
    Deadline gone_by = Deadline::in(std::max(deployment_.drain_deadline, Millis(1000)));
    bool fresh = false;
    while (true) {
      left.clear();
      for (auto& w : workers(site, pid)) {
        if (old.contains(w.pid))
          left.push_back(w);
        else
          fresh = true;
      }
      if (fresh && left.empty()) break;
      if (!fresh && fresh_by.passed())
        throw Error(Code::state, "nginx was told to reload and goes on with its old configuration", "its error log says why").in(site.label());
      if (fresh && gone_by.passed()) break;
      stop_if_cancelled(ctx);
      system_clock().sleep(Millis(50));
    }
    std::string line = site.label() + ": nginx reloaded";
    if (left.empty())
      line += ", its old workers are gone after " + human_duration(Millis(static_cast<std::int64_t>(ms_between(from, system_clock().now()))));
    else
      line += "; old workers still have connections, which pass the gate by until they end:";
    for (const auto& w : left) line += " " + std::to_string(w.pid) + " (" + w.title + ")";
    line += "; TCP resets sent by this host meanwhile: " + std::to_string(resets(site) - resets_before);
    ctx.log(line);
  }

  void replace(Site& site, const std::string& content_of, const std::string& path, const std::string& like) {
    site.exec_ok({.argv = {"sh", "-c", kReplace, "sh", content_of, path, like}}, Deadline::in(Millis(20000)), ("replacing " + path).c_str());
  }

  // A path that is absent is like nothing that was kept.
  bool same(Site& site, const std::string& path, const std::string& kept) {
    Outcome o = site.exec({.argv = {"sh", "-c", "[ -e \"$1\" ] || exit 1; exec cmp -s -- \"$1\" \"$2\"", "sh", path, kept}});
    if (o.status > 1) throw Error(Code::io, "cannot compare " + path + " with " + kept + ": " + o.err).in(site.label());
    return o.ok();
  }

  static Json manifest_of(Site& site, const std::string& name) {
    std::string path = manifest_path(site, name);
    return there(site, path) ? parse_json(get_text(site, path), path) : Json{{"files", Json::array()}};
  }

  // The file is as it was edited; or as another entry, which came after this one, has edited that again.
  bool leads(Site& site, const Json& f) {
    if (same(site, get_string(f, "path"), get_string(f, "edited"))) return true;
    for (const auto& t : deployment_.traffic) {
      if (t.kind != TrafficConfig::Kind::nginx || t.name == t_.name) continue;
      const Json m = manifest_of(site, t.name);
      for (const auto& over : m.at("files"))
        if (over.at("path") == f.at("path") && same(site, get_string(over, "original"), get_string(f, "edited"))) return leads(site, over);
    }
    return false;
  }

  static Error changed(Site& site, const Json& f, const std::string& after) {
    const std::string path = get_string(f, "path"), original = get_string(f, "original");
    return Error(Code::state, path + " was changed, renamed or removed by somebody else since it leads through the gate",
                 "bring that change into " + original + ", copy it over " + path + ", and repeat the command" + after)
        .in(site.label());
  }

  void lead_through(TrafficContext& ctx, Side s) {
    Site& site = ctx.at(s);
    std::string manifest = manifest_path(site, t_.name);
    const Json before = manifest_of(site, t_.name);
    // Changed in place: what it was like without us, and is to be again, is then a person's to say.
    for (const auto& f : before.at("files"))
      if (std::string path = get_string(f, "path"); !leads(site, f) && !same(site, path, get_string(f, "original")) &&
                                                    (!there(site, path) || get_text(site, path).find(Address::parse(t_.on[s].listen).text()) != std::string::npos))
        throw changed(site, f, "");
    Look look = look_at(site, s);
    for (const auto& p : look.plan.problems)
      if (p.fatal) throw Error(Code::config, p.where + ": " + p.message, p.mend).in(site.label());
    bool all = get_bool(before, "reloaded", false);
    std::set<std::string> kept;
    for (const auto& f : before.at("files")) all = kept.insert(get_string(f, "path")).second && leads(site, f) && all;
    for (const auto& [path, text] : look.plan.edited) all = all && kept.contains(look.real.at(path));
    if (all) return;
    master(site, s, look.plan.pid_file);
    // Half of an earlier try, or what somebody has changed since: from the originals again, of which a changed file is one now. What was
    // kept stays until the new manifest names all of it.
    for (const auto& f : before.at("files"))
      if (leads(site, f)) replace(site, get_string(f, "original"), get_string(f, "path"), get_string(f, "original"));
    auto next = get_int(before, "next", static_cast<std::int64_t>(kept.size()));
    Json m{{"files", Json::array()}, {"pid_file", look.plan.pid_file}, {"reloaded", false}};
    for (const auto& [path, text] : look.plan.edited) {
      std::string base = parent_path(manifest) + "/" + std::to_string(next++);
      std::string real = look.real.at(path);
      site.exec_ok({.argv = {"sh", "-c", "mkdir -p -m 700 \"$(dirname \"$2\")\" && cp --preserve=all -- \"$1\" \"$2\" && sync \"$2\"", "sh", real, base + ".original"}},
                   Deadline::in(Millis(20000)), ("keeping " + real).c_str());
      put_text(site, base + ".edited", text);
      m["files"].push_back({{"path", real}, {"original", base + ".original"}, {"edited", base + ".edited"}});
    }
    for (const auto& f : m["files"])
      ctx.note("nginx's " + get_string(f, "path") + " leads through the gate",
               {{"where", site.label()}, {"undone_by", "putting " + get_string(f, "original") + " back and reloading nginx"}, {"changes", look.plan.changes}});
    m["next"] = next;
    put_text(site, manifest, m.dump(1) + "\n");
    for (const auto& c : look.plan.changes) ctx.log(site.label() + ": " + c);
    try {
      for (const auto& f : m["files"]) replace(site, get_string(f, "edited"), get_string(f, "path"), get_string(f, "original"));
      test(site, s);
      reload(ctx, s, look.plan.pid_file);
    } catch (const Error& e) {
      ctx.log(site.label() + ": nginx's files are put back: " + e.what());
      put_back(ctx, s);
      throw;
    }
    m["reloaded"] = true;
    put_text(site, manifest, m.dump(1) + "\n");
  }

  void test(Site& site, Side s) {
    Outcome o = site.exec({.argv = nginx(s, {"-t"})});
    if (!o.ok()) throw Error(Code::config, "nginx refuses its configuration: " + last_words(o.err), "the originals are put back").in(site.label());
  }

  void put_back(TrafficContext& ctx, Side s) {
    Site& site = ctx.at(s);
    std::string manifest = manifest_path(site, t_.name);
    if (!there(site, manifest)) return;
    Json m = parse_json(get_text(site, manifest), manifest);
    for (const auto& f : m.at("files")) {
      std::string path = get_string(f, "path"), original = get_string(f, "original");
      if (same(site, path, original)) continue;
      if (!same(site, path, get_string(f, "edited"))) throw changed(site, f, "; rename or remove it after that");
      replace(site, original, path, original);
    }
    // Also where nothing was put back now: an earlier try may have come as far as that and not to its reload.
    test(site, s);
    std::string pid_file = get_string(m, "pid_file", "");
    try {
      master(site, s, pid_file);
    } catch (const Error& e) {
      if (e.code != Code::state) throw;
      ctx.log(site.label() + ": nginx's files are back; it was not reloaded: " + e.what());
      forget(site);
      return;
    }
    reload(ctx, s, pid_file);
    forget(site);
  }

  void forget(Site& site) {
    site.exec_ok({.argv = {"rm", "-rf", "--", parent_path(manifest_path(site, t_.name))}}, Deadline::in(Millis(20000)), "removing what was kept");
  }

  const Deployment& deployment_;
  TrafficConfig t_;
};

}  // namespace

std::unique_ptr<Traffic> make_nginx(const Deployment& d, const TrafficConfig& t) { return std::make_unique<NginxTraffic>(d, t); }

}  // namespace rehome
