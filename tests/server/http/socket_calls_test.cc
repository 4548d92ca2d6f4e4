// Many calls at once give what they would have given one after another, also
// where the ring breaks.

#include "server/http/socket_calls.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <filesystem>
#include <string>
#include <vector>

namespace machina {
namespace {

using Call = SocketCalls::Call;

// Pairs of connected sockets: `ours` is what is called on.
class SocketCallsTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (GetParam() && !SocketCalls(true).together()) {
      GTEST_SKIP() << "this kernel refuses io_uring";
    }
    for (std::size_t i = 0; i < SocketCalls::kMax; ++i) {
      int pair[2];
      ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
      ours_.push_back(pair[0]);
      theirs_.push_back(pair[1]);
    }
  }
  void TearDown() override {
    for (int fd : ours_) close(fd);
    for (int fd : theirs_) close(fd);
  }
  Call receive(std::size_t i) {
    Call call;
    call.fd = ours_[i];
    call.to = buffers_[i].data();
    call.bytes = buffers_[i].size();
    call.result = -12345;
    return call;
  }
  Call send(std::size_t i, const std::string& text) {
    Call call;
    call.kind = Call::send;
    call.fd = ours_[i];
    call.from = text.data();
    call.bytes = text.size();
    call.result = -12345;
    return call;
  }
  void say(std::size_t i, const std::string& text) {
    ASSERT_EQ(::send(theirs_[i], text.data(), text.size(), 0),
              static_cast<ssize_t>(text.size()));
  }
  std::string got(std::size_t i, const Call& call) const {
    return std::string(
        buffers_[i].data(),
        static_cast<std::size_t>(std::max<ssize_t>(call.result, 0)));
  }
  std::string hear(std::size_t i) const {
    char text[64];
    ssize_t n = recv(theirs_[i], text, sizeof text, MSG_DONTWAIT);
    return n < 0 ? "-" : std::string(text, static_cast<std::size_t>(n));
  }

  std::vector<int> ours_, theirs_;
  std::array<std::array<char, 64>, SocketCalls::kMax> buffers_{};
};

TEST_P(SocketCallsTest, EachHasItsOwnResult) {  // C1
  SocketCalls calls(GetParam());
  for (std::size_t count :
       {std::size_t{1}, std::size_t{2}, std::size_t{3}, SocketCalls::kMax}) {
    std::vector<Call> batch;
    for (std::size_t i = 0; i < count; ++i) {
      say(i, "hello " + std::to_string(i));
      batch.push_back(receive(i));
    }
    calls.run(batch);
    for (std::size_t i = 0; i < count; ++i) {
      EXPECT_EQ(got(i, batch[i]), "hello " + std::to_string(i));
    }
    std::vector<std::string> texts;
    for (std::size_t i = 0; i < count; ++i) {
      texts.push_back("answer " + std::to_string(i));
    }
    batch.clear();
    for (std::size_t i = 0; i < count; ++i) batch.push_back(send(i, texts[i]));
    calls.run(batch);
    for (std::size_t i = 0; i < count; ++i) {
      EXPECT_EQ(batch[i].result, static_cast<ssize_t>(texts[i].size()));
      EXPECT_EQ(hear(i), texts[i]);
    }
  }
  EXPECT_EQ(calls.together(), GetParam());
}

TEST_P(SocketCallsTest, NothingIsWaitedForAndFailuresAreSaid) {
  SocketCalls calls(GetParam());
  say(1, "x");
  ASSERT_EQ(shutdown(theirs_[2], SHUT_WR), 0);
  ASSERT_EQ(close(theirs_[3]), 0);
  theirs_[3] = dup(theirs_[2]);
  std::vector<Call> batch = {receive(0), receive(1), receive(2)};
  const std::string text = "y";
  batch.push_back(send(3, text));  // nobody reads it: EPIPE, and no signal
  batch.push_back(send(4, text));
  batch.push_back(receive(5));
  batch.back().fd = -1;
  calls.run(batch);
  EXPECT_EQ(batch[0].result, -EAGAIN);
  EXPECT_EQ(got(1, batch[1]), "x");
  EXPECT_EQ(batch[2].result, 0);
  EXPECT_EQ(batch[3].result, -EPIPE);
  EXPECT_EQ(batch[4].result, 1);
  EXPECT_EQ(batch[5].result, -EBADF);
  EXPECT_EQ(hear(4), "y");
}

TEST_P(SocketCallsTest, WhatDoesNotFitIsTold) {
  SocketCalls calls(GetParam());
  const std::string much(8 << 20, 'm');
  std::vector<Call> batch;
  for (std::size_t i = 0; i < 4; ++i) batch.push_back(send(i, much));
  calls.run(batch);
  for (const Call& call : batch) {
    EXPECT_GT(call.result, 0);
    EXPECT_LT(call.result, static_cast<ssize_t>(much.size()));
  }
  calls.run(batch);
  for (const Call& call : batch) EXPECT_EQ(call.result, -EAGAIN);
}

// The descriptor of this process's only ring.
int ring_descriptor() {
  namespace fs = std::filesystem;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    if (fs::read_symlink(entry.path(), error) == "anon_inode:[io_uring]") {
      return std::stoi(entry.path().filename());
    }
  }
  return -1;
}

TEST_P(SocketCallsTest, ARingThatBreaksIsGivenUp) {  // C2
  if (!GetParam()) GTEST_SKIP() << "there is no ring";
  SocketCalls calls(true);
  const int ring = ring_descriptor();
  ASSERT_GE(ring, 0);
  ASSERT_GE(dup2(ours_[0], ring), 0);
  for (int round = 0; round < 2; ++round) {
    std::vector<Call> batch;
    for (std::size_t i = 1; i < 6; ++i) {
      say(i, "still " + std::to_string(i));
      batch.push_back(receive(i));
    }
    calls.run(batch);
    for (std::size_t i = 1; i < 6; ++i) {
      EXPECT_EQ(got(i, batch[i - 1]), "still " + std::to_string(i));
    }
    EXPECT_FALSE(calls.together());
  }
}

TEST_P(SocketCallsTest, WhereNoRingIsToBeHadEachIsMadeByItself) {
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
  rlimit none = old;
  none.rlim_cur = 0;  // no descriptor for a ring
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  SocketCalls calls(true);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &old), 0);
  EXPECT_FALSE(calls.together());
  std::vector<Call> batch;
  for (std::size_t i = 0; i < 5; ++i) {
    say(i, "one " + std::to_string(i));
    batch.push_back(receive(i));
  }
  calls.run(batch);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(got(i, batch[i]), "one " + std::to_string(i));
  }
}

INSTANTIATE_TEST_SUITE_P(, SocketCallsTest, testing::Bool(),
                         [](const auto& way) {
                           return way.param ? "Together" : "OneByOne";
                         });

}  // namespace
}  // namespace machina
