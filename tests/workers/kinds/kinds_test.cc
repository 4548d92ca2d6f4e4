// What each kind refuses, and what it says about it.

#include "workers/kinds/kinds.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "workers/kinds/fields.h"
#include "workers/kinds/run.h"
#include "workers/kinds/suite/suite.h"
#include "workers/kinds/tool/shell.h"

namespace machina {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::StartsWith;

class KindsTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/machina-kinds-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    root_ = name;
    settings_.repo_roots = {root_ + "/repos"};
    fs::create_directories(root_ + "/repos/good/.git");
    fs::create_directories(root_ + "/repos/plain");
    fs::create_directories(root_ + "/outside/.git");
    fs::create_directory_symlink(root_ + "/outside", root_ + "/repos/link");
  }
  void TearDown() override { fs::remove_all(root_); }

  KindMap all() const { return kinds_of(built_in_families(), settings_); }

  // As a new job is looked at: by its text, then by what the host has.
  Checked<Kind::Kept> look_at(const std::string& kind,
                              const std::string& payload) {
    const Kind one = all().at(kind);
    auto good = one.check(payload);
    return good && one.resolve ? one.resolve(payload) : good;
  }

  // What the looks say; "" where they are content.
  std::string check(const std::string& kind, const std::string& payload) {
    const auto good = look_at(kind, payload);
    return good ? "" : good.error().text();
  }

  // What is kept of a payload that is good.
  Kind::Kept kept(const std::string& kind, const std::string& payload) {
    auto good = look_at(kind, payload);
    if (good) return *good;
    ADD_FAILURE() << payload << ": " << good.error().text();
    return {};
  }
  static std::string payload_of(const std::string& kind,
                                const std::string& repo) {
    return "{\"repo\":\"" + repo + '"' +
           (kind == "patch.apply"
                ? R"(,"diff":"--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n"})"
                : "}");
  }

  std::string root_;
  KindSettings settings_;
};

TEST_F(KindsTest, PatchesOfOneRepositoryShareAKeyWhateverItsName) {
  fs::create_directories(root_ + "/repos/other/.git");
  fs::create_directory_symlink(root_ + "/repos/good", root_ + "/repos/alias");
  auto key = [&](const std::string& repo) {
    return kept("patch.apply", payload_of("patch.apply", repo)).concurrency_key;
  };
  EXPECT_EQ(key("good"), "patch:" + root_ + "/repos/good");
  for (const std::string& same :
       {std::string("alias"), root_ + "/repos/good", root_ + "/repos/alias"}) {
    EXPECT_EQ(key(same), key("good")) << same;
  }
  EXPECT_NE(key("other"), key("good"));
  EXPECT_EQ(kept("test.run", payload_of("test.run", "good")).concurrency_key,
            "");
}

// A name could mean another directory by the time the job runs.
TEST_F(KindsTest, ANameWithSeveralRootsIsKeptAsThePath) {
  const std::string more = root_ + "/more";
  settings_.repo_roots.push_back(more);
  fs::create_directories(more + "/late/.git");
  for (const std::string kind : {"patch.apply", "test.run"}) {
    const auto of = [&](const std::string& repo) {
      return kept(kind, payload_of(kind, repo));
    };
    EXPECT_EQ(of("late").payload, payload_of(kind, more + "/late"));
    EXPECT_EQ(of("good").payload, payload_of(kind, root_ + "/repos/good"));
    EXPECT_EQ(of("./late/").payload, payload_of(kind, more + "/late"));
    EXPECT_EQ(of(more + "/late").payload, "") << "it is so already";
  }
  // The first root that has it, now and not later.
  fs::create_directories(more + "/good/.git");
  const auto good = kept("patch.apply", payload_of("patch.apply", "good"));
  EXPECT_EQ(good.payload, payload_of("patch.apply", root_ + "/repos/good"));
  EXPECT_EQ(good.concurrency_key, "patch:" + root_ + "/repos/good");
  // What leads out of the roots in one is not there; another may have it.
  fs::create_directories(more + "/link/.git");
  EXPECT_EQ(kept("test.run", payload_of("test.run", "link")).payload,
            payload_of("test.run", more + "/link"));
  // With one root it has one meaning.
  settings_.repo_roots.pop_back();
  EXPECT_EQ(kept("test.run", payload_of("test.run", "good")).payload, "");
}

TEST_F(KindsTest, AMemberIsReplacedHoweverItsNameIsSpelled) {
  for (const std::string name : {"repo", "\\u0072epo", "re\\u0070o"}) {
    const auto with = [&](const std::string& repo) {
      return "{ \"command\":[\"repo\"], \"runner\":\"command\",\"" + name +
             "\" : \"" + repo + "\" }";
    };
    EXPECT_EQ(kept("test.run", with("good/")).payload, with("good")) << name;
    EXPECT_EQ(kept("test.run", with("good")).payload, "") << name;
  }
}

TEST_F(KindsTest, NobodyLearnsWhatIsOutsideOfTheRoots) {
  const std::string repos = root_ + "/repos/", outside = root_ + "/outside";
  fs::create_directories(outside + "/plain");
  fs::create_directory_symlink(root_ + "/absent", repos + "gone");
  fs::create_directories(repos + "d1");
  fs::create_directories(repos + "d2");
  fs::create_symlink(outside + "/plain", repos + "d1/.git");
  fs::create_symlink(outside + "/absent", repos + "d2/.git");
  // Of each pair the first is there, the second is not.
  const auto said = [&](const std::string& repo) {
    std::string what = check("test.run", payload_of("test.run", repo));
    const std::size_t at = what.find('"' + repo + '"');
    return at == what.npos ? what : what.erase(at, repo.size() + 2);
  };
  EXPECT_EQ(said("link"), said("gone"));
  EXPECT_EQ(said("link/plain"), said("link/absent"));
  EXPECT_EQ(said("link"), said("link/absent"));
  EXPECT_EQ(said("link"), said("nothing"));
  EXPECT_EQ(said("d1"), said("d2"));
}

// As the server reads it: one such result would cost its whole batch.
TEST_F(KindsTest, AResultThatTheServerRefusesIsNotWholeJson) {
  EXPECT_TRUE(kinds::whole_json(R"({"a":[1,{"a":2}]})"));
  for (const std::string& text :
       {std::string("}{"), std::string(R"({"a":1,"a":1})"),
        std::string("\xef\xbb\xbf{}"), std::string("{}\0x", 4),
        std::string(70, '[') + std::string(70, ']')}) {
    EXPECT_FALSE(kinds::whole_json(text)) << text;
  }
}

TEST_F(KindsTest, DefaultsAreThoseOfTheTable) {
  const auto kinds = all();
  ASSERT_EQ(kinds.size(), 5);
  EXPECT_TRUE(kinds.at("noop").warmed());
  EXPECT_EQ(kinds.at("noop").timeout_ms, 120'000);
  EXPECT_EQ(kinds.at("tool.shell").limits.memory_mb, 512);
  EXPECT_EQ(kinds.at("tool.shell").timeout_ms, settings_.shell_timeout_ms);
  EXPECT_EQ(kinds.at("test.run").timeout_ms, 300'000);
  EXPECT_EQ(kinds.at("test.run").limits.pids, 256);
  EXPECT_EQ(kinds.at("test.run").limits.output_bytes, 8u << 20);
}

TEST_F(KindsTest, F31_EachKindIsWarmedOrHasARunOfItsOwn) {
  std::set<const void*> runs;
  int sandboxed = 0;
  for (const auto& [name, kind] : all()) {
    EXPECT_EQ(kind.warmed(), kind.run == nullptr) << name;
    EXPECT_EQ(kind.name, name);
    if (kind.run == nullptr) continue;
    ++sandboxed;
    runs.insert(reinterpret_cast<const void*>(kind.run));
  }
  EXPECT_EQ(static_cast<int>(runs.size()), sandboxed);
}

TEST_F(KindsTest, TwoFamiliesMayNotClaimOneName) {
  const MakeFamily twice[] = {built_in_families()[0], built_in_families()[0]};
  EXPECT_DEATH(kinds_of(twice, settings_), "");
  EXPECT_DEATH(register_handlers(twice), "");
}

// What the server says of a member is made of two parts; a name that came from
// the client may have any character in it.
TEST_F(KindsTest, WhatIsWrongIsFieldAndReason) {
  const auto bad = look_at(
      "tool.shell", R"({"argv":["/usr/bin/true"],"files":{"a:b/../c":"x"}})");
  ASSERT_FALSE(bad);
  EXPECT_EQ(bad.error().field, "files.a:b/../c");
  EXPECT_EQ(bad.error().why,
            "a file's name is a relative path without . and .., at most 1024 "
            "bytes");
}

TEST_F(KindsTest, NoopNamesFieldValueAndBound) {
  EXPECT_EQ(check("noop", "{}"), "");
  EXPECT_EQ(check("noop", R"({"echo":[1,{"a":"}"}],"sleep_ms":5})"), "");
  EXPECT_EQ(check("noop", R"({"sleep_ms":-1})"),
            "sleep_ms: -1 is not an integer in 0..3600000");
  EXPECT_EQ(check("noop", R"({"sleep_ms":1.5})"),
            "sleep_ms: 1.5 is not an integer in 0..3600000");
  EXPECT_EQ(check("noop", R"({"fail":1})"), "fail: 1 is not true or false");
  EXPECT_EQ(check("noop", R"({"fail_attempts":1001})"),
            "fail_attempts: 1001 is not an integer in 0..1000");
  EXPECT_EQ(check("noop", R"({"nap":1})"),
            "nap: not a member of this kind's payload");
}

TEST_F(KindsTest, ShellNamesFieldValueAndBound) {
  EXPECT_EQ(check("tool.shell", R"({"argv":["/bin/true"]})"), "");
  EXPECT_EQ(check("tool.shell", R"({"argv":["true"],"env":{"A":"b"},
                   "cwd":"x/y","files":{"a/b":"c"},"stdin":"s"})"),
            "");
  EXPECT_THAT(check("tool.shell", "{}"), StartsWith("argv: "));
  EXPECT_THAT(check("tool.shell", R"({"argv":"true"})"),
              HasSubstr("\"true\" is not a list"));
  EXPECT_THAT(check("tool.shell", R"({"argv":["true",1]})"),
              StartsWith("argv[1]: 1 is not a string"));
  EXPECT_THAT(check("tool.shell", R"({"argv":["true\u0000"]})"),
              HasSubstr("NUL"));
  EXPECT_THAT(check("tool.shell", R"({"argv":["no-such-program-x"]})"),
              HasSubstr("not an executable file"));
  EXPECT_THAT(check("tool.shell", R"({"argv":["./true"]})"),
              HasSubstr("neither an absolute path nor a bare name"));
  EXPECT_THAT(check("tool.shell", R"({"argv":["true"],"cwd":"../x"})"),
              StartsWith("cwd: "));
  EXPECT_THAT(check("tool.shell", R"({"argv":["true"],"files":{"/x":""}})"),
              StartsWith("files./x: "));
  EXPECT_THAT(check("tool.shell", R"({"argv":["true"],"files":{"a/../b":""}})"),
              StartsWith("files.a/../b: "));
  EXPECT_THAT(check("tool.shell", R"({"argv":["true"],"env":{"1A":""}})"),
              StartsWith("env.1A: "));
  EXPECT_THAT(check("tool.shell", R"({"argv":["true"],"shell":true})"),
              StartsWith("shell: "));
}

TEST_F(KindsTest, LinkNamedAfterAnAllowedProgramIsNotThatProgram) {
  settings_.prod = true;
  EXPECT_EQ(check("tool.shell", R"({"argv":["true"]})"), "");
  const std::string fake = root_ + "/true";
  fs::create_symlink("/bin/sh", fake);
  EXPECT_THAT(check("tool.shell", "{\"argv\":[\"" + fake + "\"]}"),
              HasSubstr("MACHINA_SHELL_ALLOWED_EXE"));
  for (const char* program : {"python3", "sh", "/bin/bash", "curl", "git"}) {
    if (!fs::exists("/usr/bin/" + fs::path(program).filename().string())) {
      continue;
    }
    EXPECT_THAT(
        check("tool.shell", "{\"argv\":[\"" + std::string(program) + "\"]}"),
        HasSubstr("argv[0]"))
        << program;
  }
}

TEST_F(KindsTest, ProdRunsNothingThatRunsOtherProgramsOnRequest) {
  settings_.prod = true;
  int there = 0;
  for (const char* program :
       {"find", "sed", "awk", "make", "cmake", "ninja", "rg", "gcc", "g++",
        "clang", "clang++", "git", "zip", "unzip", "env", "xargs"}) {
    if (!fs::exists("/usr/bin/" + std::string(program))) continue;
    ++there;
    EXPECT_THAT(
        check("tool.shell", "{\"argv\":[\"" + std::string(program) + "\"]}"),
        HasSubstr("not among the programs that the prod profile allows"))
        << program;
  }
  EXPECT_GT(there, 2);
  for (const char* program : {"true", "ls", "cat", "sort", "diff", "grep"}) {
    EXPECT_EQ(
        check("tool.shell", "{\"argv\":[\"" + std::string(program) + "\"]}"),
        "");
  }
  EXPECT_EQ(check("tool.shell", R"({"argv":["sort","-k2","--key=1"]})"), "");
  for (const char* option : {"--compress-program=sh", "--comp", "--co"}) {
    EXPECT_THAT(check("tool.shell", "{\"argv\":[\"sort\",\"" +
                                        std::string(option) + "\",\"x\"]}"),
                StartsWith("argv[1]: "));
  }
}

TEST_F(KindsTest, ProdRefusesVariablesThatLoadOtherCode) {
  const auto with = [&](const std::string& name) {
    return check("tool.shell",
                 R"({"argv":["true"],"env":{")" + name + "\":\"x\"}}");
  };
  const std::vector<std::string> names = {
      "LD_PRELOAD", "LD_LIBRARY_PATH", "BASH_ENV",  "ENV",
      "PATH",       "PYTHONPATH",      "GCONV_PATH"};
  for (const auto& name : names) EXPECT_EQ(with(name), "") << name;
  settings_.prod = true;
  for (const auto& name : names) {
    EXPECT_THAT(with(name), StartsWith("env." + name + ": "));
  }
  for (const char* name : {"LANG", "PATHS", "MY_ENV", "LDX"}) {
    EXPECT_EQ(with(name), "");
  }
  settings_.shell_allowed_exe = {"true"};
  for (const auto& name : names) EXPECT_EQ(with(name), "") << name;
}

TEST_F(KindsTest, AFileIsNotAlsoADirectory) {
  for (const char* kind : {"tool.shell", "test.run"}) {
    const auto with = [&](const std::string& files) {
      const std::string first =
          std::string(kind) == "tool.shell" ? R"("argv":["true"],)" : "";
      return check(kind, "{" + first + "\"files\":{" + files + "}}");
    };
    EXPECT_EQ(with(R"("a/b":"","a-b":"","ab/c":"","a.d":"","a/bc/d":"")"), "");
    // "a-b" and "a.c" sort between the two.
    EXPECT_EQ(with(R"("a":"","a-b":"","a.c":"","a/b":"")"),
              "files.a: is a file and also the directory of \"a/b\"");
    EXPECT_EQ(with(R"("x/y/z/w":"","x/y":"")"),
              "files.x/y: is a file and also the directory of \"x/y/z/w\"");
  }
}

TEST_F(KindsTest, ControlCharactersInANameAreRefusedAndShownWhole) {
  const auto with = [&](const std::string& name) {
    return check("tool.shell",
                 R"({"argv":["true"],"files":{")" + name + "\":\"\"}}");
  };
  EXPECT_EQ(with("a\\u0000b"),
            "files.a\\u0000b: a file's name holds no control characters");
  EXPECT_EQ(with("a\\n\\u001b[2J\\u007f"),
            "files.a\\u000a\\u001b[2J\\u007f: a file's name holds no control "
            "characters");
  EXPECT_EQ(check("noop", R"({"x\u0000y":1})"),
            "x\\u0000y: not a member of this kind's payload");
  EXPECT_THAT(
      check("tool.shell", R"({"argv":["true"],"env":{"A\u0000B":"x"}})"),
      StartsWith("env.A\\u0000B: a variable's name"));
  // A long one is cut between characters.
  std::string umlauts;
  for (int i = 0; i < 700; ++i) umlauts += "\u00e4";
  EXPECT_THAT(with(umlauts + "/"), HasSubstr("\u00e4...: a file's name"));
}

TEST_F(KindsTest, LimitsAreDescribedByTheirRealBound) {
  sandbox::Limits limits;
  limits.memory_mb = 64;
  limits.disk_mb = 16;
  sandbox::StepResult step;
  step.ended = sandbox::Ended::oom;
  EXPECT_THAT(kinds::describe(step, limits, 1),
              StartsWith("over its memory limit of 80 MiB (memory_mb 64 + "
                         "disk_mb 16"));
  step.detail = sandbox::kDetailOwnMemory;
  EXPECT_EQ(kinds::describe(step, limits, 1),
            "over its memory limit of 64 MiB (memory_mb)");
  step.ended = sandbox::Ended::disk;
  step.detail = "";
  EXPECT_EQ(kinds::describe(step, limits, 1), "over its disk limit of 16 MiB");
  step.detail = sandbox::kDetailInodes;
  EXPECT_THAT(kinds::describe(step, limits, 1),
              StartsWith("out of inodes: 4352 files"));
}

TEST_F(KindsTest, AllowedListIsAllThereIs) {
  settings_.shell_allowed_exe = {"/bin/sh", "sleep"};
  EXPECT_EQ(check("tool.shell", R"({"argv":["sh"]})"), "");
  EXPECT_EQ(check("tool.shell", R"({"argv":["/usr/bin/sleep"]})"), "");
  EXPECT_THAT(check("tool.shell", R"({"argv":["true"]})"),
              HasSubstr("not in MACHINA_SHELL_ALLOWED_EXE"));
}

TEST_F(KindsTest, DevRunsNothingOutsideUsr) {
  const std::string own = root_ + "/own";
  fs::copy_file("/usr/bin/true", own);
  EXPECT_THAT(check("tool.shell", "{\"argv\":[\"" + own + "\"]}"),
              HasSubstr("not below /usr"));
}

TEST_F(KindsTest, RepositoryMustLieBelowARoot) {
  EXPECT_EQ(check("test.run", R"({"repo":"good"})"), "");
  EXPECT_EQ(check("test.run", "{\"repo\":\"" + root_ + "/repos/good\"}"), "");
  for (const std::string& repo :
       {root_ + "/outside", std::string("/etc"), std::string("../outside"),
        root_ + "/repos/../outside", root_ + "/reposX", root_ + "/repos"}) {
    EXPECT_THAT(check("test.run", "{\"repo\":\"" + repo + "\"}"),
                HasSubstr("not below one of the repository roots"))
        << repo;
  }
  EXPECT_THAT(check("test.run", R"({"repo":"link"})"), HasSubstr("leads out"));
  EXPECT_THAT(check("test.run", R"({"repo":"plain"})"),
              HasSubstr("not a git repository"));
  EXPECT_THAT(check("test.run", R"({"repo":"nothing"})"),
              HasSubstr("does not exist"));
}

TEST_F(KindsTest, WhatComesLaterIsRefusedByName) {
  const auto with = [&](const std::string& more) {
    return check("test.run", R"({"files":{"t.py":""},)" + more + "}");
  };
  EXPECT_EQ(with(R"("coverage":false,"retries":0)"), "");
  EXPECT_THAT(with(R"("coverage":true)"), StartsWith("coverage: "));
  EXPECT_THAT(with(R"("scenario":"hostile_input")"), StartsWith("scenario: "));
  EXPECT_THAT(with(R"("severity":"low")"), StartsWith("severity: "));
  EXPECT_THAT(check("test.run", R"({"repo":"https://example.com/x"})"),
              HasSubstr("not available yet"));
}

TEST_F(KindsTest, F03_RunnersAndTheirMembersBelongTogether) {
  const auto with = [&](const std::string& more) {
    return check("test.run", R"({"files":{"t.py":""},)" + more + "}");
  };
  for (const char* runner : {"pytest", "unittest", "ctest", "node"}) {
    const std::string one = "\"runner\":\"" + std::string(runner) + "\"";
    EXPECT_EQ(with(one + R"(,"args":["-v"],"select":["x"])"), "") << runner;
    EXPECT_THAT(with(one + R"(,"command":["true"])"), StartsWith("command: "));
    EXPECT_THAT(with(one + R"(,"report":{"format":"tap","path":"x"})"),
                AllOf(StartsWith("report: "), HasSubstr(runner)));
  }
  EXPECT_EQ(with(R"("runner":"tap","command":["perl","t.t"])"), "");
  EXPECT_THAT(with(R"("runner":"tap")"), StartsWith("command: "));
  EXPECT_THAT(with(R"("runner":"tap","command":["x"],"args":["y"])"),
              StartsWith("args: "));
  EXPECT_THAT(with(R"("runner":"prove")"),
              AllOf(StartsWith("runner: "),
                    HasSubstr("pytest, unittest, ctest, node, tap, command")));
  // What the runner sets itself, and what leaves cases out.
  EXPECT_THAT(with(R"("runner":"node","args":["a","--test-reporter=tap"])"),
              StartsWith("args[1]: "));
  EXPECT_THAT(with(R"("runner":"ctest","args":["--output-junit","x"])"),
              StartsWith("args[0]: "));
  EXPECT_THAT(with(R"("runner":"ctest","args":["--stop-on-failure"])"),
              StartsWith("args[0]: "));
  EXPECT_EQ(with(R"("runner":"ctest","args":["--output-on-failure"])"), "");
}

TEST_F(KindsTest, F01_APytestThatStopsEarlyIsNoCommandWithAReport) {
  const auto with = [&](const std::string& command, bool report = true) {
    return check(
        "test.run",
        R"({"files":{"t":""},"runner":"command","command":)" + command +
            (report ? R"(,"report":{"format":"junit","path":"r"}})" : "}"));
  };
  for (const char* stops :
       {R"(["python3","-m","pytest","-x"])", R"(["pytest","-qx","t"])",
        R"(["/usr/bin/python3.11","-B","-m","pytest","--maxfail=1"])",
        R"(["py.test","--exitfirst"])", R"(["pytest","--sw"])"}) {
    EXPECT_THAT(with(stops), StartsWith("command: ")) << stops;
    EXPECT_EQ(with(stops, false), "") << stops;
  }
  for (const char* good :
       {R"(["python3","-m","pytest","-q","--junitxml=r"])",
        R"(["pytest","-k","x","-nx"])", R"(["pytest","--","-x"])",
        R"(["python3","x.py","-x"])", R"(["python3","-m"])", R"(["make","-x"])",
        R"(["pytest","-",""])"}) {
    EXPECT_EQ(with(good), "") << good;
  }
}

TEST_F(KindsTest, F03_TheReportOfACommandIsAFileOfTheWorkTree) {
  const auto with = [&](const std::string& report) {
    return check("test.run",
                 R"({"files":{"t":""},"runner":"command","command":["x"],)"
                 "\"report\":" +
                     report + "}");
  };
  EXPECT_EQ(with(R"({"format":"junit","path":"out/r.xml"})"), "");
  EXPECT_EQ(with(R"({"format":"tap","path":"r.tap"})"), "");
  EXPECT_THAT(with(R"({"format":"xml","path":"r"})"),
              AllOf(StartsWith("report.format: "), HasSubstr("junit")));
  EXPECT_THAT(with(R"({"path":"r"})"), StartsWith("report.format: "));
  EXPECT_THAT(with(R"({"format":"tap"})"), StartsWith("report.path: "));
  for (const char* path : {"", "/work/r", "../r", "a/../../r", "./r", "a//r",
                           "a/", "a\\u0000b", "a\\nb"}) {
    EXPECT_THAT(with(R"({"format":"tap","path":")" + std::string(path) + "\"}"),
                StartsWith("report.path: "))
        << path;
  }
  EXPECT_THAT(with(R"({"format":"tap","path":"r","x":1})"),
              StartsWith("report.x: "));
  EXPECT_THAT(with(R"("r.xml")"), StartsWith("report"));
  EXPECT_THAT(with("7"), StartsWith("report"));
}

TEST_F(KindsTest, TestRunMembersBelongTogether) {
  const auto with = [&](const std::string& more) {
    return check("test.run", R"({"files":{"t.py":""},)" + more + "}");
  };
  EXPECT_THAT(check("test.run", "{}"), StartsWith("repo: exactly one"));
  EXPECT_THAT(with(R"("repo":"good")"), StartsWith("repo: exactly one"));
  EXPECT_THAT(with(R"("base_rev":"x")"), StartsWith("base_rev: "));
  EXPECT_THAT(check("test.run", R"({"repo":"good","base_rev":"--exec=x"})"),
              StartsWith("base_rev: "));
  EXPECT_THAT(with(R"("runner":"command")"), StartsWith("command: "));
  EXPECT_THAT(with(R"("command":["x"])"), StartsWith("command: "));
  EXPECT_THAT(with(R"("runner":"command","command":["x"],"args":["y"])"),
              StartsWith("args: "));
  EXPECT_THAT(with(R"("select":["-x"])"), StartsWith("select: "));
  EXPECT_THAT(with(R"("setup":[[]])"), StartsWith("setup[0]: "));
  EXPECT_THAT(with(R"("setup":["x"])"), StartsWith("setup[0]: "));
  EXPECT_THAT(with(R"("retries":11)"),
              StartsWith("retries: 11 is not an integer in 0..10"));
  EXPECT_THAT(with(R"("runner":"make")"), StartsWith("runner: \"make\""));
}

TEST_F(KindsTest, SandboxMemberOverridesAndNetIsRefusedWithAReason) {
  sandbox::Limits limits;
  Level required = 0;
  ASSERT_TRUE(kinds::apply_sandbox(
      R"({"memory_mb":64,"pids":8,"min_level":"L3","profile":"strict"})",
      limits, required));
  EXPECT_EQ(limits.memory_mb, 64);
  EXPECT_EQ(limits.pids, 8);
  EXPECT_EQ(required, 3);
  const auto net =
      kinds::apply_sandbox(R"({"profile":"net"})", limits, required);
  ASSERT_FALSE(net);
  EXPECT_EQ(net.error().code, Code::unavailable);
  EXPECT_THAT(net.error().what, HasSubstr("egress proxy"));
  EXPECT_FALSE(kinds::apply_sandbox(R"({"memory_mb":0})", limits, required));
  EXPECT_FALSE(kinds::apply_sandbox(R"({"gpu":1})", limits, required));
}

// --- the result of test.run ---

TEST_F(KindsTest, ResultStaysBelowItsBoundAndKeepsWhatFailed) {
  kinds::TestOutcome all;
  for (int i = 0; i < 30'000; ++i) {
    kinds::Case one;
    one.id = "module.TestClass::test_number_" + std::to_string(i);
    all.suite.cases.push_back(one);
    ++all.suite.passed;
  }
  kinds::Case bad;
  bad.id = "the::one";
  bad.outcome = kinds::Outcome::failed;
  bad.message = std::string(2000, '\x01');  // six bytes each in JSON
  all.suite.cases.push_back(bad);
  all.suite.failed = 1;
  const std::string text = kinds::test_result(all, {}, kinds::kCasesBytesMax);
  EXPECT_LT(text.size(), kResultBytesMax);
  const auto result = nlohmann::json::parse(text);
  EXPECT_EQ(result["cases"][0]["id"], "the::one");
  EXPECT_EQ(result["cases_truncated"], true);
  EXPECT_EQ(result["passed"], 30'000);
  EXPECT_EQ(result["ok"], false);
}

TEST_F(KindsTest, ErrorOutsideTheReportSpoilsAnOtherwiseGoodRun) {
  kinds::TestOutcome all;
  all.suite.passed = 3;
  EXPECT_TRUE(kinds::passed(all));
  kinds::add_error(all, "pytest", "exited with 3");
  EXPECT_FALSE(kinds::passed(all));
}

}  // namespace
}  // namespace machina
