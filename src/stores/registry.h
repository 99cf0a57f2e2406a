// The one list of store drivers.
#pragma once

#include <memory>
#include <vector>

#include "stores/store.h"

namespace rehome {

// One driver object for every store of the deployment, in the order of the file.
std::vector<std::unique_ptr<Store>> make_stores(const Deployment& deployment);

}  // namespace rehome
