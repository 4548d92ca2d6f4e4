// queue/wal/log_writer.h
//
// Puts sealed batches into segments, one at a time: the part of the log that
// knows files and no threads. queue/wal/log_stage.cc stages batches for it and
// runs it on the log thread.
//
// A batch is bound to a segment and an offset when its first record is staged,
// because records must know their places at once; the segment's file comes to
// be when its first batch is written. If we die at any point of that, the
// segment is either absent or has two whole headers (create, write, sync,
// rename, sync the directory, and only then the first batch).

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "queue/base/storage.h"
#include "queue/wal/log.h"
#include "queue/wal/segment.h"

namespace machina {

// A growing buffer that O_DIRECT takes.
class BatchBuffer {
 public:
  std::byte* data() { return bytes_.get(); }
  std::size_t capacity() const { return capacity_; }
  // At least `bytes`, a copy of the first `used` kept.
  void reserve(std::size_t bytes, std::size_t used);

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> bytes_;
  std::size_t capacity_ = 0;
};

struct Segment {
  SegmentHeader header;
  std::string name;
  std::string spare;       // the held file it is made of; empty: none
  bool zero_fill = false;  // make it of zeros when it is created
  std::int64_t needs = 0;  // places in it that are needed; the owner's

  // For read(); opened when first wanted.
  std::mutex reader_mutex;
  std::shared_ptr<File> reader;
};

struct Batch {
  std::shared_ptr<Segment> segment;
  std::uint64_t offset = 0;
  BatchBuffer buffer;
  std::size_t used = kBatchHeaderBytes;  // header's room and records
  std::uint32_t records = 0;
  Lsn first_lsn = 0;
  Millis time_ms = 0;

  std::uint64_t padded() const { return pad_to(used, kBlockBytes); }
  Lsn last_lsn() const { return first_lsn + records - 1; }
};

class LogWriter {
 public:
  LogWriter(Storage& storage, const LogOptions& options, const ChainLink& link,
            Lsn synced);

  // Durable when it returns (with fsync off: written). After an error nothing
  // more may be written, but for Code::full: then the same again, some time.
  Result<void> write(Batch& batch);
  // An empty batch that says how far the log is durable.
  Result<void> vouch(const std::shared_ptr<Segment>& segment,
                     std::uint64_t offset, Millis time_ms);
  // Makes the file of `segment`; write() does it where it is not done yet.
  Result<void> enter(const std::shared_ptr<Segment>& segment);

  Lsn written() const { return link_.last_lsn; }
  // The greatest lsn known to have been synced.
  Lsn synced() const { return synced_.load(std::memory_order_acquire); }
  void set_synced(Lsn lsn);  // fsync off: a checkpoint synced the files
  // Names of segments that were written and not synced, the current one last.
  std::vector<std::string> take_unsynced();

 private:
  Result<void> make_file(Segment& segment, const std::string& tmp);
  Result<void> put(const SegmentHeader& segment, std::uint64_t offset,
                   BatchHeader header, std::span<std::byte> bytes);

  Storage& storage_;
  const LogOptions options_;
  ChainLink link_;  // the last batch written
  std::atomic<Lsn> synced_;
  std::shared_ptr<Segment> current_;
  std::unique_ptr<File> file_;
  std::uint32_t prev_crc_ = 0;
  BatchBuffer vouch_buffer_;
  std::mutex unsynced_mutex_;
  std::vector<std::string> unsynced_;
};

}  // namespace machina
