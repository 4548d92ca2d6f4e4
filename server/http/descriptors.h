// server/http/descriptors.h
//
// How the descriptors that this process may have are shared out, so that no
// number of clients leaves the log, the history or a worker without one.
//
//   limit = connections (TCP) + local (the Unix socket) + files (artifacts and
//           logs that come in or go out) + kOwnDescriptors (log, history,
//           patches, the loop, standard streams)
//
// Tested by tests/server/http/descriptors_test.cc and tests/e2e/front_test.cc
// (F06).

#pragma once

#include <string>

#include "queue/base/result.h"

namespace machina {

// Segments, checkpoints, directories and locks: 16. History and patches, each
// database three: 24 + 24 + 12. The loop, its ring, listeners, timers, signals,
// log files, children: 24.
constexpr int kOwnDescriptors = 112;
constexpr int kOpenFilesMax = 128;
// Over the Unix socket: 64 workers have three each, the pool one.
constexpr int kLocalConnectionsMax = 256;
constexpr int kDescriptorsMin = 192;  // fewer: there is no start

struct Descriptors {
  int before = 0;  // the soft limit that the process was started with
  int limit = 0;   // the one that it has now
  int connections = 0, local = 0, files = 0;
  bool fewer = false;  // `connections` are fewer than were asked for
  std::string text() const;
};

// Shares `limit` out. `connections` and `workers`: what was asked for.
// Code::invalid where `limit` is below kDescriptorsMin or holds no room for the
// workers' connections.
Result<Descriptors> share_descriptors(int limit, int connections, int workers);

// Raises the soft limit to the hard one, and shares that out.
Result<Descriptors> take_descriptors(int connections, int workers);

}  // namespace machina
