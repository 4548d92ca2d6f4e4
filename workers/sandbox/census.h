// workers/sandbox/census.h
//
// What a step's processes use, found by looking at them from PID 1. It stands
// in where a control group counts nothing: not as root, as a rule.
//
//   count()      memory and threads of everything but PID 1, now
//   cpu_us()     processor time of the whole tree since begin()
//
// Processor time is what init's wait4() was told, plus what those that live
// have used, plus what was lost: the kernel adds a child's time to its parent
// only where the parent waits for it, so a parent that ignores SIGCHLD hides
// all of its children. What vanished between two looks and did not arrive at
// the nearest ancestor that is still there is counted as lost, with what is to
// be expected of it after the last look.
//
//   N1  Waited-for children are never counted twice. What a parent has
//       collected is told in ticks of 10 ms, so a lack of up to kTicksUs may
//       be nothing but their rounding and counts as none.
//
// N1: F17_CpuTimeOfTheTreeIsCounted in tests/workers/sandbox/sandbox_test.cc.

#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>

namespace machina::sandbox {

class Census {
 public:
  explicit Census(int proc_fd) : proc_(proc_fd) {}

  struct Sum {
    std::uint64_t anon_kb = 0, shmem_kb = 0, threads = 0;
  };
  // What forks share is counted once per process, or, `exactly`, once; the
  // threads only where not `exactly`.
  Sum count(bool exactly) const;

  void begin();
  // A look. `reaped_us`: what wait4() has told since begin(); `alone`: nothing
  // lives but PID 1.
  std::uint64_t cpu_us(std::uint64_t reaped_us, bool alone);

 private:
  struct Process {
    pid_t parent = 0;
    std::uint64_t start = 0;  // ticks since boot: the number may be taken again
    std::uint64_t own_us = 0, collected_us = 0;
    std::uint64_t tail_us = 0;  // to be expected after the last look at it
  };
  using Processes = std::map<pid_t, Process>;
  Processes look() const;
  static bool read_process(int dir, const char* name, Process* out);

  int proc_;
  Processes last_;
  std::map<pid_t, std::uint64_t> debts_, tails_;  // by surviving ancestor
  std::uint64_t reaped_us_ = 0, lost_us_ = 0, total_us_ = 0;
  std::uint64_t looked_us_ = 0;  // when
};

// What lies in the buffers of this network namespace's netlink sockets, and,
// with `inet`, in those of UDP and TCP.
std::uint64_t queued_bytes(int proc_fd, bool inet);

}  // namespace machina::sandbox
