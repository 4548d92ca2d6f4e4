#include "queue/base/hex.h"

#include <sys/random.h>

#include <algorithm>

#include "queue/base/check.h"

namespace machina {

void write_hex(char* text, const void* bytes, std::size_t size) {
  const auto* from = static_cast<const unsigned char*>(bytes);
  for (std::size_t i = 0; i < size; ++i) {
    *text++ = kHexDigits[from[i] >> 4];
    *text++ = kHexDigits[from[i] & 15];
  }
}

void write_hex(char* text, std::uint64_t number) {
  for (int i = 15; i >= 0; --i, number >>= 4) text[i] = kHexDigits[number & 15];
}

std::string hex(const void* bytes, std::size_t size) {
  std::string text(2 * size, '0');
  write_hex(text.data(), bytes, size);
  return text;
}

bool is_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return lower_hex_value(c) >= 0; });
}

std::string random_hex(std::size_t digits) {
  unsigned char bytes[32];
  CHECK(digits <= 2 * sizeof bytes);
  CHECK(getrandom(bytes, sizeof bytes, 0) ==
        static_cast<ssize_t>(sizeof bytes));
  std::string text = hex(bytes, sizeof bytes);
  text.resize(digits);
  return text;
}

bool same_secret(std::string_view secret, std::string_view given) {
  if (secret.empty()) return false;
  auto difference = static_cast<unsigned>(secret.size() != given.size());
  for (std::size_t i = 0; i < given.size(); ++i) {
    difference |= static_cast<unsigned char>(given[i]) ^
                  static_cast<unsigned char>(secret[i % secret.size()]);
  }
  return difference == 0;
}

}  // namespace machina
