#include "track/probe.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>

#include "base/error.h"
#include "sys/fs.h"
#include "track/follow.h"
#include "track/mounts.h"
#include "track/watch.h"

namespace rehome::track {
namespace {

void count_tree(const std::string& path, const Json& request, Accounts& accounts, const std::function<bool()>& stopping, Json& out) {
  StoreSettings settings = settings_from(request);
  Filter filter(settings.include, settings.exclude);
  Tree tree(Fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), path);
  std::int64_t files = 0, bytes = 0, linked = 0, devices = 0, xattrs = 0, acls = 0;
  std::set<id_t> users, groups;
  walk(tree, filter, [&](const std::string& p, ino_t, unsigned char, int directory) {
    auto m = read_meta(directory, std::string(name_of(p)), p);
    if (!m) return !stopping();
    files++;
    if (m->is_file()) bytes += m->size / static_cast<std::int64_t>(std::max<nlink_t>(1, m->nlink));
    devices += S_ISCHR(m->mode) || S_ISBLK(m->mode);
    linked += !m->is_directory() && m->nlink > 1;
    for (const auto& [k, v] : m->xattrs) (is_acl(k) ? acls : xattrs)++;
    if (users.size() < 10000) users.insert(m->uid);
    if (groups.size() < 10000) groups.insert(m->gid);
    for (const auto& [k, v] : m->xattrs)
      if (is_acl(k))
        each_acl_id(v, [&](Accounts::Kind kind, id_t id) { (kind == Accounts::Kind::user ? users : groups).insert(id); });
    return !stopping();
  });
  out["files"] = files;
  out["bytes"] = bytes;
  out["linked"] = linked;
  out["devices"] = devices;
  out["xattrs"] = xattrs;
  out["acls"] = acls;
  Json names[2] = {Json::array(), Json::array()}, numbers[2] = {Json::array(), Json::array()};
  accounts.refresh();
  for (auto kind : {Accounts::Kind::user, Accounts::Kind::group})
    for (id_t id : kind == Accounts::Kind::user ? users : groups) {
      if (id == 0) continue;
      std::string name = accounts.name(kind, id);
      if (name.empty()) numbers[kind == Accounts::Kind::group].push_back(id);
      else names[kind == Accounts::Kind::group].push_back(name);
    }
  out["users"] = names[0];
  out["groups"] = names[1];
  out["unnamed_users"] = numbers[0];
  out["unnamed_groups"] = numbers[1];
}

// Whether the file system keeps attributes and ACLs: tried on a file of our own, which has no name, so that the directory stays as it
// is down to its times. Where no such file can be made (FUSE, old NFS), one with a name is, and removed.
void try_attributes(const std::string& directory, Json& out) {
  Fd fd(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd && (errno == EOPNOTSUPP || errno == EISDIR)) {
    std::string name = directory + "/.rehome-probe." + std::to_string(::getpid());
    fd = Fd(::open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (fd) ::unlink(name.c_str());
  }
  if (!fd) {
    out["write_trouble"] = std::strerror(errno);
    return;
  }
  out["has_xattrs"] = ::fsetxattr(fd.get(), "user.rehome", "1", 1, 0) == 0;
  struct {
    std::uint32_t version = 2;
    struct {
      std::uint16_t tag, perm;
      std::uint32_t id;
    } e[5] = {{1, 6, ~0u}, {2, 4, 1}, {4, 4, ~0u}, {16, 4, ~0u}, {32, 0, ~0u}};
  } acl;
  out["has_acls"] = ::fsetxattr(fd.get(), "system.posix_acl_access", &acl, sizeof acl, 0) == 0;
}

}  // namespace

Json probe(const Json& request, Accounts& accounts, const std::function<bool()>& stopping) {
  std::string asked = get_string(request, "path");
  const std::string path = resolve_path(asked);
  while (asked.ends_with('/')) asked.pop_back();
  Json out{{"exists", exists(path)}, {"rsync", rsync_version()}, {"root", ::geteuid() == 0}};
  std::string at = path;
  while (!exists(at) && at.size() > 1) at = parent_path(at);
  struct stat st;
  if (::stat(at.c_str(), &st) != 0) throw errno_error(errno, "stat", at);
  out["directory"] = exists(path) && S_ISDIR(st.st_mode);
  struct statvfs v;
  if (::statvfs(at.c_str(), &v) != 0) throw errno_error(errno, "look at the file system of", at);
  out["device"] = static_cast<std::int64_t>(st.st_dev);
  out["all_bytes"] = static_cast<std::int64_t>(v.f_blocks) * static_cast<std::int64_t>(v.f_frsize);
  out["free_bytes"] = static_cast<std::int64_t>(v.f_bavail) * static_cast<std::int64_t>(v.f_frsize);
  out["free_inodes"] = static_cast<std::int64_t>(v.f_favail);
  out["all_inodes"] = static_cast<std::int64_t>(v.f_files);
  out["read_only"] = (v.f_flag & ST_RDONLY) != 0;
  auto mounts = read_mounts();
  dev_t dev = 0;
  place_in_file_system(mounts, at, &dev);
  for (const auto& m : mounts)
    if (m.dev == dev) out["file_system"] = m.type;
  Json below = Json::array();
  // In the words of who asks, whose patterns are compared with these.
  for (const auto& m : mounts_below(path)) below.push_back(shown(asked + m.point.substr(path == "/" ? 0 : path.size())));
  out["mounts_below"] = below;
  if (out["directory"].get<bool>()) {
    out["watch_obstacle"] = Watch::obstacle(path);
    Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!fd) throw errno_error(errno, "open", path, "the agent must be able to read it");
    bool empty = true;
    each_name(fd.get(), "", [&](std::string_view, ino_t, unsigned char) { return empty = false; });
    out["empty"] = empty;
  }
  if (get_bool(request, "count", false) && out["directory"].get<bool>()) count_tree(path, request, accounts, stopping, out);
  if (get_bool(request, "attributes", false) && !get_bool(out, "read_only") && S_ISDIR(st.st_mode)) try_attributes(at, out);
  return out;
}

}  // namespace rehome::track
