// server/api/own_pool.h
//
// The pool that the server starts: one child process, started again after it
// ends, and asked to leave at a drain. The loop's thread only.
//
//   none -> supervise() -> running -> it ends -> backoff -> supervise()
//
//   OP1  None is started while another pool holds <root>/pool.lock, or is heard
//        of (Ops.ThePoolOfAnotherServerIsReplacedWhenItDies).
//   OP2  One that ends is started again after a backoff of kBackoffMinMs to
//        kBackoffMaxMs; one that cannot serve here, kUnusableTries times, then
//        once in kUnusableRetryMs (ServerLife.PoolIsStartedAndStartedAgain).
//   OP3  A drain waits for the pool at most kPoolLeaveMs, then kills it
//       (Ops.APoolThatHasJustStartedLeavesByItself).

#pragma once

#include <sys/types.h>

#include "server/api/pools.h"
#include "server/http/loop.h"

namespace machina {

constexpr Millis kPoolGraceMs = 2'000;
constexpr Millis kPoolLookMs = 500;     // whether a pool that left is gone
constexpr Millis kPoolHearMs = 500;     // until a drain is told by signal, too
constexpr Millis kPoolLeaveMs = 3'000;  // how long a drain waits for pools

class OwnPool {
 public:
  OwnPool(const ServerOptions& options, Clock& clock, Loop& loop, Pools& pools);

  // Starts one where one is wanted and none is there.
  void supervise();
  // Somebody asked for workers: no backoff is waited for.
  void start_soon() { start_at_ = unusable_times_ = 0; }
  // A pool reports, so pools can serve here.
  void pool_serves();

  // --- at a drain ---
  // Whether a pool is still there; it is waited for until `leave_until`.
  bool stays(Millis now, Millis leave_until);
  void end_left_behind();

 private:
  bool lock_is_free() const;
  bool has_left();
  void back_off(Millis now);
  void ended(int code);
  void unusable();

  const ServerOptions& options_;
  Clock& clock_;
  Loop& loop_;
  Pools& pools_;
  const Millis began_;
  int unusable_times_ = 0;  // that it ended so, in a row
  pid_t pid_ = 0;           // of the child, while running_
  bool running_ = false;
  bool asked_ = false;  // by signal, to leave
  Millis started_ = 0, start_at_ = 0, backoff_ = 0, looked_ = 0;
};

}  // namespace machina
