// server/http/listening.h
//
// Sockets that listen: what they are called when they pass from one server to
// the next, and whether one could be had.

#pragma once

#include <string>

#include "queue/base/result.h"

namespace machina {

// A socket that listens, and what it is: "http", or "socket-<device>-<inode>"
// for the Unix socket, with those of the file it is bound to.
struct ListeningSocket {
  int fd = -1;
  std::string name;
};

// Whether host:port could be listened on just now. Fails as run_server would:
// Code::conflict where it is taken.
Result<void> can_listen(const std::string& host, int port);

}  // namespace machina
