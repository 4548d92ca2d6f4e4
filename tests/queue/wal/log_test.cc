#include "queue/wal/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "queue/wal/manifest.h"
#include "queue/wal/recovery.h"
#include "tests/queue/wal/log_fixture.h"

namespace machina {
namespace {

using ::testing::HasSubstr;

TEST(Log, W1LsnsHaveNoGapsAcrossBatchesSegmentsAndStarts) {
  Journal j;
  ASSERT_TRUE(j.open());
  EXPECT_TRUE(j.replayed.empty());
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(j.put(1 + i % 7, 500));
  EXPECT_GT(j.segments().size(), 2u);
  Lsn last = j.log->durable();
  ASSERT_TRUE(j.log->close());
  ASSERT_TRUE(j.open());
  EXPECT_TRUE(j.report.clean);
  EXPECT_TRUE(is_run(j.replayed, 1, last));
  ASSERT_TRUE(j.put(3));
  EXPECT_EQ(j.log->durable(), last + 3);
}

TEST(Log, W2EverythingDurableSurvivesAPowerCut) {
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    Journal j(seed);
    ASSERT_TRUE(j.open());
    ASSERT_TRUE(j.put(5));
    ASSERT_TRUE(j.put(70, 900));
    ASSERT_TRUE(j.append(4));  // staged: nobody was told
    j.crash();
    ASSERT_TRUE(j.open()) << j.error.what;
    EXPECT_FALSE(j.report.clean);
    EXPECT_TRUE(is_run(j.replayed, 1, 75));
  }
}

TEST(Log, W3TornLastBatchIsCut) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(10));
  ASSERT_TRUE(j.append(20, 400));
  j.disk.fail_write_at(j.disk.writes() + 1);  // some sectors land
  j.write();
  EXPECT_TRUE(j.log->poisoned());
  j.crash();
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_TRUE(is_run(j.replayed, 1, 10));
  EXPECT_EQ(j.report.dropped_from, 11u);
  EXPECT_GT(j.report.dropped_bytes, 0u);
  EXPECT_THAT(j.report.text, HasSubstr("torn tail"));
}

TEST(Log, W3DamageToADurableBatchIsRefusedByName) {
  Journal j;
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(j.put(2));
  std::string name = j.segments()[0];
  std::uint64_t at = j.batch_at(name, 2);  // lsn 5 and 6
  j.disk.flip(name, at + 100);
  j.crash();
  std::uint64_t before = j.disk.digest();
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr(name));
  EXPECT_THAT(j.error.what, HasSubstr("offset " + std::to_string(at)));
  EXPECT_THAT(j.error.what, HasSubstr("lsn 5..8"));
  EXPECT_EQ(j.disk.digest(), before) << "no file may be touched";
}

}  // namespace
}  // namespace machina
