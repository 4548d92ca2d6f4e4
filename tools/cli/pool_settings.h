// tools/cli/pool_settings.h
//
// What serve, pool, worker and doctor derive from configuration in the same
// way: the settings of kinds, and what a pool and its workers are given of our
// environment. Never a secret: they need none on the Unix socket.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "queue/base/logger.h"
#include "tools/config.h"
#include "workers/kinds/kinds.h"

namespace machina::cli {

KindSettings kind_settings(const Config& config, const std::string& root);
// Absolute, <root>/repos first.
std::vector<std::string> repo_roots(const Config& config,
                                    const std::string& root);
// How lines look, and where the server's go (null: to standard error).
LoggerOptions logger_options(const Config& config,
                             const std::string& component);
// Whether nobody else could lead the lines elsewhere (tools/trust.h).
Result<void> check_log_file(const std::string& path);
Result<std::unique_ptr<LineFile>> log_file(const Config& config);
// The whole environment of a child process in which `readers` (bits of
// Setting::Reader) will run.
std::vector<std::string> child_environment(const Config& config,
                                           std::uint8_t readers);

}  // namespace machina::cli
