// tools/service_manager.h
//
// The two seams that a service manager (systemd) offers a process, spoken
// without its library:
//
//   notify     datagrams to $NOTIFY_SOCKET: READY=1, STATUS=, WATCHDOG=1 ...,
//              with descriptors to keep for the next start (FDSTORE=1)
//   sockets    $LISTEN_FDS, $LISTEN_FDNAMES: descriptors 3 and up that were
//              opened for us; `machina ops restart` uses the same seam to pass
//              a server's listening sockets to the next
//
//   S1  Whatever is said leaves at once or not at all: a manager that does not
//       read cannot stop the event loop.
//   S2  After take_service_environment() neither a child nor a job has any of
//       these variables.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace machina {

struct NamedFd {
  int fd = -1;
  std::string name;
};

struct ServiceEnvironment {
  std::string notify_socket;     // a path, or '@' and an abstract name
  std::int64_t watchdog_ms = 0;  // to be heard of at least so often; 0: never
  std::vector<NamedFd> sockets;  // close-on-exec from here on
  bool supervised = false;       // systemd started this very process
};

// Reads and unsets the variables. Call first of all, before a thread exists.
// Variables that are meant for another process (LISTEN_PID, WATCHDOG_PID) count
// as not set.
ServiceEnvironment take_service_environment();

// One datagram of `lines` ("READY=1\nSTATUS=..."), with `fds`. False where it
// did not leave; nothing to be done about that.
bool notify_manager(const std::string& notify_socket, const std::string& lines,
                    const std::vector<int>& fds = {});

// Sends and receives descriptors over a connected Unix socket, one message.
constexpr std::size_t kPassedFdsMax = 8;
bool send_fds(int socket, const std::vector<NamedFd>& fds);
// Waits at most `timeout_ms`. Empty where none came.
std::vector<NamedFd> receive_fds(int socket, int timeout_ms);

}  // namespace machina
