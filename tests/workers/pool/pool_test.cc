// The pool with workers that are a script: starting, scaling, replacing,
// leaving. In a process of its own, as it is in life.

#include "workers/pool/pool.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include "tests/workers/worker/fake_server.h"
#include "workers/pool/pool_slots.h"
#include "workers/worker/retry.h"

namespace machina {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

// Says who it is, then what a worker says after its canary; leaves on TERM.
constexpr char kWorker[] = R"SH(#!/bin/sh
echo "$(id -u) $* $(env | grep -c SECRET)" >>"$NOTES"
echo '{"state":"idle","isolation":{"level":"L3","mechanisms":{}}}' >&4
trap 'exit 0' TERM
while :; do sleep 0.02 3>&- 4>&-; done
)SH";

class PoolTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/var/tmp/machina-pool-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    root_ = name;
    chmod(name, 0777);
    setenv("SECRET", "s", 1);
    options_.root = root_;
    options_.socket_path = root_ + "/machina.sock";
    options_.self_exe = root_ + "/worker.sh";
    options_.count = 2;
    options_.worker_env = {"NOTES=" + root_ + "/notes", "PATH=/usr/bin:/bin"};
    script(kWorker);
  }
  void TearDown() override {
    if (pool_ > 0) {
      kill(pool_, SIGKILL);
      waitpid(pool_, nullptr, 0);
    }
    server_.reset();
    fs::remove_all(root_);
  }

  void script(const std::string& text) {
    std::ofstream(options_.self_exe) << text;
    chmod(options_.self_exe.c_str(), 0755);
    std::ofstream(root_ + "/notes");
    chmod((root_ + "/notes").c_str(), 0666);
  }

  // Forked before the server's threads exist.
  void start(int target) {
    pool_ = fork();
    if (pool_ == 0) _exit(run_pool(options_));
    server_ = std::make_unique<FakeServer>(options_.socket_path);
    server_->set_target(target);
  }

  // The pool's exit code, or -1 when it stays.
  int exit_code(int ms = 10'000) {
    int status = 0;
    const bool left =
        wait([&] { return waitpid(pool_, &status, WNOHANG) == pool_; }, ms);
    if (!left) return -1;
    pool_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -2;
  }

  static bool wait(const std::function<bool()>& done, int ms = 10'000) {
    for (int i = 0; i < ms / 5; ++i) {
      if (done()) return true;
      usleep(5000);
    }
    return done();
  }

  bool idle(std::size_t count) {
    return wait([&] {
      const auto workers = server_->workers();
      if (workers.size() != count) return false;
      for (const auto& w : workers) {
        if (w["state"] != "idle" || w["level"] != "L3") return false;
      }
      return true;
    });
  }

  std::vector<std::string> notes() {
    std::ifstream file(root_ + "/notes");
    std::vector<std::string> out;
    for (std::string line; std::getline(file, line);) out.push_back(line);
    return out;
  }

  std::string log() {
    std::ifstream file(root_ + "/pool.log");
    return {std::istreambuf_iterator<char>(file), {}};
  }

  bool nobody_left() {
    const auto workers = server_->workers();
    return wait([&] {
      for (const auto& w : workers) {
        const int pid = w["pid"];
        if (pid > 0 && kill(pid, 0) == 0) return false;
      }
      return true;
    });
  }

  std::string root_;
  PoolOptions options_;
  std::unique_ptr<FakeServer> server_;
  pid_t pool_ = -1;
};

TEST_F(PoolTest, ScalesBothWaysAsTheServerSays) {
  start(3);
  ASSERT_TRUE(idle(3)) << log();
  server_->set_target(5);
  ASSERT_TRUE(idle(5)) << log();
  server_->set_target(1);
  ASSERT_TRUE(idle(1)) << log();
  EXPECT_TRUE(wait([&] { return server_->gone().size() == 4; })) << log();
  server_->set_target(0);
  ASSERT_TRUE(idle(0)) << log();
}

TEST_F(PoolTest, StartsAsManyAsTheServerWantsFromTheFirst) {
  options_.count = 5;  // its own idea, until it was told
  start(1);
  ASSERT_TRUE(idle(1)) << log();
  EXPECT_EQ(notes().size(), 1u) << log();
  EXPECT_TRUE(server_->gone().empty()) << log();
}

TEST_F(PoolTest, WithoutAServerItStartsItsOwnNumber) {
  pool_ = fork();
  if (pool_ == 0) _exit(run_pool(options_));
  EXPECT_TRUE(wait([&] { return notes().size() == 2; })) << log();
  // And waits without turning: what it costs is next to nothing.
  const auto used_ticks = [&] {
    std::ifstream file("/proc/" + std::to_string(pool_) + "/stat");
    std::string field;
    std::getline(file, field, ')');
    long long user = 0, system = 0;
    for (int i = 3; i < 14; ++i) file >> field;
    file >> user >> system;
    return user + system;
  };
  const long long before = used_ticks();
  usleep(1'500'000);
  EXPECT_LT(used_ticks() - before, sysconf(_SC_CLK_TCK) / 2);
}

// Scaled down, also in the moment of a start, and drained: ends that were asked
// for are none of the errors that an operator is to look for.
TEST_F(PoolTest, AnEndThatWasAskedForIsNoError) {
  // Dies of TERM, as a worker does that has had no time to look for it.
  script(
      std::string(kWorker).replace(std::string(kWorker).find("trap"), 4, "#"));
  start(4);
  ASSERT_TRUE(idle(4)) << log();
  server_->set_target(1);
  ASSERT_TRUE(wait([&] { return server_->gone().size() == 3; })) << log();
  ASSERT_TRUE(wait([&] { return log().find("worker_left") != log().npos; }))
      << log();
  EXPECT_EQ(log().find("worker_died"), std::string::npos) << log();
  ASSERT_TRUE(idle(1)) << log();
  // One that nobody asked is.
  kill(server_->workers()[0]["pid"].get<int>(), SIGTERM);
  EXPECT_TRUE(wait([&] {
    return log().find("error pool worker_died") != log().npos ||
           log().find("worker_died: a worker died") != log().npos;
  })) << log();
  server_->set_target(1, true);
  EXPECT_EQ(exit_code(), 0) << log();
}

// A server that was killed is back in a moment. Somebody who takes each
// connection and says nothing stands for it, and counts.
TEST_F(PoolTest, AServerThatIsAwayIsLookedForOften) {
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  options_.socket_path.copy(name.sun_path, sizeof name.sun_path - 1);
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&name), sizeof name), 0);
  ASSERT_EQ(listen(listener, 64), 0);
  chmod(options_.socket_path.c_str(), 0777);
  options_.count = 0;
  pool_ = fork();
  if (pool_ == 0) _exit(run_pool(options_));
  // Some 40 ms apart; four a second would take fifteen.
  int tries = 0;
  pollfd item{listener, POLLIN, 0};
  for (const auto until = Clock::now() + std::chrono::seconds(8);
       tries < 60 && Clock::now() < until;) {
    if (poll(&item, 1, 100) <= 0) continue;
    const int fd = accept(listener, nullptr, nullptr);
    if (fd >= 0) ++tries;
    close(fd);
  }
  close(listener);
  EXPECT_EQ(tries, 60) << log();
}

TEST(RetryTest, PausesGrowToTheirBoundAndDiffer) {
  Retry one(10, 50, 1), other(10, 50, 2);
  int unlike = 0;
  for (int round = 0; round < 2; ++round) {
    Millis step = 10;
    for (int i = 0; i < 50; ++i) {
      const Millis pause = one.next();
      EXPECT_LE(pause, step);
      EXPECT_GE(pause, step / 2);
      unlike += pause != other.next();
      step = std::min<Millis>(step * 2, 50);
    }
    one.reset();
    other.reset();
  }
  EXPECT_GT(unlike, 20);
  Retry own, another;
  EXPECT_LE(own.next(), kAwayMinMs);
  for (int i = 0; i < 50; ++i) EXPECT_LE(own.next(), kAwayMaxMs);
}

TEST_F(PoolTest, WorkersHoldNoPrivilegeAndNoSecret) {
  start(1);
  ASSERT_TRUE(idle(1)) << log();
  const auto lines = notes();
  ASSERT_FALSE(lines.empty()) << log();
  const std::string uid = geteuid() == 0 ? "199999" : std::to_string(geteuid());
  EXPECT_TRUE(lines[0].starts_with(uid + " worker --name p")) << lines[0];
  EXPECT_TRUE(
      lines[0].ends_with(" --channel 3 --facts 4 --root " + root_ + " 0"))
      << lines[0];
}

TEST_F(PoolTest, KilledWorkerIsReportedGoneAndReplacedAtOnce) {
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  const auto victim = server_->workers()[0];
  kill(victim["pid"].get<int>(), SIGKILL);
  ASSERT_TRUE(wait([&] { return !server_->gone().empty(); }, 2000)) << log();
  EXPECT_EQ(server_->gone()[0], victim["name"]);
  ASSERT_TRUE(idle(2)) << log();
  for (const auto& w : server_->workers()) EXPECT_NE(w["name"], victim["name"]);
}

TEST_F(PoolTest, WorkerThatCannotStartIsTriedEverMoreSlowly) {
  script("#!/bin/sh\necho x >>\"$NOTES\"\nexit 1\n");
  start(1);
  usleep(2'000'000);
  // 0, 0, 100, 200, 400, 800 ms: some six in two seconds, never hundreds.
  EXPECT_GE(notes().size(), 4) << log();
  EXPECT_LE(notes().size(), 16) << log();
}

TEST_F(PoolTest, DrainLetsWorkersLeaveAndExitsZero) {
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  server_->set_target(2, true);
  EXPECT_EQ(exit_code(), 0) << log();
  EXPECT_EQ(server_->gone().size(), 2) << log();
  EXPECT_TRUE(nobody_left());
}

TEST_F(PoolTest, TermIsADrain) {
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  kill(pool_, SIGTERM);
  EXPECT_EQ(exit_code(), 0) << log();
}

TEST_F(PoolTest, WorkerThatStaysIsKilledWhenTheDrainIsOver) {
  script(std::string(kWorker).replace(std::string(kWorker).find("exit 0"), 6,
                                      ":"));
  options_.drain_ms = 500;
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  server_->set_target(2, true);
  EXPECT_EQ(exit_code(), 0) << log();
  EXPECT_TRUE(nobody_left());
  // Nobody's fault but of who made it leave: no job is charged with it.
  EXPECT_EQ(server_->ended().size(), 2u) << log();
  EXPECT_TRUE(server_->gone().empty()) << log();
}

TEST_F(PoolTest, F10_AskedTwiceItEndsWorkersAndSaysThatItDid) {
  script(std::string(kWorker).replace(std::string(kWorker).find("exit 0"), 6,
                                      ":"));
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  // One dies by itself while the pool drains, and is told apart.
  kill(pool_, SIGTERM);
  ASSERT_TRUE(wait([&] { return log().find("draining") != log().npos; }))
      << log();
  kill(server_->workers()[0]["pid"].get<int>(), SIGKILL);
  ASSERT_TRUE(wait([&] { return server_->gone().size() == 1; })) << log();
  kill(pool_, SIGTERM);
  EXPECT_EQ(exit_code(), 0) << log();
  EXPECT_EQ(server_->ended().size(), 1u) << log();
  EXPECT_EQ(server_->gone().size(), 1u) << log();
}

TEST_F(PoolTest, F10_AHangupIsForTheLogAlone) {
  start(1);
  ASSERT_TRUE(idle(1)) << log();
  const std::string file = root_ + "/logs/pool/pool.log";
  for (int target : {2, 3}) {
    fs::rename(file, root_ + "/old.log");
    kill(pool_, SIGHUP);
    server_->set_target(target);
    ASSERT_TRUE(idle(target)) << log();
    ASSERT_TRUE(wait([&] { return fs::exists(file); })) << log();
    EXPECT_EQ(log().find("draining"), std::string::npos) << log();
  }
}

TEST_F(PoolTest, F10_SuccessorKnowsThatAPoolWasAskedToLeave) {
  script(std::string(kWorker).replace(std::string(kWorker).find("exit 0"), 6,
                                      ":"));
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  kill(pool_, SIGTERM);
  ASSERT_TRUE(wait([&] { return log().find("draining") != log().npos; }))
      << log();
  kill(pool_, SIGKILL);
  EXPECT_EQ(exit_code(), -2);
  pool_ = fork();
  if (pool_ == 0) _exit(run_pool(options_));
  ASSERT_TRUE(wait([&] { return server_->ended().size() == 2; }, 5000))
      << log();
  EXPECT_TRUE(server_->gone().empty()) << log();
}

TEST_F(PoolTest, OutlivesAShortAbsenceOfItsServerAndNotALongOne) {
  options_.orphan_ms = 1500;
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  const auto before = server_->workers();
  server_->go_away();
  usleep(500'000);
  server_->come_back();
  const int syncs = server_->syncs();
  ASSERT_TRUE(wait([&] { return server_->syncs() > syncs; })) << log();
  EXPECT_EQ(server_->workers()[0]["pid"], before[0]["pid"]);
  server_->go_away();
  EXPECT_EQ(exit_code(), 0) << log();
  EXPECT_TRUE(nobody_left());
}

TEST_F(PoolTest, LeavesWhenItsRootIsGone) {
  start(1);
  ASSERT_TRUE(idle(1)) << log();
  fs::remove_all(root_);
  EXPECT_EQ(exit_code(), 0);
  EXPECT_TRUE(nobody_left());
}

TEST_F(PoolTest, SecondPoolOfOneRootIsRefused) {
  start(1);
  ASSERT_TRUE(idle(1)) << log();
  const pid_t second = fork();
  if (second == 0) _exit(run_pool(options_));
  int status = 0;
  waitpid(second, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 75);
}

TEST_F(PoolTest, NothingOutlivesAPoolThatIsKilled) {
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  kill(pool_, SIGKILL);
  EXPECT_EQ(exit_code(), -2);
  EXPECT_TRUE(nobody_left());
}

TEST_F(PoolTest, SuccessorReportsTheWorkersOfAPoolThatWasKilled) {
  start(2);
  ASSERT_TRUE(idle(2)) << log();
  const auto before = server_->workers();
  kill(pool_, SIGKILL);
  EXPECT_EQ(exit_code(), -2);
  pool_ = fork();
  if (pool_ == 0) _exit(run_pool(options_));
  ASSERT_TRUE(wait([&] { return server_->gone().size() == 2; }, 5000)) << log();
  for (const auto& w : before) {
    const auto gone = server_->gone();
    EXPECT_NE(std::find(gone.begin(), gone.end(), w["name"]), gone.end());
  }
  ASSERT_TRUE(idle(2)) << log();
}

// pool.lock is the unprivileged pool's to write.
TEST_F(PoolTest, F16_ANumberInPoolLockKillsNobodyElse) {
  const pid_t victim = fork();
  if (victim == 0) {
    prctl(PR_SET_NAME, "machina-spawner");
    for (;;) pause();
  }
  std::ofstream(root_ + "/pool.lock") << "1\n" << victim << " 1 none\n";
  start(1);
  ASSERT_TRUE(idle(1)) << log();
  int status = 0;
  EXPECT_EQ(waitpid(victim, &status, WNOHANG), 0);
  kill(victim, SIGKILL);
  waitpid(victim, &status, 0);
}

// --- the table alone ---

TEST(PoolSlotsTest, GoneIsSaidOnlyWhenTheSlotIsEmpty) {
  PoolSlots slots;
  slots.started(0, "a", 100, 0, 0);
  EXPECT_EQ(slots.exited(100, 10'000), 0);
  EXPECT_TRUE(slots.gone().empty());
  EXPECT_TRUE(slots.to_start(1, 10'000).empty());  // its place is taken
  slots.emptied(0);
  EXPECT_EQ(slots.gone(), std::vector<std::string>{"a"});
  EXPECT_EQ(slots.to_start(1, 10'000), std::vector<int>{0});
  slots.reported({"a"});
  EXPECT_TRUE(slots.gone().empty());
}

TEST(PoolSlotsTest, F10_WhoWasKilledByThePoolIsNotGone) {
  PoolSlots slots;
  slots.inherit({"old"}, {"older"});
  slots.started(0, "a", 100, 0, 0);
  slots.started(1, "b", 101, 0, 0);
  slots.started(2, "c", 102, 0, 0);
  slots.exited(100, 10'000);  // by itself
  slots.killed();
  slots.exited(101, 10'001);
  using Names = std::vector<std::string>;
  EXPECT_EQ(slots.unreported(),
            (Names{"old died", "older ended", "a died", "b ended", "c ended"}));
  slots.emptied(0);
  slots.emptied(1);
  EXPECT_EQ(slots.gone(), (Names{"old", "a"}));
  EXPECT_EQ(slots.ended(), (Names{"older", "b"}));
  const std::string body = slots.sync_body("h", "s", "{}", "", 64, 0);
  EXPECT_NE(body.find(R"("gone":["old","a"],"ended":["older","b"])"),
            std::string::npos)
      << body;
  slots.reported({"old", "older", "a", "b"});
  EXPECT_TRUE(slots.all_reported());
  slots.started(1, "d", 103, 20'000, 20'000);  // of the next worker nothing
  slots.exited(103, 30'000);
  slots.emptied(1);
  EXPECT_EQ(slots.gone(), Names{"d"});
}

TEST(PoolSlotsTest, IdleWorkersAreStoppedBeforeBusyOnes) {
  PoolSlots slots;
  for (int i = 0; i < 4; ++i) {
    slots.started(i, "w" + std::to_string(i), 100 + i, 0, 0);
  }
  slots.at(3).job = "busy";
  slots.at(1).job = "busy";
  EXPECT_EQ(slots.to_stop(2), (std::vector<int>{2, 0}));
  EXPECT_EQ(slots.to_stop(1), (std::vector<int>{2, 0, 3}));
}

TEST(PoolSlotsTest, EarlyDeathsPauseLongerEachTimeUpToTheBound) {
  PoolSlots slots;
  Millis now = 0, last = 0;
  for (int i = 0; i < 20; ++i) {
    slots.started(0, "w", 100, now, 0);
    slots.exited(100, now + 1);
    slots.emptied(0);
    const Millis next = slots.next_start_ms(1, now + 1);
    const Millis pause = next < 0 ? 0 : next - (now + 1);
    EXPECT_GE(pause, last);
    EXPECT_LE(pause, kBackoffMaxMs);
    last = pause;
    now += 1 + pause;
  }
  EXPECT_EQ(last, kBackoffMaxMs);
}

}  // namespace
}  // namespace machina
