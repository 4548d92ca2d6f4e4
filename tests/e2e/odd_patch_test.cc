// Patches that are too large, or as large as they may be, and repositories by
// other names than their own.

#include <fstream>
#include <vector>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

constexpr std::size_t kPayloadMax = 1 << 20;

class OddPatch : public EndToEnd {
 protected:
  void make_repository(const std::string& name, int lines = 20) {
    make_repository_at(p().root() + "/repos/" + name, lines);
  }
  void make_repository_at(const std::string& repo, int lines = 20) {
    ASSERT_EQ(p().shell("set -e; git init -q -b main " + repo + "; cd " + repo +
                        "; seq 1 " + std::to_string(lines) +
                        " >a.txt; git add -A; git -c user.name=E2E -c "
                        "user.email=e2e@localhost commit -qm base"),
              0)
        << read_file(p().dir() + "/shell.log");
  }
  // Changes the last of that many lines; all others are context.
  static std::string diff(int lines) {
    const std::string n = std::to_string(lines);
    std::string text =
        "--- a/a.txt\n+++ b/a.txt\n@@ -1," + n + " +1," + n + " @@\n";
    for (int i = 1; i < lines; ++i) text += " " + std::to_string(i) + "\n";
    return text + "-" + n + "\n+last\n";
  }
  static Json request(const std::string& repo, const std::string& diff) {
    return {{"kind", "patch.apply"},
            {"payload", {{"repo", repo}, {"diff", diff}, {"push", true}}}};
  }
  long memory_kb() {
    std::ifstream in("/proc/" + std::to_string(p().server()) + "/status");
    for (std::string word; in >> word;) {
      if (word == "VmHWM:") break;
    }
    long kb = 0;
    in >> kb;
    return kb;
  }
  void expect_nothing_was_queued() {
    EXPECT_TRUE(p().get("/v1/jobs").json()["jobs"].empty());
    EXPECT_TRUE(p().get("/v1/patches").json()["patches"].empty());
    EXPECT_EQ(p().get("/ready").status, 200);
  }
};

TEST_P(OddPatch, AHundredMegabytesOfContext) {
  start();
  make_repository("r");
  std::string text = diff(20);
  const std::string line = " " + std::string(98, 'c') + "\n";
  std::string context;
  context.reserve(100u << 20);
  while (context.size() < 100u << 20) context += line;
  text.insert(text.find(" 1\n"), context);
  const std::string payload = request("r", text)["payload"].dump();
  const long before = memory_kb();

  Answer answer =
      p().call("POST", "/v1/jobs",
               R"({"kind":"patch.apply","payload":)" + payload + "}");
  EXPECT_EQ(answer.status, 413) << answer.body;
  Json problem = answer.json();
  EXPECT_EQ(problem["code"], "too-large");
  for (const char* word : {"body", "2097152", "diff_artifact"}) {
    EXPECT_NE(problem.value("detail", "").find(word), std::string::npos)
        << word << " in " << answer.body;
  }
  // It fits the body and not the payload.
  text.resize(kPayloadMax + 100);
  answer = p().post("/v1/jobs", request("r", text));
  EXPECT_EQ(answer.status, 413) << answer.body.substr(0, 500);
  problem = answer.json();
  EXPECT_EQ(problem["field"], "payload");
  const std::string bytes =
      std::to_string(request("r", text)["payload"].dump().size());
  for (const std::string& word :
       {bytes, std::to_string(kPayloadMax), std::string("diff_artifact")}) {
    EXPECT_NE(problem.value("detail", "").find(word), std::string::npos)
        << word << " in " << answer.body;
  }
  EXPECT_LT(memory_kb() - before, 32 << 10) << "the server kept it";
  expect_nothing_was_queued();

  // The command line, by a file.
  const std::string file = p().dir() + "/payload.json";
  std::ofstream(file) << payload;
  const std::size_t size = payload.size();
  Ended ended = p().run({"enqueue", "patch.apply", "--payload", "@" + file,
                         "--server", p().url()});
  EXPECT_EQ(ended.code, 2) << ended.err;
  for (const std::string& word :
       {std::string("--payload"), file, std::to_string(size),
        std::string("4194304"), std::string("diff_artifact")}) {
    EXPECT_NE(ended.err.find(word), std::string::npos)
        << word << " in " << ended.err;
  }
  std::ofstream(file) << request("r", text)["payload"].dump();
  ended = p().run({"enqueue", "patch.apply", "--payload", "@" + file,
                   "--server", p().url()});
  EXPECT_EQ(ended.code, 4) << ended.err;
  EXPECT_NE(ended.err.find(bytes), std::string::npos) << ended.err;
  expect_nothing_was_queued();
}

// git would wait for them until the time is over, and again at each attempt.
TEST_P(OddPatch, ARepositoryWithAFifoIsRefused) {
  start();
  int number = 0;
  for (const std::string where :
       {"refs/heads/zz", "packed-refs", "shallow", "objects/info/alternates"}) {
    const std::string name = "r" + std::to_string(++number);
    make_repository(name);
    ASSERT_EQ(
        p().shell("mkfifo " + p().root() + "/repos/" + name + "/.git/" + where),
        0);
    const Json job = p().wait_end(p().submit(request(name, diff(20))), 20000);
    EXPECT_EQ(job["state"], "failed") << where << job.dump(1);
    EXPECT_EQ(job["error"]["code"], "invalid_payload") << job.dump(1);
    EXPECT_NE(job["error"].value("message", "").find(where), std::string::npos)
        << job["error"].dump();
  }
  Json odd = request("r1", diff(20));
  odd["payload"]["base_rev"] = "^main";
  const Answer answer = p().post("/v1/jobs", odd);
  EXPECT_EQ(answer.status, 400) << answer.body;
  EXPECT_EQ(answer.json().value("field", ""), "payload.base_rev");
}

TEST_P(OddPatch, ADiffJustBelowTheLimitIsApplied) {
  start();
  // As many lines as fit; one more would be ten bytes too many at most.
  const auto size = [](int lines) {
    return request("r", diff(lines))["payload"].dump().size();
  };
  int lines = 1000, too_many = 400'000;
  while (too_many - lines > 1) {
    const int middle = (lines + too_many) / 2;
    (size(middle) <= kPayloadMax ? lines : too_many) = middle;
  }
  ASSERT_GT(size(lines), kPayloadMax - 12);
  const std::string text = diff(lines);
  make_repository("r", lines);
  const Json job = p().wait_end(p().submit(request("r", text)));
  ASSERT_EQ(job["state"], "succeeded") << job["error"].dump();
  EXPECT_EQ(job["result"]["outcome"], "applied");
  EXPECT_EQ(job["result"]["files"][0]["added"], 1);
}

// Whatever a repository is called, its job says what it runs on, and is held
// back by the others on the same.
TEST_P(OddPatch, ARepositoryByOtherNames) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  make_repository("r");
  const std::string repos = p().root() + "/repos";
  ASSERT_EQ(
      p().shell("cd " + repos + "; mkdir d; ln -s r link; ln -s " + repos +
                "/link d/twice; ln -s /etc out; ln -s loop loop; ln -s "
                "../../.. up"),
      0);
  const std::string real = repos + "/r";
  const std::map<std::string, std::string> names = {{"r", "r"},
                                                    {"r/", "r"},
                                                    {"./r", "r"},
                                                    {"d/../r", "r"},
                                                    {"d//..//r/.", "r"},
                                                    {real, real},
                                                    {real + "/", real},
                                                    {repos + "/d/../r", real},
                                                    {"link", real},
                                                    {"link/", real},
                                                    {repos + "/link", real},
                                                    {"d/twice", real},
                                                    {"d/../link", real}};
  std::vector<std::string> ids;
  for (const auto& [name, kept] : names) {
    const std::string id = p().submit(request(name, diff(20)));
    const Json job = p().job(id);
    EXPECT_EQ(job["payload"]["repo"], kept) << name;
    EXPECT_EQ(job["payload"]["diff"], diff(20));
    EXPECT_EQ(job["concurrency_key"], "patch:" + real) << name;
    ids.push_back(id);
  }
  const std::string test = p().submit({{"kind", "test.run"},
                                       {"payload",
                                        {{"repo", "link"},
                                         {"runner", "command"},
                                         {"command", {"/bin/true"}}}}});
  EXPECT_EQ(p().job(test)["payload"]["repo"], real);
  for (const char* name :
       {"out", "loop", "up", "..", "../r", "../../etc", "d/../..", "/", ".",
        "/etc/../etc", "nosuch", "link/nosuch", "d"}) {
    const Answer answer = p().post("/v1/jobs", request(name, diff(20)));
    EXPECT_EQ(answer.status, 400) << name << answer.body;
    EXPECT_EQ(answer.json().value("field", ""), "payload.repo") << answer.body;
    EXPECT_NE(answer.json().value("detail", "").find("\"" + std::string(name)),
              std::string::npos)
        << answer.body;
  }
  // Where the link leads later is no matter.
  ASSERT_EQ(p().shell("cd " + repos + "; ln -sfn /etc link"), 0);
  ASSERT_EQ(p().call("PUT", "/v1/workers/scale", R"({"count":2})").status, 200);
  for (const std::string& id : ids) {
    const Json job = p().wait_end(id);
    EXPECT_EQ(job["result"]["outcome"], "applied") << job["error"].dump();
  }
  EXPECT_EQ(p().wait_end(test)["state"], "succeeded");
  ASSERT_EQ(p().call("PUT", "/v1/workers/scale", R"({"count":0})").status, 200);
  // A link that takes the directory's place is not followed.
  const std::string late = p().submit(request("r", diff(20)));
  ASSERT_EQ(p().shell("cd " + repos + "; mv r moved; ln -s moved r"), 0);
  ASSERT_EQ(p().call("PUT", "/v1/workers/scale", R"({"count":1})").status, 200);
  const Json job = p().wait_end(late);
  EXPECT_EQ(job["state"], "failed");
  EXPECT_EQ(job["error"]["code"], "invalid_payload");
  EXPECT_NE(job["error"].value("message", "").find("symbolic link"),
            std::string::npos)
      << job["error"];
}

// With several roots a name could mean another directory by the time the job
// runs: patch, record and rollback stay with the one that was looked at.
TEST_P(OddPatch, ANameMeansWhatItMeantWhenSubmitted) {
  const std::string repos = p().root() + "/repos", more = p().dir() + "/more";
  Serve serve;
  serve.workers = 0;
  ASSERT_EQ(p().shell("mkdir " + more), 0);
  serve.env["MACHINA_REPO_ROOTS"] = more;
  start(serve);
  make_repository_at(more + "/late");
  const std::string id = p().submit(request("late", diff(20)));
  EXPECT_EQ(p().job(id)["payload"]["repo"], more + "/late");
  EXPECT_EQ(p().job(id)["concurrency_key"], "patch:" + more + "/late");
  make_repository("late");  // in the root that comes first
  ASSERT_EQ(p().call("PUT", "/v1/workers/scale", R"({"count":1})").status, 200);
  const Json job = p().wait_end(id);
  ASSERT_EQ(job["result"]["outcome"], "applied") << job["error"].dump();
  const auto branches = [&](const std::string& repo) {
    const std::string file = p().dir() + "/branches";
    EXPECT_EQ(p().shell("git -C " + repo +
                        " for-each-ref --format='%(refname)' >" + file),
              0);
    return read_file(file);
  };
  const std::string branch = job["result"]["branch"],
                    main = "refs/heads/main\n";
  const std::string landed = main + "refs/heads/" + branch + "\n";
  EXPECT_EQ(branches(more + "/late"), landed);
  EXPECT_EQ(branches(repos + "/late"), main);
  // Found by its name and by its path.
  for (const std::string& name : {std::string("late"), more + "/late"}) {
    const auto found = [&] {
      return p().get("/v1/patches?repo=" + name).json()["patches"];
    };
    EXPECT_TRUE(eventually([&] { return found().size() == 1; }, 10000)) << name;
    EXPECT_EQ(found()[0]["patch_id"], id);
    EXPECT_EQ(found()[0]["repo"], more + "/late");
  }
  const Json back = p().wait_end(p().submit(
      {{"kind", "patch.rollback"}, {"payload", {{"patch_id", id}}}}));
  EXPECT_EQ(back["result"]["outcome"], "rolled_back") << back["error"].dump();
  EXPECT_EQ(branches(repos + "/late"), main);
}

// As git and `diff -u` write them without git's usual names: applied to the
// tree that git itself makes of them.
TEST_P(OddPatch, F30_FormsOfOneDiff) {
  start();
  const std::string repo = p().root() + "/repos/r";
  make_repository("r");
  const std::string hunk = "@@ -1,4 +1,4 @@\n 1\n-2\n+two\n 3\n 4\n";
  const std::string time = "\t2026-01-02 03:04:05.678900000 +0100\n";
  const auto git = [&](const std::string& line) {
    const std::string file = p().dir() + "/tree";
    EXPECT_EQ(p().shell("cd " + repo + " && { " + line + "; } >" + file), 0)
        << line << read_file(p().dir() + "/shell.log");
    std::string text = read_file(file);
    return text.substr(0, text.find('\n'));
  };
  struct One {
    std::string diff, option, id;
  };
  std::vector<One> all = {
      {"diff --git a.txt dir/c.txt\nsimilarity index 100%\nrename from a.txt\n"
       "rename to dir/c.txt\n",
       "-p0", ""},
      {"diff --git a.txt dir/c d.txt\nsimilarity index 90%\nrename from a.txt\n"
       "rename to dir/c d.txt\n--- a.txt\n+++ dir/c d.txt\n" +
           hunk,
       "-p0", ""},
      {"diff --git a.txt b.txt\nsimilarity index 100%\ncopy from a.txt\n"
       "copy to b.txt\n",
       "-p0", ""},
      {"--- a.txt.orig" + time + "+++ a.txt" + time + hunk, "", ""},
      {"--- a.txt\n+++ a.txt~\n" + hunk, "", ""},
      {"--- a/a.txt.orig\n+++ b/a.txt\n" + hunk, "", ""},
      {"--- ./a.txt.orig 2026-01-02 03:04:05 +0100\n+++ ./a.txt 2026-01-02 "
       "03:04:06 +0100\n" +
           hunk,
       "", ""},
      // Both names have the same first part, and it is no directory here.
      {"--- proj/a.txt.orig\n+++ proj/a.txt\n" + hunk, "", ""},
      {"--- old/n.txt\t1970-01-01 00:00:00.000000000 +0000\n+++ new/n.txt" +
           time + "@@ -0,0 +1 @@\n+x\n",
       "", ""},
      {"diff --git c/a.txt w/a.txt\n--- c/a.txt\n+++ w/a.txt\n" + hunk, "", ""},
  };
  for (One& one : all) one.id = p().submit(request("r", one.diff));
  for (const One& one : all) {
    std::ofstream(p().dir() + "/one.diff") << one.diff;
    const std::string index = "GIT_INDEX_FILE=" + p().dir() + "/index git ";
    const std::string tree = git(
        index + "read-tree HEAD && " + index + "apply --cached " + one.option +
        " " + p().dir() + "/one.diff && " + index + "write-tree");
    const Json job = p().wait_end(one.id, 60000);
    ASSERT_EQ(job["result"].value("outcome", ""), "applied")
        << one.diff << job.dump(1).substr(0, 2000);
    EXPECT_EQ(
        git("git rev-parse " + job["result"].value("commit", "") + "'^{tree}'"),
        tree)
        << one.diff;
  }
}

// U+FFFD stands for bytes that are no UTF-8; a cut makes none.
TEST_P(OddPatch, F30_TextIsCutBetweenCharacters) {
  start();
  std::vector<std::string> ids;
  for (const std::string pad : {"", "x", "xx"}) {
    ids.push_back(
        p().submit({{"kind", "tool.shell"},
                    {"payload",
                     {{"argv",
                       {"/usr/bin/python3", "-c",
                        "import sys; t = '" + pad +
                            "' + '\\u65e5' * 100000; "
                            "sys.stdout.write(t); sys.stderr.write(t)"}}}}}));
    ids.push_back(
        p().submit({{"kind", "test.run"},
                    {"max_attempts", 1},
                    {"payload",
                     {{"files",
                       {{"test_a.py",
                         "def test_a():\n    print('\\u65e5' * 9000)\n"
                         "    assert 0, '" +
                             pad + "' + '\\u65e5' * 9000\n"}}}}}}));
    ids.push_back(p().submit(
        {{"kind", "test.run"},
         {"max_attempts", 1},
         {"payload",
          {{"files", {{"test_a.py", ""}}},
           {"setup",
            {{"/usr/bin/python3", "-c",
              "print('" + pad + "' + '\\u65e5' * 9000); exit(3)"}}}}}}));
  }
  for (const std::string& id : ids) {
    const Json job = p().wait_end(id, 60000);
    const std::string text = job["result"].dump();
    EXPECT_NE(text.find("\u65e5\u65e5"), std::string::npos)
        << text.substr(0, 500);
    EXPECT_EQ(text.find("\ufffd"), std::string::npos) << text.substr(0, 500);
  }
}

MACHINA_BOTH(OddPatch);

}  // namespace
}  // namespace machina::e2e
