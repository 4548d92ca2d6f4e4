#include "queue/wal/segment.h"

#include <xxhash.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "queue/base/check.h"
#include "queue/base/crc32c.h"
#include "queue/base/little_endian.h"

namespace machina {
namespace {

constexpr std::uint64_t kSegmentMagic = 0x314c41574843414dULL;  // "MACHWAL1"
constexpr std::uint32_t kBatchMagic = 0x4254434d;               // "MCTB"
constexpr std::size_t kSegmentCrcAt = 4092;
constexpr std::size_t kBatchCrcAt = 60;
constexpr std::size_t kBuildBytes = 32;
constexpr std::uint8_t kRecordVersion = 1;

std::uint32_t low32(std::uint64_t value) {
  return static_cast<std::uint32_t>(value);
}

// Of a record: its header before the crc, and its body.
std::uint32_t record_crc(std::uint64_t seed, const std::byte* header,
                         std::span<const std::byte> body) {
  std::uint32_t crc = crc32c(low32(seed), {header, 8});
  return crc32c(crc, body);
}

}  // namespace

Result<void> check_features(std::uint64_t bits, std::uint64_t known) {
  if ((bits & ~known) == 0) return {};
  return Error{Code::newer,
               "it was written by a newer version of this program and has "
               "features that this one does not know: bits " +
                   std::to_string(bits) + ", known are " +
                   std::to_string(known) + "; use that version"};
}

void encode_segment_header(SegmentHeader* header,
                           std::span<std::byte, kSegmentHeaderBytes> out) {
  std::fill(out.begin(), out.end(), std::byte{0});
  std::byte* p = out.data();
  put(p + 0, kSegmentMagic);
  put(p + 8, kLogFormat);
  put(p + 10, kLogFormat);  // the oldest reader that understands this
  put(p + 12, header->flags);
  put(p + 16, header->feature_incompat);
  put(p + 24, header->feature_compat);
  put(p + 32, header->log_uuid[0]);
  put(p + 40, header->log_uuid[1]);
  put(p + 48, header->seq);
  put(p + 56, header->salt);
  put(p + 64, header->writer_epoch);
  put(p + 72, header->first_lsn);
  put(p + 80, header->first_batch_seq);
  put(p + 88, header->base);
  put(p + 96, header->bytes);
  put(p + 104, header->prev.segment_seq);
  put(p + 112, header->prev.last_lsn);
  put(p + 120, header->prev.batch_seq);
  put(p + 128, header->prev.header_crc);
  put(p + 136, header->durable_lsn);
  put(p + 144, header->created_ms);
  constexpr std::string_view kBuild = "machina " MACHINA_VERSION;
  std::memcpy(p + 152, kBuild.data(), std::min(kBuild.size(), kBuildBytes));
  header->crc = crc32c(0, out.first(kSegmentCrcAt));
  put(p + kSegmentCrcAt, header->crc);
}

Result<SegmentHeader> decode_segment_header(std::span<const std::byte> bytes) {
  if (bytes.size() < kSegmentHeaderBytes)
    return Error{Code::corrupt, "segment header is cut short"};
  const std::byte* p = bytes.data();
  if (get<std::uint64_t>(p) != kSegmentMagic)
    return Error{Code::corrupt, "no segment header here"};
  SegmentHeader header;
  header.crc = get<std::uint32_t>(p + kSegmentCrcAt);
  if (crc32c(0, bytes.first(kSegmentCrcAt)) != header.crc)
    return Error{Code::corrupt, "the segment header's checksum fails"};
  if (get<std::uint16_t>(p + 10) > kLogFormat)
    return Error{Code::newer, "needs log format " +
                                  std::to_string(get<std::uint16_t>(p + 10)) +
                                  "; this program reads up to " +
                                  std::to_string(kLogFormat)};
  header.flags = get<std::uint32_t>(p + 12);
  header.feature_incompat = get<std::uint64_t>(p + 16);
  header.feature_compat = get<std::uint64_t>(p + 24);
  if (auto ok = check_features(header.feature_incompat); !ok) return ok.error();
  header.log_uuid[0] = get<std::uint64_t>(p + 32);
  header.log_uuid[1] = get<std::uint64_t>(p + 40);
  header.seq = get<std::uint64_t>(p + 48);
  header.salt = get<std::uint64_t>(p + 56);
  header.writer_epoch = get<std::uint32_t>(p + 64);
  header.first_lsn = get<std::uint64_t>(p + 72);
  header.first_batch_seq = get<std::uint64_t>(p + 80);
  header.base = get<std::uint64_t>(p + 88);
  header.bytes = get<std::uint64_t>(p + 96);
  header.prev.segment_seq = get<std::uint64_t>(p + 104);
  header.prev.last_lsn = get<std::uint64_t>(p + 112);
  header.prev.batch_seq = get<std::uint64_t>(p + 120);
  header.prev.header_crc = get<std::uint32_t>(p + 128);
  header.durable_lsn = get<std::uint64_t>(p + 136);
  header.created_ms = get<Millis>(p + 144);
  return header;
}

Result<SegmentHeader> decode_segment_headers(std::span<const std::byte> bytes) {
  auto first = decode_segment_header(bytes);
  if (first || first.error().code == Code::newer) return first;
  if (bytes.size() < kSegmentDataOffset) return first;
  auto second = decode_segment_header(bytes.subspan(kSegmentHeaderBytes));
  if (second || second.error().code == Code::newer) return second;
  return first;
}

std::string segment_name(Lsn first_lsn) {
  char text[32];
  std::snprintf(text, sizeof(text), "wal/%016llx.seg",
                static_cast<unsigned long long>(first_lsn));
  return text;
}

std::uint64_t frame_seed(const SegmentHeader& segment, std::uint64_t offset) {
  const std::uint64_t parts[4] = {segment.salt, segment.seq, offset,
                                  segment.writer_epoch};
  return XXH3_64bits(parts, sizeof(parts));
}

void seal_batch(BatchHeader* header, const SegmentHeader& segment,
                std::uint64_t offset, std::span<std::byte> batch) {
  CHECK(offset % kBlockBytes == 0 && batch.size() % kBlockBytes == 0);
  CHECK(kBatchHeaderBytes + header->payload_bytes <= batch.size());
  std::uint64_t seed = frame_seed(segment, offset);
  std::byte* p = batch.data();
  header->payload_xxh3 =
      XXH3_64bits_withSeed(p + kBatchHeaderBytes, header->payload_bytes, seed);
  put(p + 0, kBatchMagic);
  put(p + 4, static_cast<std::uint16_t>(kBatchHeaderBytes));
  put(p + 6, static_cast<std::uint8_t>(header->type));
  put(p + 7, std::uint8_t{0});
  put(p + 8, header->payload_bytes);
  put(p + 12, header->records);
  put(p + 16, header->seq);
  put(p + 24, header->first_lsn);
  put(p + 32, header->durable_lsn);
  put(p + 40, header->server_time_ms);
  put(p + 48, header->payload_xxh3);
  put(p + 56, header->prev_header_crc);
  header->header_crc =
      crc32c(low32(seed), std::span<const std::byte>(p, kBatchCrcAt));
  put(p + kBatchCrcAt, header->header_crc);
}

std::optional<BatchHeader> decode_batch_header(std::span<const std::byte> bytes,
                                               const SegmentHeader& segment,
                                               std::uint64_t offset) {
  if (bytes.size() < kBatchHeaderBytes) return std::nullopt;
  const std::byte* p = bytes.data();
  if (get<std::uint32_t>(p) != kBatchMagic) return std::nullopt;
  std::uint64_t seed = frame_seed(segment, offset);
  BatchHeader header;
  header.header_crc = get<std::uint32_t>(p + kBatchCrcAt);
  if (crc32c(low32(seed), bytes.first(kBatchCrcAt)) != header.header_crc)
    return std::nullopt;
  if (get<std::uint16_t>(p + 4) != kBatchHeaderBytes) return std::nullopt;
  auto type = get<std::uint8_t>(p + 6);
  if (type != static_cast<std::uint8_t>(BatchType::records) &&
      type != static_cast<std::uint8_t>(BatchType::vouch))
    return std::nullopt;
  header.type = static_cast<BatchType>(type);
  header.payload_bytes = get<std::uint32_t>(p + 8);
  header.records = get<std::uint32_t>(p + 12);
  header.seq = get<std::uint64_t>(p + 16);
  header.first_lsn = get<std::uint64_t>(p + 24);
  header.durable_lsn = get<std::uint64_t>(p + 32);
  header.server_time_ms = get<Millis>(p + 40);
  header.payload_xxh3 = get<std::uint64_t>(p + 48);
  header.prev_header_crc = get<std::uint32_t>(p + 56);
  if (offset + kBatchHeaderBytes + header.payload_bytes > segment.bytes)
    return std::nullopt;
  return header;
}

bool payload_holds(const BatchHeader& header, const SegmentHeader& segment,
                   std::uint64_t offset, std::span<const std::byte> payload) {
  return payload.size() == header.payload_bytes &&
         XXH3_64bits_withSeed(payload.data(), payload.size(),
                              frame_seed(segment, offset)) ==
             header.payload_xxh3;
}

void put_record(const RecordFrame& frame, std::span<const std::byte> body,
                const SegmentHeader& segment, std::uint64_t offset,
                std::span<std::byte> out) {
  CHECK(out.size() == record_room(body.size()) && frame.bytes == body.size());
  std::byte* p = out.data();
  put(p + 0, frame.bytes);
  put(p + 4, frame.type);
  put(p + 5, kRecordVersion);
  put(p + 6, std::uint16_t{0});
  put(p + 8, record_crc(frame_seed(segment, offset), p, body));
  std::memcpy(p + kRecordHeaderBytes, body.data(), body.size());
  std::size_t end = kRecordHeaderBytes + body.size();
  std::fill(out.begin() + static_cast<std::ptrdiff_t>(end), out.end(),
            std::byte{0});
}

std::optional<RecordFrame> check_record(std::span<const std::byte> bytes,
                                        const SegmentHeader& segment,
                                        std::uint64_t offset) {
  if (bytes.size() < kRecordHeaderBytes) return std::nullopt;
  const std::byte* p = bytes.data();
  RecordFrame frame;
  frame.bytes = get<std::uint32_t>(p);
  frame.type = get<std::uint8_t>(p + 4);
  // The one length that is used before its checksum: bounded, then checked.
  if (frame.bytes > bytes.size() - kRecordHeaderBytes) return std::nullopt;
  std::uint32_t crc =
      record_crc(frame_seed(segment, offset), p,
                 bytes.subspan(kRecordHeaderBytes, frame.bytes));
  if (crc != get<std::uint32_t>(p + 8)) return std::nullopt;
  return frame;
}

}  // namespace machina
