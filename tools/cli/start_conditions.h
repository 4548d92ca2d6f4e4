// tools/cli/start_conditions.h
//
// What must hold for a server to start, asked before one does: the one list
// for `serve`, `serve --check`, `ops start` and `ops restart` (which run
// `serve --check` with the settings that they would start).

#pragma once

#include <string>
#include <vector>

#include "queue/base/result.h"
#include "tools/cli/cli.h"
#include "tools/config.h"
#include "workers/sandbox/sandbox.h"

namespace machina::cli {

// Why no server may start with these settings, wherever; a line each. Looks at
// the settings alone.
std::vector<std::string> settings_faults(const Config& config);

struct StartFault {
  int exit = 2;  // what `serve` would end with
  std::string what;
};
// Whether a server with these settings would start just now on its root, or
// take over from the one that runs there (*takes_over: its process, else 0):
// root, what lies in it in the place of what a start opens there, log file, the
// log's lock and MANIFEST, address, and in the prod profile whether a sandbox
// reaches the level that jobs ask for. What only reading all of a log or a
// database would show is left to the start. Changes nothing. An empty `what`
// is a yes. With `no_pool` the workers are started elsewhere and not tried.
StartFault place_fault(const Settings& settings, const Config& config,
                       bool unsafe_fs, bool no_pool, long* takes_over);

// The same questions where `serve` itself asks: before it makes a new root.
Result<void> probe_port(const Config& config);
// What is wrong with the log file, with the setting's name and what to do.
std::string log_file_fault(const std::string& what);

// Makes a spawner and a sandbox as a pool would, and has the canary attack it.
// Forks: call it before there is a thread, and before libuv is begun.
Result<sandbox::Report> try_isolation(const Config& config);

}  // namespace machina::cli
