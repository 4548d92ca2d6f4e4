// The kinds noop, tool.shell and test.run in real sandboxes.

#include <gmock/gmock.h>
#include <signal.h>

#include <fstream>

#include "tests/workers/worker/isolated_fixture.h"

namespace machina {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::HasSubstr;

TEST_F(IsolatedTest, NoopRunsInAConfinedHandler) {
  const auto job = run("noop", {{"echo", "hello"}});
  EXPECT_EQ(job.state, "succeeded");
  EXPECT_EQ(job.end["result"]["echo"], "hello");
  EXPECT_EQ(job.end["isolation"]["level"], "L" + std::to_string(level_));
}

TEST_F(IsolatedTest, NoopThatCrashesDiesOfASignal) {
  const auto job = run("noop", {{"crash", true}});
  EXPECT_EQ(job.end["code"], "signal") << job.end;
  EXPECT_THAT(job.end["message"], HasSubstr("signal 6"));
}

TEST_F(IsolatedTest, ShellRunsWithItsFilesInputAndEnvironment) {
  const auto job = run(
      "tool.shell",
      {{"argv", {"/bin/sh", "-c", "cat; cat sub/a.txt; echo $X; pwd; exit 4"}},
       {"stdin", "in\n"},
       {"env", {{"X", "y z"}}},
       {"cwd", "d"},
       {"files", {{"d/sub/a.txt", "file\n"}}}});
  EXPECT_EQ(job.state, "failed");
  EXPECT_EQ(job.end["result"]["exit_code"], 4) << job.end;
  EXPECT_EQ(job.end["result"]["stdout"], "in\nfile\ny z\n/work/d\n");
  EXPECT_EQ(job.log, "in\nfile\ny z\n/work/d\n");
}

TEST_F(IsolatedTest, WarmedAndSandboxedJobsTakeTurnsInOneSlot) {
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(run("noop", json::object()).state, "succeeded");
    EXPECT_EQ(run("tool.shell", {{"argv", {"/bin/true"}}}).state, "succeeded");
  }
}

TEST_F(IsolatedTest, PytestOutcomesComeFromTheReport) {
  const auto job =
      run_files({{"test_a.py",
                  "import pytest\n"
                  "def test_good(): pass\n"
                  "def test_bad(): assert 1 == 2, 'one is not two'\n"
                  "@pytest.mark.skip\n"
                  "def test_later(): pass\n"
                  "@pytest.fixture\n"
                  "def broken(): raise RuntimeError('no fixture')\n"
                  "def test_error(broken): pass\n"}});
  EXPECT_EQ(job.state, "failed") << job.end;
  const json& r = job.end["result"];
  EXPECT_EQ(r["ok"], false);
  EXPECT_EQ(r["passed"], 1) << r;
  EXPECT_EQ(r["failed"], 1);
  EXPECT_EQ(r["errors"], 1);
  EXPECT_EQ(r["skipped"], 1);
  EXPECT_EQ(r["coverage"], nullptr);
  EXPECT_EQ(r["cases_truncated"], false);
  ASSERT_EQ(r["cases"].size(), 4);
  EXPECT_EQ(r["cases"][0]["id"], "test_a::test_bad");
  EXPECT_THAT(r["cases"][0]["message"].get<std::string>(),
              HasSubstr("one is not two"));
  EXPECT_GT(r["metrics"]["peak_memory_bytes"], 1'000'000);
  EXPECT_EQ(job.end["artifacts"], json({"output.log", "junit.xml"}));
  EXPECT_THAT(job.artifacts.at("junit.xml"), HasSubstr("<testsuite"));
  EXPECT_THAT(job.artifacts.at("output.log"), HasSubstr("test_a.py"));
  EXPECT_THAT(job.log, HasSubstr("test_a.py"));
  EXPECT_FALSE(job.progress.empty());
}

TEST_F(IsolatedTest, NoTestIsNoPass) {
  EXPECT_EQ(run_files({{"test_a.py", "x = 1\n"}}).end["result"]["errors"], 1);
  const auto gone =
      run_files({{"test_a.py", "import os\ndef test_a(): os._exit(0)\n"}});
  EXPECT_EQ(gone.state, "failed");
  EXPECT_EQ(gone.end["result"]["ok"], false);
  EXPECT_EQ(gone.end["result"]["errors"], 1) << gone.end;
}

// --- a run that ends early (F01), a report that is none (F02) ---

std::map<std::string, std::string> outcomes(const FakeServer::Job& job) {
  std::map<std::string, std::string> out;
  for (const json& one : job.end["result"]["cases"]) {
    out[one["id"].get<std::string>() +
        (one.contains("nth") ? "#" + one["nth"].dump() : "")] = one["outcome"];
  }
  return out;
}

// Passes the second time.
constexpr char kFlakyFirst[] =
    "import os\n"
    "def test_a():\n"
    "    seen = os.path.exists('/work/seen')\n"
    "    open('/work/seen', 'w').close()\n"
    "    assert seen\n";

TEST_F(IsolatedTest, F01_EveryCaseRunsWhateverEndsARunEarly) {
  const std::map<std::string, std::string> files = {
      {"test_a.py", kFlakyFirst}, {"test_b.py", "def test_b(): assert 0\n"}};
  auto with = [&](const std::string& name, const std::string& text) {
    auto more = files;
    more[name] = text;
    return more;
  };
  const std::vector<std::pair<std::map<std::string, std::string>, json>> runs =
      {{files, {{"args", {"-x"}}, {"retries", 1}}},
       {files, {{"env", {{"PYTEST_ADDOPTS", "--stepwise"}}}, {"retries", 1}}},
       {with("pytest.ini", "[pytest]\naddopts = --maxfail=1\n"),
        {{"retries", 1}}},
       {with("conftest.py",
             "def pytest_sessionstart(session):\n"
             "    session.config.option.maxfail = 1\n"
             "def pytest_runtest_makereport(item, call):\n"
             "    if call.excinfo: item.session.shouldstop = 'enough'\n"),
        {{"retries", 1}}}};
  for (const auto& [given, more] : runs) {
    const auto job = run_files(given, more);
    EXPECT_EQ(job.state, "failed") << more << job.end;
    EXPECT_EQ(outcomes(job),
              (std::map<std::string, std::string>{
                  {"test_a::test_a", "flaky"}, {"test_b::test_b", "failed"}}))
        << more << job.log;
  }
  // A PYTHONPATH of the job's own is kept, and nothing of ours is in it.
  const auto path = run_files(
      {{"test_p.py",
        "import os, mine\n"
        "def test_p(): assert os.environ['PYTHONPATH'] == '/work/repo/lib'\n"},
       {"lib/mine.py", ""}},
      {{"env", {{"PYTHONPATH", "/work/repo/lib"}}}});
  EXPECT_EQ(path.state, "succeeded") << path.end << path.log;
}

TEST_F(IsolatedTest, F01_WhatWasNotReachedIsMissing) {
  const auto ended_by = [&](const std::string& statement) {
    const auto job = run_files({{"test_a.py",
                                 "import os, pytest\n"
                                 "def test_ok(): pass\n"
                                 "def test_end(): " +
                                     statement +
                                     "\n"
                                     "def test_never(): assert 0\n"}},
                               {{"retries", 1}});
    EXPECT_EQ(job.state, "failed") << statement << job.end;
    EXPECT_EQ(job.end["result"]["ok"], false) << statement;
    const auto all = outcomes(job);
    EXPECT_EQ(all.count("test_a::test_never"), 1u) << job.end;
    if (all.count("test_a::test_never") > 0) {
      EXPECT_EQ(all.at("test_a::test_never"), "missing") << statement;
      EXPECT_EQ(all.at("test_a::test_end"), "missing") << statement;
    }
    return job.end["result"];
  };
  EXPECT_EQ(ended_by("pytest.exit('x', returncode=0)")["passed"], 1);
  EXPECT_EQ(ended_by("raise KeyboardInterrupt")["missing"], 2);
  EXPECT_EQ(ended_by("os._exit(0)")["missing"], 3);
}

TEST_F(IsolatedTest, F02_AReportFromBeforeTheRunIsNotRead) {
  const std::string write =
      "import glob, os\n"
      "os.makedirs('/work/.machina', exist_ok=True)\n"
      "for f in ['junit.xml'] + glob.glob('/work/.machina/*'):\n"
      "    open(os.path.join('/work/.machina', f), 'w').write(\n"
      "        '<testsuite><testcase name=\"a\"/></testsuite>')\n";
  for (const json& args :
       {json::array({"--version"}),
        json::array({"--junitxml=/tmp/o.xml", "--co", "-q"}),
        json::array({"-p", "no:junitxml"}), json::array({"--setup-only"})}) {
    const auto job =
        run_files({{"test_a.py", "def test_a(): assert 0\n"}, {"w.py", write}},
                  {{"setup", json::array({json::array({"python3", "w.py"})})},
                   {"args", args}});
    EXPECT_EQ(job.state, "failed") << args << job.end;
    EXPECT_EQ(job.end["result"]["ok"], false) << args;
    // pytest itself calls a case passed whose body it was told not to run.
    if (args[0] == "--setup-only") {
      EXPECT_EQ(job.end["result"]["missing"], 1) << job.end;
    } else {
      EXPECT_EQ(job.end["result"]["passed"], 0) << args;
    }
  }
}

TEST_F(IsolatedTest, F02_ARunInWhichAllIsSkippedIsNoPass) {
  const auto skipped = run_files(
      {{"test_a.py", "import pytest\ndef test_a(): pytest.skip('no')\n"}});
  EXPECT_EQ(skipped.state, "failed") << skipped.end;
  EXPECT_THAT(skipped.end["result"].dump(), HasSubstr("all were skipped"));
  // Nor is one whose exit code says something else than its report.
  const auto denied = run_files(
      {{"test_a.py", "def test_a(): pass\n"},
       {"conftest.py",
        "def pytest_sessionfinish(session): session.exitstatus = 1\n"}});
  EXPECT_EQ(denied.state, "failed") << denied.end;
}

TEST_F(IsolatedTest, F02_CasesWithOneIdAreAllListed) {
  const auto job = run_files({{"test_a.py",
                               "import pytest\n"
                               "@pytest.mark.parametrize('x', [1, 10, 1])\n"
                               "def test_a(x): assert x != 10\n"
                               "@pytest.fixture\n"
                               "def bad():\n"
                               "    yield\n"
                               "    assert 0\n"
                               "def test_t(bad): pass\n"}});
  EXPECT_EQ(outcomes(job), (std::map<std::string, std::string>{
                               {"test_a::test_a[10]", "passed"},
                               {"test_a::test_a[10]#2", "failed"},
                               {"test_a::test_a[11]", "passed"},
                               {"test_a::test_t", "error"}}))
      << job.end;
}

// The second run says that what failed passes, and then crashes.
TEST_F(IsolatedTest, F02_ARerunIsBelievedAsAFirstRunIs) {
  const std::string again = "if test -e k; then ";
  const std::string bad = "; exit 9; fi; : >k; ";
  const auto command = [](const std::string& script, const json& more) {
    json out = {{"runner", "command"},
                {"command", {"sh", "-c", script}},
                {"retries", 2}};
    out.update(more);
    return out;
  };
  const auto xml = [](const std::string& inner) {
    return "echo '<testsuite><testcase name=\"a\">" + inner +
           "</testcase></testsuite>' >r.xml";
  };
  const json junit = {{"report", {{"format", "junit"}, {"path", "r.xml"}}}};
  const std::string not_ok = "echo 1..1; echo not ok 1 - a; exit 1";
  const std::vector<std::pair<std::map<std::string, std::string>, json>> runs =
      {{{{"t", ""}},
        command(again + xml("") + bad + xml("<failure/>") + "; exit 1", junit)},
       {{{"t", ""}},
        command(again + "echo 1..1; echo ok 1 - a" + bad + not_ok,
                {{"runner", "tap"}})},
       {{{"conftest.py",
          "import os\n"
          "again = os.path.exists('k')\n"
          "open('k', 'w').close()\n"
          "def pytest_unconfigure():\n"
          "    if again: os._exit(3)\n"},
         {"test_a.py",
          "import conftest\ndef test_a(): assert conftest.again\n"}},
        {{"retries", 2}}},
       {{{"test_a.py",
          "import os, unittest\n"
          "again = os.path.exists('k')\n"
          "open('k', 'w').close()\n"
          "class T(unittest.TestCase):\n"
          "    def test_a(self): assert again\n"
          "    def test_b(self):\n"
          "        if again: self._outcome.result.stop()\n"
          "    def test_c(self): pass\n"}},
        {{"runner", "unittest"}, {"retries", 2}}}};
  for (const auto& [files, more] : runs) {
    const auto job = run_files(files, more);
    EXPECT_EQ(job.state, "failed") << more << job.end;
    EXPECT_EQ(job.end["result"]["flaky"], 0) << more << job.end;
    EXPECT_EQ(job.end["result"]["failed"], 1) << more << job.end;
  }
  // One that ends as it should is believed.
  const auto good =
      run_files({{"t", ""}}, command(again + xml("") + "; exit 0; fi; : >k; " +
                                         xml("<failure/>") + "; exit 1",
                                     junit));
  EXPECT_EQ(good.state, "succeeded") << good.end;
  EXPECT_EQ(good.end["result"]["flaky"], 1) << good.end;
}

TEST_F(IsolatedTest, FlakyTestsAreToldApartFromBrokenOnes) {
  const auto job = run_files({{"test_a.py",
                               "import os\n"
                               "def test_flaky():\n"
                               "    first = not os.path.exists('/work/seen')\n"
                               "    open('/work/seen', 'w').close()\n"
                               "    assert not first\n"
                               "def test_good(): pass\n"}},
                             {{"retries", 2}});
  EXPECT_EQ(job.state, "succeeded") << job.end;
  EXPECT_EQ(job.end["result"]["flaky"], 1);
  EXPECT_EQ(job.end["result"]["failed"], 0);
  EXPECT_EQ(job.end["result"]["passed"], 1);
}

TEST_F(IsolatedTest, CommandRunnersExitCodeIsTheVerdict) {
  const json good = {{"runner", "command"}, {"command", {"test", "-f", "a"}}};
  EXPECT_EQ(run_files({{"a", "x"}}, good).state, "succeeded");
  const auto bad = run_files({{"b", "x"}}, good);
  EXPECT_EQ(bad.state, "failed");
  EXPECT_EQ(bad.end["result"]["failed"], 1);
  EXPECT_EQ(bad.end["result"]["cases"][0]["id"], "command");
}

TEST_F(IsolatedTest, SetupRunsFirstAndItsFailureIsAnError) {
  const json setup = {{"runner", "command"},
                      {"command", {"cat", "made"}},
                      {"setup", {{"sh", "-c", "echo hi >made"}}}};
  EXPECT_EQ(run_files({{"a", "x"}}, setup).state, "succeeded");
  json broken = setup;
  broken["setup"] = {{"sh", "-c", "echo no; exit 3"}};
  const auto job = run_files({{"a", "x"}}, broken);
  EXPECT_EQ(job.state, "failed");
  EXPECT_EQ(job.end["result"]["cases"][0]["id"], "setup[0]");
}

TEST_F(IsolatedTest, RunsAKilledSuiteReportWhatKilledIt) {
  const auto act = [&](const std::string& body, long timeout_ms,
                       const json& box) {
    return run_files({{"test_a.py", "def test_a():\n" + body}},
                     {{"args", {"-s"}}}, timeout_ms, box.dump())
        .end["code"];
  };
  const json box = {{"memory_mb", 128},
                    {"disk_mb", 32},
                    {"pids", 32},
                    {"output_bytes", 10000}};
  EXPECT_EQ(act("    x = bytearray(600 << 20)\n    x[:] = b'a' * len(x)\n",
                60'000, box),
            "oom");
  EXPECT_EQ(act("    while True: pass\n", 1500, box), "timeout");
  EXPECT_EQ(act("    import os, signal\n"
                "    os.kill(os.getpid(), signal.SIGSTOP)\n",
                1500, box),
            "timeout");
  EXPECT_EQ(
      act("    import os, signal\n    os.kill(os.getpid(), 9)\n", 20'000, box),
      "signal");
  const json roomy = {{"memory_mb", 1024}, {"pids", 24}};
  EXPECT_EQ(act("    import os\n    while True: os.fork()\n", 20'000, roomy),
            "pids");
  const json flood = {{"output_bytes", 10000}};
  EXPECT_EQ(act("    import os\n    while True: os.write(1, b'x' * 4096)\n",
                20'000, flood),
            "output");
}

TEST_F(IsolatedTest, RepositoryIsReadAtItsCommitAndNeverTouched) {
  const std::string repo = repos_ + "/demo";
  sh("mkdir " + repo + " && cd " + repo +
     " && git init -q -b main . && git config user.email a@b && git config "
     "user.name n && echo 'def test_a(): assert True' >test_a.py && git add "
     "-A && git commit -qm one && echo 'def test_a(): assert False' "
     ">test_a.py && git commit -qam two && echo uncommitted >>test_a.py");
  // What a hostile repository would like to have run.
  sh("cd " + repo + " && git config core.fsmonitor 'touch " + root_ +
     "/owned' && "
     "git config uploadpack.packObjectsHook 'touch " +
     root_ +
     "/owned' && "
     "printf '#!/bin/sh\\ntouch " +
     root_ +
     "/owned\\n' >.git/hooks/post-checkout && chmod +x "
     ".git/hooks/post-checkout");
  const auto two = run("test.run", {{"repo", "demo"}});
  EXPECT_EQ(two.state, "failed") << two.end;
  EXPECT_EQ(two.end["result"]["failed"], 1) << two.end;
  const auto one = run("test.run", {{"repo", repo}, {"base_rev", "HEAD~1"}});
  EXPECT_EQ(one.state, "succeeded") << one.end;
  EXPECT_FALSE(fs::exists(root_ + "/owned"));
  std::ifstream file(repo + "/test_a.py");
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_THAT(text, HasSubstr("uncommitted"));
  const auto none = run("test.run", {{"repo", "demo"}, {"base_rev", "nope"}});
  EXPECT_EQ(none.end["code"], "invalid_payload") << none.end;
  EXPECT_THAT(none.end["message"], HasSubstr("base_rev"));
  const auto missing = run("test.run", {{"repo", "missing"}});
  EXPECT_EQ(missing.end["code"], "invalid_payload") << missing.end;
}

// None of these gets better by being tried again.
TEST_F(IsolatedTest, RepositoryThatCannotBeReadIsAnInvalidPayload) {
  const auto message = [&](const std::string& name,
                           const std::string& rev = "HEAD") {
    const auto job = run("test.run", {{"repo", name}, {"base_rev", rev}});
    EXPECT_EQ(job.end["code"], "invalid_payload") << name << job.end;
    EXPECT_EQ(job.state, "failed") << name;
    return job.end.value("message", "");
  };
  const std::string fresh = repos_ + "/fresh", away = root_ + "/away";
  sh("git init -q -b main " + fresh);
  EXPECT_EQ(message("fresh"), "repo: \"fresh\" has no commit yet");
  EXPECT_EQ(message("fresh", "main"), "repo: \"fresh\" has no commit yet");
  // A commit, but not where HEAD points.
  const std::string commit =
      " && git -c user.email=a@b -c user.name=n commit -q --allow-empty -m one";
  sh("git init -q -b main " + repos_ + "/side && cd " + repos_ +
     "/side && git checkout -q -b other && echo x >a && git add a" + commit +
     " && git symbolic-ref HEAD refs/heads/none");
  EXPECT_THAT(message("side"), HasSubstr("base_rev: \"HEAD\" is no commit"));
  EXPECT_EQ(run("test.run", {{"repo", "side"},
                             {"base_rev", "other"},
                             {"runner", "command"},
                             {"command", {"cat", "a"}}})
                .state,
            "succeeded");
  // What it needs lies outside: .git is a file, a link; borrowed objects.
  sh("git init -q -b main " + away + " && cd " + away +
     " && echo x >a && git add a" + commit + " && git worktree add -q " +
     repos_ + "/tree && mkdir " + repos_ + "/linked && ln -s " + away +
     "/.git " + repos_ + "/linked/.git && git clone -q --shared " + away + " " +
     repos_ + "/shared");
  for (const char* name : {"tree", "linked", "shared"}) {
    EXPECT_THAT(message(name), HasSubstr("\"" + std::string(name) +
                                         "\" cannot be read as a git "
                                         "repository"));
  }
}

// A real suite: Debian's networkx carries its own tests.
TEST_F(IsolatedTest, NetworkxRunsItsOwnSuite) {
  const std::string from = "/usr/lib/python3/dist-packages/networkx";
  if (!fs::exists(from)) GTEST_SKIP() << "python3-networkx is not installed";
  const std::string repo = repos_ + "/networkx";
  sh("mkdir " + repo + " && cp -r " + from + " " + repo + "/ && cd " + repo +
     " && find . -name __pycache__ -prune -exec rm -r {} + && "
     "git init -q . && git add -A && git -c user.email=a@b -c user.name=n "
     "commit -qm networkx");
  const auto job = run(
      "test.run",
      {{"repo", "networkx"},
       {"select", {"networkx/algorithms/shortest_paths", "networkx/classes"}}},
      120'000);
  EXPECT_EQ(job.state, "succeeded")
      << job.end.dump().substr(0, 3000) << job.log;
  const json& r = job.end["result"];
  EXPECT_GT(r["passed"], 1500);
  EXPECT_EQ(r["failed"], 0);
  EXPECT_EQ(r["cases"].size(),
            r["passed"].get<std::size_t>() + r["skipped"].get<std::size_t>());
  std::printf("%d passed, %d skipped, %d ms, result %zu bytes\n",
              r["passed"].get<int>(), r["skipped"].get<int>(),
              r["duration_ms"].get<int>(), r.dump().size());
}

TEST_F(IsolatedTest, CancelEndsARealProcess) {
  server_->add("a", "tool.shell",
               R"({"argv":["/bin/sh","-c","trap '' TERM; sleep 60"]})");
  ASSERT_TRUE(server_->wait_state("a", "running"));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  server_->cancel("a");
  EXPECT_TRUE(server_->wait_state("a", "cancelled", 4000));
}

}  // namespace
}  // namespace machina
