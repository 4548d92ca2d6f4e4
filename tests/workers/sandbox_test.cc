// The promises of workers/sandbox/sandbox.h, each by an act that would break
// it. Runs as whoever starts it: as root at L3, otherwise at what is there.

#include "workers/sandbox/sandbox.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

namespace machina::sandbox {
namespace {

namespace fs = std::filesystem;

class SandboxTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/var/tmp/machina-sandbox-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    root_ = name;
    chmod(name, 0755);
    fs::create_directories(root_ + "/repos");
  }
  void TearDown() override {
    slot_.reset();
    spawner_.reset();
    fs::remove_all(root_);
  }

  void start(SpawnerOptions options = {}) {
    options.root = root_;
    options.repo_roots = {root_ + "/repos"};
    options.socket_path = root_ + "/machina.sock";
    auto spawner = Spawner::start(options);
    ASSERT_TRUE(spawner) << spawner.error().what;
    spawner_ = std::move(*spawner);
    slot_ = attach(0);
  }

  std::unique_ptr<Slot> attach(int n) {
    auto channel = spawner_->open_slot(n);
    EXPECT_TRUE(channel) << channel.error().what;
    auto slot = Slot::attach(*channel);
    EXPECT_TRUE(slot);
    return std::move(*slot);
  }

  std::unique_ptr<Session> open(SessionSpec spec = {}) {
    auto session = slot_->open(spec);
    EXPECT_TRUE(session) << session.error().what;
    return session ? std::move(*session) : nullptr;
  }

  static StepResult sh(Session& session, const std::string& script,
                       Millis timeout_ms = 20'000, bool merge = true) {
    Step step;
    step.argv = {"/bin/sh", "-c", script};
    step.timeout_ms = timeout_ms;
    step.merge_stderr = merge;
    return session.run(step, Watch{});
  }

  std::string root_;
  std::unique_ptr<Spawner> spawner_;
  std::unique_ptr<Slot> slot_;
};

TEST_F(SandboxTest, HelloAndExitCode) {
  start();
  auto session = open();
  ASSERT_TRUE(session);
  const auto r = sh(*session, "echo hello; id -u; pwd; exit 7");
  EXPECT_EQ(r.ended, Ended::exited) << r.detail;
  EXPECT_EQ(r.exit_code, 7);
  EXPECT_NE(r.out.find("hello"), std::string::npos) << r.out;
  std::printf("%s wall %ld\n", r.out.c_str(), long(r.wall_ms));
}

TEST_F(SandboxTest, CanaryFindsFullIsolation) {
  start();
  const auto t0 = std::chrono::steady_clock::now();
  const auto report = run_canary(*slot_);
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                      std::chrono::steady_clock::now() - t0)
                      .count();
  ASSERT_TRUE(report) << report.error().what;
  for (const auto& [name, held] : report->attacks) {
    EXPECT_TRUE(held) << name;
  }
  EXPECT_EQ(report->level, geteuid() == 0 ? 3 : 2)
      << isolation_json(*report, 3);
  std::printf("%s\n%ld ms\n", isolation_json(*report, 3).c_str(), long(ms));
}

}  // namespace
}  // namespace machina::sandbox
