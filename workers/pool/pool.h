// workers/pool/pool.h
//
// The pool: one process per host that forks the spawner, then starts, watches,
// replaces and scales workers, and tells the server by POST
// /v1/pools/{id}/sync. It outlives a server; it leaves when the server has been
// gone for orphan_ms, when the root is gone, or when the server says drain.
//
// A worker is started as
//   self_exe worker --name NAME --channel FD --facts FD --root ROOT
// with exactly `worker_env` as its environment: no secret is in either.
//
//   P1  One pool per root (<root>/pool.lock).
//   P2  The spawner is forked first; after that, as root, the pool is uid and
//       gid slot_uid_base-1 without a capability, read back.
//   P3  A worker's leases are reported `gone` only when its slot is proven
//       empty: local attempts never overlap.
//   P4  A worker that dies early is replaced ever more slowly, up to 10 s.
//   P5  Nothing of the pool outlives it: workers die with it, sandboxes with
//       the spawner. The pool that comes next waits for that, and reports the
//       workers of one that was killed, whose names it finds in pool.lock.
//   P6  <root>/ops/pool.pid says which process it is (tools/ops.h), from when
//       the lock is its own until it leaves.
//   P7  Where no job can run here it says so and stops trying: after three
//       workers in a row that could make no sandbox it starts one a minute, to
//       see whether that still is so, and tells the server why (`trouble` in
//       its sync). Where it cannot serve at all it writes that to
//       <root>/pool.trouble, a line of reason and one of remedy, and ends
//       with 69; its server starts it a few times, then one a minute.
//   P8  A worker that the pool killed because it was asked to leave, by TERM,
//   by
//       the server's drain or by being told twice, is reported `ended`: its job
//       loses no attempt, even where the pool is killed before it can say so
//       (pool.lock has it). One that died by itself is `gone` even then.
//   P9  <root>/pool.log holds what pool, spawner and workers say; the pool
//   alone
//       writes it, within its bounds; nobody waits for it
//       (queue/base/logger.h).

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "queue/base/job.h"
#include "tools/service_manager.h"

namespace machina {

struct PoolOptions {
  std::string root;         // absolute
  std::string socket_path;  // the server's Unix socket
  std::string self_exe;     // to start workers: `machina worker --channel FD`
  int count = 0;            // workers until the server says otherwise
  Millis orphan_ms = 60'000;
  Millis drain_ms = 30'000;  // running jobs may finish for so long
  Millis lease_ms = 30'000;
  std::uint32_t slot_uid_base = 200'000;
  bool seccomp_enable = true;
  Level min_level = 0;
  std::uint64_t pids_max = 4096;  // the most that a job may ask for
  std::vector<std::string> repo_roots;
  std::uint64_t log_max_bytes = 128u << 20;  // of <root>/pool.log, and of it
  std::uint64_t log_total_bytes = 1u << 30;  // with its predecessors
  std::vector<std::string> worker_env;  // what workers are given: MACHINA_*
  std::string version;                  // for the pid file
  ServiceEnvironment manager;           // told when it is ready, and leaves
};

// Until told to leave. Exit code: 0, 75 where another pool has pool.lock, 69
// where it cannot serve here (P7).
int run_pool(const PoolOptions& options);

}  // namespace machina
