// workers/pool.h
//
// The pool: one process per host that forks the spawner, then starts, watches,
// replaces and scales workers, and tells the server by POST /v1/pools/{id}/sync.
// It outlives a server; it leaves when the server has been gone for orphan_ms,
// when the root is gone, or when the server says drain.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "queue/job.h"

namespace machina {

struct PoolOptions {
  std::string root;         // absolute
  std::string socket_path;  // the server's Unix socket
  std::string self_exe;     // to start workers: `machina worker --channel FD`
  int count = 0;            // workers until the server says otherwise
  Millis orphan_ms = 60'000;
  Millis lease_ms = 30'000;
  std::uint32_t slot_uid_base = 200'000;
  bool seccomp_enable = true;
  Level min_level = 0;
  std::vector<std::string> repo_roots;
  std::vector<std::string> worker_env;  // what workers are given: MACHINA_*
};

// Until told to leave. Exit code: 0, 75 where another pool has pool.lock.
int run_pool(const PoolOptions& options);

}  // namespace machina
