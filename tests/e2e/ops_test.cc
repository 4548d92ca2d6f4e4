// machina ops: the verbs, as an operator types them. Restart is looked at
// under load: nothing that was acknowledged is lost, nothing runs twice, and
// no connection is refused.

#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "tests/e2e/fixture.h"
#include "tests/support/places.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

class Ops : public EndToEnd {
 protected:
  void TearDown() override {
    if (product_) ops({"kill"});
    EndToEnd::TearDown();
  }
  std::map<std::string, std::string> env(
      std::map<std::string, std::string> more = {}) {
    if (as_root()) more["MACHINA_SLOT_UID_BASE"] = std::to_string(slot_base());
    return more;
  }
  // As the harness chooses it, so that it finds what belongs to the product.
  static unsigned slot_base() {
    return 300000 + static_cast<unsigned>(getpid()) % 1000 * 100;
  }
  Ended ops(std::vector<std::string> args,
            const std::map<std::string, std::string>& more = {}) {
    args.insert(args.begin(), "ops");
    args.insert(args.end(), {"--root", p().root()});
    return p().run(args, env(more), 120000);
  }
  Json report(const Ended& e, int code) {
    EXPECT_EQ(e.code, code) << e.out << e.err;
    Json json = Json::parse(e.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << e.out << e.err;
    return json;
  }
  Json kept(const std::string& name) {
    std::string path = p().root() + "/ops/" + name;
    struct stat status {};
    EXPECT_EQ(stat(path.c_str(), &status), 0) << path;
    EXPECT_EQ(status.st_mode & 07777, 0600u) << path;
    return Json::parse(read_file(path), nullptr, false);
  }
  Json start_in_background(std::vector<std::string> more = {},
                           const std::map<std::string, std::string>& e = {}) {
    std::vector<std::string> args = {
        "start", "--port", std::to_string(p().port()), "--workers", "2"};
    args.insert(args.end(), more.begin(), more.end());
    return report(ops(args, e), 0);
  }
  std::string submit_slow(int seconds) {
    return p().submit(
        {{"kind", "tool.shell"},
         {"payload", {{"argv", {"/bin/sleep", std::to_string(seconds)}}}}});
  }
};

// The server of `ops start` keeps its log within its bounds by itself, and the
// one that comes after it writes on.
TEST_P(Ops, ServeLogIsTurnedOver) {
  const std::string dir = p().root() + "/ops/";
  const auto inode = [&] {
    struct stat status {};
    return stat((dir + "serve.log").c_str(), &status) == 0 ? status.st_ino : 0;
  };
  const auto ask_until = [&](const std::function<bool()>& done) {
    for (int i = 0; i < 5000 && !done(); ++i) {
      EXPECT_EQ(p().get("/stats").status, 200);
    }
    return eventually(done, 5000);
  };
  const std::map<std::string, std::string> env = {
      {"MACHINA_LOG_MAX_BYTES", "65536"},
      {"MACHINA_LOG_TOTAL_BYTES", "262144"},
      {"MACHINA_LOG_ACCESS", "all"}};
  start_in_background({}, env);
  const std::string first = read_file(dir + "serve.log");
  EXPECT_FALSE(first.empty());
  EXPECT_TRUE(ask_until([&] { return fs::exists(dir + "serve.log.2"); }));
  EXPECT_TRUE(read_file(dir + "serve.log.2").starts_with(first.substr(0, 40)));
  // The next server, by a hand-over, and its lines.
  report(ops({"restart"}), 0);
  const auto before = inode();
  EXPECT_TRUE(ask_until([&] { return inode() != 0 && inode() != before; }));
  std::uintmax_t all = 0;
  for (const auto& entry : fs::directory_iterator(dir)) {
    if (!entry.path().filename().string().starts_with("serve.log")) continue;
    EXPECT_LE(entry.file_size(), 65536u + 4096u) << entry.path();
    all += entry.file_size();
  }
  EXPECT_LE(all, 262144u + 4096u);
  report(ops({"kill"}), 0);
  // Whoever names a file has the lines there.
  const std::string mine = p().root() + "/mine.log";
  start_in_background(
      {}, {{"MACHINA_LOG_FILE", mine}, {"MACHINA_LOG_ACCESS", "all"}});
  EXPECT_EQ(p().get("/stats").status, 200);
  EXPECT_TRUE(eventually(
      [&] { return read_file(mine).find("/stats") != std::string::npos; },
      5000));
  report(ops({"kill"}), 0);
}

TEST_P(Ops, StartDetectCheckKill) {
  EXPECT_EQ(report(ops({"detect"}), 3)["count"], 0);
  EXPECT_EQ(ops({"healthcheck"}).code, 3);
  EXPECT_EQ(ops({"kill"}).code, 3);

  Json started = start_in_background();
  EXPECT_EQ(started["ready"], true);
  EXPECT_EQ(started["serve_port"], p().port());
  EXPECT_EQ(started["serve_host"], "127.0.0.1");
  EXPECT_TRUE(started["bot_pid"].is_null());
  EXPECT_TRUE(started["stack_id"].is_string());
  EXPECT_EQ(kept("pids.started.json")["serve_pid"], started["serve_pid"]);
  EXPECT_TRUE(fs::exists(started["serve_log"].get<std::string>()));
  pid_t server = started["serve_pid"];
  EXPECT_EQ(getsid(server), server) << "a session of its own";

  Json health = report(ops({"healthcheck"}), 0);
  EXPECT_EQ(health["ok"], true);
  EXPECT_EQ(health["serve_health_ok"], true);
  EXPECT_EQ(Json::parse(health["serve_health_body"].get<std::string>())["ok"],
            true);
  EXPECT_EQ(health["serve_pids"], Json::array({server}));
  EXPECT_EQ(health["pool_pids"].size(), 1u);
  EXPECT_EQ(kept("health.report.json")["ok"], true);

  Json found = report(ops({"detect"}), 0);
  std::map<std::string, int> roles;
  for (const Json& each : found["processes"]) {
    ++roles[each["role"].get<std::string>()];
    for (const char* member :
         {"pid", "ppid", "etimes", "repo_owned", "protected", "cmd"}) {
      EXPECT_TRUE(each.contains(member)) << member;
    }
  }
  EXPECT_EQ(found["count"], found["processes"].size());
  EXPECT_EQ(roles["machina_serve"], 1);
  EXPECT_EQ(roles["machina_pool"], 1);
  EXPECT_GE(roles["machina_child"], 3) << "a spawner and two workers";
  EXPECT_EQ(kept("pids.current.json")["count"], found["count"]);

  // It runs: that is what was asked for, and nothing is changed.
  Json again = report(ops({"start", "--port", "0"}), 0);
  EXPECT_EQ(again["already_running"], true);
  EXPECT_EQ(again["serve_pid"], server);

  Json would = report(ops({"kill", "--dry-run"}), 0);
  EXPECT_EQ(would["targets"].size(), 2u);
  EXPECT_FALSE(fs::exists(p().root() + "/ops/pids.killed.json"));
  EXPECT_EQ(kill(server, 0), 0);

  Json killed = report(ops({"kill"}), 0);
  EXPECT_EQ(killed["targets"].size(), 2u);
  EXPECT_EQ(killed["terminated"].size(), 2u);
  EXPECT_TRUE(killed["killed"].empty());
  EXPECT_LT(killed["took_ms"].get<int>(), 4000) << "no window is slept through";
  EXPECT_EQ(kept("pids.killed.json")["targets"], killed["targets"]);
  EXPECT_NE(read_file(p().root() + "/ops/kill.report.txt").find("TERM"),
            std::string::npos);
  EXPECT_FALSE(fs::exists(p().root() + "/ops/serve.pid"));
  EXPECT_EQ(p().leftovers(), std::vector<std::string>());
}

// Ready is one thing, workers are another; a start says both.
TEST_P(Ops, StartSaysWhetherWorkersAreThere) {
  Json started = start_in_background();
  EXPECT_EQ(started["workers"],
            (Json{{"configured", 2}, {"reported", 2}, {"ready", 2}}));
  pid_t pool = started["pool_pid"];
  Json again = report(ops({"start"}), 0);
  EXPECT_EQ(again["workers"]["ready"], 2);

  // The server dies, its pool does not: the next one has it back.
  kill(started["serve_pid"].get<pid_t>(), SIGKILL);
  ASSERT_TRUE(eventually(
      [&] {
        p().processes();  // buries what was left to us
        return ops({"detect"}).code == 1;
      },
      10000));
  started = start_in_background();
  EXPECT_EQ(started["workers"]["ready"], 2);
  EXPECT_EQ(started["pool_pid"], pool);
  EXPECT_EQ(p().wait_end(submit_slow(0))["state"], "succeeded");
  EXPECT_EQ(read_file(p().root() + "/pool.log").find(" error "),
            std::string::npos)
      << read_file(p().root() + "/pool.log");

  // As many as there are to be, from the first.
  EXPECT_EQ(ops({"kill"}).code, 0);
  Ended text = ops({"start", "--port", std::to_string(p().port()), "--workers",
                    "5", "--text"});
  EXPECT_EQ(text.code, 0) << text.out << text.err;
  EXPECT_NE(text.out.find("5 of 5 workers are ready"), text.out.npos)
      << text.out;
  EXPECT_EQ(p().get("/v1/workers").json()["reported"], 5);
  std::string log = read_file(p().root() + "/pool.log");
  EXPECT_EQ(log.find("scaled: another number"), log.npos) << log;
  EXPECT_NE(log.find("workers=5"), log.npos) << log;
  EXPECT_EQ(ops({"kill"}).code, 0);
  started = report(
      ops({"start", "--port", std::to_string(p().port()), "--workers", "0"}),
      0);
  EXPECT_EQ(started["workers"]["configured"], 0);
}

// It accepts connections and answers none.
TEST_P(Ops, AServerThatHangsIsNotWaitedForTooLong) {
  Json started = start_in_background();
  kill(started["serve_pid"].get<pid_t>(), SIGSTOP);
  double began = now_ms();
  Json health = report(ops({"healthcheck", "--wait-seconds", "2"}), 1);
  EXPECT_LT(now_ms() - began, 6000) << "four answers of three seconds each";
  EXPECT_EQ(health["ok"], false);
  for (const Json& check : health["checks"]) {
    for (const char* asked : {"tcp", "socket", "ready", "stats"}) {
      EXPECT_TRUE(check["name"] != asked || check["ok"] == false) << check;
    }
  }
  // Its pool leaves on TERM; the server itself cannot.
  Json killed = report(ops({"kill", "--term-seconds", "8"}), 0);
  EXPECT_EQ(killed["killed"], Json::array({started["serve_pid"]}));
  EXPECT_EQ(killed["terminated"], Json::array({started["pool_pid"]}));
  EXPECT_EQ(killed["left"], Json::array());
}

// Root looks after a user's root; the user goes on alone.
TEST_P(Ops, WhatRootMakesIsTheOwners) {
  if (geteuid() != 0 || as_root()) GTEST_SKIP() << "needs root and a user";
  start_in_background();
  const std::string as_root_run =
      std::string(kBinary) + " ops detect --root " + p().root() +
      " >/dev/null && " + kBinary + " ops healthcheck --root " + p().root() +
      " >/dev/null && " + kBinary + " ops kill --root " + p().root() +
      " >/dev/null";
  EXPECT_EQ(system(as_root_run.c_str()), 0);
  int seen = 0;
  for (const auto& file : fs::recursive_directory_iterator(p().root())) {
    struct stat status {};
    ASSERT_EQ(lstat(file.path().c_str(), &status), 0);
    EXPECT_EQ(status.st_uid, p().uid()) << file.path();
    ++seen;
  }
  EXPECT_GT(seen, 8);
  start_in_background();
  EXPECT_EQ(ops({"kill"}).code, 0);
}

TEST_P(Ops, AForeignProcessOfTheSameNameLives) {
  start_in_background();
  // The same program, the same verb and root on its command line.
  std::string copy = p().dir() + "/machina";
  pid_t stranger = fork();
  if (stranger == 0) {
    execl("/bin/sh", copy.c_str(), "-c", "while :; do sleep 1; done", "serve",
          p().root().c_str(), nullptr);
    _exit(127);
  }
  Json killed = report(ops({"kill"}), 0);
  EXPECT_EQ(kill(stranger, 0), 0);
  int status = 0;
  EXPECT_EQ(waitpid(stranger, &status, WNOHANG), 0) << "it was ended";
  kill(stranger, SIGKILL);
  waitpid(stranger, nullptr, 0);
}

TEST_P(Ops, AStaleFileOfAKilledServerNamesNobody) {
  Json started = start_in_background();
  pid_t server = started["serve_pid"];
  // The spawner is left to tidy up after its sandboxes.
  ASSERT_TRUE(eventually([&] { return ops({"detect"}).code == 0; }, 20000));
  pid_t pool = report(ops({"detect"}), 0)["processes"][1]["pid"];
  for (pid_t pid : {server, pool}) kill(pid, SIGKILL);
  ASSERT_TRUE(eventually([&] { return p().processes().empty(); }, 10000));
  EXPECT_TRUE(fs::exists(p().root() + "/ops/serve.pid"));
  Json found = report(ops({"detect"}), 3);
  ASSERT_GE(found["stale"].size(), 1u);
  EXPECT_EQ(found["stale"][0]["pid"], server);
  EXPECT_EQ(ops({"kill"}).code, 3);
  EXPECT_FALSE(fs::exists(p().root() + "/ops/serve.pid"));
  start_in_background();
}

TEST_P(Ops, AStartThatFailsSaysWhy) {
  start_in_background();
  std::string other = p().dir() + "/other";
  ASSERT_EQ(p().shell("mkdir -m 700 " + other), 0);
  Ended e = p().run({"ops", "start", "--root", other, "--port",
                     std::to_string(p().port()), "--workers", "0"},
                    env());
  Json json = report(e, 2);
  EXPECT_NE(json["error"].get<std::string>().find("ddress already in use"),
            std::string::npos);
  EXPECT_EQ(json["ready"], false);
  EXPECT_EQ(json["exit_code"], 2);
  EXPECT_FALSE(fs::exists(other + "/machina.sock"));
  EXPECT_EQ(p().run({"ops", "start", "--root", "/"}, env()).code, 2);
  EXPECT_EQ(p().run({"ops", "kill", "--term-seconds", "-1"}, env()).code, 2);
  EXPECT_EQ(p().run({"ops"}, env()).code, 2);
  e = p().run({"ops", "explode"}, env());
  EXPECT_EQ(e.code, 2);
  EXPECT_NE(e.err.find("there is no verb \"explode\"; machina ops --help"),
            std::string::npos)
      << e.err;
  e = p().run({"list", "--label", "odd", "--server", p().url()}, env());
  EXPECT_EQ(e.code, 2);
  EXPECT_NE(e.err.find("--label: \"odd\" must be K=V"), std::string::npos);
}

// "Nothing runs" is said by who could know it.
TEST_P(Ops, WhatIsClosedOrNotThereIsSaid) {
  Ended none =
      p().run({"ops", "detect", "--root", p().dir() + "/nowhere", "--text"});
  EXPECT_EQ(none.code, 3);
  EXPECT_NE(none.out.find("there is no directory"), std::string::npos)
      << none.out;
  if (!as_root()) return;  // only root may become another user
  start_in_background();
  for (const std::string verb : {"detect", "kill", "healthcheck"}) {
    const std::string file = p().dir() + "/said";
    ASSERT_EQ(
        p().shell("setpriv --reuid 64999 --regid 64999 --clear-groups " +
                  p().dir() + "/machina ops " + verb + " --root " + p().root() +
                  " >" + file + " 2>&1; echo \"code $?\" >>" + file),
        0);
    const std::string said = read_file(file);
    EXPECT_NE(said.find("code 2"), std::string::npos) << verb << said;
    EXPECT_NE(said.find("is closed to us"), std::string::npos) << verb << said;
  }
}

TEST_P(Ops, ADryStartTriesTheSettingsAndLeavesNothing) {
  start_in_background();
  const std::string other = p().dir() + "/other";
  const std::string port = std::to_string(p().port());
  Ended taken = p().run({"ops", "start", "--dry-run", "--root", other, "--port",
                         port, "--workers", "0"},
                        env());
  EXPECT_EQ(taken.code, 2) << taken.out << taken.err;
  EXPECT_NE(taken.err.find("cannot listen"), std::string::npos) << taken.err;
  EXPECT_FALSE(fs::exists(other));
  Ended fine = p().run({"ops", "start", "--dry-run", "--root", other, "--port",
                        "0", "--workers", "0"},
                       env());
  EXPECT_EQ(fine.code, 0) << fine.out << fine.err;
  EXPECT_FALSE(fs::exists(other));
}

TEST_P(Ops, ARestartKeepsWhatWasScaledTo) {
  start_in_background();
  ASSERT_EQ(p().run({"scale", "1", "--server", p().url()}).code, 0);
  Json done = report(ops({"restart"}), 0);
  EXPECT_EQ(done["workers_kept"], 1);
  EXPECT_EQ(p().get("/stats").json()["workers"]["configured"], 1);
  done = report(ops({"restart", "--workers", "2"}), 0);
  EXPECT_EQ(p().get("/stats").json()["workers"]["configured"], 2);
}

TEST_P(Ops, RestartHandsOver) {
  Json started = start_in_background();
  std::string id = submit_slow(6);
  p().wait_state(id, "running");
  Json would = report(ops({"restart", "--dry-run"}), 0);
  EXPECT_EQ(would["old_pid"], started["serve_pid"]);
  Json done = report(ops({"restart"}), 0);
  EXPECT_EQ(done["ok"], true);
  EXPECT_EQ(done["old_pid"], started["serve_pid"]);
  EXPECT_NE(done["new_pid"], started["serve_pid"]);
  EXPECT_EQ(done["pool_kept"], true);
  EXPECT_EQ(done["sockets_passed"], 2);
  EXPECT_EQ(done["serve_port"], p().port());
  EXPECT_EQ(kept("restart.report.json")["new_pid"], done["new_pid"]);
  EXPECT_FALSE(fs::exists(p().root() + "/ops/handover.sock"));
  Json job = p().wait_end(id);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 1);
  // Not running: restart starts.
  EXPECT_EQ(ops({"kill"}).code, 0);
  EXPECT_EQ(report(ops({"restart", "--port", std::to_string(p().port()),
                        "--workers", "1"}),
                   0)["ready"],
            true);
}

TEST_P(Ops, RestartWithOtherSettings) {
  start_in_background();
  Json done = report(ops({"restart", "--workers", "1"}), 0);
  EXPECT_EQ(done["ok"], true);
  EXPECT_EQ(p().get("/v1/workers").json()["configured"], 1);
  // What would not start leaves the running one as it is.
  Json before = report(ops({"detect"}), 0);
  Ended refused = ops({"restart", "--host", "0.0.0.0"});
  EXPECT_EQ(refused.code, 2) << refused.err;
  EXPECT_NE(refused.err.find("MACHINA_API_TOKEN"), std::string::npos);
  EXPECT_EQ(kept("restart.report.json")["ok"], false);
  EXPECT_EQ(report(ops({"detect"}), 0)["processes"][0]["pid"],
            before["processes"][0]["pid"]);
}

TEST_P(Ops, RestartKeepsASecretOrSaysThatItCannot) {
  std::string token = "ops-token-in-environment";
  start_in_background({}, {{"MACHINA_API_TOKEN", token}});
  std::string all;
  for (const auto& file : fs::directory_iterator(p().root() + "/ops")) {
    all += read_file(file.path());
  }
  EXPECT_EQ(all.find(token), std::string::npos) << "O4";
  Ended refused = ops({"restart"});
  EXPECT_EQ(refused.code, 2) << refused.out;
  EXPECT_NE(refused.err.find("MACHINA_API_TOKEN"), std::string::npos);
  EXPECT_EQ(p().get("/v1/jobs").status, 401);
  Json done = report(ops({"restart"}, {{"MACHINA_API_TOKEN", token}}), 0);
  EXPECT_EQ(done["ok"], true);
  EXPECT_EQ(p().get("/v1/jobs").status, 401);
  EXPECT_EQ(p().call("GET", "/v1/jobs", "", {"Authorization: Bearer " + token})
                .status,
            200);
}

TEST_P(Ops, RestartReplacesThePoolWhenAsked) {
  start_in_background();
  Json before = report(ops({"healthcheck"}), 0);
  Json done = report(ops({"restart", "--pool"}), 0);
  EXPECT_EQ(done["pool_replaced"], true);
  EXPECT_EQ(done["pool_pid"], before["pool_pids"][0]);
  EXPECT_NE(done["new_pool_pid"], before["pool_pids"][0]);
  Json job = p().wait_end(submit_slow(0));
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
}

TEST_P(Ops, ThePoolOfAnotherServerIsReplacedWhenItDies) {
  start_in_background();
  report(ops({"restart"}), 0);
  Json seen;
  ASSERT_TRUE(eventually(
      [&] {
        seen = Json::parse(ops({"healthcheck"}).out, nullptr, false);
        return seen.is_object() && seen["pool_pids"].is_array() &&
               !seen["pool_pids"].empty();
      },
      20000))
      << seen;
  kill(seen["pool_pids"][0], SIGKILL);
  // Nobody waits until it counts as silent.
  EXPECT_TRUE(eventually(
      [&] {
        p().processes();
        return ops({"healthcheck", "--wait-seconds", "0.1"}).code == 0;
      },
      20000))
      << p().log();
}

TEST_P(Ops, TwoTermsLeaveNothing) {
  start();
  std::string id = submit_slow(100);
  p().wait_state(id, "running");
  kill(p().server(), SIGTERM);
  ASSERT_TRUE(
      eventually([&] { return p().get("/ready").status != 200; }, 10000));
  kill(p().server(), SIGTERM);
  EXPECT_EQ(p().wait_server(5000), 143);
  EXPECT_EQ(p().leftovers(10000), std::vector<std::string>());
}

// --- systemd's side, played here ----------------------------------------

// A service manager: starts the server with a notify socket, hears what it
// says, keeps what it is given, and starts it again when it ends with 0.
class Manager {
 public:
  explicit Manager(const std::string& dir, uid_t uid)
      : path_(dir + "/notify"), uid_(uid) {
    fd_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_un where{};
    where.sun_family = AF_UNIX;
    memcpy(where.sun_path, path_.c_str(), path_.size() + 1);
    if (bind(fd_, reinterpret_cast<sockaddr*>(&where), sizeof where) != 0) {
      throw std::runtime_error("bind");
    }
    chmod(path_.c_str(), 0666);
  }
  ~Manager() {
    if (pid_ > 0) {
      kill(pid_, SIGTERM);
      waitpid(pid_, nullptr, 0);
    }
    close(fd_);
    for (int fd : kept_) close(fd);
  }
  void start(const std::vector<std::string>& args,
             std::vector<std::string> env) {
    args_ = args;
    env_ = env;
    env.push_back("NOTIFY_SOCKET=" + path_);
    env.push_back("WATCHDOG_USEC=600000");
    pid_ = fork();
    if (pid_ == 0) {
      std::string self = std::to_string(getpid());
      env.push_back("SYSTEMD_EXEC_PID=" + self);
      env.push_back("WATCHDOG_PID=" + self);
      if (!kept_.empty()) {
        std::string names;
        for (std::size_t i = 0; i < kept_.size(); ++i) {
          dup2(kept_[i], 3 + static_cast<int>(i));
          names += (i > 0 ? ":" : "") + names_[i];
        }
        env.push_back("LISTEN_PID=" + self);
        env.push_back("LISTEN_FDS=" + std::to_string(kept_.size()));
        env.push_back("LISTEN_FDNAMES=" + names);
      }
      if (uid_ != geteuid() && (setgid(uid_) != 0 || setuid(uid_) != 0)) {
        _exit(126);
      }
      std::vector<char*> argv, envp;
      for (const auto& a : args_) argv.push_back(const_cast<char*>(a.c_str()));
      for (auto& e : env) envp.push_back(e.data());
      argv.push_back(nullptr);
      envp.push_back(nullptr);
      execve(argv[0], argv.data(), envp.data());
      _exit(127);
    }
  }
  // Reads what was said until `line` is among it.
  bool hear(const std::string& line, int within_ms = 20000) {
    said_.clear();
    double until = now_ms() + within_ms;
    while (now_ms() < until) {
      if (("\n" + said_).find("\n" + line) != std::string::npos) return true;
      read_one();
    }
    return false;
  }
  int wait_end() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  pid_t pid() const { return pid_; }
  const std::string& said() const { return said_; }
  std::size_t kept() const { return kept_.size(); }

 private:
  void read_one() {
    timeval limit{0, 50000};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    char bytes[4096], control[256];
    iovec part{bytes, sizeof bytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    ssize_t n = recvmsg(fd_, &message, MSG_CMSG_CLOEXEC);
    if (n <= 0) return;
    std::string text(bytes, static_cast<std::size_t>(n));
    said_ += text + "\n";
    for (cmsghdr* h = CMSG_FIRSTHDR(&message); h != nullptr;
         h = CMSG_NXTHDR(&message, h)) {
      int fd = -1;
      memcpy(&fd, CMSG_DATA(h), sizeof fd);
      kept_.push_back(fcntl(fd, F_DUPFD_CLOEXEC, 50));
      close(fd);
      std::size_t at = text.find("FDNAME=") + 7;
      names_.push_back(text.substr(at, text.find('\n', at) - at));
    }
  }

  std::string path_, said_;
  uid_t uid_;
  int fd_ = -1;
  pid_t pid_ = 0;
  std::vector<std::string> args_, env_, names_;
  std::vector<int> kept_;
};

TEST_P(Ops, WhoFindsTheRootLockedLeavesItsRecordsAlone) {
  Json started = start_in_background();
  Ended second = p().run(
      {"serve", "--root", p().root(), "--port", "0", "--workers", "0"}, env());
  EXPECT_EQ(second.code, 75) << second.err;
  Json found = report(ops({"detect"}), 0);
  EXPECT_EQ(found["running"], true);
  EXPECT_EQ(kept("serve.pid")["pid"], started["serve_pid"]);
  EXPECT_EQ(ops({"healthcheck"}).code, 0);
  Json again = start_in_background();
  EXPECT_EQ(again["already_running"], true);
  EXPECT_EQ(report(ops({"kill"}), 0)["left"], Json::array());
  EXPECT_EQ(p().get("/health").status, 0) << "it runs still";
}

// What is not the server's own to give: somebody else's record of it is gone.
TEST_P(Ops, AServerWithoutARecordIsNotTakenForOurs) {
  Json started = start_in_background();
  ASSERT_EQ(unlink((p().root() + "/ops/serve.pid").c_str()), 0);
  Ended e = ops({"start", "--port", "0", "--workers", "0"});
  Json second = report(e, 1);
  EXPECT_NE(second["error"].get<std::string>().find("no record"),
            std::string::npos)
      << e.out;
  EXPECT_EQ(p().get("/health").status, 200);
  kill(started["serve_pid"].get<pid_t>(), SIGTERM);
  EXPECT_TRUE(
      eventually([&] { return p().get("/health").status == 0; }, 30000));
}

TEST_P(Ops, WhatCannotStartDoesNotTakeOver) {
  start_in_background();
  Json before = report(ops({"detect"}), 0);
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in where{};
  where.sin_family = AF_INET;
  where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&where), sizeof where),
            0);
  ASSERT_EQ(listen(listener, 1), 0);
  socklen_t size = sizeof where;
  getsockname(listener, reinterpret_cast<sockaddr*>(&where), &size);
  const std::string taken = std::to_string(ntohs(where.sin_port));

  auto yaml = [&](const std::string& line) {
    std::string path = p().dir() + "/settings.yaml";
    std::ofstream(path) << line << "\n";
    if (!as_root()) {
      EXPECT_EQ(chown(path.c_str(), p().uid(), p().uid()), 0);
    }
    return path;
  };
  struct {
    std::vector<std::string> args;
    std::string says;
  } const cases[] = {
      {{"--port", taken}, "MACHINA_PORT"},
      {{"--host", "192.0.2.1"}, "192.0.2.1"},
      {{"--config", yaml("MACHINA_LOG_FILE: /nowhere/at/all.log")},
       "/nowhere/at/"},
  };
  for (const auto& each : cases) {
    std::vector<std::string> args = {"restart"};
    args.insert(args.end(), each.args.begin(), each.args.end());
    Ended e = ops(args);
    EXPECT_EQ(e.code, 2) << each.says << "\n" << e.out << e.err;
    EXPECT_NE(e.err.find(each.says), std::string::npos) << e.err;
    EXPECT_EQ(p().get("/health").status, 200);
  }
  close(listener);
  Json after = report(ops({"detect"}), 0);
  EXPECT_EQ(after["processes"][0]["pid"], before["processes"][0]["pid"]);

  // The same question, asked by hand, also of a root.
  auto check = [&](std::vector<std::string> args) {
    args.insert(args.begin(), {"serve", "--check"});
    return p().run(args, env());
  };
  EXPECT_EQ(
      check({"--root", p().root(), "--port", std::to_string(p().port())}).code,
      0)
      << "the running server's port is free for its successor";
  EXPECT_EQ(check({"--root", p().dir() + "/fresh", "--port", "0"}).code, 0);
  EXPECT_FALSE(fs::exists(p().dir() + "/fresh")) << "nothing is made";
  for (const char* bad : {"/", "/etc", "/proc/x", "/nowhere/at/all"}) {
    Ended e = check({"--root", bad, "--port", "0"});
    EXPECT_EQ(e.code, 2) << bad;
    EXPECT_NE(e.err.find("MACHINA_ROOT"), std::string::npos) << e.err;
  }
  fs::create_directory(p().dir() + "/open");
  fs::permissions(p().dir() + "/open", fs::perms::all);
  EXPECT_EQ(check({"--root", p().dir() + "/open", "--port", "0"}).code, 2);
}

// Whoever watches over the pool (systemd) starts it again where it did not end
// by itself: one that the drain finds half started must not be killed.
TEST_P(Ops, APoolThatHasJustStartedLeavesByItself) {
  auto locked = [&] {
    int fd = open((p().root() + "/pool.lock").c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) return false;
    bool held = flock(fd, LOCK_EX | LOCK_NB) != 0;
    close(fd);
    return held;
  };
  for (int delay : {0, 20, 60, 150}) {
    Serve serve;
    serve.env = env();
    serve.args = {"--no-pool"};
    start(serve);
    Ended pool;
    std::thread running([&] {
      pool = p().run({"pool", "--root", p().root()}, env(), 20000);
    });
    bool there = eventually(locked, 10000);
    sleep_ms(delay);
    double from = now_ms();
    EXPECT_EQ(p().stop_server(), 0) << p().log();
    EXPECT_LT(now_ms() - from, 10000);
    running.join();
    EXPECT_TRUE(there);
    EXPECT_EQ(pool.code, 0) << delay << " ms: " << pool.out << pool.err;
  }
}

TEST_P(Ops, AServiceManagerHearsOfItAndKeepsItsSockets) {
  Manager manager(p().dir(), p().uid());
  std::vector<std::string> args = {
      p().dir() + "/machina",     "serve",     "--root", p().root(), "--port",
      std::to_string(p().port()), "--workers", "1"};
  std::vector<std::string> environment = {"PATH=/usr/bin:/bin"};
  for (const auto& [name, value] : env()) {
    environment.push_back(name + "=" + value);
  }
  manager.start(args, environment);
  ASSERT_TRUE(manager.hear("READY=1")) << manager.said();
  EXPECT_EQ(p().get("/ready").status, 200);
  EXPECT_TRUE(manager.hear("WATCHDOG=1")) << manager.said();
  EXPECT_TRUE(manager.hear("WATCHDOG=1")) << "again and again";
  EXPECT_EQ(manager.kept(), 2u);
  // Neither the pool nor a job has the manager's variables.
  std::string id = p().submit(
      {{"kind", "tool.shell"}, {"payload", {{"argv", {"/usr/bin/env"}}}}});
  p().wait_end(id);
  EXPECT_EQ(p().get("/v1/jobs/" + id + "/logs").body.find("NOTIFY"),
            std::string::npos);
  for (pid_t pid : p().processes_with("pool")) {
    EXPECT_EQ(read_file("/proc/" + std::to_string(pid) + "/environ")
                  .find("NOTIFY_SOCKET"),
              std::string::npos);
  }

  // A hung server is silent: the manager would notice.
  pid_t first = manager.pid();
  kill(first, SIGSTOP);
  while (manager.hear("WATCHDOG=1", 300)) {
  }
  EXPECT_FALSE(manager.hear("WATCHDOG=1", 1500)) << manager.said();
  kill(first, SIGCONT);
  EXPECT_TRUE(manager.hear("WATCHDOG=1"));

  // Handed over, and started again with the sockets it gave away: nobody who
  // connects meanwhile is refused.
  std::string slow = submit_slow(5);
  p().wait_state(slow, "running");
  kill(first, SIGUSR2);
  EXPECT_TRUE(manager.hear("STOPPING=1")) << manager.said();
  EXPECT_EQ(manager.wait_end(), 0);
  std::thread waiting([&] { EXPECT_EQ(p().get("/health").status, 200); });
  sleep_ms(300);
  manager.start(args, environment);
  waiting.join();
  ASSERT_TRUE(manager.hear("READY=1"));
  EXPECT_EQ(manager.kept(), 2u) << "they were not given twice";
  Json job = p().wait_end(slow);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 1);

  // machina ops restart knows who starts the next one.
  Json found = report(ops({"detect"}), 0);
  EXPECT_EQ(found["supervisor"], "systemd");
  std::thread again([&] {
    EXPECT_EQ(manager.wait_end(), 0);
    manager.start(args, environment);
  });
  Json done = report(ops({"restart"}), 0);
  again.join();
  EXPECT_EQ(done["ok"], true);
  EXPECT_EQ(done["new_pid"], manager.pid());
  manager.hear("what has been said so far", 500);  // its queue is short
  kill(manager.pid(), SIGTERM);
  EXPECT_TRUE(manager.hear("STOPPING=1")) << manager.said();
  EXPECT_EQ(manager.wait_end(), 0);
  EXPECT_FALSE(fs::exists(p().root() + "/machina.sock"));
}

// Only what the report names, and only if it still is that process.
TEST_P(Ops, KillFromAReportLeavesWhatCameSince) {
  start_in_background();
  report(ops({"detect"}), 0);
  const std::string old = p().dir() + "/old.json";
  ASSERT_EQ(p().shell("umask 077; cp " + p().root() +
                      "/ops/pids.current.json " + old),
            0);
  report(ops({"kill"}), 0);
  const pid_t server = start_in_background()["serve_pid"];
  Json killed = report(ops({"kill", "--from", old}), 3);
  EXPECT_EQ(killed["targets"], Json::array());
  EXPECT_EQ(killed["from"], old);
  ASSERT_EQ(killed["skipped"].size(), 2u) << killed.dump(2);
  EXPECT_EQ(killed["skipped"][0]["why"], "it has ended");
  EXPECT_EQ(kill(server, 0), 0);

  report(ops({"detect"}), 0);
  const std::string now = p().root() + "/ops/pids.current.json";
  Json would = report(ops({"kill", "--from", now, "--dry-run"}), 0);
  EXPECT_EQ(would["targets"].size(), 2u) << would.dump(2);
  EXPECT_EQ(kill(server, 0), 0);
  killed = report(ops({"kill", "--from", now}), 0);
  EXPECT_EQ(killed["targets"].size(), 2u);
  EXPECT_EQ(killed["skipped"], Json::array());
  EXPECT_EQ(p().leftovers(), std::vector<std::string>());

  const Ended bad = ops({"kill", "--from", p().dir() + "/none.json"});
  EXPECT_EQ(bad.code, 2);
  EXPECT_NE(bad.err.find("none.json"), std::string::npos) << bad.err;
}

TEST_P(Ops, StartByForceEndsWhatRunsFirst) {
  const pid_t first = start_in_background()["serve_pid"];
  const Json would =
      report(ops({"start", "--force", "--dry-run", "--port", "0"}), 0);
  EXPECT_EQ(kill(first, 0), 0) << would.dump(2);
  const Json started = start_in_background({"--force"});
  EXPECT_NE(started["serve_pid"], first);
  EXPECT_EQ(started["ready"], true);
  EXPECT_EQ(started["launcher"], "nohup");
  ASSERT_EQ(started["ended"]["targets"].size(), 2u) << started.dump(2);
  EXPECT_EQ(started["ended"]["targets"][0]["pid"], first);
  EXPECT_NE(started["ended"]["terminated"].dump().find(std::to_string(first)),
            std::string::npos)
      << started.dump(2);
  EXPECT_EQ(started["ended"]["left"], Json::array());
  // One that could not start costs nothing that runs.
  for (const std::vector<std::string>& bad :
       {std::vector<std::string>{"--host", "192.0.2.1"},
        {"--workers", "2", "--config", p().dir() + "/missing.yaml"}}) {
    std::vector<std::string> args = {"start", "--force"};
    args.insert(args.end(), bad.begin(), bad.end());
    EXPECT_EQ(ops(args).code, 2);
    EXPECT_EQ(report(ops({"detect"}), 0)["processes"][0]["pid"],
              started["serve_pid"]);
    EXPECT_EQ(p().get("/health").status, 200);
  }
  // Where nothing runs there is nothing to end.
  report(ops({"kill"}), 0);
  EXPECT_TRUE(start_in_background({"--force"})["ended"].is_null());
}

// A systemctl of our own: the unit serves this root, or another.
TEST_P(Ops, TheLauncherIsTheUnitWhereItServesThisRoot) {
  const std::string bin = p().dir() + "/bin";
  const auto systemctl = [&](const std::string& root) {
    const std::string serve = std::string(kBinary) + " serve --root " + root +
                              " --port " + std::to_string(p().port()) +
                              " --workers 1";
    const std::string line =
        "case \"$*\" in *show*) echo LoadState=loaded; echo 'ExecStart={ "
        "path=x ; argv[]=" +
        serve +
        " ; ignore_errors=no }';; *start\\ machina.service) echo \"$*\" "
        ">>" +
        p().dir() + "/asked; setsid " + serve + " >" + p().dir() +
        "/unit.log 2>&1 & ;; *) exit 4;; esac";
    std::ofstream file(p().dir() + "/systemctl.tmp");
    file << "#!/bin/sh\n" << line << "\n";
    file.close();
    ASSERT_EQ(p().shell("mkdir -p " + bin + "; cat " + p().dir() +
                        "/systemctl.tmp >" + bin + "/systemctl; chmod 755 " +
                        bin + "/systemctl"),
              0);
  };
  const std::map<std::string, std::string> path = {
      {"PATH", bin + ":/usr/bin:/bin"}};
  systemctl("/somewhere/else");
  Ended no = ops({"start", "--launcher", "systemd"}, path);
  EXPECT_EQ(no.code, 2);
  EXPECT_NE(no.err.find("serves /somewhere/else"), std::string::npos) << no.err;
  EXPECT_EQ(ops({"start", "--launcher", "docker"}, path).code, 2);
  Json started = start_in_background({}, path);  // auto: not its unit
  EXPECT_EQ(started["launcher"], "nohup");
  report(ops({"kill"}), 0);

  systemctl(p().root());
  // The unit has its settings; ours would be another server's.
  no = ops({"start", "--port", "0", "--launcher", "systemd"}, path);
  EXPECT_EQ(no.code, 2);
  EXPECT_NE(no.err.find("settings of its own"), std::string::npos) << no.err;
  Json would = report(ops({"start", "--dry-run"}, path), 0);
  EXPECT_EQ(would["systemctl"], "systemctl start machina.service");
  EXPECT_FALSE(fs::exists(p().dir() + "/asked"));
  started = report(ops({"start"}, path), 0);
  EXPECT_EQ(started["launcher"], "systemd") << started.dump(2);
  EXPECT_EQ(started["ready"], true);
  EXPECT_EQ(started["serve_port"], p().port());
  EXPECT_EQ(read_file(p().dir() + "/asked"),
            "--no-ask-password start machina.service\n");
  // By force what was not started by systemd is ended, and the unit started.
  const pid_t first = started["serve_pid"];
  started = report(ops({"start", "--force"}, path), 0);
  EXPECT_NE(started["serve_pid"], first);
  EXPECT_EQ(started["ended"]["targets"][0]["pid"], first) << started.dump(2);
  // A pool whose server was killed is the unit's, and goes on.
  pid_t pool = 0;
  const Json all = report(ops({"detect"}), 0);
  for (const Json& each : all["processes"]) {
    if (each["role"] == "machina_pool") pool = each["pid"];
  }
  kill(started["serve_pid"].get<pid_t>(), SIGKILL);
  ASSERT_TRUE(eventually([&] { return ops({"detect"}).code == 1; }, 10000));
  started = report(ops({"start"}, path), 0);
  EXPECT_EQ(started["pool_pid"], pool) << started.dump(2);
  // Beside the unit, by hand.
  report(ops({"kill"}), 0);
  EXPECT_EQ(start_in_background({"--launcher", "nohup"}, path)["launcher"],
            "nohup");
}

TEST_P(Ops, DoctorHasTheProductionChecklist) {
  std::string token = p().dir() + "/token";
  ASSERT_EQ(p().shell("umask 077; echo e2e-token-of-doctor > " + token), 0);
  std::map<std::string, std::string> good = {{"MACHINA_PROFILE", "prod"},
                                             {"MACHINA_API_TOKEN_FILE", token}};
  if (!as_root()) good["MACHINA_SANDBOX_MIN_LEVEL"] = "L1";
  auto doctor = [&](std::map<std::string, std::string> e) {
    return p().run(
        {"ops", "doctor", "--profile", "prod", "--json", "--root", p().root()},
        env(std::move(e)), 60000);
  };
  auto failed = [](const Ended& e) {
    std::vector<std::string> names;
    Json json = Json::parse(e.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << e.out << e.err;
    for (const Json& check : json["checks"]) {
      if (check["verdict"] == "FAIL") names.push_back(check["name"]);
    }
    return names;
  };
  const auto only = [](const std::string& name) {
    return std::vector<std::string>{name};
  };
  Ended well = doctor(good);
  EXPECT_EQ(failed(well), std::vector<std::string>()) << well.out;
  EXPECT_EQ(well.code, 0) << well.err;
  auto bad = good;
  bad["MACHINA_WAL_FSYNC"] = "0";
  Ended ill = doctor(bad);
  EXPECT_EQ(failed(ill), only("durability"));
  EXPECT_EQ(ill.code, 1);
  bad = good;
  bad.erase("MACHINA_PROFILE");
  EXPECT_EQ(failed(doctor(bad)), only("profile"));
  ASSERT_EQ(p().shell("chmod 750 " + p().root()), 0);
  EXPECT_EQ(failed(doctor(good)), only("root"));
  ASSERT_EQ(p().shell("chmod 700 " + p().root()), 0);
  // A server that runs is judged by what it has, not by what is configured.
  bad = good;
  bad["MACHINA_SANDBOX_MIN_LEVEL"] = "L0";
  start_in_background({}, bad);
  EXPECT_EQ(failed(doctor(good)), only("running_settings"));
  report(ops({"restart"}, good), 0);  // it keeps its own environment
  EXPECT_EQ(failed(doctor(good)), only("running_settings"));
  EXPECT_EQ(failed(doctor(bad)), std::vector<std::string>());
  report(ops({"kill"}), 0);
  // Without the profile: as it was.
  Ended plain = p().run({"doctor"}, env(), 60000);
  EXPECT_EQ(plain.code, 0);
  EXPECT_EQ(plain.out.find("FAIL"), std::string::npos);
}

// What can be tried is tried: a request with an id, and the log's directory.
TEST_P(Ops, DoctorLooksWhereTheLogIs) {
  const std::string logs = p().dir() + "/logs";
  ASSERT_EQ(p().shell("mkdir -m 700 " + logs), 0);
  std::map<std::string, std::string> settings = {
      {"MACHINA_LOG_FILE", logs + "/serve.log"},
      {"MACHINA_LOG_FORMAT", "json"}};
  start_in_background({}, settings);
  const auto verdict = [&](const std::string& name) {
    const Ended ended = p().run(
        {"ops", "doctor", "--profile", "prod", "--json", "--root", p().root()},
        env(settings), 60000);
    const Json json = Json::parse(ended.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << ended.out << ended.err;
    for (const Json& check : json["checks"]) {
      if (check["name"] == name) {
        return check["verdict"].get<std::string>() + ": " +
               check["what"].get<std::string>();
      }
    }
    return std::string("not there");
  };
  EXPECT_EQ(verdict("request_id"),
            "PASS: one was sent: the answer has it, and so has the log");
  EXPECT_EQ(verdict("log_rotation").substr(0, 4), "PASS");
  EXPECT_EQ(verdict("log_export").substr(0, 4), "PASS");
  // The configuration names another file than the server that runs writes.
  settings["MACHINA_LOG_FILE"] = logs + "/other.log";
  EXPECT_EQ(verdict("request_id").substr(0, 4), "FAIL");
  settings["MACHINA_LOG_FILE"] = logs + "/not/there.log";
  EXPECT_EQ(verdict("log_rotation").substr(0, 4), "FAIL");
  settings["MACHINA_LOG_FILE"] = logs + "/serve.log";
  if (!as_root()) {
    ASSERT_EQ(p().shell("chmod 500 " + logs), 0);
    EXPECT_EQ(verdict("log_rotation").substr(0, 4), "FAIL");
    ASSERT_EQ(p().shell("chmod 700 " + logs), 0);
  }
  // More than all of it may be: something else writes there.
  ASSERT_EQ(p().shell("truncate -s 3G " + logs + "/serve.log.1"), 0);
  EXPECT_EQ(verdict("log_rotation").substr(0, 4), "FAIL");
}

// --- restart under load ----------------------------------------------------

// Submits until told to stop; whatever is not acknowledged is tried again
// under the same key.
struct Client {
  Product& product;
  int number;
  std::atomic<bool>& stop;
  std::map<std::string, std::string> ids;  // by dedup key
  int unanswered = 0, busy = 0, other = 0, jobs = 0;

  void run() {
    while (!stop) {
      std::string key =
          "c" + std::to_string(number) + "-" + std::to_string(jobs++);
      for (;;) {
        Answer a =
            product.post("/v1/jobs", {{"kind", "noop"}, {"dedup_key", key}});
        if (a.status == 201 || a.status == 200) {
          std::string id = a.json()["id"];
          auto [at, is_new] = ids.emplace(key, id);
          if (!is_new && at->second != id) ++other;
          break;
        }
        if (a.status == 0) {
          ++unanswered;
        } else if (a.status == 503 || a.status == 429) {
          ++busy;
        } else {
          ++other;
          break;
        }
        sleep_ms(5);
      }
    }
  }
};

// Connects without a pause: how often was there nobody?
struct Knocker {
  int port;
  std::atomic<bool>& stop;
  int tries = 0, refused = 0;
  double longest_ms = 0;

  void run() {
    double since = 0;
    while (!stop) {
      int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      sockaddr_in a{};
      a.sin_family = AF_INET;
      a.sin_port = htons(static_cast<std::uint16_t>(port));
      a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      ++tries;
      if (connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0) {
        since = 0;
      } else {
        ++refused;
        if (since == 0) since = now_ms();
        longest_ms = std::max(longest_ms, now_ms() - since);
      }
      close(fd);
      sleep_ms(1);
    }
  }
};

TEST_P(Ops, RestartUnderLoadLosesNothingAndInterruptsNothing) {
  start_in_background();
  std::string slow = submit_slow(12);
  p().wait_state(slow, "running");

  std::atomic<bool> stop = false;
  std::vector<Client> clients;
  for (int i = 0; i < 3; ++i) clients.push_back({p(), i, stop, {}});
  Knocker knocker{p().port(), stop};
  std::vector<std::thread> threads;
  for (auto& client : clients) {
    threads.emplace_back([&client] { client.run(); });
  }
  threads.emplace_back([&] { knocker.run(); });
  std::string restarts;
  for (int i = 0; i < 3; ++i) {
    sleep_ms(300);
    Ended e = ops({"restart"});
    EXPECT_EQ(e.code, 0) << e.out << e.err;
    Json done = Json::parse(e.out, nullptr, false);
    EXPECT_EQ(done.value("sockets_passed", 0), 2);
    restarts += " " + done["restart_ms"].dump();
  }
  sleep_ms(300);
  stop = true;
  for (auto& thread : threads) thread.join();

  int acknowledged = 0, unanswered = 0, busy = 0;
  for (auto& client : clients) {
    EXPECT_EQ(client.other, 0);
    EXPECT_EQ(static_cast<int>(client.ids.size()), client.jobs);
    unanswered += client.unanswered;
    busy += client.busy;
    for (const auto& [key, id] : client.ids) {
      ++acknowledged;
      Json job = p().wait_end(id);
      EXPECT_EQ(job["state"], "succeeded") << key << job.dump(1);
      EXPECT_EQ(job["attempt"], 1) << key;
    }
  }
  Json job = p().wait_end(slow);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 1);
  EXPECT_EQ(knocker.refused, 0)
      << "of " << knocker.tries << ", for " << knocker.longest_ms << " ms";
  GTEST_LOG_(INFO) << "restarts took" << restarts << " ms; " << acknowledged
                   << " jobs acknowledged; " << unanswered
                   << " requests without an answer, " << busy
                   << " told to come again; of " << knocker.tries
                   << " connections none was refused";
  // Each was taken once, whoever asked twice.
  Json stats = p().get("/stats").json();
  EXPECT_EQ(stats["live_jobs"], 0);
}

MACHINA_BOTH(Ops);

}  // namespace
}  // namespace machina::e2e
