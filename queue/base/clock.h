// queue/base/clock.h
//
// Time and chance enter queue/ through these two, and only at its edges
// (queue/shard/shard.h): the core is handed values. tests/queue/fakes.h has a
// clock that jumps and a seeded Random.

#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace machina {

using Millis = std::int64_t;  // milliseconds

class Clock {
 public:
  virtual ~Clock() = default;
  virtual Millis wall_ms() = 0;  // since the Unix epoch, UTC; may jump
  virtual Millis mono_ms() = 0;  // CLOCK_BOOTTIME: never jumps, runs in suspend
  // Names what mono_ms() counts from: this boot of the machine. 0: unknown.
  virtual std::uint64_t boot() { return 0; }
};

class Random {
 public:
  virtual ~Random() = default;
  virtual std::uint64_t next() = 0;  // 64 uniform bits, unpredictable in prod
};

Clock& system_clock();    // lives for ever
Random& system_random();  // getrandom(2), buffered; one thread at a time

}  // namespace machina
