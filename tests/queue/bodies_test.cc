#include "queue/bodies.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace machina {
namespace {

Body body_of(std::uint64_t n, std::size_t payload) {
  EnqueueRecord record;
  record.id = make_job_id(1, n, n);
  record.job.payload.assign(payload, 'p');
  return std::make_shared<const EnqueueRecord>(std::move(record));
}

TEST(BodyCache, NeverHoldsMoreThanItsBound) {
  BodyCache cache(100'000);
  for (std::uint64_t i = 1; i <= 1000; ++i) {
    cache.put(body_of(i, 100 + i % 700));
    ASSERT_LE(cache.bytes(), 100'000u);
  }
  EXPECT_GT(cache.size(), 10u);
  EXPECT_EQ(cache.get(make_job_id(1, 1, 1)), nullptr);
  EXPECT_NE(cache.get(make_job_id(1, 1000, 1000)), nullptr);
}

TEST(BodyCache, BodyLargerThanTheBoundEvictsNobody) {
  BodyCache cache(10'000);
  cache.put(body_of(1, 100));
  cache.put(body_of(2, 20'000));
  EXPECT_NE(cache.get(make_job_id(1, 1, 1)), nullptr);
  EXPECT_EQ(cache.get(make_job_id(1, 2, 2)), nullptr);
}

TEST(BodyCache, LeastRecentlyUsedGoesFirst) {
  std::size_t each = memory_of(*body_of(1, 1000));
  BodyCache cache(3 * each);
  for (std::uint64_t i = 1; i <= 3; ++i) cache.put(body_of(i, 1000));
  cache.get(make_job_id(1, 1, 1));
  cache.put(body_of(4, 1000));
  EXPECT_NE(cache.get(make_job_id(1, 1, 1)), nullptr);
  EXPECT_EQ(cache.get(make_job_id(1, 2, 2)), nullptr);
}

TEST(BodyCache, TakeAndReplaceKeepTheAccount) {
  BodyCache cache(100'000);
  cache.put(body_of(1, 5000));
  cache.put(body_of(1, 50));  // an explicit retry brings the same id again
  EXPECT_EQ(cache.size(), 1u);
  EXPECT_EQ(cache.get(make_job_id(1, 1, 1))->job.payload.size(), 50u);
  EXPECT_NE(cache.take(make_job_id(1, 1, 1)), nullptr);
  EXPECT_EQ(cache.bytes(), 0u);
  EXPECT_EQ(cache.take(make_job_id(1, 1, 1)), nullptr);
}

// Every id that is in is found, every other is not, whatever came and went.
TEST(BodyCache, FindsExactlyWhatIsIn) {
  std::size_t each = memory_of(*body_of(1, 16));
  BodyCache cache(60 * each);
  std::deque<std::uint64_t> order;  // oldest first
  std::uint64_t random = 1;
  auto touch = [&](std::uint64_t n) {
    std::erase(order, n);
    order.push_back(n);
  };
  for (int step = 0; step < 20'000; ++step) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::uint64_t n = (random >> 33) % 97;
    switch ((random >> 20) % 4) {
      case 0:
      case 1:
        cache.put(body_of(n, 16));
        touch(n);
        if (order.size() > 60) order.pop_front();
        break;
      case 2: {
        bool there = std::find(order.begin(), order.end(), n) != order.end();
        ASSERT_EQ(cache.get(make_job_id(1, n, n)) != nullptr, there) << step;
        if (there) touch(n);
        break;
      }
      default:
        cache.take(make_job_id(1, n, n));
        std::erase(order, n);
    }
    ASSERT_EQ(cache.size(), order.size());
    ASSERT_EQ(cache.bytes(), order.size() * each);
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
