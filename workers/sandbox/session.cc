// The worker's side: its slot, a session in it, and the steps of the session.
// Everything here runs without privilege. A step's verdict is decided in
// verdict(), from who killed it, waitid, and the kernel's counters.

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>
#include <optional>
#include <utility>

#include "queue/base/fd.h"
#include "workers/sandbox/collector.h"
#include "workers/sandbox/launch.h"
#include "workers/sandbox/output.h"

namespace machina::sandbox {

namespace {

constexpr int kReplyMs = 15'000;
constexpr Millis kTermMs = 2000;  // between TERM and KILL on cancel
// After a KILL: init's time to answer, then the keeper's to end the session.
// Together less than the 3 s that run() may take beyond its timeout.
constexpr Millis kKillMs = 2000;
constexpr Millis kGiveUpMs = 900;
constexpr std::uint64_t kFloodFactor = 16;
constexpr Millis kBuiltinMs = 30'000;  // put and collect
constexpr Millis kTimeoutMax = Millis{30} * 86'400'000;

Millis now_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch())
      .count();
}

// A file in memory that nobody can change any more.
Fd sealed(std::string_view bytes) {
  Fd fd(memfd_create("step", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.get() < 0) return fd;
  if (!write_all(fd.get(), bytes)) return Fd();
  lseek(fd.get(), 0, SEEK_SET);
  fcntl(fd.get(), F_ADD_SEALS,
        F_SEAL_SEAL | F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK);
  return fd;
}

Result<std::string> spec_of(const Step& step) {
  std::string text;
  const auto put = [&](std::string_view word) {
    text.append(word);
    text.push_back('\0');
  };
  const auto whole = [](const std::string& word) {
    return word.find('\0') == std::string::npos;
  };
  std::vector<std::string> env = {"PATH=/usr/local/bin:/usr/bin:/bin",
                                  "HOME=/work", "TMPDIR=/tmp", "LANG=C.UTF-8"};
  for (const auto& variable : step.env) {
    const auto name = variable.substr(0, variable.find('=') + 1);
    if (name.size() < 2 || !whole(variable)) {
      return Error{Code::invalid, "env: \"NAME=value\" expected"};
    }
    // A declared variable replaces ours.
    std::erase_if(env, [&](const auto& e) { return e.starts_with(name); });
    env.push_back(variable);
  }
  if (step.builtin.size() > kBuiltinNameMax) {
    return Error{Code::invalid, "builtin: at most " +
                                    std::to_string(kBuiltinNameMax) +
                                    " bytes expected"};
  }
  if (step.builtin.empty() && step.argv.empty()) {
    return Error{Code::invalid, "argv: at least one word expected"};
  }
  if (step.cwd.empty() || step.cwd[0] != '/' || !whole(step.cwd)) {
    return Error{Code::invalid, "cwd: an absolute path expected"};
  }
  put(step.cwd);
  for (const auto& word : step.argv) {
    if (!whole(word)) return Error{Code::invalid, "argv: a NUL byte"};
    put(word);
  }
  for (const auto& variable : env) put(variable);
  SpecHead head;
  head.argc = static_cast<std::uint32_t>(step.argv.size());
  head.envc = static_cast<std::uint32_t>(env.size());
  head.bytes = text.size();
  std::string all(reinterpret_cast<const char*>(&head), sizeof(head));
  return all + text;
}

// One of a step's two streams.
struct Stream {
  Fd fd;
  HeadAndTail kept;
  bool open = true;
  explicit Stream(std::size_t keep) : kept(keep) {}
};

class SlotImpl;

class SessionImpl : public Session {
 public:
  SessionImpl(SlotImpl& slot, Fd control, const Limits& limits,
              std::uint64_t pids_asked)
      : slot_(slot),
        control_(std::move(control)),
        limits_(limits),
        pids_asked_(pids_asked) {}
  // A sandbox that is weaker than was asked for runs nothing.
  SessionImpl(SlotImpl& slot, std::string weak)
      : slot_(slot), weak_(std::move(weak)) {}
  ~SessionImpl() override;

  StepResult run(const Step& step, const Watch& watch) override {
    return run_capped(step, watch, limits_.output_bytes);
  }
  Result<int> start_service(const Step& program) override;
  StepResult wait_service(Millis timeout_ms) override;
  Result<void> put(const std::string& path, std::string_view bytes) override;
  Result<std::string> collect(const std::string& path,
                              std::size_t max_bytes) override;

 private:
  StepResult run_capped(const Step& step, const Watch& watch,
                        std::size_t output_bytes);
  std::optional<StepResult> refusal() const;
  std::optional<std::string> send_step(const Step& step, int in, int out,
                                       int err);
  void order(int signal) {
    send_struct(control_.get(), StepSignal{InitOp::signal, signal});
  }
  // Where the job was given fewer processes than it asked for.
  std::string part_of_pids() const {
    if (limits_.pids >= pids_asked_) return "";
    return "it was given " + std::to_string(limits_.pids) +
           ", its slot's part of the process numbers of this host (the pool's "
           "log names the bound)";
  }
  // Init does not answer: the keeper kills the namespace.
  void give_up();
  StepResult collector(const std::string& request, std::size_t output_bytes);

  SlotImpl& slot_;
  Fd control_;
  Limits limits_;
  std::uint64_t pids_asked_ = 0;  // limits_ has what was given
  std::string weak_;
  bool lost_ = false;
  bool service_ = false;
  Millis service_started_ = 0;
};

class SlotImpl : public Slot {
 public:
  explicit SlotImpl(int channel) : channel_(channel) {}

  Result<int> connect_server() override {
    KeeperRequest request;
    request.op = KeeperOp::connect_server;
    int fd = -1;
    const auto reply = ask(request, -1, &fd, kReplyMs);
    if (!reply) return reply.error();
    if (reply->stage != Stage::none || fd < 0) {
      return Error{Code::unavailable, std::string("connect to the server: ") +
                                          std::strerror(reply->error)};
    }
    return fd;
  }

  Result<std::unique_ptr<Session>> open(const SessionSpec& spec) override {
    KeeperRequest request;
    request.op = KeeperOp::open;
    request.role = static_cast<std::uint8_t>(spec.role);
    request.min_level = spec.min_level;
    request.memory_mb = spec.limits.memory_mb;
    request.disk_mb = spec.limits.disk_mb;
    request.pids = spec.limits.pids;
    request.cpu_ms = spec.limits.cpu_ms;
    if (spec.repo.size() >= sizeof(request.repo) ||
        spec.mirror.size() >= sizeof(request.mirror)) {
      return Error{Code::invalid, "repo or mirror: longer than 1023 bytes"};
    }
    std::memcpy(request.repo, spec.repo.data(), spec.repo.size());
    std::memcpy(request.mirror, spec.mirror.data(), spec.mirror.size());
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
      return Error{Code::io, std::string("session: ") + std::strerror(errno)};
    }
    Fd ours(pair[0]), theirs(pair[1]);
    const auto reply = ask(request, theirs.get(), nullptr, kReplyMs);
    if (!reply) return reply.error();
    last_ = *reply;
    if (reply->too_weak ||
        (reply->stage != Stage::none && reply->level < spec.min_level)) {
      return std::unique_ptr<Session>(std::make_unique<SessionImpl>(
          *this, "level L" + std::to_string(reply->level) + ", L" +
                     std::to_string(spec.min_level) + " required"));
    }
    if (reply->stage == Stage::paths) {  // the repository that was named
      const bool missing = reply->error == ENOENT || reply->error == ENOTDIR;
      return Error{
          missing ? Code::not_found : Code::invalid,
          reply->error == ELOOP
              ? "there is a symbolic link on the way to it now, and "
                "none is followed here: submit the job again"
              : std::string("repository: ") + std::strerror(reply->error)};
    }
    if (reply->stage != Stage::none) {
      return Error{Code::unavailable, std::string("sandbox: ") +
                                          stage_name(reply->stage) + ": " +
                                          std::strerror(reply->error)};
    }
    Limits given = spec.limits;
    given.pids = reply->pids;
    return std::unique_ptr<Session>(std::make_unique<SessionImpl>(
        *this, std::move(ours), given, spec.limits.pids));
  }

  void close_session(int wait_ms) {
    KeeperRequest request;
    request.op = KeeperOp::close;
    (void)ask(request, -1, nullptr, wait_ms);
  }

  const KeeperReply& last() const { return last_; }

 private:
  // One question at a time; a thread that only connects may ask beside the one
  // that runs steps.
  Result<KeeperReply> ask(const KeeperRequest& request, int pass, int* got,
                          int wait_ms) {
    const std::lock_guard lock(mutex_);
    if (broken_) return Error{Code::unavailable, "the spawner has gone"};
    const int error =
        send_struct(channel_.get(), request,
                    std::span<const int>(&pass, pass >= 0 ? 1U : 0U));
    // Not sent: there is nothing to wait for, and the next may pass.
    if (error && !gone(error)) {
      return Error{
          Code::unavailable,
          std::string("the request cannot be sent: ") + std::strerror(error)};
    }
    KeeperReply reply;
    int fds[1] = {-1};
    std::size_t count = 0;
    if (error || !readable_within(channel_.get(), wait_ms) ||
        !recv_struct(channel_.get(), reply, fds, &count)) {
      broken_ = true;  // a late reply must not be taken for the next one
      return Error{Code::unavailable, "the spawner does not answer"};
    }
    if (count && got) {
      *got = fds[0];
    } else if (count) {
      ::close(fds[0]);
    }
    return reply;
  }

  std::mutex mutex_;
  Fd channel_;
  bool broken_ = false;
  KeeperReply last_;
};

SessionImpl::~SessionImpl() {
  control_.reset();
  if (weak_.empty()) slot_.close_session(kReplyMs);
}

void SessionImpl::give_up() {
  lost_ = true;
  slot_.close_session(static_cast<int>(kGiveUpMs));
}

std::optional<StepResult> SessionImpl::refusal() const {
  StepResult result;
  if (!weak_.empty()) {
    result.ended = Ended::isolation;
    result.detail = weak_;
  } else if (lost_) {
    result.detail = "the sandbox has died";
  } else if (service_) {
    result.detail = "a service is running in the sandbox";
  } else {
    return std::nullopt;
  }
  return result;
}

std::optional<std::string> SessionImpl::send_step(const Step& step, int in,
                                                  int out, int err) {
  const auto spec = spec_of(step);
  if (!spec) return spec.error().what;
  const Fd file = sealed(*spec);
  if (file.get() < 0) return std::string("memfd: ") + std::strerror(errno);
  StepRequest request;
  step.builtin.copy(request.builtin, kBuiltinNameMax);
  request.merge_stderr = err < 0;
  const int fds[] = {file.get(), in, out, err};
  const int error =
      send_struct(control_.get(), request, std::span(fds, err < 0 ? 3U : 4U));
  if (error) return std::string("step: ") + std::strerror(error);
  return std::nullopt;
}

// Which of the reasons a step can end for: what killed it comes first, then a
// limit that was hit by a step that did not succeed.
void verdict(const StepDone& done, std::optional<Ended> killed,
             StepResult* result) {
  const int status = done.wait_status;
  const bool exited = WIFEXITED(status);
  if (exited) result->exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) result->signal = WTERMSIG(status);
  result->ended = exited ? Ended::exited : Ended::signalled;
  result->cpu_ms = static_cast<Millis>(done.cpu_us / 1000);
  result->max_rss_bytes = done.memory_bytes;
  result->disk_bytes = done.disk_bytes;
  const bool succeeded = exited && result->exit_code == 0;
  if (done.stage == Stage::exec || done.stage == Stage::cwd) {
    // As a shell says it: 127 not found, 126 not to be run.
    result->ended = Ended::exited;
    result->exit_code =
        done.stage == Stage::exec && done.error == ENOENT ? 127 : 126;
    result->detail =
        std::string(stage_name(done.stage)) + ": " + std::strerror(done.error);
  } else if (done.stage != Stage::none) {
    // B6: a mechanism refused to start.
    const bool ours = done.stage == Stage::request ||
                      done.stage == Stage::spec || done.stage == Stage::fork ||
                      done.stage == Stage::builtin ||
                      done.stage == Stage::stdio;
    result->ended = ours ? Ended::failed : Ended::isolation;
    result->exit_code = -1;
    result->detail =
        std::string(stage_name(done.stage)) + ": " + std::strerror(done.error);
  } else if (killed) {
    result->ended = *killed;
  } else if (done.killed_by == Kill::oom) {
    result->ended = Ended::oom;
    result->detail = kDetailOwnMemory;
  } else if (done.killed_by == Kill::sockets) {
    result->ended = Ended::oom;
    result->detail = kDetailSockets;
  } else if (done.killed_by == Kill::pids) {
    result->ended = Ended::pids;
  } else if (done.killed_by == Kill::cpu) {
    result->ended = Ended::timeout;
    result->detail = kDetailCpu;
  } else if (succeeded) {
  } else if (done.oom_kills) {
    result->ended = Ended::oom;
  } else if (done.pids_hits) {
    result->ended = Ended::pids;
  } else if (done.disk_full || (!exited && result->signal == SIGXFSZ)) {
    result->ended = Ended::disk;
    if (done.inodes_full) result->detail = kDetailInodes;
  } else if (done.cpu_over) {
    // By the counter: SIGXCPU alone may have been sent by the program.
    result->ended = Ended::timeout;
    result->detail = kDetailCpu;
  }
}

StepResult SessionImpl::run_capped(const Step& step, const Watch& watch,
                                   std::size_t output_bytes) {
  if (auto refused = refusal()) return *refused;
  StepResult result;
  const Millis started = now_ms();
  const auto failed = [&](const std::string& why) {
    result.ended = Ended::failed;
    result.detail = why;
    result.wall_ms = now_ms() - started;
    return result;
  };
  const Fd in = sealed(step.stdin_data);
  if (in.get() < 0) return failed("stdin: no memory");
  Stream streams[2] = {Stream(output_bytes), Stream(output_bytes)};
  Fd writers[2];
  for (int i = 0; i < (step.merge_stderr ? 1 : 2); ++i) {
    int pair[2];
    if (pipe2(pair, O_CLOEXEC) < 0) return failed("pipe: no descriptor");
    streams[i].fd.reset(pair[0]);
    writers[i].reset(pair[1]);
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
  }
  streams[1].open = !step.merge_stderr;
  if (auto error =
          send_step(step, in.get(), writers[0].get(), writers[1].get())) {
    return failed(*error);
  }
  writers[0].reset();
  writers[1].reset();

  const Millis deadline =
      started + std::clamp<Millis>(step.timeout_ms, 0, kTimeoutMax);
  const std::uint64_t flood =
      kFloodFactor * std::max<std::uint64_t>(output_bytes, 4096);
  std::optional<Ended> killed;
  Millis kill_at = 0;  // a TERM was sent; KILL follows then
  Millis lost_at = 0;  // a KILL was sent; init must have answered by then
  const auto kill_now = [&](Ended why) {
    if (!killed) killed = why;
    if (!lost_at) lost_at = now_ms() + kKillMs;
    order(SIGKILL);
  };
  // Reads what is there, at most `rounds` buffers of it.
  const auto drain = [&](int i, int rounds) {
    Stream& s = streams[i];
    char buffer[65536];
    while (s.open && rounds-- > 0) {
      const ssize_t n = read(s.fd.get(), buffer, sizeof(buffer));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) return;
      if (n <= 0) {
        s.open = false;
        return;
      }
      const auto bytes =
          std::as_bytes(std::span(buffer, static_cast<std::size_t>(n)));
      s.kept.add(bytes);
      if (watch.on_output) watch.on_output(i + 1, bytes);
      if (s.kept.total() > flood && !lost_at) {
        kill_now(Ended::output);
      }
    }
  };

  StepDone done;
  for (;;) {
    const Millis now = now_ms();
    if (watch.cancel && watch.cancel->load() && !killed) {
      killed = Ended::cancelled;
      kill_at = now + kTermMs;
      order(SIGTERM);
    }
    if (!lost_at && now >= deadline) kill_now(Ended::timeout);
    if (!lost_at && kill_at && now >= kill_at) kill_now(Ended::cancelled);
    if (lost_at && now >= lost_at) {
      give_up();
      break;
    }
    Millis wait = (lost_at   ? lost_at
                   : kill_at ? std::min(kill_at, deadline)
                             : deadline) -
                  now;
    // Without a descriptor to be woken by, the flag is looked at.
    if (watch.cancel && watch.wake_fd < 0) wait = std::min<Millis>(wait, 100);
    pollfd items[4] = {{control_.get(), POLLIN, 0},
                       {streams[0].open ? streams[0].fd.get() : -1, POLLIN, 0},
                       {streams[1].open ? streams[1].fd.get() : -1, POLLIN, 0},
                       {killed ? -1 : watch.wake_fd, POLLIN, 0}};
    poll(items, 4, static_cast<int>(std::clamp<Millis>(wait, 0, 60'000)));
    if (items[1].revents) drain(0, 4);
    if (items[2].revents) drain(1, 4);
    if (items[3].revents && watch.cancel && !watch.cancel->load()) {
      // Woken for another reason: do not spin on it.
      usleep(1000);
    }
    if (!items[0].revents) continue;
    if (!recv_struct(control_.get(), done)) {
      lost_ = true;
      break;
    }
    break;
  }
  // The tree is dead, so what is in the pipes is all there will be.
  for (int i = 0; i < 2; ++i) drain(i, 64);
  if (lost_) {
    result.ended = killed.value_or(Ended::failed);
    result.detail = "the sandbox has died";
  } else {
    verdict(done, killed, &result);
    if (result.ended == Ended::pids) result.detail = part_of_pids();
  }
  result.wall_ms = now_ms() - started;
  result.out = streams[0].kept.text();
  result.err = streams[1].kept.text();
  result.output_bytes = streams[0].kept.total() + streams[1].kept.total();
  result.truncated = streams[0].kept.truncated() || streams[1].kept.truncated();
  return result;
}

Result<int> SessionImpl::start_service(const Step& program) {
  if (auto refused = refusal()) {
    return Error{Code::unavailable, refused->detail};
  }
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
    return Error{Code::io, std::string("service: ") + std::strerror(errno)};
  }
  Fd ours(pair[0]), theirs(pair[1]);
  const Fd null(open("/dev/null", O_WRONLY | O_CLOEXEC));
  if (auto error = send_step(program, theirs.get(), theirs.get(), null.get())) {
    return Error{Code::unavailable, *error};
  }
  service_ = true;
  service_started_ = now_ms();
  return ours.release();
}

StepResult SessionImpl::wait_service(Millis timeout_ms) {
  StepResult result;
  if (!service_) {
    result.detail = "no service is running";
    return result;
  }
  service_ = false;
  std::optional<Ended> killed;
  if (!readable_within(control_.get(), static_cast<int>(std::clamp<Millis>(
                                           timeout_ms, 0, 1 << 30)))) {
    killed = Ended::timeout;
    order(SIGKILL);
  }
  StepDone done;
  if (killed && !readable_within(control_.get(), kKillMs)) {
    give_up();
  } else if (!recv_struct(control_.get(), done)) {
    lost_ = true;
  }
  if (lost_) {
    result.ended = killed.value_or(Ended::failed);
    result.detail = "the sandbox has died";
  } else {
    verdict(done, killed, &result);
    if (result.ended == Ended::pids) result.detail = part_of_pids();
  }
  result.wall_ms = now_ms() - service_started_;
  return result;
}

StepResult SessionImpl::collector(const std::string& request,
                                  std::size_t output_bytes) {
  Step step;
  step.builtin = kCollectBuiltin;
  step.stdin_data = request;
  step.timeout_ms = kBuiltinMs;
  return run_capped(step, Watch{}, output_bytes);
}

Result<void> SessionImpl::put(const std::string& path, std::string_view bytes) {
  const auto request = put_request(path, bytes);
  if (!request) return request.error();
  const auto result = collector(*request, 4096);
  if (auto error = collector_error(result, path)) return *error;
  return {};
}

Result<std::string> SessionImpl::collect(const std::string& path,
                                         std::size_t max_bytes) {
  const auto request = collect_request(path, max_bytes);
  if (!request) return request.error();
  auto result = collector(*request, 2 * max_bytes + 4096);
  if (auto error = collector_error(result, path)) return *error;
  return std::move(result.out);
}

}  // namespace

Result<std::unique_ptr<Slot>> Slot::attach(int channel_fd) {
  if (channel_fd < 0 || fcntl(channel_fd, F_SETFD, FD_CLOEXEC) < 0) {
    return Error{Code::invalid, "slot: not a channel of the spawner's"};
  }
  return std::unique_ptr<Slot>(std::make_unique<SlotImpl>(channel_fd));
}

const KeeperReply& last_reply(const Slot& slot) {
  return static_cast<const SlotImpl&>(slot).last();
}

}  // namespace machina::sandbox
