// tools/cli/ops_common.h
//
// What the verbs of `machina ops` share: their options, how a server is
// started in the background, and how it is asked whether it is well.

#pragma once

#include <sys/types.h>

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "tools/cli/cli.h"
#include "tools/ops.h"
#include "tools/service_manager.h"

namespace machina::cli {

using OpsJson = nlohmann::ordered_json;

struct OpsOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  bool dry_run = false, text = false, unsafe_fs = false, replace_pool = false;
  double term_seconds = 8, wait_seconds = 60, handover_seconds = 20;
  int min_free_mb = 512;
  std::string stack_id;
  std::string from;               // kill: a report of detect
  std::string launcher = "auto";  // start: auto, nohup or systemd
  bool force = false;             // start: end what runs there first
};

// JSON on standard output, or `text` with --text; kept under `file` below the
// root's ops/ unless --dry-run or the name is empty. Returns `exit`.
int give_report(const OpsOptions& options, const std::string& root,
                const std::string& file, const OpsJson& json,
                const std::string& text, int exit);

// A server in the background: a session of its own, its output appended to
// <root>/ops/serve.log. Where nobody has set MACHINA_LOG_FILE it is set to that
// file too, so that the server itself keeps it within its bounds.
struct Launch {
  std::string root;
  std::vector<std::string> argv;         // with the program
  std::vector<std::string> environment;  // all of it
  std::string cwd;                       // empty: ours
  std::vector<NamedFd> sockets;
};
class Launched {
 public:
  static Result<Launched> start(const Launch& launch);
  pid_t pid() const { return pid_; }
  // Its exit code once it has ended (128 + signal), else -1.
  int ended();
  // What it has printed since its start; the last of it.
  std::string log_tail() const;
  const std::string& log_path() const { return log_path_; }

 private:
  pid_t pid_ = 0;
  int code_ = -1;
  std::string log_path_;
  off_t log_from_ = 0;
};

// Whether a server would start so, or take over from the one that runs there:
// `serve --check` with its settings. The Error is what it said.
Result<void> try_launch(Launch trial);

// The environment without what a service manager gave to us alone.
std::vector<std::string> child_environment();

// GET `path` of the server at `where` (a socket's path or an URL). status 0:
// nobody answered, and `body` says why.
struct Probe {
  long status = 0;
  std::string body;
};
Probe probe(const Settings& settings, const std::string& where,
            const std::string& path, long timeout_ms = 3000);

// All that healthcheck looks at, looked at again until all is well or
// --wait-seconds are over, which no answer is waited for beyond: what has just
// started needs a moment.
struct Health {
  std::shared_ptr<OpsJson> json;
  int exit = kOpsOk;
  std::string text;
};
Health await_health(const OpsOptions& options, const Detected& found);

// Waits until the server answers ready, it ends, or the time is up. Says how
// it goes on standard error.
struct Ready {
  bool ready = false;
  std::string why;  // why not
  std::int64_t took_ms = 0;
};
Ready await_ready(const OpsOptions& options, const std::string& socket,
                  Launched* launched);

// The workers as the server knows them. It is ready to take jobs without any,
// so whoever starts it is told.
struct WorkersThere {
  bool known = false;  // the server said so
  int configured = 0, reported = 0;
  int ready = 0;   // have proven their isolation
  int level = -1;  // the best of what they have proven; -1: none has yet
  bool all() const { return known && ready >= configured; }
  bool none() const { return !known || (ready == 0 && configured > 0); }
  OpsJson json() const;
  std::string text() const;
};
WorkersThere look_at_workers(const OpsOptions& options,
                             const std::string& socket, long timeout_ms);
// Until all are ready, for at most `limit_ms`.
WorkersThere await_workers(const OpsOptions& options, const std::string& socket,
                           std::int64_t limit_ms);

// How long a verb waits for another that changes something on its root.
constexpr int kOpsLockWaitMs = 3000;

// The systemd unit that ops/install.sh installs: why it is not the one that
// serves `root`, or nothing. ops_unit.cc.
struct Unit {
  std::string why_not;
};
Unit look_at_unit(const std::string& root);
Result<void> start_unit(bool restart);

int ops_start(const OpsOptions& options);    // ops.cc
int ops_restart(const OpsOptions& options);  // ops_restart.cc

std::int64_t steady_ms();

}  // namespace machina::cli
