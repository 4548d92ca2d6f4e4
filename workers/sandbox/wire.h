// workers/sandbox/wire.h
//
// What travels between the pool, the spawner, the keepers and the sessions:
// fixed-size structs in SOCK_SEQPACKET messages, with descriptors beside them.
// The privileged side parses nothing else. All of it stays on one host and in
// one build, so there is no version and no byte order.
//
//   pool -> spawner    OpenSlot + the keeper's end of a channel -> Status
//                      OpenSlot{kConnectServer} -> Status + a connection
//   spawner -> pool    SlotEmpty                       (the events socket)
//   worker -> keeper   KeeperRequest [+ descriptors] -> KeeperReply
//   worker -> init     StepRequest + descriptors -> StepDone
//                      StepSignal, any time in between
//
// A step's argv and environment are not here: they lie in a sealed memfd that
// only stage 2 reads, after it has given up every right.

#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

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
struct OpenSlot {
  std::int32_t slot = 0;
};
struct SlotEmpty {
  std::int32_t slot = 0;
};
struct Status {
  std::int32_t error = 0;
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
  MechWire mechs[kMechs];
  char provider[8] = {};
};

enum class InitOp : std::uint32_t { step, signal };

struct StepRequest {
  InitOp op = InitOp::step;
  std::uint8_t builtin = 0;
  std::uint8_t merge_stderr = 0;
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

// Closes every descriptor from 3 on but these.
void close_all_but(std::initializer_list<int> keep);
// Waits until `fd` is readable (or at end-of-file); false after the time.
bool readable_within(int fd, int milliseconds);

// A blocking connection to a Unix socket, or -errno; waits at most 2 s for
// room in its backlog.
int connect_unix(const std::string& path);

}  // namespace machina::sandbox
