// The canary: it attacks. Its steps run inside sessions exactly as a job's do,
// and the level is computed from what they could not do. Return codes of the
// set-up are no evidence: a policy that was "applied" without enforcing
// anything is the oldest failure of such systems.

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/sock_diag.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <vector>

#include "workers/sandbox/launch.h"

namespace machina::sandbox {

const KeeperReply& last_reply(const Slot& slot);
std::vector<Mechanism> mechanisms_of(const MechWire (&mechs)[kMechs]);

namespace {

constexpr Limits kLimits{32, 4, 16, 0, 1 << 16};

// --- the attacks, inside the sandbox ---

// What the outside tells: where the bait lies.
// Nothing is planted in the file system: a worker killed here leaves nothing.
constexpr const char* kHostPlaces[] = {"/",    "/etc",  "/etc/passwd", "/tmp",
                                       "/var", "/home", "/root",       "/work"};
struct Place {
  dev_t device = 0;
  ino_t inode = 0;
};
struct Bait {
  char mode = 'a';
  int worker_pid = 0;
  Place places[std::size(kHostPlaces)];  // what lies there on the host
  char socket[64] = {};                  // an abstract socket of the worker's
};

bool cannot_open(const char* path, int flags) {
  const int fd = open(path, flags | O_CLOEXEC, 0600);
  if (fd >= 0) close(fd);
  return fd < 0;
}

bool fails(long result) { return result < 0; }

// The wait status of a child that runs `act` and exits 0 where it says so.
template <class Act>
int status_of(Act act) {
  const pid_t pid = fork();
  if (pid == 0) _exit(act() ? 0 : 1);
  int status = 1 << 8;
  if (pid > 0) waitpid(pid, &status, 0);
  return status;
}
template <class Act>
bool child_agrees(Act act) {
  return status_of(act) == 0;
}
// Killed, or it reports refusal.
template <class Act>
bool child_withstands(Act act) {
  const int status = status_of(act);
  return WIFSIGNALED(status) || status == 0;
}

bool reach_host(const Bait& bait) {
  for (std::size_t i = 0; i < std::size(kHostPlaces); ++i) {
    struct stat st {};
    if (stat(kHostPlaces[i], &st) == 0 && st.st_dev == bait.places[i].device &&
        st.st_ino == bait.places[i].inode) {
      return false;
    }
  }
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/root", bait.worker_pid);
  return cannot_open("/etc/shadow", O_RDONLY) &&
         cannot_open("/root", O_RDONLY) && cannot_open("/home", O_RDONLY) &&
         cannot_open("/proc/1/root/etc", O_RDONLY) &&
         cannot_open(path, O_RDONLY);
}

bool write_outside(const Bait&) {
  for (const char* path : {"/x", "/usr/x", "/etc/x", "/dev/x", "/run/x",
                           "/proc/x", "/usr/bin/x"}) {
    if (!cannot_open(path, O_WRONLY | O_CREAT)) return false;
  }
  return cannot_open("/etc/passwd", O_WRONLY) &&
         cannot_open("/proc/sys/kernel/core_pattern", O_WRONLY);
}

bool new_namespace(const Bait&) {
  clone_args args{};
  args.flags = CLONE_NEWUSER;
  args.exit_signal = SIGCHLD;
  const long cloned = syscall(SYS_clone3, &args, sizeof(args));
  if (cloned == 0) _exit(0);
  if (cloned > 0) return false;
  const long old = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
  if (old == 0) _exit(0);
  return old < 0 && fails(unshare(CLONE_NEWUSER)) &&
         fails(unshare(CLONE_NEWNS)) && fails(unshare(CLONE_NEWNET));
}

bool mount_something(const Bait&) {
  return fails(mount("none", "/work", "tmpfs", 0, nullptr)) &&
         fails(umount2("/usr", MNT_DETACH)) &&
         fails(mount(nullptr, "/", nullptr, MS_REMOUNT | MS_BIND, nullptr)) &&
         fails(syscall(SYS_fsopen, "tmpfs", 0)) && fails(chroot("/work"));
}

bool reach_network(const Bait& bait) {
  const int tcp = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(80);
  inet_pton(AF_INET, "192.0.2.1", &to.sin_addr);
  const bool out = tcp >= 0 && (connect(tcp, reinterpret_cast<sockaddr*>(&to),
                                        sizeof(to)) == 0 ||
                                errno == EINPROGRESS);
  if (tcp >= 0) close(tcp);
  const int local = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path + 1, bait.socket, std::strlen(bait.socket));
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 +
                                           std::strlen(bait.socket));
  const bool abstract =
      local >= 0 &&
      connect(local, reinterpret_cast<sockaddr*>(&name), size) == 0;
  if (local >= 0) close(local);
  return !out && !abstract;
}

bool foreign_sockets(const Bait&) {
  for (int family : {AF_VSOCK, AF_ALG, AF_PACKET}) {
    for (long high : {0L, 1L << 32}) {
      const long fd = syscall(SYS_socket, family | high, SOCK_DGRAM, 0L);
      if (fd >= 0) return false;
    }
  }
  constexpr int kProtocols[][2] = {
      {SOCK_STREAM, 262 /* MPTCP */}, {SOCK_DGRAM, 136 /* UDP-Lite */},
      {SOCK_STREAM, 132 /* SCTP */},  {SOCK_DCCP, 33},
      {SOCK_DGRAM, 115 /* L2TP */},   {SOCK_STREAM, 256 /* SMC */}};
  for (const auto& [type, protocol] : kProtocols) {
    if (socket(AF_INET, type, protocol) >= 0 || errno != EPROTONOSUPPORT) {
      return false;
    }
  }
  return fails(socket(AF_NETLINK, SOCK_RAW, 9)) &&
         fails(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
}

bool touch_others(const Bait& bait) {
  char byte;
  iovec here{&byte, 1}, there{reinterpret_cast<void*>(0x400000), 1};
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/environ", bait.worker_pid);
  kill(1, SIGKILL);  // if that worked we would not see what comes next
  rlimit limit{};
  return fails(kill(bait.worker_pid, 0)) &&
         fails(prlimit(1, RLIMIT_NOFILE, nullptr, &limit)) &&
         fails(setpriority(PRIO_PROCESS, 1, 19)) &&
         fails(setpriority(PRIO_USER, 0, 19)) &&
         fails(ptrace(PTRACE_SEIZE, 1, nullptr, nullptr)) &&
         fails(process_vm_readv(1, &here, 1, &there, 1, 0)) &&
         cannot_open(path, O_RDONLY) &&
         cannot_open("/proc/1/environ", O_RDONLY) &&
         cannot_open("/proc/1/mem", O_RDWR);
}

bool seccomp_holds(const Bait&) {
  return prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 2 &&
         syscall(SYS_keyctl, 0, -3, 0, 0, 0) < 0 && errno == EPERM &&
         syscall(SYS_io_uring_setup, 1, nullptr) < 0 && errno == ENOSYS &&
         fails(syscall(600)) &&
         child_withstands([] { return syscall(0x40000000 | 39) < 0; });
}

// Creating a whiteout (0, 0) needs no right at all: only Landlock says no.
bool landlock_holds(const Bait&) {
  return fails(mknod("/tmp/.canary", S_IFCHR | 0600, makedev(0, 0))) &&
         errno == EACCES;
}

bool no_rights(const Bait&) {
  __user_cap_header_struct head{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2];
  if (syscall(SYS_capget, &head, data) < 0) return false;
  for (const auto& d : data) {
    if (d.effective || d.permitted || d.inheritable) return false;
  }
  const bool root = getuid() == 0;
  return (root || fails(setuid(0))) && fails(setgroups(0, nullptr)) &&
         prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 &&
         prctl(PR_CAPBSET_READ, CAP_SYS_ADMIN, 0, 0, 0) == 0;
}

bool only_own_files(const Bait&) {
  for (int fd = 3; fd < 1024; ++fd) {
    if (fcntl(fd, F_GETFD) >= 0) return false;
  }
  return true;
}

bool fork_capped(const Bait&) {
  pid_t children[64];
  int n = 0;
  while (n < 64) {
    const pid_t pid = fork();
    if (pid < 0) break;
    if (pid == 0) {
      pause();
      _exit(0);
    }
    children[n++] = pid;
  }
  for (int i = 0; i < n; ++i) kill(children[i], SIGKILL);
  for (int i = 0; i < n; ++i) waitpid(children[i], nullptr, 0);
  return n <= static_cast<int>(kLimits.pids);
}

bool disk_capped(const Bait&) {
  const int fd = open("/tmp/fill", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  static const char block[1 << 16] = {};
  bool full = false;
  for (int i = 0; i < 256 && !full; ++i) {
    full = write(fd, block, sizeof(block)) < 0;
  }
  close(fd);
  unlink("/tmp/fill");
  return full;
}

// EROFS is said before anybody's rights are looked at: of the mount alone.
bool read_only(const char* path) {
  return fails(chmod(path, 0755)) && errno == EROFS;
}

bool has_flags(const char* path, unsigned long wanted) {
  struct statvfs fs {};
  return statvfs(path, &fs) == 0 && (fs.f_flag & wanted) == wanted;
}

// Nodev and nosuid cannot be attacked alone: Landlock and no_new_privs stand
// before them. So the kernel is asked what it enforces.
bool mount_flags_hold(const Bait&) {
  constexpr unsigned long kShown = ST_RDONLY | ST_NOSUID | ST_NODEV;
  return read_only("/") && read_only("/usr") && read_only("/etc/passwd") &&
         read_only("/dev/null") && read_only("/proc/self") &&
         has_flags("/", kShown) && has_flags("/usr", kShown) &&
         has_flags("/work", ST_NOSUID | ST_NODEV) &&
         has_flags("/tmp", ST_NOSUID | ST_NODEV) &&
         has_flags("/dev/shm", ST_NOSUID | ST_NODEV) &&
         has_flags("/dev/null", ST_RDONLY | ST_NOSUID | ST_NOEXEC) &&
         has_flags("/proc", kShown | ST_NOEXEC) &&
         fails(mknod("/tmp/.node", S_IFCHR | 0600, makedev(1, 1)));
}

// Goes beyond each limit; as a child, whose signals and descriptors are its
// own.
bool limits_hold(const Bait&) {
  const auto files = [] {
    int n = 0;
    while (n <= static_cast<int>(kStepDescriptors) && dup(0) >= 0) ++n;
    return errno == EMFILE && n <= static_cast<int>(kStepDescriptors);
  };
  const auto file_size = [] {
    signal(SIGXFSZ, SIG_IGN);
    const auto beyond = static_cast<off_t>(file_bytes_max(kLimits));
    const int fd = open("/tmp/big", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    const bool held = fd >= 0 && fails(pwrite(fd, "x", 1, beyond)) &&
                      errno == EFBIG && fails(ftruncate(fd, beyond + 1)) &&
                      errno == EFBIG;
    unlink("/tmp/big");
    return held;
  };
  const auto locked = [] {
    constexpr std::size_t kSize = kLockedBytesMax + (1 << 20);
    void* memory = mmap(nullptr, kSize, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory != MAP_FAILED && fails(mlock(memory, kSize));
  };
  const auto pending = [] {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &set, nullptr);
    std::uint64_t n = 0;
    while (n <= kPendingSignalsMax &&
           sigqueue(getpid(), SIGRTMIN, sigval{}) == 0) {
      ++n;
    }
    return n <= kPendingSignalsMax;
  };
  const auto core = [] {
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    const pid_t pid = fork();
    if (pid == 0) {
      signal(SIGABRT, SIG_DFL);
      abort();
    }
    int status = 0;
    return waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) &&
           !WCOREDUMP(status);
  };
  // None can be taken back, nor a better place among the host's processes.
  const auto raised = [] {
    for (const auto what : {RLIMIT_NOFILE, RLIMIT_FSIZE, RLIMIT_CORE,
                            RLIMIT_MEMLOCK, RLIMIT_NPROC, RLIMIT_SIGPENDING}) {
      rlimit limit{};
      if (getrlimit(what, &limit) < 0 || limit.rlim_max == RLIM_INFINITY) {
        return false;
      }
      ++limit.rlim_max;
      if (setrlimit(what, &limit) == 0) return false;
    }
    const sched_param first{1};
    return fails(setpriority(PRIO_PROCESS, 0, -1)) &&
           fails(sched_setscheduler(0, SCHED_FIFO, &first));
  };
  return child_agrees(files) && child_agrees(file_size) &&
         child_agrees(locked) && child_agrees(pending) && child_agrees(core) &&
         child_agrees(raised);
}

// Sockets whose buffers are filled, and what the kernel holds in them.
class Hoard {
 public:
  ~Hoard() {
    for (int fd : fds_) close(fd);
  }
  std::uint64_t bytes() const {
    std::uint64_t sum = 0;
    for (int fd : fds_) sum += held(fd);
    return sum;
  }
  bool full() const { return bytes() > kMost || fds_.size() > 1000; }

  // False where no socket of the kind can be had.
  bool add_udp() {
    sockaddr_in self{};
    const int fd = bound(SOCK_DGRAM, &self);
    if (fd < 0) return false;
    static const char block[16 << 10] = {};
    fill(fd, [&] {
      return sendto(fd, block, sizeof(block), MSG_DONTWAIT,
                    reinterpret_cast<sockaddr*>(&self), sizeof(self));
    });
    return true;
  }

  bool add_tcp() {
    sockaddr_in self{};
    const int listener = bound(SOCK_STREAM, &self);
    if (listener < 0 || listen(listener, 1) < 0) return false;
    const int out = keep(socket(AF_INET, SOCK_STREAM, 0));
    if (out < 0 ||
        connect(out, reinterpret_cast<sockaddr*>(&self), sizeof(self)) < 0) {
      return false;
    }
    const int in = keep(accept(listener, nullptr, nullptr));
    static const char block[64 << 10] = {};
    if (in < 0) return false;
    fill(in, [&] { return send(out, block, sizeof(block), MSG_DONTWAIT); });
    return true;
  }

  // Answers that nobody reads.
  bool add_netlink() {
    const int fd = keep(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
    if (fd < 0) return false;
    struct {
      nlmsghdr head{};
      ifinfomsg link{};
    } ask;
    ask.head.nlmsg_len = sizeof(ask);
    ask.head.nlmsg_type = RTM_GETLINK;
    ask.head.nlmsg_flags = NLM_F_REQUEST;
    ask.link.ifi_index = 1;
    fill(fd, [&] { return send(fd, &ask, sizeof(ask), MSG_DONTWAIT); });
    return true;
  }

 private:
  static std::uint64_t held(int fd) {
    std::uint32_t info[SK_MEMINFO_VARS] = {};
    socklen_t size = sizeof(info);
    return getsockopt(fd, SOL_SOCKET, SO_MEMINFO, info, &size) == 0
               ? info[SK_MEMINFO_RMEM_ALLOC] + info[SK_MEMINFO_WMEM_QUEUED]
               : 0;
  }

  // Until it is refused, or nothing more arrives at `to`.
  template <class Send>
  static void fill(int to, Send send_one) {
    for (std::uint64_t before = 0, now = 1; now > before;) {
      before = now;
      for (int i = 0; i < 64; ++i) {
        if (send_one() < 0) return;
      }
      now = held(to);
    }
  }

  // More than the job may have in all.
  static constexpr std::uint64_t kMost =
      (kLimits.memory_mb + kLimits.disk_mb + 24) << 20;

  int keep(int fd) {
    if (fd >= 0) {
      const int most = 1 << 30;
      setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &most, sizeof(most));
      setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &most, sizeof(most));
      fds_.push_back(fd);
    }
    return fd;
  }
  int bound(int type, sockaddr_in* self) {
    const int fd = keep(socket(AF_INET, type, 0));
    self->sin_family = AF_INET;
    self->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(*self);
    auto* address = reinterpret_cast<sockaddr*>(self);
    return fd >= 0 && ::bind(fd, address, size) == 0 &&
                   getsockname(fd, address, &size) == 0
               ? fd
               : -1;
  }
  std::vector<int> fds_;
};

// False where the kernel held it all and nobody minded within the time in which
// a watchdog looks.
bool sockets_capped() {
  for (auto add : {&Hoard::add_udp, &Hoard::add_tcp, &Hoard::add_netlink}) {
    Hoard hoard;
    // What is dropped instead of kept makes no progress.
    std::uint64_t before = 0;
    for (int idle = 0; idle < 4 && !hoard.full();) {
      if (!(hoard.*add)()) break;
      const std::uint64_t now = hoard.bytes();
      idle = now > before + (64 << 10) ? 0 : idle + 1;
      before = now;
    }
    if (!hoard.full()) continue;
    usleep(300'000);
    return false;
  }
  return true;
}

// Not an attack: leaves a process that should not survive this step.
void leave_daemon() {
  if (fork() == 0) {
    setsid();
    if (fork() == 0) {
      for (int s = 1; s < 32; ++s) signal(s, SIG_IGN);
      for (;;) pause();
    }
    _exit(0);
  }
}

bool alone_now() {
  if (kill(-1, 0) == 0) return false;
  DIR* dir = opendir("/proc");
  if (!dir) return false;
  int others = 0;
  const long self = getpid();
  while (const dirent* entry = readdir(dir)) {
    const long pid = std::atol(entry->d_name);
    if (pid > 1 && pid != self) ++others;
  }
  closedir(dir);
  return others == 0;
}

void fill_memory() {
  const std::size_t size = (kLimits.memory_mb + kLimits.disk_mb + 64) << 20;
  auto* memory = static_cast<volatile char*>(
      mmap(nullptr, size, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) return;
  for (std::size_t i = 0; i < size; i += 4096) memory[i] = 1;
  // Held, so that a watchdog that looks now and then sees it too.
  sleep(2);
}

constexpr int kNotCapped = 4;  // the exit code

struct Attack {
  const char* name;
  bool (*act)(const Bait&);
};
constexpr Attack kAttacks[] = {
    {"host_files", reach_host},       {"write_outside", write_outside},
    {"new_namespace", new_namespace}, {"mount", mount_something},
    {"network", reach_network},       {"foreign_sockets", foreign_sockets},
    {"touch_others", touch_others},   {"syscalls", seccomp_holds},
    {"landlock", landlock_holds},     {"privilege", no_rights},
    {"descriptors", only_own_files},  {"fork_cap", fork_capped},
    {"disk_cap", disk_capped},        {"mount_flags", mount_flags_hold},
    {"limits", limits_hold},
};

// --- outside ---

struct Planted {
  int listener = -1;
  Bait bait;

  bool plant() {
    for (std::size_t i = 0; i < std::size(kHostPlaces); ++i) {
      struct stat st {};
      if (stat(kHostPlaces[i], &st) < 0) continue;
      bait.places[i] = Place{st.st_dev, st.st_ino};
    }
    bait.worker_pid = getpid();
    std::snprintf(bait.socket, sizeof(bait.socket), "machina-canary-%d",
                  getpid());
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const std::size_t n = std::strlen(bait.socket);
    std::memcpy(address.sun_path + 1, bait.socket, n);
    const auto size =
        static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + n);
    if (listener < 0) return false;
    // A name that is taken still serves: somebody else listens there.
    return bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0
               ? listen(listener, 1) == 0
               : errno == EADDRINUSE;
  }
  ~Planted() {
    if (listener >= 0) close(listener);
  }
};

StepResult attack(Session& session, Bait bait, char mode, Millis timeout_ms) {
  bait.mode = mode;
  Step step;
  step.builtin = kCanaryBuiltin;
  step.stdin_data.assign(reinterpret_cast<const char*>(&bait), sizeof(bait));
  step.timeout_ms = timeout_ms;
  return session.run(step, Watch{});
}

bool withstood(const Report& report, std::string_view name) {
  for (const auto& [attack, held] : report.attacks) {
    if (attack == name) return held;
  }
  return false;
}

// What did not hold takes its mechanism, and with it the level, away.
Level judge(Report* report, const KeeperReply& reply) {
  MechWire mechs[kMechs];
  std::copy(std::begin(reply.mechs), std::end(reply.mechs), mechs);
  const auto needs = [&](const char* name, Mech mech) {
    auto& m = mechs[static_cast<std::size_t>(mech)];
    if (!withstood(*report, name) && m.state == 0) {
      m = MechWire{static_cast<std::uint8_t>(MechanismState::unavailable), 0};
    }
  };
  needs("host_files", Mech::mountns);
  needs("write_outside", Mech::mountns);
  needs("descriptors", Mech::mountns);
  needs("touch_others", Mech::pidns);
  needs("daemon", Mech::pidns);
  needs("network", Mech::netns);
  needs("privilege", Mech::caps);
  needs("mount", Mech::caps);
  needs("new_namespace", Mech::caps);
  needs("landlock", Mech::landlock);
  needs("mount_flags", Mech::mountns);
  needs("limits", Mech::rlimits);
  needs("disk_cap", Mech::rlimits);
  needs("fork_cap", Mech::cgroup_pids);
  needs("memory_cap", Mech::cgroup_memory);
  auto& memory = mechs[static_cast<std::size_t>(Mech::cgroup_memory)];
  if (!withstood(*report, "socket_cap") && memory.state == 0) {
    memory.state = static_cast<std::uint8_t>(MechanismState::degraded);
  }
  if (!withstood(*report, "fork_cap")) needs("fork_cap", Mech::rlimits);
  for (const char* name : {"syscalls", "foreign_sockets"}) {
    auto& seccomp = mechs[static_cast<std::size_t>(Mech::seccomp)];
    if (!withstood(*report, name)) {
      seccomp.state = static_cast<std::uint8_t>(MechanismState::unavailable);
    }
  }
  report->mechanisms = mechanisms_of(mechs);
  return level_of(mechs);
}

}  // namespace

int canary_builtin(int in_fd, int out_fd) {
  Bait bait;
  if (read(in_fd, &bait, sizeof(bait)) != sizeof(bait)) return 2;
  bait.socket[sizeof(bait.socket) - 1] = 0;
  if (bait.mode == 'm') {
    fill_memory();
    return 0;
  }
  if (bait.mode == 's') return sockets_capped() ? 0 : kNotCapped;
  std::string lines;
  if (bait.mode == 'a') {
    for (const auto& attack : kAttacks) {
      lines += attack.name;
      lines += attack.act(bait) ? " 1\n" : " 0\n";
    }
    leave_daemon();
  } else {
    lines = alone_now() ? "daemon 1\n" : "daemon 0\n";
  }
  return write(out_fd, lines.data(), lines.size()) ==
                 static_cast<ssize_t>(lines.size())
             ? 0
             : 3;
}

Result<Report> run_canary(Slot& slot) {
  Report report;
  Planted planted;
  if (!planted.plant()) {
    return Error{Code::io, std::string("canary: ") + std::strerror(errno)};
  }
  SessionSpec spec;
  spec.limits = kLimits;
  auto session = slot.open(spec);
  const KeeperReply& reply = last_reply(slot);
  if (!session) {
    if (reply.stage == Stage::none) return session.error();
    // No sandbox can be made here: that is an answer, not a failure.
    report.mechanisms = mechanisms_of(reply.mechs);
    report.attacks.emplace_back("sandbox", false);
    report.trouble = {session.error().what,
                      remedy_for(reply.stage, reply.error)};
    return report;
  }
  report.provider.assign(reply.provider,
                         strnlen(reply.provider, sizeof(reply.provider)));
  for (char mode : {'a', 'd'}) {
    const StepResult result = attack(**session, planted.bait, mode, 10'000);
    if (result.ended == Ended::isolation) {
      // A sandbox in which nothing may start is none.
      report.mechanisms = mechanisms_of(reply.mechs);
      report.attacks.emplace_back("sandbox", false);
      report.trouble = {
          "no program can start in a sandbox: " + result.detail,
          remedy_for(
              result.detail.starts_with("userns") ? Stage::userns : Stage::none,
              0)};
      return report;
    }
    if (result.ended != Ended::exited || result.exit_code != 0) {
      return Error{Code::unavailable,
                   "canary: ended early: " + result.detail + " (" +
                       std::to_string(static_cast<int>(result.ended)) + ", " +
                       std::to_string(result.exit_code) + ", signal " +
                       std::to_string(result.signal) + ")"};
    }
    std::istringstream lines(result.out);
    std::string name;
    for (int held; lines >> name >> held;) {
      report.attacks.emplace_back(name, held != 0);
    }
  }
  StepResult memory = attack(**session, planted.bait, 'm', 10'000);
  if (memory.ended == Ended::signalled) {
    // Killed, and not by the cap: by somebody else, who will not do it twice.
    memory = attack(**session, planted.bait, 'm', 10'000);
  }
  if (memory.ended == Ended::failed) {
    return Error{Code::unavailable, "canary: ended early: " + memory.detail};
  }
  report.attacks.emplace_back("memory_cap", memory.ended == Ended::oom);
  const StepResult sockets = attack(**session, planted.bait, 's', 10'000);
  if (sockets.ended == Ended::failed) {
    return Error{Code::unavailable, "canary: ended early: " + sockets.detail};
  }
  report.attacks.emplace_back(
      "socket_cap",
      sockets.ended == Ended::oom ||
          (sockets.ended == Ended::exited && sockets.exit_code != kNotCapped));
  report.level = judge(&report, reply);
  if (report.level == 0) {
    std::string through;
    for (const auto& [name, held] : report.attacks) {
      if (!held) through += (through.empty() ? "" : ", ") + name;
    }
    report.trouble = {"the sandbox does not hold: " + through,
                      remedy_for(Stage::none, 0)};
  }
  return report;
}

}  // namespace machina::sandbox
