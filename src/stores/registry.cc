#include "stores/registry.h"

#include "base/error.h"
#include "stores/postgres/postgres.h"
#if __has_include("stores/files/files.h")
#include "stores/files/files.h"
#endif

namespace rehome {

std::vector<std::unique_ptr<Store>> make_stores(const Deployment& deployment) {
  std::vector<std::unique_ptr<Store>> stores;
  for (const auto& s : deployment.stores) {
    switch (s.kind) {
      case StoreConfig::Kind::postgres: stores.push_back(std::make_unique<PostgresStore>(s, deployment)); break;
      case StoreConfig::Kind::files:
#if __has_include("stores/files/files.h")
        stores.push_back(make_files_store(s, deployment));
#endif
        break;
    }
  }
  return stores;
}

}  // namespace rehome
