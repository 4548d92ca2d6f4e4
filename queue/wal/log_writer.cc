#include "queue/wal/log_writer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "queue/base/check.h"

namespace machina {

void BatchBuffer::reserve(std::size_t bytes, std::size_t used) {
  if (bytes <= capacity_) return;
  std::size_t size = pad_to(std::max(bytes, 2 * capacity_), kBlockBytes);
  std::unique_ptr<std::byte, Free> grown(
      static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, size)));
  CHECK(grown != nullptr);
  used = std::min(used, capacity_);
  if (used > 0) std::memcpy(grown.get(), bytes_.get(), used);
  bytes_ = std::move(grown);
  capacity_ = size;
}

LogWriter::LogWriter(Storage& storage, const LogOptions& options,
                     const ChainLink& link, Lsn synced)
    : storage_(storage), options_(options), link_(link), synced_(synced) {}

Result<void> LogWriter::write(Batch& batch) {
  if (auto ok = enter(batch.segment); !ok) return ok;
  BatchHeader header;
  header.type = BatchType::records;
  header.payload_bytes =
      static_cast<std::uint32_t>(batch.used - kBatchHeaderBytes);
  header.records = batch.records;
  header.first_lsn = batch.first_lsn;
  header.server_time_ms = batch.time_ms;
  CHECK(batch.first_lsn == link_.last_lsn + 1);  // W1
  CHECK(batch.padded() <= batch.buffer.capacity());
  std::byte* bytes = batch.buffer.data();
  std::fill(bytes + batch.used, bytes + batch.padded(), std::byte{0});
  return put(batch.segment->header, batch.offset, header,
             {bytes, batch.padded()});
}

Result<void> LogWriter::vouch(const std::shared_ptr<Segment>& segment,
                              std::uint64_t offset, Millis time_ms) {
  CHECK(segment == current_);
  vouch_buffer_.reserve(kBlockBytes, 0);
  std::span<std::byte> bytes(vouch_buffer_.data(), kBlockBytes);
  std::fill(bytes.begin(), bytes.end(), std::byte{0});
  BatchHeader header;
  header.type = BatchType::vouch;
  header.first_lsn = link_.last_lsn + 1;
  header.server_time_ms = time_ms;
  return put(segment->header, offset, header, bytes);
}

Result<void> LogWriter::put(const SegmentHeader& segment, std::uint64_t offset,
                            BatchHeader header, std::span<std::byte> bytes) {
  header.seq = link_.batch_seq + 1;
  header.durable_lsn = synced();
  header.prev_header_crc = prev_crc_;
  seal_batch(&header, segment, offset, bytes);
  if (auto ok = file_->write_at(offset, bytes); !ok) return ok;
  if (options_.fsync && !options_.direct) {
    if (auto ok = file_->sync(); !ok) return Error{Code::io, ok.error().what};
  }
  link_ = {segment.seq, header.seq, header.last_lsn(), header.header_crc};
  prev_crc_ = header.header_crc;
  if (options_.fsync) set_synced(link_.last_lsn);
  return {};
}

Result<void> LogWriter::enter(const std::shared_ptr<Segment>& segment) {
  if (segment == current_) return {};
  SegmentHeader& header = segment->header;
  header.prev = link_;
  header.first_batch_seq = link_.batch_seq + 1;
  header.durable_lsn = synced();
  if (!options_.fsync) header.flags |= kSegmentUnsynced;
  CHECK(header.first_lsn == link_.last_lsn + 1);

  bool plain = segment->spare.empty();
  std::string tmp = plain ? segment->name + ".tmp" : segment->spare;
  auto made = make_file(*segment, tmp);
  if (made) made = storage_.rename(tmp, segment->name);
  if (!made) {
    // What is held stays held; what was begun goes, and may be tried again.
    bool again = made.error().code == Code::full;
    if (again && plain) (void)storage_.remove(tmp).has_value();
    return made;
  }
  if (auto ok = storage_.sync_dir("wal"); !ok)
    return Error{Code::io, ok.error().what};

  bool durable = options_.fsync && options_.direct;
  auto file = storage_.open(segment->name,
                            durable ? OpenMode::durable : OpenMode::write);
  if (!file) return file.error();
  file_ = std::move(*file);
  current_ = segment;
  prev_crc_ = header.crc;
  if (!options_.fsync) {
    std::lock_guard hold(unsynced_mutex_);
    unsynced_.push_back(segment->name);
  }
  return {};
}

// Both headers, synced; with `hold` all the blocks that it will ever need.
Result<void> LogWriter::make_file(Segment& segment, const std::string& tmp) {
  bool plain = segment.spare.empty();
  auto made = storage_.open(tmp, plain ? OpenMode::create : OpenMode::write);
  if (!made) return made.error();
  if (plain && options_.hold) {
    if (auto ok = (*made)->allocate(segment.header.bytes); !ok) return ok;
  }
  std::size_t bytes = kSegmentDataOffset;
  if (segment.zero_fill) bytes = segment.header.bytes;
  BatchBuffer buffer;
  buffer.reserve(bytes, 0);
  std::memset(buffer.data(), 0, bytes);
  std::span<std::byte, kSegmentHeaderBytes> copy(buffer.data(),
                                                 kSegmentHeaderBytes);
  encode_segment_header(&segment.header, copy);
  std::memcpy(buffer.data() + kSegmentHeaderBytes, buffer.data(),
              kSegmentHeaderBytes);
  if (auto ok = (*made)->write_at(0, {buffer.data(), bytes}); !ok) return ok;
  return (*made)->sync();
}

void LogWriter::set_synced(Lsn lsn) {
  if (lsn > synced()) synced_.store(lsn, std::memory_order_release);
}

std::vector<std::string> LogWriter::take_unsynced() {
  std::lock_guard hold(unsynced_mutex_);
  std::vector<std::string> names = unsynced_;
  if (unsynced_.size() > 1)
    unsynced_.erase(unsynced_.begin(), unsynced_.end() - 1);
  return names;
}

}  // namespace machina
