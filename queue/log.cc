#include "queue/log.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <thread>
#include <utility>

#include "queue/check.h"
#include "queue/checkpoint.h"
#include "queue/log_writer.h"
#include "queue/manifest.h"
#include "queue/recovery.h"
#include "queue/segment.h"

namespace machina {
namespace {

using Steady = std::chrono::steady_clock;

constexpr auto kIdleVouch = std::chrono::milliseconds(5);
constexpr std::uint64_t kPlainSegmentBytes = 16ull << 20;  // without a spare
constexpr std::size_t kSpareStepBytes = 256 << 10;
constexpr auto kSparePause = std::chrono::milliseconds(4);
constexpr std::size_t kSyncSamplesMax = 4096;
constexpr std::size_t kReadersMax = 64;  // files open for read()
constexpr std::size_t kKeptBufferBytes = 1 << 20;

// Room that a batch of `used` bytes takes, with the block behind it for a
// vouching batch.
std::uint64_t room_for(std::uint64_t used) {
  return pad_to(used, kBlockBytes) + kBlockBytes;
}

}  // namespace

class Log::Impl {
 public:
  Impl(Storage& storage, const LogOptions& options)
      : storage_(storage),
        options_(options),
        clock_(options.clock ? *options.clock : system_clock()),
        random_(options.random ? *options.random : system_random()) {}
  ~Impl() { stop_threads(); }

  // --- open ---
  Result<void> open(Lsn replay_from, const Load& load, const Visit& visit,
                    RecoveryReport* report);

  // --- the owner's side ---
  Result<void> append(Record* record);
  std::span<const std::byte> encoded() const { return scratch_; }
  void flush();
  void poll();
  void checkpoint(Lsn lsn, Millis time_ms, Image image);
  void release();
  Result<void> close();

  // --- the threads' work, one piece at a time; true if there was any ---
  bool write_batch();
  bool write_vouch();
  bool keep_one();  // checkpoint, removals or a spare
  bool do_checkpoint();

  Result<std::pair<RecordType, std::vector<std::byte>>> read(
      Place place, std::uint32_t bytes) const;
  void need(Place place, int delta);
  Stats take_stats();
  bool write_one();

  bool poisoned() const { return poisoned_.load(std::memory_order_acquire); }
  std::string poison_cause() const {
    std::lock_guard hold(mutex_);
    return cause_;
  }

  void set_wake(std::function<void()> wake) {
    std::lock_guard hold(mutex_);
    wake_ = std::move(wake);
  }

  std::uint32_t epoch_ = 0;
  Lsn appended_ = 0, durable_ = 0;
  Lsn history_applied_ = 0;
  bool checkpointing_ = false;
  bool may_release_ = false;  // not before a checkpoint of this start
  std::uint64_t bytes_since_checkpoint_ = 0;
  std::uint64_t staged_bytes_ = 0;

 private:
  // --- opening, in order ---
  Result<void> start_manifest();
  Result<void> sweep(bool tmp);
  Result<void> load_checkpoint(const Load& load, RecoveryReport* report,
                               Lsn* covered);
  Result<void> recover(Lsn replay_from, Lsn covered, const Visit& visit,
                       RecoveryReport* report);
  Result<void> begin_writing(Chain* chain, const Scan& scan);
  void remember(const FoundSegment& found);
  void describe(RecoveryReport* report) const;

  // --- staging ---
  std::shared_ptr<Segment> make_segment(std::uint64_t bytes, Place base,
                                        Lsn first_lsn);
  void open_batch(std::size_t need);
  void close_batch();
  void roll(std::size_t need);
  BatchBuffer take_buffer();

  // --- keeper's work ---
  struct CheckpointJob {
    Lsn lsn = 0;
    Millis time_ms = 0;
    std::uint64_t features = 0;
    Image image;
  };
  Result<void> run_checkpoint(const CheckpointJob& job);
  Result<void> run_removals(const std::vector<std::string>& names);
  Result<void> sync_unsynced();
  Result<void> make_spare();
  bool pause_spare();
  bool wants_spare() const;  // under mutex_

  void poison(const Error& error);
  void wake_owner();
  void run_writer();
  void run_keeper();
  void start_threads();
  void stop_threads();
  std::shared_ptr<File> reader_of(Segment& segment, Error* error) const;

  Storage& storage_;
  const LogOptions options_;
  Clock& clock_;
  Random& random_;
  std::unique_ptr<Storage::Lock> lock_;
  std::unique_ptr<LogWriter> writer_;

  // The owner's.
  std::unique_ptr<Batch> open_;
  std::deque<std::unique_ptr<Batch>> staged_;  // closed, not handed over
  std::shared_ptr<Segment> tail_;
  std::uint64_t next_seq_ = 1;
  std::uint64_t log_uuid_[2] = {0, 0};
  std::uint64_t features_ = 0, features_compat_ = 0;  // of new segments
  std::vector<std::byte> scratch_;
  std::vector<BatchBuffer> buffers_;  // at most 2, to be used again
  Millis time_ms_ = 0;                // greatest logged
  bool closed_ = false;

  // Segments by base place; written by the owner, read by read().
  mutable std::shared_mutex table_mutex_;
  std::map<Place, std::shared_ptr<Segment>> table_;
  mutable std::atomic<std::size_t> readers_{0};

  // Between the owner and the threads.
  mutable std::mutex mutex_;
  std::condition_variable work_ready_, keeper_ready_, done_ready_;
  std::deque<std::unique_ptr<Batch>> work_;
  std::vector<std::unique_ptr<Batch>> done_;
  bool busy_ = false;
  std::uint64_t tail_offset_ = 0;  // where the next batch is bound
  std::size_t bound_ = 0;          // batches bound and not yet written
  bool vouched_ = true;            // nothing was written since the last one
  std::optional<CheckpointJob> checkpoint_job_;
  bool checkpoint_busy_ = false, checkpoint_done_ = false;
  std::vector<std::string> removals_;
  Manifest manifest_;
  Lsn written_ = 0;                // by the log thread
  std::uint64_t tail_bytes_ = 0;   // size of the segment being bound
  std::uint64_t spare_bytes_ = 0;  // 0: there is none
  std::string spare_name_;
  std::uint64_t spare_number_ = 0;
  bool spare_wanted_ = true;
  bool stop_ = false;
  std::function<void()> wake_;
  std::string cause_;
  std::atomic<bool> poisoned_{false};
  Stats stats_;
  std::size_t sync_next_ = 0;
  std::thread writer_thread_, keeper_thread_;
};

// --- open --------------------------------------------------------------------

Result<void> Log::Impl::open(Lsn replay_from, const Load& load,
                             const Visit& visit, RecoveryReport* report) {
  Lsn covered = 0;
  if (auto ok = start_manifest(); !ok) return ok;
  if (auto ok = load_checkpoint(load, report, &covered); !ok) return ok;
  if (auto ok = recover(replay_from, covered, visit, report); !ok) return ok;
  describe(report);
  start_threads();
  return {};
}

// The lock, and what the manifest says. An empty root gets its first one.
Result<void> Log::Impl::start_manifest() {
  if (auto ok = storage_.make_dir("wal"); !ok) return ok;
  auto lock = storage_.lock("wal/LOCK");
  if (!lock) return lock.error();
  lock_ = std::move(*lock);
  if (options_.on_locked) options_.on_locked();
  auto manifest = read_manifest(storage_);
  if (!manifest) return manifest.error();
  if (*manifest) {
    manifest_ = **manifest;
    return {};
  }
  auto names = storage_.list("wal");
  if (!names) return names.error();
  for (const std::string& name : *names) {
    if (name.ends_with(".seg") || name.ends_with(".ckpt"))
      return Error{Code::corrupt,
                   "wal/MANIFEST is missing, and wal/" + name + " is there"};
  }
  manifest_.log_uuid[0] = random_.next();
  manifest_.log_uuid[1] = random_.next();
  return storage_.sync_dir(".");
}

// Temporary names are of work that was never finished, and so are checkpoints
// that no manifest names.
Result<void> Log::Impl::sweep(bool tmp) {
  auto names = storage_.list("wal");
  if (!names) return names.error();
  for (const std::string& name : *names) {
    std::string full = "wal/" + name;
    bool stale = name.ends_with(tmp ? ".tmp" : ".ckpt");
    for (const auto& checkpoint : manifest_.checkpoint)
      stale &= checkpoint.lsn == 0 || full != checkpoint_name(checkpoint.lsn);
    if (!stale) continue;
    if (auto ok = storage_.remove(full); !ok) return ok;
  }
  return {};
}

Result<void> Log::Impl::load_checkpoint(const Load& load,
                                        RecoveryReport* report, Lsn* covered) {
  Error newest{Code::corrupt, ""};
  for (int i = 0; i < 2; ++i) {
    const auto checkpoint = manifest_.checkpoint[i];
    if (checkpoint.lsn == 0) break;
    auto image = read_checkpoint(storage_, manifest_, checkpoint);
    if (!image && image.error().code != Code::corrupt) return image.error();
    if (!image) {
      if (i == 0) newest = image.error();
      report->checkpoint_fell_back = true;
      continue;
    }
    if (i == 1) {  // the older one is all that counts from here on
      manifest_.checkpoint[0] = checkpoint;
      manifest_.checkpoint[1] = {};
    }
    *covered = report->checkpoint = checkpoint.lsn;
    if (options_.image_features) features_ |= options_.image_features(*image);
    return load(checkpoint.lsn, *image);
  }
  if (manifest_.checkpoint[1].lsn != 0)
    return Error{Code::corrupt, newest.what + "; the older one neither"};
  // None, or the only one is bad: the log then goes back to its first record,
  // because nothing is released before there are two.
  manifest_.checkpoint[0] = {};
  return load(0, {});
}

Result<void> Log::Impl::recover(Lsn replay_from, Lsn covered,
                                const Visit& visit, RecoveryReport* report) {
  auto found = find_segments(storage_, manifest_);
  if (!found) return found.error();
  for (const FoundSegment& segment : *found)
    next_seq_ = std::max(next_seq_, segment.header.seq + 1);
  Chain chain = link_segments(std::move(*found));
  Scan scan;
  if (chain.live.empty()) {
    if (manifest_.begun)
      return Error{Code::corrupt,
                   "wal: the manifest knows of segments, of lsns up to at "
                   "least " +
                       std::to_string(manifest_.durable_lsn) +
                       ", and none is there"};
  } else {
    if (chain.live.front().header.first_lsn > covered + 1)
      return Error{Code::corrupt,
                   "wal: lsn " + std::to_string(covered + 1) + ".." +
                       std::to_string(chain.live.front().header.first_lsn - 1) +
                       " are in no segment and no checkpoint"};
    Lsn from = std::max(std::min(covered, replay_from) + 1,
                        chain.live.front().header.first_lsn);
    Visit counting = [&](const Record& record) {
      features_ |= features_of(record);  // before there was a bit for them
      if (record.lsn > covered) {
        bytes_since_checkpoint_ += record_room(record.bytes);
      }
      return visit(record);
    };
    auto scanned = scan_chain(storage_, chain, manifest_, from, counting);
    if (!scanned) return scanned.error();
    scan = std::move(*scanned);
    if (scan.last < covered)
      return Error{Code::corrupt,
                   "wal: the log ends at lsn " + std::to_string(scan.last) +
                       ", before its checkpoint at " + std::to_string(covered)};
  }
  report->last = scan.last;
  report->durable = scan.vouched;
  report->clean = manifest_.clean;
  report->dropped_bytes = scan.dropped_bytes;
  report->dropped_from = scan.dropped_bytes != 0 ? scan.last + 1 : 0;
  report->segments = chain.live.size() + chain.kept.size();
  report->records = scan.records;
  report->first_visited = scan.first_visited;
  time_ms_ = std::max(manifest_.time_ms, scan.time_ms);
  // The scan settled the files that it read; this does so for their names.
  if (auto ok = storage_.sync_dir("wal"); !ok) return ok;
  return begin_writing(&chain, scan);
}

// A new epoch, a fresh segment (W4), and only then the end of what was cut off.
Result<void> Log::Impl::begin_writing(Chain* chain, const Scan& scan) {
  ChainLink link = scan.link;
  Place base = 0;
  for (const auto* list : {&chain->live, &chain->kept, &chain->dead}) {
    for (const FoundSegment& segment : *list)
      base = std::max(base, segment.header.base + segment.header.bytes);
  }
  for (std::size_t i = scan.keep; i < chain->live.size(); ++i)
    chain->dead.push_back(std::move(chain->live[i]));
  chain->live.resize(scan.keep);
  // A segment that kept no batch has the name that the new one needs: it is
  // replaced by the rename, and the chain goes on from the one before.
  if (!chain->live.empty() &&
      chain->live.back().header.first_lsn == scan.last + 1) {
    link = chain->live.back().header.prev;
    chain->live.pop_back();
  }
  for (const auto* list : {&chain->kept, &chain->live}) {
    for (const FoundSegment& segment : *list) remember(segment);
  }
  appended_ = durable_ = scan.last;
  link.last_lsn = scan.last;

  if (auto ok = sweep(true); !ok) return ok;
  ++manifest_.generation;
  epoch_ = ++manifest_.writer_epoch;
  manifest_.clean = false;
  features_ |= manifest_.feature_incompat;
  manifest_.feature_incompat = features_;
  features_compat_ = manifest_.feature_compat;
  std::copy_n(manifest_.log_uuid, 2, log_uuid_);
  manifest_.durable_lsn = scan.last;
  manifest_.time_ms = time_ms_;
  if (auto ok = write_manifest(storage_, manifest_); !ok) return ok;
  if (auto ok = sweep(false); !ok) return ok;

  writer_ = std::make_unique<LogWriter>(storage_, options_, link, scan.last);
  std::uint64_t bytes =
      std::min(options_.first_segment_bytes, options_.segment_bytes);
  tail_ = make_segment(std::max<std::uint64_t>(bytes, 4 * kBlockBytes), base,
                       scan.last + 1);
  tail_->zero_fill = options_.fsync && options_.spares;
  if (auto ok = writer_->enter(tail_); !ok) return ok;
  for (const FoundSegment& segment : chain->dead) {
    if (segment.name == tail_->name) continue;
    if (auto ok = storage_.remove(segment.name); !ok) return ok;
  }
  if (!chain->dead.empty()) {
    if (auto ok = storage_.sync_dir("wal"); !ok) return ok;
  }
  if (manifest_.begun) return {};
  manifest_.begun = true;
  return write_manifest(storage_, manifest_);
}

void Log::Impl::remember(const FoundSegment& found) {
  auto segment = std::make_shared<Segment>();
  segment->header = found.header;
  segment->name = found.name;
  table_[found.header.base] = std::move(segment);
}

void Log::Impl::describe(RecoveryReport* report) const {
  std::string text;
  if (report->segments == 0) {
    text = "a new log";
  } else {
    text = "log of " + std::to_string(report->last) + " records in " +
           std::to_string(report->segments) + " segments, " +
           (report->clean ? "shut down clean" : "not shut down clean");
    if (report->checkpoint != 0)
      text += ", checkpoint at lsn " + std::to_string(report->checkpoint);
    if (report->checkpoint_fell_back)
      text += " (the newest checkpoint was bad and was passed over)";
    text += ", " + std::to_string(report->records) + " records replayed";
    if (report->dropped_bytes != 0)
      text += ", a torn tail of " + std::to_string(report->dropped_bytes) +
              " bytes from lsn " + std::to_string(report->dropped_from) +
              " dropped (the crash cut it off, or it was damaged since)";
  }
  report->text = text + "; writer epoch " + std::to_string(epoch_);
}

// --- staging -----------------------------------------------------------------

std::shared_ptr<Segment> Log::Impl::make_segment(std::uint64_t bytes,
                                                 Place base, Lsn first_lsn) {
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
  tail_bytes_ = header.bytes;
  ++stats_.segments;
  return segment;
}

Result<void> Log::Impl::append(Record* record) {
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

void Log::Impl::open_batch(std::size_t need) {
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

void Log::Impl::close_batch() {
  std::lock_guard hold(mutex_);
  tail_offset_ += open_->padded();
  staged_.push_back(std::move(open_));
}

// The next batch begins a new segment: of the spare if there is one that is
// large enough, else a plain one.
void Log::Impl::roll(std::size_t need) {
  std::uint64_t least = kSegmentDataOffset + room_for(kBatchHeaderBytes + need);
  std::uint64_t bytes = 0;
  std::string spare;
  bool unused = false;
  {
    std::lock_guard hold(mutex_);
    if (spare_bytes_ >= least) {
      bytes = std::exchange(spare_bytes_, 0);
      spare = std::exchange(spare_name_, {});
    }
    unused = tail_offset_ == kSegmentDataOffset;
    spare_wanted_ = true;
  }
  if (spare.empty()) {
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
  tail_->spare = spare;
  keeper_ready_.notify_one();
}

BatchBuffer Log::Impl::take_buffer() {
  if (buffers_.empty()) return {};
  BatchBuffer buffer = std::move(buffers_.back());
  buffers_.pop_back();
  return buffer;
}

void Log::Impl::flush() {
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

void Log::Impl::poll() {
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
  if (checkpointed) {
    checkpointing_ = false;
    may_release_ = true;
    release();
  }
}

// --- the log thread ----------------------------------------------------------

bool Log::Impl::write_batch() {
  std::unique_ptr<Batch> batch;
  {
    std::lock_guard hold(mutex_);
    if (work_.empty() || poisoned()) return false;
    batch = std::move(work_.front());
    work_.pop_front();
    busy_ = true;
  }
  auto before = Steady::now();
  auto ok = writer_->write(*batch);
  auto after = Steady::now();
  if (!ok) poison(ok.error());
  {
    std::lock_guard hold(mutex_);
    busy_ = false;
    if (ok) {
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
  return true;
}

// Closes the gap of W3: rot in the last batch is known for what it is once a
// later one vouches for it.
bool Log::Impl::write_vouch() {
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
  if (!ok) poison(ok.error());
  {
    std::lock_guard hold(mutex_);
    busy_ = false;
  }
  wake_owner();  // records may have been staged meanwhile
  return true;
}

void Log::Impl::run_writer() {
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
  }
}

// --- the keeper thread -------------------------------------------------------

bool Log::Impl::wants_spare() const {
  return options_.spares && options_.fsync && spare_wanted_ &&
         spare_bytes_ == 0;
}

bool Log::Impl::keep_one() {
  if (do_checkpoint()) return true;
  std::vector<std::string> names;
  bool spare = false;
  {
    std::lock_guard hold(mutex_);
    if (poisoned()) return false;
    names.swap(removals_);
    spare = names.empty() && wants_spare();
  }
  if (names.empty() && !spare) return false;
  auto ok = spare ? make_spare() : run_removals(names);
  if (!ok) poison(ok.error());
  return true;
}

bool Log::Impl::do_checkpoint() {
  std::optional<CheckpointJob> job;
  {
    std::lock_guard hold(mutex_);
    if (!checkpoint_job_ || poisoned()) return false;
    job.swap(checkpoint_job_);
    checkpoint_busy_ = true;
  }
  auto ok = run_checkpoint(*job);
  job.reset();  // what it holds is much, and should go before it is done
  if (!ok) poison(ok.error());
  {
    std::lock_guard hold(mutex_);
    checkpoint_busy_ = false;
    checkpoint_done_ = true;
    done_ready_.notify_all();
  }
  wake_owner();
  return true;
}

Result<void> Log::Impl::run_checkpoint(const CheckpointJob& job) {
  if (!options_.fsync) {
    if (auto ok = sync_unsynced(); !ok) return ok;
  }
  Manifest manifest;
  {
    std::lock_guard hold(mutex_);
    manifest = manifest_;
  }
  manifest.feature_incompat |= job.features;
  const Manifest::Checkpoint oldest = manifest.checkpoint[1];
  auto written =
      write_checkpoint(storage_, manifest, job.lsn, job.time_ms, job.image());
  if (!written) return written.error();
  ++manifest.generation;
  manifest.checkpoint[1] = manifest.checkpoint[0];
  manifest.checkpoint[0] = *written;
  manifest.durable_lsn = std::max(manifest.durable_lsn, writer_->synced());
  manifest.time_ms = std::max(manifest.time_ms, job.time_ms);
  if (auto ok = write_manifest(storage_, manifest); !ok) return ok;
  {
    std::lock_guard hold(mutex_);
    manifest_ = manifest;
  }
  // From here on no one may need the third.
  bool gone = oldest.lsn == 0 || oldest.lsn == manifest.checkpoint[0].lsn ||
              oldest.lsn == manifest.checkpoint[1].lsn;
  if (gone) return {};
  return storage_.remove(checkpoint_name(oldest.lsn));
}

// With fsync off a checkpoint must not outlive the bodies that it points at.
Result<void> Log::Impl::sync_unsynced() {
  Lsn written;
  {
    std::lock_guard hold(mutex_);
    written = written_;
  }
  for (const std::string& name : writer_->take_unsynced()) {
    auto file = storage_.open(name, OpenMode::write);
    if (!file) return file.error();
    if (auto ok = (*file)->sync(); !ok) return ok;
  }
  writer_->set_synced(written);
  return {};
}

Result<void> Log::Impl::run_removals(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (auto ok = storage_.remove(name); !ok) return ok;
  }
  return storage_.sync_dir("wal");
}

// Zeros, written politely: small steps, each synced, with pauses, unless the
// log will soon want it. A full disk is no fault of the log's: it then goes on
// in plain segments.
Result<void> Log::Impl::make_spare() {
  std::string name;
  {
    std::lock_guard hold(mutex_);
    spare_wanted_ = false;
    name = "wal/spare-" + std::to_string(++spare_number_) + ".tmp";
  }
  auto file = storage_.open(name, OpenMode::create);
  // As durable the zeros go past the page cache, which would copy each of them
  // once more and keep it; they are as many bytes as the log itself writes.
  if (file && options_.direct) file = storage_.open(name, OpenMode::durable);
  if (!file) return file.error();
  BatchBuffer zeros;
  zeros.reserve(kSpareStepBytes, 0);
  std::memset(zeros.data(), 0, kSpareStepBytes);
  std::uint64_t size = pad_to(options_.segment_bytes, kBlockBytes), at = 0;
  while (at < size) {
    std::size_t step = std::min<std::uint64_t>(kSpareStepBytes, size - at);
    auto ok = (*file)->write_at(at, {zeros.data(), step});
    if (ok && !options_.direct) ok = (*file)->sync();
    if (!ok && ok.error().code == Code::full) return storage_.remove(name);
    if (!ok) return ok;
    at += step;
    if (!pause_spare()) return {};
  }
  std::lock_guard hold(mutex_);
  spare_bytes_ = size;
  spare_name_ = name;
  return {};
}

// False when there is no use in going on.
bool Log::Impl::pause_spare() {
  if (!options_.own_thread) return true;
  do_checkpoint();
  std::unique_lock hold(mutex_);
  bool urgent = tail_offset_ > tail_bytes_ / 2;
  if (!urgent) keeper_ready_.wait_for(hold, kSparePause, [&] { return stop_; });
  return !stop_ && !poisoned();
}

void Log::Impl::run_keeper() {
  for (;;) {
    {
      std::unique_lock hold(mutex_);
      keeper_ready_.wait(hold, [this] {
        return stop_ || (!poisoned() && (checkpoint_job_ ||
                                         !removals_.empty() || wants_spare()));
      });
      if (stop_) return;
    }
    keep_one();
  }
}

void Log::Impl::poison(const Error& error) {
  {
    std::lock_guard hold(mutex_);
    if (poisoned()) return;  // the first cause is the one that counts
    cause_ = error.what;
    poisoned_.store(true, std::memory_order_release);
    done_ready_.notify_all();
  }
  wake_owner();
}

void Log::Impl::wake_owner() {
  std::function<void()> wake;
  {
    std::lock_guard hold(mutex_);
    wake = wake_;
    done_ready_.notify_all();
  }
  if (wake) wake();
}

void Log::Impl::start_threads() {
  if (!options_.own_thread) return;
  writer_thread_ = std::thread([this] { run_writer(); });
  keeper_thread_ = std::thread([this] { run_keeper(); });
}

void Log::Impl::stop_threads() {
  {
    std::lock_guard hold(mutex_);
    stop_ = true;
    work_ready_.notify_all();
    keeper_ready_.notify_all();
  }
  if (writer_thread_.joinable()) writer_thread_.join();
  if (keeper_thread_.joinable()) keeper_thread_.join();
}

// --- checkpoints and segments, on the owner's side ---------------------------

void Log::Impl::checkpoint(Lsn lsn, Millis time_ms, Image image) {
  CHECK(!checkpointing_ && lsn <= durable_);
  bytes_since_checkpoint_ = 0;
  std::lock_guard hold(mutex_);
  if (lsn == 0 || lsn <= manifest_.checkpoint[0].lsn) return;  // nothing new
  checkpointing_ = true;
  checkpoint_job_ = CheckpointJob{lsn, time_ms, features_, std::move(image)};
  keeper_ready_.notify_one();
}

void Log::Impl::release() {
  if (!may_release_) return;
  Lsn covered;
  {
    std::lock_guard hold(mutex_);
    covered = manifest_.checkpoint[1].lsn;
  }
  covered = std::min(covered, history_applied_);
  std::vector<std::string> names;
  {
    std::unique_lock hold(table_mutex_);
    for (auto it = table_.begin(); it != table_.end();) {
      auto next = std::next(it);
      if (next == table_.end() || next->second->header.first_lsn > covered + 1)
        break;
      if (it->second->needs == 0) {
        if (it->second->reader) readers_.fetch_sub(1);
        names.push_back(it->second->name);
        table_.erase(it);
      }
      it = next;
    }
  }
  if (names.empty()) return;
  std::lock_guard hold(mutex_);
  removals_.insert(removals_.end(), names.begin(), names.end());
  keeper_ready_.notify_one();
}

void Log::Impl::need(Place place, int delta) {
  if (place == 0) return;
  std::shared_lock hold(table_mutex_);
  auto it = table_.upper_bound(place);
  if (it == table_.begin()) return;
  --it;
  Segment& segment = *it->second;
  if (place >= segment.header.base + segment.header.bytes) return;
  segment.needs += delta;
  CHECK(segment.needs >= 0);
}

// --- reading -----------------------------------------------------------------

Result<std::pair<RecordType, std::vector<std::byte>>> Log::Impl::read(
    Place place, std::uint32_t bytes) const {
  std::shared_ptr<Segment> segment;
  {
    std::shared_lock hold(table_mutex_);
    auto it = table_.upper_bound(place);
    if (it != table_.begin()) segment = std::prev(it)->second;
  }
  std::string at = "log place " + std::to_string(place);
  if (!segment || bytes > options_.batch_bytes_max ||
      place + kRecordHeaderBytes + bytes >
          segment->header.base + segment->header.bytes)
    return Error{Code::not_found, at + " is in no segment that is kept"};
  Error error{Code::io, ""};
  std::shared_ptr<File> file = reader_of(*segment, &error);
  if (!file) return error;
  std::uint64_t offset = place - segment->header.base;
  std::vector<std::byte> data(kRecordHeaderBytes + bytes);
  auto got = file->read_at(offset, data);
  if (!got) return got.error();
  data.resize(*got);
  auto frame = check_record(data, segment->header, offset);
  if (!frame || frame->bytes != bytes)
    return Error{Code::corrupt, segment->name + ": offset " +
                                    std::to_string(offset) +
                                    ": the record's checksum fails"};
  data.erase(data.begin(), data.begin() + kRecordHeaderBytes);
  return std::pair(static_cast<RecordType>(frame->type), std::move(data));
}

std::shared_ptr<File> Log::Impl::reader_of(Segment& segment,
                                           Error* error) const {
  {
    std::lock_guard hold(segment.reader_mutex);
    if (segment.reader) return segment.reader;
  }
  auto file = storage_.open(segment.name, OpenMode::read);
  if (!file) {
    *error = file.error();
    return nullptr;
  }
  std::shared_ptr<File> reader = std::move(*file);
  std::shared_lock table(table_mutex_);
  if (readers_.fetch_add(1) >= kReadersMax) {
    for (auto& [base, other] : table_) {  // rare; those in use stay open
      std::lock_guard hold(other->reader_mutex);
      if (other->reader) readers_.fetch_sub(1);
      other->reader.reset();
    }
  }
  std::lock_guard hold(segment.reader_mutex);
  if (segment.reader) readers_.fetch_sub(1);  // another thread was faster
  segment.reader = reader;
  return reader;
}

// --- the rest ----------------------------------------------------------------

Result<void> Log::Impl::close() {
  if (closed_) return {};
  flush();
  while (!poisoned()) {
    if (!options_.own_thread) {
      while (write_batch() || do_checkpoint()) {
      }
    }
    {
      std::unique_lock hold(mutex_);
      done_ready_.wait(hold, [this] {
        bool idle =
            work_.empty() && !busy_ && !checkpoint_job_ && !checkpoint_busy_;
        return idle || poisoned();
      });
    }
    poll();
    if (!open_ && staged_.empty()) break;
    flush();
  }
  stop_threads();
  if (poisoned())
    return Error{Code::io, "the log is poisoned: " + poison_cause()};
  closed_ = true;
  Result<void> ok;
  if (!options_.fsync) ok = sync_unsynced();
  ++manifest_.generation;
  manifest_.clean = true;
  manifest_.feature_incompat = features_;
  manifest_.durable_lsn = appended_;
  manifest_.time_ms = time_ms_;
  if (ok) ok = write_manifest(storage_, manifest_);
  if (ok) ok = sweep(true);  // the spare: the next start makes its own
  if (!ok) poison(ok.error());
  lock_.reset();
  return ok;
}

Log::Stats Log::Impl::take_stats() {
  Stats stats;
  std::shared_lock table(table_mutex_);
  std::lock_guard hold(mutex_);
  stats = stats_;
  stats.segments = table_.size();
  stats_.sync_us.clear();
  sync_next_ = 0;
  return stats;
}

bool Log::Impl::write_one() {
  CHECK(!options_.own_thread);
  return write_batch() || write_vouch() || keep_one();
}

// --- Log ---------------------------------------------------------------------

Log::Log() = default;
Log::~Log() = default;

Result<std::unique_ptr<Log>> Log::open(Storage& storage,
                                       const LogOptions& options,
                                       Lsn replay_from, const Load& load,
                                       const Visit& visit,
                                       RecoveryReport* report) {
  RecoveryReport unwanted;
  std::unique_ptr<Log> log(new Log);
  log->impl_ = std::make_unique<Impl>(storage, options);
  auto ok = log->impl_->open(replay_from, load, visit,
                             report != nullptr ? report : &unwanted);
  if (!ok) return ok.error();
  return log;
}

std::uint32_t Log::writer_epoch() const { return impl_->epoch_; }
Result<void> Log::append(Record* record) { return impl_->append(record); }
std::span<const std::byte> Log::encoded() const { return impl_->encoded(); }
void Log::flush() { impl_->flush(); }
void Log::poll() { impl_->poll(); }
void Log::on_wake(std::function<void()> wake) { impl_->set_wake(wake); }
Lsn Log::appended() const { return impl_->appended_; }
Lsn Log::durable() const { return impl_->durable_; }
bool Log::poisoned() const { return impl_->poisoned(); }
std::string Log::poison_cause() const { return impl_->poison_cause(); }

Result<std::pair<RecordType, std::vector<std::byte>>> Log::read(
    Place place, std::uint32_t bytes) const {
  return impl_->read(place, bytes);
}

void Log::need(Place place, int delta) { impl_->need(place, delta); }

void Log::set_history_applied(Lsn lsn) {
  if (lsn <= impl_->history_applied_) return;
  impl_->history_applied_ = lsn;
  impl_->release();
}

void Log::checkpoint(Lsn lsn, Millis time_ms, Image image) {
  impl_->checkpoint(lsn, time_ms, std::move(image));
}
void Log::checkpoint(Lsn lsn, Millis time_ms, std::vector<std::byte> image) {
  impl_->checkpoint(lsn, time_ms, [image = std::move(image)] { return image; });
}
bool Log::checkpointing() const { return impl_->checkpointing_; }
std::uint64_t Log::bytes_since_checkpoint() const {
  return impl_->bytes_since_checkpoint_;
}
std::uint64_t Log::staged_bytes() const { return impl_->staged_bytes_; }
bool Log::write_one() { return impl_->write_one(); }
Result<void> Log::close() { return impl_->close(); }
Log::Stats Log::take_stats() { return impl_->take_stats(); }

}  // namespace machina
