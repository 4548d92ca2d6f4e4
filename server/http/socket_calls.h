// server/http/socket_calls.h
//
// recv() and send() of many sockets at once: one system call for all of them
// where the kernel has io_uring and lets us use it, else one for each. The only
// includer of liburing.h is socket_calls.cc.
//
// Nothing is asynchronous. Each call is made with MSG_DONTWAIT, so the kernel
// carries it out while it takes it, and run() returns when all have their
// results, as recv() and send() would have given them one after another.
//
//   C1  run() sets every result, in whichever way the calls were made.
//   C2  A ring that fails is given up for good: what it had not begun is done
//       one by one. No call is made twice.
//
// Tested by tests/server/http/socket_calls_test.cc. One thread.

#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <span>

namespace machina {

class SocketCalls {
 public:
  static constexpr std::size_t kMax = 64;  // of one run()

  struct Call {
    enum Kind : unsigned char { receive, send };
    Kind kind = receive;
    int fd = -1;
    char* to = nullptr;          // receive
    const char* from = nullptr;  // send
    std::size_t bytes = 0;
    ssize_t result = 0;  // how many bytes, or -errno
  };

  // Without `together`, or where the kernel refuses a ring: one by one.
  explicit SocketCalls(bool together);
  ~SocketCalls();
  SocketCalls(const SocketCalls&) = delete;
  SocketCalls& operator=(const SocketCalls&) = delete;

  void run(std::span<Call> calls);  // at most kMax; C1
  bool together() const { return ring_ != nullptr; }

 private:
  struct Ring;
  std::unique_ptr<Ring> ring_;
};

}  // namespace machina
