// workers/worker/worker.h
//
// One worker: leases a job over HTTP, runs it in its slot's sandbox, reports.
// It holds no privilege; connections to the server and sandboxes come from the
// spawner through one inherited channel. Heartbeats are its own, never the
// job's.
//
//   lease one of any kind --> warmed?    run it, then complete and lease up to
//                         |              64 warmed ones in one trip, for a
//                         while
//                         +> sandboxed?  run it, complete it, ask again
//
//   K1  One sandboxed job at a time; warmed ones in turn.
//   K2  An end is reported until the server answers: 200, or that the lease is
//       another's. A server that is away delays it and loses nothing.
//   K3  A cancelled attempt is over within 2 s and a little; a lost one too,
//       and its end is told to nobody.
//   K4  A job above this worker's level is refused before it starts.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "queue/base/job.h"
#include "workers/kinds/kinds.h"
#include "workers/sandbox/sandbox.h"

namespace machina {

// In a worker's environment: WorkerOptions::session.
constexpr const char* kWorkerSessionVariable = "WORKER_SESSION";

struct WorkerOptions {
  std::string name;     // unique per process: <pool>-<slot>-<start>
  std::string session;  // the pool's secret; empty: leases only expire
  int channel_fd = -1;  // to the spawner
  int facts_fd = -1;    // a pipe to the pool: JSON lines; -1: none
  std::string root;
  std::vector<std::string> kinds;  // patterns; empty: all built-in
  Millis lease_ms = 30'000;
  Level min_level = 0;
  std::vector<std::string> repo_roots;
  bool prod = false;
  std::vector<std::string> shell_allowed_exe;  // empty: the profile's rule
  Millis shell_timeout_ms = 30'000;
  std::uint64_t shell_stdout_max = 131'072;  // bytes of each in a result
  std::uint64_t shell_stderr_max = 131'072;
  Families families = built_in_families();
};

// Attaches to the slot, runs the canary, serves until it is told to leave.
// SIGTERM: takes nothing new, finishes what it has; again: gives it back.
// Exit code: 0, 1, or kExitNoSandbox (P7 of workers/pool/pool.h).
constexpr int kExitNoSandbox = 69;
int run_worker(const WorkerOptions& options);

// The same without process-wide effects, for run_worker and tests.
class Worker {
 public:
  Worker(const WorkerOptions& options, sandbox::Slot& slot,
         sandbox::Report report);
  ~Worker();
  void run();
  // From any thread.
  void stop();         // finish what is held, then return from run()
  void release_now();  // stop(), and give back what is held

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace machina
