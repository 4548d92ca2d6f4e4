#include "queue/wal/segment.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/sim_storage.h"

namespace machina {
namespace {

SegmentHeader some_header(std::uint64_t salt = 11) {
  SegmentHeader header;
  header.flags = kSegmentUnsynced;
  header.log_uuid[0] = 1;
  header.log_uuid[1] = 2;
  header.seq = 3;
  header.salt = salt;
  header.writer_epoch = 4;
  header.first_lsn = 5;
  header.first_batch_seq = 6;
  header.base = 7 * kBlockBytes;
  header.bytes = 1 << 20;
  header.prev = {8, 9, 10, 11};
  header.durable_lsn = 12;
  header.created_ms = 13;
  return header;
}

std::vector<std::byte> encoded(SegmentHeader* header) {
  std::vector<std::byte> bytes(kSegmentHeaderBytes);
  encode_segment_header(header, std::span<std::byte, kSegmentHeaderBytes>(
                                    bytes.data(), kSegmentHeaderBytes));
  return bytes;
}

struct Sealed {
  BatchHeader header;
  std::vector<std::byte> bytes;
};

Sealed sealed_batch(const SegmentHeader& segment, std::uint64_t offset) {
  std::vector<std::byte> body(100, std::byte{42});
  Sealed batch;
  batch.bytes.resize(kBlockBytes);
  std::size_t room = record_room(body.size());
  put_record({1, 100}, body, segment, offset + kBatchHeaderBytes,
             std::span(batch.bytes).subspan(kBatchHeaderBytes, room));
  batch.header.payload_bytes = static_cast<std::uint32_t>(room);
  batch.header.records = 1;
  batch.header.first_lsn = 5;
  seal_batch(&batch.header, segment, offset, batch.bytes);
  return batch;
}

TEST(Segment, HeaderComesBackWhole) {
  SegmentHeader header = some_header();
  auto bytes = encoded(&header);
  auto back = decode_segment_header(bytes);
  ASSERT_TRUE(back) << back.error().what;
  EXPECT_EQ(back->flags, header.flags);
  EXPECT_EQ(back->seq, 3u);
  EXPECT_EQ(back->salt, 11u);
  EXPECT_EQ(back->writer_epoch, 4u);
  EXPECT_EQ(back->first_lsn, 5u);
  EXPECT_EQ(back->first_batch_seq, 6u);
  EXPECT_EQ(back->base, 7 * kBlockBytes);
  EXPECT_EQ(back->bytes, 1u << 20);
  EXPECT_EQ(back->prev, header.prev);
  EXPECT_EQ(back->durable_lsn, 12u);
  EXPECT_EQ(back->created_ms, 13);
  EXPECT_EQ(back->crc, header.crc);
}

TEST(Segment, EveryFlippedBitOfAHeaderIsSeen) {
  SegmentHeader header = some_header();
  auto bytes = encoded(&header);
  for (std::size_t bit = 0; bit < 200 * 8; ++bit) {
    bytes[bit / 8] ^= std::byte(1u << (bit % 8));
    auto back = decode_segment_header(bytes);
    ASSERT_FALSE(back) << "bit " << bit;
    ASSERT_EQ(back.error().code, Code::corrupt) << "damage is not a version";
    bytes[bit / 8] ^= std::byte(1u << (bit % 8));
  }
}

TEST(Segment, EveryFlippedBitOfABatchIsSeen) {
  SegmentHeader segment = some_header();
  Sealed batch = sealed_batch(segment, 8192);
  std::size_t end = kBatchHeaderBytes + batch.header.payload_bytes;
  for (std::size_t bit = 0; bit < end * 8; ++bit) {
    batch.bytes[bit / 8] ^= std::byte(1u << (bit % 8));
    auto header = decode_batch_header(batch.bytes, segment, 8192);
    bool holds = header && payload_holds(*header, segment, 8192,
                                         std::span(batch.bytes)
                                             .subspan(kBatchHeaderBytes)
                                             .first(header->payload_bytes));
    ASSERT_FALSE(holds) << "bit " << bit;
    batch.bytes[bit / 8] ^= std::byte(1u << (bit % 8));
  }
}

TEST(Segment, FramesOfAnotherPlaceSegmentOrLifeNeverPass) {
  SegmentHeader segment = some_header();
  Sealed batch = sealed_batch(segment, 8192);
  std::span<const std::byte> bytes = batch.bytes;
  ASSERT_TRUE(decode_batch_header(bytes, segment, 8192));
  ASSERT_TRUE(check_record(bytes.subspan(64), segment, 8192 + 64));
  EXPECT_FALSE(decode_batch_header(bytes, segment, 12288)) << "misdirected";
  EXPECT_FALSE(check_record(bytes.subspan(64), segment, 12288 + 64));
  SegmentHeader other = some_header(99);
  EXPECT_FALSE(decode_batch_header(bytes, other, 8192)) << "an earlier life";
  EXPECT_FALSE(check_record(bytes.subspan(64), other, 8192 + 64));
  other = some_header();
  other.seq = 4;
  EXPECT_FALSE(decode_batch_header(bytes, other, 8192));
  other = some_header();
  other.writer_epoch = 5;
  EXPECT_FALSE(decode_batch_header(bytes, other, 8192));
}

TEST(Segment, NoLengthIsBelievedBeyondWhatIsThere) {
  SegmentHeader segment = some_header();
  SeededRandom random(3);
  Sealed batch = sealed_batch(segment, 8192);
  for (int i = 0; i < 2000; ++i) {
    auto bytes = batch.bytes;
    for (std::size_t at = 0; at < 12; ++at)
      bytes[64 + at] = std::byte(random.next());
    std::size_t cut = random.below(200);
    auto frame = check_record(
        std::span<const std::byte>(bytes).subspan(64, cut), segment, 8192 + 64);
    EXPECT_FALSE(frame);
  }
}

}  // namespace
}  // namespace machina
