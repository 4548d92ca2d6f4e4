#include "queue/base/numbers.h"

#include <gtest/gtest.h>

namespace machina {
namespace {

TEST(NumbersTest, TheWholeTextIsANumberOrNothing) {
  EXPECT_EQ(parse_number("0"), 0);
  EXPECT_EQ(parse_number("-7"), -7);
  EXPECT_EQ(parse_number("9223372036854775807"), INT64_MAX);
  EXPECT_EQ(parse_number<std::uint64_t>("18446744073709551615"), UINT64_MAX);
  EXPECT_EQ(parse_number<double>("1.5"), 1.5);
  for (const char* text :
       {"", " 1", "1 ", "+1", "1x", "x", "-", "1.5", "9223372036854775808"}) {
    EXPECT_FALSE(parse_number(text)) << text;
  }
  EXPECT_FALSE(parse_number<std::uint64_t>("-1"));
  EXPECT_FALSE(parse_number<int>("2147483648"));
  EXPECT_FALSE(parse_number(std::string_view()));
}

}  // namespace
}  // namespace machina
