// patch.apply in real sandboxes, with real git on real repositories.

#include "workers/kinds/patch/patch.h"

#include <gmock/gmock.h>
#include <poll.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include "tests/workers/worker/isolated_fixture.h"

namespace machina {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), {});
}
void write(const std::string& path, const std::string& text) {
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

const json kTests = {{"select", {"test_m.py"}}};

class PatchTest : public IsolatedTest {
 protected:
  // A package of two functions and three cases, and work that is not committed.
  void SetUp() override {
    IsolatedTest::SetUp();
    repo_ = repos_ + "/demo";
    write(repo_ + "/m.py",
          "def one(x):\n    return x + 1\n\n\n"
          "def two(x):\n    return x + 2\n");
    write(repo_ + "/test_m.py",
          "from m import one, two\n\n\n"
          "def test_one():\n    assert one(1) == 2\n\n\n"
          "def test_two():\n    assert two(1) == 3\n\n\n"
          "def test_sum():\n    assert one(1) + two(1) == 5\n");
    git("init -q -b main .");
    commit("one");
    write(repo_ + "/m.py", read(repo_ + "/m.py") + "# not committed\n");
    write(repo_ + "/notes.txt", "mine\n");
  }

  std::string out(const std::string& command) {
    FILE* pipe = popen(command.c_str(), "r");
    std::string text;
    char buffer[4096];
    for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) {
      text.append(buffer, n);
    }
    pclose(pipe);
    while (text.ends_with('\n')) text.pop_back();
    return text;
  }
  std::string git_out(const std::string& args) {
    return out("git -C " + repo_ + " " + args + " 2>&1");
  }
  void git(const std::string& args) {
    sh("git -C " + repo_ + " -c user.name=n -c user.email=a@b " + args);
  }
  void commit(const std::string& message) {
    git("add -A");
    git("commit -q -m '" + message + "'");
  }

  // A diff from HEAD's m.py with one text replaced.
  std::string change(const std::string& from, const std::string& to,
                     const std::string& name = "m.py") {
    const std::string dir = root_ + "/make";
    fs::remove_all(dir);
    sh("git clone -q " + repo_ + " " + dir);
    std::string text = read(dir + "/" + name);
    const std::size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    write(dir + "/" + name, text.replace(at, from.size(), to));
    return out("git -C " + dir + " diff") + "\n";
  }

  FakeServer::Job apply(const std::string& diff, json more = json::object(),
                        long timeout_ms = 0, const std::string& box = "") {
    more["repo"] = "demo";
    more["diff"] = diff;
    return run("patch.apply", more, timeout_ms, box);
  }
  static std::string outcome(const FakeServer::Job& job) {
    const json result = job.end.value("result", json::object());
    return result.is_object() ? result.value("outcome", "none") : "none";
  }
  static std::string reason(const FakeServer::Job& job) {
    const json& why = job.end["result"]["reason"];
    return why.is_string() ? why.get<std::string>() : "";
  }

  // Every byte of the user's: work tree, index, HEAD, configuration; without
  // objects and branches where those may grow.
  std::string state(bool with_git = true) {
    return out("cd " + repo_ + " && find . " +
               (with_git ? ""
                         : "-path ./.git/objects -prune -o "
                           "-path ./.git/refs -prune -o ") +
               "-type f -print0 | sort -z | xargs -0 sha256sum && find . " +
               (with_git ? ""
                         : "-path ./.git/objects -prune -o "
                           "-path ./.git/refs -prune -o ") +
               "! -type f -printf '%p %y %m %l\\n' | sort");
  }
  static void expect_same(const std::string& before, const std::string& after) {
    const auto lines = [](const std::string& text) {
      std::set<std::string> all;
      std::istringstream in(text);
      for (std::string line; std::getline(in, line);) all.insert(line);
      return all;
    };
    const auto a = lines(before), b = lines(after);
    std::vector<std::string> changed;
    std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(),
                                  std::back_inserter(changed));
    EXPECT_THAT(changed, IsEmpty());
  }
  // Nothing half-made, anywhere.
  void expect_clean() {
    EXPECT_EQ(out("find " + root_ + "/mirrors " + repos_ +
                  " '(' -name '*.lock' -o -name 'tmp_*' -o -name '*.tmp' -o "
                  "-name 'incoming*' ')' ! -name machina.lock"),
              "");
    EXPECT_EQ(git_out("fsck --no-dangling"), "");
  }

  std::string repo_;
};

TEST_F(PatchTest, GoodPatchBecomesACommitOnABranch) {
  const std::string before = state(false);
  const std::string diff = change("x + 1", "1 + x");
  const auto job = apply(diff, {{"test", kTests},
                                {"push", true},
                                {"author", "Ann Bee <ann@example.com>"},
                                {"description", "Add the other way round"}});
  ASSERT_EQ(job.state, "succeeded") << job.end << job.log;
  const json& r = job.end["result"];
  EXPECT_EQ(r["outcome"], "applied");
  EXPECT_EQ(r["patch_id"], "job1");
  EXPECT_EQ(r["branch"], "review/job1");
  EXPECT_EQ(r["alignment"], nullptr);
  EXPECT_EQ(r["reason"], nullptr);
  ASSERT_EQ(r["files"].size(), 1u);
  EXPECT_EQ(r["files"][0]["path"], "m.py");
  EXPECT_EQ(r["files"][0]["added"], 1);
  EXPECT_EQ(r["files"][0]["removed"], 1);
  const auto sha = [&](const std::string& rev) {
    return git_out("show " + rev + ":m.py | sha256sum").substr(0, 64);
  };
  EXPECT_EQ(r["files"][0]["sha256_before"], sha("main"));
  EXPECT_EQ(r["files"][0]["sha256_after"], sha("review/job1"));
  EXPECT_EQ(r["tests"]["before"]["passed"], 3);
  EXPECT_EQ(r["tests"]["after"]["passed"], 3);
  EXPECT_EQ(r["tests"]["newly_failing"], json::array());
  // What landed is the patch on top of the base and nothing else.
  EXPECT_EQ(git_out("rev-parse review/job1"), r["commit"]);
  EXPECT_EQ(git_out("rev-parse review/job1^"), git_out("rev-parse main"));
  EXPECT_EQ(git_out("diff main review/job1") + "\n", diff);
  EXPECT_EQ(git_out("log -1 --format='%an <%ae>|%cn|%s|%(trailers:key="
                    "Machina-Patch,valueonly)' review/job1"),
            "Ann Bee <ann@example.com>|Machina|Add the other way round|job1");
  expect_same(before, state(false));
  expect_clean();
  // The artifacts stand for themselves.
  EXPECT_EQ(job.end["artifacts"],
            json({"patch.diff", "output-before.log", "junit-before.xml",
                  "output-after.log", "junit-after.xml", "reverse.diff",
                  "patch.bundle"}));
  EXPECT_EQ(job.artifacts.at("patch.diff"), diff);
  write(root_ + "/b.bundle", job.artifacts.at("patch.bundle"));
  EXPECT_THAT(git_out("bundle verify " + root_ + "/b.bundle"),
              HasSubstr("is okay"));
  EXPECT_THAT(git_out("bundle list-heads " + root_ + "/b.bundle"),
              HasSubstr("refs/heads/review/job1"));
  write(root_ + "/r.diff", job.artifacts.at("reverse.diff"));
  sh("cd " + root_ + " && git clone -q -b review/job1 " + repo_ +
     " back && git -C back apply " + root_ +
     "/r.diff && git -C back diff --quiet origin/main");
  EXPECT_THAT(job.log, HasSubstr("== the tests before the patch =="));
}

TEST_F(PatchTest, WithoutPushTheRepositoryIsNotTouchedAtAll) {
  const std::string before = state();
  for (const auto& [from, to] : std::map<std::string, std::string>{
           {"x + 1", "1 + x"}, {"x + 2", "x + 3"}}) {
    const auto job = apply(change(from, to), {{"test", kTests}});
    EXPECT_EQ(outcome(job), to == "x + 3" ? "tests_failed" : "applied")
        << job.end;
  }
  expect_same(before, state());
  expect_clean();
}

TEST_F(PatchTest, BreakingPatchFailsAndNamesItsCases) {
  const auto job =
      apply(change("x + 2", "x + 3"), {{"test", kTests}, {"push", true}});
  ASSERT_EQ(job.state, "failed") << job.end;
  EXPECT_EQ(job.end["verdict"], "fail");
  const json& r = job.end["result"];
  EXPECT_EQ(r["outcome"], "tests_failed");
  EXPECT_EQ(r["tests"]["newly_failing"],
            json({"test_m::test_two", "test_m::test_sum"}))
      << r;
  EXPECT_EQ(r["commit"], nullptr);
  EXPECT_EQ(r["bundle_artifact"], nullptr);
  EXPECT_EQ(git_out("branch --list 'review/*'"), "");
  expect_clean();
}

TEST_F(PatchTest, OnlyWhatNewlyFailsCounts) {
  git("checkout -q -- m.py");
  write(repo_ + "/test_m.py",
        "from m import one, two\n"
        "def test_one(): assert one(1) == 2\n"
        "def test_two(): assert two(1) == 30\n"
        "def test_bad(): assert False\n");
  commit("a case that fails, one that never can pass");
  const auto unrelated = apply(change("x + 1", "1 + x"), {{"test", kTests}});
  EXPECT_EQ(outcome(unrelated), "applied") << unrelated.end;
  EXPECT_EQ(unrelated.end["result"]["tests"]["after"]["failed"], 2);
  EXPECT_EQ(reason(unrelated), "2 cases failed before and still fail");
  const auto better = apply(change("x + 2", "x + 29"), {{"test", kTests}});
  EXPECT_EQ(outcome(better), "applied") << better.end;
  EXPECT_EQ(better.end["result"]["tests"]["newly_passing"],
            json({"test_m::test_two"}));
  EXPECT_EQ(reason(better), "1 case failed before and still fails");
  const auto worse = apply(change("x + 1", "x"), {{"test", kTests}});
  EXPECT_EQ(outcome(worse), "tests_failed");
  EXPECT_EQ(worse.end["result"]["tests"]["newly_failing"],
            json({"test_m::test_one"}));
  // Without a baseline all must pass.
  const auto strict =
      apply(change("x + 1", "1 + x"), {{"test", kTests}, {"baseline", false}});
  EXPECT_EQ(outcome(strict), "tests_failed");
  EXPECT_EQ(strict.end["result"]["tests"]["before"], nullptr);
  EXPECT_EQ(strict.end["result"]["tests"]["newly_failing"].size(), 2u);
}

TEST_F(PatchTest, FlakyCasesAreToldApartByRunningThemAgain) {
  git("checkout -q -- m.py");
  write(repo_ + "/test_m.py",
        "import os\nfrom m import one, NEW\n"
        "def test_flaky():\n"
        "    seen = os.path.exists('/work/seen')\n"
        "    open('/work/seen', 'w').close()\n"
        "    assert seen or not NEW\n"
        "def test_one(): assert one(1) == 2\n");
  write(repo_ + "/m.py", "NEW = False\ndef one(x):\n    return x + 1\n");
  commit("flaky");
  // The way the end-to-end test calls it: without pytest's own memory.
  const json test = {{"select", {"test_m.py"}},
                     {"args", {"-p", "no:cacheprovider"}}};
  const auto job = apply(change("False", "True"), {{"test", test}});
  EXPECT_EQ(outcome(job), "applied") << job.end << job.log;
  EXPECT_EQ(job.end["result"]["tests"]["after"]["flaky"], 1);
}

TEST_F(PatchTest, SuiteThatEndsBadlyAfterThePatchIsAVerdict) {
  const auto act = [&](const std::string& body, const std::string& why,
                       long timeout_ms = 60'000, const json& box = json()) {
    const auto job =
        apply(change("def one(x):\n", "def one(x):\n" + body),
              {{"test", kTests}}, timeout_ms, box.is_null() ? "" : box.dump());
    EXPECT_EQ(job.state, "failed") << why << job.end;
    EXPECT_EQ(job.attempt, 1) << why;
    EXPECT_EQ(outcome(job), "tests_failed") << why << job.end;
    EXPECT_THAT(reason(job), HasSubstr(why));
    const json& r = job.end["result"]["tests"];
    EXPECT_EQ(r["before"]["valid"], true) << job.end;
    EXPECT_EQ(r["missing"].size(), 3u) << why << r;
  };
  act("    import time; time.sleep(600)\n", "ran longer than", 20'000);
  act("    import os; os.kill(os.getpid(), 9)\n", "signal 9");
  act("    import os; os._exit(0)\n", "left no report");
  act("    x = bytearray(900 << 20); x[:] = b'a' * len(x)\n", "memory", 60'000,
      {{"memory_mb", 200}, {"disk_mb", 64}});
  // Its parent is ours and cannot be reached: the case just passes.
  const auto parent = apply(
      change("def one(x):\n",
             "def one(x):\n    import os\n    try:\n        "
             "os.kill(os.getppid(), 9)\n    except OSError:\n        pass\n"),
      {{"test", kTests}});
  EXPECT_EQ(outcome(parent), "applied") << parent.end;
}

TEST_F(PatchTest, ReportThatLeavesCasesOutOrIsForgedDoesNotHelp) {
  // Writes a report of its own and leaves before pytest writes one.
  const std::string forged =
      "def one(x):\n    import os\n"
      "    os.makedirs('/work/.machina', exist_ok=True)\n"
      "    open('/work/.machina/junit.xml', 'w').write("
      "'<testsuite tests=\"1\"><testcase classname=\"test_m\" "
      "name=\"test_one\"/></testsuite>')\n    os._exit(1)\n";
  const auto job = apply(change("def one(x):\n", forged), {{"test", kTests}});
  EXPECT_EQ(outcome(job), "tests_failed") << job.end;
  const json& missing = job.end["result"]["tests"]["missing"];
  EXPECT_THAT(missing.dump(), HasSubstr("test_m::test_two")) << job.end;
  // One that is no XML at all.
  std::string garbage = forged;
  garbage.replace(garbage.find("<testsuite"), 10, "<!DOCTYPE");
  const auto none = apply(change("def one(x):\n", garbage), {{"test", kTests}});
  EXPECT_EQ(outcome(none), "tests_failed") << none.end;
  EXPECT_EQ(none.end["result"]["tests"]["after"]["valid"], false);
}

TEST_F(PatchTest, TestsThatArePutOutOfActionFail) {
  const auto with_conftest = [&](const std::vector<std::string>& lines) {
    std::string diff = change("x + 1", "x + 7") +
                       "--- /dev/null\n+++ b/conftest.py\n@@ -0,0 +1," +
                       std::to_string(lines.size()) + " @@\n";
    for (const std::string& line : lines) diff += "+" + line + "\n";
    return apply(diff, {{"test", kTests}});
  };
  const auto skipped = with_conftest(
      {"import pytest", "def pytest_collection_modifyitems(items):",
       "    for i in items: i.add_marker(pytest.mark.skip)"});
  EXPECT_EQ(outcome(skipped), "tests_failed") << skipped.end;
  const auto gone =
      with_conftest({"def pytest_collection_modifyitems(items):",
                     "    items[:] = [i for i in items if 'two' in i.name]"});
  EXPECT_EQ(outcome(gone), "tests_failed") << gone.end;
  EXPECT_THAT(gone.end["result"]["tests"]["missing"].dump(),
              HasSubstr("test_m::test_one"))
      << gone.end;
}

// Three cases of which the first is known to fail, in a project that stops
// there.
TEST_F(PatchTest, F01_ASuiteThatStopsEarlyIsNotBelieved) {
  git("checkout -q -- m.py");
  write(repo_ + "/pytest.ini", "[pytest]\naddopts = -x\n");
  write(repo_ + "/test_a.py", "def test_bad(): assert 0\n");
  commit("stops at the first failure");
  const json test = json::object();
  const auto good = apply(change("x + 2", "2 + x"), {{"test", test}});
  EXPECT_EQ(outcome(good), "applied") << good.end;
  EXPECT_EQ(good.end["result"]["tests"]["after"]["complete"], true);
  const auto bad = apply(change("x + 2", "x + 3"), {{"test", test}});
  EXPECT_EQ(outcome(bad), "tests_failed") << bad.end;
  EXPECT_EQ(bad.end["result"]["tests"]["newly_failing"],
            json({"test_m::test_two", "test_m::test_sum"}));
  // Nothing puts off an exit: what it did not reach is unknown, also where it
  // was so before.
  write(repo_ + "/test_a.py",
        "import pytest\ndef test_first(): pass\n"
        "def test_bad(): pytest.exit('enough', returncode=0)\n");
  commit("leaves in the middle");
  const auto unknown = apply(change("x + 2", "x + 3"), {{"test", test}});
  EXPECT_EQ(outcome(unknown), "tests_failed") << unknown.end;
  EXPECT_EQ(unknown.end["result"]["tests"]["missing"],
            json({"test_a::test_bad", "test_m::test_one", "test_m::test_two",
                  "test_m::test_sum"}));
  EXPECT_THAT(reason(unknown), HasSubstr("test_m::test_one"));
  // One that does so by the patch.
  const auto leaves =
      apply(change("pytest.exit('enough', returncode=0)", "pass", "test_a.py") +
                change("return x + 1", "import os; os._exit(0)"),
            {{"test", test}});
  EXPECT_EQ(outcome(leaves), "tests_failed") << leaves.end;
  // And one that mends it.
  const auto mended =
      apply(change("pytest.exit('enough', returncode=0)", "pass", "test_a.py"),
            {{"test", test}});
  EXPECT_EQ(outcome(mended), "applied") << mended.end;
  EXPECT_THAT(reason(mended), HasSubstr("no whole verdict before"));
}

TEST_F(PatchTest, F01_OnlyARemovedTestMayBeGone) {
  git("checkout -q -- m.py");
  write(repo_ + "/test_p.py",
        "import pytest\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_p(x): pass\n"
        "class TestC:\n"
        "    def test_c(self): pass\n"
        "    def test_d(self): pass\n"
        "class TestD(TestC):\n"
        "    pass\n");
  commit("more tests");
  const json test = {{"test", json::object()}};
  const auto judged = [&](const std::string& from, const std::string& to) {
    const auto job = apply(change(from, to, "test_p.py"), test);
    const json& tests = job.end["result"]["tests"];
    EXPECT_EQ(outcome(job),
              tests["missing"].empty() ? "applied" : "tests_failed")
        << job.end;
    return tests["missing"];
  };
  // Removed, renamed, and with all that inherits it.
  EXPECT_EQ(judged("    def test_c(self): pass\n", ""), json::array());
  EXPECT_EQ(judged("def test_p(", "def test_q("), json::array());
  EXPECT_EQ(judged("class TestD(TestC):\n    pass\n", ""), json::array());
  // A parameter that is gone, a class that is not collected any more, a test
  // that is put out of action.
  EXPECT_EQ(judged("[1, 2]", "[1]"), json({"test_p::test_p[2]"}));
  EXPECT_EQ(judged("class TestD(TestC):\n    pass\n",
                   "class TestD(TestC):\n    __test__ = False\n"),
            json({"test_p.TestD::test_c", "test_p.TestD::test_d"}));
  EXPECT_EQ(
      judged("def test_p(x): pass\n", "def test_p(x): pass\ndel test_p\n"),
      json({"test_p::test_p[1]", "test_p::test_p[2]"}));
}

TEST_F(PatchTest, F02_ANewFailureHidesBehindNoOther) {
  git("checkout -q -- m.py");
  write(repo_ + "/test_m.py",
        "import pytest\nfrom m import one, two\n"
        "@pytest.mark.parametrize('x', [1, 10, 1])\n"
        "def test_p(x): assert x != 1 and one(1) == 2\n"
        "@pytest.fixture\n"
        "def bad():\n    yield\n    assert 0\n"
        "def test_t(bad): assert two(1) == 3\n"
        "def test_good(): pass\n");
  commit("known failures");
  const auto same = apply(change("x + 1", "1 + x"), {{"test", kTests}});
  EXPECT_EQ(outcome(same), "applied") << same.end;
  const auto second = apply(change("x + 1", "x"), {{"test", kTests}});
  EXPECT_EQ(outcome(second), "tests_failed") << second.end;
  EXPECT_EQ(second.end["result"]["tests"]["newly_failing"],
            json({"test_m::test_p[10]#2"}));
  const auto body = apply(change("x + 2", "x"), {{"test", kTests}});
  EXPECT_EQ(outcome(body), "tests_failed") << body.end;
  EXPECT_EQ(body.end["result"]["tests"]["newly_failing"],
            json({"test_m::test_t"}));
}

TEST_F(PatchTest, F04_IdsThatChangeFromRunToRunAreTheReason) {
  git("checkout -q -- m.py");
  write(repo_ + "/test_m.py",
        "import pytest, time\nfrom m import one\n"
        "@pytest.mark.parametrize('x', [1], ids=[f'at-{time.time_ns()}'])\n"
        "def test_p(x): assert one(1) == 2\n"
        "def test_good(): pass\n");
  commit("a name of the hour");
  const auto job = apply(change("x + 1", "1 + x"), {{"test", kTests}});
  EXPECT_EQ(outcome(job), "tests_failed") << job.end;
  EXPECT_THAT(reason(job), StartsWith("ids of cases change from run to run"));
  EXPECT_THAT(reason(job), HasSubstr("test_m::test_p[at-"));
}

TEST_F(PatchTest, BaselineThatHangsSaysSoAndBlocksNothing) {
  git("checkout -q -- m.py");
  write(repo_ + "/m.py",
        "import time\ndef one(x):\n    time.sleep(600)\n    return x + 1\n\n\n"
        "def two(x):\n    return x + 2\n");
  commit("hangs");
  const auto fixed =
      apply(change("time.sleep(600)", "pass"), {{"test", kTests}}, 12'000);
  EXPECT_EQ(outcome(fixed), "applied") << fixed.end;
  EXPECT_THAT(reason(fixed), HasSubstr("before the patch"));
  EXPECT_THAT(reason(fixed), HasSubstr("ran longer"));
  const auto still =
      apply(change("x + 2", "2 + x"), {{"test", kTests}}, 12'000);
  EXPECT_EQ(outcome(still), "tests_failed") << still.end;
  EXPECT_THAT(reason(still), HasSubstr("after the patch"));
  EXPECT_THAT(reason(still), HasSubstr("before the patch"));
  EXPECT_EQ(still.attempt, 1);
}

TEST_F(PatchTest, ConflictsAreNamedByFileAndHunk) {
  const std::string good = change("x + 1", "1 + x");
  std::string two = change("x + 2", "2 + x");
  two.replace(two.find("-    return x + 2"), 17, "-    return x + 9");
  const std::string none =
      "diff --git a/none.py b/none.py\n--- a/none.py\n+++ b/none.py\n"
      "@@ -1 +1 @@\n-a\n+b\n";
  const auto job = apply(two + none, {{"test", kTests}});
  ASSERT_EQ(job.state, "failed") << job.end;
  EXPECT_EQ(outcome(job), "conflict");
  const json& list = job.end["result"]["conflicts"];
  ASSERT_EQ(list.size(), 2u) << list;
  EXPECT_EQ(list[0]["path"], "m.py");
  EXPECT_EQ(list[0]["hunk"], 1);
  EXPECT_EQ(list[1]["path"], "none.py");
  EXPECT_EQ(list[1]["hunk"], nullptr);
  EXPECT_EQ(job.end["result"]["tests"], nullptr);
  // Part of it applies: none of it is.
  EXPECT_EQ(outcome(apply(good + none)), "conflict");
}

TEST_F(PatchTest, ConflictsAreToldInWordsOfTheRepository) {
  git("checkout -q -- m.py");
  sh("cd " + repo_ + " && ln -s m.py way && mkdir dir && touch dir/x");
  commit("a link and a directory");
  const auto file = [](const std::string& name, const std::string& head,
                       const std::string& hunk) {
    return "diff --git a/" + name + " b/" + name + "\n" + head + hunk;
  };
  const auto made = [&](const std::string& name) {
    return file(name,
                "new file mode 100644\n--- /dev/null\n+++ b/" + name + "\n",
                "@@ -0,0 +1 @@\n+x\n");
  };
  struct Row {
    std::string diff, path, why;
  };
  for (const Row& row : std::vector<Row>{
           {made("m.py"), "m.py", "it is there already"},
           {made("m.py/x"), "m.py/x", "the name of its directory"},
           {made("dir"), "dir", "a directory its name"},
           {file("gone", "--- a/gone\n+++ b/gone\n", "@@ -1 +1 @@\n-a\n+b\n"),
            "gone", "it is not there"},
           {file("way", "deleted file mode 100644\n--- a/way\n+++ /dev/null\n",
                 "@@ -1 +0,0 @@\n-m.py\n\\ No newline at end of file\n"),
            "way", "another type"},
           // A program's place is taken by a link, of another text than is
           // there.
           {file("m.py",
                 "deleted file mode 100644\n--- a/m.py\n+++ /dev/null\n",
                 "@@ -1 +0,0 @@\n-no\n") +
                file("m.py",
                     "new file mode 120000\n--- /dev/null\n+++ b/m.py\n",
                     "@@ -0,0 +1 @@\n+way\n\\ No newline at end of file\n"),
            "m.py", "are not those that the hunk expects"},
           {file("way",
                 "old mode 120000\nnew mode 100644\n--- a/way\n+++ b/way\n",
                 "@@ -1 +1 @@\n-m.py\n\\ No newline at end of file\n+x\n"),
            "way", "as a removal and a new file"},
           {file("m.py", "--- a/m.py\n+++ b/m.py\n",
                 "@@ -2 +2 @@\n-    return x + 1\n+    return 1 + x\n"),
            "m.py", "not -U0"}}) {
    const auto job = apply(row.diff);
    ASSERT_EQ(outcome(job), "conflict") << row.diff << job.end;
    const json& first = job.end["result"]["conflicts"][0];
    EXPECT_EQ(first["path"], row.path) << row.diff << job.end;
    const std::string why = first["reason"];
    EXPECT_THAT(why, HasSubstr(row.why)) << row.diff;
    EXPECT_THAT(why, testing::Not(HasSubstr("index"))) << row.diff;
  }
}

TEST_F(PatchTest, WhatIsThereAlreadyIsNoChange) {
  const std::string diff = change("x + 1", "1 + x");
  git("checkout -q -- m.py");
  sh("cd " + repo_ + " && sed -i 's/x + 1/1 + x/' m.py");
  commit("applied by hand");
  const auto job = apply(diff, {{"test", kTests}, {"push", true}});
  EXPECT_EQ(job.state, "succeeded") << job.end;
  EXPECT_EQ(outcome(job), "no_change");
  EXPECT_EQ(job.end["result"]["commit"], nullptr);
  EXPECT_EQ(git_out("branch --list 'review/*'"), "");
}

TEST_F(PatchTest, EveryShapeOfATextFileComesThrough) {
  git("checkout -q -- m.py");
  write(repo_ + "/crlf.txt", "a\r\nb\r\nc\r\n");
  write(repo_ + "/.gitattributes",
        "* text=auto eol=lf\n*.txt filter=evil diff=evil merge=evil\n");
  write(repo_ + "/noeol", "a\nb");
  write(repo_ + "/old name.py", "1\n2\n3\n4\n5\n6\n7\n8\n");
  write(repo_ + "/bin", std::string("\0\1\2\3", 4));
  write(repo_ + "/tool", "#!/bin/sh\n");
  git("config core.autocrlf false");
  sh("cd " + repo_ +
     " && git -c core.autocrlf=false add -A && "
     "git -c filter.evil.clean=cat -c user.name=n -c user.email=a@b commit -qm "
     "shapes && blob=$(printf 'a\\r\\nb\\r\\nc\\r\\n' | git hash-object -w "
     "--stdin) && git update-index --cacheinfo 100644,$blob,crlf.txt && git -c "
     "user.name=n -c user.email=a@b commit -qm crlf");
  const std::string dir = root_ + "/shapes";
  sh("git clone -q " + repo_ + " " + dir + " && cd " + dir +
     " && rm .gitattributes && git rm -q --cached .gitattributes && "
     "git reset -q --hard HEAD~0 && rm .gitattributes && "
     "printf 'a\\r\\nB\\r\\nc\\r\\n' >crlf.txt && printf 'a\\nb\\n' >noeol && "
     "git mv 'old name.py' 't\303\274r.py' && sed -i 's/4/four/' "
     "'t\303\274r.py' && git mv bin bin2 && chmod +x tool && echo new >added "
     "&& "
     "ln -s tool link && : >empty && git rm -q test_m.py && "
     "git checkout -q HEAD .gitattributes && git add -A . && "
     "blob=$(printf 'a\\r\\nB\\r\\nc\\r\\n' | git hash-object -w --stdin) && "
     "git update-index --cacheinfo 100644,$blob,crlf.txt");
  const std::string diff = out("git -C " + dir + " diff --cached -M") + "\n";
  const std::string tree = out("git -C " + dir + " write-tree");
  EXPECT_THAT(diff, HasSubstr("\r"));
  EXPECT_THAT(diff, HasSubstr("rename from"));
  EXPECT_THAT(diff, HasSubstr("\\ No newline"));
  git("config filter.evil.clean 'touch " + root_ + "/owned'");
  git("config filter.evil.smudge 'touch " + root_ + "/owned'");
  git("config diff.evil.textconv 'touch " + root_ + "/owned'");
  const auto job = apply(diff, {{"push", true}});
  ASSERT_EQ(outcome(job), "applied") << job.end << diff;
  EXPECT_EQ(git_out("rev-parse review/job1^{tree}"), tree) << diff;
  EXPECT_FALSE(fs::exists(root_ + "/owned"));
  // Back again, byte for byte, by the reverse diff.
  const auto back =
      run("patch.apply", {{"repo", "demo"},
                          {"base_rev", "review/job1"},
                          {"diff", job.artifacts.at("reverse.diff")},
                          {"push", true}});
  ASSERT_EQ(outcome(back), "applied") << back.end;
  EXPECT_EQ(git_out("rev-parse review/job2^{tree}"),
            git_out("rev-parse main^{tree}"));
}

TEST_F(PatchTest, HostileDiffsAreRejectedWithAReason) {
  const std::string before = state();
  git("checkout -q -- m.py");
  sh("cd " + repo_ + " && ln -s sub way && mkdir sub && touch sub/x");
  commit("a link");
  const auto make = [](const std::string& name, const std::string& text = "x",
                       const std::string& mode = "100644") {
    return "diff --git a/" + name + " b/" + name + "\nnew file mode " + mode +
           "\n--- /dev/null\n+++ b/" + name + "\n@@ -0,0 +1 @@\n+" + text +
           "\n\\ No newline at end of file\n";
  };
  const std::vector<std::pair<std::string, std::string>> table = {
      {make("../../etc/x"), ".."},
      {make(".git/hooks/post-checkout", "x", "100755"), ".git"},
      {make("l", "/etc", "120000"), "absolute"},
      {make("l", "..", "120000"), "leaves"},
      {make("l", "sub", "120000") + make("l/x"), "lies below"},
      {make("way/x2"), "path \"way/x2\" lies below a symbolic link"},
      {make("sub/l", "..", "120000") + make("sub/l/m.py2"), "lies below"},
      {make("s", "x", "160000"), "submodules"},
      {"diff --git a/b b/b\nnew file mode 100644\nGIT binary patch\nliteral "
       "0\nHcmV?d00001\n\n",
       "binary"},
  };
  for (const auto& [diff, why] : table) {
    const auto job = apply(diff, {{"push", true}, {"test", kTests}});
    EXPECT_EQ(job.state, "failed") << diff << job.end;
    EXPECT_EQ(outcome(job), "rejected") << diff << job.end;
    EXPECT_THAT(reason(job), HasSubstr(why)) << diff;
    EXPECT_EQ(job.end["verdict"], "fail");
  }
  EXPECT_EQ(git_out("branch --list 'review/*'"), "");
  // A link that is there may be moved, and not be made to lead away.
  const std::string away =
      "diff --git a/way b/way\nindex 1111111..2222222 120000\n--- a/way\n"
      "+++ b/way\n@@ -1 +1 @@\n-sub\n\\ No newline at end of file\n+/etc\n"
      "\\ No newline at end of file\n";
  EXPECT_EQ(outcome(apply(away)), "rejected");
  std::string quiet = away;  // the same without saying that it is a link
  quiet.erase(quiet.find("index"), quiet.find("---") - quiet.find("index"));
  const auto sly = apply(quiet);
  EXPECT_THAT((std::vector<std::string>{"rejected", "conflict"}),
              testing::Contains(outcome(sly)))
      << sly.end;
  expect_clean();
}

TEST_F(PatchTest, AFileThatGitTakesForBinaryIsNotPatchedAsText) {
  git("checkout -q -- m.py");
  // The hunk is text; the NUL byte is elsewhere in the file.
  std::string text("a\0b\n", 4);
  for (int i = 0; i < 20; ++i) text += std::to_string(i) + "\n";
  write(repo_ + "/data", text);
  commit("binary");
  const auto edit = apply(
      "diff --git a/data b/data\n--- a/data\n+++ b/data\n"
      "@@ -10,3 +10,3 @@\n 8\n-9\n+nine\n 10\n");
  EXPECT_EQ(outcome(edit), "rejected") << edit.end;
  EXPECT_THAT(reason(edit), HasSubstr("\"data\" is binary to git"));
  // In the hunk itself, it is said with the line.
  const auto nul = apply(
      std::string("diff --git a/n b/n\nnew file mode 100644\n--- /dev/null\n"
                  "+++ b/n\n@@ -0,0 +1,2 @@\n+one\n+a\0b\n",
                  86 + 4));
  EXPECT_EQ(outcome(nul), "rejected") << nul.end;
  EXPECT_THAT(reason(nul), StartsWith("line 7: the text of \"n\" holds a NUL"));
  // Moved as it is, it stays what it is.
  const auto moved = apply(
      "diff --git a/data b/moved\nsimilarity index 100%\n"
      "rename from data\nrename to moved\n");
  EXPECT_EQ(outcome(moved), "applied") << moved.end;
}

TEST_F(PatchTest, LandingIntoABranchThatIsTakenIsRefused) {
  const std::string diff = change("x + 1", "1 + x");
  git("checkout -q -b open");
  git("branch other");
  git("worktree add -q " + root_ + "/tree other");
  git("branch taken");
  git("branch a/b/c");
  git("pack-refs --all");
  git("branch deep");
  const std::string before = state();
  const std::vector<std::pair<std::string, std::string>> table = {
      {"open", "exists already"},  {"other", "exists already"},
      {"taken", "exists already"}, {"a/b", "in the way"},
      {"a/b/c/d", "in the way"},   {"deep/er", "in the way"},
  };
  for (const auto& [branch, why] : table) {
    const auto job =
        apply(diff, {{"push", true}, {"branch", branch}, {"test", kTests}});
    EXPECT_EQ(outcome(job), "conflict") << branch << job.end;
    EXPECT_THAT(reason(job), HasSubstr(why)) << branch;
    EXPECT_THAT(reason(job), HasSubstr("give another one as branch"));
    // Told before the tests are run, and the patch is there as a bundle.
    EXPECT_EQ(job.end["result"]["tests"], nullptr);
    EXPECT_EQ(job.end["result"]["bundle_artifact"], "patch.bundle");
  }
  expect_same(before, state());
  // An unborn branch that is checked out: no ref, and yet not free.
  git("symbolic-ref HEAD refs/heads/unborn");
  const auto unborn =
      apply(diff, {{"push", true}, {"branch", "unborn"}, {"base_rev", "main"}});
  EXPECT_EQ(outcome(unborn), "conflict") << unborn.end;
  EXPECT_THAT(reason(unborn), HasSubstr("checked out"));
  git("symbolic-ref HEAD refs/heads/open");
  expect_clean();
}

TEST_F(PatchTest, LandingReadsNothingHostileOfTheRepository) {
  const std::string trap = "'touch " + root_ + "/owned'";
  for (const char* hook :
       {"reference-transaction", "post-checkout", "pre-receive", "update",
        "post-update", "proc-receive", "pre-push", "post-commit"}) {
    write(repo_ + "/.git/hooks/" + hook,
          "#!/bin/sh\ntouch " + root_ + "/owned\nexit 1\n");
    sh("chmod +x " + repo_ + "/.git/hooks/" + std::string(hook));
  }
  for (const char* key :
       {"core.fsmonitor", "core.alternateRefsCommand", "core.sshCommand",
        "core.pager", "gpg.program", "uploadpack.packObjectsHook",
        "receive.procReceiveRefs", "core.askPass", "credential.helper"}) {
    git("config " + std::string(key) + " " + trap);
  }
  git("config commit.gpgSign true");
  git("config core.hooksPath " + repo_ + "/.git/hooks");
  git("config include.path /dev/null");
  const std::string before = state(false);
  const auto job = apply(change("x + 1", "1 + x"), {{"push", true}});
  ASSERT_EQ(outcome(job), "applied") << job.end;
  EXPECT_EQ(git_out("-c core.hooksPath=/dev/null rev-parse review/job1"),
            job.end["result"]["commit"]);
  EXPECT_FALSE(fs::exists(root_ + "/owned"));
  expect_same(before, state(false));
}

TEST_F(PatchTest, LandingTwiceIsLandingOnce) {
  const std::string diff = change("x + 1", "1 + x");
  const auto first = apply(diff, {{"push", true}});
  ASSERT_EQ(outcome(first), "applied") << first.end;
  // As though the worker had died between the landing and its report; and the
  // user has gone on meanwhile.
  git("commit -q -a -m meanwhile");
  server_->put_back("job1");
  ASSERT_TRUE(server_->wait(
      [&] { return server_->job("job1").completions > 0; }, 60'000));
  const auto second = server_->job("job1");
  EXPECT_EQ(second.attempt, 2);
  EXPECT_EQ(outcome(second), "applied") << second.end;
  EXPECT_EQ(second.end["result"]["commit"], first.end["result"]["commit"]);
  expect_clean();
}

// The lander alone, as its handler is called.
class LanderTest : public PatchTest {
 protected:
  // `objects`: how many it has to copy on its way.
  int land(const std::string& how, const std::string& branch,
           const std::string& commit, const std::string& old, std::string* said,
           int objects = 0) {
    auto channel = spawner_->open_slot(++slots_);
    auto slot = sandbox::Slot::attach(*channel);
    EXPECT_TRUE(slot);
    sandbox::SessionSpec spec;
    spec.role = sandbox::Role::land;
    spec.repo = repo_;
    auto session = (*slot)->open(spec);
    EXPECT_TRUE(session) << session.error().what;
    sandbox::Step make;
    make.argv = {"/bin/sh", "-c",
                 "mkdir -p /work/land/objects/ab && cd /work/land/objects/ab "
                 "&& for i in $(seq -f %038g $1); do echo >$i; done",
                 "make", std::to_string(objects)};
    EXPECT_EQ((*session)->run(make, {}).exit_code, 0);
    sandbox::Step link;
    link.builtin = kinds::kLandHandler;
    link.stdin_data = how + "\n" + branch + "\n" + commit + "\n" +
                      (old.empty() ? "" : old + "\n");
    const auto ran = (*session)->run(link, {});
    *said = ran.out;
    return ran.exit_code;
  }
  int slots_ = 0;
};

TEST_F(LanderTest, MovesABranchFromTheValueThatWasSeenAndFromNoOther) {
  const std::string first = git_out("rev-parse main");
  git("branch b");
  git("branch packed");
  git("pack-refs --all");
  git("commit -q -a -m second");
  const std::string second = git_out("rev-parse main");
  git("commit -q --allow-empty -m third");
  const std::string third = git_out("rev-parse main");
  std::string said;
  for (const char* branch : {"b", "packed"}) {
    // What was seen is not what is there any more.
    EXPECT_EQ(land("land", branch, third, second, &said), 12) << said;
    EXPECT_THAT(said, HasSubstr("has moved meanwhile, to " + first));
    EXPECT_EQ(git_out("rev-parse " + std::string(branch)), first);
    EXPECT_EQ(land("land", branch, second, first, &said), 0) << said;
    EXPECT_EQ(git_out("rev-parse " + std::string(branch)), second);
    // Done is done.
    EXPECT_EQ(land("land", branch, second, first, &said), 0) << said;
  }
  EXPECT_EQ(land("land", "gone", second, first, &said), 12) << said;
  EXPECT_THAT(said, HasSubstr("is not there any more"));
  EXPECT_EQ(land("land", "main", second, third, &said), 10) << said;
  EXPECT_THAT(said, HasSubstr("checked out"));
  write(repo_ + "/.git/refs/heads/b.lock", "another's\n");
  EXPECT_EQ(land("land", "b", third, second, &said), 12) << said;
  EXPECT_THAT(said, HasSubstr("another git holds"));
  EXPECT_EQ(git_out("rev-parse b"), second);
  // A new branch only where there is none; a look changes nothing.
  for (const char* how : {"check", "land"}) {
    EXPECT_EQ(land(how, "b", third, "", &said), 10) << said;
    EXPECT_THAT(said, HasSubstr("exists already"));
  }
  EXPECT_EQ(land("check", "new", third, "", &said), 0) << said;
  EXPECT_THAT(git_out("branch --list new"), IsEmpty());
}

// Between its first look and its lock the branch moves: the look under the lock
// sees that.
TEST_F(LanderTest, LooksAtTheBranchAgainUnderTheLock) {
  const std::string first = git_out("rev-parse main");
  git("commit -q -a -m second");
  const std::string second = git_out("rev-parse main");
  git("commit -q --allow-empty -m third");
  const std::string third = git_out("rev-parse main");
  const std::string heads = repo_ + "/.git/refs/heads/";
  bool between = false;
  for (int round = 1; round <= 8 && !between; ++round) {
    const std::string name = "b" + std::to_string(round);
    git("branch " + name + " " + first);
    const int events = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    ASSERT_GE(inotify_add_watch(events, (heads + name).c_str(), IN_OPEN), 0);
    const int locks =
        inotify_add_watch(events, heads.c_str(), IN_CREATE | IN_MOVED_TO);
    int code = 0;
    std::string said;
    std::thread landing(
        [&] { code = land("land", name, third, first, &said, 300 << round); });
    pollfd opened{events, POLLIN, 0};
    EXPECT_EQ(poll(&opened, 1, 60'000), 1);
    write(heads + "../moved", second + "\n");
    fs::rename(heads + "../moved", heads + name);
    // Whether the lock was there before that; then this round says nothing.
    alignas(inotify_event) char buffer[16384];
    between = true;
    for (ssize_t n; (n = ::read(events, buffer, sizeof buffer)) > 0;) {
      for (ssize_t at = 0; at < n;) {
        const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
        const std::string what = event->len > 0 ? event->name : "";
        if (event->wd == locks && what == name + ".lock") between = false;
        at += static_cast<ssize_t>(sizeof *event + event->len);
      }
    }
    landing.join();
    close(events);
    if (!between) continue;
    EXPECT_EQ(code, 12) << said;
    EXPECT_THAT(said, HasSubstr("has moved meanwhile, to " + second));
    EXPECT_EQ(git_out("rev-parse " + name), second);
    EXPECT_FALSE(fs::exists(heads + name + ".lock"));
  }
  EXPECT_TRUE(between) << "the branch never moved in time";
}

// A worker that has sandboxes and nothing else.
class BareHost final : public kinds::Host {
 public:
  BareHost(std::unique_ptr<sandbox::Slot> slot, const std::string& repos)
      : slot_(std::move(slot)) {
    settings_.repo_roots = {repos};
  }
  Result<std::unique_ptr<sandbox::Session>> open(
      const sandbox::SessionSpec& spec) override {
    return slot_->open(spec);
  }
  sandbox::Watch watch() override { return {}; }
  bool cancelled() const override { return false; }
  void progress(int, const std::string&) override {}
  void log(std::string_view) override {}
  Result<void> artifact(const std::string&, std::string_view) override {
    return {};
  }
  Result<std::string> fetch_artifact(const std::string&, const std::string&,
                                     std::size_t) override {
    return Error{Code::not_found, "none"};
  }
  Result<std::string> fetch_patch(const std::string&, bool) override {
    return Error{Code::not_found, "none"};
  }
  const KindSettings& settings() const override { return settings_; }

 private:
  std::unique_ptr<sandbox::Slot> slot_;
  KindSettings settings_;
};

// Each phase looks for itself, whatever the one before it let pass.
TEST_F(PatchTest, NoPhaseBelievesTheOneBefore) {
  const std::string diff = change("x + 1", "1 + x");
  ASSERT_EQ(outcome(apply(diff)), "applied");  // there is a mirror now
  auto slot = sandbox::Slot::attach(*spawner_->open_slot(1));
  ASSERT_TRUE(slot);
  BareHost host(std::move(*slot), repos_);
  kinds::Attempt attempt;
  kinds::Checkout base;
  base.repo = repo_;
  base.mirror = kinds::sha256_hex(repo_);
  base.commit = git_out("rev-parse main");
  kinds::CommitWords words;
  words.branch = "review/x";
  words.author_name = words.author_email = "n";
  words.message = "m";
  const auto applied = [&](const kinds::Diff& as) {
    return kinds::apply_diff(diff, as, words, base, attempt, host, 60'000);
  };
  kinds::Diff seen = kinds::read_diff(diff);
  kinds::Applied good = applied(seen);
  ASSERT_EQ(good.how, kinds::Applied::How::committed)
      << good.reason << good.end.message;
  // git changes what our own reading did not find.
  seen.paths = {"other.py"};
  const kinds::Applied sly = applied(seen);
  EXPECT_EQ(sly.how, kinds::Applied::How::refused) << sly.reason;
  EXPECT_THAT(sly.reason,
              HasSubstr("\"m.py\" would change, and the diff does"));

  const auto landed = [&](const std::string& commit, const std::string& bundle,
                          const kinds::Checkout& on) {
    return kinds::land_branch("review/x", commit, bundle, on, false, attempt,
                              host, 60'000);
  };
  // A pack of two commits: more than the one that was judged.
  git("checkout -q -b side");
  git("commit -q -a -m one");
  git("commit -q --allow-empty -m two");
  git("bundle create -q " + root_ + "/two.bundle side ^main");
  kinds::Landed two =
      landed(git_out("rev-parse side"), read(root_ + "/two.bundle"), base);
  EXPECT_EQ(two.how, kinds::Landed::How::failed) << two.reason;
  // A base that the repository has not.
  kinds::Checkout gone = base;
  gone.commit = std::string(40, '1');
  two = landed(good.commit, good.bundle, gone);
  EXPECT_EQ(two.how, kinds::Landed::How::refused) << two.end.message;
  EXPECT_THAT(two.reason, HasSubstr("no longer has the base"));
  EXPECT_EQ(git_out("branch --list 'review/*'"), "");
  two = landed(good.commit, good.bundle, base);
  EXPECT_EQ(two.how, kinds::Landed::How::done) << two.reason;
  EXPECT_EQ(git_out("rev-parse review/x"), good.commit);
}

TEST_F(PatchTest, ALinkThatIsMovedMayNotLeadAwayFromItsNewPlace) {
  git("checkout -q -- m.py");
  sh("cd " + repo_ + " && mkdir d && ln -s ../m.py d/way");
  commit("a link");
  const std::string moved =
      "diff --git a/d/way b/way\nsimilarity index 100%\n"
      "rename from d/way\nrename to way\n";
  const auto job = apply(moved, {{"push", true}});
  EXPECT_EQ(outcome(job), "rejected") << job.end;
  EXPECT_THAT(reason(job), HasSubstr("symbolic link \"way\" leaves"));
  std::string below = moved;
  for (std::size_t at;
       (at = below.find("way\nrename to way")) != std::string::npos;) {
    below.replace(at, 17, "way\nrename to d/e");
  }
  below.replace(below.find(" b/way"), 6, " b/d/e");
  EXPECT_EQ(outcome(apply(below)), "applied");
}

TEST_F(PatchTest, LandingMakesDoWithWhatGitLeavesLying) {
  // Empty directories of a deleted branch, and a lock that is not ours.
  fs::create_directories(repo_ + "/.git/refs/heads/review/a/b");
  const std::string diff = change("x + 1", "1 + x");
  EXPECT_EQ(outcome(apply(diff, {{"push", true}, {"branch", "review/a"}})),
            "applied");
  write(repo_ + "/.git/refs/heads/held.lock", "");
  const auto held = apply(diff, {{"push", true}, {"branch", "held"}});
  EXPECT_EQ(outcome(held), "conflict");
  EXPECT_THAT(reason(held), HasSubstr("held.lock"));
  EXPECT_TRUE(fs::exists(repo_ + "/.git/refs/heads/held.lock"));
}

TEST_F(PatchTest, RepositoriesOfEveryKind) {
  const std::string diff = change("x + 1", "1 + x");
  sh("git clone -q --bare " + repo_ + " " + repos_ +
     "/bare && git clone -q "
     "--mirror " +
     repo_ + " " + repos_ + "/broken && git init -q " + repos_ + "/empty");
  git("commit -q -a -m more");
  git("commit -q --allow-empty -m 'and more'");
  sh("git clone -q --depth 1 file://" + repo_ + " " + repos_ + "/shallow");
  const auto with = [&](const std::string& repo, const json& more = {}) {
    json payload = {{"repo", repo}, {"diff", diff}, {"push", true}};
    if (more.is_object()) payload.update(more);
    return run("patch.apply", payload);
  };
  const auto bare = with("bare", {{"test", kTests}});
  ASSERT_EQ(outcome(bare), "applied") << bare.end;
  EXPECT_EQ(out("git -C " + repos_ + "/bare rev-parse review/job1"),
            bare.end["result"]["commit"]);
  const auto shallow = with("shallow", {{"test", kTests}});
  ASSERT_EQ(outcome(shallow), "applied") << shallow.end;
  EXPECT_EQ(out("git -C " + repos_ + "/shallow rev-parse review/job2"),
            shallow.end["result"]["commit"]);
  EXPECT_EQ(out("git -C " + repos_ + "/shallow fsck 2>&1"), "");
  const auto empty = with("empty");
  EXPECT_EQ(empty.end["code"], "invalid_payload") << empty.end;
  EXPECT_THAT(empty.end["message"], HasSubstr("has no commit yet"));
  const auto gone = with("bare", {{"base_rev", "no-such-branch"}});
  EXPECT_EQ(gone.end["code"], "invalid_payload");
  EXPECT_THAT(gone.end["message"], HasSubstr("base_rev"));
  // A blob of the base is missing.
  const std::string broken = repos_ + "/broken";
  sh("cd " + broken +
     " && rm -f objects/$(git rev-parse HEAD:m.py | sed 's/^../&\\//')");
  const auto corrupt = with("broken");
  EXPECT_EQ(corrupt.end["code"], "invalid_payload") << corrupt.end;
  const std::string why = corrupt.end["message"];
  EXPECT_THAT(why, HasSubstr("cannot be read"));
  for (const char* inner : {"/repo", "/mirror", "/work", "fatal:", "remote:"}) {
    EXPECT_THAT(why, testing::Not(HasSubstr(std::string("'") + inner)));
    EXPECT_THAT(why, testing::Not(HasSubstr(std::string(" ") + inner)));
  }
  // Objects by another hash.
  sh("git init -q --object-format=sha256 -b main " + repos_ + "/other && cd " +
     repos_ +
     "/other && touch x && git add x && "
     "git -c user.name=n -c user.email=a@b commit -qm x");
  const auto other = with("other");
  EXPECT_EQ(other.end["code"], "invalid_payload") << other.end;
  EXPECT_THAT(other.end["message"], HasSubstr("names its objects by SHA-256"));
  expect_clean();
}

TEST(GitSaid, IsInWordsOfTheRepository) {
  EXPECT_EQ(kinds::git_said("fatal: '/repo' does not appear to be a git "
                            "repository\nfatal: Could not read from remote "
                            "repository.\n\nPlease make sure you have the "
                            "correct access rights\nand the repository "
                            "exists.\n",
                            "demo"),
            "'demo' does not appear to be a git repository");
  EXPECT_EQ(kinds::git_said("remote: error: object file "
                            "/repo/.git/objects/ab/cd is empty\n"
                            "fatal: early EOF\n",
                            "demo"),
            "object file demo/.git/objects/ab/cd is empty");
  EXPECT_EQ(kinds::git_said("fatal: cannot open /work/index\n", "demo"),
            "cannot open index");
  EXPECT_EQ(kinds::git_said("1\n2\n3\n4\n", "demo"), "1; 2; 3");
  EXPECT_EQ(kinds::git_said("", "demo"), "git gave no reason");
}

class ApprovalTest : public PatchTest {
 protected:
  // Submits a patch that waits for approval and gives it as it then waits.
  FakeServer::Job ask(const std::string& id, const std::string& diff,
                      json more = json::object()) {
    more["repo"] = "demo";
    more["diff"] = diff;
    more["approval"] = "required";
    server_->add(id, "patch.apply", more.dump());
    return wait(id);
  }
  FakeServer::Job wait(const std::string& id) {
    EXPECT_TRUE(server_->wait([&] { return server_->job(id).completions > 0; },
                              60'000));
    return server_->job(id);
  }
  // What the server makes of an approval (server/api/routes_jobs.cc).
  FakeServer::Job approve(const std::string& id, const json& data) {
    server_->unblock(id, {{"approve", true},
                          {"digest", data["digest"]},
                          {"base_commit", data["base_commit"]}});
    return wait(id);
  }
};

TEST_F(ApprovalTest, BindsTheDiff) {
  const std::string diff = change("x + 1", "1 + x");
  const std::string before = state();
  auto job = ask("ask", diff);
  ASSERT_EQ(job.state, "blocked") << job.end;
  EXPECT_EQ(job.end["reason"], "approval");
  const json data = job.end["data"];
  const std::string digest = data["digest"];
  EXPECT_THAT(digest, StartsWith("sha256:"));
  write(root_ + "/d", diff);
  EXPECT_EQ(digest.substr(7), out("sha256sum <" + root_ + "/d").substr(0, 64));
  EXPECT_EQ(data["base_commit"], git_out("rev-parse main"));
  EXPECT_EQ(data["files"][0]["path"], "m.py");
  EXPECT_EQ(data["added"], 1);
  const std::string base = data["base_commit"];
  for (const json& input :
       {json{{"approve", true}, {"base_commit", base}}, json(), json("yes"),
        json{{"approve", true}, {"digest", digest}},  // of no base: asked again
        json{{"approve", true}, {"digest", digest}, {"base_commit", "main"}},
        json{{"approve", true},
             {"base_commit", base},
             {"digest", "sha256:" + std::string(64, '0')}}}) {
    server_->unblock("ask", input);
    job = wait("ask");
    EXPECT_EQ(job.state, "blocked") << input << job.end;
  }
  EXPECT_EQ(outcome(approve("ask", data)), "applied");
  EXPECT_EQ(ask("deny", diff).state, "blocked");
  server_->unblock("deny", {{"approve", false}, {"digest", digest}});
  job = wait("deny");
  EXPECT_EQ(job.state, "failed");
  EXPECT_EQ(outcome(job), "approval_denied") << job.end;
  expect_same(before, state());
}

TEST_F(ApprovalTest, BindsTheBaseWhateverItsNameMeansLater) {
  const std::string base = git_out("rev-parse main");
  const std::string diff = change("x + 1", "1 + x");
  const auto job = ask("ask", diff, {{"push", true}, {"test", kTests}});
  ASSERT_EQ(job.state, "blocked") << job.end;
  EXPECT_EQ(job.end["data"]["base_commit"], base);
  // The branch moves to where the diff still applies, and the tests fail.
  write(repo_ + "/test_m.py", "def test_one(): assert False\n");
  write(repo_ + "/other.py", "\n");
  git("add test_m.py other.py");
  git("commit -q -m moved");
  const auto done = approve("ask", job.end["data"]);
  ASSERT_EQ(outcome(done), "applied") << done.end;
  EXPECT_EQ(done.end["result"]["base_commit"], base);
  EXPECT_EQ(done.end["result"]["tests"]["after"]["passed"], 3);
  EXPECT_EQ(git_out("rev-parse review/ask^"), base);
  // What is wrong with the base is said at once, to nobody's approval.
  const auto none = ask("none", diff, {{"base_rev", "nowhere"}});
  EXPECT_EQ(none.end["code"], "invalid_payload") << none.end;
}

TEST_F(ApprovalTest, ABaseThatIsGoneIsRejectedByName) {
  git("checkout -q -b side");
  write(repo_ + "/side.txt", "x\n");
  git("add side.txt");
  git("commit -q -m side");
  const std::string base = git_out("rev-parse side");
  const auto job = ask("ask", change("x + 1", "1 + x"), {{"base_rev", "side"}});
  ASSERT_EQ(job.state, "blocked") << job.end;
  ASSERT_EQ(job.end["data"]["base_commit"], base);
  git("checkout -q main");
  git("branch -q -D side");
  git("reflog expire --expire=now --all");
  git("prune --expire=now");
  ASSERT_NE(git_out("cat-file -t " + base), "commit");
  const auto done = approve("ask", job.end["data"]);
  EXPECT_EQ(done.state, "failed") << done.end;
  EXPECT_EQ(outcome(done), "rejected") << done.end;
  EXPECT_THAT(reason(done), HasSubstr(base));
  EXPECT_THAT(reason(done), HasSubstr("no longer has it"));
}

TEST_F(PatchTest, DiffComesFromAnArtifact) {
  const std::string id = "01a1fed2-8ebd-7400-a29c-61d12f136172";
  const std::string diff = change("x + 1", "1 + x");
  server_->add(id, "other.kind");
  server_->stage(id, "fix.diff", diff);
  server_->stage(id, "text", "no diff\n");
  server_->stage(id, "big", std::string(kinds::kDiffBytesMax + 1, 'x'));
  const auto with = [&](const std::string& name) {
    return run("patch.apply",
               {{"repo", "demo"}, {"diff_artifact", id + "/" + name}});
  };
  const auto good = with("fix.diff");
  EXPECT_EQ(outcome(good), "applied") << good.end;
  EXPECT_EQ(good.artifacts.at("patch.diff"), diff);
  const auto text = with("text");
  EXPECT_EQ(text.end["code"], "invalid_payload") << text.end;
  EXPECT_THAT(text.end["message"], HasSubstr("diff_artifact: not a unified"));
  const auto none = with("none");
  EXPECT_EQ(none.end["code"], "invalid_payload") << none.end;
  EXPECT_THAT(
      none.end["message"],
      HasSubstr("has no artifact \"none\"; it has big, fix.diff, text"));
  const auto stranger =
      run("patch.apply",
          {{"repo", "demo"},
           {"diff_artifact", "01a1fed2-8ebd-7400-a29c-000000000000/fix.diff"}});
  EXPECT_EQ(stranger.end["code"], "invalid_payload") << stranger.end;
  EXPECT_THAT(stranger.end["message"],
              HasSubstr("there is no job 01a1fed2-8ebd-7400-a29c-000000000000 "
                        "of this tenant"));
  const auto big = with("big");
  EXPECT_EQ(outcome(big), "rejected") << big.end;
  EXPECT_THAT(reason(big), HasSubstr("at most 4194304"));
}

TEST_F(PatchTest, CancelEndsEveryPhase) {
  git("checkout -q -- m.py");
  write(repo_ + "/test_m.py",
        "import time\nfrom m import one\n"
        "def test_one():\n    time.sleep(600)\n");
  commit("slow");
  const std::string diff = change("x + 1", "1 + x");
  const std::string before = state();
  server_->add(
      "c", "patch.apply",
      json{{"repo", "demo"}, {"diff", diff}, {"push", true}, {"test", kTests}}
          .dump());
  ASSERT_TRUE(server_->wait([&] {
    const auto seen = server_->job("c").progress;
    return std::find(seen.begin(), seen.end(), "the tests before the patch") !=
           seen.end();
  }));
  server_->cancel("c");
  EXPECT_TRUE(server_->wait_state("c", "cancelled", 10'000));
  expect_same(before, state());
  expect_clean();
}

}  // namespace
}  // namespace machina
