// queue/wal/log.h
//
// The write-ahead log: a change to the queue is in here before anyone hears of
// it. docs/wal-format.md has every byte; in short: segments of 4 KiB-aligned
// batches of checksummed records; every batch header says how far the log was
// known durable when it was written, which is what tells a torn tail (dropped)
// from damage (refused).
//
//   W1  Lsns start at 1 and have no gaps, within a segment or across two.
//   W2  After a crash the log ends at or after durable(), and lacks nothing
//       before its end. More than durable() is a reply lost, not a job.
//   W3  P = first bad lsn, D = greatest durable_lsn vouched for anywhere.
//       P > D: the tail from P is dropped and reported. P <= D: Code::corrupt,
//       naming file, offset and lsns; no file is touched.
//   W4  A synced block is never written again; a segment that recovery touched
//       is never appended to.
//   W5  After one failed write, sync, rename or close the log is poisoned: all
//       else fails with Code::io, for nobody knows what the disk kept.
//   W6  A place handed out by append() names the same record for as long as
//       its segment is kept, across restarts.
//
//   W7  Whoever cannot read all that is in the log finds a feature bit that it
//       does not know, durable before the first such record: in a segment's
//       header, and from the next checkpoint on in MANIFEST.
//   W8  A full disk is no fault. What finds no room (Code::full) is tried again
//       for as long as it takes: the batch that is being written (stalled()),
//       a checkpoint, a file that is held. What is held (hold()) is there
//       already: while the held room lasts, nothing stalls.
//
// The loop thread owns a Log. One thread of the Log's own writes and syncs; it
// owns the bytes of the batch it carries, and hands them back as a message:
// `wake` is called on that thread, the owner then calls poll(). Readers of
// places (read()) may be on any thread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/ids.h"
#include "queue/base/result.h"
#include "queue/base/storage.h"
#include "queue/record/record.h"

namespace machina {

struct LogOptions {
  bool fsync = true;
  std::uint64_t segment_bytes = 64ull << 20;
  std::uint64_t first_segment_bytes = 1ull << 20;  // of an empty root
  std::size_t batch_bytes_max = 8u << 20;
  bool spares = true;        // pre-zero the next segment in the background
  bool hold = false;         // keep room: see hold()
  bool own_thread = true;    // false: write() is called by the owner (tests)
  bool direct = true;        // try O_DIRECT|O_DSYNC
  Clock* clock = nullptr;    // when segments were made; null: system_clock()
  Random* random = nullptr;  // salts, on the owner's thread; null: the system's
  std::function<void()> on_locked;  // open() has wal/LOCK; recovery begins
  // Features (queue/record/record.h) that the owner's first record will need:
  // MANIFEST and each new segment say so from the start, and no segment begins
  // for it.
  std::uint64_t features = 0;
  // Features that an image needs. Null: none.
  std::function<std::uint64_t(std::span<const std::byte>)> image_features;
};

struct RecoveryReport {
  Lsn last = 0;                     // the last record kept
  Lsn durable = 0;                  // D
  bool clean = false;               // ended with a clean-shutdown mark
  std::uint64_t dropped_bytes = 0;  // torn tail (W3)
  Lsn dropped_from = 0;
  std::uint64_t segments = 0, records = 0;
  Lsn checkpoint = 0;                 // the one that was loaded; 0: none
  bool checkpoint_fell_back = false;  // the newest one was bad
  Lsn first_visited = 0;  // later than replay_from + 1 where the log
                          // no longer goes back that far
  std::string text;       // one line for the operator
};

// What must survive beside the segments. MANIFEST is rewritten whole: tmp,
// sync, rename, sync_dir.
struct Manifest {
  std::uint64_t generation = 0;
  std::uint32_t writer_epoch = 0;
  std::uint64_t log_uuid[2] = {0, 0};
  std::uint64_t feature_incompat = 0, feature_compat = 0;
  struct Checkpoint {
    Lsn lsn = 0;  // 0: none
    std::uint64_t bytes = 0;
    std::uint64_t digest = 0;  // XXH3-64 of the whole file
  } checkpoint[2];             // newest first; two generations are kept
  Lsn durable_lsn = 0;
  Millis time_ms = 0;  // greatest logged server time seen
  bool clean = false;  // shut down clean at durable_lsn
  bool begun = false;  // there is a segment: a log without one is damaged
};

class Log {
 public:
  using Visit = std::function<Result<void>(const Record&)>;
  // Given the checkpoint's bytes (empty: none); called before any visit.
  using Load = std::function<Result<void>(Lsn, std::span<const std::byte>)>;

  // Takes the lock, bumps the writer epoch (synced), loads the newest sound
  // checkpoint, gives `visit` each record with lsn > min(checkpoint,
  // replay_from) in order (the caller applies only those > the checkpoint),
  // opens a fresh segment. `storage` must outlive the log. Fails: conflict
  // (locked), corrupt (W3), newer (a feature bit we do not know), io, full.
  static Result<std::unique_ptr<Log>> open(Storage& storage,
                                           const LogOptions& options,
                                           Lsn replay_from, const Load& load,
                                           const Visit& visit,
                                           RecoveryReport* report);
  virtual ~Log();  // does not sync; close() does

  std::uint32_t writer_epoch() const;

  // Stages a record, sets its lsn, place and bytes. Fails with Code::io when
  // poisoned and Code::too_large over the batch maximum; then nothing is
  // staged. Two records of one decision that must be atomic are one record.
  Result<void> append(Record* record);
  // The record that was appended last, as encode() made it; until the next.
  std::span<const std::byte> encoded() const;

  // Sends what is staged to the writing thread if it is idle. Call at the end
  // of each turn of the loop.
  void flush();
  // Collects finished batches; call after `wake`. durable() may have advanced.
  void poll();
  void on_wake(std::function<void()> wake);  // called on the log thread

  Lsn appended() const;  // last staged
  Lsn durable() const;   // last known synced (with fsync off: written)
  bool poisoned() const;
  std::string poison_cause() const;

  // Any thread. The record's bytes at a place, its crc verified; place must
  // have been written (lsn <= durable()). Code::corrupt where the crc is bad.
  Result<std::pair<RecordType, std::vector<std::byte>>> read(
      Place place, std::uint32_t bytes) const;

  // Pins. A segment is removed only when the newest-but-one checkpoint covers
  // it, `history_applied` covers it, and no place in it is needed. Nothing is
  // removed before the first checkpoint() after open(), so places that turn up
  // during recovery may be pinned afterwards. A body that history has yet to
  // copy must stay pinned until it has.
  void need(Place place, int delta);
  void set_history_applied(Lsn lsn);

  // Writes a checkpoint of what `image` gives (the state as of `lsn` <=
  // durable()) on a background thread, where it is also called: tmp, sync,
  // rename, sync_dir, MANIFEST; then removes what no one needs. At most one at
  // a time; checkpointing() tells. Done is noticed by poll(). A failure poisons
  // the log, but for a full disk: then there is none, see checkpointed().
  using Image = std::function<std::vector<std::byte>()>;
  void checkpoint(Lsn lsn, Millis time_ms, Image image);
  void checkpoint(Lsn lsn, Millis time_ms, std::vector<std::byte> image);
  bool checkpointing() const;
  std::uint64_t bytes_since_checkpoint() const;
  // Bytes of segments that nothing but the checkpoints keeps: two more, the
  // second of a later lsn, let all of them go. O(segments).
  std::uint64_t kept_for_checkpoints() const;

  // The room that is to be there before it is needed, beside the segment being
  // written and the spare: files of their own blocks, made in the background
  // and kept over restarts, which become segments when the disk has no more to
  // give; and one for a checkpoint of `checkpoint_bytes`. Each call has the
  // log try again for what it could not get.
  void hold(std::uint64_t log_bytes, std::uint64_t checkpoint_bytes);
  struct Room {
    std::uint64_t held = 0;  // bytes of records that have their blocks
    bool lacking = false;    // the disk refused some of what is to be held
    bool stalled = false;    // records are staged that find no room
    std::string why;         // of the last two
  };
  Room room() const;
  bool lacking() const;  // as in room(); cheap
  bool stalled() const;
  // Whether records of `bytes` in all find held room, and `keep` bytes are left
  // of it then.
  bool fits(std::uint64_t bytes, std::uint64_t keep) const;
  // The newest checkpoint: that of the last call of checkpoint() once
  // checkpointing() is false, or an earlier one where the disk was full.
  Lsn checkpointed() const;

  // Bytes staged and not yet durable: what a caller should bound.
  std::uint64_t staged_bytes() const;

  // With own_thread false: does the next piece of the threads' work here (one
  // batch, checkpoint, removal, spare, or the vouching batch of an idle log).
  // False when there was none.
  bool write_one();

  // Waits for all that is staged, marks the manifest clean, stops the threads.
  // Code::full: it is stalled; what is staged was never durable.
  Result<void> close();

  struct Stats {
    std::uint64_t segments = 0, batches = 0, records = 0, bytes = 0;
    std::uint64_t last_batch_records = 0;
    std::vector<std::uint64_t> sync_us;  // since the last call; <= 4096 samples
  };
  Stats take_stats();

 protected:
  Log();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace machina
