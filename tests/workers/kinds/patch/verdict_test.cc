// The gate, on what two runs say: nothing runs here.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "workers/kinds/patch/patch.h"
#include "workers/kinds/suite/pytest_watch.h"

namespace machina::kinds {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

Suite parse(const std::string& cases) {
  auto suite =
      decode_junit(encode_junit("<testsuite>" + cases + "</testsuite>"));
  EXPECT_TRUE(suite) << suite.error().what;
  return suite ? *suite : Suite();
}

// One letter a case: p passes, f fails, e errs, s is skipped, t passes and
// fails in its teardown, F fails in both, m is not reached. "f.b" is case b of
// the module t with the letter f.
std::string element(char how, const std::string& name) {
  const std::string open = "<testcase classname=\"t\" name=\"" + name + "\">";
  const std::string teardown =
      open + "<error message=\"failed on teardown with &quot;x&quot;\"/>";
  const std::string close = "</testcase>";
  switch (how) {
    case 'f':
      return open + "<failure/>" + close;
    case 'e':
      return open + "<error message=\"failed on setup\"/>" + close;
    case 's':
      return open + "<skipped/>" + close;
    case 't':
      return teardown + close;
    case 'F':
      return open + "<failure/>" + close + teardown + close;
    default:
      return open + close;
  }
}

TestPhase phase(const std::vector<std::string>& cases,
                const std::map<std::string, std::string>& where = {}) {
  TestPhase out;
  out.ran = out.valid = out.run.reported = true;
  std::string report, record;
  for (const std::string& one : cases) {
    const std::string name = one.substr(2);
    if (one[0] != 'm') report += element(one[0], name);
    const auto at = where.find(name);
    std::string lines = at == where.end() ? "" : at->second;
    for (std::size_t i; (i = lines.find('\n')) != std::string::npos;) {
      lines.replace(i, 1, "&#10;");
    }
    record += "<testcase classname=\"t\" name=\"" + name + "\"><" +
              (one[0] == 'm' ? "error" : "skipped") + " message=\"" + lines +
              "\"/></testcase>";
  }
  out.run.tests.suite = parse(report);
  expect_cases(out.run.tests.suite, parse(record));
  return out;
}

Gate judge(const TestPhase& before, const TestPhase& after,
           const std::string& undo = "") {
  return judge_patch(before, after, true, read_taken_away(undo));
}

std::vector<std::string> ids(const std::vector<CaseKey>& keys) {
  std::vector<std::string> out;
  for (const CaseKey& key : keys) {
    out.push_back(shown(key) + (key.teardown ? " teardown" : ""));
  }
  return out;
}

TEST(Verdict, F01_WhatPassedBeforeIsSeenToPassAfter) {
  Gate gate = judge(phase({"p.a", "p.b"}), phase({"p.a", "p.b"}));
  EXPECT_TRUE(gate.accepted) << gate.reason;
  EXPECT_EQ(gate.reason, "");
  gate = judge(phase({"p.a", "p.b"}), phase({"p.a"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.missing), ElementsAre("t::b"));
  EXPECT_THAT(gate.newly_failing, IsEmpty());
  EXPECT_THAT(gate.reason, HasSubstr("t::b"));
  gate = judge(phase({"p.a", "p.b"}), phase({"p.a", "s.b"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::b"));
  // What did not pass may go, or go on.
  gate = judge(phase({"p.a", "f.b", "s.c"}), phase({"p.a"}));
  EXPECT_TRUE(gate.accepted) << gate.reason;
  gate = judge(phase({"p.a", "f.b"}), phase({"p.a", "e.b"}));
  EXPECT_TRUE(gate.accepted) << gate.reason;
  EXPECT_THAT(gate.reason, HasSubstr("1 case failed before and still fails"));
}

TEST(Verdict, F01_WhatWasNotReachedIsUnknown) {
  // Not reached after: never a yes, whatever it was before.
  for (const char* before : {"p.b", "f.b", "s.b", "m.b"}) {
    const Gate gate = judge(phase({"f.a", before}), phase({"f.a", "m.b"}));
    EXPECT_FALSE(gate.accepted) << before;
    EXPECT_THAT(gate.reason, HasSubstr("no whole verdict after")) << before;
    EXPECT_EQ(gate.missing.size(), before[0] == 'p' || before[0] == 'm')
        << before;
  }
  Gate gate = judge(phase({"p.a"}), phase({"p.a", "m.new"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.missing), ElementsAre("t::new"));
  // Not reached before: excuses neither a failure nor that it is gone.
  gate = judge(phase({"f.a", "m.b"}), phase({"f.a", "f.b"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::b"));
  gate = judge(phase({"f.a", "m.b"}), phase({"f.a"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.missing), ElementsAre("t::b"));
  gate = judge(phase({"f.a", "m.b"}), phase({"f.a", "p.b"}));
  EXPECT_TRUE(gate.accepted) << gate.reason;
  EXPECT_THAT(gate.reason, HasSubstr("no whole verdict before"));
  // Also of a run that left no report.
  TestPhase killed = phase({"m.a", "m.b"});
  killed.valid = false;
  killed.problem = "killed";
  gate = judge(killed, phase({"p.a"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.missing), ElementsAre("t::b"));
  EXPECT_TRUE(judge(killed, phase({"p.a", "p.b"})).accepted);
  gate = judge(phase({"p.a", "p.b"}), killed);
  EXPECT_FALSE(gate.accepted);
  EXPECT_EQ(gate.missing.size(), 2u);
  // A run that nobody listed the cases of, and one that ended oddly both times.
  TestPhase unknown = phase({"p.a"});
  unknown.run.tests.suite.complete = false;
  EXPECT_FALSE(judge(unknown, unknown).accepted);
  TestPhase odd = phase({"p.a"});
  add_error(odd.run.tests, "pytest", "exited with 3");
  EXPECT_FALSE(judge(odd, odd).accepted);
  EXPECT_THAT(judge(odd, odd).reason, HasSubstr("exited with 3"));
}

TEST(Verdict, F02_CasesWithOneIdAreComparedByNumber) {
  // The second one fails newly, though the first did before.
  Gate gate = judge(phase({"f.a", "p.a", "p.z"}), phase({"f.a", "f.a", "p.z"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a#2"));
  gate = judge(phase({"f.a", "p.a"}), phase({"p.a", "f.a"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a#2"));
  EXPECT_THAT(ids(gate.newly_passing), ElementsAre("t::a"));
  EXPECT_TRUE(judge(phase({"f.a", "p.a"}), phase({"f.a", "p.a"})).accepted);
  // Another number of them: by counts.
  gate = judge(phase({"p.a", "p.a", "p.a"}), phase({"p.a", "p.a"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.missing), ElementsAre("t::a#3"));
  gate = judge(phase({"f.a", "p.a"}), phase({"f.a", "p.a", "f.a"}));
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a#3"));
  gate = judge(phase({"f.a", "p.a", "p.a"}), phase({"f.a", "f.a"}));
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a#2"));
  EXPECT_THAT(ids(gate.missing), ElementsAre("t::a#3"));
  EXPECT_TRUE(judge(phase({"f.a", "p.a"}), phase({"p.a"})).accepted);
}

TEST(Verdict, F02_ATeardownIsKeptApartFromItsBody) {
  EXPECT_TRUE(judge(phase({"t.a"}), phase({"t.a"})).accepted);
  Gate gate = judge(phase({"t.a"}), phase({"F.a"}));
  EXPECT_FALSE(gate.accepted);
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a"));
  gate = judge(phase({"t.a"}), phase({"f.a"}));
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a"));
  gate = judge(phase({"p.a"}), phase({"t.a"}));
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a teardown"));
  gate = judge(phase({"f.a"}), phase({"F.a"}));
  EXPECT_THAT(ids(gate.newly_failing), ElementsAre("t::a teardown"));
  EXPECT_TRUE(judge(phase({"F.a"}), phase({"F.a"})).accepted);
  gate = judge(phase({"t.a"}), phase({"p.a"}));
  EXPECT_TRUE(gate.accepted);
  EXPECT_THAT(ids(gate.newly_passing), ElementsAre("t::a"));
}

TEST(Verdict, F02_ARetryDecidesOnTheCaseThatItRan) {
  const auto after_rerun = [](std::vector<std::string> cases,
                              std::vector<std::string> rerun) {
    TestOutcome tests = phase(cases).run.tests;
    merge_rerun(tests, phase(rerun).run.tests.suite);
    return tests;
  };
  EXPECT_TRUE(passed(after_rerun({"f.a", "p.b"}, {"p.a"})));
  EXPECT_EQ(after_rerun({"F.a"}, {"p.a"}).flaky, 2u);
  EXPECT_FALSE(passed(after_rerun({"f.a", "p.b"}, {"p.b"})));
  EXPECT_FALSE(passed(after_rerun({"f.a"}, {"t.a"})));
  EXPECT_FALSE(passed(after_rerun({"f.a"}, {"s.a"})));
  EXPECT_FALSE(passed(after_rerun({"f.a", "m.b"}, {"p.a"})));
  // Two of one id.
  EXPECT_FALSE(passed(after_rerun({"f.a", "p.a"}, {"f.a", "p.a"})));
  EXPECT_TRUE(passed(after_rerun({"f.a", "p.a"}, {"p.a", "f.a"})));
  EXPECT_TRUE(passed(after_rerun({"p.a", "f.a"}, {"p.a"})));
  EXPECT_FALSE(passed(after_rerun({"f.a", "f.a", "f.a"}, {"p.a"})));
}

TEST(Verdict, F01_WhatPassesOnlyWhenItRunsAgainIsNamed) {
  TestPhase after = phase({"p.a", "f.b"});
  merge_rerun(after.run.tests, phase({"p.b"}).run.tests.suite);
  after.alone = true;
  Gate gate = judge(phase({"p.a", "p.b"}), after);
  EXPECT_TRUE(gate.accepted);
  EXPECT_EQ(gate.reason,
            "1 case failed and passed when it was run again without the "
            "others: t::b");
  after.alone = false;
  gate = judge(phase({"p.a", "p.b"}), after);
  EXPECT_THAT(gate.reason, HasSubstr("when it was run again: t::b"));
}

TEST(Verdict, F02_OnlyWhatHasANameIsACase) {
  Suite suite = parse(
      "<testcase time='0'/><testcase classname='' name=' '/>"
      "<testcase classname='t' name=''/>");
  EXPECT_EQ(suite.cases.size(), 0u);
  EXPECT_EQ(suite.passed, 0u);
  suite = parse("<testcase classname='t'><failure/></testcase>");
  EXPECT_EQ(suite.failed, 1u);
  // What a runner says in another way, or in no way that is known.
  suite = parse(
      "<testcase name='a' status='notrun'/>"
      "<testcase name='b' status='run'/>"
      "<testcase name='c' status='disabled'/>"
      "<testcase name='d' status='exploded'/>"
      "<testcase name='e'><surprise/></testcase>"
      "<testcase name='f'><system-out>x</system-out></testcase>"
      "<testcase name='g' result='suppressed'/>");
  EXPECT_EQ(suite.passed, 2u);
  EXPECT_EQ(suite.skipped, 3u);
  EXPECT_EQ(suite.errors, 2u);
  EXPECT_FALSE(decode_junit(encode_junit(
      "<testsuite><testcase name='a'><testcase name='b'/></testcase>"
      "</testsuite>")));
}

// --- what the diff takes away ---

// git's diff that undoes a patch: what it adds, the patch removed.
std::string undo_of(const std::string& path, const std::string& hunk) {
  return "diff --git a/" + path + " b/" + path + "\nindex 1..2 100644\n--- a/" +
         path + "\n+++ b/" + path + "\n" + hunk;
}

TEST(Verdict, F01_OnlyTheDiffThatRemovesATestExcusesThatItIsGone) {
  const std::string kB = "test_t.py\ntest_t.py\n7\n\nb";
  const TestPhase before =
      phase({"p.a", "p.b[1]", "p.b[2]"}, {{"b[1]", kB}, {"b[2]", kB}});
  const TestPhase after = phase({"p.a"});
  const auto accepted = [&](const std::string& undo) {
    return judge(before, after, undo).accepted;
  };
  const std::string gone =
      undo_of("test_t.py", "@@ -5,1 +5,3 @@\n x = 1\n+@p\n+def b(x): pass\n");
  EXPECT_TRUE(accepted(gone)) << judge(before, after, gone).reason;
  EXPECT_THAT(judge(before, after, gone).reason,
              HasSubstr("2 cases that passed before are removed"));
  EXPECT_FALSE(accepted(""));
  // Another line than the one that defines it, another name, another file.
  EXPECT_FALSE(accepted(
      undo_of("test_t.py", "@@ -5,1 +5,2 @@\n x = 1\n+def b(x): pass\n")));
  EXPECT_FALSE(accepted(
      undo_of("test_t.py", "@@ -6,1 +6,2 @@\n x = 1\n+def bb(x): pass\n")));
  EXPECT_FALSE(accepted(
      undo_of("test_u.py", "@@ -6,1 +6,2 @@\n x = 1\n+def b(x): pass\n")));
  // The line has changed: it defines the test still.
  EXPECT_FALSE(accepted(undo_of(
      "test_t.py", "@@ -7,1 +7,1 @@\n-    def b(): pass\n+def b(x): pass\n")));
  // The test has another name now.
  EXPECT_TRUE(accepted(undo_of(
      "test_t.py", "@@ -7,1 +7,1 @@\n-def c(x): pass\n+def b(x): pass\n")));
  // What the file has beside it says nothing.
  EXPECT_FALSE(
      accepted(undo_of("test_t.py", "@@ -1,1 +1,2 @@\n x = 1\n+import y\n")));
  // The file is gone, or has another name.
  EXPECT_TRUE(
      accepted("diff --git a/test_t.py b/test_t.py\nnew file mode "
               "100644\n--- /dev/null\n+++ b/test_t.py\n@@ -0,0 +1 @@\n"
               "+import x\n"));
  EXPECT_TRUE(
      accepted("diff --git a/test_v.py b/test_t.py\nsimilarity index "
               "100%\nrename from test_v.py\nrename to test_t.py\n"));
  EXPECT_FALSE(
      accepted("diff --git a/test_t.py b/test_v.py\nsimilarity index "
               "100%\nrename from test_t.py\nrename to test_v.py\n"));
  // A skip is no removal.
  EXPECT_FALSE(
      judge(before, phase({"p.a", "s.b[1]", "s.b[2]"}), gone).accepted);
  // Nor is a case that the run was to reach.
  EXPECT_FALSE(
      judge(before, phase({"p.a", "m.b[1]", "m.b[2]"}), gone).accepted);
}

TEST(Verdict, F01_AClassGoesWithItsLineAndNoOtherDoes) {
  const TestPhase before = phase(
      {"p.a", "p.b"}, {{"b", "test_t.py\nbase.py\n3\nTestX::TestY\nb\n2,0"}});
  const auto accepted = [&](const std::string& undo) {
    return judge(before, phase({"p.a"}), undo).accepted;
  };
  const std::string line = "@@ -1,1 +1,2 @@\n x = 1\n+";
  EXPECT_TRUE(accepted(undo_of("test_t.py", line + "class TestX(Base):\n")));
  EXPECT_TRUE(accepted(undo_of("test_t.py", line + "class TestX:\n")));
  EXPECT_FALSE(accepted(undo_of("test_t.py", line + "class TestXX:\n")));
  // Below an `if`: its line is known.
  EXPECT_TRUE(accepted(undo_of("test_t.py", line + "    class TestX:\n")));
  EXPECT_FALSE(accepted(undo_of("test_t.py", line + "class TestY:\n")));
  EXPECT_TRUE(accepted(
      undo_of("base.py", "@@ -2,1 +2,2 @@\n x = 1\n+    async  def b (x):\n")));
  // A text that looks like the class's line, or a class that stays there.
  EXPECT_FALSE(accepted(
      undo_of("test_t.py", "@@ -7,1 +7,2 @@\n x = 1\n+class TestX: doc\n")));
  EXPECT_FALSE(accepted(undo_of("test_t.py",
                                "@@ -1,2 +1,2 @@\n x = 1\n-class TestX(New):\n"
                                "+class TestX(Base):\n")));
}

TEST(Verdict, F01_AClassWithinAClassGoesWithItsLineToo) {
  const TestPhase before = phase(
      {"p.a", "p.b"}, {{"b", "test_t.py\ntest_t.py\n9\nTestX::TestY\nb\n2,7"}});
  const auto accepted = [&](const std::string& hunk) {
    return judge(before, phase({"p.a"}), undo_of("test_t.py", hunk)).accepted;
  };
  EXPECT_TRUE(accepted("@@ -6,1 +6,2 @@\n x = 1\n+    class TestY:\n"));
  EXPECT_FALSE(accepted("@@ -4,1 +4,2 @@\n x = 1\n+    class TestY:\n"));
  // The same name in another class says nothing of this one.
  EXPECT_FALSE(accepted("@@ -4,1 +4,2 @@\n x = 1\n+    def b(self):\n"));
}

TEST(Verdict, F01_ACallGoesWithTheLineThatNamesIt) {
  const std::string where = "a.test.js\na.test.js\n4\nsuite\nit's b\n2";
  const TestPhase before = phase({"p.a", "p.b"}, {{"b", where}});
  const auto accepted = [&](const std::string& hunk,
                            const std::string& path = "a.test.js") {
    return judge(before, phase({"p.a"}), undo_of(path, hunk)).accepted;
  };
  const std::string line = "+  test(\"it's b\", () => {});\n";
  EXPECT_TRUE(accepted("@@ -3,1 +3,2 @@\n x\n" + line));
  EXPECT_TRUE(accepted("@@ -4,1 +4,2 @@\n test(\n+    `it's b`,\n"));
  EXPECT_TRUE(accepted("@@ -1,1 +1,2 @@\n x\n+describe('suite', () => {\n"));
  // Another line, another name, one that stays, and another file.
  EXPECT_FALSE(accepted("@@ -7,1 +7,2 @@\n x\n" + line));
  EXPECT_FALSE(accepted("@@ -3,1 +3,2 @@\n x\n+  test('it');\n"));
  EXPECT_FALSE(accepted("@@ -3,2 +3,2 @@\n x\n-test(\"it's b\", g);\n" + line));
  EXPECT_FALSE(accepted("@@ -7,1 +7,2 @@\n x\n+describe('suite', f);\n"));
  EXPECT_FALSE(accepted("@@ -3,1 +3,2 @@\n x\n" + line, "b.test.js"));
  // More lines than are kept excuse nothing.
  std::string many = "@@ -0,0 +1,5004 @@\n";
  for (int i = 0; i < 5003; ++i) many += "+''\n";
  const TakenAway taken = read_taken_away(undo_of("a.test.js", many + line));
  EXPECT_EQ(taken.gone.at("a.test.js").size(), kTakenLinesMax);
}

// Cases of which the run does not say where they are defined.
TestPhase placeless(const std::vector<std::string>& more, bool id_is_module) {
  TestPhase out = phase({"p.a"});
  out.id_is_module = id_is_module;
  for (const std::string& id : more) {
    Case one;
    one.id = id;
    out.run.tests.suite.cases.push_back(one);
  }
  return out;
}

std::string undo_of_deleted(const std::string& path) {
  return "diff --git a/" + path + " b/" + path +
         "\nnew file mode 100644\n--- /dev/null\n+++ b/" + path +
         "\n@@ -0,0 +1 @@\n+import x\n";
}

TEST(Verdict, F01_WithoutAPlaceOnlyAModulesFileThatIsGoneExcuses) {
  const TestPhase before =
      placeless({"tests.test_t.TestX::test_b", "tests.test_t::c[1]"}, true);
  const auto missing = [&](const std::string& undo) {
    return judge(before, phase({"p.a"}), undo).missing.size();
  };
  EXPECT_EQ(missing(undo_of_deleted("tests/test_t.py")), 0u);
  for (const char* other :
       {"test_t.py", "tests/test_t2.py", "tests/test_t.txt", "tests/test.py",
        "tests/test_t.py.txt", "tests/test_t", "tests.py/test_t"}) {
    EXPECT_EQ(missing(undo_of_deleted(other)), 2u) << other;
  }
  // A line may be another class's, or a text's.
  const std::string hunk =
      "@@ -1,1 +1,4 @@\n x = 1\n+def c(x):\n+class TestX:\n";
  EXPECT_EQ(
      missing(undo_of("tests/test_t.py", hunk + "+    def test_b(self):\n")),
      2u);
}

TEST(Verdict, F01_AnIdThatOnlyLooksLikeAPathExcusesNothing) {
  const TestPhase before = placeless(
      {"parser: b", "Parser.Basic", "tests.test_t::c", "a.test.js::b"}, false);
  for (const char* path : {"parser.txt", "Parser.h", "tests/test_t.py",
                           "a.test.js", "parser", "Parser"}) {
    const Gate gate = judge(before, phase({"p.a"}), undo_of_deleted(path));
    EXPECT_EQ(gate.missing.size(), 4u) << path;
    EXPECT_FALSE(gate.accepted) << path;
  }
}

TEST(Verdict, F01_GitsOwnNamesAreRead) {
  const TakenAway taken = read_taken_away(
      "diff --git \"a/t\\303\\244 x.py\" \"b/t\\303\\244 x.py\"\n"
      "--- \"a/t\\303\\244 x.py\"\n+++ \"b/t\\303\\244 x.py\"\n"
      "@@ -3 +2,0 @@ def no\n-def come():\n"
      "@@ -9,2 +8,3 @@\n context\n+def gone():\n--- a/no\n+++ b/no\n"
      "diff --git a/a b.py b/a b.py\n--- a/a b.py\t\n+++ b/a b.py\t\n"
      "@@ -0,0 +1 @@\n+class Y:\n\\ No newline at end of file\n");
  ASSERT_EQ(taken.gone.size(), 2u);
  ASSERT_EQ(taken.gone.at("t\xc3\xa4 x.py").size(), 1u);
  EXPECT_EQ(taken.gone.at("t\xc3\xa4 x.py")[0].number, 9u);
  EXPECT_EQ(taken.come.at("t\xc3\xa4 x.py")[0].number, 3u);
  EXPECT_EQ(taken.gone.at("a b.py")[0].text, "class Y:");
  EXPECT_THAT(taken.files, IsEmpty());
  (void)read_taken_away("@@ -99999999999999999999 +1,x @@\n+++ \"\n--- \n");
}

// --- ids that change ---

TEST(Verdict, F04_IdsThatChangeAreNamed) {
  const TestPhase before = phase({"p.a", "p.x[at 0x7f01]"});
  const TestPhase after = phase({"p.a", "p.x[at 0x7fb2]"});
  Gate gate = judge(before, after);
  ASSERT_TRUE(ids_may_change(gate));
  // Listed once more: the id is not there again, or is.
  TestPhase listed = phase({"m.a", "m.x[at 0x7fc3]"});
  std::string why = changing_ids(gate, &listed);
  EXPECT_THAT(why, HasSubstr("change from run to run"));
  EXPECT_THAT(why, HasSubstr("t::x[at 0x7f01]"));
  EXPECT_THAT(why, Not(HasSubstr("t::a")));
  listed = phase({"m.a", "m.x[at 0x7f01]"});
  EXPECT_EQ(changing_ids(gate, &listed), "");
  // It cannot be listed: told as a guess.
  why = changing_ids(gate, nullptr);
  EXPECT_THAT(why, HasSubstr("may change"));
  EXPECT_THAT(why, HasSubstr("t::x[at 0x7fb2]"));
  gate = judge(before, phase({"p.a", "p.other"}));
  EXPECT_EQ(changing_ids(gate, nullptr), "");
  EXPECT_FALSE(ids_may_change(judge(before, before)));
  EXPECT_FALSE(ids_may_change(judge(before, phase({"p.a"}))));
}

}  // namespace
}  // namespace machina::kinds
