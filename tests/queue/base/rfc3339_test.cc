#include "queue/base/rfc3339.h"

#include <gtest/gtest.h>

namespace machina {
namespace {

TEST(Rfc3339Test, TimesAreRfc3339) {
  std::string out;
  append_rfc3339(&out, 1'795'183'200'123);
  EXPECT_EQ(out, "2026-11-20T14:00:00.123Z");
  for (Millis ms : {Millis{0}, Millis{951'782'400'000}, Millis{1},
                    Millis{1'709'164'800'000}, Millis{4'102'444'799'999}}) {
    out.clear();
    append_rfc3339(&out, ms);
    EXPECT_EQ(parse_rfc3339(out), ms) << out;
  }
  EXPECT_EQ(parse_rfc3339("2026-11-20T15:00:00.5+01:00"), 1'795'183'200'500);
  EXPECT_EQ(parse_rfc3339("2026-11-20T14:00:00Z"), 1'795'183'200'000);
}

TEST(Rfc3339Test, OtherTextsAreRefused) {
  for (const char* bad :
       {"", "2026-11-20", "2026-11-20T14:00:00", "2026-13-20T14:00:00Z",
        "2026-02-29T14:00:00Z", "2026-11-20T24:00:00Z", "2026-11-20T14:00:00.Z",
        "2026-11-20T14:00:00Zx", "1763647200"}) {
    EXPECT_FALSE(parse_rfc3339(bad)) << bad;
  }
}

}  // namespace
}  // namespace machina
