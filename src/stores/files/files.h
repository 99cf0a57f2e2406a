// The files driver: a directory that follows another through the agents. The agents do the work (docs/PROTOCOL.md, Files);
// what is here decides when, and which side may write. It may know config and site, and no other store.
//
// The serving side's agent tracks and sends. The other side's tree is closed: a read-only mount over it, beneath which that
// agent writes. Opening it refuses the peer from then on, durably, so that a follower that has not heard of the commit
// cannot overwrite what the new side's application writes.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "stores/store.h"

namespace rehome {

class FilesStore : public Store {
 public:
  explicit FilesStore(const StoreConfig& config, const Deployment& deployment);

  const std::string& name() const override { return config_.name; }
  const char* kind() const override { return "files"; }
  // No soft fence of its own: its writers are frozen by the services' runtime, and the freeze kept is the hard fence,
  // with the services' start condition.
  Capabilities capabilities() const override { return {.follow = true, .reverse = true, .soft_fence = false, .hard_fence = false, .verify = true}; }
  std::vector<Finding> preflight(StoreContext&) override;
  std::optional<Room> room() const override { return room_; }
  Estimate estimate(StoreContext&) override;
  void prepare(StoreContext&) override;
  void copy(StoreContext&) override;
  void follow(StoreContext&) override;
  FollowStatus follow_status(StoreContext&) override;
  std::vector<std::string> needs_recopy(StoreContext&) override;
  void recopy(StoreContext&) override;
  Verdict verify(StoreContext&) override;
  void prepare_reverse(StoreContext&, Direction) override;
  void make_up_for_cut(StoreContext&, Direction) override;
  ActionSets actions(StoreContext&, Direction) override;
  std::unique_ptr<Cut> open_cut(StoreContext&, Direction) override;
  Millis micro_fence(StoreContext&, Direction, Deadline) override { return Millis(0); }
  std::vector<std::string> finish(StoreContext&, Side serves) override;
  std::vector<std::string> abandon(StoreContext&) override;
  void unfence_source(StoreContext&) override {}
  std::vector<std::string> leftovers(StoreContext&) override;

  // {"store", path and patterns at that side}: what files.track and files.receive take.
  Json settings(Side side) const;
  Json named() const { return {{"store", config_.name}}; }

 private:
  Json status(StoreContext&, Side side);
  Side tracking_side(StoreContext&);
  void take_down(StoreContext&, Side side);
  const StoreConfig config_;
  const Limits limits_;
  const std::int64_t bandwidth_;   // this store's part of limits.bandwidth
  std::optional<Room> room_;
  std::int64_t bytes_ = 0;   // of the source's tree, as preflight counted it: what a copy's progress is measured by
};

std::unique_ptr<Store> make_files_store(const StoreConfig& config, const Deployment& deployment);

}  // namespace rehome
