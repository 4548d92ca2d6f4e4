// The worker against a server that is away, refuses, cancels and steals.

#include "workers/worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>

#include "tests/workers/sandbox/fake_sandbox.h"
#include "tests/workers/worker/fake_server.h"

namespace machina {
namespace {

using nlohmann::json;
using testing::HasSubstr;

class WorkerTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/machina-worker-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    folder_ = name;
    server_ = std::make_unique<FakeServer>(folder_ + "/s");
    box_.connect = [this] { return server_->connect(); };
    options_.name = "p-0-1";
    options_.root = folder_;
  }
  void TearDown() override {
    stop();
    server_.reset();
    std::filesystem::remove_all(folder_);
  }

  void start(Level level = 3) {
    worker_ = std::make_unique<Worker>(options_, slot_, fake_report(level));
    thread_ = std::thread([this] {
      worker_->run();
      returned_ = true;
    });
  }
  void stop() {
    if (!worker_) return;
    worker_->release_now();
    thread_.join();
    worker_.reset();
  }

  // A program that runs until it is cancelled.
  void run_until_cancelled() {
    box_.program = [this](const sandbox::Step&, const sandbox::Watch& watch) {
      started_ = true;
      while (!watch.cancel->load()) usleep(1000);
      sandbox::StepResult result;
      result.ended = sandbox::Ended::cancelled;
      return result;
    };
  }

  std::string folder_;
  FakeSandbox box_;
  FakeSlot slot_{box_};
  std::unique_ptr<FakeServer> server_;
  WorkerOptions options_;
  std::unique_ptr<Worker> worker_;
  std::thread thread_;
  std::atomic<bool> returned_{false}, started_{false};
};

const std::string kTrue = R"({"argv":["/usr/bin/true"]})";

TEST_F(WorkerTest, NoopComesBackWithItsEchoAndItsIsolation) {
  server_->add("a", "noop", R"({"echo":{"x":[1,"}"]}})");
  start();
  ASSERT_TRUE(server_->wait_state("a", "succeeded"));
  const json end = server_->job("a").end;
  EXPECT_EQ(end["result"], json::parse(R"({"echo":{"x":[1,"}"]}})"));
  EXPECT_EQ(end["isolation"]["level"], "L3");
  EXPECT_TRUE(end["usage"].contains("wall_ms"));
}

TEST_F(WorkerTest, ManyNoopsShareOneHandlerAndFewTrips) {
  for (int i = 0; i < 1000; ++i) server_->add("n" + std::to_string(i), "noop");
  start();
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(server_->wait_state("n" + std::to_string(i), "succeeded"));
  }
  EXPECT_EQ(box_.services, 1);
  EXPECT_EQ(server_->leases_max_seen, 64);
  EXPECT_LT(server_->lease_calls, 40);
}

// One body over the server's bound would lose all of its ends.
TEST_F(WorkerTest, LargeResultsOfABatchGoInSeveralBodies) {
  const std::string large =
      R"({"echo":")" + std::string(600'000, 'x') + R"("})";
  for (int i = 0; i < 6; ++i)
    server_->add("n" + std::to_string(i), "noop", large);
  start();
  for (int i = 0; i < 6; ++i)
    EXPECT_TRUE(server_->wait_state("n" + std::to_string(i), "succeeded"));
  EXPECT_GT(server_->leases_max_seen, 4);
  EXPECT_LT(server_->body_max_seen, 2u << 20);
}

TEST_F(WorkerTest, FailAttemptsIsRetriedAndThenSucceeds) {
  server_->add("a", "noop", R"({"fail_attempts":2})");
  start();
  ASSERT_TRUE(server_->wait_state("a", "succeeded"));
  EXPECT_EQ(server_->job("a").attempt, 3);
}

TEST_F(WorkerTest, FailIsAVerdictWithItsResult) {
  server_->add("a", "noop", R"({"fail":true})");
  start();
  ASSERT_TRUE(server_->wait_state("a", "failed"));
  EXPECT_EQ(server_->job("a").end["verdict"], "fail");
  EXPECT_EQ(server_->job("a").attempt, 1);
}

TEST_F(WorkerTest, CrashKillsItsHandlerAndNoOtherJob) {
  server_->add("crash", "noop", R"({"crash":true})");
  for (int i = 0; i < 20; ++i) server_->add("n" + std::to_string(i), "noop");
  start();
  ASSERT_TRUE(server_->wait_state("crash", "dead"));
  EXPECT_EQ(server_->job("crash").end["code"], "signal");
  EXPECT_EQ(server_->job("crash").attempt, 5);
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(server_->wait_state("n" + std::to_string(i), "succeeded"));
    EXPECT_EQ(server_->job("n" + std::to_string(i)).attempt, 1);
  }
}

TEST_F(WorkerTest, SlowNoopGivesBackThoseBehindIt) {
  server_->add("first", "noop");
  server_->add("slow", "noop", R"({"sleep_ms":700})");
  for (int i = 0; i < 5; ++i) server_->add("n" + std::to_string(i), "noop");
  start();
  // The batch is [slow, n0..n4]; all but slow are released while it sleeps.
  ASSERT_TRUE(server_->wait([&] { return server_->job("n4").releases == 1; }));
  EXPECT_EQ(server_->job("slow").state, "running");
  ASSERT_TRUE(server_->wait_state("slow", "succeeded"));
  ASSERT_TRUE(server_->wait_state("n4", "succeeded"));
}

TEST_F(WorkerTest, NoopOverItsTimeoutIsKilled) {
  server_->add("a", "noop", R"({"sleep_ms":60000})", 200);
  start();
  ASSERT_TRUE(server_->wait([&] { return server_->job("a").completions > 0; }));
  EXPECT_EQ(server_->job("a").end["code"], "timeout");
}

TEST_F(WorkerTest, BadPayloadIsRefusedAgainInTheWorker) {
  server_->add("a", "noop", R"({"nap_ms":1})");
  server_->add("b", "tool.shell", R"({"argv":[]})");
  server_->add("c", "test.run", R"({"repo":"/etc"})");
  start();
  for (const char* id : {"a", "b", "c"}) {
    ASSERT_TRUE(server_->wait_state(id, "failed"));
    EXPECT_EQ(server_->job(id).end["code"], "invalid_payload");
  }
  EXPECT_THAT(server_->job("a").end["message"], HasSubstr("nap_ms"));
}

TEST_F(WorkerTest, ShellReportsOutputExitCodeAndLog) {
  box_.program = [](const sandbox::Step& step, const sandbox::Watch& watch) {
    EXPECT_EQ(step.argv[0], "/usr/bin/true");
    const std::string text = "out\xff\n";
    watch.on_output(1, std::as_bytes(std::span(text)));
    auto result = FakeSandbox::exited(3, text);
    result.err = "err";
    return result;
  };
  server_->add("a", "tool.shell", kTrue);
  start();
  ASSERT_TRUE(server_->wait_state("a", "failed"));
  const auto job = server_->job("a");
  EXPECT_EQ(job.end["result"]["exit_code"], 3);
  EXPECT_EQ(job.end["result"]["stdout"], "out\xEF\xBF\xBD\n");
  EXPECT_EQ(job.end["result"]["stderr"], "err");
  EXPECT_EQ(job.log, "out\xff\n");
}

TEST_F(WorkerTest, EachWayToDieHasItsOwnCode) {
  using sandbox::Ended;
  const std::map<Ended, std::string> codes = {
      {Ended::signalled, "signal"}, {Ended::timeout, "timeout"},
      {Ended::oom, "oom"},          {Ended::pids, "pids"},
      {Ended::disk, "disk"},        {Ended::output, "output"},
      {Ended::failed, "sandbox"},   {Ended::isolation, "isolation_unavailable"},
  };
  Ended ended = Ended::failed;
  box_.program = [&](const sandbox::Step&, const sandbox::Watch&) {
    sandbox::StepResult result;
    result.ended = ended;
    return result;
  };
  start();
  for (const auto& [how, code] : codes) {
    ended = how;
    server_->add(code, "tool.shell", kTrue);
    ASSERT_TRUE(server_->wait_state(code, "dead")) << code;
    const json end = server_->job(code).end;
    EXPECT_EQ(end["code"], code);
    if (code == "sandbox" || code == "isolation_unavailable") continue;
    EXPECT_TRUE(end["result"].contains("exit_code")) << end;
    EXPECT_TRUE(end["result"]["exit_code"].is_null()) << end;
  }
}

TEST_F(WorkerTest, CancelReachesARunningJobAtOnce) {
  run_until_cancelled();
  server_->add("a", "tool.shell", kTrue);
  start();
  ASSERT_TRUE(server_->wait([&] { return started_.load(); }));
  const auto begin = std::chrono::steady_clock::now();
  server_->cancel("a");
  ASSERT_TRUE(server_->wait_state("a", "cancelled"));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
}

TEST_F(WorkerTest, CancelReachesASleepingNoop) {
  server_->add("a", "noop", R"({"sleep_ms":60000})");
  start();
  ASSERT_TRUE(server_->wait_state("a", "running"));
  server_->cancel("a");
  ASSERT_TRUE(server_->wait_state("a", "cancelled", 3000));
}

TEST_F(WorkerTest, LostLeaseEndsTheJobAndSaysNothing) {
  run_until_cancelled();
  server_->add("a", "tool.shell", kTrue);
  start();
  ASSERT_TRUE(server_->wait([&] { return server_->heartbeats > 0; }));
  server_->steal("a");
  server_->add("next", "noop");
  ASSERT_TRUE(server_->wait_state("next", "succeeded"));
  EXPECT_EQ(server_->job("a").completions, 0);
}

TEST_F(WorkerTest, CompletionWaitsForAServerThatIsAway) {
  std::atomic<bool> go{false};
  box_.program = [&](const sandbox::Step&, const sandbox::Watch&) {
    while (!go) usleep(1000);
    return FakeSandbox::exited(0, "done");
  };
  server_->add("a", "tool.shell", kTrue);
  start();
  ASSERT_TRUE(server_->wait_state("a", "running"));
  server_->go_away();
  go = true;
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  server_->come_back();
  ASSERT_TRUE(server_->wait_state("a", "succeeded"));
  EXPECT_EQ(server_->job("a").attempt, 1);
  EXPECT_EQ(server_->job("a").end["result"]["stdout"], "done");
}

TEST_F(WorkerTest, AnErrorOfTheServerIsRetried) {
  server_->add("a", "tool.shell", kTrue);
  server_->answer_500 = 3;
  start();
  ASSERT_TRUE(server_->wait_state("a", "succeeded"));
}

TEST_F(WorkerTest, JobAboveTheWorkersLevelIsNotRun) {
  std::atomic<int> runs{0};
  box_.program = [&](const sandbox::Step&, const sandbox::Watch&) {
    ++runs;
    return FakeSandbox::exited(0);
  };
  server_->add("a", "tool.shell", kTrue, 0, R"({"min_level":"L3"})");
  server_->add("b", "noop", "{}", 0, R"({"min_level":"L3"})");
  server_->add("c", "tool.shell", kTrue, 0, R"({"profile":"net"})");
  start(2);
  for (const char* id : {"a", "b", "c"}) {
    ASSERT_TRUE(server_->wait_state(id, "dead"));
    EXPECT_EQ(server_->job(id).end["code"], "isolation_unavailable");
    EXPECT_EQ(server_->job(id).end["isolation"]["level"], "L2");
  }
  EXPECT_EQ(server_->job("a").end["isolation"]["requested"], "L3");
  EXPECT_EQ(server_->job("c").attempt, 1);  // a retry would not help
  EXPECT_EQ(runs, 0);
}

TEST_F(WorkerTest, F31_AKindThatItDoesNotKnowIsNotRunAsAShell) {
  std::atomic<int> runs{0};
  box_.program = [&](const sandbox::Step&, const sandbox::Watch&) {
    ++runs;
    return FakeSandbox::exited(0);
  };
  server_->gives_any_kind = true;
  server_->add("a", "tool.unknown", kTrue);
  start();
  ASSERT_TRUE(server_->wait_state("a", "dead"));
  EXPECT_THAT(server_->job("a").end["message"].get<std::string>(),
              HasSubstr("tool.unknown"));
  EXPECT_EQ(runs, 0);
}

TEST_F(WorkerTest, StopFinishesTheJobAndTakesNoOther) {
  std::atomic<bool> go{false};
  box_.program = [&](const sandbox::Step&, const sandbox::Watch&) {
    started_ = true;
    while (!go) usleep(1000);
    return FakeSandbox::exited(0);
  };
  server_->add("a", "tool.shell", kTrue);
  server_->add("b", "tool.shell", kTrue);
  start();
  ASSERT_TRUE(server_->wait([&] { return started_.load(); }));
  worker_->stop();
  go = true;
  ASSERT_TRUE(server_->wait_state("a", "succeeded"));
  ASSERT_TRUE(server_->wait([&] { return returned_.load(); }));
  EXPECT_EQ(server_->job("b").state, "ready");
}

TEST_F(WorkerTest, ReleaseNowGivesTheJobBackWithoutAnAttempt) {
  run_until_cancelled();
  server_->add("a", "tool.shell", kTrue);
  start();
  ASSERT_TRUE(server_->wait([&] { return started_.load(); }));
  worker_->release_now();
  ASSERT_TRUE(server_->wait([&] { return returned_.load(); }));
  EXPECT_EQ(server_->job("a").state, "ready");
  EXPECT_EQ(server_->job("a").attempt, 0);
}

TEST_F(WorkerTest, StopEndsAParkedLeaseAtOnce) {
  start();
  ASSERT_TRUE(server_->wait([&] { return server_->lease_calls > 0; }));
  worker_->stop();
  EXPECT_TRUE(server_->wait([&] { return returned_.load(); }, 1000));
}

TEST_F(WorkerTest, HeartbeatsKeepALeaseThatIsShorterThanItsJob) {
  server_->lease_ms = 300;
  std::atomic<bool> go{false};
  box_.program = [&](const sandbox::Step&, const sandbox::Watch&) {
    while (!go) usleep(1000);
    return FakeSandbox::exited(0);
  };
  server_->add("a", "tool.shell", kTrue);
  start();
  ASSERT_TRUE(server_->wait([&] { return server_->heartbeats >= 5; }, 3000));
  go = true;
  ASSERT_TRUE(server_->wait_state("a", "succeeded"));
}

// The second word comes soon after the first, and long before the next beat.
TEST_F(WorkerTest, ProgressSoonAfterProgressIsShownAsSoon) {
  const auto shown = [&](const std::string& word, int ms) {
    return server_->wait(
        [&] {
          const auto job = server_->job("a");
          return !job.progress.empty() && job.progress.back() == word;
        },
        ms);
  };
  std::atomic<bool> first{false}, second{false};
  box_.program = [&](const sandbox::Step& step, const sandbox::Watch&) {
    if (step.argv[0] == "one") first = shown("setup[0]", 8000);
    if (step.argv[0] == "two") second = shown("setup[1]", 8000);
    return FakeSandbox::exited(0);
  };
  server_->add("a", "test.run",
               R"({"files":{"a":"b"},"runner":"command","command":["/bin/true"],
                   "setup":[["one"],["two"]]})");
  start();
  ASSERT_TRUE(server_->wait_state("a", "succeeded", 30'000));
  EXPECT_TRUE(first);
  EXPECT_TRUE(second);
}

}  // namespace
}  // namespace machina
