// patch.apply through the whole product on two real packages with their own
// suites, Debian's networkx and toolz, and with everything killed under it.

#include <signal.h>

#include <algorithm>
#include <fstream>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

constexpr char kPackages[] = "/usr/lib/python3/dist-packages/";
constexpr char kPaths[] =
    "networkx/algorithms/shortest_paths/tests/test_unweighted.py";

class Patch : public EndToEnd {
 protected:
  // The installed package as a repository of one commit, with work that nobody
  // has committed.
  std::string make_repository(const std::string& name) {
    const std::string repo = p().root() + "/repos/" + name;
    must("set -e; mkdir " + repo + "; cp -r " + kPackages + name + " " + repo +
         "; find " + repo +
         " -name __pycache__ -prune -exec rm -rf {} +; "
         "git init -q -b main " +
         repo + "; cd " + repo +
         "; git add -A; "
         "git -c user.name=E2E -c user.email=e2e@localhost commit -qm "
         "installed; echo '# mine' >>" +
         name + "/__init__.py; echo x >new");
    return repo;
  }
  void must(const std::string& line) {
    ASSERT_EQ(p().shell(line), 0) << line << "\n"
                                  << read_file(p().dir() + "/shell.log");
  }
  std::string out(const std::string& line) {
    const std::string file = p().dir() + "/out";
    EXPECT_EQ(p().shell("{ " + line + "; } >" + file + " 2>&1"), 0)
        << line << "\n"
        << read_file(file);
    std::string text = read_file(file);
    while (text.ends_with('\n')) text.pop_back();
    return text;
  }
  // The diff that a replacement in one committed file makes.
  std::string diff(const std::string& repo, const std::string& file,
                   const std::string& sed) {
    const std::string dir = p().dir() + "/edit";
    return out("rm -rf " + dir + "; git clone -q " + repo + " " + dir +
               "; cd " + dir + "; sed -i '" + sed + "' " + file +
               "; git diff") +
           "\n";
  }
  Json request(const std::string& repo, const std::string& text,
               const Json& more = Json::object()) {
    Json payload = {{"repo", repo}, {"diff", text}, {"push", true}};
    payload.update(more);
    return {
        {"kind", "patch.apply"}, {"max_attempts", 20}, {"payload", payload}};
  }
  // The user's files, index, HEAD and configuration.
  std::string state(const std::string& repo) {
    return out("cd " + repo +
               "; find . -path ./.git/objects -prune -o -path "
               "./.git/refs -prune -o -type f -print0 | sort -z | xargs -0 "
               "sha256sum");
  }
  void expect_nothing_left(const std::string& repo) {
    EXPECT_EQ(out("find " + repo + " " + p().root() +
                  "/mirrors '(' -name "
                  "'*.lock' -o -name 'tmp_*' -o -name '*.tmp' ')' ! -name "
                  "machina.lock"),
              "");
    EXPECT_EQ(out("git -C " + repo + " worktree list | wc -l"), "1");
    EXPECT_EQ(out("git -C " + repo + " fsck --no-dangling"), "");
  }
  void expect_landed(const std::string& repo, const Json& job) {
    ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 4000);
    const std::string branch = job["result"]["branch"];
    EXPECT_EQ(out("git -C " + repo + " rev-parse " + branch),
              job["result"]["commit"]);
    EXPECT_EQ(out("git -C " + repo + " rev-parse " + branch + "^"),
              out("git -C " + repo + " rev-parse main"));
  }
};

TEST_P(Patch, NetworkxGoodBreakingAndEscaping) {
  const std::string repo = make_repository("networkx");
  start_prod();
  const std::string before = state(repo);
  const std::string file = "networkx/algorithms/shortest_paths/unweighted.py";
  const Json test = {{"test", {{"select", {kPaths}}}}};
  const std::string good_diff =
      diff(repo, file, "s/^        level += 1$/        level = level + 1/");
  const std::string broken_diff =
      diff(repo, file, "s/^        level += 1$/        level += 2/");
  std::string escape = broken_diff;
  for (std::size_t at; (at = escape.find(file)) != std::string::npos;) {
    escape.replace(at, file.size(), "../../etc/x");
  }
  const std::string good = p().submit(request("networkx", good_diff, test));
  const std::string bad = p().submit(request("networkx", broken_diff, test));
  const std::string out_of = p().submit(request("networkx", escape, test));
  Json job = p().wait_end(good, 120000);
  EXPECT_EQ(job["result"]["outcome"], "applied") << job.dump(1).substr(0, 3000);
  expect_landed(repo, job);
  EXPECT_GE(job["isolation"].value("level", ""), least_level());
  EXPECT_GT(job["result"]["tests"]["after"]["passed"], 10);
  EXPECT_EQ(job["result"]["alignment"], nullptr);
  const Answer bundle = p().get("/v1/jobs/" + good + "/artifacts/patch.bundle");
  EXPECT_EQ(bundle.status, 200);
  EXPECT_TRUE(bundle.body.starts_with("# v2 git bundle"));
  job = p().wait_end(bad, 120000);
  EXPECT_EQ(job["state"], "failed");
  EXPECT_EQ(job["attempt"], 1);
  EXPECT_EQ(job["error"]["code"], "verdict");
  EXPECT_EQ(job["result"]["outcome"], "tests_failed");
  EXPECT_NE(job["result"]["tests"]["newly_failing"].dump().find(
                "test_single_source_shortest_path_length"),
            std::string::npos)
      << job["result"]["tests"]["newly_failing"].dump(1);
  job = p().wait_end(out_of);
  EXPECT_EQ(job["state"], "failed");
  EXPECT_EQ(job["result"]["outcome"], "rejected");
  EXPECT_NE(job["result"].value("reason", "").find(".."), std::string::npos);
  EXPECT_EQ(out("git -C " + repo + " branch --list 'review/*' | wc -l"), "1");
  EXPECT_EQ(state(repo), before);
  expect_nothing_left(repo);

  // What is refused at the door.
  for (const auto& [payload, field] : std::vector<std::pair<Json, std::string>>{
           {{{"repo", "networkx"}, {"diff", "hello\n"}}, "payload.diff"},
           {{{"repo", "/etc"}, {"diff", good_diff}}, "payload.repo"},
           {{{"repo", "networkx"}, {"diff", good_diff}, {"x", 1}}, "payload.x"},
           {{{"repo", "networkx"},
             {"diff", good_diff},
             {"test", {{"repo", "networkx"}}}},
            "payload.test.repo"},
           {{{"repo", "networkx"}, {"diff", good_diff}, {"branch", "a..b"}},
            "payload.branch"},
           {{{"repo", "networkx"}, {"diff", good_diff}, {"base_rev", "a\nb"}},
            "payload.base_rev"},
       }) {
    const Answer answer =
        p().post("/v1/jobs", {{"kind", "patch.apply"}, {"payload", payload}});
    EXPECT_EQ(answer.status, 400) << payload.dump().substr(0, 200);
    EXPECT_EQ(answer.json().value("field", ""), field) << answer.body;
    EXPECT_EQ(answer.json().value("detail", "").find('\n'), std::string::npos)
        << answer.body;
  }
}

TEST_P(Patch, ToolzBlocksForApprovalThenIsApplied) {
  const std::string repo = make_repository("toolz");
  start_prod();
  std::string before = state(repo);
  const Json test = {{"test", {{"select", {"toolz/tests/test_recipes.py"}}}}};
  Json ask = test;
  ask["approval"] = "required";
  const std::string good = diff(repo, "toolz/recipes.py",
                                "s/^from .itertoolz/from toolz.itertoolz/");
  const std::string id = p().submit(request("toolz", good, ask));
  Json job = p().wait_state(id, "blocked");
  ASSERT_EQ(job["state"], "blocked") << job.dump(1);
  EXPECT_EQ(job["blocked"]["reason"], "approval");
  const Json data = job["blocked"]["data"];
  EXPECT_EQ(data["files"][0]["path"], "toolz/recipes.py");
  EXPECT_EQ(state(repo), before);
  // The branch goes on meanwhile; what was shown is what is approved.
  const std::string base = out("git -C " + repo + " rev-parse main");
  EXPECT_EQ(data["base_commit"], base);
  must("cd " + repo +
       "; git -c user.name=E2E -c user.email=e2e@localhost commit -qm more "
       "--allow-empty");
  before = state(repo);
  const Answer yes =
      p().post("/v1/jobs/" + id + "/unblock",
               {{"token", job["blocked"]["token"]},
                {"input", {{"approve", true}, {"digest", data["digest"]}}}});
  EXPECT_EQ(yes.status, 200) << yes.body;
  job = p().wait_end(id, 120000);
  ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 4000);
  EXPECT_EQ(job["result"]["base_commit"], base);
  EXPECT_EQ(out("git -C " + repo + " rev-parse review/" + id + "^"), base);
  EXPECT_EQ(job["attempt"], 1);
  const Json record = p().get("/v1/patches/" + id).json();
  EXPECT_EQ(record["base_commit"], base);
  EXPECT_EQ(record["approval"]["state"], "approved");
  const std::string broken = p().submit(request(
      "toolz", diff(repo, "toolz/recipes.py", "s/map(key, seq)/map(key, [])/"),
      test));
  job = p().wait_end(broken, 120000);
  EXPECT_EQ(job["result"]["outcome"], "tests_failed")
      << job.dump(1).substr(0, 3000);
  // By the artifact of another job.
  Json by = request("toolz", "");
  by["payload"].erase("diff");
  by["payload"]["diff_artifact"] = id + "/patch.diff";
  job = p().wait_end(p().submit(by));
  expect_landed(repo, job);
  EXPECT_EQ(state(repo), before);
  expect_nothing_left(repo);
}

// A repository that is not its server's: what comes into it is its owner's.
TEST_P(Patch, ARepositoryOfAnotherOwner) {
  if (!as_root()) GTEST_SKIP() << "only root serves other people's files";
  const std::string repo = make_repository("toolz");
  const std::string good = diff(repo, "toolz/recipes.py",
                                "s/^from .itertoolz/from toolz.itertoolz/");
  must("chown -R 54321:54321 " + repo);
  start_prod();
  const Json test = {{"test", {{"select", {"toolz/tests/test_recipes.py"}}}}};
  const Json job = p().wait_end(p().submit(request("toolz", good, test)));
  ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 4000);
  EXPECT_EQ(out("cat " + repo + "/.git/refs/heads/" +
                job["result"]["branch"].get<std::string>()),
            job["result"]["commit"]);
  EXPECT_EQ(out("find " + repo + " ! -uid 54321"), "");
  const Json back = p().wait_end(p().submit(
      {{"kind", "patch.rollback"}, {"payload", {{"patch_id", job["id"]}}}}));
  EXPECT_EQ(back["result"]["outcome"], "rolled_back") << back.dump(1);
  EXPECT_EQ(out("find " + repo + " ! -uid 54321"), "");
}

TEST_P(Patch, OneAtATimeInARepositoryAndBesideEachOtherInTwo) {
  const std::string repo = make_repository("toolz");
  must("cd " + p().root() + "/repos; cp -a toolz other");
  start_prod(3);
  const Json test = {{"test", {{"select", {"toolz/tests/test_recipes.py"}}}}};
  const std::string slow = diff(
      repo, "toolz/recipes.py",
      "s/^from .itertoolz/import time; time.sleep(3)\\nfrom toolz.itertoolz/");
  const std::string good = diff(repo, "toolz/recipes.py",
                                "s/^from .itertoolz/from toolz.itertoolz/");
  const std::string first = p().submit(request("toolz", slow, test));
  p().wait_state(first, "running");
  // By its path, and by its name again: the same repository.
  const std::string second = p().submit(request(repo, good, test));
  const std::string third = p().submit(request("toolz", good, test));
  const std::string beside = p().submit(request("other", good, test));
  EXPECT_EQ(p().job(second)["waiting_for_concurrency"], true);
  EXPECT_EQ(p().job(third)["waiting_for_concurrency"], true);
  const Json other = p().wait_end(beside, 60000);
  const Json a = p().wait_end(first, 60000), b = p().wait_end(second, 60000),
             c = p().wait_end(third, 60000);
  for (const Json& job : {a, b, c, other}) {
    ASSERT_EQ(job["state"], "succeeded") << job.dump(1);
    EXPECT_EQ(job["result"]["outcome"], "applied");
  }
  // Times are RFC 3339 of one length: they sort as text.
  EXPECT_LT(other["started_at"], a["finished_at"]);
  EXPECT_GE(b["started_at"], a["finished_at"]);
  EXPECT_GE(c["started_at"], b["finished_at"]);
  expect_nothing_left(repo);
}

TEST_P(Patch, ServerPoolAndSuiteKilledMeanwhile) {
  if (!as_root()) GTEST_SKIP() << "once is enough for CI";
  const std::string repo = make_repository("toolz");
  start_prod(1,
             {{"MACHINA_RETRY_MIN_MS", "50"}, {"MACHINA_RETRY_MAX_MS", "200"}});
  const std::string before = state(repo);
  const Json test = {{"test", {{"select", {"toolz/tests/test_recipes.py"}}}}};
  const std::string good = diff(repo, "toolz/recipes.py",
                                "s/^from .itertoolz/from toolz.itertoolz/");
  // The server: the job runs on, and ends where it began.
  std::string id = p().submit(request("toolz", good, test));
  p().wait_state(id, "running");
  sleep_ms(400);
  p().kill_server();
  restart();
  Json job = p().wait_end(id, 120000);
  expect_landed(repo, job);
  EXPECT_EQ(job["attempt"], 1);
  // The pool: its sandboxes die with it, and another takes the job up.
  id = p().submit(request("toolz", good, test));
  p().wait_state(id, "running");
  sleep_ms(600);
  for (const pid_t pid : p().processes_with("pool")) kill(pid, SIGKILL);
  job = p().wait_end(id, 120000);
  expect_landed(repo, job);
  // The suite itself, from outside: a verdict, and its reason.
  const std::string slow = diff(
      repo, "toolz/recipes.py",
      "s/^from .itertoolz/import time; time.sleep(3)\\nfrom toolz.itertoolz/");
  id = p().submit(request("toolz", slow, test));
  bool killed = false;
  eventually(
      [&] {
        const Json now = p().job(id);
        const std::string said = now["progress"].is_object()
                                     ? now["progress"].value("message", "")
                                     : "";
        const bool after = said == "the tests after the patch";
        for (const pid_t pid : p().processes_with("pytest")) {
          if (after) killed = kill(pid, SIGKILL) == 0 || killed;
        }
        return killed || now["state"] != "running";
      },
      60000);
  job = p().wait_end(id, 120000);
  if (killed) {
    EXPECT_EQ(job["result"]["outcome"], "tests_failed")
        << job.dump(1).substr(0, 3000);
    EXPECT_NE(job["result"].value("reason", "").find("signal 9"),
              std::string::npos);
  }
  EXPECT_EQ(state(repo), before);
  expect_nothing_left(repo);
}

MACHINA_BOTH(Patch);

}  // namespace
}  // namespace machina::e2e
