// The log under chance: thousands of short lives on a disk that dies, tears,
// fails, fills up or rots, each repeatable by its seed. MACHINA_LOG_SEEDS sets
// how many; a failure prints its seed.

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "tests/queue/wal/log_fixture.h"

namespace machina {
namespace {

std::uint64_t seeds(std::uint64_t usual) {
  const char* text = std::getenv("MACHINA_LOG_SEEDS");
  return text == nullptr ? usual : std::strtoull(text, nullptr, 10);
}

LogOptions swarm(SeededRandom& random) {
  LogOptions options = small_log();
  options.fsync = !random.one_in(4);
  options.direct = random.one_in(2);
  options.spares = random.one_in(2);
  options.hold = random.one_in(2);
  options.segment_bytes = (8 + random.below(40)) * 4096;
  options.first_segment_bytes = (6 + random.below(8)) * 4096;
  options.batch_bytes_max = (2 + random.below(15)) * 4096;
  return options;
}

// One step of a life. What a step does to a poisoned log is nothing.
void act(Journal& j, SeededRandom& random) {
  switch (random.below(9)) {
    case 8:
      j.log->hold(random.below(300 << 10), random.below(32 << 10));
      break;
    case 0:
      j.append(1 + random.below(5), random.below(3000));
      break;
    case 1:
      j.settle();
      break;
    case 2:
      if (!j.log->checkpointing() && j.log->durable() > 0) {
        j.log->set_history_applied(j.log->durable());
        j.checkpoint();
      }
      break;
    default:
      j.put(1 + random.below(9), random.below(2000));
  }
}

class FixedClock : public Clock {
 public:
  Millis wall_ms() override { return 1'700'000'000'000; }
  Millis mono_ms() override { return 1; }
};

struct Tally {
  int crashes = 0, torn = 0, poisoned = 0, clean = 0, stalled = 0;
};

void live(std::uint64_t seed, Tally* tally) {
  SeededRandom random(seed);
  Journal j(seed, swarm(random));
  SCOPED_TRACE("seed " + std::to_string(seed));
  for (int life = 0; life < 5; ++life) {
    // Faults: the process is killed, or the disk says no, at some operation;
    // this may well be while the log opens.
    bool kill = random.one_in(2);
    if (kill) j.disk.kill_at(j.disk.operations() + 1 + random.below(60));
    bool broken = kill;
    if (random.one_in(6)) {
      broken = true;
      j.disk.fail_sync_at(j.disk.syncs() + 1 + random.below(30));
    }
    if (random.one_in(6)) {
      broken = true;
      j.disk.fail_write_at(j.disk.writes() + 1 + random.below(30));
    }
    if (random.one_in(3))
      j.disk.set_quota(j.disk.bytes_used() + random.below(300 << 10));
    if (!j.open(j.promised)) {
      ASSERT_NE(j.error.code, Code::corrupt) << j.error.what;
      ASSERT_NE(j.error.code, Code::newer) << j.error.what;
    } else {
      ASSERT_TRUE(j.sound());
      tally->torn += j.report.dropped_bytes != 0;
      tally->clean += j.report.clean;
      for (std::uint64_t n = random.below(30); n > 0; --n) act(j, random);
      tally->poisoned += j.log->poisoned();
      tally->stalled += j.log->stalled();
      if (!broken) {
        ASSERT_FALSE(j.log->poisoned()) << j.log->poison_cause();
        if (random.one_in(2)) {  // room heals it
          j.disk.set_quota(0);
          j.settle();
          ASSERT_FALSE(j.log->stalled());
          ASSERT_EQ(j.log->durable(), j.log->appended());
        }
      }
      if (random.one_in(5) && j.log->close())
        j.safe = j.promised = j.log->appended();
    }
    ++tally->crashes;
    random.one_in(2) ? j.crash() : j.kill();
    j.disk.set_quota(0);
  }
  ASSERT_TRUE(j.open(0)) << j.error.what;
  ASSERT_TRUE(j.sound());
  // It heals: a whole life without a fault.
  ASSERT_TRUE(j.put(20, 300));
  ASSERT_TRUE(j.log->close());
  ASSERT_TRUE(j.open(0)) << j.error.what;
  ASSERT_TRUE(j.report.clean);
  ASSERT_TRUE(j.sound());
}

// Survive: whatever dies or fails, nothing promised is missing, nothing else
// turns up, and the log opens.
TEST(LogUnderChance, SurvivesKillsPowerCutsErrorsAndFullDisks) {
  Tally tally;
  std::uint64_t count = seeds(800);
  for (std::uint64_t seed = 1; seed <= count; ++seed) {
    live(seed, &tally);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
  // A run in which these never happened has tested nothing.
  EXPECT_GT(tally.torn, 0);
  EXPECT_GT(tally.poisoned, 0);
  EXPECT_GT(tally.clean, 0);
  EXPECT_GT(tally.stalled, 0);
  std::printf(
      "%d lives: %d poisoned, %d torn tails, %d clean ends, %d stalled\n",
      tally.crashes, tally.poisoned, tally.torn, tally.clean, tally.stalled);
}

// Detect: one flipped bit anywhere either changes nothing or is refused.
TEST(LogUnderChance, FlippedBitsNeverLoseARecordInSilence) {
  std::uint64_t count = seeds(500);
  int refused = 0, harmless = 0;
  for (std::uint64_t seed = 1; seed <= count; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    SeededRandom random(seed * 7919);
    Journal j(seed);
    ASSERT_TRUE(j.open());
    for (std::uint64_t n = 5 + random.below(20); n > 0; --n) {
      ASSERT_TRUE(j.put(1 + random.below(5), random.below(3000)));
      if (random.one_in(6)) {
        j.log->set_history_applied(j.log->durable());
        j.checkpoint();
      }
    }
    j.settle();  // the last batch is vouched for
    if (random.one_in(3)) {
      ASSERT_TRUE(j.log->close());
    }
    j.crash();
    auto names = j.disk.list("wal");
    std::string name;
    do {
      name = "wal/" + (*names)[random.below(names->size())];
    } while (j.disk.contents(name).empty());
    j.disk.flip(name, random.below(j.disk.contents(name).size()),
                static_cast<std::uint8_t>(1u << random.below(8)));
    if (j.open()) {
      ++harmless;
      ASSERT_TRUE(j.sound()) << name;
    } else {
      ++refused;
      ASSERT_EQ(j.error.code, Code::corrupt) << name << ": " << j.error.what;
    }
  }
  EXPECT_GT(refused, 0);
  EXPECT_GT(harmless, 0);
}

// Every operation of one whole story, each with its own power cut and kill.
TEST(LogUnderChance, DyingAtEveryOperationOfAStory) {
  for (bool power : {true, false}) {
    for (std::uint64_t at = 1;; ++at) {
      SCOPED_TRACE("operation " + std::to_string(at));
      LogOptions options = small_log();
      options.spares = true;
      options.segment_bytes = 32 << 10;
      Journal j(at, options);
      j.disk.kill_at(at);
      auto story = [&] {
        if (!j.open()) return;
        j.put(3);
        j.settle();
        for (int i = 0; i < 6 && !j.log->poisoned(); ++i) {
          j.put(3, 2500);
          j.log->set_history_applied(j.log->durable());
          if (i % 2 == 1 && !j.log->poisoned()) j.checkpoint();
        }
        if (!j.log->poisoned() && j.log->close())
          j.promised = j.log->appended();
      };
      story();
      bool died = j.disk.killed();
      power ? j.crash() : j.kill();
      ASSERT_TRUE(j.open(j.promised)) << j.error.what;
      ASSERT_TRUE(j.sound());
      ASSERT_TRUE(j.put(5, 100));
      j.crash();
      ASSERT_TRUE(j.open(j.promised)) << j.error.what;
      ASSERT_TRUE(j.sound());
      if (!died) break;
    }
  }
}

TEST(LogUnderChance, OneSeedIsOneStory) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    std::uint64_t digests[2];
    for (auto& digest : digests) {
      SeededRandom random(seed);
      Journal j(seed, swarm(random));
      FixedClock clock;
      j.options.clock = &clock;
      ASSERT_TRUE(j.open());
      for (int i = 0; i < 20 && !j.log->poisoned(); ++i) act(j, random);
      j.crash();
      digest = j.disk.digest();
    }
    EXPECT_EQ(digests[0], digests[1]) << "seed " << seed;
  }
}

}  // namespace
}  // namespace machina
