// What the verbs show to people: times, columns, and text that came from a job.

#include <gtest/gtest.h>

#include <cstdlib>
#include <ctime>
#include <nlohmann/json.hpp>

#include "tools/cli/cli.h"

namespace machina::cli {
namespace {

TEST(Harmless, NoControlCharacterReachesTheTerminal) {
  EXPECT_EQ(harmless("a\x1b[2Jb"), "a\\u001b[2Jb");
  EXPECT_EQ(harmless("\r\b\x7f"), "\\u000d\\u0008\\u007f");
  EXPECT_EQ(harmless(std::string_view("a\0b", 3)), "a\\u0000b");
  EXPECT_EQ(harmless("one\n\ttwo"), "one\n\ttwo");
  EXPECT_EQ(harmless("\xc2\x9b"
                     "31m"),
            "\\u009b31m");  // CSI as one C1 character
  EXPECT_EQ(harmless("caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"),
            "caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80");
}

TEST(Harmless, NothingTurnsOrHidesText) {
  // Each character that must not come through, in UTF-8.
  for (const auto& [bytes, code] :
       std::vector<std::pair<std::string, std::string>>{
           {"\xd8\x9c", "061c"},
           {"\xe2\x80\x8b", "200b"},
           {"\xe2\x80\x8c", "200c"},
           {"\xe2\x80\x8d", "200d"},
           {"\xe2\x80\x8e", "200e"},
           {"\xe2\x80\x8f", "200f"},
           {"\xe2\x80\xa8", "2028"},
           {"\xe2\x80\xaa", "202a"},
           {"\xe2\x80\xab", "202b"},
           {"\xe2\x80\xac", "202c"},
           {"\xe2\x80\xad", "202d"},
           {"\xe2\x80\xae", "202e"},
           {"\xe2\x81\xa0", "2060"},
           {"\xe2\x81\xa6", "2066"},
           {"\xe2\x81\xa7", "2067"},
           {"\xe2\x81\xa8", "2068"},
           {"\xe2\x81\xa9", "2069"},
           {"\xef\xbb\xbf", "feff"},
           {"\xc2\xad", "00ad"}}) {
    EXPECT_EQ(harmless("a" + bytes + "b"), "a\\u" + code + "b");
  }
  EXPECT_EQ(harmless("\xf3\xa0\x81\x81"), "\\U000e0041");  // a tag letter
  // A second time changes nothing.
  EXPECT_EQ(harmless(harmless("\xe2\x80\xae")), "\\u202e");
}

TEST(Harmless, JsonStaysTheSameJson) {
  const nlohmann::json json = {
      {"a",
       "\xc2\x9b"
       "31m \xe2\x80\xae \x7f \x1b \" \\ \n"},
      {"b", "caf\xc3\xa9 \xf0\x9f\x98\x80 \xf3\xa0\x81\x81"}};  // U+E0041
  for (int indent : {-1, 2}) {
    const std::string shown = harmless_json(json.dump(indent));
    EXPECT_EQ(nlohmann::json::parse(shown, nullptr, false), json) << shown;
    EXPECT_EQ(harmless(shown), shown) << "and nothing harmful is left";
    EXPECT_NE(shown.find("\xf0\x9f\x98\x80"), std::string::npos);
    EXPECT_NE(shown.find("\\udb40\\udc41"), std::string::npos) << shown;
  }
}

TEST(Harmless, BytesThatAreNoUtf8AreShownAsBytes) {
  EXPECT_EQ(harmless("a\x9b"
                     "1m"),
            "a\\x9b1m");
  EXPECT_EQ(harmless("\xe2\x80"), "\\xe2\\x80");
  EXPECT_EQ(harmless("\xc0\xaf"), "\\xc0\\xaf");           // too long a form
  EXPECT_EQ(harmless("\xed\xa0\x80"), "\\xed\\xa0\\x80");  // half a pair
  EXPECT_EQ(harmless("\xf4\x90\x80\x80"), "\\xf4\\x90\\x80\\x80");
}

TEST(Text, IsCutBetweenCharacters) {
  EXPECT_EQ(first_line("one\ntwo", 60), "one");
  EXPECT_EQ(first_line("caf\xc3\xa9", 4), "caf");
  EXPECT_EQ(first_line("caf\xc3\xa9", 5), "caf\xc3\xa9");
}

TEST(Table, ColumnsAlignAndOneCellIsOneLine) {
  Table table({"A", "LONG HEAD", "C"});
  table.add({"longer", "x", "last"});
  table.add({"", "two\nlines", ""});
  EXPECT_EQ(table.text(),
            "A       LONG HEAD  C\n"
            "longer  x          last\n"
            "-       two lines  -\n");
}

TEST(Times, AreReadAndShown) {
  EXPECT_EQ(parse_time_ms("1970-01-02T00:00:00.250Z"), 86'400'250);
  EXPECT_EQ(parse_time_ms("yesterday"), -1);
  EXPECT_EQ(readable_ms(0), "0 ms");
  EXPECT_EQ(readable_ms(999), "999 ms");
  EXPECT_EQ(readable_ms(11'240), "11.2 s");
  EXPECT_EQ(readable_ms(61'000), "1 min 01 s");
  EXPECT_EQ(readable_ms(3'720'000), "1 h 02 min");
  EXPECT_EQ(readable_ms(-5), "-5 ms");
  EXPECT_EQ(readable_time("not a time"), "-");
}

}  // namespace
}  // namespace machina::cli
