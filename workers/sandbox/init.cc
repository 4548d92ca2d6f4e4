// PID 1 of a sandbox. Ours, never the job: it makes the root, then runs steps
// one after another at the worker's word, reaps whatever is orphaned, and after
// each step kills and reaps until the kernel says that nothing is left. It
// answers with what waitid and the counters say; it reads nothing a job wrote.

#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "workers/sandbox/census.h"
#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

// Failed forks after which a step is a fork bomb, not a busy build.
constexpr std::uint64_t kForkBombHits = 1000;
// Without a pids cgroup: looks in a row that found the step at its cap.
constexpr int kForkBombLooks = 40;
constexpr int kWatchMs = 50;
constexpr int kFirstMs = 20;  // sooner at first: most steps are short
// Without a memory cgroup: looks for each exact sum.
constexpr int kExactEvery = 2;

class Init {
 public:
  Init(const Host& host, const Ground& ground, const InitFds& fds)
      : host_(host), ground_(ground), fds_(fds), meter_(fds.counters) {}

  [[noreturn]] void run() {
    build();
    for (;;) {
      StepRequest request;
      int passed[8];
      std::size_t count = 0;
      const ssize_t n = recv_message(
          fds_.control, std::as_writable_bytes(std::span(&request, 1)), passed,
          &count, true);
      if (n <= 0) _exit(0);  // the worker has gone, and so do we
      if (n == sizeof(StepRequest) && request.op == InitOp::step) {
        const StepDone done = step(request, {passed, count});
        if (send_struct(fds_.control, done)) _exit(0);
      } else {
        for (std::size_t i = 0; i < count; ++i) close(passed[i]);
      }
    }
  }

 private:
  void build() {
    // kill(-1) below must never mean the host.
    if (getpid() != 1) _exit(1);
    // What the spawner ignores its steps must not: ignoring survives exec.
    for (int s = 1; s < 65; ++s) signal(s, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    // The keeper writes one byte once our identity is mapped; end-of-file says
    // that it died before the line above was in force.
    char byte;
    if (read(fds_.release, &byte, 1) != 1) _exit(1);
    close(fds_.release);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    Failure failure = build_root(host_, ground_, &inside_);
    if (failure.ok()) failure = give_up_rights();
    meter_.set_base();
    if (failure.ok()) {
      sigset_t chld;
      sigemptyset(&chld);
      sigaddset(&chld, SIGCHLD);
      sigprocmask(SIG_BLOCK, &chld, nullptr);
      signals_ = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
      if (signals_ < 0) failure = Failure{Stage::init_caps, errno};
    }
    [[maybe_unused]] const ssize_t n =
        write(fds_.report, &failure, sizeof(failure));
    close(fds_.report);
    if (!failure.ok()) _exit(1);
  }

  // Keeps what giving steps their identity takes, and killing them.
  Failure give_up_rights() {
    const auto bit = [](int cap) { return std::uint64_t{1} << cap; };
    std::uint64_t keep = 0;
    if (host_.root) {
      keep =
          bit(CAP_KILL) | bit(CAP_SETUID) | bit(CAP_SETGID) | bit(CAP_SETPCAP);
      // Without a memory cgroup init adds up what the steps really use.
      if (!host_.active(Mech::cgroup_memory)) keep |= bit(CAP_SYS_PTRACE);
    } else if (ground_.other_uid) {
      // Over what has another uid; of this user namespace alone.
      keep = bit(CAP_KILL) | bit(CAP_SETUID) | bit(CAP_SETGID);
      if (!host_.active(Mech::cgroup_memory)) keep |= bit(CAP_SYS_PTRACE);
    }
    if (const int error = set_capabilities(keep)) {
      return Failure{Stage::init_caps, error};
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    return {};
  }

  StepDone step(const StepRequest& request, std::span<const int> passed) {
    StepDone done;
    before_ = read_counters(fds_.counters);
    reaped_cpu_us_ = cpu_us_ = seen_bytes_ = 0;
    looks_at_cap_ = looks_ = 0;
    seen_at_cap_ = false;
    census_ = Census(inside_.proc);
    census_.begin();
    meter_.begin();
    int pipe_fds[2] = {-1, -1};
    const std::size_t wanted = request.merge_stderr ? 3 : 4;
    if (passed.size() != wanted || pipe2(pipe_fds, O_CLOEXEC) < 0) {
      done.stage = Stage::request;
      done.error = EINVAL;
    } else {
      StepPlan plan;
      plan.host = &host_;
      plan.ground = &ground_;
      plan.inside = &inside_;
      plan.spec = passed[0];
      plan.in = passed[1];
      plan.out = passed[2];
      plan.err = passed[wanted - 1];
      plan.fail = pipe_fds[1];
      const std::string_view name(request.builtin,
                                  strnlen(request.builtin, kBuiltinNameMax));
      if (!name.empty()) plan.builtin = find_builtin(name);
      if (!name.empty() && !plan.builtin) {
        done.stage = Stage::builtin;
        done.error = ENOSYS;
      } else {
        job_ = fork();
        if (job_ == 0) enter_step(plan);
        if (job_ < 0) {
          done.stage = Stage::fork;
          done.error = errno;
        }
      }
    }
    for (int fd : passed) close(fd);
    if (pipe_fds[1] >= 0) close(pipe_fds[1]);
    if (done.stage == Stage::none) {
      watch(&done);
      if (!alone()) {
        // A step that failed for want of processes has left them behind.
        if (fds_.counters.pids < 0 &&
            census_.count(false).threads + 1 >= ground_.limits.pids) {
          seen_at_cap_ = true;
        }
        // Those that live on are to be in it before they are killed.
        if (fds_.counters.cpu < 0) measure_cpu(Counters{}, false);
      }
      sweep(&done);
      Failure failure;
      if (read(pipe_fds[0], &failure, sizeof(failure)) == sizeof(failure)) {
        done.stage = failure.stage;
        done.error = failure.error;
      }
    }
    if (pipe_fds[0] >= 0) close(pipe_fds[0]);
    fill_in(&done);
    return done;
  }

  // Until the step's own process has ended.
  void watch(StepDone* done) {
    ended_ = false;
    look_at_ = now_ms() + kFirstMs;
    while (!ended_) {
      pollfd items[2] = {{fds_.control, POLLIN, 0}, {signals_, POLLIN, 0}};
      poll(items, 2,
           static_cast<int>(std::max<Millis>(look_at_ - now_ms(), 0)));
      if (items[0].revents) obey();
      if (items[1].revents) {
        signalfd_siginfo ignored[8];
        while (read(signals_, ignored, sizeof(ignored)) > 0) {
        }
      }
      reap(done, false);
      if (ended_ || done->killed_by != Kill::none || now_ms() < look_at_) {
        if (done->killed_by != Kill::none) look_at_ = now_ms() + kWatchMs;
        continue;
      }
      look(done);
      look_at_ = now_ms() + kWatchMs;
    }
  }

  static Millis now_ms() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1'000'000;
  }

  void obey() {
    StepSignal order;
    const ssize_t n =
        recv_message(fds_.control, std::as_writable_bytes(std::span(&order, 1)),
                     {}, nullptr, false);
    if (n == 0 || n == -ECONNRESET) _exit(0);  // the kernel kills the rest
    if (n == sizeof(order) && order.op == InitOp::signal) {
      kill(-1, order.signal == SIGTERM ? SIGTERM : SIGKILL);
      // What is stopped does not take a TERM before it goes on.
      if (order.signal == SIGTERM) kill(-1, SIGCONT);
    }
  }

  void reap(StepDone* done, bool wait) {
    for (;;) {
      int status = 0;
      rusage usage{};
      const pid_t pid =
          wait4(-1, &status, __WALL | (wait ? 0 : WNOHANG), &usage);
      if (pid < 0 && errno == EINTR) continue;
      if (pid <= 0) return;
      const auto us = [](const timeval& t) {
        return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000 +
               static_cast<std::uint64_t>(t.tv_usec);
      };
      reaped_cpu_us_ += us(usage.ru_utime) + us(usage.ru_stime);
      // Of one process, and without a look too.
      seen_bytes_ = std::max(seen_bytes_,
                             static_cast<std::uint64_t>(usage.ru_maxrss) << 10);
      if (pid == job_) {
        ended_ = true;
        done->wait_status = status;
      } else if (ended_) {
        ++done->survivors;
      }
      if (wait) return;
    }
  }

  // B1: PID 1 without a child is alone in its namespace.
  void sweep(StepDone* done) {
    for (;;) {
      kill(-1, SIGKILL);
      siginfo_t info{};
      if (waitid(P_ALL, 0, &info, WEXITED | WNOWAIT | __WALL) < 0 &&
          errno == ECHILD) {
        return;
      }
      reap(done, true);
    }
  }

  void measure_cpu(const Counters& now, bool dead) {
    cpu_us_ = fds_.counters.cpu >= 0 ? now.cpu_us - before_.cpu_us
                                     : census_.cpu_us(reaped_cpu_us_, dead);
  }

  // No child is left, dead or alive.
  static bool alone() {
    siginfo_t info{};
    return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT | __WALL) < 0 &&
           errno == ECHILD;
  }

  // The limits that no signal of the kernel's enforces.
  void look(StepDone* done) {
    ++looks_;
    const Counters now = read_counters(fds_.counters);
    measure_cpu(now, false);
    meter_.look();
    const Limits& l = ground_.limits;
    Kill why = Kill::none;
    if (now.pids_hits - before_.pids_hits > kForkBombHits) why = Kill::pids;
    if (cpu_limit_passed()) why = Kill::cpu;
    if (fds_.counters.oom < 0 || fds_.counters.pids < 0) {
      const Kill found = look_at_processes();
      if (found != Kill::none) why = found;
    }
    // Of those that no group charges (without one: look_at_processes()).
    if (fds_.counters.oom >= 0 && uncharged_bytes() > socket_bytes(l)) {
      why = Kill::sockets;
    }
    if (why == Kill::none) return;
    done->killed_by = why;
    kill(-1, SIGKILL);
  }

  bool cpu_limit_passed() const {
    const Millis limit = static_cast<Millis>(ground_.limits.cpu_ms);
    return limit > 0 && static_cast<Millis>(cpu_us_ / 1000) > limit;
  }

  // Without cgroups: counts threads and adds up memory, from outside.
  Kill look_at_processes() {
    Census::Sum sum = census_.count(false);
    const Limits& l = ground_.limits;
    const bool at_cap = sum.threads >= l.pids;
    if (at_cap) seen_at_cap_ = true;
    looks_at_cap_ = at_cap ? looks_at_cap_ + 1 : 0;
    if (fds_.counters.oom < 0) {
      const std::uint64_t files = scratch_bytes();
      const std::uint64_t sockets = uncharged_bytes();
      const std::uint64_t most = l.memory_mb << 20;
      // What is mapped of the tmpfs's files is in both sums.
      const auto bytes = [&] {
        return (sum.anon_kb << 10) + std::max(sum.shmem_kb << 10, files) +
               sockets;
      };
      const auto own = [&] {
        return ((sum.anon_kb + sum.shmem_kb) << 10) + sockets;
      };
      // What forks share is counted once per process at first; only a sum that
      // is higher than any before, or too high, is worth the exact one.
      if (own() > most || (bytes() > seen_bytes_ + seen_bytes_ / 64 &&
                           looks_ % kExactEvery == 0)) {
        const std::uint64_t threads = sum.threads;
        sum = census_.count(true);
        sum.threads = threads;
        seen_bytes_ = std::max(seen_bytes_, bytes());
      }
      if (own() > most) return Kill::oom;
    }
    if (fds_.counters.pids < 0 && looks_at_cap_ > kForkBombLooks) {
      return Kill::pids;
    }
    return Kill::none;
  }

  // Netlink's everywhere; UDP's and TCP's where no group charges them. Those of
  // Unix sockets are charged where there is a group, else not counted.
  std::uint64_t uncharged_bytes() const {
    return queued_bytes(inside_.proc, !fds_.counters.sockets_charged());
  }

  // Of the whole tmpfs behind /work, /tmp and /dev/shm.
  std::uint64_t scratch_bytes() const {
    struct statvfs fs {};
    if (fstatvfs(inside_.scratch, &fs) < 0) return 0;
    return (fs.f_blocks - fs.f_bfree) * fs.f_frsize;
  }

  void fill_in(StepDone* done) {
    const Counters now = read_counters(fds_.counters);
    done->oom_kills = now.oom_kills - before_.oom_kills;
    done->pids_hits = now.pids_hits - before_.pids_hits;
    if (seen_at_cap_ && fds_.counters.pids < 0) ++done->pids_hits;
    measure_cpu(now, true);
    meter_.look();
    done->cpu_us = cpu_us_;
    done->cpu_over = cpu_limit_passed();
    done->memory_bytes = std::max(meter_.peak_bytes(), seen_bytes_);
    struct statvfs fs {};
    if (fstatvfs(inside_.scratch, &fs) == 0) {
      done->disk_bytes = (fs.f_blocks - fs.f_bfree) * fs.f_frsize;
      done->disk_full = fs.f_bfree <= 1 || fs.f_ffree <= 1;
      done->inodes_full = fs.f_bfree > 1 && fs.f_ffree <= 1;
    }
  }

  const Host& host_;
  const Ground& ground_;
  const InitFds fds_;
  Inside inside_;
  int signals_ = -1;
  pid_t job_ = -1;
  bool ended_ = false;
  Counters before_;
  Census census_{-1};
  MemoryMeter meter_;
  // cpu_us_: of the tree, as last measured. seen_bytes_: the most memory that
  // was seen without a control group.
  std::uint64_t reaped_cpu_us_ = 0, cpu_us_ = 0, seen_bytes_ = 0;
  int looks_at_cap_ = 0, looks_ = 0;
  Millis look_at_ = 0;
  bool seen_at_cap_ = false;
};

}  // namespace

void init_main(const Host& host, const Ground& ground, const InitFds& fds) {
  Init(host, ground, fds).run();
}

}  // namespace machina::sandbox
