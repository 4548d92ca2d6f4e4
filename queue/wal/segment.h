// queue/wal/segment.h
//
// The bytes of a log segment, without a file: encoders and checkers for the
// segment header, the batch header and the record header. Every offset is in
// docs/wal-format.md.
//
//   segment := header header batch*      both headers alike, 4096 bytes each
//   batch   := batch_header record* zeros, begins and ends at 4096-byte blocks
//   record  := record_header body zeros,   begins at a multiple of 8 bytes
//
//   G1  No length is believed before the checksum over it.
//   G2  Checksums are seeded with the segment's salt, number and epoch and with
//       the frame's own offset: bytes of another segment, another place or an
//       earlier life of the file never pass.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "queue/base/clock.h"
#include "queue/base/ids.h"
#include "queue/base/result.h"
#include "queue/record/record.h"

namespace machina {

constexpr std::size_t kBlockBytes = 4096;
constexpr std::size_t kSegmentHeaderBytes = 4096;
constexpr std::size_t kSegmentDataOffset = 2 * kSegmentHeaderBytes;
constexpr std::size_t kBatchHeaderBytes = 64;
constexpr std::size_t kRecordHeaderBytes = 12;

constexpr std::uint16_t kLogFormat = 1;
// Feature bits that we understand (queue/record/record.h).
constexpr std::uint64_t kKnownIncompat =
    kFeatureConcurrencyKeys | kFeatureClock | kFeatureSessions;
constexpr std::uint32_t kSegmentUnsynced = 1;  // written with fsync off

// newer, where `bits` of a file have one that is not `known`.
Result<void> check_features(std::uint64_t bits,
                            std::uint64_t known = kKnownIncompat);

constexpr std::uint64_t pad_to(std::uint64_t bytes, std::uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// The last batch of the segment before: where the chain goes on.
struct ChainLink {
  std::uint64_t segment_seq = 0;  // 0: there is none
  std::uint64_t batch_seq = 0;
  Lsn last_lsn = 0;
  std::uint32_t header_crc = 0;
  bool operator==(const ChainLink&) const = default;
};

struct SegmentHeader {
  std::uint32_t flags = 0;
  std::uint64_t feature_incompat = 0, feature_compat = 0;
  std::uint64_t log_uuid[2] = {0, 0};
  std::uint64_t seq = 0;   // 1 is the first; never used twice
  std::uint64_t salt = 0;  // chance
  std::uint32_t writer_epoch = 0;
  Lsn first_lsn = 0;
  std::uint64_t first_batch_seq = 0;
  Place base = 0;           // place of the segment's first byte
  std::uint64_t bytes = 0;  // places base .. base + bytes are its own
  ChainLink prev;
  Lsn durable_lsn = 0;  // known synced when this was written
  Millis created_ms = 0;
  std::uint32_t crc = 0;  // of the encoded header; set by encode and decode
};

void encode_segment_header(SegmentHeader* header,
                           std::span<std::byte, kSegmentHeaderBytes> out);
// One copy. corrupt: no such header, or its checksum fails. newer.
Result<SegmentHeader> decode_segment_header(std::span<const std::byte> bytes);
// Both copies as read from a file's start; the first sound one.
Result<SegmentHeader> decode_segment_headers(std::span<const std::byte> bytes);

// "wal/0000000000000001.seg"
std::string segment_name(Lsn first_lsn);

// The seed of every checksum of a frame at `offset` in that segment.
std::uint64_t frame_seed(const SegmentHeader& segment, std::uint64_t offset);

enum class BatchType : std::uint8_t {
  records = 1,
  vouch = 2,  // no records: it only carries durable_lsn
};

struct BatchHeader {
  BatchType type = BatchType::records;
  std::uint32_t payload_bytes = 0;
  std::uint32_t records = 0;
  std::uint64_t seq = 0;
  Lsn first_lsn = 0;
  Lsn durable_lsn = 0;
  Millis server_time_ms = 0;
  std::uint64_t payload_xxh3 = 0;
  std::uint32_t prev_header_crc = 0;  // of the batch before; of the segment's
                                      // header for its first
  std::uint32_t header_crc = 0;
  Lsn last_lsn() const { return first_lsn + records - 1; }
};

// Fills in `batch` (whose payload lies behind the header's room, padded with
// zeros) the header with both checksums; sets them in *header too.
void seal_batch(BatchHeader* header, const SegmentHeader& segment,
                std::uint64_t offset, std::span<std::byte> batch);

// The header at `offset`, if its checksum holds and its numbers can be true.
std::optional<BatchHeader> decode_batch_header(std::span<const std::byte> bytes,
                                               const SegmentHeader& segment,
                                               std::uint64_t offset);
bool payload_holds(const BatchHeader& header, const SegmentHeader& segment,
                   std::uint64_t offset, std::span<const std::byte> payload);

struct RecordFrame {
  std::uint8_t type = 0;
  std::uint32_t bytes = 0;  // of the body
};

constexpr std::size_t record_room(std::size_t body_bytes) {
  return pad_to(kRecordHeaderBytes + body_bytes, 8);
}
// `out` has record_room(body) bytes; `offset` is the record's in the file.
void put_record(const RecordFrame& frame, std::span<const std::byte> body,
                const SegmentHeader& segment, std::uint64_t offset,
                std::span<std::byte> out);
// The frame at the start of `bytes` if it lies within and its crc holds; its
// body follows the record header.
std::optional<RecordFrame> check_record(std::span<const std::byte> bytes,
                                        const SegmentHeader& segment,
                                        std::uint64_t offset);

}  // namespace machina
