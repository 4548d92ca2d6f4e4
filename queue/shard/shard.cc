#include "queue/shard/shard.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "queue/base/logger.h"
#include "queue/shard/shard_impl.h"

namespace machina {
namespace {

constexpr Millis kCloseWaitMs = 30'000;  // for a stuck disk or SQLite

constexpr std::uint64_t kSegmentShare = 16;  // of a small file system
constexpr std::uint64_t kSegmentBytesMin = 1u << 20;

// The log takes time and chance from where the shard does, and room to hold
// that a small file system can spare.
ShardOptions with_sources(ShardOptions options, Storage& storage, Clock& clock,
                          Random& random) {
  options.log.hold = true;
  if (auto total = storage.total_bytes(); total && *total != 0) {
    std::uint64_t share = *total / kSegmentShare / kSegmentBytesMin;
    share = std::max<std::uint64_t>(share, 1) * kSegmentBytesMin;
    options.log.segment_bytes = std::min(options.log.segment_bytes, share);
  }
  if (options.log.clock == nullptr) options.log.clock = &clock;
  if (options.log.random == nullptr) options.log.random = &random;
  options.log.image_features = Core::image_features;
  options.log.features = kFeatureClock | kFeatureSessions;
  return options;
}

}  // namespace

Result<std::unique_ptr<Shard>> Shard::open(Storage& storage, Clock& clock,
                                           Random& random,
                                           const ShardOptions& options,
                                           RecoveryReport* report) {
  auto shard = std::make_unique<ShardImpl>(storage, clock, random, options);
  RecoveryReport unwanted;
  if (auto r = shard->start(report != nullptr ? report : &unwanted); !r) {
    return r.error();
  }
  return std::unique_ptr<Shard>(std::move(shard));
}

ShardImpl::ShardImpl(Storage& storage, Clock& clock, Random& random,
                     const ShardOptions& options)
    : storage_(storage),
      clock_(clock),
      random_(random),
      options_(with_sources(options, storage, clock, random)),
      segment_bytes_(options.log.segment_bytes),
      core_(options.core),
      cache_(options.body_cache_bytes) {}

// Without close() this is a crash, to the files: the log is not synced.
ShardImpl::~ShardImpl() {
  {
    std::lock_guard lock(waker_->mutex);
    waker_->wake = nullptr;
  }
  history_thread_.reset();
  store_.reset();
}

// --- open and recovery ---

Result<void> ShardImpl::start(RecoveryReport* report) {
  auto history = History::open(options_.history_dir);
  if (!history && history.error().code == Code::conflict) {
    // Another server, most likely: the log's lock is the one to name.
    auto lock = storage_.lock("wal/LOCK");
    if (!lock && lock.error().code == Code::conflict) return lock.error();
  }
  if (!history) return history.error();
  history_ = std::move(*history);

  core_.on_place([this](Place place, int delta) {
    if (log_ != nullptr) return log_->need(place, delta);
    auto& [first, count] = early_needs_[place >> 12];
    if (count == 0) first = place;
    count += delta;
  });
  Lsn checkpoint = 0;
  auto load = [&](Lsn lsn, std::span<const std::byte> image) -> Result<void> {
    checkpoint = lsn;
    if (image.empty()) return {};
    image_bytes_ = image.size();
    return core_.load(image);
  };
  auto opened = options_.open_log(
      storage_, options_.log, history_->applied(), load,
      [&](const Record& record) { return visit(record, checkpoint); }, report);
  if (!opened) return opened.error();
  log_ = std::move(*opened);
  for (const auto& [page, need] : early_needs_) {
    if (need.second != 0) log_->need(need.first, need.second);
  }
  early_needs_.clear();
  for (const EndedPtr& ended : feed_) {
    if (ended->is_end()) log_->need(ended->body_place, +1);
  }
  // With fsync off SQLite may have kept what the log lost.
  if (history_->applied() > report->last) {
    if (auto r = history_->rewind(report->last); !r) return r;
  }
  history_applied_ = history_->applied();
  log_->set_history_applied(history_applied_);
  checkpoint_lsn_ = checkpoint;
  start_disk(report);
  recovery_ = report->text;
  boot_ = clock_.boot();
  server_clock_.start(core_.time(), core_.clock_offset(), core_.clock_anchor(),
                      read_clocks());
  new_anchor_ = boot_ != 0 && core_.clock_anchor().boot != boot_;
  look_at_clock(true);
  core_.set_epoch(log_->writer_epoch());
  core_.set_mono(mono());
  core_.restart_leases(mono());

  store_ = std::make_unique<StoreThreads>(kStoreThreads);
  history_thread_ = std::make_unique<StoreThreads>(1);
  auto knock = [waker = waker_] { waker->knock(); };
  store_->on_wake(knock);
  history_thread_->on_wake(knock);
  log_->on_wake(knock);
  checkpoint_at_mono_ = mono() + options_.checkpoint_ms;
  feed_at_mono_ = mono();
  return {};
}

// A record of the log that the checkpoint or history does not cover.
Result<void> ShardImpl::visit(const Record& record, Lsn checkpoint) {
  if (record.lsn > checkpoint) core_.apply(record);
  if (record.lsn <= history_->applied()) return {};
  if (auto* body = std::get_if<EnqueueRecord>(&record.body)) {
    if (body->revived == 0) return {};
    auto left = std::make_shared<Ended>();
    left->id = body->id;
    left->lsn = record.lsn;
    left->left = true;
    remember_ended(std::move(left));
  } else if (std::holds_alternative<UnblockRecord>(record.body)) {
    remember_unblock(record);
  } else if (auto* end = std::get_if<EndRecord>(&record.body)) {
    auto made = std::make_shared<Ended>();
    made->id = end->id;
    made->lsn = record.lsn;
    made->fence = end->fence;
    made->by_complete = end->by_complete != 0;
    made->state = end->state;
    made->attempt = end->attempt;
    made->offset_ms = core_.clock_offset();
    made->finished_ms = record.time_ms + made->offset_ms;
    made->body_place = end->body_place;
    made->body_bytes = end->body_bytes;
    made->end_place = record.place;
    made->end_bytes = record.bytes;
    remember_ended(std::move(made));
  }
  return {};
}

// --- the turn ---

void ShardImpl::Waker::knock() {
  std::lock_guard lock(mutex);
  pending = true;
  knocked.notify_all();
  if (wake) wake();
}

void ShardImpl::on_wake(std::function<void()> wake) {
  std::lock_guard lock(waker_->mutex);
  waker_->wake = std::move(wake);
}

Millis ShardImpl::now() const { return server_clock_.now(mono()); }

// The monotonic one first: what comes between makes the wall clock seem ahead.
ClockReading ShardImpl::read_clocks() const {
  ClockReading at;
  at.boot = boot_;
  at.mono_ms = mono();
  at.wall_ms = clock_.wall_ms();
  return at;
}

// Whether the wall clock was set, since the last look or, at a start, since the
// log was last written.
void ShardImpl::look_at_clock(bool starting) {
  const Millis known = new_offset_.value_or(core_.clock_offset());
  Millis measured = server_clock_.offset(read_clocks());
  if (!clock_was_set(known, measured)) return;
  for (int i = 0; i < 3; ++i) {  // we may have been held up in between
    measured = std::min(measured, server_clock_.offset(read_clocks()));
  }
  if (!clock_was_set(known, measured)) return;
  new_offset_ = measured;
  const Millis step = measured - known;
  if (step < kClockSaidMs && step > -kClockSaidMs) return;
  ++clock_steps_;
  last_step_ms_ = step;
  LogLine(Severity::warn, "clock_stepped",
          std::string("the wall clock was set ") +
              (step < 0 ? "back" : "forward") + " by " +
              std::to_string(step < 0 ? -step : step) + " ms" +
              (starting ? " while no server ran" : "") +
              ": run_at follows it; delays, retries and deadlines do not")
      .with("step_ms", step);
}

// Into the log, before whatever is decided next.
void ShardImpl::say_clock() {
  if (!new_offset_ && !new_anchor_) return;
  const ClockReading at = read_clocks();
  ClockCommand command;
  command.offset_ms = new_offset_.value_or(core_.clock_offset());
  command.boot = at.boot;
  command.boot_ms = at.mono_ms;
  new_offset_.reset();
  new_anchor_ = false;
  Decision decision =
      core_.decide(server_clock_.now(at.mono_ms), 0, Command(command));
  commit(&decision);
}

Millis ShardImpl::mono() const { return clock_.mono_ms(); }

void ShardImpl::turn() {
  log_->poll();
  store_->run_done();
  history_thread_->run_done();
  if (log_->poisoned()) {
    release_held();  // what was durable before it is true all the same
    fail_all_poisoned();
    return;
  }
  look_at_clock(false);
  if (new_offset_ && core_.applied() > 0 &&
      (!log_->lacking() ||
       log_->fits(kDecisionBytes, core_.reserved_bytes()))) {
    say_clock();
  }
  const bool lacked = room_.lacking;
  room_ = log_->room();
  if (room_.lacking && !lacked) {  // somebody else was faster
    disk_at_mono_ = std::min(disk_at_mono_, mono());
    answer_parked_leases();
  }
  run_due();
  run_timers();
  list_on();
  log_->flush();
  if (!options_.log.own_thread) {
    while (log_->write_one()) {
    }
  }
  log_->poll();
  release_held();
  feed();
  run_checkpoint();
  sample_disk();
  hold_room(false);
  log_->flush();  // what sending brought in
  if (log_->poisoned()) fail_all_poisoned();
}

void ShardImpl::run_due() {
  for (int round = 0; round < kTickRoundsMax; ++round) {
    core_.set_mono(mono());
    if (core_.next_due() > now() && core_.next_due_mono() > mono()) return;
    // It will still be due when there is room.
    if (log_->lacking() &&
        (mono() < due_retry_mono_ ||
         !log_->fits(kDecisionBytes, core_.reserved_bytes()))) {
      due_retry_mono_ = std::max(due_retry_mono_, mono() + kFullRetryMs);
      return;
    }
    auto decision = decide(Command(TickCommand{}));
    if (!decision) return;
    const bool idle = decision->records.empty();
    deliver(&*decision);
    if (idle) return;
  }
}

Millis ShardImpl::next_due_ms() {
  const Millis at = mono();
  Millis due = INT64_MAX;
  auto sooner = [&](Millis delay) {
    due = std::min(due, std::max<Millis>(delay, 0));
  };
  if (log_->poisoned()) {
    return held_.empty() && calls_.empty() ? -1 : 0;
  }
  const Millis due_wait = log_->lacking() ? due_retry_mono_ - at : 0;
  if (Millis next = core_.next_due(); next != INT64_MAX) {
    sooner(std::max(next - server_clock_.now(at), due_wait));
  }
  if (Millis mono_due = core_.next_due_mono(); mono_due != INT64_MAX) {
    sooner(std::max(mono_due - at, due_wait));
  }
  if (!timers_.empty()) sooner(timers_.begin()->first - at);
  if (!held_.empty() && held_.front()->lsn <= log_->durable()) sooner(0);
  if (!feed_busy_ && history_applied_ < log_->durable()) {
    bool rows = !feed_.empty() && feed_.front()->lsn <= log_->durable();
    Millis wait = rows ? kFeedMs : kFeedIdleMs;
    sooner(std::max(feed_at_mono_ + wait, feed_retry_mono_) - at);
  }
  for (const CallPtr& call : listing_) sooner(call->deadline_mono - at);
  if (!scanning_.empty()) sooner(0);
  if (!image_ && !log_->checkpointing() && core_.applied() > checkpoint_lsn_ &&
      log_->bytes_since_checkpoint() >= image_bytes_) {
    sooner(std::max(checkpoint_at_mono_, checkpoint_retry_mono_) - at);
  }
  if (!disk_busy_) sooner(disk_at_mono_ - at);
  return due == INT64_MAX ? -1 : due;
}

// --- the end ---

void ShardImpl::drain() {
  draining_ = true;
  answer_all_parked();
}

std::size_t ShardImpl::running() const {
  std::uint64_t running = 0;
  for (const QueueCounts& queue : core_.counts()) {
    running += queue.by_state[static_cast<int>(State::running)];
  }
  return running;
}

void ShardImpl::release_all() {
  std::vector<Fence> held;
  std::uint64_t cursor = 0;
  do {
    cursor = core_.scan(cursor, kExamineMax, [&](const Core::Look& look) {
      if (look.view.state == State::running) held.push_back(look.view.fence);
      return true;
    });
  } while (cursor != 0);
  release_grants(std::move(held));
}

// Turns until `done`, sleeping until knocked; false after kCloseWaitMs or when
// poisoned. Real time: a fake clock does not move by itself.
bool ShardImpl::wait_for(const std::function<bool()>& done) {
  using std::chrono::steady_clock;
  const auto deadline =
      steady_clock::now() + std::chrono::milliseconds(kCloseWaitMs);
  while (true) {
    turn();
    if (done()) return true;
    if (log_->poisoned() || steady_clock::now() >= deadline) return false;
    std::unique_lock lock(waker_->mutex);
    waker_->knocked.wait_for(lock, std::chrono::milliseconds(5),
                             [this] { return waker_->pending; });
    waker_->pending = false;
  }
}

Result<void> ShardImpl::close() {
  draining_ = true;
  answer_all_parked();
  bool ok = wait_for([this] {
    return log_->durable() == log_->appended() && held_.empty() &&
           store_->outstanding() == 0;
  });
  if (ok && core_.applied() > checkpoint_lsn_) {
    ok = wait_for([this] { return !image_ && !log_->checkpointing(); });
    if (ok) take_image();
  }
  ok = ok && wait_for([this] {
         feed_at_mono_ = std::min(feed_at_mono_, mono() - kFeedIdleMs);
         return !image_ && !log_->checkpointing() && !feed_busy_ &&
                feed_.empty() && history_applied_ == log_->durable();
       });
  if (log_->poisoned()) return Error{Code::io, log_->poison_cause()};
  auto closed = log_->close();
  history_thread_ = std::make_unique<StoreThreads>(0);
  store_ = std::make_unique<StoreThreads>(0);
  history_.reset();
  if (!closed) return closed;
  if (!ok) {
    return Error{Code::unavailable,
                 "closing took too long; the log is whole, history or the "
                 "last checkpoint is behind" +
                     (feed_error_.empty() ? "" : ": " + feed_error_)};
  }
  return {};
}

// --- looking ---

ShardStats ShardImpl::stats() {
  ShardStats stats;
  stats.queues = core_.counts();
  stats.totals = core_.totals();
  stats.applied = core_.applied();
  stats.durable = log_->durable();
  stats.history_applied = history_applied_;
  stats.history_lag_bytes = history_lag_bytes_;
  stats.live_jobs = core_.live_jobs();
  stats.reserved_bytes = core_.reserved_bytes();
  stats.disk_free_bytes = disk_free_ == UINT64_MAX ? 0 : disk_free_;
  stats.disk = disk();
  stats.log = log_->take_stats();
  stats.poisoned = log_->poisoned();
  stats.draining = draining_;
  stats.poison_cause = log_->poison_cause();
  stats.recovery = recovery_;
  stats.clock_steps = clock_steps_;
  stats.last_clock_step_ms = last_step_ms_;
  stats.wait_seconds.swap(wait_seconds_);
  stats.run_seconds.swap(run_seconds_);
  return stats;
}

}  // namespace machina
