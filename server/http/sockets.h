// server/http/sockets.h
//
// The stream sockets of the loop: those that listen, and those of clients, all
// non-blocking, and the epoll set that the loop waits on.
//
// Each client's socket is registered once, edge-triggered: while it is read to
// its end and written without resistance it costs one recv and one send for
// each turn and nothing else, and those of a turn are made together
// (socket_calls.h). What an edge told of and was not read (the owner paused, or
// others must have their turn) is remembered.
//
//   X1  SocketEvents::on_gone comes once, from reap(), and is the last call.
//   X2  serve() reads at most kReadsMax x kReadBytes of a socket.
//   X3  What the kernel does not take is kept and sent when it does; unsent()
//       counts it.
//   X4  Out of descriptors: who connects is let in and closed at once, instead
//       of waiting in the backlog while accept() fails for ever. Where even the
//       descriptor kept for that is gone, accepting rests a while.
//
// One thread.

#pragma once

#include <sys/epoll.h>
#include <sys/socket.h>

#include <array>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "queue/base/result.h"
#include "server/http/loop.h"
#include "server/http/socket_calls.h"

namespace machina {

class SocketImpl;

class Sockets {
 public:
  // `together`: with io_uring, where there is one.
  static Result<std::unique_ptr<Sockets>> make(bool together);
  ~Sockets();
  Sockets(const Sockets&) = delete;

  // A descriptor of somebody else's, which serve() tells of. One at most.
  Result<void> watch(int fd);

  // Until serve() has something to do, for at most `ms` (< 0: for ever).
  void wait(int ms);
  bool together() const { return calls_.together(); }
  // Accepts, reads, and writes where the kernel has room again, as of the last
  // wait(). Whether the descriptor of watch() has something to read.
  bool serve();

  // These are Loop's.
  void on_accept(Loop::Accept accept) { accept_ = std::move(accept); }
  Result<int> listen_tcp(const std::string& host, int port,
                         const std::vector<ListeningSocket>& inherited);
  Result<void> listen_unix(const std::string& path,
                           const std::vector<ListeningSocket>& inherited);
  std::vector<ListeningSocket> listening() const;
  void stop_listening(bool passed_on);

  void flush();  // sends what was put out since the last time
  void reap();   // X1
  bool unsent() const;
  std::uint64_t unsent_bytes() const { return unsent_bytes_; }
  void close_all();  // clients; then reap()

 private:
  friend class SocketImpl;
  struct Watched;
  struct Listener;

  Sockets(int epoll, int spare, bool together);
  Result<void> begin_listening(int fd, bool local, const std::string& path,
                               const std::string& name,
                               const std::string& where);
  void read();
  void accept(Listener& listener);
  void watch(Listener& listener, bool on);
  void admit(int fd, const Listener& listener);
  void look_at_polled();

  const int epoll_;
  int spare_;  // X4
  Loop::Accept accept_;
  std::vector<std::unique_ptr<Listener>> listeners_, stopped_;
  std::unordered_set<SocketImpl*> sockets_;
  std::vector<SocketImpl*> dirty_, again_, closed_;
  // For which the kernel had no watch left: they are counted over all processes
  // of a user, of which another may have taken them all.
  std::vector<SocketImpl*> polled_;
  std::vector<SocketImpl*> reads_;  // of this serve()
  std::vector<epoll_event> events_;
  int events_ready_ = 0;
  std::uint64_t unsent_bytes_ = 0;  // of all; SocketImpl::count()
  SocketCalls calls_;
  std::array<SocketCalls::Call, SocketCalls::kMax> call_;
  std::array<SocketImpl*, SocketCalls::kMax> called_{};
  std::vector<char> buffer_, first_buffers_;
};

}  // namespace machina
