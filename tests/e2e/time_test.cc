// Times and ends that must be true: retries and what they depend on, a wall
// clock that is set, attempts that the operator ended, keys that outlive their
// jobs.

#include <gtest/gtest.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>

#include "tests/e2e/fixture.h"
#include "tests/support/places.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

class Times : public EndToEnd {
 protected:
  Json lease(const std::string& kind) {
    Answer a = p().post(
        "/v1/leases", {{"worker", "w"}, {"kinds", {kind}}, {"wait_ms", 5000}});
    EXPECT_EQ(a.status, 200) << a.body;
    Json leases = a.json()["leases"];
    return leases.empty() ? Json() : leases[0];
  }
  Answer verb(const Json& lease, const std::string& what,
              const Json& body = Json::object()) {
    return p().post("/v1/leases/" + lease.value("token", "none") + "/" + what,
                    body);
  }
  // No worker of ours: each lease is a test's.
  void start_alone(const std::map<std::string, std::string>& env = {}) {
    Serve serve;
    serve.workers = 0;
    serve.env = env;
    // What a test has leased and not ended goes back soon.
    serve.env["MACHINA_DRAIN_MS"] = "100";
    start(serve);
  }
};

TEST_P(Times, F12_ARetryAsksForItsDependencies) {
  start_alone();
  std::string first =
      p().submit({{"kind", "ext.first"}, {"keep_result_ms", 1}});
  std::string gone =
      p().submit({{"kind", "ext.then"}, {"depends_on", Json::array({first})}});
  std::string root = p().submit({{"kind", "ext.root"}});
  std::string id =
      p().submit({{"kind", "ext.after"}, {"depends_on", Json::array({root})}});
  verb(lease("ext.first"), "complete", {{"verdict", "fail"}});
  verb(lease("ext.root"), "complete", {{"verdict", "fail"}});
  EXPECT_EQ(p().wait_end(id)["state"], "cancelled");

  Answer refused = p().post("/v1/jobs/" + id + "/retry", Json::object());
  EXPECT_EQ(refused.status, 409) << refused.body;
  EXPECT_EQ(refused.json()["code"], "dependency");
  EXPECT_NE(refused.body.find(root + " ended failed"), std::string::npos)
      << refused.body;
  Ended cli = p().run({"retry", id, "--server", p().url()});
  EXPECT_NE(cli.code, 0) << cli.out;
  EXPECT_EQ(p().job(id)["state"], "cancelled");

  // One that is past its retention did not succeed either.
  EXPECT_EQ(p().wait_end(gone)["state"], "cancelled");
  ASSERT_TRUE(eventually(
      [&] { return p().get("/v1/jobs/" + first).status == 404; }, 20000));
  refused = p().post("/v1/jobs/" + gone + "/retry", Json::object());
  EXPECT_EQ(refused.status, 409) << refused.body;
  EXPECT_EQ(refused.json()["code"], "dependency");
  Answer taken =
      p().post("/v1/jobs/" + gone + "/retry", {{"ignore_dependencies", true}});
  EXPECT_EQ(taken.status, 200) << taken.body;
  EXPECT_EQ(taken.json()["state"], "ready");

  // Queued again, it is waited for.
  EXPECT_EQ(p().post("/v1/jobs/" + root + "/retry", Json::object()).status,
            200);
  taken = p().post("/v1/jobs/" + id + "/retry", Json::object());
  EXPECT_EQ(taken.status, 200) << taken.body;
  EXPECT_EQ(taken.json()["state"], "waiting");
  verb(lease("ext.root"), "complete", {{"verdict", "fail"}});
  EXPECT_EQ(p().wait_end(id)["state"], "cancelled");
  cli = p().run({"retry", id, "--ignore-dependencies", "--server", p().url()});
  EXPECT_EQ(cli.code, 0) << cli.err;
  EXPECT_EQ(p().job(id)["state"], "ready");
  EXPECT_EQ(p().post("/v1/jobs/" + id + "/retry", {{"ignore", true}}).status,
            400);
}

TEST_P(Times, F12_NoWaitIsLongerThanItsMaximum) {
  start_alone();
  for (const Json& failure :
       {Json{{"code", "exit"}},
        Json{{"code", "exit"}, {"retry_after_ms", 60000}}}) {
    std::string id = p().submit({{"kind", "ext.max"},
                                 {"max_attempts", 9},
                                 {"retry_min_ms", 100},
                                 {"retry_max_ms", 100}});
    for (int i = 0; i < 4; ++i) {
      const double begin = now_ms();
      verb(lease("ext.max"), "fail", failure);
      Json job = p().job(id);
      // Whole milliseconds, so that 100 ms after the decision is 100 ms.
      EXPECT_NE(job["state"], "dead") << job.dump(1);
      Json again = lease("ext.max");
      ASSERT_TRUE(again.is_object());
      EXPECT_GE(now_ms() - begin, 100);
      verb(again, "release");
    }
    p().post("/v1/jobs/" + id + "/cancel", Json::object());
  }
}

// --- clocks ---

class Clocks : public Times {
 protected:
  void start_with_clock() {
    shim_ = p().dir() + "/wall_clock.so";
    shift_ = p().dir() + "/shift";
    ASSERT_STRNE(kWallClockShim, "") << "a build without sanitizers has it";
    fs::copy_file(kWallClockShim, shim_);
    fs::permissions(shim_, fs::perms(0755));
    set_clock(0);
    start_alone({{"LD_PRELOAD", shim_}, {"WALL_CLOCK_SHIFT_FILE", shift_}});
  }
  // So many seconds from the true time.
  void set_clock(long seconds) {
    seconds_ = seconds;
    std::ofstream(shift_ + ".new") << seconds;
    fs::permissions(shift_ + ".new", fs::perms(0644));
    fs::rename(shift_ + ".new", shift_);
  }
  // What that clock shows.
  double wall_ms() const {
    timespec t{};
    clock_gettime(CLOCK_REALTIME, &t);
    return static_cast<double>(t.tv_sec + seconds_) * 1e3 +
           static_cast<double>(t.tv_nsec) / 1e6;
  }
  static std::string rfc3339(double ms) {
    const time_t seconds = static_cast<time_t>(ms / 1000);
    tm parts{};
    gmtime_r(&seconds, &parts);
    char text[64];
    const std::size_t n = strftime(text, sizeof text, "%FT%T", &parts);
    std::snprintf(text + n, sizeof text - n, ".%03dZ",
                  static_cast<int>(static_cast<long long>(ms) % 1000));
    return text;
  }
  // All that waits takes the time that it should, by whatever clock.
  void expect_durations(const std::string& label) {
    const std::string wait = std::to_string(++looks_);
    auto kind = [&](const std::string& what) { return "ext." + what + wait; };
    const double begin = now_ms();
    // run_at is of whole milliseconds.
    const double at = std::floor(wall_ms()) + 900;
    p().submit({{"kind", kind("delay")}, {"delay_ms", 700}});
    p().submit({{"kind", kind("at")}, {"run_at", rfc3339(at)}});
    p().submit({{"kind", kind("retry")},
                {"retry_min_ms", 500},
                {"retry_max_ms", 500}});
    std::string blocked = p().submit({{"kind", kind("block")}});
    EXPECT_EQ(verb(lease(kind("block")), "block",
                   {{"reason", "x"}, {"deadline_ms", 600}})
                  .status,
              200);
    const double failed = now_ms();
    EXPECT_EQ(verb(lease(kind("retry")), "fail", {{"code", "exit"}}).status,
              200);
    EXPECT_TRUE(lease(kind("retry")).is_object()) << label;
    EXPECT_GE(now_ms() - failed, 500) << label;
    EXPECT_TRUE(lease(kind("delay")).is_object()) << label;
    EXPECT_GE(now_ms() - begin, 700) << label;
    EXPECT_TRUE(lease(kind("at")).is_object()) << label;
    EXPECT_GE(wall_ms(), at) << label;
    Json end = p().wait_end(blocked, 20000);
    EXPECT_EQ(end["state"], "dead") << label << end.dump(1);
    EXPECT_EQ(end["error"]["code"], "timeout") << label;
    EXPECT_GE(now_ms() - begin, 600) << label;
  }

  std::string shim_, shift_;
  long seconds_ = 0;
  int looks_ = 0;
};

TEST_P(Clocks, F07_ASetClockMovesNoDuration) {
  start_with_clock();
  set_clock(-30);
  expect_durations("30 s back");
  // Set while a job waits: it waits neither less nor until the clock is there.
  double begin = now_ms();
  p().submit({{"kind", "ext.long"}, {"delay_ms", 1500}});
  set_clock(3600);
  expect_durations("an hour forward");
  set_clock(0);
  EXPECT_TRUE(lease("ext.long").is_object());
  EXPECT_GE(now_ms() - begin, 1500);

  Json clock = p().get("/stats").json()["clock"];
  EXPECT_GE(clock["steps"], 3) << clock.dump(1);
  EXPECT_NEAR(clock["last_step_ms"].get<double>(), -3'600'000, 1000);
  EXPECT_NE(p().get("/metrics").body.find("machina_clock_steps_total "),
            std::string::npos);
  for (const char* line : {"the wall clock was set back by",
                           "the wall clock was set forward by"}) {
    EXPECT_NE(p().log().find(line), std::string::npos) << end_of(p().log());
  }
}

TEST_P(Clocks, F07_ASetClockMovesNoDurationOverARestart) {
  start_with_clock();
  for (long step : {-3600, 3600}) {
    const std::string kind = step < 0 ? "ext.back" : "ext.forward";
    const double begin = now_ms();
    p().submit({{"kind", kind}, {"delay_ms", 2500}});
    p().kill_server();
    set_clock(seconds_ + step);
    restart();
    EXPECT_TRUE(lease(kind).is_object()) << step;
    EXPECT_GE(now_ms() - begin, 2500) << step;
    // What is shown goes by the clock as it is now.
    Json job = p().job(p().submit({{"kind", "ext.shown"}}));
    EXPECT_EQ(job["created_at"].get<std::string>().substr(0, 13),
              rfc3339(wall_ms()).substr(0, 13));
  }
  expect_durations("back, forward, restarted");
}

MACHINA_BOTH(Clocks);

// --- the operator ends it ---

class Ends : public Times {
 protected:
  // Runs until somebody ends it; its only attempt.
  std::string start_job() {
    std::string id =
        p().submit({{"kind", "tool.shell"},
                    {"max_attempts", 1},
                    {"payload", {{"argv", {"/bin/sleep", "600"}}}}});
    EXPECT_EQ(p().wait_state(id, "running")["state"], "running");
    return id;
  }
  // It runs again, on the attempt that it had.
  void expect_runs_again(const std::string& id, const std::string& why) {
    Json job = p().wait_state(id, "running");
    EXPECT_EQ(job["state"], "running") << why << job.dump(1);
    EXPECT_EQ(job["attempt"], 1) << why;
  }
  // How often a server has said that it drains.
  std::size_t drains() {
    const std::string log = p().log();
    std::size_t count = 0, at = 0;
    while ((at = log.find("draining: no new leases", at)) != log.npos) {
      ++count, ++at;
    }
    return count;
  }
  void cancel(const std::string& id) {
    EXPECT_EQ(p().post("/v1/jobs/" + id + "/cancel", Json::object()).status,
              200);
    EXPECT_EQ(p().wait_end(id)["state"], "cancelled");
  }
};

TEST_P(Ends, F10_TheSecondSignalCostsNoAttempt) {
  Serve serve;
  serve.workers = 1;
  start(serve);
  std::string id = start_job();
  for (int signal : {SIGTERM, SIGINT}) {
    const std::size_t before = drains();
    ::kill(p().server(), signal);
    ASSERT_TRUE(eventually([&] { return drains() > before; }, 10000));
    ::kill(p().server(), signal);
    EXPECT_NE(p().wait_server(), 0);
    restart();
    expect_runs_again(id, "after signal " + std::to_string(signal) + " ");
  }
  cancel(id);
}

TEST_P(Ends, F10_OpsKillCostsNoAttempt) {
  Serve serve;
  serve.workers = 1;
  start(serve);
  std::string id = start_job();
  for (const char* grace : {"1", "0"}) {
    Ended killed =
        p().run({"ops", "kill", "--term-seconds", grace, "--root", p().root()});
    EXPECT_EQ(killed.code, 0) << killed.out << killed.err;
    p().wait_server();
    restart();
    expect_runs_again(id, std::string("after a grace of ") + grace + " s ");
  }
  cancel(id);
}

TEST_P(Ends, F10_APoolThatIsToldTwiceCostsNoAttempt) {
  Serve serve;
  serve.workers = 1;
  start(serve);
  std::string id = start_job();
  // The pool's own word: its spawner and keepers have its command line too.
  const auto pool = [&] {
    return std::atoi(read_file(p().root() + "/pool.lock").c_str());
  };
  const pid_t first = pool();
  ASSERT_GT(first, 1);
  const std::string file = p().root() + "/pool.log";
  ::kill(first, SIGTERM);
  ASSERT_TRUE(eventually(
      [&] { return read_file(file).find("draining") != std::string::npos; },
      10000));
  ::kill(first, SIGTERM);
  ASSERT_TRUE(eventually(
      [&] {
        const pid_t now = pool();
        return now > 1 && now != first && ::kill(now, 0) == 0;
      },
      20000));
  expect_runs_again(id, "");
  cancel(id);
}

TEST_P(Ends, F10_AWorkerThatDiesByItselfIsCounted) {
  Serve serve;
  serve.workers = 1;
  start(serve);
  std::string id = start_job();
  // The pool tells the server of its worker in its own time.
  std::vector<pid_t> workers;
  ASSERT_TRUE(eventually(
      [&] {
        workers = p().worker_pids();
        return workers.size() == 1;
      },
      10000));
  ::kill(workers[0], SIGKILL);
  Json job = p().wait_end(id);
  EXPECT_EQ(job["state"], "dead") << job.dump(1);
  EXPECT_EQ(job["error"]["code"], "worker_died") << job.dump(1);
}

// --- what a key remembers ---

class Keys : public Times {};

TEST_P(Keys, F11_AKeyThatOutlivesItsJobTellsTheTruth) {
  start_alone();
  auto gone = [&](const std::string& key, const std::string& end) {
    Json request = {{"kind", "ext.e"},
                    {"payload", {{"x", 1}}},
                    {"dedup_key", key},
                    {"keep_result_ms", 1}};
    std::string id = p().submit(request);
    Json body = Json::object();
    if (end == "failed") body["verdict"] = "fail";
    EXPECT_EQ(verb(lease("ext.e"), "complete", body).status, 200);
    EXPECT_TRUE(eventually(
        [&] { return p().get("/v1/jobs/" + id).status == 404; }, 20000));
    auto check = [&](const Answer& a, int status) {
      EXPECT_EQ(a.status, status) << a.body;
      Json job = a.json();
      EXPECT_EQ(job["id"], id) << a.body;
      EXPECT_EQ(job["state"], end) << a.body;
      EXPECT_EQ(job["kind"], "ext.e") << a.body;
      EXPECT_TRUE(job["created_at"].is_string()) << a.body;
      EXPECT_TRUE(job["finished_at"].is_string()) << a.body;
      EXPECT_EQ(job["duplicate"], true) << a.body;
      EXPECT_EQ(job["past_retention"], true) << a.body;
      EXPECT_FALSE(job.contains("durability")) << a.body;
    };
    const std::string text = request.dump();
    check(p().post("/v1/jobs", request), 200);
    check(p().call("POST", "/v1/jobs", text, {"Prefer: wait=20"}), 200);
    check(p().post("/run_sync", request), 200);
    for (const Answer& bulk :
         {p().post("/v1/jobs", Json::array({request})),
          p().call("POST", "/v1/jobs", text + "\n",
                   {"Content-Type: application/x-ndjson"})}) {
      Json job = bulk.json()["jobs"][0];
      EXPECT_EQ(job["id"], id) << bulk.body;
      EXPECT_EQ(job["state"], end) << bulk.body;
      EXPECT_EQ(job["duplicate"], true) << bulk.body;
      EXPECT_EQ(job["kind"], "ext.e") << bulk.body;
      EXPECT_EQ(job["past_retention"], true) << bulk.body;
      EXPECT_TRUE(job["created_at"].is_string()) << bulk.body;
      EXPECT_TRUE(job["finished_at"].is_string()) << bulk.body;
      EXPECT_FALSE(job.contains("served")) << bulk.body;
    }
    Answer short_form = p().post("/enqueue", request);
    EXPECT_EQ(short_form.json()["deduplicated"], true) << short_form.body;
    EXPECT_EQ(short_form.json()["id"], id) << short_form.body;
    EXPECT_EQ(short_form.json()["state"], end) << short_form.body;
    EXPECT_EQ(short_form.json()["kind"], "ext.e") << short_form.body;
    EXPECT_EQ(short_form.json()["past_retention"], true) << short_form.body;
    EXPECT_TRUE(short_form.json()["finished_at"].is_string())
        << short_form.body;
    Ended cli = p().run({"enqueue", "ext.e", "--payload", R"({"x":1})",
                         "--dedup-key", key, "--server", p().url()});
    EXPECT_NE(cli.out.find(end), std::string::npos) << cli.out << cli.err;
    EXPECT_NE(cli.out.find("past its retention"), std::string::npos)
        << cli.out << cli.err;
    return request;
  };
  gone("one", "succeeded");
  Json failed = gone("two", "failed");
  p().kill_server();
  restart();
  Answer again = p().post("/v1/jobs", failed);
  EXPECT_EQ(again.json()["state"], "failed") << again.body;
}

TEST_P(Keys, F11_TwoKeysThatDifferAreRefused) {
  start_alone();
  for (const char* member : {"dedup_key", "request_id"}) {
    const std::string body =
        Json{{"kind", "ext.k"}, {member, std::string("in ") + member}}.dump();
    for (const char* path : {"/v1/jobs", "/enqueue", "/run_sync"}) {
      Answer a = p().call("POST", path, body, {"Idempotency-Key: header"});
      EXPECT_EQ(a.status, 400) << path << a.body;
      EXPECT_NE(a.body.find(member), std::string::npos) << a.body;
      EXPECT_NE(a.body.find("dempotency-"), std::string::npos) << a.body;
      EXPECT_NE(a.body.find("header"), std::string::npos) << a.body;
    }
    Answer same = p().call("POST", "/v1/jobs", body,
                           {std::string("Idempotency-Key: in ") + member});
    EXPECT_EQ(same.status, 201) << same.body;
  }
}

MACHINA_BOTH(Times);
MACHINA_BOTH(Ends);
MACHINA_BOTH(Keys);

}  // namespace
}  // namespace machina::e2e
