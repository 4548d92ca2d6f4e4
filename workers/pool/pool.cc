#include "workers/pool/pool.h"

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
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include "queue/base/hex.h"
#include "queue/base/json.h"
#include "queue/base/logger.h"
#include "queue/base/rfc3339.h"
#include "queue/base/utf8.h"
#include "tools/ops.h"
#include "tools/process.h"
#include "workers/kinds/kinds.h"
#include "workers/pool/pool_process.h"
#include "workers/pool/pool_slots.h"
#include "workers/sandbox/sandbox.h"
#include "workers/worker/http_client.h"
#include "workers/worker/retry.h"
#include "workers/worker/sandbox_counts.h"
#include "workers/worker/worker.h"

namespace machina {
namespace {

using std::chrono::milliseconds;
using Steady = std::chrono::steady_clock;

constexpr int kExitLocked = 75;
constexpr int kExitUnusable = 69;           // P7
constexpr int kUnusableTries = 3;           // in a row, before it is believed
constexpr Millis kUnusableLookMs = 60'000;  // then
constexpr int kLockTries = 20;
constexpr int kSessionDigits = 32;
constexpr char kRemedyDoctor[] =
    "`machina doctor`, run as the server's user, shows what this host lacks";
constexpr Millis kSyncWaitMs = 10'000;
constexpr Millis kRefusedMs = 200;    // after an answer that was none of ours
constexpr Millis kSyncEveryMs = 200;  // for news that can wait
constexpr Millis kFirstAnswerMs = 1000;  // how many workers: asked first
constexpr Millis kTickMs = 1000;         // the root is looked for
constexpr Millis kReleaseMs = 2500;      // to give leases back, then KILL
constexpr Millis kServerLeftMs = 1500;   // no answer while draining: it left
constexpr Millis kLastWordsMs = 1000;
constexpr int kLinesPipeBytes = 1 << 20;
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

// The pool's descriptors that outlive the drop of privilege.
struct Root {
  int dir = -1, lock = -1;
};

// 0 or the exit code.
int take_root(const PoolOptions& options, Root& root) {
  root.dir = open(options.root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (root.dir < 0) {
    LogLine(Severity::error, "start_failed",
            "root " + options.root + ": " + strerror(errno));
    return 2;
  }
  root.lock = openat(root.dir, "pool.lock",
                     O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  // A server that looks whether a pool is there holds it for a moment.
  int locked = -1;
  for (int i = 0; root.lock >= 0 && i < kLockTries && locked != 0; ++i) {
    if (i > 0) usleep(10'000);
    locked = flock(root.lock, LOCK_EX | LOCK_NB);
    if (locked != 0 && errno != EWOULDBLOCK) break;
  }
  if (locked != 0) {
    if (root.lock >= 0 && errno == EWOULDBLOCK) {
      LogLine(Severity::error, "start_failed",
              "another pool has " + options.root + "/pool.lock");
      return kExitLocked;
    }
    LogLine(Severity::error, "start_failed",
            options.root + "/pool.lock: " + strerror(errno));
    return 2;
  }
  return 0;
}

// What pool.lock holds beside the lock: a line with the pool's pid, one with
// its spawner's pid, start and boot, one with "=" and the secret of the
// workers' sessions, one for each worker that the server may believe in: its
// name, and what became of it. A line more says that the pool was asked to
// leave (tools/ops.h: whoever kills it writes that, too): who lived then was
// ended by whoever operates it. A pool that was killed leaves it to its
// successor, which must know the secret to say what became of the workers.
struct Predecessor {
  ProcessId spawner;
  std::string session;
  std::vector<std::string> gone, ended;
};

Predecessor read_predecessor(const Root& root) {
  Predecessor out;
  char text[16384];
  const ssize_t n = pread(root.lock, text, sizeof text, 0);
  std::istringstream lines(std::string(text, n > 0 ? std::size_t(n) : 0));
  std::string line;
  if (!std::getline(lines, line) || !std::getline(lines, line)) return out;
  std::istringstream spawner(line);
  spawner >> out.spawner.pid >> out.spawner.start_ticks >> out.spawner.boot_id;
  bool asked = false;
  std::vector<std::string> lived;
  const auto take = [&line](std::string_view fate,
                            std::vector<std::string>* names) {
    if (!line.ends_with(fate)) return false;
    line.resize(line.size() - fate.size());
    if (valid_name(line)) names->push_back(line);
    return true;
  };
  while (std::getline(lines, line)) {
    if (line.starts_with('=')) {
      out.session = line.substr(1);
      continue;
    }
    asked = asked || line == kAskedToLeave;
    if (take(kDied, &out.gone) || take(kEnded, &out.ended)) continue;
    take("", &lived);
  }
  auto& theirs = asked ? out.ended : out.gone;
  theirs.insert(theirs.end(), lived.begin(), lived.end());
  return out;
}

void write_successor(const Root& root, const ProcessId& spawner,
                     const std::string& session, const PoolSlots& slots,
                     bool asked) {
  std::string text = std::to_string(getpid()) + "\n" +
                     std::to_string(spawner.pid) + " " +
                     std::to_string(spawner.start_ticks) + " " +
                     spawner.boot_id + "\n=" + session + "\n";
  if (asked) text.append(kAskedToLeave) += '\n';
  for (const std::string& line : slots.unreported()) text += line + "\n";
  (void)!pwrite(root.lock, text.data(), text.size(), 0);
  (void)!ftruncate(root.lock, static_cast<off_t>(text.size()));
}

// Its spawner ends by itself, after its sandboxes; what does not is killed,
// through a descriptor of the very process that was written down: the same
// number, start and boot, and our user's (a job may not name a process of
// root's to be killed, whatever it can do to the file).
void outlast_spawner(const ProcessId& spawner) {
  if (spawner.pid <= 1) return;
  const auto held = Held::hold(spawner);
  if (!held || held->process().id.uid != geteuid()) return;
  if (held->ended(5000)) return;
  (void)held->signal(SIGKILL);
  (void)held->ended(5000);
}

// <root>/logs/pool, which the pool may write to when it has dropped its
// privilege; <root>/pool.log is a link into it.
int open_log_dir(const Root& root, std::uint32_t uid) {
  if (mkdirat(root.dir, "logs", 0700) != 0 && errno != EEXIST) return -1;
  if (mkdirat(root.dir, "logs/pool", 0700) != 0 && errno != EEXIST) return -1;
  const int dir = openat(root.dir, "logs/pool",
                         O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
  if (dir < 0) return -1;
  if (geteuid() == 0) (void)!fchown(dir, uid, uid);
  struct stat info {};
  if (fstatat(root.dir, "pool.log", &info, AT_SYMLINK_NOFOLLOW) == 0 &&
      S_ISREG(info.st_mode)) {
    // Of an older version: the first predecessor.
    renameat(root.dir, "pool.log", dir, "pool.log.1");
  }
  (void)!symlinkat("logs/pool/pool.log", root.dir, "pool.log");
  return dir;
}

// The pool's pid file, open, since an unprivileged pool cannot remove it: one
// that has left cleanly is empty. -1 where it could not be written.
int write_own_pid(const PoolOptions& options) {
  PidFile file;
  file.role = "pool";
  file.id = this_process();
  file.version = options.version;
  file.started_at = rfc3339_now();
  if (auto ok = write_pid_file(options.root, file); !ok) {
    LogLine(Severity::warn, "no_pid_file", ok.error().what);
    return -1;
  }
  return open((ops_dir(options.root) + "/pool.pid").c_str(),
              O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
}

void erase_own_pid(const PoolOptions& options, int fd) {
  remove_pid_file(options.root, "pool");
  if (fd < 0) return;
  (void)!ftruncate(fd, 0);
  close(fd);
}

// What the pool says goes to the file; what the spawner and the workers say
// comes through a pipe, whose one end is their standard output and error, and
// goes there too: so one process writes the file and may rename it.
class PoolLines {
 public:
  PoolLines(const Root& root, const PoolOptions& options) {
    const std::uint32_t uid = options.slot_uid_base - 1;
    const int dir = open_log_dir(root, uid);
    auto file = dir < 0 ? Result<std::unique_ptr<LineFile>>(
                              Error{Code::io, strerror(errno)})
                        : LineFile::open(dir, "pool.log", options.log_max_bytes,
                                         options.log_total_bytes);
    if (!file) {
      LogLine(Severity::warn, "no_log_file",
              "logs/pool/pool.log: " + file.error().what);
      return;
    }
    if (geteuid() == 0) (void)!fchown((*file)->fd(), uid, uid);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return;
    fcntl(ends[0], F_SETPIPE_SZ, kLinesPipeBytes);
    file_ = std::move(*file);
    pipe_ = ends[0];
    dup2(ends[1], 1);
    dup2(ends[1], 2);  // until the spawner has been forked
    close(ends[1]);
    const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null >= 0) {
      dup2(null, 0);
      close(null);
    }
  }

  // After the spawner was forked and privilege dropped.
  void begin() {
    start_logger(std::move(file_), pipe_);
    begun_ = true;
  }
  ~PoolLines() {
    // Before begin(): what was said is in the pipe, and has no other reader.
    if (!begun_) begin();
    stop_logger(kLastWordsMs);
  }

 private:
  std::unique_ptr<LineFile> file_;
  int pipe_ = -1;
  bool begun_ = false;
};

class Pool {
 public:
  Pool(const PoolOptions& options, const Root& root,
       const Predecessor& predecessor, sandbox::Spawner& spawner,
       const sandbox::PidsBound& pids, Program program)
      : options_(options),
        root_(root),
        spawner_(spawner),
        program_(std::move(program)),
        pids_(pids),
        id_("p" + random_hex(8)),
        session_(predecessor.session.size() == kSessionDigits
                     ? predecessor.session
                     : random_hex(kSessionDigits)),
        client_([this] { return connect(); }),
        target_(std::clamp(options.count, 0, kSlotsMax)) {
    char host[256] = "localhost";
    gethostname(host, sizeof host - 1);
    host_ = host;
    slots_.inherit(predecessor.gone, predecessor.ended);
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
    write_successor(root_, spawner_id_, session_, slots_, asked_);
  }

  // --- the sync thread ---
  void sync_loop();
  void take_answer(const std::string& body);
  void wake_main() const {
    const std::uint64_t one = 1;
    (void)!write(news_fd_, &one, sizeof one);
  }
  // P7, with mutex_ held: raw JSON, or empty.
  bool unusable() const { return unusable_tries_ >= kUnusableTries; }
  std::string trouble_json() const {
    if (!unusable()) return "";
    return "{\"reason\":" + json::quoted(trouble_.reason) +
           ",\"remedy\":" + json::quoted(trouble_.remedy) + "}";
  }
  // Of a job, with as many workers as are wanted now.
  std::uint64_t pids_max() const {
    return std::min(options_.pids_max, sandbox::pids_part(pids_, target_));
  }
  void take_trouble(const PoolSlots::Slot& slot, sandbox::Trouble trouble);
  // Called with mutex_ held. `urgent`: end the poll that is parked.
  void changed(bool urgent) {
    dirty_ = true;
    if (in_call_ && (urgent || now_ms() - synced_ms_ >= kSyncEveryMs)) {
      client_.interrupt();
    }
    sync_changed_.notify_all();
  }

  // --- the main thread ---
  bool asks_first() const {
    return !told_ && now_ms() - begun_ms_ < kFirstAnswerMs;
  }
  void wait_for_news();
  Millis timeout() const;
  void reap();
  void say_ended(const PoolSlots::Slot& slot, int status) const;
  void take_empty_slots();
  void read_facts(int slot);
  void take_fact(int slot, const std::string& line);
  void adjust();
  void start_worker(int slot);
  void signal_all(int signal);
  void begin_drain(const char* why, Millis grace_ms);
  void begin_kill(const char* why, bool charged = false);
  void check_world();
  void feed_watchdog();
  bool finished();
  bool spawner_died() const;

  const PoolOptions& options_;
  const Root& root_;
  sandbox::Spawner& spawner_;
  const ProcessId spawner_id_ =
      look_at(spawner_.pid()).value_or(Process()).id;  // in pool.lock
  const Program program_;
  const sandbox::PidsBound pids_;
  const std::string id_;
  const std::string session_;  // a secret: whose leases the workers' are
  std::string host_;
  HttpClient client_;
  int signal_fd_ = -1, news_fd_ = -1;
  int terms_ = 0;               // how often a signal asked it to leave
  std::map<int, Facts> facts_;  // by slot
  int starts_ = 0;
  int slots_told_ = 0;  // what the spawner knows of target_
  Millis fed_ms_ = 0;   // when the service manager last heard of us

  std::mutex spawner_mutex_;
  std::mutex mutex_;  // all that follows
  std::condition_variable sync_changed_;
  PoolSlots slots_;
  SandboxCounts counts_;  // of all workers since this pool began
  int target_;
  bool told_ = false;  // the server has said how many workers it wants
  const Millis begun_ms_ = now_ms();
  Retry retry_;  // of the sync thread
  bool drain_asked_ = false, dirty_ = false, in_call_ = false, quit_ = false;
  Millis synced_ms_ = 0;         // when a sync was last begun
  Millis away_since_ms_ = 0;     // since when none was answered; 0: not away
  int unusable_tries_ = 0;       // workers in a row that made no sandbox
  sandbox::Trouble trouble_;     // as the last of them said
  Millis unusable_look_ms_ = 0;  // when the next one is tried
  Mode mode_ = Mode::serving;
  Millis release_at_ms_ = 0, kill_at_ms_ = 0, empty_since_ms_ = 0;
  bool released_ = false;
  bool asked_ = false;  // to leave: what it kills now is not its jobs' doing
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
  LogLine(Severity::info, "started", "serving")
      .with("pid", getpid())
      .with("uid", getuid())
      .with("spawner_pid", spawner_.pid())
      .with("workers", target_)
      .with("pids_max", static_cast<std::int64_t>(pids_max()));

  std::thread sync([this] { sync_loop(); });
  notify_manager(options_.manager.notify_socket, "READY=1");
  while (!finished()) {
    adjust();
    wait_for_news();
    check_world();
    feed_watchdog();
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
  LogLine(Severity::info, "stopped", "left").with("code", exit_code_);
  return exit_code_;
}

void Pool::feed_watchdog() {
  const Millis every = options_.manager.watchdog_ms / 3;
  if (every == 0 || now_ms() - fed_ms_ < every) return;
  fed_ms_ = now_ms();
  notify_manager(options_.manager.notify_socket, "WATCHDOG=1");
}

// --- the sync thread ---

void Pool::sync_loop() {
  std::unique_lock lock(mutex_);
  while (!quit_) {
    std::vector<std::string> told = slots_.gone();
    told.insert(told.end(), slots_.ended().begin(), slots_.ended().end());
    const bool parked = mode_ == Mode::serving;
    const Millis wait_ms = parked ? kSyncWaitMs : 200;
    SandboxCounts counts = counts_;
    counts.log_dropped += log_lines_dropped();
    const std::string body = slots_.sync_body(
        host_, session_, counts.json(), trouble_json(), pids_max(), wait_ms);
    dirty_ = false;
    in_call_ = true;
    synced_ms_ = now_ms();
    client_.resume();
    lock.unlock();
    const auto reply =
        client_.post("/v1/pools/" + id_ + "/sync", body, wait_ms + 5000);
    lock.lock();
    in_call_ = false;
    // Its log has no room: it takes the report later, and is not away.
    const bool full = reply && reply->status == 507;
    if (full || (reply && reply->status == 200)) {
      if (away_since_ms_ != 0) {
        LogLine(Severity::info, "server_back", "the server is back")
            .with("away_ms", now_ms() - away_since_ms_);
      }
      away_since_ms_ = 0;
      retry_.reset();
    }
    if (reply && reply->status == 200) {
      slots_.reported(told);
      if (!told.empty()) remember();
      take_answer(reply->body);
      wake_main();
    } else if (reply) {
      LogLine(Severity::warn, "sync_refused", utf8_head(reply->body, 200))
          .with("status", reply->status);
    }
    const bool ours = !reply && reply.error().code == Code::conflict;
    if (quit_ || ours) continue;
    if ((!reply || reply->status != 200) && !full && away_since_ms_ == 0) {
      away_since_ms_ = now_ms();
      LogLine(Severity::warn, "server_away", "the server is away");
    }
    // Not faster than kSyncEveryMs, whatever the server does; a death that is
    // not reported yet goes at once. One that is away is looked for often.
    const Millis rest =
        !reply ? retry_.next()
               : (reply->status == 200 ? synced_ms_ + kSyncEveryMs - now_ms()
                                       : kRefusedMs);
    if (rest > 0) {
      sync_changed_.wait_for(lock, milliseconds(rest), [&] {
        return quit_ || (dirty_ && reply && !slots_.all_reported());
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
        LogLine(Severity::info, "scaled", "another number of workers")
            .with("from", target_)
            .with("to", *target);
        unusable_tries_ = 0;  // whoever scales asks for another try
      }
      target_ = static_cast<int>(*target);
      told_ = true;
    } else if (key == "drain") {
      drain_asked_ = json::boolean(value).value_or(false);
    }
    return true;
  });
  if (!good) {
    LogLine(Severity::error, "sync_malformed", utf8_head(body, 200));
  }
}

// --- the main thread ---

Millis Pool::timeout() const {
  Millis at = now_ms() + kTickMs;
  const Millis next = slots_.next_start_ms(target_, now_ms());
  if (next >= 0) at = std::min(at, next);
  if (asks_first()) at = std::min(at, begun_ms_ + kFirstAnswerMs);
  if (mode_ != Mode::serving) at = std::min(at, now_ms() + 50);
  if (dirty_ && in_call_) at = std::min(at, synced_ms_ + kSyncEveryMs);
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
        if (++terms_ == 1) {
          begin_drain("asked to leave", options_.drain_ms);
        } else {
          begin_kill("asked twice");
        }
      } else if (info.ssi_signo == SIGHUP) {
        reopen_logger();
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
    const PoolSlots::Slot* ended = slots_.find(pid);
    if (ended == nullptr) continue;
    say_ended(*ended, status);
    slots_.exited(pid, now_ms());
    remember();
    changed(false);
  }
}

// A death is an error, an end that was asked for none: a worker that had no
// time yet to look for TERM dies of it.
void Pool::say_ended(const PoolSlots::Slot& slot, int status) const {
  const bool asked =
      slot.phase == PoolSlots::Phase::leaving || mode_ == Mode::killing;
  const int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  const int code = signal == 0 ? WEXITSTATUS(status) : 0;
  // One that could make no sandbox has said so.
  const bool clean = signal == 0 && (code == 0 || code == kExitNoSandbox);
  if (clean ||
      (asked && (signal == 0 || signal == SIGTERM || signal == SIGKILL))) {
    if (asked) {
      LogLine(Severity::info, "worker_left",
              "a worker left, as it was asked to")
          .with("worker", slot.name)
          .with("pid", slot.pid);
    }
    return;
  }
  LogLine(Severity::error, "worker_died", "a worker died")
      .with("worker", slot.name)
      .with("pid", slot.pid)
      .with("job", slot.job)
      .with(signal != 0 ? "signal" : "code",
            signal != 0 ? signal : WEXITSTATUS(status));
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
  sandbox::Trouble trouble;
  bool first = false, counted = false;
  json::members(line, [&](auto key, auto value) {
    if (key == "state") state = json::string(value).value_or("");
    if (key == "job") job = json::string(value).value_or("");
    if (key == "reason") trouble.reason = json::string(value).value_or("");
    if (key == "remedy") trouble.remedy = json::string(value).value_or("");
    if (key == "counts") {
      const auto counts = SandboxCounts::parse(value.raw());
      if (counts) counts_.add(*counts);
      counted = true;
    }
    if (key == "isolation") {
      first = s.isolation.empty();
      s.isolation = value.raw();
    }
    return true;
  });
  if (counted) return changed(false);
  if (state == "unusable") return take_trouble(s, std::move(trouble));
  if (first) unusable_tries_ = 0;
  s.job = state == "busy" ? job : "";
  if (first) {
    std::string level;
    json::members(s.isolation, [&](auto key, auto value) {
      if (key == "level") level = json::string(value).value_or("");
      return true;
    });
    LogLine(Severity::info, "worker_ready", "a worker has proven its level")
        .with("worker", s.name)
        .with("isolation_level", level);
  }
  changed(first);
}

void Pool::take_trouble(const PoolSlots::Slot& slot, sandbox::Trouble trouble) {
  const bool news = trouble_.reason != trouble.reason;
  trouble_ = std::move(trouble);
  ++unusable_tries_;
  if (!unusable()) return;
  unusable_look_ms_ = now_ms() + kUnusableLookMs;
  if (unusable_tries_ == kUnusableTries || news) {
    LogLine(Severity::error, "no_sandbox",
            "no job can run here, and no more workers are started but one a "
            "minute: " +
                trouble_.reason)
        .with("worker", slot.name)
        .with("remedy", trouble_.remedy);
  }
  changed(true);
}

void Pool::adjust() {
  std::vector<int> starts;
  int wanted = 0;
  {
    std::lock_guard lock(mutex_);
    wanted = std::max(target_, 1);
  }
  if (wanted != slots_told_) {
    std::lock_guard lock(spawner_mutex_);
    if (spawner_.set_slots(wanted)) slots_told_ = wanted;
  }
  {
    std::lock_guard lock(mutex_);
    if (drain_asked_ && mode_ == Mode::serving) {
      begin_drain("the server drains", options_.drain_ms);
    }
    if (mode_ != Mode::serving) return;
    // None is started to be stopped again: the server says how many first.
    if (asks_first()) return;
    for (const int slot : slots_.to_stop(target_)) {
      kill(slots_.at(slot).pid, SIGTERM);
      slots_.leaving(slot);
      changed(false);
    }
    int target = target_;
    if (unusable()) {
      const bool look = now_ms() >= unusable_look_ms_;
      if (look) unusable_look_ms_ = now_ms() + kUnusableLookMs;
      target = std::min(target, slots_.staying() + (look ? 1 : 0));
    }
    starts = slots_.to_start(target, now_ms());
  }
  for (const int slot : starts) start_worker(slot);
}

void Pool::start_worker(int slot) {
  const auto failed = [&](const std::string& why) {
    LogLine(Severity::error, "worker_not_started", why).with("slot", slot);
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
  std::vector<std::string> env = options_.worker_env;
  env.push_back(std::string(kWorkerSessionVariable) + "=" + session_);
  const auto pid = program_.start(argv, env, *channel, pipe[1]);
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
  LogLine(Severity::info, "draining", std::string(why) + ": no new jobs")
      .with("grace_ms", grace_ms)
      .with("workers", slots_.alive());
  mode_ = Mode::draining;
  asked_ = true;
  remember();
  notify_manager(options_.manager.notify_socket,
                 std::string("STOPPING=1\nSTATUS=") + why);
  release_at_ms_ = now_ms() + grace_ms - std::min<Millis>(1000, grace_ms / 4);
  kill_at_ms_ = release_at_ms_ + kReleaseMs;
  for (int i = 0; i < kSlotsMax; ++i) {
    if (slots_.at(i).phase != PoolSlots::Phase::running) continue;
    kill(slots_.at(i).pid, SIGTERM);
    slots_.leaving(i);
  }
  changed(true);
}

// Whoever had it leave, or nobody is left to work for: not the jobs' doing. But
// a spawner that died may have died of one.
void Pool::begin_kill(const char* why, bool charged) {
  if (mode_ == Mode::killing) return;
  if (!charged) {
    asked_ = true;
    slots_.killed();
    remember();
  }
  LogLine(Severity::warn, "killing", std::string(why) + ": killing workers")
      .with("workers", slots_.alive());
  mode_ = Mode::killing;
  signal_all(SIGKILL);
}

void Pool::check_world() {
  std::lock_guard lock(mutex_);
  const Millis now = now_ms();
  // News that came too soon after the last sync began.
  if (dirty_ && in_call_ && now - synced_ms_ >= kSyncEveryMs) {
    client_.interrupt();
  }
  struct stat info {};
  if (fstat(root_.dir, &info) == 0 && info.st_nlink == 0) {
    begin_kill("the root is gone");
  }
  if (spawner_died()) {
    exit_code_ = 1;
    begin_kill("the spawner died", true);
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
  return slots_.all_reported() || away_since_ms_ > 0 || waited >= 1000;
}

}  // namespace

namespace {

// P7. For the server, which has nobody else to ask.
int cannot_serve(const Root& root, const sandbox::Trouble& trouble) {
  LogLine(Severity::error, "start_failed", trouble.reason)
      .with("remedy", trouble.remedy);
  const int fd =
      openat(root.dir, "pool.trouble",
             O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd >= 0) {
    const std::string text = trouble.reason + "\n" + trouble.remedy + "\n";
    (void)!write(fd, text.data(), text.size());
    close(fd);
  }
  return kExitUnusable;
}

}  // namespace

int run_pool(const PoolOptions& options) {
  Root root;
  if (const int code = take_root(options, root); code != 0) return code;
  setsid();  // a terminal's signals are for the server
  PoolLines lines(root, options);
  auto program = Program::open(options.self_exe);
  if (!program) {
    LogLine(Severity::error, "start_failed", program.error().what);
    return 2;
  }
  const int own_pid = write_own_pid(options);
  const Predecessor predecessor = read_predecessor(root);
  outlast_spawner(predecessor.spawner);
  register_handlers(built_in_families());
  sandbox::SpawnerOptions spawning;
  spawning.root = options.root;
  spawning.socket_path = options.socket_path;
  spawning.repo_roots = options.repo_roots;
  spawning.slot_uid_base = options.slot_uid_base;
  spawning.seccomp_enable = options.seccomp_enable;
  spawning.self_exe = options.self_exe;
  spawning.pids_max = options.pids_max;
  spawning.slots = std::max(options.count, 1);
  if (auto trouble = sandbox::host_trouble(spawning); trouble.any()) {
    return cannot_serve(root, trouble);
  }
  const sandbox::PidsBound pids = sandbox::pids_bound();  // as the spawner asks
  auto spawner = sandbox::Spawner::start(spawning);
  if (!spawner) {
    return cannot_serve(root, {spawner.error().what, kRemedyDoctor});
  }
  if (auto dropped = drop_privilege(options.slot_uid_base - 1); !dropped) {
    return cannot_serve(root, {dropped.error().what, kRemedyDoctor});
  }
  unlinkat(root.dir, "pool.trouble", 0);
  lines.begin();
  const int code =
      Pool(options, root, predecessor, **spawner, pids, std::move(*program))
          .run();
  erase_own_pid(options, own_pid);
  return code;
}

}  // namespace machina
