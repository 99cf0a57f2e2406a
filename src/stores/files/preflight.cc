#include <algorithm>
#include <cstdio>

#include "base/text.h"
#include "stores/files/files.h"

namespace rehome {
namespace {

constexpr std::int64_t bytes_per_second = 60'000'000;  // through one ssh, measured on two cores
constexpr std::int64_t files_per_second = 8'000;
constexpr std::int64_t scanned_per_second = 100'000;   // names and metadata only

// Of `names`, those that the site's getent does not know.
std::vector<std::string> missing_accounts(Site& site, const char* database, const Json& names) {
  std::vector<std::string> missing;
  if (names.empty()) return missing;
  std::vector<std::string> argv{"getent", database};
  for (const auto& n : names) argv.push_back(n.get<std::string>());
  // Status 2: some were not found.
  Outcome o = site.exec({.argv = argv});
  if (o.status != 0 && o.status != 2)
    throw Error(Code::unknown, std::string("getent ") + database + " ended with status " + std::to_string(o.status), "is getent installed there?");
  std::vector<std::string> found;
  for (const auto& line : split(o.out, '\n')) found.push_back(line.substr(0, line.find(':')));
  for (const auto& n : names)
    if (std::find(found.begin(), found.end(), n.get<std::string>()) == found.end()) missing.push_back(n.get<std::string>());
  return missing;
}

bool old_rsync(const std::string& version) {
  int major = 0, minor = 0, patch = 0;
  if (std::sscanf(version.c_str(), "%d.%d.%d", &major, &minor, &patch) < 2) return true;
  // 3.1.3 is the first that compares times to the nanosecond.
  return major < 3 || (major == 3 && (minor < 1 || (minor == 1 && patch < 3)));
}

}  // namespace

std::vector<Finding> FilesStore::preflight(StoreContext& c) {
  using Level = Finding::Level;
  std::vector<Finding> out;
  const FilesConfig& f = config_.files;
  auto object = [&](Side side) { return std::string(side_name(side)) + ": " + f.path[side]; };
  auto add = [&](Level level, const char* id, Side side, std::string message, std::string mend) {
    out.push_back({level, std::string("files.") + id, object(side), std::move(message), std::move(mend)});
  };
  if (f.merge)
    add(Level::error, "merge", Side::target, "merging into a directory that has files is not supported", "leave merge out, and start with an empty directory");
  Json ask = settings(Side::source);
  ask["count"] = true;
  Json source = c.source.call("files.probe", ask, Deadline::in(Millis(3'600'000)));
  ask = settings(Side::target);
  // Once prepared, the tree is closed to everybody but the peer: nothing can be tried there, and nothing needs to be.
  bool begun = !c.recall("files." + name() + ".prepared").is_null();
  ask["attributes"] = !begun;
  Json target = c.target.call("files.probe", ask, Deadline::in(Millis(60'000)));

  if (!get_bool(source, "directory")) {
    add(Level::error, "missing", Side::source, "there is no such directory", "correct the store's path");
    return out;
  }
  if (get_bool(target, "exists") && !get_bool(target, "directory"))
    add(Level::error, "missing", Side::target, "it is not a directory", "move it away, or correct the path");
  else if (!begun && get_bool(target, "exists") && !get_bool(target, "empty", false))
    add(Level::error, "not_empty", Side::target, "the directory is not empty", "move away what is in it, or correct the path");
  if (get_bool(target, "read_only") && !begun)
    add(Level::error, "read_only", Side::target, "its file system is mounted read-only", "mount it writable");
  if (std::string trouble = get_string(target, "write_trouble", ""); !trouble.empty())
    add(Level::error, "not_writable", Side::target, "no file can be made there: " + trouble, "use root for that site, or let its account write there");

  std::int64_t bytes = get_int(source, "bytes"), files = get_int(source, "files");
  bytes_ = bytes;
  // Some file systems (ramfs) count no blocks, and some (btrfs) no inodes.
  room_.reset();
  if (!begun && get_int(target, "all_bytes") > 0) room_ = {f.path[Side::target], get_int(target, "device"), bytes + bytes / 50, get_int(target, "free_bytes")};
  if (room_ && room_->free < room_->needed)
    add(Level::error, "space", Side::target, "it has " + human_bytes(room_->free) + " free, and the source holds " + human_bytes(bytes),
        "make room, or choose another path");
  if (!begun && get_int(target, "all_inodes") > 0 && get_int(target, "free_inodes") < files)
    add(Level::error, "inodes", Side::target, "its file system has " + std::to_string(get_int(target, "free_inodes")) + " inodes free, and the source holds " +
        std::to_string(files) + " files and directories", "make a file system with more inodes");
  if (!get_bool(target, "root") && get_int(source, "devices") > 0)
    add(Level::error, "devices", Side::target, "the source has " + std::to_string(get_int(source, "devices")) + " device files, and only root makes such", "use root for that site, or exclude them");
  if (!get_bool(target, "has_xattrs", true) && get_int(source, "xattrs") > 0)
    add(Level::error, "xattrs", Side::target, "its file system keeps no extended attributes, and the source has " + std::to_string(get_int(source, "xattrs")),
        "use a file system that does, or mount it with user_xattr");
  if (!get_bool(target, "has_acls", true) && get_int(source, "acls") > 0)
    add(Level::error, "acls", Side::target, "its file system keeps no ACLs, and the source has " + std::to_string(get_int(source, "acls")),
        "use a file system that does, or mount it with acl");

  for (Side side : {Side::source, Side::target}) {
    const Json& p = side == Side::source ? source : target;
    std::string version = get_string(p, "rsync");
    if (version.empty()) add(Level::error, "rsync", side, "rsync is not installed", "install the package rsync there");
    else if (old_rsync(version)) add(Level::error, "rsync", side, "rsync " + version + " compares times to the second only", "install rsync 3.1.3 or newer");
    if (!get_bool(p, "root"))
      add(Level::warning, "root", side, "the agent is not root: owners cannot be kept, files of others may not be readable, and nothing closes the tree there while that side does not serve", "use root for that site; docs/WITHOUT-ROOT.md says what that changes");
    for (const auto& m : p.value("mounts_below", Json::array())) {
      std::string point = m.get<std::string>();
      bool excluded = false;
      for (const auto& e : f.exclude)
        excluded = excluded || (e.size() > 1 && e[0] == '/' && point == f.path[side] + (e.back() == '/' ? e.substr(0, e.size() - 1) : e));
      if (!excluded)
        add(Level::error, "mount", side, "another file system is mounted at " + point + ", inside the tree",
            "exclude it (exclude: [\"" + point.substr(std::min(point.size(), f.path[side].size())) +
                "\"]) and move it by other means; or name each directory of the tree as a store instead of the tree, and this one too: stores may not lie inside each other");
    }
  }
  std::string obstacle = get_string(source, "watch_obstacle", "");
  if (!obstacle.empty())
    add(Level::warning, "watch", Side::source, "changes cannot be followed, the whole tree is read in every pass, also inside the pause (about " +
        human_duration(Millis(files * 1000 / scanned_per_second)) + "): " + obstacle, "run the agent as root on Linux 5.9 or newer, on a file system with file handles");

  if (f.owner_by_name) {
    auto users = missing_accounts(c.target, "passwd", source.value("users", Json::array()));
    auto groups = missing_accounts(c.target, "group", source.value("groups", Json::array()));
    if (!users.empty())
      add(Level::warning, "owners", Side::target, "users that own files on the source are missing here: " + first_few(users, 10) + "; their files keep the number",
          "make these users first (useradd --system), or set owner: number");
    if (!groups.empty())
      add(Level::warning, "owners", Side::target, "groups that own files on the source are missing here: " + first_few(groups, 10) + "; their files keep the number",
          "make these groups first (groupadd --system), or set owner: number");
  }

  Json ask_writers = settings(Side::source);
  std::vector<std::string> writers;
  const Json open_for_writing = c.source.call("files.writers", ask_writers);
  for (const auto& w : open_for_writing.at("writers")) {
    std::string one = get_string(w, "program") + " (process " + std::to_string(get_int(w, "pid")) + ")";
    if (std::find(writers.begin(), writers.end(), one) == writers.end()) writers.push_back(one);
  }
  if (!writers.empty())
    add(Level::note, "writers", Side::source, "open for writing now in " + first_few(writers, 10), "each of them must belong to one of the services, which are frozen in the pause");
  return out;
}

Estimate FilesStore::estimate(StoreContext& c) {
  Json ask = settings(Side::source);
  ask["count"] = true;
  Json p = c.source.call("files.probe", ask, Deadline::in(Millis(3'600'000)));
  Estimate e;
  e.bytes = get_int(p, "bytes");
  e.objects = get_int(p, "files");
  std::int64_t rate = bandwidth_ > 0 ? std::min(bandwidth_, bytes_per_second) : bytes_per_second;
  e.copy = Millis(1000 * (e.bytes / rate + e.objects / files_per_second));
  e.reasons.push_back(std::to_string(e.objects) + " files and directories, " + human_bytes(e.bytes) + ", by rsync");
  std::string obstacle = get_string(p, "watch_obstacle", "");
  if (obstacle.empty()) {
    e.pause = Millis(30);
    e.reasons.push_back("what changed in the last half second is sent in the pause, and fsynced: about 30 ms for 100 files");
  } else {
    e.pause = Millis(1000 * e.objects / scanned_per_second + 500);
    e.reasons.push_back("no change events (" + obstacle + "): the whole tree is read inside the pause, about " + human_duration(e.pause));
  }
  e.facts = {{"path", config_.files.path.source}, {"watched", obstacle.empty()}};
  return e;
}

}  // namespace rehome
