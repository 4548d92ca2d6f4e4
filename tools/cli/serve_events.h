// tools/cli/serve_events.h
//
// What a server tells the outside about itself: its pid file, the service
// manager, and whoever takes its listening sockets at a handover.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "server/api/server.h"
#include "tools/config.h"
#include "tools/service_manager.h"

namespace machina::cli {

struct ServeStart {
  std::string root;  // absolute
  ServiceEnvironment manager;
  std::vector<std::string> argv;         // without the program
  std::vector<std::string> environment;  // MACHINA_*, no secret
  std::vector<std::string> secrets;      // names of those that were set
};

// Call before secrets are scrubbed: it reads this process's arguments and
// environment.
ServeStart remember_start(ServiceEnvironment manager);
// Where the one who restarts a server waits for its sockets.
std::string handover_socket(const std::string& root);
ServerEvents serve_events(const Config& config, ServeStart start);

}  // namespace machina::cli
