// For tests: this machine as a site that has no agent, and runs what it is asked to.
#pragma once

#include <string>
#include <vector>

#include "site/site.h"

namespace rehome {

class Here : public Site {
 public:
  Side side() const override { return Side::source; }
  std::string label() const override { return "source"; }
  std::string state() const override { return "/nowhere"; }
  std::int64_t generation() const override { return 1; }
  Json call(const std::string&, Json args, Deadline deadline) override {
    return outcome_to_json(run({.argv = args.at("argv").get<std::vector<std::string>>()}, deadline));
  }
  Fd open_relay(const std::string&, const std::string&, const std::string&) override { return {}; }
  std::string local_socket_for(const std::string&, const std::string&, const std::string&) override { return {}; }
};

}  // namespace rehome
