#include "track/dirty.h"

#include <algorithm>

namespace rehome::track {
namespace {

// What one entry costs beside its name: the node, the string, its share of the table.
constexpr std::size_t entry_cost = 80;
constexpr std::size_t most_inodes = 200'000;
constexpr std::size_t most_moves = 10'000;

}  // namespace

void DirtySet::add(std::string_view path, std::uint8_t why) {
  std::lock_guard lock(mutex_);
  if (now_.rescan) return;
  auto [it, fresh] = now_.paths.try_emplace(std::string(path), why);
  if (!fresh) {
    it->second = static_cast<std::uint8_t>(it->second | why);
    return;
  }
  bytes_ += path.size() + entry_cost;
  if (bytes_ > most_) shrink();
}

void DirtySet::add_move(std::string_view from, std::string_view to) {
  std::lock_guard lock(mutex_);
  // Hints save copying, nothing else: past a number of them they are dropped.
  if (now_.rescan || now_.moves.size() >= most_moves) return;
  now_.moves.emplace_back(from, to);
}

void DirtySet::add_inode(std::uint64_t ino, std::uint64_t names) {
  std::lock_guard lock(mutex_);
  if (now_.rescan) return;
  if (now_.inodes.size() >= most_inodes && !now_.inodes.contains(ino)) {
    now_ = Dirty{.rescan = true, .reason = "more hard-linked files changed than are kept in memory"};
    bytes_ = 0;
    return;
  }
  now_.inodes[ino] = names;
}

void DirtySet::rescan(std::string_view reason) {
  std::lock_guard lock(mutex_);
  if (now_.rescan) return;
  now_ = Dirty{.rescan = true, .reason = std::string(reason)};
  bytes_ = 0;
}

// Replaces the entries below the deepest directory that holds half of all by one, until half of the memory is free.
void DirtySet::shrink() {
  while (bytes_ > most_ / 2) {
    std::string prefix;
    while (true) {
      std::unordered_map<std::string_view, std::size_t> counts;
      for (const auto& [path, why] : now_.paths) {
        std::string_view p = path;
        if (!prefix.empty()) {
          if (p.size() <= prefix.size() || !p.starts_with(prefix) || p[prefix.size()] != '/') continue;
          p.remove_prefix(prefix.size() + 1);
        }
        auto slash = p.find('/');
        if (slash != std::string_view::npos) counts[p.substr(0, slash)]++;
      }
      auto best = std::max_element(counts.begin(), counts.end(), [](auto& a, auto& b) { return a.second < b.second; });
      if (best == counts.end() || best->second < now_.paths.size() / 2) break;
      std::string name(best->first);
      prefix = prefix.empty() ? name : prefix + "/" + name;
    }
    if (prefix.empty()) {
      now_ = Dirty{.rescan = true, .reason = "more changes than are kept in memory"};
      bytes_ = 0;
      return;
    }
    std::erase_if(now_.paths, [&](const auto& e) {
      bool below = e.first.size() > prefix.size() && e.first.starts_with(prefix) && e.first[prefix.size()] == '/';
      if (below) bytes_ -= e.first.size() + entry_cost;
      return below;
    });
    auto [it, fresh] = now_.paths.try_emplace(prefix, why_tree);
    it->second = static_cast<std::uint8_t>(it->second | why_tree);
    if (fresh) bytes_ += prefix.size() + entry_cost;
  }
}

Dirty DirtySet::take() {
  std::lock_guard lock(mutex_);
  Dirty out = std::move(now_);
  now_ = {};
  bytes_ = 0;
  taken_ = out.paths.size() + out.inodes.size();
  taken_rescan_ = out.reason;
  return out;
}

void DirtySet::confirm() {
  std::lock_guard lock(mutex_);
  taken_ = 0;
  taken_rescan_.clear();
}

void DirtySet::put_back(Dirty&& dirty) {
  if (dirty.rescan) {
    rescan(dirty.reason);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    if (now_.rescan) return;
    // Older moves come first; what they could still save is verified by content in any case.
    dirty.moves.insert(dirty.moves.end(), now_.moves.begin(), now_.moves.end());
    if (dirty.moves.size() > most_moves) dirty.moves.resize(most_moves);
    now_.moves = std::move(dirty.moves);
  }
  for (const auto& [path, why] : dirty.paths) add(path, why);
  for (auto [ino, names] : dirty.inodes) add_inode(ino, names);
}

std::size_t DirtySet::size() const {
  std::lock_guard lock(mutex_);
  return now_.paths.size() + now_.inodes.size() + taken_;
}

bool DirtySet::empty() const {
  std::lock_guard lock(mutex_);
  return now_.empty();
}

std::string DirtySet::open_rescan() const {
  std::lock_guard lock(mutex_);
  return now_.rescan ? now_.reason : taken_rescan_;
}

std::string DirtySet::rescan_reason() const {
  std::lock_guard lock(mutex_);
  return now_.rescan ? now_.reason : std::string();
}

}  // namespace rehome::track
