// Processes die, by kill -9 and in order: what was promised is kept.

#include <signal.h>

#include <atomic>
#include <mutex>
#include <set>
#include <thread>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class Crash : public EndToEnd {
 protected:
  std::string submit_slow(int seconds) {
    return p().submit(
        {{"kind", "test.run"},
         {"payload",
          {{"runner", "pytest"},
           {"files",
            {{"test_slow.py", "import time\ndef test_slow():\n    time.sleep(" +
                                  std::to_string(seconds) + ")\n"}}}}}});
  }
};

TEST_P(Crash, ServerKilledMidRunInterruptsNoJobAndLosesNone) {
  start_prod();
  std::string running = submit_slow(4);
  Json before = p().wait_state(running, "running");
  std::vector<std::string> ids;
  for (int i = 0; i < 20; ++i) {
    ids.push_back(p().submit({{"kind", "noop"},
                              {"delay_ms", i % 2 == 0 ? 0 : 1500},
                              {"payload", {{"echo", {{"i", i}}}}}}));
  }
  std::string waiting =
      p().submit({{"kind", "noop"}, {"depends_on", {running}}});
  std::string outside = p().submit({{"kind", "ext.none"}});
  p().kill_server();
  sleep_ms(500);
  restart();
  Json job = p().job(running);
  ASSERT_TRUE(job.is_object());
  EXPECT_EQ(job["attempt"], 1);
  job = p().wait_end(running);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 1) << "the job ran on: " << job.dump(1);
  EXPECT_EQ(job["worker"], before["worker"]);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Json done = p().wait_end(ids[i]);
    EXPECT_EQ(done["state"], "succeeded") << done.dump(1);
    EXPECT_EQ(done["result"]["echo"]["i"], static_cast<int>(i));
  }
  EXPECT_EQ(p().wait_end(waiting)["state"], "succeeded");
  EXPECT_EQ(p().job(outside)["state"], "ready");
}

TEST_P(Crash, JobThatEndsWhileTheServerIsAwayIsNotLost) {
  start_prod();
  std::string id = submit_slow(1);
  p().wait_state(id, "running");
  p().kill_server();
  sleep_ms(3000);
  restart();
  Json job = p().wait_end(id);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 1);
}

TEST_P(Crash, WorkerKilledItsJobRunsAgainAtOnce) {
  Serve serve;
  serve.workers = 1;
  serve.env["MACHINA_RETRY_MIN_MS"] = "60000";  // at once is not a backoff
  start(serve);
  std::string id = submit_slow(2);
  Json before = p().wait_state(id, "running");
  // The pool begins with its own number of workers, and hears of ours.
  std::vector<pid_t> pids;
  EXPECT_TRUE(eventually([&] { return (pids = p().worker_pids()).size() == 1; },
                         20000));
  ASSERT_EQ(pids.size(), 1u) << p().get("/v1/workers").body;
  sleep_ms(300);
  double begin = now_ms();
  ASSERT_EQ(kill(pids[0], SIGKILL), 0);
  Json again = p().wait_until(
      id, [](const Json& j) { return j.value("attempt", 0) == 2; }, 15000);
  EXPECT_EQ(again["attempt"], 2) << again.dump(1);
  EXPECT_LT(now_ms() - begin, 10000) << "nobody waits out a lease";
  Json job = p().wait_end(id);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 2);
  EXPECT_NE(job["worker"], before["worker"]);
  std::vector<pid_t> now = p().worker_pids();
  ASSERT_EQ(now.size(), 1u);
  EXPECT_NE(now[0], pids[0]);
}

TEST_P(Crash, PoolKilledIsReplacedAndItsJobRunsAgain) {
  Serve serve;
  serve.env["MACHINA_LEASE_MS"] = "3000";  // nobody is left to say "gone"
  start(serve);
  std::string id = submit_slow(2);
  p().wait_state(id, "running");
  std::vector<pid_t> pools = p().processes_with("pool");
  ASSERT_FALSE(pools.empty());
  for (pid_t pid : pools) kill(pid, SIGKILL);
  Json job = p().wait_end(id, 90000);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_GE(job["attempt"].get<int>(), 2);
}

TEST_P(Crash, TermDrainsARunningJobToItsEnd) {
  start_prod();
  std::string running = submit_slow(2);
  p().wait_state(running, "running");
  std::string queued = p().submit({{"kind", "ext.none"}});
  EXPECT_EQ(p().stop_server(20000), 0) << end_of(p().log());
  EXPECT_EQ(p().leftovers(), std::vector<std::string>());
  restart();
  Json job = p().wait_end(running);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 1);
  EXPECT_EQ(p().job(queued)["state"], "ready");
}

TEST_P(Crash, DrainGivesBackWhatDoesNotEndInTime) {
  Serve serve;
  serve.env["MACHINA_DRAIN_MS"] = "1000";
  start(serve);
  std::string id = submit_slow(20);
  p().wait_state(id, "running");
  double begin = now_ms();
  EXPECT_EQ(p().stop_server(20000), 0) << end_of(p().log());
  EXPECT_LT(now_ms() - begin, 1000 + 2000 + 1000);
  EXPECT_EQ(p().leftovers(), std::vector<std::string>());
  serve.workers = 0;
  start(serve);
  Json job = p().job(id);
  EXPECT_EQ(job["state"], "ready") << job.dump(1);
  EXPECT_EQ(job["attempt"], 0) << "a drain costs no attempt";
}

TEST_P(Crash, ShutdownRouteDrainsToo) {
  start();
  Answer a = p().post("/shutdown", {{"mode", "drain"}});
  EXPECT_EQ(a.status / 100, 2) << a.body;
  EXPECT_EQ(p().wait_server(), 0);
}

class KillLoop : public Crash {
 protected:
  // Submits under keys of its own until told to stop. No answer is no promise:
  // the same key again, until there is one.
  void submit_until_stopped(int lane) {
    for (int i = 0; !stop_; ++i) {
      std::string key = std::to_string(lane) + "-" + std::to_string(i);
      Json request = {{"kind", "ext.load"},
                      {"dedup_key", key},
                      {"payload", {{"key", key}}}};
      if (i % 8 == 0) {
        request["kind"] = "noop";
        request["payload"] = {{"echo", {{"key", key}}}};
      }
      std::string id;
      while (!stop_ && id.empty()) {
        Answer a = p().post("/v1/jobs", request);
        if (a.status == 201 || a.status == 200) id = a.json()["id"];
        sleep_ms(12);
      }
      if (id.empty()) return;
      std::lock_guard lock(mutex_);
      accepted_.push_back(id);
    }
  }

  // An outside worker: a completion without an answer is sent again; one that
  // is refused was somebody else's by then.
  void work_until_stopped() {
    while (!stop_) {
      Answer a = p().post("/v1/leases", {{"worker", "outside"},
                                         {"kinds", {"ext.load"}},
                                         {"max", 32},
                                         {"wait_ms", 200}});
      if (a.status != 200) {
        if (a.status != 204) sleep_ms(10);
        continue;
      }
      std::map<std::string, std::string> id_of;
      Json items = Json::array();
      const Json granted = a.json();
      for (const Json& l : granted["leases"]) {
        id_of[l["token"]] = l["job"]["id"];
        items.push_back({{"token", l["token"]},
                         {"result", {{"key", l["job"]["payload"]["key"]}}}});
      }
      Answer done;
      while (!stop_ && done.status != 200) {
        done = p().post("/v1/leases/complete", {{"items", items}});
        if (done.status != 200) sleep_ms(10);
      }
      if (done.status != 200) return;
      const Json ended = done.json();
      std::lock_guard lock(mutex_);
      for (const Json& item : ended["items"]) {
        if (item.value("state", "") == "succeeded") {
          completed_.push_back(id_of[item["token"]]);
        }
      }
    }
  }

  // What was answered since the last audit is there.
  void audit(int round) {
    std::vector<std::string> told, done;
    {
      std::lock_guard lock(mutex_);
      told.assign(accepted_.begin() + static_cast<long>(audited_),
                  accepted_.end());
      done.assign(completed_.begin() + static_cast<long>(audited_done_),
                  completed_.end());
      audited_ = accepted_.size();
      audited_done_ = completed_.size();
    }
    int lost = 0, undone = 0;
    for (const auto& id : told) lost += p().get("/v1/jobs/" + id).status != 200;
    for (const auto& id : done) {
      Json job = p().job(id);
      undone += !job.is_object() || job["state"] != "succeeded";
    }
    EXPECT_EQ(lost, 0) << "of " << told.size() << " answered, round " << round;
    EXPECT_EQ(undone, 0) << "of " << done.size() << " ended, round " << round;
  }

  void stop() {
    stop_ = true;
    for (auto& t : threads_) t.join();
    threads_.clear();
  }
  void TearDown() override {
    stop();
    Crash::TearDown();
  }

  std::vector<std::thread> threads_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::vector<std::string> accepted_, completed_;
  std::size_t audited_ = 0, audited_done_ = 0;
};

// SIGKILL under load, again and again. What a client was told (201, or a
// completion's 200) must be there after each restart, and in the end every
// accepted job must have ended as its worker said.
TEST_P(KillLoop, UnderLoadLosesNothingThatWasAnswered) {
  start_prod(2, {{"MACHINA_LEASE_MS", "2000"}, {"MACHINA_DRAIN_MS", "3000"}});
  for (int lane = 0; lane < 3; ++lane) {
    threads_.emplace_back([this, lane] { submit_until_stopped(lane); });
  }
  threads_.emplace_back([this] { work_until_stopped(); });
  const int rounds = 7;
  for (int round = 0; round < rounds; ++round) {
    sleep_ms(500 + 130 * round);
    p().kill_server();
    restart();
    audit(round);
  }
  stop();
  RecordProperty("accepted", static_cast<int>(accepted_.size()));
  RecordProperty("completed", static_cast<int>(completed_.size()));
  ASSERT_GT(accepted_.size(), 200u);
  ASSERT_GT(completed_.size(), 100u);
  // Healed, all of it drains.
  stop_ = false;
  threads_.emplace_back([this] { work_until_stopped(); });
  double end = now_ms() + 60000;
  for (const auto& id : accepted_) {
    Json job = p().wait_until(id, is_final, std::max(1, int(end - now_ms())));
    ASSERT_TRUE(job.is_object()) << id;
    ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 1500);
    const Json& said =
        job["kind"] == "noop" ? job["result"]["echo"] : job["result"];
    ASSERT_EQ(said["key"].get<std::string>(),
              job["dedup_key"].get<std::string>())
        << job.dump(1).substr(0, 1500);
  }
  std::set<std::string> distinct(accepted_.begin(), accepted_.end());
  EXPECT_EQ(distinct.size(), accepted_.size()) << "one key, one job";
}

MACHINA_BOTH(Crash);
MACHINA_BOTH(KillLoop);

}  // namespace
}  // namespace machina::e2e
