// What the verbs show to people: times, columns, and text that came from a job.

#include <gtest/gtest.h>

#include <cstdlib>
#include <ctime>

#include "tools/cli/cli.h"

namespace machina::cli {
namespace {

TEST(Harmless, NoControlCharacterReachesTheTerminal) {
  EXPECT_EQ(harmless("a\x1b[2Jb"), "a?[2Jb");
  EXPECT_EQ(harmless("\r\b\x7f"), "???");
  EXPECT_EQ(harmless("one\n\ttwo"), "one\n\ttwo");
  EXPECT_EQ(harmless("\xc2\x9b"
                     "31m"),
            "?31m");  // CSI as one C1 character
  EXPECT_EQ(harmless("caf\xc3\xa9"), "caf\xc3\xa9");
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
