// The main job on real input: Debian's python3-networkx and its own suite, run
// from a git repository through the whole product, as in production.

#include <algorithm>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

constexpr char kNetworkx[] = "/usr/lib/python3/dist-packages/networkx";
// Not slow, and it breaks when breadth-first levels are miscounted.
constexpr char kSmall[] =
    "networkx/algorithms/shortest_paths/tests/test_unweighted.py";

class TestRun : public EndToEnd {
 protected:
  // The installed package as a repository of one commit, and `broken`: a second
  // one in which every shortest path is one step longer.
  void make_repository() {
    repo_ = p().root() + "/repos/networkx";
    std::string git =
        "git -C " + repo_ + " -c user.name=E2E -c user.email=e2e@localhost ";
    ASSERT_EQ(p().shell("set -e; mkdir " + repo_ + "; cp -r " + kNetworkx +
                        " " + repo_ + "; find " + repo_ +
                        " -name __pycache__ -prune -exec rm -rf {} +; "
                        "git init -q -b main " +
                        repo_ + "; " + git + "add -A; " + git +
                        "commit -q -m installed; " + git + "tag good"),
              0)
        << read_file(p().dir() + "/shell.log");
    ASSERT_EQ(p().shell("set -e; sed -i 's/^        level += 1$/        level "
                        "+= 2/' " +
                        repo_ +
                        "/networkx/algorithms/shortest_paths/unweighted.py; " +
                        git + "commit -q -a -m broken; " + git + "tag broken"),
              0)
        << read_file(p().dir() + "/shell.log");
  }

  Json request(const std::string& rev, const Json& select) {
    return {{"kind", "test.run"},
            {"max_attempts", 1},
            {"payload",
             {{"repo", repo_},
              {"base_rev", rev},
              {"runner", "pytest"},
              {"args", {"-p", "no:cacheprovider"}},
              {"select", select}}}};
  }

  std::string repo_;
};

int count(const std::string& text, const std::string& word) {
  int n = 0;
  for (std::size_t at = text.find(word); at != std::string::npos;
       at = text.find(word, at + word.size())) {
    ++n;
  }
  return n;
}

// Where the counts come from: they are those of the report, case by case.
void expect_counts_are_the_reports(const Json& result, const std::string& xml) {
  int cases = count(xml, "<testcase ");
  EXPECT_GT(cases, 0);
  EXPECT_EQ(result.value("passed", 0) + result.value("failed", 0) +
                result.value("errors", 0) + result.value("skipped", 0),
            cases)
      << result.dump().substr(0, 2000);
  if (!result.value("cases_truncated", false)) {
    EXPECT_EQ(result["cases"].size(), static_cast<std::size_t>(cases));
  }
}

TEST_P(TestRun, NetworkxPassesWithItsRealCountsAndArtifacts) {
  make_repository();
  start_prod();
  // All of it once; as a user a part, to keep CI short.
  Json select =
      as_root() ? Json{"networkx/algorithms/shortest_paths", "networkx/classes"}
                : Json{kSmall};
  std::string id = p().submit(request("good", select));
  Json job = p().wait_end(id, 240000);
  ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 4000);
  EXPECT_EQ(job["attempt"], 1);
  EXPECT_EQ(job["durability"], "fsync");
  EXPECT_GE(job["isolation"].value("level", ""), least_level())
      << job["isolation"].dump(1);
  const Json& result = job["result"];
  EXPECT_EQ(result["ok"], true);
  EXPECT_EQ(result["failed"], 0);
  EXPECT_EQ(result["errors"], 0);
  EXPECT_GE(result["passed"].get<int>(), as_root() ? 1700 : 10);
  EXPECT_GT(result["duration_ms"].get<int>(), 0);

  Json list = p().get("/v1/jobs/" + id + "/artifacts").json();
  EXPECT_NE(list.dump().find("junit.xml"), std::string::npos) << list.dump();
  EXPECT_NE(list.dump().find("output.log"), std::string::npos) << list.dump();
  Answer xml = p().get("/v1/jobs/" + id + "/artifacts/junit.xml");
  ASSERT_EQ(xml.status, 200) << xml.body.substr(0, 500);
  expect_counts_are_the_reports(result, xml.body);
  Answer output = p().get("/v1/jobs/" + id + "/artifacts/output.log");
  EXPECT_EQ(output.status, 200);
  EXPECT_NE(output.body.find(" passed"), std::string::npos)
      << end_of(output.body);
  Answer logs = p().get("/v1/jobs/" + id + "/logs");
  EXPECT_EQ(logs.status, 200);
  EXPECT_NE(logs.body.find(" passed"), std::string::npos) << end_of(logs.body);
}

TEST_P(TestRun, BrokenCommitFailsAndNamesTheCases) {
  make_repository();
  start_prod();
  std::string broken = p().submit(request("broken", {kSmall}));
  std::string good = p().submit(request("good", {kSmall}));
  Json job = p().wait_end(broken);
  ASSERT_EQ(job["state"], "failed") << job.dump(1).substr(0, 4000);
  EXPECT_EQ(job["error"]["code"], "verdict");
  EXPECT_EQ(job["result"]["ok"], false);
  int failed = job["result"]["failed"].get<int>();
  EXPECT_GT(failed, 0);
  std::vector<std::string> names;
  for (const Json& c : job["result"]["cases"]) {
    if (c["outcome"] == "failed") {
      names.push_back(c["id"]);
      EXPECT_FALSE(c.value("message", "").empty()) << c.dump();
    }
  }
  EXPECT_EQ(static_cast<int>(names.size()), failed);
  EXPECT_TRUE(std::any_of(names.begin(), names.end(), [](const auto& n) {
    return n.find("test_single_source_shortest_path_length") !=
           std::string::npos;
  })) << Json(names).dump(1);
  // The revision decides, not what lies in the checkout.
  EXPECT_EQ(p().wait_end(good)["state"], "succeeded");
  EXPECT_EQ(p().shell("test -z \"$(git -C " + repo_ + " status --porcelain)\""),
            0)
      << "the user's checkout was touched";
}

TEST_P(TestRun, LogIsReadableWhileTheJobRuns) {
  start_prod();
  std::string id =
      p().submit({{"kind", "test.run"},
                  {"payload",
                   {{"runner", "pytest"},
                    {"args", {"-s"}},
                    {"files",
                     {{"test_slow.py",
                       "import time\n"
                       "def test_slow():\n"
                       "    print('early word', flush=True)\n"
                       "    time.sleep(4)\n"
                       "    print('late word', flush=True)\n"}}}}}});
  std::string seen;
  EXPECT_TRUE(eventually(
      [&] {
        seen = p().get("/v1/jobs/" + id + "/logs").body;
        return seen.find("early word") != std::string::npos;
      },
      20000));
  EXPECT_EQ(seen.find("late word"), std::string::npos) << seen;
  EXPECT_EQ(p().job(id)["state"], "running");
  EXPECT_EQ(p().wait_end(id)["state"], "succeeded");
  seen = p().get("/v1/jobs/" + id + "/logs").body;
  EXPECT_NE(seen.find("late word"), std::string::npos) << seen;
}

TEST_P(TestRun, CommandRunnerPassesFailsAndKeepsItsOutput) {
  start_prod();
  auto command = [&](const std::string& script) {
    return p().submit({{"kind", "test.run"},
                       {"payload",
                        {{"runner", "command"},
                         {"command", {"sh", "run.sh"}},
                         {"files", {{"run.sh", script}}}}}});
  };
  std::string passes = command("echo all is well\n");
  std::string fails = command("echo not well; exit 3\n");
  Json job = p().wait_end(passes);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(job["result"]["ok"], true);
  EXPECT_NE(p().get("/v1/jobs/" + passes + "/logs").body.find("all is well"),
            std::string::npos);
  job = p().wait_end(fails);
  EXPECT_EQ(job["state"], "failed") << job.dump(1);
  EXPECT_EQ(job["error"]["code"], "verdict");
}

TEST_P(TestRun, NoReportAndExitZeroIsNotAPass) {
  start_prod();
  std::string id = p().submit(
      {{"kind", "test.run"},
       {"max_attempts", 1},
       {"payload",
        {{"runner", "pytest"},
         {"files", {{"test_exit.py", "import os\nos._exit(0)\n"}}}}}});
  Json job = p().wait_end(id);
  EXPECT_NE(job["state"], "succeeded") << job.dump(1);
}

MACHINA_BOTH(TestRun);

}  // namespace
}  // namespace machina::e2e
