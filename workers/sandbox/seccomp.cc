#include "workers/sandbox/seccomp.h"

#include <linux/sched.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
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
const char* const kAbsent[] = {"clone3", "io_uring_setup", "io_uring_enter",
                               "io_uring_register"};
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
  return b.finish();
}

}  // namespace machina::sandbox
