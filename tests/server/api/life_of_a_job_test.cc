// One job the whole way, through the real log and history: submitted, leased,
// logged, completed, found; and found again after the server was started anew.

#include <fstream>

#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

class LifeOfAJob : public ServerTest {
 protected:
  // The real shard; the port comes by its file.
  void start_real() {
    options_.port_file = root_ + "/port";
    options_.shard.log.fsync = false;
    options_.shard.core.fsync = false;
    std::filesystem::remove(options_.port_file);
    exited_ = false;
    thread_ = std::thread([this] {
      exit_code_ = run_server(options_);
      exited_ = true;
    });
    for (int i = 0; i < 500 && !exited_; ++i) {
      std::ifstream in(options_.port_file);
      if (in >> port_) return;
      usleep(10'000);
    }
    FAIL() << "the server did not start";
  }
};

TEST_F(LifeOfAJob, FromBytesToHistoryAndAcrossARestart) {
  start_real();
  std::string id, token;
  {
    Client c = tcp(), w = local();
    Reply r = c.post("/v1/jobs", R"({"kind":"ext.trip","payload":{"a":[1, 2]},)"
                                 R"("dedup_key":"once","labels":{"l":"v"}})");
    ASSERT_EQ(r.status, 201) << r.body;
    id = r.json()["id"];
    EXPECT_EQ(r.json()["durability"], "os");

    r = w.post("/v1/leases", R"({"worker":"w","kinds":["ext.*"]})");
    ASSERT_EQ(r.status, 200) << r.body;
    token = r.json()["leases"][0]["token"];
    EXPECT_NE(r.body.find(R"("payload":{"a":[1, 2]})"), std::string::npos);
    EXPECT_EQ(c.get("/v1/jobs/" + id).json()["state"], "running");

    std::string lease = "/v1/leases/" + token;
    EXPECT_EQ(w.post(lease + "/log?offset=0", "working\n").status, 200);
    EXPECT_EQ(c.get("/v1/jobs/" + id + "/logs").body, "working\n");
    EXPECT_EQ(w.call("PUT", lease + "/artifacts/out.txt", "made").status, 200);

    // Someone waits for the end while it comes.
    c.start("GET", "/v1/jobs/" + id, {}, "Prefer: wait=20\r\n");
    r = w.post(
        lease + "/complete",
        R"({"result":{"n":7},"artifacts":["out.txt"],)"
        R"("isolation":{"level":"L3"},"enqueue":[{"kind":"ext.child"}]})");
    ASSERT_EQ(r.status, 200) << r.body;
    EXPECT_EQ(r.json()["state"], "succeeded");
    r = c.reply();
    EXPECT_EQ(r.status, 200);
    EXPECT_EQ(r.json()["result"]["n"], 7);
    EXPECT_EQ(c.post(lease + "/complete", "").status, 200);  // the stored one
    EXPECT_EQ(c.post(lease + "/release", "").status, 409);
    r = c.get("/v1/jobs?kind=ext.child");
    EXPECT_EQ(r.json()["jobs"].size(), 1u) << r.body;
  }
  ASSERT_EQ(stop(), 0);

  start_real();
  Client c = tcp();
  Reply r = c.get("/v1/jobs/" + id);
  ASSERT_EQ(r.status, 200) << r.body;
  Json job = r.json();
  EXPECT_EQ(job["state"], "succeeded");
  EXPECT_EQ(job["result"]["n"], 7);
  EXPECT_EQ(job["isolation"]["level"], "L3");
  EXPECT_EQ(job["labels"]["l"], "v");
  EXPECT_EQ(job["artifacts"][0], "out.txt");
  EXPECT_NE(r.body.find(R"("payload":{"a":[1, 2]})"), std::string::npos);
  EXPECT_EQ(c.get("/v1/jobs/" + id + "/logs").body, "working\n");
  EXPECT_EQ(c.get("/v1/jobs/" + id + "/artifacts").json()["artifacts"].size(),
            1u);
  EXPECT_EQ(c.get("/v1/jobs/" + id + "/artifacts/out.txt").body, "made");
  // The old token still verifies: its completion is told again.
  r = c.post("/v1/leases/" + token + "/complete", "");
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["id"], id);
  r = c.post("/v1/jobs", R"({"kind":"ext.trip","payload":{"a":[1,2]},)"
                         R"("dedup_key":"once"})");
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["id"], id);
  r = c.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  EXPECT_EQ(r.json()["leases"][0]["job"]["kind"], "ext.child");
}

TEST_F(LifeOfAJob, AFailureThatIsRetriedIsCountedByItsCode) {
  start_real();
  Client w = local();
  ASSERT_EQ(w.post("/v1/jobs", R"({"kind":"ext.a"})").status, 201);
  Reply r = w.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  std::string token = r.json()["leases"][0]["token"];
  r = w.post("/v1/leases/" + token + "/fail", R"({"code":"oom"})");
  ASSERT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["state"], "scheduled");
  r = w.get("/metrics");
  EXPECT_NE(r.body.find("machina_jobs_fail_total{code=\"oom\"} 1\n"),
            std::string::npos)
      << r.body;
  Json totals = w.get("/stats").json()["totals"];
  EXPECT_EQ(totals["attempts_failed_by_code"]["oom"], 1);
  EXPECT_EQ(totals["ended_by_code"]["oom"], 0);
}

TEST_F(LifeOfAJob, ALeaseOutlivesTheServerThatGaveIt) {
  start_real();
  Client w = local();
  ASSERT_EQ(w.post("/v1/jobs", R"({"kind":"ext.a"})").status, 201);
  Reply r = w.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  std::string token = r.json()["leases"][0]["token"];
  std::string id = r.json()["leases"][0]["job"]["id"];
  EXPECT_EQ(w.post("/shutdown", R"({"mode":"handover"})").status, 200);
  EXPECT_EQ(join(), 0);
  start_real();
  Client v = local();
  // The new server learns job and attempt from the lease.
  EXPECT_EQ(v.post("/v1/leases/" + token + "/log?offset=0", "on").status, 200);
  EXPECT_EQ(v.call("PUT", "/v1/leases/" + token + "/artifacts/a", "x").status,
            200);
  r = v.post("/v1/leases/" + token + "/complete", R"({"artifacts":["a"]})");
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(v.get("/v1/jobs/" + id + "/logs?attempt=1").body, "on");
}

TEST_F(LifeOfAJob, ASecondServerOnOneRootIsExit75) {
  start_real();
  ServerOptions second = options_;
  second.port_file.clear();
  EXPECT_EQ(run_server(second), 75);
  EXPECT_EQ(local().get("/health").status, 200);  // its socket is left alone
}

// Answers that are made only when there is room for them, and one at a time,
// say all the same what the others do.
TEST_F(LifeOfAJob, F08_LargeAnswersComeWholeAndInTheirOrder) {
  start_real();
  const std::string text(30'000, 'x'), large = "{\"t\":\"" + text + "\"}";
  const std::string job =
      R"({"kind":"ext.a","dedup_key":"k","payload":)" + large + "}";
  Client c = tcp(), w = local();
  constexpr int kTimes = 5;  // so few that the kernel holds the bodies
  auto times = [&](const std::string& method, const std::string& path,
                   const std::string& body, const std::string& headers,
                   int status, const char* member) {
    SCOPED_TRACE(method + " " + path + " " + headers);
    for (Client* from : {&c, &w}) {
      for (int i = 0; i < kTimes; ++i) from->start(method, path, body, headers);
      for (int i = 0; i < kTimes; ++i) {
        const Reply r = from->reply();
        EXPECT_EQ(r.status, status) << r.body.substr(0, 300);
        EXPECT_EQ(r.json()[member]["t"].get<std::string>().substr(0, 30'000),
                  text);
      }
    }
  };
  // More than is kept for a job whose size is not known.
  const std::string more = "{\"t\":\"" + std::string(300'000, 'x') + "\"}";
  Reply huge = c.post("/v1/jobs", R"({"kind":"other","payload":)" + more + "}");
  ASSERT_EQ(huge.status, 201) << huge.body.substr(0, 300);
  times("GET", "/v1/jobs/" + std::string(huge.json()["id"]), "", "", 200,
        "payload");
  Reply r = c.post("/v1/jobs", job);
  ASSERT_EQ(r.status, 201) << r.body.substr(0, 300);
  EXPECT_EQ(r.json()["payload"]["t"], text);
  const std::string path = "/v1/jobs/" + std::string(r.json()["id"]);
  times("GET", path, "", "", 200, "payload");
  times("POST", "/v1/jobs", job, "", 200, "payload");
  r = w.post("/v1/leases", R"({"worker":"w","kinds":["ext.*"]})");
  ASSERT_EQ(r.status, 200) << r.body.substr(0, 300);
  EXPECT_EQ(r.json()["leases"][0]["job"]["payload"]["t"], text);
  const std::string lease =
      "/v1/leases/" + std::string(r.json()["leases"][0]["token"]);
  times("POST", path + "/cancel", "", "", 200, "payload");
  // These hear of the end, all at once.
  for (int i = 0; i < kTimes; ++i) {
    c.start("GET", path, "", "Prefer: wait=60\r\n");
    c.start("POST", "/v1/jobs", job, "Prefer: wait=60\r\n");
    c.start("POST", "/run_sync", job);
  }
  w.start("POST", lease + "/complete", "{\"result\":" + large + "}");
  r = w.reply();
  ASSERT_EQ(r.status, 200) << r.body.substr(0, 300);
  EXPECT_EQ(r.json()["result"]["t"], text);
  for (int i = 0; i < 3 * kTimes; ++i) {
    r = c.reply();
    EXPECT_EQ(r.status, 200) << r.body.substr(0, 300);
    EXPECT_EQ(r.json()["payload"]["t"], text);
    EXPECT_EQ(r.json()["result"]["t"], text);
  }
  times("POST", lease + "/complete", "{}", "", 200, "result");
  times("GET", path, "", "Prefer: wait=60\r\n", 200, "result");
  times("POST", "/v1/jobs", job, "Prefer: wait=60\r\n", 200, "result");
  times("POST", "/run_sync", job, "", 200, "result");
}

// Asked whether they may send it (Expect), they are told the end instead.
TEST_F(LifeOfAJob, F09_NoBodyIsTakenForALeaseThatHasEnded) {
  start_real();
  Client c = tcp();
  ASSERT_EQ(c.post("/v1/jobs", R"({"kind":"ext.a"})").status, 201);
  const Reply leased =
      c.post("/v1/leases", R"({"worker":"w","kinds":["ext.*"]})");
  ASSERT_EQ(leased.status, 200);
  const std::string lease =
      "/v1/leases/" + std::string(leased.json()["leases"][0]["token"]);
  auto offer = [&](const std::string& verb) {
    Client one = tcp();
    one.send("POST " + lease + verb +
             " HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
             "Content-Length: 1000000\r\n\r\n");
    return one.reply();
  };
  for (const char* verb : {"/complete", "/fail", "/block"}) {
    EXPECT_EQ(offer(verb).status, 100) << verb;
  }
  ASSERT_EQ(c.post(lease + "/complete", R"({"result":7})").status, 200);
  const Reply again = offer("/complete");
  EXPECT_EQ(again.status, 200);
  EXPECT_EQ(again.json()["result"], 7);
  EXPECT_EQ(offer("/fail").status, 409);
  EXPECT_EQ(offer("/block").status, 409);
}

}  // namespace
}  // namespace machina::test
