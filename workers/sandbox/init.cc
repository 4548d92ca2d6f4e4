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
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

// Failed forks after which a step is a fork bomb, not a busy build.
constexpr std::uint64_t kForkBombHits = 1000;
// Without a pids cgroup: looks in a row that found the step at its cap.
constexpr int kForkBombLooks = 40;
constexpr int kWatchMs = 50;

class Init {
 public:
  Init(const Host& host, const Ground& ground, const InitFds& fds)
      : host_(host), ground_(ground), fds_(fds) {}

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
    reaped_cpu_us_ = max_rss_kb_ = 0;
    looks_at_cap_ = 0;
    seen_at_cap_ = false;
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
      const auto id = static_cast<BuiltinId>(request.builtin);
      if (id != BuiltinId::none) plan.builtin = find_builtin(id);
      if (id != BuiltinId::none && !plan.builtin) {
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
      // A step that failed for want of processes has left them behind.
      if (fds_.counters.pids < 0 &&
          add_up(false).threads + 1 >= ground_.limits.pids) {
        seen_at_cap_ = true;
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
    while (!ended_) {
      pollfd items[2] = {{fds_.control, POLLIN, 0}, {signals_, POLLIN, 0}};
      poll(items, 2, kWatchMs);
      if (items[0].revents) obey();
      if (items[1].revents) {
        signalfd_siginfo ignored[8];
        while (read(signals_, ignored, sizeof(ignored)) > 0) {
        }
      }
      reap(done, false);
      if (!ended_ && done->killed_by == Kill::none) look(done);
    }
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
      const auto rss = static_cast<std::uint64_t>(usage.ru_maxrss);
      if (rss > max_rss_kb_) max_rss_kb_ = rss;
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

  // The limits that no signal of the kernel's enforces.
  void look(StepDone* done) {
    const Counters now = read_counters(fds_.counters);
    Kill why = Kill::none;
    if (now.pids_hits - before_.pids_hits > kForkBombHits) why = Kill::pids;
    const std::uint64_t cpu_us =
        fds_.counters.cpu >= 0 ? now.cpu_us - before_.cpu_us : reaped_cpu_us_;
    if (ground_.limits.cpu_ms && cpu_us / 1000 > ground_.limits.cpu_ms) {
      why = Kill::cpu;
    }
    if (fds_.counters.oom < 0 || fds_.counters.pids < 0) {
      const Kill found = look_at_processes();
      if (found != Kill::none) why = found;
    }
    if (why == Kill::none) return;
    done->killed_by = why;
    kill(-1, SIGKILL);
  }

  // Without cgroups: counts threads and adds up memory, from outside.
  struct Sum {
    std::uint64_t kilobytes = 0, threads = 0;
  };

  Kill look_at_processes() {
    const Sum sum = add_up(false);
    const Limits& l = ground_.limits;
    const bool at_cap = sum.threads >= l.pids;
    if (at_cap) seen_at_cap_ = true;
    looks_at_cap_ = at_cap ? looks_at_cap_ + 1 : 0;
    const std::uint64_t most = l.memory_mb << 10;
    // What forks share is counted once per process at first; only a sum that
    // is too high is worth the exact one.
    if (fds_.counters.oom < 0 && sum.kilobytes > most &&
        add_up(true).kilobytes > most) {
      return Kill::oom;
    }
    if (fds_.counters.pids < 0 && looks_at_cap_ > kForkBombLooks) {
      return Kill::pids;
    }
    return Kill::none;
  }

  // Over all processes but ourselves.
  Sum add_up(bool exactly) const {
    Sum sum;
    const int dir =
        openat(inside_.proc, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) return sum;
    alignas(8) char names[8192];
    for (;;) {
      const long n = syscall(SYS_getdents64, dir, names, sizeof(names));
      if (n <= 0) break;
      for (long at = 0; at < n;) {
        unsigned short length;
        std::memcpy(&length, names + at + 16, sizeof(length));
        const char* name = names + at + 19;
        if (name[0] >= '1' && name[0] <= '9' && std::strcmp(name, "1") != 0) {
          add_process(dir, name, exactly, &sum);
        }
        at += length;
      }
    }
    close(dir);
    return sum;
  }

  static void add_process(int dir, const char* name, bool exactly, Sum* sum) {
    char text[4096];
    const auto value = [&](const char* key) -> std::uint64_t {
      const char* at = std::strstr(text, key);
      return at ? std::strtoull(at + std::strlen(key), nullptr, 10) : 0;
    };
    if (exactly && read_of(dir, name, "/smaps_rollup", text, sizeof(text))) {
      sum->kilobytes += value("\nPss_Anon:") + value("\nPss_Shmem:");
    } else if (read_of(dir, name, "/status", text, sizeof(text))) {
      sum->kilobytes += value("\nRssAnon:") + value("\nRssShmem:");
      sum->threads += value("\nThreads:");
    }
  }

  static bool read_of(int dir, const char* name, const char* file, char* text,
                      std::size_t size) {
    char path[64];
    const std::size_t n = std::strlen(name);
    if (n > 20) return false;
    std::memcpy(path, name, n);
    std::memcpy(path + n, file, std::strlen(file) + 1);
    const int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    const ssize_t got = read(fd, text, size - 1);
    close(fd);
    if (got <= 0) return false;
    text[got] = 0;
    return true;
  }

  void fill_in(StepDone* done) {
    const Counters now = read_counters(fds_.counters);
    done->oom_kills = now.oom_kills - before_.oom_kills;
    done->pids_hits = now.pids_hits - before_.pids_hits;
    if (seen_at_cap_ && fds_.counters.pids < 0) ++done->pids_hits;
    done->cpu_us =
        fds_.counters.cpu >= 0 ? now.cpu_us - before_.cpu_us : reaped_cpu_us_;
    done->max_rss_kb = max_rss_kb_;
    // The whole tmpfs behind /work, /tmp and /dev/shm.
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
  std::uint64_t reaped_cpu_us_ = 0, max_rss_kb_ = 0;
  int looks_at_cap_ = 0;
  bool seen_at_cap_ = false;
};

}  // namespace

void init_main(const Host& host, const Ground& ground, const InitFds& fds) {
  Init(host, ground, fds).run();
}

}  // namespace machina::sandbox
