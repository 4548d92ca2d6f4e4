// workers/sandbox/launch.h
//
// Inside the sandbox library only: what the spawner found out about the host,
// what one sandbox is made of, and the stages that make it.
//
//   spawner  find_host(), one keeper per slot           spawner.cc
//   keeper   joins the slot's cgroups, clones init       keeper.cc
//   stage 1  own root, proc, dev, scratch, pivot         stage1.cc
//   init     PID 1 of ours: steps, reaping, counters     init.cc
//   stage 2  between fork and exec; system calls only    stage2.cc

#pragma once

#include <sys/types.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "workers/sandbox/cgroup.h"
#include "workers/sandbox/sandbox.h"
#include "workers/sandbox/seccomp.h"
#include "workers/sandbox/wire.h"

namespace machina::sandbox {

struct Host {
  SpawnerOptions options;
  bool root = false;  // real root: no user namespace, a uid per slot
  uid_t uid = 0;
  gid_t gid = 0;
  // Not root: the first of the subordinate ids, one a slot; 0 where there are
  // none, and jobs share our uid.
  std::uint64_t sub_uid = 0, sub_gid = 0;
  int landlock_abi = 0;
  Bpf allow, deny;  // empty: not to be installed
  Cgroups cgroups;
  std::vector<std::string> mounts;  // where the host had any at our start
  MechWire mechs[kMechs];
  PidsBound pids;   // of all slots together
  Level level = 0;  // of the mechanisms alone; the canary has the last word

  MechWire& mech(Mech m) { return mechs[static_cast<std::size_t>(m)]; }
  const MechWire& mech(Mech m) const {
    return mechs[static_cast<std::size_t>(m)];
  }
  bool active(Mech m) const { return mech(m).state == 0; }
  bool forced_off(const char* name) const;
};

// The pool's end of a spawner that has said it is there: its process, its two
// sockets, and how long it may take for an answer.
std::unique_ptr<Spawner> spawner_at(pid_t pid, int control, int events,
                                    int answer_ms);

// Asks the kernel; runs before any slot exists.
Host find_host(const SpawnerOptions& options);
Level level_of(const MechWire (&mechs)[kMechs]);

struct Failure {
  Stage stage = Stage::none;
  std::int32_t error = 0;
  bool ok() const { return stage == Stage::none; }
};

// One sandbox.
struct Ground {
  int slot = 0;
  Role role = Role::job;
  Limits limits;
  std::string repo, mirror;
  uid_t uid = 0;  // of the job, as seen inside
  gid_t gid = 0;
  bool other_uid = false;  // in a user namespace: it is not init's
};

// What the kernel may keep in the buffers of a job's sockets, where these are
// not charged to its memory.
constexpr std::uint64_t socket_bytes(const Limits& l) {
  constexpr std::uint64_t kLeast = 4, kMost = 64;  // MiB
  return std::min(std::max(l.memory_mb / 4, kLeast), kMost) << 20;
}

// What keeper and init themselves need beside the job.
constexpr std::uint64_t kSlackPids = 2;

// Limits that are the same for every step.
constexpr std::uint64_t kLockedBytesMax = 8 << 20;
constexpr std::uint64_t kPendingSignalsMax = 1024;
// Above the tmpfs's size: ENOSPC comes first, and a sparse file stops here.
constexpr std::uint64_t file_bytes_max(const Limits& l) {
  return (l.disk_mb + 1) << 20;
}

// Inside a user namespace: the job's and, where that is another of the host's,
// our own, which init and the owner of a repository have.
constexpr uid_t kInnerUid = 1000, kOwnerUid = 1001;

// Finds the subordinate ids of our user and tries them; 0, or ENOENT (no
// newuidmap), ENODATA (none are given to us), or what the helper met.
int find_subids(Host* host);
// The caller, a keeper, moves into a user namespace that has its slot's and our
// own id. 0 or errno, and then the caller is of no use any more.
int enter_subids(const Host& host, int slot);

// What stage 1 leaves for the steps.
struct Inside {
  int proc = -1;     // a writable /proc nobody else sees
  int scratch = -1;  // /work, to ask how full it is
  int landlock = -1;
};

Failure build_root(const Host& host, const Ground& ground, Inside* inside);

// A directory below one of the repo roots, reached without any symbolic link;
// a descriptor (O_PATH) or -errno.
int open_repo(const Host& host, const std::string& path);
// <root>/mirrors/<name>, likewise.
int open_mirror(const Host& host, const std::string& name);

struct InitFds {
  int control = -1, report = -1, release = -1;
  CounterFds counters;
};
[[noreturn]] void init_main(const Host& host, const Ground& ground,
                            const InitFds& fds);

// The keeper of a slot, one of `slots`.
[[noreturn]] void keeper_main(Host& host, int slot, int channel,
                              const KeeperLink& link, int slots);

// What to change where a sandbox could not be made.
std::string remedy_for(Stage stage, int error);

struct StepPlan {
  const Host* host = nullptr;
  const Ground* ground = nullptr;
  const Inside* inside = nullptr;
  int spec = -1, in = -1, out = -1, err = -1, fail = -1;
  Builtin builtin = nullptr;
};
// Between fork and exec. Never returns.
[[noreturn]] void enter_step(const StepPlan& plan);

Builtin find_builtin(std::string_view name);
inline constexpr char kCollectBuiltin[] = "sandbox.collect";
inline constexpr char kCanaryBuiltin[] = "sandbox.canary";
int collect_builtin(int in_fd, int out_fd);
int canary_builtin(int in_fd, int out_fd);

// Capabilities of the caller become exactly `mask` (permitted, effective);
// inheritable and ambient none. 0 or errno.
int set_capabilities(std::uint64_t mask);

}  // namespace machina::sandbox
