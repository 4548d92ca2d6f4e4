// queue/shard/mailbox.h
//
// How values pass from any thread to one: a bounded queue with many senders
// and one receiver. What goes in is self-contained and owned by the mailbox
// until the receiver takes it. The sender that finds it empty is told to wake
// the receiver; the others need not, for the receiver takes all at once.
//
// Between Io and Shard (tests/queue/shard/two_threads_test.cc), and between
// store threads and the shard.

#pragma once

#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

namespace machina {

template <class T>
class Mailbox {
 public:
  explicit Mailbox(std::size_t max) : max_(max) {}

  enum class Put {
    first,  // accepted; it was empty: wake the receiver
    added,  // accepted; the receiver has been woken for an earlier one
    full,   // refused; `value` is untouched
  };
  Put put(T&& value) {
    std::lock_guard lock(mutex_);
    if (values_.size() >= max_) return Put::full;
    values_.push_back(std::move(value));
    return values_.size() == 1 ? Put::first : Put::added;
  }

  // All that is there, in the order in which it was put.
  std::vector<T> take() {
    std::vector<T> taken;
    std::lock_guard lock(mutex_);
    taken.swap(values_);
    return taken;
  }

 private:
  const std::size_t max_;
  std::mutex mutex_;
  std::vector<T> values_;
};

}  // namespace machina
