#include "server/loop.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <uv.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <mutex>
#include <unordered_set>

#include "queue/check.h"

namespace machina {
namespace {

constexpr std::size_t kReadBytes = 64 * 1024;
constexpr int kBacklog = 1024;
// A socket's buffer that grew past this is given back once it is empty.
constexpr std::size_t kKeepBytes = 64 * 1024;

class LoopImpl;

class SocketImpl final : public Socket {
 public:
  SocketImpl(LoopImpl& loop, bool local) : loop_(loop), local_(local) {}

  void touch() override;
  std::size_t unsent() const override {
    return out_.size() + uv_stream_get_write_queue_size(
                             reinterpret_cast<const uv_stream_t*>(&handle_));
  }
  void pause(bool paused) override;
  void end() override;
  void close() override;

  void start_reading();
  void flush();
  uv_stream_t* stream() { return reinterpret_cast<uv_stream_t*>(&handle_); }

 private:
  friend class LoopImpl;
  struct Write {
    uv_write_t request;
    SocketImpl* socket;
    std::string bytes;
  };
  static void alloc(uv_handle_t* handle, std::size_t, uv_buf_t* buffer);
  static void read(uv_stream_t* stream, ssize_t bytes, const uv_buf_t* buffer);
  static void written(uv_write_t* request, int status);
  static void closed(uv_handle_t* handle);
  void maybe_shutdown();

  LoopImpl& loop_;
  SocketEvents* events_ = nullptr;
  union {
    uv_tcp_t tcp;
    uv_pipe_t pipe;
  } handle_;
  uv_shutdown_t shutdown_;
  std::size_t writing_ = 0;
  bool local_, dirty_ = false, closing_ = false, ending_ = false, shut_ = false,
               paused_ = false, ended_ = false;
};

class LoopImpl final : public Loop {
 public:
  LoopImpl() {
    CHECK(uv_loop_init(&loop_) == 0);
    loop_.data = this;
    uv_check_init(&loop_, &check_);
    check_.data = this;
    uv_check_start(&check_, [](uv_check_t* check) {
      static_cast<LoopImpl*>(check->data)->turn();
    });
    uv_async_init(&loop_, &async_, [](uv_async_t* async) {
      static_cast<LoopImpl*>(async->data)->run_posted();
    });
    async_.data = this;
    uv_timer_init(&loop_, &timer_);
    timer_.data = this;
  }

  ~LoopImpl() override {
    close_everything();
    while (uv_run(&loop_, UV_RUN_DEFAULT) != 0) {
    }
    uv_loop_close(&loop_);
  }

  void on_accept(Accept accept) override { accept_ = std::move(accept); }
  Result<int> listen_tcp(const std::string& host, int port) override;
  Result<void> listen_unix(const std::string& path) override;
  void stop_listening() override;
  void on_turn(std::function<void()> turn) override {
    on_turn_ = std::move(turn);
  }
  Millis now() const override { return static_cast<Millis>(uv_now(&loop_)); }
  void post(std::function<void()> run) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      posted_.push_back(std::move(run));
    }
    uv_async_send(&async_);
  }
  void wake() override { uv_async_send(&async_); }
  void set_timer(Millis delay, std::function<void()> run) override {
    if (delay < 0) {
      uv_timer_stop(&timer_);
      return;
    }
    timer_run_ = std::move(run);
    uv_update_time(&loop_);
    uv_timer_start(
        &timer_,
        [](uv_timer_t* timer) {
          auto* self = static_cast<LoopImpl*>(timer->data);
          self->timer_run_();
          self->turn();
        },
        static_cast<std::uint64_t>(delay), 0);
  }
  void every(Millis period, std::function<void()> run) override;
  void on_signal(int number, std::function<void()> run) override;
  Result<pid_t> start(const Child& child,
                      std::function<void(int)> exited) override;
  void run() override {
    stopped_ = false;
    while (!stopped_) uv_run(&loop_, UV_RUN_ONCE);
  }
  void stop() override {
    stopped_ = true;
    uv_async_send(&async_);
  }
  void finish(Millis limit) override;

 private:
  friend class SocketImpl;
  struct Repeating {
    uv_timer_t handle;
    LoopImpl* loop;
    std::function<void()> run;
  };
  struct SignalWatch {
    uv_signal_t handle;
    LoopImpl* loop;
    std::function<void()> run;
  };
  struct Process {
    uv_process_t handle;
    std::function<void(int)> exited;
  };
  struct Listener {
    union {
      uv_tcp_t tcp;
      uv_pipe_t pipe;
    } handle;
    LoopImpl* loop;
    bool local;
  };

  void turn() {
    if (on_turn_) on_turn_();
    flush_dirty();
  }
  void flush_dirty() {
    for (std::size_t i = 0; i < dirty_.size(); ++i) dirty_[i]->flush();
    dirty_.clear();
  }
  void run_posted() {
    std::vector<std::function<void()>> posted;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      posted.swap(posted_);
    }
    for (auto& run : posted) run();
  }
  void accept(Listener& listener);
  static bool allowed_peer(uv_pipe_t* pipe);
  Result<void> begin_listening(std::unique_ptr<Listener> listener,
                               const std::string& name);
  void close_everything();

  uv_loop_t loop_;
  uv_check_t check_;
  uv_async_t async_;
  uv_timer_t timer_;
  std::function<void()> timer_run_;
  Accept accept_;
  std::function<void()> on_turn_;
  std::mutex mutex_;
  std::vector<std::function<void()>> posted_;
  std::vector<std::unique_ptr<Listener>> listeners_, old_listeners_;
  std::vector<std::unique_ptr<Repeating>> repeating_;
  std::vector<std::unique_ptr<SignalWatch>> signals_;
  std::vector<SocketImpl*> dirty_;
  std::unordered_set<SocketImpl*> sockets_;
  std::vector<char> buffer_ = std::vector<char>(kReadBytes);
  bool stopped_ = false;
  bool closed_all_ = false;
};

// --- Socket ----------------------------------------------------------------

void SocketImpl::touch() {
  if (dirty_ || closing_) return;
  dirty_ = true;
  loop_.dirty_.push_back(this);
}

void SocketImpl::alloc(uv_handle_t* handle, std::size_t, uv_buf_t* buffer) {
  // One buffer serves all: what is read is consumed before the next read.
  auto* self = static_cast<SocketImpl*>(handle->data);
  *buffer = uv_buf_init(self->loop_.buffer_.data(),
                        static_cast<unsigned>(self->loop_.buffer_.size()));
}

void SocketImpl::read(uv_stream_t* stream, ssize_t bytes,
                      const uv_buf_t* buffer) {
  auto* self = static_cast<SocketImpl*>(stream->data);
  if (bytes == 0 || self->closing_) return;
  if (bytes < 0) {
    if (bytes == UV_EOF) {
      self->ended_ = true;
      uv_read_stop(stream);
      self->events_->on_end();
    } else {
      self->close();
    }
    return;
  }
  self->events_->on_bytes(
      std::string_view(buffer->base, static_cast<std::size_t>(bytes)));
}

void SocketImpl::start_reading() { uv_read_start(stream(), alloc, read); }

void SocketImpl::pause(bool paused) {
  if (closing_ || ended_ || paused == paused_) return;
  paused_ = paused;
  if (paused) {
    uv_read_stop(stream());
  } else {
    uv_read_start(stream(), alloc, read);
  }
}

void SocketImpl::flush() {
  dirty_ = false;
  if (closing_) return;
  if (!out_.empty()) {
    std::size_t sent = 0;
    if (writing_ == 0) {
      uv_buf_t buffer =
          uv_buf_init(out_.data(), static_cast<unsigned>(out_.size()));
      int n = uv_try_write(stream(), &buffer, 1);
      if (n < 0 && n != UV_EAGAIN) {
        close();
        return;
      }
      if (n > 0) sent = static_cast<std::size_t>(n);
    }
    if (sent == out_.size()) {
      if (out_.capacity() > kKeepBytes) {
        std::string().swap(out_);
      } else {
        out_.clear();
      }
      events_->on_drained();
    } else {
      auto* write = new Write{{}, this, out_.substr(sent)};
      std::string().swap(out_);
      writing_ += write->bytes.size();
      uv_buf_t buffer = uv_buf_init(write->bytes.data(),
                                    static_cast<unsigned>(write->bytes.size()));
      write->request.data = write;
      if (uv_write(&write->request, stream(), &buffer, 1, written) != 0) {
        writing_ -= write->bytes.size();
        delete write;
        close();
        return;
      }
    }
  }
  maybe_shutdown();
}

void SocketImpl::written(uv_write_t* request, int status) {
  auto* write = static_cast<Write*>(request->data);
  SocketImpl* self = write->socket;
  self->writing_ -= write->bytes.size();
  delete write;
  if (self->closing_) return;
  if (status != 0) {
    self->close();
    return;
  }
  if (self->writing_ == 0 && self->out_.empty()) self->events_->on_drained();
  self->maybe_shutdown();
}

void SocketImpl::end() {
  ending_ = true;
  touch();
}

void SocketImpl::maybe_shutdown() {
  if (!ending_ || shut_ || closing_ || unsent() != 0) return;
  shut_ = true;
  uv_shutdown(&shutdown_, stream(), [](uv_shutdown_t*, int) {});
}

void SocketImpl::close() {
  if (closing_) return;
  closing_ = true;
  uv_close(reinterpret_cast<uv_handle_t*>(stream()), closed);
}

void SocketImpl::closed(uv_handle_t* handle) {
  auto* self = static_cast<SocketImpl*>(handle->data);
  LoopImpl& loop = self->loop_;
  if (self->dirty_) std::erase(loop.dirty_, self);
  if (self->events_ != nullptr) self->events_->on_gone();
  loop.sockets_.erase(self);
  delete self;
}

// --- Listening -------------------------------------------------------------

Error uv_failure(const std::string& what, int code) {
  Code kind = code == UV_EADDRINUSE ? Code::conflict : Code::io;
  return Error{kind, what + ": " + uv_strerror(code)};
}

Result<int> LoopImpl::listen_tcp(const std::string& host, int port) {
  std::string address = host == "localhost" ? "127.0.0.1" : host;
  sockaddr_storage where{};
  if (uv_ip4_addr(address.c_str(), port,
                  reinterpret_cast<sockaddr_in*>(&where)) != 0 &&
      uv_ip6_addr(address.c_str(), port,
                  reinterpret_cast<sockaddr_in6*>(&where)) != 0) {
    return Error{Code::invalid,
                 "host: \"" + host + "\" is not an IPv4 or IPv6 address"};
  }
  std::string name = host + ":" + std::to_string(port);
  auto listener = std::make_unique<Listener>();
  listener->loop = this;
  listener->local = false;
  uv_tcp_t* tcp = &listener->handle.tcp;
  uv_tcp_init(&loop_, tcp);
  tcp->data = listener.get();
  if (int e = uv_tcp_bind(tcp, reinterpret_cast<sockaddr*>(&where), 0);
      e != 0) {
    Error error = uv_failure("cannot listen on " + name, e);
    uv_close(reinterpret_cast<uv_handle_t*>(tcp), nullptr);
    old_listeners_.push_back(std::move(listener));
    return error;
  }
  auto begun = begin_listening(std::move(listener), name);
  if (!begun) return begun.error();
  int size = sizeof where;
  uv_tcp_getsockname(tcp, reinterpret_cast<sockaddr*>(&where), &size);
  return ntohs(where.ss_family == AF_INET6
                   ? reinterpret_cast<sockaddr_in6*>(&where)->sin6_port
                   : reinterpret_cast<sockaddr_in*>(&where)->sin_port);
}

Result<void> LoopImpl::listen_unix(const std::string& path) {
  if (path.size() > 107) {
    return Error{Code::invalid, "socket path: \"" + path + "\" has " +
                                    std::to_string(path.size()) +
                                    " bytes; at most 107 fit"};
  }
  // What is there belongs to a server that is gone: we hold the lock.
  struct stat there;
  if (lstat(path.c_str(), &there) == 0) {
    if (!S_ISSOCK(there.st_mode)) {
      return Error{Code::conflict, path + " exists and is not a socket"};
    }
    unlink(path.c_str());
  }
  auto listener = std::make_unique<Listener>();
  listener->loop = this;
  listener->local = true;
  uv_pipe_t* pipe = &listener->handle.pipe;
  uv_pipe_init(&loop_, pipe, 0);
  pipe->data = listener.get();
  // The mode must be right from the first moment: bind under a tight umask.
  mode_t old = umask(0177);
  int e = uv_pipe_bind(pipe, path.c_str());
  umask(old);
  if (e != 0) {
    Error error = uv_failure("cannot listen on " + path, e);
    uv_close(reinterpret_cast<uv_handle_t*>(pipe), nullptr);
    old_listeners_.push_back(std::move(listener));
    return error;
  }
  return begin_listening(std::move(listener), path);
}

Result<void> LoopImpl::begin_listening(std::unique_ptr<Listener> listener,
                                       const std::string& name) {
  auto* stream = reinterpret_cast<uv_stream_t*>(&listener->handle);
  int e = uv_listen(stream, kBacklog, [](uv_stream_t* server, int status) {
    auto* self = static_cast<Listener*>(server->data);
    if (status == 0) self->loop->accept(*self);
  });
  if (e != 0) {
    Error error = uv_failure("cannot listen on " + name, e);
    uv_close(reinterpret_cast<uv_handle_t*>(stream), nullptr);
    old_listeners_.push_back(std::move(listener));
    return error;
  }
  listeners_.push_back(std::move(listener));
  return {};
}

bool LoopImpl::allowed_peer(uv_pipe_t* pipe) {
  uv_os_fd_t fd;
  ucred peer{};
  socklen_t size = sizeof peer;
  if (uv_fileno(reinterpret_cast<uv_handle_t*>(pipe), &fd) != 0) return false;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  return peer.uid == 0 || peer.uid == geteuid();
}

void LoopImpl::accept(Listener& listener) {
  auto* socket = new SocketImpl(*this, listener.local);
  if (listener.local) {
    uv_pipe_init(&loop_, &socket->handle_.pipe, 0);
  } else {
    uv_tcp_init(&loop_, &socket->handle_.tcp);
  }
  socket->stream()->data = socket;
  sockets_.insert(socket);
  auto* server = reinterpret_cast<uv_stream_t*>(&listener.handle);
  if (uv_accept(server, socket->stream()) != 0 ||
      (listener.local && !allowed_peer(&socket->handle_.pipe))) {
    socket->close();
    return;
  }
  if (!listener.local) uv_tcp_nodelay(&socket->handle_.tcp, 1);
  socket->events_ = accept_(*socket, listener.local);
  if (socket->events_ == nullptr) {
    // A refusal may have left a last word in out().
    if (!socket->out_.empty()) {
      uv_buf_t buffer = uv_buf_init(socket->out_.data(),
                                    static_cast<unsigned>(socket->out_.size()));
      uv_try_write(socket->stream(), &buffer, 1);
    }
    socket->close();
    return;
  }
  socket->start_reading();
}

void LoopImpl::stop_listening() {
  for (auto& listener : listeners_) {
    uv_close(reinterpret_cast<uv_handle_t*>(&listener->handle), nullptr);
    old_listeners_.push_back(std::move(listener));
  }
  listeners_.clear();
}

// --- Timers, signals, children ---------------------------------------------

void LoopImpl::every(Millis period, std::function<void()> run) {
  auto repeating = std::make_unique<Repeating>();
  repeating->loop = this;
  repeating->run = std::move(run);
  uv_timer_init(&loop_, &repeating->handle);
  repeating->handle.data = repeating.get();
  uv_timer_start(
      &repeating->handle,
      [](uv_timer_t* timer) {
        auto* self = static_cast<Repeating*>(timer->data);
        self->run();
        self->loop->turn();
      },
      static_cast<std::uint64_t>(period), static_cast<std::uint64_t>(period));
  repeating_.push_back(std::move(repeating));
}

void LoopImpl::on_signal(int number, std::function<void()> run) {
  auto watch = std::make_unique<SignalWatch>();
  watch->loop = this;
  watch->run = std::move(run);
  uv_signal_init(&loop_, &watch->handle);
  watch->handle.data = watch.get();
  uv_signal_start(
      &watch->handle,
      [](uv_signal_t* signal, int) {
        static_cast<SignalWatch*>(signal->data)->run();
      },
      number);
  signals_.push_back(std::move(watch));
}

Result<pid_t> LoopImpl::start(const Child& child,
                              std::function<void(int)> exited) {
  int out =
      ::open(child.output.c_str(),
             O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (out < 0) {
    return Error{Code::io, "open " + child.output + ": " + strerror(errno)};
  }
  std::vector<char*> argv, env;
  for (const auto& a : child.argv) argv.push_back(const_cast<char*>(a.c_str()));
  for (const auto& e : child.env) env.push_back(const_cast<char*>(e.c_str()));
  argv.push_back(nullptr);
  env.push_back(nullptr);

  uv_stdio_container_t stdio[3];
  stdio[0].flags = UV_IGNORE;
  stdio[1].flags = stdio[2].flags = UV_INHERIT_FD;
  stdio[1].data.fd = stdio[2].data.fd = out;

  uv_process_options_t options{};
  options.file = argv[0];
  options.args = argv.data();
  options.env = env.data();
  options.flags = UV_PROCESS_DETACHED;
  options.stdio = stdio;
  options.stdio_count = 3;
  options.exit_cb = [](uv_process_t* handle, std::int64_t status, int signal) {
    auto* process = static_cast<Process*>(handle->data);
    auto done = std::move(process->exited);
    uv_close(reinterpret_cast<uv_handle_t*>(handle),
             [](uv_handle_t* h) { delete static_cast<Process*>(h->data); });
    done(signal != 0 ? 128 + signal : static_cast<int>(status));
  };
  auto* process = new Process{{}, std::move(exited)};
  process->handle.data = process;
  int e = uv_spawn(&loop_, &process->handle, &options);
  ::close(out);
  if (e != 0) {
    uv_close(reinterpret_cast<uv_handle_t*>(&process->handle),
             [](uv_handle_t* h) { delete static_cast<Process*>(h->data); });
    return uv_failure("start " + child.argv[0], e);
  }
  return process->handle.pid;
}

// --- The end ---------------------------------------------------------------

void LoopImpl::finish(Millis limit) {
  flush_dirty();
  bool late = false;
  uv_timer_t timer;
  uv_timer_init(&loop_, &timer);
  timer.data = &late;
  uv_timer_start(
      &timer, [](uv_timer_t* t) { *static_cast<bool*>(t->data) = true; },
      static_cast<std::uint64_t>(limit), 0);
  auto unsent = [this] {
    for (auto* socket : sockets_) {
      if (!socket->closing_ && socket->unsent() != 0) return true;
    }
    return false;
  };
  while (!late && unsent()) uv_run(&loop_, UV_RUN_ONCE);
  uv_timer_stop(&timer);
  uv_close(reinterpret_cast<uv_handle_t*>(&timer), nullptr);
  close_everything();
  while (uv_run(&loop_, UV_RUN_DEFAULT) != 0) {
  }
}

void LoopImpl::close_everything() {
  if (closed_all_) return;
  closed_all_ = true;
  on_turn_ = nullptr;
  uv_walk(
      &loop_,
      [](uv_handle_t* handle, void* self) {
        if (uv_is_closing(handle)) return;
        auto* loop = static_cast<LoopImpl*>(self);
        if (handle->type == UV_TCP || handle->type == UV_NAMED_PIPE) {
          auto* socket = static_cast<SocketImpl*>(handle->data);
          if (loop->sockets_.count(socket) != 0) {
            socket->close();
            return;
          }
        }
        if (handle->type == UV_PROCESS) {
          uv_close(handle, [](uv_handle_t* h) {
            delete static_cast<Process*>(h->data);
          });
          return;
        }
        uv_close(handle, nullptr);
      },
      this);
}

}  // namespace

Result<std::unique_ptr<Loop>> Loop::make() {
  // A peer that went away is an error code, never a signal.
  std::signal(SIGPIPE, SIG_IGN);
  return std::unique_ptr<Loop>(new LoopImpl());
}

bool is_loopback(const std::string& host) {
  if (host == "localhost" || host == "::1") return true;
  in_addr v4;
  return inet_pton(AF_INET, host.c_str(), &v4) == 1 &&
         (ntohl(v4.s_addr) >> 24) == 127;
}

}  // namespace machina
