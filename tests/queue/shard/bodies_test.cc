#include "queue/shard/bodies.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace machina {
namespace {

JobId id_of(std::uint64_t n) { return make_job_id(1, n, n); }

void put(BodyCache& cache, std::uint64_t n, std::size_t payload) {
  EnqueueRecord record;
  record.id = id_of(n);
  record.job.payload.assign(payload, static_cast<char>('a' + n % 26));
  std::vector<std::byte> bytes;
  encode(Record{1, record}, &bytes);
  cache.put(record.id, bytes);
}

TEST(BodyCache, NeverHoldsMoreThanItsBound) {
  BodyCache cache(100'000);
  for (std::uint64_t i = 1; i <= 1000; ++i) put(cache, i, 100 + i % 700);
  EXPECT_GT(cache.size(), 100u);
  EXPECT_LT(cache.size(), 1000u);
  EXPECT_EQ(cache.get(id_of(1)), nullptr);
  EXPECT_NE(cache.get(id_of(1000)), nullptr);
}

TEST(BodyMemory, F31_EveryTextOfABodyIsCounted) {
  using Text = std::string NewJob::*;
  for (Text text :
       {&NewJob::kind, &NewJob::queue, &NewJob::tenant, &NewJob::payload,
        &NewJob::dedup_key, &NewJob::sandbox, &NewJob::traceparent,
        &NewJob::request_id, &NewJob::concurrency_key}) {
    EnqueueRecord record;
    const std::size_t before = memory_of(record);
    (record.job.*text).assign(kKindKeyBytesMax, 'k');
    EXPECT_GE(memory_of(record), before + kKindKeyBytesMax);
  }
}

TEST(BodyCache, BodyLargerThanTheBoundEvictsNobody) {
  BodyCache cache(10'000);
  put(cache, 1, 100);
  put(cache, 2, 20'000);
  EXPECT_NE(cache.get(id_of(1)), nullptr);
  EXPECT_EQ(cache.get(id_of(2)), nullptr);
  BodyCache none(0);
  put(none, 1, 1);
  EXPECT_EQ(none.get(id_of(1)), nullptr);
}

TEST(BodyCache, TheOldestGoesFirst) {
  BodyCache cache(3 * 1200);
  for (std::uint64_t i = 1; i <= 4; ++i) put(cache, i, 1000);
  EXPECT_EQ(cache.get(id_of(1)), nullptr);
  EXPECT_NE(cache.get(id_of(2)), nullptr);
}

TEST(BodyCache, AnIdThatComesAgainIsTheLaterOne) {
  BodyCache cache(100'000);
  put(cache, 1, 5000);
  put(cache, 1, 50);  // an explicit retry
  EXPECT_EQ(cache.size(), 1u);
  EXPECT_EQ(cache.get(id_of(1))->job.payload.size(), 50u);
  EXPECT_NE(cache.take(id_of(1)), nullptr);
  EXPECT_EQ(cache.size(), 0u);
  EXPECT_EQ(cache.take(id_of(1)), nullptr);
}

// What came last is found, whole; what is found is what was put; whatever came,
// went and was overwritten.
TEST(BodyCache, FindsWhatIsInAndNothingElse) {
  constexpr std::size_t kBytes = 64'000;
  BodyCache cache(kBytes);
  struct Put {
    std::uint64_t n;
    std::size_t payload;
    bool taken = false;
  };
  std::deque<Put> order;  // oldest first
  std::uint64_t random = 1;
  for (int step = 0; step < 200'000; ++step) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::uint64_t n = (random >> 33) % 397;
    auto last = std::find_if(order.rbegin(), order.rend(),
                             [n](const Put& p) { return p.n == n; });
    bool known = last != order.rend() && !last->taken;
    std::size_t choice = (random >> 20) % 8;
    if (choice < 5) {
      std::size_t payload = (random >> 40) % (choice == 0 ? 5000 : 200);
      put(cache, n, payload);
      std::erase_if(order, [n](const Put& p) { return p.n == n; });
      order.push_back({n, payload});
      ASSERT_NE(cache.get(id_of(n)), nullptr);
      continue;
    }
    Body body = choice < 7 ? cache.get(id_of(n)) : cache.take(id_of(n));
    if (!known) {
      ASSERT_EQ(body, nullptr) << step;
      continue;
    }
    if (body != nullptr) {
      ASSERT_EQ(body->id, id_of(n));
      ASSERT_EQ(body->job.payload,
                std::string(last->payload, static_cast<char>('a' + n % 26)));
    }
    // At most a wrap and one body's room are lost, and the taken and put again.
    std::size_t later = 0;
    for (auto it = order.rbegin(); it != last; ++it) later += it->payload + 160;
    if (later < kBytes / 4) {
      ASSERT_NE(body, nullptr) << step;
    }
    if (choice == 7) last->taken = true;
  }
}

TEST(StoreThreads, WhatATaskReturnsRunsOnTheOwnersThread) {
  StoreThreads threads(2);
  std::atomic<int> woken{0};
  threads.on_wake([&] { ++woken; });
  const auto owner = std::this_thread::get_id();
  int done = 0;
  std::atomic<int> elsewhere{0};
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(threads.post([&]() -> StoreThreads::Done {
      if (std::this_thread::get_id() != owner) ++elsewhere;
      return [&] {
        EXPECT_EQ(std::this_thread::get_id(), owner);
        ++done;
      };
    }));
  }
  while (threads.outstanding() > 0) {
    threads.wait_done(100);
    threads.run_done();
  }
  EXPECT_EQ(done, 100);
  EXPECT_EQ(elsewhere, 100);
  EXPECT_GT(woken, 0);
}

TEST(StoreThreads, FullQueueSaysNo) {
  std::mutex gate;
  gate.lock();
  {
    StoreThreads threads(1);
    std::size_t accepted = 0;
    while (accepted <= kStoreTasksMax + 1) {
      bool posted = threads.post([&]() -> StoreThreads::Done {
        std::lock_guard lock(gate);
        return {};
      });
      if (!posted) break;
      ++accepted;
    }
    EXPECT_GE(accepted, kStoreTasksMax);
    EXPECT_LE(accepted, kStoreTasksMax + 1);
    gate.unlock();
  }  // what waits is dropped; what runs is finished
}

TEST(Mailbox, BoundedInOrderAndWakesOnce) {
  Mailbox<int> box(3);
  EXPECT_EQ(box.put(1), Mailbox<int>::Put::first);
  EXPECT_EQ(box.put(2), Mailbox<int>::Put::added);
  EXPECT_EQ(box.put(3), Mailbox<int>::Put::added);
  EXPECT_EQ(box.put(4), Mailbox<int>::Put::full);
  EXPECT_EQ(box.take(), (std::vector<int>{1, 2, 3}));
  EXPECT_TRUE(box.take().empty());
  EXPECT_EQ(box.put(5), Mailbox<int>::Put::first);
}

}  // namespace
}  // namespace machina
