// tools/duration.h: each form, and what is none.

#include "tools/duration.h"

#include <gtest/gtest.h>

namespace machina {
namespace {

TEST(Duration, F28_EachFormIsReadInItsUnit) {
  EXPECT_EQ(parse_duration_ms("5s", 1), 5000);
  EXPECT_EQ(parse_duration_ms("10m", 1), 600'000);
  EXPECT_EQ(parse_duration_ms("1h30m", 1), 5'400'000);
  EXPECT_EQ(parse_duration_ms("2d", 1), 172'800'000);
  EXPECT_EQ(parse_duration_ms("250ms", 1000), 250);
  EXPECT_EQ(parse_duration_ms("1m5ms", 1), 60'005);
  EXPECT_EQ(parse_duration_ms("1.5s", 1), 1500);
  EXPECT_EQ(parse_duration_ms("7", 1), 7);
  EXPECT_EQ(parse_duration_ms("7", 1000), 7000);
  EXPECT_EQ(parse_duration_ms("0.2", 1000), 200);
  EXPECT_EQ(parse_duration_ms("0", 1), 0);
}

TEST(Duration, F28_WhatIsNoneIsRefused) {
  for (const char* text : {"",
                           "s",
                           "5 s",
                           " 5s",
                           "5s ",
                           "-5s",
                           "+5",
                           "5x",
                           "5S",
                           "5s5",
                           "5s5s",
                           "5s1m",
                           "30m1h",
                           "1..5s",
                           "1.s",
                           ".5s",
                           "0.5ms",
                           "1e3",
                           "5sec",
                           "99999999999999999999s",
                           "9223372036854775807d",
                           "0x5s",
                           "1.0000000001s",
                           "5s1h"}) {
    EXPECT_EQ(parse_duration_ms(text, 1), std::nullopt) << text;
  }
}

TEST(Duration, F28_ARangeNamesItsUnit) {
  EXPECT_EQ(duration_range(0, 86'400'000, "ms"),
            "0..86400000 ms, also as 5s, 10m or 1h30m");
  EXPECT_EQ(duration_range(200, 60'000, "s"),
            "0.2..60 s, also as 5s, 10m or 1h30m");
}

}  // namespace
}  // namespace machina
