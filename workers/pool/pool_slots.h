// workers/pool/pool_slots.h
//
// What the pool knows of its 64 slots, and what is to be done next. No process,
// clock or socket inside: times come in, actions come out.
//
//            start()              exited()            emptied()
//   empty ------------> running ------------> dying ------------> empty
//                          |  stop             (its tree is being killed; its
//                          v                    name is reported `gone` only
//                       leaving --exited()-->   after emptied())
//
//   Invariants: a slot in `running` or `leaving` has a pid; a name is in
//   gone() or ended() from emptied() until it was reported: in ended() where
//   the pool itself killed the worker, because it was asked to leave, so that
//   its job is not charged with it.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/job.h"

namespace machina {

constexpr int kSlotsMax = 64;
constexpr Millis kBackoffMinMs = 100, kBackoffMaxMs = 10'000;
constexpr Millis kLivedMs = 5000;  // an earlier death is followed by a pause

// What pool.lock says of a worker that has ended.
constexpr std::string_view kDied = " died", kEnded = " ended";

class PoolSlots {
 public:
  enum class Phase : std::uint8_t { empty, running, leaving, dying };
  struct Slot {
    Phase phase = Phase::empty;
    bool killed = false;  // by this pool, which leaves
    std::string name;
    int pid = -1;
    Millis started_ms = 0;  // monotonic
    Millis started_wall_ms = 0;
    std::string isolation;  // raw JSON, once its canary has passed
    std::string job;        // its busy job's id, or empty
    int early_deaths = 0;
    Millis not_before_ms = 0;
  };

  // Slots to start a worker in now, for `target` workers in all.
  std::vector<int> to_start(int target, Millis now_ms) const;
  // Workers to ask to leave: idle ones first, higher slots first.
  std::vector<int> to_stop(int target) const;
  // When to_start() may say more, or -1.
  Millis next_start_ms(int target, Millis now_ms) const;

  void started(int slot, const std::string& name, int pid, Millis now_ms,
               Millis wall_ms);
  void leaving(int slot);
  // A start that failed before there was a process.
  void not_started(int slot, Millis now_ms);
  // By pid; null where it is none of ours.
  const Slot* find(int pid) const;
  // By pid; -1 where it is none of ours.
  int exited(int pid, Millis now_ms);
  void emptied(int slot);
  // All that live are about to be killed by this pool.
  void killed();

  Slot& at(int slot) { return slots_[static_cast<std::size_t>(slot)]; }
  const std::array<Slot, kSlotsMax>& all() const { return slots_; }
  int alive() const;    // processes
  int pending() const;  // not empty: alive or dying

  const std::vector<std::string>& gone() const { return gone_; }
  const std::vector<std::string>& ended() const { return ended_; }
  bool all_reported() const { return gone_.empty() && ended_.empty(); }
  // Workers of a pool that died before it could report them; its slots have
  // been emptied since.
  void inherit(const std::vector<std::string>& gone,
               const std::vector<std::string>& ended);
  // Every worker that the server may believe in, each with kDied or kEnded
  // behind its name where it does not live any more.
  std::vector<std::string> unreported() const;
  void reported(const std::vector<std::string>& names);

  // The body of a sync; `counts` is raw JSON, `trouble` too, or empty;
  // `pids_max` is what a job gets at most.
  std::string sync_body(const std::string& host, const std::string& session,
                        const std::string& counts, const std::string& trouble,
                        std::uint64_t pids_max, Millis wait_ms) const;
  int staying() const;  // running, and not asked to leave

 private:
  void pause(Slot& slot, Millis now_ms);

  std::array<Slot, kSlotsMax> slots_;
  std::vector<std::string> gone_, ended_;
};

}  // namespace machina
