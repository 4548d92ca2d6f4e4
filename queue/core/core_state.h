// queue/core/core_state.h
//
// What a Core holds. Private to core*.cc: core.cc looks, core_decide.cc
// decides, core_apply.cc changes, core_checkpoint.cc writes and reads images,
// core_invariants.cc checks.
//
//   jobs       a slab of 88-byte entries, found by id. By state an entry is
//              in exactly one of: its line's lists (ready), a due heap
//              (scheduled: one by the server's clock, one by times of day),
//              the deadline heap (blocked with a deadline), a
//              lease (running), its dependencies' edges or the doomed list
//              (waiting).
//   lines      (queue, kind, level), interned. Each has, by priority, two
//              lists of ready jobs: those returned by an attempt and, after
//              them, those never leased, which keep commit order.
//   keys       a ready job with a concurrency key is in no line's list but in
//              its group's: the jobs of one key and one line, by rank. A group
//              whose first job may start is open, and in its line's heap of
//              open groups; the others wait out of everybody's way.
//   ended      jobs that have ended while others wait for them: out of the
//              index, their slot is kept until the edges are walked, at most
//              kPumpMax per record, so that no record costs more than that.

#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "queue/core/core.h"
#include "queue/core/heap.h"
#include "queue/core/index.h"
#include "queue/core/slab.h"

namespace machina {

constexpr std::size_t kPriorities = kPriorityMax + 1;
constexpr std::size_t kPumpMax = 256;     // edges walked by one record
constexpr std::size_t kTickMax = 256;     // of each thing that one Tick does
constexpr std::size_t kForgetMax = 4096;  // keys that one Tick forgets
constexpr Millis kForgetLateMs = 1000;    // so that they go in batches
// Lines that one concurrency key may have jobs in: a slot that is taken or
// given back looks at each.
constexpr std::uint32_t kKeyLinesMax = 64;
constexpr std::size_t kFeedMax = 1024;  // grants to parked calls by one Tick

enum JobFlag : std::uint8_t {
  kUsed = 1,
  kEnded = 2,      // see `ended` above
  kCancel = 4,     // cancel requested
  kDoomed = 8,     // a dependency did not succeed: ends at the next Tick
  kReturned = 16,  // was leased before
  kDiedOnce = 32,  // one worker died under it already
  kKeyed = 64,     // has a concurrency key: `extra` is a KeyedEntry
  kAtWall = 128,   // waiting, scheduled: `time` is a time of day
};

struct JobEntry {
  JobId id;
  Place body_place;
  std::uint64_t order;  // when it last became ready, scheduled or blocked
  // Of the server's clock, but with kAtWall. waiting, scheduled: when it may
  // run; ready, running: since; blocked: deadline or 0.
  std::int64_t time;
  std::uint32_t body_bytes;
  std::uint32_t link;
  // ready, doomed: next and previous of the list; waiting: a is the first of
  // its edges; scheduled, blocked: a is the heap position; running: a is the
  // lease; ended: a is the next one.
  std::uint32_t a, b;
  std::uint32_t dependents;  // first edge of those who wait for it
  std::uint32_t line;
  std::uint32_t extra;
  std::uint32_t retry_min, retry_max;  // ms
  std::uint16_t attempt;               // leases less releases
  std::uint16_t base;   // attempts before the last explicit retry
  std::uint16_t limit;  // attempts allowed, from 0
  std::uint16_t tenant;
  std::uint8_t state, priority, unmet, flags;
};
static_assert(sizeof(JobEntry) == 88);

// What few jobs have: a note in the log, an error, a token.
struct ExtraEntry {
  Place note_place;
  std::uint32_t note_bytes;
  std::uint32_t link;
  std::uint8_t token[16];
  std::uint16_t error_attempt;
  std::uint8_t error_code;
  std::uint8_t message_bytes;
  char message[120];  // the beginning of it
};

// What a job with a concurrency key has beside its entry.
struct KeyedEntry {
  std::uint32_t group;
  std::uint32_t extra;  // what JobEntry::extra is without a key
  std::uint32_t link;
  std::uint16_t limit;
};

// 128 bits of a hash: of (tenant, queue, dedup key) or of a concurrency key.
struct KeyHash {
  std::uint64_t low = 0, high = 0;
  auto operator<=>(const KeyHash&) const = default;
};

// A concurrency key; there while a live job has it.
struct KeyEntry {
  KeyHash hash;
  std::uint32_t running;  // slots held
  std::uint32_t groups;   // first of them
  std::uint32_t lines;    // how many they are
  std::uint32_t link;
};

// The live jobs of one key and one line; `ranks` are the ready ones.
struct GroupEntry {
  std::uint64_t order;  // of its first ready job
  std::uint32_t key, line;
  std::uint32_t jobs;          // live
  std::uint32_t ranks;         // first of its RankEntries, in their order
  std::uint32_t next, before;  // among the key's groups
  std::uint32_t position;      // in the line's heap, where it is open
  std::uint32_t link;
  std::uint8_t rank;  // of its first ready job
  bool open;          // its first ready job may start: limit > running
};

struct JobList {
  std::uint32_t head = kNone, tail = kNone;
};

// The ready jobs of a group that have one rank: priority 9 - rank / 2; even:
// returned, odd: never leased.
struct RankEntry {
  JobList list;
  std::uint32_t next, link;
  std::uint8_t rank;
};

struct LeaseEntry {
  Fence fence;
  std::uint64_t session;  // as in the grant
  Millis started;
  Millis deadline;  // mono; not durable
  std::uint32_t job, link, position, worker_next, worker_before;
  std::uint8_t level, worker_bytes;
  std::int8_t percent;          // -1: none; not durable
  std::uint8_t progress_bytes;  // "
  char worker[kWorkerBytesMax];
  char progress[120];  // not durable
  std::string_view worker_name() const { return {worker, worker_bytes}; }
};

// `dependent` waits for `dependency`.
struct EdgeEntry {
  std::uint32_t dependency, dependent;
  std::uint32_t next, before;  // among the dependency's dependents
  std::uint32_t sibling;       // among the dependent's dependencies
  std::uint32_t link;
};

// How its job ended is kept here as well: a key may outlive what history keeps.
struct DedupEntry {
  KeyHash key;
  JobId job;
  std::uint64_t digest;  // of kind and payload
  Millis expiry;         // at it, the key is new again
  Millis finished;       // 0: the job lives, or ended before this was kept
  std::uint32_t link, job_link, position;
  std::uint16_t attempt;
  std::uint8_t state, code;
};

struct JobById {
  using Key = JobId;
  static const JobId& key(const JobEntry& e) { return e.id; }
  static std::uint64_t hash(const JobId&);
};
struct LeaseByFence {
  using Key = Fence;
  static Fence key(const LeaseEntry& e) { return e.fence; }
  static std::uint64_t hash(Fence);
};
struct DedupByKey {
  using Key = KeyHash;
  static const KeyHash& key(const DedupEntry& e) { return e.key; }
  static std::uint64_t hash(const KeyHash& key) { return key.low; }
};
struct DedupByJob {
  using Key = JobId;
  static const JobId& key(const DedupEntry& e) { return e.job; }
  static std::uint64_t hash(const JobId& id) { return JobById::hash(id); }
  template <class Entry>
  static auto& link(Entry& e) {
    return e.job_link;
  }
};
struct KeyByHash {
  using Key = KeyHash;
  static const KeyHash& key(const KeyEntry& e) { return e.hash; }
  static std::uint64_t hash(const KeyHash& key) { return key.low; }
};
struct JobByTime {
  static bool before(const JobEntry& x, const JobEntry& y) {
    return x.time != y.time ? x.time < y.time : x.order < y.order;
  }
  static std::uint32_t& position(JobEntry& e) { return e.a; }
};
struct LeaseByDeadline {
  static bool before(const LeaseEntry& x, const LeaseEntry& y) {
    return x.deadline != y.deadline ? x.deadline < y.deadline
                                    : x.fence < y.fence;
  }
  static std::uint32_t& position(LeaseEntry& e) { return e.position; }
};
struct DedupByExpiry {
  static bool before(const DedupEntry& x, const DedupEntry& y) {
    return x.expiry != y.expiry ? x.expiry < y.expiry : x.key < y.key;
  }
  static std::uint32_t& position(DedupEntry& e) { return e.position; }
};

// The group whose first job goes first.
struct GroupByHead {
  static bool before(const GroupEntry& x, const GroupEntry& y) {
    return x.rank != y.rank ? x.rank < y.rank : x.order < y.order;
  }
  static std::uint32_t& position(GroupEntry& e) { return e.position; }
};
using OpenGroups = Heap<GroupEntry, GroupByHead, 256>;

enum : int { kReturnedList = 0, kFreshList = 1 };

struct Line {
  std::string kind;
  std::uint32_t queue = 0;
  Level level = 0;
  std::uint64_t jobs = 0;   // live ones; 0: the line may be reused
  std::uint64_t ready = 0;  // in `lists`, and the groups in `open`
  // Null: none so far. A frozen core's lines share it and do not look at it.
  std::shared_ptr<OpenGroups> open;
  std::uint32_t waiters = 0;       // parked calls that match; not durable
  std::uint32_t ready_at = kNone;  // position in ready_lines
  JobList lists[kPriorities][2];
};
struct QueueEntry {
  std::string name;
  std::uint64_t by_state[kStates] = {};
  std::uint64_t live() const;
};

struct Waiter {
  LeaseCommand command;
  std::vector<bool> lines;  // those that match
};

struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const {
    return std::hash<std::string_view>()(text);
  }
};
using Names =
    std::unordered_map<std::string, std::uint32_t, TextHash, std::equal_to<>>;

// What a line is called in line_names. Lives on the stack: each new job asks.
class LineKey {
 public:
  LineKey(std::string_view queue, std::string_view kind, Level level);
  LineKey(const LineKey&) = delete;
  operator std::string_view() const {
    return longer_.empty() ? std::string_view(bytes_, size_) : longer_;
  }
  std::string string() const { return std::string(std::string_view(*this)); }

 private:
  std::size_t size_;
  char bytes_[kQueueBytesMax + kKindBytesMax + 2];
  std::string longer_;  // of names over their bounds: they were refused
};
KeyHash dedup_key_of(const NewJob&);
KeyHash concurrency_key_of(const NewJob&);
std::uint64_t dedup_digest_of(const NewJob&);
constexpr std::uint8_t rank_of(const JobEntry& e) {
  return static_cast<std::uint8_t>(2 * (kPriorityMax - e.priority) +
                                   (e.flags & kReturned ? 0 : 1));
}
constexpr std::uint8_t u8(State s) { return static_cast<std::uint8_t>(s); }

struct Core::Impl {
  explicit Impl(const CoreOptions& o) : options(o) {}

  CoreOptions options;

  // --- durable ---
  Lsn applied = 0;
  Millis time = 0;
  Millis offset = 0;  // of the wall clock to that
  ClockAnchor anchor;
  std::uint64_t next_order = 1;
  Fence last_fence = 0;
  Slab<JobEntry> jobs;
  Slab<ExtraEntry> extras;
  Slab<LeaseEntry> leases;
  Slab<EdgeEntry> edges;
  Slab<DedupEntry> dedups;
  Index<JobEntry, JobById> job_index{&jobs};
  Index<LeaseEntry, LeaseByFence> lease_index{&leases};
  Index<DedupEntry, DedupByKey> dedup_index{&dedups};
  Index<DedupEntry, DedupByJob> dedup_by_job{&dedups};
  Slab<KeyedEntry> keyed;
  Slab<KeyEntry> keys;
  Slab<GroupEntry> groups;
  Slab<RankEntry> ranks;
  Index<KeyEntry, KeyByHash> key_index{&keys};
  Heap<JobEntry, JobByTime> due{&jobs};
  Heap<JobEntry, JobByTime> due_wall{&jobs};
  Heap<JobEntry, JobByTime> deadlines{&jobs};
  Heap<DedupEntry, DedupByExpiry> expiries{&dedups};
  std::vector<Line> lines;
  std::vector<QueueEntry> queues;
  std::vector<std::string> tenants;
  Names line_names, queue_names, tenant_names;
  JobList doomed, ended;

  // --- derived or not durable ---
  Heap<LeaseEntry, LeaseByDeadline> lease_deadlines{&leases};
  Names worker_leases;  // worker -> first of its leases
  std::vector<std::uint32_t> ready_lines;
  std::size_t lines_used = 0;  // with live jobs
  std::size_t hungry = 0;      // lines with ready jobs and parked calls
  std::list<Waiter> waiters;   // in order of arrival
  std::unordered_map<std::uint64_t, std::list<Waiter>::iterator> waiter_index;
  std::uint32_t leases_by_level[kLevelMax + 1] = {};
  std::uint32_t waiters_by_level[kLevelMax + 1] = {};
  std::uint32_t epoch = 0;
  std::uint64_t next_counter = 1;  // of the next fence
  std::uint64_t next_id = 0;       // what the next id counts; not durable
  Millis mono = 0;
  CoreTotals totals;
  PlaceHook place_hook;

  // --- core_apply.cc ---
  void apply(const Record&);
  void apply(const Record&, const EnqueueRecord&);
  void apply(const Record&, const GrantRecord&);
  void apply(const Record&, const EndRecord&);
  void apply(const Record&, const RetryRecord&);
  void apply(const Record&, const ReleaseRecord&);
  void apply(const Record&, const BlockRecord&);
  void apply(const Record&, const UnblockRecord&);
  void apply(const Record&, const CancelRecord&);
  void apply(const Record&, const PromoteRecord&);
  void apply(const Record&, const ForgetRecord&);
  void apply(const Record&, const ClockRecord&);
  void enter(std::uint32_t slot, State state);   // into a state's structure
  void enter_ready(std::uint32_t slot);          // now
  void insert(std::uint32_t slot, State state);  // keeping its order
  void leave(std::uint32_t slot);                // out of it
  void make_due(std::uint32_t slot);             // scheduled or ready, by time
  void set_key(std::uint32_t slot, const KeyHash&, std::uint16_t limit);
  void drop_key(std::uint32_t slot);
  void join_group(std::uint32_t slot);   // it is ready
  void leave_group(std::uint32_t slot);  // no longer
  void use_slot(std::uint32_t slot, int delta);
  void refresh(std::uint32_t group);
  void add_edge(std::uint32_t dependency, std::uint32_t dependent);
  void drop_edge(std::uint32_t edge);
  void drop_edges(std::uint32_t slot);
  void doom(std::uint32_t slot);
  void pump();
  void end_lease(std::uint32_t slot);
  std::uint32_t add_lease(const LeaseEntry& lease);
  void remember(const NewJob&, const JobId&);
  void remember_end(const EndRecord&);
  std::uint32_t line_for(std::string_view queue, std::string_view kind,
                         Level level);
  void forget_line(std::uint32_t line);
  std::uint32_t queue_for(std::string_view name);
  std::uint16_t tenant_for(std::string_view name);
  void use_line(std::uint32_t line, int delta);
  void count_ready(std::uint32_t line, int delta);
  void match_waiters(std::uint32_t line);
  ExtraEntry& extra_of(std::uint32_t slot);
  void set_note(std::uint32_t slot, Place place, std::uint32_t bytes);
  void need(Place place, int delta) {
    if (place && place_hook) place_hook(place, delta);
  }

  // --- looking ---
  // A time of the server's clock as the wall clock shows it; 0 stays 0.
  Millis wall(Millis at) const { return at == 0 ? 0 : at + offset; }
  Heap<JobEntry, JobByTime>& due_of(const JobEntry& e) {
    return e.flags & kAtWall ? due_wall : due;
  }
  // Its ExtraEntry, or kNone.
  std::uint32_t extra_slot(const JobEntry& e) const {
    return e.flags & kKeyed ? keyed[e.extra].extra : e.extra;
  }
  std::uint32_t key_slot(const JobEntry& e) const {  // of one with a key
    return groups[keyed[e.extra].group].key;
  }
  std::uint32_t group_of(std::uint32_t key, std::uint32_t line) const;
  std::uint32_t first_ready(const GroupEntry& g) const {
    return g.ranks == kNone ? kNone : ranks[g.ranks].list.head;
  }
  std::uint32_t next_ready(std::uint32_t slot) const;  // of its group
  std::uint32_t find(const JobId& id) const { return job_index.find(id); }
  bool is_hungry(const Line& line) const {
    return line.ready > 0 && line.waiters > 0;
  }
  bool matches(const LeaseCommand& c, std::string_view queue,
               std::string_view kind, Level level) const;
  bool matches(const LeaseCommand& c, const Line& line) const {
    return matches(c, queues[line.queue].name, line.kind, line.level);
  }
  Look look(std::uint32_t slot) const;

  void save(std::vector<std::byte>* out) const;
  std::unique_ptr<const Impl> freeze();
  Result<void> load(std::span<const std::byte> bytes);
  void check_invariants() const;
};

}  // namespace machina
