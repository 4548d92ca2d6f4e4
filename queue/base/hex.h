// queue/base/hex.h
//
// Bytes as hexadecimal text, and the names that are such text: digests,
// commits, secrets.
//
//   HX1  Writes lower case. (HexTest.BytesAreWrittenAndRead)
//   HX2  is_hex() takes lower case alone, so a name has one spelling.
//        (HexTest.NamesAreLowerCaseAndOfTheirLength)

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace machina {

constexpr char kHexDigits[] = "0123456789abcdef";

// The value of a digit; -1: it is none.
constexpr int lower_hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}
constexpr int hex_value(char c) {  // of either case
  return lower_hex_value(c >= 'A' && c <= 'F' ? static_cast<char>(c + 32) : c);
}

// `text` has room for two digits a byte; for 16 digits of a number.
void write_hex(char* text, const void* bytes, std::size_t size);
void write_hex(char* text, std::uint64_t number);
std::string hex(const void* bytes, std::size_t size);

bool is_hex(std::string_view text);
inline bool is_sha256(std::string_view text) {
  return text.size() == 64 && is_hex(text);
}
inline bool is_commit_name(std::string_view text) {  // whole: SHA-1 to SHA-256
  return text.size() >= 40 && text.size() <= 64 && is_hex(text);
}

std::string random_hex(std::size_t digits);  // at most 64; nobody can guess it

// True where `given` is `secret`, which is not empty. The time depends on
// `given` alone.
bool same_secret(std::string_view secret, std::string_view given);

}  // namespace machina
