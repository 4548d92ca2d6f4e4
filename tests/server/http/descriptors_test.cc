#include "server/http/descriptors.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

namespace machina {
namespace {

TEST(DescriptorsTest, F06_TheSharesNeverExceedTheLimit) {
  for (int limit = kDescriptorsMin; limit < 9000; limit += 7) {
    for (int workers : {0, 1, 4}) {
      auto d = share_descriptors(limit, 4096, workers);
      ASSERT_TRUE(d) << limit;
      EXPECT_LE(d->connections + d->local + d->files + kOwnDescriptors, limit);
      EXPECT_GE(d->connections, 20) << limit;
      EXPECT_GE(d->local, 3 * workers + 4) << limit;
      EXPECT_GE(d->files, 8);
      EXPECT_EQ(d->fewer, d->connections < 4096);
    }
  }
  auto many = share_descriptors(1 << 20, 4096, 64);
  ASSERT_TRUE(many);
  EXPECT_EQ(many->connections, 4096);
  EXPECT_EQ(many->local, kLocalConnectionsMax);
  EXPECT_EQ(many->files, kOpenFilesMax);
}

TEST(DescriptorsTest, F06_TooFewAreRefusedWithTheNumberThatIsNeeded) {
  for (auto [limit, workers] : {std::pair{64, 0}, {191, 0}, {256, 64}}) {
    auto d = share_descriptors(limit, 100, workers);
    ASSERT_FALSE(d) << limit;
    EXPECT_NE(d.error().what.find(std::to_string(limit)), std::string::npos);
    EXPECT_NE(d.error().what.find("LimitNOFILE"), std::string::npos);
  }
  auto enough = share_descriptors(kOwnDescriptors + 2 * (3 * 64 + 8), 10, 64);
  EXPECT_TRUE(enough);
}

TEST(DescriptorsTest, F06_TheSoftLimitIsRaised) {
  rlimit had{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &had), 0);
  if (had.rlim_max < 1000) GTEST_SKIP() << "the hard limit is too low here";
  rlimit low{400, had.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
  auto d = take_descriptors(4096, 1);
  ASSERT_TRUE(d);
  EXPECT_EQ(d->before, 400);
  EXPECT_GT(d->limit, 400);
  EXPECT_NE(d->text().find("(were 400)"), std::string::npos);
  EXPECT_EQ(setrlimit(RLIMIT_NOFILE, &had), 0);
}

}  // namespace
}  // namespace machina
