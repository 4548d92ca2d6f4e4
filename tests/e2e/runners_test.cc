// The runners beside pytest, each with the program that this host has and with
// the traps that its own report has; and the gate on what a command reports.

#include <set>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class Runners : public EndToEnd {
 protected:
  std::string run(const Json& payload) {
    return p().submit(
        {{"kind", "test.run"}, {"max_attempts", 1}, {"payload", payload}});
  }
  // "outcome id" of each case.
  static std::multiset<std::string> cases(const Json& job) {
    std::multiset<std::string> out;
    if (!job["result"].is_object()) return out;
    for (const Json& one : job["result"]["cases"]) {
      out.insert(one.value("outcome", "") + " " + one.value("id", ""));
    }
    return out;
  }
  // Ended as `state` with just these cases.
  void expect_cases(const std::string& id, const std::string& state,
                    const std::multiset<std::string>& expected) {
    const Json job = p().wait_end(id, 60000);
    EXPECT_EQ(job["state"], state) << job.dump(1).substr(0, 3000);
    EXPECT_EQ(cases(job), expected) << job.dump(1).substr(0, 4000);
  }
  // No verdict that says yes; the last case says why.
  void expect_none(const std::string& id, const std::string& why) {
    const Json job = p().wait_end(id, 60000);
    EXPECT_EQ(job["state"], "failed") << job.dump(1).substr(0, 3000);
    EXPECT_NE(job["result"].dump().find(why), std::string::npos)
        << why << "\n"
        << job.dump(1).substr(0, 3000);
  }
  void must(const std::string& line) {
    ASSERT_EQ(p().shell("set -e; " + line), 0)
        << line << "\n"
        << read_file(p().dir() + "/shell.log");
  }
};

TEST_P(Runners, F03_UnittestAndNode) {
  start();
  const std::string py =
      "import os, unittest\n"
      "class T(unittest.TestCase):\n"
      "    def test_ok(self): pass\n"
      "    def test_bad(self): self.assertEqual('\\x01', 'b')\n"
      "    def test_err(self): 1 / 0\n"
      "    def test_sub(self):\n"
      "        for i in range(2):\n"
      "            with self.subTest(i=i): self.assertEqual(i, 0)\n"
      "    @unittest.skip('why')\n"
      "    def test_skip(self): pass\n"
      "    @unittest.expectedFailure\n"
      "    def test_xf(self): self.fail()\n"
      "    @unittest.expectedFailure\n"
      "    def test_xp(self): pass\n"
      "class S(unittest.TestCase):\n"
      "    @classmethod\n"
      "    def setUpClass(cls): raise RuntimeError('no database')\n"
      "    def test_1(self): pass\n";
  const std::string mixed = run(
      {{"runner", "unittest"},
       {"files", {{"test_a.py", py}, {"test_b.py", "import nosuchmodule\n"}}}});
  const std::string good = run({{"runner", "unittest"},
                                {"args", {"-v"}},
                                {"select", {"test_a.T.test_ok"}},
                                {"files", {{"test_a.py", py}}}});
  const std::string left =
      run({{"runner", "unittest"},
           {"files",
            {{"test_a.py",
              "import os, unittest\nclass T(unittest.TestCase):\n"
              "    def test_1(self): pass\n"
              "    def test_2(self): os._exit(0)\n"}}}});
  const std::string stopped = run({{"runner", "unittest"},
                                   {"args", {"-f"}},
                                   {"files", {{"test_a.py", py}}}});
  const std::string none =
      run({{"runner", "unittest"}, {"files", {{"a.py", ""}}}});

  const std::string js =
      "const {test, describe, it} = require('node:test');\n"
      "const assert = require('node:assert');\n"
      "describe('suite # 1', () => {\n"
      "  it('same', () => {}); it('same', () => {});\n"
      "  it('a\\u0001b\\nc', () => assert.equal(1, 2));\n"
      "  it.skip('later', () => {});\n"
      "  it('soon', {todo: true}, () => assert(0));\n"
      "});\n"
      "test('outer', async (t) => { await t.test('inner', () => {}); });\n";
  const std::string node = run(
      {{"runner", "node"},
       {"files", {{"t/a.test.js", js}, {"t/b.test.js", "process.exit(0)\n"}}}});
  const std::string node_good =
      run({{"runner", "node"},
           {"select", {"a.js"}},
           {"files", {{"a.js", "require('node:test').test('x', () => {});"}}}});
  const std::string node_none =
      run({{"runner", "node"}, {"files", {{"a.txt", ""}}}});

  expect_cases(mixed, "failed",
               {"passed test_a.T::test_ok", "failed test_a.T::test_bad",
                "error test_a.T::test_err", "passed test_a.T::test_sub (i=0)",
                "failed test_a.T::test_sub (i=1)", "failed test_a.T::test_sub",
                "skipped test_a.T::test_skip", "skipped test_a.T::test_xf",
                "failed test_a.T::test_xp", "error test_a.S::setUpClass",
                "error test_a.S::test_1", "error test_b::import"});
  expect_cases(good, "succeeded", {"passed test_a.T::test_ok"});
  expect_none(left, "left no report");
  expect_none(stopped, "stopped before all of its cases had run");
  expect_none(none, "no test ran");
  expect_cases(
      node, "failed",
      {"passed t/a.test.js::suite # 1 > same",
       "passed t/a.test.js::suite # 1 > same",
       "failed t/a.test.js::suite # 1 > a?b\nc",
       "skipped t/a.test.js::suite # 1 > later",
       "skipped t/a.test.js::suite # 1 > soon",
       "passed t/a.test.js::outer > inner", "passed t/a.test.js::outer",
       "error t/b.test.js::(file)", "error node"});
  expect_cases(node_good, "succeeded", {"passed a.js::x"});
  expect_none(node_none, "no test ran");
}

TEST_P(Runners, F03_CtestAndTap) {
  start();
  const std::string lists =
      "cmake_minimum_required(VERSION 3.16)\nproject(x NONE)\n"
      "enable_testing()\nadd_test(NAME good COMMAND true)\n"
      "add_test(NAME bad COMMAND sh -c \"echo it says no; exit 3\")\n"
      "add_test(NAME missing COMMAND nosuchprogram)\n"
      "add_test(NAME off COMMAND true)\n"
      "set_tests_properties(off PROPERTIES DISABLED 1)\n";
  const Json ctest = {{"runner", "ctest"},
                      {"setup", {{"cmake", "-S", ".", "-B", "b"}}},
                      {"args", {"--test-dir", "b"}},
                      {"files", {{"CMakeLists.txt", lists}}}};
  Json some = ctest, nothing = ctest, nowhere = ctest;
  some["select"] = {"good"};
  nothing["select"] = {"x"};
  nowhere.erase("args");
  const std::string all = run(ctest), good = run(some), none = run(nothing),
                    no_dir = run(nowhere);
  const auto tap = [&](const std::string& script) {
    return run({{"runner", "tap"},
                {"command", {"sh", "t.sh"}},
                {"files", {{"t.sh", script}}}});
  };
  const std::string perl =
      run({{"runner", "tap"},
           {"command", {"perl", "t/x.t"}},
           {"files",
            {{"t/x.t",
              "use Test::More; ok(1, 'one'); subtest s => sub { ok(1, 'a'); "
              "ok(0, 'b') }; SKIP: { skip 'no', 1; ok(0) } done_testing;"}}}});
  const std::string passes = tap("echo 1..1; echo ok 1 - a; echo noise >&2");
  const std::string lies = tap("echo 1..1; echo not ok 1 - a");
  const std::string fails = tap("echo 1..1; echo ok 1 - a; exit 4");
  const std::string shorter = tap("echo 1..2; echo ok 1 - a");
  const std::string skipped = tap("echo '1..0 # SKIP no database'");
  const std::string bail = tap("echo 1..1; echo ok 1; echo 'Bail out! why'");
  const std::string absent = run({{"runner", "tap"},
                                  {"command", {"nosuchprogram"}},
                                  {"files", {{"a", ""}}}});

  expect_cases(all, "failed",
               {"passed good", "failed bad", "error missing", "skipped off"});
  expect_cases(good, "succeeded", {"passed good"});
  expect_none(none, "no test ran");
  expect_none(no_dir, "no test ran");
  expect_cases(
      perl, "failed",
      {"passed one", "passed s > a", "failed s > b", "skipped test 3"});
  expect_cases(passes, "succeeded", {"passed a"});
  expect_none(lies, "exited with 0, though its report has failures");
  expect_none(fails, "exited with 4, though its report has no failure");
  expect_none(shorter, "the plan is 1..2");
  expect_none(skipped, "no test ran");
  expect_none(bail, "Bail out! why");
  expect_none(absent, "\\\"nosuchprogram\\\" is not in the sandbox");
}

// ctest's report says nothing of tests that it did not come to, nor of names
// that it does not know.
TEST_P(Runners, F01_WhatCtestDoesNotReachIsMissing) {
  start();
  const std::string lists =
      "cmake_minimum_required(VERSION 3.20)\nproject(x NONE)\n"
      "enable_testing()\nadd_test(NAME a COMMAND sh ${CMAKE_SOURCE_DIR}/a.sh)\n"
      "add_test(NAME \"b <&> (x)\" COMMAND true)\n"
      "add_test(NAME off COMMAND true)\n"
      "set_tests_properties(off PROPERTIES DISABLED 1)\n";
  Json preset = {
      {"version", 4},
      {"configurePresets",
       {{{"name", "d"}, {"generator", "Unix Makefiles"}, {"binaryDir", "b"}}}},
      {"testPresets",
       {{{"name", "d"},
         {"configurePreset", "d"},
         {"execution", {{"stopOnFailure", true}}}}}}};
  const auto ctest = [&](const std::string& a, const Json& more) {
    Json payload = {{"runner", "ctest"},
                    {"retries", 1},
                    {"setup", {{"cmake", "-S", ".", "-B", "b"}}},
                    {"args", {"--preset", "d"}},
                    {"files",
                     {{"CMakeLists.txt", lists},
                      {"CMakePresets.json", preset.dump()},
                      {"a.sh", a}}}};
    payload.update(more);
    return run(payload);
  };
  const std::string stops = ctest("exit 1", Json::object());
  // The whole suite passes when it runs again; the first run stands.
  const std::string again =
      ctest("test -e /work/repo/k && exit 0; : >/work/repo/k; exit 1",
            Json::object());
  const std::string good = ctest("exit 0", Json::object());
  const std::string stride =
      ctest("exit 0", {{"args", {"--test-dir", "b", "-I", "1,3,2"}}});
  const std::string unknown = ctest(
      "exit 0", {{"args", {"--test-dir", "b"}}, {"select", {"a", "nope"}}});
  // Without a list nothing is known.
  preset["testPresets"][0]["output"] = {{"quiet", true}};
  const std::string quiet = ctest("exit 1", Json::object());
  expect_none(quiet, "gave no whole list of its tests");
  expect_cases(stops, "failed",
               {"failed a", "missing b <&> (x)", "missing off", "error ctest"});
  expect_cases(again, "failed",
               {"flaky a", "missing b <&> (x)", "missing off", "error ctest"});
  expect_cases(good, "succeeded",
               {"passed a", "passed b <&> (x)", "skipped off"});
  expect_cases(stride, "succeeded", {"passed a", "skipped off"});
  expect_none(unknown, "select: no test is named nope");
}

// A process of node's that leaves may have had tests to come.
TEST_P(Runners, F01_ATestFileOfNodesThatLeavesIsNoYes) {
  start();
  const std::string test = "const {test} = require('node:test');\n";
  const auto node = [&](const std::string& script) {
    return run(
        {{"runner", "node"},
         {"files",
          {{"a.test.js", test + script},
           {"b.test.js", test + "test('known', () => { throw 1; });"}}}});
  };
  const std::vector<std::string> leaves = {
      node("test('a', () => {}); setTimeout(() => process.exit(0), 50);\n"
           "setTimeout(() => test('b', () => { throw 1; }), 5000);"),
      node("test('a', () => { throw 1; }).then(() => setTimeout(() => "
           "process.exit(1), 50));\n"),
      node("test('a', () => {}).then(() => setTimeout(() => "
           "process.kill(process.pid, 'SIGKILL'), 50));\n"),
      node("process.exit(1);")};
  const std::string ends = node(
      "test('a', () => {}); process.on('beforeExit', () => {});\n"
      "require('node:child_process').execFileSync(process.execPath, ['-e', "
      "'']);");
  for (const std::string& id : leaves) {
    expect_none(id, "which tests there are is not known of a.test.js");
  }
  expect_cases(ends, "failed",
               {"passed a.test.js::a", "failed b.test.js::known"});
}

// A suite of which one case fails already: the patch that breaks another one is
// found where something tells the cases apart, and never believed elsewhere.
TEST_P(Runners, F03_TheGateOnWhatACommandReports) {
  start();
  const std::string repo = p().root() + "/repos/r";
  const std::string suite =
      "rc=0; n=0; echo 1..2 >r.tap; { echo \"<testsuite>\"; for c in a b; do "
      "n=$((n+1)); echo \"<testcase classname=\\\"s\\\" name=\\\"$c\\\">\"; if "
      "sh case_$c.sh; then echo \"ok $n - $c\" >>r.tap; else rc=1; echo "
      "\"<failure message=\\\"no\\\"/>\"; echo \"not ok $n - $c\" >>r.tap; fi; "
      "echo \"</testcase>\"; done; echo \"</testsuite>\"; } >r.xml; exit $rc";
  must("git init -q -b main " + repo + "; cd " + repo +
       "; cat >suite.sh <<'END'\n" + suite +
       "\nEND\necho false >case_a.sh; echo true >case_b.sh; echo 1 >x.txt; git "
       "add -A; git -c user.name=t -c user.email=t@t commit -qm base");
  const auto diff = [](const std::string& file, const std::string& from,
                       const std::string& to) {
    return "--- a/" + file + "\n+++ b/" + file + "\n@@ -1 +1 @@\n-" + from +
           "\n+" + to + "\n";
  };
  const std::string breaks = diff("case_b.sh", "true", "false"),
                    harmless = diff("x.txt", "1", "2"),
                    mends = diff("case_a.sh", "false", "true");
  const auto patch = [&](const std::string& text, const Json& report) {
    Json test = {{"runner", "command"}, {"command", {"sh", "suite.sh"}}};
    if (!report.is_null()) test["report"] = report;
    return p().submit(
        {{"kind", "patch.apply"},
         {"max_attempts", 1},
         {"payload", {{"repo", "r"}, {"diff", text}, {"test", test}}}});
  };
  const Json junit = {{"format", "junit"}, {"path", "r.xml"}};
  const Json tap = {{"format", "tap"}, {"path", "r.tap"}};
  const auto end = [&](const std::string& id, const std::string& outcome,
                       const Json& newly_failing) {
    const Json job = p().wait_end(id, 90000);
    EXPECT_EQ(job["result"].value("outcome", ""), outcome)
        << job.dump(1).substr(0, 4000);
    EXPECT_EQ(job["result"]["tests"]["newly_failing"], newly_failing)
        << job.dump(1).substr(0, 4000);
    return job["result"].value("reason", "");
  };
  const std::string told = "nothing tells its cases apart";
  const std::string blind = patch(breaks, nullptr),
                    blind_mends = patch(mends, nullptr),
                    by_junit = patch(breaks, junit),
                    by_tap = patch(breaks, tap), good = patch(harmless, junit);
  EXPECT_NE(end(blind, "tests_failed", {"command"}).find(told),
            std::string::npos);
  EXPECT_NE(end(blind_mends, "applied", Json::array()).find(told),
            std::string::npos);
  end(by_junit, "tests_failed", {"s::b"});
  end(by_tap, "tests_failed", {"b"});
  end(good, "applied", Json::array());
}

// What lies there before the run is not the run's report, wherever it leads.
TEST_P(Runners, F03_AnOldReportIsNotBelieved) {
  start();
  const std::string old =
      "<testsuite><testcase classname=\"s\" name=\"a\"/></testsuite>";
  const Json report = {{"format", "junit"}, {"path", "out/r.xml"}};
  const auto command = [&](const Json& argv, const Json& setup) {
    return run({{"runner", "command"},
                {"command", argv},
                {"setup", setup},
                {"report", report},
                {"files", {{"out/r.xml", old}, {"old.xml", old}}}});
  };
  const std::string committed = command({"true"}, Json::array());
  const std::string linked =
      command({"true"}, {{"ln", "-sf", "../old.xml", "out/r.xml"}});
  const std::string linked_by_run =
      command({"ln", "-s", "../old.xml", "out/r.xml"}, Json::array());
  const std::string other_place =
      command({"sh", "-c",
               "rm -rf out; mkdir new; cp old.xml new/r.xml; ln -s new out"},
              Json::array());
  const std::string fresh =
      command({"cp", "old.xml", "out/r.xml"}, Json::array());
  const std::string directory =
      command({"true"}, Json::array({Json::array({"rm", "out/r.xml"}),
                                     Json::array({"mkdir", "out/r.xml"})}));
  expect_none(committed, "left no report");
  expect_none(linked, "left no report");
  expect_none(linked_by_run, "left no report");
  expect_none(other_place, "left no report");
  expect_cases(fresh, "succeeded", {"passed s::a"});
  expect_none(directory, "cannot be removed");
  for (const auto& [more, field] : std::vector<std::pair<Json, std::string>>{
           {{{"report", {{"format", "junit"}, {"path", "../r"}}}},
            "payload.report.path"},
           {{{"report", {{"format", "xml"}, {"path", "r"}}}},
            "payload.report.format"},
           {{{"runner", "pytest"}, {"report", report}}, "payload.report"},
           {{{"runner", "jest"}}, "payload.runner"},
           {{{"runner", "node"}, {"args", {"--test-reporter=tap"}}},
            "payload.args[0]"}}) {
    Json payload = {{"files", {{"a", ""}}}};
    payload.update(more);
    if (!payload.contains("runner")) {
      payload.update({{"runner", "command"}, {"command", {"true"}}});
    }
    const Answer answer =
        p().post("/v1/jobs", {{"kind", "test.run"}, {"payload", payload}});
    EXPECT_EQ(answer.status, 400) << payload.dump();
    EXPECT_EQ(answer.json().value("field", ""), field) << answer.body;
  }
}

MACHINA_BOTH(Runners);

}  // namespace
}  // namespace machina::e2e
