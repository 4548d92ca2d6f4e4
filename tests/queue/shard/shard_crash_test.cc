// The shard over a disk that loses what was not synced. A client works, the
// machine dies at some operation of the disk, the shard comes back; what the
// client was told must still be true. One seed is one run (but for the timing
// of the history thread).

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <map>
#include <thread>

#include "queue/shard/shard.h"
#include "tests/queue/shard/shard_harness.h"
#include "tests/support/sim_storage.h"

namespace machina {
namespace {

class CrashRun {
 public:
  explicit CrashRun(std::uint64_t seed)
      : disk_(seed), chance_(seed * 77 + 1), random_(seed ^ 0xfeed) {
    char name[] = "/tmp/machina_crash_XXXXXX";
    root_ = mkdtemp(name);
    options_.history_dir = root_;
    options_.log.segment_bytes = 128 << 10;
    options_.log.first_segment_bytes = 32 << 10;
    options_.log.batch_bytes_max = 64 << 10;
    options_.log.own_thread = false;
    options_.log.spares = false;
    options_.checkpoint_log_bytes = 24 << 10;
    options_.checkpoint_ms = 50;
    options_.body_cache_bytes = 8 << 10;
    options_.disk_soft_bytes = options_.disk_hard_bytes = 1;
  }
  ~CrashRun() {
    shard_.reset();
    std::filesystem::remove_all(root_);
  }

  void run(int lives) {
    open();
    for (int life = 0; life < lives && !failed(); ++life) {
      disk_.kill_at(disk_.operations() + 20 + chance_.below(150));
      for (int i = 0; i < 200 && !shard_->poisoned(); ++i) step();
      shard_.reset();
      disk_.kill_at(0);
      if (chance_.one_in(2)) {
        disk_.crash();
      } else {
        disk_.restart();
      }
      open();
      if (!failed()) audit();
    }
    if (!failed()) drain();
  }

  std::uint64_t told() const { return jobs_.size(); }
  std::uint64_t completed() const { return completed_; }
  std::uint64_t checkpoints() const { return checkpoints_; }

 private:
  struct Told {
    std::string payload;
    std::string dedup_key;
    bool succeeded = false;  // its completion was answered
    std::string result;
  };

  static bool failed() { return testing::Test::HasFatalFailure(); }

  void open() {
    RecoveryReport report;
    auto opened = Shard::open(disk_, clock_, random_, options_, &report);
    ASSERT_TRUE(opened) << opened.error().what;
    if (report.checkpoint != 0) ++checkpoints_;
    shard_ = std::move(*opened);
    shard_->on_send([this](Response r) { answer_ = std::move(r); });
    held_.clear();
  }

  Response call(std::variant<Command, GetQuery, ListQuery> what) {
    answer_.reset();
    Request request;
    request.from = {0, 1, ++sequence_};
    request.what = std::move(what);
    shard_->submit(std::move(request));
    for (int i = 0; i < 100'000 && !answer_; ++i) {
      shard_->turn();
      if (i > 2) std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    EXPECT_TRUE(answer_) << "no answer";
    return answer_ ? std::move(*answer_) : Response{};
  }

  void step() {
    clock_.advance(static_cast<Millis>(chance_.below(40)));
    switch (chance_.below(8)) {
      case 0:
      case 1:
      case 2:
        return enqueue();
      case 3:
      case 4:
        return lease();
      case 5:
        return complete();
      case 6:
        return fail();
      default:
        return repeat();
    }
  }

  void enqueue() {
    EnqueueCommand command;
    NewJob job =
        noop("{\"p\":\"" + std::string(chance_.below(3000), 'p') + "\"}");
    job.max_attempts = 1000;
    if (chance_.one_in(2)) {
      job.dedup_key = "k" + std::to_string(++keys_);
      job.dedup_ttl_ms = 1'000'000'000;
    }
    job.payload_digest[0] = keys_;
    command.jobs.push_back(job);
    Response response = call(Command(command));
    if (response.status != Response::Status::done) return;
    ASSERT_EQ(response.items.at(0).answer, Answer::ok);
    Told& told = jobs_[response.items[0].id];
    told.payload = job.payload;
    told.dedup_key = job.dedup_key;
    if (!job.dedup_key.empty()) keyed_[job.dedup_key] = {job, response};
  }

  void lease() {
    LeaseCommand command;
    command.worker = "w";
    command.kinds = {"*"};
    command.max = 3;
    Response response = call(Command(command));
    for (const LeaseView& lease : response.leases) {
      EXPECT_GT(lease.fence, last_fence_) << "a fence was issued twice";
      last_fence_ = lease.fence;
      auto told = jobs_.find(lease.job.id);
      if (told != jobs_.end()) {
        EXPECT_EQ(lease.job.payload, told->second.payload);
        EXPECT_FALSE(told->second.succeeded) << "ran again after its end";
      }
      held_.push_back({lease.fence, lease.job.id});
    }
  }

  void complete() {
    if (held_.empty()) return;
    auto [fence, id] = held_.back();
    held_.pop_back();
    std::string result = "{\"f\":\"" + fence_hex(fence) + "\"}";
    CompleteCommand command;
    command.items.emplace_back();
    command.items[0].fence = fence;
    command.items[0].outcome.result = result;
    Response response = call(Command(command));
    if (response.status != Response::Status::done) return;
    if (response.items.at(0).answer != Answer::ok) return;  // it expired
    ++completed_;
    Told& told = jobs_[id];
    told.succeeded = true;
    told.result = result;
    fences_[fence] = id;
  }

  void fail() {
    if (held_.empty()) return;
    FailCommand command;
    command.fence = held_.back().first;
    held_.pop_back();
    command.outcome.code = EndCode::exit;
    command.outcome.retry_after_ms = 10;
    call(Command(command));
  }

  // What was answered once is answered again.
  void repeat() {
    if (chance_.one_in(2) && !keyed_.empty()) {
      auto it = keyed_.begin();
      std::advance(it, static_cast<long>(chance_.below(keyed_.size())));
      EnqueueCommand command;
      command.jobs.push_back(it->second.first);
      Response response = call(Command(command));
      if (response.status != Response::Status::done) return;
      EXPECT_EQ(response.items.at(0).answer, Answer::duplicate);
      EXPECT_EQ(response.items.at(0).id, it->second.second.items[0].id);
    } else if (!fences_.empty()) {
      auto it = fences_.begin();
      std::advance(it, static_cast<long>(chance_.below(fences_.size())));
      CompleteCommand command;
      command.items.emplace_back();
      command.items[0].fence = it->first;
      command.items[0].outcome.result = "{\"other\":1}";
      Response response = call(Command(command));
      if (response.status != Response::Status::done) return;
      EXPECT_EQ(response.items.at(0).answer, Answer::ok);
      EXPECT_EQ(response.views.at(0).result, jobs_.at(it->second).result);
    }
  }

  // Promise 6: no 201 lost, no answered completion undone.
  void audit() {
    for (const auto& [id, told] : jobs_) {
      GetQuery query;
      query.id = id;
      Response response = call(query);
      ASSERT_EQ(response.status, Response::Status::done) << response.detail;
      ASSERT_EQ(response.items.at(0).answer, Answer::ok)
          << to_string(id) << " was lost";
      const JobView& view = response.views.at(0);
      if (!told.payload.empty()) {
        ASSERT_EQ(view.payload, told.payload);
      }
      if (told.succeeded) {
        ASSERT_EQ(view.state, State::succeeded) << to_string(id);
        ASSERT_EQ(view.result, told.result);
      }
    }
  }

  // Liveness: with a sound disk every job ends.
  void drain() {
    for (int i = 0; i < 10'000; ++i) {
      if (shard_->stats().live_jobs == 0) break;
      clock_.advance(20'000);
      lease();
      while (!held_.empty()) complete();
    }
    EXPECT_EQ(shard_->stats().live_jobs, 0u);
    auto closed = shard_->close();
    ASSERT_TRUE(closed) << closed.error().what;
    shard_.reset();
    open();
    if (!failed()) audit();
  }

  std::string root_;
  SimStorage disk_;
  SeededRandom chance_;
  SeededRandom random_;
  TestClock clock_;
  ShardOptions options_;
  std::unique_ptr<Shard> shard_;
  std::optional<Response> answer_;
  std::uint64_t sequence_ = 0, keys_ = 0, completed_ = 0, checkpoints_ = 0;
  Fence last_fence_ = 0;
  std::map<JobId, Told> jobs_;
  std::map<std::string, std::pair<NewJob, Response>> keyed_;
  std::map<Fence, JobId> fences_;
  std::vector<std::pair<Fence, JobId>> held_;
};

class ShardCrash : public testing::TestWithParam<std::uint64_t> {};

TEST_P(ShardCrash, WhatWasToldIsTrueAfterEachDeath) {
  CrashRun run(GetParam());
  run.run(8);
  EXPECT_GT(run.told(), 20u);
  EXPECT_GT(run.completed(), 5u);
  EXPECT_GT(run.checkpoints(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, ShardCrash,
                         testing::Range<std::uint64_t>(1, 25));

}  // namespace
}  // namespace machina
