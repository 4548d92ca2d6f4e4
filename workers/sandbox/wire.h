// workers/sandbox/wire.h
//
// What travels between the pool, the spawner, the keepers and the sessions:
// fixed-size structs in SOCK_SEQPACKET messages, with descriptors beside them.
// The privileged side parses nothing else. All of it stays on one host and in
// one build, so there is no version and no byte order.
//
//   pool -> spawner    OpenSlot + the keeper's end of a channel -> Status
//                      OpenSlot{kConnectServer} -> Status + a connection
//                      OpenSlot{kSetSlots, count} -> Status
//   spawner -> keeper  Slots, which it reads before it opens a session
//   spawner -> pool    SlotEmpty                       (the events socket)
//   worker -> keeper   KeeperRequest [+ descriptors] -> KeeperReply
//   worker -> init     StepRequest + descriptors -> StepDone
//                      StepSignal, any time in between
//
// A step's argv and environment are not here: they lie in a sealed memfd that
// only stage 2 reads, after it has given up every right.

#pragma once

#include <sys/types.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "workers/sandbox/sandbox.h"

namespace machina::sandbox {

constexpr int kSlotsMax = 64;
constexpr std::size_t kPathMax = 1024;
constexpr std::size_t kMirrorName = 64;  // hex digits

// Order is that of the names in report.cc.
enum class Mech : std::uint8_t {
  userns,
  mountns,
  pidns,
  netns,
  ipcns,
  utsns,
  seccomp,
  landlock,
  cgroup_memory,
  cgroup_pids,
  uid,
  caps,
  rlimits,
  count
};
constexpr std::size_t kMechs = static_cast<std::size_t>(Mech::count);

struct MechWire {
  std::uint8_t state = 3;  // MechanismState
  std::int32_t error = 0;
};

// Where the making of a sandbox, or of a step in it, stopped.
enum class Stage : std::int32_t {
  none,
  request,
  paths,
  cgroup,
  clone,
  idmap,
  root_fs,
  binds,
  etc,
  dev,
  proc,
  scratch,
  repo,
  pivot,
  loopback,
  landlock_rules,
  init_caps,
  lost,
  // of a step
  spec,
  fork,
  session_id,
  rlimits,
  userns,
  groups,
  caps,
  uid,
  caps_readback,
  no_new_privs,
  cwd,
  stdio,
  landlock,
  seccomp,
  exec,
  builtin,
  count
};
const char* stage_name(Stage stage);

constexpr std::int32_t kConnectServer = -1;  // instead of a slot
constexpr std::int32_t kSetSlots = -2;
struct OpenSlot {
  std::int32_t slot = 0;
  std::int32_t count = 0;    // kSetSlots
  std::uint32_t number = 0;  // comes back in the Status: whose answer it is
};
struct Slots {
  std::int32_t count = 1;
};
struct SlotEmpty {
  std::int32_t slot = 0;
};
struct Status {
  std::int32_t error = 0;
  std::uint32_t number = 0;
};

enum class KeeperOp : std::uint32_t { connect_server, open, close };

struct KeeperRequest {
  KeeperOp op = KeeperOp::connect_server;
  std::uint8_t role = 0;  // Role
  std::uint8_t min_level = 0;
  std::uint64_t memory_mb = 0, disk_mb = 0, pids = 0, cpu_ms = 0;
  char repo[kPathMax] = {};
  char mirror[kMirrorName + 1] = {};
};

struct KeeperReply {
  Stage stage = Stage::none;  // none: done
  std::int32_t error = 0;
  std::uint8_t level = 0;     // what the mechanisms below would make
  std::uint8_t too_weak = 0;  // below min_level: nothing was started
  std::uint64_t pids = 0;     // what was asked for, or less: the slot's part
  MechWire mechs[kMechs];
  char provider[8] = {};
};

enum class InitOp : std::uint32_t { step, signal };

struct StepRequest {
  InitOp op = InitOp::step;
  std::uint8_t merge_stderr = 0;
  char builtin[kBuiltinNameMax + 1] = {};  // its name; empty: argv
};
// Descriptors of a step, in order: spec memfd, stdin, stdout, stderr (absent
// with merge_stderr).

struct StepSignal {
  InitOp op = InitOp::signal;
  std::int32_t signal = 0;
};

// What killed a step beside its own end. Decided by init from the kernel's
// counters.
enum class Kill : std::uint8_t { none, oom, sockets, pids, cpu };

struct StepDone {
  Stage stage = Stage::none;  // not none: the step never ran; error says why
  std::int32_t error = 0;
  std::int32_t wait_status = 0;
  Kill killed_by = Kill::none;
  std::uint8_t disk_full = 0;
  std::uint8_t inodes_full = 0;  // disk_full, and bytes were left
  std::uint8_t cpu_over = 0;     // by the time that was counted at the end
  std::uint64_t oom_kills = 0, pids_hits = 0;  // during this step
  std::uint64_t cpu_us = 0, memory_bytes = 0, disk_bytes = 0;
  std::int32_t survivors = 0;  // processes that had to be killed after it
};

// The head of the spec memfd: then argc + envc strings, each ended by NUL;
// first the working directory, then argv, then the environment.
struct SpecHead {
  std::uint32_t argc = 0, envc = 0;
  std::uint64_t bytes = 0;  // of the strings
};

// --- messages (wire.cc) ---
// 0 or errno. At most 8 descriptors.
int send_message(int socket, std::span<const std::byte> bytes,
                 std::span<const int> fds = {});
// Bytes received, 0 at end-of-file, or -errno. Descriptors beyond `fds` and of
// a message that is too long are closed. All arrive close-on-exec.
ssize_t recv_message(int socket, std::span<std::byte> bytes, std::span<int> fds,
                     std::size_t* fd_count, bool wait);

template <class T>
int send_struct(int socket, const T& value, std::span<const int> fds = {}) {
  return send_message(socket, std::as_bytes(std::span(&value, 1)), fds);
}
// True when exactly one T came.
template <class T>
bool recv_struct(int socket, T& value, std::span<int> fds = {},
                 std::size_t* fd_count = nullptr) {
  return recv_message(socket, std::as_writable_bytes(std::span(&value, 1)), fds,
                      fd_count, true) == static_cast<ssize_t>(sizeof(T));
}

// Whether a send failed because nobody is at the other end any more. Any other
// failure (no room for descriptors in flight, no memory) is that message's
// alone.
constexpr bool gone(int error) {
  return error == EPIPE || error == ECONNRESET || error == ENOTCONN ||
         error == EBADF;
}

// Closes every descriptor from 3 on but these; 0 or errno. Where close_range()
// is refused (older container profiles) those that /proc/self/fd names are
// closed one by one. Without both it fails, and its caller must not go on with
// what may still be open. System calls only.
int close_all_but(std::initializer_list<int> keep);

// Descriptors in flight are counted over all processes of a user, and refused
// to a sender that may open fewer itself. Jobs may share our uid: our limit is
// raised to the hard one, and a step's is kept at most at half of that.
void raise_descriptor_limit();
constexpr std::uint64_t kStepDescriptors = 4096;

// A process by a descriptor: never another that was given its number since.
void kill_by_pidfd(int pidfd);
// Waits for a child's end and reaps it; at once where it was reaped before.
void bury_by_pidfd(int pidfd);

// Both ends of a socket that the spawner and one keeper share. The keeper puts
// a pidfd of its sandbox's PID 1 in, and takes it out again when it has buried
// that; what lies there when the keeper has died is the spawner's to kill. No
// other process has an end, and no memory is shared.
struct KeeperLink {
  int keeper = -1, spawner = -1;
};
// Waits until `fd` is readable (or at end-of-file); false after the time.
bool readable_within(int fd, int milliseconds);

// A blocking connection to a Unix socket, or -errno; waits at most 2 s for
// room in its backlog.
int connect_unix(const std::string& path);

}  // namespace machina::sandbox
