// queue/shard/shard.h
//
// One core and its log: the shard. It takes Requests, has the core decide,
// applies and appends, and sends each Response when, and only when, the log is
// durable up to all that was applied when it was decided. It also knows where
// bodies are (cache, log, history) and keeps history fed.
//
// A shard is used from one thread (its owner's loop). It never blocks it: files
// and SQLite are read by store threads that post back through `wake`. Io and
// Shard exchange self-contained values addressed (io, connection, sequence), so
// that they may live on two threads (tests/queue/shard/two_threads_test.cc).
//
//   H1  No response leaves before the log is durable up to the lsn that was
//       applied when it was decided: reads, refusals and duplicates included.
//   H2  Responses to one connection may come in any order; `sequence` tells.
//   H3  After poison every request but reads is answered `poisoned`.
//   H4  A full disk refuses (`disk_low`) before anything is decided: new jobs
//       first, then leases, last of all ends. It never poisons, and freed room
//       heals it. What the ends of leased jobs need is held before they are
//       leased: results of up to kReservePerLease bytes always find room.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/job.h"
#include "queue/base/result.h"
#include "queue/core/core.h"
#include "queue/wal/log_store.h"

namespace machina {

class EndSink;

struct Address {
  std::uint32_t io = 0;
  std::uint64_t connection = 0;
  std::uint64_t sequence = 0;
  auto operator<=>(const Address&) const = default;
};

// --- reads beside the core's commands ---
struct GetQuery {
  JobId id;
  bool payload = true;
  bool until_final = false;  // hold the answer until the job ends
  Millis wait_ms = 0;        // or so long
};
// A lease call's wait; 0 answers at once.
struct Waiting {
  Millis wait_ms = 0;
};
struct Request {
  Address from;
  std::variant<Command, GetQuery, ListQuery> what;
  Millis wait_ms = 0;        // lease calls: how long they may be parked;
                             // heartbeat: until a cancel, or so long;
                             // enqueue of one job: until it ends, or so long
  bool with_payload = true;  // put the payload into the views of the response
  // Payload, result, blocked_data and input of a view (not of a lease, nor of a
  // list): where they are more together they are left out, and
  // Response::left_out says so.
  std::uint64_t view_bytes = UINT64_MAX;
};

// What a lease call is answered with, as HTTP: docs/http-api.md.
constexpr std::size_t kLeaseReplyBytesMax = 4u << 20;

struct LeaseView {
  Fence fence = 0;
  Millis expires_at_ms = 0;  // wall
  JobView job;
};
struct Response {
  Address to;
  enum class Status : std::uint8_t {
    done,        // see items
    poisoned,    // 503: the outcome is unknown
    disk_low,    // 507: nothing of it was done; room heals it
    lagging,     // 503: history is too far behind
    draining,    // 503: no new leases
    bad_cursor,  // 400
    failed,      // 500: `detail`
  } status = Status::done;
  std::string detail;
  std::vector<ItemAnswer> items;
  std::vector<JobView> views;  // enqueue: by item (empty id: refused);
                               // get: one; list: the page; complete: by item
  std::vector<LeaseView> leases;
  std::string cursor;          // list
  std::uint64_t scanned = 0;   // list
  bool waited_out = false;     // the wait passed before the job ended
  std::uint64_t left_out = 0;  // so many bytes, about
};

struct ShardOptions {
  CoreOptions core;
  LogOptions log;
  OpenLog open_log = open_file_log;
  std::size_t body_cache_bytes = 64u << 20;
  std::uint64_t history_lag_max_bytes = 1ull << 30;
  Millis checkpoint_ms = 5000;
  std::uint64_t checkpoint_log_bytes = 128ull << 20;
  // Less free than soft, beside what is promised to live jobs: no new jobs;
  // than hard: only ends and cancels. 0: four segments and one, on a small
  // file system a quarter of it and an eighth.
  std::uint64_t disk_soft_bytes = 0;
  std::uint64_t disk_hard_bytes = 0;
  std::string history_dir;  // absolute; SQLite
};

// How full the disk is, and what is still done. Room for the ends of what was
// accepted, and for a checkpoint, is held by the log: it is not among what is
// free.
enum class DiskLevel : std::uint8_t {
  ok,
  soft,  // no new jobs, no uploads
  hard,  // only ends and cancels
  full,  // nothing that has to be written
};
struct DiskState {
  DiskLevel level = DiskLevel::ok;
  std::uint64_t free_bytes = 0;
  std::uint64_t soft_bytes = 0, hard_bytes = 0;  // needed free for more
  std::uint64_t held_bytes = 0;      // of the log, allocated already
  std::uint64_t promised_bytes = 0;  // of these: to jobs that were accepted
  std::string says;  // why it is not ok, and what to do; empty: it is ok
};
std::string_view name(DiskLevel level);

struct ShardStats {
  std::vector<QueueCounts> queues;
  CoreTotals totals;
  Lsn applied = 0, durable = 0, history_applied = 0;
  std::uint64_t history_lag_bytes = 0;
  std::uint64_t live_jobs = 0, reserved_bytes = 0, disk_free_bytes = 0;
  LogStore::Stats log;
  bool poisoned = false, draining = false;
  std::string poison_cause, recovery;
  std::uint64_t clock_steps = 0;  // of the wall clock, since the start
  Millis last_clock_step_ms = 0;  // < 0: back
  // samples since the last call, seconds; bounded
  std::vector<std::pair<std::string, double>> wait_seconds,
      run_seconds;  // kind
  DiskState disk;
};

class Shard {
 public:
  using Send = std::function<void(Response)>;

  // `storage` is <root>/queue; it, `clock` and `random` outlive the shard.
  static Result<std::unique_ptr<Shard>> open(Storage& storage, Clock& clock,
                                             Random& random,
                                             const ShardOptions& options,
                                             RecoveryReport* report);
  virtual ~Shard() = default;

  virtual void on_send(Send send) = 0;
  virtual void on_wake(std::function<void()> wake) = 0;  // from other threads
  // Before the first turn(); the sink outlives the shard. Null: nobody.
  virtual void feed_to(EndSink* sink) = 0;

  virtual void submit(Request request) = 0;
  // The connection went away: its parked calls and holds are dropped, and
  // grants that were decided but not yet sent to it are released.
  virtual void abandon(std::uint32_t io, std::uint64_t connection) = 0;

  // The peer of this connection waits for nothing more: its parked calls are
  // answered as if their wait had passed.
  virtual void hurry(std::uint32_t io, std::uint64_t connection) = 0;

  // Runs what is due, flushes the log, sends what may be sent. Call after each
  // batch of submits, after `wake`, and at next_due_ms().
  virtual void turn() = 0;
  virtual Millis next_due_ms() = 0;  // delay from now; -1: nothing is due

  // From now on: no new leases; parked calls are answered at once.
  virtual void drain() = 0;
  virtual std::size_t running() const = 0;  // leases held
  // Whether the lease is current by what was decided, durable or not.
  virtual bool leased(Fence fence) const = 0;
  // The leases still held go back without counting the attempt.
  virtual void release_all() = 0;
  // Everything durable, a last checkpoint, history caught up, files closed.
  virtual Result<void> close() = 0;

  virtual ShardStats stats() = 0;
  // How many jobs of each kind are ready; kinds with none are left out.
  virtual std::map<std::string, std::uint64_t> ready_kinds() const = 0;
  // How far the log is; cheap enough to ask at every turn.
  struct Progress {
    Lsn applied = 0, durable = 0;
  };
  virtual Progress progress() const { return {}; }
  virtual bool poisoned() const = 0;
  virtual DiskState disk() const { return {}; }
};

}  // namespace machina
