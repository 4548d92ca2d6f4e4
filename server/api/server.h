// server/api/server.h
//
// The HTTP face of one shard: a libuv loop that owns connections, parses with
// llhttp, turns bytes into requests for the shard and its responses into bytes.
// It decides nothing about jobs; that is queue/core/core.h.
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

#include "queue/base/job.h"
#include "queue/base/kind.h"
#include "queue/base/result.h"
#include "queue/shard/shard.h"
#include "server/auth/principal.h"
#include "server/http/listening.h"

namespace machina {

// How the server is, for whoever watches over it.
struct ServerPulse {
  std::string unready;  // why it is not ready; empty: it is
  bool draining = false, handover = false;
  bool log_stuck = false;  // a batch has not become durable for too long
};

// What the one who runs the server is told and asked, on the server's thread;
// none of it may block.
struct ServerEvents {
  std::function<void()> locked;  // the root is ours; recovery begins
  std::function<void(int port, const std::vector<ListeningSocket>&)> listening;
  std::function<void(const ServerPulse&)> pulse;  // about every scan_ms
  // At a handover: takes copies of the sockets for the next server. True: it
  // has them, and they are to stay reachable.
  std::function<bool(const std::vector<ListeningSocket>&)> pass_sockets;
  // Asks the pool of this root to leave; `at_once`: ends it with its jobs.
  std::function<void(bool at_once)> end_pool;
  std::function<void()> left;  // last; the root is still ours
};

struct ServerOptions {
  std::string root;  // absolute; exists, ours, 0700
  std::string host = "127.0.0.1";
  int port = 8080;          // 0: any free one
  std::string port_file;    // where the bound port is written, or empty (tests)
  std::string socket_path;  // <root>/machina.sock
  // From the server before, or a service manager: taken where they are what
  // host, port and socket_path ask for, else closed.
  std::vector<ListeningSocket> inherited;
  bool prod = false;
  std::string version = MACHINA_VERSION;

  // Empty: none. With neither, host must be loopback.
  std::string api_token, hmac_secret;
  bool both_credentials = false;  // where both are set, each request needs both
  Millis hmac_window_ms = 60'000;
  // Per minute and client; 0: none.
  std::uint32_t rpm = 0, enqueue_rpm = 0, run_sync_rpm = 0;
  std::uint64_t max_body_bytes = 2u << 20;
  int connections_max = 4096;
  int connections_per_address = 1024;
  bool io_uring = true;  // where the kernel has it and lets us

  std::vector<std::string> kinds_allowed;  // patterns; empty: all
  std::map<std::string, KindFacts> kinds;  // the built-in ones
  std::vector<std::string> repo_roots;     // absolute: one repo, two spellings
  int max_attempts = 5;
  Millis retry_min_ms = 1000, retry_max_ms = 300'000;
  Millis dedup_ttl_ms = 300'000;
  Millis drain_ms = 30'000;
  Millis resolve_ms = 2000;  // for what a kind looks up on the host
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

  // Which requests are told of in the log (server/api/access.cc).
  enum class Access : std::uint8_t { off, sampled, all };
  Access access = Access::sampled;
  bool reopen_on_hangup = false;  // SIGHUP: the log file was moved away
  ServerEvents events;
};

// Runs until drained or handed over. Returns the exit code of api.md: 0 after a
// drain, 2 configuration, 65 damage, 74 poisoned, 75 locked; says why, and
// that it is ready, as it goes (queue/base/logger.h).
int run_server(const ServerOptions& options);

// The same with its shard given: what tests use, and what opens <root>/queue
// in run_server(options). Errors of `open_shard` become exit codes as above.
struct ServerHooks {
  std::function<Result<std::unique_ptr<Shard>>(RecoveryReport*)> open_shard;
  std::function<void(int port)> listening;  // once, on the server's thread
  bool signals = true;                      // take SIGTERM, SIGINT, SIGUSR2
  // Tokens beside the configured one: other tenants' (tests make them; the
  // configuration cannot yet).
  std::vector<Credential> credentials;
};
int run_server(const ServerOptions& options, const ServerHooks& hooks);

}  // namespace machina
