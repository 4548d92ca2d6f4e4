// What a job used and how it ended, as the API says it; and who is busy, as
// metrics and lists say it while short jobs come without a pause.

#include <algorithm>
#include <sstream>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class UsageE2e : public EndToEnd {
 protected:
  Json run(const Json& payload, const Json& sandbox = Json::object(),
           int timeout_ms = 30000) {
    return p().wait_end(p().submit({{"kind", "test.run"},
                                    {"max_attempts", 1},
                                    {"timeout_ms", timeout_ms},
                                    {"sandbox", sandbox},
                                    {"payload", payload}}));
  }
  Json python(const std::string& code, const Json& sandbox = Json::object()) {
    return run({{"files", {{"a.py", code}}},
                {"runner", "command"},
                {"command", {"python3", "a.py"}}},
               sandbox);
  }
  double metric(const std::string& name) {
    std::istringstream lines(p().get("/metrics").body);
    double sum = 0;
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with(name + " ") || line.starts_with(name + "{")) {
        sum += std::stod(line.substr(line.rfind(' ')));
      }
    }
    return sum;
  }
};
MACHINA_BOTH(UsageE2e);

}  // namespace

TEST_P(UsageE2e, F17_UsageIsTheTrees) {
  start_prod(1);
  const Json job = python(
      "import os, signal, time\n"
      "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
      "ready, there = os.pipe(); leave, hold = os.pipe()\n"
      "for i in range(4):\n"
      "  if os.fork() == 0:\n"
      "    os.close(hold)\n"
      "    b = bytearray(b'1') * (60 << 20)\n"
      "    while time.process_time() < .3: pass\n"
      "    os.write(there, b'x'); os.read(leave, 1); os._exit(0)\n"
      "for i in range(4): os.read(ready, 1)\n"
      "time.sleep(.4); os.close(hold)\n"
      "try: os.wait()\n"
      "except ChildProcessError: pass\n",
      {{"memory_mb", 600}});
  ASSERT_EQ(job["state"], "succeeded") << job.dump(1);
  const double mib =
      job["result"]["metrics"]["peak_memory_bytes"].get<double>() / (1 << 20);
  EXPECT_NEAR(mib, 245, 20) << job.dump(1);
  EXPECT_EQ(job["usage"]["max_rss_bytes"],
            job["result"]["metrics"]["peak_memory_bytes"]);
  EXPECT_NEAR(job["usage"]["cpu_ms"].get<double>(), 1300, 250) << job.dump(1);
  EXPECT_EQ(
      p().wait_end(p().submit({{"kind", "noop"}}))["usage"]["max_rss_bytes"],
      "unavailable");
}

// The code says whose fault an end was: the program's, the limits' or the
// payload's. "sandbox" is for the machine alone.
TEST_P(UsageE2e, F17_CodesSayWhoseFaultItWas) {
  start({.workers = 1});
  // How it ended, or what refused it.
  const auto code = [&](const std::string& kind, const Json& payload,
                        const Json& sandbox = Json::object()) {
    const Answer answer = p().post("/v1/jobs", {{"kind", kind},
                                                {"max_attempts", 1},
                                                {"sandbox", sandbox},
                                                {"payload", payload}});
    if (answer.status != 201) return answer.json().value("code", "?");
    const Json job = p().wait_end(answer.json()["id"]);
    return job["state"].get<std::string>() + " " +
           (job["error"].is_object() ? job["error"].value("code", "?") : "");
  };
  const auto run_of = [](const std::string& repo) {
    return Json{{"repo", repo}, {"runner", "command"}, {"command", {"true"}}};
  };
  const auto with_file = [](const std::string& path) {
    return Json{
        {"files", {{path, "x"}}}, {"runner", "command"}, {"command", {"true"}}};
  };
  const std::string python = "python3";
  // The program sends itself the signal of a spent budget.
  EXPECT_EQ(
      code("tool.shell",
           {{"argv", {python, "-c", "import os; os.kill(os.getpid(), 24)"}}}),
      "dead signal");
  // The budget itself, over children that nobody waits for.
  EXPECT_EQ(code("tool.shell",
                 {{"argv",
                   {python, "-c",
                    "import os\nfor i in range(2):\n  if os.fork() == 0:\n"
                    "    while True: pass\nwhile True: pass\n"}}},
                 {{"cpu_ms", 1000}}),
            "dead timeout");
  // What no workspace can hold.
  std::string deep = "a.py";
  for (int i = 0; i < 80; ++i) deep = "d/" + deep;
  EXPECT_EQ(code("test.run", with_file(deep)), "failed invalid_payload");
  EXPECT_EQ(code("test.run", with_file(std::string(300, 'n'))),
            "invalid-payload");
  EXPECT_EQ(code("test.run", with_file("a"), {{"memory_mb", 1ll << 40}}),
            "bad-request");
  // Repositories: a name that no file system takes; objects that are gone.
  const std::string repos = p().root() + "/repos/";
  const std::string git = "git -c user.name=a -c user.email=a@localhost ";
  ASSERT_EQ(
      p().shell("set -e; git init -q -b main " + repos + "long; cd " + repos +
                "long; b=$(echo hi | git hash-object -w --stdin); "
                "n=$(printf 'n%.0s' $(seq 300)); "
                "t=$(printf '100644 blob %s\\t%s\\n' $b $n | git mktree); "
                "git update-ref refs/heads/main $(" +
                git + "commit-tree -m x $t)"),
      0)
      << read_file(p().dir() + "/shell.log");
  EXPECT_EQ(code("test.run", run_of("long")), "failed invalid_payload");
  ASSERT_EQ(p().shell("set -e; git init -q -b main " + repos + "gone; cd " +
                      repos + "gone; echo x >f; git add f; " + git +
                      "commit -q -m x; rm -f .git/objects/$(git rev-parse "
                      "HEAD:f | sed 's,^..,&/,')"),
            0)
      << read_file(p().dir() + "/shell.log");
  EXPECT_EQ(code("test.run", run_of("gone")), "failed invalid_payload");
}

TEST_P(UsageE2e, F26_WorkersAreBusyUnderShortJobs) {
  start();
  ASSERT_TRUE(eventually([&] { return p().worker_pids().size() == 2; }, 15000));
  for (const char* kind : {"tool.shell", "noop"}) {
    const bool shell = std::string(kind) == "tool.shell";
    const Json payload =
        shell ? Json{{"argv", {"true"}}} : Json{{"sleep_ms", 1}};
    int samples = 0, busy = 0;
    const auto waiting = [&] { return metric("machina_queue_inbox_size"); };
    Json shown;
    // Some always wait.
    for (int round = 0; round < 400 && samples < 40; ++round) {
      if (waiting() < 20) {
        Json jobs = Json::array();
        for (int i = 0; i < (shell ? 60 : 500); ++i) {
          jobs.push_back({{"kind", kind}, {"payload", payload}});
        }
        ASSERT_EQ(p().post("/v1/jobs", jobs).status, 200);
        continue;
      }
      // From when both are at work: how soon a worker is ready is not this
      // test's matter.
      if (samples == 0) {
        ASSERT_TRUE(eventually(
            [&] { return metric("machina_workers_busy") == 2; }, 15000));
      }
      ++samples;
      busy += static_cast<int>(metric("machina_workers_busy"));
      shown = p().get("/v1/workers").json();
    }
    ASSERT_EQ(samples, 40);
    // What the alert MachinaWorkersAllBusy asks for.
    EXPECT_GE(busy, 0.9 * 2 * samples) << kind;
    EXPECT_GE(shown["busy"], 1) << shown.dump(1);
    int with_job = 0;
    for (const Json& worker : shown["workers"]) {
      if (worker["state"] == "busy" && worker.contains("job")) ++with_job;
    }
    EXPECT_EQ(shown["busy"], with_job) << shown.dump(1);
    EXPECT_TRUE(eventually(
        [&] { return metric("machina_queue_inbox_size") == 0; }, 60000));
  }
  EXPECT_TRUE(eventually(
      [&] {
        return metric("machina_workers_busy") == 0 &&
               p().get("/v1/workers").json()["workers"][0]["state"] == "idle";
      },
      10000))
      << p().get("/v1/workers").body;
}

// More processes than any host has, for each worker: said at the start, and at
// each number of workers.
TEST_P(UsageE2e, F18_JobsAreHeldToTheirPartOfTheHostsProcesses) {
  Serve serve;
  serve.workers = 2;
  serve.env["MACHINA_SANDBOX_MAX_PIDS"] = "4000000";
  start(serve);
  EXPECT_NE(p().log().find("4000000 processes to a job"), std::string::npos)
      << end_of(p().log());
  const auto parts = [&](std::size_t count) {
    std::vector<std::uint64_t> all;
    EXPECT_TRUE(eventually(
        [&] {
          all.clear();
          const Json shown = p().get("/v1/workers").json();
          for (const Json& worker : shown["workers"]) {
            all.push_back(worker.value("pids_max", std::uint64_t{0}));
          }
          return all.size() == count &&
                 std::count(all.begin(), all.end(), all[0]) ==
                     static_cast<std::ptrdiff_t>(count);
        },
        20000))
        << p().get("/v1/workers").body;
    return all.empty() ? 0 : all[0];
  };
  const std::uint64_t two = parts(2);
  EXPECT_GT(two, 0u);
  EXPECT_LT(two, 4'000'000u);
  p().call("PUT", "/v1/workers/scale", R"({"count":4})");
  const std::uint64_t four = parts(4);
  EXPECT_LE(four, two / 2);
  EXPECT_GT(four, two / 3);
  p().call("PUT", "/v1/workers/scale", R"({"count":2})");
  EXPECT_EQ(parts(2), two);
}

}  // namespace machina::e2e
