// queue/wal/log_store.h
//
// The seam between the shard and its write-ahead log. FileLog
// (queue/wal/log.h), a folder of files, is one log store. Each promise names
// the test that holds it.
//
//   L1  The shard opens its log through ShardOptions::open_log, and passes on
//       the error of a log that does not open.
//       Test: ShardStore.ALogThatDoesNotOpenIsTheShardsError.
//   L2  An answer waits for durable(): while durable() stands still, nobody is
//       told of what was appended after it.
//       Test: ShardStore.NoAnswerLeavesBeforeTheLogIsDurable.
//   L3  Once poisoned() is true, append() fails with Code::io, and the shard
//       tells nobody of a success that was not durable before.
//       Test: ShardStore.APoisonedLogTellsNobodyOfASuccess.
//
// One thread, the owner, calls a log store. `wake` and an Image are called on
// threads of the store. read() may be called on any thread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
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

class LogStore {
 public:
  using Visit = std::function<Result<void>(const Record&)>;
  // Given the checkpoint's bytes (empty: none); called before any visit.
  using Load = std::function<Result<void>(Lsn, std::span<const std::byte>)>;

  virtual ~LogStore() = default;  // does not sync; close() does

  virtual std::uint32_t writer_epoch() const = 0;

  // Stages a record, sets its lsn, place and bytes. Fails with Code::io when
  // poisoned and Code::too_large over the batch maximum; then nothing is
  // staged. Two records of one decision that must be atomic are one record.
  virtual Result<void> append(Record* record) = 0;
  // The record that was appended last, as encode() made it; until the next.
  virtual std::span<const std::byte> encoded() const = 0;

  // Sends what is staged to the writing thread if it is idle. Call at the end
  // of each turn of the loop.
  virtual void flush() = 0;
  // Collects finished batches; call after `wake`. durable() may have advanced.
  virtual void poll() = 0;
  virtual void on_wake(
      std::function<void()> wake) = 0;  // called on the log thread

  virtual Lsn appended() const = 0;  // last staged
  virtual Lsn durable()
      const = 0;  // last known synced (with fsync off: written)
  virtual bool poisoned() const = 0;
  virtual std::string poison_cause() const = 0;

  // Any thread. The record's bytes at a place, its crc verified; place must
  // have been written (lsn <= durable()). Code::corrupt where the crc is bad.
  virtual Result<std::pair<RecordType, std::vector<std::byte>>> read(
      Place place, std::uint32_t bytes) const = 0;

  // Pins. A segment is removed only when the newest-but-one checkpoint covers
  // it, `history_applied` covers it, and no place in it is needed. Nothing is
  // removed before the first checkpoint() after open(), so places that turn up
  // during recovery may be pinned afterwards. A body that history has yet to
  // copy must stay pinned until it has.
  virtual void need(Place place, int delta) = 0;
  virtual void set_history_applied(Lsn lsn) = 0;

  // Writes a checkpoint of what `image` gives (the state as of `lsn` <=
  // durable()) on a background thread, where it is also called: tmp, sync,
  // rename, sync_dir, MANIFEST; then removes what no one needs. At most one at
  // a time; checkpointing() tells. Done is noticed by poll(). A failure poisons
  // the log, but for a full disk: then there is none, see checkpointed().
  using Image = std::function<std::vector<std::byte>()>;
  virtual void checkpoint(Lsn lsn, Millis time_ms, Image image) = 0;
  void checkpoint(Lsn lsn, Millis time_ms, std::vector<std::byte> image) {
    checkpoint(lsn, time_ms, [image = std::move(image)] { return image; });
  }
  virtual bool checkpointing() const = 0;
  virtual std::uint64_t bytes_since_checkpoint() const = 0;
  // Bytes of segments that nothing but the checkpoints keeps: two more, the
  // second of a later lsn, let all of them go. O(segments).
  virtual std::uint64_t kept_for_checkpoints() const = 0;

  // The room that is to be there before it is needed, beside the segment being
  // written and the spare: files of their own blocks, made in the background
  // and kept over restarts, which become segments when the disk has no more to
  // give; and one for a checkpoint of `checkpoint_bytes`. Each call has the
  // log try again for what it could not get.
  virtual void hold(std::uint64_t log_bytes,
                    std::uint64_t checkpoint_bytes) = 0;
  struct Room {
    std::uint64_t held = 0;  // bytes of records that have their blocks
    bool lacking = false;    // the disk refused some of what is to be held
    bool stalled = false;    // records are staged that find no room
    std::string why;         // of the last two
  };
  virtual Room room() const = 0;
  virtual bool lacking() const = 0;  // as in room(); cheap
  virtual bool stalled() const = 0;
  // Whether records of `bytes` in all find held room, and `keep` bytes are left
  // of it then.
  virtual bool fits(std::uint64_t bytes, std::uint64_t keep) const = 0;
  // The newest checkpoint: that of the last call of checkpoint() once
  // checkpointing() is false, or an earlier one where the disk was full.
  virtual Lsn checkpointed() const = 0;

  // Bytes staged and not yet durable: what a caller should bound.
  virtual std::uint64_t staged_bytes() const = 0;

  // With own_thread false: does the next piece of the threads' work here (one
  // batch, checkpoint, removal, spare, or the vouching batch of an idle log).
  // False when there was none.
  virtual bool write_one() = 0;

  // Waits for all that is staged, marks the manifest clean, stops the threads.
  // Code::full: it is stalled; what is staged was never durable.
  virtual Result<void> close() = 0;

  struct Stats {
    std::uint64_t segments = 0, batches = 0, records = 0, bytes = 0;
    std::uint64_t last_batch_records = 0;
    std::vector<std::uint64_t> sync_us;  // since the last call; <= 4096 samples
  };
  virtual Stats take_stats() = 0;
};

// Opens a log: see FileLog::open.
using OpenLog = std::function<Result<std::unique_ptr<LogStore>>(
    Storage&, const LogOptions&, Lsn replay_from, const LogStore::Load&,
    const LogStore::Visit&, RecoveryReport*)>;

// An OpenLog: the log is a FileLog.
Result<std::unique_ptr<LogStore>> open_file_log(Storage& storage,
                                                const LogOptions& options,
                                                Lsn replay_from,
                                                const LogStore::Load& load,
                                                const LogStore::Visit& visit,
                                                RecoveryReport* report);

}  // namespace machina
