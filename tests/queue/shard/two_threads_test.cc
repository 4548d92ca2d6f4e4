// The seam between Io and Shard carries self-contained values only: here each
// has its own thread, and two bounded mailboxes are all that they share. Run
// under the thread sanitizer this says that nothing else is.

#include <condition_variable>
#include <thread>

#include "queue/shard/mailbox.h"
#include "tests/queue/shard/shard_harness.h"

namespace machina {
namespace {

class Bell {
 public:
  void ring() {
    std::lock_guard lock(mutex_);
    rung_ = true;
    rang_.notify_all();
  }
  void wait(Millis ms) {
    std::unique_lock lock(mutex_);
    rang_.wait_for(lock, std::chrono::milliseconds(ms),
                   [this] { return rung_; });
    rung_ = false;
  }

 private:
  std::mutex mutex_;
  std::condition_variable rang_;
  bool rung_ = false;
};

TEST_F(ShardHarness, IoAndShardOnTwoThreads) {
  constexpr int kJobs = 2000, kInFlight = 64;
  open();
  Mailbox<Request> requests(kInFlight * 32);
  Mailbox<Response> responses(kInFlight * 32);
  // A thread of the log may ring it when this body has ended.
  auto shards_bell = std::make_shared<Bell>();
  Bell& for_shard = *shards_bell;
  Bell for_io;
  std::atomic<bool> stop{false};

  shard_->on_send([&](Response response) {
    auto put = responses.put(std::move(response));
    ASSERT_NE(put, Mailbox<Response>::Put::full);
    for_io.ring();
  });
  shard_->on_wake([shards_bell] { shards_bell->ring(); });
  std::thread shard_thread([&] {
    while (!stop) {
      for (Request& request : requests.take()) {
        shard_->submit(std::move(request));
      }
      shard_->turn();
      Millis due = shard_->next_due_ms();
      if (due != 0) for_shard.wait(due < 0 ? 50 : std::min<Millis>(due, 50));
    }
  });

  // This thread is the Io: it enqueues, leases and completes, each job once.
  int enqueued = 0, completed = 0, in_flight = 0;
  std::uint64_t sequence = 0;
  auto send = [&](Command command) {
    Request request;
    request.from = {1, 1, ++sequence};
    request.what = std::move(command);
    ASSERT_NE(requests.put(std::move(request)), Mailbox<Request>::Put::full);
    ++in_flight;
    for_shard.ring();
  };
  std::map<Fence, int> seen;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (completed < kJobs && std::chrono::steady_clock::now() < deadline) {
    while (in_flight < kInFlight && enqueued < kJobs) {
      EnqueueCommand command;
      command.jobs.push_back(
          noop("{\"n\":" + std::to_string(enqueued++) + "}"));
      send(Command(command));
      if (enqueued % 8 == 0) send(Command(lease_command(16)));
    }
    if (in_flight == 0) send(Command(lease_command(16)));
    for_io.wait(50);
    for (Response& response : responses.take()) {
      --in_flight;
      ASSERT_EQ(response.status, Response::Status::done) << response.detail;
      if (response.leases.empty()) {
        for (const JobView& view : response.views) {
          if (view.state == State::succeeded) ++completed;
        }
        continue;
      }
      for (const LeaseView& lease : response.leases) {
        EXPECT_EQ(++seen[lease.fence], 1);
        send(Command(completion(lease.fence)));
      }
    }
  }
  stop = true;
  for_shard.ring();
  shard_thread.join();
  EXPECT_EQ(completed, kJobs);
  EXPECT_EQ(shard_->stats().live_jobs, 0u);
}

}  // namespace
}  // namespace machina
