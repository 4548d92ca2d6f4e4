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
