// rehome-pg-copy SOURCE_DIR TARGET_DIR DATABASE JOBS: the driver's copy alone, between two servers' socket directories on
// this machine; what bench/copy measures. Leaves the slot and the publication to the servers' end.
#include <cstdio>
#include <cstdlib>

#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/local_site.h"

int main(int argc, char** argv) {
  using namespace rehome;
  if (argc != 5) {
    std::fprintf(stderr, "usage: rehome-pg-copy SOURCE_DIR TARGET_DIR DATABASE JOBS\n");
    return 2;
  }
  try {
    testing::World world(testing::deployment_between(argv[1], argv[2], {argv[3]}, std::atoi(argv[4])));
    world.source.direct = world.target.direct = true;
    PostgresStore store(world.deployment.stores[0], world.deployment);
    Ticks from = system_clock().now();
    std::string phase;
    world.context().progress = [&](const Progress& p) {
      if (p.phase != phase) std::printf("%6.1f s  %s\n", ms_between(from, system_clock().now()) / 1000, p.phase.c_str());
      phase = p.phase;
    };
    store.prepare(world.context());
    double prepared = ms_between(from, system_clock().now());
    store.copy(world.context());
    std::printf("prepare %.0f ms, copy %.0f ms\n", prepared, ms_between(from, system_clock().now()) - prepared);
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
