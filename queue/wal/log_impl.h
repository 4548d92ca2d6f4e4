// queue/wal/log_impl.h
//
// What a FileLog is made of, for its own files alone. Each file has one part:
// log_open.cc opens a root and recovers it, log_stage.cc stages records and
// writes batches, log_keep.cc makes checkpoints, holds room and removes
// segments, log.cc reads by place and shuts the log down.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/result.h"
#include "queue/base/storage.h"
#include "queue/wal/log.h"
#include "queue/wal/log_writer.h"
#include "queue/wal/recovery.h"
#include "queue/wal/segment.h"

namespace machina {

// The size of a segment that was not made ahead of time as a spare.
inline constexpr std::uint64_t kPlainSegmentBytes = 16ull << 20;
// The file that holds the blocks of the next checkpoint.
inline constexpr char kRoomName[] = "wal/checkpoint-room.tmp";

// Room that a batch of `used` bytes takes, with the block behind it for a
// vouching batch.
inline std::uint64_t room_for(std::uint64_t used) {
  return pad_to(used, kBlockBytes) + kBlockBytes;
}

class FileLog::Impl {
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

}  // namespace machina
