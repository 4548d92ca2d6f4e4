// tools/ops.h
//
// Which processes belong to a root, and how they are ended. `serve` and `pool`
// leave a pid file below <root>/ops/ once the root's lock is theirs; the verbs
// `machina ops ...` (tools/cli/ops.cc) read it, and write their reports beside
// it. docs/operating.md has each report's members.
//
//   <root>/ops/serve.pid     the server: who it is, how it was started
//   <root>/ops/pool.pid      the pool: who it is
//   <root>/ops/ops.lock      locked while a verb changes something
//
//   O1  A process is ours by its pid file: number, start time and boot, user
//       and executable (tools/process.h). A name is never looked at.
//   O2  What a pid file names and is not that process any more is left alone.
//   O3  A root that belongs to a user names that user's processes only: root
//       may run these verbs on anybody's root and be led to no other process.
//   O4  No secret is in a pid file or a report, not even a hint of its value.
//   O5  Reports and pid files are written whole or not at all, mode 0600.
//   O6  A pid file belongs to the directory it was written for (device and
//       inode): in a copy of a root it names nobody.
//   O7  One verb at a time changes what runs on a root: OpsLock.
//   O8  What root makes below a user's root is that user's.
//   O9  A report from before is believed as a pid file is: what it names and is
//       not that process any more is left alone.
//
// tests/tools/ops_test.cc has a test for each.

#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "queue/base/result.h"
#include "tools/process.h"

namespace machina {

constexpr int kOpsOk = 0;
constexpr int kOpsPartial = 1;
constexpr int kOpsUsage = 2;
constexpr int kOpsNotRunning = 3;

// What a pid file holds.
struct PidFile {
  std::string role;  // "serve" or "pool"
  ProcessId id;
  // The root's directory; write_pid_file fills it in.
  std::uint64_t root_device = 0, root_inode = 0;
  std::string version, started_at;
  // Of a server only: where it listens, and what starts it again.
  std::string host;
  int port = 0;
  int workers = 0;
  std::string profile;
  std::string cwd;
  std::vector<std::string> argv;         // without the program
  std::vector<std::string> environment;  // MACHINA_*, no secret's value
  std::vector<std::string> secrets;      // names of those it held itself
  std::string supervisor;                // "systemd", or empty
  // What holds: each variable's value; of a secret "set", or empty.
  std::map<std::string, std::string> settings;
};

std::string ops_dir(const std::string& root);

// Atomically replaces <root>/ops/<role>.pid. Call with the root's lock held.
Result<void> write_pid_file(const std::string& root, const PidFile& file);
// Code::not_found where there is none, Code::corrupt where it is not one.
Result<PidFile> read_pid_file(const std::string& root, const std::string& role);
// Only what this very process wrote, for this root.
void remove_pid_file(const std::string& root, const std::string& role);

// Held by start, kill and restart while they change what runs on a root (O7).
// The kernel lets it go with its process, however that ends.
class OpsLock {
 public:
  // Code::conflict where another has held it for `wait_ms`, Code::not_found
  // where there is no <root>/ops (nothing was ever started there), Code::io
  // where it cannot be opened or locked.
  static Result<OpsLock> take(const std::string& root, int wait_ms);
  OpsLock(OpsLock&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  OpsLock& operator=(OpsLock&&) = delete;
  ~OpsLock();

 private:
  explicit OpsLock(int fd) : fd_(fd) {}
  int fd_;
};

// A process of a root.
struct OurProcess {
  Process process;
  std::string role;  // machina_serve, machina_pool, machina_child
};

struct Detected {
  std::string root;
  bool missing = false;  // there is no such directory
  std::optional<PidFile> serve_file, pool_file;
  std::optional<OurProcess> serve, pool;
  std::vector<OurProcess> children;  // spawner, workers, sandboxes
  // Pid files whose process is not ours (any more), and why.
  struct Stale {
    std::string file, why;
    pid_t pid = 0;
  };
  std::vector<Stale> stale;
  bool running() const { return serve || pool; }
};

// Looks; changes nothing. Where there is no such directory nothing runs; fails
// with Code::invalid where it is something else, Code::io where it is closed.
Result<Detected> detect(const std::string& root);
// The same from a report that detect() gave earlier (to_json): of what it names
// the server and the pool that still are those processes, by number, start time
// in this boot, user and executable; others are `stale`, with why. The report
// must be about this root, and of its owner, root or ourselves, and nobody
// else's to write. Code::invalid says what is wrong with it.
Result<Detected> detect_from(const std::string& root, const std::string& path);
// 0 server and pool as configured, 1 only one of them, 3 neither.
int detect_exit(const Detected& found);

struct Killed {
  std::vector<Process> targets;
  std::vector<pid_t> terminated;  // ended after TERM
  std::vector<pid_t> killed;      // ended after KILL
  struct Left {
    pid_t pid;
    std::string why;
  };
  std::vector<Left> left;
  std::int64_t took_ms = 0;
};

// TERM to the server, which drains and sends its pool away; to a pool without
// one, and to one whose server has done nothing for half the time; what is left
// after `term_ms` gets KILL. Returns as soon as all have ended, their children
// too.
Killed kill_all(const Detected& found, std::int64_t term_ms);
// Sends `signal` to the pool of `root`, if it runs. Does not wait.
// KILL is the operator's: pool.lock says so first, so that no job is charged
// with the end of its worker.
void signal_pool(const std::string& root, int signal);
// That line of pool.lock.
constexpr std::string_view kAskedToLeave = "asked to leave";

// --- reports ---

nlohmann::ordered_json to_json(const Detected& found);
nlohmann::ordered_json to_json(const Killed& killed);
std::string to_text(const Detected& found);
std::string to_text(const Killed& killed, const std::string& root);

// <root>/ops/<name>, O5. A directory that is no server's root gets none.
Result<void> write_report(const std::string& root, const std::string& name,
                          const std::string& text);
void remove_report(const std::string& root, const std::string& name);

}  // namespace machina
