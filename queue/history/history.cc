#include "queue/history/history.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <utility>

#include "queue/base/logger.h"
#include "queue/base/storage.h"
#include "queue/history/sqlite.h"
#include "queue/record/view.h"

namespace machina {
namespace {

constexpr int kSchemaVersion = 1;
constexpr std::size_t kOpenFilesMax = 8;  // of each of writer and reader
constexpr Millis kDayMs = 86'400'000;

// Between 1000 (SQLite's default: too many syncs at 25,000 rows a second) and
// what makes one commit stall for long.
constexpr int kCheckpointPages = 4000;

constexpr char kMainSchema[] =
    "CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value INTEGER NOT "
    "NULL) WITHOUT ROWID;"
    "CREATE TABLE IF NOT EXISTS buckets(day INTEGER PRIMARY KEY, expires "
    "INTEGER NOT NULL);";

// What is searched comes before what may overflow the page, so that a scan
// never reads a payload.
constexpr char kDaySchema[] =
    "CREATE TABLE IF NOT EXISTS jobs("
    "id BLOB NOT NULL, lsn INTEGER NOT NULL, finished INTEGER NOT NULL,"
    "expires INTEGER NOT NULL, state INTEGER NOT NULL, fence INTEGER NOT NULL,"
    "kind TEXT NOT NULL, queue TEXT NOT NULL, head BLOB NOT NULL,"
    "tail BLOB NOT NULL, payload BLOB NOT NULL, result BLOB NOT NULL);"
    "CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_id ON jobs(id);"
    "CREATE INDEX IF NOT EXISTS jobs_by_fence ON jobs(fence) WHERE fence<>0;"
    "CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value INTEGER NOT "
    "NULL) WITHOUT ROWID;";

constexpr char kColumns[] =
    "id,lsn,finished,expires,state,kind,queue,head,tail,payload,result";
enum Column {
  kId,
  kLsn,
  kFinished,
  kExpires,
  kState,
  kKind,
  kQueue,
  kHead,
  kTail,
  kPayload,
  kResult
};

using sqlite::Database;
using sqlite::Statement;

sqlite::Setup writing(const char* schema) {
  return {"history", schema, kSchemaVersion, kCheckpointPages, {}};
}
sqlite::Setup reading() { return {"history"}; }

std::int64_t day_of(const JobId& id) { return created_ms(id) / kDayMs; }

std::string day_name(std::int64_t day) {
  std::chrono::year_month_day date{
      std::chrono::sys_days{std::chrono::days{day}}};
  char text[32];
  std::snprintf(
      text, sizeof text, "%04d-%02u-%02u.db", static_cast<int>(date.year()),
      static_cast<unsigned>(date.month()), static_cast<unsigned>(date.day()));
  return text;
}

std::optional<std::int64_t> parse_day_name(const std::string& name) {
  int year = 0;
  unsigned month = 0, day = 0;
  if (std::sscanf(name.c_str(), "%d-%u-%u.db", &year, &month, &day) != 3) {
    return std::nullopt;
  }
  std::chrono::year_month_day date{std::chrono::year{year},
                                   std::chrono::month{month},
                                   std::chrono::day{day}};
  if (!date.ok()) return std::nullopt;
  std::int64_t number = std::chrono::sys_days{date}.time_since_epoch().count();
  if (day_name(number) != name) return std::nullopt;
  return number;
}

// The least id that could have been made at `ms`.
JobId first_id_at(Millis ms) {
  JobId id;
  ms = std::clamp<Millis>(ms, 0, (Millis{1} << 48) - 1);
  for (int i = 0; i < 6; ++i) {
    id.bytes[static_cast<std::size_t>(i)] =
        static_cast<std::uint8_t>(ms >> (8 * (5 - i)));
  }
  return id;
}

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span{text.data(), text.size()});
}

struct DayWriter {
  Database db;
  Statement put, remove, keep_expires;
  std::uint64_t used = 0;
};

struct DayReader {
  Database db;
  Statement find, by_fence, scan;
  std::uint64_t used = 0;
};

class SqliteHistory final : public History {
 public:
  explicit SqliteHistory(std::string dir) : dir_(std::move(dir)) {}

  Result<void> start();

  Lsn applied() const override { return applied_; }
  Result<void> apply(const std::vector<HistoryChange>& changes,
                     Lsn through) override;
  Result<void> rewind(Lsn last) override;
  Result<void> expire(Millis now_ms) override;
  Result<std::optional<FinishedJob>> find(const JobId& id,
                                          Millis now_ms) override;
  Result<std::optional<FinishedJob>> find_by_fence(Fence fence,
                                                   Millis now_ms) override;
  Result<Page> list(const ListQuery& query, Millis now_ms,
                    std::uint64_t examine) override;

 private:
  std::string path(std::int64_t day) const {
    return dir_ + "/" + day_name(day);
  }
  Result<void> open_main();
  Result<void> adopt_days();
  Result<void> put_aside(const std::string& path);
  Result<DayWriter*> writer(std::int64_t day);
  Result<DayReader*> reader(std::int64_t day);
  Result<void> apply_day(std::int64_t day,
                         const std::vector<const HistoryChange*>& changes,
                         Millis* expires);
  int put(DayWriter* day, const HistoryChange& change, Millis expires);
  Result<void> set_main(Lsn through);
  std::vector<std::int64_t> days_newest_first();
  Result<void> list_day(std::int64_t day, const ListQuery& query,
                        const JobId& below, const JobId& from, Millis now_ms,
                        std::uint64_t examine, Page* page, bool* more);

  const std::string dir_;
  std::unique_ptr<Storage::Lock> lock_;
  std::atomic<Lsn> applied_ = 0;

  // The writing thread's.
  Database main_;
  Statement set_meta_, set_bucket_, remove_bucket_;
  std::map<std::int64_t, std::unique_ptr<DayWriter>> writers_;
  std::map<std::int64_t, Millis> dirty_;  // days whose expiry must be written
  std::uint64_t uses_ = 0;
  std::vector<std::byte> head_, tail_;

  // Readers take turns; expire() takes its turn too, so that no file vanishes
  // under one.
  std::mutex mutex_;
  std::map<std::int64_t, Millis> days_;  // day -> when its last row passes
  std::map<std::int64_t, std::unique_ptr<DayReader>> readers_;
  std::uint64_t read_uses_ = 0;
};

// --- open ---

Result<void> SqliteHistory::start() {
  std::error_code error;
  std::filesystem::create_directories(dir_, error);
  if (error) {
    return Error{Code::io, "history: create " + dir_ + ": " + error.message()};
  }
  auto storage = open_posix_storage(dir_);
  if (!storage) return storage.error();
  auto lock = (*storage)->lock("LOCK");
  if (!lock && lock.error().code == Code::conflict) {
    std::string root = std::filesystem::path(dir_).parent_path().string();
    return Error{Code::conflict, "another server has " + root + " (" + dir_ +
                                     "/LOCK is locked)"};
  }
  if (!lock) return lock.error();
  lock_ = std::move(*lock);
  auto opened = open_main();
  if (!opened && opened.error().code == Code::corrupt) {
    if (auto r = put_aside(dir_ + "/history.db"); !r) return r;
    opened = open_main();
  }
  if (!opened) return opened;
  return adopt_days();
}

Result<void> SqliteHistory::open_main() {
  // A second try after damage needs fresh objects.
  std::destroy_at(&main_);
  std::construct_at(&main_);
  applied_ = 0;
  days_.clear();
  if (auto r = main_.open(dir_ + "/history.db", writing(kMainSchema)); !r) {
    return r;
  }
  Statement meta, buckets;
  sqlite3* db = main_.get();
  int rc = meta.prepare(db, "SELECT value FROM meta WHERE key='applied'");
  if (rc == sqlite::kOk) {
    rc = meta.step();
    if (rc == sqlite::kRow) applied_ = static_cast<Lsn>(meta.number_at(0));
    if (rc == sqlite::kRow || rc == sqlite::kDone) rc = sqlite::kOk;
  }
  if (rc == sqlite::kOk) {
    rc = buckets.prepare(db, "SELECT day,expires FROM buckets");
  }
  if (rc == sqlite::kOk) {
    while ((rc = buckets.step()) == sqlite::kRow) {
      days_[buckets.number_at(0)] = buckets.number_at(1);
    }
    if (rc == sqlite::kDone) rc = sqlite::kOk;
  }
  if (rc == sqlite::kOk) {
    rc = set_meta_.prepare(
        db, "INSERT OR REPLACE INTO meta(key,value) VALUES('applied',?1)");
  }
  if (rc == sqlite::kOk) {
    rc = set_bucket_.prepare(
        db, "INSERT OR REPLACE INTO buckets(day,expires) VALUES(?1,?2)");
  }
  if (rc == sqlite::kOk) {
    rc = remove_bucket_.prepare(db, "DELETE FROM buckets WHERE day=?1");
  }
  if (rc != sqlite::kOk) return main_.error(rc, "read history.db");
  return {};
}

// Squares what history.db lists with what is there (Y4).
Result<void> SqliteHistory::adopt_days() {
  std::error_code error;
  std::map<std::int64_t, bool> found;
  for (const auto& entry : std::filesystem::directory_iterator(dir_, error)) {
    // An empty file is one that lost its rows; SQLite would take it as new.
    if (auto day = parse_day_name(entry.path().filename().string());
        day && entry.file_size(error) > 0) {
      found[*day] = true;
    }
  }
  if (error) {
    return Error{Code::io, "history: list " + dir_ + ": " + error.message()};
  }
  bool lost = false;
  for (auto it = days_.begin(); it != days_.end();) {
    if (found.contains(it->first)) {
      ++it;
      continue;
    }
    lost = true;
    remove_bucket_.number(1, it->first);
    if (int rc = remove_bucket_.run(); rc != sqlite::kOk) {
      return main_.error(rc, "forget a missing file");
    }
    it = days_.erase(it);
  }
  for (const auto& [day, _] : found) {
    auto opened = writer(day);
    if (!opened && opened.error().code == Code::corrupt) {
      if (auto r = put_aside(path(day)); !r) return r;
      remove_bucket_.number(1, day);
      remove_bucket_.run();
      days_.erase(day);
      lost = true;
      continue;
    }
    if (!opened) return opened.error();
    if (days_.contains(day)) continue;
    // Rows were committed and then the crash came before history.db knew.
    Statement expires;
    int rc = expires.prepare((*opened)->db.get(),
                             "SELECT value FROM meta WHERE key='expires'");
    if (rc == sqlite::kOk) rc = expires.step();
    days_[day] = rc == sqlite::kRow ? expires.number_at(0) : 0;
    dirty_[day] = days_[day];
  }
  if (lost) applied_ = 0;
  if (lost || !dirty_.empty()) return set_main(applied_);
  return {};
}

Result<void> SqliteHistory::put_aside(const std::string& path) {
  LogLine(Severity::error, "history_damaged",
          "history: " + path +
              " is damaged; put aside, rebuilt from what the log still holds");
  std::error_code error;
  for (const char* suffix : {"", "-wal", "-shm"}) {
    std::string from = path + suffix;
    if (!std::filesystem::exists(from, error)) continue;
    std::filesystem::rename(from, path + ".damaged" + suffix, error);
    if (error) {
      return Error{Code::io,
                   "history: put " + from + " aside: " + error.message()};
    }
  }
  return {};
}

// The least recently used goes first where too many are open.
template <class Map>
void trim(Map* map) {
  if (map->size() < kOpenFilesMax) return;
  auto oldest = std::min_element(map->begin(), map->end(),
                                 [](const auto& a, const auto& b) {
                                   return a.second->used < b.second->used;
                                 });
  map->erase(oldest);
}

Result<DayWriter*> SqliteHistory::writer(std::int64_t day) {
  if (auto it = writers_.find(day); it != writers_.end()) {
    it->second->used = ++uses_;
    return it->second.get();
  }
  trim(&writers_);
  auto made = std::make_unique<DayWriter>();
  if (auto r = made->db.open(path(day), writing(kDaySchema)); !r)
    return r.error();
  sqlite3* db = made->db.get();
  int rc = made->put.prepare(
      db,
      "INSERT OR REPLACE INTO jobs(id,lsn,finished,expires,state,fence,kind,"
      "queue,head,tail,payload,result) "
      "VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12)");
  if (rc == sqlite::kOk) {
    rc = made->remove.prepare(db, "DELETE FROM jobs WHERE id=?1");
  }
  if (rc == sqlite::kOk) {
    rc = made->keep_expires.prepare(
        db,
        "INSERT INTO meta(key,value) VALUES('expires',?1) "
        "ON CONFLICT(key) DO UPDATE SET value=max(value,excluded.value)");
  }
  if (rc != sqlite::kOk) return made->db.error(rc, "prepare " + path(day));
  made->used = ++uses_;
  DayWriter* raw = made.get();
  writers_[day] = std::move(made);
  return raw;
}

Result<DayReader*> SqliteHistory::reader(std::int64_t day) {
  if (auto it = readers_.find(day); it != readers_.end()) {
    it->second->used = ++read_uses_;
    return it->second.get();
  }
  trim(&readers_);
  auto made = std::make_unique<DayReader>();
  if (auto r = made->db.open(path(day), reading()); !r) return r.error();
  sqlite3* db = made->db.get();
  std::string select = std::string("SELECT ") + kColumns + " FROM jobs WHERE ";
  int rc = made->find.prepare(db, select + "id=?1");
  if (rc == sqlite::kOk) {
    rc = made->by_fence.prepare(db, select + "fence=?1 AND fence<>0");
  }
  if (rc == sqlite::kOk) {
    rc = made->scan.prepare(db, select + "id<?1 AND id>=?2 ORDER BY id DESC");
  }
  if (rc != sqlite::kOk) return made->db.error(rc, "prepare " + path(day));
  made->used = ++read_uses_;
  DayReader* raw = made.get();
  readers_[day] = std::move(made);
  return raw;
}

// --- writing ---

Result<void> SqliteHistory::apply(const std::vector<HistoryChange>& changes,
                                  Lsn through) {
  std::map<std::int64_t, std::vector<const HistoryChange*>> by_day;
  for (const HistoryChange& change : changes) {
    if (change.unblock != nullptr) continue;
    bool gone = change.body == nullptr;
    if (!gone && change.body->job.keep_result_ms == 0) continue;
    by_day[day_of(change.id)].push_back(&change);
  }
  for (const auto& [day, of_day] : by_day) {
    Millis expires = 0;
    if (auto r = apply_day(day, of_day, &expires); !r) return r;
    std::lock_guard lock(mutex_);
    auto [it, fresh] = days_.try_emplace(day, expires);
    if (!fresh && it->second >= expires) continue;
    it->second = expires;
    dirty_[day] = expires;
  }
  // Crash here: the rows are there, applied is not; they are applied again.
  return set_main(through);
}

Result<void> SqliteHistory::apply_day(
    std::int64_t day, const std::vector<const HistoryChange*>& changes,
    Millis* expires) {
  auto opened = writer(day);
  if (!opened) return opened.error();
  DayWriter* to = *opened;
  if (auto r = to->db.execute("BEGIN IMMEDIATE"); !r) return r;
  int rc = sqlite::kOk;
  for (const HistoryChange* change : changes) {
    if (change->body == nullptr) {
      to->remove.bytes(1, change->id.bytes.data(), change->id.bytes.size());
      rc = to->remove.run();
    } else {
      Millis until = change->finished_ms - change->offset_ms +
                     change->body->job.keep_result_ms;
      *expires = std::max(*expires, until);
      rc = put(to, *change, until);
    }
    if (rc != sqlite::kOk) break;
  }
  if (rc == sqlite::kOk) {
    to->keep_expires.number(1, *expires);
    rc = to->keep_expires.run();
  }
  if (rc != sqlite::kOk) {
    Error error = to->db.error(rc, "write " + path(day));
    (void)to->db.execute("ROLLBACK").has_value();
    return error;
  }
  auto committed = to->db.execute("COMMIT");
  if (!committed) (void)to->db.execute("ROLLBACK").has_value();
  return committed;
}

int SqliteHistory::put(DayWriter* day, const HistoryChange& change,
                       Millis expires) {
  Record head, tail;
  EnqueueRecord body = *change.body;
  body.job.payload.clear();
  head.time_ms = change.body->created_ms;
  head.body = std::move(body);
  EndRecord end;
  end.id = change.end->id;
  end.fence = change.end->fence;
  end.state = change.end->state;
  end.attempt = change.end->attempt;
  end.started_ms = change.end->started_ms;
  end.by_complete = change.end->by_complete;
  end.worker = change.end->worker;
  end.outcome = change.end->outcome;
  end.outcome.result.clear();
  tail.time_ms = change.finished_ms;
  tail.body = std::move(end);
  head_.clear();
  tail_.clear();
  encode(head, &head_);
  encode(tail, &tail_);

  const EnqueueRecord& from = *change.body;
  Statement& to = day->put;
  to.bytes(1, from.id.bytes.data(), from.id.bytes.size());
  to.number(2, static_cast<std::int64_t>(change.lsn));
  to.number(3, change.finished_ms);
  to.number(4, expires);
  to.number(5, static_cast<int>(change.end->state));
  to.number(6, static_cast<std::int64_t>(change.end->fence));
  to.text(7, from.job.kind);
  to.text(8, from.job.queue);
  to.bytes(9, head_.data(), head_.size());
  to.bytes(10, tail_.data(), tail_.size());
  to.bytes(11, from.job.payload.data(), from.job.payload.size());
  to.bytes(12, change.end->outcome.result.data(),
           change.end->outcome.result.size());
  return to.run();
}

Result<void> SqliteHistory::set_main(Lsn through) {
  if (auto r = main_.execute("BEGIN IMMEDIATE"); !r) return r;
  int rc = sqlite::kOk;
  for (const auto& [day, expires] : dirty_) {
    set_bucket_.number(1, day);
    set_bucket_.number(2, expires);
    if ((rc = set_bucket_.run()) != sqlite::kOk) break;
  }
  if (rc == sqlite::kOk) {
    set_meta_.number(1, static_cast<std::int64_t>(through));
    rc = set_meta_.run();
  }
  if (rc != sqlite::kOk) {
    Error error = main_.error(rc, "write history.db");
    (void)main_.execute("ROLLBACK").has_value();
    return error;
  }
  if (auto r = main_.execute("COMMIT"); !r) {
    (void)main_.execute("ROLLBACK").has_value();
    return r;
  }
  dirty_.clear();
  applied_ = through;
  return {};
}

Result<void> SqliteHistory::rewind(Lsn last) {
  if (applied_ <= last) return {};
  for (std::int64_t day : days_newest_first()) {
    auto opened = writer(day);
    if (!opened) return opened.error();
    std::string sql =
        "DELETE FROM jobs WHERE lsn>" + std::to_string(last) + ";";
    if (auto r = (*opened)->db.execute(sql.c_str()); !r) return r;
  }
  return set_main(last);
}

Result<void> SqliteHistory::expire(Millis now_ms) {
  std::lock_guard lock(mutex_);
  for (auto it = days_.begin(); it != days_.end();) {
    auto [day, expires] = *it;
    // A job made in that day could still end in it: wait for the day itself.
    if (expires > now_ms || (day + 1) * kDayMs > now_ms) {
      ++it;
      continue;
    }
    remove_bucket_.number(1, day);
    if (int rc = remove_bucket_.run(); rc != sqlite::kOk) {
      return main_.error(rc, "forget an expired file");
    }
    // Crash here: the file is adopted at the next open and expires again.
    writers_.erase(day);
    readers_.erase(day);
    dirty_.erase(day);
    it = days_.erase(it);
    std::error_code error;
    for (const char* suffix : {"", "-wal", "-shm"}) {
      std::filesystem::remove(path(day) + suffix, error);
    }
  }
  return {};
}

// --- reading ---

std::vector<std::int64_t> SqliteHistory::days_newest_first() {
  std::vector<std::int64_t> days;
  std::lock_guard lock(mutex_);
  for (auto it = days_.rbegin(); it != days_.rend(); ++it) {
    days.push_back(it->first);
  }
  return days;
}

Result<FinishedJob> read_row(Statement& row, bool whole) {
  FinishedJob job;
  job.lsn = static_cast<Lsn>(row.number_at(kLsn));
  job.finished_ms = row.number_at(kFinished);
  auto head = decode(RecordType::enqueue, as_bytes(row.text_at(kHead)));
  if (!head) return head.error();
  auto tail = decode(RecordType::end, as_bytes(row.text_at(kTail)));
  if (!tail) return tail.error();
  auto* body = std::get_if<EnqueueRecord>(&head->body);
  auto* end = std::get_if<EndRecord>(&tail->body);
  if (body == nullptr || end == nullptr) {
    return Error{Code::corrupt, "history: a row holds another record"};
  }
  job.body = std::move(*body);
  job.end = std::move(*end);
  if (whole) {
    job.body.job.payload = row.text_at(kPayload);
    job.end.outcome.result = row.text_at(kResult);
  }
  return job;
}

Result<std::optional<FinishedJob>> read_one(Statement& statement,
                                            const Database& db, Millis now_ms) {
  int rc = statement.step();
  if (rc == sqlite::kDone ||
      (rc == sqlite::kRow && statement.number_at(kExpires) <= now_ms)) {
    statement.reset();
    return std::optional<FinishedJob>{};
  }
  if (rc != sqlite::kRow) {
    Error error = db.error(rc, "read");
    statement.reset();
    return error;
  }
  auto job = read_row(statement, true);
  statement.reset();
  if (!job) return job.error();
  return std::optional<FinishedJob>(std::move(*job));
}

Result<std::optional<FinishedJob>> SqliteHistory::find(const JobId& id,
                                                       Millis now_ms) {
  std::lock_guard lock(mutex_);
  std::int64_t day = day_of(id);
  if (!days_.contains(day)) return std::optional<FinishedJob>{};
  auto from = reader(day);
  if (!from) return from.error();
  (*from)->find.bytes(1, id.bytes.data(), id.bytes.size());
  return read_one((*from)->find, (*from)->db, now_ms);
}

Result<std::optional<FinishedJob>> SqliteHistory::find_by_fence(Fence fence,
                                                                Millis now_ms) {
  std::lock_guard lock(mutex_);
  for (auto it = days_.rbegin(); it != days_.rend(); ++it) {
    auto from = reader(it->first);
    if (!from) return from.error();
    (*from)->by_fence.number(1, static_cast<std::int64_t>(fence));
    auto job = read_one((*from)->by_fence, (*from)->db, now_ms);
    if (!job || *job) return job;
  }
  return std::optional<FinishedJob>{};
}

Result<History::Page> SqliteHistory::list(const ListQuery& query, Millis now_ms,
                                          std::uint64_t examine) {
  Page page;
  JobId below;
  below.bytes.fill(0xff);
  if (query.until_ms > 0) below = first_id_at(query.until_ms + 1);
  JobId from = first_id_at(query.since_ms);
  if (!query.cursor.empty()) {
    auto id = parse_job_id(query.cursor);
    if (!id) return Error{Code::invalid, "cursor: not one of ours"};
    below = std::min(below, *id);
  }
  bool more = false;
  for (std::int64_t day : days_newest_first()) {
    if (day > day_of(below) || day < day_of(from)) continue;
    if (auto r =
            list_day(day, query, below, from, now_ms, examine, &page, &more);
        !r) {
      return r.error();
    }
    if (more) break;
  }
  if (!more) page.cursor.clear();
  return page;
}

bool wanted_by_labels(const ListQuery& query, const NewJob& job) {
  for (const auto& label : query.labels) {
    if (std::find(job.labels.begin(), job.labels.end(), label) ==
        job.labels.end()) {
      return false;
    }
  }
  return true;
}

Result<void> SqliteHistory::list_day(std::int64_t day, const ListQuery& query,
                                     const JobId& below, const JobId& from,
                                     Millis now_ms, std::uint64_t examine,
                                     Page* page, bool* more) {
  std::lock_guard lock(mutex_);
  if (!days_.contains(day)) return {};  // it expired since
  auto opened = reader(day);
  if (!opened) return opened.error();
  Statement& row = (*opened)->scan;
  row.bytes(1, below.bytes.data(), below.bytes.size());
  row.bytes(2, from.bytes.data(), from.bytes.size());
  int rc;
  Result<void> result;
  while ((rc = row.step()) == sqlite::kRow) {
    if (page->scanned >= examine || page->bytes >= query.bytes ||
        page->jobs.size() >= static_cast<std::size_t>(query.limit)) {
      *more = true;
      break;
    }
    ++page->scanned;
    JobId id;
    auto bytes = row.text_at(kId);
    if (bytes.size() == id.bytes.size()) {
      std::memcpy(id.bytes.data(), bytes.data(), bytes.size());
    }
    page->cursor = to_string(id);
    if (row.number_at(kExpires) <= now_ms) continue;
    auto state = static_cast<State>(row.number_at(kState));
    if (!query.states.empty() &&
        std::find(query.states.begin(), query.states.end(), state) ==
            query.states.end()) {
      continue;
    }
    if (!query.kind.empty() && row.text_at(kKind) != query.kind) continue;
    if (!query.queue.empty() && row.text_at(kQueue) != query.queue) continue;
    auto job = read_row(row, false);
    if (!job) {
      result = job.error();
      break;
    }
    if (!wanted_by_labels(query, job->body.job)) continue;
    page->bytes += row.text_at(kHead).size() + row.text_at(kTail).size();
    page->jobs.push_back(std::move(*job));
  }
  if (rc != sqlite::kRow && rc != sqlite::kDone) {
    result = (*opened)->db.error(rc, "list");
  }
  row.reset();
  return result;
}

}  // namespace

Result<std::unique_ptr<History>> History::open(const std::string& dir) {
  auto history = std::make_unique<SqliteHistory>(dir);
  if (auto r = history->start(); !r) return r.error();
  return std::unique_ptr<History>(std::move(history));
}

JobView view_of(const FinishedJob& job, bool fsync) {
  JobView view;
  view.fsync = fsync;
  fill_from_body(job.body, true, &view);
  fill_from_end(job.end, job.finished_ms, &view);
  return view;
}

}  // namespace machina
