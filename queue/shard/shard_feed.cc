// What the shard does beside requests: feeds history with what is durable,
// checkpoints the core, watches the disk, samples times.

#include <algorithm>

#include "queue/base/logger.h"
#include "queue/shard/shard_impl.h"

namespace machina {
namespace {

std::string size_words(std::uint64_t bytes) {
  constexpr std::uint64_t kMiB = 1u << 20;
  if (bytes < kMiB) return std::to_string(bytes) + " bytes";
  return std::to_string(bytes / kMiB) + " MiB";
}

}  // namespace

// --- the way to history ---

void ShardImpl::remember_ended(EndedPtr ended) {
  history_lag_bytes_ += ended->body_bytes + ended->end_bytes;
  ended_memory_ += ended->memory;
  if (ended->left) {
    // The job is live again; what its earlier end left is no longer true.
    if (EndedPtr earlier = find_ended(ended->id)) {
      ended_by_fence_.erase(earlier->fence);
      ended_by_id_.erase(ended->id);
    }
  } else if (ended->is_end()) {
    ended_by_id_[ended->id] = ended;
    if (ended->by_complete) ended_by_fence_[ended->fence] = ended;
  }
  feed_.push_back(std::move(ended));
}

void ShardImpl::remember_unblock(const Record& record) {
  auto unblock = std::get<UnblockRecord>(record.body);
  if (unblock.input.size() > kUnblockInputMax) unblock.input.clear();
  auto made = std::make_shared<Ended>();
  made->id = unblock.id;
  made->lsn = record.lsn;
  made->finished_ms = record.time_ms + core_.clock_offset();
  made->unblock = std::make_shared<const UnblockRecord>(std::move(unblock));
  remember_ended(std::move(made));
}

void ShardImpl::forget_ended(const EndedPtr& ended) {
  history_lag_bytes_ -= ended->body_bytes + ended->end_bytes;
  ended_memory_ -= ended->memory;
  if (!ended->is_end()) return;
  log_->need(ended->body_place, -1);
  auto by_id = ended_by_id_.find(ended->id);
  if (by_id != ended_by_id_.end() && by_id->second == ended) {
    ended_by_id_.erase(by_id);
  }
  auto by_fence = ended_by_fence_.find(ended->fence);
  if (by_fence != ended_by_fence_.end() && by_fence->second == ended) {
    ended_by_fence_.erase(by_fence);
  }
}

EndedPtr ShardImpl::find_ended(const JobId& id) const {
  auto it = ended_by_id_.find(id);
  return it == ended_by_id_.end() ? nullptr : it->second;
}

EndedPtr ShardImpl::find_ended(Fence fence) const {
  auto it = ended_by_fence_.find(fence);
  return it == ended_by_fence_.end() ? nullptr : it->second;
}

// One batch at a time goes to the history thread; only what is durable, so
// that history never knows more than the log.
void ShardImpl::feed() {
  const Millis at = mono();
  const Lsn durable = log_->durable();
  // Lists wait for what had ended when they were asked for.
  std::vector<CallPtr> ready;
  for (const CallPtr& call : listing_) {
    bool behind = (!feeding_.empty() && feeding_.front()->lsn <= call->lsn) ||
                  (!feed_.empty() && feed_.front()->lsn <= call->lsn);
    if (!behind || at >= call->deadline_mono) ready.push_back(call);
  }
  for (const CallPtr& call : ready) {
    std::erase(listing_, call);
    if (!call->dropped) read_page(call);
  }
  if (feed_busy_ || at < feed_retry_mono_) return;
  const bool rows = !feed_.empty() && feed_.front()->lsn <= durable;
  if (!rows) {
    if (durable <= history_applied_ || at < feed_at_mono_ + kFeedIdleMs) return;
    return post_feed({}, durable);
  }
  if (at < feed_at_mono_ + kFeedMs && feed_.size() < kFeedBatchMax / 2 &&
      listing_.empty()) {
    return;
  }
  std::vector<EndedPtr> batch;
  std::size_t bytes = 0;
  while (!feed_.empty() && feed_.front()->lsn <= durable &&
         batch.size() < kFeedBatchMax && bytes < kFeedBatchBytesMax) {
    bytes += feed_.front()->body_bytes + feed_.front()->end_bytes;
    batch.push_back(std::move(feed_.front()));
    feed_.pop_front();
  }
  const bool all = feed_.empty() || feed_.front()->lsn > durable;
  post_feed(batch, all ? durable : batch.back()->lsn);
}

namespace {

// On the history thread. Reads from the log what was not kept in memory.
Result<HistoryChange> change_of(const LogStore& log, const Ended& ended) {
  HistoryChange change;
  change.id = ended.id;
  change.lsn = ended.lsn;
  change.finished_ms = ended.finished_ms;
  change.offset_ms = ended.offset_ms;
  change.unblock = ended.unblock;
  if (!ended.is_end()) return change;
  change.body = ended.body;
  change.end = ended.end;
  if (change.body == nullptr) {
    auto body = read_body(log, ended.id, ended.body_place, ended.body_bytes);
    if (!body) return body.error();
    change.body = std::move(*body);
  }
  if (change.end == nullptr) {
    auto record = read_record(log, ended.end_place, ended.end_bytes);
    if (!record) return record.error();
    auto* end = std::get_if<EndRecord>(&record->body);
    if (end == nullptr) {
      return Error{Code::corrupt, "the end of " + to_string(ended.id) +
                                      ": another record lies there"};
    }
    change.end = std::make_shared<const EndRecord>(std::move(*end));
  }
  return change;
}

// Damage of one job's bytes must not keep all later ones out of history: it is
// left out, loudly. A disk that does not answer is another matter: the whole
// batch is tried again, for its rows would otherwise be lost.
Result<void> apply_batch(const LogStore& log, History& history, EndSink* sink,
                         const std::vector<EndedPtr>& batch, Lsn through) {
  std::vector<HistoryChange> changes;
  changes.reserve(batch.size());
  for (const EndedPtr& ended : batch) {
    auto change = change_of(log, *ended);
    if (change) {
      changes.push_back(std::move(*change));
    } else if (change.error().code != Code::corrupt) {
      return change.error();
    } else {
      LogLine(Severity::error, "history_left_out",
              "history: a job is left out: " + change.error().what)
          .with("job", to_string(ended->id))
          .with("lsn", static_cast<std::int64_t>(ended->lsn));
    }
  }
  // Crash between the two: the sink is given the same again (S2).
  if (sink != nullptr && !changes.empty()) {
    if (auto r = sink->take(changes); !r) return r;
  }
  return history.apply(changes, through);
}

}  // namespace

void ShardImpl::post_feed(std::vector<EndedPtr> batch, Lsn through) {
  feed_busy_ = true;
  feed_at_mono_ = mono();
  feeding_ = batch;
  bool expire = mono() >= expire_at_mono_;
  if (expire) expire_at_mono_ = mono() + kExpireMs;
  Millis at = now();
  auto shared = std::make_shared<std::vector<EndedPtr>>(std::move(batch));
  bool posted = history_thread_->post([=, this] {
    auto result = std::make_shared<Result<void>>(
        apply_batch(*log_, *history_, sink_, *shared, through));
    if (*result && expire) *result = history_->expire(at);
    return [=, this] { fed(*shared, through, *result); };
  });
  if (!posted) fed(*shared, through, Error{Code::unavailable, "no room"});
}

void ShardImpl::fed(const std::vector<EndedPtr>& batch, Lsn through,
                    const Result<void>& result) {
  feed_busy_ = false;
  feeding_.clear();
  if (!result) {
    // The same rows again, later; meanwhile the lag grows and enqueue says so.
    if (feed_error_ != result.error().what) {
      feed_error_ = result.error().what;
      LogLine(Severity::warn, "history_failed", feed_error_ + "; trying again");
    }
    feed_.insert(feed_.begin(), batch.begin(), batch.end());
    feed_retry_mono_ = mono() + kFeedRetryMs;
    return;
  }
  feed_error_.clear();
  history_applied_ = through;
  for (const EndedPtr& ended : batch) forget_ended(ended);
  log_->set_history_applied(through);
}

// The rest of a list's page, from history.
void ShardImpl::read_page(const CallPtr& call) {
  auto query = std::make_shared<ListQuery>(call->list);
  query->limit -= static_cast<int>(call->response.views.size());
  const Millis at = now();
  call->parked = Call::Parked::no;
  bool posted = store_->post([=, this] {
    auto page = std::make_shared<Result<History::Page>>(
        history_->list(*query, at, kExamineMax));
    return [=, this] {
      if (!*page) {
        return refuse(call,
                      page->error().code == Code::invalid
                          ? Response::Status::bad_cursor
                          : Response::Status::failed,
                      page->error().what);
      }
      for (const FinishedJob& job : (*page)->jobs) {
        call->response.views.push_back(view_of(job, options_.core.fsync));
      }
      call->response.scanned += (*page)->scanned;
      if (call->response.views.empty() && !(*page)->cursor.empty() &&
          mono() < call->list_until_mono && !call->dropped) {
        call->list.cursor = (*page)->cursor;
        return read_page(call);
      }
      if (!(*page)->cursor.empty()) {
        call->response.cursor = "H" + (*page)->cursor;
      }
      answer(call);
    };
  });
  if (!posted) refuse(call, Response::Status::failed, "too many file reads");
}

// --- checkpoints ---

// The image is of the state that is applied; it goes to disk when the log is
// durable that far, for a checkpoint must not know more than the log.
void ShardImpl::run_checkpoint() {
  if (log_->poisoned()) return;
  if (image_ && !log_->checkpointing() && log_->durable() >= image_->lsn) {
    auto save = [this, state = std::move(image_->state)] {
      std::vector<std::byte> bytes;
      state->save(&bytes);
      image_bytes_ = bytes.size();
      return bytes;
    };
    log_->checkpoint(image_->lsn, image_->time_ms, std::move(save));
    image_.reset();
  }
  if (image_ || log_->checkpointing()) return;
  if (checkpoint_lsn_ > log_->checkpointed()) {  // no room for it
    checkpoint_lsn_ = log_->checkpointed();
    checkpoint_retry_mono_ = mono() + kFullRetryMs;
  }
  if (mono() < checkpoint_retry_mono_) return;
  // At once where it frees more than it writes.
  if (reclaim_bytes_ != 0 &&
      (reclaim_bytes_ > image_bytes_ || mono() >= checkpoint_at_mono_)) {
    return reclaim();
  }
  if (core_.applied() <= checkpoint_lsn_) return;
  // It is due when the log has grown by as much as the last image had bytes,
  // so that the disk's time for it stays a small share.
  const std::uint64_t grown = log_->bytes_since_checkpoint();
  const bool due = grown >= options_.checkpoint_log_bytes ||
                   (mono() >= checkpoint_at_mono_ && grown >= image_bytes_);
  if (due) take_image();
}

// A low disk refuses what would let the log grow, and a log that does not grow
// gets no further checkpoint: the segments that the checkpoints keep would stay
// for ever, and the disk low with them. A checkpoint needs an lsn of its own:
// where nothing is new, the clock is written once more.
void ShardImpl::reclaim() {
  reclaim_bytes_ = 0;
  if (core_.applied() <= checkpoint_lsn_) {
    if (log_->lacking() && !log_->fits(kDecisionBytes, core_.reserved_bytes()))
      return;
    new_anchor_ = true;
    say_clock();
  }
  take_image();
}

// Freezes what is applied; the log's thread makes bytes of it.
void ShardImpl::take_image() {
  image_.emplace();
  image_->lsn = core_.applied();
  image_->time_ms = core_.time();
  image_->state = core_.freeze();
  checkpoint_lsn_ = image_->lsn;
  checkpoint_at_mono_ = mono() + options_.checkpoint_ms;
}

// --- disk and samples ---

void ShardImpl::sample_disk() {
  if (disk_busy_ || mono() < disk_at_mono_) return;
  disk_at_mono_ =
      mono() + (disk_said_ == DiskLevel::ok ? kDiskSampleMs : kDiskLowSampleMs);
  disk_busy_ = store_->post([this] {
    auto free = storage_.free_bytes();
    std::uint64_t bytes = free ? *free : UINT64_MAX;
    return [this, bytes] {
      disk_busy_ = false;
      disk_free_ = bytes;
      hold_room(true);
      reclaim_bytes_ =
          disk().level != DiskLevel::ok ? log_->kept_for_checkpoints() : 0;
      if (disk_low(disk_hard_) || log_->lacking()) answer_parked_leases();
      say_disk();
    };
  });
}

// What is promised, and a margin, in whole units; and room for an image. Grows
// at once; becomes less by a unit a second.
void ShardImpl::hold_room(bool sampled) {
  const std::uint64_t unit =
      std::min<std::uint64_t>(kHoldUnitBytes, options_.log.segment_bytes);
  const std::uint64_t margin =
      std::min<std::uint64_t>(kHoldMarginBytes, unit / 4 * 3);
  std::uint64_t log = core_.reserved_bytes() + margin;
  std::uint64_t image = image_bytes_ + image_bytes_ / 4;
  image = std::max(image, core_.live_jobs() * 128);
  image = (image / kCheckpointRoomBytes + 1) * kCheckpointRoomBytes;
  image = std::min(image, std::max(image_bytes_ * 2, std::size_t{unit}));
  if (sampled && hold_log_ > unit) log = std::max(log, hold_log_ - unit);
  if (!sampled && log <= hold_log_ && image <= hold_checkpoint_) return;
  // In steps, so that it is not asked for at every turn.
  hold_log_ = sampled ? log : std::max(hold_log_, log + margin / 4);
  hold_checkpoint_ = image;
  log_->hold(hold_log_, hold_checkpoint_);
}

// `segments` of the log, or one part in `share` of a small file system: a
// bound that such a one can never meet would be a queue that never starts.
ShardImpl::DiskBound ShardImpl::disk_bound(std::uint64_t set,
                                           std::uint64_t segments,
                                           std::uint64_t segment_bytes,
                                           std::uint64_t total,
                                           std::uint64_t share) {
  if (set != 0) return {set, "as set"};
  const std::uint64_t bytes = segments * segment_bytes;
  if (total != 0 && total / share < bytes) {
    return {total / share, "1/" + std::to_string(share) +
                               " of a file system of " + size_words(total)};
  }
  return {bytes, std::to_string(segments) +
                     (segments == 1 ? " segment of " : " segments of ") +
                     size_words(segment_bytes)};
}

// The first sample is taken before the first request; room is held from the
// first turn on.
void ShardImpl::start_disk(RecoveryReport* report) {
  auto total = storage_.total_bytes();
  const std::uint64_t whole = total ? *total : 0;
  disk_soft_ =
      disk_bound(options_.disk_soft_bytes, 4, segment_bytes_, whole, 4);
  disk_hard_ =
      disk_bound(options_.disk_hard_bytes, 1, segment_bytes_, whole, 8);
  if (auto free = storage_.free_bytes()) disk_free_ = *free;
  disk_at_mono_ = mono() + kDiskSampleMs;
  hold_room(true);
  room_ = log_->room();
  if (!disk_low(disk_soft_)) return;
  const bool hard = disk_low(disk_hard_);
  report->text += std::string("; warning: ") +
                  (hard ? "no job is leased and none" : "no job") +
                  " is accepted until there is room: " +
                  disk_words(hard ? disk_hard_ : disk_soft_);
}

// What was promised to live jobs and is not held yet comes on top.
std::uint64_t ShardImpl::needed(const DiskBound& bound) const {
  const std::uint64_t promised = core_.reserved_bytes();
  return bound.bytes + promised - std::min(promised, room_.held);
}

bool ShardImpl::disk_low(const DiskBound& bound) const {
  return disk_free_ < needed(bound);
}

std::string ShardImpl::disk_words(const DiskBound& bound) const {
  const std::uint64_t more = needed(bound) - bound.bytes;
  return "disk: " + std::to_string(disk_free_) + " bytes free, " +
         std::to_string(bound.bytes + more) + " needed (" + bound.from +
         ", and " + std::to_string(more) +
         " bytes for the jobs in queue); make room on the file system of the "
         "root";
}

std::string ShardImpl::full_words() const {
  const LogStore::Room room = log_->room();
  return "disk: the log found no room (" + room.why + "); " +
         std::to_string(room.held) + " bytes are held, " +
         std::to_string(core_.reserved_bytes()) +
         " of them for the jobs in queue; make room on the file system of the "
         "root";
}

bool ShardImpl::refuse_if_low(const CallPtr& call, const DiskBound& bound) {
  const bool low = disk_low(bound);
  if (!low && (&bound == &disk_hard_ || !log_->lacking())) return false;
  refuse(call, Response::Status::disk_low,
         low ? disk_words(bound) : full_words());
  return true;
}

std::uint64_t ShardImpl::promised_but(std::uint64_t bytes) const {
  const std::uint64_t promised = core_.reserved_bytes();
  return promised - std::min(promised, bytes);
}

bool ShardImpl::refuse_if_full(const CallPtr& call, std::uint64_t bytes,
                               std::uint64_t keep) {
  if (!log_->lacking()) return false;
  if (log_->fits(bytes + kDecisionBytes, keep)) return false;
  refuse(call, Response::Status::disk_low, full_words());
  return true;
}

// So many leases as the held room has ends for; false: not one.
bool ShardImpl::shorten(LeaseCommand* lease) const {
  if (!log_->lacking()) return true;
  for (int n = lease->max; n > 0; n /= 2) {
    const auto count = static_cast<std::uint64_t>(n);
    if (!log_->fits(kDecisionBytes + count * kGrantBytes,
                    core_.reserved_bytes() + count * kReservePerLease))
      continue;
    lease->max = n;
    lease->waiter = 0;
    return true;
  }
  return false;
}

DiskState ShardImpl::disk() const {
  DiskState state;
  state.free_bytes = disk_free_ == UINT64_MAX ? 0 : disk_free_;
  state.soft_bytes = needed(disk_soft_);
  state.hard_bytes = needed(disk_hard_);
  state.held_bytes = room_.held;
  state.promised_bytes = core_.reserved_bytes();
  if (log_->stalled()) {
    state.level = DiskLevel::full;
    state.says = "nothing is written until there is room; " + full_words();
  } else if (disk_low(disk_hard_)) {
    state.level = DiskLevel::hard;
    state.says = "only ends and cancels are taken; " + disk_words(disk_hard_);
  } else if (disk_low(disk_soft_) || log_->lacking()) {
    state.level = DiskLevel::soft;
    state.says = "no new jobs and no uploads are taken; " +
                 (disk_low(disk_soft_) ? disk_words(disk_soft_) : full_words());
  }
  return state;
}

// Once a change, but not at every turn of a disk that is just at a bound.
void ShardImpl::say_disk() {
  const DiskState state = disk();
  if (state.level == disk_said_) return;
  if (state.level < disk_said_ && mono() < disk_said_mono_ + 2 * kDiskSampleMs)
    return;
  disk_said_ = state.level;
  disk_said_mono_ = mono();
  if (state.level == DiskLevel::ok) {
    LogLine(Severity::info, "disk_ok", "the disk has room again");
  } else {
    LogLine(Severity::warn, "disk_low",
            "disk level " + std::string(name(state.level)) + ": " + state.says);
  }
}

std::string_view name(DiskLevel level) {
  constexpr std::string_view kNames[] = {"ok", "soft", "hard", "full"};
  return kNames[static_cast<int>(level)];
}

// What the histograms of waiting and running get from a record that is about
// to be applied. The core knows since when a job is ready or runs, over
// restarts too; the body cache and the views do not know it of a recovered job.
void ShardImpl::sample_times(const Record& record) {
  auto sample = [&](Samples* samples, const JobId& id) {
    if (samples->size() >= kSamplesMax) return;
    const Core::Standing job = core_.standing(id);
    const auto ms = static_cast<double>(record.time_ms - job.since_ms);
    samples->emplace_back(job.kind, std::max(0.0, ms / 1000.0));
  };
  if (const auto* grant = std::get_if<GrantRecord>(&record.body)) {
    sample(&wait_seconds_, grant->id);
  } else if (const auto* end = std::get_if<EndRecord>(&record.body)) {
    if (end->fence != 0) sample(&run_seconds_, end->id);
  }
}

}  // namespace machina
