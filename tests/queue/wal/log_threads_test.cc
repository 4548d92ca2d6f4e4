// The log as it is used: its own threads, and a real disk.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <mutex>
#include <thread>

#include "queue/wal/log.h"
#include "tests/queue/wal/log_fixture.h"

namespace machina {
namespace {

using ::testing::HasSubstr;

class RealLog : public ::testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/var/tmp/machina-log-XXXXXX";
    ASSERT_NE(::mkdtemp(path), nullptr);
    path_ = path;
    auto storage = open_posix_storage(path_);
    ASSERT_TRUE(storage);
    storage_ = std::move(*storage);
    options_.segment_bytes = 1 << 20;
    options_.first_segment_bytes = 256 << 10;
  }
  void TearDown() override {
    log_.reset();
    std::filesystem::remove_all(path_);
  }

  bool open() {
    replayed_.clear();
    auto log = FileLog::open(
        *storage_, options_, 0,
        [&](Lsn lsn, std::span<const std::byte> bytes) -> Result<void> {
          loaded_ = lsn;
          image_.assign(bytes.begin(), bytes.end());
          return {};
        },
        [&](const Record& record) -> Result<void> {
          replayed_.push_back(record);
          return {};
        },
        &report_);
    if (!log) {
      error_ = log.error();
      return false;
    }
    log_ = std::move(*log);
    log_->on_wake([this] {
      std::lock_guard hold(mutex_);
      woken_ = true;
      ready_.notify_one();
    });
    return true;
  }

  // A turn of the owner's loop: collect, hand over, sleep until woken.
  void turn() {
    log_->poll();
    log_->flush();
    std::unique_lock hold(mutex_);
    ready_.wait_for(hold, std::chrono::milliseconds(100),
                    [this] { return woken_; });
    woken_ = false;
  }
  void wait_durable() {
    auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (log_->durable() < log_->appended() && !log_->poisoned() &&
           std::chrono::steady_clock::now() < until)
      turn();
    ASSERT_EQ(log_->durable(), log_->appended()) << log_->poison_cause();
  }
  void append(int count, std::size_t extra = 0) {
    for (int i = 0; i < count; ++i) {
      Record record = numbered(log_->appended() + 1, extra);
      ASSERT_TRUE(log_->append(&record));
      places_[record.lsn] = {record.place, record.bytes};
    }
  }
  std::size_t files(const std::string& end) {
    std::size_t n = 0;
    for (const auto& entry :
         std::filesystem::directory_iterator(path_ + "/wal"))
      n += entry.path().string().ends_with(end);
    return n;
  }

  std::string path_;
  std::unique_ptr<Storage> storage_;
  LogOptions options_;
  std::unique_ptr<FileLog> log_;
  RecoveryReport report_;
  Error error_{Code::io, ""};
  std::vector<Record> replayed_;
  std::vector<std::byte> image_;
  Lsn loaded_ = 0;
  std::map<Lsn, std::pair<Place, std::uint32_t>> places_;
  std::mutex mutex_;
  std::condition_variable ready_;
  bool woken_ = false;
};

TEST_F(RealLog, GroupCommitTakesAllThatIsStagedAndReplaysIt) {
  ASSERT_TRUE(open()) << error_.what;
  for (int i = 0; i < 300; ++i) {
    append(1 + i % 64, 100);
    turn();
  }
  wait_durable();
  Lsn last = log_->durable();
  auto stats = log_->take_stats();
  EXPECT_EQ(stats.records, last);
  EXPECT_LE(stats.batches, 301u);
  EXPECT_GT(stats.segments, 1u);
  log_.reset();  // as killed
  ASSERT_TRUE(open()) << error_.what;
  EXPECT_FALSE(report_.clean);
  EXPECT_TRUE(is_run(replayed_, 1, last));
  ASSERT_TRUE(log_->close());
  ASSERT_TRUE(open()) << error_.what;
  EXPECT_TRUE(report_.clean);
  EXPECT_TRUE(is_run(replayed_, 1, last));
}

TEST_F(RealLog, LargestRecordFitsAndOneTooLargeIsRefused) {
  ASSERT_TRUE(open()) << error_.what;
  append(3);
  append(1, 4600 << 10);
  append(3);
  wait_durable();
  Record record = numbered(8, 9 << 20);
  auto refused = log_->append(&record);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::too_large);
  EXPECT_EQ(log_->appended(), 7u);
  auto [place, bytes] = places_[4];
  auto read = log_->read(place, bytes);
  ASSERT_TRUE(read) << read.error().what;
  EXPECT_EQ(read->second.size(), bytes);
  ASSERT_TRUE(log_->close());
  ASSERT_TRUE(open()) << error_.what;
  EXPECT_TRUE(is_run(replayed_, 1, 7));
}

TEST_F(RealLog, ReadersOnOtherThreadsSeeWhatIsDurable) {
  ASSERT_TRUE(open()) << error_.what;
  append(200, 200);
  wait_durable();
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0}, right{0};
  std::vector<std::thread> readers;
  const auto known = places_;
  for (int t = 0; t < 2; ++t) {
    readers.emplace_back([&] {
      while (!stop) {
        for (const auto& [lsn, where] : known) {
          auto got = log_->read(where.first, where.second);
          bool ok = got && decode(got->first, got->second).has_value() &&
                    number_of(*decode(got->first, got->second)) == lsn;
          ++(ok ? right : wrong);
        }
      }
    });
  }
  for (int i = 0; i < 100; ++i) {  // the segments roll beneath them
    append(40, 300);
    wait_durable();
    auto [place, bytes] = places_[log_->appended()];
    auto got = log_->read(place, bytes);
    ASSERT_TRUE(got) << got.error().what;
  }
  stop = true;
  for (auto& reader : readers) reader.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(right, 0);
}

TEST_F(RealLog, SpareIsMadeBehindTheScenesAndBecomesTheNextSegment) {
  options_.segment_bytes = 512 << 10;
  ASSERT_TRUE(open()) << error_.what;
  auto spare = path_ + "/wal/spare-1.tmp";
  for (int i = 0; i < 400; ++i) {
    if (std::filesystem::exists(spare) &&
        std::filesystem::file_size(spare) == options_.segment_bytes)
      break;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  ASSERT_TRUE(std::filesystem::exists(spare));
  append(40, 8000);  // over the first segment
  wait_durable();
  append(10, 8000);
  wait_durable();
  EXPECT_EQ(files(".seg"), 2u);
  EXPECT_FALSE(std::filesystem::exists(spare)) << "renamed into place";
  log_.reset();
  ASSERT_TRUE(open()) << error_.what;
  EXPECT_TRUE(is_run(replayed_, 1, 50));
}

TEST_F(RealLog, SecondOpenerIsRefused) {
  ASSERT_TRUE(open());
  auto first = std::move(log_);
  ASSERT_FALSE(open());
  EXPECT_EQ(error_.code, Code::conflict);
  EXPECT_THAT(error_.what, HasSubstr("LOCK"));
  first.reset();
  EXPECT_TRUE(open()) << error_.what;
}

TEST_F(RealLog, AnEmptyRootIsReadyAtOnce) {
  auto before = std::chrono::steady_clock::now();
  options_.segment_bytes = 64 << 20;
  options_.first_segment_bytes = 1 << 20;
  ASSERT_TRUE(open());
  append(1);
  wait_durable();
  auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                std::chrono::steady_clock::now() - before)
                .count();
  EXPECT_LT(ms, 1000) << "a 64 MiB segment on the start path?";
  EXPECT_EQ(std::filesystem::file_size(path_ + "/wal/0000000000000001.seg"),
            std::uintmax_t{1} << 20);
  RecordProperty("open_and_commit_ms", static_cast<int>(ms));
}

TEST_F(RealLog, CheckpointOnItsOwnThreadIsNoticedByPoll) {
  ASSERT_TRUE(open());
  append(30, 100);
  wait_durable();
  std::vector<std::byte> image(5 << 20, std::byte{7});
  log_->checkpoint(30, 99, image);
  EXPECT_TRUE(log_->checkpointing());
  for (int i = 0; i < 200 && log_->checkpointing(); ++i) turn();
  ASSERT_FALSE(log_->checkpointing());
  EXPECT_EQ(log_->bytes_since_checkpoint(), 0u);
  append(4);
  wait_durable();
  log_.reset();
  ASSERT_TRUE(open()) << error_.what;
  EXPECT_EQ(loaded_, 30u);
  EXPECT_EQ(image_, image);
  EXPECT_EQ(report_.checkpoint, 30u);
}

TEST_F(RealLog, WithFsyncOffAKilledProcessLosesNothing) {
  options_.fsync = false;
  ASSERT_TRUE(open());
  append(500, 300);
  wait_durable();
  log_.reset();
  ASSERT_TRUE(open()) << error_.what;
  EXPECT_TRUE(is_run(replayed_, 1, 500));
}

TEST_F(RealLog, WithoutDirectWritesAndSyncs) {
  options_.direct = false;
  ASSERT_TRUE(open());
  append(500, 300);
  wait_durable();
  log_.reset();
  ASSERT_TRUE(open()) << error_.what;
  EXPECT_TRUE(is_run(replayed_, 1, 500));
}

}  // namespace
}  // namespace machina
