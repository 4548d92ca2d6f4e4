#include "tools/cli/pool_settings.h"

#include "tools/trust.h"

namespace machina::cli {

std::vector<std::string> repo_roots(const Config& config,
                                    const std::string& root) {
  std::vector<std::string> roots = {root + "/repos"};
  for (const auto& path : config.typed().repo_roots) roots.push_back(path);
  return roots;
}

KindSettings kind_settings(const Config& config, const std::string& root) {
  const KindsSettings& set = config.typed();
  KindSettings settings;
  settings.prod = config.prod();
  settings.repo_roots = repo_roots(config, root);
  settings.shell_allowed_exe = set.shell_allowed_exe;
  settings.shell_timeout_ms = set.shell_timeout_ms;
  settings.shell_stdout_max = set.shell_stdout_max;
  settings.shell_stderr_max = set.shell_stderr_max;
  return settings;
}

LoggerOptions logger_options(const Config& config,
                             const std::string& component) {
  const ProcessSettings& set = config.typed();
  LoggerOptions say;
  say.json = set.log_format == "json";
  say.least = parse_severity(set.log_level);
  say.component = component;
  return say;
}

Result<void> check_log_file(const std::string& path) {
  return check_trusted("its path", path, false, false);
}

Result<std::unique_ptr<LineFile>> log_file(const Config& config) {
  const ProcessSettings& set = config.typed();
  if (set.log_file.empty()) return std::unique_ptr<LineFile>();
  if (auto ok = check_log_file(set.log_file); !ok) return ok.error();
  return LineFile::open(set.log_file, set.log_max_bytes, set.log_total_bytes);
}

std::vector<std::string> child_environment(const Config& config,
                                           std::uint8_t readers) {
  std::vector<std::string> all = config.environment(readers);
  all.emplace_back("PATH=/usr/local/bin:/usr/bin:/bin");
  all.emplace_back("LANG=C.UTF-8");
  return all;
}

}  // namespace machina::cli
