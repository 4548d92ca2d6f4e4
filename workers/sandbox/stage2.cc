// Stage 2: between fork and exec. ASYNC-SIGNAL-SAFE ONLY: system calls, the
// stack, and memory mapped here. It takes every right away, reads back that it
// is gone, and execs. The order matters and each line has its reason beside it.

#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "workers/sandbox/landlock.h"
#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

[[noreturn]] void fail(const StepPlan& plan, Stage stage, int error) {
  const Failure failure{stage, error};
  [[maybe_unused]] const ssize_t n =
      write(plan.fail, &failure, sizeof(failure));
  _exit(127);
}

int cap_last() {
  static int last = -1;
  if (last < 0) {
    last = 63;
    while (last > 0 && prctl(PR_CAPBSET_READ, last, 0, 0, 0) < 0) --last;
  }
  return last;
}

int set_limit(int what, rlim_t value) {
  rlimit limit{};
  if (getrlimit(static_cast<__rlimit_resource_t>(what), &limit) < 0) {
    return errno;
  }
  // Root without CAP_SYS_RESOURCE cannot raise a hard limit: only lower it.
  const rlim_t wanted = value < limit.rlim_max ? value : limit.rlim_max;
  limit.rlim_cur = limit.rlim_max = wanted;
  return setrlimit(static_cast<__rlimit_resource_t>(what), &limit) < 0 ? errno
                                                                       : 0;
}

// Fewer than ours: wire.h, raise_descriptor_limit().
rlim_t descriptors() {
  rlimit ours{};
  if (getrlimit(RLIMIT_NOFILE, &ours) < 0) return kStepDescriptors / 2;
  return ours.rlim_max / 2 < kStepDescriptors ? ours.rlim_max / 2
                                              : kStepDescriptors;
}

int set_limits(const StepPlan& plan) {
  const Limits& l = plan.ground->limits;
  // 1, not 0: with a pipe as core_pattern the kernel starts the host's handler
  // at 0, and gives up at 1.
  int error = set_limit(RLIMIT_CORE, 1);
  if (!error) error = set_limit(RLIMIT_NOFILE, descriptors());
  if (!error) error = set_limit(RLIMIT_FSIZE, file_bytes_max(l));
  if (!error) error = set_limit(RLIMIT_MEMLOCK, kLockedBytesMax);
  if (!error) error = set_limit(RLIMIT_MSGQUEUE, 0);
  if (!error) error = set_limit(RLIMIT_NICE, 0);
  if (!error) error = set_limit(RLIMIT_RTPRIO, 0);
  if (!error) error = set_limit(RLIMIT_SIGPENDING, kPendingSignalsMax);
  if (!error && l.cpu_ms) {
    // Per process; the whole tree's sum is watched by init.
    error = set_limit(RLIMIT_CPU, l.cpu_ms / 1000 + 2);
  }
  // Alone where there is no pids cgroup. Behind one it is far away: the
  // cgroup's counter tells why a fork failed, and another pool's slot may have
  // our uid.
  const bool cgroup = plan.host->active(Mech::cgroup_pids);
  if (!error) error = set_limit(RLIMIT_NPROC, cgroup ? l.pids + 4096 : l.pids);
  return error;
}

int write_at(int dir, const char* path, const char* text, std::size_t size) {
  const int fd = openat(dir, path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  const int error = write(fd, text, size) < 0 ? errno : 0;
  close(fd);
  return error;
}

// Another of the host's uids than init's, and none of its groups.
int become_the_job(const StepPlan& plan) {
  const uid_t uid = plan.ground->uid;
  const gid_t gid = plan.ground->gid;
  if (setgroups(0, nullptr) < 0 || setresgid(gid, gid, gid) < 0 ||
      setresuid(uid, uid, uid) < 0) {
    return errno;
  }
  // Any change of identity clears it: see enter_step().
  return prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) < 0 ? errno : 0;
}

// A user namespace below init's, in which nobody may make another.
int nested_userns(const StepPlan& plan) {
  static const char kJob[] = "1000 1000 1", kOwner[] = "1001 1001 1";
  static_assert(kInnerUid == 1000 && kOwnerUid == 1001);
  const char* const map = plan.ground->uid == kInnerUid ? kJob : kOwner;
  const int proc = plan.inside->proc;
  if (unshare(CLONE_NEWUSER) < 0) return errno;
  int error = write_at(proc, "self/setgroups", "deny", 4);
  if (!error) error = write_at(proc, "self/gid_map", map, sizeof(kJob) - 1);
  if (!error) error = write_at(proc, "self/uid_map", map, sizeof(kJob) - 1);
  if (!error) error = write_at(proc, "sys/user/max_user_namespaces", "0", 1);
  if (!error && unshare(CLONE_NEWUSER) == 0) error = EPERM;  // it must not work
  return error;
}

int drop_bounding() {
  for (int cap = 0; cap <= cap_last(); ++cap) {
    if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0) return errno;
  }
  if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0) {
    return errno;
  }
  constexpr unsigned long kBits =
      SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP |
      SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS_LOCKED |
      SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
  return prctl(PR_SET_SECUREBITS, kBits, 0, 0, 0) < 0 ? errno : 0;
}

// What was taken is gone: asked of the kernel, not remembered.
bool nothing_left(const StepPlan& plan) {
  __user_cap_header_struct head{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2];
  if (syscall(SYS_capget, &head, data) < 0) return false;
  for (const auto& d : data) {
    if (d.effective || d.permitted || d.inheritable) return false;
  }
  for (int cap = 0; cap <= cap_last(); ++cap) {
    if (prctl(PR_CAPBSET_READ, cap, 0, 0, 0) != 0) return false;
  }
  uid_t r, e, s;
  gid_t gr, ge, gs;
  if (getresuid(&r, &e, &s) < 0 || getresgid(&gr, &ge, &gs) < 0) return false;
  const uid_t uid = plan.ground->uid;
  const gid_t gid = plan.ground->gid;
  return r == uid && e == uid && s == uid && gr == gid && ge == gid &&
         gs == gid;
}

int install(const Bpf& program) {
  if (program.empty()) return 0;
  const sock_fprog filter{static_cast<unsigned short>(program.size()),
                          const_cast<sock_filter*>(program.data())};
  return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filter) < 0 ? errno
                                                                       : 0;
}

struct Program {
  char* cwd = nullptr;
  char** argv = nullptr;
  char** env = nullptr;
};

// Cuts the mapped strings apart. The mapping is private: nobody else's later
// write shows.
bool read_spec(int fd, Program* program) {
  struct stat st {};
  if (fstat(fd, &st) < 0) return false;
  const auto size = static_cast<std::size_t>(st.st_size);
  if (size < sizeof(SpecHead)) return false;
  void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  if (map == MAP_FAILED) return false;
  SpecHead head;
  std::memcpy(&head, map, sizeof(head));
  char* text = static_cast<char*>(map) + sizeof(head);
  const std::size_t bytes = size - sizeof(head);
  if (head.bytes != bytes || bytes == 0 || text[bytes - 1] != 0) return false;
  if (head.argc > 65536 || head.envc > 65536) return false;
  const std::size_t count = head.argc + head.envc + 2;
  void* table = mmap(nullptr, count * sizeof(char*), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (table == MAP_FAILED) return false;
  char* const end = text + bytes;
  program->cwd = text;
  program->argv = static_cast<char**>(table);
  program->env = program->argv + head.argc + 1;
  for (std::uint32_t i = 0; i < head.argc + head.envc; ++i) {
    text += std::strlen(text) + 1;
    if (text >= end) return false;
    if (i < head.argc) {
      program->argv[i] = text;
    } else {
      program->env[i - head.argc] = text;
    }
  }
  return true;
}

int enter_directory(char* path) {
  for (char* p = path + 1; *p; ++p) {
    if (*p != '/') continue;
    *p = 0;
    mkdir(path, 0755);
    *p = '/';
  }
  mkdir(path, 0755);
  return chdir(path) < 0 ? errno : 0;
}

int take_stdio(StepPlan& plan) {
  // Out of the way of 0, 1 and 2 first.
  for (int* fd : {&plan.in, &plan.out, &plan.err, &plan.fail}) {
    const int moved = fcntl(*fd, F_DUPFD_CLOEXEC, 10);
    if (moved < 0) return errno;
    *fd = moved;
  }
  if (dup2(plan.in, 0) < 0 || dup2(plan.out, 1) < 0 || dup2(plan.err, 2) < 0) {
    return errno;
  }
  if (dup3(plan.fail, 3, O_CLOEXEC) < 0) return errno;
  plan.fail = 3;
  return close_all_but({3});
}

int exec(const Program& program) {
  char* const name = program.argv[0];
  if (!name || !*name) return ENOENT;
  if (std::strchr(name, '/')) {
    execve(name, program.argv, program.env);
    return errno;
  }
  int error = ENOENT;
  for (const char* dir : {"/usr/local/bin/", "/usr/bin/", "/bin/"}) {
    char path[kPathMax];
    const std::size_t n = std::strlen(dir), m = std::strlen(name);
    if (n + m + 1 > sizeof(path)) return ENAMETOOLONG;
    std::memcpy(path, dir, n);
    std::memcpy(path + n, name, m + 1);
    execve(path, program.argv, program.env);
    if (errno != ENOENT) error = errno;
  }
  return error;
}

// Handlers are the default already: init saw to it once.
void take_all_signals() {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
}

}  // namespace

int set_capabilities(std::uint64_t mask) {
  __user_cap_header_struct head{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  for (int i = 0; i < 2; ++i) {
    data[i].effective = data[i].permitted =
        static_cast<std::uint32_t>(mask >> (32 * i));
  }
  return syscall(SYS_capset, &head, data) < 0 ? errno : 0;
}

void enter_step(const StepPlan& given) {
  StepPlan plan = given;
  const Host& host = *plan.host;
  const auto must = [&](Stage stage, int error) {
    if (error) fail(plan, stage, error);
  };
  take_all_signals();
  // No terminal, and a group of its own to be signalled.
  if (setsid() < 0) fail(plan, Stage::session_id, errno);
  Program program;
  if (!read_spec(plan.spec, &program)) fail(plan, Stage::spec, EINVAL);

  // Its /proc files belong to it only while dumpable; exec makes it so anyway.
  prctl(PR_SET_DUMPABLE, host.root ? 0 : 1, 0, 0, 0);
  // The kernel's out-of-memory killer takes the job, never init or keeper. The
  // job cannot undo it: its /proc is read-only.
  must(Stage::rlimits,
       write_at(plan.inside->proc, "self/oom_score_adj", "1000", 4));
  if (plan.ground->other_uid) must(Stage::uid, become_the_job(plan));
  if (!host.root) must(Stage::userns, nested_userns(plan));
  must(Stage::rlimits, set_limits(plan));

  if (host.root && setgroups(0, nullptr) < 0) fail(plan, Stage::groups, errno);
  must(Stage::caps, drop_bounding());
  const uid_t uid = plan.ground->uid;
  const gid_t gid = plan.ground->gid;
  if (setresgid(gid, gid, gid) < 0) fail(plan, Stage::uid, errno);
  if (setresuid(uid, uid, uid) < 0) fail(plan, Stage::uid, errno);
  must(Stage::caps, set_capabilities(0));
  if (!nothing_left(plan)) fail(plan, Stage::caps_readback, EPERM);
  // Any change of identity clears it: armed here, after the last.
  prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
    fail(plan, Stage::no_new_privs, errno);
  }
  umask(022);
  must(Stage::cwd, enter_directory(program.cwd));
  if (plan.inside->landlock >= 0) {
    must(Stage::landlock, landlock_enter(plan.inside->landlock));
  }
  must(Stage::stdio, take_stdio(plan));
  must(Stage::seccomp, install(host.allow));
  must(Stage::seccomp, install(host.deny));
  if (plan.builtin) {
    close(plan.fail);
    _exit(plan.builtin(0, 1));
  }
  fail(plan, Stage::exec, exec(program));
}

}  // namespace machina::sandbox
