// server/server.h
//
// The HTTP face of one shard: a libuv loop that owns connections, parses with
// llhttp, turns bytes into requests for the shard and its responses into bytes.
// It decides nothing about jobs; that is queue/core.h.
//
//   V1  No success is sent before the shard says that it is durable (H1).
//   V2  Every input bound has a name, and an answer that names field, value and
//       bound; nothing is half done.
//   V3  No call on the loop blocks: files, SQLite and DNS live elsewhere.
//   V4  Credentials are compared in constant time and never logged.

#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "queue/job.h"
#include "queue/result.h"
#include "queue/shard.h"

namespace machina {

// What the server knows of a kind that a built-in handler serves; main takes
// the table from workers/kinds.
struct KindFacts {
  // Code::invalid; `what` is "<field>: <what is wrong, value and bound>", the
  // field relative to the payload ("argv", "test.runner").
  std::function<Result<void>(const std::string& payload_json)> check;
  Millis timeout_ms = 120'000;
};

struct ServerOptions {
  std::string root;  // absolute; exists, ours, 0700
  std::string host = "127.0.0.1";
  int port = 8080;          // 0: any free one
  std::string port_file;    // where the bound port is written, or empty (tests)
  std::string socket_path;  // <root>/machina.sock
  bool prod = false;
  std::string version = MACHINA_VERSION;

  std::string api_token;  // empty: none. With none, host must be loopback.
  std::uint64_t max_body_bytes = 2u << 20;
  int connections_max = 4096;

  std::vector<std::string> kinds_allowed;  // patterns; empty: all
  std::map<std::string, KindFacts> kinds;  // the built-in ones
  int max_attempts = 5;
  Millis retry_min_ms = 1000, retry_max_ms = 300'000;
  Millis dedup_ttl_ms = 300'000;
  Millis drain_ms = 30'000;
  Millis scan_ms = 150;
  Level min_level = 0;  // of built-in kinds
  // Ceilings of a job's `sandbox` member; 0: none.
  std::uint64_t max_memory_mb = 0, max_cpu_ms = 0, max_pids = 0,
                max_disk_mb = 0, max_output_bytes = 0;

  int workers = 0;                     // the pool's target at start
  std::vector<std::string> pool_argv;  // how to start a pool, or empty
  std::vector<std::string> pool_env;   // its whole environment

  ShardOptions shard;
  std::string not_promised;  // the line printed at start
};

// Runs until drained or handed over. Returns the exit code of api.md: 0 after a
// drain, 2 configuration, 65 damage, 74 poisoned, 75 locked; says why on
// stderr. Prints "ready" lines to stderr as it goes.
int run_server(const ServerOptions& options);

// The same with its shard given: what tests use, and what opens <root>/queue
// in run_server(options). Errors of `open_shard` become exit codes as above.
struct ServerHooks {
  std::function<Result<std::unique_ptr<Shard>>(RecoveryReport*)> open_shard;
  std::function<void(int port)> listening;  // once, on the server's thread
  bool signals = true;                      // take SIGTERM, SIGINT, SIGUSR2
};
int run_server(const ServerOptions& options, const ServerHooks& hooks);

}  // namespace machina
