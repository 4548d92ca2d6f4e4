// server/http/loop.h
//
// The event loop and everything that comes through it: sockets (sockets.h), one
// timer, signals, child processes, and messages from other threads. loop.cc is
// the only includer of uv.h; it moves bytes and decides nothing.
//
// One iteration: wait for I/O, hand each socket's bytes to its SocketEvents,
// run the timers that are due and what other threads posted, then call
// `on_turn` once, then write what the turn put out: many requests share one
// turn, and a socket one write.
//
//   L1  on_turn runs after every iteration that called anything of ours.
//   L2  SocketEvents::on_gone is called exactly once, and is the last call.
//   L3  post() may be called from any thread, until the Loop is destroyed; all
//       else belongs to the thread that runs it.

#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/result.h"
#include "server/http/limits.h"
#include "server/http/listening.h"

namespace machina {

class SocketEvents {
 public:
  virtual ~SocketEvents() = default;
  virtual void on_bytes(std::string_view bytes) = 0;
  virtual void on_end() = 0;  // the peer will send no more
  // The same, seen while reading is paused: on_end() comes when that was read.
  virtual void on_hangup() {}
  virtual void on_drained() = 0;  // what was written has left
  virtual void on_gone() = 0;     // L2; the Socket is invalid from here on
};

class Socket {
 public:
  virtual ~Socket() = default;
  // Bytes appended here leave at the end of the turn.
  std::string& out() { return out_; }
  // Call after appending. Cheap to repeat.
  virtual void touch() = 0;
  virtual std::size_t unsent()
      const = 0;                        // bytes that the kernel has not taken
  virtual void pause(bool paused) = 0;  // stop or resume reading
  virtual void end() = 0;               // after what is unsent: no more writing
  virtual void close() = 0;             // drop it now; on_gone follows
  // Who is at the other end: ADDRESS:PORT, or "unix". A system call.
  virtual std::string remote() const = 0;
  // Of the other end; zero on the Unix socket.
  const ClientAddress& address() const { return address_; }
  // Bytes that the kernel has taken since the beginning.
  virtual std::uint64_t sent() const = 0;

 protected:
  std::string out_;
  ClientAddress address_;
};

class Loop {
 public:
  // `together`: see Sockets::make.
  static Result<std::unique_ptr<Loop>> make(bool together = true);
  virtual ~Loop() = default;

  // Called for each new connection; returns its events, or nullptr to refuse.
  // `local`: came over the Unix socket, from a peer that may use it.
  using Accept = std::function<SocketEvents*(Socket& socket, bool local)>;
  virtual void on_accept(Accept accept) = 0;
  // Both fail with Code::conflict where the address is taken. listen_tcp
  // returns the port. listen_unix replaces a stale socket: call it only while
  // holding the root's lock. Both take those of `inherited` that are what is
  // asked for: a connection that waits there is not refused.
  virtual Result<int> listen_tcp(
      const std::string& host, int port,
      const std::vector<ListeningSocket>& inherited = {}) = 0;
  virtual Result<void> listen_unix(
      const std::string& path,
      const std::vector<ListeningSocket>& inherited = {}) = 0;
  virtual std::vector<ListeningSocket> listening() const = 0;
  // `passed_on`: somebody else has these sockets too, and their paths stay.
  virtual void stop_listening(bool passed_on = false) = 0;

  // Bytes of all clients that the kernel has not taken, as of the last turn.
  virtual std::uint64_t unsent_bytes() const = 0;
  virtual void on_turn(std::function<void()> turn) = 0;
  virtual Millis now() const = 0;  // CLOCK_MONOTONIC, as of this iteration
  virtual void post(std::function<void()> run) = 0;  // any thread
  // Makes an iteration happen (any thread); cheaper than post().
  virtual void wake() = 0;
  // The one-shot timer: replaces its last setting; < 0: none.
  virtual void set_timer(Millis delay, std::function<void()> run) = 0;
  // Runs every `period` until the loop ends.
  virtual void every(Millis period, std::function<void()> run) = 0;
  virtual void on_signal(int number, std::function<void()> run) = 0;

  struct Child {
    std::vector<std::string> argv, env;
    std::string output;  // a file that its stdout and stderr are appended to
  };
  // Starts a program in a session of its own. `exited` gets its exit code, or
  // 128 + signal.
  virtual Result<pid_t> start(const Child& child,
                              std::function<void(int)> exited) = 0;

  virtual bool together() const = 0;  // see make()
  virtual void run() = 0;             // until stop()
  virtual void stop() = 0;
  // Writes what sockets still hold, for at most `limit`, then closes all.
  virtual void finish(Millis limit) = 0;
};

// True for 127.0.0.0/8, ::1 and "localhost".
bool is_loopback(const std::string& host);

}  // namespace machina
