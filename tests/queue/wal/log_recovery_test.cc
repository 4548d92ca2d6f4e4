// What the log does about a disk that lost, tore, damaged or refused something.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "queue/base/crc32c.h"
#include "queue/base/little_endian.h"
#include "queue/wal/checkpoint.h"
#include "queue/wal/manifest.h"
#include "queue/wal/recovery.h"
#include "tests/queue/wal/log_fixture.h"

namespace machina {
namespace {

using ::testing::HasSubstr;

std::vector<std::byte> zeros(std::size_t n) {
  return std::vector<std::byte>(n);
}

LogOptions unsynced_log() {
  LogOptions options = small_log();
  options.fsync = false;
  return options;
}

TEST(Judge, RefusesOnlyWhatSomebodyVouchedFor) {
  EXPECT_EQ(judge(5, 4, false), TailVerdict::whole);
  EXPECT_EQ(judge(5, 4, true), TailVerdict::torn);
  EXPECT_EQ(judge(5, 5, true), TailVerdict::damaged);
  EXPECT_EQ(judge(5, 9, false), TailVerdict::damaged);
}

TEST(Recovery, HoleThenValidTailIsDroppedWithFsyncOff) {
  Journal j(1, unsynced_log());
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(j.put(2));
  std::string name = j.segments()[0];
  j.kill();
  j.disk.overwrite(name, j.batch_at(name, 1), zeros(4096));  // lsn 3, 4
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_TRUE(is_run(j.replayed, 1, 2));
  EXPECT_EQ(j.report.dropped_from, 3u);
  EXPECT_EQ(j.report.dropped_bytes, 2 * 4096u) << "two whole batches behind";
}

TEST(Recovery, HoleThenValidTailIsDamageWithFsyncOn) {
  Journal j;
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(j.put(2));
  std::string name = j.segments()[0];
  j.kill();
  j.disk.overwrite(name, j.batch_at(name, 1), zeros(4096));
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr("lsn 3..6"));
}

TEST(Recovery, DroppedBatchesDoNotRiseAgain) {
  Journal j(1, unsynced_log());
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(j.put(2));
  std::string name = j.segments()[0];
  std::uint64_t hole = j.batch_at(name, 1);
  auto bytes = j.disk.contents(name);
  j.kill();
  j.disk.overwrite(name, hole, zeros(4096));
  ASSERT_TRUE(j.open());
  j.promised = 2;
  ASSERT_TRUE(j.put(2));  // a new lsn 3 and 4, elsewhere
  // The bait: the lost batch is back, and old lsn 5 follows it.
  j.disk.overwrite(name, hole, std::span(bytes).subspan(hole, 4096));
  j.kill();
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_EQ(j.report.last, 4u);
  EXPECT_TRUE(j.sound());
}

TEST(Recovery, SegmentsBehindATornOneAreCutOffForGood) {
  Journal j(1, unsynced_log());
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 40; ++i) ASSERT_TRUE(j.put(2, 2000));
  auto names = j.segments();
  ASSERT_GE(names.size(), 2u);
  j.kill();
  j.disk.overwrite(names[0], j.batch_at(names[0], 1), zeros(4096));
  ASSERT_TRUE(j.open()) << j.error.what;
  j.promised = 2;
  EXPECT_EQ(j.report.last, 2u);
  EXPECT_EQ(j.segments().size(), 2u) << "the first, and a fresh one";
  for (int i = 0; i < 30; ++i) ASSERT_TRUE(j.put(2, 2000));
  j.kill();
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_EQ(j.report.last, 62u);
  EXPECT_TRUE(j.sound());
}

TEST(Recovery, W4ASegmentThatRecoveryReadIsNeverWrittenAgain) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(3));
  ASSERT_TRUE(j.append(5));
  j.disk.fail_write_at(j.disk.writes() + 1);
  j.write();
  j.crash();
  std::string name = j.segments()[0];
  auto before = j.disk.contents(name);
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(20));
  j.settle();
  EXPECT_EQ(j.disk.contents(name), before);
  EXPECT_EQ(j.segments().size(), 2u);
}

TEST(Recovery, FreshSegmentHasAnotherSaltAndAHigherEpoch) {
  Journal j;
  std::uint32_t epoch = 0;
  std::uint64_t salt = 0;
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(j.open());
    EXPECT_GT(j.log->writer_epoch(), epoch) << "never the same twice";
    epoch = j.log->writer_epoch();
    ASSERT_TRUE(j.put(1));
    auto header = decode_segment_headers(j.disk.contents(j.segments().back()));
    EXPECT_NE(header->salt, salt);
    EXPECT_EQ(header->writer_epoch, epoch);
    salt = header->salt;
    i % 2 ? j.crash() : j.kill();
  }
}

TEST(Recovery, EpochRisesEvenIfThatStartDiedAtOnce) {
  Journal j;
  ASSERT_TRUE(j.open());
  std::uint32_t epoch = j.log->writer_epoch();
  j.crash();
  for (int i = 1; i < 40; ++i) {
    j.disk.kill_at(j.disk.operations() + i);
    if (j.open()) {
      EXPECT_GT(j.log->writer_epoch(), epoch);
      epoch = j.log->writer_epoch();
    }
    j.crash();
  }
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_GT(j.log->writer_epoch(), epoch);
}

TEST(Recovery, IdleVouchingBatchTellsRotOfTheLastBatch) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  ASSERT_TRUE(j.put(2));
  j.settle();  // idle: an empty batch vouches for lsn 4
  std::string name = j.segments()[0];
  std::uint64_t writes = j.disk.writes();
  j.settle();
  EXPECT_EQ(j.disk.writes(), writes) << "one vouches for all; it is not lonely";
  j.disk.flip(name, j.batch_at(name, 1) + 90);
  j.crash();
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr("lsn 3..4"));
}

TEST(Recovery, WithoutItRotOfTheLastBatchLooksLikeTearing) {
  // The ambiguity that docs/wal-format.md admits.
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  ASSERT_TRUE(j.put(2));
  std::string name = j.segments()[0];
  j.disk.flip(name, j.batch_at(name, 1) + 90);
  j.crash();
  ASSERT_TRUE(j.open());
  EXPECT_EQ(j.report.last, 2u);
}

TEST(Recovery, CleanMarkVouchesForTheLastBatch) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(4));
  ASSERT_TRUE(j.log->close());
  std::string name = j.segments()[0];
  j.disk.flip(name, j.batch_at(name, 0) + 90);
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr("lsn 1..4"));
}

TEST(Recovery, WriteThatTheDiskLostIsNoticed) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  j.disk.lose_write_at(j.disk.writes() + 1);
  ASSERT_TRUE(j.put(2));
  ASSERT_TRUE(j.put(2));
  j.crash();
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
}

TEST(Recovery, RecoveringTwiceGivesTheSame) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(9));
  ASSERT_TRUE(j.append(9));
  j.disk.fail_write_at(j.disk.writes() + 1);
  j.write();
  j.crash();
  ASSERT_TRUE(j.open());
  auto first = j.report.last;
  for (int i = 0; i < 4; ++i) {
    j.crash();
    ASSERT_TRUE(j.open()) << j.error.what;
    EXPECT_EQ(j.report.last, first);
    EXPECT_EQ(j.segments().size(), 2u) << "no trail of empty segments";
  }
}

// --- poison (W5) ---

TEST(Poison, FailedWriteStopsAllSuccess) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  ASSERT_TRUE(j.append(2));
  j.disk.fail_write_at(j.disk.writes() + 1);
  j.write();
  EXPECT_TRUE(j.log->poisoned());
  EXPECT_THAT(j.log->poison_cause(), HasSubstr("injected EIO"));
  EXPECT_EQ(j.log->durable(), 2u);
  Record record = numbered(9);
  auto refused = j.log->append(&record);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::io);
  EXPECT_FALSE(j.log->close());
  EXPECT_EQ(j.log->durable(), 2u);
}

TEST(Poison, FailedSyncIsNotTriedAgain) {
  LogOptions options = small_log();
  options.direct = false;
  Journal j(1, options);
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  ASSERT_TRUE(j.append(2));
  j.disk.fail_sync_at(j.disk.syncs() + 1);
  j.write();
  EXPECT_TRUE(j.log->poisoned());
  std::uint64_t syncs = j.disk.syncs();
  j.settle();
  EXPECT_FALSE(j.log->close());
  EXPECT_EQ(j.disk.syncs(), syncs);
  EXPECT_EQ(j.log->durable(), 2u);
  j.crash();
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_TRUE(j.sound());
}

TEST(Poison, F05_AFullDiskIsNoPoisonAndNothingAcknowledgedIsLost) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    Journal j(seed);
    ASSERT_TRUE(j.open());
    ASSERT_TRUE(j.put(3));
    j.disk.set_quota(j.disk.bytes_used() + seed * 3000);
    for (int i = 0; i < 1000 && !j.log->stalled(); ++i) {
      ASSERT_TRUE(j.put(2, 700));
    }
    EXPECT_TRUE(j.log->stalled());
    EXPECT_FALSE(j.log->poisoned()) << j.log->poison_cause();
    j.crash();
    j.disk.set_quota(0);
    ASSERT_TRUE(j.open()) << j.error.what;
    EXPECT_TRUE(j.sound());
  }
}

TEST(Poison, FailureAtTheRollOrInACheckpointPoisonsToo) {
  int poisoned = 0;
  for (int nth = 1; nth <= 12; ++nth) {
    Journal j(nth);
    ASSERT_TRUE(j.open());
    ASSERT_TRUE(j.put(3));
    j.disk.fail_sync_at(j.disk.syncs() + nth);
    for (int i = 0; i < 30 && j.put(2, 2000); ++i) {
    }
    if (!j.log->poisoned()) j.checkpoint();
    poisoned += j.log->poisoned();
    j.crash();
    ASSERT_TRUE(j.open()) << j.error.what;
    EXPECT_TRUE(j.sound());
  }
  EXPECT_GT(poisoned, 5);
}

// --- what is missing, damaged, foreign or newer ---

TEST(Refusal, MissingManifestWithSegmentsIsDamage) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  j.crash();
  ASSERT_TRUE(j.disk.remove("wal/MANIFEST"));
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr("wal/MANIFEST"));
}

TEST(Refusal, MissingSegmentIsDamage) {
  Journal j;
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(j.put(2, 2000));
  auto names = j.segments();
  ASSERT_GE(names.size(), 3u);
  j.crash();
  ASSERT_TRUE(j.disk.remove(names[1]));
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr("in no segment"));
  for (const auto& name : j.segments()) ASSERT_TRUE(j.disk.remove(name));
  ASSERT_FALSE(j.open()) << "not a new, empty log";
  EXPECT_EQ(j.error.code, Code::corrupt);
}

TEST(Refusal, OneBadCopyOfAHeaderIsSurvivedTwoAreDamage) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  std::string segment = j.segments()[0];
  j.kill();
  for (std::string name : {segment, std::string("wal/MANIFEST")}) {
    j.disk.flip(name, 50);
    ASSERT_TRUE(j.open()) << j.error.what;
    EXPECT_TRUE(j.sound());
    j.kill();
  }
  j.disk.flip(segment, 4096 + 50);
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr(segment));
  j.disk.flip(segment, 4096 + 50);
  for (std::uint64_t copy : {0, 4096}) j.disk.flip("wal/MANIFEST", copy + 60);
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr("wal/MANIFEST"));
}

TEST(Refusal, LaterFormatsAreRefusedAndNotCalledDamage) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(2));
  std::string segment = j.segments()[0];
  j.kill();
  // A feature bit, properly checksummed, in both copies.
  auto with_bit = [&](const std::string& name, std::size_t at) {
    auto bytes = j.disk.contents(name);
    for (std::size_t copy : {0, 4096}) {
      bytes[copy + at] |= std::byte{128};
      std::uint32_t crc = crc32c(0, std::span(bytes).subspan(copy, 4092));
      put(bytes.data() + copy + 4092, crc);
    }
    return bytes;
  };
  for (std::string name : {segment, std::string("wal/MANIFEST")}) {
    for (std::size_t at : {std::size_t{16}, std::size_t{10}}) {
      auto before = j.disk.contents(name);
      j.disk.overwrite(name, 0, with_bit(name, at));
      ASSERT_FALSE(j.open());
      EXPECT_EQ(j.error.code, Code::newer) << j.error.what;
      EXPECT_THAT(j.error.what, HasSubstr(name));
      j.disk.overwrite(name, 0, before);
    }
  }
  EXPECT_TRUE(j.open()) << j.error.what;
}

TEST(Refusal, SegmentOfAnotherLogIsRefused) {
  Journal a(1), b(2);
  ASSERT_TRUE(a.open());
  ASSERT_TRUE(b.open());
  ASSERT_TRUE(a.put(2));
  ASSERT_TRUE(b.put(2));
  std::string name = a.segments()[0];
  a.kill();
  a.disk.overwrite(name, 0, b.disk.contents(name));
  ASSERT_FALSE(a.open());
  EXPECT_EQ(a.error.code, Code::corrupt);
  EXPECT_THAT(a.error.what, HasSubstr("another log"));
}

TEST(Refusal, SecondOpenerIsRefused) {
  Journal j;
  ASSERT_TRUE(j.open());
  auto first = std::move(j.log);
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::conflict);
}

// --- checkpoints ---

TEST(Checkpoint, ReplayBeginsBehindItOrAtReplayFrom) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(10));
  j.checkpoint();
  ASSERT_TRUE(j.put(5));
  j.crash();
  ASSERT_TRUE(j.open(100));
  EXPECT_EQ(j.loaded, 10u);
  EXPECT_TRUE(is_run(j.replayed, 11, 15));
  j.crash();
  ASSERT_TRUE(j.open(7)) << "history is behind: it gets its records";
  EXPECT_EQ(j.loaded, 10u);
  EXPECT_TRUE(is_run(j.replayed, 8, 15));
  EXPECT_EQ(j.report.first_visited, 8u);
}

TEST(Checkpoint, BadNewestFallsBackToTheOlderAndTheLog) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(10));
  j.checkpoint();
  ASSERT_TRUE(j.put(10, 3000));
  j.checkpoint();
  ASSERT_TRUE(j.put(10, 3000));
  j.crash();
  j.disk.flip(checkpoint_name(20), 700);
  ASSERT_TRUE(j.open(1000)) << j.error.what;
  EXPECT_EQ(j.loaded, 10u);
  EXPECT_TRUE(j.report.checkpoint_fell_back);
  EXPECT_TRUE(is_run(j.replayed, 11, 30));
  j.checkpoint();
  j.crash();
  ASSERT_TRUE(j.open(1000)) << j.error.what;
  EXPECT_EQ(j.loaded, 30u);
}

TEST(Checkpoint, TheOnlyOneBadMeansReplayFromTheFirstRecord) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(60, 3000));
  j.log->set_history_applied(60);
  j.checkpoint();
  ASSERT_TRUE(j.put(3));
  j.crash();
  j.disk.flip(checkpoint_name(60), 10);
  ASSERT_TRUE(j.open(1000)) << j.error.what;
  EXPECT_EQ(j.loaded, 0u);
  EXPECT_TRUE(is_run(j.replayed, 1, 63));
}

TEST(Checkpoint, BothBadIsDamage) {
  Journal j;
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(j.put(10));
    j.checkpoint();
  }
  j.crash();
  j.disk.flip(checkpoint_name(20), 700);
  j.disk.flip(checkpoint_name(10), 700);
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::corrupt);
  EXPECT_THAT(j.error.what, HasSubstr(checkpoint_name(20)));
}

TEST(Checkpoint, TwoGenerationsAreKeptAndNoMore) {
  Journal j;
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(j.put(10));
    j.checkpoint();
  }
  EXPECT_FALSE(j.disk.exists(checkpoint_name(30)));
  EXPECT_TRUE(j.disk.exists(checkpoint_name(40)));
  EXPECT_TRUE(j.disk.exists(checkpoint_name(50)));
}

TEST(Checkpoint, CrashAtEveryStepLeavesOneThatCounts) {
  for (std::uint64_t step = 1; step <= 24; ++step) {
    Journal j(step);
    ASSERT_TRUE(j.open());
    for (int i = 0; i < 3; ++i) {
      ASSERT_TRUE(j.put(30, 2000));
      j.log->set_history_applied(j.log->durable());
      if (i == 2) j.disk.kill_at(j.disk.operations() + step);
      j.checkpoint();
    }
    j.crash();
    ASSERT_TRUE(j.open(1000)) << step << ": " << j.error.what;
    EXPECT_TRUE(j.sound()) << step;
    EXPECT_GE(j.loaded, 60u);
  }
}

TEST(Segments, RemovedOnlyBelowTheOlderCheckpointHistoryAndPins) {
  LogOptions options = small_log();
  options.segment_bytes = options.first_segment_bytes;
  Journal j(1, options);
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(60, 3000));
  std::size_t before = j.segments().size();
  ASSERT_GE(before, 6u);
  auto pinned = j.places[1];
  j.log->need(pinned.first, +1);

  j.checkpoint();
  ASSERT_TRUE(j.put(1));
  j.log->set_history_applied(30);
  j.settle();
  EXPECT_GE(j.segments().size(), before) << "one checkpoint is not two";

  j.checkpoint();  // the older is at 60
  auto names = j.segments();
  EXPECT_LT(names.size(), before);
  EXPECT_EQ(names[0], segment_name(1)) << "pinned";
  EXPECT_TRUE(j.log->read(j.places[31].first, j.places[31].second))
      << "history has yet to take it";

  j.log->set_history_applied(61);
  j.settle();
  EXPECT_EQ(j.segments()[0], segment_name(1));
  auto gone = j.log->read(j.places[31].first, j.places[31].second);
  ASSERT_FALSE(gone);
  EXPECT_EQ(gone.error().code, Code::not_found);

  // A pinned segment stays, and its places hold, across restarts (W6).
  j.crash();
  ASSERT_TRUE(j.open(1000)) << j.error.what;
  EXPECT_TRUE(j.log->read(pinned.first, pinned.second));
  j.log->need(pinned.first, +1);
  j.log->set_history_applied(1000);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(j.put(1));
    j.checkpoint();
  }
  EXPECT_TRUE(j.log->read(pinned.first, pinned.second));
  j.log->need(pinned.first, -1);
  ASSERT_TRUE(j.put(1));
  j.checkpoint();
  EXPECT_FALSE(j.disk.exists(segment_name(1)));
  j.crash();
  ASSERT_TRUE(j.open(1000)) << j.error.what;
  EXPECT_TRUE(j.sound());
}

TEST(Segments, NothingIsRemovedBeforeACheckpointOfThisStart) {
  Journal j;
  ASSERT_TRUE(j.open());
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(j.put(40, 3000));
    j.checkpoint();
  }
  j.crash();
  ASSERT_TRUE(j.open(1000));
  std::size_t before = j.segments().size();
  j.log->set_history_applied(80);  // pins may not have been told yet
  j.settle();
  EXPECT_EQ(j.segments().size(), before);
}

TEST(Segments, W6PlacesHoldAcrossStartsAndRolls) {
  Journal j;
  ASSERT_TRUE(j.open());
  for (int start = 0; start < 4; ++start) {
    for (int i = 0; i < 15; ++i) ASSERT_TRUE(j.put(3, 900));
    start % 2 ? j.crash() : j.kill();
    ASSERT_TRUE(j.open()) << j.error.what;
    for (const Record& record : j.replayed)
      EXPECT_EQ(record.place, j.places[record.lsn].first);
  }
  for (const auto& [lsn, where] : j.places) {
    auto got = j.log->read(where.first, where.second);
    ASSERT_TRUE(got) << got.error().what;
    auto record = decode(got->first, got->second);
    ASSERT_TRUE(record);
    EXPECT_EQ(number_of(*record), lsn);
  }
}

TEST(Segments, ReadFindsARottenBody) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(3, 500));
  auto [place, bytes] = j.places[2];
  std::string name = j.segments()[0];
  auto header = decode_segment_headers(j.disk.contents(name));
  j.disk.flip(name, place - header->base + 40);
  auto got = j.log->read(place, bytes);
  ASSERT_FALSE(got);
  EXPECT_EQ(got.error().code, Code::corrupt);
  EXPECT_FALSE(j.log->read(place + 8, bytes)) << "a place that is none";
  EXPECT_FALSE(j.log->read(place, bytes - 1));
  EXPECT_FALSE(j.log->read(1ull << 60, bytes));
}

LogOptions holding_log(bool fsync = true) {
  LogOptions options = small_log();
  options.hold = true;
  options.fsync = fsync;
  options.spares = fsync;
  return options;
}

// What is held is enough for what it was held for, to the last byte of the
// disk; beyond that the log waits for room and goes on where it stood.
TEST(FullDisk, F05_HeldRoomTakesWhatItWasHeldForAndThenTheLogWaits) {
  for (bool fsync : {true, false}) {
    for (bool direct : {true, false}) {
      LogOptions options = holding_log(fsync);
      options.direct = direct;
      Journal j(7, options);
      ASSERT_TRUE(j.open());
      j.log->hold(200 << 10, 16 << 10);
      j.settle();
      ASSERT_FALSE(j.log->lacking());
      ASSERT_GE(j.log->room().held, 200u << 10);
      ASSERT_TRUE(j.put(3));
      j.disk.set_quota(j.disk.bytes_used());
      std::uint64_t written = 0;
      while (j.log->fits(3000, 0)) {
        ASSERT_TRUE(j.put(1, 2500));
        ASSERT_FALSE(j.log->stalled()) << "room that was said to be there";
        written += 2500;
      }
      EXPECT_GE(written, 100u << 10);
      EXPECT_FALSE(j.log->poisoned()) << j.log->poison_cause();
      for (int i = 0; i < 200 && !j.log->stalled(); ++i) j.put(1, 2500);
      ASSERT_TRUE(j.log->stalled());
      EXPECT_FALSE(j.log->poisoned());
      EXPECT_FALSE(j.log->room().why.empty());
      ASSERT_TRUE(j.append(2));
      Lsn told = j.log->durable();
      ASSERT_LT(told, j.log->appended());
      EXPECT_FALSE(j.log->fits(1, 0));
      j.disk.set_quota(0);
      j.settle();
      EXPECT_FALSE(j.log->stalled());
      EXPECT_EQ(j.log->durable(), j.log->appended());
      j.log->hold(200 << 10, 16 << 10);
      j.settle();
      EXPECT_FALSE(j.log->lacking()) << j.log->room().why;
      j.kill();
      ASSERT_TRUE(j.open()) << j.error.what;
      EXPECT_TRUE(j.sound());
    }
  }
}

TEST(FullDisk, F05_OneCheckpointFindsRoomTheNextWaitsAndNothingIsPoisoned) {
  Journal j(8, holding_log());
  ASSERT_TRUE(j.open());
  j.log->hold(64 << 10, 16 << 10);
  j.settle();
  ASSERT_TRUE(j.put(5));
  j.disk.set_quota(j.disk.bytes_used());
  j.checkpoint();
  EXPECT_EQ(j.log->checkpointed(), 5u);
  j.log->hold(64 << 10, 1 << 20);  // more than there is
  j.settle();
  EXPECT_TRUE(j.log->lacking());
  ASSERT_TRUE(j.put(5));
  j.checkpoint();
  EXPECT_FALSE(j.log->checkpointing());
  EXPECT_FALSE(j.log->poisoned()) << j.log->poison_cause();
  Lsn made = j.log->checkpointed();
  j.disk.set_quota(0);
  ASSERT_TRUE(j.put(1));
  j.log->hold(64 << 10, 1 << 20);
  j.settle();
  EXPECT_FALSE(j.log->lacking());
  j.checkpoint();
  EXPECT_EQ(j.log->checkpointed(), 11u);
  EXPECT_GE(j.log->checkpointed(), made);
  j.crash();
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_TRUE(j.sound());
}

// Not even a clean end gives the room away: somebody else might take it.
TEST(FullDisk, F05_AStartOnAFullDiskHasTheRoomThatWasHeld) {
  for (int how = 0; how < 3; ++how) {
    Journal j(9, holding_log(how != 1));
    ASSERT_TRUE(j.open());
    j.log->hold(300 << 10, 16 << 10);
    j.settle();
    ASSERT_TRUE(j.put(5));
    j.checkpoint();
    if (how == 2) {
      ASSERT_TRUE(j.log->close());
    }
    j.disk.set_quota(j.disk.bytes_used());
    j.kill();
    for (int start = 0; start < 3; ++start) {
      ASSERT_TRUE(j.open()) << j.error.what;
      EXPECT_TRUE(j.sound());
      EXPECT_TRUE(j.log->fits(20 << 10, 0)) << "start " << start;
      ASSERT_TRUE(j.put(1, 2500));
      EXPECT_FALSE(j.log->stalled());
      j.kill();
    }
  }
}

// A file that was made and got no blocks: the end came in between, or the disk
// refused them. The kernel refuses to allocate nothing.
TEST(FullDisk, F05_AStartPassesOverHeldFilesWithoutBlocks) {
  Journal j(12, holding_log());
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(5));
  j.kill();
  for (const char* name :
       {"wal/checkpoint-room.tmp", "wal/held-90.tmp", "wal/spare-91.tmp"}) {
    (void)j.disk.remove(name);
    ASSERT_TRUE(j.disk.open(name, OpenMode::create));
  }
  j.disk.set_quota(j.disk.bytes_used() + (1 << 20));
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_TRUE(j.sound());
  j.log->hold(64 << 10, 16 << 10);
  j.settle();
  EXPECT_FALSE(j.log->lacking()) << j.log->room().why;
  ASSERT_TRUE(j.put(1));
}

// Where a unit is as large as a spare (a small file system) as elsewhere.
TEST(FullDisk, F01_StartsOfAnIdleRootKeepTheSameFiles) {
  for (int segment_kib : {128, 20 << 10}) {
    for (bool fsync : {true, false}) {
      LogOptions options = holding_log(fsync);
      options.segment_bytes = static_cast<std::uint64_t>(segment_kib) << 10;
      Journal j(10, options);
      std::vector<std::string> first;
      for (int start = 0; start < 20; ++start) {
        ASSERT_TRUE(j.open()) << j.error.what;
        j.log->hold(100 << 10, 16 << 10);
        j.settle();
        EXPECT_FALSE(j.log->lacking());
        auto names = j.disk.list("wal");
        ASSERT_TRUE(names);
        if (start == 0) first = *names;
        EXPECT_EQ(*names, first) << "start " << start;
        j.kill();
      }
    }
  }
}

// Left behind by an earlier program, or by an end between two steps.
TEST(FullDisk, F01_AStartGivesBackWhatIsHeldTooMuch) {
  Journal j(11, holding_log());
  ASSERT_TRUE(j.open());
  j.log->hold(64 << 10, 16 << 10);
  j.settle();
  j.kill();
  for (int n = 0; n < 14; ++n) {
    for (const char* kind : {"held-", "spare-"}) {
      auto file = j.disk.open(
          "wal/" + std::string(kind) + std::to_string(100 + n) + ".tmp",
          OpenMode::create);
      ASSERT_TRUE(file);
      ASSERT_TRUE((*file)->allocate(j.options.segment_bytes));
    }
  }
  ASSERT_TRUE(j.open()) << j.error.what;
  j.log->hold(64 << 10, 16 << 10);
  j.settle();
  auto names = j.disk.list("wal");
  ASSERT_TRUE(names);
  int units = 0, spares = 0;
  for (const std::string& name : *names) {
    units += name.starts_with("held-");
    spares += name.starts_with("spare-");
  }
  EXPECT_LE(units, 1 + 4);
  EXPECT_EQ(spares, 1);
}

// Several files have the room together, and none for the whole record.
TEST(FullDisk, F02_WhatNoHeldFileCanTakeIsNotSaidToFit) {
  for (std::size_t record : {130'000, 150'000, 240'000}) {
    LogOptions options = holding_log(false);
    options.batch_bytes_max = 256 << 10;
    Journal j(12, options);
    ASSERT_TRUE(j.open());
    j.log->hold(800 << 10, 16 << 10);
    j.settle();
    j.disk.set_quota(j.disk.bytes_used());
    ASSERT_GE(j.log->room().held, 3 * record);
    EXPECT_FALSE(j.log->fits(record, 0)) << record;
    EXPECT_TRUE(j.log->fits(60'000, 0));
    ASSERT_TRUE(j.put(1, 60'000));
    EXPECT_FALSE(j.log->stalled());
  }
}

Record with_key(std::uint64_t n) {
  Record record = numbered(n);
  auto& job = std::get<EnqueueRecord>(record.body).job;
  job.concurrency_key = "one at a time";
  job.concurrency_limit = 1;
  return record;
}

std::uint64_t features_of_segment(Journal& j, const std::string& name) {
  auto header = decode_segment_headers(j.disk.contents(name));
  EXPECT_TRUE(header) << name;
  return header ? header->feature_incompat : 0;
}

std::uint64_t features_of_manifest(Journal& j) {
  auto manifest = decode_manifest(j.disk.contents("wal/MANIFEST"));
  EXPECT_TRUE(manifest);
  return manifest ? manifest->feature_incompat : 0;
}

// A program from before concurrency keys knows no bit at all: it must meet one
// wherever it could meet a record with a key.
TEST(Features, F31_WhatIsWrittenSetsTheBitThatKeepsAnOlderProgramAway) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(3));
  EXPECT_EQ(features_of_segment(j, j.segments().back()), 0u)
      << "an older program can read all of it";
  ASSERT_TRUE(j.append(1));  // before it, in the same turn
  for (std::uint64_t n : {5, 6}) {
    Record keyed = with_key(n);
    std::get<EnqueueRecord>(keyed.body).created_ms = j.life;
    ASSERT_TRUE(j.log->append(&keyed));
    j.lives[n] = j.life;
  }
  j.write();
  ASSERT_EQ(j.log->durable(), 6u);
  ASSERT_EQ(j.segments().size(), 2u) << "one new segment, not one a record";
  EXPECT_EQ(features_of_segment(j, j.segments()[0]), 0u);
  EXPECT_EQ(features_of_segment(j, j.segments()[1]), kFeatureConcurrencyKeys);
  auto older = check_features(features_of_segment(j, j.segments()[1]), 0);
  ASSERT_FALSE(older);
  EXPECT_EQ(older.error().code, Code::newer);
  EXPECT_NE(older.error().what.find("newer version"), std::string::npos);
  EXPECT_TRUE(check_features(features_of_segment(j, j.segments()[1])));
  // MANIFEST says so before the segments that said so are gone.
  j.log->set_history_applied(6);
  j.checkpoint();
  EXPECT_EQ(features_of_manifest(j), kFeatureConcurrencyKeys);
  j.crash();
  ASSERT_TRUE(j.open()) << j.error.what;
  ASSERT_TRUE(j.sound());
  ASSERT_TRUE(j.put(1));
  EXPECT_EQ(features_of_segment(j, j.segments().back()),
            kFeatureConcurrencyKeys);
}

// Of programs before there was a bit: what they left says no more than its
// image does.
TEST(Features, F31_AnOldLogGetsItsBitsWhenItIsOpened) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(1));
  j.checkpoint();
  j.crash();
  j.options.image_features = [](std::span<const std::byte>) {
    return kFeatureConcurrencyKeys;
  };
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_EQ(features_of_manifest(j), kFeatureConcurrencyKeys);
  EXPECT_EQ(features_of_segment(j, j.segments().back()),
            kFeatureConcurrencyKeys);
}

TEST(Features, F31_ABitFromTheFutureIsNewerAndNothingIsTouched) {
  Journal j;
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(3));
  j.crash();
  std::string name = j.segments().back();
  auto header = decode_segment_headers(j.disk.contents(name));
  ASSERT_TRUE(header);
  header->feature_incompat |= std::uint64_t{1} << 63;
  std::vector<std::byte> copy(kSegmentHeaderBytes);
  encode_segment_header(&*header, std::span<std::byte, kSegmentHeaderBytes>(
                                      copy.data(), copy.size()));
  j.disk.overwrite(name, 0, copy);
  j.disk.overwrite(name, kSegmentHeaderBytes, copy);
  auto before = j.disk.digest();
  ASSERT_FALSE(j.open());
  EXPECT_EQ(j.error.code, Code::newer);
  EXPECT_NE(j.error.what.find(name), std::string::npos) << j.error.what;
  EXPECT_NE(j.error.what.find("newer version"), std::string::npos);
  EXPECT_EQ(j.disk.digest(), before);
}

TEST(Segments, SpareBecomesTheNextAndANewOneIsMade) {
  LogOptions options = small_log();
  options.spares = true;
  Journal j(1, options);
  ASSERT_TRUE(j.open());
  j.settle();
  EXPECT_TRUE(j.disk.exists("wal/spare-1.tmp"));
  ASSERT_TRUE(j.put(12, 3000));
  auto names = j.segments();
  ASSERT_GE(names.size(), 2u);
  EXPECT_EQ(j.disk.contents(names[1]).size(), options.segment_bytes);
  EXPECT_FALSE(j.disk.exists("wal/spare-1.tmp"));
  j.settle();
  EXPECT_TRUE(j.disk.exists("wal/spare-2.tmp"));
  j.crash();
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_TRUE(j.sound());
  EXPECT_FALSE(j.disk.exists("wal/spare-2.tmp")) << "stale: not trusted";
}

TEST(Segments, NoRoomForASpareIsNoFault) {
  LogOptions options = small_log();
  options.spares = true;
  Journal j(1, options);
  ASSERT_TRUE(j.open());
  j.disk.set_quota(j.disk.bytes_used() + 20000);
  j.settle();
  EXPECT_FALSE(j.log->poisoned());
  EXPECT_FALSE(j.disk.exists("wal/spare-1.tmp"));
  ASSERT_TRUE(j.put(2));
}

TEST(Segments, RecordLargerThanASegmentGetsOneOfItsOwnSize) {
  LogOptions options = small_log();
  options.batch_bytes_max = 1 << 20;
  Journal j(1, options);
  ASSERT_TRUE(j.open());
  ASSERT_TRUE(j.put(1, 500000)) << "the first segment stays empty";
  ASSERT_TRUE(j.put(3, 200));
  ASSERT_TRUE(j.put(1, 600000));
  ASSERT_TRUE(j.put(1));
  j.crash();
  ASSERT_TRUE(j.open()) << j.error.what;
  EXPECT_TRUE(j.sound());
  EXPECT_EQ(j.report.last, 6u);
}

}  // namespace
}  // namespace machina
