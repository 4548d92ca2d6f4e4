// Times and ends that must be true: retries and what they depend on.

#include <gtest/gtest.h>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class Times : public EndToEnd {
 protected:
  Json lease(const std::string& kind) {
    Answer a = p().post(
        "/v1/leases",
        {{"worker", "w"}, {"kinds", {kind}}, {"wait_ms", 5000}});
    EXPECT_EQ(a.status, 200) << a.body;
    Json leases = a.json()["leases"];
    return leases.empty() ? Json() : leases[0];
  }
  Answer verb(const Json& lease, const std::string& what,
              const Json& body = Json::object()) {
    return p().post("/v1/leases/" + lease.value("token", "none") + "/" + what,
                    body);
  }
  // No worker of ours: each lease is a test's.
  void start_alone(const std::map<std::string, std::string>& env = {}) {
    Serve serve;
    serve.workers = 0;
    serve.env = env;
    start(serve);
  }
};

TEST_P(Times, F12_ARetryAsksForItsDependencies) {
  start_alone();
  std::string first = p().submit({{"kind", "ext.first"}, {"keep_result_ms", 1}});
  std::string gone = p().submit(
      {{"kind", "ext.then"}, {"depends_on", Json::array({first})}});
  std::string root = p().submit({{"kind", "ext.root"}});
  std::string id =
      p().submit({{"kind", "ext.after"}, {"depends_on", Json::array({root})}});
  verb(lease("ext.first"), "complete", {{"verdict", "fail"}});
  verb(lease("ext.root"), "complete", {{"verdict", "fail"}});
  EXPECT_EQ(p().wait_end(id)["state"], "cancelled");

  Answer refused = p().post("/v1/jobs/" + id + "/retry", Json::object());
  EXPECT_EQ(refused.status, 409) << refused.body;
  EXPECT_EQ(refused.json()["code"], "dependency");
  EXPECT_NE(refused.body.find(root + " ended failed"), std::string::npos)
      << refused.body;
  Ended cli = p().run({"retry", id, "--server", p().url()});
  EXPECT_NE(cli.code, 0) << cli.out;
  EXPECT_EQ(p().job(id)["state"], "cancelled");

  // One that is past its retention did not succeed either.
  EXPECT_EQ(p().wait_end(gone)["state"], "cancelled");
  ASSERT_TRUE(eventually(
      [&] { return p().get("/v1/jobs/" + first).status == 404; }, 20000));
  refused = p().post("/v1/jobs/" + gone + "/retry", Json::object());
  EXPECT_EQ(refused.status, 409) << refused.body;
  EXPECT_EQ(refused.json()["code"], "dependency");
  Answer taken = p().post("/v1/jobs/" + gone + "/retry",
                          {{"ignore_dependencies", true}});
  EXPECT_EQ(taken.status, 200) << taken.body;
  EXPECT_EQ(taken.json()["state"], "ready");

  // Queued again, it is waited for.
  EXPECT_EQ(p().post("/v1/jobs/" + root + "/retry", Json::object()).status,
            200);
  taken = p().post("/v1/jobs/" + id + "/retry", Json::object());
  EXPECT_EQ(taken.status, 200) << taken.body;
  EXPECT_EQ(taken.json()["state"], "waiting");
  verb(lease("ext.root"), "complete", {{"verdict", "fail"}});
  EXPECT_EQ(p().wait_end(id)["state"], "cancelled");
  cli = p().run({"retry", id, "--ignore-dependencies", "--server", p().url()});
  EXPECT_EQ(cli.code, 0) << cli.err;
  EXPECT_EQ(p().job(id)["state"], "ready");
  EXPECT_EQ(p().post("/v1/jobs/" + id + "/retry", {{"ignore", true}}).status,
            400);
}

TEST_P(Times, F12_NoWaitIsLongerThanItsMaximum) {
  start_alone();
  for (const Json& failure :
       {Json{{"code", "exit"}}, Json{{"code", "exit"}, {"retry_after_ms", 60000}}}) {
    std::string id = p().submit({{"kind", "ext.max"},
                                 {"max_attempts", 9},
                                 {"retry_min_ms", 100},
                                 {"retry_max_ms", 100}});
    for (int i = 0; i < 4; ++i) {
      const double begin = now_ms();
      verb(lease("ext.max"), "fail", failure);
      Json job = p().job(id);
      // Whole milliseconds, so that 100 ms after the decision is 100 ms.
      EXPECT_NE(job["state"], "dead") << job.dump(1);
      Json again = lease("ext.max");
      ASSERT_TRUE(again.is_object());
      EXPECT_GE(now_ms() - begin, 100);
      verb(again, "release");
    }
    p().post("/v1/jobs/" + id + "/cancel", Json::object());
  }
}

MACHINA_BOTH(Times);

}  // namespace
}  // namespace machina::e2e
