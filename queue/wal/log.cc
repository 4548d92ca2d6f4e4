#include "queue/wal/log.h"

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

#include "queue/base/check.h"
#include "queue/wal/checkpoint.h"
#include "queue/wal/log_writer.h"
#include "queue/wal/manifest.h"
#include "queue/wal/recovery.h"
#include "queue/wal/segment.h"

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
constexpr auto kStallPause = std::chrono::milliseconds(200);
constexpr char kRoomName[] = "wal/checkpoint-room.tmp";
// The end of a held file that a record of this size may find too short.
constexpr std::uint64_t kWasteBytes = 64 << 10;

// Room that a batch of `used` bytes takes, with the block behind it for a
// vouching batch.
std::uint64_t room_for(std::uint64_t used) {
  return pad_to(used, kBlockBytes) + kBlockBytes;
}

// Records that a held file of `bytes` takes for certain, each of at most
// `record` bytes: none where one of that size is more than the whole file.
std::uint64_t room_in(std::uint64_t bytes, std::uint64_t record) {
  if (kSegmentDataOffset + room_for(kBatchHeaderBytes + record) > bytes)
    return 0;
  std::uint64_t lost = kSegmentDataOffset + kBlockBytes +
                       std::min(bytes / 8, std::max(record, kWasteBytes));
  return bytes > lost ? bytes - lost : 0;
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
  std::uint64_t kept_for_checkpoints() const;
  Result<void> close();

  // --- the threads' work, one piece at a time; true if there was any ---
  bool write_batch();
  bool write_vouch();
  bool keep_one();  // checkpoint, removals or a spare
  bool do_checkpoint();

  Result<std::pair<RecordType, std::vector<std::byte>>> read(
      Place place, std::uint32_t bytes) const;
  void need(Place place, int delta);
  void hold(std::uint64_t log_bytes, std::uint64_t checkpoint_bytes);
  Room room() const;
  bool fits(std::uint64_t bytes, std::uint64_t keep) const;
  bool lacking() const { return lacking_.load(std::memory_order_acquire); }
  bool stalled() const { return stalled_.load(std::memory_order_acquire); }
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
  Lsn checkpointed_ = 0;
  std::uint64_t staged_bytes_ = 0;

 private:
  // --- opening, in order ---
  Result<void> start_manifest();
  Result<void> adopt();
  Result<void> sweep(bool tmp);
  Result<void> load_checkpoint(const Load& load, RecoveryReport* report,
                               Lsn* covered);
  Result<void> recover(Lsn replay_from, Lsn covered, const Visit& visit,
                       RecoveryReport* report);
  Result<void> begin_writing(Chain* chain, const Scan& scan);
  Result<void> begin_tail(Place base, Lsn first_lsn);
  void remember(const FoundSegment& found);
  void describe(RecoveryReport* report) const;

  // --- staging ---
  std::shared_ptr<Segment> make_segment(std::uint64_t bytes, Place base,
                                        Lsn first_lsn);
  void open_batch(std::size_t need);
  void close_batch();
  void roll(std::size_t need);
  // A file that is not needed for anything else once it is taken; under mutex_.
  struct Held {
    std::string name;
    std::uint64_t bytes = 0;
    bool spare = false;   // of a whole segment's size
    bool zeroed = false;  // written, not only allocated
  };
  std::optional<Held> take_held(std::uint64_t least);
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
  Result<void> zero_spare(const Held& spare);
  bool pause_spare(const Held& spare);
  Result<void> make_room();
  Result<void> allocate(File& file, std::uint64_t bytes);
  Result<void> no_room(const Error& error, const std::string& name);
  // These under mutex_:
  bool wants_spare() const;
  bool wants_room() const;
  std::uint64_t unit_bytes() const;
  std::uint64_t units_held() const;
  std::uint64_t tail_room() const;
  void settle_room();

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
  Lsn written_ = 0;               // by the log thread
  std::uint64_t tail_bytes_ = 0;  // size of the segment being bound
  Place tail_base_ = 0;
  bool tail_held_ = false;  // its blocks are there
  std::vector<Held> held_;
  std::uint64_t spare_number_ = 0;
  bool spare_wanted_ = true;
  std::string zeroing_;  // the held file that the keeper writes
  std::uint64_t hold_log_ = 0, hold_checkpoint_ = 0;  // what is to be held
  std::uint64_t room_bytes_ = 0;  // of the checkpoint's room
  bool room_refused_ = false;     // until the owner asks again
  bool checkpoint_full_ = false;
  Lsn checkpoint_lsn_ = 0;  // of the one under way, and the bytes that
  std::uint64_t checkpoint_grown_ = 0;  // it was to cover
  std::string lacking_why_;
  std::atomic<bool> lacking_{false}, stalled_{false};
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
  auto manifest = find_manifest(storage_);
  if (!manifest) return manifest.error();
  if (*manifest) {
    manifest_ = **manifest;
    return {};
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
    stale &= full != kManifestTmp && (full != kRoomName || !options_.hold);
    for (const Held& held : held_) stale &= full != held.name || !options_.hold;
    for (const auto& checkpoint : manifest_.checkpoint)
      stale &= checkpoint.lsn == 0 || full != checkpoint_name(checkpoint.lsn);
    if (!stale) continue;
    if (auto ok = storage_.remove(full); !ok) return ok;
  }
  return {};
}

// What an earlier start held is held on: on a full disk it is all there is.
// The spare is told by its name: on a small file system a unit is as large.
Result<void> Log::Impl::adopt() {
  if (!options_.hold) return {};
  auto names = storage_.list("wal");
  if (!names) return names.error();
  bool any_spare = false;
  for (const std::string& name : *names) {
    bool room = "wal/" + name == kRoomName;
    bool spare = name.starts_with("spare-");
    bool held = (name.starts_with("held-") || spare) && name.ends_with(".tmp");
    if (!room && !held) continue;
    auto file = storage_.open("wal/" + name, OpenMode::write);
    if (!file) return file.error();
    auto size = (*file)->size();
    if (!size) return size.error();
    // Killed between making the file and giving it blocks, or refused these.
    if (*size == 0) continue;
    // After a power cut it may be shorter than it was, or have holes.
    auto whole = (*file)->allocate(*size);
    if (!whole && whole.error().code != Code::full) return whole;
    if (room) room_bytes_ = whole ? *size : 0;
    if (room || !whole || *size < unit_bytes() || *size % kBlockBytes != 0)
      continue;
    spare = spare && options_.spares && options_.fsync &&
            *size == pad_to(options_.segment_bytes, kBlockBytes);
    // One is enough; sweep() gives back what others took.
    if (spare && std::exchange(any_spare, true)) continue;
    held_.push_back({"wal/" + name, *size, spare, false});
    spare_number_ = std::max<std::uint64_t>(
        spare_number_,
        std::strtoull(name.c_str() + name.find('-') + 1, nullptr, 10));
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

  if (auto ok = adopt(); !ok) return ok;
  if (auto ok = sweep(true); !ok) return ok;
  ++manifest_.generation;
  epoch_ = ++manifest_.writer_epoch;
  manifest_.clean = false;
  features_ |= manifest_.feature_incompat | options_.features;
  manifest_.feature_incompat = features_;
  features_compat_ = manifest_.feature_compat;
  std::copy_n(manifest_.log_uuid, 2, log_uuid_);
  manifest_.durable_lsn = scan.last;
  manifest_.time_ms = time_ms_;
  if (auto ok = write_manifest(storage_, manifest_); !ok) return ok;
  if (auto ok = sweep(false); !ok) return ok;

  writer_ = std::make_unique<LogWriter>(storage_, options_, link, scan.last);
  checkpointed_ = manifest_.checkpoint[0].lsn;
  if (auto ok = begin_tail(base, scan.last + 1); !ok) return ok;
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

// A small segment, so that it is there at once; on a full disk one of those
// that are held.
Result<void> Log::Impl::begin_tail(Place base, Lsn first_lsn) {
  std::uint64_t bytes =
      std::min(options_.first_segment_bytes, options_.segment_bytes);
  bytes = std::max<std::uint64_t>(bytes, 4 * kBlockBytes);
  tail_ = make_segment(bytes, base, first_lsn);
  tail_->zero_fill = options_.fsync && options_.spares;
  auto entered = writer_->enter(tail_);
  if (!entered && entered.error().code == Code::full) {
    if (auto held = take_held(bytes)) {
      tail_ = make_segment(held->bytes, base, first_lsn);
      tail_->spare = held->name;
      entered = writer_->enter(tail_);
    }
  }
  tail_held_ = entered && options_.hold;
  return entered;
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
  tail_base_ = base;
  tail_bytes_ = header.bytes;
  tail_held_ = false;
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
// large enough, else of another held file, else a plain one.
void Log::Impl::roll(std::size_t need) {
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
std::optional<Log::Impl::Held> Log::Impl::take_held(std::uint64_t least) {
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

bool Log::Impl::write_batch() {
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
    if (stalled())
      work_ready_.wait_for(hold, kStallPause, [&] { return stop_; });
  }
}

// --- the keeper thread -------------------------------------------------------

bool Log::Impl::wants_spare() const {
  return options_.spares && options_.fsync && spare_wanted_ &&
         std::none_of(held_.begin(), held_.end(),
                      [](const Held& held) { return held.zeroed; });
}

// Held files that are not the spare: as large as a segment without one.
std::uint64_t Log::Impl::unit_bytes() const {
  std::uint64_t bytes = options_.segment_bytes;
  if (options_.fsync) bytes = std::min(bytes, kPlainSegmentBytes);
  return pad_to(bytes, kBlockBytes);
}

std::uint64_t Log::Impl::units_held() const {
  std::uint64_t bytes = 0;
  for (const Held& held : held_) {
    if (!held.spare) bytes += room_in(held.bytes, 0);
  }
  return bytes;
}

bool Log::Impl::wants_room() const {
  if (!options_.hold || room_refused_) return false;
  return units_held() < hold_log_ || room_bytes_ < hold_checkpoint_;
}

// Under mutex_, after any change of what is held or to be held.
void Log::Impl::settle_room() {
  if (stalled() || !options_.hold || room_refused_) return;
  if (units_held() >= hold_log_ && room_bytes_ >= hold_checkpoint_)
    lacking_ = false;
}

void Log::Impl::hold(std::uint64_t log_bytes, std::uint64_t checkpoint_bytes) {
  std::lock_guard hold(mutex_);
  hold_log_ = log_bytes;
  hold_checkpoint_ = pad_to(checkpoint_bytes, kBlockBytes);
  room_refused_ = false;
  spare_wanted_ = true;
  // What was needed for a short while goes back, but for a few.
  for (auto it = held_.begin();
       it != held_.end() && units_held() > hold_log_ + 4 * unit_bytes();) {
    if (it->spare) {
      ++it;
      continue;
    }
    removals_.push_back(it->name);
    it = held_.erase(it);
  }
  settle_room();
  keeper_ready_.notify_one();
}

// Of the segment being written, behind what is staged.
std::uint64_t Log::Impl::tail_room() const {
  std::uint64_t used = tail_offset_ + (open_ ? open_->padded() : 0);
  used += 2 * kBlockBytes;  // the next batch's header, a vouching batch
  return tail_held_ && used < tail_bytes_ ? tail_bytes_ - used : 0;
}

Log::Room Log::Impl::room() const {
  std::lock_guard hold(mutex_);
  Room room;
  room.held = tail_room();
  for (const Held& held : held_) room.held += room_in(held.bytes, 0);
  room.lacking = lacking();
  room.stalled = stalled();
  if (room.lacking || room.stalled) room.why = lacking_why_;
  return room;
}

bool Log::Impl::fits(std::uint64_t bytes, std::uint64_t keep) const {
  std::lock_guard hold(mutex_);
  if (stalled()) return false;
  const std::uint64_t record =
      std::min<std::uint64_t>(bytes, options_.batch_bytes_max);
  std::uint64_t room = tail_room();
  const bool tail = bytes <= room;
  if (!tail) room = 0;  // what is left of it is lost
  for (const Held& held : held_) room += room_in(held.bytes, tail ? 0 : record);
  return room >= bytes && room - bytes >= keep;
}

bool Log::Impl::keep_one() {
  if (do_checkpoint()) return true;
  std::vector<std::string> names;
  bool room = false, spare = false;
  {
    std::lock_guard hold(mutex_);
    if (poisoned()) return false;
    names.swap(removals_);
    room = names.empty() && wants_room();
    spare = names.empty() && !room && wants_spare();
  }
  if (names.empty() && !room && !spare) return false;
  auto ok = room ? make_room() : spare ? make_spare() : run_removals(names);
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
  const bool full = !ok && ok.error().code == Code::full;
  if (!ok && !full) poison(ok.error());
  {
    std::lock_guard hold(mutex_);
    checkpoint_full_ = full;
    if (full) {
      lacking_ = true;
      lacking_why_ = ok.error().what;
    }
    checkpoint_busy_ = false;
    checkpoint_done_ = true;
    done_ready_.notify_all();
  }
  wake_owner();
  return true;
}

Result<void> Log::Impl::run_checkpoint(const CheckpointJob& job) {
  if (!options_.fsync) {
    // Never again, whatever it was (S3).
    if (auto ok = sync_unsynced(); !ok) return Error{Code::io, ok.error().what};
  }
  Manifest manifest;
  std::string room;
  {
    std::lock_guard hold(mutex_);
    manifest = manifest_;
    if (std::exchange(room_bytes_, 0) != 0) room = kRoomName;
  }
  manifest.feature_incompat |= job.features;
  const Manifest::Checkpoint oldest = manifest.checkpoint[1];
  auto written = write_checkpoint(storage_, manifest, job.lsn, job.time_ms,
                                  job.image(), room);
  if (!written) return written.error();
  ++manifest.generation;
  manifest.checkpoint[1] = manifest.checkpoint[0];
  manifest.checkpoint[0] = *written;
  manifest.durable_lsn = std::max(manifest.durable_lsn, writer_->synced());
  manifest.time_ms = std::max(manifest.time_ms, job.time_ms);
  if (auto ok = write_manifest(storage_, manifest); !ok) {
    // Nobody names it.
    if (ok.error().code == Code::full)
      (void)storage_.remove(checkpoint_name(job.lsn)).has_value();
    return ok;
  }
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
  {
    std::lock_guard hold(mutex_);
    room_refused_ = false;  // there is some now
  }
  return storage_.sync_dir("wal");
}

// One more file that is held, or the checkpoint's room.
Result<void> Log::Impl::make_room() {
  std::string name = kRoomName;
  std::uint64_t bytes = 0;
  bool log = false;
  {
    std::lock_guard hold(mutex_);
    log = units_held() < hold_log_;
    bytes = log ? unit_bytes() : hold_checkpoint_;
    if (log) name = "wal/held-" + std::to_string(++spare_number_) + ".tmp";
  }
  auto file = storage_.open(name, log ? OpenMode::create : OpenMode::write);
  if (!file && !log && file.error().code == Code::not_found)
    file = storage_.open(name, OpenMode::create);
  if (!file) return no_room(file.error(), "");
  auto ok = allocate(**file, bytes);
  if (ok) ok = (*file)->sync();
  file->reset();
  if (!ok) return no_room(ok.error(), log ? name : "");
  std::lock_guard hold(mutex_);
  if (log) {
    held_.push_back({name, bytes, false, false});
  } else {
    room_bytes_ = bytes;
  }
  settle_room();
  return {};
}

// Not even tried where it cannot be: a try takes the last of the room from
// others, if only for a moment.
Result<void> Log::Impl::allocate(File& file, std::uint64_t bytes) {
  auto size = file.size();
  if (!size) return size.error();
  auto free = storage_.free_bytes();
  if (free && *size < bytes && *free < bytes - *size)
    return Error{Code::full, "no space for " + std::to_string(bytes - *size) +
                                 " bytes that are to be held: " +
                                 std::to_string(*free) + " are free"};
  return file.allocate(bytes);
}

// A full disk is no fault of the log's: whoever asked for room hears of it.
Result<void> Log::Impl::no_room(const Error& error, const std::string& name) {
  if (error.code != Code::full) return error;
  {
    std::lock_guard hold(mutex_);
    room_refused_ = true;
    lacking_ = true;
    lacking_why_ = error.what;
  }
  wake_owner();
  if (name.empty()) return {};
  return storage_.remove(name);
}

// The next segment, before it is needed: its blocks first, then zeros. A full
// disk is no fault of the log's: it then goes on without.
Result<void> Log::Impl::make_spare() {
  Held spare;
  {
    std::lock_guard hold(mutex_);
    spare_wanted_ = false;
    for (const Held& held : held_) {
      if (held.spare) spare = held;
    }
    if (spare.name.empty())
      spare.name = "wal/spare-" + std::to_string(++spare_number_) + ".tmp";
  }
  if (spare.bytes == 0) {
    auto file = storage_.open(spare.name, OpenMode::create);
    if (!file && file.error().code == Code::full) return {};
    if (!file) return file.error();
    spare.bytes = pad_to(options_.segment_bytes, kBlockBytes);
    spare.spare = true;
    if (auto ok = allocate(**file, spare.bytes); !ok) {
      if (ok.error().code != Code::full) return ok;
      return storage_.remove(spare.name);
    }
    std::lock_guard hold(mutex_);
    held_.push_back(spare);
    zeroing_ = spare.name;
  } else {
    // It may have been taken since.
    std::lock_guard hold(mutex_);
    for (const Held& held : held_) {
      if (held.name == spare.name) zeroing_ = spare.name;
    }
    if (zeroing_.empty()) return {};
  }
  auto ok = zero_spare(spare);
  std::lock_guard hold(mutex_);
  bool whole = ok && !zeroing_.empty();
  zeroing_.clear();
  for (Held& held : held_) {
    if (held.name == spare.name) held.zeroed = whole && !stop_;
  }
  done_ready_.notify_all();
  if (!ok && ok.error().code == Code::full) return {};
  return ok;
}

// Written politely: small steps, each synced, with pauses, unless the log will
// soon want it.
Result<void> Log::Impl::zero_spare(const Held& spare) {
  // As durable the zeros go past the page cache, which would copy each of them
  // once more and keep it; they are as many bytes as the log itself writes.
  auto file = storage_.open(
      spare.name, options_.direct ? OpenMode::durable : OpenMode::write);
  if (!file) return file.error();
  BatchBuffer zeros;
  zeros.reserve(kSpareStepBytes, 0);
  std::memset(zeros.data(), 0, kSpareStepBytes);
  for (std::uint64_t at = 0; at < spare.bytes;) {
    std::size_t step =
        std::min<std::uint64_t>(kSpareStepBytes, spare.bytes - at);
    auto ok = (*file)->write_at(at, {zeros.data(), step});
    if (ok && !options_.direct) ok = (*file)->sync();
    if (!ok) return ok;
    at += step;
    if (!pause_spare(spare)) break;
  }
  return {};
}

// False when there is no use in going on.
bool Log::Impl::pause_spare(const Held& spare) {
  if (!options_.own_thread) return true;
  do_checkpoint();
  std::unique_lock hold(mutex_);
  if (wants_room()) {
    hold.unlock();
    if (auto ok = make_room(); !ok) poison(ok.error());
    hold.lock();
  }
  bool urgent = tail_offset_ > tail_bytes_ / 2;
  if (!urgent) keeper_ready_.wait_for(hold, kSparePause, [&] { return stop_; });
  bool taken = std::none_of(held_.begin(), held_.end(), [&](const Held& held) {
    return held.name == spare.name;
  });
  if (taken || stop_ || poisoned()) zeroing_.clear();
  return !zeroing_.empty();
}

void Log::Impl::run_keeper() {
  for (;;) {
    {
      std::unique_lock hold(mutex_);
      keeper_ready_.wait(hold, [this] {
        return stop_ ||
               (!poisoned() && (checkpoint_job_ || !removals_.empty() ||
                                wants_room() || wants_spare()));
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
  checkpoint_grown_ = std::exchange(bytes_since_checkpoint_, 0);
  std::lock_guard hold(mutex_);
  if (lsn == 0 || lsn <= manifest_.checkpoint[0].lsn) return;  // nothing new
  checkpoint_lsn_ = lsn;
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

std::uint64_t Log::Impl::kept_for_checkpoints() const {
  std::uint64_t bytes = 0;
  std::shared_lock hold(table_mutex_);
  for (auto it = table_.begin(); it != table_.end(); ++it) {
    auto next = std::next(it);
    if (next == table_.end() ||
        next->second->header.first_lsn > history_applied_ + 1)
      break;
    if (it->second->needs == 0) bytes += it->second->header.bytes;
  }
  return bytes;
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
        return idle || poisoned() || stalled();
      });
    }
    poll();
    if (stalled()) break;
    if (!open_ && staged_.empty()) break;
    flush();
  }
  stop_threads();
  if (poisoned())
    return Error{Code::io, "the log is poisoned: " + poison_cause()};
  if (stalled())
    return Error{Code::full,
                 "records that nobody was told of find no room: " + room().why};
  closed_ = true;
  Result<void> ok;
  if (!options_.fsync) ok = sync_unsynced();
  ++manifest_.generation;
  manifest_.clean = true;
  manifest_.feature_incompat = features_;
  manifest_.durable_lsn = appended_;
  manifest_.time_ms = time_ms_;
  if (ok) ok = write_manifest(storage_, manifest_);
  if (ok) ok = sweep(true);
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
Lsn Log::checkpointed() const { return impl_->checkpointed_; }
void Log::hold(std::uint64_t log_bytes, std::uint64_t checkpoint_bytes) {
  impl_->hold(log_bytes, checkpoint_bytes);
}
Log::Room Log::room() const { return impl_->room(); }
bool Log::lacking() const { return impl_->lacking(); }
bool Log::stalled() const { return impl_->stalled(); }
bool Log::fits(std::uint64_t bytes, std::uint64_t keep) const {
  return impl_->fits(bytes, keep);
}
std::uint64_t Log::kept_for_checkpoints() const {
  return impl_->kept_for_checkpoints();
}
std::uint64_t Log::bytes_since_checkpoint() const {
  return impl_->bytes_since_checkpoint_;
}
std::uint64_t Log::staged_bytes() const { return impl_->staged_bytes_; }
bool Log::write_one() { return impl_->write_one(); }
Result<void> Log::close() { return impl_->close(); }
Log::Stats Log::take_stats() { return impl_->take_stats(); }

}  // namespace machina
