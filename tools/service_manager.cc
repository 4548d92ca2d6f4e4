#include "tools/service_manager.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace machina {
namespace {

constexpr int kFirstFd = 3;
constexpr std::size_t kNamesBytesMax = 4096;

// Its value, and it is gone from the environment.
std::string take(const char* name) {
  const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe)
  std::string text = value != nullptr ? value : "";
  ::unsetenv(name);  // NOLINT(concurrency-mt-unsafe)
  return text;
}

bool for_us(const std::string& pid) {
  return pid == std::to_string(::getpid());
}

std::vector<NamedFd> take_sockets() {
  std::string pid = take("LISTEN_PID");
  std::string count = take("LISTEN_FDS");
  std::istringstream names(take("LISTEN_FDNAMES"));
  std::vector<NamedFd> sockets;
  if (!for_us(pid)) return sockets;
  int n = std::atoi(count.c_str());
  for (int fd = kFirstFd; fd < kFirstFd + n; ++fd) {
    NamedFd socket{fd, ""};
    std::getline(names, socket.name, ':');
    if (::fcntl(fd, F_SETFD, FD_CLOEXEC) == 0) {
      sockets.push_back(std::move(socket));
    }
  }
  return sockets;
}

// Room for the descriptors of one message.
union Control {
  cmsghdr header;
  char bytes[CMSG_SPACE(kPassedFdsMax * sizeof(int))];
};

bool send_with(int socket, const std::string& text, const std::vector<int>& fds,
               const sockaddr* to, socklen_t to_bytes) {
  if (fds.size() > kPassedFdsMax) return false;
  iovec part{const_cast<char*>(text.data()), text.size()};
  msghdr message{};
  message.msg_name = const_cast<sockaddr*>(to);
  message.msg_namelen = to_bytes;
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  Control control{};
  if (!fds.empty()) {
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) ==
         static_cast<ssize_t>(text.size());
}

}  // namespace

ServiceEnvironment take_service_environment() {
  ServiceEnvironment service;
  service.notify_socket = take("NOTIFY_SOCKET");
  std::string watchdog_pid = take("WATCHDOG_PID");
  std::string watchdog_us = take("WATCHDOG_USEC");
  if (watchdog_pid.empty() || for_us(watchdog_pid)) {
    service.watchdog_ms = std::atoll(watchdog_us.c_str()) / 1000;
  }
  service.supervised = for_us(take("SYSTEMD_EXEC_PID"));
  service.sockets = take_sockets();
  return service;
}

bool notify_manager(const std::string& notify_socket, const std::string& lines,
                    const std::vector<int>& fds) {
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if (notify_socket.size() < 2 || notify_socket.size() >= sizeof to.sun_path ||
      (notify_socket[0] != '/' && notify_socket[0] != '@')) {
    return false;
  }
  std::memcpy(to.sun_path, notify_socket.data(), notify_socket.size());
  std::size_t length = offsetof(sockaddr_un, sun_path) + notify_socket.size();
  if (to.sun_path[0] == '@') {
    to.sun_path[0] = '\0';  // abstract: its length counts, not a final zero
  } else {
    ++length;
  }
  int socket = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket < 0) return false;
  bool sent = send_with(socket, lines, fds, reinterpret_cast<sockaddr*>(&to),
                        static_cast<socklen_t>(length));
  ::close(socket);
  return sent;
}

bool send_fds(int socket, const std::vector<NamedFd>& fds) {
  std::string names;
  std::vector<int> numbers;
  for (const auto& each : fds) {
    names += each.name + "\n";
    numbers.push_back(each.fd);
  }
  return !fds.empty() && send_with(socket, names, numbers, nullptr, 0);
}

std::vector<NamedFd> receive_fds(int socket, int timeout_ms) {
  pollfd item{socket, POLLIN, 0};
  if (::poll(&item, 1, timeout_ms) <= 0) return {};
  std::string text(kNamesBytesMax, '\0');
  iovec part{text.data(), text.size()};
  Control control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes;
  message.msg_controllen = sizeof control.bytes;
  ssize_t got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  if (got <= 0) return {};
  text.resize(static_cast<std::size_t>(got));
  std::istringstream names(text);
  std::vector<NamedFd> fds;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      NamedFd each;
      std::memcpy(&each.fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      std::getline(names, each.name);
      fds.push_back(std::move(each));
    }
  }
  return fds;
}

}  // namespace machina
