#include "tests/escape/hostile.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <elf.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace machina::escape {

namespace {

bool g_contained = true;

// The act got what it should not have.
void check(bool contained, const std::string& what) {
  if (contained) return;
  g_contained = false;
  std::printf("ESCAPED: %s (errno %d %s)\n", what.c_str(), errno,
              std::strerror(errno));
}

void refused(long result, const std::string& what) { check(result < 0, what); }
void refused_as(long result, int error, const std::string& what) {
  check(result < 0 && errno == error,
        what + " should say " + std::strerror(error));
}

void no_open(const std::string& path, int flags) {
  const int fd = open(path.c_str(), flags | O_CLOEXEC, 0644);
  check(fd < 0, "open " + path);
  if (fd >= 0) close(fd);
}

bool killed_or_failed(bool (*act)()) {
  const pid_t pid = fork();
  if (pid == 0) _exit(act() ? 0 : 1);
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFSIGNALED(status) || WEXITSTATUS(status) == 0;
}

std::string slurp(const std::string& path) {
  std::string all;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  char text[4096];
  for (ssize_t n; fd >= 0 && (n = read(fd, text, sizeof(text))) > 0;) {
    all.append(text, static_cast<std::size_t>(n));
  }
  if (fd >= 0) close(fd);
  return all;
}

std::vector<std::string> entries(const std::string& path) {
  std::vector<std::string> names;
  DIR* dir = opendir(path.c_str());
  while (const dirent* entry = dir ? readdir(dir) : nullptr) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  if (dir) closedir(dir);
  return names;
}

// --- files ---

void read_secret(const Bait& bait) {
  for (const std::string& path :
       {bait.secret, std::string("/etc/shadow"), std::string("/root/.ssh"),
        std::string("/etc/ssl/private"), std::string("/var/lib"),
        std::string("/proc/1/root/etc/shadow"), std::string("/proc/1/cwd"),
        std::string("/proc/kcore"), "/proc/" + std::to_string(bait.worker)}) {
    if (path == "/proc/kcore") {
      check(slurp(path).empty(), "read " + path);
    } else {
      no_open(path, O_RDONLY);
    }
  }
}

void write_everywhere(const std::string& dir, int depth) {
  if (dir == "/mirror" || dir == "/work" || dir == "/tmp" ||
      dir == "/dev/shm" || dir == "/var/tmp") {
    return;
  }
  const std::string probe = (dir == "/" ? "" : dir) + "/.escape";
  const int fd = open(probe.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  check(fd < 0, "create " + probe);
  if (fd >= 0) close(fd);
  if (depth == 0) return;
  for (const auto& name : entries(dir)) {
    const std::string path = (dir == "/" ? "" : dir) + "/" + name;
    struct stat st {};
    if (lstat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode) &&
        name != "proc") {
      write_everywhere(path, depth - 1);
    }
  }
}

void write_outside(const Bait& bait) {
  write_everywhere("/", 3);
  no_open(bait.writable + "/x", O_WRONLY | O_CREAT);
  for (const char* path : {"/etc/passwd", "/etc/hosts", "/etc/resolv.conf",
                           "/etc/hostname", "/usr/bin/env"}) {
    no_open(path, O_WRONLY);
    refused(unlink(path), std::string("unlink ") + path);
    refused(chmod(path, 0777), std::string("chmod ") + path);
  }
  refused(rename("/etc", "/etc2"), "rename /etc");
  refused(mkdir("/new", 0755), "mkdir /new");
  refused(chmod("/dev/null", 0600), "chmod /dev/null");
}

void dot_dot(const Bait&) {
  struct stat root {
  }, st{};
  stat("/", &root);
  chdir("/work");
  for (int i = 0; i < 64; ++i) chdir("..");
  stat(".", &st);
  check(st.st_ino == root.st_ino && st.st_dev == root.st_dev, "above the root");
  int dir = open("/work", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  for (int i = 0; i < 64; ++i) {
    const int up = openat(dir, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    close(dir);
    dir = up;
  }
  fstat(dir, &st);
  check(st.st_ino == root.st_ino, "above the root by descriptors");
  // A rename beneath a walker's feet.
  mkdir("/work/a", 0755);
  mkdir("/work/a/b", 0755);
  const pid_t racer = fork();
  if (racer == 0) {
    for (;;) {
      rename("/work/a/b", "/work/b");
      rename("/work/b", "/work/a/b");
    }
  }
  for (int i = 0; i < 20'000; ++i) {
    if (chdir("/work/a/b") < 0) continue;
    for (int j = 0; j < 6; ++j) chdir("..");
    stat(".", &st);
    if (st.st_ino != root.st_ino) {
      check(false, "above the root in a race");
      break;
    }
  }
  kill(racer, SIGKILL);
  char cwd[4096];
  check(getcwd(cwd, sizeof(cwd)) && cwd[0] == '/', "getcwd outside");
}

void chroot_out(const Bait&) {
  mkdir("/work/jail", 0755);
  refused_as(chroot("/work/jail"), EPERM, "chroot");
}

void mounts(const Bait&) {
  refused(mount("none", "/work", "tmpfs", 0, nullptr), "mount tmpfs");
  refused(mount("/usr", "/work", nullptr, MS_BIND, nullptr), "bind");
  refused(mount(nullptr, "/usr", nullptr, MS_REMOUNT | MS_BIND, nullptr),
          "remount rw");
  refused(mount("proc", "/work", "proc", 0, nullptr), "mount proc");
  refused(mount("cgroup", "/work", "cgroup2", 0, nullptr), "mount cgroup2");
  refused(umount2("/usr", MNT_DETACH), "umount");
  refused(umount2("/proc/keys", MNT_DETACH), "unmask");
  refused(syscall(SYS_pivot_root, "/work", "/work"), "pivot_root");
  refused(syscall(SYS_open_tree, AT_FDCWD, "/", 1), "open_tree");
  refused(syscall(SYS_fsopen, "tmpfs", 0), "fsopen");
  refused(syscall(SYS_fsmount, 0, 0, 0), "fsmount");
  refused(syscall(SYS_move_mount, AT_FDCWD, "/usr", AT_FDCWD, "/work", 0),
          "move_mount");
  refused(syscall(442, AT_FDCWD, "/usr", 0, nullptr, 0), "mount_setattr");
}

void device_nodes(const Bait&) {
  refused(mknod("/work/mem", S_IFCHR | 0666, makedev(1, 1)), "mknod c 1 1");
  refused(mknod("/work/disk", S_IFBLK | 0666, makedev(8, 0)), "mknod b 8 0");
  refused(mknod("/work/w", S_IFCHR | 0666, makedev(0, 0)), "mknod whiteout");
  check(!entries("/dev").empty() && entries("/dev").size() <= 10,
        "more than ten names in /dev");
}

void setuid_files(const Bait&) {
  const uid_t before = geteuid();
  const int fd = open("/work/suid", O_WRONLY | O_CREAT | O_CLOEXEC, 0755);
  [[maybe_unused]] ssize_t n = write(fd, "#!/bin/sh\nid -u\n", 16);
  fchmod(fd, 04755);
  close(fd);
  FILE* out = popen(
      "/work/suid; su -c 'id -u' root </dev/null; "
      "mount /work 2>/dev/null; newgrp root </dev/null",
      "r");
  char line[256];
  while (out && fgets(line, sizeof(line), out)) {
    if (before != 0) check(std::strcmp(line, "0\n") != 0, "became root");
  }
  if (out) pclose(out);
}

void handles(const Bait&) {
  alignas(file_handle) char room[sizeof(file_handle) + 128] = {};
  auto* handle = reinterpret_cast<file_handle*>(room);
  handle->handle_bytes = 128;
  int id;
  refused(syscall(SYS_name_to_handle_at, AT_FDCWD, "/usr", handle, &id, 0),
          "name_to_handle_at");
  // "Shocker": inode 2 of the host's file system.
  handle->handle_bytes = 8;
  handle->handle_type = 1;
  std::memcpy(room + sizeof(file_handle), "\x02\0\0\0\0\0\0\0", 8);
  const int at = open("/usr", O_RDONLY | O_CLOEXEC);
  refused(syscall(SYS_open_by_handle_at, at, handle, O_RDONLY),
          "open_by_handle_at");
}

void hard_links(const Bait& bait) {
  refused(link("/etc/passwd", "/work/passwd"), "link of /etc/passwd");
  refused(link("/usr/bin/env", "/work/env"), "link of /usr/bin/env");
  refused(link(bait.secret.c_str(), "/work/secret"), "link of the secret");
}

void proc_files(const Bait&) {
  for (const char* path :
       {"/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger",
        "/proc/self/oom_score_adj", "/proc/sys/vm/drop_caches",
        "/proc/self/uid_map", "/proc/self/gid_map", "/proc/self/setgroups",
        "/proc/1/oom_score_adj", "/proc/sys/user/max_user_namespaces",
        "/proc/sys/net/ipv4/ip_forward"}) {
    const int fd = open(path, O_WRONLY | O_CLOEXEC);
    // The mask over sysrq-trigger is /dev/null.
    check(fd < 0 || std::strcmp(path, "/proc/sysrq-trigger") == 0,
          std::string("write ") + path);
    if (fd >= 0) close(fd);
  }
  for (const char* path : {"/proc/keys", "/proc/key-users", "/proc/kallsyms",
                           "/proc/timer_list", "/proc/kmsg"}) {
    check(slurp(path).empty(), std::string("read ") + path);
  }
  check(entries("/sys").empty(), "/sys is there");
  check(slurp("/proc/self/mounts").find(" cgroup") == std::string::npos,
        "a cgroup file system is mounted");
}

void exe_overwrite(const Bait&) {
  no_open("/proc/1/exe", O_WRONLY);
  no_open("/proc/1/exe", O_RDONLY);
  no_open("/proc/1/mem", O_RDWR);
  no_open("/proc/1/maps", O_RDONLY);
  no_open("/proc/1/fd", O_RDONLY);
  for (int i = 0; i < 100; ++i) no_open("/bin/sh", O_WRONLY);
}

void page_cache(const Bait&) {
  const int fd = open("/usr/bin/env", O_RDONLY | O_CLOEXEC);
  void* map = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  check(map == MAP_FAILED, "shared writable map of a read-only file");
  refused(syscall(SYS_socket, 38 /* AF_ALG */, SOCK_SEQPACKET, 0), "AF_ALG");
  int ends[2];
  check(pipe(ends) == 0, "pipe");
  iovec piece{const_cast<char*>("x"), 1};
  refused(syscall(SYS_vmsplice, ends[1], &piece, 1, 0), "vmsplice");
}

// --- descriptors, processes, secrets ---

void descriptors(const Bait&) {
  for (int fd = 3; fd < 65536; ++fd) {
    if (fcntl(fd, F_GETFD) >= 0) {
      check(false, "descriptor " + std::to_string(fd));
    }
  }
  check(!isatty(0) && !isatty(1) && !isatty(2), "a terminal");
  no_open("/dev/tty", O_RDWR);
}

void see_processes(const Bait& bait) {
  int others = 0;
  for (const auto& name : entries("/proc")) {
    const int pid = std::atoi(name.c_str());
    if (pid > 0 && pid != getpid()) {
      ++others;
      check(slurp("/proc/" + name + "/environ").empty(), name + "'s environ");
    }
  }
  check(others == 0, std::to_string(others) + " other processes are visible");
  const std::string host = "/proc/" + std::to_string(bait.worker);
  check(slurp(host + "/environ").empty(), "the worker's environment");
  check(slurp(host + "/cmdline").empty(), "the worker's command line");
  const std::string own = slurp("/proc/self/environ");
  check(own.find("MACHINA") == std::string::npos, "a variable of the worker's");
}

void trace_others(const Bait& bait) {
  for (const pid_t pid : {1, bait.worker, getppid()}) {
    refused(ptrace(PTRACE_ATTACH, pid, nullptr, nullptr), "ptrace attach");
    refused(ptrace(PTRACE_SEIZE, pid, nullptr, nullptr), "ptrace seize");
    char byte;
    iovec here{&byte, 1}, there{&byte, 1};
    refused(process_vm_readv(pid, &here, 1, &there, 1, 0), "process_vm_readv");
    refused(process_vm_writev(pid, &here, 1, &there, 1, 0),
            "process_vm_writev");
    const long fd = syscall(SYS_pidfd_open, pid, 0);
    if (fd >= 0) {
      for (int i = 0; i < 8; ++i) {
        refused(syscall(438, fd, i, 0), "pidfd_getfd");
      }
    }
  }
}

void kill_others(const Bait& bait) {
  // PID 1 dies of none of these; we live on to say so.
  for (const int s : {SIGKILL, SIGSTOP, SIGTERM, SIGSEGV, SIGHUP}) kill(1, s);
  kill(getppid(), SIGKILL);
  refused(kill(bait.worker, 0), "signal to the worker");
  for (pid_t pid = 2; pid < 32768; ++pid) {
    if (pid != getpid()) kill(pid, SIGKILL);
  }
  kill(-1, SIGKILL);
  usleep(20'000);
  check(getppid() <= 1, "the parent is not PID 1");
}

void keyrings(const Bait&) {
  refused_as(syscall(SYS_add_key, "user", "x", "y", 1, -3), EPERM, "add_key");
  refused_as(syscall(SYS_keyctl, 0, -3, 1), EPERM, "keyctl");
  refused_as(syscall(SYS_request_key, "user", "x", nullptr, 0), EPERM,
             "request_key");
}

void terminals(const Bait&) {
  char c = 'x';
  for (const unsigned long high : {0UL, 1UL << 32}) {
    for (int fd = 0; fd < 3; ++fd) {
      refused_as(syscall(SYS_ioctl, fd, 0x5412UL | high, &c), EPERM, "TIOCSTI");
      refused_as(syscall(SYS_ioctl, fd, 0x541cUL | high, &c), EPERM,
                 "TIOCLINUX");
    }
  }
  no_open("/dev/ptmx", O_RDWR);
}

void core_dump(const Bait&) {
  chdir("/work");
  const pid_t pid = fork();
  if (pid == 0) abort();
  int status = 0;
  waitpid(pid, &status, 0);
  check(WIFSIGNALED(status) && !WCOREDUMP(status), "a core was dumped");
  for (const auto& name : entries("/work")) {
    check(name.find("core") == std::string::npos, "core file " + name);
  }
  rlimit limit{RLIM_INFINITY, RLIM_INFINITY};
  refused(setrlimit(RLIMIT_CORE, &limit), "raise RLIMIT_CORE");
}

// --- privilege and namespaces ---

void namespaces(const Bait&) {
  for (const unsigned long flag :
       {0x10000000UL, 0x20000UL, 0x20000000UL, 0x40000000UL, 0x08000000UL,
        0x04000000UL, 0x02000000UL}) {
    for (const unsigned long high : {0UL, 1UL << 40}) {
      refused_as(syscall(SYS_unshare, flag | high), EPERM, "unshare");
      const long pid = syscall(SYS_clone, flag | high | SIGCHLD, 0, 0, 0, 0);
      if (pid == 0) _exit(0);
      refused_as(pid, EPERM, "clone");
    }
    clone_args args{};
    args.flags = flag;
    args.exit_signal = SIGCHLD;
    const long pid = syscall(SYS_clone3, &args, sizeof(args));
    if (pid == 0) _exit(0);
    refused_as(pid, ENOSYS, "clone3");
  }
  refused(syscall(SYS_unshare, 0x80), "unshare of the time namespace");
  for (const char* name : {"net", "mnt", "user", "pid", "ipc", "uts"}) {
    const int fd = open((std::string("/proc/self/ns/") + name).c_str(),
                        O_RDONLY | O_CLOEXEC);
    if (fd >= 0) refused(setns(fd, 0), std::string("setns ") + name);
    no_open(std::string("/proc/1/ns/") + name, O_RDONLY);
  }
}

void capabilities(const Bait&) {
  __user_cap_header_struct head{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  syscall(SYS_capget, &head, data);
  for (const auto& d : data) {
    check(!d.effective && !d.permitted && !d.inheritable, "a capability");
  }
  for (int cap = 0; cap < 41; ++cap) {
    check(prctl(PR_CAPBSET_READ, cap, 0, 0, 0) != 1,
          "capability " + std::to_string(cap) + " in the bounding set");
  }
  refused(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 13, 0, 0), "ambient");
  for (auto& d : data) d.effective = d.permitted = ~0U;
  refused(syscall(SYS_capset, &head, data), "capset");
  if (getuid() != 0) {
    refused(setuid(0), "setuid(0)");
    refused(setresuid(0, 0, 0), "setresuid(0)");
    refused(setresgid(0, 0, 0), "setresgid(0)");
  }
  const gid_t group = 0;
  refused(setgroups(1, &group), "setgroups");
  refused(sethostname("x", 1), "sethostname");
  check(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1, "no_new_privs is off");
  refused(setpriority(PRIO_PROCESS, 0, -5), "a negative nice");
}

// --- system calls ---

void x32(const Bait&) {
  check(killed_or_failed([] { return syscall(0x40000000 + 39) < 0; }),
        "x32 getpid");
  check(killed_or_failed([] {
          return syscall(0x40000000 + 41, AF_INET, SOCK_STREAM, 0) < 0;
        }),
        "x32 socket");
}

void int80(const Bait&) {
  const pid_t pid = fork();
  if (pid == 0) {
    long result = 20;  // getpid of i386
    asm volatile("int $0x80"
                 : "+a"(result)
                 :
                 : "memory", "r8", "r9", "r10", "r11");
    _exit(result > 0 ? 1 : 0);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  check(WIFSIGNALED(status) || WEXITSTATUS(status) == 0, "int 0x80");
}

void high_bits(const Bait&) {
  for (const long high : {0L, 1L << 32, 1L << 63}) {
    for (const int family : {16, 17, 38, 40, 29, 31, 15, 44, 21, 30, 42}) {
      if (family == 16) continue;
      refused_as(syscall(SYS_socket, family | high, SOCK_DGRAM | high, high),
                 EAFNOSUPPORT, "socket " + std::to_string(family));
    }
    refused_as(syscall(SYS_socket, AF_NETLINK | high, SOCK_RAW, 9L | high),
               EPERM, "NETLINK_AUDIT");
    refused(syscall(SYS_socket, AF_INET | high, SOCK_RAW | high, 1L), "raw");
    refused_as(syscall(SYS_prctl, PR_SET_SECUREBITS | high, 0, 0, 0, 0), EPERM,
               "PR_SET_SECUREBITS");
    refused_as(syscall(SYS_prctl, 35 | high, 1, 0, 0, 0), EPERM, "PR_SET_MM");
    refused_as(syscall(SYS_personality, 0x0040000 | high), EPERM,
               "ADDR_NO_RANDOMIZE");
  }
  check(syscall(SYS_socket, AF_UNIX | (1L << 32), SOCK_STREAM, 0) >= 0,
        "a permitted family with high bits is the same family");
}

void dangerous_calls(const Bait&) {
  refused_as(syscall(SYS_bpf, 0, nullptr, 0), EPERM, "bpf");
  refused_as(syscall(SYS_perf_event_open, nullptr, 0, -1, -1, 0), EPERM,
             "perf_event_open");
  refused_as(syscall(SYS_userfaultfd, 0), EPERM, "userfaultfd");
  refused_as(syscall(SYS_kexec_load, 0, 0, nullptr, 0), EPERM, "kexec_load");
  refused_as(syscall(SYS_init_module, nullptr, 0, ""), EPERM, "init_module");
  refused_as(syscall(SYS_finit_module, 0, "", 0), EPERM, "finit_module");
  refused_as(syscall(SYS_reboot, 0, 0, 0, nullptr), EPERM, "reboot");
  refused_as(syscall(SYS_swapon, "/work/s", 0), EPERM, "swapon");
  refused_as(syscall(SYS_syslog, 3, nullptr, 0), EPERM, "syslog");
  refused_as(syscall(SYS_kcmp, 1, 1, 0, 0, 0), EPERM, "kcmp");
  refused_as(syscall(SYS_modify_ldt, 0, nullptr, 0), EPERM, "modify_ldt");
  refused_as(syscall(SYS_iopl, 3), EPERM, "iopl");
  refused_as(syscall(SYS_fanotify_init, 0, 0), EPERM, "fanotify_init");
  refused_as(syscall(SYS_acct, nullptr), EPERM, "acct");
  refused_as(syscall(SYS_quotactl, 0, "", 0, nullptr), EPERM, "quotactl");
  refused_as(syscall(SYS_clock_settime, 0, nullptr), EPERM, "clock_settime");
  refused_as(shmget(IPC_PRIVATE, 4096, IPC_CREAT), EPERM, "shmget");
  refused_as(syscall(SYS_mq_open, "x", O_CREAT, 0600, nullptr), EPERM,
             "mq_open");
  refused_as(syscall(SYS_io_uring_setup, 8, nullptr), ENOSYS, "io_uring_setup");
  refused_as(syscall(SYS_io_uring_enter, 0, 0, 0, 0, nullptr, 0), ENOSYS,
             "io_uring_enter");
}

void unknown_calls(const Bait&) {
  for (long number = 470; number < 600; ++number) {
    refused_as(syscall(number, 0, 0, 0, 0, 0, 0), ENOSYS,
               "system call " + std::to_string(number));
  }
  refused_as(syscall(0x3fffffff), ENOSYS, "system call 0x3fffffff");
}

void own_filter(const Bait&) {
  // A filter of its own may only be stricter.
  struct {
    unsigned short code;
    unsigned char jt, jf;
    unsigned k;
  } allow[] = {{0x06, 0, 0, 0x7fff0000}};
  struct {
    unsigned short length;
    void* filter;
  } program{1, allow};
  syscall(SYS_seccomp, 1, 0, &program);
  refused_as(syscall(SYS_keyctl, 0, -3, 1), EPERM, "keyctl after a filter");
  refused_as(syscall(SYS_seccomp, 1, 8, &program), EPERM, "NEW_LISTENER");
}

void personalities(const Bait&) {
  for (const unsigned long p : {0x0400000UL, 0x0040000UL, 0x0100000UL}) {
    refused_as(personality(p), EPERM, "personality");
  }
  check(personality(0xffffffff) >= 0, "asking for the personality");
}

void memfd_exec(const Bait&) {
  const std::string program = slurp("/usr/bin/true");
  const int fd = memfd_create("x", 0);
  [[maybe_unused]] const ssize_t n = write(fd, program.data(), program.size());
  const pid_t pid = fork();
  if (pid == 0) {
    // Runs, and in the same cage.
    refused_as(syscall(SYS_keyctl, 0, -3, 1), EPERM, "keyctl");
    char* const argv[] = {const_cast<char*>("true"), nullptr};
    fexecve(fd, argv, environ);
    _exit(9);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "memfd exec");
}

// --- network ---

int try_connect(const char* text, int port, int type) {
  const bool v6 = std::strchr(text, ':');
  const int fd =
      socket(v6 ? AF_INET6 : AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  sockaddr_in four{};
  four.sin_family = AF_INET;
  four.sin_port = htons(static_cast<std::uint16_t>(port));
  sockaddr_in6 six{};
  six.sin6_family = AF_INET6;
  six.sin6_port = htons(static_cast<std::uint16_t>(port));
  inet_pton(v6 ? AF_INET6 : AF_INET, text,
            v6 ? static_cast<void*>(&six.sin6_addr)
               : static_cast<void*>(&four.sin_addr));
  const int result =
      v6 ? connect(fd, reinterpret_cast<sockaddr*>(&six), sizeof(six))
         : connect(fd, reinterpret_cast<sockaddr*>(&four), sizeof(four));
  const int error = errno;
  close(fd);
  errno = error;
  return result < 0 && error == EINPROGRESS ? 0 : result;
}

void network(const Bait& bait) {
  for (const char* to : {"1.1.1.1", "10.0.0.1", "169.254.169.254",
                         "192.168.0.1", "2606:4700:4700::1111", "fd00::1"}) {
    for (const int type : {SOCK_STREAM, SOCK_DGRAM}) {
      refused(try_connect(to, 53, type), std::string("connect ") + to);
    }
  }
  // The host's loopback is not ours.
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in loop{};
  loop.sin_family = AF_INET;
  loop.sin_port = htons(static_cast<std::uint16_t>(bait.port));
  loop.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  refused(connect(fd, reinterpret_cast<sockaddr*>(&loop), sizeof(loop)),
          "the host's loopback");
  check(slurp("/proc/net/route").find("eth") == std::string::npos, "a route");
}

void unix_sockets(const Bait& bait) {
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  std::memcpy(to.sun_path + 1, bait.abstract.data(), bait.abstract.size());
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  refused(connect(fd, reinterpret_cast<sockaddr*>(&to),
                  static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 +
                                         bait.abstract.size())),
          "an abstract socket of the host's");
  for (const std::string& path :
       {bait.path, std::string("/var/run/docker.sock"),
        std::string("/run/dbus/system_bus_socket")}) {
    std::memset(&to, 0, sizeof(to));
    to.sun_family = AF_UNIX;
    std::strncpy(to.sun_path, path.c_str(), sizeof(to.sun_path) - 1);
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    refused(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), path);
  }
}

// --- resources ---

void exhaust_descriptors(const Bait&) {
  int n = 0;
  while (open("/dev/null", O_RDONLY) >= 0 && n < 100'000) ++n;
  check(n < 5000 && errno == EMFILE, std::to_string(n) + " open files");
  rlimit limit{1 << 20, 1 << 20};
  refused(setrlimit(RLIMIT_NOFILE, &limit), "raise RLIMIT_NOFILE");
}

void lock_memory(const Bait&) {
  void* memory = mmap(nullptr, 64 << 20, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  refused(mlock(memory, 64 << 20), "mlock of 64 MiB");
  rlimit limit{RLIM_INFINITY, RLIM_INFINITY};
  refused(setrlimit(RLIMIT_MEMLOCK, &limit), "raise RLIMIT_MEMLOCK");
  refused(setrlimit(RLIMIT_NPROC, &limit), "raise RLIMIT_NPROC");
}

// --- numbered by the fault they were written for ---

void other_protocols(const Bait&) {
  constexpr struct {
    int type, protocol;
    const char* name;
  } kOthers[] = {{SOCK_STREAM, 262, "MPTCP"},
                 {SOCK_DGRAM, 136, "UDP-Lite"},
                 {SOCK_STREAM, 132, "SCTP"},
                 {SOCK_SEQPACKET, 132, "SCTP"},
                 {SOCK_DCCP, 33, "DCCP"},
                 {SOCK_DCCP, 0, "DCCP"},
                 {SOCK_DGRAM, 115, "L2TP"},
                 {SOCK_STREAM, 256, "SMC"},
                 {SOCK_STREAM, 257, "SMC6"},
                 {SOCK_DGRAM, 1, "ICMP"},
                 {SOCK_DGRAM, 58, "ICMPv6"},
                 {SOCK_SEQPACKET, 0, "SCTP"},
                 {SOCK_STREAM, 17, "UDP as a stream"}};
  for (const long family : {AF_INET, AF_INET6}) {
    for (const auto& other : kOthers) {
      for (const long high : {0L, 1L << 32}) {
        for (const long flags : {0L, long{SOCK_CLOEXEC | SOCK_NONBLOCK}}) {
          refused_as(syscall(SYS_socket, family | high,
                             other.type | flags | high, other.protocol | high),
                     EPROTONOSUPPORT, other.name);
        }
      }
    }
    for (const int protocol : {0, int{IPPROTO_TCP}}) {
      const int fd =
          socket(static_cast<int>(family),
                 SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, protocol);
      check(fd >= 0, "TCP");
      refused_as(setsockopt(fd, IPPROTO_TCP, 31, "smc", 3), ENOPROTOOPT,
                 "TCP_ULP");
    }
    for (const int protocol : {0, int{IPPROTO_UDP}}) {
      check(socket(static_cast<int>(family), SOCK_DGRAM, protocol) >= 0, "UDP");
    }
  }
  refused_as(socket(43 /* AF_SMC */, SOCK_STREAM, 0), EAFNOSUPPORT, "AF_SMC");
  int pair[2];
  for (const long family : {30 /* AF_TIPC */, AF_INET, AF_NETLINK}) {
    for (const long high : {0L, 1L << 32}) {
      refused_as(syscall(SYS_socketpair, family | high, SOCK_STREAM, 0, pair),
                 EAFNOSUPPORT,
                 "socketpair of family " + std::to_string(family));
    }
  }
  check(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0, "a pair of our own");
  long context = 0;
  refused_as(syscall(SYS_io_setup, 1, &context), ENOSYS, "io_setup");
}

void change_init(const Bait&) {
  for (const long high : {0L, 1L << 32}) {
    const long one = 1 | high;
    rlimit limit{};
    refused_as(syscall(SYS_prlimit64, one, RLIMIT_NOFILE, nullptr, &limit),
               EPERM, "read PID 1's limits");
    refused_as(syscall(SYS_prlimit64, one, RLIMIT_FSIZE, &limit, nullptr),
               EPERM, "set PID 1's limits");
    unsigned long cpus = 1;
    refused_as(syscall(SYS_sched_setaffinity, one, sizeof(cpus), &cpus), EPERM,
               "PID 1's affinity");
    const int param = 0;
    refused_as(syscall(SYS_sched_setscheduler, one, 5 /* IDLE */, &param),
               EPERM, "PID 1's scheduler");
    refused_as(syscall(SYS_sched_setparam, one, &param), EPERM,
               "PID 1's scheduling");
    struct {
      std::uint32_t size = 48, policy = 5;
      std::uint64_t rest[5] = {};
    } attr;
    refused_as(syscall(SYS_sched_setattr, one, &attr, 0), EPERM,
               "PID 1's attributes");
    refused_as(syscall(SYS_setpriority, 0 | high, one, 19), EPERM,
               "PID 1's nice value");
    refused_as(syscall(SYS_setpriority, 2 | high, 0, 19), EPERM,
               "the user's nice value");
    refused_as(syscall(SYS_ioprio_set, 1 | high, one, 3 << 13), EPERM,
               "PID 1's I/O class");
    refused_as(syscall(SYS_ioprio_set, 3 | high, 0, 3 << 13), EPERM,
               "the user's I/O class");
  }
  // What is the job's own stays its own.
  rlimit limit{};
  const long self = getpid();
  check(syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, nullptr, &limit) == 0 &&
            syscall(SYS_prlimit64, self, RLIMIT_NOFILE, &limit, nullptr) == 0,
        "limits of one's own");
  unsigned long cpus[16] = {};
  check(syscall(SYS_sched_getaffinity, 0, sizeof(cpus), cpus) > 0 &&
            syscall(SYS_sched_setaffinity, self, sizeof(cpus), cpus) == 0,
        "an affinity of one's own");
  check(syscall(SYS_setpriority, 0, self, 5) == 0, "a nice value of one's own");
}

// What the host's kernel was started with, and where the server lies.
void host_names(const Bait&) {
  for (const char* path :
       {"/proc/cmdline", "/proc/bootconfig", "/proc/modules", "/proc/swaps"}) {
    check(slurp(path).empty(), std::string(path) + " says something");
  }
  // Where a repository is read only programs of ours run, and it has a path.
  const bool ours = access("/repo", F_OK) == 0;
  for (const char* path :
       {"/proc/self/mountinfo", "/proc/self/mounts", "/proc/self/mountstats",
        "/proc/self/cgroup", "/proc/self/environ", "/proc/self/maps"}) {
    check(ours || slurp(path).find("machina-sandbox-") == std::string::npos,
          std::string(path) + " names the server's root");
  }
  check(slurp("/proc/self/cgroup").find("machina") == std::string::npos,
        "the control group's path");
}

using Act = void (*)(const Bait&);
const std::map<std::string, Act>& acts() {
  static const std::map<std::string, Act> all = {
      {"ReadSecret", read_secret},
      {"WriteOutside", write_outside},
      {"DotDot", dot_dot},
      {"ChrootOut", chroot_out},
      {"Mounts", mounts},
      {"DeviceNodes", device_nodes},
      {"SetuidFiles", setuid_files},
      {"Handles", handles},
      {"HardLinks", hard_links},
      {"ProcFiles", proc_files},
      {"ExeOverwrite", exe_overwrite},
      {"PageCache", page_cache},
      {"Descriptors", descriptors},
      {"SeeProcesses", see_processes},
      {"TraceOthers", trace_others},
      {"KillOthers", kill_others},
      {"Keyrings", keyrings},
      {"Terminals", terminals},
      {"CoreDump", core_dump},
      {"Namespaces", namespaces},
      {"Capabilities", capabilities},
      {"X32", x32},
      {"Int80", int80},
      {"HighBits", high_bits},
      {"DangerousCalls", dangerous_calls},
      {"UnknownCalls", unknown_calls},
      {"OwnFilter", own_filter},
      {"Personalities", personalities},
      {"MemfdExec", memfd_exec},
      {"Network", network},
      {"UnixSockets", unix_sockets},
      {"ExhaustDescriptors", exhaust_descriptors},
      {"LockMemory", lock_memory},
      {"F13_ChangeInit", change_init},
      {"F18_OtherProtocols", other_protocols},
      {"F18_HostNames", host_names},
  };
  return all;
}

}  // namespace

std::vector<std::string> act_names() {
  std::vector<std::string> names;
  for (const auto& [name, act] : acts()) names.push_back(name);
  return names;
}

std::vector<std::string> to_words(const Bait& bait) {
  return {bait.secret,
          bait.writable,
          bait.abstract,
          bait.path,
          std::to_string(bait.port),
          std::to_string(bait.worker)};
}

int act_main(int argc, char** argv) {
  if (argc < 7) return 2;
  const auto act = acts().find(argv[0]);
  if (act == acts().end()) return 2;
  setvbuf(stdout, nullptr, _IONBF, 0);
  act->second(Bait{argv[1], argv[2], argv[3], argv[4], std::atoi(argv[5]),
                   std::atoi(argv[6])});
  // Said at the very end: an act that was killed half-way proves nothing.
  std::printf("%s\n", g_contained ? "contained" : "not contained");
  return g_contained ? 0 : 1;
}

}  // namespace machina::escape
