// workers/worker/retry.h
//
// How long to rest before a call to a server that was away is tried again:
// short at first, twice as long each time, and never longer than `most_ms`;
// each time less by chance, down to half, so that those who lost the same
// server do not come back as one.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <random>

#include "queue/base/job.h"

namespace machina {

// A server that was killed is back in a fraction of a second: so soon it must
// be found again, by the pool and by each of its workers.
constexpr Millis kAwayMinMs = 10, kAwayMaxMs = 50;

class Retry {
 public:
  Retry(Millis least_ms, Millis most_ms, unsigned seed)
      : least_(least_ms), most_(most_ms), chance_(seed) {}
  Retry(Millis least_ms, Millis most_ms)
      : Retry(least_ms, most_ms, another_seed()) {}
  Retry() : Retry(kAwayMinMs, kAwayMaxMs) {}

  // The pause before the next try, in [half, whole] of the present step.
  Millis next() {
    step_ = step_ == 0 ? least_ : std::min(step_ * 2, most_);
    std::uniform_int_distribution<Millis> within(step_ - step_ / 2, step_);
    return within(chance_);
  }
  void reset() { step_ = 0; }  // it answered

 private:
  // Unlike another process's, at no cost: most calls never rest.
  static unsigned another_seed() {
    static std::atomic<unsigned> last{0};
    return static_cast<unsigned>(::getpid()) * 2'654'435'761u + ++last;
  }

  Millis least_, most_, step_ = 0;
  std::minstd_rand chance_;
};

}  // namespace machina
