// The gate listens where clients are sent to: nothing of the application's is touched.
#include "traffic/gates.h"

namespace rehome {
namespace {

class ListenTraffic : public Traffic {
 public:
  ListenTraffic(const Deployment& d, const TrafficConfig& t) : deployment_(d), t_(t) {}
  const std::string& name() const override { return t_.name; }

  std::vector<Finding> preflight(TrafficContext& ctx) override {
    std::vector<Finding> found;
    for (Side s : {Side::source, Side::target})
      if (reach_the_same(Address::parse(t_.on[s].listen), Address::parse(t_.on[s].application)))
        found.push_back({Finding::Level::error, "traffic.same_address", ctx.at(s).label() + ": traffic " + t_.name,
                         "the gate cannot listen at " + t_.on[s].listen + " where the application listens at " + t_.on[s].application,
                         "give the application another address"});
    if (found.empty()) find_application(ctx.source, t_, found);
    return found;
  }

  std::vector<std::string> plan_notes() override {
    auto notes = common_notes(deployment_, t_, Front::none);
    notes.push_back("clients must use the gate's address, " + t_.on.source.listen + " on the source or " + t_.on.target.listen + " on the target, from begin on; nobody listens at either after complete or cancel");
    return notes;
  }

  void prepare(TrafficContext& ctx) override {
    raise_gates(ctx, t_, {{t_.on.source.listen, t_.on.source.application}, {t_.on.target.listen, t_.on.target.application}});
  }

  // The gate ends with its agent; a listener that went earlier would refuse clients that can still be served.
  void withdraw(TrafficContext&) override {}
  std::int64_t from_old_address(TrafficContext& ctx, Side old_side) override { return clients_at(ctx, old_side, t_.name); }
  std::vector<std::string> leftovers(TrafficContext&) override { return {}; }

 private:
  const Deployment& deployment_;
  TrafficConfig t_;
};

}  // namespace

std::unique_ptr<Traffic> make_listen(const Deployment& d, const TrafficConfig& t) { return std::make_unique<ListenTraffic>(d, t); }

}  // namespace rehome
