#include "queue/history/history.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>

namespace machina {
namespace {

constexpr Millis kDay = 86'400'000;
constexpr Millis kNoon = 20'000 * kDay + kDay / 2;

class HistoryTest : public testing::Test {
 protected:
  HistoryTest() {
    char name[] = "/tmp/machina_history_XXXXXX";
    dir_ = mkdtemp(name);
    open();
  }
  ~HistoryTest() override {
    history_.reset();
    std::filesystem::remove_all(dir_);
  }

  void open() {
    history_.reset();
    auto opened = History::open(dir_);
    ASSERT_TRUE(opened) << opened.error().what;
    history_ = std::move(*opened);
  }

  HistoryChange finished(Millis created, State state = State::succeeded,
                         const std::string& kind = "noop") {
    ++next_;
    EnqueueRecord body;
    body.id = make_job_id(created, next_, next_ * 0x9e3779b97f4a7c15ull);
    body.created_ms = created;
    body.job.kind = kind;
    body.job.payload = R"({"n":)" + std::to_string(next_) + "}";
    body.job.labels = {{"n", std::to_string(next_)}};
    EndRecord end;
    end.id = body.id;
    end.state = state;
    end.fence = make_fence(3, next_);
    end.attempt = 1;
    end.by_complete = 1;
    end.worker = "w1";
    end.started_ms = created + 5;
    end.outcome.code =
        state == State::failed ? EndCode::verdict : EndCode::none;
    end.outcome.result = R"({"r":)" + std::to_string(next_) + "}";
    HistoryChange change;
    change.id = body.id;
    change.lsn = next_ * 10;
    change.finished_ms = created + 100;
    change.body = std::make_shared<EnqueueRecord>(body);
    change.end = std::make_shared<EndRecord>(end);
    return change;
  }

  void apply(const std::vector<HistoryChange>& changes, Lsn through) {
    auto r = history_->apply(changes, through);
    ASSERT_TRUE(r) << r.error().what;
  }
  std::optional<FinishedJob> find(const JobId& id, Millis now = kNoon) {
    auto r = history_->find(id, now);
    EXPECT_TRUE(r) << r.error().what;
    return r ? *r : std::nullopt;
  }
  History::Page list(const ListQuery& query, std::uint64_t examine = 10'000) {
    auto r = history_->list(query, kNoon, examine);
    EXPECT_TRUE(r) << r.error().what;
    return r ? *r : History::Page{};
  }

  std::string dir_;
  std::unique_ptr<History> history_;
  std::uint64_t next_ = 0;
};

TEST_F(HistoryTest, RowHoldsAllThatAViewShows) {
  HistoryChange change = finished(kNoon, State::failed);
  apply({change}, 10);
  EXPECT_EQ(history_->applied(), 10u);
  auto found = find(change.id);
  ASSERT_TRUE(found);
  JobView view = view_of(*found, true);
  EXPECT_EQ(view.id, change.id);
  EXPECT_EQ(view.state, State::failed);
  EXPECT_EQ(view.payload, change.body->job.payload);
  EXPECT_EQ(view.result, change.end->outcome.result);
  EXPECT_EQ(view.error_code, EndCode::verdict);
  EXPECT_EQ(view.error_attempt, 1);
  EXPECT_EQ(view.finished_ms, change.finished_ms);
  EXPECT_EQ(view.started_ms, change.end->started_ms);
  EXPECT_EQ(view.created_ms, kNoon);
  EXPECT_EQ(view.worker, "w1");
  EXPECT_EQ(view.labels, change.body->job.labels);
}

TEST_F(HistoryTest, AppliedAndRowsSurviveReopen) {
  HistoryChange change = finished(kNoon);
  apply({change}, 42);
  open();
  EXPECT_EQ(history_->applied(), 42u);
  EXPECT_TRUE(find(change.id));
}

// A start takes no room: on a full disk there is none.
TEST_F(HistoryTest, F05_NoIndexOfAWriteAheadLogTakesRoomOnDisk) {
  apply({finished(kNoon)}, 10);
  int logs = 0;
  for (const auto& file : std::filesystem::recursive_directory_iterator(dir_)) {
    const std::string name = file.path().filename();
    logs += name.ends_with("-wal");
    EXPECT_FALSE(name.ends_with("-shm")) << name;
  }
  EXPECT_GT(logs, 0);
}

TEST_F(HistoryTest, SameRowTwiceIsOneRow) {
  HistoryChange change = finished(kNoon);
  apply({change}, 10);
  apply({change, change}, 11);
  EXPECT_EQ(list({}).jobs.size(), 1u);
}

TEST_F(HistoryTest, ExplicitRetryTakesTheRowAwayInOrder) {
  HistoryChange change = finished(kNoon);
  HistoryChange left;
  left.id = change.id;
  apply({change, left}, 11);
  EXPECT_FALSE(find(change.id));
  apply({left, change}, 12);
  EXPECT_TRUE(find(change.id));
}

TEST_F(HistoryTest, FenceFindsTheJobThatItEnded) {
  HistoryChange old = finished(kNoon - 3 * kDay);
  HistoryChange young = finished(kNoon);
  auto keep = std::make_shared<EnqueueRecord>(*old.body);
  keep->job.keep_result_ms = 10 * kDay;
  old.body = keep;
  apply({old, young}, 20);
  auto found = history_->find_by_fence(old.end->fence, kNoon);
  ASSERT_TRUE(found && *found);
  EXPECT_EQ((*found)->body.id, old.id);
  EXPECT_EQ((*found)->end.by_complete, 1);
  auto none = history_->find_by_fence(make_fence(9, 9), kNoon);
  ASSERT_TRUE(none);
  EXPECT_FALSE(*none);
}

TEST_F(HistoryTest, KeepNothingLeavesNoRow) {
  HistoryChange change = finished(kNoon);
  auto body = std::make_shared<EnqueueRecord>(*change.body);
  body->job.keep_result_ms = 0;
  change.body = body;
  apply({change}, 10);
  EXPECT_EQ(history_->applied(), 10u);
  EXPECT_FALSE(find(change.id));
}

TEST_F(HistoryTest, RowPastItsKeepTimeIsGoneAndItsFileUnlinked) {
  HistoryChange change = finished(kNoon);
  apply({change}, 10);
  Millis past = change.finished_ms + change.body->job.keep_result_ms;
  EXPECT_TRUE(find(change.id, past - 1));
  EXPECT_FALSE(find(change.id, past));
  ASSERT_TRUE(history_->expire(past - 1));
  EXPECT_TRUE(find(change.id, past - 1));
  ASSERT_TRUE(history_->expire(past));
  EXPECT_FALSE(find(change.id, kNoon));
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/2024-10-04.db"));
  open();
  EXPECT_EQ(history_->applied(), 10u);  // expiry is not a gap
}

TEST_F(HistoryTest, PagesNewestFirstAcrossDaysWithoutBodies) {
  std::vector<HistoryChange> all;
  for (int i = 0; i < 25; ++i) {
    auto change = finished(kNoon - (25 - i) * kDay / 10,
                           i % 3 == 0 ? State::failed : State::succeeded,
                           i % 2 == 0 ? "noop" : "tool.shell");
    auto body = std::make_shared<EnqueueRecord>(*change.body);
    body->job.keep_result_ms = 100 * kDay;
    change.body = body;
    all.push_back(change);
  }
  apply(all, 1000);
  ListQuery query;
  query.limit = 7;
  std::vector<JobId> seen;
  do {
    auto page = list(query);
    for (const auto& job : page.jobs) {
      EXPECT_TRUE(job.body.job.payload.empty());
      EXPECT_TRUE(job.end.outcome.result.empty());
      seen.push_back(job.body.id);
    }
    query.cursor = page.cursor;
  } while (!query.cursor.empty());
  ASSERT_EQ(seen.size(), 25u);
  for (std::size_t i = 0; i < seen.size(); ++i) {
    EXPECT_EQ(seen[i], all[24 - i].id) << i;
  }

  ListQuery failed;
  failed.states = {State::failed};
  failed.kind = "noop";
  EXPECT_EQ(list(failed).jobs.size(), 5u);  // i = 0, 6, 12, 18, 24

  ListQuery label;
  label.labels = {{"n", "4"}};
  auto labelled = list(label);
  ASSERT_EQ(labelled.jobs.size(), 1u);
  EXPECT_EQ(labelled.jobs[0].body.id, all[3].id);

  ListQuery range;
  range.since_ms = all[10].body->created_ms;
  range.until_ms = all[12].body->created_ms;
  EXPECT_EQ(list(range).jobs.size(), 3u);
}

TEST_F(HistoryTest, ScanIsBoundedAndResumes) {
  std::vector<HistoryChange> all;
  for (int i = 0; i < 30; ++i) all.push_back(finished(kNoon + i));
  apply(all, 1000);
  ListQuery query;
  query.kind = "absent";
  auto page = list(query, 12);
  EXPECT_EQ(page.scanned, 12u);
  EXPECT_TRUE(page.jobs.empty());
  ASSERT_FALSE(page.cursor.empty());
  query.cursor = page.cursor;
  EXPECT_EQ(list(query, 100).scanned, 18u);
  query.cursor = "no cursor";
  EXPECT_FALSE(history_->list(query, kNoon));
}

TEST_F(HistoryTest, MissingDayAsksForAReplay) {
  HistoryChange change = finished(kNoon);
  apply({change}, 10);
  history_.reset();
  std::filesystem::remove(dir_ + "/2024-10-04.db");
  open();
  EXPECT_EQ(history_->applied(), 0u);
  EXPECT_FALSE(find(change.id));
  apply({change}, 10);
  EXPECT_TRUE(find(change.id));
}

TEST_F(HistoryTest, DamagedDayIsPutAsideNotDeleted) {
  HistoryChange change = finished(kNoon);
  apply({change}, 10);
  history_.reset();
  std::string path = dir_ + "/2024-10-04.db";
  ASSERT_TRUE(std::filesystem::exists(path));
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      << std::string(8192, 'x');
  open();
  EXPECT_EQ(history_->applied(), 0u);
  EXPECT_TRUE(std::filesystem::exists(path + ".damaged"));
  apply({change}, 10);
  EXPECT_TRUE(find(change.id));
}

TEST_F(HistoryTest, EmptiedDayAsksForAReplay) {
  HistoryChange change = finished(kNoon);
  apply({change}, 10);
  history_.reset();
  std::filesystem::resize_file(dir_ + "/2024-10-04.db", 0);
  open();
  EXPECT_EQ(history_->applied(), 0u);
}

TEST_F(HistoryTest, RewindDropsRowsAboveTheLogsEnd) {
  HistoryChange kept = finished(kNoon);  // lsn 10
  HistoryChange lost = finished(kNoon);  // lsn 20
  apply({kept, lost}, 25);
  ASSERT_TRUE(history_->rewind(15));
  EXPECT_EQ(history_->applied(), 15u);
  EXPECT_TRUE(find(kept.id));
  EXPECT_FALSE(find(lost.id));
}

TEST_F(HistoryTest, FilesOfALaterVersionAreRefused) {
  apply({finished(kNoon)}, 10);
  history_.reset();
  // user_version is the big-endian u32 at offset 60 of an SQLite file.
  std::fstream file(dir_ + "/history.db",
                    std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(63);
  file.put(9);
  file.close();
  auto opened = History::open(dir_);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, Code::newer);
}

// Not a threshold that a busy machine could miss; it prints what it measured.
TEST_F(HistoryTest, KeepsUpWithSmallJobs) {
  constexpr int kRows = 50'000, kBatch = 1000;
  std::vector<HistoryChange> batch;
  double seconds = 0;
  for (int i = 0; i < kRows; i += kBatch) {
    batch.clear();
    for (int j = 0; j < kBatch; ++j) {
      batch.push_back(finished(kNoon + i + j));
      auto body = std::make_shared<EnqueueRecord>(*batch.back().body);
      body->job.payload = "{\"p\":\"" + std::string(240, 'p') + "\"}";
      batch.back().body = body;
    }
    auto start = std::chrono::steady_clock::now();
    apply(batch, static_cast<Lsn>(i + kBatch));
    seconds +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start)
            .count();
  }
  std::printf("history: %.0f rows/s in batches of %d\n", kRows / seconds,
              kBatch);
  EXPECT_EQ(list({}).jobs.size(), 50u);
}

}  // namespace
}  // namespace machina
