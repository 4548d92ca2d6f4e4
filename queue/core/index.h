// queue/core/index.h
//
// Finds the entries of a Slab by key: linear hashing, chained through the
// entries' `link`. Each insert splits at most one bucket, so that no insert
// ever pays for the whole table; four bytes an entry beside the link.
//
// Traits has Key, Key key(const T&) and std::uint64_t hash(const Key&), which
// must be uniform in its low bits. An entry that is in a second index as well
// has a second link for that one: std::uint32_t& link(T&) of its Traits.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "queue/core/slab.h"

namespace machina {

template <class T, class Traits>
class Index {
 public:
  using Key = typename Traits::Key;

  explicit Index(Slab<T>* slab) : slab_(slab) {
    for (int i = 0; i < 16; ++i) buckets_.push_back(kNone);
  }

  std::size_t size() const { return size_; }

  std::uint32_t find(const Key& key) const {
    std::uint32_t at = buckets_[bucket_of(Traits::hash(key))];
    while (at != kNone && !(Traits::key(look(at)) == key)) at = next_of(at);
    return at;
  }

  // To be called some time before find() or insert() of a key: what they look
  // at is on its way then.
  void expect(const Key& key) const {
    std::uint32_t at = buckets_[bucket_of(Traits::hash(key))];
    if (at != kNone) __builtin_prefetch(&look(at));
  }

  // The key must not be there.
  void insert(std::uint32_t slot) {
    if (++size_ > buckets_.size()) split();
    push(bucket_of(Traits::hash(Traits::key(look(slot)))), slot);
  }

  // The entry must be there.
  void erase(std::uint32_t slot) {
    std::size_t bucket = bucket_of(Traits::hash(Traits::key(look(slot))));
    std::uint32_t next = next_of(slot);
    if (buckets_[bucket] == slot) {
      buckets_[bucket] = next;
    } else {
      std::uint32_t at = buckets_[bucket];
      while (next_of(at) != slot) at = next_of(at);
      link_of((*slab_)[at]) = next;
    }
    --size_;
  }

 private:
  // Buckets [0, split_) and [mask_ + 1, ...) are of the doubled table already.
  std::size_t bucket_of(std::uint64_t hash) const {
    std::size_t bucket = hash & mask_;
    return bucket < split_ ? hash & (mask_ * 2 + 1) : bucket;
  }

  void push(std::size_t bucket, std::uint32_t slot) {
    link_of((*slab_)[slot]) = buckets_[bucket];
    buckets_[bucket] = slot;
  }

  void split() {
    std::uint32_t at = buckets_[split_];
    buckets_[split_] = kNone;
    buckets_.push_back(kNone);
    ++split_;
    while (at != kNone) {
      std::uint32_t next = next_of(at);
      push(bucket_of(Traits::hash(Traits::key(look(at)))), at);
      at = next;
    }
    if (split_ > mask_) {
      mask_ = mask_ * 2 + 1;
      split_ = 0;
    }
    // The next splits' entries are cold: by then they will have come.
    if (std::uint32_t soon = std::as_const(buckets_)[split_ + kAhead];
        soon != kNone) {
      __builtin_prefetch(&look(soon));
    }
  }

  // Without taking a shared page for its own.
  const T& look(std::uint32_t slot) const {
    return std::as_const(*slab_)[slot];
  }

  template <class Entry>  // T or const T
  static auto& link_of(Entry& entry) {
    if constexpr (requires { Traits::link(entry); }) {
      return Traits::link(entry);
    } else {
      return entry.link;
    }
  }
  std::uint32_t next_of(std::uint32_t slot) const {
    return link_of(look(slot));
  }

  static constexpr std::size_t kAhead = 4;  // less than the buckets at first

  Slab<T>* slab_;
  Paged<std::uint32_t, 4096> buckets_;
  std::size_t mask_ = 15, split_ = 0, size_ = 0;
};

}  // namespace machina
