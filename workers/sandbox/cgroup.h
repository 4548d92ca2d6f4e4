// workers/sandbox/cgroup.h
//
// The control groups of the slots. One directory machina.<pid>/slot-<n> (or
// machina.<pid>.<i>, where another PID namespace has that number) below each
// hierarchy that serves: v1 memory, pids and cpuacct where those are
// mounted, v2 where its controllers are (and, without any controller, for
// cgroup.kill alone). A slot's keeper joins its groups once; every sandbox it
// clones is born inside, so no process of a job ever runs outside them.
//
//   G1  Limits are set while the slot is empty, before the sandbox is cloned.
//   G2  The memory limit has no swap beside it. v2 charges the buffers of
//       sockets to it; v1 has a limit of its own for those of TCP and UDP
//       (memory.kmem.tcp), which is set where the kernel has it.
//   G3  What a spawner made it removes; what a dead one left is emptied and
//       removed at the next start. Its maker holds a record lock on each
//       directory, so that one that lives in another PID namespace, where its
//       number means nothing, is not taken for dead.
//   G4  A directory that somebody else removed is made again for the next slot.
//
// G1, G2: tests/workers/sandbox/sandbox_test.cc; G3, G4:
// tests/workers/sandbox/cgroup_test.cc.

#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace machina::sandbox {

// Descriptors on a slot's counters, -1 where there is none. init inherits
// them and reads with pread().
struct CounterFds {
  int oom = -1;          // memory.oom_control (v1) or memory.events (v2)
  int pids = -1;         // pids.events
  int cpu = -1;          // cpuacct.usage (v1) or cpu.stat (v2)
  int memory = -1;       // memory.usage_in_bytes (v1) or memory.current (v2)
  int memory_peak = -1;  // memory.max_usage_in_bytes (v1), memory.peak (v2)
  int memory_stat = -1;  // memory.stat
  int sockets = -1;      // memory.kmem.tcp.usage_in_bytes (v1)
  bool v2 = false;       // the memory group is
  // Buffers of TCP and UDP sockets are charged to the slot.
  bool sockets_charged() const { return memory >= 0 && (v2 || sockets >= 0); }
  // All of them.
  std::array<int, 7> all() const {
    return {oom, pids, cpu, memory, memory_peak, memory_stat, sockets};
  }
};
struct Counters {
  std::uint64_t oom_kills = 0, pids_hits = 0, cpu_us = 0;
};
Counters read_counters(const CounterFds& fds);

// The memory that a slot's groups charge, but for the pages of files on disk:
// those are shared with the host, and given back as soon as they are missed.
class MemoryMeter {
 public:
  explicit MemoryMeter(const CounterFds& fds) : fds_(fds) {}
  bool works() const { return fds_.memory >= 0 && fds_.memory_stat >= 0; }
  // What is charged now is not the job's.
  void set_base();
  // From here on; what the job has since set_base() stays in the sum.
  void begin();
  // A look. Between looks the kernel's own peak is read, where it can be set
  // back (v1; v2 since Linux 6.12).
  void look();
  std::uint64_t peak_bytes() const { return peak_; }

 private:
  // Of a file's pages, now.
  std::uint64_t cached() const;
  CounterFds fds_;
  std::uint64_t base_ = 0, peak_ = 0, most_cached_ = 0;
  bool peak_was_reset_ = false;
};

// The caller's own groups where processes are counted, below /sys/fs/cgroup: a
// limit there or above holds for every job.
std::vector<std::string> own_pids_groups();

class Cgroups {
 public:
  // Finds what may be used and makes machina.<pid> there. `no_memory`,
  // `no_pids` and `no_cpu` act as if the controller were not there (tests).
  void find(bool no_memory, bool no_pids, bool no_cpu = false);

  bool memory() const { return memory_error_ == 0; }
  bool pids() const { return pids_error_ == 0; }
  int memory_error() const { return memory_error_; }
  int pids_error() const { return pids_error_; }
  const std::string& memory_why() const { return memory_why_; }

  // Makes the slot's directories; 0 or errno, and then `where` is the one.
  int make_slot(int slot, std::string* where);
  // The caller joins them.
  int join(int slot) const;
  // Limits of the next sandbox, with what keeper and init need.
  int limit(int slot, std::uint64_t memory_bytes, std::uint64_t socket_bytes,
            std::uint64_t pids) const;
  // What all slots together may have of the host's process numbers.
  void limit_all(std::uint64_t pids) const;
  CounterFds open_counters(int slot) const;
  // Kills what is in the slot's groups. True when they are empty.
  bool kill_all(int slot) const;
  // Removes slots and bases (not from the keepers).
  void remove() const;
  std::vector<std::string> bases() const;

 private:
  struct Hierarchy {
    std::string base;  // .../machina.<pid>
    int lock = -1;     // G3; for as long as this process lives
    bool v2 = false, has_memory = false, has_pids = false, has_cpu = false;
  };
  std::string slot_dir(const Hierarchy& h, int slot) const;
  static int make_base(const std::string& parent, Hierarchy* h);
  static int make_again(Hierarchy* h);
  void add_v1(const std::string& mount, const std::string& own,
              const std::string& controller);
  void add_v2(const std::string& mount, const std::string& own, bool no_memory,
              bool no_pids, bool no_cpu);

  std::vector<Hierarchy> hierarchies_;
  int memory_error_ = 2, pids_error_ = 2;  // ENOENT
  std::string memory_why_;
};

}  // namespace machina::sandbox
