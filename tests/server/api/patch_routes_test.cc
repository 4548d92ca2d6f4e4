// Patches and approvals over HTTP, with the real log, history and store; the
// worker is played.

#include <fstream>

#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

class PatchRoutes : public ServerTest {
 protected:
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
  void restart() {
    ASSERT_EQ(stop(), 0);
    start_real();
  }

  static std::string lease(Client& c, std::string* id) {
    Reply r = c.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
    EXPECT_EQ(r.status, 200) << r.body;
    if (r.status != 200) return "/v1/leases/none";
    *id = r.json()["leases"][0]["job"]["id"];
    return "/v1/leases/" + r.json()["leases"][0]["token"].get<std::string>();
  }
  // A patch.apply job from its payload to its result; its id.
  std::string patched(Client& c, const Json& payload, const Json& completion,
                      const std::string& kind = "patch.apply") {
    Reply r =
        c.post("/v1/jobs", Json{{"kind", kind}, {"payload", payload}}.dump());
    EXPECT_EQ(r.status, 201) << r.body;
    std::string id, at = lease(c, &id);
    for (const auto& name : completion.value("artifacts", Json::array())) {
      EXPECT_EQ(c.call("PUT", at + "/artifacts/" + name.get<std::string>(),
                       "bytes of " + name.get<std::string>())
                    .status,
                200);
    }
    r = c.post(at + "/complete", completion.dump());
    EXPECT_EQ(r.status, 200) << r.body;
    return id;
  }
  static Json applied() {
    return {{"result",
             {{"outcome", "applied"},
              {"commit", std::string(40, 'c')},
              {"branch", "review/x"},
              {"files", {{{"path", "a.py"}, {"added", 2}, {"removed", 1}}}},
              {"reverse_diff_artifact", "reverse.diff"}}},
            {"artifacts", {"reverse.diff"}}};
  }
  static std::vector<std::string> ids(const Reply& reply) {
    std::vector<std::string> out;
    const Json page = reply.json();
    for (const auto& patch : page["patches"]) {
      out.push_back(patch["patch_id"]);
    }
    return out;
  }
};

using Ids = std::vector<std::string>;

TEST_F(PatchRoutes, APatchIsThereAsSoonAsItsJobHasEnded) {
  start_real();
  Client c = local();
  Json payload = {
      {"repo", "r"},
      {"diff", "x"},
      {"author", "ann"},
      {"provenance",
       {{{"origin", "weak"}, {"influence", 0.1}},
        {{"origin", "strong"}, {"influence", 0.9}, {"license", "MIT"}}}}};
  std::string id = patched(c, payload, applied());
  Reply r = c.get("/v1/patches/" + id);
  ASSERT_EQ(r.status, 200) << r.body;
  Json patch = r.json();
  EXPECT_EQ(patch["patch_id"], id);
  EXPECT_EQ(patch["state"], "succeeded");
  EXPECT_EQ(patch["outcome"], "applied");
  EXPECT_EQ(patch["lines"]["added"], 2);
  EXPECT_EQ(patch["pushed"], false);
  EXPECT_EQ(patch["approval"]["state"], "not_required");
  EXPECT_EQ(patch["provenance"][0]["origin"], "strong");
  EXPECT_EQ(patch["files"][0]["path"], "a.py");
  EXPECT_EQ(patch["files"][0]["sha256_before"], nullptr);
  EXPECT_EQ(patch["branch_log"][0]["action"], "committed");
  EXPECT_EQ(patch["rolled_back_by"], nullptr);
  EXPECT_EQ(patch["tests"]["newly_failing"], Json::array());
  EXPECT_EQ(c.get("/v1/patches/" + id + "/reverse_diff").body,
            "bytes of reverse.diff");
  // Also when the server, and the job with it, are gone.
  restart();
  Client d = local();
  EXPECT_EQ(d.get("/v1/patches/" + id).json(), patch);
}

TEST_F(PatchRoutes, ListsArePagedFilteredAndTellWhatIsWrong) {
  start_real();
  Client c = local();
  Ids all;
  for (int i = 0; i < 5; ++i) {
    Json payload = {{"repo", "r" + std::to_string(i % 2)},
                    {"provenance",
                     {{{"license", i == 1 ? "GPL-3.0-only" : "MIT"},
                       {"license_text", i < 2 ? "abc" : "xyz"},
                       {"session_id", "s" + std::to_string(i / 2)},
                       {"vector_id", "v" + std::to_string(i)}}}}};
    if (i > 0) payload["parent_patch_id"] = all.back();
    all.push_back(patched(c, payload, applied()));
    usleep(2000);  // ids are in order of the millisecond
  }
  Ids newest(all.rbegin(), all.rend());
  EXPECT_EQ(ids(c.get("/v1/patches")), newest);
  EXPECT_EQ(ids(c.get("/v1/patches?license=gpl-3.0-only")), (Ids{all[1]}));
  EXPECT_EQ(ids(c.get("/v1/patches?vector=v3")), (Ids{all[3]}));
  EXPECT_EQ(ids(c.get("/v1/patches?path=a.py&repo=r1")), (Ids{all[3], all[1]}));
  EXPECT_EQ(ids(c.get("/v1/patches?outcome=conflict")), Ids{});
  const std::string abc =  // sha256("abc")
      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  EXPECT_EQ(ids(c.get("/v1/patches?license_fingerprint=" + abc)),
            (Ids{all[1], all[0]}));
  EXPECT_EQ(
      ids(c.get("/v1/patches?license=MIT&license_fingerprint=sha256:" + abc)),
      (Ids{all[0]}));
  EXPECT_EQ(ids(c.get("/v1/patches?session=s1")), (Ids{all[3], all[2]}));
  EXPECT_EQ(ids(c.get("/v1/patches?diff_digest=" + std::string(64, '0'))),
            Ids{});
  Json whole = c.get("/v1/patches/" + all[1]).json();
  EXPECT_EQ(whole["provenance"][0]["license_fingerprint"], abc);
  EXPECT_EQ(whole["contributors"][0]["vector_id"], "v1");
  EXPECT_EQ(whole["contributors"][0]["session_id"], "s0");
  EXPECT_TRUE(whole["metrics"].is_object()) << whole.dump(2);

  Reply page = c.get("/v1/patches?limit=2&license=MIT");
  EXPECT_EQ(ids(page), (Ids{all[4], all[3]}));
  std::string link = page.headers["link"];
  ASSERT_NE(link.find(">; rel=\"next\""), std::string::npos) << link;
  page = c.get(link.substr(1, link.find('>') - 1));
  EXPECT_EQ(ids(page), (Ids{all[2], all[0]}));
  EXPECT_EQ(page.json()["cursor"], nullptr);
  EXPECT_EQ(page.headers.count("link"), 0u);

  for (const auto& [query, field] :
       std::vector<std::pair<std::string, std::string>>{
           {"limit=0", "limit"},
           {"limit=1001", "limit"},
           {"limit=5x", "limit"},
           {"cursor=no", "cursor"},
           {"license=", "license"},
           {"license=MIT&license=MIT", "license"},
           {"vector=" + std::string(2000, 'v'), "vector"},
           {"outcome=zzz", "outcome"},
           {"outcome=Applied", "outcome"},
           {"outcome=", "outcome"},
           {"repo=", "repo"},
           {"session=", "session"},
           {"session_id=s1", "session_id"},
           {"license_fingerprint=abc", "license_fingerprint"},
           {"diff_digest=sha256:" + std::string(64, 'A'), "diff_digest"},
           {"colour=red", "colour"}}) {
    Reply r = c.get("/v1/patches?" + query);
    EXPECT_EQ(r.status, 400) << query;
    EXPECT_EQ(r.field(), field) << r.body;
  }

  Reply r = c.get("/v1/patches/" + all[4] + "/ancestry");
  EXPECT_EQ(ids(r), newest);
  EXPECT_EQ(r.json()["truncated"], false);
  EXPECT_EQ(r.json()["missing"], nullptr);
  EXPECT_EQ(r.json()["patches"][0]["provenance"][0]["vector_id"], "v4");

  const std::string stranger = "/v1/patches/01900000-0000-7000-8000-00000000ff";
  for (const std::string& path :
       {stranger + "01", stranger + "01/ancestry", stranger + "01/reverse_diff",
        std::string("/v1/patches/no"), "/v1/patches/" + all[0] + "/nothing"}) {
    EXPECT_EQ(c.get(path).status, 404) << path;
  }
  EXPECT_EQ(c.get("/v1/patches/" + all[0] + "?full=1").field(), "full");
  EXPECT_EQ(c.post("/v1/patches", "{}").status, 405);
}

TEST_F(PatchRoutes, ARepositoryIsFoundUnderEachOfItsNames) {
  options_.repo_roots = {"/srv/a", "/srv/b/"};
  start_real();
  Client c = local();
  Ids all;
  for (const char* repo :
       {"r", "/srv/a/r", "/srv/b/r", "/srv/a/r2", "r2", "/srv/b/deep/r"}) {
    all.push_back(patched(c, {{"repo", repo}}, applied()));
    usleep(2000);  // ids are in order of the millisecond
  }
  EXPECT_EQ(ids(c.get("/v1/patches?repo=/srv/a/r")), (Ids{all[1], all[0]}));
  EXPECT_EQ(ids(c.get("/v1/patches?repo=%2Fsrv%2Fa%2Fr%2F")),
            (Ids{all[1], all[0]}));
  EXPECT_EQ(ids(c.get("/v1/patches?repo=/srv/b/r")), (Ids{all[2], all[0]}));
  EXPECT_EQ(ids(c.get("/v1/patches?repo=r")), (Ids{all[2], all[1], all[0]}));
  EXPECT_EQ(ids(c.get("/v1/patches?repo=r2&outcome=applied")),
            (Ids{all[4], all[3]}));
  EXPECT_EQ(ids(c.get("/v1/patches?path=a.py&repo=deep/r")), (Ids{all[5]}));
  Reply page = c.get("/v1/patches?repo=r&limit=2");
  EXPECT_EQ(ids(page), (Ids{all[2], all[1]}));
  EXPECT_EQ(ids(c.get("/v1/patches?repo=r&cursor=" +
                      page.json()["cursor"].get<std::string>())),
            (Ids{all[0]}));
  for (const char* away : {"/srv/c/r", "/srv/a", "/srv/ab/r"}) {
    Reply r = c.get(std::string("/v1/patches?repo=") + away);
    EXPECT_EQ(r.status, 400) << away;
    EXPECT_EQ(r.field(), "repo");
    EXPECT_NE(r.body.find("/srv/a, /srv/b"), std::string::npos) << r.body;
  }
}

TEST_F(PatchRoutes, AnOutcomeThatIsNoneIsToldThoseThereAre) {
  start_real();
  Client c = local();
  Reply r = c.get("/v1/patches?outcome=zzz");
  EXPECT_EQ(r.status, 400);
  for (const char* one : {"zzz", "applied", "no_change", "conflict", "rejected",
                          "tests_failed", "approval_denied", "dead"}) {
    EXPECT_NE(r.json()["detail"].get<std::string>().find(one),
              std::string::npos)
        << r.body;
    if (std::string(one) == "zzz") continue;
    EXPECT_EQ(c.get(std::string("/v1/patches?outcome=") + one).status, 200);
  }
}

TEST_F(PatchRoutes, ADiffThatIsTooLongIsToldTheOtherWay) {
  start_real();
  for (const std::size_t bytes : {kPayloadBytesMax + 1, std::size_t{5} << 20}) {
    Client c = local();
    Reply r = c.post("/v1/jobs",
                     Json{{"kind", "patch.apply"},
                          {"payload", {{"diff", std::string(bytes, 'x')}}}}
                         .dump());
    EXPECT_EQ(r.status, 413);
    EXPECT_NE(r.body.find("payload.diff_artifact"), std::string::npos)
        << r.body;
  }
}

TEST_F(PatchRoutes, AJobThatHasNotEndedIsNoPatch) {
  start_real();
  Client c = local();
  Reply r = c.post("/v1/jobs", R"({"kind":"patch.apply"})");
  std::string id = r.json()["id"], same;
  EXPECT_EQ(c.get("/v1/patches/" + id).status, 404);
  std::string at = lease(c, &same);
  EXPECT_EQ(c.get("/v1/patches/" + id).status, 404);
  c.post(at + "/fail", R"({"code":"oom","retry":false})");
  EXPECT_EQ(c.get("/v1/patches/" + id).json()["outcome"], "dead");
  EXPECT_EQ(c.post("/v1/jobs/" + id + "/retry", "").status, 200);
  EXPECT_EQ(c.get("/v1/patches/" + id).status, 404);
  c.post("/v1/jobs/" + id + "/cancel", "");
  EXPECT_EQ(c.get("/v1/patches/" + id).json()["outcome"], "cancelled");
}

TEST_F(PatchRoutes, AMissingStoreIsFilledFromTheHistory) {
  start_real();
  std::string id, back;
  {
    Client c = local();
    id = patched(c, {{"repo", "r"}}, applied());
    back =
        patched(c, {{"patch_id", id}},
                {{"result", {{"outcome", "rolled_back"}, {"restored", {1}}}}},
                "patch.rollback");
    EXPECT_EQ(c.get("/v1/patches/" + id).json()["rolled_back_by"], back);
    for (int i = 0; i < 20; ++i)
      patched(c, Json::object(), Json::object(), "ext.other");
  }
  ASSERT_EQ(stop(), 0);
  std::filesystem::remove_all(root_ + "/patches");
  start_real();
  Client c = local();
  Json patch;
  for (int i = 0; i < 1000; ++i) {
    patch = c.get("/v1/patches/" + id).json();
    if (patch["rolled_back_by"] == back) break;
    usleep(10'000);
  }
  EXPECT_EQ(patch["rolled_back_by"], back);
  EXPECT_EQ(patch["outcome"], "applied");
  EXPECT_EQ(c.get("/v1/patches/" + id + "/reverse_diff").body,
            "bytes of reverse.diff");
  EXPECT_EQ(ids(c.get("/v1/patches")).size(), 1u);
}

// --- approval ---

class Approvals : public PatchRoutes {
 protected:
  const std::string digest_ = "sha256:" + std::string(64, '7');

  // A job that is blocked for approval; its path. token_ becomes its token.
  std::string blocked(Client& c, const std::string& kind = "patch.apply",
                      const std::string& data = "") {
    c.post(
        "/v1/jobs",
        Json{{"kind", kind}, {"payload", {{"approval", "required"}}}}.dump());
    std::string at = lease(c, &id_);
    Json block = {{"reason", "approval"},
                  {"data", {{"digest", digest_}, {"files", {"a.py"}}}}};
    if (!data.empty()) block["data"] = Json::parse(data);
    Reply r = c.post(at + "/block", block.dump());
    EXPECT_EQ(r.status, 200) << r.body;
    token_ = r.json()["blocked"]["token"];
    return "/v1/jobs/" + id_;
  }
  std::string body(const Json& input, const std::string& actor = "boss") {
    return Json{{"token", token_}, {"input", input}, {"actor", actor}}.dump();
  }
  static std::string state(Client& c, const std::string& path) {
    return c.get(path).json()["state"];
  }
  std::string id_, token_;
};

TEST_F(Approvals, TheDigestMustBeTheOneThatWasBlocked) {
  start_real();
  Client c = local();
  std::string path = blocked(c);
  for (const Json& input :
       std::vector<Json>{{{"approve", true}},
                         Json::object(),
                         {{"digest", "sha256:" + std::string(64, '8')}},
                         {{"digest", std::string(64, '7')}},
                         {{"digest", digest_ + "0"}},
                         {{"approve", false}, {"digest", "sha256:other"}}}) {
    Reply r = c.post(path + "/unblock", body(input));
    EXPECT_EQ(r.status, 422) << input << r.body;
    EXPECT_EQ(r.code(), "digest-mismatch");
    EXPECT_EQ(r.field(), "input.digest");
    EXPECT_EQ(state(c, path), "blocked");
  }
  for (const auto& [input, field] : std::vector<std::pair<Json, std::string>>{
           {nullptr, "input"},
           {"yes", "input"},
           {{{"approve", "yes"}, {"digest", digest_}}, "input.approve"},
           {{{"digest", 7}}, "input.digest"},
           {{{"aprove", false}, {"digest", digest_}}, "input.aprove"}}) {
    Reply r = c.post(path + "/unblock", body(input));
    EXPECT_EQ(r.status, 400) << input << r.body;
    EXPECT_EQ(r.field(), field) << r.body;
    if (field == "input") {
      EXPECT_NE(r.body.find("blocked.data.digest"), std::string::npos)
          << r.body;
    }
    EXPECT_EQ(state(c, path), "blocked");
  }
  // The right digest with another's token.
  std::string right = token_;
  token_[0] = token_[0] == '0' ? '1' : '0';
  EXPECT_EQ(c.post(path + "/unblock", body({{"digest", digest_}})).code(),
            "wrong-token");
  token_ = right;
  Reply r = c.post(path + "/unblock", body({{"digest", digest_}}));
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["state"], "ready");
  EXPECT_EQ(c.post(path + "/unblock", body({{"digest", digest_}})).code(),
            "wrong-state");
  EXPECT_EQ(c.post("/v1/jobs/" + std::string("01900000-0000-7000-8000-") +
                       "000000000001/unblock",
                   body({}))
                .status,
            404);
}

TEST_F(Approvals, WhoApprovedGoesToTheWorkerAndIntoThePatch) {
  start_real();
  Client c = local();
  std::string path = blocked(c);
  ASSERT_EQ(c.post(path + "/unblock", body({{"approve", true},
                                            {"digest", digest_},
                                            {"comment", "looks good"}},
                                           "ann"))
                .status,
            200);
  Reply r = c.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  Json leased = r.json()["leases"][0];
  EXPECT_EQ(leased["job"]["input"]["digest"], digest_);
  EXPECT_EQ(leased["job"]["attempt"], 1);
  Json done = applied();
  done.erase("artifacts");
  r = c.post("/v1/leases/" + leased["token"].get<std::string>() + "/complete",
             done.dump());
  ASSERT_EQ(r.status, 200) << r.body;
  Json approval = c.get("/v1/patches/" + id_).json()["approval"];
  EXPECT_EQ(approval["state"], "approved");
  EXPECT_EQ(approval["actor"], "ann");
  EXPECT_EQ(approval["comment"], "looks good");
  EXPECT_EQ(approval["digest"], digest_);
  EXPECT_NE(approval["at"], nullptr);
}

TEST_F(Approvals, TheBaseThatWasShownGoesToTheWorker) {
  start_real();
  Client c = local();
  const std::string base(40, 'a'), other(40, 'b');
  const Json data = {{"digest", digest_}, {"base_commit", base}};
  std::string path = blocked(c, "patch.apply", data.dump());
  EXPECT_EQ(c.get(path).json()["blocked"]["data"]["base_commit"], base);
  // Whoever names a base means the one that was shown.
  Reply r = c.post(path + "/unblock",
                   body({{"digest", digest_}, {"base_commit", other}}));
  EXPECT_EQ(r.status, 422) << r.body;
  EXPECT_EQ(r.field(), "input.base_commit");
  EXPECT_EQ(state(c, path), "blocked");
  ASSERT_EQ(c.post(path + "/unblock",
                   body({{"digest", digest_}, {"comment", "a \"b\""}}))
                .status,
            200);
  restart();  // what was approved survives
  Client d = local();
  r = d.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  EXPECT_EQ(r.json()["leases"][0]["job"]["input"],
            (Json{{"approve", true},
                  {"digest", digest_},
                  {"base_commit", base},
                  {"comment", "a \"b\""}}));
  // A job that was blocked without a base takes none from its approver.
  d.post("/v1/leases/" + r.json()["leases"][0]["token"].get<std::string>() +
             "/complete",
         applied().dump());
  path = blocked(d, "patch.apply", Json{{"digest", digest_}}.dump());
  r = d.post(path + "/unblock",
             body({{"digest", digest_}, {"base_commit", base}}));
  EXPECT_EQ(r.status, 422) << r.body;
  EXPECT_EQ(r.field(), "input.base_commit");
}

TEST_F(Approvals, ADenialNeedsNoDigestAndIsTheWorkersToEnd) {
  start_real();
  Client c = local();
  std::string path = blocked(c);
  Reply r = c.post(path + "/unblock", body({{"approve", false}}, "eve"));
  ASSERT_EQ(r.status, 200) << r.body;
  restart();  // who said no survives
  Client d = local();
  r = d.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  Json leased = r.json()["leases"][0];
  EXPECT_EQ(leased["job"]["input"]["approve"], false);
  d.post("/v1/leases/" + leased["token"].get<std::string>() + "/complete",
         R"({"verdict":"fail","result":{"outcome":"approval_denied"}})");
  Json patch = d.get("/v1/patches/" + id_).json();
  EXPECT_EQ(patch["outcome"], "approval_denied");
  EXPECT_EQ(patch["approval"]["state"], "denied");
  EXPECT_EQ(patch["approval"]["actor"], "eve");
}

TEST_F(Approvals, WhatBindsNothingIsFreeElsewhereAndRefusedForPatches) {
  start_real();
  Client c = local();
  std::string path = blocked(c, "ext.deploy", R"({"ask":"boss"})");
  EXPECT_EQ(c.post(path + "/unblock", body({{"approve", true}})).status, 200);
  std::string at = lease(c, &id_);
  c.post(at + "/complete", "");
  path = blocked(c, "patch.apply", R"({"files":[]})");
  EXPECT_EQ(c.post(path + "/unblock", body({{"approve", true}})).code(),
            "digest-mismatch");
  EXPECT_EQ(c.post(path + "/unblock", body({{"approve", false}})).status, 200);
}

}  // namespace
}  // namespace machina::test
