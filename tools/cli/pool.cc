// pool: the process that keeps a host's workers. `serve` starts it; a unit
// file may do so instead.

#include "workers/pool/pool.h"

#include <sys/stat.h>

#include "tools/cli/cli.h"
#include "tools/cli/pool_settings.h"
#include "tools/root.h"

namespace machina::cli {
namespace {

int pool(const Settings& settings, const std::string& server) {
  if (!server.empty()) {
    return fail(kUsage,
                "--server: a pool on another host comes later; here "
                "the pool finds <root>/machina.sock (--root)");
  }
  ServiceEnvironment manager = take_service_environment();
  auto config = load(settings);
  if (!config) return kUsage;
  scrub_secrets_from_environment();
  // The server that shares this root has judged its file system already.
  auto root = prepare_root(config->typed().root, config->prod(), true);
  if (!root) return fail(kUsage, root.error().what);
  ::umask(077);

  PoolOptions options;
  options.root = root->path;
  options.socket_path = root->socket_path;
  options.self_exe = self_exe();
  const SettingValues& set = config->typed();
  options.count = set.workers;
  options.orphan_ms = set.pool_orphan_ms;
  options.drain_ms = set.drain_ms;
  options.lease_ms = set.lease_ms;
  options.slot_uid_base = set.slot_uid_base;
  options.seccomp_enable = set.seccomp_enable;
  options.min_level = set.sandbox_min_level;
  options.pids_max = set.sandbox_max_pids;
  options.repo_roots = repo_roots(*config, root->path);
  options.worker_env = child_environment(*config, Setting::kWorker);
  options.log_max_bytes = set.log_max_bytes;
  options.log_total_bytes = set.log_total_bytes;
  set_logger(logger_options(*config, "pool"));
  options.version = MACHINA_VERSION;
  options.manager = std::move(manager);
  return run_pool(options);
}

}  // namespace

void add_pool(Verb& app) {
  auto settings = std::make_shared<Settings>();
  auto server = std::make_shared<std::string>();
  Verb verb = app.add_verb("pool", "Keep this host's workers");
  verb.add_option("--server", *server, "URL (not built yet)");
  add_setting(verb, settings, "--root", "MACHINA_ROOT", "the server's root");
  add_setting(verb, settings, "--workers", "MACHINA_WORKERS",
              "until the server says otherwise");
  add_setting(verb, settings, "--profile", "MACHINA_PROFILE", "dev or prod");
  add_common(verb, settings);
  verb.run([settings, server] { return pool(*settings, *server); });
}

}  // namespace machina::cli
