// How long jobs waited and ran, as the histograms of /metrics get it: told by
// the core, so that a restart neither leaves a job out nor shortens its time.

#include "tests/queue/shard/shard_harness.h"

namespace machina {
namespace {

using Samples = std::vector<std::pair<std::string, double>>;

class ShardTimesTest : public ShardHarness {
 protected:
  // One job waits 40 s, of which 30 s before `restart`; then it runs 7 s, of
  // which 5 s before a second `restart`.
  void expect_times_over(const std::function<void()>& restart) {
    open();
    enqueued(noop());
    clock_.advance(30'000);
    restart();
    clock_.advance(10'000);
    Fence fence = lease_one().fence;
    EXPECT_EQ(shard_->stats().wait_seconds, (Samples{{"noop", 40.0}}));
    clock_.advance(5'000);
    restart();
    clock_.advance(2'000);
    complete(fence);
    EXPECT_EQ(shard_->stats().run_seconds, (Samples{{"noop", 7.0}}));
  }
};

TEST_F(ShardTimesTest, F26_AKilledServerForgetsNoWaitAndNoRun) {
  expect_times_over([this] {
    kill();
    open();
  });
}

TEST_F(ShardTimesTest, F26_ARestartWithACheckpointForgetsNoWaitAndNoRun) {
  expect_times_over([this] { reopen(); });
}

TEST_F(ShardTimesTest, F26_ARetryWaitsFromWhenItIsReadyAgain) {
  open();
  NewJob job = noop();
  job.retry_min_ms = job.retry_max_ms = 1'000;
  enqueued(job);
  Fence fence = lease_one().fence;
  FailCommand fail;
  fail.fence = fence;
  fail.outcome.code = EndCode::exit;
  call(Command(fail));
  clock_.advance(2'000);
  shard_->turn();  // promotes the job
  clock_.advance(3'000);
  lease_one();
  EXPECT_EQ(shard_->stats().wait_seconds,
            (Samples{{"noop", 0.0}, {"noop", 3.0}}));
}

}  // namespace
}  // namespace machina
