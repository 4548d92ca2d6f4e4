// tools/cli/top_view.h: two samples make a frame.

#include <gtest/gtest.h>

#include <clocale>
#include <nlohmann/json.hpp>
#include <string>

#include "tools/cli/top_view.h"

namespace machina::cli {
namespace {

using Json = nlohmann::ordered_json;

TopSample sample(std::int64_t mono_ms, int enqueued, const std::string& evil) {
  TopSample s;
  s.reached = true;
  s.where = "http://127.0.0.1:1";
  s.mono_ms = mono_ms;
  s.wall_ms = 1'700'000'010'000;
  Json stats, workers, running;
  stats = {{"version", "0.1.0" + evil},
           {"profile", "dev"},
           {"durability", "os"},
           {"uptime_ms", mono_ms},
           {"ready", true},
           {"live_jobs", 7},
           {"disk_free_bytes", 5368709120},
           {"totals",
            {{"enqueued", enqueued},
             {"succeeded", enqueued / 2},
             {"retried", 0},
             {"ended_by_code", {{"exit", 1}}},
             {"attempts_failed_by_code", {{"exit", 1}}}}},
           {"workers", {{"busy", 1}, {"configured", 2}}},
           {"log", {{"durable_lsn", enqueued}}},
           {"history", {{"lag_bytes", 0}}}};
  for (int i = 0; i < 40; ++i) {
    stats["queues"]["q" + std::to_string(i) + evil] = {
        {"ready", i},
        {"running", 1},
        {"dead", i % 2},
        {"oldest_ready_at", "2023-11-14T22:13:20.000Z"}};
  }
  for (int i = 0; i < 64; ++i) {
    workers["workers"].push_back({{"name", "w" + evil},
                                  {"state", evil},
                                  {"level", "L3"},
                                  {"job", evil},
                                  {"pid", 12345}});
    running["jobs"].push_back(
        {{"id", "01a1feeb-14bf-7000-acc8-136851631c8f"},
         {"kind", "k" + evil},
         {"queue", evil},
         {"worker", evil},
         {"attempt", 1},
         {"started_at", "2023-11-14T22:13:20.000Z"},
         {"progress", {{"percent", 50}, {"message", evil}}}});
  }
  auto text = [](const Json& json) {
    return json.dump(-1, ' ', false, Json::error_handler_t::replace);
  };
  s.stats = text(stats);
  s.workers = text(workers);
  s.running = text(running);
  return s;
}

int columns_of(const std::string& line) {
  int n = 0;
  for (unsigned char c : line) n += (c & 0xc0) != 0x80 ? 1 : 0;
  return n;
}

// T1
TEST(Top, AFrameFitsWhateverTheTerminal) {
  TopSample before = sample(1000, 100, ""), now = sample(2000, 300, "");
  for (int rows : {1, 2, 5, 8, 24, 50, 500}) {
    for (int columns : {1, 2, 10, 40, 80, 200}) {
      auto lines = top_frame(now, &before, {rows, columns, false});
      EXPECT_LE(static_cast<int>(lines.size()), rows);
      for (const auto& line : lines) {
        EXPECT_LE(columns_of(line), columns) << rows << "x" << columns;
      }
    }
  }
}

TEST(Top, ShowsRatesQueuesWorkersAndJobsAt80x24) {
  TopSample before = sample(1000, 100, ""), now = sample(2000, 300, "");
  std::string all;
  for (const auto& line : top_frame(now, &before, {24, 80, false})) {
    all += line + "\n";
  }
  EXPECT_NE(all.find("enqueue 200/s"), all.npos) << all;
  EXPECT_NE(all.find("done 100/s"), all.npos) << all;
  EXPECT_NE(all.find("q39 "), all.npos) << "the busiest queue first\n" << all;
  EXPECT_NE(all.find("... 37 more"), all.npos) << all;
  EXPECT_NE(all.find("01a1feeb-14bf-7000-acc8-136851631c8f"), all.npos) << all;
  EXPECT_NE(all.find("10.0s"), all.npos) << all;
  EXPECT_NE(all.find("disk 5.0 GiB"), all.npos) << all;
  EXPECT_EQ(all.find('\x1b'), all.npos) << "no colour was asked for";
}

TEST(Top, F05_ALowDiskHasALineOfItsOwn) {
  TopSample now = sample(2000, 300, "");
  auto shown = [&](const Json& disk) {
    Json stats = Json::parse(now.stats);
    stats["disk"] = disk;
    now.stats = stats.dump();
    std::string all;
    for (const auto& line : top_frame(now, nullptr, {24, 80, false})) {
      all += line + "\n";
    }
    return all;
  };
  EXPECT_EQ(shown({{"level", "ok"}}).find("make room"), std::string::npos);
  const std::string low = shown({{"level", "hard"},
                                 {"soft_bytes", 268435456},
                                 {"hard_bytes", 67108864},
                                 {"says", "only ends"}});
  EXPECT_NE(low.find("disk hard: make room; new jobs need 256 MiB free, "
                     "leases 64.0 MiB"),
            std::string::npos)
      << low;
}

// T2
TEST(Top, HostileTextMovesNoCursor) {
  ASSERT_NE(std::setlocale(LC_CTYPE, "C.UTF-8"), nullptr);
  const std::string evil =
      "\x1b[2J\x1b]0;owned\x07\r\n\x9b\xc2\x9b\x7f\xff\xe2\x80\xae\xed\x95\x9c";
  for (bool color : {false, true}) {
    TopSample now = sample(2000, 300, evil);
    for (const auto& line : top_frame(now, nullptr, {100, 120, color})) {
      std::string rest = line;
      for (const char* ours : {"\x1b[1m", "\x1b[31;1m", "\x1b[7m", "\x1b[0m"}) {
        for (auto at = rest.find(ours); at != rest.npos; at = rest.find(ours)) {
          ASSERT_TRUE(color);
          rest.erase(at, std::string(ours).size());
        }
      }
      for (unsigned char c : rest) EXPECT_TRUE(c >= 0x20 && c != 0x7f) << line;
      EXPECT_EQ(rest.find("\xc2\x9b"), rest.npos);
      EXPECT_EQ(rest.find("\xe2\x80\xae"), rest.npos) << "turns text around";
    }
  }
}

// Whatever a worker of somebody's says of its progress.
TEST(Top, APercentageIsOne) {
  TopSample now = sample(2000, 300, "");
  for (const auto& [said, shown] :
       std::vector<std::pair<Json, std::string>>{{-5, " 0% "},
                                                 {0, " 0% "},
                                                 {33, " 33% "},
                                                 {100, " 100% "},
                                                 {101, " 100% "},
                                                 {1e300, " 100% "},
                                                 {-1e300, " 0% "}}) {
    Json running = Json::parse(now.running);
    running["jobs"] = Json::array({running["jobs"][0]});
    running["jobs"][0]["progress"] = {{"percent", said}, {"message", "so far"}};
    now.running = running.dump();
    std::string all;
    for (const auto& line : top_frame(now, nullptr, {50, 160, false})) {
      all += line + "\n";
    }
    EXPECT_NE(all.find(shown + "so far"), all.npos) << said << "\n" << all;
  }
}

// T3
TEST(Top, ARestartedServerShowsNoRate) {
  TopSample before = sample(100'000, 5000, ""), now = sample(101'000, 5, "");
  auto up = [&](int ms) {
    Json stats = Json::parse(now.stats);
    stats["uptime_ms"] = ms;
    now.stats = stats.dump();
  };
  up(10);
  auto lines = top_frame(now, &before, {24, 80, false});
  ASSERT_GT(lines.size(), 2u);
  EXPECT_NE(lines[1].find("enqueue -"), std::string::npos) << lines[1];
  up(200'000);  // the same run, and a counter that fell
  EXPECT_NE(top_frame(now, &before, {24, 80, false})[1].find("enqueue -"),
            std::string::npos);
}

TEST(Top, WhatIsNotThereIsNoFault) {
  for (const Json& odd : {Json(), Json(1), Json("x"), Json::array({1, 2}),
                          Json{{"queues", 3}, {"totals", "x"}},
                          Json{{"queues", {{"q", 1}}}, {"log", {1, 2}}}}) {
    TopSample now;
    now.reached = true;
    now.stats = now.running = odd.dump();
    now.workers = Json{{"workers", odd}}.dump();
    EXPECT_FALSE(top_frame(now, &now, {24, 80, true}).empty());
    EXPECT_TRUE(Json::parse(top_json(now, &now)).is_object());
  }
}

TEST(Top, AwayServerSaysSoAndKeepsWhatWasSeen) {
  TopSample now = sample(2000, 300, "");
  now.reached = false;
  now.why = "connection refused";
  auto lines = top_frame(now, nullptr, {24, 80, false});
  EXPECT_EQ(lines[1], "reconnecting: connection refused");
  EXPECT_GT(lines.size(), 10u);
}

TEST(Top, QuantilesAreOfWhatWasCountedBetween) {
  auto now = read_histograms(
      "# TYPE a_seconds histogram\n"
      "a_seconds_bucket{kind=\"x\",le=\"0.1\"} 10\n"
      "a_seconds_bucket{kind=\"x\",le=\"1\"} 20\n"
      "a_seconds_bucket{kind=\"x\",le=\"+Inf\"} 20\n"
      "a_seconds_bucket{kind=\"y\",le=\"0.1\"} 10\n"
      "a_seconds_bucket{kind=\"y\",le=\"1\"} 10\n"
      "a_seconds_bucket{kind=\"y\",le=\"+Inf\"} 10\n"
      "a_seconds_sum{kind=\"x\"} 3\n")["a_seconds"];
  EXPECT_EQ(now.count, 30);
  EXPECT_NEAR(quantile(now, nullptr, 0.5), 0.075, 1e-9);
  TopHistogram before = now;
  EXPECT_LT(quantile(now, &before, 0.5), 0) << "nothing in between";
  now.upto[1] += 10;
  now.count += 10;
  EXPECT_NEAR(quantile(now, &before, 0.5), 0.55, 1e-9);
}

}  // namespace
}  // namespace machina::cli
