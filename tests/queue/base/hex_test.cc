#include "queue/base/hex.h"

#include <gtest/gtest.h>

namespace machina {
namespace {

TEST(HexTest, BytesAreWrittenAndRead) {
  EXPECT_EQ(hex("\x00\x7f\xff\x1a", 4), "007fff1a");
  EXPECT_EQ(hex("", 0), "");
  char text[16];
  write_hex(text, std::uint64_t{0x0123456789abcdef});
  EXPECT_EQ(std::string_view(text, 16), "0123456789abcdef");
  for (int i = 0; i < 16; ++i) EXPECT_EQ(lower_hex_value(kHexDigits[i]), i);
  EXPECT_EQ(hex_value('F'), 15);
  EXPECT_EQ(lower_hex_value('F'), -1);
  for (const char c : {'g', 'G', '/', ':', '@', '`', '\0', '\x80'}) {
    EXPECT_EQ(hex_value(c), -1) << c;
  }
}

TEST(HexTest, NamesAreLowerCaseAndOfTheirLength) {
  EXPECT_TRUE(is_sha256(std::string(64, 'a')));
  EXPECT_FALSE(is_sha256(std::string(63, 'a')));
  EXPECT_FALSE(is_sha256(std::string(64, 'A')));
  for (const std::size_t size : {40, 64}) {
    EXPECT_TRUE(is_commit_name(std::string(size, '0')));
  }
  for (const std::size_t size : {0, 7, 39, 65}) {
    EXPECT_FALSE(is_commit_name(std::string(size, '0')));
  }
  EXPECT_FALSE(is_commit_name(std::string(39, '0') + "g"));
}

TEST(HexTest, RandomNamesDiffer) {
  EXPECT_EQ(random_hex(8).size(), 8u);
  EXPECT_EQ(random_hex(64).size(), 64u);
  EXPECT_TRUE(is_hex(random_hex(64)));
  EXPECT_NE(random_hex(32), random_hex(32));
}

TEST(HexTest, ASecretIsTheSameOnlyWhenAllOfItIs) {
  EXPECT_TRUE(same_secret("abc", "abc"));
  for (const char* other : {"", "ab", "abcd", "abcabc", "Abc", "abd"}) {
    EXPECT_FALSE(same_secret("abc", other)) << other;
  }
  EXPECT_FALSE(same_secret("", ""));
}

}  // namespace
}  // namespace machina
