#include "support/options.h"

#include <algorithm>
#include <charconv>

namespace rehome::testing {

Options::Options(int argc, char** argv, const std::vector<std::string>& valued,
                 const std::vector<std::string>& switches) {
  auto among = [](const std::vector<std::string>& names, const std::string& n) {
    return std::find(names.begin(), names.end(), n) != names.end();
  };
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    if (name.rfind("--", 0) != 0) throw Error(Code::usage, "not an option: " + name);
    name.erase(0, 2);
    if (among(switches, name)) {
      values_[name];
      continue;
    }
    if (!among(valued, name)) throw Error(Code::usage, "no option --" + name);
    auto& values = values_[name];
    while (i + 1 < argc && std::string(argv[i + 1]).rfind("--", 0) != 0) values.push_back(argv[++i]);
    if (values.empty()) throw Error(Code::usage, "--" + name + " needs a value");
  }
}

std::string Options::get(const std::string& name, const std::string& fallback) const {
  auto it = values_.find(name);
  return it == values_.end() || it->second.empty() ? fallback : it->second.back();
}

std::string Options::need(const std::string& name) const {
  if (!has(name)) throw Error(Code::usage, "--" + name + " is required");
  return get(name, {});
}

std::vector<std::string> Options::all(const std::string& name) const {
  auto it = values_.find(name);
  return it == values_.end() ? std::vector<std::string>() : it->second;
}

long long Options::number(const std::string& name, long long fallback) const {
  if (!has(name)) return fallback;
  std::string text = need(name);
  long long value = 0;
  auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failed != std::errc() || end != text.data() + text.size() || value < 0)
    throw Error(Code::usage, "--" + name + " takes a number, not " + text);
  return value;
}

}  // namespace rehome::testing
