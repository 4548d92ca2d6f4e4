// queue/core/slab.h
//
// Fixed-size entries in pages, named by index. Entries hold indices, never
// pointers, so that they may be copied, counted and written out as they are.
//
//   G1  Growing never moves or copies an entry: a page at a time is added.
//   G2  A freed index is the next to be handed out.
//   G3  share() gives what is there now, unmoved by what is written later, at
//       the price of a pointer a page; each page is copied when one of the two
//       first writes to it.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "queue/base/check.h"

namespace machina {

constexpr std::uint32_t kNone = 0xffffffff;  // no index

// An array that grows by pages. Two may share their pages (G3); whoever writes
// to a shared one gets a copy of it first.
template <class T, std::size_t kPerPage = 1024>
class Paged {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Paged() = default;
  Paged(Paged&&) = default;
  Paged& operator=(Paged&&) = default;

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](std::size_t i) {
    T* page = to_write_[i / kPerPage];
    if (page == nullptr) [[unlikely]]
      page = own(i / kPerPage);
    return page[i % kPerPage];
  }
  const T& operator[](std::size_t i) const {
    return to_read_[i / kPerPage][i % kPerPage];
  }
  void push_back(const T& value) {
    if (size_ == pages_.size() * kPerPage) {
      pages_.push_back(std::make_shared_for_overwrite<T[]>(kPerPage));
      to_read_.push_back(pages_.back().get());
      to_write_.push_back(pages_.back().get());
    }
    ++size_;
    (*this)[size_ - 1] = value;
  }
  void pop_back() { --size_; }
  std::size_t bytes() const { return pages_.size() * kPerPage * sizeof(T); }

  // What is in it now; O(pages). The two may then be used, and destroyed, on
  // different threads.
  Paged share() {
    Paged other;
    other.pages_ = pages_;
    other.to_read_ = to_read_;
    other.to_write_.resize(pages_.size());
    other.size_ = size_;
    std::fill(to_write_.begin(), to_write_.end(), nullptr);
    return other;
  }

 private:
  T* own(std::size_t page) {
    std::shared_ptr<T[]>& mine = pages_[page];
    if (mine.use_count() > 1) {
      auto copy = std::make_shared_for_overwrite<T[]>(kPerPage);
      std::memcpy(copy.get(), mine.get(), kPerPage * sizeof(T));
      mine = std::move(copy);
    }
    // The other's last look at it came before it let go: to give one back here
    // acquires what it released there. (A fence would, too, but the thread
    // sanitizer knows none.)
    std::shared_ptr<T[]>(mine).reset();
    return to_read_[page] = to_write_[page] = mine.get();
  }

  std::vector<std::shared_ptr<T[]>> pages_;
  std::vector<T*> to_read_;
  std::vector<T*> to_write_;  // null: shared, or was
  std::size_t size_ = 0;
};

// T has `std::uint32_t link`, which is the slab's while the entry is free and
// an Index's (queue/core/index.h) while it is used.
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
  Slab share() {  // G3
    Slab other;
    other.entries_ = entries_.share();
    other.free_ = free_;
    other.used_ = used_;
    return other;
  }

 private:
  Paged<T> entries_;
  std::uint32_t free_ = kNone;
  std::size_t used_ = 0;
};

}  // namespace machina
