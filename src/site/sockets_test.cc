#include "site/sockets.h"

#include <gtest/gtest.h>

namespace rehome {
namespace {

// Lines of a real kernel, x86-64.
constexpr char kTable[] =
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    "   0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 48211 1 0000000000000000 100 0 0 10 0\n"
    "   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 48212 1 0000000000000000 100 0 0 10 0\n"
    "   2: 02004D0A:A2B4 01004D0A:1538 01 00000000:00000000 00:00000000 00000000    33        0 48213 1 0000000000000000 20 4 30 10 -1\n"
    "   3: 02004D0A:A2B5 01004D0A:1538 06 00000000:00000000 03:00000A11 00000000     0        0 0 3 0000000000000000\n"
    "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    "   0: 00000000000000000000000000000000:1538 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000   105        0 48214 1\n"
    "   1: 0000000000000000FFFF00000100007F:1538 0000000000000000FFFF00000100007F:B1C2 01 00000000:00000000 00:00000000 00000000   105        0 48215 1\n";

TEST(Sockets, ReadsTheKernelsTable) {
  auto all = parse_proc_net_tcp(kTable);
  ASSERT_EQ(all.size(), 5u);   // what is neither listening nor established is left out
  EXPECT_TRUE(all[0].listening);
  EXPECT_EQ(all[0].local, "127.0.0.1");
  EXPECT_EQ(all[0].local_port, 8001);
  EXPECT_EQ(all[0].inode, "48211");
  EXPECT_FALSE(all[2].listening);
  EXPECT_EQ(all[2].remote, "10.77.0.1");
  EXPECT_EQ(all[2].remote_port, 5432);
  EXPECT_EQ(all[3].local, "::");
  EXPECT_EQ(all[4].local, "127.0.0.1");
  EXPECT_TRUE(parse_proc_net_tcp("garbage 0A 0A 0A\n").empty());
}

TEST(Sockets, KnowsWhichListenersMeet) {
  auto all = parse_proc_net_tcp(kTable);
  EXPECT_TRUE(same_listener(all[0], "127.0.0.1", 8001));
  EXPECT_TRUE(same_listener(all[0], "localhost", 8001));
  EXPECT_TRUE(same_listener(all[0], "0.0.0.0", 8001));
  EXPECT_FALSE(same_listener(all[0], "10.77.0.2", 8001));
  EXPECT_FALSE(same_listener(all[0], "127.0.0.1", 8002));
  EXPECT_TRUE(same_listener(all[1], "10.77.0.2", 80));
  EXPECT_TRUE(same_listener(all[3], "127.0.0.1", 5432));
  EXPECT_FALSE(same_listener(all[1], "::1", 80));   // of IPv4 alone
  EXPECT_TRUE(same_listener(all[1], "::", 80));
  EXPECT_TRUE(same_listener(all[3], "::1", 5432));
  EXPECT_FALSE(same_listener(all[2], "10.77.0.2", 0xA2B4));   // a connection, no listener
}

}  // namespace
}  // namespace rehome
