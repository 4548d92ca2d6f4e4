// queue/bodies.h
//
// Where jobs' bodies are kept while the core holds only their places: a
// byte-bounded cache of those that came lately, and the store threads that read
// the rest (and history) without the loop ever touching a file.
//
//   D1  The cache never holds more than its bound (one body over it is not
//       kept at all); the least recently used goes first.
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
#include <thread>
#include <vector>

#include "queue/ids.h"
#include "queue/log.h"
#include "queue/mailbox.h"
#include "queue/record.h"

namespace machina {

struct JobIdHash {
  std::size_t operator()(const JobId& id) const;
};

using Body = std::shared_ptr<const EnqueueRecord>;

std::size_t memory_of(const EnqueueRecord& body);  // roughly, for bounds
std::size_t memory_of(const EndRecord& end);

// Found through a flat table that is made once, large enough for all that the
// bound allows: with jobs by the hundred thousand a lookup costs what it misses
// in the processor's caches, and here that is one line.
class BodyCache {
 public:
  explicit BodyCache(std::size_t bytes_max);
  ~BodyCache();
  BodyCache(const BodyCache&) = delete;

  void put(Body body);
  Body get(const JobId& id);   // null: not here
  Body take(const JobId& id);  // and forget it
  std::size_t bytes() const { return bytes_; }
  std::size_t size() const { return size_; }

 private:
  struct Entry {
    Body body;
    std::size_t bytes = 0;
    std::size_t hash = 0;
    Entry* newer = nullptr;
    Entry* older = nullptr;
  };
  struct Slot {  // linear probing; no entry: empty
    std::size_t hash;
    Entry* entry;
  };

  // The slot of `id`, or the empty one where it would go.
  std::size_t slot_of(const JobId& id, std::size_t hash) const;
  void clear_slot(std::size_t slot);
  void link_newest(Entry* entry);
  void unlink(Entry* entry);
  Body remove(std::size_t slot);

  const std::size_t bytes_max_;
  std::size_t bytes_ = 0, size_ = 0;
  Entry* newest_ = nullptr;
  Entry* oldest_ = nullptr;
  Slot* slots_;  // calloc'ed: pages that were never used cost nothing
  std::size_t mask_;
};

// The body of `id` as it lies in the log: a record of its own, or a child
// within its parent's end.
Result<Body> read_body(const Log& log, const JobId& id, Place place,
                       std::uint32_t bytes);
Result<Record> read_record(const Log& log, Place place, std::uint32_t bytes);

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
