// The service manager's seams, against a socket of our own.

#include "tools/service_manager.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace machina {
namespace {

class ServiceManagerTest : public testing::Test {
 protected:
  void TearDown() override {
    if (fd_ >= 0) ::close(fd_);
    if (name_[0] == '/') ::unlink(name_.c_str());
    for (const char* name :
         {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID",
          "LISTEN_FDS", "LISTEN_FDNAMES", "SYSTEMD_EXEC_PID"}) {
      ::unsetenv(name);
    }
  }
  void bind_to(const std::string& name) {
    name_ = name;
    fd_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_un where{};
    where.sun_family = AF_UNIX;
    std::memcpy(where.sun_path, name.data(), name.size());
    std::size_t size = offsetof(sockaddr_un, sun_path) + name.size();
    if (name[0] == '@') {
      where.sun_path[0] = '\0';
    } else {
      ++size;
    }
    ASSERT_EQ(::bind(fd_, reinterpret_cast<sockaddr*>(&where),
                     static_cast<socklen_t>(size)),
              0)
        << std::strerror(errno);
  }
  static std::string unique(const char* prefix) {
    return prefix + std::to_string(::getpid());
  }

  int fd_ = -1;
  std::string name_ = "@";
};

TEST_F(ServiceManagerTest, ADatagramArrivesAtAPathAndAtAnAbstractName) {
  for (const std::string& name :
       {unique("/var/tmp/machina-notify-"), unique("@machina-notify-")}) {
    bind_to(name);
    ASSERT_TRUE(notify_manager(name, "READY=1\nSTATUS=ready"));
    char bytes[100];
    ssize_t got = ::recv(fd_, bytes, sizeof bytes, 0);
    EXPECT_EQ(std::string(bytes, static_cast<std::size_t>(got)),
              "READY=1\nSTATUS=ready");
    TearDown();
    fd_ = -1;
  }
}

TEST_F(ServiceManagerTest, NobodyThereOrNobodyReadingStopsNobody) {  // S1
  EXPECT_FALSE(notify_manager("", "READY=1"));
  EXPECT_FALSE(notify_manager("relative", "READY=1"));
  EXPECT_FALSE(notify_manager("/var/tmp/machina-nobody-there", "READY=1"));
  EXPECT_FALSE(notify_manager("@" + std::string(200, 'x'), "READY=1"));
  bind_to(unique("@machina-full-"));
  auto began = std::chrono::steady_clock::now();
  bool sent = true;
  for (int i = 0; i < 100'000 && sent; ++i) {
    sent = notify_manager(name_, "WATCHDOG=1");
  }
  EXPECT_FALSE(sent) << "its queue never filled";
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(60));
}

TEST_F(ServiceManagerTest, DescriptorsGoAlong) {
  int pair[2], pipe[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
  ASSERT_EQ(::pipe(pipe), 0);
  ASSERT_TRUE(send_fds(pair[0], {{pipe[0], "http"}, {pipe[1], "socket-1-2"}}));
  auto got = receive_fds(pair[1], 1000);
  ASSERT_EQ(got.size(), 2u);
  EXPECT_EQ(got[0].name, "http");
  EXPECT_EQ(got[1].name, "socket-1-2");
  struct stat a {
  }, b{};
  ::fstat(pipe[1], &a);
  ::fstat(got[1].fd, &b);
  EXPECT_EQ(a.st_ino, b.st_ino);
  EXPECT_TRUE(receive_fds(pair[1], 10).empty());
  for (int fd : {pair[0], pair[1], pipe[0], pipe[1], got[0].fd, got[1].fd}) {
    ::close(fd);
  }
}

TEST_F(ServiceManagerTest, VariablesAreTakenAndLeaveNoTrace) {  // S2
  std::string self = std::to_string(::getpid());
  ::setenv("NOTIFY_SOCKET", "@here", 1);
  ::setenv("WATCHDOG_USEC", "3000000", 1);
  ::setenv("WATCHDOG_PID", self.c_str(), 1);
  ::setenv("SYSTEMD_EXEC_PID", self.c_str(), 1);
  auto service = take_service_environment();
  EXPECT_EQ(service.notify_socket, "@here");
  EXPECT_EQ(service.watchdog_ms, 3000);
  EXPECT_TRUE(service.supervised);
  for (const char* name :
       {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID",
        "LISTEN_FDS", "LISTEN_FDNAMES", "SYSTEMD_EXEC_PID"}) {
    EXPECT_EQ(::getenv(name), nullptr) << name;
  }
}

TEST_F(ServiceManagerTest, WhatIsMeantForAnotherProcessIsNotOurs) {
  ::setenv("WATCHDOG_USEC", "3000000", 1);
  ::setenv("WATCHDOG_PID", "1", 1);
  ::setenv("SYSTEMD_EXEC_PID", "1", 1);
  ::setenv("LISTEN_PID", "1", 1);
  ::setenv("LISTEN_FDS", "1", 1);
  auto service = take_service_environment();
  EXPECT_EQ(service.watchdog_ms, 0);
  EXPECT_FALSE(service.supervised);
  EXPECT_TRUE(service.sockets.empty());
}

}  // namespace
}  // namespace machina
