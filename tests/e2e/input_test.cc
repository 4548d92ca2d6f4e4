// Bad input over HTTP: each gets one clear error that names field, value and
// bound; nothing is lost or half done.

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class Input : public EndToEnd {
 protected:
  void SetUp() override {
    EndToEnd::SetUp();
    if (!product_) return;
    Serve serve;
    serve.workers = 0;
    serve.env["MACHINA_KINDS_ALLOWED"] = "noop,test.*,tool.*,ext.*";
    start(serve);
  }

  // A problem of that status whose detail has each of `words`.
  void expect_problem(const Answer& a, int status, const std::string& field,
                      const std::vector<std::string>& words = {}) {
    EXPECT_EQ(a.status, status) << a.body;
    Json problem = a.json();
    ASSERT_TRUE(problem.is_object()) << a.body;
    auto type = a.headers.find("content-type");
    ASSERT_NE(type, a.headers.end());
    EXPECT_NE(type->second.find("application/problem+json"), std::string::npos);
    EXPECT_EQ(problem.value("status", 0), status);
    EXPECT_FALSE(problem.value("code", "").empty()) << a.body;
    EXPECT_EQ(problem.value("type", ""),
              "/problems/" + problem.value("code", ""));
    if (!field.empty()) {
      EXPECT_EQ(problem.value("field", ""), field) << a.body;
    }
    for (const std::string& word : words) {
      EXPECT_NE(problem.value("detail", "").find(word), std::string::npos)
          << "'" << word << "' is missing in: " << a.body;
    }
  }
  Answer job(const std::string& body) {
    return p().call("POST", "/v1/jobs", body);
  }
  void expect_nothing_was_queued() {
    EXPECT_TRUE(p().get("/v1/jobs").json()["jobs"].empty())
        << p().get("/v1/jobs").body;
    EXPECT_EQ(p().get("/ready").status, 200);
  }
};

TEST_P(Input, JsonThatIsNotAJob) {
  expect_problem(job("{\"kind\":\"noop\""), 400, "");
  expect_problem(job("{\"kind\":\"noop\"} trailing"), 400, "");
  expect_problem(job("\"noop\""), 400, "");
  expect_problem(job("{}"), 400, "kind");
  expect_problem(job(R"({"kind":"noop","prio":9})"), 400, "prio");
  EXPECT_EQ(job(R"({"kind":"noop","prio":9})").json()["code"], "unknown-field");
  expect_problem(job(R"({"kind":"noop","priority":1,"priority":9})"), 400,
                 "priority");
  expect_problem(job(R"({"kind":"noop","priority":"9"})"), 400, "priority");
  expect_problem(job(R"({"kind":"noop","priority":10})"), 400, "priority",
                 {"10", "9"});
  expect_problem(job(R"({"kind":"noop","priority":-1})"), 400, "priority");
  expect_problem(job(R"({"kind":"noop","priority":1.5})"), 400, "priority");
  expect_problem(job(R"({"kind":"noop","payload":[]})"), 400, "payload");
  expect_problem(job(R"({"kind":"noop","max_attempts":0})"), 400,
                 "max_attempts", {"0"});
  expect_problem(job(R"({"kind":"noop","labels":{"a":1}})"), 400, "labels.a");
  expect_problem(job(R"({"kind":"noop","run_at":"tomorrow"})"), 400, "run_at",
                 {"tomorrow"});
  expect_problem(job(R"({"kind":"noop","depends_on":["no-such-id"]})"), 400,
                 "depends_on", {"no-such-id"});
  expect_problem(job(R"({"kind":"noop","depends_on":)"
                     R"(["01234567-89ab-7def-8123-456789abcdef"]})"),
                 400, "depends_on");
  expect_problem(job(std::string("{\"kind\":\"noop\",\"queue\":\"\xff\"}")),
                 400, "");
  std::string deep(100, '['), end(100, ']');
  expect_problem(job(R"({"kind":"noop","payload":{"x":)" + deep + end + "}}"),
                 400, "", {"64"});
  expect_nothing_was_queued();
}

TEST_P(Input, KindsThatAreIllFormedOrNotAllowed) {
  expect_problem(job(R"({"kind":"Noop"})"), 400, "kind", {"Noop"});
  expect_problem(job(R"({"kind":"a..b"})"), 400, "kind");
  expect_problem(job(R"({"kind":""})"), 400, "kind");
  expect_problem(job(R"({"kind":")" + std::string(65, 'a') + R"("})"), 400,
                 "kind", {"64"});
  Answer a = job(R"({"kind":"billing.charge"})");
  EXPECT_TRUE(a.status == 400 || a.status == 403) << a.body;
  expect_problem(a, a.status, "kind", {"billing.charge"});
  expect_nothing_was_queued();
}

TEST_P(Input, PayloadsThatTheirKindRefuses) {
  expect_problem(job(R"({"kind":"noop","payload":{"sleep":1}})"), 400,
                 "payload.sleep");
  expect_problem(job(R"({"kind":"noop","payload":{"sleep_ms":"1"}})"), 400,
                 "payload.sleep_ms");
  expect_problem(job(R"({"kind":"tool.shell","payload":{}})"), 400,
                 "payload.argv");
  expect_problem(
      job(R"({"kind":"tool.shell","payload":{"argv":["/root/evil"]}})"), 400,
      "payload.argv[0]", {"/root/evil"});
  expect_problem(job(R"({"kind":"test.run","payload":{"repo":"/etc",)"
                     R"("runner":"pytest"}})"),
                 400, "payload.repo", {"/etc"});
  expect_problem(job(R"({"kind":"test.run","payload":{"repo":"../../etc",)"
                     R"("runner":"pytest"}})"),
                 400, "payload.repo", {"../../etc"});
  expect_problem(job(R"({"kind":"test.run","payload":{"files":{"a.py":""},)"
                     R"("runner":"make"}})"),
                 400, "payload.runner", {"make"});
  expect_problem(job(R"({"kind":"noop","sandbox":{"profile":"net"}})"), 501,
                 "sandbox.profile");
  expect_nothing_was_queued();
}

TEST_P(Input, WhatIsTooLarge) {
  std::string big(1100 * 1024, 'x');
  Answer a = job(R"({"kind":"ext.big","payload":{"x":")" + big + R"("}})");
  EXPECT_TRUE(a.status == 400 || a.status == 413) << a.body.substr(0, 500);
  expect_problem(a, a.status, "payload", {"1048576"});
  big.assign(3 << 20, 'x');
  a = job(R"({"kind":"ext.big","payload":{"x":")" + big + R"("}})");
  expect_problem(a, 413, "", {"2097152"});
  // The bound itself is inside.
  big.assign((1 << 20) - 8, 'x');
  a = job(R"({"kind":"ext.big","payload":{"x":")" + big + R"("}})");
  EXPECT_EQ(a.status, 201) << a.body.substr(0, 500);
  // A head without end, a request line without end.
  a = p().raw("GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " +
              std::string(20000, 'h') + "\r\n\r\n");
  EXPECT_EQ(a.status, 431) << a.body;
  a = p().raw("GET /" + std::string(9000, 'p') +
              " HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(a.status == 414 || a.status == 431) << a.status;
}

TEST_P(Input, PathsVerbsAndTokens) {
  expect_problem(p().get("/v2/jobs"), 404, "");
  expect_problem(p().get("/v1/jobs/01234567-89ab-7def-8123-456789abcdef"), 404,
                 "");
  expect_problem(p().get("/v1/jobs/..%2f..%2fetc"), 404, "");
  Answer a = p().call("DELETE", "/v1/jobs");
  expect_problem(a, 405, "");
  EXPECT_NE(a.headers["allow"].find("POST"), std::string::npos);
  expect_problem(p().post("/v1/leases/not-a-token/complete", Json::object()),
                 404, "");
  expect_problem(p().post("/v1/leases", {{"worker", "w"}}), 400, "kinds");
  expect_problem(p().post("/v1/leases",
                          {{"worker", "w"}, {"kinds", {"noop"}}, {"max", 257}}),
                 400, "max", {"257", "256"});
  expect_problem(p().get("/v1/jobs?limit=1001"), 400, "limit",
                 {"1001", "1000"});
  expect_problem(p().get("/v1/jobs?stat=ready"), 400, "stat");
  // What this release does not have says so, and is never ignored.
  expect_problem(p().get("/v1/events"), 501, "");
  EXPECT_EQ(p().get("/v1/events").json()["code"], "not-implemented");
  expect_problem(job(R"({"kind":"noop","callback_url":"http://localhost/x"})"),
                 501, "callback_url");
  expect_nothing_was_queued();
}

TEST_P(Input, BytesThatAreNotHttp) {
  Answer a = p().raw("hello\r\n\r\n");
  EXPECT_TRUE(a.status == 400 || a.status == 0) << a.status;
  a = p().raw(
      "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
      "Content-Length: 6\r\n\r\nhello");
  EXPECT_EQ(a.status, 400);
  a = p().raw(
      "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
      "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
  EXPECT_EQ(a.status, 400);
  expect_nothing_was_queued();
}

MACHINA_BOTH(Input);

class Auth : public EndToEnd {};

TEST_P(Auth, EverythingButHealthNeedsTheToken) {
  start_prod(0);
  for (const char* path : {"/v1/jobs", "/v1/workers", "/stats"}) {
    Answer a = p().call("GET", path, "", {"Authorization: Bearer e2e-tokem"});
    EXPECT_EQ(a.status, 401) << path << ": " << a.body;
    a = p().raw(std::string("GET ") + path +
                " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    EXPECT_EQ(a.status, 401) << path << ": " << a.body;
    EXPECT_EQ(p().get(path).status, 200) << path;
  }
  for (const char* path : {"/health", "/ready", "/metrics"}) {
    Answer a = p().raw(std::string("GET ") + path +
                       " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    EXPECT_EQ(a.status, 200) << path << ": " << a.body;
  }
  EXPECT_EQ(p().get("/health").json()["status"], "ok");
  EXPECT_NE(p().get("/metrics").body.find("machina_jobs_enqueued_total"),
            std::string::npos);
  EXPECT_EQ(p().log().find("e2e-token"), std::string::npos)
      << "a secret was logged";
}

MACHINA_BOTH(Auth);

}  // namespace
}  // namespace machina::e2e
