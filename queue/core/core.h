// queue/core/core.h
//
// The queue itself, as a pure state machine: which jobs live, in which state,
// who holds which lease. It touches no clock, file, socket or chance; `now` and
// random bits come in with each command, effects go out as data.
//
//   decide(command)  looks, and says what should be recorded and answered.
//   apply(record)    is the only thing that changes durable state, live and in
//                    recovery alike. Same records in, same state out.
//
// Callers apply and append each decided record at once and in order, and hold
// every answer until the log is durable up to the lsn that was applied when it
// was decided (queue/shard/shard.h).
//
// What is not durable is kept apart and can be lost at no cost: lease
// deadlines, parked lease calls, workers' last words, counters for metrics.
//
// State is fixed-size entries in pointer-free slabs (queue/core/slab.h) found
// by linear-hash indexes that grow one bucket at a time: nothing is ever
// proportional to the backlog.
//
//   C1..C17  docs/core-invariants.md, asserted by check_invariants() and
//            after every step of tests/sim.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/ids.h"
#include "queue/base/job.h"
#include "queue/base/result.h"
#include "queue/core/server_clock.h"
#include "queue/record/record.h"

namespace machina {

// --- Commands --------------------------------------------------------------

// A fact about a job that is not live, fetched by the shard beforehand.
struct Fact {
  JobId id;
  bool known = false;  // false: never was, or past its retention
  State state = State::succeeded;
  std::string tenant = "default";  // whose job it is, where it is known
};

struct EnqueueCommand {
  std::vector<NewJob> jobs;
  std::vector<Fact> facts;  // about depends_on ids that are not live
};
// What a worker shows beside its name, which anybody may know: a number made
// of a secret. Bit 0: it came over the server's own socket. 0: a lease of a
// version before sessions.
using Session = std::uint64_t;
constexpr Session kLocalSession = 1;

struct LeaseCommand {
  std::string worker;
  std::vector<std::string> kinds;   // patterns
  std::vector<std::string> queues;  // empty: all
  int max = 1;
  Level level = 0;
  Session session = 0;
  // The worker's other leases of the same session are released.
  std::optional<std::vector<Fence>> holding;
  std::uint64_t waiter = 0;  // != 0: may be parked under this number
};
struct HeartbeatCommand {
  struct Item {
    Fence fence = 0;
    int progress_percent = -1;
    std::string progress_message;
  };
  std::vector<Item> items;
};
struct CompleteCommand {  // also of a batch, with a lease in the same trip
  struct Item {
    Fence fence = 0;
    Outcome outcome;  // code none or verdict
    std::vector<NewJob> children;
  };
  std::vector<Item> items;
  std::optional<LeaseCommand> lease;
  std::vector<Fact> facts;  // about children's depends_on that are not live
};
struct FailCommand {
  Fence fence = 0;
  Outcome outcome;
};
struct BlockCommand {
  Fence fence = 0;
  std::string reason, data;
  Millis deadline_ms = 0;  // from now; 0: none
};
struct ReleaseCommand {
  std::vector<Fence> fences;
};
struct CancelCommand {
  JobId id;
};
struct RetryCommand {  // an explicit retry of a finished job
  JobId id;
  // Fetched by the shard: what the job was, and where it ended.
  std::optional<EnqueueRecord> body;
  State state = State::dead;
  int attempt = 0;
  bool ignore_dependencies = false;  // run it whatever became of them
  std::vector<Fact> facts;           // about depends_on ids that are not live
};
struct UnblockCommand {
  JobId id;
  std::string token, input, actor;
};
struct GoneCommand {
  std::vector<std::string> workers;  // proven dead: their leases end
  bool ended = false;  // by whoever operates them, not by their jobs: the
                       // leases go back, and no attempt is counted
  // Of each of them: only leases of this session end; 0 or none: those of any
  // session that came over the server's own socket.
  std::vector<Session> sessions;
};
struct ClockCommand {  // the wall clock was set, or a server starts
  Millis offset_ms = 0;
  std::uint64_t boot = 0;
  Millis boot_ms = 0;
};
struct TickCommand {};  // whatever is due: expiry, delays, dependents, dedup

using Command =
    std::variant<EnqueueCommand, LeaseCommand, HeartbeatCommand,
                 CompleteCommand, FailCommand, BlockCommand, ReleaseCommand,
                 CancelCommand, RetryCommand, UnblockCommand, GoneCommand,
                 ClockCommand, TickCommand>;

// --- Answers ---------------------------------------------------------------

enum class Answer : std::uint8_t {
  ok,
  duplicate,           // enqueue: the job that already has the key
  already,             // cancel: was already asked for, or already cancelled
  not_found,           //
  wrong_state,         // 409; `state` says which
  stale_lease,         // 409; maybe a repeat of a completion: the shard looks
  dedup_mismatch,      // 422
  queue_full,          // 429
  dedup_full,          // 429
  unknown_dependency,  // 400; `detail` is the id
  bad_token,           // unblock: not the blocked token
  dependency,          // retry: 409; `detail` says what became of which
  need_facts,  // a dependency (`detail`) is not live and has no fact. enqueue,
               // retry: nothing was decided, come again with it. complete:
               // this item was refused because of a child's; its job still
               // runs.
};

struct ItemAnswer {
  Answer answer = Answer::ok;
  JobId id;
  State state = State::ready;
  std::string detail;
  // heartbeat
  bool cancel = false;
  // duplicate: how the job ended, while the key remembers it; 0: it lives, or
  // ended before keys did
  Millis finished_ms = 0;
  EndCode code = EndCode::none;
  int attempt = 0;
};
struct GrantAnswer {
  JobId id;
  Fence fence = 0;
};
struct Decision {
  std::vector<Record> records;    // to be applied and appended, in order
  std::vector<ItemAnswer> items;  // one per job, item, fence or id asked about
  std::vector<GrantAnswer> grants;  // of a lease or complete+lease
  bool park = false;                // lease: nothing to give; wait if you may
  // Parked lease calls that these records feed, with their grants. The caller
  // unparks them when it applies the records.
  struct Fed {
    std::uint64_t waiter = 0;
    std::vector<GrantAnswer> grants;
  };
  std::vector<Fed> fed;
};

// --- Limits and counters ---------------------------------------------------

struct CoreOptions {
  std::uint64_t queue_max = 20'000'000;  // live jobs, then queue_full
  std::uint64_t dedup_max = 20'000'000;  // live keys, then dedup_full
  Millis lease_ms = 30'000;
  std::uint32_t names_max = 4096;  // distinct (queue, kind, level) lines
  std::uint64_t concurrency_keys_max = 1'000'000;  // live ones
  bool fsync = true;
};

struct QueueCounts {
  std::string queue;
  std::uint64_t by_state[kStates] = {};  // live states now; final: since the
                                         // root was made, less retried ones
  Millis oldest_ready_ms = 0;            // wall; 0: none is ready
};

struct CoreTotals {
  std::uint64_t enqueued = 0, duplicates = 0, grants = 0, retried = 0;
  std::uint64_t dead = 0;  // ends without a verdict
  std::uint64_t ended_by_code[kEndCodes] = {};
  // Failures: ends but success, and attempts that failed and were retried.
  std::uint64_t attempts_failed_by_code[kEndCodes] = {};
};

// Log room that is promised: to each live job, for a grant and an end; to each
// lease, for a result.
constexpr std::uint64_t kReservePerJob = 512;
constexpr std::uint64_t kReservePerLease = 64 << 10;

class Core {
 public:
  explicit Core(const CoreOptions&);
  ~Core();
  Core(const Core&) = delete;

  // What should happen, given server time and chance. Changes nothing. `now`
  // is the server's clock (queue/core/server_clock.h), which never goes back;
  // `random` supplies ids and jitter and is a pure function of the command's
  // own seed.
  // What a command brings in may be moved into its records.
  Decision decide(Millis now, std::uint64_t seed, Command) const;

  // The only mutator of durable state. CHECKs that the record is legal here:
  // it was decided by us, or comes checksummed from our log. Append first:
  // lsn (the next one), place and bytes must be set. The body of a job that is
  // another's child lies in the EndRecord of its parent, so its body place is
  // that record's.
  void apply(const Record&);

  // --- not durable ---
  // Epoch of this start and the first counter free in it: fences never repeat.
  void set_epoch(std::uint32_t writer_epoch);
  // Mono times. Every lease held at recovery gets its full time from `mono`.
  void restart_leases(Millis mono);
  // Called before decide() of a command: mono time for lease deadlines.
  void set_mono(Millis mono);
  void heartbeat(Fence, Millis deadline_mono, int percent,
                 std::string_view message);
  void park(const LeaseCommand&);     // waiter != 0
  void unpark(std::uint64_t waiter);  // unknown numbers are ignored
  std::size_t parked() const;
  // A lease whose fence is current, or 0 / nil.
  JobId leased_job(Fence) const;

  // The next time (of the server's clock) at which a TickCommand has work, and
  // the same for lease deadlines (mono). INT64_MAX: nothing is due.
  Millis next_due() const;
  Millis next_due_mono() const;

  // --- looking ---
  bool live(const JobId&) const;
  // Everything but what lies in the log; body and note tell where that is.
  struct Look {
    JobView view;
    Place body_place = 0;
    std::uint32_t body_bytes = 0;
    Place note_place = 0;  // BlockRecord or UnblockRecord, 0: none
    std::uint32_t note_bytes = 0;
  };
  std::optional<Look> look(const JobId&) const;
  // The kind of a live job, and the logged time since which it has been in its
  // state if that is ready or running. The kind is valid until the next apply.
  struct Standing {
    std::string_view kind;
    Millis since_ms = 0;
  };
  Standing standing(const JobId&) const;  // CHECK: the job is live
  // Live jobs in slab order from `cursor`; examines at most `examine` entries;
  // stops when `visit` returns false. Returns the next cursor, 0 at the end.
  std::uint64_t scan(std::uint64_t cursor, std::size_t examine,
                     const std::function<bool(const Look&)>& visit) const;
  std::vector<QueueCounts> counts() const;  // O(queues)
  // Jobs that are ready, by kind; O(queues x kinds).
  std::map<std::string, std::uint64_t> ready_kinds() const;
  const CoreTotals& totals() const;
  std::uint64_t live_jobs() const;
  std::uint64_t reserved_bytes() const;  // log room promised to live jobs
  Lsn applied() const;
  Millis time() const;  // the last logged server time
  // The wall clock less the server's, and where that is tied to a boot.
  Millis clock_offset() const;
  const ClockAnchor& clock_anchor() const;

  // The lowest place that a live job still needs, per `segment_of`: calls
  // `visit(place)` never; instead bodies are counted as records are applied:
  using PlaceHook = std::function<void(Place place, int delta)>;
  void on_place(PlaceHook);  // +1 when a live entry begins to need a place,
                             // -1 when it no longer does

  // --- checkpoint ---
  // The whole durable state as bytes; load() into a fresh Core gives a Core
  // that decides and applies identically. load() checks everything it reads
  // and calls the place hook for each place needed.
  void save(std::vector<std::byte>* out) const;
  Result<void> load(std::span<const std::byte> bytes);

  struct Impl;  // queue/core/core_state.h

  // The state as it was at freeze(), whatever is applied since; save() as
  // above, on any thread. It shares the core's memory, page by page, until the
  // core changes a page.
  class Frozen {
   public:
    explicit Frozen(std::unique_ptr<const Impl> state);
    ~Frozen();
    void save(std::vector<std::byte>* out) const;

   private:
    std::unique_ptr<const Impl> state_;
  };
  // The features (queue/record/record.h) that a reader of this image needs.
  static std::uint64_t image_features(std::span<const std::byte> image);
  // Takes time in proportion to pages, not to jobs: a millisecond for millions.
  std::shared_ptr<const Frozen> freeze();

  // CHECKs every invariant; O(state). For tests and the simulator.
  void check_invariants() const;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace machina
