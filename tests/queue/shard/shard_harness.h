// tests/queue/shard/shard_harness.h
//
// A shard over a temporary root, a clock that moves when it is told to, and a
// client that turns the shard until its answer comes.

#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <map>
#include <mutex>
#include <thread>

#include "queue/base/storage.h"
#include "queue/shard/shard.h"

namespace machina {

class TestClock final : public Clock {
 public:
  Millis wall_ms() override { return wall_.load(); }
  Millis mono_ms() override { return mono_.load(); }
  void advance(Millis ms) {
    wall_ += ms;
    mono_ += ms;
  }
  void jump_wall(Millis ms) { wall_ += ms; }
  std::uint64_t boot() override { return boot_; }
  // The machine starts again: nothing but the wall clock goes on.
  void reboot() {
    ++boot_;
    mono_ = 5'000;
  }

 private:
  std::atomic<std::uint64_t> boot_{0};  // 0: it does not say
  std::atomic<Millis> wall_{1'763'640'000'000};
  std::atomic<Millis> mono_{1'000'000};
};

class TestRandom final : public Random {
 public:
  explicit TestRandom(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() override {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t state_;
};

// A disk whose writes and syncs to the log can be held up, or made to fail.
class GatedStorage final : public Storage {
 public:
  explicit GatedStorage(Storage& base) : base_(base) {}

  void close_gate() {
    std::lock_guard lock(mutex_);
    closed_ = true;
  }
  void open_gate() {
    std::lock_guard lock(mutex_);
    closed_ = false;
    opened_.notify_all();
  }
  void fail_from_now() { failing_ = true; }
  void pretend_free(std::uint64_t bytes) { free_ = bytes; }
  void pretend_total(std::uint64_t bytes) { total_ = bytes; }

  Result<std::unique_ptr<File>> open(std::string_view name,
                                     OpenMode mode) override {
    auto file = base_.open(name, mode);
    if (!file) return file;
    return std::unique_ptr<File>(new Gated(*this, std::move(*file)));
  }
  Result<std::vector<std::string>> list(std::string_view dir) override {
    return base_.list(dir);
  }
  Result<void> make_dir(std::string_view dir) override {
    return base_.make_dir(dir);
  }
  Result<void> rename(std::string_view from, std::string_view to) override {
    return base_.rename(from, to);
  }
  Result<void> exchange(std::string_view from, std::string_view to) override {
    return base_.exchange(from, to);
  }
  Result<void> remove(std::string_view name) override {
    return base_.remove(name);
  }
  Result<void> sync_dir(std::string_view dir) override {
    return base_.sync_dir(dir);
  }
  Result<std::unique_ptr<Lock>> lock(std::string_view name) override {
    return base_.lock(name);
  }
  Result<std::uint64_t> free_bytes() override {
    if (std::uint64_t pretended = free_) return pretended;
    return base_.free_bytes();
  }
  Result<std::uint64_t> total_bytes() override {
    if (std::uint64_t pretended = total_) return pretended;
    return base_.total_bytes();
  }

 private:
  class Gated final : public File {
   public:
    Gated(GatedStorage& owner, std::unique_ptr<File> file)
        : owner_(owner), file_(std::move(file)) {}
    Result<void> write_at(std::uint64_t offset,
                          std::span<const std::byte> bytes) override {
      if (auto r = owner_.pass(); !r) return r;
      return file_->write_at(offset, bytes);
    }
    Result<std::size_t> read_at(std::uint64_t offset,
                                std::span<std::byte> bytes) const override {
      return file_->read_at(offset, bytes);
    }
    Result<void> sync() override {
      if (auto r = owner_.pass(); !r) return r;
      return file_->sync();
    }
    Result<void> allocate(std::uint64_t bytes) override {
      return file_->allocate(bytes);
    }
    Result<std::uint64_t> size() const override { return file_->size(); }
    Result<void> truncate(std::uint64_t bytes) override {
      return file_->truncate(bytes);
    }

   private:
    GatedStorage& owner_;
    std::unique_ptr<File> file_;
  };

  Result<void> pass() {
    std::unique_lock lock(mutex_);
    opened_.wait(lock, [this] { return !closed_; });
    if (failing_) return Error{Code::io, "the disk said no"};
    return {};
  }

  Storage& base_;
  std::mutex mutex_;
  std::condition_variable opened_;
  bool closed_ = false;
  std::atomic<bool> failing_{false};
  std::atomic<std::uint64_t> free_{0}, total_{0};
};

inline NewJob noop(const std::string& payload = "{}") {
  NewJob job;
  job.kind = "noop";
  job.payload = payload;
  return job;
}

class ShardHarness : public testing::Test {
 protected:
  ShardHarness() {
    char name[] = "/tmp/machina_shard_XXXXXX";
    root_ = mkdtemp(name);
    std::filesystem::create_directory(root_ + "/queue");
    auto disk = open_posix_storage(root_ + "/queue");
    EXPECT_TRUE(disk);
    disk_ = std::move(*disk);
    gate_ = std::make_unique<GatedStorage>(*disk_);
    options_.history_dir = root_ + "/history";
    options_.log.segment_bytes = 1 << 20;
    options_.log.first_segment_bytes = 256 << 10;
    options_.disk_soft_bytes = 1;
    options_.disk_hard_bytes = 1;
  }
  ~ShardHarness() override {
    gate_->open_gate();
    shard_.reset();
    std::filesystem::remove_all(root_);
  }

  void open() {
    shard_.reset();
    random_ = std::make_unique<TestRandom>(++seed_);
    auto opened = Shard::open(*gate_, clock_, *random_, options_, &report_);
    ASSERT_TRUE(opened) << opened.error().what;
    shard_ = std::move(*opened);
    shard_->on_send([this](Response response) {
      Address to = response.to;
      ASSERT_FALSE(answers_.contains(to)) << "answered twice";
      answers_.emplace(to, std::move(response));
    });
    shard_->on_wake([this] { woken_ = true; });
  }
  void kill() {  // without close()
    shard_.reset();
    answers_.clear();
  }
  void close() {
    auto closed = shard_->close();
    ASSERT_TRUE(closed) << closed.error().what;
    shard_.reset();
    answers_.clear();
  }
  void reopen() {
    close();
    open();
  }

  Address submit(std::variant<Command, GetQuery, ListQuery> what,
                 Millis wait_ms = 0, std::uint64_t connection = 1) {
    Request request;
    request.from = {0, connection, ++sequence_};
    request.what = std::move(what);
    request.wait_ms = wait_ms;
    shard_->submit(std::move(request));
    return {0, connection, sequence_};
  }
  // Turns for `ms` of real time, or until `done`.
  bool turn_until(const std::function<bool()>& done, int ms = 10'000) {
    auto deadline =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
    while (true) {
      shard_->turn();
      if (done()) return true;
      if (std::chrono::steady_clock::now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
  void turn_for(int ms) {
    turn_until([] { return false; }, ms);
  }
  bool answered(const Address& at) { return answers_.contains(at); }
  Response await(const Address& at) {
    EXPECT_TRUE(turn_until([&] { return answered(at); })) << "no answer";
    auto it = answers_.find(at);
    if (it == answers_.end()) return Response{};
    Response response = std::move(it->second);
    answers_.erase(it);
    return response;
  }
  Response call(std::variant<Command, GetQuery, ListQuery> what,
                Millis wait_ms = 0) {
    return await(submit(std::move(what), wait_ms));
  }

  // What tests mostly do.
  Response enqueue(NewJob job, Millis wait_ms = 0) {
    EnqueueCommand command;
    command.jobs.push_back(std::move(job));
    return call(Command(std::move(command)), wait_ms);
  }
  JobId enqueued(NewJob job) {
    Response response = enqueue(std::move(job));
    EXPECT_EQ(response.status, Response::Status::done) << response.detail;
    EXPECT_EQ(response.items.size(), 1u);
    if (response.items.size() != 1) return JobId{};
    EXPECT_EQ(response.items[0].answer, Answer::ok);
    return response.items[0].id;
  }
  static LeaseCommand lease_command(int max = 1) {
    LeaseCommand command;
    command.worker = "w1";
    command.kinds = {"*"};
    command.max = max;
    return command;
  }
  LeaseView lease_one() {
    Response response = call(Command(lease_command()));
    EXPECT_EQ(response.leases.size(), 1u) << response.detail;
    return response.leases.empty() ? LeaseView{} : response.leases[0];
  }
  static CompleteCommand completion(Fence fence,
                                    const std::string& result = "{}") {
    CompleteCommand command;
    CompleteCommand::Item item;
    item.fence = fence;
    item.outcome.result = result;
    command.items.push_back(std::move(item));
    return command;
  }
  Response complete(Fence fence, const std::string& result = "{}") {
    return call(Command(completion(fence, result)));
  }
  Response get(const JobId& id) {
    GetQuery query;
    query.id = id;
    return call(query);
  }
  State state_of(const JobId& id) {
    Response response = get(id);
    EXPECT_EQ(response.items.at(0).answer, Answer::ok) << to_string(id);
    return response.views.at(0).state;
  }
  void wait_for_history() {
    EXPECT_TRUE(turn_until([&] {
      clock_.advance(10);
      ShardStats stats = shard_->stats();
      return stats.history_applied == stats.applied &&
             stats.durable == stats.applied;
    }));
  }

  std::string root_;
  TestClock clock_;
  std::unique_ptr<TestRandom> random_;
  std::uint64_t seed_ = 7;
  std::unique_ptr<Storage> disk_;
  std::unique_ptr<GatedStorage> gate_;
  ShardOptions options_;
  RecoveryReport report_;
  std::unique_ptr<Shard> shard_;
  std::map<Address, Response> answers_;
  std::uint64_t sequence_ = 0;
  std::atomic<bool> woken_{false};
};

}  // namespace machina
