#include "track/compare.h"

#include <algorithm>
#include <map>
#include <set>
#include <thread>

#include "base/error.h"

namespace rehome::track {
namespace {

// A request is one `listed` frame: what, then jobs or what the case needs.
enum class Ask : std::uint8_t { all = 0, buckets = 1, paths = 2, account = 3 };

constexpr std::size_t most_buckets = 1024;  // listed by path in one comparison: about 16,000 entries of a million
constexpr int most_rounds = 5;

void send_listed(Channel& channel, const Listed& l) {
  channel.send(FrameType::listed, Packer().bytes(l.path).u8(l.group).u64(l.hash.low).u64(l.hash.high).out());
}

Frame receive_answer(Channel& channel) {
  // A tree of millions of files takes a while before the first word.
  Frame f = channel.receive(Deadline::in(std::chrono::hours(12)));
  if (f.type == FrameType::failed) throw error_from_json(parse_json(f.payload, "the other agent's answer")).in("the other side");
  return f;
}

// Asks the other agent for its id of an account, once for each.
class PeerAccounts {
 public:
  PeerAccounts(Fd connection, Accounts& accounts)
      : connection_(std::move(connection)), channel_(connection_.get()), accounts_(accounts) {}
  id_t get(Accounts::Kind kind, id_t id) {
    if (id == 0) return 0;
    std::lock_guard lock(mutex_);
    auto key = std::pair(kind == Accounts::Kind::group, id);
    if (auto it = known_.find(key); it != known_.end()) return it->second;
    std::string name = accounts_.name(kind, id);
    id_t there = id;
    if (!name.empty()) {
      channel_.send(FrameType::listed,
                    Packer().u8(static_cast<std::uint8_t>(Ask::account)).u8(kind == Accounts::Kind::group).bytes(name).out());
      channel_.flush();
      Frame f = receive_answer(channel_);
      Unpacker u(f.payload);
      if (u.u8()) there = u.u32();
    }
    known_[key] = there;
    return there;
  }

 private:
  std::mutex mutex_;
  Fd connection_;
  Channel channel_;
  Accounts& accounts_;
  std::map<std::pair<bool, id_t>, id_t> known_;
};

class Comparison {
 public:
  Comparison(AgentHost& host, Accounts& accounts, const std::string& store, Follower& follower, const CompareOptions& options)
      : host_(host), store_(store), follower_(follower), options_(options), connection_(dial()), channel_(connection_.get()),
        peer_accounts_(dial(), accounts) {
    manifest_.jobs = options.jobs;
    manifest_.stop = options.stop;
    if (follower.settings().owner_by_name)
      manifest_.owners = [this](Accounts::Kind kind, id_t id) { return peer_accounts_.get(kind, id); };
  }

  Compared run() {
    Ticks began = system_clock().now();
    std::unordered_set<std::uint32_t> wanted = differing_buckets();
    if (!wanted.empty()) {
      auto candidates = differing_entries(wanted);
      settle(std::move(candidates));
    }
    out_.ms = ms_between(began, system_clock().now());
    return std::move(out_);
  }

 private:
  struct Candidate {
    std::string path;
    bool group;
    bool operator<(const Candidate& o) const { return std::tie(path, group) < std::tie(o.path, o.group); }
  };

  Fd dial() { return host_.open_peer({{"op", "files.manifest"}, {"store", store_}}, Deadline::in(Millis(30'000))); }

  // Runs `mine` while the other side works too.
  template <class F>
  void both(F mine, const std::function<void()>& theirs) {
    std::exception_ptr failure;
    std::thread thread([&] {
      try {
        mine();
      } catch (...) {
        failure = std::current_exception();
      }
    });
    try {
      theirs();
    } catch (...) {
      thread.join();
      throw;
    }
    thread.join();
    if (failure) std::rethrow_exception(failure);
  }

  std::unordered_set<std::uint32_t> differing_buckets() {
    Manifest mine;
    std::unordered_set<std::uint32_t> wanted;
    std::vector<Bucket> theirs(bucket_count);
    channel_.send(FrameType::listed, Packer().u8(static_cast<std::uint8_t>(Ask::all)).u8(jobs()).out());
    channel_.flush();
    both([&] { mine = make_manifest(follower_.tree(), follower_.filter(), manifest_); },
         [&] {
           while (true) {
             Frame f = receive_answer(channel_);
             if (f.type == FrameType::end) break;
             Unpacker u(f.payload);
             auto index = u.u32();
             if (index >= bucket_count) throw Error(Code::io, "the other agent's manifest makes no sense");
             theirs[index].sum.low = u.u64();
             theirs[index].sum.high = u.u64();
             theirs[index].count = u.u64();
           }
         });
    out_.entries = mine.entries;
    out_.bytes = mine.bytes;
    for (std::uint32_t i = 0; i < bucket_count; i++) {
      if (mine.buckets[i] == theirs[i]) continue;
      if (wanted.size() < most_buckets) wanted.insert(i);
      else out_.more++;
    }
    return wanted;
  }

  std::vector<Candidate> differing_entries(const std::unordered_set<std::uint32_t>& wanted) {
    std::map<Candidate, Hash> mine, theirs;
    Packer p;
    p.u8(static_cast<std::uint8_t>(Ask::buckets)).u8(jobs());
    for (auto b : wanted) p.u32(b);
    channel_.send(FrameType::listed, p.out());
    channel_.flush();
    both([&] { list_buckets(follower_.tree(), follower_.filter(), manifest_, wanted,
                            [&](const Listed& l) { mine[{l.path, l.group}] = l.hash; }); },
         [&] {
           while (true) {
             Frame f = receive_answer(channel_);
             if (f.type == FrameType::end) break;
             Unpacker u(f.payload);
             Candidate c{std::string(u.bytes()), u.u8() != 0};
             Hash h;
             h.low = u.u64();
             h.high = u.u64();
             theirs[std::move(c)] = h;
           }
         });
    std::vector<Candidate> out;
    for (const auto& [c, h] : mine)
      if (auto it = theirs.find(c); it == theirs.end() || it->second != h) out.push_back(c);
    for (const auto& [c, h] : theirs)
      if (!mine.contains(c)) out.push_back(c);
    return out;
  }

  // Looks again at each path after what is dirty was sent. Groups of names are looked at when nothing else differs.
  void settle(std::vector<Candidate> candidates) {
    std::vector<std::string> paths;
    bool groups = false;
    for (const auto& c : candidates) {
      if (c.group) groups = true;
      else paths.push_back(c.path);
    }
    std::map<std::string, std::pair<Hash, Hash>> last;  // mine, theirs
    std::set<std::string> moved;
    for (out_.rounds = 1; out_.rounds <= most_rounds && !paths.empty(); out_.rounds++) {
      std::map<std::string, Hash> before = hashes(paths);
      follower_.flush(false, Deadline::in(std::chrono::minutes(10)));
      std::map<std::string, Hash> theirs = peer_hashes(paths), after = hashes(paths);
      std::vector<std::string> still;
      for (const auto& path : paths) {
        if (theirs[path] == after[path] || theirs[path] == before[path]) continue;
        if (before[path] == after[path]) {
          // Nothing changes here, and yet they differ: once more to be sure, then it is one.
          if (out_.rounds >= 2) {
            add(path, theirs[path] == Hash{} ? "missing on the other side" : after[path] == Hash{} ? "extra on the other side" : "differs");
            continue;
          }
        } else {
          moved.insert(path);
        }
        still.push_back(path);
      }
      paths = std::move(still);
      if (!paths.empty()) system_clock().sleep(Millis(50));
    }
    for (const auto& path : paths) {
      if (moved.contains(path)) out_.changing.push_back(path);
      else add(path, "differs");
    }
    if (groups && out_.differences.empty()) settle_groups(candidates);
  }

  void settle_groups(const std::vector<Candidate>& candidates) {
    std::unordered_set<std::uint32_t> wanted;
    for (const auto& c : candidates)
      if (c.group) wanted.insert(bucket_of(hash_of(c.path)));
    for (int round = 0; round < most_rounds; round++) {
      follower_.flush(false, Deadline::in(std::chrono::minutes(10)));
      std::vector<Candidate> left;
      for (auto& c : differing_entries(wanted))
        if (c.group) left.push_back(std::move(c));
      if (left.empty()) return;
      if (round + 1 == most_rounds)
        for (const auto& c : left) add(c.path, "its hard links are not the same");
    }
  }

  void add(const std::string& path, const std::string& what) {
    if (out_.differences.size() < options_.most) out_.differences.push_back({path, what});
    else out_.more++;
  }

  std::map<std::string, Hash> hashes(const std::vector<std::string>& paths) {
    std::map<std::string, Hash> out;
    Cursor cursor(follower_.tree());
    for (const auto& p : paths) {
      cursor.forget();
      out[p] = entry_hash(cursor, p, manifest_.owners);
    }
    return out;
  }

  std::map<std::string, Hash> peer_hashes(const std::vector<std::string>& paths) {
    std::map<std::string, Hash> out;
    Packer p;
    p.u8(static_cast<std::uint8_t>(Ask::paths)).u8(1);
    for (const auto& path : paths) p.bytes(path);
    channel_.send(FrameType::listed, p.out());
    channel_.flush();
    while (true) {
      Frame f = receive_answer(channel_);
      if (f.type == FrameType::end) return out;
      Unpacker u(f.payload);
      std::string path(u.bytes());
      u.u8();
      Hash& h = out[path];
      h.low = u.u64();
      h.high = u.u64();
    }
  }

  std::uint8_t jobs() const { return static_cast<std::uint8_t>(std::clamp(options_.jobs, 1, 64)); }

  AgentHost& host_;
  const std::string& store_;
  Follower& follower_;
  const CompareOptions options_;
  Fd connection_;
  Channel channel_;
  PeerAccounts peer_accounts_;
  ManifestOptions manifest_;
  Compared out_;
};

}  // namespace

Json to_json(const Compared& c) {
  Json differences = Json::array(), changing = Json::array();
  for (const auto& d : c.differences) differences.push_back({{"path", shown(d.path)}, {"what", d.what}});
  for (const auto& p : c.changing) changing.push_back(shown(p));
  return {{"equal", c.differences.empty() && c.more == 0}, {"entries", c.entries}, {"bytes", c.bytes},
          {"differences", differences}, {"more", c.more}, {"changing", changing}, {"ms", c.ms}};
}

Compared compare_trees(AgentHost& host, Accounts& accounts, const std::string& store, Follower& follower,
                       const CompareOptions& options) {
  return Comparison(host, accounts, store, follower, options).run();
}

void serve_manifest(const Tree& tree, const Filter& filter, Accounts& accounts, Channel& channel, const std::atomic<bool>& stop) {
  Frame f;
  while (!stop) {
    if (!channel.readable(Millis(200))) continue;
    if (!channel.receive_or_end(f)) return;
    Unpacker u(f.payload);
    auto ask = static_cast<Ask>(u.u8());
    if (ask == Ask::account) {
      auto kind = u.u8() ? Accounts::Kind::group : Accounts::Kind::user;
      auto id = accounts.id(kind, std::string(u.bytes()));
      channel.send(FrameType::listed, Packer().u8(id.has_value()).u32(id.value_or(0)).out());
      channel.flush();
      continue;
    }
    ManifestOptions options;
    options.jobs = u.u8();
    options.stop = &stop;
    try {
      if (ask == Ask::all) {
        Manifest m = make_manifest(tree, filter, options);
        for (std::uint32_t i = 0; i < bucket_count; i++) {
          const Bucket& b = m.buckets[i];
          if (b.count > 0 || b.sum != Hash{})
            channel.send(FrameType::bucket, Packer().u32(i).u64(b.sum.low).u64(b.sum.high).u64(b.count).out());
        }
      } else if (ask == Ask::buckets) {
        std::unordered_set<std::uint32_t> wanted;
        while (!u.empty()) wanted.insert(u.u32());
        list_buckets(tree, filter, options, wanted, [&](const Listed& l) { send_listed(channel, l); });
      } else {
        Cursor cursor(tree);
        while (!u.empty()) {
          std::string path(u.bytes());
          cursor.forget();
          send_listed(channel, {path, false, entry_hash(cursor, path, {})});
        }
      }
      channel.send(FrameType::end, {});
    } catch (const Error& e) {
      channel.send(FrameType::failed, dump_line(error_to_json(e)));
    }
    channel.flush();
  }
}

}  // namespace rehome::track
