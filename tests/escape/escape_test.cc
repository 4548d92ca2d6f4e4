// Hostile programs against the sandbox, each as root and as an ordinary user,
// and what the canary says when a mechanism is taken away.

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <sstream>
#include <thread>

#include "tests/escape/hostile.h"
#include "tests/workers/sandbox/sandbox_fixture.h"

namespace machina::sandbox {
namespace {

namespace fs = std::filesystem;
using escape::Bait;

// What lies on the host for an act to find.
class Planted {
 public:
  explicit Planted(const std::string& root) {
    bait.secret = root + "/secret";
    std::ofstream(bait.secret) << "secret";
    chmod(bait.secret.c_str(), 0600);
    bait.writable = root + "/writable";
    fs::create_directories(bait.writable);
    chmod(bait.writable.c_str(), 01777);
    bait.worker = getpid();
    bait.abstract = "machina-escape-" + std::to_string(getpid());
    bait.path = root + "/host.sock";
    sockaddr_un named{};
    named.sun_family = AF_UNIX;
    std::strncpy(named.sun_path, bait.path.c_str(), sizeof(named.sun_path) - 1);
    serve(AF_UNIX, reinterpret_cast<sockaddr*>(&named), sizeof(named));
    sockaddr_un abstract{};
    abstract.sun_family = AF_UNIX;
    std::memcpy(abstract.sun_path + 1, bait.abstract.data(),
                bait.abstract.size());
    serve(AF_UNIX, reinterpret_cast<sockaddr*>(&abstract),
          static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 +
                                 bait.abstract.size()));
    sockaddr_in loop{};
    loop.sin_family = AF_INET;
    loop.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int fd =
        serve(AF_INET, reinterpret_cast<sockaddr*>(&loop), sizeof(loop));
    socklen_t size = sizeof(loop);
    getsockname(fd, reinterpret_cast<sockaddr*>(&loop), &size);
    bait.port = ntohs(loop.sin_port);
  }
  ~Planted() {
    for (int fd : fds_) close(fd);
  }
  Bait bait;

 private:
  int serve(int family, const sockaddr* address, socklen_t size) {
    const int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    EXPECT_EQ(bind(fd, address, size), 0) << std::strerror(errno);
    EXPECT_EQ(listen(fd, 4), 0);
    fds_.push_back(fd);
    return fd;
  }
  std::vector<int> fds_;
};

const std::string& own_binary() {
  static const std::string all = [] {
    std::ifstream in("/proc/self/exe", std::ios::binary);
    std::ostringstream out;
    out << in.rdbuf();
    return out.str();
  }();
  return all;
}

// Who runs the act: the slot's uid of a privileged spawner, an unprivileged
// spawner's job, or the owner (here root) of a repository being prepared.
enum class Actor { slot, user, owner };

class EscapeTest
    : public testing::TestWithParam<std::tuple<std::string, Actor>> {};

TEST_P(EscapeTest, IsContained) {
  const auto& [name, actor] = GetParam();
  const auto body = [&, &act = name, &who = actor] {
    const std::string& binary = own_binary();
    Stand stand;
    Planted planted(stand.root);
    SessionSpec spec;
    spec.limits.memory_mb = 256;
    spec.limits.disk_mb = 512;
    if (who == Actor::owner) {
      spec.role = Role::prepare;
      spec.repo = stand.root + "/repos/one";
      spec.mirror = std::string(64, 'e');
      fs::create_directories(spec.repo);
    }
    auto session = stand.open(spec);
    ASSERT_TRUE(session);
    ASSERT_TRUE(session->put("hostile", binary));
    sh(*session, "chmod 755 hostile");
    Step step = command({"/work/hostile", "--act", act}, 60'000);
    // A sanitizer's leak check would trace, which is refused.
    step.env = {"ASAN_OPTIONS=detect_leaks=0"};
    for (const auto& word : escape::to_words(planted.bait)) {
      step.argv.push_back(word);
    }
    const auto r = session->run(step, Watch{});
    EXPECT_EQ(r.ended, Ended::exited) << shown(r);
    EXPECT_EQ(r.exit_code, 0) << shown(r);
    EXPECT_EQ(r.out, "contained\n") << shown(r);
    // The sandbox still works, and the host is as it was.
    EXPECT_EQ(sh(*session, "echo alive").out, "alive\n");
    EXPECT_TRUE(fs::is_empty(planted.bait.writable));
  };
  if (actor == Actor::user) {
    as_user(body);
  } else if (geteuid() == 0) {
    body();
  } else {
    GTEST_SKIP() << "needs root";
  }
}

std::string act_and_actor(
    const testing::TestParamInfo<EscapeTest::ParamType>& given) {
  constexpr const char* kWho[] = {"AsSlot", "AsUser", "AsOwner"};
  const auto& [act, actor] = given.param;
  return act + kWho[static_cast<int>(actor)];
}
INSTANTIATE_TEST_SUITE_P(
    Acts, EscapeTest,
    testing::Combine(testing::ValuesIn(escape::act_names()),
                     testing::Values(Actor::slot, Actor::user, Actor::owner)),
    act_and_actor);

// --- the canary ---

class CanaryTest : public AnyIdentity {};
INSTANTIATE_TEST_SUITE_P(Canary, CanaryTest,
                         testing::Values(Identity::root, Identity::user),
                         identity_name);

std::string attacks_of(const Report& report) {
  std::string all;
  for (const auto& [name, held] : report.attacks) {
    all += name + (held ? " held\n" : " FAILED\n");
  }
  return all;
}

TEST_P(CanaryTest, EveryAttackIsWithstood) {
  with([&] {
    Stand stand;
    const auto report = run_canary(*stand.slot);
    ASSERT_TRUE(report) << report.error().what;
    for (const auto& [name, held] : report->attacks) EXPECT_TRUE(held) << name;
    EXPECT_EQ(report->attacks.size(), 18U);
    EXPECT_GE(report->level, as_root() ? 3 : 2) << attacks_of(*report);
    const std::string json = isolation_json(*report, 3);
    EXPECT_NE(json.find("\"requested\":\"L3\""), std::string::npos) << json;
    EXPECT_NE(json.find(as_root() ? "\"userns\":{\"state\":\"disabled\"}"
                                  : "\"userns\":{\"state\":\"active\"}"),
              std::string::npos)
        << json;
  });
}

struct Without {
  const char* mechanism;
  Level root, user;  // what is left
};

TEST_P(CanaryTest, AMissingMechanismLowersTheLevelAndStricterWorkIsRefused) {
  constexpr Without kCases[] = {
      {"mountns", 0, 0},       {"pidns", 0, 0},       {"netns", 0, 0},
      {"userns", 3, 0},        {"seccomp", 0, 0},     {"landlock", 1, 1},
      {"cgroup_memory", 2, 2}, {"cgroup_pids", 2, 2},
  };
  with([&] {
    for (const auto& c : kCases) {
      SpawnerOptions options;
      options.force_off = {c.mechanism};
      if (!as_root() || std::string(c.mechanism) != "userns") {
        Stand stand(options);
        const auto report = run_canary(*stand.slot);
        ASSERT_TRUE(report) << c.mechanism << ": " << report.error().what;
        const Level left = as_root() ? c.root : c.user;
        EXPECT_EQ(report->level, left) << c.mechanism << "\n"
                                       << attacks_of(*report);
        bool named = false;
        for (const auto& m : report->mechanisms) {
          if (m.name != c.mechanism) continue;
          named = true;
          EXPECT_EQ(m.state, MechanismState::unavailable) << c.mechanism;
        }
        EXPECT_TRUE(named) << c.mechanism;
        SessionSpec spec;
        spec.min_level = static_cast<Level>(left + 1);
        auto session = stand.slot->open(spec);
        ASSERT_TRUE(session) << c.mechanism;
        const auto r = sh(**session, "echo ran");
        EXPECT_EQ(r.ended, Ended::isolation) << c.mechanism << shown(r);
        EXPECT_EQ(r.out, "");
      }
    }
  });
}

TEST_P(CanaryTest, TheAlwaysDenyListAloneIsLevelTwo) {
  with([&] {
    SpawnerOptions options;
    options.seccomp_enable = false;
    Stand stand(options);
    const auto report = run_canary(*stand.slot);
    ASSERT_TRUE(report) << report.error().what;
    EXPECT_EQ(report->level, 2) << attacks_of(*report);
    EXPECT_NE(
        isolation_json(*report, 2).find("\"seccomp\":{\"state\":\"degraded\"}"),
        std::string::npos);
  });
}

// What the allow-list refuses by not naming it the deny-list must refuse, too.
TEST_P(CanaryTest, F18_TheAlwaysDenyListClosesTheOtherProtocols) {
  with([&] {
    SpawnerOptions options;
    options.seccomp_enable = false;
    const std::string& binary = own_binary();
    Stand stand(options);
    SessionSpec spec;
    spec.limits.memory_mb = 256;
    spec.limits.disk_mb = 512;
    auto session = stand.open(spec);
    ASSERT_TRUE(session);
    ASSERT_TRUE(session->put("hostile", binary));
    sh(*session, "chmod 755 hostile");
    for (const char* act :
         {"F18_OtherProtocols", "F13_ChangeInit", "UnknownCalls"}) {
      Step step = command({"/work/hostile", "--act", act}, 60'000);
      step.env = {"ASAN_OPTIONS=detect_leaks=0"};
      for (const auto& word : escape::to_words({})) step.argv.push_back(word);
      const auto r = session->run(step, Watch{});
      EXPECT_EQ(r.out, "contained\n") << act << shown(r);
    }
  });
}

// --- nothing is left ---

std::size_t lines_of(const char* path) {
  std::ifstream in(path);
  std::size_t n = 0;
  for (std::string line; std::getline(in, line);) ++n;
  return n;
}
std::size_t descriptors_of(pid_t pid) {
  const auto path = "/proc/" + std::to_string(pid) + "/fd";
  return static_cast<std::size_t>(
      std::distance(fs::directory_iterator(path), fs::directory_iterator()));
}
std::vector<std::string> cgroups_of(pid_t spawner) {
  std::vector<std::string> found;
  std::error_code ignored;
  for (const auto& entry : fs::recursive_directory_iterator(
           "/sys/fs/cgroup", fs::directory_options::skip_permission_denied,
           ignored)) {
    if (entry.path().filename() == "machina." + std::to_string(spawner)) {
      found.push_back(entry.path());
    }
  }
  return found;
}

TEST_P(CanaryTest, AHundredSessionsLeaveNothing) {
  with([&] {
    const std::size_t mounts = lines_of("/proc/self/mounts");
    const std::size_t own = descriptors_of(getpid());
    pid_t spawner = 0;
    {
      Stand stand;
      spawner = stand.spawner->pid();
      std::size_t warm = 0;
      for (int i = 0; i < 100; ++i) {
        auto session = stand.open();
        EXPECT_EQ(sh(*session, "sleep 737373 & exit 4").exit_code, 4);
        session.reset();
        if (i == 5) warm = descriptors_of(getpid());
      }
      EXPECT_EQ(descriptors_of(getpid()), warm);
      if (as_root()) {
        EXPECT_FALSE(cgroups_of(spawner).empty());
      }
    }
    EXPECT_EQ(running("737373"), 0);
    EXPECT_EQ(descriptors_of(getpid()), own);
    EXPECT_EQ(lines_of("/proc/self/mounts"), mounts);
    EXPECT_TRUE(cgroups_of(spawner).empty()) << cgroups_of(spawner)[0];
    EXPECT_NE(kill(spawner, 0), 0);
  });
}

// Killed at a moment of its own each time: what it made is swept at the next
// start, and nothing lives on.
TEST_P(CanaryTest, AKilledSpawnerIsSweptUpAfter) {
  with([&] {
    std::vector<pid_t> dead;
    for (int round = 0; round < 8; ++round) {
      Stand stand;
      dead.push_back(stand.spawner->pid());
      std::thread killer([&] {
        usleep(static_cast<useconds_t>(round * 2500));
        kill(stand.spawner->pid(), SIGKILL);
      });
      if (auto session = stand.slot->open({})) {
        const auto r = sh(**session, "sleep 838383");
        EXPECT_EQ(r.ended, Ended::failed) << shown(r);
      }
      killer.join();
      EXPECT_TRUE(gone("838383", 3000));
    }
    Stand stand;
    for (const pid_t pid : dead) EXPECT_TRUE(cgroups_of(pid).empty()) << pid;
  });
}

// Its own parent has not waited for it when the next one starts.
TEST_P(CanaryTest, AKilledSpawnerIsSweptUpBeforeItIsBuried) {
  with([&] {
    Stand first;
    const pid_t dead = first.spawner->pid();
    if (as_root()) {
      EXPECT_FALSE(cgroups_of(dead).empty());
    }
    ASSERT_EQ(kill(dead, SIGKILL), 0);
    siginfo_t info{};
    ASSERT_EQ(waitid(P_PID, static_cast<id_t>(dead), &info, WEXITED | WNOWAIT),
              0);
    Stand next;
    EXPECT_TRUE(cgroups_of(dead).empty()) << cgroups_of(dead)[0];
  });
}

// A job cannot make its slot useless for the next one.
TEST_P(CanaryTest, AfterEachBombTheSlotIsAsNew) {
  with([&] {
    Stand stand;
    SessionSpec spec;
    spec.limits.memory_mb = 64;
    spec.limits.disk_mb = 16;
    spec.limits.pids = 32;
    for (const char* bomb :
         {":(){ :|:& };:; sleep 5",
          "python3 -c 'import os\nfor i in range(3000):\n os.mkdir(\"d\"); "
          "os.chdir(\"d\")'",
          "python3 -c 'x=[bytearray(b\"1\")*(1<<20) for _ in range(999)]'",
          "dd if=/dev/zero of=/dev/shm/x bs=1M; kill -STOP $$",
          "python3 -c 'import os,signal\nwhile True:\n p=os.fork()\n if p==0: "
          "signal.pause()' ; kill -STOP $$",
          "python3 -c 'import os\np=[os.pipe() for _ in range(1000)]\n"
          "for r,w in p:\n os.set_blocking(w,0)\n os.write(w,b\"x\"*65536)'"}) {
      {
        auto session = stand.open(spec);
        ASSERT_TRUE(session);
        const auto r = sh(*session, bomb, 1500);
        EXPECT_LT(r.wall_ms, 1500 + 3000) << bomb;
      }
      auto session = stand.open(spec);
      ASSERT_TRUE(session) << bomb;
      const auto r =
          sh(*session, "ls -A /work /tmp /dev/shm | grep -v : ; echo ok");
      EXPECT_NE(r.out.find("ok"), std::string::npos) << bomb << shown(r);
      EXPECT_EQ(r.out.find_first_not_of("\nok"), std::string::npos) << r.out;
    }
  });
}

}  // namespace
}  // namespace machina::sandbox

int main(int argc, char** argv) {
  if (argc > 2 && std::strcmp(argv[1], "--act") == 0) {
    return machina::escape::act_main(argc - 2, argv + 2);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
