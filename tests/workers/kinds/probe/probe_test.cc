// Kinds that were written for the test go the whole way: submitted to the real
// server, leased and run by a real worker in real sandboxes, completed, read,
// and read again after the server was started anew.

#include "tests/workers/kinds/probe/probe.h"

#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>

#include "tests/server/api/server_fixture.h"
#include "workers/worker/worker.h"

namespace machina::test {
namespace {

std::vector<MakeFamily> with_probe() {
  const Families built_in = built_in_families();
  std::vector<MakeFamily> all(built_in.begin(), built_in.end());
  all.push_back(probe_family);  // the one row
  return all;
}

class ProbeTest : public ServerTest {
 protected:
  void SetUp() override {
    register_handlers(families_);
    const KindMap kinds = kinds_of(families_, {});
    options_.kinds = {kinds.begin(), kinds.end()};
    fork_server();
    sandbox::SpawnerOptions spawning;
    spawning.root = root_;
    spawning.socket_path = options_.socket_path;
    mask_ = umask(077);                                // as the pool does
    auto spawner = sandbox::Spawner::start(spawning);  // before any thread
    ASSERT_TRUE(spawner) << spawner.error().what;
    spawner_ = std::move(*spawner);
    auto channel = spawner_->open_slot(0);
    ASSERT_TRUE(channel);
    auto slot = sandbox::Slot::attach(*channel);
    ASSERT_TRUE(slot);
    slot_ = std::move(*slot);
    auto report = sandbox::run_canary(*slot_);
    ASSERT_TRUE(report) << report.error().what;
    start_server();
    WorkerOptions options;
    options.name = "p-0-1";
    options.root = root_;
    options.families = families_;
    worker_ = std::make_unique<Worker>(options, *slot_, *report);
    working_ = std::thread([this] { worker_->run(); });
  }
  void TearDown() override {
    if (worker_) {
      worker_->release_now();
      working_.join();
      worker_.reset();
      stop_server();
    }
    umask(mask_);
    close(control_[0]);
    waitpid(server_, nullptr, 0);
  }

  // A process of its own: what libuv leaves behind in a process (handlers of
  // fork()) closes descriptors of the sandboxes that are made there later.
  void fork_server() {
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control_), 0);
    options_.shard.log.fsync = options_.shard.core.fsync = false;
    options_.events.listening = [this](int, const auto&) {
      (void)!write(control_[1], "l", 1);
    };
    server_ = fork();
    ASSERT_GE(server_, 0);
    if (server_ != 0) {
      close(control_[1]);
      return;
    }
    close(control_[0]);
    for (char go; read(control_[1], &go, 1) == 1;) {
      const char code = static_cast<char>(run_server(options_));
      (void)!write(control_[1], &code, 1);
    }
    _exit(0);
  }
  void start_server() {
    char answer = 0;
    ASSERT_EQ(write(control_[0], "g", 1), 1);
    ASSERT_EQ(read(control_[0], &answer, 1), 1);
    ASSERT_EQ(answer, 'l');
  }
  void stop_server() {
    local().post("/shutdown", "{}");
    char code = 1;
    EXPECT_EQ(read(control_[0], &code, 1), 1);
    EXPECT_EQ(code, 0);
  }

  Json run(const std::string& kind, const std::string& payload = "{}") {
    Client c = local();
    const Reply r = c.post("/v1/jobs",
                           "{\"kind\":\"" + kind +
                               "\",\"max_attempts\":1,"
                               "\"payload\":" +
                               payload + "}",
                           "Prefer: wait=60\r\n");
    EXPECT_EQ(r.status, 200) << r.body;
    return r.json();
  }
  std::string process_of(const Json& job) {
    return job["result"]["process"].get<std::string>();
  }

  const std::vector<MakeFamily> families_ = with_probe();
  std::unique_ptr<sandbox::Spawner> spawner_;
  std::unique_ptr<sandbox::Slot> slot_;
  std::unique_ptr<Worker> worker_;
  std::thread working_;
  int control_[2] = {-1, -1};
  pid_t server_ = -1;
  mode_t mask_ = 022;
};

TEST_F(ProbeTest, EachOfThemGoesTheWholeWayAndIsThereAfterARestart) {
  const std::map<std::string, Json> results = {
      {"probe.box", Json{{"probed", true}}},
      {"probe.warm", Json{{"n", 1}}},
      {"probe.own", Json{{"n", 1}}}};
  std::map<std::string, Json> ended;
  for (const auto& [kind, result] : results) {
    const Json job = run(kind, R"({"n":1})");
    EXPECT_EQ(job["state"], "succeeded") << job;
    EXPECT_EQ(kind == "probe.box" ? job["result"] : job["result"]["payload"],
              result);
    EXPECT_NE(job["isolation"]["level"], nullptr) << job;
    ended[kind] = job;
  }
  EXPECT_EQ(ended["probe.box"]["payload"], Json::parse(R"({"resolved":true})"));
  stop_server();
  start_server();
  for (const auto& [kind, job] : ended) {
    const Json again =
        local().get("/v1/jobs/" + job["id"].get<std::string>()).json();
    EXPECT_EQ(again["state"], "succeeded") << again;
    EXPECT_EQ(again["result"], job["result"]);
    // The worker has found the server again.
    EXPECT_EQ(run(kind)["state"], "succeeded") << kind;
  }
}

TEST_F(ProbeTest, WhatIsWrongIsSaidAtSubmission) {
  Client c = local();
  for (const std::string kind : {"probe.box", "probe.warm", "probe.own"}) {
    const Reply r = c.post(
        "/v1/jobs", "{\"kind\":\"" + kind + "\",\"payload\":{\"wrong\":1}}");
    EXPECT_EQ(r.status, 400) << r.body;
    EXPECT_EQ(r.field(), "payload.wrong");
  }
  const Reply r =
      c.post("/v1/jobs", R"({"kind":"probe.box","payload":{"missing":1}})");
  EXPECT_EQ(r.field(), "payload.missing") << r.body;
}

TEST_F(ProbeTest, GroupsNeverShareAProcess) {
  const std::string warm = process_of(run("probe.warm"));
  EXPECT_EQ(process_of(run("probe.also")), warm) << "one group, one process";
  const std::string own = process_of(run("probe.own"));
  EXPECT_EQ(process_of(run("probe.own")), own);
  EXPECT_NE(process_of(run("probe.warm")), warm)
      << "another group's job found the slot empty";
}

TEST_F(ProbeTest, AKindThatTheGroupDoesNotKnowFails) {
  const std::string before = process_of(run("probe.warm"));
  const Json job = run("probe.unknown");
  EXPECT_EQ(job["state"], "dead") << job;
  EXPECT_EQ(job["error"]["message"], "kind probe.unknown is not served here");
  EXPECT_EQ(process_of(run("probe.warm")), before) << "its process lives on";
}

TEST_F(ProbeTest, AProgramsResultThatIsNoJsonFailsThatJobAlone) {
  const Json job = run("probe.own", R"({"garbage":1})");
  EXPECT_NE(job["state"], "succeeded") << job;
  EXPECT_EQ(job["error"]["message"], "the handler's result is no JSON");
  EXPECT_EQ(run("probe.own")["state"], "succeeded");
}

}  // namespace
}  // namespace machina::test
