// workers/sandbox/output.h
//
// What is kept of an endless stream: its first half and its last half of a
// number of bytes, without a part of a character, and how many lay between.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "queue/base/utf8.h"

namespace machina::sandbox {

class HeadAndTail {
 public:
  explicit HeadAndTail(std::size_t keep)
      : head_max_(keep - keep / 2), tail_max_(keep / 2) {}

  void add(std::span<const std::byte> bytes) {
    total_ += bytes.size();
    const char* data = reinterpret_cast<const char*>(bytes.data());
    std::size_t size = bytes.size();
    const std::size_t first = std::min(size, head_max_ - head_.size());
    head_.append(data, first);
    data += first;
    size -= first;
    if (size > tail_max_) {
      data += size - tail_max_;
      size = tail_max_;
    }
    tail_.append(data, size);
    // Cut only now and then, so that a byte is moved once on average.
    if (tail_.size() > 2 * tail_max_) {
      tail_.erase(0, tail_.size() - tail_max_);
    }
  }

  std::uint64_t total() const { return total_; }
  bool truncated() const { return total_ > head_max_ + tail_max_; }

  std::string text() const {
    std::string_view head = head_, tail = tail_;
    tail.remove_prefix(tail.size() - std::min(tail.size(), tail_max_));
    if (!truncated()) return head_ + std::string(tail);
    head = utf8_whole_end(head);
    tail = utf8_whole_begin(tail);
    return std::string(head) + "\n[... " +
           std::to_string(total_ - head.size() - tail.size()) +
           " bytes are missing here ...]\n" + std::string(tail);
  }

 private:
  const std::size_t head_max_, tail_max_;
  std::string head_, tail_;
  std::uint64_t total_ = 0;
};

}  // namespace machina::sandbox
