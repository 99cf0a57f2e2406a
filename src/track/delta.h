// The delta: dirty paths of one tree become the same at the other side. What is sent is state, not history: each path as
// it is now. So it may be sent again, and whatever changes meanwhile is dirty again.
//
// In one batch: hints (renames that save copying) and removals; entries (a path's metadata, and its content when it is
// small); ask; the receiver answers which contents it needs, all of it or by blocks whose hashes differ; data; commit;
// done, with what failed. Directories' own times are set last, after everything in them.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "track/dirty.h"
#include "track/filter.h"
#include "track/hash.h"
#include "track/links.h"
#include "track/owners.h"
#include "track/tree.h"
#include "track/wire.h"

namespace rehome::track {

enum class Content : std::uint8_t {
  keep = 0,    // not known to have changed; needed when the other side's has another type or size
  whole = 1,   // comes with the entry
  hashed = 2,  // needed when the other side's hash differs
  changed = 3, // needed, by blocks if the other side has an old one
};

struct Entry {
  std::string path;
  Meta meta;
  Content content = Content::keep;
  Hash hash;                                                   // when hashed
  std::vector<std::string> names;                              // other names of the same inode in the tree
  std::vector<std::pair<std::uint64_t, std::string>> extents;  // when whole: offset and bytes; the rest is holes
};
std::string pack(const Entry& e);
Entry unpack_entry(std::string_view payload);

struct Sent {
  std::int64_t files = 0;    // entries, links and removals
  std::int64_t bytes = 0;    // over the wire
  Hash paths;                // of the set of paths, order-independent
  std::vector<std::pair<std::string, std::string>> failed;  // path, why; they were put back as dirty
};

struct SendOptions {
  bool durable = true;          // the receiver fsyncs before it answers
  std::int64_t bandwidth = 0;   // bytes a second; 0: no limit
  Deadline deadline;
  const std::atomic<bool>* stop = nullptr;
};

class Sender {
 public:
  Sender(const Tree& tree, const Filter& filter, LinkIndex& links, Accounts& accounts)
      : tree_(tree), filter_(filter), links_(links), accounts_(accounts), cursor_(tree) {}
  // Sends `dirty`; what failed goes back into `again`. Throws Error(unreachable, timeout, interrupted) after putting all
  // of it back. With nothing dirty it sends nothing.
  Sent send(Channel& channel, Dirty dirty, DirtySet& again, const SendOptions& options);
  // For a new connection: account names are told again.
  void forget_names() { told_.clear(); }

 private:
  struct Asked {
    std::string path;
    std::uint8_t why;
  };
  void send_all(Channel& channel, const Dirty& dirty, DirtySet& again);
  void send_path(const std::string& path, std::uint8_t why);
  struct Listed {
    Fd fd;
    std::vector<std::string> names;
  };
  std::optional<Listed> send_names(const std::string& directory, std::uint8_t why);
  void send_tree(const std::string& directory);
  void send_entry(const std::string& path, Meta meta, std::uint8_t why);
  void tell_owner(Accounts::Kind kind, id_t id);
  bool read_content(const std::string& path, Entry& entry);
  void remove(const std::string& path);
  void put_back(const std::string& path, std::uint8_t why, const std::string& message);
  void count(const std::string& path);
  void finish_batch();
  void answer_need(Unpacker in);
  void send_data(std::uint32_t index, std::uint64_t offset, std::string_view bytes);
  bool dirty_name(const std::string& path) const;
  void require_running() const;
  void throttle();

  const Tree& tree_;
  const Filter& filter_;
  LinkIndex& links_;
  Accounts& accounts_;
  Cursor cursor_;
  std::set<std::pair<int, id_t>> told_;
  std::uint64_t accounts_then_ = 0;  // when they were told

  // of one send()
  Channel* channel_ = nullptr;
  DirtySet* again_ = nullptr;
  const Dirty* dirty_ = nullptr;
  SendOptions options_;
  Sent sent_;
  std::vector<Asked> asked_;                               // entries of the batch, by index
  std::size_t pending_ = 0;                                // bytes of the batch
  std::map<std::pair<dev_t, ino_t>, std::string> groups_;  // inode -> the name that stands for it
  std::vector<std::pair<std::string, std::string>> linked_;
  std::set<std::string> linked_names_;
  std::string removed_;
  bool uncommitted_ = false;
  bool all_links_known_ = false;
  Ticks began_ = 0;
  std::uint64_t sent_before_ = 0;
};

struct ReceiveOptions {
  bool owner_by_name = true;
  std::function<void()> check;  // throws when what was received must not count as done
};

// The other end. Nothing it does leaves the tree or follows a link in it. After a broken connection the tree may hold
// half of a batch; the sender has all of it still dirty.
class Receiver {
 public:
  Receiver(const Tree& tree, const Filter& filter, Accounts& accounts, ReceiveOptions options)
      : tree_(tree), filter_(filter), accounts_(accounts), options_(options), cursor_(tree) {}
  // Serves frames until the sender closes. Throws Error for a broken connection or a frame that makes no sense.
  void serve(Channel& channel, const std::atomic<bool>& stop);

 private:
  struct Pending {
    Entry entry;
    bool needed = false;  // content was asked for and has not come yet
  };
  void on_entry(Channel& channel, Entry entry);
  void apply_entry(Entry& entry, Pending& pending, Channel& channel);
  bool apply_file(Entry& entry, Pending& pending, Channel& channel, int directory, const std::string& name);
  void write_meta(const Entry& entry, int directory, const std::string& name);
  void on_names(Unpacker in);
  void on_remove(const std::string& path);
  void on_link(const std::string& path, const std::string& of);
  void on_hint(const std::string& from, const std::string& to);
  Fd& writing(std::uint32_t index);
  void on_data_end(std::uint32_t index, std::uint64_t size);
  void on_commit(Channel& channel, bool durable);
  bool remove_at(int directory, const std::string& name, const std::string& path);
  void touch(const std::string& directory);  // its times are put back at the commit
  int need_parent(const std::string& path, std::string& name);
  void fail(const std::string& path, const std::string& why, bool parent_missing = false);
  void make_durable();
  void set_owner(const std::pair<const std::pair<Accounts::Kind, id_t>, std::string>& told);
  void renew_owners();

  const Tree& tree_;
  const Filter& filter_;
  Accounts& accounts_;
  ReceiveOptions options_;
  Cursor cursor_;
  OwnerMap owners_;
  std::map<std::pair<Accounts::Kind, id_t>, std::string> told_;
  std::uint64_t accounts_then_ = 0;
  bool between_batches_ = true;

  std::vector<Pending> batch_;
  Fd writing_;
  std::uint32_t writing_index_ = 0;
  std::map<std::string, Entry> directories_;     // metadata to set at the commit
  std::map<std::string, timespec> touched_;      // directory -> its mtime before we changed names in it
  std::vector<std::string> written_;             // files to fsync
  std::set<std::string> changed_directories_;    // directories to fsync
  std::string names_of_;                         // of a names list that is not complete yet
  std::set<Hash> names_;
  struct Failure {
    std::string path, message;
    bool parent_missing;
  };
  std::vector<Failure> failures_;
  std::uint32_t entries_ = 0;
};

}  // namespace rehome::track
