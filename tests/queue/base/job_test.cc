#include "queue/base/job.h"

#include <gtest/gtest.h>

#include <string>

namespace machina {
namespace {

TEST(Job, EveryStateAndCodeNameParsesBack) {
  for (int i = 0; i < kStates; ++i) {
    State state = static_cast<State>(i);
    EXPECT_EQ(parse_state(name(state)), state);
  }
  for (int i = 0; i < kEndCodes; ++i) {
    EndCode code = static_cast<EndCode>(i);
    EXPECT_EQ(parse_end_code(name(code)), code);
  }
  EXPECT_FALSE(parse_state("Ready"));
  EXPECT_FALSE(parse_state(""));
  EXPECT_FALSE(parse_end_code("exit "));
}

TEST(Job, KindIsDottedLowerCase) {
  for (const char* good : {"noop", "test.run", "a", "a1_.b.c", "x.9"}) {
    EXPECT_TRUE(valid_kind(good)) << good;
  }
  for (const char* bad : {"", ".", "a.", ".a", "a..b", "A", "9a", "_a", "a-b",
                          "a b", "t\xc3\xa9st", "a.B", "*"}) {
    EXPECT_FALSE(valid_kind(bad)) << bad;
  }
  EXPECT_TRUE(valid_kind(std::string(64, 'a')));
  EXPECT_FALSE(valid_kind(std::string(65, 'a')));
  EXPECT_FALSE(valid_kind(std::string_view("a\0b", 3)));
}

TEST(Job, NameIsAWord) {
  for (const char* good : {"default", "A", "0", "_x", "w:1.2-3"}) {
    EXPECT_TRUE(valid_name(good)) << good;
  }
  for (const char* bad : {"", "-a", ".a", ":a", "a/b", "a b", "\xff"}) {
    EXPECT_FALSE(valid_name(bad)) << bad;
  }
  EXPECT_FALSE(valid_name(std::string(65, 'a')));
}

TEST(Job, PatternsMatchWholeParts) {
  EXPECT_TRUE(valid_kind_pattern("*"));
  EXPECT_TRUE(valid_kind_pattern("test.*"));
  EXPECT_TRUE(valid_kind_pattern("test.run"));
  for (const char* bad : {"", "te*", "*.run", "test.**", "test.*.a", ".*"}) {
    EXPECT_FALSE(valid_kind_pattern(bad)) << bad;
  }
  EXPECT_TRUE(kind_matches("*", "noop"));
  EXPECT_TRUE(kind_matches("test.*", "test.run"));
  EXPECT_TRUE(kind_matches("test.*", "test.a.b"));
  EXPECT_FALSE(kind_matches("test.*", "test"));
  EXPECT_FALSE(kind_matches("test.*", "testing.run"));
  EXPECT_TRUE(kind_matches("test.run", "test.run"));
  EXPECT_FALSE(kind_matches("test.run", "test.runs"));
}

}  // namespace
}  // namespace machina
