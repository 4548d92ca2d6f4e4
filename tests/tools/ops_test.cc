// Which processes are a root's, and how they end: tools/ops.h's promises by
// number, and tools/process.h's.

#include "tools/ops.h"

#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "queue/base/rfc3339.h"

namespace machina {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// Children of this test: what they do is decided here, not by a program.
class OpsTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/var/tmp/machina_ops_test.XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    root_ = name;
    fs::create_directory(root_ + "/queue");
  }
  void TearDown() override {
    for (pid_t pid : children_) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
    }
    fs::remove_all(root_);
  }

  enum Act { obey, ignore_term };
  pid_t child(Act act = obey) {
    int ready[2];
    if (::pipe(ready) != 0) std::abort();
    pid_t pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::signal(SIGTERM, act == obey ? SIG_DFL : SIG_IGN);
      (void)!::write(ready[1], "x", 1);
      for (;;) ::pause();
    }
    ::close(ready[1]);
    char byte;
    (void)!::read(ready[0], &byte, 1);
    ::close(ready[0]);
    children_.push_back(pid);
    return pid;
  }
  // A child with one of its own, which does not die with it.
  pid_t family(pid_t* grandchild) {
    int ends[2];
    if (::pipe(ends) != 0) std::abort();
    pid_t pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      pid_t below = ::fork();
      if (below == 0) {
        for (;;) ::pause();
      }
      (void)!::write(ends[1], &below, sizeof below);
      for (;;) ::pause();
    }
    (void)!::read(ends[0], grandchild, sizeof *grandchild);
    ::close(ends[0]);
    ::close(ends[1]);
    children_.push_back(pid);
    return pid;
  }

  PidFile file_of(pid_t pid, const std::string& role = "serve") {
    PidFile file;
    file.role = role;
    file.id = look_at(pid)->id;
    file.version = "test";
    file.started_at = rfc3339_now();
    return file;
  }
  void record(const PidFile& file) {
    auto ok = write_pid_file(root_, file);
    ASSERT_TRUE(ok) << ok.error().what;
  }
  Detected look() {
    auto found = detect(root_);
    EXPECT_TRUE(found) << found.error().what;
    return found ? *found : Detected{};
  }
  static bool alive(pid_t pid) { return look_at(pid).has_value(); }

  std::string root_;
  std::vector<pid_t> children_;
};

TEST_F(OpsTest, WhatAPidFileNamesIsFoundAndDescribed) {  // O1
  pid_t pid = child();
  record(file_of(pid));
  Detected found = look();
  ASSERT_TRUE(found.serve);
  EXPECT_EQ(found.serve->process.id.pid, pid);
  EXPECT_EQ(detect_exit(found), kOpsOk);
  Json json = to_json(found);
  EXPECT_EQ(json["count"], 1);
  Json process = json["processes"][0];
  for (const char* member : {"pid", "ppid", "etimes", "start_ticks", "uid"}) {
    EXPECT_TRUE(process[member].is_number()) << member;
  }
  EXPECT_EQ(process["role"], "machina_serve");
  EXPECT_EQ(process["repo_owned"], true);
  EXPECT_EQ(process["protected"], false);
  EXPECT_EQ(process["ppid"], ::getpid());
}

TEST_F(OpsTest, NothingRunsWhereNothingIsRecorded) {
  child();  // the same program, the same name, and not ours
  Detected found = look();
  EXPECT_FALSE(found.running());
  EXPECT_EQ(detect_exit(found), kOpsNotRunning);
}

TEST_F(OpsTest, AServerWithoutItsPoolIsPartial) {
  pid_t serve = child(), pool = child();
  PidFile file = file_of(serve);
  file.workers = 2;
  record(file);
  EXPECT_EQ(detect_exit(look()), kOpsPartial);
  record(file_of(pool, "pool"));
  EXPECT_EQ(detect_exit(look()), kOpsOk);
  remove_report(root_, "serve.pid");
  EXPECT_EQ(detect_exit(look()), kOpsPartial);
}

// Each way in which a number may have become somebody else's. All of them run
// this very program, under its name.
TEST_F(OpsTest, AReusedNumberIsLeftAlone) {  // O2, Q1
  const std::vector<std::pair<std::string, std::function<void(PidFile*)>>>
      kFaults = {
          {"another time", [](PidFile* f) { f->id.start_ticks += 1; }},
          {"this boot", [](PidFile* f) { f->id.boot_id = "another"; }},
          {"another executable", [](PidFile* f) { f->id.exe_inode += 1; }},
          {"ended", [](PidFile* f) { f->id.pid = 4'000'000; }},
      };
  for (const auto& [word, spoil] : kFaults) {
    pid_t pid = child();
    PidFile file = file_of(pid);
    spoil(&file);
    record(file);
    Detected found = look();
    EXPECT_FALSE(found.running()) << word;
    ASSERT_EQ(found.stale.size(), 1u) << word;
    EXPECT_NE(found.stale[0].why.find(word), std::string::npos)
        << found.stale[0].why;
    Killed killed = kill_all(found, 1000);
    EXPECT_TRUE(killed.targets.empty()) << word;
    EXPECT_TRUE(alive(pid)) << word;
  }
}

TEST_F(OpsTest, AnothersProcessIsLeftAlone) {  // O3
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to be led astray";
  pid_t pid = child();  // ours: root's
  record(file_of(pid));
  // The root belongs to a user, who wrote our number into the file.
  ASSERT_EQ(::chown(root_.c_str(), 64999, 64999), 0);
  Detected found = look();
  EXPECT_FALSE(found.running());
  ASSERT_EQ(found.stale.size(), 1u);
  EXPECT_NE(found.stale[0].why.find("64999"), std::string::npos);
}

TEST_F(OpsTest, AReplacedExecutableIsStillRecognised) {  // Q3
  std::string program = root_ + "/program";
  fs::copy_file("/bin/sleep", program);
  pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::execl(program.c_str(), "sleep", "1000", nullptr);
    ::_exit(127);
  }
  children_.push_back(pid);
  for (int i = 0; i < 500 && look_at(pid)->id.exe != program; ++i) {
    ::usleep(10'000);
  }
  record(file_of(pid));
  EXPECT_FALSE(look().serve->process.exe_replaced);
  fs::copy_file("/bin/sleep", program + ".new");
  fs::rename(program + ".new", program);
  Detected found = look();
  ASSERT_TRUE(found.serve) << found.stale.size();
  EXPECT_TRUE(found.serve->process.exe_replaced);
  EXPECT_EQ(found.serve->process.id.exe, program) << "without (deleted)";
  fs::remove(program);
  EXPECT_TRUE(look().serve);
}

// --- a report from before (O9) ---

class FromReport : public OpsTest {
 protected:
  // What detect said, kept as a file.
  std::string keep(const Json& report, mode_t mode = 0600) {
    const std::string path = root_ + "/report.json";
    fs::remove(path);
    std::ofstream(path) << report.dump();
    EXPECT_EQ(::chmod(path.c_str(), mode), 0);
    return path;
  }
};

TEST_F(FromReport, WhatItNamedIsFoundAlsoWithoutAPidFile) {
  pid_t serve = child(), pool = child();
  record(file_of(serve));
  record(file_of(pool, "pool"));
  const std::string path = keep(to_json(look()));
  remove_report(root_, "serve.pid");
  remove_report(root_, "pool.pid");
  ASSERT_FALSE(look().running());
  auto found = detect_from(root_, path);
  ASSERT_TRUE(found) << found.error().what;
  ASSERT_TRUE(found->serve && found->pool);
  EXPECT_EQ(found->serve->process.id.pid, serve);
  EXPECT_EQ(found->pool->process.id.pid, pool);
  Killed killed = kill_all(*found, 3000);
  EXPECT_TRUE(killed.left.empty());
  EXPECT_EQ(killed.targets.size(), 2u);
}

// What came since is not in it, and what has another's number is nobody.
TEST_F(FromReport, WhatCameSinceIsLeftAlone) {
  pid_t old = child();
  record(file_of(old));
  const Json report = to_json(look());
  pid_t next = child();
  record(file_of(next));
  auto found = detect_from(root_, keep(report));
  ASSERT_TRUE(found) << found.error().what;
  ASSERT_TRUE(found->serve);
  EXPECT_EQ(found->serve->process.id.pid, old);
  for (const auto& [member, word] :
       std::vector<std::pair<std::string, std::string>>{
           {"start_ticks", "another time"},
           {"exe_inode", "another executable"},
           {"exe_device", "another executable"},
           {"uid", "uid"}}) {
    Json other = report;
    Json& value = other["processes"][0][member];
    value = value.get<std::uint64_t>() + 1;
    found = detect_from(root_, keep(other));
    ASSERT_TRUE(found) << found.error().what;
    EXPECT_FALSE(found->running()) << member;
    ASSERT_EQ(found->stale.size(), 1u) << member;
    EXPECT_EQ(found->stale[0].pid, old);
    EXPECT_NE(found->stale[0].why.find(word), std::string::npos)
        << found->stale[0].why;
  }
  Json other = report;
  other["boot_id"] = "another";
  found = detect_from(root_, keep(other));
  ASSERT_TRUE(found);
  EXPECT_FALSE(found->running());
  EXPECT_TRUE(alive(old) && alive(next));
}

TEST_F(FromReport, WhatIsNoReportOfThisRootIsRefusedByName) {
  pid_t serve = child();
  record(file_of(serve));
  const Json report = to_json(look());
  using Spoil = std::function<void(Json*)>;
  const std::vector<std::pair<std::string, Spoil>> kFaults = {
      {"no object", [](Json* j) { *j = Json::array(); }},
      {"boot_id", [](Json* j) { j->erase("boot_id"); }},
      {"processes", [](Json* j) { (*j)["processes"] = 5; }},
      {"root_inode", [](Json* j) { j->erase("root_inode"); }},
      {"--root", [](Json* j) { (*j)["root"] = "/elsewhere"; }},
      {"--root",
       [](Json* j) {
         (*j)["root_inode"] = (*j)["root_inode"].get<std::uint64_t>() + 1;
       }},
      {"processes[0] has no role",
       [](Json* j) { (*j)["processes"][0].erase("role"); }},
      {"processes[0]: pid",
       [](Json* j) { (*j)["processes"][0].erase("exe_inode"); }},
      {"processes[0]: pid", [](Json* j) { (*j)["processes"][0]["pid"] = -1; }},
      {"processes[0]: pid", [](Json* j) { (*j)["processes"][0]["pid"] = 1; }},
      {"a second machina_serve",
       [](Json* j) {
         Json again = (*j)["processes"][0];
         (*j)["processes"].push_back(again);
       }},
  };
  for (const auto& [word, spoil] : kFaults) {
    Json bad = report;
    spoil(&bad);
    auto found = detect_from(root_, keep(bad));
    ASSERT_FALSE(found) << word;
    EXPECT_EQ(found.error().code, Code::invalid);
    EXPECT_NE(found.error().what.find(word), std::string::npos)
        << found.error().what;
  }
  auto found = detect_from(root_, keep(report, 0622));
  ASSERT_FALSE(found);
  EXPECT_NE(found.error().what.find("by others"), std::string::npos);
  found = detect_from(root_, root_ + "/not-there");
  ASSERT_FALSE(found);
  EXPECT_NE(found.error().what.find("not-there"), std::string::npos);
  found = detect_from(root_, root_);
  ASSERT_FALSE(found);
  EXPECT_NE(found.error().what.find("not a file"), std::string::npos);
  EXPECT_TRUE(alive(serve));
}

// Root is not led to its own processes by the report of a user's root.
TEST_F(FromReport, AUsersReportNamesThatUsersProcessesOnly) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to be led astray";
  pid_t pid = child();  // root's
  record(file_of(pid));
  const std::string path = keep(to_json(look()));
  ASSERT_EQ(::chown(root_.c_str(), 64999, 64999), 0);
  auto found = detect_from(root_, path);
  ASSERT_TRUE(found) << found.error().what;
  EXPECT_FALSE(found->running());
  // A third user's file is not read at all.
  ASSERT_EQ(::chown(path.c_str(), 64998, 64998), 0);
  found = detect_from(root_, path);
  ASSERT_FALSE(found);
  EXPECT_NE(found.error().what.find("64998"), std::string::npos);
}

TEST_F(OpsTest, KillReturnsAsSoonAsAllHaveEnded) {
  pid_t serve = child(), pool = child();
  record(file_of(serve));
  record(file_of(pool, "pool"));
  auto began = std::chrono::steady_clock::now();
  Killed killed = kill_all(look(), 8000);
  auto took = std::chrono::steady_clock::now() - began;
  EXPECT_EQ(killed.terminated, (std::vector<pid_t>{serve, pool}));
  EXPECT_TRUE(killed.killed.empty());
  EXPECT_TRUE(killed.left.empty());
  EXPECT_LT(took, std::chrono::milliseconds(500));
  EXPECT_FALSE(alive(serve));
  EXPECT_FALSE(alive(pool));
}

TEST_F(OpsTest, WhatIgnoresTermIsKilledAfterTheGrace) {
  pid_t pid = child(ignore_term);
  record(file_of(pid));
  Killed killed = kill_all(look(), 300);
  EXPECT_EQ(killed.killed, std::vector<pid_t>{pid});
  EXPECT_TRUE(killed.terminated.empty());
  EXPECT_GE(killed.took_ms, 300);
  EXPECT_FALSE(alive(pid));
}

// A server that does nothing, stopped or stuck, cannot send its pool away: the
// pool hears of it all the same before it is killed.
TEST_F(OpsTest, APoolWhoseServerHangsGetsTermFirst) {
  for (auto [grace, stopped] : std::vector<std::pair<std::int64_t, bool>>{
           {0, true}, {1000, true}, {1000, false}}) {
    pid_t serve = child(stopped ? obey : ignore_term), pool = child();
    if (stopped) ::kill(serve, SIGSTOP);
    record(file_of(serve));
    record(file_of(pool, "pool"));
    Killed killed = kill_all(look(), grace);
    EXPECT_EQ(killed.killed.front(), serve);
    EXPECT_TRUE(killed.left.empty());
    EXPECT_GE(killed.took_ms, grace);
    int status = 0;
    ASSERT_EQ(::waitpid(pool, &status, 0), pool);
    EXPECT_TRUE(WIFSIGNALED(status));
    if (grace == 0) continue;  // both signals: either may be the first
    EXPECT_EQ(WTERMSIG(status), SIGTERM);
    EXPECT_EQ(killed.terminated, std::vector<pid_t>{pool});
    EXPECT_EQ(killed.killed, std::vector<pid_t>{serve});
  }
}

TEST_F(OpsTest, ChildrenThatOutliveTheirParentAreEndedToo) {
  pid_t below = 0;
  pid_t pid = family(&below);
  record(file_of(pid, "pool"));
  Detected found = look();
  ASSERT_EQ(found.children.size(), 1u);
  EXPECT_EQ(found.children[0].process.id.pid, below);
  Killed killed = kill_all(found, 1000);
  EXPECT_EQ(killed.terminated, std::vector<pid_t>{pid});
  EXPECT_EQ(killed.killed, std::vector<pid_t>{below});
  EXPECT_TRUE(killed.left.empty());
  EXPECT_FALSE(alive(below));
}

TEST_F(OpsTest, ASignalGoesToWhatWasHeldOrToNobody) {  // Q2
  pid_t pid = child();
  auto held = Held::hold(look_at(pid)->id);
  ASSERT_TRUE(held) << held.error().what;
  EXPECT_FALSE(held->ended(0));
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
  children_.clear();
  EXPECT_TRUE(held->ended(1000));
  EXPECT_TRUE(held->signal(SIGTERM)) << "nobody is there to be hit";
  EXPECT_FALSE(Held::hold(held->process().id));
}

TEST_F(OpsTest, PidFilesComeBackAsTheyWere) {
  PidFile file = file_of(::getpid());
  file.host = "127.0.0.1";
  file.port = 8080;
  file.workers = 3;
  file.profile = "prod";
  file.cwd = "/";
  file.argv = {"serve", "--root", root_};
  file.environment = {"MACHINA_WORKERS=3"};
  file.secrets = {"MACHINA_API_TOKEN"};
  file.settings = {{"MACHINA_API_TOKEN", "set"}, {"MACHINA_HOST", "::1"}};
  record(file);
  auto read = read_pid_file(root_, "serve");
  ASSERT_TRUE(read) << read.error().what;
  EXPECT_EQ(read->id.pid, file.id.pid);
  EXPECT_EQ(read->id.start_ticks, file.id.start_ticks);
  EXPECT_EQ(read->port, 8080);
  EXPECT_EQ(read->argv, file.argv);
  EXPECT_EQ(read->environment, file.environment);
  EXPECT_EQ(read->secrets, file.secrets);
  EXPECT_EQ(read->settings, file.settings);
  struct stat status {};
  ASSERT_EQ(::stat((root_ + "/ops/serve.pid").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0600u);  // O5
  ASSERT_EQ(::stat((root_ + "/ops").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0700u);
  EXPECT_EQ(read_pid_file(root_, "pool").error().code, Code::not_found);
  remove_pid_file(root_, "serve");
  EXPECT_EQ(read_pid_file(root_, "serve").error().code, Code::not_found);
}

TEST_F(OpsTest, InACopyOfARootNobodyIsNamed) {  // O6
  pid_t pid = child();
  record(file_of(pid));
  record(file_of(pid, "pool"));
  std::string copy = root_ + ".copy";
  fs::copy(root_, copy, fs::copy_options::recursive);
  auto found = detect(copy);
  ASSERT_TRUE(found) << found.error().what;
  EXPECT_EQ(detect_exit(*found), kOpsNotRunning);
  ASSERT_EQ(found->stale.size(), 2u);
  EXPECT_NE(found->stale[0].why.find("a copy"), std::string::npos);
  EXPECT_TRUE(kill_all(*found, 1000).targets.empty());
  signal_pool(copy, SIGKILL);
  EXPECT_TRUE(alive(pid));
  EXPECT_TRUE(look().serve) << "the original is told as before";
  // Moved, it is still the same directory.
  fs::remove_all(copy);
  fs::rename(root_, copy);
  EXPECT_TRUE(detect(copy)->serve);
  fs::rename(copy, root_);
}

TEST_F(OpsTest, APidFileWithoutItsRootNamesNobody) {  // O6
  record(file_of(child()));
  std::string path = root_ + "/ops/serve.pid";
  std::ifstream in(path);
  Json json = Json::parse(in);
  json.erase("root_inode");
  std::ofstream(path) << json.dump();
  Detected found = look();
  EXPECT_FALSE(found.running());
  EXPECT_EQ(found.stale.size(), 1u);
}

TEST_F(OpsTest, OneVerbAtATimeChangesARoot) {  // O7
  EXPECT_EQ(OpsLock::take(root_, 0).error().code, Code::not_found);
  fs::create_directory(root_ + "/ops");
  {
    auto first = OpsLock::take(root_, 0);
    ASSERT_TRUE(first) << first.error().what;
    auto second = OpsLock::take(root_, 50);
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code, Code::conflict);
    EXPECT_NE(second.error().what.find(root_), std::string::npos);
  }
  EXPECT_TRUE(OpsLock::take(root_, 0));
  fs::remove(root_ + "/ops/ops.lock");
  fs::create_symlink("/dev/null", root_ + "/ops/ops.lock");
  EXPECT_EQ(OpsLock::take(root_, 0).error().code, Code::io);
}

TEST_F(OpsTest, APidFileOfAnEarlierProcessOfThisNumberStays) {
  PidFile file = file_of(::getpid());
  file.id.start_ticks -= 1;
  record(file);
  remove_pid_file(root_, "serve");
  EXPECT_TRUE(read_pid_file(root_, "serve"));
}

TEST_F(OpsTest, OnlyItsWriterRemovesAPidFile) {
  record(file_of(child()));
  remove_pid_file(root_, "serve");
  EXPECT_TRUE(read_pid_file(root_, "serve"));
}

TEST_F(OpsTest, WhatIsNoPidFileNamesNobody) {
  fs::create_directory(root_ + "/ops");
  for (const char* text :
       {"", "{", "[]", "4711", "{\"role\":\"serve\",\"pid\":\"x\"}",
        "{\"role\":\"pool\",\"pid\":1}"}) {
    std::ofstream(root_ + "/ops/serve.pid") << text;
    Detected found = look();
    EXPECT_FALSE(found.running()) << text;
    EXPECT_EQ(found.stale.size(), *text == '\0' ? 0u : 1u) << text;
  }
}

TEST_F(OpsTest, ReportsStayBelowTheirRoot) {  // O5
  ASSERT_TRUE(write_report(root_, "r.json", "{}"));
  EXPECT_TRUE(fs::exists(root_ + "/ops/r.json"));
  fs::remove_all(root_ + "/ops");
  std::string elsewhere = root_ + "/elsewhere";
  fs::create_directory(elsewhere);
  fs::create_symlink(elsewhere, root_ + "/ops");
  EXPECT_FALSE(write_report(root_, "r.json", "{}"));
  EXPECT_TRUE(fs::is_empty(elsewhere));
  // A directory that is no server's root gets none.
  ASSERT_TRUE(write_report(elsewhere, "r.json", "{}"));
  EXPECT_TRUE(fs::is_empty(elsewhere));
}

// O8: root looks after a user's root, and the user can go on alone.
TEST_F(OpsTest, WhatRootMakesBelongsToTheRootsOwner) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to work for another";
  constexpr uid_t kUser = 64998;
  constexpr gid_t kGroup = 64997;
  ASSERT_EQ(::chown(root_.c_str(), kUser, kGroup), 0);
  ASSERT_TRUE(write_report(root_, "pids.current.json", "{}"));
  record(file_of(::getpid(), "pool"));
  ASSERT_TRUE(OpsLock::take(root_, 0));
  for (const char* name :
       {"", "/pids.current.json", "/pool.pid", "/ops.lock"}) {
    struct stat status {};
    ASSERT_EQ(::lstat((root_ + "/ops" + name).c_str(), &status), 0) << name;
    EXPECT_EQ(status.st_uid, kUser) << name;
    EXPECT_EQ(status.st_gid, kGroup) << name;
  }
  // A name that the user made a link goes where it leads to nobody.
  std::string prey = root_ + "-prey";
  std::ofstream(prey) << "untouched";
  for (const char* name : {"/ops/kill.report.txt", "/ops/ops.lock"}) {
    fs::remove(root_ + name);
    fs::create_symlink(prey, root_ + name);
  }
  EXPECT_TRUE(write_report(root_, "kill.report.txt", "x"));
  EXPECT_FALSE(OpsLock::take(root_, 0));
  fs::remove_all(root_ + "/ops");
  fs::create_directory_symlink("/var/tmp", root_ + "/ops");
  EXPECT_FALSE(write_report(root_, "kill.report.txt", "x"));
  struct stat status {};
  ASSERT_EQ(::stat(prey.c_str(), &status), 0);
  EXPECT_EQ(status.st_uid, 0u);
  std::ifstream in(prey);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "untouched");
  ASSERT_EQ(::stat("/var/tmp", &status), 0);
  EXPECT_EQ(status.st_uid, 0u);
  fs::remove(prey);
}

TEST_F(OpsTest, ARootThatIsNotThereRunsNothing) {
  auto found = detect(root_ + "/none");
  ASSERT_TRUE(found);
  EXPECT_EQ(detect_exit(*found), kOpsNotRunning);
  std::ofstream(root_ + "/file") << "x";
  EXPECT_EQ(detect(root_ + "/file").error().code, Code::invalid);
}

}  // namespace
}  // namespace machina
