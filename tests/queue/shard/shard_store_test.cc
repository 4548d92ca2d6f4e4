// What the shard does with a log store that is not a FileLog: promises L1 to
// L3 of queue/wal/log_store.h.

#include "tests/queue/shard/shard_harness.h"
#include "tests/support/faulty_log.h"

namespace machina {
namespace {

using Status = Response::Status;

class ShardStore : public ShardHarness {
 protected:
  ShardStore() { options_.open_log = faulty(faults_); }
  ~ShardStore() override { shard_.reset(); }  // before the faults go

  Address submit_noop() {
    EnqueueCommand command;
    command.jobs.push_back(noop());
    return submit(Command(std::move(command)));
  }
  bool base_is_durable() {
    return turn_until([this] {
      ShardStats stats = shard_->stats();
      return stats.applied > 0 && stats.log.records >= stats.applied;
    });
  }

  LogFaults faults_;
};

TEST_F(ShardStore, ALogThatDoesNotOpenIsTheShardsError) {
  options_.open_log = [](Storage&, const LogOptions&, Lsn,
                         const LogStore::Load&, const LogStore::Visit&,
                         RecoveryReport*) -> Result<std::unique_ptr<LogStore>> {
    return Error{Code::conflict, "another owner has the log"};
  };
  TestRandom random(1);
  auto opened = Shard::open(*gate_, clock_, random, options_, nullptr);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, Code::conflict);
  EXPECT_EQ(opened.error().what, "another owner has the log");
}

TEST_F(ShardStore, NoAnswerLeavesBeforeTheLogIsDurable) {
  open();
  faults_.hold_durable = true;
  Address at = submit_noop();
  ASSERT_TRUE(base_is_durable());  // the file has the record
  shard_->turn();
  EXPECT_TRUE(answers_.empty());  // but the store does not say so
  faults_.hold_durable = false;
  EXPECT_EQ(await(at).status, Status::done);
}

TEST_F(ShardStore, APoisonedLogTellsNobodyOfASuccess) {
  open();
  faults_.hold_durable = true;
  Address at = submit_noop();
  ASSERT_TRUE(base_is_durable());
  EXPECT_TRUE(answers_.empty());
  faults_.poison = "another owner has the log";
  Response response = await(at);
  EXPECT_EQ(response.status, Status::poisoned);
  EXPECT_NE(response.detail.find("another owner has the log"),
            std::string::npos)
      << response.detail;
  EXPECT_TRUE(shard_->poisoned());
  EXPECT_EQ(enqueue(noop()).status, Status::poisoned);
  EXPECT_EQ(call(ListQuery{}).status, Status::poisoned);
  EXPECT_FALSE(shard_->close());
}

}  // namespace
}  // namespace machina
