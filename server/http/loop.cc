#include "server/http/loop.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <unistd.h>
#include <uv.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <mutex>

#include "queue/base/check.h"
#include "server/http/sockets.h"

namespace machina {
namespace {

// Sockets are ours (sockets.h) and waited for by epoll; timers, signals,
// children and other threads' messages are libuv's, which waits as one
// descriptor among them.
class LoopImpl final : public Loop {
 public:
  explicit LoopImpl(std::unique_ptr<Sockets> sockets)
      : sockets_(std::move(sockets)) {
    CHECK(uv_loop_init(&loop_) == 0);
    loop_.data = this;
    uv_async_init(&loop_, &async_, [](uv_async_t* async) {
      static_cast<LoopImpl*>(async->data)->run_posted();
    });
    async_.data = this;
    uv_timer_init(&loop_, &timer_);
    timer_.data = this;
  }

  ~LoopImpl() override {
    close_everything();
    uv_loop_close(&loop_);
  }

  Result<void> begin() { return sockets_->watch(uv_backend_fd(&loop_)); }

  void on_accept(Accept accept) override {
    sockets_->on_accept(std::move(accept));
  }
  Result<int> listen_tcp(
      const std::string& host, int port,
      const std::vector<ListeningSocket>& inherited) override {
    return sockets_->listen_tcp(host, port, inherited);
  }
  Result<void> listen_unix(
      const std::string& path,
      const std::vector<ListeningSocket>& inherited) override {
    return sockets_->listen_unix(path, inherited);
  }
  std::vector<ListeningSocket> listening() const override {
    return sockets_->listening();
  }
  void stop_listening(bool passed_on) override {
    sockets_->stop_listening(passed_on);
  }
  std::uint64_t unsent_bytes() const override {
    return sockets_->unsent_bytes();
  }
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
          static_cast<LoopImpl*>(timer->data)->timer_run_();
        },
        static_cast<std::uint64_t>(delay), 0);
  }
  void every(Millis period, std::function<void()> run) override;
  void on_signal(int number, std::function<void()> run) override;
  Result<pid_t> start(const Child& child,
                      std::function<void(int)> exited) override;
  bool together() const override { return sockets_->together(); }
  void run() override {
    stopped_ = false;
    while (!stopped_) iterate(-1);
  }
  void stop() override {
    stopped_ = true;
    uv_async_send(&async_);
  }
  void finish(Millis limit) override;

 private:
  struct Repeating {
    uv_timer_t handle;
    std::function<void()> run;
  };
  struct SignalWatch {
    uv_signal_t handle;
    std::function<void()> run;
  };
  struct Process {
    uv_process_t handle;
    std::function<void(int)> exited;
  };

  void iterate(int wait_max_ms);
  void run_posted() {
    std::vector<std::function<void()>> posted;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      posted.swap(posted_);
    }
    for (auto& run : posted) run();
  }
  void close_everything();

  std::unique_ptr<Sockets> sockets_;
  uv_loop_t loop_;
  uv_async_t async_;
  uv_timer_t timer_;
  std::function<void()> timer_run_;
  std::function<void()> on_turn_;
  std::mutex mutex_;
  std::vector<std::function<void()>> posted_;
  std::vector<std::unique_ptr<Repeating>> repeating_;
  std::vector<std::unique_ptr<SignalWatch>> signals_;
  bool watches_more_ = true;  // libuv learns of it when it runs
  bool stopped_ = false;
  bool closed_all_ = false;
};

void LoopImpl::iterate(int wait_max_ms) {
  uv_update_time(&loop_);  // the last turn may have been a long one
  int wait_ms = uv_backend_timeout(&loop_);
  if (watches_more_) wait_ms = 0;
  if (wait_max_ms >= 0 && (wait_ms < 0 || wait_ms > wait_max_ms)) {
    wait_ms = wait_max_ms;
  }
  sockets_->wait(wait_ms);
  uv_update_time(&loop_);
  const bool uv_has = sockets_->serve();
  if (uv_has || watches_more_ || uv_backend_timeout(&loop_) == 0) {
    watches_more_ = false;
    uv_run(&loop_, UV_RUN_NOWAIT);
  }
  if (on_turn_) on_turn_();
  sockets_->flush();
  sockets_->reap();
}

Error uv_failure(const std::string& what, int code) {
  return Error{Code::io, what + ": " + uv_strerror(code)};
}

// --- Timers, signals, children ---------------------------------------------

void LoopImpl::every(Millis period, std::function<void()> run) {
  auto repeating = std::make_unique<Repeating>();
  repeating->run = std::move(run);
  uv_timer_init(&loop_, &repeating->handle);
  repeating->handle.data = repeating.get();
  uv_timer_start(
      &repeating->handle,
      [](uv_timer_t* timer) { static_cast<Repeating*>(timer->data)->run(); },
      static_cast<std::uint64_t>(period), static_cast<std::uint64_t>(period));
  repeating_.push_back(std::move(repeating));
}

void LoopImpl::on_signal(int number, std::function<void()> run) {
  auto watch = std::make_unique<SignalWatch>();
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
  watches_more_ = true;
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
  watches_more_ = true;
  return process->handle.pid;
}

// --- The end ---------------------------------------------------------------

void LoopImpl::finish(Millis limit) {
  sockets_->flush();
  const std::uint64_t until =
      uv_hrtime() / 1'000'000 + static_cast<std::uint64_t>(limit);
  while (sockets_->unsent()) {
    const std::uint64_t now = uv_hrtime() / 1'000'000;
    if (now >= until) break;
    iterate(static_cast<int>(until - now));
  }
  close_everything();
}

void LoopImpl::close_everything() {
  if (closed_all_) return;
  closed_all_ = true;
  on_turn_ = nullptr;
  sockets_->stop_listening(false);
  sockets_->close_all();
  sockets_->reap();
  uv_walk(
      &loop_,
      [](uv_handle_t* handle, void*) {
        if (uv_is_closing(handle)) return;
        const bool child = handle->type == UV_PROCESS;
        uv_close(
            handle,
            child
                ? [](uv_handle_t* h) { delete static_cast<Process*>(h->data); }
                : uv_close_cb(nullptr));
      },
      nullptr);
  while (uv_run(&loop_, UV_RUN_DEFAULT) != 0) {
  }
}

}  // namespace

Result<std::unique_ptr<Loop>> Loop::make(bool together) {
  // A peer that went away is an error code, never a signal.
  std::signal(SIGPIPE, SIG_IGN);
  auto sockets = Sockets::make(together);
  if (!sockets) return sockets.error();
  auto loop = std::make_unique<LoopImpl>(std::move(*sockets));
  if (auto begun = loop->begin(); !begun) return begun.error();
  return std::unique_ptr<Loop>(std::move(loop));
}

bool is_loopback(const std::string& host) {
  if (host == "localhost" || host == "::1") return true;
  in_addr v4;
  return inet_pton(AF_INET, host.c_str(), &v4) == 1 &&
         (ntohl(v4.s_addr) >> 24) == 127;
}

}  // namespace machina
