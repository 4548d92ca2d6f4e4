// Sockets against real ones of the other side.

#include "server/http/sockets.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <deque>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <utility>

#include "queue/base/clock.h"

namespace machina {
namespace {

// What became of one connection, and what to do about it.
class Recorder final : public SocketEvents {
 public:
  void on_bytes(std::string_view more) override {
    EXPECT_FALSE(gone);
    ++reads;
    bytes += more;
    if (hook) hook();
  }
  void on_end() override {
    EXPECT_FALSE(gone);
    ++ends;
  }
  void on_drained() override { ++drained; }
  void on_gone() override {
    EXPECT_FALSE(gone) << "twice";
    gone = true;
  }

  Socket* socket = nullptr;
  std::string bytes;
  int reads = 0, ends = 0, drained = 0;
  bool gone = false;
  std::function<void()> hook;
};

// With a ring, and without.
class SocketsTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    auto made = Sockets::make(GetParam());
    ASSERT_TRUE(made);
    sockets_ = std::move(*made);
    sockets_->on_accept([this](Socket& socket, bool) -> SocketEvents* {
      if (refuse_) {
        socket.out() = "no";
        return nullptr;
      }
      recorders_.emplace_back();
      recorders_.back().socket = &socket;
      return &recorders_.back();
    });
    auto port = sockets_->listen_tcp("127.0.0.1", 0, {});
    ASSERT_TRUE(port);
    port_ = *port;
  }
  void TearDown() override {
    for (int fd : fds_) ::close(fd);
    sockets_.reset();
    for (const Recorder& recorder : recorders_) EXPECT_TRUE(recorder.gone);
  }

  void turn(int wait_ms = 0) {
    sockets_->wait(wait_ms);
    sockets_->serve();
    sockets_->flush();
    sockets_->reap();
  }
  bool until(const std::function<bool()>& done) {
    const Millis end = system_clock().mono_ms() + 10'000;
    while (!done()) {
      if (system_clock().mono_ms() > end) return false;
      turn(5);
    }
    return true;
  }
  int connect() {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in where{};
    where.sin_family = AF_INET;
    where.sin_port = htons(static_cast<std::uint16_t>(port_));
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&where), sizeof where),
              0);
    fds_.push_back(fd);
    return fd;
  }
  Recorder& accepted(std::size_t n = 1) {
    EXPECT_TRUE(until([&] { return recorders_.size() >= n; }));
    return recorders_[n - 1];
  }
  static void send(int fd, const std::string& text) {
    ASSERT_EQ(::send(fd, text.data(), text.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(text.size()));
  }
  // What is there to read now; `end`: and the end.
  static std::string receive(int fd, bool* end = nullptr) {
    std::string text;
    char buffer[65536];
    pollfd poll{fd, POLLIN, 0};
    while (::poll(&poll, 1, 20) == 1) {
      ssize_t n = recv(fd, buffer, sizeof buffer, 0);
      if (n <= 0) {
        if (end != nullptr) *end = true;
        break;
      }
      text.append(buffer, static_cast<std::size_t>(n));
    }
    return text;
  }
  void drop(int fd) {
    ::close(fd);
    std::erase(fds_, fd);
  }

  std::unique_ptr<Sockets> sockets_;
  int port_ = 0;
  bool refuse_ = false;
  std::deque<Recorder> recorders_;
  std::vector<int> fds_;
};

// Watches are counted over all processes of a user: another may have them all.
// In a thread of its own, with which the filter that says so goes away.
TEST_P(SocketsTest, F13_WithoutAWatchAConnectionIsServedAllTheSame) {
  std::thread([&] {
    sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_epoll_ctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, EPOLL_CTL_ADD, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSPC),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    const sock_fprog filter{std::size(program), program};
    ASSERT_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    ASSERT_EQ(syscall(SYS_seccomp, 1, 0, &filter), 0);
    const int first = connect(), second = connect();
    Recorder& one = accepted(1);
    Recorder& two = accepted(2);
    send(first, "a question");
    ASSERT_TRUE(until([&] { return one.bytes == "a question"; }));
    // More than the kernel takes at once: room is told of, too.
    const std::string answer(8 << 20, 'x');
    one.socket->out() = answer;
    one.socket->touch();
    std::string got;
    ASSERT_TRUE(until([&] {
      got += receive(first);
      return got.size() >= answer.size();
    }));
    EXPECT_EQ(got.size(), answer.size());
    shutdown(second, SHUT_WR);
    EXPECT_TRUE(until([&] { return two.ends > 0; }));
    two.socket->close();
    turn();
    EXPECT_TRUE(two.gone);
  }).join();
  // Watches are there again: it is taken into the set, and still served.
  Recorder& one = recorders_.front();
  send(fds_.front(), " and another");
  EXPECT_TRUE(until([&] { return one.bytes == "a question and another"; }));
}

TEST_P(SocketsTest, BytesAndTheEndInOneEdge) {
  int fd = connect();
  Recorder& peer = accepted();
  send(fd, "last words");
  shutdown(fd, SHUT_WR);
  ASSERT_TRUE(until([&] { return peer.ends > 0; }));
  EXPECT_EQ(peer.bytes, "last words");
  EXPECT_EQ(peer.ends, 1);
  for (int i = 0; i < 3; ++i) turn(1);
  EXPECT_EQ(peer.ends, 1);
  EXPECT_FALSE(peer.gone);  // it may still be answered
  peer.socket->out() = "answer";
  peer.socket->touch();
  turn();
  EXPECT_EQ(receive(fd), "answer");
}

TEST_P(SocketsTest, WhatCameDuringAPauseComesAfterIt) {
  int fd = connect();
  Recorder& peer = accepted();
  peer.socket->pause(true);
  send(fd, "one");
  for (int i = 0; i < 5; ++i) turn(2);
  EXPECT_EQ(peer.bytes, "");
  peer.socket->pause(false);
  turn();  // no new edge comes, and none is waited for
  EXPECT_EQ(peer.bytes, "one");
  peer.socket->pause(true);
  send(fd, "two");
  shutdown(fd, SHUT_WR);
  for (int i = 0; i < 5; ++i) turn(2);
  peer.socket->pause(false);
  turn();
  EXPECT_EQ(peer.bytes, "onetwo");
  EXPECT_EQ(peer.ends, 1);
}

TEST_P(SocketsTest, APauseWithinACallHoldsTheRestBack) {
  int fd = connect();
  Recorder& peer = accepted();
  peer.hook = [&] { peer.socket->pause(true); };
  const std::string text(300'000, 'x');
  std::size_t sent = 0;
  while (peer.bytes.size() < text.size()) {
    if (sent < text.size()) {
      ssize_t n = ::send(fd, text.data() + sent, text.size() - sent,
                         MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n > 0) sent += static_cast<std::size_t>(n);
    }
    const int reads = peer.reads;
    turn(1);
    ASSERT_LE(peer.reads, reads + 1);
    peer.socket->pause(false);
  }
  EXPECT_EQ(peer.bytes, text);
}

TEST_P(SocketsTest, OneThatSendsMuchLeavesTheOthersTheirTurn) {
  int loud = connect();
  Recorder& first = accepted(1);
  int quiet = connect();
  Recorder& second = accepted(2);
  const std::string much(4 << 20, 'x');
  std::size_t sent = 0;
  send(quiet, "hello");
  while (first.bytes.size() < much.size()) {
    while (sent < much.size()) {
      ssize_t n = ::send(loud, much.data() + sent, much.size() - sent,
                         MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n <= 0) break;
      sent += static_cast<std::size_t>(n);
    }
    const std::size_t before = first.bytes.size();
    turn(1);
    // X2, from the list of those to look at again, and by an edge.
    ASSERT_LE(first.bytes.size() - before, 2u * 4 * 64 * 1024);
    ASSERT_EQ(second.bytes, "hello");
  }
}

TEST_P(SocketsTest, WhatTheKernelDoesNotTakeFollowsInOrder) {
  int fd = connect();
  Recorder& peer = accepted();
  std::string all;
  for (int i = 0; i < 30'000'000; ++i) all += static_cast<char>('a' + i % 23);
  peer.socket->out() = all;
  peer.socket->touch();
  turn();
  EXPECT_GT(peer.socket->unsent(), 0u);
  EXPECT_EQ(peer.socket->sent() + peer.socket->unsent(), all.size());
  EXPECT_EQ(peer.drained, 0);
  peer.socket->out() += "and more";
  peer.socket->touch();
  turn();
  peer.socket->end();
  std::string got;
  bool end = false;
  while (!end) {
    turn();
    got += receive(fd, &end);
    ASSERT_LE(got.size(), all.size() + 8);
  }
  EXPECT_TRUE(got == all + "and more");
  EXPECT_EQ(peer.drained, 1);
  EXPECT_EQ(peer.socket->unsent(), 0u);
  EXPECT_EQ(peer.socket->sent(), got.size());
}

TEST_P(SocketsTest, OneThatIsClosedHearsNothingMore) {
  int fd = connect();
  Recorder& peer = accepted();
  peer.hook = [&] {
    peer.socket->out() += "not sent";
    peer.socket->touch();
    peer.socket->close();
    peer.socket->close();
    EXPECT_FALSE(peer.gone);  // not from within
  };
  send(fd, std::string(200'000, 'x'));
  ASSERT_TRUE(until([&] { return peer.gone; }));
  EXPECT_EQ(peer.reads, 1);
  EXPECT_EQ(receive(fd), "");
}

TEST_P(SocketsTest, OneThatWentAwayIsClosed) {
  int fd = connect();
  Recorder& peer = accepted();
  linger now{1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);  // a reset
  drop(fd);
  ASSERT_TRUE(until([&] { return peer.gone; }));
  EXPECT_EQ(peer.ends, 0);
}

TEST_P(SocketsTest, ARefusalHasALastWord) {
  refuse_ = true;
  int fd = connect();
  bool end = false;
  std::string got;
  ASSERT_TRUE(until([&] {
    got += receive(fd, &end);
    return end;
  }));
  EXPECT_EQ(got, "no");
}

// X4
TEST_P(SocketsTest, OutOfDescriptorsWhoConnectsIsClosed) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer looks at memory through descriptors, too";
#endif
  int before = connect();
  Recorder& peer = accepted();
  int fd = connect();
  rlimit old;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
  int next = dup(fd);
  ::close(next);
  rlimit none{static_cast<rlim_t>(next), old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  bool end = false;
  EXPECT_TRUE(until([&] {
    receive(fd, &end);
    return end;
  }));
  EXPECT_EQ(recorders_.size(), 1u);
  send(before, "still here");
  EXPECT_TRUE(until([&] { return peer.bytes == "still here"; }));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &old), 0);
  connect();
  accepted(2);
}

TEST_P(SocketsTest, OfManyInOneTurnEachHasItsOwnBytesOnce) {
  constexpr std::size_t kMany = 150;  // more than go into one call
  for (std::size_t i = 0; i < kMany; ++i) connect();
  accepted(kMany);
  for (int round = 0; round < 2; ++round) {
    for (std::size_t i = 0; i < kMany; ++i) {
      send(fds_[i], "ask " + std::to_string(i));
    }
    ASSERT_TRUE(until([&] {
      return std::all_of(recorders_.begin(), recorders_.end(),
                         [](const Recorder& r) { return !r.bytes.empty(); });
    }));
    for (Recorder& peer : recorders_) {
      // Some write more than the others; one nothing.
      const std::string word = "answer to " + std::exchange(peer.bytes, {});
      if (word != "answer to ask 7") peer.socket->out() = word;
      if (word == "answer to ask 9") peer.socket->out() += word;
      peer.socket->touch();
    }
    turn();
    for (std::size_t i = 0; i < kMany; ++i) {
      std::string word = "answer to ask " + std::to_string(i);
      if (i == 7) word.clear();
      if (i == 9) word += word;
      char buffer[256];
      ssize_t n = recv(fds_[i], buffer, sizeof buffer, MSG_DONTWAIT);
      EXPECT_EQ(std::string(buffer,
                            static_cast<std::size_t>(std::max<ssize_t>(n, 0))),
                word);
    }
    for (const Recorder& peer : recorders_) {
      EXPECT_EQ(peer.socket->unsent(), 0u);
    }
  }
}

TEST_P(SocketsTest, AListenerMayStopWhileItIsServed) {
  connect();
  Recorder& peer = accepted();
  send(fds_[0], "x");
  peer.hook = [&] { sockets_->stop_listening(false); };
  connect();  // both are ready in one serve()
  ASSERT_TRUE(until([&] { return peer.reads == 1; }));
  turn(1);
  EXPECT_TRUE(sockets_->listening().empty());
}

TEST_P(SocketsTest, SaysWhichAddressIsTaken) {
  auto again = sockets_->listen_tcp("127.0.0.1", port_, {});
  ASSERT_FALSE(again);
  EXPECT_EQ(again.error().code, Code::conflict);
  EXPECT_NE(again.error().what.find(std::to_string(port_)), std::string::npos);
  auto none = sockets_->listen_tcp("nowhere.example", 1, {});
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code, Code::invalid);
}

INSTANTIATE_TEST_SUITE_P(, SocketsTest, testing::Bool(), [](const auto& way) {
  return way.param ? "Together" : "OneByOne";
});

}  // namespace
}  // namespace machina
