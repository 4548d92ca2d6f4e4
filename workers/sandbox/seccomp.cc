#include "workers/sandbox/seccomp.h"

#include <linux/audit.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

namespace machina::sandbox {

namespace {

// clang-format off
const char* const kAllowed[] = {
  // start and end
  "execve", "execveat", "exit", "exit_group", "arch_prctl", "set_tid_address",
  "set_robust_list", "get_robust_list", "rseq", "prlimit64", "brk", "wait4",
  "waitid", "clone", "fork", "vfork", "kill", "tkill", "tgkill",
  "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "pidfd_send_signal",
  "prctl", "unshare", "seccomp", "landlock_create_ruleset",
  "landlock_add_rule", "landlock_restrict_self", "membarrier",
  // memory
  "mmap", "munmap", "mprotect", "mremap", "madvise", "msync", "mincore",
  "mlock", "mlock2", "munlock", "mlockall", "munlockall", "pkey_alloc",
  "pkey_free", "pkey_mprotect", "memfd_create", "get_mempolicy", "mbind",
  "set_mempolicy",
  // signals and time
  "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending",
  "rt_sigtimedwait", "rt_sigsuspend", "sigaltstack", "restart_syscall",
  "pause", "alarm", "getitimer", "setitimer", "timer_create", "timer_settime",
  "timer_gettime", "timer_getoverrun", "timer_delete", "timerfd_create",
  "timerfd_settime", "timerfd_gettime", "nanosleep", "clock_gettime",
  "clock_getres", "clock_nanosleep", "gettimeofday", "time", "times",
  "sched_yield",
  // threads and scheduling
  "futex", "futex_waitv", "futex_wake", "futex_wait", "futex_requeue",
  "gettid", "sched_getaffinity", "sched_setaffinity", "sched_getparam",
  "sched_setparam", "sched_getscheduler", "sched_setscheduler",
  "sched_getattr", "sched_setattr", "sched_get_priority_max",
  "sched_get_priority_min", "sched_rr_get_interval", "getcpu", "getpriority",
  "setpriority", "ioprio_get", "ioprio_set",
  // files
  "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv",
  "pwritev", "preadv2", "pwritev2", "open", "openat", "openat2", "creat",
  "close", "close_range", "dup", "dup2", "dup3", "lseek", "fcntl", "flock",
  "fsync", "fdatasync", "sync_file_range", "fallocate", "ftruncate",
  "truncate", "fadvise64", "readahead", "copy_file_range", "sendfile",
  "splice", "tee", "getdents", "getdents64", "stat", "fstat", "lstat",
  "newfstatat", "statx", "statfs", "fstatfs", "access", "faccessat",
  "faccessat2", "readlink", "readlinkat", "getcwd", "chdir", "fchdir",
  "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "rename", "renameat",
  "renameat2", "link", "linkat", "symlink", "symlinkat", "chmod", "fchmod",
  "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "umask",
  "utime", "utimes", "futimesat", "utimensat", "getxattr", "lgetxattr",
  "fgetxattr", "listxattr", "llistxattr", "flistxattr", "setxattr",
  "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
  "inotify_init", "inotify_init1", "inotify_add_watch", "inotify_rm_watch",
  "mknod", "mknodat", "syncfs", "cachestat",
  // waiting
  "poll", "ppoll", "select", "pselect6", "epoll_create", "epoll_create1",
  "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "eventfd",
  "eventfd2", "signalfd", "signalfd4", "pipe", "pipe2",
  // who and what
  "getpid", "getppid", "getuid", "geteuid", "getgid", "getegid", "getresuid",
  "getresgid", "getgroups", "getpgid", "getpgrp", "setpgid", "getsid",
  "setsid", "setuid", "setgid", "setreuid", "setregid", "setresuid",
  "setresgid", "setfsuid", "setfsgid", "setgroups", "uname", "sysinfo",
  "getrusage", "getrlimit", "setrlimit", "getrandom", "capget", "capset",
  "ioctl",
  // sockets; `deny` refuses foreign families
  "socketpair", "connect", "bind", "listen", "accept", "accept4",
  "getsockname", "getpeername", "setsockopt", "getsockopt", "sendto",
  "sendmsg", "sendmmsg", "recvfrom", "recvmsg", "recvmmsg", "shutdown",
};

const char* const kDenied[] = {
  "bpf", "perf_event_open", "userfaultfd", "ptrace", "process_vm_readv",
  "process_vm_writev", "kcmp", "pidfd_getfd", "process_madvise",
  "process_mrelease", "kexec_load", "kexec_file_load", "init_module",
  "finit_module", "delete_module", "create_module", "mount", "umount2",
  "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig",
  "fsmount", "fspick", "mount_setattr", "setns", "keyctl", "add_key",
  "request_key", "swapon", "swapoff", "reboot", "acct", "quotactl",
  "quotactl_fd", "syslog", "sethostname", "setdomainname", "iopl", "ioperm",
  "modify_ldt", "open_by_handle_at", "name_to_handle_at", "fanotify_init",
  "fanotify_mark", "lookup_dcookie", "nfsservctl", "vhangup",
  "clock_settime", "settimeofday", "adjtimex", "clock_adjtime", "move_pages",
  "migrate_pages", "sync", "uselib", "ustat", "sysfs", "_sysctl",
  "memfd_secret", "vmsplice", "remap_file_pages", "shmget", "shmat", "shmctl",
  "shmdt", "semget", "semop", "semctl", "semtimedop", "msgget", "msgsnd",
  "msgrcv", "msgctl", "mq_open", "mq_unlink", "mq_timedsend",
  "mq_timedreceive", "mq_notify", "mq_getsetattr",
};

// Callers fall back on ENOSYS alone. clone3 hides its flags behind a pointer;
// io_uring does its work where no filter looks.
// The old aio counts against a limit that the whole host shares.
const char* const kAbsent[] = {"clone3", "io_uring_setup", "io_uring_enter",
                               "io_uring_register", "io_setup", "io_submit",
                               "io_getevents", "io_pgetevents", "io_cancel",
                               "io_destroy"};
// clang-format on

constexpr scmp_datum_t kLow = 0xffffffff;
constexpr std::uint32_t kErrno(int e) {
  return SCMP_ACT_ERRNO(static_cast<std::uint32_t>(e));
}

class Builder {
 public:
  explicit Builder(std::uint32_t otherwise)
      : context_(seccomp_init(otherwise), seccomp_release) {
    if (!context_) {
      error_ = ENOMEM;
      return;
    }
    check(seccomp_attr_set(context_.get(), SCMP_FLTATR_ACT_BADARCH,
                           SCMP_ACT_KILL_PROCESS));
    check(seccomp_attr_set(context_.get(), SCMP_FLTATR_CTL_OPTIMIZE, 2));
  }

  // A name this machine or this libseccomp does not know is skipped: what it
  // would name answers ENOSYS anyway.
  void rule(std::uint32_t action, const char* name,
            std::initializer_list<scmp_arg_cmp> args = {}) {
    const int number = seccomp_syscall_resolve_name(name);
    if (number < 0 || error_) return;
    check(seccomp_rule_add_array(context_.get(), action, number,
                                 static_cast<unsigned>(args.size()),
                                 args.begin()));
  }

  // Low 32 bits of argument `n`, masked, equal `value`.
  static scmp_arg_cmp low(unsigned n, scmp_datum_t value,
                          scmp_datum_t mask = kLow) {
    return SCMP_CMP64(n, SCMP_CMP_MASKED_EQ, mask & kLow, value);
  }

  Result<Bpf> finish() {
    if (error_) return failed();
    const int file = memfd_create("bpf", MFD_CLOEXEC);
    if (file < 0) {
      error_ = errno;
      return failed();
    }
    check(seccomp_export_bpf(context_.get(), file));
    const off_t size = lseek(file, 0, SEEK_END);
    Bpf program(static_cast<std::size_t>(size > 0 ? size : 0) /
                sizeof(sock_filter));
    const ssize_t got =
        pread(file, program.data(), program.size() * sizeof(sock_filter), 0);
    close(file);
    if (!error_ && (got != size || program.empty())) error_ = EIO;
    if (error_) return failed();
    return program;
  }

 private:
  void check(int code) {
    if (code < 0 && !error_) error_ = -code;
  }
  Error failed() const {
    return Error{Code::io,
                 std::string("seccomp filter: ") + std::strerror(error_)};
  }

  std::unique_ptr<void, void (*)(scmp_filter_ctx)> context_;
  int error_ = 0;
};

// --- what libseccomp cannot express ---

// The newest call that was looked at (mseal). In the deny-list alone a later
// one would be allowed unseen.
constexpr std::uint32_t kNewest = 462;
constexpr std::uint32_t kX32Bit = 0x40000000;
#if defined(__x86_64__)
constexpr std::uint32_t kNative = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
constexpr std::uint32_t kNative = AUDIT_ARCH_AARCH64;
#endif
static_assert(std::endian::native == std::endian::little);

// Blocks of instructions, one a call; each ends by refusing, or by going on to
// the filter behind.
class Arguments {
 public:
  Arguments() {
    put(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, arch)));
    put(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kNative, 1, 0));
    go_on();
    put(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)));
    put(BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, kX32Bit, 0, 1));
    go_on();
    put(BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, kNewest, 0, 1));
    refuse(ENOSYS);
  }

  // `block` is taken where the number is `call`'s. Its jumps are relative.
  void when(std::uint32_t call, const std::function<void(Arguments&)>& block) {
    const std::size_t at = program_.size();
    put(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 0));
    block(*this);
    program_[at].jf = static_cast<std::uint8_t>(program_.size() - at - 1);
  }
  // Loads the low word of an argument.
  void argument(unsigned n) {
    put(BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                 static_cast<std::uint32_t>(offsetof(seccomp_data, args) +
                                            n * sizeof(std::uint64_t))));
  }
  void mask(std::uint32_t bits) {
    put(BPF_STMT(BPF_ALU | BPF_AND | BPF_K, bits));
  }
  // Skips so many instructions where equal, and where not.
  void equal(std::uint32_t value, std::uint8_t yes, std::uint8_t no) {
    put(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no));
  }
  void refuse(int error) { put(BPF_STMT(BPF_RET | BPF_K, kErrno(error))); }
  void go_on() {
    on_.push_back(program_.size());
    put(BPF_STMT(BPF_JMP | BPF_JA, 0));
  }

  Bpf before(const Bpf& filter) && {
    for (const std::size_t at : on_) {
      program_[at].k = static_cast<std::uint32_t>(program_.size() - at - 1);
    }
    program_.insert(program_.end(), filter.begin(), filter.end());
    return std::move(program_);
  }

 private:
  void put(const sock_filter& instruction) { program_.push_back(instruction); }

  Bpf program_;
  std::vector<std::size_t> on_;
};

// TCP and UDP; what is raw the rules behind refuse. Not MPTCP, UDP-Lite, SCTP,
// DCCP, L2TP, SMC, nor ICMP as datagrams.
void inet_sockets_only(Arguments& a) {
  a.argument(0);
  a.equal(AF_INET, 1, 0);
  a.equal(AF_INET6, 0, 12);
  a.argument(1);
  a.mask(0xf);
  a.equal(SOCK_STREAM, 3, 0);
  a.equal(SOCK_DGRAM, 4, 0);
  a.equal(SOCK_RAW, 7, 0);
  a.equal(SOCK_PACKET, 6, 5);
  a.argument(2);
  a.equal(IPPROTO_TCP, 4, 2);
  a.argument(2);
  a.equal(IPPROTO_UDP, 2, 0);
  a.equal(0, 1, 0);
  a.refuse(EPROTONOSUPPORT);
  a.go_on();
}

// In a job's PID namespace the one process that is not the job's is PID 1, and
// without another uid for the job the kernel would let it be changed.
void not_of_init(Arguments& a) {
  a.argument(0);
  a.equal(1, 0, 1);
  a.refuse(EPERM);
  a.go_on();
}

// setpriority and ioprio_set: by process, by group, or all of a user's.
void not_of_init_or_user(Arguments& a, std::uint32_t user) {
  a.argument(0);
  a.equal(user, 2, 0);
  a.argument(1);
  a.equal(1, 0, 1);
  a.refuse(EPERM);
  a.go_on();
}

Bpf with_arguments(const Bpf& filter) {
  Arguments a;
  a.when(SYS_socket, inet_sockets_only);
  a.when(SYS_socketpair, [](Arguments& b) {
    b.argument(0);
    b.equal(AF_UNIX, 1, 0);
    b.refuse(EAFNOSUPPORT);
    b.go_on();
  });
  // What makes another protocol of a TCP socket: SMC, TLS in the kernel.
  a.when(SYS_setsockopt, [](Arguments& b) {
    b.argument(1);
    b.equal(IPPROTO_TCP, 0, 3);
    b.argument(2);
    b.equal(31 /* TCP_ULP */, 0, 1);
    b.refuse(ENOPROTOOPT);
    b.go_on();
  });
  for (const std::uint32_t call :
       {SYS_prlimit64, SYS_sched_setaffinity, SYS_sched_setparam,
        SYS_sched_setscheduler, SYS_sched_setattr}) {
    a.when(call, not_of_init);
  }
  a.when(SYS_setpriority,
         [](Arguments& b) { not_of_init_or_user(b, 2 /* PRIO_USER */); });
  a.when(SYS_ioprio_set,
         [](Arguments& b) { not_of_init_or_user(b, 3 /* WHO_USER */); });
  return std::move(a).before(filter);
}

}  // namespace

Result<Bpf> compile_allow_filter() {
  Builder b(kErrno(ENOSYS));
  for (const char* name : kAllowed) b.rule(SCMP_ACT_ALLOW, name);
  for (int family : {AF_UNIX, AF_INET, AF_INET6}) {
    b.rule(SCMP_ACT_ALLOW, "socket",
           {Builder::low(0, static_cast<scmp_datum_t>(family))});
  }
  // NETLINK_ROUTE alone: getifaddrs() asks it.
  b.rule(SCMP_ACT_ALLOW, "socket",
         {Builder::low(0, AF_NETLINK), Builder::low(2, 0)});
  for (scmp_datum_t persona : {0x0u, 0x8u, 0x20000u, 0x20008u, 0xffffffffu}) {
    b.rule(SCMP_ACT_ALLOW, "personality", {Builder::low(0, persona)});
  }
  return b.finish();
}

Result<Bpf> compile_deny_filter() {
  Builder b(SCMP_ACT_ALLOW);
  for (const char* name : kDenied) b.rule(kErrno(EPERM), name);
  for (const char* name : kAbsent) b.rule(kErrno(ENOSYS), name);

  for (scmp_datum_t bit :
       {CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER,
        CLONE_NEWPID, CLONE_NEWNET}) {
    b.rule(kErrno(EPERM), "clone", {Builder::low(0, bit, bit)});
    b.rule(kErrno(EPERM), "unshare", {Builder::low(0, bit, bit)});
  }
  b.rule(kErrno(EPERM), "unshare", {Builder::low(0, 0x80, 0x80)});  // NEWTIME

  for (int family = 0; family < 64; ++family) {
    if (family == AF_UNIX || family == AF_INET || family == AF_INET6 ||
        family == AF_NETLINK) {
      continue;
    }
    b.rule(kErrno(EAFNOSUPPORT), "socket",
           {Builder::low(0, static_cast<scmp_datum_t>(family))});
  }
  for (scmp_datum_t bit = 64; bit <= 0x80000000u; bit <<= 1) {
    b.rule(kErrno(EAFNOSUPPORT), "socket", {Builder::low(0, bit, bit)});
  }
  for (scmp_datum_t bit = 1; bit <= 0x80000000u; bit <<= 1) {
    b.rule(kErrno(EPERM), "socket",
           {Builder::low(0, AF_NETLINK), Builder::low(2, bit, bit)});
  }
  b.rule(kErrno(EPERM), "socket",
         {Builder::low(0, AF_INET), Builder::low(1, SOCK_RAW, 0xf)});
  b.rule(kErrno(EPERM), "socket",
         {Builder::low(0, AF_INET6), Builder::low(1, SOCK_RAW, 0xf)});
  b.rule(kErrno(EPERM), "socket",
         {Builder::low(0, AF_INET), Builder::low(1, SOCK_PACKET, 0xf)});

  for (scmp_datum_t request : {0x5412u /* TIOCSTI */, 0x541cu /* TIOCLINUX */,
                               0x540eu /* TIOCSCTTY */}) {
    b.rule(kErrno(EPERM), "ioctl", {Builder::low(1, request)});
  }
  // Leases and directory notices on files that others use too.
  for (scmp_datum_t order :
       {1024u /* F_SETLEASE */, 1026u /* F_NOTIFY */, 1040u /* F_SETDELEG */}) {
    b.rule(kErrno(EPERM), "fcntl", {Builder::low(1, order)});
  }
  for (scmp_datum_t option : {35u /* SET_MM */, 0x59616d61u /* SET_PTRACER */,
                              28u /* SECUREBITS */, 47u /* CAP_AMBIENT */}) {
    b.rule(kErrno(EPERM), "prctl", {Builder::low(0, option)});
  }
  // A listener of its own could answer CONTINUE to itself.
  b.rule(kErrno(EPERM), "seccomp", {Builder::low(1, 8, 8)});
  // READ_IMPLIES_EXEC, ADDR_NO_RANDOMIZE, MMAP_PAGE_ZERO; bit 31 clear, since
  // 0xffffffff only asks.
  for (scmp_datum_t bit : {0x0400000u, 0x0040000u, 0x0100000u}) {
    b.rule(kErrno(EPERM), "personality",
           {Builder::low(0, bit, bit | 0x80000000u)});
  }
  auto filter = b.finish();
  if (!filter) return filter.error();
  return with_arguments(*filter);
}

}  // namespace machina::sandbox
