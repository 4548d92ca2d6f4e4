// queue/shard/bodies.h
//
// Where jobs' bodies are kept while the core holds only their places: a
// byte-bounded cache of those that came lately, and the store threads that read
// the rest (and history) without the loop ever touching a file.
//
//   D1  The cache never holds more than its bound (one body over it is not
//       kept at all); the oldest goes first.
//   D2  A task runs on a store thread; what it returns runs on the owner's
//       thread, in run_done(). Between the two it owns all that it touches.
//   D3  At most kStoreTasksMax tasks wait; then post() says no.

#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "queue/base/ids.h"
#include "queue/record/record.h"
#include "queue/shard/mailbox.h"
#include "queue/wal/log_store.h"

namespace machina {

struct JobIdHash {
  std::size_t operator()(const JobId& id) const { return place_of(id); }
};

using Body = std::shared_ptr<const EnqueueRecord>;

std::size_t memory_of(const EnqueueRecord& body);  // roughly, for bounds
std::size_t memory_of(const EndRecord& end);

// Bodies in the log's own form, one behind the other in a ring: to take one in
// is a copy of its bytes, and those it overwrites need not be looked at. They
// are found through a flat table. With jobs by the hundred thousand both cost
// what they miss in the processor's caches, and that is a line or two.
class BodyCache {
 public:
  explicit BodyCache(std::size_t bytes_max);
  ~BodyCache();
  BodyCache(const BodyCache&) = delete;

  // `record`: an EnqueueRecord, encoded.
  void put(const JobId& id, std::span<const std::byte> record);
  Body get(const JobId& id) const;  // null: not here
  Body take(const JobId& id);       // and forget it
  std::size_t size() const { return size_; }
  std::size_t bytes_max() const { return capacity_; }

 private:
  struct Head {  // of a body in the ring
    JobId id;
    std::uint32_t bytes;
    std::uint32_t hash;
  };
  struct Slot {        // linear probing
    std::uint32_t at;  // in the ring, in units of kUnit, from 1; 0: empty
    std::uint32_t hash;
  };

  Head head(std::size_t at) const;
  // The slot of `id`, or the empty one where it would go.
  std::size_t slot_of(const JobId& id, std::uint32_t hash) const;
  Body body_in(const Slot& slot) const;
  void clear_slot(std::size_t slot);
  bool make_room(std::size_t bytes);
  void drop_oldest();

  const std::size_t capacity_;
  // The ring holds [oldest_, end_), or, when wrapped, [oldest_, wrap_) and
  // [0, end_).
  std::size_t oldest_ = 0, end_ = 0, wrap_ = 0;
  bool wrapped_ = false;
  std::size_t size_ = 0;
  std::byte* ring_;  // these two calloc'ed: what was never used costs nothing
  Slot* slots_;
  std::size_t mask_;
};

// The body of `id` as it lies in the log: a record of its own, or a child
// within its parent's end.
Result<Body> read_body(const LogStore& log, const JobId& id, Place place,
                       std::uint32_t bytes);
Result<Record> read_record(const LogStore& log, Place place,
                           std::uint32_t bytes);

constexpr std::size_t kStoreTasksMax = 16'384;

class StoreThreads {
 public:
  using Done = std::function<void()>;  // for the owner's thread; may be empty
  using Task = std::function<Done()>;

  explicit StoreThreads(int threads);
  ~StoreThreads();  // finishes what runs, drops what waits
  StoreThreads(const StoreThreads&) = delete;
  StoreThreads& operator=(const StoreThreads&) = delete;

  // Called on a store thread when there is something for run_done().
  void on_wake(std::function<void()> wake);

  bool post(Task task);  // false: D3
  // Runs what has come back; how many.
  std::size_t run_done();
  std::size_t outstanding() const { return outstanding_; }  // owner's thread
  // Waits until something has come back, or `ms` have passed.
  void wait_done(int ms);

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable back_;
  std::deque<Task> tasks_;
  std::vector<Done> done_;
  std::function<void()> wake_;
  bool stop_ = false;
  std::size_t outstanding_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace machina
