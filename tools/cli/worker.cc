// worker: one worker of a pool, started by it with a channel to the spawner.

#include "workers/worker/worker.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cstdlib>

#include "queue/base/job.h"
#include "tools/cli/cli.h"
#include "tools/cli/pool_settings.h"
#include "workers/kinds/kinds.h"

namespace machina::cli {
namespace {

struct Given {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string server, name = "worker", kinds;
  int channel = -1, facts = -1;
};

Result<std::vector<std::string>> patterns(const std::string& text) {
  std::vector<std::string> all;
  std::size_t from = 0;
  while (from < text.size()) {
    std::size_t to = std::min(text.find(',', from), text.size());
    all.push_back(text.substr(from, to - from));
    if (!valid_kind_pattern(all.back())) {
      return Error{Code::invalid, "--kinds: \"" + all.back() +
                                      "\" must be a kind, or one that ends "
                                      "in .*"};
    }
    from = to + 1;
  }
  return all;
}

int worker(const Given& given) {
  if (!given.server.empty()) {
    return fail(kUsage,
                "--server: a worker on another host comes later; a "
                "pool (machina pool) starts workers here");
  }
  if (given.channel < 3 || ::fcntl(given.channel, F_GETFD) < 0) {
    return fail(kUsage, "--channel: " + std::to_string(given.channel) +
                            " is no open descriptor; workers are started by "
                            "machina pool");
  }
  auto config = load(*given.settings);
  if (!config) return kUsage;
  auto kinds = patterns(given.kinds);
  if (!kinds) return fail(kUsage, kinds.error().what);
  ::umask(077);

  const std::string& root = config->typed().root;
  WorkerOptions options;
  options.name = given.name;
  // Not an argument: those are for everybody on the host to read.
  if (const char* session = std::getenv(kWorkerSessionVariable)) {
    options.session = session;
    ::unsetenv(kWorkerSessionVariable);
  }
  options.channel_fd = given.channel;
  options.facts_fd = given.facts;
  options.root = root;
  options.kinds = *kinds;
  const SettingValues& set = config->typed();
  options.lease_ms = set.lease_ms;
  options.min_level = set.sandbox_min_level;
  options.repo_roots = repo_roots(*config, root);
  options.prod = config->prod();
  options.shell_allowed_exe = set.shell_allowed_exe;
  options.shell_timeout_ms = set.shell_timeout_ms;
  options.shell_stdout_max = set.shell_stdout_max;
  options.shell_stderr_max = set.shell_stderr_max;
  LoggerOptions say = logger_options(*config, "worker");
  say.who = options.name;
  set_logger(say);
  return run_worker(options);
}

}  // namespace

void add_worker(Verb& app) {
  auto given = std::make_shared<Given>();
  Verb verb = app.add_verb("worker", "One worker of a pool");
  verb.add_option("--server", given->server, "URL (not built yet)");
  verb.add_option("--channel", given->channel, "descriptor to the spawner");
  verb.add_option("--facts", given->facts, "descriptor to the pool");
  verb.add_option("--name", given->name, "unique per process");
  verb.add_option("--kinds", given->kinds, "patterns, by comma");
  add_setting(verb, given->settings, "--root", "MACHINA_ROOT",
              "the server's root");
  add_setting(verb, given->settings, "--profile", "MACHINA_PROFILE",
              "dev or prod");
  add_common(verb, given->settings);
  verb.run([given] { return worker(*given); });
}

}  // namespace machina::cli
