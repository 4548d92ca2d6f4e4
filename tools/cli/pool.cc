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
  auto root = prepare_root(config->text("MACHINA_ROOT"), config->prod(), true);
  if (!root) return fail(kUsage, root.error().what);
  ::umask(077);

  PoolOptions options;
  options.root = root->path;
  options.socket_path = root->socket_path;
  options.self_exe = self_exe();
  options.count = static_cast<int>(config->number("MACHINA_WORKERS"));
  options.orphan_ms = config->number("MACHINA_POOL_ORPHAN_MS");
  options.drain_ms = config->number("MACHINA_DRAIN_MS");
  options.lease_ms = config->number("MACHINA_LEASE_MS");
  options.slot_uid_base =
      static_cast<std::uint32_t>(config->number("MACHINA_SLOT_UID_BASE"));
  options.seccomp_enable = config->flag("MACHINA_SECCOMP_ENABLE");
  options.min_level =
      static_cast<Level>(config->number("MACHINA_SANDBOX_MIN_LEVEL"));
  options.pids_max =
      static_cast<std::uint64_t>(config->number("MACHINA_SANDBOX_MAX_PIDS"));
  options.repo_roots = repo_roots(*config, root->path);
  options.worker_env = pool_environment(*config);
  options.log_max_bytes =
      static_cast<std::uint64_t>(config->number("MACHINA_LOG_MAX_BYTES"));
  options.log_total_bytes =
      static_cast<std::uint64_t>(config->number("MACHINA_LOG_TOTAL_BYTES"));
  say_as(say_options(*config, "pool"));
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
