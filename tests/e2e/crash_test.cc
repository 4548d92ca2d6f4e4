// Processes die, by kill -9 and in order: what was promised is kept.

#include <signal.h>

#include <atomic>
#include <mutex>
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
  std::vector<pid_t> pids = p().worker_pids();
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
  start();
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
  EXPECT_EQ(p().stop_server(15000), 0);
}

// SIGKILL under load, again and again. What a client was told (201, or the
// 200 of a completion) must be there after each restart, and in the end every
// accepted job must have ended exactly as its worker said.
TEST_P(Crash, KillLoopUnderLoadLosesNothingThatWasAnswered) {
  start_prod();
  std::mutex mutex;
  std::vector<std::string> accepted, completed;
  std::atomic<bool> stop{false};
  auto submitter = [&](int lane) {
    for (int i = 0; !stop; ++i) {
      std::string key = std::to_string(lane) + "-" + std::to_string(i);
      Json request = {{"kind", i % 3 == 0 ? "noop" : "ext.load"},
                      {"dedup_key", key},
                      {"payload", {{"echo", {{"key", key}}}}}};
      if (i % 3 != 0) request["payload"] = {{"key", key}};
      std::string id;
      // No answer is no promise: the same key again, until there is one.
      while (!stop && id.empty()) {
        Answer a = p().post("/v1/jobs", request);
        if (a.status == 201 || a.status == 200) id = a.json()["id"];
        if (id.empty()) sleep_ms(10);
      }
      if (id.empty()) break;
      std::lock_guard lock(mutex);
      accepted.push_back(id);
    }
  };
  auto worker = [&] {
    while (!stop) {
      Answer a = p().post("/v1/leases", {{"worker", "outside"},
                                         {"kinds", {"ext.load"}},
                                         {"max", 8},
                                         {"wait_ms", 200}});
      if (a.status != 200) {
        if (a.status != 204) sleep_ms(10);
        continue;
      }
      for (const Json& l : a.json()["leases"]) {
        Answer done = p().post(
            "/v1/leases/" + l["token"].get<std::string>() + "/complete",
            {{"result", {{"key", l["job"]["payload"]["key"]}}}});
        if (done.status != 200) continue;
        std::lock_guard lock(mutex);
        completed.push_back(l["job"]["id"]);
      }
    }
  };
  std::vector<std::thread> threads;
  for (int lane = 0; lane < 3; ++lane) threads.emplace_back(submitter, lane);
  threads.emplace_back(worker);

  std::size_t audited = 0, audited_done = 0;
  const int rounds = 6;
  for (int round = 0; round < rounds; ++round) {
    sleep_ms(700 + 130 * round);
    p().kill_server();
    std::string why;
    if (!p().restart(&why)) {
      stop = true;
      ADD_FAILURE() << "round " << round << ": " << why;
      break;
    }
    std::vector<std::string> told, done;
    {
      std::lock_guard lock(mutex);
      told.assign(accepted.begin() + static_cast<long>(audited),
                  accepted.end());
      done.assign(completed.begin() + static_cast<long>(audited_done),
                  completed.end());
      audited = accepted.size();
      audited_done = completed.size();
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
  // Heal, then everything drains.
  sleep_ms(500);
  stop = true;
  for (auto& t : threads) t.join();
  ASSERT_GT(p().server(), 0);
  ASSERT_GT(accepted.size(), 50u);
  double end = now_ms() + 60000;
  std::size_t ended = 0;
  stop = false;
  std::thread last(worker);
  for (const auto& id : accepted) {
    Json job = p().wait_until(id, is_final, std::max(1, int(end - now_ms())));
    ended += job.is_object() && job["state"] == "succeeded";
    EXPECT_TRUE(job.is_object() && job["state"] == "succeeded")
        << job.dump(1).substr(0, 1500);
    if (HasFailure()) break;
  }
  stop = true;
  last.join();
  EXPECT_EQ(ended, accepted.size());
}

MACHINA_BOTH(Crash);

}  // namespace
}  // namespace machina::e2e
