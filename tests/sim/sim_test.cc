// Seeds of tests/sim/world.h: a fixed number at least, however slow the machine
// is, and then as many as fit into the time given. On a failure the seed is
// printed; MACHINA_SIM_SEED=<n> runs it alone. MACHINA_SIM_SEEDS and
// MACHINA_SIM_MINUTES run more (tests/sim/run).

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/sim/world.h"

namespace machina::sim {
namespace {

std::uint64_t variable(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

bool seeds_are_chosen() {
  return variable("MACHINA_SIM_SEED", 0) || variable("MACHINA_SIM_SEEDS", 0);
}

// A CHECK aborts: say which seed it was.
char current[64];
void say_seed(int) {
  [[maybe_unused]] auto n = ::write(2, current, std::strlen(current));
}

std::string run_seed(std::uint64_t seed, void (World::*mode)(), Planted planted,
                     Tally* tally) {
  std::snprintf(current, sizeof(current), "\nMACHINA_SIM_SEED=%llu\n",
                static_cast<unsigned long long>(seed));
  World world(seed, planted);
  std::string wrong;
  try {
    (world.*mode)();
  } catch (const Wrong& e) {
    wrong = e.what();
  }
  tally->add(world.tally());
  return wrong;
}

// At least `least` seeds, unless fewer were asked for, and all of `seconds`.
Tally run_all(const char* what, void (World::*mode)(), std::uint64_t least,
              double seconds) {
  std::signal(SIGABRT, say_seed);
  std::uint64_t only = variable("MACHINA_SIM_SEED", 0);
  std::uint64_t first = only ? only : variable("MACHINA_SIM_FIRST", 1);
  std::uint64_t count = only ? 1 : variable("MACHINA_SIM_SEEDS", 1'000'000);
  std::uint64_t minutes = variable("MACHINA_SIM_MINUTES", 0);
  if (minutes) seconds = 60.0 * static_cast<double>(minutes);
  Tally tally;
  auto start = std::chrono::steady_clock::now();
  auto elapsed = [start] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() -
                                         start)
        .count();
  };
  least = std::min(least, count);
  std::uint64_t seed = first;
  for (; seed < first + count; ++seed) {
    if (seed >= first + least && elapsed() >= seconds) break;
    std::string wrong = run_seed(seed, mode, kNothingPlanted, &tally);
    EXPECT_EQ(wrong, "") << "MACHINA_SIM_SEED=" << seed;
    if (!wrong.empty()) return tally;
  }
  std::printf("%s: seeds %llu..%llu in %.1f s: %s\n", what,
              static_cast<unsigned long long>(first),
              static_cast<unsigned long long>(seed - 1), elapsed(),
              tally.text().c_str());
  EXPECT_GE(seed, first + least);
  return tally;
}

// What CI runs also on the slowest machine; in so many seeds everything that
// can go wrong does.
constexpr std::uint64_t kSurviveSeeds = 60, kDetectSeeds = 40;

TEST(Sim, F31_SurvivesWhatItMustSurvive) {
  const Tally seen = run_all("survive", &World::survive, kSurviveSeeds, 14);
  if (HasFailure() || seeds_are_chosen()) return;
  EXPECT_GT(seen.crashes, 0u);
  EXPECT_GT(seen.cuts, 0u);
  EXPECT_GT(seen.torn, 0u);
  EXPECT_GT(seen.poisoned, 0u);
  EXPECT_GT(seen.checkpoints, 0u);
  EXPECT_GT(seen.duplicates, 0u);
  EXPECT_GT(seen.stale, 0u);
  EXPECT_GT(seen.drained, 0u);
}

TEST(Sim, F31_DetectsDamageToWhatWasDurable) {
  const Tally seen = run_all("detect", &World::detect, kDetectSeeds, 7);
  if (HasFailure() || seeds_are_chosen()) return;
  EXPECT_GT(seen.flips, 0u);
  EXPECT_GT(seen.refused, 0u);
}

TEST(Sim, OneSeedIsOneRun) {
  for (std::uint64_t seed : {11, 12, 13}) {
    Tally a, b;
    EXPECT_EQ(run_seed(seed, &World::survive, kNothingPlanted, &a), "");
    EXPECT_EQ(run_seed(seed, &World::survive, kNothingPlanted, &b), "");
    EXPECT_EQ(a.text(), b.text());
  }
}

// The measure of the simulation: bugs it must find, and in how many seeds.
class Planting : public ::testing::TestWithParam<Planted> {};

TEST_P(Planting, IsFound) {
  Tally tally;
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    std::string wrong = run_seed(seed, &World::survive, GetParam(), &tally);
    if (wrong.empty()) continue;
    std::printf("found by seed %llu: %s\n",
                static_cast<unsigned long long>(seed), wrong.c_str());
    return;
  }
  FAIL() << "2000 seeds did not find it";
}

std::string title(const ::testing::TestParamInfo<Planted>& planted) {
  switch (planted.param) {
    case kForgetsToSync:
      return "NoSegmentSync";
    case kForgetsCheckpointSync:
      return "NoCheckpointSync";
    case kForgetsDirSync:
      return "NoDirectorySync";
    case kAnswersEarly:
      return "AnswersBeforeSync";
    default:
      return "FencesWithoutEpoch";
  }
}

INSTANTIATE_TEST_SUITE_P(Sim, Planting,
                         ::testing::Values(kForgetsToSync,
                                           kForgetsCheckpointSync,
                                           kForgetsDirSync, kAnswersEarly,
                                           kForgetsEpoch),
                         title);

}  // namespace
}  // namespace machina::sim
