// queue/shard/shard_impl.h
//
// The parts of the shard, as its source files see them:
//
//   shard.cc         open and recovery, the turn, drain, close, stats
//   shard_submit.cc  a request -> facts -> decide -> commit -> an answer
//   shard_reply.cc   answers: held until durable, completed from files, sent
//   shard_wait.cc    what waits: lease calls, heartbeats, watchers of jobs
//   shard_feed.cc    the way to history, checkpoints, disk space
//
// A Call is one request on its way. It is
//
//   waiting   for facts (store thread), or parked: calls_, timers_
//   held      until the log is durable up to its lsn (H1): held_
//   fetching  what its views lack, by a store thread
//   sent
//
// and may be dropped (its connection went away) in each of them.

#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "queue/base/storage.h"
#include "queue/core/core.h"
#include "queue/history/end_sink.h"
#include "queue/history/history.h"
#include "queue/record/view.h"
#include "queue/shard/bodies.h"
#include "queue/shard/shard.h"
#include "queue/wal/log_store.h"

namespace machina {

constexpr std::size_t kCallsMax = 65'536;  // parked or with unsent grants
// Bodies and what surrounds each, in one lease reply; the rest is its frame.
constexpr std::size_t kLeaseBodiesBytesMax = kLeaseReplyBytesMax - (64u << 10);
// Of all lease replies that wait for the disk, and one more: then 503.
constexpr std::uint64_t kGivenBytesMax = 16u << 20;
constexpr std::uint64_t kStagedBytesMax = 64u << 20;  // then enqueue waits
constexpr std::size_t kLeaseOverheadBytes = 2048;
constexpr std::uint64_t kLiveExamineMax = 2000;  // of a list, on the loop
constexpr std::uint64_t kExamineMax = 10'000;    // of a list, in all
constexpr std::size_t kFeedBatchMax = 2000;
constexpr std::size_t kFeedBatchBytesMax = 32u << 20;
// Rows wait at most so long for company: each batch is two syncs, and one that
// is under way delays the log's. Whoever asks for a list does not wait for it.
constexpr Millis kFeedMs = 500;
constexpr Millis kFeedIdleMs = 5000;  // applied() follows without rows
constexpr Millis kFeedRetryMs = 1000;
constexpr Millis kExpireMs = 60'000;
constexpr Millis kDiskSampleMs = 1000;
constexpr Millis kDiskLowSampleMs = 250;  // room should not wait to be seen
constexpr Millis kFullRetryMs = 1000;     // of what a full disk refused
// Log room that is held beside what is promised, in parts of a unit: while the
// disk fills up, what is under way must not eat what is promised.
constexpr std::uint64_t kHoldUnitBytes = 16u << 20;
constexpr std::uint64_t kHoldMarginBytes = 12u << 20;
constexpr std::uint64_t kCheckpointRoomBytes = 1u << 20;  // at least
// What one decision writes beside what it was asked for: an end tells 256
// dependents, a Tick does 256 of each thing.
constexpr std::uint64_t kDecisionBytes = 128u << 10;
constexpr std::uint64_t kGrantBytes = 256;  // a grant's record
constexpr Millis kClockSaidMs = 500;        // a smaller step is nobody's doing
constexpr Millis kLevelSeenMs = 60'000;
constexpr Millis kListWaitMs = 15'000;  // for history to catch up with the core
// While a page has no job yet it is looked on for, so that one without jobs is
// the end; but not longer than this.
constexpr Millis kListLookMs = 20'000;
constexpr std::size_t kEndedMemoryMax = 64u << 20;  // else read from the log
constexpr std::size_t kUnblockInputMax = 4096;      // a longer one is not fed
constexpr std::size_t kSamplesMax = 16384;
constexpr int kStoreThreads = 2;
constexpr int kTickRoundsMax = 16;  // of a turn
constexpr int kFactRoundsMax = 8;

// A job that ended, which history does not have yet; or one that left history
// by an explicit retry (`left`), or went on after a block (`unblock`).
// Immutable: the history thread reads it too.
struct Ended {
  JobId id;
  Lsn lsn = 0;
  bool left = false;
  std::shared_ptr<const UnblockRecord> unblock;
  bool is_end() const { return !left && unblock == nullptr; }
  Fence fence = 0;
  bool by_complete = false;
  State state = State::succeeded;
  int attempt = 0;
  Millis finished_ms = 0;  // as the wall clock showed it
  Millis offset_ms = 0;    // that less the log's time
  Place body_place = 0, end_place = 0;
  std::uint32_t body_bytes = 0, end_bytes = 0;
  Body body;                             // null: in the log
  std::shared_ptr<const EndRecord> end;  // null: in the log
  std::size_t memory = 0;
};
using EndedPtr = std::shared_ptr<const Ended>;

// Something that a response lacks and that lies in a file.
struct Need {
  enum class What {
    body,      // of a live job, by place
    note,      // a BlockRecord or UnblockRecord, by place
    ended,     // a finished job that history does not have yet, by places
    finished,  // a finished job, from history by id
    by_fence,  // a finished job, from history by the fence that ended it
  } what = What::body;
  std::size_t index = 0;
  bool of_lease = false;  // index counts leases, not views
  bool light = false;     // payload and result are not wanted
  bool with_payload = true;
  std::uint64_t view_bytes = UINT64_MAX;  // Request::view_bytes
  std::uint64_t left_out = 0;             // found, but more than that
  JobId id;
  Fence fence = 0;
  Place place = 0;
  std::uint32_t bytes = 0;
  EndedPtr ended;
  // Found:
  Body body;
  std::optional<Record> note;
  std::optional<FinishedJob> finished;
  std::string error;
};

// On a store thread: reads what `need` asks for, as of server time `at`.
void fetch_need(const LogStore& log, History& history, Millis at, Need* need);

// What a finished job means for the item that asked about it.
enum class Purpose : std::uint8_t {
  view,    // nothing but its view
  get,     // not_found if there is none
  cancel,  // already, wrong_state or not_found
  change,  // wrong_state or not_found
};

struct Call {
  std::uint64_t number = 0;  // 0: not in calls_
  Address from;
  Response response;
  bool with_payload = true;
  bool light = false;  // of many jobs: views carry id and state only
  std::uint64_t view_bytes = UINT64_MAX;  // Request::view_bytes
  Purpose purpose = Purpose::view;
  std::vector<Need> needs;
  std::unique_ptr<JobView> asked;  // of one job with a dedup key: as much of
                                   // it as the job that has the key shares
  std::vector<Fence> grants;       // decided for it and not yet sent
  std::uint64_t given_bytes = 0;   // of their bodies, about
  Lsn lsn = 0;                     // H1
  bool dropped = false;
  bool hurried = false;  // waits for nothing that may be long

  enum class Parked : std::uint8_t { no, lease, heartbeat, watch, list };
  Parked parked = Parked::no;
  Millis deadline_mono = 0;
  JobId watched;
  HeartbeatCommand beat;
  ListQuery list;
  std::uint64_t list_at = 0;  // where the live jobs go on
  Millis list_until_mono = 0;
};
using CallPtr = std::shared_ptr<Call>;

class ShardImpl final : public Shard {
 public:
  ShardImpl(Storage& storage, Clock& clock, Random& random,
            const ShardOptions& options);
  ~ShardImpl() override;

  Result<void> start(RecoveryReport* report);

  void on_send(Send send) override { send_ = std::move(send); }
  void on_wake(std::function<void()> wake) override;
  void feed_to(EndSink* sink) override { sink_ = sink; }
  void submit(Request request) override;
  void abandon(std::uint32_t io, std::uint64_t connection) override;
  void hurry(std::uint32_t io, std::uint64_t connection) override;
  void turn() override;
  Millis next_due_ms() override;
  void drain() override;
  std::size_t running() const override;
  bool leased(Fence fence) const override {
    return !core_.leased_job(fence).is_nil();
  }
  void release_all() override;
  Result<void> close() override;
  ShardStats stats() override;
  std::map<std::string, std::uint64_t> ready_kinds() const override {
    return core_.ready_kinds();
  }
  Progress progress() const override {
    return {core_.applied(), log_->durable()};
  }
  bool poisoned() const override { return log_->poisoned(); }
  DiskState disk() const override;

 private:
  using ConnectionKey = std::pair<std::uint32_t, std::uint64_t>;

  // shard.cc
  Result<void> visit(const Record& record, Lsn checkpoint);
  void run_due();
  bool wait_for(const std::function<bool()>& done);
  void look_at_clock(bool starting);
  void say_clock();
  ClockReading read_clocks() const;
  Millis now() const;  // of the server's clock: never goes back
  Millis mono() const;

  // shard_submit.cc
  void run_command(const CallPtr& call, Command command, Millis wait_ms);
  void enqueue(const CallPtr& call, EnqueueCommand command, Millis wait_ms,
               int round);
  std::vector<JobId> gather_facts(std::span<const NewJob> jobs,
                                  std::vector<Fact>* facts) const;
  void fetch_facts(const CallPtr& call, std::vector<JobId> missing, int round,
                   std::function<void(const std::vector<Fact>&)> then);
  void lease(const CallPtr& call, LeaseCommand command, Millis wait_ms);
  void heartbeat(const CallPtr& call, HeartbeatCommand command, Millis wait_ms);
  void complete(const CallPtr& call, CompleteCommand command, Millis wait_ms,
                int round);
  void change(const CallPtr& call, const Command& command, Purpose purpose);
  void retry(const CallPtr& call, RetryCommand command);
  void retry_with(const CallPtr& call, RetryCommand command, Lsn fetched,
                  int round);
  void get(const CallPtr& call, const GetQuery& query);
  void list(const CallPtr& call, ListQuery query);
  void list_on();  // a piece of one list, once per turn
  void list_live(const CallPtr& call, std::uint64_t cursor);
  void list_history(const CallPtr& call);

  std::optional<Decision> decide(Command command);  // and commit
  bool commit(Decision* decision);
  void applied(Record* record);
  void ended(Record* record);
  void deliver(Decision* decision);
  void give(const CallPtr& call, const std::vector<GrantAnswer>& grants);

  // shard_reply.cc
  void want_view(Call* call, std::size_t index, const JobId& id);
  bool add_live_view(Call* call, std::size_t index, const JobId& id);
  void add_ended_view(Call* call, std::size_t index, const EndedPtr& ended);
  void fill_live(const Core::Look& look, Call* call, std::size_t index,
                 bool of_lease);
  // Payload, result and what it waits for and with, where they are more than
  // the answer may have.
  void leave_out(Call* call, JobView* view);
  void settle_item(Call* call, std::size_t index, State state);
  void need(Call* call, Need need);
  void pin(const Need& need, int delta);
  void drop_needs(Call* call);
  void answer(const CallPtr& call);  // holds it until durable
  void refuse(const CallPtr& call, Response::Status status,
              std::string detail = {});
  void release_held();
  void fetch(const CallPtr& call);
  void fetched(const CallPtr& call, std::vector<Need>* needs);
  void settle(Call* call, Need* need, std::vector<Fence>* unreadable);
  void settle_finished(Call* call, Need* need);
  void settle_forgotten(Call* call, std::size_t index);
  void send(const CallPtr& call);
  void fail_all_poisoned();
  void release_grants(std::vector<Fence> fences);
  bool calls_full() const { return calls_.size() >= kCallsMax; }
  void enlist(const CallPtr& call);  // into calls_; callers ask calls_full()
  void unlist(const CallPtr& call);
  void forget_given(Call* call);

  // shard_wait.cc
  bool park(const CallPtr& call, Call::Parked how, Millis wait_ms);
  void unpark(const CallPtr& call);
  void timed_out(const CallPtr& call);
  void run_timers();
  void run_woken();
  void finish_watch(const CallPtr& call);
  void finish_beat(const CallPtr& call);
  void wake_watchers(const JobId& id);
  void wake_beats(Fence fence);
  void answer_all_parked();
  void answer_parked_leases();
  bool level_seen(Level level) const;

  // shard_feed.cc
  void feed();
  void post_feed(std::vector<EndedPtr> batch, Lsn through);
  void fed(const std::vector<EndedPtr>& batch, Lsn through,
           const Result<void>& result);
  void remember_ended(EndedPtr ended);
  void remember_unblock(const Record& record);
  void forget_ended(const EndedPtr& ended);
  EndedPtr find_ended(const JobId& id) const;
  EndedPtr find_ended(Fence fence) const;
  void read_page(const CallPtr& call);
  void run_checkpoint();
  void reclaim();
  void take_image();
  void sample_disk();
  // What must be free, and where that number comes from.
  struct DiskBound {
    std::uint64_t bytes = 0;
    std::string from;
  };
  void start_disk(RecoveryReport* report);
  static DiskBound disk_bound(std::uint64_t set, std::uint64_t segments,
                              std::uint64_t segment_bytes, std::uint64_t total,
                              std::uint64_t share);
  std::uint64_t needed(const DiskBound& bound) const;
  bool disk_low(const DiskBound& bound) const;
  bool refuse_if_low(const CallPtr& call, const DiskBound& bound);
  // Where the log lacks room: does what a command writes find held room, with
  // what is promised to others (`keep`) left?
  bool refuse_if_full(const CallPtr& call, std::uint64_t bytes,
                      std::uint64_t keep);
  std::uint64_t promised_but(std::uint64_t bytes) const;
  bool shorten(LeaseCommand* lease) const;
  std::string disk_words(const DiskBound& bound) const;
  std::string full_words() const;
  void hold_room(bool sampled);
  void say_disk();
  void sample_times(const Record& record);

  Storage& storage_;
  Clock& clock_;
  Random& random_;
  const ShardOptions options_;
  const std::uint64_t segment_bytes_;  // as set: what the bounds are counted in
  Core core_;
  ServerClock server_clock_;
  std::uint64_t boot_ = 0;
  std::optional<Millis> new_offset_;  // measured, and not in the log yet
  bool new_anchor_ = false;           // this boot is not in the log yet
  std::uint64_t clock_steps_ = 0;
  Millis last_step_ms_ = 0;
  std::unique_ptr<History> history_;
  EndSink* sink_ = nullptr;
  std::atomic<std::size_t> image_bytes_{0};  // of the last checkpoint; set by
                                             // a thread of the log
  std::unique_ptr<LogStore> log_;
  std::string recovery_;
  Send send_;

  // Other threads knock here.
  struct Waker {
    std::mutex mutex;
    std::condition_variable knocked;
    bool pending = false;
    std::function<void()> wake;
    void knock();
  };
  std::shared_ptr<Waker> waker_ = std::make_shared<Waker>();

  // Places needed before log_ exists: one for each 4 KiB page of the log.
  std::unordered_map<Place, std::pair<Place, int>> early_needs_;

  BodyCache cache_;

  // Calls.
  std::uint64_t next_call_ = 1;
  std::unordered_map<std::uint64_t, CallPtr> calls_;
  std::map<ConnectionKey, std::vector<std::uint64_t>> by_connection_;
  std::uint64_t given_bytes_ = 0;  // of them all
  std::deque<CallPtr> held_;       // by lsn
  std::set<std::pair<Millis, std::uint64_t>> timers_;
  std::unordered_multimap<JobId, std::uint64_t, JobIdHash> watchers_;
  std::unordered_multimap<Fence, std::uint64_t> beats_;
  std::vector<std::uint64_t> woken_;
  std::vector<CallPtr> listing_;  // wait for history to catch up
  std::deque<CallPtr> scanning_;  // have found no live job yet
  std::array<Millis, kLevelMax + 1> level_seen_mono_{};
  bool draining_ = false;
  bool told_poison_ = false;

  // The way to history.
  std::deque<EndedPtr> feed_;
  std::vector<EndedPtr> feeding_;  // with the history thread
  bool feed_busy_ = false;
  Millis feed_at_mono_ = 0;     // of the last batch
  Millis feed_retry_mono_ = 0;  // after a failure: not before
  Millis expire_at_mono_ = 0;
  Lsn history_applied_ = 0;
  std::uint64_t history_lag_bytes_ = 0;
  std::size_t ended_memory_ = 0;
  std::unordered_map<JobId, EndedPtr, JobIdHash> ended_by_id_;
  std::unordered_map<Fence, EndedPtr> ended_by_fence_;
  std::string feed_error_;

  // Checkpoints.
  struct Image {
    Lsn lsn = 0;
    Millis time_ms = 0;
    std::shared_ptr<const Core::Frozen> state;
  };
  std::optional<Image> image_;  // waits for its lsn to be durable
  Lsn checkpoint_lsn_ = 0;
  Millis checkpoint_at_mono_ = 0;

  DiskBound disk_soft_, disk_hard_;
  LogStore::Room room_;  // as of this turn
  std::uint64_t hold_log_ = 0, hold_checkpoint_ = 0;
  Millis due_retry_mono_ = 0;         // what is due waits for room until then
  Millis checkpoint_retry_mono_ = 0;  // "
  std::uint64_t reclaim_bytes_ = 0;   // checkpoints would give a low disk
  DiskLevel disk_said_ = DiskLevel::ok;
  Millis disk_said_mono_ = 0;
  std::uint64_t disk_free_ = UINT64_MAX;
  Millis disk_at_mono_ = 0;
  bool disk_busy_ = false;

  using Samples = std::vector<std::pair<std::string, double>>;
  Samples wait_seconds_, run_seconds_;

  // Last: their threads use what stands above.
  std::unique_ptr<StoreThreads> store_;
  std::unique_ptr<StoreThreads> history_thread_;
};

}  // namespace machina
