// serve: from settings to a running server. The list of what happens at a
// start, in order: settings, refusals, root, secrets out of reach, run.

#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "queue/base/line_file.h"
#include "server/api/server.h"
#include "tools/cli/cli.h"
#include "tools/cli/ops_common.h"
#include "tools/cli/pool_settings.h"
#include "tools/cli/serve_events.h"
#include "tools/cli/start_conditions.h"
#include "tools/ops.h"
#include "tools/promises.h"
#include "tools/root.h"
#include "tools/trust.h"
#include "workers/kinds/kinds.h"
#include "workers/sandbox/sandbox.h"

namespace machina::cli {
namespace {

constexpr Millis kLastWordsMs = 2000;  // to a log that nobody reads

struct ServeOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string port_file;
  bool print_config = false, check = false, unsafe_fs = false, no_pool = false;
};

void print_config(const Config& config, bool json) {
  if (!json) {
    std::cout << config.print();
    return;
  }
  nlohmann::ordered_json all;
  for (const auto& row : config.table()) {
    const auto& value = config.values().at(row.name);
    bool secret = row.type == Setting::Type::secret && !value.text.empty();
    all[row.name] = {{"value", secret ? "(set)" : value.text},
                     {"origin", value.origin}};
    if (!row.has_effect()) all[row.name]["no_effect_yet"] = true;
  }
  std::cout << all.dump(2) << "\n";
}

// What this build and these settings know of the built-in kinds.
std::map<std::string, KindFacts> kind_facts(const Config& config,
                                            const std::string& root) {
  const KindMap all =
      kinds_of(built_in_families(), kind_settings(config, root));
  return {all.begin(), all.end()};
}

void fill_limits(const SettingValues& set, ServerOptions* server) {
  server->max_body_bytes = set.api_max_body_bytes;
  server->max_attempts = set.max_attempts;
  server->retry_min_ms = set.retry_min_ms;
  server->retry_max_ms = set.retry_max_ms;
  server->dedup_ttl_ms = set.dedup_ttl_ms;
  server->drain_ms = set.drain_ms;
  server->scan_ms = set.serve_scan_ms;
  server->min_level = set.sandbox_min_level;
  server->max_memory_mb = set.sandbox_max_memory_mb;
  server->max_cpu_ms = set.sandbox_max_cpu_ms;
  server->max_pids = set.sandbox_max_pids;
  server->max_disk_mb = set.sandbox_max_disk_mb;
  server->max_output_bytes = set.sandbox_max_output_bytes;
}

void fill_gate(const ApiSettings& set, ServerOptions* server) {
  server->api_token = set.api_token;
  server->hmac_secret = set.api_hmac_secret;
  server->both_credentials = set.api_credentials == "all";
  server->hmac_window_ms = set.api_hmac_ttl_sec * 1000;
  server->rpm = set.api_rpm;
  server->enqueue_rpm = set.api_enqueue_rpm;
  server->run_sync_rpm = set.api_runsync_rpm;
  server->connections_max = set.api_connections;
  server->connections_per_address = set.api_connections_per_address;
}

void fill_shard(const QueueSettings& set, const std::string& root,
                ShardOptions* shard) {
  shard->core.fsync = set.wal_fsync;
  shard->log.fsync = set.wal_fsync;
  shard->core.queue_max = set.queue_max;
  shard->core.lease_ms = set.lease_ms;
  shard->checkpoint_ms = set.wal_checkpoint_ms;
  shard->body_cache_bytes = set.payload_cache_bytes;
  shard->history_lag_max_bytes = set.history_lag_max_bytes;
  shard->history_dir = root + "/history";
}

ServerOptions::Access access_of(const std::string& word) {
  return word == "all"   ? ServerOptions::Access::all
         : word == "off" ? ServerOptions::Access::off
                         : ServerOptions::Access::sampled;
}

// Where this host has not the process numbers for as many workers.
std::string fewer_pids(const SettingValues& set) {
  const sandbox::PidsBound bound = sandbox::pids_bound();
  const std::uint64_t part = sandbox::pids_part(bound, set.workers);
  if (part >= set.sandbox_max_pids) return "";
  return "; " + std::to_string(set.sandbox_max_pids) +
         " processes to a job (MACHINA_SANDBOX_MAX_PIDS; " + bound.what +
         " is " + std::to_string(part) + " for each of " +
         std::to_string(set.workers) + " workers)";
}

ServerOptions server_options(const Config& config, const Root& root) {
  const SettingValues& set = config.typed();
  ServerOptions server;
  server.root = root.path;
  server.socket_path = root.socket_path;
  server.host = set.host;
  server.port = set.port;
  server.prod = config.prod();
  server.io_uring = set.io_uring;
  fill_gate(set, &server);
  server.kinds_allowed = set.kinds_allowed;
  server.kinds = kind_facts(config, root.path);
  server.repo_roots = repo_roots(config, root.path);
  fill_limits(set, &server);
  fill_shard(set, root.path, &server.shard);
  server.workers = set.workers;
  server.pool_argv = {self_exe(), "pool", "--root", root.path};
  server.pool_env =
      child_environment(config, Setting::kPool | Setting::kWorker);
  server.not_promised = not_promised(config) + fewer_pids(set);
  server.access = access_of(set.log_access);
  server.reopen_on_hangup = !set.log_file.empty();
  return server;
}

// Nobody who is not root reads our memory, by ptrace, /proc or a core file:
// the API token and the lease secret are in it.
void close_ranks(bool prod) {
  ::umask(077);
  ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  if (prod) {
    rlimit none{0, 0};
    ::setrlimit(RLIMIT_CORE, &none);
  }
}

// Whether a server would start here just now, or take over from the one that
// runs.
int check(const ServeOptions& options, const Config& config) {
  long takes_over = 0;
  const StartFault fault =
      place_fault(*options.settings, config, options.unsafe_fs, options.no_pool,
                  &takes_over);
  if (!fault.what.empty()) return fail(fault.exit, fault.what);
  if (::isatty(STDOUT_FILENO) == 0) return kOk;  // a script has the exit code
  std::cout << (takes_over != 0
                    ? "a server with these settings would take over from "
                      "process " +
                          std::to_string(takes_over)
                    : std::string("a server with these settings would start"))
            << "\n";
  return kOk;
}

int serve(const ServeOptions& options) {
  ServiceEnvironment manager = take_service_environment();
  auto config = load(*options.settings);
  if (!config) return kUsage;
  if (options.print_config) {
    print_config(*config, options.settings->json);
    return kOk;
  }
  auto refusals = settings_faults(*config);
  for (const auto& line : refusals) fail(kUsage, line);
  if (!refusals.empty()) return kUsage;
  for (const auto& line : config->open_secrets()) {
    std::cerr << "warning: " << line << "\n";
  }
  if (!options.port_file.empty()) {
    auto ok = check_trusted("--port-file", options.port_file, false, false);
    if (!ok) return fail(kUsage, ok.error().what);
  }
  if (options.check) return check(options, *config);
  if (manager.sockets.empty()) {
    if (auto ok = probe_port(*config); !ok) {
      return fail(kUsage, ok.error().what);
    }
  }
  auto root =
      prepare_root(config->typed().root, config->prod(), options.unsafe_fs);
  if (!root) return fail(kUsage, root.error().what);
  for (const auto& line : root->warnings)
    std::cerr << "warning: " << line << "\n";
  ServeStart start = remember_start(std::move(manager));
  start.root = root->path;
  scrub_secrets_from_environment();
  close_ranks(config->prod());
  auto lines = log_file(*config);
  if (!lines) {
    return fail(kUsage, log_file_fault(lines.error().what));
  }
  set_logger(logger_options(*config, "server"));
  start_logger(std::move(*lines));
  ServerOptions server = server_options(*config, *root);
  server.port_file = options.port_file;
  if (options.no_pool) server.pool_argv.clear();
  for (const auto& each : start.manager.sockets) {
    server.inherited.push_back({each.fd, each.name});
  }
  server.events = serve_events(*config, std::move(start));
  int code = run_server(server);
  stop_logger(kLastWordsMs);
  return code;
}

}  // namespace

void add_serve(Verb& app) {
  auto options = std::make_shared<ServeOptions>();
  Verb verb = app.add_verb("serve", "Run the server");
  auto& settings = options->settings;
  add_setting(verb, settings, "--host", "MACHINA_HOST", "address to bind");
  add_setting(verb, settings, "--port", "MACHINA_PORT", "0: any free one");
  add_setting(verb, settings, "--workers", "MACHINA_WORKERS",
              "0..64; 0 only accepts");
  add_setting(verb, settings, "--root", "MACHINA_ROOT", "where all state is");
  add_setting(verb, settings, "--profile", "MACHINA_PROFILE", "dev or prod");
  add_common(verb, settings);
  verb.add_flag("--print-config", options->print_config,
                "show each value and its origin, and exit");
  verb.add_flag("--check", options->check,
                "say whether a server would start with these settings, and "
                "exit");
  verb.add_flag("--no-pool", options->no_pool,
                "start no pool: one is, or will be, started beside this "
                "server (machina pool)");
  verb.add_flag("--unsafe-fs", options->unsafe_fs,
                "accept NFS, overlay or tmpfs in the prod profile");
  verb.add_option("--port-file", options->port_file,
                  "write the bound port there");
  verb.run([options] { return serve(*options); });
}

}  // namespace machina::cli
