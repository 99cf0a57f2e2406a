#include "base/bytes.h"

#include <array>

#include "base/error.h"

namespace rehome {
namespace {

constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

}  // namespace

std::string to_base64(std::string_view bytes) {
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    unsigned word = 0;
    for (std::size_t k = 0; k < 3; k++)
      word = word << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0u);
    for (std::size_t k = 0; k < 4; k++)
      out += i + k > bytes.size() ? '=' : kDigits[word >> (18 - 6 * k) & 63];
  }
  return out;
}

std::string from_base64(std::string_view text) {
  std::array<int, 256> value;
  value.fill(-1);
  for (std::size_t i = 0; i < kDigits.size(); i++) value[static_cast<unsigned char>(kDigits[i])] = static_cast<int>(i);
  Error bad(Code::io, "a value is not base64");
  if (text.size() % 4 != 0) throw bad;
  std::string out;
  out.reserve(text.size() / 4 * 3);
  for (std::size_t i = 0; i < text.size(); i += 4) {
    std::size_t count = 4;
    if (i + 4 == text.size()) count = text[i + 3] != '=' ? 4 : text[i + 2] != '=' ? 3 : 2;
    unsigned word = 0;
    for (std::size_t k = 0; k < 4; k++) {
      int v = k < count ? value[static_cast<unsigned char>(text[i + k])] : 0;
      if (v < 0) throw bad;
      word = word << 6 | static_cast<unsigned>(v);
    }
    for (std::size_t k = 0; k + 1 < count; k++) out += static_cast<char>(word >> (16 - 8 * k) & 255);
  }
  return out;
}

bool is_utf8(std::string_view s) {
  for (std::size_t i = 0; i < s.size();) {
    auto c = static_cast<unsigned char>(s[i]);
    std::size_t more = c < 0x80 ? 0 : c >= 0xC2 && c < 0xE0 ? 1 : c >= 0xE0 && c < 0xF0 ? 2 : c >= 0xF0 && c < 0xF5 ? 3 : 9;
    if (more == 9 || i + more >= s.size()) {
      if (more != 0) return false;
    }
    for (std::size_t k = 1; k <= more; k++) {
      auto d = static_cast<unsigned char>(s[i + k]);
      if ((d & 0xC0) != 0x80) return false;
      if (k == 1 && ((c == 0xE0 && d < 0xA0) || (c == 0xED && d > 0x9F) || (c == 0xF0 && d < 0x90) || (c == 0xF4 && d > 0x8F)))
        return false;
    }
    i += more + 1;
  }
  return true;
}

}  // namespace rehome
