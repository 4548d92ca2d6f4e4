#include "workers/pool.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>

#include "workers/http_client.h"
#include "workers/json_view.h"
#include "workers/kinds/kinds.h"
#include "workers/pool_process.h"
#include "workers/pool_slots.h"
#include "workers/sandbox/sandbox.h"

namespace machina {
namespace {

using std::chrono::milliseconds;
using Steady = std::chrono::steady_clock;

constexpr int kExitLocked = 75;
constexpr Millis kSyncWaitMs = 10'000;
constexpr Millis kSyncRetryMs = 200;
constexpr Millis kSyncEveryMs = 200;    // for news that can wait
constexpr Millis kTickMs = 1000;        // the root is looked for
constexpr Millis kReleaseMs = 2500;     // to give leases back, then KILL
constexpr Millis kServerLeftMs = 1500;  // no answer while draining: it left
constexpr off_t kLogBytesMax = 4 << 20;
constexpr std::size_t kFactsLineMax = 64 << 10;

Millis now_ms() {
  return std::chrono::duration_cast<milliseconds>(
             Steady::now().time_since_epoch())
      .count();
}

Millis wall_ms() {
  return std::chrono::duration_cast<milliseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

__attribute__((format(printf, 1, 2))) void say(const char* format, ...) {
  char line[600];
  va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof line, format, args);
  va_end(args);
  char when[32];
  const Millis wall = wall_ms();
  const time_t seconds = static_cast<time_t>(wall / 1000);
  struct tm parts {};
  gmtime_r(&seconds, &parts);
  strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &parts);
  std::fprintf(stderr, "%s.%03dZ pool: %s\n", when,
               static_cast<int>(wall % 1000), line);
}

std::string random_hex(int digits) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::random_device random;
  std::string out;
  for (int i = 0; i < digits; ++i) out += kHex[random() & 15];
  return out;
}

// The pool's descriptors that outlive the drop of privilege.
struct Root {
  int dir = -1, lock = -1;
};

// 0 or the exit code.
int take_root(const PoolOptions& options, Root& root) {
  root.dir = open(options.root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (root.dir < 0) {
    say("root %s: %s", options.root.c_str(), strerror(errno));
    return 2;
  }
  root.lock = openat(root.dir, "pool.lock",
                     O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (root.lock < 0 || flock(root.lock, LOCK_EX | LOCK_NB) != 0) {
    if (root.lock >= 0 && errno == EWOULDBLOCK) {
      say("another pool has %s/pool.lock", options.root.c_str());
      return kExitLocked;
    }
    say("%s/pool.lock: %s", options.root.c_str(), strerror(errno));
    return 2;
  }
  return 0;
}

// What pool.lock holds beside the lock: a line with the pool's pid, one with
// its spawner's, one for each worker that the server may believe in. A pool
// that was killed leaves it to its successor.
struct Predecessor {
  int spawner = -1;
  std::vector<std::string> workers;
};

Predecessor read_predecessor(const Root& root) {
  Predecessor out;
  char text[16384];
  const ssize_t n = pread(root.lock, text, sizeof text, 0);
  std::istringstream lines(std::string(text, n > 0 ? std::size_t(n) : 0));
  std::string line;
  if (!std::getline(lines, line) || !std::getline(lines, line)) return out;
  out.spawner = std::atoi(line.c_str());
  while (std::getline(lines, line)) {
    if (valid_name(line)) out.workers.push_back(line);
  }
  return out;
}

void write_successor(const Root& root, int spawner,
                     const std::vector<std::string>& workers) {
  std::string text =
      std::to_string(getpid()) + "\n" + std::to_string(spawner) + "\n";
  for (const std::string& name : workers) text += name + "\n";
  (void)!pwrite(root.lock, text.data(), text.size(), 0);
  (void)!ftruncate(root.lock, static_cast<off_t>(text.size()));
}

// Its spawner ends by itself, after its sandboxes; what does not is killed.
// The number may be another process's by now: its name tells.
void outlast_spawner(int pid) {
  const auto there = [&] {
    std::ifstream file("/proc/" + std::to_string(pid) + "/comm");
    std::string name;
    return pid > 1 && std::getline(file, name) && name == "machina-spawner";
  };
  for (int round = 0; round < 1000 && there(); ++round) {
    if (round == 500) kill(pid, SIGKILL);
    usleep(10'000);
  }
}

// stderr of the pool and its workers, from here on.
void log_to_root(const Root& root) {
  struct stat info {};
  if (fstatat(root.dir, "pool.log", &info, AT_SYMLINK_NOFOLLOW) == 0 &&
      info.st_size > kLogBytesMax) {
    renameat(root.dir, "pool.log", root.dir, "pool.log.1");
  }
  const int log =
      openat(root.dir, "pool.log",
             O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (log < 0) return;
  dup2(log, 1);
  dup2(log, 2);
  close(log);
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (null >= 0) {
    dup2(null, 0);
    close(null);
  }
}

class Pool {
 public:
  Pool(const PoolOptions& options, const Root& root,
       const Predecessor& predecessor, sandbox::Spawner& spawner,
       Program program)
      : options_(options),
        root_(root),
        spawner_(spawner),
        program_(std::move(program)),
        id_("p" + random_hex(8)),
        client_([this] { return connect(); }),
        target_(std::clamp(options.count, 0, kSlotsMax)) {
    char host[256] = "localhost";
    gethostname(host, sizeof host - 1);
    host_ = host;
    slots_.inherit(predecessor.workers);
    remember();
  }

  int run();

 private:
  enum class Mode { serving, draining, killing };
  struct Facts {
    int fd = -1;
    std::string line;
  };

  Result<int> connect() {
    std::lock_guard lock(spawner_mutex_);
    return spawner_.connect_server();
  }

  // With mutex_ held.
  void remember() const {
    write_successor(root_, spawner_.pid(), slots_.unreported());
  }

  // --- the sync thread ---
  void sync_loop();
  void take_answer(const std::string& body);
  void wake_main() const {
    const std::uint64_t one = 1;
    (void)!write(news_fd_, &one, sizeof one);
  }
  // Called with mutex_ held. `urgent`: end the poll that is parked.
  void changed(bool urgent) {
    dirty_ = true;
    if (in_call_ && (urgent || now_ms() - synced_ms_ >= kSyncEveryMs)) {
      client_.interrupt();
    }
    sync_changed_.notify_all();
  }

  // --- the main thread ---
  void wait_for_news();
  Millis timeout() const;
  void reap();
  void take_empty_slots();
  void read_facts(int slot);
  void take_fact(int slot, const std::string& line);
  void adjust();
  void start_worker(int slot);
  void signal_all(int signal);
  void begin_drain(const char* why, Millis grace_ms);
  void begin_kill(const char* why);
  void check_world();
  bool finished();
  bool spawner_died() const;

  const PoolOptions& options_;
  const Root& root_;
  sandbox::Spawner& spawner_;
  const Program program_;
  const std::string id_;
  std::string host_;
  HttpClient client_;
  int signal_fd_ = -1, news_fd_ = -1;
  std::map<int, Facts> facts_;  // by slot
  int starts_ = 0;

  std::mutex spawner_mutex_;
  std::mutex mutex_;  // all that follows
  std::condition_variable sync_changed_;
  PoolSlots slots_;
  int target_;
  bool drain_asked_ = false, dirty_ = false, in_call_ = false, quit_ = false;
  Millis synced_ms_ = 0;      // when a sync was last begun
  Millis away_since_ms_ = 0;  // since when none was answered; 0: not away
  Mode mode_ = Mode::serving;
  Millis release_at_ms_ = 0, kill_at_ms_ = 0, empty_since_ms_ = 0;
  bool released_ = false;
  int exit_code_ = 0;
};

int Pool::run() {
  sigset_t mine;
  sigemptyset(&mine);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGCHLD}) {
    sigaddset(&mine, signal);
  }
  pthread_sigmask(SIG_BLOCK, &mine, nullptr);
  signal(SIGPIPE, SIG_IGN);
  signal_fd_ = signalfd(-1, &mine, SFD_CLOEXEC | SFD_NONBLOCK);
  news_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  say("%s: pid %d, uid %d, spawner %d, %d workers", id_.c_str(), getpid(),
      static_cast<int>(getuid()), spawner_.pid(), target_);

  std::thread sync([this] { sync_loop(); });
  while (!finished()) {
    adjust();
    wait_for_news();
    check_world();
  }
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
    client_.interrupt();
    sync_changed_.notify_all();
  }
  sync.join();
  for (auto& [slot, facts] : facts_) close(facts.fd);
  close(signal_fd_);
  close(news_fd_);
  say("left");
  return exit_code_;
}

// --- the sync thread ---

void Pool::sync_loop() {
  std::unique_lock lock(mutex_);
  while (!quit_) {
    const std::vector<std::string> gone = slots_.gone();
    const bool parked = mode_ == Mode::serving;
    const Millis wait_ms = parked ? kSyncWaitMs : 200;
    const std::string body = slots_.sync_body(host_, wait_ms);
    dirty_ = false;
    in_call_ = true;
    synced_ms_ = now_ms();
    client_.resume();
    lock.unlock();
    const auto reply =
        client_.post("/v1/pools/" + id_ + "/sync", body, wait_ms + 5000);
    lock.lock();
    in_call_ = false;
    if (reply && reply->status == 200) {
      away_since_ms_ = 0;
      slots_.reported(gone);
      if (!gone.empty()) remember();
      take_answer(reply->body);
      wake_main();
    } else if (reply) {
      say("sync: the server answered %d %.200s", reply->status,
          reply->body.c_str());
    }
    const bool ours = !reply && reply.error().code == Code::conflict;
    if (quit_ || ours) continue;
    if ((!reply || reply->status != 200) && away_since_ms_ == 0) {
      away_since_ms_ = now_ms();
      say("the server is away");
    }
    // Not faster than kSyncEveryMs, whatever the server does; a death that is
    // not reported yet goes at once.
    const Millis rest = reply && reply->status == 200
                            ? synced_ms_ + kSyncEveryMs - now_ms()
                            : kSyncRetryMs;
    if (rest > 0) {
      sync_changed_.wait_for(lock, milliseconds(rest), [&] {
        return quit_ || (dirty_ && reply && !slots_.gone().empty());
      });
    }
  }
}

void Pool::take_answer(const std::string& body) {
  const bool good = json::members(body, [&](auto key, auto value) {
    if (key == "target") {
      const auto target = json::integer(value);
      if (!target || *target < 0 || *target > kSlotsMax) return false;
      if (*target != target_) {
        say("target %d -> %d", target_, static_cast<int>(*target));
      }
      target_ = static_cast<int>(*target);
    } else if (key == "drain") {
      drain_asked_ = value == "true";
    }
    return true;
  });
  if (!good) say("sync: malformed answer %.200s", body.c_str());
}

// --- the main thread ---

Millis Pool::timeout() const {
  Millis at = now_ms() + kTickMs;
  const Millis next = slots_.next_start_ms(target_, now_ms());
  if (next >= 0) at = std::min(at, next);
  if (mode_ != Mode::serving) at = std::min(at, now_ms() + 50);
  return std::max<Millis>(0, at - now_ms());
}

void Pool::wait_for_news() {
  std::vector<pollfd> items = {{signal_fd_, POLLIN, 0},
                               {news_fd_, POLLIN, 0},
                               {spawner_.events_fd(), POLLIN, 0}};
  std::vector<int> order;
  for (const auto& [slot, facts] : facts_) {
    items.push_back({facts.fd, POLLIN, 0});
    order.push_back(slot);
  }
  Millis wait;
  {
    std::lock_guard lock(mutex_);
    wait = timeout();
  }
  if (::poll(items.data(), items.size(), static_cast<int>(wait)) < 0) return;
  if (items[0].revents != 0) {
    signalfd_siginfo info;
    while (::read(signal_fd_, &info, sizeof info) == sizeof info) {
      if (info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT) {
        std::lock_guard lock(mutex_);
        begin_drain("asked to leave", options_.drain_ms);
      }
    }
  }
  std::uint64_t ignored;
  if (items[1].revents != 0) (void)!::read(news_fd_, &ignored, sizeof ignored);
  // What a worker said last is read before its death is noticed.
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (items[i + 3].revents != 0) read_facts(order[i]);
  }
  reap();
  take_empty_slots();
}

void Pool::reap() {
  std::vector<int> pids;
  {
    std::lock_guard lock(mutex_);
    for (const auto& slot : slots_.all()) {
      if (slot.pid > 0) pids.push_back(slot.pid);
    }
  }
  for (const int pid : pids) {
    int status = 0;
    if (waitpid(pid, &status, WNOHANG) != pid) continue;
    std::lock_guard lock(mutex_);
    const int slot = slots_.exited(pid, now_ms());
    if (slot < 0) continue;
    const bool clean = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (!clean) {
      say("worker %s (pid %d) died: %s %d", slots_.at(slot).name.c_str(), pid,
          WIFSIGNALED(status) ? "signal" : "exit code",
          WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    }
    changed(false);
  }
}

void Pool::take_empty_slots() {
  std::vector<int> empty;
  {
    std::lock_guard lock(spawner_mutex_);
    empty = spawner_.take_empty();
  }
  // The spawner sees a worker's channel close before the pool may have reaped
  // it: one more look, and what is still alive then is remembered as dead.
  if (!empty.empty()) reap();
  std::lock_guard lock(mutex_);
  for (const int slot : empty) {
    const auto& s = slots_.at(slot);
    if (s.phase == PoolSlots::Phase::running ||
        s.phase == PoolSlots::Phase::leaving) {
      // It closed its channel and lives: without a slot it is of no use.
      kill(s.pid, SIGKILL);
      int status = 0;
      const int pid = s.pid;
      while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
      }
      slots_.exited(pid, now_ms());
    }
    slots_.emptied(slot);
    const auto facts = facts_.find(slot);
    if (facts != facts_.end()) {
      close(facts->second.fd);
      facts_.erase(facts);
    }
  }
  if (!empty.empty()) changed(true);
}

void Pool::read_facts(int slot) {
  const auto at = facts_.find(slot);
  if (at == facts_.end()) return;
  Facts& facts = at->second;
  char buffer[4096];
  for (;;) {
    const ssize_t n = ::read(facts.fd, buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return;  // nothing more for now
    if (n == 0) {
      close(facts.fd);
      facts_.erase(at);
      return;
    }
    facts.line.append(buffer, static_cast<std::size_t>(n));
    std::size_t end;
    while ((end = facts.line.find('\n')) != std::string::npos) {
      take_fact(slot, facts.line.substr(0, end));
      facts.line.erase(0, end + 1);
    }
    if (facts.line.size() > kFactsLineMax) facts.line.clear();
  }
}

void Pool::take_fact(int slot, const std::string& line) {
  std::lock_guard lock(mutex_);
  auto& s = slots_.at(slot);
  std::string state, job;
  bool first = false;
  json::members(line, [&](auto key, auto value) {
    if (key == "state") state = json::string(value).value_or("");
    if (key == "job") job = json::string(value).value_or("");
    if (key == "isolation") {
      first = s.isolation.empty();
      s.isolation = std::string(value);
    }
    return true;
  });
  s.job = state == "busy" ? job : "";
  if (first) {
    std::string level;
    json::members(s.isolation, [&](auto key, auto value) {
      if (key == "level") level = std::string(value);
      return true;
    });
    say("worker %s: level %s", s.name.c_str(), level.c_str());
  }
  changed(first);
}

void Pool::adjust() {
  std::vector<int> starts;
  {
    std::lock_guard lock(mutex_);
    if (drain_asked_ && mode_ == Mode::serving) {
      begin_drain("the server drains", options_.drain_ms);
    }
    if (mode_ != Mode::serving) return;
    for (const int slot : slots_.to_stop(target_)) {
      kill(slots_.at(slot).pid, SIGTERM);
      slots_.leaving(slot);
      changed(false);
    }
    starts = slots_.to_start(target_, now_ms());
  }
  for (const int slot : starts) start_worker(slot);
}

void Pool::start_worker(int slot) {
  const auto failed = [&](const std::string& why) {
    say("slot %d: %s", slot, why.c_str());
    std::lock_guard lock(mutex_);
    slots_.not_started(slot, now_ms());
  };
  Result<int> channel = Error{Code::unavailable, ""};
  {
    std::lock_guard lock(spawner_mutex_);
    channel = spawner_.open_slot(slot);
  }
  if (!channel) return failed(channel.error().what);
  int pipe[2];
  if (pipe2(pipe, O_CLOEXEC) != 0) {
    close(*channel);
    return failed(std::string("pipe: ") + strerror(errno));
  }
  fcntl(pipe[0], F_SETFL, O_NONBLOCK);
  const std::string name =
      id_ + "-" + std::to_string(slot) + "-" + std::to_string(++starts_);
  const std::vector<std::string> argv = {
      options_.self_exe, "worker",
      "--name",          name,
      "--channel",       std::to_string(kWorkerChannelFd),
      "--facts",         std::to_string(kWorkerFactsFd),
      "--root",          options_.root,
  };
  const auto pid = program_.start(argv, options_.worker_env, *channel, pipe[1]);
  close(*channel);
  close(pipe[1]);
  if (!pid) {
    close(pipe[0]);
    return failed(pid.error().what);
  }
  if (const auto old = facts_.find(slot); old != facts_.end()) {
    close(old->second.fd);
  }
  facts_[slot] = Facts{pipe[0], ""};
  std::lock_guard lock(mutex_);
  slots_.started(slot, name, *pid, now_ms(), wall_ms());
  remember();
  changed(false);
}

void Pool::signal_all(int signal) {
  for (const auto& slot : slots_.all()) {
    if (slot.pid > 0) kill(slot.pid, signal);
  }
}

// Workers finish what they have; near the end of the grace they give it back.
void Pool::begin_drain(const char* why, Millis grace_ms) {
  if (mode_ != Mode::serving) return;
  say("%s: no new jobs, %d ms for %d workers", why, static_cast<int>(grace_ms),
      slots_.alive());
  mode_ = Mode::draining;
  release_at_ms_ = now_ms() + grace_ms - std::min<Millis>(1000, grace_ms / 4);
  kill_at_ms_ = release_at_ms_ + kReleaseMs;
  for (int i = 0; i < kSlotsMax; ++i) {
    if (slots_.at(i).phase != PoolSlots::Phase::running) continue;
    kill(slots_.at(i).pid, SIGTERM);
    slots_.leaving(i);
  }
  changed(true);
}

void Pool::begin_kill(const char* why) {
  if (mode_ == Mode::killing) return;
  say("%s: killing %d workers", why, slots_.alive());
  mode_ = Mode::killing;
  signal_all(SIGKILL);
}

void Pool::check_world() {
  std::lock_guard lock(mutex_);
  const Millis now = now_ms();
  struct stat info {};
  if (fstat(root_.dir, &info) == 0 && info.st_nlink == 0) {
    begin_kill("the root is gone");
  }
  if (spawner_died()) {
    exit_code_ = 1;
    begin_kill("the spawner died");
  }
  const Millis away = away_since_ms_ > 0 ? now - away_since_ms_ : 0;
  if (mode_ == Mode::serving && away >= options_.orphan_ms) {
    begin_kill("the server has been away too long");
  }
  if (mode_ == Mode::draining) {
    if (away >= kServerLeftMs && drain_asked_) {
      begin_kill("the server has left");
    } else if (now >= kill_at_ms_) {
      begin_kill("time is up");
    } else if (now >= release_at_ms_ && !released_) {
      released_ = true;
      signal_all(SIGTERM);
    }
  }
}

bool Pool::spawner_died() const {
  siginfo_t info{};
  return waitid(P_PID, static_cast<id_t>(spawner_.pid()), &info,
                WEXITED | WNOHANG | WNOWAIT) == 0 &&
         info.si_pid != 0;
}

// Nobody is left, and the server knows it or cannot be told.
bool Pool::finished() {
  std::lock_guard lock(mutex_);
  if (mode_ == Mode::serving) return false;
  const bool no_spawner = exit_code_ != 0;
  if (no_spawner ? slots_.alive() > 0 : slots_.pending() > 0) return false;
  if (empty_since_ms_ == 0) {
    empty_since_ms_ = now_ms();
    changed(true);
  }
  const Millis waited = now_ms() - empty_since_ms_;
  return slots_.gone().empty() || away_since_ms_ > 0 || waited >= 1000;
}

}  // namespace

int run_pool(const PoolOptions& options) {
  Root root;
  if (const int code = take_root(options, root); code != 0) return code;
  setsid();  // a terminal's signals are for the server
  log_to_root(root);
  auto program = Program::open(options.self_exe);
  if (!program) {
    say("%s", program.error().what.c_str());
    return 2;
  }
  const Predecessor predecessor = read_predecessor(root);
  outlast_spawner(predecessor.spawner);
  register_built_in_handlers();
  sandbox::SpawnerOptions spawning;
  spawning.root = options.root;
  spawning.socket_path = options.socket_path;
  spawning.repo_roots = options.repo_roots;
  spawning.slot_uid_base = options.slot_uid_base;
  spawning.seccomp_enable = options.seccomp_enable;
  spawning.self_exe = options.self_exe;
  auto spawner = sandbox::Spawner::start(spawning);
  if (!spawner) {
    say("spawner: %s", spawner.error().what.c_str());
    return 1;
  }
  if (auto dropped = drop_privilege(options.slot_uid_base - 1); !dropped) {
    say("%s", dropped.error().what.c_str());
    return 1;
  }
  return Pool(options, root, predecessor, **spawner, std::move(*program)).run();
}

}  // namespace machina
