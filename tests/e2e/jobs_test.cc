// What a client may do with jobs, on the real product: dedup, retries, delays,
// priorities, dependencies, cancel, unblock by an outside worker, scaling.

#include <signal.h>

#include <algorithm>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class Jobs : public EndToEnd {
 protected:
  // Leases for an outside worker; the first lease or null.
  Json lease(const std::string& worker, const std::string& kind,
             int wait_ms = 5000, int max = 1) {
    Answer a = p().post("/v1/leases", {{"worker", worker},
                                       {"kinds", {kind}},
                                       {"max", max},
                                       {"wait_ms", wait_ms}});
    if (a.status == 204) return Json();
    EXPECT_EQ(a.status, 200) << a.body;
    Json leases = a.json()["leases"];
    return leases.empty() ? Json() : leases[0];
  }
  Answer verb(const Json& lease, const std::string& what,
              const Json& body = Json::object()) {
    return p().post("/v1/leases/" + lease.value("token", "none") + "/" + what,
                    body);
  }
};

TEST_P(Jobs, SameSubmissionTwiceIsOneJob) {
  start_prod();
  Json request = {{"kind", "noop"},
                  {"dedup_key", "order-17"},
                  {"payload", {{"echo", {{"a", 1}, {"b", 2}}}}}};
  std::string id = p().submit(request);
  Answer again = p().post("/v1/jobs", request);
  EXPECT_EQ(again.status, 200) << again.body;
  EXPECT_EQ(again.json()["id"], id);
  EXPECT_EQ(again.json()["duplicate"], true);
  // The same value in another order of members is the same payload.
  again = p().call("POST", "/v1/jobs",
                   R"({"payload":{"echo":{"b":2,"a":1}},"kind":"noop",)"
                   R"("dedup_key":"order-17"})");
  EXPECT_EQ(again.status, 200) << again.body;
  EXPECT_EQ(again.json()["id"], id);
  // Another payload under the key is a mistake, and is told.
  request["payload"]["echo"]["a"] = 3;
  again = p().post("/v1/jobs", request);
  EXPECT_EQ(again.status, 422) << again.body;
  EXPECT_EQ(again.json()["code"], "dedup-mismatch");
  // After its end it is still the same job, and after a restart too.
  p().wait_end(id);
  p().kill_server();
  restart();
  request["payload"]["echo"]["a"] = 1;
  again = p().post("/v1/jobs", request);
  EXPECT_EQ(again.status, 200) << again.body;
  EXPECT_EQ(again.json()["id"], id);
}

TEST_P(Jobs, NoopEchoesAtTheLevelItClaims) {
  start_prod();
  Json job = p().wait_end(
      p().submit({{"kind", "noop"}, {"payload", {{"echo", {{"x", "y"}}}}}}));
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["result"]["echo"]["x"], "y") << job.dump(1);
  EXPECT_GE(job["isolation"].value("level", ""), least_level())
      << job["isolation"].dump(1);
}

TEST_P(Jobs, FailingTwiceIsRetriedWithBackoff) {
  start();
  double begin = now_ms();
  std::string id = p().submit({{"kind", "noop"},
                               {"max_attempts", 4},
                               {"retry_min_ms", 300},
                               {"payload", {{"fail_attempts", 2}}}});
  Json between = p().wait_until(
      id, [](const Json& j) { return j.value("state", "") == "scheduled"; },
      5000);
  EXPECT_EQ(between["state"], "scheduled") << between.dump(1);
  EXPECT_EQ(between["error"]["code"], "exit") << between.dump(1);
  Json job = p().wait_end(id);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["attempt"], 3);
  EXPECT_GE(now_ms() - begin, 300 + 600) << "300 ms, then twice that";
}

TEST_P(Jobs, FailureByVerdictIsNotRetried) {
  start();
  Json job = p().wait_end(
      p().submit({{"kind", "noop"}, {"payload", {{"fail", true}}}}));
  EXPECT_EQ(job["state"], "failed") << job.dump(1);
  EXPECT_EQ(job["attempt"], 1);
  EXPECT_EQ(job["error"]["code"], "verdict");
}

TEST_P(Jobs, CrashingAlwaysEndsDeadAfterItsAttempts) {
  start();
  std::string id = p().submit({{"kind", "noop"},
                               {"max_attempts", 3},
                               {"retry_min_ms", 50},
                               {"payload", {{"crash", true}}}});
  Json job = p().wait_end(id);
  EXPECT_EQ(job["state"], "dead") << job.dump(1);
  EXPECT_EQ(job["attempt"], 3);
  EXPECT_EQ(job["error"]["code"], "signal");
  // The worker that it crashed below serves the next.
  EXPECT_EQ(p().wait_end(p().submit({{"kind", "noop"}}))["state"], "succeeded");
  // Dead is not for ever: an operator may send it again.
  Answer retry = p().post("/v1/jobs/" + id + "/retry", Json::object());
  EXPECT_EQ(retry.status, 200) << retry.body;
  EXPECT_EQ(p().wait_end(id)["state"], "dead");
}

TEST_P(Jobs, DelayedJobWaitsItsTime) {
  start();
  std::string id = p().submit({{"kind", "noop"}, {"delay_ms", 1200}});
  double begin = now_ms();
  EXPECT_EQ(p().job(id)["state"], "scheduled");
  EXPECT_EQ(p().wait_end(id)["state"], "succeeded");
  EXPECT_GE(now_ms() - begin, 1000);
  EXPECT_LT(now_ms() - begin, 5000);
}

TEST_P(Jobs, HigherPriorityIsLeasedFirstThenCommitOrder) {
  start();
  std::vector<std::string> ids;
  for (int priority : {1, 5, 9, 5}) {
    ids.push_back(p().submit({{"kind", "ext.order"}, {"priority", priority}}));
  }
  std::vector<std::string> got;
  for (int i = 0; i < 4; ++i) {
    Json l = lease("w", "ext.order");
    ASSERT_TRUE(l.is_object());
    got.push_back(l["job"]["id"]);
    EXPECT_EQ(verb(l, "complete").status, 200);
  }
  EXPECT_EQ(got, (std::vector<std::string>{ids[2], ids[1], ids[3], ids[0]}));
}

TEST_P(Jobs, DependentWaitsAndIsCancelledWhereItsDependencyFails) {
  start();
  std::string first = p().submit({{"kind", "ext.first"}});
  std::string second = p().submit({{"kind", "noop"}, {"depends_on", {first}}});
  EXPECT_EQ(p().job(second)["state"], "waiting");
  Json l = lease("w", "ext.first");
  ASSERT_TRUE(l.is_object());
  EXPECT_EQ(p().job(second)["state"], "waiting");
  EXPECT_EQ(verb(l, "complete").status, 200);
  EXPECT_EQ(p().wait_end(second)["state"], "succeeded");

  std::string bad =
      p().submit({{"kind", "noop"}, {"payload", {{"fail", true}}}});
  std::string after = p().submit({{"kind", "noop"}, {"depends_on", {bad}}});
  std::string last = p().submit({{"kind", "noop"}, {"depends_on", {after}}});
  for (const std::string& id : {after, last}) {
    Json job = p().wait_end(id);
    EXPECT_EQ(job["state"], "cancelled") << job.dump(1);
    EXPECT_EQ(job["error"]["code"], "dependency") << job.dump(1);
  }
  // Born after the fact.
  std::string late = p().submit({{"kind", "noop"}, {"depends_on", {bad}}});
  EXPECT_EQ(p().job(late)["state"], "cancelled");
  std::string fine = p().submit({{"kind", "noop"}, {"depends_on", {first}}});
  EXPECT_EQ(p().wait_end(fine)["state"], "succeeded");
}

TEST_P(Jobs, CancelEndsAWaitingAndARunningJob) {
  start();
  std::string waiting = p().submit({{"kind", "noop"}, {"delay_ms", 600000}});
  Answer a = p().post("/v1/jobs/" + waiting + "/cancel", Json::object());
  EXPECT_EQ(a.status, 200) << a.body;
  EXPECT_EQ(p().job(waiting)["state"], "cancelled");
  EXPECT_EQ(p().call("POST", "/v1/jobs/" + waiting + "/cancel").status, 200)
      << "again is no error";

  std::string running =
      p().submit({{"kind", "tool.shell"},
                  {"payload", {{"argv", {"/usr/bin/sleep", "120"}}}},
                  {"timeout_ms", 120000}});
  p().wait_state(running, "running");
  double begin = now_ms();
  a = p().post("/v1/jobs/" + running + "/cancel", Json::object());
  EXPECT_EQ(a.status, 200) << a.body;
  Json job = p().wait_end(running, 15000);
  EXPECT_EQ(job["state"], "cancelled") << job.dump(1);
  EXPECT_LT(now_ms() - begin, 10000);
  EXPECT_TRUE(
      eventually([&] { return p().processes_with("120").empty(); }, 3000))
      << "the job's process is still there";

  std::string done = p().submit({{"kind", "noop"}});
  p().wait_end(done);
  a = p().post("/v1/jobs/" + done + "/cancel", Json::object());
  EXPECT_EQ(a.status, 409) << a.body;
  EXPECT_EQ(a.json()["code"], "wrong-state");
}

TEST_P(Jobs, OutsideWorkerBlocksAndAPersonUnblocks) {
  start();
  std::string id =
      p().submit({{"kind", "ext.approve"}, {"payload", {{"amount", 12}}}});
  Json l = lease("human-loop", "ext.approve");
  ASSERT_TRUE(l.is_object());
  EXPECT_EQ(l["job"]["payload"]["amount"], 12) << l.dump(1);
  Answer a = verb(l, "block",
                  {{"reason", "approval"}, {"data", {{"who", "finance"}}}});
  ASSERT_EQ(a.status, 200) << a.body;
  Json job = p().job(id);
  EXPECT_EQ(job["state"], "blocked") << job.dump(1);
  EXPECT_EQ(job["blocked"]["reason"], "approval");
  std::string token = job["blocked"]["token"];
  EXPECT_FALSE(lease("human-loop", "ext.approve", 100).is_object());
  std::string path = "/v1/jobs/" + id + "/unblock";
  a = p().post(
      path,
      {{"token", "0" + token}, {"input", {{"ok", true}}}, {"actor", "nobody"}});
  EXPECT_GE(a.status, 400) << "without the job's token: " << a.body;
  EXPECT_EQ(p().job(id)["state"], "blocked");
  a = p().post(path,
               {{"token", token}, {"input", {{"ok", true}}}, {"actor", "ann"}});
  EXPECT_EQ(a.status, 200) << a.body;
  l = lease("human-loop", "ext.approve");
  ASSERT_TRUE(l.is_object());
  EXPECT_NE(l.dump().find("\"ok\":true"), std::string::npos)
      << "the next lease carries the input: " << l.dump(1);
  EXPECT_EQ(verb(l, "complete", {{"result", {{"paid", 12}}}}).status, 200);
  job = p().job(id);
  EXPECT_EQ(job["state"], "succeeded");
  EXPECT_EQ(job["attempt"], 1) << "unblocking counts no attempt";
  EXPECT_EQ(job["result"]["paid"], 12);
}

TEST_P(Jobs, LateCompletionOfALostLeaseIsRefused) {
  Serve serve;
  serve.workers = 0;
  serve.env["MACHINA_LEASE_MS"] = "1000";
  start(serve);
  std::string id = p().submit({{"kind", "ext.slow"}, {"retry_min_ms", 0}});
  Json late = lease("slow", "ext.slow");
  ASSERT_TRUE(late.is_object());
  Json next = lease("quick", "ext.slow", 10000);
  ASSERT_TRUE(next.is_object()) << p().job(id).dump(1);
  EXPECT_EQ(next["job"]["id"], id);
  EXPECT_NE(next["fence"], late["fence"]);
  Answer refused = verb(late, "complete", {{"result", {{"by", "slow"}}}});
  EXPECT_EQ(refused.status, 409) << refused.body;
  EXPECT_EQ(refused.json()["code"], "stale-lease");
  EXPECT_EQ(p().job(id)["state"], "running");
  Answer done = verb(next, "complete", {{"result", {{"by", "quick"}}}});
  EXPECT_EQ(done.status, 200) << done.body;
  // Its own answer, repeated, is its stored one; the late one stays refused.
  EXPECT_EQ(verb(next, "complete", {{"result", {{"by", "quick"}}}}).status,
            200);
  EXPECT_EQ(verb(late, "complete").status, 409);
  Json job = p().job(id);
  EXPECT_EQ(job["state"], "succeeded");
  EXPECT_EQ(job["result"]["by"], "quick");
  EXPECT_EQ(job["attempt"], 2);
}

TEST_P(Jobs, ReleaseAndFailAsAnOutsideWorkerSays) {
  start();
  std::string id = p().submit({{"kind", "ext.any"}, {"max_attempts", 2}});
  Json l = lease("w", "ext.any");
  ASSERT_TRUE(l.is_object());
  EXPECT_EQ(verb(l, "release").status, 200);
  EXPECT_EQ(p().job(id)["attempt"], 0) << "a release is no attempt";
  l = lease("w", "ext.any");
  ASSERT_TRUE(l.is_object());
  Answer a = verb(l, "fail",
                  {{"code", "upstream"},
                   {"message", "the other side is down"},
                   {"retry_after_ms", 10}});
  EXPECT_EQ(a.status, 200) << a.body;
  l = lease("w", "ext.any");
  ASSERT_TRUE(l.is_object());
  EXPECT_EQ(verb(l, "fail",
                 {{"code", "upstream"}, {"message", "still"}, {"retry", false}})
                .status,
            200);
  Json job = p().job(id);
  EXPECT_EQ(job["state"], "dead");
  EXPECT_EQ(job["error"]["message"], "still");
}

TEST_P(Jobs, WorkersScaleWhileRunning) {
  start();
  auto workers = [&](std::size_t n) {
    return eventually([&] { return p().worker_pids().size() == n; }, 10000);
  };
  EXPECT_TRUE(workers(2)) << p().get("/v1/workers").body;
  Answer a = p().call("PUT", "/v1/workers/scale", R"({"count":5})");
  EXPECT_EQ(a.status, 200) << a.body;
  EXPECT_TRUE(workers(5)) << p().get("/v1/workers").body;
  a = p().call("PUT", "/v1/workers/scale", R"({"count":1})");
  EXPECT_EQ(a.status, 200) << a.body;
  EXPECT_TRUE(workers(1)) << p().get("/v1/workers").body;
  EXPECT_EQ(p().wait_end(p().submit({{"kind", "noop"}}))["state"], "succeeded");
  a = p().call("PUT", "/v1/workers/scale", R"({"count":65})");
  EXPECT_EQ(a.status, 400) << a.body;
}

TEST_P(Jobs, ManyAtOnceWaitAndRunSync) {
  start();
  Answer a = p().post("/v1/jobs", Json::array({{{"kind", "noop"}},
                                               {{"kind", "NOOP"}},
                                               {{"kind", "noop"}}}));
  EXPECT_EQ(a.status, 200) << a.body;
  Json many = a.json();
  EXPECT_EQ(many["accepted"], 2);
  EXPECT_EQ(many["rejected"], 1);
  EXPECT_EQ(many["jobs"][1]["problem"]["field"], "kind") << many.dump(1);
  p().wait_end(many["jobs"][0]["id"]);
  p().wait_end(many["jobs"][2]["id"]);

  a = p().call("POST", "/v1/jobs",
               "{\"kind\":\"noop\"}\n{\"kind\":\n{\"kind\":\"noop\"}\n",
               {"Content-Type: application/x-ndjson"});
  EXPECT_EQ(a.status, 200) << a.body;
  EXPECT_EQ(a.json()["accepted"], 2) << a.body;
  EXPECT_EQ(a.json()["rejected"], 1) << a.body;

  a = p().call("POST", "/v1/jobs", R"({"kind":"noop"})", {"Prefer: wait=10"});
  EXPECT_EQ(a.status, 200) << a.body;
  EXPECT_EQ(a.json()["state"], "succeeded");
  a = p().call("POST", "/v1/jobs", R"({"kind":"ext.never"})",
               {"Prefer: wait=1"});
  EXPECT_EQ(a.status, 202) << a.body;
  a = p().call("POST", "/run_sync", R"({"kind":"noop"})");
  EXPECT_EQ(a.status, 200) << a.body;
  EXPECT_EQ(a.json()["state"], "succeeded");
  a = p().call("POST", "/enqueue", R"({"kind":"noop","request_id":"r1"})");
  EXPECT_EQ(a.status, 200) << a.body;
  EXPECT_EQ(a.json()["ok"], true);
  EXPECT_EQ(a.json()["queued"], true);
  a = p().call("POST", "/enqueue", R"({"kind":"noop","request_id":"r1"})");
  EXPECT_EQ(a.json()["deduplicated"], true) << a.body;
}

TEST_P(Jobs, ListPagesThroughEverything) {
  start();
  std::vector<std::string> ids;
  for (int i = 0; i < 12; ++i) {
    ids.push_back(p().submit({{"kind", i % 2 == 0 ? "noop" : "ext.later"}}));
  }
  for (int i = 0; i < 12; i += 2) p().wait_end(ids[static_cast<size_t>(i)]);
  std::vector<std::string> seen;
  std::string path = "/v1/jobs?limit=5";
  for (int page = 0; page < 20; ++page) {
    Json answer = p().get(path).json();
    ASSERT_TRUE(answer.is_object());
    for (const Json& job : answer["jobs"]) seen.push_back(job["id"]);
    if (!answer.contains("cursor") || !answer["cursor"].is_string()) break;
    path = "/v1/jobs?limit=5&cursor=" + answer["cursor"].get<std::string>();
  }
  std::sort(ids.begin(), ids.end());
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(seen, ids);
  Json ready = p().get("/v1/jobs?state=ready&kind=ext.later").json();
  EXPECT_EQ(ready["jobs"].size(), 6u) << ready.dump(1);
}

MACHINA_BOTH(Jobs);

}  // namespace
}  // namespace machina::e2e
