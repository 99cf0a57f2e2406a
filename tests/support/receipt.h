// Where an order's receipt lies, for the service that writes it and for those who look for it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace rehome::testing {

// FNV-1a: the same on every build and host, because the writer and the reader are different programs.
inline std::uint32_t key_hash(const std::string& key) {
  std::uint32_t h = 2166136261u;
  for (unsigned char c : key) h = (h ^ c) * 16777619u;
  return h;
}

inline std::string receipt_directory(const std::string& files, const std::string& key) {
  char name[9];
  std::snprintf(name, sizeof name, "%08x", key_hash(key));
  return files + "/receipts/" + std::string(name, 2);
}

inline std::string receipt_path(const std::string& files, const std::string& key) {
  return receipt_directory(files, key) + "/" + key + ".json";
}

}  // namespace rehome::testing
