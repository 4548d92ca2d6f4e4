// queue/wal/window.h
//
// A file, read through a window that moves forward.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "queue/base/storage.h"

namespace machina {

class Window {
 public:
  explicit Window(const File& file) : file_(file) {}

  // Up to `bytes` at `offset`; fewer only at the end of the file. Holds until
  // the next call.
  Result<std::span<const std::byte>> at(std::uint64_t offset,
                                        std::size_t bytes) {
    if (offset < start_ || offset + bytes > start_ + held_) {
      buffer_.resize(std::max(bytes, kBytes));
      auto got = file_.read_at(offset, buffer_);
      if (!got) return got.error();
      start_ = offset;
      held_ = *got;
    }
    std::size_t skip = offset - start_;
    return std::span<const std::byte>(buffer_).subspan(
        skip, std::min(bytes, held_ - skip));
  }

 private:
  static constexpr std::size_t kBytes = 1 << 20;

  const File& file_;
  std::vector<std::byte> buffer_;
  std::uint64_t start_ = 0;
  std::size_t held_ = 0;
};

}  // namespace machina
