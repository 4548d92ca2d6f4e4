// queue/slab.h
//
// Fixed-size entries in pages, named by index. Entries hold indices, never
// pointers, so that they may be copied, counted and written out as they are.
//
//   G1  Growing never moves or copies an entry: a page at a time is added.
//   G2  A freed index is the next to be handed out.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "queue/check.h"

namespace machina {

constexpr std::uint32_t kNone = 0xffffffff;  // no index

// An array that grows by pages.
template <class T, std::size_t kPerPage = 1024>
class Paged {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](std::size_t i) { return pages_[i / kPerPage][i % kPerPage]; }
  const T& operator[](std::size_t i) const {
    return pages_[i / kPerPage][i % kPerPage];
  }
  void push_back(const T& value) {
    if (size_ == pages_.size() * kPerPage) {
      pages_.push_back(std::make_unique_for_overwrite<T[]>(kPerPage));
    }
    ++size_;
    (*this)[size_ - 1] = value;
  }
  void pop_back() { --size_; }
  std::size_t bytes() const { return pages_.size() * kPerPage * sizeof(T); }

 private:
  std::vector<std::unique_ptr<T[]>> pages_;
  std::size_t size_ = 0;
};

// T has `std::uint32_t link`, which is the slab's while the entry is free and
// an Index's (queue/index.h) while it is used.
template <class T>
class Slab {
 public:
  T& operator[](std::uint32_t i) { return entries_[i]; }
  const T& operator[](std::uint32_t i) const { return entries_[i]; }

  // An entry of zeros.
  std::uint32_t allocate() {
    ++used_;
    if (free_ == kNone) {
      CHECK(entries_.size() < kNone);
      entries_.push_back(T{});
      return static_cast<std::uint32_t>(entries_.size() - 1);
    }
    std::uint32_t i = free_;
    free_ = entries_[i].link;
    entries_[i] = T{};
    return i;
  }
  void release(std::uint32_t i) {
    --used_;
    entries_[i] = T{};
    entries_[i].link = free_;
    free_ = i;
  }
  std::size_t used() const { return used_; }
  // Indices below this have been used at some time.
  std::uint32_t end() const {
    return static_cast<std::uint32_t>(entries_.size());
  }
  std::size_t bytes() const { return entries_.bytes(); }

 private:
  Paged<T> entries_;
  std::uint32_t free_ = kNone;
  std::size_t used_ = 0;
};

}  // namespace machina
