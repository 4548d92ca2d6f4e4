// queue/base/codec.h
//
// Numbers, texts and ids as bytes, for the log's records and the checkpoint's
// image. docs/wal-records.md has the forms. Each value has exactly one
// encoding.
//
//   B1  A Reader never reads past its bytes, whatever they are; after the
//       first thing that is wrong ok() is false for good, and every read gives
//       an empty value.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/ids.h"

namespace machina {

class Writer {
 public:
  explicit Writer(std::vector<std::byte>* out) : out_(out) {}

  void u8(std::uint8_t value) { out_->push_back(std::byte{value}); }
  void u64(std::uint64_t value) {
    std::byte bytes[8];
    for (int i = 0; i < 8; ++i) bytes[i] = std::byte(value >> (8 * i));
    raw(bytes, sizeof(bytes));
  }
  void number(std::uint64_t value) {  // LEB128
    std::byte bytes[10];
    int count = 0;
    for (; value >= 0x80; value >>= 7) bytes[count++] = std::byte(value | 0x80);
    bytes[count++] = std::byte(value);
    raw(bytes, count);
  }
  void signed_number(std::int64_t value) {  // zigzag, then LEB128
    number((static_cast<std::uint64_t>(value) << 1) ^
           static_cast<std::uint64_t>(value >> 63));
  }
  void text(std::string_view value) {
    number(value.size());
    raw(value.data(), value.size());
  }
  void id(const JobId& value) { raw(value.bytes.data(), value.bytes.size()); }
  void ids(const std::vector<JobId>& values) {
    number(values.size());
    for (const JobId& value : values) id(value);
  }

 private:
  void raw(const void* from, std::size_t bytes) {
    const auto* begin = static_cast<const std::byte*>(from);
    out_->insert(out_->end(), begin, begin + bytes);
  }

  std::vector<std::byte>* out_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  bool ok() const { return ok_; }
  bool done() const { return ok_ && at_ == bytes_.size(); }
  std::size_t at() const { return at_; }
  void fail() { ok_ = false; }

  std::uint8_t u8() {
    const std::byte* from = take(1);
    return from ? static_cast<std::uint8_t>(*from) : 0;
  }
  std::uint8_t u8_below(std::uint8_t bound) {
    std::uint8_t value = u8();
    if (value >= bound) ok_ = false;
    return ok_ ? value : 0;
  }
  std::uint64_t u64() {
    const std::byte* from = take(8);
    std::uint64_t value = 0;
    if (!from) return 0;
    for (int i = 0; i < 8; ++i) {
      value |= static_cast<std::uint64_t>(from[i]) << (8 * i);
    }
    return value;
  }
  // One way to write each number: an overlong form is refused.
  std::uint64_t number() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      std::uint8_t byte = u8();
      if (!ok_) return 0;
      bool too_big = shift == 63 && byte > 1;
      bool overlong = shift > 0 && byte == 0;
      if (too_big || overlong) break;
      value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
      if (!(byte & 0x80)) return value;
    }
    ok_ = false;
    return 0;
  }
  std::uint64_t number_to(std::uint64_t max) {
    std::uint64_t value = number();
    if (value > max) ok_ = false;
    return ok_ ? value : 0;
  }
  std::int64_t signed_number() {
    std::uint64_t value = number();
    return static_cast<std::int64_t>((value >> 1) ^ (~(value & 1) + 1));
  }
  std::int64_t signed_int() {  // one that fits an int
    std::int64_t value = signed_number();
    if (value != static_cast<int>(value)) ok_ = false;
    return ok_ ? value : 0;
  }
  std::string text() {
    std::uint64_t size = number();
    const std::byte* from = take(size);
    if (!from) return {};
    return std::string(reinterpret_cast<const char*>(from), size);
  }
  JobId id() {
    JobId value;
    const std::byte* from = take(value.bytes.size());
    if (from) std::memcpy(value.bytes.data(), from, value.bytes.size());
    return value;
  }
  std::vector<JobId> ids() {
    std::uint64_t count = count_of(sizeof(JobId));
    std::vector<JobId> values;
    values.reserve(count);
    for (std::uint64_t i = 0; i < count; ++i) values.push_back(id());
    return values;
  }
  // How many things of at least `bytes_each` bytes follow.
  std::uint64_t count_of(std::size_t bytes_each) {
    return number_to((bytes_.size() - at_) / bytes_each);
  }

 private:
  const std::byte* take(std::uint64_t count) {
    if (!ok_ || count > bytes_.size() - at_) {
      ok_ = false;
      return nullptr;
    }
    const std::byte* from = bytes_.data() + at_;
    at_ += count;
    return from;
  }

  std::span<const std::byte> bytes_;
  std::size_t at_ = 0;
  bool ok_ = true;
};

}  // namespace machina
