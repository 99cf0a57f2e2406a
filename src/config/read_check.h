// One entry of `checks`.
#pragma once

#include <functional>
#include <set>
#include <string>

#include "config/config.h"
#include "config/yaml.h"

namespace rehome {

// Adds it to `d`, whose stores and traffic have been read; mistakes go to `y`. `unclear_stores`: names of stores that were not
// understood, of which nothing is held against a check. `unique_name` takes the entry's name.
void read_check(const YAML::Node& n, Deployment& d, YamlText& y, const std::set<std::string>& unclear_stores, const std::function<std::string(YamlMap&)>& unique_name);

}  // namespace rehome
