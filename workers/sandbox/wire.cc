#include "workers/sandbox/wire.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace machina::sandbox {

namespace {
constexpr std::size_t kFdsMax = 8;

std::int64_t now_ms() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000 + t.tv_nsec / 1'000'000;
}

// Those above 2 that /proc/self/fd names and `keep` (sorted) does not have.
// Closing changes the listing, so it is read anew until it names no more.
int close_listed(std::span<const int> keep) {
  constexpr int kRounds = 64;
  for (int round = 0; round < kRounds; ++round) {
    const int dir = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) return errno;
    bool closed = false;
    int error = 0;
    alignas(8) char names[4096];
    for (;;) {
      const long n = syscall(SYS_getdents64, dir, names, sizeof(names));
      if (n < 0) error = errno;
      if (n <= 0) break;
      for (long at = 0; at < n;) {
        unsigned short length;
        std::memcpy(&length, names + at + 16, sizeof(length));
        int fd = 0;
        for (const char* c = names + at + 19; *c >= '0' && *c <= '9'; ++c) {
          fd = fd * 10 + (*c - '0');
        }
        at += length;
        if (fd <= 2 || fd == dir ||
            std::find(keep.begin(), keep.end(), fd) != keep.end()) {
          continue;
        }
        close(fd);
        closed = true;
      }
    }
    close(dir);
    if (error) return error;
    if (!closed) return 0;
  }
  return EBADF;
}
}  // namespace

const char* stage_name(Stage stage) {
  static const char* const kNames[] = {
      "none",       "request", "paths",         "cgroup",
      "clone",      "idmap",   "root_fs",       "binds",
      "etc",        "dev",     "proc",          "scratch",
      "repo",       "pivot",   "loopback",      "landlock_rules",
      "init_caps",  "lost",    "spec",          "fork",
      "session_id", "rlimits", "userns",        "groups",
      "caps",       "uid",     "caps_readback", "no_new_privs",
      "cwd",        "stdio",   "landlock",      "seccomp",
      "exec",       "builtin"};
  static_assert(std::size(kNames) == static_cast<std::size_t>(Stage::count));
  const auto index = static_cast<std::size_t>(stage);
  return index < std::size(kNames) ? kNames[index] : "unknown";
}

int send_message(int socket, std::span<const std::byte> bytes,
                 std::span<const int> fds) {
  iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(kFdsMax * sizeof(int))] = {};
  if (!fds.empty()) {
    if (fds.size() > kFdsMax) return EINVAL;
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(head), fds.data(), fds.size_bytes());
  }
  ssize_t sent;
  do {
    sent = sendmsg(socket, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent < 0 ? errno : 0;
}

ssize_t recv_message(int socket, std::span<std::byte> bytes, std::span<int> fds,
                     std::size_t* fd_count, bool wait) {
  if (fd_count) *fd_count = 0;
  iovec piece{bytes.data(), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kFdsMax * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t got;
  do {
    got =
        recvmsg(socket, &message, MSG_CMSG_CLOEXEC | (wait ? 0 : MSG_DONTWAIT));
  } while (got < 0 && errno == EINTR);
  if (got < 0) return -errno;
  std::size_t count = 0;
  const bool bad = message.msg_flags & (MSG_TRUNC | MSG_CTRUNC);
  for (cmsghdr* head = CMSG_FIRSTHDR(&message); head;
       head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const std::size_t n = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < n; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
      if (bad || count == fds.size()) {
        close(fd);
      } else {
        fds[count++] = fd;
      }
    }
  }
  if (fd_count) *fd_count = count;
  return bad ? -EMSGSIZE : got;
}

int close_all_but(std::initializer_list<int> keep) {
  int sorted[32];
  std::size_t n = 0;
  for (int fd : keep) {
    if (fd > 2 && n < std::size(sorted)) sorted[n++] = fd;
  }
  std::sort(sorted, sorted + n);
  unsigned from = 3;
  bool refused = false;
  const auto close_up_to = [&](unsigned last) {
    refused = refused || syscall(SYS_close_range, from, last, 0) < 0;
  };
  for (std::size_t i = 0; i < n && !refused; ++i) {
    const auto fd = static_cast<unsigned>(sorted[i]);
    if (fd > from) close_up_to(fd - 1);
    from = std::max(from, fd + 1);
  }
  if (!refused) close_up_to(~0U);
  return refused ? close_listed({sorted, n}) : 0;
}

void raise_descriptor_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) < 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

void kill_by_pidfd(int pidfd) {
  syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, nullptr, 0);
}

void bury_by_pidfd(int pidfd) {
  siginfo_t info{};
  while (waitid(P_PIDFD, static_cast<id_t>(pidfd), &info, WEXITED | __WALL) <
             0 &&
         errno == EINTR) {
  }
}

bool readable_within(int fd, int milliseconds) {
  const std::int64_t until = now_ms() + milliseconds;
  for (;;) {
    pollfd item{fd, POLLIN, 0};
    const auto left = static_cast<int>(until - now_ms());
    const int n = poll(&item, 1, std::max(left, 0));
    if (n > 0) return true;
    if (n == 0 || errno != EINTR) return false;
  }
}

int connect_unix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty()) return -ENOENT;
  if (path.size() >= sizeof(address.sun_path)) return -ENAMETOOLONG;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  // A full backlog would hold us for ever.
  timeval wait{2, 0};
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address),
              sizeof(address)) < 0) {
    const int error = errno;
    close(fd);
    return -error;
  }
  wait = {};
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
  return fd;
}

}  // namespace machina::sandbox
