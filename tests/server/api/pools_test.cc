// What pools report, without a server (server/api/pools.h).

#include "server/api/pools.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

namespace machina::test {
namespace {

struct SetClock final : Clock {
  Millis wall_ms() override { return now; }
  Millis mono_ms() override { return now; }
  Millis now = 1000;
};

class PoolsTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/machina-pools-XXXXXX";
    dir_ = mkdtemp(path);
    auto tokens = Tokens::open(dir_ + "/token.key");
    ASSERT_TRUE(tokens);
    tokens_ = std::move(*tokens);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  MaybeProblem read(const std::string& body, PoolSync* sync) {
    EXPECT_FALSE(doc_.parse(body)) << body;
    return read_sync(doc_.root(), sync);
  }
  Pools::Heard hear(const std::string& id, const std::string& body) {
    PoolSync sync;
    EXPECT_FALSE(read(body, &sync)) << body;
    return pools_.hear(id, std::move(sync), *tokens_);
  }
  // How many of the syncs that wait are answered.
  int answered(bool all) {
    int count = 0;
    pools_.answer_due(all, [&](const Where&) { return ++count > 0; });
    return count;
  }

  std::string dir_;
  SetClock clock_;
  ServerOptions options_;
  Pools pools_{options_, clock_};
  std::unique_ptr<Tokens> tokens_;
  JsonDoc doc_;
  PoolTold told_;
};

constexpr char kSecret[] = "0123456789abcdef0123456789abcdef";

std::string with_session(const std::string& rest) {
  return std::string(R"({"session":")") + kSecret + "\"," + rest + "}";
}

TEST_F(PoolsTest, APoolEndsOnlyItsOwnWorkers) {
  hear("a", R"({"workers":[{"name":"w"}]})");
  EXPECT_TRUE(hear("b", R"({"gone":["w","a-1"]})").ends.empty());
  // Nor where it lists the worker, too: the other pool was the first.
  EXPECT_TRUE(
      hear("b", R"({"workers":[{"name":"w"}],"gone":["w"]})").ends.empty());
  const auto ends = hear("a", R"({"gone":["w"],"ended":["a-1"]})").ends;
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_EQ(ends[0].workers, std::vector<std::string>{"w"});
  EXPECT_FALSE(ends[0].ended);
  EXPECT_EQ(ends[1].workers, std::vector<std::string>{"a-1"});
  EXPECT_TRUE(ends[1].ended);
}

TEST_F(PoolsTest, AnEndedSessionIsRemembered) {
  const Session session = tokens_->session("w", kSecret, true);
  EXPECT_FALSE(pools_.has_ended(session));
  const auto ends = hear("a", with_session(R"("gone":["w"])")).ends;
  ASSERT_EQ(ends.size(), 1u);
  EXPECT_EQ(ends[0].sessions, std::vector<Session>{session});
  EXPECT_TRUE(pools_.has_ended(session));
  EXPECT_FALSE(pools_.has_ended(tokens_->session("v", kSecret, true)));
}

TEST_F(PoolsTest, ASyncWaitsUntilThereIsNews) {
  hear("a", "{}");
  EXPECT_FALSE(pools_.park("a", {1, 1}, 500, &told_)) << "target not told yet";
  EXPECT_EQ(pools_.answer(&told_), R"({"target":0,"drain":false})");
  EXPECT_FALSE(pools_.park("a", {1, 2}, 0, &told_)) << "does not want to wait";
  EXPECT_TRUE(pools_.park("a", {1, 2}, 500, &told_));
  EXPECT_EQ(answered(false), 0);
  clock_.now += 500;
  EXPECT_EQ(answered(false), 1);
  EXPECT_EQ(answered(true), 0) << "once";

  EXPECT_TRUE(pools_.park("a", {1, 3}, 500, &told_));
  EXPECT_EQ(hear("a", "{}").left_behind.sequence, 3u);
  EXPECT_TRUE(pools_.park("a", {1, 4}, 500, &told_));
  EXPECT_TRUE(pools_.take_parked(2).empty());
  EXPECT_EQ(pools_.take_parked(1).size(), 1u);
  EXPECT_EQ(answered(true), 0);

  pools_.scale(3);
  EXPECT_FALSE(pools_.park("a", {1, 5}, 500, &told_));
  pools_.drain(true);
  EXPECT_EQ(pools_.answer(&told_), R"({"target":3,"drain":true})");
  EXPECT_FALSE(pools_.park("a", {1, 6}, 500, &told_)) << "draining";
}

TEST_F(PoolsTest, ASilentPoolIsForgotten) {
  hear("a", R"({"workers":[{"name":"w","state":"busy"}]})");
  clock_.now += kPoolSilentMs;
  answered(false);
  EXPECT_EQ(pools_.numbers().busy, 1);
  EXPECT_FALSE(pools_.heard());
  clock_.now += 1;
  answered(false);
  EXPECT_EQ(pools_.numbers().reported, 0);
}

TEST_F(PoolsTest, OneGoodWorkerIsNoTrouble) {
  EXPECT_EQ(pools_.trouble(), nullptr);
  pools_.ours_has_trouble({"ours", ""});
  ASSERT_NE(pools_.trouble(), nullptr);
  EXPECT_EQ(pools_.trouble()->reason, "ours");
  hear("a", R"({"trouble":{"reason":"no namespaces","remedy":"allow them"}})");
  ASSERT_NE(pools_.trouble(), nullptr);
  EXPECT_EQ(pools_.trouble()->remedy, "allow them");
  hear("b", R"({"workers":[{"name":"w","level":"L2"}]})");
  EXPECT_EQ(pools_.trouble(), nullptr);
}

TEST_F(PoolsTest, AGrantIsKnownBeforeThePoolTells) {
  hear("a", R"({"workers":[{"name":"w","state":"idle"}]})");
  const PoolReport::Worker& w = pools_.all().at("a").workers.front();
  EXPECT_EQ(pools_.job_of(w), "");
  LeaseView lease;
  lease.job.worker = "w";
  pools_.worker_got(lease);
  EXPECT_EQ(pools_.job_of(w), to_string(lease.job.id));
  EXPECT_EQ(pools_.numbers().busy, 1);
  pools_.worker_asks("w");
  EXPECT_EQ(pools_.numbers().busy, 0);
}

TEST_F(PoolsTest, ReportsAreBounded) {
  for (std::size_t i = 0; i < kPoolsMax; ++i) {
    const std::string id = "p" + std::to_string(i);
    EXPECT_TRUE(pools_.has_room_for(id));
    hear(id, "{}");
  }
  EXPECT_TRUE(pools_.has_room_for("p0"));
  EXPECT_FALSE(pools_.has_room_for("more"));

  std::string workers = R"({"name":"w"})";
  for (int i = 1; i < kWorkersMax; ++i) workers += R"(,{"name":"w"})";
  PoolSync sync;
  EXPECT_FALSE(read("{\"workers\":[" + workers + "]}", &sync));
  const MaybeProblem p = read("{\"workers\":[" + workers + ",{}]}", &sync);
  ASSERT_TRUE(p);
  EXPECT_EQ(p->detail, "workers: more than 64");
  EXPECT_TRUE(read(R"({"workers":{}})", &sync));
  EXPECT_TRUE(read(R"({"workers":[{"host":"h"}]})", &sync));
}

}  // namespace
}  // namespace machina::test
