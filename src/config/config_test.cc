#include <gtest/gtest.h>

#include "base/error.h"
#include "config/config.h"

namespace rehome {
namespace {

TEST(Config, TheExampleOfTheManualIsRead) {
  Deployment d;
  try {
    d = load_deployment(REHOME_DOCS "/example.yaml");
  } catch (const Error& e) {
    FAIL() << e.what();
  }
  EXPECT_EQ(d.name, "shop");
  EXPECT_EQ(d.hash.size(), 64u);
  ASSERT_EQ(d.stores.size(), 2u);
  EXPECT_EQ(d.stores[0].postgres.server.target.port, 5433);
  EXPECT_EQ(d.stores[0].postgres.server.source.os_user, "postgres");
  EXPECT_EQ(url_at(d, d.checks[0], Side::target), "http://127.0.0.1/health");
  EXPECT_EQ(d.link.initiator, Side::target);
  EXPECT_EQ(d.max_pause, Millis(500));
}

}  // namespace
}  // namespace rehome
