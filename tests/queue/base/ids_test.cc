#include "queue/base/ids.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

namespace machina {
namespace {

JobId counted(std::uint64_t count, std::uint64_t chance = 0) {
  return make_job_id(1'700'000'000'000, 0, chance << 32 | count);
}

TEST(Ids, TextAndBack) {
  const JobId id = make_job_id(0x0123456789ab, 3, 0xfedcba9876543210);
  EXPECT_EQ(to_string(id), "01234567-89ab-7c00-bedc-ba9876543210");
  EXPECT_EQ(parse_job_id(to_string(id)), id);
  EXPECT_EQ(created_ms(id), 0x0123456789ab);
  for (const char* bad : {"", "01234567-89ab-7c00-bedc-ba987654321",
                          "01234567-89ab-7c00-bedc-ba98765432100",
                          "01234567-89AB-7c00-bedc-ba9876543210",
                          "0123456789ab-7c00-bedc-ba98765432100-",
                          "01234567-89ab-7c00-bedc-ba987654321g"}) {
    EXPECT_FALSE(parse_job_id(bad)) << bad;
  }
}

TEST(Ids, SixteenThatWereMadeInTurnLieTogether) {
  for (std::uint64_t first : {0ull, 16ull, 160ull, 0xfffffff0ull}) {
    std::set<std::uint64_t> places, blocks;
    for (std::uint64_t i = 0; i < 16; ++i) {
      places.insert(place_of(counted(first + i, first * 7 + i)));
      blocks.insert(place_of(counted(first + i)) >> 4);
    }
    EXPECT_EQ(places.size(), 16u);
    EXPECT_EQ(blocks.size(), 1u);
  }
}

// Whatever regular choice of the ids stays, no bucket gets many of them.
TEST(Ids, RegularChoicesSpreadOverATable) {
  constexpr std::size_t kBuckets = 1 << 14;
  for (std::uint64_t step : {1, 2, 3, 8, 16, 24, 64, 1000, 4096, 65536}) {
    std::vector<int> load(kBuckets);
    for (std::uint64_t i = 0; i < kBuckets; ++i) {
      ++load[place_of(counted(5 + i * step)) % kBuckets];
    }
    EXPECT_LE(*std::max_element(load.begin(), load.end()), 12) << step;
    std::size_t empty =
        static_cast<std::size_t>(std::count(load.begin(), load.end(), 0));
    EXPECT_LE(empty, kBuckets / 2) << step;
  }
}

}  // namespace
}  // namespace machina
