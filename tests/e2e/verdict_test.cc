// Verdicts that must not be wrong, through the whole product: suites that stop
// early, reports that are none, cases that are gone.

#include <filesystem>
#include <fstream>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class Verdict : public EndToEnd {
 protected:
  int sh(const std::string& line) { return p().shell("set -e; " + line); }
  void make_repository(const std::string& name,
                       const std::map<std::string, std::string>& files) {
    const std::string repo = p().root() + "/repos/" + name;
    ASSERT_EQ(sh("git init -q -b main " + repo), 0);
    for (const auto& [path, text] : files) {
      std::ofstream(repo + "/" + path) << text;
    }
    ASSERT_EQ(sh("cd " + repo + "; " + kGit + " add -A; " + kGit +
                 " commit -q -m base"),
              0)
        << read_file(p().dir() + "/shell.log");
  }
  static std::string change(const std::string& path, const std::string& from,
                            const std::string& to) {
    return "--- a/" + path + "\n+++ b/" + path + "\n@@ -1 +1 @@\n-" + from +
           "\n+" + to + "\n";
  }
  std::string submit(const std::string& repo, const std::string& diff,
                     const Json& more = Json::object()) {
    Json payload = {{"repo", repo}, {"diff", diff}, {"test", Json::object()}};
    payload.update(more);
    return p().submit(
        {{"kind", "patch.apply"}, {"max_attempts", 1}, {"payload", payload}});
  }
  // The diff that makes these of a repository's files; an empty text: no file.
  std::string edited(const std::string& name,
                     const std::map<std::string, std::string>& files) {
    const std::string repo = p().root() + "/repos/" + name;
    for (const auto& [path, text] : files) {
      std::ofstream(repo + "/" + path) << text;
      if (text.empty()) std::filesystem::remove(repo + "/" + path);
    }
    EXPECT_EQ(sh("cd " + repo + "; git add -A; git diff --cached > " +
                 p().dir() + "/the.diff; git reset -q --hard"),
              0);
    return read_file(p().dir() + "/the.diff");
  }
  Json result(const std::string& id) {
    return p().wait_end(id, 120000)["result"];
  }

  const std::string kGit = "git -c user.name=E2E -c user.email=e2e@localhost";
};

// A case is gone: is it the diff that removes the test, or only something that
// looks like it.
TEST_P(Verdict, F01_ACaseIsExcusedByItsOwnDefinitionAlone) {
  start();
  struct Try {
    std::string name;
    std::map<std::string, std::string> files, edits;
    Json test;
    bool applied;
    std::string id;
  };
  std::vector<Try> tries;
  const auto add = [&](const std::string& name,
                       const std::map<std::string, std::string>& files,
                       const std::map<std::string, std::string>& edits,
                       const Json& test, bool applied) {
    make_repository(name, files);
    Try one{name, files, edits, test, applied, ""};
    one.id = submit(name, edited(name, edits), {{"test", test}});
    tries.push_back(std::move(one));
  };
  const Json node = {{"runner", "node"}}, unittest = {{"runner", "unittest"}};
  const std::string js =
      "const {test, describe, it} = require('node:test');\n"
      "test('alpha', () => {});\n";
  const std::string beta = "test('beta', () => {});\n";
  const std::string suite =
      "describe('suite', () => {\n  it('beta', () => {});\n});\n";
  add("node_removes", {{"a.test.js", js + beta}}, {{"a.test.js", js}}, node,
      true);
  add("node_suite", {{"a.test.js", js + suite}},
      {{"a.test.js", js + "describe('other', () => {\n  it('beta', () => "
                          "{});\n});\n"}},
      node, true);
  add("node_other", {{"a.test.js", js + suite + beta}},
      {{"a.test.js", js + "if (0) describe('suite', () => {\n  it('beta', () "
                          "=> {});\n});\n"}},
      node, false);

  const std::string two =
      "import unittest\nclass A(unittest.TestCase):\n"
      "    def test_x(self): pass\n    def test_k(self): pass\n";
  const std::string one =
      "import unittest\nclass A(unittest.TestCase):\n"
      "    def test_k(self): pass\n";
  add("unittest_removes", {{"test_a.py", two}}, {{"test_a.py", one}}, unittest,
      true);
  add("unittest_deletes", {{"test_a.py", two}, {"test_b.py", one}},
      {{"test_a.py", ""}}, unittest, true);
  const std::string other_class = "class B(A): pass\n";
  add("unittest_class", {{"test_a.py", two + other_class}},
      {{"test_a.py", two}}, unittest, true);
  add("unittest_other_class",
      {{"test_a.py", two + "class B(unittest.TestCase):\n"
                           "    def test_x(self): pass\n"}},
      {{"test_a.py", one + "class B(unittest.TestCase):\n"
                           "    def test_x(self): pass\ndel B.test_x\n"}},
      unittest, false);
  ASSERT_EQ(sh("mkdir -p " + p().root() + "/repos/unittest_start/tests " +
               p().root() + "/repos/unittest_elsewhere/tests"),
            0);
  Json start_there = unittest;
  start_there["args"] = {"discover", "-s", "tests"};
  add("unittest_start", {{"tests/test_a.py", two}}, {{"tests/test_a.py", one}},
      start_there, true);
  add("unittest_elsewhere",
      {{"tests/test_a.py", two}, {"test_a.py", "x = 1\n"}},
      {{"test_a.py", ""}, {"tests/test_a.py", two + "del A.test_x\n"}},
      start_there, false);

  const std::string text = "X = \"\"\"\nclass TestA: doc\n\"\"\"\n";
  const std::string a =
      "class TestA:\n    def test_a(self): pass\ndef test_k(): pass\n";
  add("pytest_text", {{"test_a.py", text + a}},
      {{"test_a.py", "X = \"\"\"\n\"\"\"\n" + a + "del TestA\n"}},
      Json::object(), false);
  add("pytest_class",
      {{"test_a.py",
        "class TestB:\n    def test_a(self): "
        "pass\n" +
            a}},
      {{"test_a.py", a}}, Json::object(), true);
  const std::string f = "def f():\n    \"\"\"\n    >>> 1\n    1\n    \"\"\"\n";
  const std::string g = "def g():\n    \"\"\"\n    >>> 1\n    1\n    \"\"\"\n";
  add("pytest_doctest", {{"m.py", f + g}}, {{"m.py", f}},
      {{"args", {"--doctest-modules"}}}, true);

  const std::string tap =
      "echo 1..2; echo ok 1 - parser: a; echo ok 2 - parser: b\n";
  add("tap", {{"t.sh", tap}, {"parser.txt", "x\n"}},
      {{"parser.txt", ""}, {"t.sh", "echo 1..1; echo ok 1 - parser: a\n"}},
      {{"runner", "tap"}, {"command", {"sh", "t.sh"}}}, false);
  const std::string junit =
      "echo '<testsuite><testcase classname=\"Parser\" name=\"a\"/>"
      "<testcase classname=\"Parser\" name=\"b\"/></testsuite>' > r.xml\n";
  add("junit", {{"t.sh", junit}, {"Parser.h", "x\n"}},
      {{"Parser.h", ""},
       {"t.sh",
        "echo '<testsuite><testcase classname=\"Parser\" "
        "name=\"a\"/></testsuite>' > r.xml\n"}},
      {{"runner", "command"},
       {"command", {"sh", "t.sh"}},
       {"report", {{"format", "junit"}, {"path", "r.xml"}}}},
      false);
  for (const Try& each : tries) {
    const Json got = result(each.id);
    EXPECT_EQ(got.value("outcome", ""),
              each.applied ? "applied" : "tests_failed")
        << each.name << got.dump(1).substr(0, 3000);
    if (each.applied || !got.contains("tests")) continue;
    EXPECT_EQ(got["tests"]["missing"].size(), 1u) << each.name << got["tests"];
  }
}

TEST_P(Verdict, F01_WhatASuiteDidNotReachIsNoYes) {
  start();
  const std::map<std::string, std::string> files = {
      {"pytest.ini", "[pytest]\naddopts = --exitfirst\n"},
      {"m.py", "def f(): return 1\n"},
      {"test_a.py", "def test_a(): assert 0\n"},
      {"test_b.py", "from m import f\ndef test_b(): assert f() == 1\n"}};
  make_repository("stops", files);
  auto leaves = files;
  leaves["test_a.py"] =
      "import pytest\ndef test_a(): pytest.exit('x', returncode=0)\n";
  make_repository("leaves", leaves);
  const std::string breaks =
      change("m.py", "def f(): return 1", "def f(): return 2");
  const std::string harmless =
      change("m.py", "def f(): return 1", "def f(): return 2 - 1");
  const std::string bad = submit("stops", breaks);
  const std::string good = submit("stops", harmless, {{"push", true}});
  const std::string unknown = submit("leaves", breaks);
  Json got = result(bad);
  EXPECT_EQ(got["outcome"], "tests_failed") << got.dump(1);
  EXPECT_EQ(got["tests"]["newly_failing"], Json({"test_b::test_b"}));
  got = result(unknown);
  EXPECT_EQ(got["outcome"], "tests_failed") << got.dump(1);
  EXPECT_EQ(got["tests"]["missing"],
            Json({"test_a::test_a", "test_b::test_b"}));
  EXPECT_EQ(got["tests"]["after"]["missing"], 2);
  got = result(good);
  EXPECT_EQ(got["outcome"], "applied") << got.dump(1);
  // A later test needs the patch: the rollback sees it, behind the failure at
  // which the project would stop.
  const std::string repo = p().root() + "/repos/stops", work = repo + "-w";
  ASSERT_EQ(sh("cd " + repo + "; " + kGit + " worktree add -q " + work +
               " review/" + good + "; cd " + work +
               "; printf 'def test_c(): assert \"2 - 1\" in open(\"m.py\")"
               ".read()\\n' >test_c.py; " +
               kGit + " add -A; " + kGit + " commit -q -m later; cd " + repo +
               "; " + kGit + " worktree remove -f " + work),
            0)
      << read_file(p().dir() + "/shell.log");
  got = result(p().submit({{"kind", "patch.rollback"},
                           {"max_attempts", 1},
                           {"payload", {{"patch_id", good}}}}));
  EXPECT_EQ(got["outcome"], "tests_failed") << got.dump(1);
  EXPECT_EQ(got["tests"]["newly_failing"], Json({"test_c::test_c"}));
}

TEST_P(Verdict, F02_ARunIsJudgedByItsOwnReport) {
  start();
  const auto run = [&](const std::string& test, const Json& more) {
    Json payload = {{"files", {{"test_a.py", test}}}};
    payload.update(more);
    return p().submit(
        {{"kind", "test.run"}, {"max_attempts", 1}, {"payload", payload}});
  };
  const Json stale = {
      {"args", {"--version"}},
      {"setup",
       {{"sh", "-c",
         "mkdir -p /work/.machina; echo '<testsuite><testcase name=\"a\"/>"
         "</testsuite>' >/work/.machina/junit.xml"}}}};
  const std::vector<std::string> jobs = {
      run("def test_a(): assert 0\n", stale),
      run("import pytest\ndef test_a(): pytest.exit('x', returncode=0)\n",
          Json::object()),
      run("import pytest\ndef test_a(): pytest.skip('x')\n", Json::object())};
  for (const std::string& id : jobs) {
    const Json job = p().wait_end(id, 60000);
    EXPECT_EQ(job["state"], "failed") << job.dump(1);
    EXPECT_EQ(job["result"]["ok"], false);
    EXPECT_EQ(job["result"]["passed"], 0);
  }
}

TEST_P(Verdict, F04_IdsThatChangeAreNamedInTheReason) {
  start();
  make_repository("ids", {{"m.py", "X = 1\n"},
                          {"test_a.py",
                           "import pytest, time\n"
                           "@pytest.mark.parametrize('x', [1], "
                           "ids=[f'at-{time.time_ns()}'])\n"
                           "def test_a(x): pass\ndef test_b(): pass\n"}});
  const Json got = result(submit("ids", change("m.py", "X = 1", "X = 2")));
  EXPECT_EQ(got["outcome"], "tests_failed") << got.dump(1);
  const std::string reason = got["reason"];
  EXPECT_NE(reason.find("change from run to run"), std::string::npos) << reason;
  EXPECT_NE(reason.find("test_a::test_a[at-"), std::string::npos) << reason;
}

TEST_P(Verdict, F04_IdsThatChangeAreNamedWithEveryRunner) {
  start();
  make_repository("ids",
                  {{"m.py", "X = 1\n"},
                   {"test_a.py",
                    "import random, string, unittest\n"
                    "w = ''.join(random.choices(string.ascii_letters, k=9))\n"
                    "class T(unittest.TestCase):\n"
                    "    def test_b(self):\n"
                    "        with self.subTest(w=w): pass\n"}});
  const Json got = result(submit("ids", change("m.py", "X = 1", "X = 2"),
                                 {{"test", {{"runner", "unittest"}}}}));
  EXPECT_EQ(got["outcome"], "tests_failed") << got.dump(1);
  const std::string reason = got["reason"];
  EXPECT_NE(reason.find("change from run to run"), std::string::npos) << reason;
  EXPECT_NE(reason.find("test_a.T::test_b (w='"), std::string::npos) << reason;
}

MACHINA_BOTH(Verdict);

}  // namespace
}  // namespace machina::e2e
