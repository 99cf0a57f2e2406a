#include "gate/proxy.h"

#include <gtest/gtest.h>

namespace rehome {
namespace {

TEST(Proxy, BothVersionsSayTheSameOfAClient) {
  for (std::string line : {"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n", "PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n", "PROXY UNKNOWN\r\n"}) {
    std::string second = proxy_version_2(line);
    for (const std::string& header : {line, second}) {
      auto h = parse_proxy(header + "GET /");
      ASSERT_TRUE(h) << line;
      EXPECT_EQ(h->size, header.size());
      EXPECT_EQ(h->line, line);
      // However little of it has come, it is neither refused nor taken for whole.
      for (std::size_t n = 0; n < header.size(); n++) {
        auto part = parse_proxy(header.substr(0, n));
        ASSERT_TRUE(part) << line << n;
        EXPECT_EQ(part->size, 0u) << line << n;
      }
    }
  }
}

// Written out from the specification, not by our own code.
TEST(Proxy, ReadsAHeaderOfAnotherProgram) {
  std::string header("\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0f\xc0\x00\x02\x01\xc6\x33\x64\x07\xdc\x04\x01\xbb\x04\x00\x00", 31);
  auto h = parse_proxy(header + "x");
  ASSERT_TRUE(h);
  EXPECT_EQ(h->size, 31u);  // with an addition (TLV) that is skipped
  EXPECT_EQ(h->line, "PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n");
  // LOCAL: the proxy itself, for its own checks.
  auto local = parse_proxy(std::string("\r\n\r\n\0\r\nQUIT\n\x20\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x07\xdc\x04\x01\xbb", 28));
  ASSERT_TRUE(local);
  EXPECT_EQ(local->line, "PROXY UNKNOWN\r\n");
  EXPECT_EQ(parse_proxy("PROXY UNKNOWN ffff:f::1 whatever 65535\r\n")->line, "PROXY UNKNOWN\r\n");
}

TEST(Proxy, RefusesWhatIsNone) {
  std::string v2("\r\n\r\n\0\r\nQUIT\n", 12);
  for (std::string bad : {std::string("GET / HTTP/1.1\r\n\r\n"), std::string("PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n"), std::string("PROXY TCP4 1.2.3.4 5.6.7.8 1 70000\r\n"),
                          std::string("PROXY TCP4 ::1 ::1 1 2\r\n"), std::string("PROXY TCP9 1.2.3.4 5.6.7.8 1 2\r\n"), "PROXY TCP4 " + std::string(200, '1'),
                          v2 + std::string("\x11\x11\x00\x0c", 4) + std::string(12, 'x'), v2 + std::string("\x21\x11\xff\xff", 4), v2 + std::string("\x21\x11\x00\x02xx", 6),
                          std::string("\r\n\r\nGET")})
    EXPECT_FALSE(parse_proxy(bad)) << bad;
}

}  // namespace
}  // namespace rehome
