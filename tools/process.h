// tools/process.h
//
// Who a process is, told by what cannot be borrowed: its number together with
// the moment it was started in this boot, its user and its executable file.
// Never by its name: anybody may call a program "machina".
//
//   Q1  A number that was given to another process since is not the same
//       process: the start time differs, after a reboot the boot does.
//   Q2  A signal goes to the process that was looked at, or to none: it is
//       sent through a descriptor that was opened before the look.
//   Q3  An executable that was replaced on disk is still recognised: the
//       running one keeps its device and inode.

#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "queue/base/result.h"

namespace machina {

// What a pid file keeps, and what is compared.
struct ProcessId {
  pid_t pid = 0;
  std::uint64_t start_ticks = 0;  // since the boot, in clock ticks
  std::string boot_id;
  uid_t uid = 0;
  std::uint64_t exe_device = 0, exe_inode = 0;  // 0: not known
  std::string exe;                              // its path when it started
};

struct Process {
  ProcessId id;
  pid_t parent = 0;
  char state = '?';           // R, S, D, Z ...
  std::int64_t age_s = 0;     // since its start
  std::string command;        // its arguments, made harmless, cut
  bool exe_readable = true;   // false: what it runs is not ours to see
  bool exe_replaced = false;  // its file is no longer at its path
};

ProcessId this_process();
std::string boot_id();
// Nothing where there is none, or only its remains (a zombie).
std::optional<Process> look_at(pid_t pid);
// All of them, in no order. Those that vanish meanwhile are left out.
std::vector<Process> all_processes();
// `top`'s children, their children and so on; without `top`.
std::vector<Process> descendants(const std::vector<Process>& all, pid_t top);

// Why `seen` is not `recorded`; empty: it is (Q1, Q3).
std::string difference(const ProcessId& recorded, const Process& seen);

// A running process, held: its number cannot become another's while this
// lives.
class Held {
 public:
  // Code::not_found where `recorded` does not run (any more); `what` says why.
  static Result<Held> hold(const ProcessId& recorded);
  Held(Held&& other) noexcept;
  Held& operator=(Held&& other) noexcept;
  ~Held();

  Result<void> signal(int number) const;  // Q2
  // True once it has ended, at the latest after `timeout_ms`.
  bool ended(int timeout_ms) const;
  const Process& process() const { return process_; }

 private:
  Held(int fd, Process process) : fd_(fd), process_(std::move(process)) {}
  int fd_ = -1;
  Process process_;
};

}  // namespace machina
