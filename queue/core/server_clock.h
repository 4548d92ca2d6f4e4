// queue/core/server_clock.h
//
// The server's own clock, by which durations pass: a delay, the wait before a
// retry, a block's deadline, a dedup window, retention. It never jumps and
// never goes back; each record of the log carries its time. It is not the wall
// clock, which somebody may set: how far the two are apart is a fact of the log
// (the `clock` record), and what waits for a time of day is compared with the
// wall.
//
// No clock is read here: readings come in.
//
//   T1  While a server runs it moves as the machine's monotonic clock does.
//   T2  At a start in the same boot it has moved by what that clock has, also
//       while no server ran; whatever was done to the wall clock.
//   T3  After another boot it has moved by what the wall clock has, at least by
//       nothing: a wall clock that was set back costs the time that no server
//       ran, and nobody waits until it has caught up.
//   T4  It is never behind what was logged.

#pragma once

#include <cstdint>

#include "queue/base/clock.h"

namespace machina {

// What both clocks said at one moment.
struct ClockReading {
  Millis mono_ms = 0, wall_ms = 0;
  std::uint64_t boot = 0;  // 0: unknown
};

// Where the log ties its time to a boot's monotonic clock.
struct ClockAnchor {
  Millis time_ms = 0;  // of the log; 0: none
  Millis boot_ms = 0;
  std::uint64_t boot = 0;
  bool operator==(const ClockAnchor&) const = default;
};

class ServerClock {
 public:
  // `last`: the greatest logged time, 0 of an empty log; `offset`: the wall
  // clock less the log's time as it was then.
  void start(Millis last, Millis offset, const ClockAnchor& anchor,
             const ClockReading& at) {
    mono_ = at.mono_ms;
    if (last == 0) {
      base_ = at.wall_ms;  // a new log begins as the wall clock does
    } else if (at.boot != 0 && at.boot == anchor.boot && anchor.time_ms > 0 &&
               at.mono_ms >= anchor.boot_ms) {
      base_ = anchor.time_ms + (at.mono_ms - anchor.boot_ms);
    } else {
      base_ = at.wall_ms - offset;
    }
    if (base_ < last) base_ = last;
  }
  Millis now(Millis mono_ms) const {
    return mono_ms <= mono_ ? base_ : base_ + (mono_ms - mono_);
  }
  // How far the wall clock is from it now.
  Millis offset(const ClockReading& at) const {
    return at.wall_ms - now(at.mono_ms);
  }

 private:
  Millis base_ = 0, mono_ = 0;
};

// Whether the wall clock was set. The two are read one after the other, the
// wall second, so that a reading may be too far ahead, never too far behind
// (but for what milliseconds cut off). What is behind makes jobs early.
constexpr Millis kClockBackMs = 2, kClockAheadMs = 50;
constexpr bool clock_was_set(Millis offset, Millis measured) {
  return measured < offset - kClockBackMs || measured > offset + kClockAheadMs;
}

}  // namespace machina
