#include "tools/cli/pool_settings.h"

#include "tools/trust.h"

namespace machina::cli {
namespace {

constexpr const char* kPoolVariables[] = {
    "MACHINA_LEASE_MS",          "MACHINA_POOL_ORPHAN_MS",
    "MACHINA_DRAIN_MS",          "MACHINA_SECCOMP_ENABLE",
    "MACHINA_SECCOMP_PROFILE",   "MACHINA_SECCOMP_ALLOW_NET",
    "MACHINA_SANDBOX_MIN_LEVEL", "MACHINA_SANDBOX_MAX_PIDS",
    "MACHINA_BWRAP_REQUIRED",    "MACHINA_SLOT_UID_BASE",
    "MACHINA_REPO_ROOTS",        "MACHINA_SHELL_TIMEOUT_MS",
    "MACHINA_SHELL_STDOUT_MAX",  "MACHINA_SHELL_STDERR_MAX",
    "MACHINA_SHELL_ALLOWED_EXE", "MACHINA_LOG_FORMAT",
    "MACHINA_LOG_LEVEL",         "MACHINA_LOG_MAX_BYTES",
    "MACHINA_LOG_TOTAL_BYTES",
};

}  // namespace

std::vector<std::string> repo_roots(const Config& config,
                                    const std::string& root) {
  std::vector<std::string> roots = {root + "/repos"};
  for (auto& path : config.list("MACHINA_REPO_ROOTS")) {
    roots.push_back(std::move(path));
  }
  return roots;
}

KindSettings kind_settings(const Config& config, const std::string& root) {
  KindSettings settings;
  settings.prod = config.prod();
  settings.repo_roots = repo_roots(config, root);
  settings.shell_allowed_exe = config.list("MACHINA_SHELL_ALLOWED_EXE");
  settings.shell_timeout_ms = config.number("MACHINA_SHELL_TIMEOUT_MS");
  settings.shell_stdout_max =
      static_cast<std::uint64_t>(config.number("MACHINA_SHELL_STDOUT_MAX"));
  settings.shell_stderr_max =
      static_cast<std::uint64_t>(config.number("MACHINA_SHELL_STDERR_MAX"));
  return settings;
}

SayOptions say_options(const Config& config, const std::string& component) {
  SayOptions say;
  say.json = config.text("MACHINA_LOG_FORMAT") == "json";
  say.least = parse_severity(config.text("MACHINA_LOG_LEVEL"));
  say.component = component;
  return say;
}

Result<void> check_log_file(const std::string& path) {
  return check_trusted("its path", path, false, false);
}

Result<std::unique_ptr<LineFile>> log_file(const Config& config) {
  const std::string& path = config.text("MACHINA_LOG_FILE");
  if (path.empty()) return std::unique_ptr<LineFile>();
  if (auto ok = check_log_file(path); !ok) return ok.error();
  return LineFile::open(
      path, static_cast<std::uint64_t>(config.number("MACHINA_LOG_MAX_BYTES")),
      static_cast<std::uint64_t>(config.number("MACHINA_LOG_TOTAL_BYTES")));
}

std::vector<std::string> pool_environment(const Config& config) {
  std::vector<std::string> all = config.environment(kPoolVariables);
  all.push_back("MACHINA_PROFILE=" + config.text("MACHINA_PROFILE"));
  all.emplace_back("PATH=/usr/local/bin:/usr/bin:/bin");
  all.emplace_back("LANG=C.UTF-8");
  return all;
}

}  // namespace machina::cli
