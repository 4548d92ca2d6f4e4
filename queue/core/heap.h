// queue/core/heap.h
//
// What is due next, among the entries of a Slab: a binary heap of their
// indices. Each entry knows its position, so that one in the middle can leave.
//
// Order has bool before(const T&, const T&), a strict total order (equal times
// need a tie-break that does not depend on indices: a checkpoint moves them),
// and std::uint32_t& position(T&).

#pragma once

#include <cstddef>
#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

#include "queue/core/slab.h"

namespace machina {

template <class T, class Order, std::size_t kPerPage = 4096>
class Heap {
 public:
  explicit Heap(Slab<T>* slab) : slab_(slab) {}

  bool empty() const { return slots_.empty(); }
  std::size_t size() const { return slots_.size(); }
  std::uint32_t top() const { return slots_[0]; }
  std::uint32_t at(std::size_t i) const { return slots_[i]; }

  void push(std::uint32_t slot) {
    slots_.push_back(slot);
    up(slots_.size() - 1);
  }
  void remove(std::uint32_t slot) {
    std::size_t i = Order::position((*slab_)[slot]);
    std::uint32_t last = slots_[slots_.size() - 1];
    slots_.pop_back();
    if (last == slot) return;
    put(i, last);
    down(up(i));
  }
  // The entry's key changed.
  void update(std::uint32_t slot) { down(up(Order::position((*slab_)[slot]))); }

  // Takes on what `other` holds, of a slab that is shared with the other's.
  void share(Heap& other) { slots_ = other.slots_.share(); }

  // The first `limit` entries for which due(entry), in order. `due` is true of
  // every entry before one of which it is true.
  template <class Due>
  std::vector<std::uint32_t> first(std::size_t limit, const Due& due) const {
    std::vector<std::uint32_t> found;
    auto later = [this](std::size_t a, std::size_t b) {
      return before(slots_[b], slots_[a]);
    };
    std::priority_queue<std::size_t, std::vector<std::size_t>, decltype(later)>
        open(later);
    auto consider = [&](std::size_t i) {
      if (i < slots_.size() && due(look(slots_[i]))) open.push(i);
    };
    consider(0);
    while (!open.empty() && found.size() < limit) {
      std::size_t i = open.top();
      open.pop();
      found.push_back(slots_[i]);
      consider(2 * i + 1);
      consider(2 * i + 2);
    }
    return found;
  }

 private:
  bool before(std::uint32_t a, std::uint32_t b) const {
    return Order::before(look(a), look(b));
  }
  void put(std::size_t i, std::uint32_t slot) {
    slots_[i] = slot;
    Order::position((*slab_)[slot]) = static_cast<std::uint32_t>(i);
  }
  std::size_t up(std::size_t i) {
    std::uint32_t slot = slots_[i];
    while (i > 0 && before(slot, slots_[(i - 1) / 2])) {
      put(i, slots_[(i - 1) / 2]);
      i = (i - 1) / 2;
    }
    put(i, slot);
    return i;
  }
  void down(std::size_t i) {
    std::uint32_t slot = slots_[i];
    for (;;) {
      std::size_t child = 2 * i + 1;
      if (child >= slots_.size()) break;
      if (child + 1 < slots_.size() &&
          before(slots_[child + 1], slots_[child])) {
        ++child;
      }
      if (!before(slots_[child], slot)) break;
      put(i, slots_[child]);
      i = child;
    }
    put(i, slot);
  }

  const T& look(std::uint32_t slot) const {
    return std::as_const(*slab_)[slot];
  }

  Slab<T>* slab_;
  Paged<std::uint32_t, kPerPage> slots_;
};

}  // namespace machina
