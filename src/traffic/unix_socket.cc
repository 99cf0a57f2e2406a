// The gate's socket under the application's name: link(2) keeps the original beside it, rename(2) puts the gate's over
// it, so that there is no moment without a socket that answers. Undone the same way.
//
// An application that starts again makes its socket anew, over the gate's: a kept program of the agent sees that within
// a second, and takes the new socket like the first. Where the name has gone with an application that may not serve any
// more, the gate's socket is put under it again, for those who still come to the old address.
#include "base/text.h"
#include "sys/fs.h"
#include "traffic/gates.h"

namespace rehome {
namespace {

// $1 the application's socket, $2 where it is kept, $3 the gate's, $2.gate the one that was put under the name. -ef: both names are
// one file. The gate's own socket is made anew too (by a reload, or a supervisor that starts before the gate has ended): what has
// the name then is no application's, and the kept one must stay. One at a time: the kept program may be at it, too. $4 is there while
// the application may not serve: only then nobody is about to make the socket whose name is free.
constexpr char kTake[] = R"sh(set -e
exec 9<"${2%/*}/"
flock 9
put() {
  if [ "$1" -ef "$2" ]; then return; fi
  ln -f -T "$1" "$2.rehome-new"
  mv -f -T "$2.rehome-new" "$2"
}
[ -S "$3" ] || { echo "$3 is not a socket: the gate does not listen" >&2; exit 3; }
if ! [ -e "$1" ] && [ -S "$2.gate" ] && [ -e "$4" ]; then
  chown --reference="$2.gate" "$3"
  chmod --reference="$2.gate" "$3"
  put "$3" "$2.gate"
  put "$3" "$1"
fi
[ -S "$1" ] || { echo "$1 is not a socket: the application does not listen" >&2; exit 4; }
# One that was killed had put this under the name, and not got as far as to note it.
if [ "$1" -ef "$2.gate-next" ]; then put "$2.gate-next" "$2.gate"; fi
# From here on it is this socket, whatever $3 becomes meanwhile.
put "$3" "$2.gate-next"
if ! [ "$1" -ef "$2.gate-next" ]; then
  if ! [ "$1" -ef "$2.gate" ]; then put "$1" "$2"; fi
  chown --reference="$1" "$2.gate-next"
  chmod --reference="$1" "$2.gate-next"
  put "$2.gate-next" "$1"
fi
put "$2.gate-next" "$2.gate"
rm -f -- "$2.gate-next"
)sh";

constexpr char kKeep[] = R"sh(while true; do
  if [ -S "$3" ] && ! [ "$1" -ef "$3" ] && { [ -S "$1" ] || { ! [ -e "$1" ] && [ -S "$2.gate" ] && [ -e "$4" ]; }; }; then sh -c "$5" sh "$1" "$2" "$3" "$4"; fi
  sleep 1
done
)sh";

constexpr char kGiveBack[] = R"sh(set -e
exec 9<"${2%/*}/"
# What was at it and is killed may be inside its last rename.
flock 9
[ "$1" -ef "$3" ] || [ "$1" -ef "$2.gate" ] || [ "$1" -ef "$2.gate-next" ] || exit 0
if [ -S "$2" ]; then
  ln -f -T "$2" "$1.rehome-new"
  mv -f -T "$1.rehome-new" "$1"
else
  rm -f -- "$1"
fi
)sh";

class UnixSocketTraffic : public Traffic {
 public:
  UnixSocketTraffic(const Deployment& d, const TrafficConfig& t) : deployment_(d), t_(t) {}
  const std::string& name() const override { return t_.name; }

  std::vector<Finding> preflight(TrafficContext& ctx) override {
    std::vector<Finding> found;
    for (Side s : {Side::source, Side::target}) {
      Site& site = ctx.at(s);
      std::string object = site.label() + ": traffic " + t_.name;
      auto error = [&](const char* id, std::string message, std::string mend) {
        found.push_back({Finding::Level::error, id, object, std::move(message), std::move(mend)});
      };
      try {
        Paths p = paths(s);
        Outcome o = site.exec({.argv = {"stat", "-c", "%d", "--", parent_path(p.application), parent_path(p.gate)}});
        auto devices = split(trim(o.out), '\n');
        if (!o.ok() || devices.size() != 2)
          error("unix_socket.directory", "a directory is missing: " + std::string(trim(o.err)), "make it, or correct `application` and `listen`");
        else if (devices[0] != devices[1])
          error("unix_socket.file_system", p.gate + " and " + p.application + " are on two file systems, so one cannot take the other's name",
                "put the gate's socket (`listen`) beside the application's");
        // Its name is to be given to a hard link, and the gate's socket its owner.
        const char* rights = "[ \"$(id -u)\" = 0 ] || { [ -w \"$2\" ] && { [ ! -e \"$1\" ] || [ -O \"$1\" ]; }; }";
        if (!site.exec({.argv = {"sh", "-c", rights, "sh", p.application, parent_path(p.application)}}).ok())
          error("unix_socket.rights", "this account cannot take the name of " + p.application + ": the socket is another's, or its directory may not be written", "use root, or the application's account, for that site");
        for (const auto& service : deployment_.services) {
          if (service.runtime != ServiceConfig::Runtime::systemd) continue;
          const std::string& unit = service.on[s].unit;
          auto [directory, preserve] = runtime_directory(site, unit, p);
          if (!directory.empty() && preserve != "yes")
            error("unix_socket.runtime_directory", "the sockets' directory " + directory + " is the RuntimeDirectory of " + unit + ", which takes it away when the service ends, and the gate's way in with it",
                  "systemctl edit " + unit + " on that host: [Service] RuntimeDirectoryPreserve=yes; or put the sockets elsewhere");
        }
        // On the target it may come with the application's start, which the kept program sees.
        if (s == Side::source && !site.exec({.argv = {"test", "-S", p.application}}).ok())
          error("unix_socket.application", p.application + " is not a socket", "start the application, or correct `application`");
      } catch (const Error& e) {
        error("unix_socket", e.what(), e.hint);
      }
    }
    return found;
  }

  std::vector<std::string> plan_notes() override {
    auto notes = common_notes(deployment_, t_, Front::none);
    notes.push_back("the gate's socket takes the name " + Address::parse(t_.on.source.application).path +
                    "; connections of before stay with the application, and are in nobody's count");
    notes.push_back("an application that starts again makes its socket anew: for up to a second, its clients pass the gate by");
    return notes;
  }

  void prepare(TrafficContext& ctx) override {
    BySide<GateSide> sides;
    for (Side s : {Side::source, Side::target}) {
      Paths p = paths(s);
      sides[s] = {"unix:" + p.gate, "unix:" + p.kept};
    }
    raise_gates(ctx, t_, sides);
    for (Side s : {Side::target, Side::source}) {
      stop_if_cancelled(ctx);
      Site& site = ctx.at(s);
      Paths p = paths(s);
      ctx.note("the gate's socket takes the name " + p.application,
               {{"where", site.label()}, {"undone_by", "renaming " + p.kept + " to " + p.application}});
      Outcome o = site.exec({.argv = {"sh", "-c", kTake, "sh", p.application, p.kept, p.gate, not_serving(site)}}, Deadline::in(Millis(10000)));
      bool absent = o.status == 4 && s == Side::target;
      if (!o.ok() && !absent)
        throw Error(Code::state, "the socket " + p.application + " cannot be taken: " + std::string(trim(o.err)), "correct `application` and `listen`").in(site.label());
      site.call("child.set", {{"name", "take-" + t_.name}, {"argv", {"sh", "-c", kKeep, "sh", p.application, p.kept, p.gate, not_serving(site), kTake}}, {"restart_ms", 1000}});
    }
  }

  // Where no socket has the name, the application is not up, and the kept program waits for it.
  std::vector<std::string> astray(TrafficContext& ctx, Side s) override {
    Site& site = ctx.at(s);
    Paths p = paths(s);
    if (comes_back([&] { return site.exec({.argv = {"sh", "-c", "! [ -S \"$1\" ] || [ \"$1\" -ef \"$2\" ]", "sh", p.application, p.gate}}).ok(); })) return {};
    return {site.label() + ": " + p.application + " is not the gate's socket any more, and does not become it by itself"};
  }

  void withdraw(TrafficContext& ctx) override {
    at_both(ctx, [&](Side s) {
      Site& site = ctx.at(s);
      Paths p = paths(s);
      site.call("child.drop", {{"name", "take-" + t_.name}});
      if (!ours(site, p)) return;
      site.exec_ok({.argv = {"sh", "-c", kGiveBack, "sh", p.application, p.kept, p.gate}}, Deadline::in(Millis(10000)), ("giving " + p.application + " back").c_str());
      // Who has come to the gate's socket still needs the kept name.
      let_finish(ctx, t_, s);
      site.exec_ok({.argv = {"rm", "-f", "--", p.kept, p.kept + ".gate", p.kept + ".gate-next", p.kept + ".rehome-new", p.kept + ".gate.rehome-new", p.kept + ".gate-next.rehome-new", p.application + ".rehome-new"}}, Deadline::in(Millis(10000)), "removing the kept name");
    });
  }

  std::int64_t from_old_address(TrafficContext& ctx, Side old_side) override { return clients_at(ctx, old_side, t_.name); }

  std::vector<std::string> leftovers(TrafficContext& ctx) override {
    std::vector<std::string> left;
    for (Side s : {Side::source, Side::target}) {
      if (!ctx.has(s)) continue;
      Paths p = paths(s);
      if (ours(ctx.at(s), p)) left.push_back(ctx.at(s).label() + ": the gate's socket has the name " + p.application + "; the application's is " + p.kept);
    }
    return left;
  }

 private:
  struct Paths {
    std::string application, kept, gate;
  };
  Paths paths(Side s) const {
    std::string application = Address::parse(t_.on[s].application).path;
    return {application, application + ".rehome", Address::parse(t_.on[s].listen).path};
  }
  static std::string not_serving(const Site& site) { return site.state() + "/not-serving"; }
  // The unit's RuntimeDirectory that a socket is in, and its RuntimeDirectoryPreserve; empty where none is.
  std::pair<std::string, std::string> runtime_directory(Site& site, const std::string& unit, const Paths& p) {
    std::string directories, preserve;
    for (const auto& line : split(site.exec({.argv = {"systemctl", "show", "-p", "RuntimeDirectory,RuntimeDirectoryPreserve", unit}}).out, '\n')) {
      if (line.starts_with("RuntimeDirectory=")) directories = line.substr(17);
      if (line.starts_with("RuntimeDirectoryPreserve=")) preserve = line.substr(25);
    }
    for (const auto& name : split(directories, ' '))
      for (const std::string& socket : {p.application, p.gate})
        if (!name.empty() && (socket.starts_with("/run/" + name + "/") || socket.starts_with("/var/run/" + name + "/"))) return {"/run/" + name, preserve};
    return {};
  }
  bool ours(Site& site, const Paths& p) {
    Outcome o = site.exec({.argv = {"sh", "-c", "[ -e \"$2\" ] || [ -e \"$2.gate\" ] || [ \"$1\" -ef \"$3\" ]", "sh", p.application, p.kept, p.gate}});
    if (o.status > 1) throw Error(Code::unknown, "cannot look at " + p.application + ": " + o.err).in(site.label());
    return o.ok();
  }

  const Deployment& deployment_;
  TrafficConfig t_;
};

}  // namespace

std::unique_ptr<Traffic> make_unix_socket(const Deployment& d, const TrafficConfig& t) { return std::make_unique<UnixSocketTraffic>(d, t); }

}  // namespace rehome
