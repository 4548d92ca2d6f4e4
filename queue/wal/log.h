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
// The loop thread owns a FileLog. One thread of the FileLog's own writes and
// syncs; it owns the bytes of the batch it carries, and hands them back as a
// message: `wake` is called on that thread, the owner then calls poll().
// Readers of places (read()) may be on any thread.

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
#include "queue/wal/log_store.h"

namespace machina {

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

class FileLog final : public LogStore {
 public:
  // Takes the lock, bumps the writer epoch (synced), loads the newest sound
  // checkpoint, gives `visit` each record with lsn > min(checkpoint,
  // replay_from) in order (the caller applies only those > the checkpoint),
  // opens a fresh segment. `storage` must outlive the log. Fails: conflict
  // (locked), corrupt (W3), newer (a feature bit we do not know), io, full.
  static Result<std::unique_ptr<FileLog>> open(
      Storage& storage, const LogOptions& options, Lsn replay_from,
      const Load& load, const Visit& visit, RecoveryReport* report);
  ~FileLog() override;

  using LogStore::checkpoint;
  std::uint32_t writer_epoch() const override;
  Result<void> append(Record* record) override;
  std::span<const std::byte> encoded() const override;
  void flush() override;
  void poll() override;
  void on_wake(std::function<void()> wake) override;
  Lsn appended() const override;
  Lsn durable() const override;
  bool poisoned() const override;
  std::string poison_cause() const override;
  Result<std::pair<RecordType, std::vector<std::byte>>> read(
      Place place, std::uint32_t bytes) const override;
  void need(Place place, int delta) override;
  void set_history_applied(Lsn lsn) override;
  void checkpoint(Lsn lsn, Millis time_ms, Image image) override;
  bool checkpointing() const override;
  std::uint64_t bytes_since_checkpoint() const override;
  std::uint64_t kept_for_checkpoints() const override;
  void hold(std::uint64_t log_bytes, std::uint64_t checkpoint_bytes) override;
  Room room() const override;
  bool lacking() const override;
  bool stalled() const override;
  bool fits(std::uint64_t bytes, std::uint64_t keep) const override;
  Lsn checkpointed() const override;
  std::uint64_t staged_bytes() const override;
  bool write_one() override;
  Result<void> close() override;
  Stats take_stats() override;

 private:
  class Impl;
  explicit FileLog(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace machina
