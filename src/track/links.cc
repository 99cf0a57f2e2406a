#include "track/links.h"

#include <dirent.h>
#include <fcntl.h>

#include <algorithm>

#include "base/error.h"

namespace rehome::track {

void walk(const Tree& tree, const Filter& filter,
          const std::function<bool(const std::string&, ino_t, unsigned char, int)>& each) {
  std::vector<std::string> todo{""};
  bool go_on = true;
  while (!todo.empty() && go_on) {
    std::string directory = std::move(todo.back());
    todo.pop_back();
    Fd fd = tree.open_directory(directory);
    if (!fd) {
      if (says_gone(errno)) continue;
      throw errno_error(errno, "open directory", shown(directory));
    }
    each_name(fd.get(), directory, [&](std::string_view name, ino_t ino, unsigned char type) {
      std::string path = child_of(directory, name);
      if (type == DT_UNKNOWN) {
        struct stat st;
        if (::fstatat(fd.get(), std::string(name).c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) return true;
        type = static_cast<unsigned char>(IFTODT(st.st_mode));
        ino = st.st_ino;
      }
      if (!filter.includes_child(path, type == DT_DIR)) return true;
      go_on = each(path, ino, type, fd.get());
      if (go_on && type == DT_DIR) todo.push_back(std::move(path));
      return go_on;
    });
  }
}

void LinkIndex::build(const std::atomic<bool>& stop) {
  walk(tree_, filter_, [&](const std::string& path, ino_t, unsigned char type, int directory) {
    if (type == DT_DIR) return !stop.load();
    struct stat st;
    if (::fstatat(directory, std::string(name_of(path)).c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_nlink > 1)
      add(st.st_ino, path);
    return !stop.load();
  });
  std::lock_guard lock(mutex_);
  built_ = true;
}

void LinkIndex::add(ino_t ino, const std::string& path) {
  std::lock_guard lock(mutex_);
  auto& names = names_[ino];
  if (std::find(names.begin(), names.end(), path) != names.end()) return;
  // Past the limit nothing is kept: what is missing is found by a pass over the tree's names.
  if (bytes_ > most_) {
    if (names.empty()) names_.erase(ino);
    return;
  }
  bytes_ += path.size() + 96;
  names.push_back(path);
}

std::vector<std::string> LinkIndex::verified(ino_t ino) {
  std::vector<std::string> out;
  auto it = names_.find(ino);
  if (it == names_.end()) return out;
  Cursor cursor(tree_);
  std::erase_if(it->second, [&](const std::string& path) {
    std::string name;
    int directory = cursor.at(path, name);
    struct stat st;
    bool same = directory >= 0 && ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_ino == ino;
    if (same) out.push_back(path);
    else bytes_ -= std::min(bytes_, path.size() + 96);
    return !same;
  });
  if (it->second.empty()) names_.erase(it);
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<std::string> LinkIndex::names(ino_t ino) {
  std::lock_guard lock(mutex_);
  return verified(ino);
}

bool LinkIndex::knows(ino_t ino, bool unknown) const {
  std::lock_guard lock(mutex_);
  return names_.contains(ino) || (unknown && (bytes_ > most_ || !built_));
}

bool LinkIndex::is_outside(ino_t ino, nlink_t nlink) {
  std::lock_guard lock(mutex_);
  auto known = outside_.find(ino);
  return known != outside_.end() && known->second == std::pair<nlink_t, std::size_t>(nlink, 0);
}

void LinkIndex::forget_outside() {
  std::lock_guard lock(mutex_);
  outside_.clear();
}

void LinkIndex::complete(const std::unordered_map<ino_t, nlink_t>& inodes) {
  std::unordered_map<ino_t, nlink_t> wanted;
  {
    std::lock_guard lock(mutex_);
    for (auto [ino, nlink] : inodes) {
      auto names = verified(ino);
      std::size_t have = names.size();
      nlink_t all = nlink;
      if (all == 0 && have > 0) {
        Cursor cursor(tree_);
        std::string name;
        int directory = cursor.at(names.front(), name);
        struct stat st;
        if (directory >= 0 && ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0) all = st.st_nlink;
      }
      if (have == all && have > 0) continue;
      auto known = outside_.find(ino);
      if (known != outside_.end() && known->second.first == nlink && known->second.second == have && nlink > 0) continue;
      wanted.emplace(ino, nlink);
    }
  }
  if (wanted.empty()) return;
  passes_++;
  std::unordered_map<ino_t, std::vector<std::string>> found;
  walk(tree_, filter_, [&](const std::string& path, ino_t ino, unsigned char type, int) {
    if (type != DT_DIR && wanted.contains(ino)) found[ino].push_back(path);
    return true;
  });
  std::lock_guard lock(mutex_);
  for (auto [ino, nlink] : wanted) {
    auto it = found.find(ino);
    auto& names = names_[ino];
    if (it != found.end())
      for (auto& path : it->second)
        if (std::find(names.begin(), names.end(), path) == names.end()) {
          bytes_ += path.size() + 96;
          names.push_back(path);
        }
    std::size_t have = names.size();
    if (names.empty()) names_.erase(ino);
    if (outside_.size() > 100000) outside_.clear();
    if (have != nlink) outside_[ino] = {nlink, have};
  }
}

}  // namespace rehome::track
