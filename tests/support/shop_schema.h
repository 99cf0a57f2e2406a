// The sample service's database: as many kinds of objects as a real one has, so that a move which forgets one shows.
#pragma once

#include "support/pg.h"

namespace rehome::testing {

struct SchemaOptions {
  long long extra_tables = 0;
  long long history_orders = 0;
  long long large_objects = 0;
  bool unlogged = false;
  bool keyless = false;
};

void create_schema(Session& db, const SchemaOptions& options);

// How many products there are, numbered from 1: the load spreads its orders over them.
inline constexpr int kProducts = 200;
inline constexpr int kCustomers = 500;
inline constexpr long long kStock = 1'000'000'000;  // of each product, before the first order

}  // namespace rehome::testing
