// Each route's ways, over real sockets, on a real loop.

#include <unistd.h>

#include "server/api/service.h"
#include "server/api/store.h"
#include "server/http/connection.h"
#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

class JobRoutes : public ServerTest {
 protected:
  void SetUp() override { start(); }
};

TEST_F(JobRoutes, SubmittedJobIsShownWhole) {
  Client c = tcp();
  Reply r = c.post(
      "/v1/jobs",
      R"({"kind":"ext.a","payload":{"b":1, "a":[ 1.50 ]},"queue":"q1",)"
      R"("priority":9,"labels":{"team":"x"},"max_attempts":2,)"
      R"("dedup_key":"k1","timeout_ms":77})",
      "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
      "X-Request-Id: abc-1\r\n");
  ASSERT_EQ(r.status, 201) << r.body;
  Json job = r.json();
  std::string id = job["id"];
  EXPECT_EQ(r.headers["location"], "/v1/jobs/" + id);
  EXPECT_EQ(r.headers["x-request-id"], "abc-1");
  EXPECT_EQ(r.headers["content-type"], "application/json");
  EXPECT_EQ(job["kind"], "ext.a");
  EXPECT_EQ(job["queue"], "q1");
  EXPECT_EQ(job["state"], "ready");
  EXPECT_EQ(job["priority"], 9);
  EXPECT_EQ(job["max_attempts"], 2);
  EXPECT_EQ(job["attempt"], 0);
  EXPECT_EQ(job["labels"]["team"], "x");
  EXPECT_EQ(job["dedup_key"], "k1");
  EXPECT_EQ(job["durability"], "fsync");
  EXPECT_EQ(job["timeout_ms"], 77);
  EXPECT_EQ(job["duplicate"], false);
  EXPECT_EQ(job["request_id"], "abc-1");
  EXPECT_TRUE(job["error"].is_null());
  EXPECT_TRUE(job["result"].is_null());
  EXPECT_TRUE(job["finished_at"].is_null());
  EXPECT_EQ(job["created_at"].get<std::string>().size(), 24u);
  EXPECT_EQ(job["traceparent"].get<std::string>().substr(0, 5), "00-0a");
  // The payload is kept byte for byte.
  EXPECT_NE(r.body.find(R"("payload":{"b":1, "a":[ 1.50 ]})"),
            std::string::npos);
  Reply again = c.get("/v1/jobs/" + id);
  EXPECT_EQ(again.status, 200);
  EXPECT_EQ(again.json(), job);
}

TEST_F(JobRoutes, DefaultsAreFilledIn) {
  Client c = tcp();
  Reply r = c.post("/v1/jobs", R"({"kind":"noop"})");
  ASSERT_EQ(r.status, 201);
  EXPECT_EQ(r.headers["x-request-id"].size(), 16u);
  NewJob job = control_.last_job();
  EXPECT_EQ(job.queue, "default");
  EXPECT_EQ(job.tenant, "default");
  EXPECT_EQ(job.payload, "{}");
  EXPECT_EQ(job.max_attempts, 5);
  EXPECT_EQ(job.retry_min_ms, 1000);
  EXPECT_EQ(job.timeout_ms, 4321);  // the kind's
  EXPECT_EQ(job.keep_result_ms, 86'400'000);
  EXPECT_EQ(job.run_at_ms, 0);
}

TEST_F(JobRoutes, EachBadMemberIsNamedWithItsBound) {
  Client c = tcp();
  struct Case {
    const char* body;
    const char* code;
    const char* field;
    const char* detail;
  } const cases[] = {
      {R"({})", "bad-request", "kind", "missing"},
      {R"({"kind":"Noop"})", "bad-request", "kind", "Noop"},
      {R"({"kind":"a..b"})", "bad-request", "kind", "a..b"},
      {R"({"kind":7})", "bad-request", "kind", "a number"},
      {R"({"kind":"a","x":1})", "unknown-field", "x", "no such"},
      {R"({"kind":"a","payload":[]})", "bad-request", "payload", "an array"},
      {R"({"kind":"a","payload":null})", "bad-request", "payload", "null"},
      {R"({"kind":"a","kind":"a"})", "unknown-field", "kind", "twice"},
      {R"({"kind":"a","payload":{"z":{"y":1,"y":2}}})", "unknown-field", "y",
       "twice"},
      {R"({"kind":"a","priority":10})", "bad-request", "priority", "0..9"},
      {R"({"kind":"a","priority":1.5})", "bad-request", "priority", "1.5"},
      {R"({"kind":"a","priority":"1"})", "bad-request", "priority", "string"},
      {R"({"kind":"a","max_attempts":0})", "bad-request", "max_attempts",
       "1..1000"},
      {R"({"kind":"a","delay_ms":-1})", "bad-request", "delay_ms", "0.."},
      {R"({"kind":"a","run_at":"tomorrow"})", "bad-request", "run_at",
       "tomorrow"},
      {R"({"kind":"a","run_at":"2026-01-01T00:00:00Z","delay_ms":1})",
       "bad-request", "delay_ms", "exclude"},
      {R"({"kind":"a","dedup_key":""})", "bad-request", "dedup_key", "empty"},
      {R"({"kind":"a","dedup_key":"a","request_id":"b"})", "bad-request",
       "request_id", "exclude"},
      {R"({"kind":"a","retry_min_ms":5000,"retry_max_ms":10})", "bad-request",
       "retry_max_ms", "5000"},
      {R"({"kind":"a","queue":"a b"})", "bad-request", "queue", "a b"},
      {R"({"kind":"a","depends_on":["x"]})", "bad-request", "depends_on", "no"},
      {R"({"kind":"a","labels":{"k":1}})", "bad-request", "labels.k",
       "a number"},
      {R"({"kind":"a","labels":{"a b":"c"}})", "bad-request", "labels", "a b"},
      {R"({"kind":"a","sandbox":{"min_level":"L9"}})", "bad-request",
       "sandbox.min_level", "L0 to L4"},
      {R"({"kind":"a","sandbox":{"pids":0}})", "bad-request", "sandbox.pids",
       "1.."},
      {R"({"kind":"a","sandbox":{"x":0}})", "unknown-field", "sandbox.x", ""},
      {R"({"kind":"a","sandbox":{"profile":"net"}})", "not-implemented",
       "sandbox.profile", "egress"},
      {R"({"kind":"a","callback_url":"http://x"})", "not-implemented",
       "callback_url", ""},
      {R"({"kind":"a","concurrency_key":""})", "bad-request", "concurrency_key",
       "empty"},
      {R"({"kind":"a","concurrency_key":7})", "bad-request", "concurrency_key",
       "a number"},
      {R"({"kind":"a","concurrency_limit":2})", "bad-request",
       "concurrency_limit", "concurrency_key"},
      {R"({"kind":"a","concurrency_key":"k","concurrency_limit":0})",
       "bad-request", "concurrency_limit", "1..10000"},
      {R"({"kind":"a","concurrency_key":"k","concurrency_limit":10001})",
       "bad-request", "concurrency_limit", "10001"},
      {R"({"kind":"a","concurrency_key":"k","concurrency_limit":"2"})",
       "bad-request", "concurrency_limit", "a string"},
      {R"({"kind":"takes.turns","concurrency_key":"k"})", "bad-request",
       "concurrency_key", "one of their own"},
      {R"({"kind":"noop","payload":{"bad":1}})", "invalid-payload",
       "payload.bad", "not a member"},
      {R"("x")", "bad-request", "", "object"},
      {R"({"kind":"a",})", "malformed-json", "", "byte"},
      {"", "malformed-json", "", ""},
  };
  for (const Case& one : cases) {
    Reply r = c.post("/v1/jobs", one.body);
    int expected = std::string(one.code) == "not-implemented" ? 501 : 400;
    EXPECT_EQ(r.status, expected) << one.body << r.body;
    EXPECT_EQ(r.headers["content-type"], "application/problem+json");
    Json p = r.json();
    EXPECT_EQ(p.value("code", ""), one.code) << one.body << r.body;
    EXPECT_EQ(p.value("field", ""), one.field) << one.body << r.body;
    EXPECT_EQ(p.value("type", ""), "/problems/" + std::string(one.code));
    EXPECT_EQ(p.value("status", 0), expected);
    if (std::string(one.field) != "depends_on") {
      EXPECT_NE(p.value("detail", "").find(one.detail), std::string::npos)
          << one.body << r.body;
    }
  }
  EXPECT_EQ(c.get("/v1/jobs").json()["jobs"].size(), 0u);  // nothing half done
}

TEST_F(JobRoutes, PayloadHasItsBound) {
  Client c = tcp();
  std::string most(kPayloadBytesMax - 8, 'x');
  EXPECT_EQ(
      c.post("/v1/jobs", R"({"kind":"a","payload":{"x":")" + most + R"("}})")
          .status,
      201);
  Reply r =
      c.post("/v1/jobs", R"({"kind":"a","payload":{"x":")" + most + R"(y"}})");
  EXPECT_EQ(r.status, 413);
  EXPECT_EQ(r.field(), "payload");
}

TEST_F(JobRoutes, OversizeBodyIsAnsweredThenTheRestDropped) {
  Client c = tcp();
  c.send(
      "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n"
      "\r\n");
  std::string mb(1 << 20, 'x');
  for (int i = 0; i < 2; ++i) c.send(mb);
  Reply r = c.reply();
  EXPECT_EQ(r.status, 413);
  EXPECT_EQ(r.code(), "too-large");
  EXPECT_EQ(r.headers["connection"], "close");
  EXPECT_TRUE(c.at_end());
}

TEST_F(JobRoutes, SameKeyIsOneJob) {
  Client c = tcp();
  const char* body = R"({"kind":"a","payload":{"p":1,"q":2},"dedup_key":"k"})";
  Reply first = c.post("/v1/jobs", body);
  Reply second = c.post(
      "/v1/jobs", R"({"dedup_key":"k","payload":{"q":2, "p":1},"kind":"a"})");
  EXPECT_EQ(first.status, 201);
  EXPECT_EQ(second.status, 200);
  EXPECT_EQ(second.json()["duplicate"], true);
  EXPECT_EQ(second.json()["id"], first.json()["id"]);
  Reply other = c.post("/v1/jobs", R"({"kind":"a","payload":{"p":2},)"
                                   R"("dedup_key":"k"})");
  EXPECT_EQ(other.status, 422);
  EXPECT_EQ(other.code(), "dedup-mismatch");
  // By header; two keys that differ are a mistake.
  Reply third = c.post("/v1/jobs", R"({"kind":"a"})", "Idempotency-Key: h\r\n");
  Reply fourth =
      c.post("/v1/jobs", R"({"kind":"a"})", "Idempotency-Key: h\r\n");
  EXPECT_EQ(third.status, 201);
  EXPECT_EQ(fourth.status, 200);
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"a","dedup_key":"own"})",
                   "Idempotency-Key: h\r\n")
                .status,
            400);
}

TEST_F(JobRoutes, ArraysAndLinesReportEachJob) {
  Client c = tcp();
  Reply r = c.post("/v1/jobs", R"([{"kind":"a"},{"kind":"B"},)"
                               R"({"kind":"a","queue":"full"}])");
  ASSERT_EQ(r.status, 200) << r.body;
  Json j = r.json();
  EXPECT_EQ(j["accepted"], 1);
  EXPECT_EQ(j["rejected"], 2);
  EXPECT_EQ(j["jobs"][0]["index"], 0);
  EXPECT_EQ(j["jobs"][0]["state"], "ready");
  EXPECT_EQ(j["jobs"][1]["problem"]["field"], "kind");
  EXPECT_EQ(j["jobs"][1]["problem"]["index"], 1);
  EXPECT_EQ(j["jobs"][2]["problem"]["code"], "queue-full");

  r = c.post("/v1/jobs",
             "{\"kind\":\"a\",\"dedup_key\":\"d\"}\n"
             "{nonsense\n\n"
             "{\"kind\":\"a\",\"dedup_key\":\"d\"}\r\n"
             "{\"kind\":\"a\"}",
             "Content-Type: application/x-ndjson\r\n");
  ASSERT_EQ(r.status, 200) << r.body;
  j = r.json();
  EXPECT_EQ(j["accepted"], 2);
  EXPECT_EQ(j["duplicates"], 1);
  EXPECT_EQ(j["rejected"], 1);
  EXPECT_EQ(j["jobs"][1]["problem"]["code"], "malformed-json");
  EXPECT_EQ(j["jobs"][2]["duplicate"], true);
  EXPECT_EQ(j["jobs"][2]["id"], j["jobs"][0]["id"]);

  EXPECT_EQ(c.post("/v1/jobs", "[{\"kind\":\"a\"},").status, 400);
  EXPECT_EQ(c.post("/v1/jobs", "[]").json()["accepted"], 0);
  std::string many = "[";
  for (int i = 0; i <= kBatchMax; ++i) many += i ? ",{}" : "{}";
  r = c.post("/v1/jobs", many + "]");
  EXPECT_EQ(r.status, 413);
}

TEST_F(JobRoutes, WaitEndsWithTheJobOrTheTime) {
  Client c = tcp(), w = local();
  c.start("POST", "/v1/jobs", R"({"kind":"a"})", "Prefer: wait=20\r\n");
  Reply lease =
      w.post("/v1/leases", R"({"worker":"w","kinds":["a"],"wait_ms":5000})");
  ASSERT_EQ(lease.status, 200) << lease.body;
  std::string token = lease.json()["leases"][0]["token"];
  EXPECT_TRUE(c.quiet(50));
  EXPECT_EQ(w.post("/v1/leases/" + token + "/complete", R"({"result":{"x":1}})")
                .status,
            200);
  Reply r = c.reply();
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.headers["preference-applied"], "wait=20");
  EXPECT_EQ(r.json()["state"], "succeeded");
  EXPECT_EQ(r.json()["result"]["x"], 1);

  r = c.post("/v1/jobs", R"({"kind":"b"})", "Prefer: wait=1\r\n");
  EXPECT_EQ(r.status, 202);
  r = c.call("GET", "/v1/jobs/" + r.json()["id"].get<std::string>(), {},
             "Prefer: wait=1\r\n");
  EXPECT_EQ(r.status, 202);
  EXPECT_EQ(r.headers["preference-applied"], "wait=1");
}

TEST(Preference, AWaitIsAWholeNumberOfSecondsWithinItsBound) {
  EXPECT_EQ(preferred_wait("wait=5"), 5);
  EXPECT_EQ(preferred_wait("respond-async, WAIT=7 "), 7);
  EXPECT_EQ(preferred_wait("wait=0"), 0);
  for (const char* huge : {"wait=100000", "wait=99999999999999999999"}) {
    EXPECT_EQ(preferred_wait(huge), kWaitSecondsMax) << huge;
  }
  for (const char* none :
       {"", "wait", "wait=", "wait=x", "wait=5s", "wait=-1", "wait=+1"}) {
    EXPECT_EQ(preferred_wait(none), -1) << none;
  }
}

TEST_F(JobRoutes, ListPagesByLink) {
  Client c = tcp();
  for (int i = 0; i < 5; ++i) c.post("/v1/jobs", R"({"kind":"a"})");
  Reply r = c.get("/v1/jobs?state=ready,running&limit=2");
  ASSERT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["jobs"].size(), 2u);
  EXPECT_FALSE(r.json()["jobs"][0].contains("payload"));
  EXPECT_FALSE(r.json()["jobs"][0].contains("result"));
  EXPECT_EQ(r.headers["link"],
            "</v1/jobs?state=ready,running&limit=2&cursor=2>; rel=\"next\"");
  r = c.get("/v1/jobs?limit=2&cursor=4");
  EXPECT_EQ(r.json()["jobs"].size(), 1u);
  EXPECT_TRUE(r.json()["cursor"].is_null());
  EXPECT_EQ(r.headers.count("link"), 0u);
  for (const char* bad :
       {"limit=0", "limit=1001", "limit=x", "state=nice", "since=now", "kind=A",
        "nope=1", "queue=%zz", "cursor=bad"}) {
    Reply p = c.get(std::string("/v1/jobs?") + bad);
    EXPECT_EQ(p.status, 400) << bad << p.body;
  }
  EXPECT_EQ(c.get("/v1/jobs?q=x").status, 501);
  EXPECT_EQ(c.get("/v1/jobs?label.a=b").status, 501);
  EXPECT_EQ(c.get("/v1/jobs?label.a=b&state=failed").status, 200);
}

TEST_F(JobRoutes, CancelRetryUnblock) {
  Client c = tcp();
  std::string id = c.post("/v1/jobs", R"({"kind":"a"})").json()["id"];
  std::string path = "/v1/jobs/" + id;
  EXPECT_EQ(c.post(path + "/retry", "").code(), "wrong-state");
  EXPECT_EQ(c.post(path + "/cancel", R"({"why":1})").code(), "unknown-field");
  Reply r = c.post(path + "/cancel", "");
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.json()["state"], "cancelled");
  EXPECT_EQ(r.json()["error"]["code"], "cancelled");
  EXPECT_EQ(c.post(path + "/cancel", "{}").status, 200);
  r = c.post(path + "/retry", "{}");
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.json()["state"], "ready");
  EXPECT_TRUE(r.json().contains("payload"));

  r = c.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  std::string token = r.json()["leases"][0]["token"];
  r = c.post("/v1/leases/" + token + "/block",
             R"({"reason":"approval","data":{"d":1}})");
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["blocked"]["reason"], "approval");
  std::string secret = r.json()["blocked"]["token"];
  EXPECT_EQ(c.post(path + "/unblock", "{}").field(), "token");
  EXPECT_EQ(c.post(path + "/unblock", R"({"token":"no"})").code(),
            "wrong-token");
  r = c.post(path + "/unblock", R"({"token":")" + secret +
                                    R"(","input":{"ok":true},"actor":"me"})");
  EXPECT_EQ(r.status, 200) << r.body;
  r = c.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  EXPECT_EQ(r.json()["leases"][0]["job"]["input"]["ok"], true);
}

TEST_F(JobRoutes, UnknownIdsOfAnyFormAre404) {
  Client c = tcp();
  for (const char* id :
       {"x", "00000000-0000-7000-8000-000000000000",
        "00000000-0000-7000-8000-00000000000G", "..", "%2e%2e"}) {
    for (const char* verb : {"", "/logs", "/artifacts", "/artifacts/a"}) {
      Reply r = c.get("/v1/jobs/" + std::string(id) + verb);
      EXPECT_EQ(r.status, 404) << id << verb << r.body;
    }
    for (const char* verb : {"/cancel", "/retry"}) {
      EXPECT_EQ(c.post("/v1/jobs/" + std::string(id) + verb, "").status, 404);
    }
  }
}

TEST_F(JobRoutes, EnqueueHasItsOwnForm) {
  Client c = tcp();
  Reply r = c.post("/enqueue", R"({"kind":"a","request_id":"r"})");
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.json()["ok"], true);
  EXPECT_EQ(r.json()["queued"], true);
  Reply again = c.post("/enqueue", R"({"kind":"a","request_id":"r"})");
  EXPECT_EQ(again.json()["deduplicated"], true);
  EXPECT_EQ(again.json()["id"], r.json()["id"]);
  r = c.post("/enqueue", R"({"kind":"a","zzz":1})");
  EXPECT_EQ(r.status, 400);
  EXPECT_EQ(r.json()["ok"], false);
  EXPECT_NE(r.json()["error"].get<std::string>().find("zzz"),
            std::string::npos);
}

TEST_F(JobRoutes, RunSyncWaits) {
  Client c = tcp(), w = local();
  c.start("POST", "/run_sync", R"({"kind":"a"})");
  Reply lease =
      w.post("/v1/leases", R"({"worker":"w","kinds":["a"],"wait_ms":5000})");
  std::string token = lease.json()["leases"][0]["token"];
  w.post("/v1/leases/" + token + "/complete", R"({"verdict":"fail"})");
  Reply r = c.reply();
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.json()["state"], "failed");
  EXPECT_EQ(r.json()["error"]["code"], "verdict");
}

TEST_F(JobRoutes, F22_WhatAPageSendsIsRefusedInEveryForm) {
  const std::string body = "Content-Length: 12\r\n\r\n{\"kind\":\"a\"}";
  for (const char* head :
       {"POST /v1/jobs HTTP/1.0\r\nOrigin: http://evil.com\r\n",
        "POST /v1/jobs HTTP/1.0\r\nOrigin:\r\n",
        "POST /v1/jobs HTTP/1.0\r\nHost:\r\nOrigin: null\r\n",
        "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nOrigin:\r\n",
        "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n",
        "POST /v1/jobs HTTP/1.0\r\nHost: evil.com\r\n"}) {
    Client c = tcp();
    c.send(head + body);
    EXPECT_EQ(c.reply().status, 403) << head;
  }
  Client c = tcp();
  c.send("POST /v1/jobs HTTP/1.0\r\n" + body);
  EXPECT_EQ(c.reply().status, 201);
}

TEST_F(JobRoutes, F22_AParameterTwiceIsRefused) {
  Client c = tcp();
  const std::string id = c.post("/v1/jobs", R"({"kind":"a"})").json()["id"];
  for (const std::string& path :
       {std::string("/v1/jobs?limit=1&limit=2"),
        std::string("/v1/jobs?kind=a&%6bind=a"),
        "/v1/jobs/" + id + "/logs?attempt=1&attempt=9",
        "/v1/jobs/" + id + "?x=1&x=1",
        std::string("/v1/patches?limit=1&limit=1"),
        std::string("/stats?a&a")}) {
    Reply r = c.get(path);
    EXPECT_EQ(r.status, 400) << path;
    EXPECT_NE(r.body.find("twice"), std::string::npos) << r.body;
  }
  EXPECT_EQ(
      c.post("/v1/leases/" + leased_token(c) + "/log?offset=0&offset=0", "x")
          .status,
      400);
}

TEST_F(JobRoutes, F11_AnEmptyIdempotencyKeyIsRefused) {
  Client c = tcp();
  for (const char* header : {"Idempotency-Key:", "Idempotency-Key: \t "}) {
    for (const char* body : {R"({"kind":"a"})", R"([{"kind":"a"}])"}) {
      Reply r = c.post("/v1/jobs", body, std::string(header) + "\r\n");
      EXPECT_EQ(r.status, 400) << r.body;
      EXPECT_NE(r.body.find("Idempotency-Key: it "), std::string::npos)
          << r.body;
    }
  }
}

TEST_F(JobRoutes, F22_AnInvalidTraceparentIsDropped) {
  Client c = tcp();
  const std::string id(32, '4'), parent(16, '7'), zero(32, '0');
  auto kept = [&](const std::string& text) {
    return c
        .post("/v1/jobs", R"({"kind":"a"})", "traceparent: " + text + "\r\n")
        .json()["traceparent"];
  };
  const std::string good = "00-" + id + "-" + parent + "-01";
  EXPECT_EQ(kept(good), good);
  // A version to come may have more, which is not kept.
  const std::string next = "01" + good.substr(2);
  EXPECT_EQ(kept(next), next);
  EXPECT_EQ(kept(next + "-what-comes"), next);
  EXPECT_TRUE(kept(next + "x").is_null());
  EXPECT_TRUE(kept(good + "-x").is_null());
  for (const std::string& bad :
       {"00-" + zero + "-" + parent + "-01",
        "00-" + id + "-" + zero.substr(16) + "-01",
        "ff-" + id + "-" + parent + "-01", "00-" + id + "-" + parent + "-1",
        "00-" + id + "-" + parent + "-011", "00-" + id.substr(1) + "-" + parent,
        "00-" + id + "-" + parent.substr(1) + "A-01", std::string("00-")}) {
    EXPECT_TRUE(kept(bad).is_null()) << bad;
  }
}

TEST_F(JobRoutes, F28_AnAnswerSaysWhetherAnybodyServesTheKind) {
  Client c = tcp();
  Json job = c.post("/v1/jobs", R"({"kind":"ext.a"})").json();
  EXPECT_EQ(job["served"], false);
  const std::string path = "/v1/jobs/" + std::string(job["id"]);
  Json bulk = c.post("/v1/jobs", R"([{"kind":"ext.a"}])").json();
  EXPECT_EQ(bulk["jobs"][0]["served"], false);
  EXPECT_EQ(c.get("/stats").json()["unserved"],
            Json::parse(R"([{"kind":"ext.a","ready":2}])"));
  Client w = tcp();
  w.start("POST", "/v1/leases",
          R"({"worker":"w","kinds":["ext.b","ext.*"],"wait_ms":1})");
  EXPECT_EQ(w.reply().status, 200);
  EXPECT_EQ(c.get(path).json()["served"], true);
  EXPECT_EQ(c.get("/stats").json()["unserved"], Json::array());
  EXPECT_EQ(c.get("/v1/jobs").json()["jobs"][0]["served"], true);
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"other"})").json()["served"], false);
}

TEST_F(JobRoutes, F28_AWrongValueIsToldWhatIsRight) {
  Client c = tcp();
  Reply r = c.get("/v1/jobs?state=failed,no.such");
  EXPECT_EQ(r.status, 400);
  for (const char* state :
       {"waiting", "scheduled", "ready", "running", "blocked", "succeeded",
        "failed", "cancelled", "dead"}) {
    EXPECT_NE(r.body.find(state), std::string::npos) << state;
  }
  r = c.post("/v1/leases", R"({"worker":"w","kinds":["a"],"wait_ms":99999})");
  EXPECT_EQ(r.status, 400);
  EXPECT_NE(r.body.find("0..30000 ms"), std::string::npos) << r.body;
}

TEST_F(JobRoutes, PathsAndMethods) {
  Client c = tcp();
  EXPECT_EQ(c.get("/nope").status, 404);
  EXPECT_EQ(c.get("/v1/jobs/").status, 404);
  Reply r = c.call("PUT", "/v1/jobs", "{}");
  EXPECT_EQ(r.status, 405);
  EXPECT_EQ(r.headers["allow"], "POST, GET, HEAD");
  r = c.call("DELETE", "/v1/leases");
  EXPECT_EQ(r.status, 405);
  EXPECT_EQ(r.headers["allow"], "POST");
  for (const char* path :
       {"/openapi.json", "/v1/queues", "/v1/events", "/v1/schedules/x"}) {
    r = c.get(path);
    EXPECT_EQ(r.status, 501) << path;
    EXPECT_EQ(r.code(), "not-implemented");
  }
  EXPECT_EQ(c.post("/v1/jobs/cancel", R"({"filter":{}})").status, 501);
  EXPECT_EQ(c.post("/v1/queues/a/pause", "").status, 501);
}

TEST_F(JobRoutes, PipelinedRequestsAreAnsweredInOrder) {
  Client c = tcp();
  std::string text;
  for (int i = 0; i < 200; ++i) {
    std::string body =
        R"({"kind":"a","dedup_key":"p)" + std::to_string(i) + R"("})";
    text += "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: " +
            std::to_string(body.size()) + "\r\n\r\n" + body;
  }
  c.send(text);
  for (int i = 0; i < 200; ++i) {
    Reply r = c.reply();
    ASSERT_EQ(r.status, 201) << i;
    EXPECT_EQ(r.json()["dedup_key"], "p" + std::to_string(i));
  }
}

TEST_F(JobRoutes, ACancelIsDecidedBeforeWhatItsConnectionSendsNext) {
  Client c = tcp();
  const std::string job =
      "/v1/jobs/" +
      c.post("/v1/jobs", R"({"kind":"a"})").json()["id"].get<std::string>();
  c.send(
      "POST " + job +
      "/cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\nGET " +
      job + " HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(c.reply().json()["state"], "cancelled");
  EXPECT_EQ(c.reply().json()["state"], "cancelled");
}

TEST_F(JobRoutes, NothingIsAnsweredBeforeTheShardSaysSo) {
  control_.hold = true;
  Client c = tcp();
  c.start("POST", "/v1/jobs", R"({"kind":"a"})");
  EXPECT_TRUE(c.quiet(200));
  control_.hold = false;
  control_.poke();
  EXPECT_EQ(c.reply().status, 201);
}

TEST_F(JobRoutes, ShardRefusalsHaveTheirStatus) {
  struct {
    Response::Status status;
    int http;
    const char* code;
    bool retry;
  } const cases[] = {
      {Response::Status::disk_low, 507, "disk-low", true},
      {Response::Status::lagging, 503, "lagging", true},
      {Response::Status::draining, 503, "draining", true},
      {Response::Status::failed, 500, "internal", false},
  };
  Client c = tcp();
  for (const auto& one : cases) {
    control_.status = static_cast<int>(one.status);
    Reply r = c.post("/v1/jobs", R"({"kind":"a"})");
    EXPECT_EQ(r.status, one.http);
    EXPECT_EQ(r.code(), one.code);
    EXPECT_EQ(r.headers.count("retry-after") == 1, one.retry);
  }
  control_.status = 0;
  Reply full = c.post("/v1/jobs", R"({"kind":"a","queue":"full"})");
  EXPECT_EQ(full.status, 429);
  EXPECT_EQ(full.headers["retry-after"], "1");
}

class Ceilings : public ServerTest {
 protected:
  void SetUp() override {
    options_.kinds_allowed = {"test.*", "noop"};
    options_.max_memory_mb = 100;
    options_.min_level = 3;
    start();
  }
};

TEST_F(Ceilings, KindsOutsideTheListAreRefused) {
  Client c = tcp();
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"test.run"})").status, 201);
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"noop"})").status, 201);
  Reply r = c.post("/v1/jobs", R"({"kind":"tool.shell"})");
  EXPECT_EQ(r.status, 400);
  EXPECT_EQ(r.code(), "kind-not-allowed");
  EXPECT_NE(r.body.find("test.*,noop"), std::string::npos);
}

TEST_F(Ceilings, SandboxStaysBelowTheOperatorsMaximum) {
  Client c = tcp();
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"noop","sandbox":{"memory_mb":100}})")
                .status,
            201);
  Reply r =
      c.post("/v1/jobs", R"({"kind":"noop","sandbox":{"memory_mb":101}})");
  EXPECT_EQ(r.status, 400);
  EXPECT_EQ(r.field(), "sandbox.memory_mb");
  EXPECT_NE(r.body.find("1..100"), std::string::npos);
}

TEST_F(Ceilings, BuiltInKindsGetTheOperatorsLevel) {
  Client c = tcp();
  c.post("/v1/jobs", R"({"kind":"noop"})");
  EXPECT_EQ(control_.last_job().min_level, 3);
  c.post("/v1/jobs", R"({"kind":"test.other"})");
  EXPECT_EQ(control_.last_job().min_level, 0);
  c.post("/v1/jobs", R"({"kind":"noop","sandbox":{"min_level":"L4"}})");
  EXPECT_EQ(control_.last_job().min_level, 4);
}

class WorkerRoutes : public ServerTest {
 protected:
  void SetUp() override { start(); }
};

TEST_F(WorkerRoutes, LeaseAndComplete) {
  Client c = local();
  EXPECT_EQ(c.post("/v1/leases", R"({"worker":"w","kinds":["*"]})").status,
            204);
  ASSERT_EQ(c.post("/v1/jobs", R"({"kind":"a","payload":{"p":1}})").status,
            201);
  Reply r =
      c.post("/v1/leases", R"({"worker":"w","kinds":["*"],"holding":[]})");
  ASSERT_EQ(r.status, 200);
  Json lease = r.json()["leases"][0];
  std::string token = lease["token"];
  EXPECT_EQ(token.size(), 33u);
  EXPECT_EQ(lease["fence"], token.substr(0, 16));
  EXPECT_EQ(lease["lease_ms"], 30000);
  EXPECT_EQ(lease["job"]["payload"]["p"], 1);
  EXPECT_EQ(lease["job"]["attempt"], 1);
  EXPECT_EQ(lease["job"]["worker"], "w");
  r = c.post("/v1/leases/" + token + "/complete",
             R"({"verdict":"pass","result":[1,2],"isolation":{"level":"L3"},)"
             R"("usage":{"wall_ms":5}})");
  ASSERT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["state"], "succeeded");
  EXPECT_EQ(r.json()["result"][1], 2);
  EXPECT_EQ(r.json()["isolation"]["level"], "L3");
  EXPECT_FALSE(r.json().contains("payload"));
  // Again: the stored answer. Any other verb: stale.
  EXPECT_EQ(c.post("/v1/leases/" + token + "/complete", "{}").status, 200);
  r = c.post("/v1/leases/" + token + "/fail", R"({"code":"exit"})");
  EXPECT_EQ(r.status, 409);
  EXPECT_EQ(r.code(), "stale-lease");
}

TEST_F(WorkerRoutes, TokensAreCheckedForFormAndForOrigin) {
  Client c = local();
  std::string token = leased_token(c);
  std::string forged = token;
  forged[32] = forged[32] == '0' ? '1' : '0';
  std::string other_fence = token;
  other_fence[15] = other_fence[15] == '0' ? '1' : '0';
  for (const char* verb : {"/complete", "/release", "/log?offset=0"}) {
    for (const std::string& bad : {forged, other_fence}) {
      Reply r = c.post("/v1/leases/" + bad + verb, "{}");
      EXPECT_EQ(r.status, 409) << verb;
      EXPECT_EQ(r.code(), "stale-lease");
    }
    for (const std::string& bad : {std::string("x"), token + "0",
                                   token.substr(1), "A" + token.substr(1)}) {
      EXPECT_EQ(c.post("/v1/leases/" + bad + verb, "{}").status, 404) << bad;
    }
  }
  EXPECT_EQ(c.call("PUT", "/v1/leases/" + forged + "/artifacts/a", "x").status,
            409);
  EXPECT_EQ(c.call("PUT", "/v1/leases/zz/artifacts/a", "x").status, 404);
  EXPECT_EQ(c.post("/v1/leases/" + token + "/complete", "{}").status, 200);
}

TEST_F(WorkerRoutes, BadBodiesNameTheirField) {
  Client c = local();
  std::string token = leased_token(c);
  struct {
    std::string path, body, code, field;
  } const cases[] = {
      {"/v1/leases", R"({"kinds":["*"]})", "bad-request", "worker"},
      {"/v1/leases", R"({"worker":"w"})", "bad-request", "kinds"},
      {"/v1/leases", R"({"worker":"w","kinds":[]})", "bad-request", "kinds"},
      {"/v1/leases", R"({"worker":"w","kinds":["a*"]})", "bad-request",
       "kinds"},
      {"/v1/leases", R"({"worker":"w","kinds":["*"],"max":257})", "bad-request",
       "max"},
      {"/v1/leases", R"({"worker":"w","kinds":["*"],"wait_ms":30001})",
       "bad-request", "wait_ms"},
      {"/v1/leases", R"({"worker":"w","kinds":["*"],"isolation_level":3})",
       "bad-request", "isolation_level"},
      {"/v1/leases", R"({"worker":"w","kinds":["*"],"holding":["x"]})",
       "bad-request", "holding"},
      {"/v1/leases", R"({"worker":"w","kinds":["*"],"a":1})", "unknown-field",
       "a"},
      {"/v1/leases/heartbeat", R"({})", "bad-request", "items"},
      {"/v1/leases/heartbeat", R"({"items":[{}]})", "bad-request",
       "items.token"},
      {"/v1/leases/" + token + "/complete", R"({"verdict":"maybe"})",
       "bad-request", "verdict"},
      {"/v1/leases/" + token + "/complete", R"({"isolation":"L3"})",
       "bad-request", "isolation"},
      {"/v1/leases/" + token + "/complete", R"({"artifacts":["../x"]})",
       "bad-request", "artifacts"},
      {"/v1/leases/" + token + "/complete", R"({"artifacts":["gone"]})",
       "bad-request", "artifacts"},
      {"/v1/leases/" + token + "/complete", R"({"enqueue":[{"kind":"A"}]})",
       "bad-request", "enqueue[0].kind"},
      {"/v1/leases/" + token + "/fail", R"({})", "bad-request", "code"},
      {"/v1/leases/" + token + "/fail", R"({"code":"sad"})", "bad-request",
       "code"},
      {"/v1/leases/" + token + "/fail", R"({"code":"verdict"})", "bad-request",
       "code"},
      {"/v1/leases/" + token + "/block", R"({})", "bad-request", "reason"},
      {"/v1/leases/" + token + "/release", R"({"x":1})", "unknown-field", "x"},
      {"/v1/leases/" + token + "/log", "x", "bad-request", "offset"},
      {"/v1/leases/" + token + "/log?offset=-1", "x", "bad-request", "offset"},
      {"/v1/leases/complete", R"({})", "bad-request", "items"},
      {"/v1/leases/complete", R"({"items":[],"lease":{"worker":"w"}})",
       "bad-request", "lease.kinds"},
  };
  for (const auto& one : cases) {
    Reply r = c.post(one.path, one.body);
    EXPECT_EQ(r.status, 400) << one.path << one.body << r.body;
    EXPECT_EQ(r.code(), one.code) << one.path << one.body << r.body;
    EXPECT_EQ(r.field(), one.field) << one.path << one.body << r.body;
  }
  // None of it ended the lease.
  EXPECT_EQ(c.post("/v1/leases/" + token + "/complete", "").status, 200);
}

TEST_F(WorkerRoutes, ParkedLeaseIsFedAtOnce) {
  Client w = local(), c = tcp();
  w.start("POST", "/v1/leases",
          R"({"worker":"w","kinds":["a"],"wait_ms":20000})");
  EXPECT_TRUE(w.quiet(50));
  c.post("/v1/jobs", R"({"kind":"a"})");
  EXPECT_EQ(w.reply(1000).status, 200);
  w.start("POST", "/v1/leases",
          R"({"worker":"w","kinds":["a"],"wait_ms":100})");
  EXPECT_EQ(w.reply(2000).status, 204);
}

TEST_F(WorkerRoutes, AWorkerThatHangsUpLosesNoJob) {
  {
    Client w = local();
    w.start("POST", "/v1/leases",
            R"({"worker":"w","kinds":["a"],"wait_ms":20000})");
    EXPECT_TRUE(w.quiet(50));
  }
  Client c = tcp();
  for (int i = 0; i < 100 && control_.abandoned == 0; ++i) usleep(10'000);
  c.post("/v1/jobs", R"({"kind":"a"})");
  EXPECT_EQ(c.post("/v1/leases", R"({"worker":"v","kinds":["a"]})").status,
            200);
}

TEST_F(WorkerRoutes, HeartbeatTellsOfEachLease) {
  Client c = local(), other = tcp();
  std::string token = leased_token(c);
  Reply r = c.post("/v1/leases/heartbeat",
                   R"({"items":[{"token":")" + token +
                       R"(","progress":{"percent":40,"message":"m"}},)"
                       R"({"token":"junk"}],"wait_ms":5000})");
  ASSERT_EQ(r.status, 200) << r.body;
  Json items = r.json()["items"];
  EXPECT_EQ(items[0]["token"], token);
  EXPECT_FALSE(items[0]["expires_at"].is_null());
  EXPECT_EQ(items[0]["cancel"], false);
  EXPECT_TRUE(items[0]["problem"].is_null());
  EXPECT_EQ(items[1]["problem"]["status"], 404);
  EXPECT_EQ(other.get("/v1/jobs/" + last_job_).json()["progress"]["percent"],
            40);
  c.start("POST", "/v1/leases/heartbeat",
          R"({"items":[{"token":")" + token + R"("}],"wait_ms":20000})");
  EXPECT_TRUE(c.quiet(50));
  other.post("/v1/jobs/" + last_job_ + "/cancel", "");
  r = c.reply(2000);
  EXPECT_EQ(r.json()["items"][0]["cancel"], true);
}

TEST_F(WorkerRoutes, CompleteManyAndLeaseAgain) {
  Client c = local();
  std::string one = leased_token(c), two = leased_token(c);
  c.post("/v1/jobs", R"({"kind":"next"})");
  Reply r = c.post("/v1/leases/complete",
                   R"({"items":[{"token":")" + one + R"("},{"token":"bad"},)" +
                       R"({"token":")" + two +
                       R"(","verdict":"fail","artifacts":["no"]}],)" +
                       R"("lease":{"worker":"w","kinds":["*"]}})");
  ASSERT_EQ(r.status, 200) << r.body;
  Json j = r.json();
  EXPECT_EQ(j["items"][0]["state"], "succeeded");
  EXPECT_EQ(j["items"][1]["problem"]["status"], 404);
  EXPECT_EQ(j["items"][2]["problem"]["field"], "artifacts");
  EXPECT_EQ(j["leases"][0]["job"]["kind"], "next");
  r = c.post("/v1/leases/complete",
             R"({"items":[{"token":")" + two + R"(","verdict":"fail"}]})");
  EXPECT_EQ(r.json()["items"][0]["state"], "failed");
  EXPECT_EQ(r.json()["leases"].size(), 0u);
}

std::string nested(int depth) {
  const auto n = static_cast<std::size_t>(depth);
  return std::string(n, '[') + std::string(n, ']');
}

// A worker wraps what a request brought: the bound is the value's own.
TEST_F(WorkerRoutes, AResultNestsAsDeepAsARequest) {
  Client c = local();
  const std::string most = nested(kJsonDepthMax),
                    more = nested(kJsonDepthMax + 1);
  std::string at = "/v1/leases/" + leased_token(c) + "/complete";
  Reply r = c.post(at, R"({"result":)" + more + "}");
  EXPECT_EQ(r.status, 400) << r.body;
  EXPECT_EQ(r.field(), "result");
  EXPECT_NE(r.body.find("nested more than 64 deep"), r.body.npos) << r.body;
  r = c.post(at, R"({"result":)" + nested(kJsonMessageDepthMax) + "}");
  EXPECT_EQ(r.code(), "malformed-json");
  r = c.post(at, R"({"result":)" + most + "}");
  EXPECT_EQ(r.status, 200) << r.body;
  const Reply got = c.get("/v1/jobs/" + last_job_);
  EXPECT_NE(got.body.find(R"("result":)" + most + ","), got.body.npos);

  const std::string token = leased_token(c);
  const auto batch = [&](const std::string& result) {
    return c.post("/v1/leases/complete", R"({"items":[{"token":")" + token +
                                             R"(","result":)" + result + "}]}");
  };
  r = batch(more);
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["items"][0]["problem"]["field"], "result");
  EXPECT_EQ(r.json()["items"][0]["problem"]["status"], 400);
  r = batch(most);
  EXPECT_EQ(r.json()["items"][0]["state"], "succeeded") << r.body;
}

TEST_F(WorkerRoutes, WhatAWorkerSendsNestsAsDeepAsARequest) {
  Client c = local();
  const std::string below = nested(kJsonDepthMax - 1),
                    most = nested(kJsonDepthMax),
                    more = nested(kJsonDepthMax + 1);
  // An object around it: one level more.
  const auto object = [](const std::string& in) {
    return R"({"a":)" + in + "}";
  };
  std::string at = "/v1/leases/" + leased_token(c);
  for (const std::string name : {"isolation", "usage", "side_effects"}) {
    const std::string head = R"({"code":"exit","retry":false,")" + name + "\":";
    EXPECT_EQ(c.post(at + "/fail", head + object(most) + "}").field(), name);
  }
  Reply r = c.post(at + "/fail", R"({"code":"exit","usage":)" + object(below) +
                                     R"(,"retry":false})");
  EXPECT_EQ(r.status, 200) << r.body;

  at = "/v1/leases/" + leased_token(c);
  r = c.post(at + "/complete", R"({"enqueue":[{"kind":"ext.b","payload":)" +
                                   object(most) + "}]}");
  EXPECT_EQ(r.field(), "enqueue[0].payload") << r.body;
  r = c.post(at + "/complete", R"({"enqueue":[{"kind":"ext.b","payload":)" +
                                   object(below) + "}]}");
  EXPECT_EQ(r.status, 200) << r.body;
  r = c.post("/v1/leases", R"({"worker":"w","kinds":["ext.b"]})");
  EXPECT_NE(r.body.find(object(below)), r.body.npos) << r.body;

  at = "/v1/leases/" + leased_token(c);
  EXPECT_EQ(c.post(at + "/block", R"({"reason":"asked","data":)" + more + "}")
                .field(),
            "data");
  r = c.post(at + "/block", R"({"reason":"asked","data":)" + most + "}");
  EXPECT_EQ(r.status, 200) << r.body;
  const std::string secret = r.json()["blocked"]["token"];
  // A client's: within the bound of a request.
  const auto unblock = [&](const std::string& input) {
    return c.post("/v1/jobs/" + last_job_ + "/unblock",
                  R"({"token":")" + secret + R"(","input":)" + input + "}");
  };
  EXPECT_EQ(unblock(most).code(), "malformed-json");
  EXPECT_EQ(unblock(below).status, 200);
  r = c.post("/v1/leases", R"({"worker":"w","kinds":["ext.a"]})");
  EXPECT_NE(r.body.find(R"("input":)" + below), r.body.npos) << r.body;
}

TEST_F(WorkerRoutes, FailRetriesOrEnds) {
  Client c = local();
  std::string token = leased_token(c);
  Reply r = c.post("/v1/leases/" + token + "/fail",
                   R"({"code":"exit","message":"rc 1","retry_after_ms":10})");
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["state"], "scheduled");
  token = leased_token(c);
  r = c.post("/v1/leases/" + token + "/fail",
             R"({"code":"signal","retry":false})");
  EXPECT_EQ(r.json()["state"], "dead");
  EXPECT_EQ(r.json()["error"]["code"], "signal");
  token = leased_token(c);
  r = c.post("/v1/leases/" + token + "/release", "");
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["state"], "ready");
  EXPECT_EQ(r.json()["attempt"], 0);
}

TEST_F(WorkerRoutes, LeaseRepliesAreBoundedAndTheRestGoesBack) {
  Client c = local();
  std::string body = R"({"kind":"big","payload":{"x":")" +
                     std::string(1'000'000, 'x') + R"("}})";
  for (int i = 0; i < 6; ++i) ASSERT_EQ(c.post("/v1/jobs", body).status, 201);
  Reply r = c.post("/v1/leases", R"({"worker":"w","kinds":["*"],"max":10})");
  EXPECT_LE(r.body.size(), 4u << 20);
  EXPECT_EQ(r.json()["leases"].size(), 4u);
  c.get("/health");
  EXPECT_EQ(control_.released, 2);
}

TEST_F(WorkerRoutes, LogIsIdempotentByOffset) {
  Client c = local();
  std::string token = leased_token(c);
  std::string log = "/v1/leases/" + token + "/log?offset=";
  std::string job = "/v1/jobs/" + last_job_ + "/logs";
  EXPECT_EQ(c.get(job).status, 200);
  EXPECT_EQ(c.get(job).body, "");
  EXPECT_EQ(c.post(log + "0", "hello ").json()["size_bytes"], 6);
  EXPECT_EQ(c.post(log + "0", "hello ").json()["size_bytes"], 6);
  EXPECT_EQ(c.get(job).body, "hello ");  // live
  EXPECT_EQ(c.post(log + "6", "world").json()["size_bytes"], 11);
  Reply gap = c.post(log + "20", "x");
  EXPECT_EQ(gap.status, 409);
  EXPECT_EQ(gap.code(), "bad-offset");
  EXPECT_EQ(c.post(log + "11", std::string(kLogChunkBytesMax, 'z')).status,
            200);
  EXPECT_EQ(c.get(job).body.size(), 11 + kLogChunkBytesMax);
  Reply r = c.get(job + "?attempt=1");
  EXPECT_EQ(r.headers["content-type"], "text/plain; charset=utf-8");
  EXPECT_EQ(c.get(job + "?attempt=2").status, 404);
  EXPECT_EQ(c.get(job + "?attempt=0").status, 400);
  EXPECT_EQ(c.get(job + "?follow=1").status, 501);
  Client d = local();
  EXPECT_EQ(d.post(log + "0", std::string(kLogChunkBytesMax + 1, 'z')).status,
            413);
  c.post("/v1/leases/" + token + "/complete", "");
  EXPECT_EQ(c.post(log + "0", "late").status, 409);
  EXPECT_EQ(c.get(job).body.substr(0, 5), "hello");
}

// Files are refused first, and by what is free at that moment, not by what was
// free when somebody last looked.
TEST_F(WorkerRoutes, F05_UploadsStopAtTheBoundOfNewJobs) {
  Client c = local();
  const std::string token = leased_token(c), lease = "/v1/leases/" + token;
  EXPECT_EQ(c.get("/ready").json()["disk"]["level"], "ok");
  control_.disk_level = static_cast<int>(DiskLevel::soft);
  Reply r = c.call("PUT", lease + "/artifacts/a", "x");
  EXPECT_EQ(r.status, 507);
  EXPECT_EQ(r.json()["code"], "disk-low");
  EXPECT_EQ(r.json()["detail"], "it is full; make room");
  EXPECT_FALSE(r.headers["retry-after"].empty());
  EXPECT_EQ(c.post(lease + "/log?offset=0", "x").status, 507);
  r = c.get("/ready");
  EXPECT_EQ(r.status, 200) << "ends are taken still";
  EXPECT_EQ(r.json()["disk"]["level"], "soft");
  EXPECT_EQ(r.json()["disk"]["says"], "it is full; make room");
  control_.disk_level = static_cast<int>(DiskLevel::full);
  EXPECT_EQ(c.get("/ready").status, 503);
  control_.disk_level = static_cast<int>(DiskLevel::ok);
  control_.disk_soft = std::uint64_t{1} << 60;  // more than any disk has free
  Reply low;
  for (int i = 0; i < 500 && low.status != 507; ++i) {
    low = c.call("PUT", lease + "/artifacts/a", "x");
    usleep(10'000);
  }
  EXPECT_EQ(low.status, 507);
  EXPECT_EQ(low.json()["code"], "disk-full");
  EXPECT_NE(low.json()["detail"].get<std::string>().find("make room"),
            std::string::npos);
  EXPECT_EQ(c.post(lease + "/log?offset=0", "x").status, 507);
  control_.disk_soft = 0;
  for (int i = 0; i < 500 && low.status != 200; ++i) {
    low = c.call("PUT", lease + "/artifacts/a", "x");
    usleep(10'000);
  }
  EXPECT_EQ(low.status, 200) << "room heals it";
}

TEST_F(WorkerRoutes, ArtifactsComeBackAsTheyWent) {
  Client c = local();
  std::string token = leased_token(c);
  std::string lease = "/v1/leases/" + token;
  std::string job = "/v1/jobs/" + last_job_ + "/artifacts";
  std::string big;
  for (int i = 0; big.size() < (5u << 20); ++i) {
    big += "line " + std::to_string(i) + "\n";
  }
  Reply r = c.call("PUT", lease + "/artifacts/big.log", big);
  ASSERT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["size_bytes"], big.size());
  EXPECT_EQ(r.json()["sha256"].get<std::string>().size(), 64u);
  EXPECT_EQ(c.call("PUT", lease + "/artifacts/empty", "").status, 200);
  EXPECT_EQ(c.call("PUT", lease + "/artifacts/note", "one").status, 200);
  EXPECT_EQ(c.call("PUT", lease + "/artifacts/note", "two").status, 200);
  EXPECT_EQ(c.call("PUT", lease + "/artifacts/.hidden", "x").status, 400);
  EXPECT_EQ(c.call("PUT", lease + "/artifacts/a%2fb", "x").status, 404);
  EXPECT_EQ(c.get(job).json()["artifacts"].size(), 3u);  // while it runs
  r = c.post(lease + "/complete",
             R"({"artifacts":["big.log","note","empty"]})");
  ASSERT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["artifacts"].size(), 3u);
  EXPECT_EQ(c.call("PUT", lease + "/artifacts/late", "x").status, 409);
  EXPECT_EQ(c.get(job).json()["artifacts"].size(), 3u);
  EXPECT_EQ(c.get(job + "/note").body, "two");
  // More of them than may be open at a time (N3).
  std::string asked;
  for (int i = 0; i < kPipelineMax + 6; ++i) {
    asked += "GET " + job + "/note HTTP/1.1\r\nHost: localhost\r\n\r\n";
  }
  c.send(asked);
  for (int i = 0; i < kPipelineMax + 6; ++i) {
    ASSERT_EQ(c.reply().body, "two") << i;
  }
  EXPECT_EQ(c.get(job + "/empty").body, "");
  r = c.get(job + "/big.log");
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.headers["content-length"], std::to_string(big.size()));
  EXPECT_EQ(r.headers["x-content-type-options"], "nosniff");
  EXPECT_TRUE(r.body == big);
  EXPECT_EQ(c.get(job + "/other").status, 404);
  // Pipelined downloads keep their order.
  c.start("GET", job + "/big.log");
  c.start("GET", job + "/note");
  EXPECT_TRUE(c.reply().body == big);
  EXPECT_EQ(c.reply().body, "two");
}

TEST_F(WorkerRoutes, OversizeArtifactIsRefusedUnread) {
  Client c = local();
  std::string token = leased_token(c);
  c.send(
      "PUT /v1/leases/" + token +
      "/artifacts/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 67108865\r\n"
      "\r\n");
  EXPECT_EQ(c.reply().status, 413);
}

// A pool forgets whom it has reported once it is answered 200.
TEST_F(WorkerRoutes, F10_AReportThatTheLogDidNotTakeIsNotConfirmed) {
  Client pool = local();
  for (const char* names : {"gone", "ended"}) {
    SCOPED_TRACE(names);
    const std::string report =
        std::string(R"({"workers":[{"name":"p-w0"}],")") + names +
        R"(":["p-w1"]})";
    control_.status = static_cast<int>(Response::Status::disk_low);
    Reply r = pool.post("/v1/pools/p/sync", report);
    EXPECT_EQ(r.status, 507) << r.body;
    EXPECT_EQ(r.json()["code"], "disk-low");
    control_.status = static_cast<int>(Response::Status::draining);
    EXPECT_EQ(pool.post("/v1/pools/p/sync", report).status, 503);
    // Who has nothing to report hears how many there are to be.
    EXPECT_EQ(pool.post("/v1/pools/p/sync", "{}").status, 200);
    control_.status = 0;
    EXPECT_EQ(pool.post("/v1/pools/p/sync", report).status, 200);
  }
}

// A worker's last call may be read after its pool has reported its end.
TEST_F(WorkerRoutes, F10_WhoIsReportedGoneLeasesNothing) {
  Client pool = local(), worker = local();
  const std::string lease =
      R"("worker":"p-w1","session":"first-session-000","kinds":["*"])";
  EXPECT_NE(worker.post("/v1/leases", "{" + lease + "}").status, 409);
  EXPECT_EQ(
      pool.post(
              "/v1/pools/p/sync",
              R"({"session":"first-session-000","workers":[],"gone":["p-w1"]})")
          .status,
      200);
  Reply r = worker.post("/v1/leases", "{" + lease + "}");
  EXPECT_EQ(r.status, 409) << r.body;
  EXPECT_EQ(r.json()["code"], "stale-lease");
  // Another session of that name is somebody else.
  EXPECT_NE(
      worker
          .post(
              "/v1/leases",
              R"({"worker":"p-w1","session":"second-session-00","kinds":["*"]})")
          .status,
      409);
}

TEST_F(WorkerRoutes, PoolsReportAndAreScaled) {
  Client pool = local(), c = tcp();
  const std::string sync = "/v1/pools/p1/sync";
  const std::string body =
      R"({"host":"h","workers":[{"name":"w1","state":"busy","level":"L3",)"
      R"("pid":7}],"gone":["w0"],"wait_ms":20000})";
  Reply r = pool.post(sync, body);
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.json()["target"], 0);
  EXPECT_EQ(r.json()["drain"], false);
  EXPECT_EQ(control_.gone, 0);  // w0 is not known to be this pool's
  EXPECT_EQ(
      pool.post(sync, R"({"workers":[{"name":"w0"}],"gone":["w0","p1-7"]})")
          .status,
      200);
  EXPECT_EQ(control_.gone, 2);
  pool.start("POST", sync, body);
  EXPECT_TRUE(pool.quiet(100));
  r = c.call("PUT", "/v1/workers/scale", R"({"count":3})");
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(pool.reply(2000).json()["target"], 3);
  r = c.get("/v1/workers");
  EXPECT_EQ(r.json()["configured"], 3);
  EXPECT_EQ(r.json()["busy"], 1);
  EXPECT_EQ(r.json()["workers"][0]["name"], "w1");
  EXPECT_EQ(r.json()["workers"][0]["pool"], "p1");
  EXPECT_EQ(r.json()["workers"][0]["pid"], 7);
  EXPECT_EQ(c.call("PUT", "/v1/workers/scale", R"({"count":65})").status, 400);
  EXPECT_EQ(c.call("PUT", "/v1/workers/scale", R"({})").status, 400);
  EXPECT_EQ(c.call("PUT", "/v1/workers/scale", R"({"min":1,"max":2})").status,
            501);
  // An answer that was lost is told again on the next connection.
  Client again = local();
  EXPECT_EQ(again.post(sync, body).json()["target"], 3);
  EXPECT_EQ(again.post("/v1/pools/a%20b/sync", "{}").status, 404);
  EXPECT_EQ(again.post("/v1/pools/p/sync", R"({"workers":[1]})").status, 400);
  EXPECT_EQ(again.post("/v1/pools/p/sync", R"({"more":1})").status, 400);
  // Whoever only reaches the port cannot say that a worker is dead.
  const int before = control_.gone;
  EXPECT_EQ(c.post(sync, R"({"gone":["w1"]})").status, 501);
  EXPECT_EQ(control_.gone, before);
}

TEST_F(WorkerRoutes, F20_APoolEndsOnlyLeasesOfItsOwnWorkers) {
  Client a = local(), b = local();
  auto gone = [&](Client& pool, const std::string& id,
                  const std::string& body) {
    const int before = control_.gone;
    EXPECT_EQ(pool.post("/v1/pools/" + id + "/sync", body).status, 200);
    return control_.gone - before;
  };
  EXPECT_EQ(gone(a, "a", R"({"workers":[{"name":"w1"}]})"), 0);
  EXPECT_EQ(gone(b, "b", R"({"gone":["w1","a-1","w2"]})"), 0);
  EXPECT_EQ(gone(b, "b", R"({"workers":[{"name":"w1"}],"gone":["w1"]})"), 0);
  EXPECT_EQ(gone(b, "b", R"({"gone":["b-1"]})"), 1);
  EXPECT_EQ(gone(a, "a", R"({"gone":["w1","a-1"]})"), 2);
  // The session says more than any list: the core compares it.
  EXPECT_EQ(gone(b, "b", R"({"session":"0123456789abcdef","gone":["x"]})"), 1);
  EXPECT_EQ(a.post("/v1/pools/a/sync", R"({"session":"short"})").status, 400);
}

TEST_F(WorkerRoutes, F20_ALeasesAnswerSaysItsSession) {
  Client c = tcp();
  c.post("/v1/jobs", R"([{"kind":"a"},{"kind":"a"},{"kind":"a"}])");
  const std::string ask = R"({"worker":"w","kinds":["a"])";
  const std::string first = c.post("/v1/leases", ask + "}").json()["session"];
  EXPECT_EQ(first.size(), 32u);
  const std::string again = c.post("/v1/leases", ask + "}").json()["session"];
  EXPECT_NE(first, again);
  Reply r =
      c.post("/v1/leases/complete", R"({"items":[],"lease":)" + ask +
                                        R"(,"session":")" + first + "\"}}");
  EXPECT_EQ(r.json()["session"], first);
  for (const char* bad :
       {"\"fifteen-letters\"", "\"0123456789 abcdef\"", "7"}) {
    r = c.post("/v1/leases", ask + ",\"session\":" + bad + "}");
    EXPECT_EQ(r.status, 400) << bad;
    EXPECT_EQ(r.field(), "session");
  }
  EXPECT_EQ(c.post("/v1/leases", ask + ",\"session\":null}").status, 204);
}

TEST_F(WorkerRoutes, AnIsolationReportSaysALevelThatExists) {
  Client c = tcp();
  const std::string end = "/v1/leases/" + leased_token(c) + "/complete";
  for (const char* level : {R"("L9")", "3", R"("")"}) {
    Reply r =
        c.post(end, R"({"isolation":{"level":)" + std::string(level) + "}}");
    EXPECT_EQ(r.status, 400) << level;
    EXPECT_EQ(r.field(), "isolation.level");
  }
  EXPECT_EQ(c.post(end, R"({"isolation":{"level":"L1"}})").status, 200);
}

TEST_F(WorkerRoutes, ToolsAreCountedByHowTheirAttemptsEnded) {
  Client c = tcp();
  const std::string good = leased_token(c, "tool.probe");
  ASSERT_EQ(c.post("/v1/leases/" + good + "/complete", "{}").status, 200);
  const std::string text = c.get("/metrics").body;
  EXPECT_NE(text.find(R"(machina_tool_ok_total{aid="tool.probe"} 1)"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find(R"(machina_tool_fail_total{aid="tool.probe"} 0)"),
            std::string::npos);
}

TEST_F(WorkerRoutes, ARepeatedQueryParameterIsRefused) {
  Client c = tcp();
  Reply r = c.get("/v1/jobs?limit=1&limit=2");
  EXPECT_EQ(r.status, 400);
  EXPECT_EQ(r.field(), "limit");
}

TEST_F(WorkerRoutes, HealthStatsMetrics) {
  Client c = tcp();
  Reply r = c.get("/health");
  EXPECT_EQ(r.body, R"({"status":"ok","ok":true})");
  EXPECT_EQ(c.get("/ready").status, 200);
  c.post("/v1/jobs", R"({"kind":"ext.m"})");
  r = c.get("/stats");
  EXPECT_EQ(r.json()["queues"]["default"]["ready"], 1);
  EXPECT_EQ(r.json()["ready"], true);
  r = c.get("/metrics");
  EXPECT_EQ(r.status, 200);
  for (const char* line :
       {"machina_jobs_enqueued_total{kind=\"ext.m\",queue=\"default\"} 1\n",
        "machina_queue_inbox_size{queue=\"default\"} 1\n",
        "machina_queue_dlq_size{queue=\"default\"} 0\n",
        "machina_enqueue_seconds_count 1\n",
        "machina_job_wait_seconds_bucket{kind=\"noop\",le=\"0.0025\"} ",
        "machina_build_info{version=", "# TYPE machina_wal_sync_seconds"}) {
    EXPECT_NE(r.body.find(line), std::string::npos) << line << r.body;
  }
}

}  // namespace
}  // namespace machina::test
