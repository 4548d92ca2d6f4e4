// TAP as perl, bats, node and people write it, and as it is when something is
// wrong with it.

#include "workers/kinds/suite/tap.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace machina::kinds {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// "+id", "-id" or "~id" of each case: passed, failed, skipped.
std::vector<std::string> cases(const std::string& text) {
  const auto read = read_tap(text);
  if (!read) return {"? " + read.error().what};
  std::vector<std::string> out;
  for (const Case& one : *read) {
    const char* mark = one.outcome == Outcome::passed    ? "+"
                       : one.outcome == Outcome::failed  ? "-"
                       : one.outcome == Outcome::skipped ? "~"
                                                         : "!";
    out.push_back(mark + one.id);
  }
  return out;
}

TEST(TapTest, F03_PlanPointsAndDirectives) {
  EXPECT_THAT(cases("1..3\nok 1 - a\nnot ok 2 - b\nok 3\n"),
              ElementsAre("+a", "-b", "+test 3"));
  EXPECT_THAT(cases("TAP version 14\r\nok - a\r\nok b\r\n1..2\r\n"),
              ElementsAre("+a", "+b"));
  EXPECT_THAT(cases("noise\n1..5\nok 1 - s # SKIP no tty\nnot ok 2 t # TODO\n"
                    "ok 3 - u # todo later\nok 4 - v \\# SKIP\nok 5 #skip\n"
                    "# done\nmore noise, okay\n"),
              ElementsAre("~s", "~t", "~u", "+v # SKIP", "~test 5"));
  EXPECT_THAT(cases("1..0 # SKIP not here\n"), ElementsAre());
  EXPECT_THAT(cases("1..2\nok 1 - same\nok 2 - same\n"),
              ElementsAre("+same", "+same"));
  // The time in a name differs from run to run.
  EXPECT_THAT(cases("1..1\nok 1 - a # time=12.5ms\n"), ElementsAre("+a"));
  EXPECT_EQ(read_tap("1..1\nok 1 - a # time=12.5ms\n")->at(0).duration_ms, 13);
  EXPECT_THAT(cases("1..1\nok 1 - skipping is no directive here\n"),
              ElementsAre("+skipping is no directive here"));
}

TEST(TapTest, F03_WhatIsNotWholeIsNone) {
  const std::vector<std::pair<std::string, std::string>> table = {
      {"", "neither a plan nor a test"},
      {"hello\n", "neither a plan nor a test"},
      {"ok 1 - a\n", "the plan is missing"},
      {"1..2\nok 1 - a\n", "the plan is 1..2"},
      {"1..1\nok 1 - a\nok 2 - b\n", "line 3: the plan is 1..1"},
      {"ok 1 - a\nok 2 - b\n1..3\n", "the plan is 1..3"},
      {"1..2\nok 1 - a\nok 1 - b\n", "number 1 where 2 is next"},
      {"1..2\nok 2 - a\nok 1 - b\n", "number 2 where 1 is next"},
      {"1..1\n1..1\nok 1\n", "a second plan"},
      {"ok 1\n1..1\nok 2\n", "a test after the plan"},
      {"1..2\nok 1\nBail out! no database\nok 2\n", "no database"},
      {"1..1\n    ok 1 - in\n    Bail out!\n", "Bail out!"},
      {"1..1\nok 1\n  Bail out! odd\n", "Bail out! odd"},
      {"1..1\nok 1\n\t Bail out! tab\n", "Bail out! tab"},
      {"1..0 # SKIP x\nok 1\n", "the plan is 1..0"},
      {"TAP version 15\n1..1\nok 1\n", "version"},
      {"1..1\nok 1 - a\n  ---\n  message: x\n", "yaml"},
      {"1..1\n    ok 1 - in\n    1..1\n", "a subtest that does not end"},
      {"1..1\n    ok 1 - in\nok 1 - out\n", "no plan"},
      {"1..1\n    ok 1 - in\n    1..2\nok 1 - out\n", "the plan is 1..2"},
      {"1..1\n    not ok 1 - in\n    1..1\nok 1 - out\n", "says ok"},
      {"        ok 1 - in\n1..0\n", "further in"},
      {"1..1\nok 1 - a {\n    ok 1 - in\n    1..1\nok 2 - b\n", "not ended"},
  };
  for (const auto& [text, why] : table) {
    const auto read = read_tap(text);
    ASSERT_FALSE(read) << text;
    EXPECT_THAT(read.error().what, HasSubstr(why)) << text;
    // Over the handler's frames the same is said.
    const auto suite = decode_junit(encode_tap(text));
    ASSERT_FALSE(suite) << text;
    EXPECT_THAT(suite.error().what, HasSubstr(why)) << text;
  }
}

TEST(TapTest, F03_SubtestsNameTheirCases) {
  // perl's Test::More
  EXPECT_THAT(cases("# Subtest: outer\n    ok 1 - a\n    # Subtest: inner\n"
                    "        ok 1 - a\n        not ok 2 - b\n        1..2\n"
                    "    not ok 2 - inner\n    1..2\nnot ok 1 - outer\n"
                    "ok 2 - last\n1..2\n"),
              ElementsAre("+outer > a", "+outer > inner > a",
                          "-outer > inner > b", "+last"));
  // A point that fails by itself is a case; one without points below it too.
  EXPECT_THAT(cases("1..2\n    1..1\n    ok 1 - a\nnot ok 1 - outer\n"
                    "    1..0 # SKIP none\nok 2 - empty # SKIP none\n"),
              ElementsAre("+outer > a", "-outer", "~empty"));
  // What is still to be done excuses all of it.
  EXPECT_THAT(cases("1..1\n    1..1\n    not ok 1 - a\nnot ok 1 - o # TODO\n"),
              ElementsAre("~o > a"));
  // node-tap's blocks
  EXPECT_THAT(cases("TAP version 14\nok 1 - outer # time=5ms {\n    ok 1 - a\n"
                    "    1..1\n}\n\nok 2 - b {}\n1..2\n"),
              ElementsAre("+outer > a", "+b {}"));
}

TEST(TapTest, F03_FailuresAreExplained) {
  // bats
  const auto bats = read_tap(
      "1..1\nnot ok 1 adds\n# (in test file a.bats, line 3)\n#   `false' "
      "failed\n");
  ASSERT_TRUE(bats) << bats.error().what;
  EXPECT_EQ(bats->at(0).message,
            "(in test file a.bats, line 3)\n`false' failed");
  // node
  const auto node = read_tap(
      "TAP version 13\n# Subtest: x \\# y\nnot ok 1 - x \\# y\n  ---\n"
      "  duration_ms: 2.6\n  location: '/work/repo/a.js:1:1'\n  error: |-\n"
      "    ok 7 - no point\n    \n  ...\n1..1\n# tests 1\n");
  ASSERT_TRUE(node) << node.error().what;
  EXPECT_EQ(node->at(0).id, "x # y");
  EXPECT_EQ(node->at(0).duration_ms, 3);
  EXPECT_THAT(node->at(0).message, HasSubstr("/work/repo/a.js:1:1"));
  EXPECT_THAT(node->at(0).message, HasSubstr("ok 7 - no point"));
}

TEST(TapTest, F03_SizeHasBounds) {
  std::string deep;
  for (std::size_t i = 0; i <= kTapDepthMax; ++i) {
    deep += std::string(4 * i, ' ') + "1..1\n";
  }
  EXPECT_FALSE(read_tap(deep));
  std::string many = "1..100001\n";
  for (int i = 0; i <= 100'000; ++i) many += "ok\n";
  EXPECT_FALSE(read_tap(many));
  const auto names = read_tap("1..1\nok 1 - " + std::string(5000, 'x') + "\n");
  ASSERT_TRUE(names);
  EXPECT_EQ(names->at(0).id.size(), kCaseIdBytesMax);
}

}  // namespace
}  // namespace machina::kinds
