// Who has files of a tree open for writing: from /proc, in every mount namespace.
#pragma once

#include <sys/types.h>

#include <set>
#include <string>
#include <vector>

#include "base/json.h"
#include "track/tree.h"

namespace rehome::track {

struct Writer {
  pid_t pid = 0;
  std::string program, cgroup;
  std::string path;      // relative to the tree
  ino_t ino = 0;
  bool mapped = false;   // shared and writable: its writes raise no event
  bool frozen = false;   // its cgroup is
};

struct WriterQuery {
  std::string path;                  // of the tree, absolute, as this host sees it
  std::set<pid_t> except;            // and their cgroups:
  std::vector<std::string> except_cgroups;  // "/system.slice/shop.service"; what is below them too
};

// Processes of others are seen by root only. Kernel threads, those that end meanwhile and files without a name are left out.
std::vector<Writer> find_writers(const Tree& tree, const WriterQuery& query);

Json to_json(const std::vector<Writer>& writers);
// The answer to files.writers, of the tree at `path`: a request may name processes and cgroups to leave out.
Json writers_answer(const Json& request, const std::string& path);

}  // namespace rehome::track
