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
  // A repository of one commit, made by `script` inside it.
  std::string repository(const std::string& name, const std::string& script) {
    const std::string path = p().root() + "/repos/" + name;
    EXPECT_EQ(p().shell("set -e; git init -q -b main " + path + "; cd " + path +
                        "; " + script),
              0)
        << read_file(p().dir() + "/shell.log");
    return path;
  }
  static constexpr char kCommit[] =
      "git add -A; git -c user.name=a -c user.email=a@b commit -qm x; ";
};
MACHINA_BOTH(UsageE2e);

}  // namespace

TEST_P(UsageE2e, F15_AJobCannotHoldUpOthersOfItsRepository) {
  start_prod();
  const std::string repo = repository(
      "r", std::string("echo 'import fcntl,glob,os,time\n"
                       "for f in [\"/mirror\"]+glob.glob(\"/mirror/**\","
                       "recursive=True):\n"
                       " fcntl.flock(os.open(f,os.O_RDONLY),fcntl.LOCK_EX)\n"
                       "print(\"held\",flush=True)\n"
                       "time.sleep(60)' > hold.py; ") +
               kCommit);
  const Json payload = {{"repo", repo},
                        {"runner", "command"},
                        {"command", {"python3", "hold.py"}}};
  const std::string holder =
      p().submit({{"kind", "test.run"}, {"payload", payload}});
  ASSERT_TRUE(eventually(
      [&] {
        return p().get("/v1/jobs/" + holder + "/logs").body.find("held") !=
               std::string::npos;
      },
      20000))
      << p().job(holder).dump(1);
  const Json job =
      run({{"repo", repo}, {"runner", "command"}, {"command", {"true"}}},
          Json::object(), 20000);
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1);
  EXPECT_EQ(p().call("POST", "/v1/jobs/" + holder + "/cancel", "{}").status,
            200);
  EXPECT_EQ(p().wait_end(holder)["state"], "cancelled");
}

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

TEST_P(UsageE2e, F17_CodesNameWhoseFaultItWas) {
  start();
  const auto code = [](const Json& job) {
    return job["error"]["code"].is_string()
               ? job["error"]["code"].get<std::string>()
               : "none: " + job.dump(1);
  };
  EXPECT_EQ(code(python("import os, signal\nos.kill(os.getppid(), 0)\n"
                        "os.kill(os.getpid(), signal.SIGXCPU)\n",
                        {{"cpu_ms", 20000}})),
            "signal");
  EXPECT_EQ(code(python("while True: pass", {{"cpu_ms", 300}})), "timeout");
  // More directories than a workspace takes.
  std::string deep;
  for (int i = 0; i < 80; ++i) deep += "d/";
  EXPECT_EQ(code(run({{"files", {{deep + "a.py", "x"}}},
                      {"runner", "command"},
                      {"command", {"true"}}})),
            "invalid_payload");
  EXPECT_EQ(code(run({{"files", {{"a.py", "x"}}},
                      {"runner", "command"},
                      {"command", {"true"}}},
                     {{"memory_mb", 1ll << 40}})),
            "invalid_payload");
  // What git cannot check out, and what it cannot read.
  const std::string odd = repository(
      "odd",
      std::string("echo x > a; echo 'a working-tree-encoding=UTF-16LE-BOM"
                  "\n' > .gitattributes; ") +
          kCommit +
          "blob=$(echo y | git hash-object -w --stdin); "
          "tree=$(printf '100644 blob %s\\t%s\\n' $blob "
          "$(printf 'n%.0s' $(seq 300)) | git mktree); "
          "git update-ref refs/heads/main "
          "$(git -c user.name=a -c user.email=a@b commit-tree $tree -m "
          "x)");
  const Json command = {"true"};
  EXPECT_EQ(
      code(run({{"repo", odd}, {"runner", "command"}, {"command", command}})),
      "invalid_payload");
  const std::string shut =
      repository("shut", std::string("echo x > a; ") + kCommit +
                             "mkdir .git/odd; chmod 0 .git/odd; "
                             "chmod -R 0 .git/objects/[0-9a-f][0-9a-f]");
  EXPECT_EQ(
      code(run({{"repo", shut}, {"runner", "command"}, {"command", command}})),
      "invalid_payload");
  p().shell("chmod -R u+rwX " + shut);
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
    // Never less than a hundred wait.
    for (int round = 0; round < 200 && samples < 40; ++round) {
      if (waiting() < 100) {
        Json jobs = Json::array();
        for (int i = 0; i < 300; ++i) {
          jobs.push_back({{"kind", kind}, {"payload", payload}});
        }
        ASSERT_EQ(p().post("/v1/jobs", jobs).status, 200);
        continue;
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

}  // namespace machina::e2e
