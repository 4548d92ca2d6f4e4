// A patch is pushed and taken back, through the whole product.

#include <poll.h>
#include <sys/inotify.h>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class Rollback : public EndToEnd {
 protected:
  void make_repository() {
    repo_ = p().root() + "/repos/r";
    ASSERT_EQ(sh("git init -q -b main " + repo_ + "; cd " + repo_ +
                 "; seq 1 20 >a.txt; echo keep >b.txt; echo gone >c.txt; " +
                 kGit + " add -A; " + kGit +
                 " commit -q -m base; "
                 "echo mine >>b.txt"),
              0);
  }
  int sh(const std::string& line) { return p().shell("set -e; " + line); }
  std::string out(const std::string& command) {
    const std::string file = p().dir() + "/out.txt";
    EXPECT_EQ(sh("cd " + repo_ + "; " + command + " >" + file), 0) << command;
    return read_file(file);
  }
  // Changes lines 2 and 18 of a.txt, makes d/new.txt, removes c.txt.
  std::string patch(bool push = true) {
    const std::string diff =
        "diff --git a/a.txt b/a.txt\n--- a/a.txt\n+++ b/a.txt\n"
        "@@ -1,3 +1,3 @@\n 1\n-2\n+two\n 3\n"
        "@@ -17,3 +17,3 @@\n 17\n-18\n+eighteen\n 19\n"
        "diff --git a/c.txt b/c.txt\ndeleted file mode 100644\n"
        "--- a/c.txt\n+++ /dev/null\n@@ -1 +0,0 @@\n-gone\n"
        "diff --git a/d/new.txt b/d/new.txt\nnew file mode 100644\n"
        "--- /dev/null\n+++ b/d/new.txt\n@@ -0,0 +1 @@\n+new\n";
    std::string id = p().submit({{"kind", "patch.apply"},
                                 {"payload",
                                  {{"repo", "r"},
                                   {"diff", diff},
                                   {"description", "a change"},
                                   {"push", push}}}});
    Json job = p().wait_end(id);
    EXPECT_EQ(job["result"]["outcome"], "applied") << job.dump(2);
    branch_ = "review/" + id;
    return id;
  }
  Json rollback(const std::string& id, const Json& region = nullptr) {
    Json payload = {{"patch_id", id}};
    if (!region.is_null()) payload["region"] = region;
    return p().wait_end(
        p().submit({{"kind", "patch.rollback"}, {"payload", payload}}));
  }
  // A commit of `change` on the patch's branch, without a checkout of it.
  void commit_on_branch(const std::string& change) {
    ASSERT_EQ(sh("cd " + repo_ + "; " + kGit + " worktree add -q ../w " +
                 branch_ + "; cd ../w; " + change + "; " + kGit + " add -A; " +
                 kGit + " commit -q -m later; cd " + repo_ + "; " + kGit +
                 " worktree remove -f ../w"),
              0)
        << read_file(p().dir() + "/shell.log");
  }
  std::string refs() { return out("git for-each-ref"); }

  const std::string kGit = "git -c user.name=E2E -c user.email=e2e@localhost";
  std::string repo_, branch_;
};

TEST_P(Rollback, BringsThePreImageBackAndTwiceIsANoOp) {
  start();
  make_repository();
  std::string id = patch();
  const std::string checkout = out("git status --porcelain; cat a.txt b.txt");
  Json job = rollback(id);
  ASSERT_EQ(job["state"], "succeeded") << job.dump(2);
  EXPECT_EQ(job["result"]["outcome"], "rolled_back");
  EXPECT_EQ(job["result"]["verified"], true);
  EXPECT_EQ(job["result"]["restored"].size(), 3u);
  EXPECT_EQ(out("git rev-parse " + branch_ + "^{tree}"),
            out("git rev-parse main^{tree}"));
  EXPECT_EQ(out("git rev-parse " + branch_),
            job["result"]["commit"].get<std::string>() + "\n");
  EXPECT_EQ(out("git rev-list --count main.." + branch_), "2\n");
  EXPECT_EQ(sh("cd " + repo_ + "; git fsck --strict"), 0);
  Json record = p().get("/v1/patches/" + id).json();
  EXPECT_EQ(record["rolled_back_by"], job["id"]) << record.dump(2);
  EXPECT_EQ(record["branch_log"].back()["action"], "rolled_back");

  const std::string before = refs();
  Json again = rollback(id);
  EXPECT_EQ(again["state"], "succeeded") << again.dump(2);
  EXPECT_EQ(again["result"]["outcome"], "already_rolled_back");
  EXPECT_EQ(again["result"]["restored"], Json::array());
  EXPECT_EQ(again["result"]["pushed"], true);  // the branch has it
  EXPECT_EQ(refs(), before);
  EXPECT_EQ(out("git status --porcelain; cat a.txt b.txt"), checkout);
}

TEST_P(Rollback, OfManyAtOnceOneDoesItAndAllSayThatItIsDone) {
  Serve serve;
  serve.workers = 4;
  start(serve);
  make_repository();
  const std::string id = patch();
  std::vector<std::string> jobs;
  for (int i = 0; i < 6; ++i) {
    jobs.push_back(p().submit(
        {{"kind", "patch.rollback"}, {"payload", {{"patch_id", id}}}}));
  }
  int done = 0;
  for (const std::string& one : jobs) {
    const Json job = p().wait_end(one, 120000);
    EXPECT_EQ(job["state"], "succeeded") << job.dump(2);
    EXPECT_EQ(job["result"]["pushed"], true) << job.dump(2);
    if (job["result"]["outcome"] == "rolled_back") {
      ++done;
      continue;
    }
    EXPECT_EQ(job["result"]["outcome"], "already_rolled_back") << job.dump(2);
  }
  EXPECT_EQ(done, 1);
  EXPECT_EQ(out("git rev-list --count main.." + branch_), "2\n");
  EXPECT_EQ(out("git rev-parse " + branch_ + "^{tree}"),
            out("git rev-parse main^{tree}"));
}

// Another rollback has the branch's lock when this one comes to move it, and
// is done a moment later.
TEST_P(Rollback, TheLoserOfTheRaceLooksAgain) {
  start();
  make_repository();
  const std::string id = patch();
  const std::string ref = ".git/refs/heads/" + branch_;
  const std::string back =
      out(kGit + " commit-tree -p " + branch_ + " -m back 'main^{tree}'");
  out("echo other >" + ref + ".lock");
  const int watch = inotify_init1(IN_CLOEXEC);
  ASSERT_GE(
      inotify_add_watch(watch, (repo_ + "/" + ref + ".lock").c_str(), IN_OPEN),
      0);
  const std::string job =
      p().submit({{"kind", "patch.rollback"}, {"payload", {{"patch_id", id}}}});
  // As soon as its attempt to move the branch has looked at the lock.
  pollfd opened{watch, POLLIN, 0};
  EXPECT_EQ(poll(&opened, 1, 60'000), 1);
  close(watch);
  out("echo " + back.substr(0, 40) + " >" + ref + "; rm " + ref + ".lock");
  const Json end = p().wait_end(job);
  EXPECT_EQ(end["state"], "succeeded") << end.dump(2);
  EXPECT_EQ(end["result"]["outcome"], "already_rolled_back") << end.dump(2);
  EXPECT_EQ(end["result"]["pushed"], true);
  EXPECT_EQ(out("git rev-parse " + branch_), back);
  EXPECT_EQ(end["result"]["bundle_artifact"], nullptr);
  EXPECT_EQ(end["result"]["conflicts"], Json::array());
}

TEST_P(Rollback, WhatChangedSinceIsAConflictThatNamesIt) {
  start();
  make_repository();
  std::string id = patch();
  commit_on_branch("echo more >>a.txt");
  const std::string before = refs();
  Json job = rollback(id);
  EXPECT_EQ(job["state"], "failed") << job.dump(2);
  EXPECT_EQ(job["error"]["code"], "verdict");
  EXPECT_EQ(job["result"]["outcome"], "conflict");
  ASSERT_EQ(job["result"]["conflicts"].size(), 1u) << job.dump(2);
  EXPECT_EQ(job["result"]["conflicts"][0]["path"], "a.txt");
  EXPECT_EQ(refs(), before);
}

TEST_P(Rollback, WhatCameBesideItStays) {
  start();
  make_repository();
  std::string id = patch();
  commit_on_branch("echo other >other.txt");
  ASSERT_EQ(sh("cd " + repo_ + "; git pack-refs --all"), 0);
  Json job = rollback(id);
  ASSERT_EQ(job["state"], "succeeded") << job.dump(2);
  EXPECT_EQ(out("git show " + branch_ + ":other.txt"), "other\n");
  EXPECT_EQ(out("git diff --name-only main " + branch_), "other.txt\n");
}

TEST_P(Rollback, ARegionTakesItsHunksAlone) {
  start();
  make_repository();
  std::string id = patch();
  const Json region = {{"path", "a.txt"}, {"start_line", 1}, {"end_line", 5}};
  Json job = rollback(id, region);
  ASSERT_EQ(job["state"], "succeeded") << job.dump(2);
  EXPECT_EQ(job["result"]["outcome"], "rolled_back");
  EXPECT_EQ(out("git show " + branch_ + ":a.txt | sed -n '2p;18p'"),
            "2\neighteen\n");
  EXPECT_EQ(out("git show " + branch_ + ":d/new.txt"), "new\n");
  const std::string before = refs();
  job = rollback(id, region);
  EXPECT_EQ(job["result"]["outcome"], "already_rolled_back") << job.dump(2);
  EXPECT_EQ(refs(), before);
  job = rollback(id, {{"path", "a.txt"}, {"start_line", 9}, {"end_line", 9}});
  EXPECT_EQ(job["result"]["outcome"], "no_change") << job.dump(2);
  // The rest of it, and then all of it.
  job = rollback(id, {{"path", "a.txt"}, {"start_line", 18}});
  EXPECT_EQ(job["result"]["outcome"], "rolled_back") << job.dump(2);
  EXPECT_EQ(out("git diff --name-only main " + branch_), "c.txt\nd/new.txt\n");
  job = rollback(id);
  EXPECT_EQ(job["result"]["outcome"], "rolled_back") << job.dump(2);
  EXPECT_EQ(out("git rev-parse " + branch_ + "^{tree}"),
            out("git rev-parse main^{tree}"));
}

TEST_P(Rollback, ACheckedOutBranchAndAMissingOneAreConflicts) {
  start();
  make_repository();
  std::string id = patch();
  ASSERT_EQ(sh("cd " + repo_ + "; git worktree add -q ../w " + branch_), 0);
  const std::string before = refs();
  Json job = rollback(id);
  EXPECT_EQ(job["result"]["outcome"], "conflict") << job.dump(2);
  EXPECT_NE(job["result"]["reason"].get<std::string>().find("checked out"),
            std::string::npos);
  EXPECT_EQ(refs(), before);
  ASSERT_EQ(sh("cd " + repo_ +
               "; git worktree remove -f ../w; git branch -q "
               "-D " +
               branch_),
            0);
  job = rollback(id);
  EXPECT_EQ(job["result"]["outcome"], "conflict") << job.dump(2);
  EXPECT_NE(job["result"]["reason"].get<std::string>().find("not there"),
            std::string::npos);
}

// Git's commit and what the server wrote down of it must agree, before and
// after: a worker played over HTTP writes down something else.
TEST_P(Rollback, WhatTheServerWroteDownIsCompared) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  make_repository();
  const auto sha = [&](const std::string& rev) {
    return out("git show " + rev + ":a.txt | sha256sum").substr(0, 64);
  };
  std::vector<std::string> ids;
  for (const bool wrong_before : {false, true}) {
    const std::string id = p().submit(
        {{"kind", "patch.apply"},
         {"payload",
          {{"repo", "r"},
           {"push", true},
           {"diff", "--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-1\n+one\n"}}}});
    const Json lease = p().post("/v1/leases", {{"worker", "played"},
                                               {"isolation_level", "L4"},
                                               {"kinds", {"patch.apply"}}})
                           .json()["leases"][0];
    branch_ = "review/" + id;
    out("git branch " + branch_ + " main");
    commit_on_branch("sed -i s/^1$/one/ a.txt");
    const std::string other(64, '0');
    const Json file = {{"path", "a.txt"},
                       {"added", 1},
                       {"removed", 1},
                       {"sha256_before", wrong_before ? other : sha("main")},
                       {"sha256_after", wrong_before ? sha(branch_) : other}};
    const Answer answer = p().post(
        "/v1/leases/" + lease["token"].get<std::string>() + "/complete",
        {{"verdict", "pass"},
         {"result",
          {{"outcome", "applied"},
           {"branch", branch_},
           {"commit", out("git rev-parse " + branch_).substr(0, 40)},
           {"base_commit", out("git rev-parse main").substr(0, 40)},
           {"pushed", true},
           {"files", {file}}}}});
    ASSERT_EQ(answer.status, 200) << answer.body;
    ids.push_back(id);
  }
  const std::string before = refs();
  ASSERT_EQ(p().call("PUT", "/v1/workers/scale", R"({"count":1})").status, 200);
  Json job = rollback(ids[0]);
  EXPECT_EQ(job["result"]["outcome"], "conflict") << job.dump(2);
  EXPECT_EQ(job["result"]["conflicts"][0]["path"], "a.txt");
  job = rollback(ids[1]);
  EXPECT_EQ(job["result"]["outcome"], "conflict") << job.dump(2);
  EXPECT_NE(job["result"].value("reason", "").find("not what was recorded"),
            std::string::npos)
      << job.dump(2);
  EXPECT_EQ(refs(), before);
}

TEST_P(Rollback, WhatWasNotPushedGivesABundle) {
  start();
  make_repository();
  std::string id = patch(false);
  const std::string before = refs();
  Json job = rollback(id);
  ASSERT_EQ(job["state"], "succeeded") << job.dump(2);
  EXPECT_EQ(job["result"]["outcome"], "rolled_back");
  EXPECT_EQ(job["result"]["pushed"], false);
  EXPECT_EQ(job["result"]["bundle_artifact"], "patch.bundle");
  EXPECT_EQ(refs(), before);
  job = rollback(id);
  EXPECT_EQ(job["result"]["outcome"], "already_rolled_back") << job.dump(2);
}

TEST_P(Rollback, WhatIsNoAppliedPatchIsRefused) {
  start();
  make_repository();
  Json job = rollback("01900000-0000-7000-8000-000000000001");
  EXPECT_EQ(job["state"], "failed");
  EXPECT_EQ(job["error"]["code"], "invalid_payload") << job.dump(2);
  EXPECT_NE(job["error"].value("message", "").find("machina patches list"),
            std::string::npos)
      << job["error"];
  std::string id = p().submit(
      {{"kind", "patch.apply"},
       {"payload",
        {{"repo", "r"},
         {"diff", "--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-no\n+yes\n"}}}});
  EXPECT_EQ(p().wait_end(id)["result"]["outcome"], "conflict");
  job = rollback(id);
  EXPECT_EQ(job["state"], "failed");
  EXPECT_EQ(job["result"]["outcome"], "rejected") << job.dump(2);
  const Answer answer = p().post(
      "/v1/jobs",
      {{"kind", "patch.rollback"}, {"payload", {{"patch_id", "la\ntest"}}}});
  EXPECT_EQ(answer.status, 400);
  EXPECT_EQ(answer.json().value("field", ""), "payload.patch_id");
  EXPECT_NE(answer.json().value("detail", "").find("\"la\\u000atest\""),
            std::string::npos)
      << answer.body;
}

// --- what the tests say ---

class TestedRollback : public Rollback {
 protected:
  // shop.py has a bug that one test knows.
  void make_project() {
    repo_ = p().root() + "/repos/r";
    ASSERT_EQ(sh("git init -q -b main " + repo_ + "; cd " + repo_ +
                 "; printf 'def add(a, b):\\n    return a - b\\n' >shop.py; "
                 "printf 'from shop import add\\ndef test_add():\\n"
                 "    assert add(1, 2) == 3\\ndef test_zero():\\n"
                 "    assert add(0, 0) == 0\\n' >test_shop.py; " +
                 kGit + " add -A; " + kGit + " commit -q -m base"),
              0);
  }
  // Mends the bug and brings tax.py.
  std::string mend(const Json& test = Json::object()) {
    const std::string id =
        p().submit({{"kind", "patch.apply"},
                    {"payload",
                     {{"repo", "r"},
                      {"push", true},
                      {"test", test},
                      {"diff",
                       "--- a/shop.py\n+++ b/shop.py\n@@ -1,2 +1,2 @@\n"
                       " def add(a, b):\n-    return a - b\n+    return a + b\n"
                       "--- /dev/null\n+++ b/tax.py\n@@ -0,0 +1,2 @@\n"
                       "+def tax(a):\n+    return a\n"}}}});
    const Json job = p().wait_end(id, 120000);
    EXPECT_EQ(job["result"]["outcome"], "applied") << job.dump(2);
    branch_ = "review/" + id;
    return id;
  }
  Json rollback_with(const std::string& id, const Json& more) {
    Json payload = {{"patch_id", id}};
    payload.update(more);
    return p().wait_end(
        p().submit({{"kind", "patch.rollback"}, {"payload", payload}}), 120000);
  }
};

TEST_P(TestedRollback, WhatThePatchMendedMayFailAgain) {
  start();
  make_project();
  const std::string id = mend();
  const Json job = rollback_with(id, Json::object());
  ASSERT_EQ(job["state"], "succeeded") << job.dump(2);
  const Json& result = job["result"];
  EXPECT_EQ(result["outcome"], "rolled_back");
  ASSERT_TRUE(result["tests"].is_object()) << result.dump(2);
  EXPECT_EQ(result["tests"]["before"]["passed"], 2);
  EXPECT_EQ(result["tests"]["after"]["passed"], 1);
  EXPECT_EQ(result["tests"]["newly_failing"], Json::array());
  EXPECT_EQ(result["tests"]["failing_again"], Json({"test_shop::test_add"}));
  EXPECT_NE(result["reason"].get<std::string>().find("as before the patch"),
            std::string::npos);
  const auto& artifacts = job["artifacts"];
  EXPECT_NE(artifacts.dump().find("junit-after.xml"), std::string::npos)
      << artifacts.dump();
  const Json record = p().get("/v1/patches/" + id).json();
  const Json& kept = record["rollbacks"][0]["tests"];
  EXPECT_EQ(kept["after"]["failed"], 1) << record.dump(2);
  EXPECT_EQ(kept["failing_again"], Json({"test_shop::test_add"}));
  EXPECT_EQ(kept["newly_failing_count"], 0);
  const Ended shown = p().run({"patches", "show", id, "--server", p().url()});
  EXPECT_NE(shown.out.find("1 of 2 pass, 1 fails as before the patch"),
            std::string::npos)
      << shown.out;
}

TEST_P(TestedRollback, WhatLaterCodeNeedsStaysUnlessNoTestsAreWanted) {
  start();
  make_project();
  const std::string id = mend();
  commit_on_branch(
      "printf 'from tax import tax\\ndef test_tax():\\n"
      "    assert tax(1) == 1\\n' >test_tax.py");
  const std::string before = refs();
  Json job = rollback_with(id, Json::object());
  EXPECT_EQ(job["state"], "failed") << job.dump(2);
  EXPECT_EQ(job["error"]["code"], "verdict");
  const Json& result = job["result"];
  EXPECT_EQ(result["outcome"], "tests_failed");
  EXPECT_EQ(result["verified"], false);
  EXPECT_EQ(result["restored"], Json::array());
  EXPECT_TRUE(result["commit"].is_null());
  EXPECT_TRUE(result["bundle_artifact"].is_null());
  EXPECT_NE(result["tests"]["newly_failing"].dump().find("test_tax"),
            std::string::npos)
      << result.dump(2);
  // The third run, of the files from before the patch, told the two apart.
  EXPECT_EQ(result["tests"]["failing_again"], Json({"test_shop::test_add"}))
      << result.dump(2);
  EXPECT_EQ(refs(), before);
  const Json record = p().get("/v1/patches/" + id).json();
  EXPECT_TRUE(record["rolled_back_by"].is_null());
  EXPECT_EQ(record["rollbacks"][0]["outcome"], "tests_failed");

  job = rollback_with(id, {{"test", nullptr}});
  EXPECT_EQ(job["state"], "succeeded") << job.dump(2);
  EXPECT_EQ(job["result"]["outcome"], "rolled_back");
  EXPECT_TRUE(job["result"]["tests"].is_null());
  EXPECT_NE(refs(), before);
}

// The suite that is given counts, not the patch's own; one that is killed gives
// no verdict, and only where it gave none before the patch, and nothing came
// later, is that no reason.
TEST_P(TestedRollback, ASuiteOfItsOwnAndOneThatDies) {
  start();
  make_project();
  const std::string id =
      mend({{"runner", "command"}, {"command", {"test", "-e", "shop.py"}}});
  const auto dies = [](const std::string& when) {
    return Json{{"test",
                 {{"runner", "command"},
                  {"command", {"sh", "-c", when + " || kill -9 $$"}}}}};
  };
  const std::string before = refs();
  commit_on_branch("echo later >later.txt");
  const std::string later = refs();
  Json job = rollback_with(id, dies("test -e tax.py"));
  EXPECT_EQ(job["result"]["outcome"], "tests_failed") << job.dump(2);
  EXPECT_NE(job["result"].value("reason", "").find("no verdict"),
            std::string::npos);
  EXPECT_EQ(refs(), later);
  ASSERT_EQ(sh("cd " + repo_ + "; git update-ref refs/heads/" + branch_ + " " +
               branch_ + "^"),
            0);
  EXPECT_EQ(refs(), before);
  job = rollback_with(id, dies("test -e tax.py"));
  EXPECT_EQ(job["result"]["outcome"], "rolled_back") << job.dump(2);
  EXPECT_NE(job["result"].value("reason", "").find("nor before the patch"),
            std::string::npos)
      << job.dump(2);
}

// --- what changed since, merged with a yes ---

TEST_P(Rollback, AMergeWaitsForAYesToJustThat) {
  start();
  make_repository();
  const std::string id = patch();
  commit_on_branch("echo more >>a.txt");
  const std::string before = refs();
  const Json payload = {{"patch_id", id}, {"on_conflict", "block"}};
  const std::string job_id =
      p().submit({{"kind", "patch.rollback"}, {"payload", payload}});
  Json job = p().wait_state(job_id, "blocked", 60000);
  ASSERT_EQ(job["state"], "blocked") << job.dump(2);
  Json blocked = job["blocked"];
  EXPECT_EQ(blocked["reason"], "conflict");
  Json data = blocked["data"];
  EXPECT_EQ(data["conflicts"][0]["path"], "a.txt") << data.dump(2);
  EXPECT_EQ(data["conflicts"][0]["merges"], true);
  EXPECT_EQ(data["tip"], out("git rev-parse " + branch_).substr(0, 40));
  EXPECT_NE(data["diff"].get<std::string>().find("\n-two\n+2\n"),
            std::string::npos)
      << data.dump(2);
  EXPECT_EQ(refs(), before);
  const auto answer = [&](const Json& input) {
    return p().post("/v1/jobs/" + job_id + "/unblock",
                    {{"token", blocked["token"]}, {"input", input}});
  };
  const Answer wrong =
      answer({{"approve", true}, {"digest", "sha256:" + std::string(64, '0')}});
  EXPECT_EQ(wrong.status, 422) << wrong.body;
  EXPECT_EQ(wrong.json().value("code", ""), "digest-mismatch");
  EXPECT_EQ(answer({{"approve", true}}).status, 422);

  // What was shown is bound to the tip: another commit, another question.
  const std::string old_digest = data["digest"];
  const std::string old_token = blocked["token"];
  commit_on_branch("echo other >other.txt");
  ASSERT_EQ(answer({{"approve", true}, {"digest", old_digest}}).status, 200);
  job = p().wait_until(job_id, [&](const Json& now) {
    return is_final(now) ||
           (now["state"] == "blocked" && now["blocked"]["token"] != old_token);
  });
  ASSERT_EQ(job["state"], "blocked") << job.dump(2);
  blocked = job["blocked"];
  EXPECT_NE(blocked["data"]["digest"], old_digest);
  const Ended shown =
      p().run({"unblock", job_id, "--approve", "--server", p().url()});
  EXPECT_EQ(shown.code, 0) << shown.out << shown.err;
  EXPECT_NE(shown.out.find("a.txt"), std::string::npos) << shown.out;
  job = p().wait_end(job_id);
  EXPECT_EQ(job["result"]["outcome"], "rolled_back") << job.dump(2);
  EXPECT_EQ(out("git show " + branch_ + ":a.txt"),
            out("{ seq 1 20; echo more; }"));
  EXPECT_EQ(out("git show " + branch_ + ":other.txt"), "other\n");
  EXPECT_EQ(out("git diff --name-only main " + branch_), "a.txt\nother.txt\n");
}

TEST_P(Rollback, WhereNothingMergesSomebodyMendsTheBranchOrSaysNo) {
  start();
  make_repository();
  const std::string id = patch();
  commit_on_branch("sed -i s/^two$/deux/ a.txt");
  const Json payload = {{"patch_id", id}, {"on_conflict", "block"}};
  const auto block = [&] {
    const std::string job_id =
        p().submit({{"kind", "patch.rollback"}, {"payload", payload}});
    const Json job = p().wait_state(job_id, "blocked", 60000);
    EXPECT_EQ(job["blocked"]["data"]["conflicts"][0]["merges"], false)
        << job.dump(2);
    EXPECT_TRUE(job["blocked"]["data"]["digest"].is_null());
    return job;
  };
  Json job = block();
  const std::string before = refs();
  p().post(
      "/v1/jobs/" + job["id"].get<std::string>() + "/unblock",
      {{"token", job["blocked"]["token"]}, {"input", {{"approve", false}}}});
  job = p().wait_end(job["id"]);
  EXPECT_EQ(job["state"], "failed") << job.dump(2);
  EXPECT_EQ(job["result"]["outcome"], "conflict");
  EXPECT_EQ(refs(), before);

  job = block();
  commit_on_branch("sed -i s/^deux$/two/ a.txt");
  const Answer yes = p().post(
      "/v1/jobs/" + job["id"].get<std::string>() + "/unblock",
      {{"token", job["blocked"]["token"]}, {"input", {{"approve", true}}}});
  EXPECT_EQ(yes.status, 200) << yes.body;
  job = p().wait_end(job["id"]);
  EXPECT_EQ(job["result"]["outcome"], "rolled_back") << job.dump(2);
  EXPECT_EQ(out("git rev-parse " + branch_ + "^{tree}"),
            out("git rev-parse main^{tree}"));
}

MACHINA_BOTH(Rollback);
MACHINA_BOTH(TestedRollback);

}  // namespace
}  // namespace machina::e2e
