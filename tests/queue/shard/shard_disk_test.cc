// The shard on a disk that is full to the last byte: what was promised finds
// the room that is held for it, all else is refused before it is decided, and
// room heals it (H4).

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <thread>

#include "queue/shard/shard.h"
#include "tests/queue/shard/shard_harness.h"
#include "tests/support/sim_storage.h"

namespace machina {
namespace {

using Status = Response::Status;

class ShardOnAFullDisk : public testing::TestWithParam<bool> {  // fsync
 protected:
  ShardOnAFullDisk() : disk_(3), random_(17) {
    char name[] = "/tmp/machina_full_XXXXXX";
    root_ = mkdtemp(name);
    options_.history_dir = root_;
    options_.log.fsync = GetParam();
    options_.log.segment_bytes = 1 << 20;
    options_.log.first_segment_bytes = 128 << 10;
    options_.log.own_thread = false;
    options_.checkpoint_log_bytes = 96 << 10;
    options_.checkpoint_ms = 50;
    options_.disk_soft_bytes = 2;
    options_.disk_hard_bytes = 1;
  }
  ~ShardOnAFullDisk() override {
    shard_.reset();
    std::filesystem::remove_all(root_);
  }

  void open() {
    shard_.reset();
    RecoveryReport report;
    auto opened = Shard::open(disk_, clock_, random_, options_, &report);
    ASSERT_TRUE(opened) << opened.error().what;
    shard_ = std::move(*opened);
    shard_->on_send([this](Response r) { answer_ = std::move(r); });
    shard_->turn();
  }
  void kill() {
    shard_.reset();
    disk_.restart();
  }
  // Until the disk has been looked at once more.
  void look() {
    clock_.advance(1500);
    for (int i = 0; i < 20; ++i) {
      shard_->turn();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  Response call(std::variant<Command, GetQuery, ListQuery> what) {
    answer_.reset();
    Request request;
    request.from = {0, 1, ++sequence_};
    request.what = std::move(what);
    shard_->submit(std::move(request));
    for (int i = 0; i < 20'000 && !answer_; ++i) {
      shard_->turn();
      if (i > 2) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    EXPECT_TRUE(answer_) << "no answer";
    return answer_ ? std::move(*answer_) : Response{};
  }
  Response enqueue(std::size_t bytes = 100) {
    EnqueueCommand command;
    command.jobs.push_back(noop("\"" + std::string(bytes, 'p') + "\""));
    command.jobs[0].max_attempts = 100;
    Response response = call(Command(command));
    if (response.status == Status::done) told_.push_back(response.items[0].id);
    return response;
  }
  std::vector<Fence> lease(int max) {
    LeaseCommand command;
    command.worker = "w";
    command.kinds = {"*"};
    command.max = max;
    std::vector<Fence> fences;
    for (const LeaseView& lease : call(Command(command)).leases)
      fences.push_back(lease.fence);
    return fences;
  }
  Status complete(Fence fence, std::size_t bytes) {
    CompleteCommand command;
    command.items.emplace_back();
    command.items[0].fence = fence;
    command.items[0].outcome.result = "\"" + std::string(bytes, 'r') + "\"";
    return call(Command(command)).status;
  }
  State state_of(const JobId& id) {
    GetQuery query;
    query.id = id;
    Response response = call(query);
    EXPECT_EQ(response.items.at(0).answer, Answer::ok) << to_string(id);
    return response.views.at(0).state;
  }

  std::string root_;
  SimStorage disk_;
  SeededRandom random_;
  TestClock clock_;
  ShardOptions options_;
  std::unique_ptr<Shard> shard_;
  std::optional<Response> answer_;
  std::uint64_t sequence_ = 0;
  std::vector<JobId> told_;
};

TEST_P(ShardOnAFullDisk, F05_EndsFindTheirRoomAndEverythingElseIsRefused) {
  open();
  for (int i = 0; i < 60; ++i) ASSERT_EQ(enqueue().status, Status::done);
  auto fences = lease(24);
  ASSERT_EQ(fences.size(), 24u);
  look();
  DiskState disk = shard_->disk();
  ASSERT_EQ(disk.level, DiskLevel::ok) << disk.says;
  ASSERT_GE(disk.held_bytes, disk.promised_bytes);
  disk_.set_quota(disk_.bytes_used());
  look();
  EXPECT_EQ(shard_->disk().level, DiskLevel::hard);
  EXPECT_NE(shard_->disk().says.find("make room"), std::string::npos);
  EXPECT_EQ(enqueue().status, Status::disk_low);
  LeaseCommand more;
  more.worker = "v";
  more.kinds = {"*"};
  EXPECT_EQ(call(Command(more)).status, Status::disk_low);
  const auto checkpoints = shard_->stats().applied;
  for (std::size_t i = 0; i < fences.size(); ++i) {
    if (i % 6 == 5) {
      FailCommand fail;
      fail.fence = fences[i];
      fail.outcome.code = EndCode::exit;
      fail.outcome.message = std::string(4000, 'm');
      EXPECT_EQ(call(Command(fail)).status, Status::done) << i;
    } else {
      EXPECT_EQ(complete(fences[i], 60'000), Status::done) << i;
    }
    clock_.advance(100);
    ASSERT_FALSE(shard_->poisoned()) << shard_->stats().poison_cause;
  }
  EXPECT_GT(shard_->stats().applied, checkpoints);
  for (int i = 40; i < 60; ++i) {
    EXPECT_EQ(call(Command(CancelCommand{told_[i]})).status, Status::done) << i;
  }
  // Killed and started on the full disk: all there, and it goes on.
  kill();
  open();
  EXPECT_EQ(state_of(told_[59]), State::cancelled);
  EXPECT_EQ(enqueue().status, Status::disk_low);
  EXPECT_EQ(call(Command(CancelCommand{told_[39]})).status, Status::done);
  disk_.set_quota(0);
  look();
  look();
  EXPECT_EQ(shard_->disk().level, DiskLevel::ok) << shard_->disk().says;
  EXPECT_EQ(enqueue().status, Status::done);
  EXPECT_FALSE(shard_->poisoned());
  for (const JobId& id : told_) state_of(id);
}

// A refused job does not grow the log, and the segments of what ended are kept
// for the checkpoints alone: the server itself must let them go.
TEST_P(ShardOnAFullDisk, F05_AnEmptyQueueGivesItsSegmentsBackToALowDisk) {
  options_.checkpoint_log_bytes = 1 << 30;  // none is due by growth
  options_.log.first_segment_bytes = options_.log.segment_bytes;
  options_.disk_soft_bytes = 3 << 20;
  for (const bool killed : {false, true}) {
    open();
    for (int i = 0; i < 60; ++i) {
      ASSERT_EQ(enqueue(20'000).status, Status::done);
      for (Fence fence : lease(1)) {
        ASSERT_EQ(complete(fence, 60'000), Status::done);
      }
    }
    if (killed) {
      kill();
      open();
    }
    look();
    const std::uint64_t used = disk_.bytes_used();
    disk_.set_quota(used + (1 << 20));
    look();
    ASSERT_EQ(shard_->disk().level, DiskLevel::soft) << killed;
    ASSERT_EQ(enqueue().status, Status::disk_low);
    // History, on a thread of its own, must have the ends first.
    for (int i = 0; i < 500 && shard_->disk().level != DiskLevel::ok; ++i)
      look();
    EXPECT_EQ(shard_->disk().level, DiskLevel::ok)
        << killed << ", " << shard_->disk().says << "; used " << used
        << ", now " << disk_.bytes_used();
    // Low again: soon there is nothing to give back, and no checkpoint is
    // written for that.
    disk_.set_quota(disk_.bytes_used() + (1 << 20));
    bool settled = false;
    for (int i = 0; i < 100 && !settled; ++i) {
      const Lsn applied = shard_->stats().applied;
      for (int n = 0; n < 6; ++n) look();
      settled = shard_->stats().applied == applied;
    }
    EXPECT_TRUE(settled) << "checkpoints without end";
    disk_.set_quota(0);
  }
  for (const JobId& id : told_) state_of(id);
}

// Between two looks at the disk, with everything at once.
TEST_P(ShardOnAFullDisk, F05_FilledByAnotherUnderLoadNothingIsLostOrPoisoned) {
  SeededRandom chance(99);
  for (int life = 0; life < 4; ++life) {
    open();
    std::vector<Fence> held;
    for (int cycle = 0; cycle < 4; ++cycle) {
      disk_.set_quota(disk_.bytes_used() + chance.below(100'000));
      int refused = 0;
      for (int i = 0; i < 300; ++i) {
        clock_.advance(static_cast<Millis>(chance.below(20)));
        switch (chance.below(4)) {
          case 0: {
            auto more = lease(1 + static_cast<int>(chance.below(8)));
            held.insert(held.end(), more.begin(), more.end());
            break;
          }
          case 1:
            if (held.empty()) break;
            if (complete(held.back(), chance.below(300'000)) == Status::done)
              held.pop_back();
            break;
          default:
            refused += enqueue(chance.below(20'000)).status != Status::done;
        }
        ASSERT_FALSE(shard_->poisoned()) << shard_->stats().poison_cause;
      }
      EXPECT_GT(refused, 0);
      disk_.set_quota(0);
      look();
      look();
      EXPECT_EQ(shard_->disk().level, DiskLevel::ok) << shard_->disk().says;
      EXPECT_EQ(enqueue().status, Status::done);
    }
    disk_.set_quota(disk_.bytes_used());
    for (int i = 0; i < 20; ++i) enqueue(5000);
    kill();
    disk_.set_quota(0);
  }
  open();
  for (const JobId& id : told_) state_of(id);
}

INSTANTIATE_TEST_SUITE_P(, ShardOnAFullDisk, testing::Bool(),
                         [](const auto& which) {
                           return which.param ? "Fsync" : "Os";
                         });

}  // namespace
}  // namespace machina
