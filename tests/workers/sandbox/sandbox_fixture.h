// tests/workers/sandbox/sandbox_fixture.h
//
// A spawner, a slot and a temporary root, as root and as a made-up user: a test
// body runs under an identity of its own, where need be in a forked child that
// has dropped to it. What fails in the child fails the test.

#pragma once

#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>

#include "workers/sandbox/sandbox.h"

namespace machina::sandbox {

enum class Identity { root, user };
constexpr uid_t kUserUid = 61234;  // nobody's

inline std::string identity_name(const testing::TestParamInfo<Identity>& info) {
  return info.param == Identity::root ? "AsRoot" : "AsUser";
}

// One spawner with its root; made and destroyed under the test's identity.
class Stand {
 public:
  explicit Stand(SpawnerOptions options = {}) {
    char name[] = "/var/tmp/machina-sandbox-XXXXXX";
    EXPECT_NE(mkdtemp(name), nullptr);
    root = name;
    chmod(name, 0755);
    std::filesystem::create_directories(root + "/repos");
    options.root = root;
    options.repo_roots = {root + "/repos"};
    options.socket_path = root + "/machina.sock";
    auto started = Spawner::start(options);
    EXPECT_TRUE(started) << started.error().what;
    if (!started) return;
    spawner = std::move(*started);
    slot = attach(0);
  }
  ~Stand() {
    slot.reset();
    spawner.reset();
    std::error_code ignored;
    std::filesystem::remove_all(root, ignored);
  }

  std::unique_ptr<Slot> attach(int n) {
    auto channel = spawner->open_slot(n);
    EXPECT_TRUE(channel) << channel.error().what;
    if (!channel) return nullptr;
    auto attached = Slot::attach(*channel);
    EXPECT_TRUE(attached);
    return std::move(*attached);
  }

  std::unique_ptr<Session> open(const SessionSpec& spec = {}) {
    auto session = slot->open(spec);
    EXPECT_TRUE(session) << session.error().what;
    return session ? std::move(*session) : nullptr;
  }

  std::string root;
  std::unique_ptr<Spawner> spawner;
  std::unique_ptr<Slot> slot;
};

inline Step command(std::vector<std::string> argv, Millis timeout_ms = 20'000) {
  Step step;
  step.argv = std::move(argv);
  step.timeout_ms = timeout_ms;
  return step;
}
inline StepResult sh(Session& session, const std::string& script,
                     Millis timeout_ms = 20'000) {
  return session.run(command({"/bin/sh", "-c", script}, timeout_ms), Watch{});
}
inline StepResult python(Session& session, const std::string& script,
                         Millis timeout_ms = 20'000) {
  return session.run(command({"/usr/bin/python3", "-c", script}, timeout_ms),
                     Watch{});
}

inline std::string shown(const StepResult& r) {
  return "ended " + std::to_string(static_cast<int>(r.ended)) + " exit " +
         std::to_string(r.exit_code) + " signal " + std::to_string(r.signal) +
         " wall " + std::to_string(r.wall_ms) + " [" + r.detail +
         "]\nout: " + r.out.substr(0, 2000) + "\nerr: " + r.err.substr(0, 2000);
}

// Processes of this host whose command line has `marker`.
inline int running(const std::string& marker) {
  int found = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    if (name == std::to_string(getpid())) continue;
    std::ifstream in(entry.path() / "cmdline");
    const std::string line((std::istreambuf_iterator<char>(in)), {});
    if (line.find(marker) != std::string::npos) ++found;
  }
  return found;
}
// False when some are still there after the time.
inline bool gone(const std::string& marker, int milliseconds) {
  for (int i = 0; i * 20 < milliseconds; ++i) {
    if (running(marker) == 0) return true;
    usleep(20'000);
  }
  return running(marker) == 0;
}

inline void as_user(const std::function<void()>& body) {
  if (geteuid() != 0) {
    body();
    return;
  }
  const pid_t pid = fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    if (setgroups(0, nullptr) < 0 || setresgid(kUserUid, kUserUid, kUserUid) ||
        setresuid(kUserUid, kUserUid, kUserUid)) {
      _exit(3);
    }
    body();
    fflush(stdout);
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
      << "under uid " << kUserUid << ": status " << status;
}

// Runs its body under the parameter's identity.
class AnyIdentity : public testing::TestWithParam<Identity> {
 protected:
  void with(const std::function<void()>& body) {
    if (GetParam() == Identity::user) {
      as_user(body);
    } else if (geteuid() == 0) {
      body();
    } else {
      GTEST_SKIP() << "needs root";
    }
  }
  bool as_root() const { return GetParam() == Identity::root; }
};

}  // namespace machina::sandbox
