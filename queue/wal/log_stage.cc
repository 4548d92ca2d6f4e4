#include <algorithm>
#include <chrono>

#include "queue/base/check.h"
#include "queue/wal/log_impl.h"

namespace machina {
namespace {

using Steady = std::chrono::steady_clock;

constexpr auto kIdleVouch = std::chrono::milliseconds(5);
constexpr std::size_t kSyncSamplesMax = 4096;
constexpr std::size_t kKeptBufferBytes = 1 << 20;
constexpr auto kStallPause = std::chrono::milliseconds(200);

}  // namespace

std::shared_ptr<Segment> FileLog::Impl::make_segment(std::uint64_t bytes,
                                                     Place base,
                                                     Lsn first_lsn) {
  auto segment = std::make_shared<Segment>();
  SegmentHeader& header = segment->header;
  // Not from manifest_: that is the keeper's while a checkpoint is made.
  header.feature_incompat = features_;
  header.feature_compat = features_compat_;
  std::copy_n(log_uuid_, 2, header.log_uuid);
  header.seq = next_seq_++;
  header.salt = random_.next();
  header.writer_epoch = epoch_;
  header.first_lsn = first_lsn;
  header.base = base;
  header.bytes = pad_to(bytes, kBlockBytes);
  header.created_ms = clock_.wall_ms();
  segment->name = segment_name(first_lsn);
  {
    std::unique_lock hold(table_mutex_);
    table_[base] = segment;
  }
  std::lock_guard hold(mutex_);
  tail_offset_ = kSegmentDataOffset;
  tail_base_ = base;
  tail_bytes_ = header.bytes;
  tail_held_ = false;
  ++stats_.segments;
  return segment;
}

Result<void> FileLog::Impl::append(Record* record) {
  if (poisoned())
    return Error{Code::io, "the log is poisoned: " + poison_cause()};
  CHECK(!closed_);
  scratch_.clear();
  encode(*record, &scratch_);
  std::size_t need = record_room(scratch_.size());
  if (kBatchHeaderBytes + need > options_.batch_bytes_max)
    return Error{Code::too_large, "a record of " +
                                      std::to_string(scratch_.size()) +
                                      " bytes; a batch holds " +
                                      std::to_string(options_.batch_bytes_max)};
  features_ |= features_of(*record);
  if (open_) {
    std::size_t used = open_->used + need;
    if (used > options_.batch_bytes_max ||
        open_->offset + room_for(used) > tail_->header.bytes ||
        tail_->header.feature_incompat != features_)
      close_batch();
  }
  if (!open_) open_batch(need);
  Batch& batch = *open_;
  batch.buffer.reserve(pad_to(batch.used + need, kBlockBytes), batch.used);
  std::uint64_t offset = batch.offset + batch.used;
  RecordFrame frame{static_cast<std::uint8_t>(type_of(*record)),
                    static_cast<std::uint32_t>(scratch_.size())};
  put_record(frame, scratch_, tail_->header, offset,
             {batch.buffer.data() + batch.used, need});
  batch.used += need;
  ++batch.records;
  time_ms_ = batch.time_ms = std::max(time_ms_, record->time_ms);
  record->lsn = ++appended_;
  record->place = tail_->header.base + offset;
  record->bytes = frame.bytes;
  staged_bytes_ += need;
  bytes_since_checkpoint_ += need;
  return {};
}

void FileLog::Impl::open_batch(std::size_t need) {
  std::uint64_t room = room_for(kBatchHeaderBytes + need);
  std::unique_lock hold(mutex_);
  ++bound_;  // from here on no vouching batch takes the offset
  // W7: a new feature needs a header that says so.
  if (tail_offset_ + room > tail_->header.bytes ||
      tail_->header.feature_incompat != features_) {
    hold.unlock();
    roll(need);
    hold.lock();
  }
  open_ = std::make_unique<Batch>();
  open_->segment = tail_;
  open_->offset = tail_offset_;
  open_->first_lsn = appended_ + 1;
  hold.unlock();
  open_->buffer = take_buffer();
}

void FileLog::Impl::close_batch() {
  std::lock_guard hold(mutex_);
  tail_offset_ += open_->padded();
  staged_.push_back(std::move(open_));
}

// The next batch begins a new segment: of the spare if there is one that is
// large enough, else of another held file, else a plain one.
void FileLog::Impl::roll(std::size_t need) {
  std::uint64_t least = kSegmentDataOffset + room_for(kBatchHeaderBytes + need);
  std::uint64_t bytes = 0;
  std::optional<Held> held;
  bool unused = false;
  {
    std::lock_guard hold(mutex_);
    held = take_held(least);
    if (held) bytes = held->bytes;
    unused = tail_offset_ == kSegmentDataOffset;
    spare_wanted_ = true;
  }
  if (!held) {
    // With fsync on it is the slower kind; the next spare should not wait long.
    std::uint64_t plain = options_.segment_bytes;
    if (options_.fsync) plain = std::min(plain, kPlainSegmentBytes);
    bytes = std::max(plain, least);
  }
  Place base = tail_->header.base + tail_->header.bytes;
  if (unused) {  // the new one takes its name, and its file goes
    std::unique_lock hold(table_mutex_);
    table_.erase(tail_->header.base);
  }
  tail_ = make_segment(bytes, base, appended_ + 1);
  if (held) tail_->spare = held->name;
  {
    std::lock_guard hold(mutex_);
    tail_held_ = held.has_value();
  }
  keeper_ready_.notify_one();
}

// Zeroed ones first: they sync faster. Without hold() only those.
std::optional<FileLog::Impl::Held> FileLog::Impl::take_held(
    std::uint64_t least) {
  auto best = held_.end();
  auto rank = [this](const Held& held) {
    if (held.zeroed) return 0;
    if (!held.spare) return 1;
    return held.name == zeroing_ ? 3 : 2;  // the keeper lets go of it
  };
  for (auto it = held_.begin(); it != held_.end(); ++it) {
    if (it->bytes < least || (!it->zeroed && !options_.hold)) continue;
    if (best == held_.end() || rank(*it) < rank(*best)) best = it;
  }
  if (best == held_.end()) return std::nullopt;
  Held held = std::move(*best);
  held_.erase(best);
  return held;
}

BatchBuffer FileLog::Impl::take_buffer() {
  if (buffers_.empty()) return {};
  BatchBuffer buffer = std::move(buffers_.back());
  buffers_.pop_back();
  return buffer;
}

void FileLog::Impl::flush() {
  if (!open_ && staged_.empty()) return;
  {
    std::lock_guard hold(mutex_);
    if (busy_ || !work_.empty() || poisoned()) return;
  }
  if (open_) close_batch();
  std::lock_guard hold(mutex_);
  for (auto& batch : staged_) work_.push_back(std::move(batch));
  staged_.clear();
  work_ready_.notify_one();
}

void FileLog::Impl::poll() {
  std::vector<std::unique_ptr<Batch>> done;
  bool checkpointed = false;
  {
    std::lock_guard hold(mutex_);
    done.swap(done_);
    checkpointed = std::exchange(checkpoint_done_, false);
  }
  for (auto& batch : done) {
    durable_ = batch->last_lsn();
    staged_bytes_ -= batch->used - kBatchHeaderBytes;
    if (buffers_.size() < 2 && batch->buffer.capacity() <= kKeptBufferBytes)
      buffers_.push_back(std::move(batch->buffer));
  }
  if (!checkpointed) return;
  checkpointing_ = false;
  bool full;
  {
    std::lock_guard hold(mutex_);
    full = std::exchange(checkpoint_full_, false);
  }
  if (full) {
    bytes_since_checkpoint_ += checkpoint_grown_;
    return;
  }
  checkpointed_ = checkpoint_lsn_;
  may_release_ = true;
  release();
}

// --- the log thread ----------------------------------------------------------

bool FileLog::Impl::write_batch() {
  std::unique_ptr<Batch> batch;
  {
    std::unique_lock hold(mutex_);
    if (work_.empty() || poisoned()) return false;
    batch = std::move(work_.front());
    work_.pop_front();
    busy_ = true;
    // The keeper may still be writing zeros to what became this segment.
    const std::string& spare = batch->segment->spare;
    done_ready_.wait(hold, [&] { return spare.empty() || zeroing_ != spare; });
  }
  auto before = Steady::now();
  auto ok = writer_->write(*batch);
  auto after = Steady::now();
  // W8: it stays where it is, the same bytes for the same place.
  const bool full = !ok && ok.error().code == Code::full;
  if (!ok && !full) poison(ok.error());
  {
    std::lock_guard hold(mutex_);
    busy_ = false;
    stalled_ = full;
    if (full) {
      lacking_ = true;
      lacking_why_ = ok.error().what;
      work_.push_front(std::move(batch));
    }
    if (ok) {
      if (batch->segment->header.base == tail_base_ && options_.hold)
        tail_held_ = true;
      --bound_;
      vouched_ = false;
      written_ = batch->last_lsn();
      ++stats_.batches;
      stats_.records += stats_.last_batch_records = batch->records;
      stats_.bytes += batch->padded();
      std::uint64_t us =
          std::chrono::duration_cast<std::chrono::microseconds>(after - before)
              .count();
      if (stats_.sync_us.size() < kSyncSamplesMax)
        stats_.sync_us.push_back(us);
      else
        stats_.sync_us[sync_next_++ % kSyncSamplesMax] = us;
      done_.push_back(std::move(batch));
    }
  }
  wake_owner();
  return !full;
}

// Closes the gap of W3: rot in the last batch is known for what it is once a
// later one vouches for it.
bool FileLog::Impl::write_vouch() {
  std::shared_ptr<Segment> segment;
  std::uint64_t offset = 0;
  Millis time_ms = 0;
  {
    std::lock_guard hold(mutex_);
    if (!options_.fsync || vouched_ || bound_ != 0 || poisoned()) return false;
    CHECK(tail_offset_ + kBlockBytes <= tail_->header.bytes);
    segment = tail_;  // the owner changes it only with a batch to bind
    offset = tail_offset_;
    time_ms = manifest_.time_ms;
    tail_offset_ += kBlockBytes;
    vouched_ = true;
    busy_ = true;
  }
  auto ok = writer_->vouch(segment, offset, time_ms);
  auto full = [&] { return !ok && ok.error().code == Code::full; };
  while (full() && options_.own_thread) {  // batches may be bound behind it
    std::unique_lock hold(mutex_);
    stalled_ = lacking_ = true;
    lacking_why_ = ok.error().what;
    work_ready_.wait_for(hold, kStallPause, [this] { return stop_; });
    if (stop_) return false;
    hold.unlock();
    ok = writer_->vouch(segment, offset, time_ms);
  }
  if (!ok && !full()) poison(ok.error());
  {
    std::lock_guard hold(mutex_);
    busy_ = false;
    stalled_ = full();
    if (full()) {  // it was never there
      tail_offset_ = offset;
      vouched_ = false;
    }
  }
  wake_owner();  // records may have been staged meanwhile
  return !full();
}

void FileLog::Impl::run_writer() {
  std::unique_lock hold(mutex_);
  for (;;) {
    auto ready = [this] { return stop_ || (!work_.empty() && !poisoned()); };
    if (!ready()) {
      bool idle = !vouched_ && bound_ == 0;
      if (!idle) {
        work_ready_.wait(hold);
        continue;
      }
      if (!work_ready_.wait_for(hold, kIdleVouch, ready)) {
        hold.unlock();
        write_vouch();
        hold.lock();
        continue;
      }
    }
    if (stop_) return;
    hold.unlock();
    write_batch();
    hold.lock();
    if (stalled())
      work_ready_.wait_for(hold, kStallPause, [&] { return stop_; });
  }
}

}  // namespace machina
