#include "queue/history/end_sink.h"

#include <gtest/gtest.h>

#include <mutex>
#include <vector>

#include "tests/queue/shard/shard_harness.h"

namespace machina {
namespace {

class KeepingSink final : public EndSink {
 public:
  Result<void> take(const std::vector<HistoryChange>& changes) override {
    std::lock_guard lock(mutex_);
    taken_.insert(taken_.end(), changes.begin(), changes.end());
    ++calls_;
    if (failing_) return Error{Code::io, "the sink said no"};
    return {};
  }
  void fail(bool failing) {
    std::lock_guard lock(mutex_);
    failing_ = failing;
  }
  std::vector<HistoryChange> taken() {
    std::lock_guard lock(mutex_);
    return taken_;
  }
  int calls() {
    std::lock_guard lock(mutex_);
    return calls_;
  }

 private:
  std::mutex mutex_;
  std::vector<HistoryChange> taken_;
  int calls_ = 0;
  bool failing_ = false;
};

class EndSinkTest : public ShardHarness {
 protected:
  void start() {
    open();
    shard_->feed_to(&sink_);
  }
  // Outlives the shard, which is the base's.
  ~EndSinkTest() override { shard_.reset(); }
  KeepingSink sink_;
};

TEST_F(EndSinkTest, IsGivenEachEndWholeAlsoOfJobsThatHistoryDoesNotKeep) {
  start();
  NewJob job = noop(R"({"a":1})");
  job.keep_result_ms = 0;
  JobId id = enqueued(job);
  Millis ended = clock_.wall_ms();
  complete(lease_one().fence, R"({"b":2})");
  wait_for_history();
  auto taken = sink_.taken();
  ASSERT_EQ(taken.size(), 1u);
  EXPECT_EQ(taken[0].id, id);
  ASSERT_NE(taken[0].body, nullptr);
  ASSERT_NE(taken[0].end, nullptr);
  EXPECT_EQ(taken[0].body->job.payload, R"({"a":1})");
  EXPECT_EQ(taken[0].end->outcome.result, R"({"b":2})");
  EXPECT_GT(taken[0].lsn, 0u);
  EXPECT_EQ(taken[0].finished_ms, ended);
}

TEST_F(EndSinkTest, HistoryWaitsForASinkThatFails) {
  start();
  sink_.fail(true);
  enqueued(noop());
  complete(lease_one().fence);
  EXPECT_TRUE(turn_until([&] {
    clock_.advance(10);
    return sink_.calls() >= 3;
  }));
  ShardStats stats = shard_->stats();
  EXPECT_LT(stats.history_applied, stats.durable);
  sink_.fail(false);
  wait_for_history();
  auto taken = sink_.taken();
  EXPECT_EQ(taken.back().id, taken.front().id);
}

// S2: the sink had it, history did not; after the crash it comes again.
TEST_F(EndSinkTest, WhatHistoryHadNotTakenComesAgainAfterACrash) {
  start();
  sink_.fail(true);
  JobId id = enqueued(noop());
  complete(lease_one().fence, R"({"b":2})");
  EXPECT_TRUE(turn_until([&] {
    clock_.advance(10);
    return sink_.calls() >= 1;
  }));
  kill();
  std::size_t before = sink_.taken().size();
  sink_.fail(false);
  start();
  wait_for_history();
  auto taken = sink_.taken();
  ASSERT_EQ(taken.size(), before + 1);
  EXPECT_EQ(taken.back().id, id);
  EXPECT_EQ(taken.back().lsn, taken.front().lsn);
  ASSERT_NE(taken.back().end, nullptr);
  EXPECT_EQ(taken.back().end->outcome.result, R"({"b":2})");
  // And not a third time.
  close();
  start();
  wait_for_history();
  EXPECT_EQ(sink_.taken().size(), before + 1);
}

TEST_F(EndSinkTest, HearsWhoUnblockedBeforeTheEndAlsoAfterACrash) {
  start();
  sink_.fail(true);
  JobId id = enqueued(noop());
  BlockCommand block;
  block.fence = lease_one().fence;
  block.reason = "approval";
  std::string token = call(Command(block)).items.at(0).detail;
  UnblockCommand unblock;
  unblock.id = id;
  unblock.token = token;
  unblock.actor = "ann";
  unblock.input = R"({"approve":true})";
  EXPECT_EQ(call(Command(unblock)).items.at(0).answer, Answer::ok);
  complete(lease_one().fence);
  turn_for(20);
  kill();
  std::size_t before = sink_.taken().size();
  sink_.fail(false);
  start();
  wait_for_history();
  auto taken = sink_.taken();
  taken.erase(taken.begin(),
              taken.begin() + static_cast<std::ptrdiff_t>(before));
  ASSERT_EQ(taken.size(), 2u);
  ASSERT_NE(taken[0].unblock, nullptr);
  EXPECT_EQ(taken[0].unblock->actor, "ann");
  EXPECT_EQ(taken[0].unblock->input, R"({"approve":true})");
  EXPECT_EQ(taken[0].id, id);
  EXPECT_EQ(taken[1].unblock, nullptr);
  ASSERT_NE(taken[1].end, nullptr);
  EXPECT_LT(taken[0].lsn, taken[1].lsn);
  // History is none the worse for it.
  EXPECT_EQ(state_of(id), State::succeeded);
}

TEST_F(EndSinkTest, HearsOfAnExplicitRetry) {
  start();
  JobId id = enqueued(noop());
  call(Command(CancelCommand{id}));
  wait_for_history();
  RetryCommand retry;
  retry.id = id;
  EXPECT_EQ(call(Command(retry)).items.at(0).answer, Answer::ok);
  wait_for_history();
  auto taken = sink_.taken();
  ASSERT_EQ(taken.size(), 2u);
  EXPECT_EQ(taken[1].id, id);
  EXPECT_EQ(taken[1].body, nullptr);
  EXPECT_EQ(taken[1].unblock, nullptr);
}

}  // namespace
}  // namespace machina
