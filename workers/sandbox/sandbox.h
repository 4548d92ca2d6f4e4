// workers/sandbox/sandbox.h
//
// What the pool and the workers may ask of the sandbox. Three parties:
//
//   spawner   forked first by the pool; single-threaded; alone keeps privilege;
//             fed fixed-size structs and descriptors (workers/sandbox/wire.h)
//   session   one sandbox: namespaces, own root, slot cgroups, PID 1 of ours.
//             Lives for one attempt (or for a warmed handler's life).
//   step      one program (or built-in handler) run inside a session, through
//             stage 2: rlimits, caps, no_new_privs, Landlock, seccomp, exec.
//             Steps of a session run one after another in the same workspace;
//             between two steps the tree of the first is proven dead.
//
//   B1  Nothing of a step outlives it: its tree is dead when run() returns.
//   B2  A step's verdict comes from waitid and kernel counters alone; what the
//       job prints or writes is only output.
//   B3  The host side opens no path inside a workspace by name; files leave by
//       collect(), which runs confined under the slot's uid.
//   B4  A worker's death ends its session; the spawner tells the pool when the
//       slot is proven empty.
//   B5  No step has a descriptor but 0, 1, 2, nor a variable but PATH, HOME,
//       TMPDIR, LANG and those declared.
//   B6  A mechanism that fails to start ends the session with Ended::isolation
//       where the spec requires it; it is never skipped in silence.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "queue/base/job.h"
#include "queue/base/result.h"

namespace machina::sandbox {

struct Limits {
  std::uint64_t memory_mb = 512;  // cgroup limit is memory + disk
  std::uint64_t disk_mb = 256;  // workspace and /tmp, one sized tmpfs each way
  std::uint64_t pids = 64;
  std::uint64_t cpu_ms = 0;              // of the tree; 0: wall limit only
  std::uint64_t output_bytes = 1 << 20;  // kept of each stream: head and tail;
                                         // beyond 16 times this it is killed
};

// More than any host has: beyond these a session is not opened.
constexpr std::uint64_t kMegabytesMax = 1 << 24, kPidsMax = 4'000'000;

// Who runs in a session, and what it sees beside its own root.
enum class Role : std::uint8_t {
  job,      // the slot's uid; workspace at /work; mirror read-only at /mirror
            // where one is named
  prepare,  // the repo directory's owner, no capability; repo read-only at
            // /repo, mirror read-write at /mirror, nothing else
  land,     // the repo directory's owner, no capability; repo read-write at
            // /repo. For programs of ours alone: nothing of a project runs here
};

struct SessionSpec {
  Role role = Role::job;
  Limits limits;
  Level min_level = 0;  // below it: Ended::isolation, before anything runs
  std::string repo;     // not job: absolute, below one of the repo roots
  std::string mirror;   // 64 hex digits below <root>/mirrors, or empty
};

// Handlers compiled in, run confined without exec. Registered by name before
// the spawner is forked; a name has 1 to kBuiltinNameMax bytes. A null `run`
// takes the name out again (tests).
using Builtin = int (*)(int in_fd, int out_fd);
constexpr std::size_t kBuiltinNameMax = 31, kBuiltinsMax = 32;
struct NamedBuiltin {
  std::string name;
  Builtin run = nullptr;
};
void register_builtin(const std::string& name, Builtin run);

struct Step {
  std::vector<std::string> argv;  // argv[0] is absolute inside the sandbox, or
                                  // looked up in PATH there
  std::vector<std::string> env;   // "NAME=value", beside the standard four
  std::string cwd = "/work";      // inside; created before if it is missing
  std::string stdin_data;
  std::string builtin;  // a registered name, instead of argv
  Millis timeout_ms = 120'000;
  bool merge_stderr = false;  // both to stream 1
};

enum class Ended : std::uint8_t {
  exited,
  signalled,
  timeout,
  oom,
  pids,
  disk,
  output,
  cancelled,  // by Watch::cancel
  isolation,  // the sandbox is weaker than required
  failed,     // the sandbox itself could not be made or died: `detail`
};

// `detail` where a limit has more than one bound: oom by the processes' own
// memory alone (no cgroup) or by what lies in socket buffers that no group
// charges; disk by the number of files instead of bytes.
inline constexpr char kDetailOwnMemory[] = "memory_mb";
inline constexpr char kDetailSockets[] = "sockets";
inline constexpr char kDetailCpu[] = "cpu_ms";  // of a timeout
inline constexpr char kDetailInodes[] = "inodes";
// How many files, directories and links a workspace can hold.
constexpr std::uint64_t inodes_max(std::uint64_t disk_mb) {
  return disk_mb * 256 + 256;
}

struct StepResult {
  Ended ended = Ended::failed;
  int exit_code = -1, signal = 0;
  std::string detail;
  Millis wall_ms = 0, cpu_ms = 0;  // cpu_ms: of the whole tree
  // The peak of what the whole tree held at one time: memory of its own, files
  // in its tmpfs, memfds, socket buffers, the kernel's tables for it. Not the
  // pages of files on disk. As the control group counts, else as its processes
  // were seen every 50 ms.
  std::uint64_t max_rss_bytes = 0;
  std::uint64_t output_bytes = 0, disk_bytes = 0;
  std::string out, err;  // head and tail within limits.output_bytes, with a
                         // line between them that says how much is missing
  bool truncated = false;
};

// The caller's ears while a step runs; called on the calling thread.
struct Watch {
  const std::atomic<bool>* cancel = nullptr;  // set: TERM, 2 s, KILL
  int wake_fd = -1;                           // readable: look at `cancel`
  std::function<void(int stream, std::span<const std::byte>)> on_output;
};

enum class MechanismState : std::uint8_t {
  active,
  degraded,
  disabled,
  unavailable
};
struct Mechanism {
  std::string name;  // userns mountns pidns netns ipcns utsns seccomp landlock
                     // cgroup_memory cgroup_pids uid caps rlimits
  MechanismState state = MechanismState::unavailable;
  int error = 0;    // errno, 0: none
  std::string why;  // for doctor; not part of the job's JSON
};
// Why nothing can run here, and what to change; both empty where something can.
struct Trouble {
  std::string reason, remedy;
  bool any() const { return !reason.empty(); }
};

// What the canary found by attacking (workers/sandbox/canary.cc).
struct Report {
  Level level = 0;
  Trouble trouble;  // at level 0
  std::string provider = "native";
  std::vector<Mechanism> mechanisms;
  std::vector<std::pair<std::string, bool>> attacks;  // name, withstood
};
// The job's `isolation` member (api.md).
std::string isolation_json(const Report& report, Level requested);

class Session {
 public:
  virtual ~Session() = default;  // kills and empties it
  // Runs a step to its end. Never blocks past its timeout + 3 s.
  virtual StepResult run(const Step& step, const Watch& watch) = 0;

  // A program that stays, with no time limit of its own: a stream socket to
  // talk to it, its standard input and output (a built-in's in_fd and out_fd).
  // When it dies the socket reads end-of-file and wait_service() says how.
  virtual Result<int> start_service(const Step& program) = 0;
  // Kills it after the time: Ended::timeout.
  virtual StepResult wait_service(Millis timeout_ms) = 0;

  // Writes `bytes` to a path below /work before the next step, inside the
  // sandbox under the slot's uid. Code::invalid for a path that leaves it.
  virtual Result<void> put(const std::string& path, std::string_view bytes) = 0;
  // Reads a regular file below /work the same way; Code::invalid when it is
  // anything else, Code::too_large, Code::not_found.
  virtual Result<std::string> collect(const std::string& path,
                                      std::size_t max_bytes) = 0;
};

// The worker's end of its slot.
class Slot {
 public:
  static Result<std::unique_ptr<Slot>> attach(int channel_fd);
  virtual ~Slot() = default;
  // A fresh connection to the server's Unix socket, made by the spawner. From
  // any thread, at any time: also while another thread is in Session::run(),
  // and in less than a second whether the server is there or not.
  virtual Result<int> connect_server() = 0;
  virtual Result<std::unique_ptr<Session>> open(const SessionSpec& spec) = 0;
};

// Runs the canary in a fresh session: attacks, and says what held.
Result<Report> run_canary(Slot& slot);

struct SpawnerOptions {
  std::string root;                     // <root>: mirrors/ below it
  std::string socket_path;              // the server's; empty: TCP only
  std::vector<std::string> repo_roots;  // absolute
  std::uint32_t slot_uid_base = 200'000;
  bool seccomp_enable = true;  // false: only the always-deny list
  std::string self_exe;        // for doctor and tests
  // The most processes that a job may ask for (MACHINA_SANDBOX_MAX_PIDS), and
  // how many slots there are to be at first.
  std::uint64_t pids_max = 4096;
  int slots = 1;
  // Tests: mechanisms (by name) that this host is to be without.
  std::vector<std::string> force_off;
};

// What can be told before a spawner is started: root of a user namespace that
// has no other ids to give is no root.
Trouble host_trouble(const SpawnerOptions& options);

// How many processes and threads all jobs of this host may have together, and
// what bounds it, in words: seven eighths of the least of kernel.pid_max,
// kernel.threads-max, pids.max of the caller's control groups and RLIMIT_NPROC
// (not for root). The rest is the host's. Each of N slots gets an N-th at most,
// whatever its job asks for.
struct PidsBound {
  std::uint64_t most = 0;
  std::string what;  // "kernel.pid_max 32768"
};
PidsBound pids_bound();
// What a job of one of `slots` gets of it at most.
std::uint64_t pids_part(const PidsBound& bound, int slots);

// The pool's end. start() forks; call it before any thread exists. It raises
// the process's soft limit of descriptors to the hard one: jobs that share our
// uid are held below it, and so cannot use up what may be in flight.
class Spawner {
 public:
  static Result<std::unique_ptr<Spawner>> start(const SpawnerOptions&);
  virtual ~Spawner() = default;  // its sandboxes die with it
  virtual int pid() const = 0;
  // A channel for the worker of slot `n` (0..63): hand it over exec as a
  // descriptor, then close it here.
  virtual Result<int> open_slot(int n) = 0;
  // How many slots there are to be: what each may have of the host's process
  // numbers follows, for sessions that are opened from now on.
  virtual Result<void> set_slots(int count) = 0;
  // The pool's own way to the server's Unix socket, as Slot::connect_server().
  // Calls on a Spawner are made one at a time; any thread may make them.
  virtual Result<int> connect_server() = 0;
  // Readable on events_fd(): slots whose worker has gone and which are proven
  // empty since.
  virtual int events_fd() const = 0;
  virtual std::vector<int> take_empty() = 0;
};

}  // namespace machina::sandbox
