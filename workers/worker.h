// workers/worker.h
//
// One worker: leases a job over HTTP, runs it in its slot's sandbox, reports.
// It holds no privilege; connections to the server and sandboxes come from the
// spawner through one inherited channel. Heartbeats are its own, never the
// job's.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "queue/job.h"

namespace machina {

struct WorkerOptions {
  std::string name;     // unique per process: <pool>-<slot>-<start>
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
};

int run_worker(const WorkerOptions& options);

}  // namespace machina
