#include "server/api/patches.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

#include "queue/base/logger.h"
#include "queue/history/sqlite.h"

namespace machina {
namespace {

using sqlite::Database;
using sqlite::Statement;

constexpr int kSchemaVersion = 2;

// Texts that are not there are empty, not NULL, but for parent_patch_id and
// rolled_back_by, which point elsewhere. A licence is one word in any case
// (SPDX).
constexpr char kSchema1[] = R"(
CREATE TABLE meta(key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta(key,value) VALUES('patches',0),('reverse_bytes',0),
  ('rebuild',1);
CREATE TABLE patches(
  patch_id TEXT NOT NULL PRIMARY KEY, lsn INTEGER NOT NULL, state TEXT NOT NULL,
  outcome TEXT NOT NULL, reason TEXT NOT NULL, repo TEXT NOT NULL,
  base_rev TEXT NOT NULL, base_commit TEXT NOT NULL, commit_id TEXT NOT NULL,
  branch TEXT NOT NULL, pushed INTEGER NOT NULL, description TEXT NOT NULL,
  author TEXT NOT NULL, parent_patch_id TEXT, diff_digest TEXT NOT NULL,
  approval TEXT NOT NULL, approval_actor TEXT NOT NULL,
  approval_comment TEXT NOT NULL, approval_digest TEXT NOT NULL,
  approval_at INTEGER NOT NULL, lines_added INTEGER NOT NULL,
  lines_removed INTEGER NOT NULL, file_count INTEGER NOT NULL,
  tests_before TEXT NOT NULL, tests_after TEXT NOT NULL,
  newly_failing TEXT NOT NULL, newly_passing TEXT NOT NULL,
  newly_failing_count INTEGER NOT NULL, newly_passing_count INTEGER NOT NULL,
  reverse_diff_bytes INTEGER NOT NULL, rolled_back_by TEXT,
  created INTEGER NOT NULL, finished INTEGER NOT NULL);
CREATE INDEX patches_by_repo ON patches(repo, patch_id);
CREATE INDEX patches_by_outcome ON patches(outcome, patch_id);
CREATE TABLE files(
  patch_id TEXT NOT NULL, position INTEGER NOT NULL, path TEXT NOT NULL,
  old_path TEXT NOT NULL, added INTEGER NOT NULL, removed INTEGER NOT NULL,
  sha256_before TEXT NOT NULL, sha256_after TEXT NOT NULL,
  PRIMARY KEY(patch_id, position)) WITHOUT ROWID;
CREATE INDEX files_by_path ON files(path, patch_id);
CREATE TABLE provenance(
  patch_id TEXT NOT NULL, position INTEGER NOT NULL, origin TEXT NOT NULL,
  vector_id TEXT NOT NULL, influence REAL,
  license TEXT NOT NULL COLLATE NOCASE,
  PRIMARY KEY(patch_id, position)) WITHOUT ROWID;
CREATE INDEX provenance_by_license ON provenance(license, patch_id);
CREATE INDEX provenance_by_vector ON provenance(vector_id, patch_id);
CREATE TABLE branch_log(
  patch_id TEXT NOT NULL, ts INTEGER NOT NULL, job_id TEXT NOT NULL,
  action TEXT NOT NULL, branch TEXT NOT NULL, commit_id TEXT NOT NULL,
  PRIMARY KEY(patch_id, ts, job_id, action)) WITHOUT ROWID;
CREATE TABLE rollbacks(
  patch_id TEXT NOT NULL, job_id TEXT NOT NULL, lsn INTEGER NOT NULL,
  state TEXT NOT NULL, outcome TEXT NOT NULL, region TEXT NOT NULL,
  branch TEXT NOT NULL, commit_id TEXT NOT NULL, reason TEXT NOT NULL,
  pushed INTEGER NOT NULL, verified INTEGER NOT NULL,
  restored INTEGER NOT NULL, created INTEGER NOT NULL,
  finished INTEGER NOT NULL, PRIMARY KEY(patch_id, job_id)) WITHOUT ROWID;
CREATE INDEX rollbacks_by_job ON rollbacks(job_id);
CREATE TABLE unblocks(
  job_id TEXT NOT NULL PRIMARY KEY, lsn INTEGER NOT NULL, ts INTEGER NOT NULL,
  actor TEXT NOT NULL, input TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE reverse_diffs(
  patch_id TEXT NOT NULL PRIMARY KEY, bytes BLOB NOT NULL);
)";

// `written`: the schema that a patch's row was made under. An earlier one's
// lacks what is new here; a rebuild is owed and fills it in.
constexpr char kSchema2[] = R"(
ALTER TABLE patches ADD COLUMN suite TEXT NOT NULL DEFAULT '';
ALTER TABLE patches ADD COLUMN written INTEGER NOT NULL DEFAULT 1;
ALTER TABLE rollbacks ADD COLUMN tests TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN license_fingerprint TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN session_id TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN retrieved_at TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN semantic_alerts TEXT NOT NULL DEFAULT '';
CREATE INDEX patches_by_digest ON patches(diff_digest, patch_id);
CREATE INDEX provenance_by_fingerprint
  ON provenance(license_fingerprint, patch_id);
CREATE INDEX provenance_by_session ON provenance(session_id, patch_id);
CREATE TABLE contributors(
  patch_id TEXT NOT NULL, vector_id TEXT NOT NULL, session_id TEXT NOT NULL,
  influence REAL NOT NULL,
  PRIMARY KEY(patch_id, vector_id, session_id)) WITHOUT ROWID;
CREATE TABLE metrics(
  patch_id TEXT NOT NULL PRIMARY KEY, tests_passed INTEGER,
  tests_failed INTEGER, errors INTEGER, flaky INTEGER,
  error_trace_count INTEGER NOT NULL, lines_changed INTEGER NOT NULL,
  context_tokens INTEGER, patch_difficulty REAL, effort_estimate REAL,
  roi_tag TEXT NOT NULL, enhancement_name TEXT NOT NULL,
  enhancement_score REAL, start_time INTEGER NOT NULL,
  time_to_completion INTEGER NOT NULL) WITHOUT ROWID;
UPDATE meta SET value=1 WHERE key='rebuild';
)";

constexpr const char* kUpgrades[] = {kSchema2};

const char* newest_schema() {
  static const std::string all = std::string(kSchema1) + kSchema2;
  return all.c_str();
}

// The column is not a schema of its own: a program of schema 2 names the
// columns that it reads and writes, so it goes on with a file that has one
// more. A new version number would make that program refuse the file. Rows of
// that program are of "default", the only tenant that it has.
Result<void> add_tenant(Database& db) {
  Statement look;
  int rc = look.prepare(
      db.get(),
      "SELECT 1 FROM pragma_table_info('patches') WHERE name='tenant'");
  if (rc == sqlite::kOk) rc = look.step();
  if (rc == sqlite::kRow) return {};
  if (rc != sqlite::kDone) return db.error(rc, "read the columns of patches");
  return db.execute(
      "ALTER TABLE patches ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default'");
}

// The columns of a summary, in the order in which read_summary() takes them.
constexpr char kSummary[] =
    "patch_id,state,outcome,reason,repo,base_rev,base_commit,commit_id,branch,"
    "pushed,description,author,parent_patch_id,diff_digest,approval,"
    "approval_actor,approval_comment,approval_digest,approval_at,lines_added,"
    "lines_removed,file_count,tests_before,tests_after,newly_failing,"
    "newly_passing,newly_failing_count,newly_passing_count,reverse_diff_bytes,"
    "rolled_back_by,created,finished,tenant";

std::string string_at(Statement& row, int column) {
  return std::string(row.text_at(column));
}

PatchRecord read_summary(Statement& row) {
  PatchRecord patch;
  int at = 0;
  auto text = [&] { return string_at(row, at++); };
  auto number = [&] { return row.number_at(at++); };
  patch.patch_id = text();
  patch.state = text();
  patch.outcome = text();
  patch.reason = text();
  patch.repo = text();
  patch.base_rev = text();
  patch.base_commit = text();
  patch.commit = text();
  patch.branch = text();
  patch.pushed = number() != 0;
  patch.description = text();
  patch.author = text();
  patch.parent_patch_id = text();
  patch.diff_digest = text();
  patch.approval.state = text();
  patch.approval.actor = text();
  patch.approval.comment = text();
  patch.approval.digest = text();
  patch.approval.at_ms = number();
  patch.lines_added = number();
  patch.lines_removed = number();
  patch.file_count = number();
  patch.tests_before = text();
  patch.tests_after = text();
  patch.newly_failing = text();
  patch.newly_passing = text();
  patch.newly_failing_count = number();
  patch.newly_passing_count = number();
  patch.reverse_diff_bytes = static_cast<std::uint64_t>(number());
  patch.rolled_back_by = text();
  patch.created_ms = number();
  patch.finished_ms = number();
  patch.tenant = text();
  return patch;
}

// The reads. Each ends in order of an index.
struct ReadSql {
  std::string summary =
      std::string("SELECT ") + kSummary + " FROM patches WHERE patch_id=?1";
  std::string all =
      "SELECT patch_id FROM patches WHERE patch_id<?1 ORDER BY patch_id DESC";
  std::string by_repo =
      "SELECT patch_id FROM patches WHERE repo=?2 AND patch_id<?1 "
      "ORDER BY patch_id DESC";
  std::string by_outcome =
      "SELECT patch_id FROM patches WHERE outcome=?2 AND patch_id<?1 "
      "ORDER BY patch_id DESC";
  std::string by_path =
      "SELECT patch_id FROM files WHERE path=?2 AND patch_id<?1 "
      "ORDER BY patch_id DESC";
  std::string by_license =
      "SELECT patch_id FROM provenance WHERE license=?2 AND patch_id<?1 "
      "ORDER BY patch_id DESC";
  std::string by_vector =
      "SELECT patch_id FROM provenance WHERE vector_id=?2 AND patch_id<?1 "
      "ORDER BY patch_id DESC";
  std::string by_fingerprint =
      "SELECT patch_id FROM provenance WHERE license_fingerprint=?2 AND "
      "patch_id<?1 ORDER BY patch_id DESC";
  std::string by_session =
      "SELECT patch_id FROM provenance WHERE session_id=?2 AND patch_id<?1 "
      "ORDER BY patch_id DESC";
  std::string by_digest =
      "SELECT patch_id FROM patches WHERE diff_digest=?2 AND patch_id<?1 "
      "ORDER BY patch_id DESC";
  std::string has_fingerprint =
      "SELECT 1 FROM provenance WHERE license_fingerprint=?2 AND patch_id=?1 "
      "LIMIT 1";
  std::string has_session =
      "SELECT 1 FROM provenance WHERE session_id=?2 AND patch_id=?1 LIMIT 1";
  std::string has_path =
      "SELECT 1 FROM files WHERE path=?2 AND patch_id=?1 LIMIT 1";
  std::string has_license =
      "SELECT 1 FROM provenance WHERE license=?2 AND patch_id=?1 LIMIT 1";
  std::string has_vector =
      "SELECT 1 FROM provenance WHERE vector_id=?2 AND patch_id=?1 LIMIT 1";
  std::string files =
      "SELECT path,old_path,added,removed,sha256_before,sha256_after "
      "FROM files WHERE patch_id=?1 ORDER BY position";
  std::string sources =
      "SELECT position,origin,vector_id,influence,license,"
      "license_fingerprint,session_id,retrieved_at,semantic_alerts "
      "FROM provenance WHERE patch_id=?1 ORDER BY position";
  std::string branch_log =
      "SELECT job_id,action,branch,commit_id,ts FROM branch_log "
      "WHERE patch_id=?1 ORDER BY ts,job_id,action";
  std::string rollbacks =
      "SELECT job_id,state,outcome,region,branch,commit_id,reason,pushed,"
      "verified,restored,created,finished,tests FROM rollbacks WHERE "
      "patch_id=?1 "
      "ORDER BY job_id DESC";
  std::string suite = "SELECT suite FROM patches WHERE patch_id=?1";
  std::string contributors =
      "SELECT vector_id,session_id,influence FROM contributors "
      "WHERE patch_id=?1 ORDER BY vector_id,session_id";
  std::string metrics =
      "SELECT tests_passed,tests_failed,errors,flaky,error_trace_count,"
      "lines_changed,context_tokens,patch_difficulty,effort_estimate,roi_tag,"
      "enhancement_name,enhancement_score,start_time,time_to_completion "
      "FROM metrics WHERE patch_id=?1";
  std::string reverse_diff =
      "SELECT bytes FROM reverse_diffs WHERE patch_id=?1";
};

const ReadSql& read_sql() {
  static const ReadSql sql;
  return sql;
}

EndedJob ended_job(const HistoryChange& change) {
  EndedJob job;
  const NewJob& asked = change.body->job;
  const Outcome& outcome = change.end->outcome;
  job.id = change.id;
  job.lsn = change.lsn;
  job.kind = asked.kind;
  job.tenant = asked.tenant;
  job.payload = asked.payload;
  job.result = outcome.result;
  job.state = change.end->state;
  job.message = outcome.message;
  job.fence = change.end->fence;
  job.artifacts = outcome.artifacts;
  job.created_ms = change.body->created_ms;
  job.finished_ms = change.finished_ms;
  return job;
}

}  // namespace

struct Patches::Writer {
  Database db;
  Statement set_meta, patch_lsn, own_patch, rollback_lsn;
  Statement put_patch, put_file, put_source, put_log, put_rollback;
  Statement put_reverse, put_unblock, get_unblock, drop_unblock;
  Statement set_rolled_back, trim_rollbacks;
  Statement oldest, oldest_reverse, reverse_size, drop_reverse, mark_no_reverse;
  Statement drop_patch, drop_files, drop_sources, drop_log, drop_rollbacks,
      drop_rollback;
  Statement old_patch, set_suite, put_contributor, put_metrics;
  Statement drop_contributors, drop_metrics;

  int prepare();
};

int Patches::Writer::prepare() {
  const std::string summary = kSummary;
  const std::pair<Statement*, std::string> all[] = {
      {&set_meta, "INSERT OR REPLACE INTO meta(key,value) VALUES(?1,?2)"},
      {&patch_lsn, "SELECT lsn FROM patches WHERE patch_id=?1"},
      {&own_patch, "SELECT lsn FROM patches WHERE patch_id=?1 AND tenant=?2"},
      {&rollback_lsn, "SELECT lsn,patch_id FROM rollbacks WHERE job_id=?1"},
      {&put_patch,
       "INSERT OR REPLACE INTO patches(" + summary +
           ",lsn,suite,written) "
           "VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,"
           "?16,?17,?18,?19,?20,?21,?22,?23,?24,?25,?26,?27,?28,?29,?30,?31,"
           "?32,?33,?34,?35," +
           std::to_string(kSchemaVersion) + ")"},
      {&old_patch,
       "SELECT approval_digest FROM patches WHERE patch_id=?1 AND written<" +
           std::to_string(kSchemaVersion)},
      {&set_suite, "UPDATE patches SET suite=?2,written=" +
                       std::to_string(kSchemaVersion) + " WHERE patch_id=?1"},
      {&put_contributor,
       "INSERT OR REPLACE INTO contributors VALUES(?1,?2,?3,?4)"},
      {&put_metrics,
       "INSERT OR REPLACE INTO metrics VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,"
       "?11,?12,?13,?14,?15)"},
      {&drop_contributors, "DELETE FROM contributors WHERE patch_id=?1"},
      {&drop_metrics, "DELETE FROM metrics WHERE patch_id=?1"},
      {&put_file,
       "INSERT OR REPLACE INTO files VALUES(?1,?2,?3,?4,?5,?6,?7,?8)"},
      {&put_source,
       "INSERT OR REPLACE INTO provenance VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,"
       "?10)"},
      {&put_log, "INSERT OR REPLACE INTO branch_log VALUES(?1,?2,?3,?4,?5,?6)"},
      {&put_rollback,
       "INSERT OR REPLACE INTO rollbacks VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,"
       "?10,?11,?12,?13,?14,?15)"},
      {&put_reverse, "INSERT OR REPLACE INTO reverse_diffs VALUES(?1,?2)"},
      {&put_unblock, "INSERT OR REPLACE INTO unblocks VALUES(?1,?2,?3,?4,?5)"},
      {&get_unblock, "SELECT ts,actor,input FROM unblocks WHERE job_id=?1"},
      {&drop_unblock, "DELETE FROM unblocks WHERE job_id=?1"},
      {&set_rolled_back,
       "UPDATE patches SET rolled_back_by=?2 WHERE patch_id=?1"},
      {&trim_rollbacks,
       "DELETE FROM rollbacks WHERE patch_id=?1 AND job_id NOT IN (SELECT "
       "job_id FROM rollbacks WHERE patch_id=?1 ORDER BY job_id DESC LIMIT " +
           std::to_string(kPatchRollbacksMax) + ")"},
      {&oldest, "SELECT patch_id FROM patches ORDER BY patch_id LIMIT 1"},
      {&oldest_reverse,
       "SELECT patch_id FROM reverse_diffs ORDER BY patch_id LIMIT 1"},
      {&reverse_size,
       "SELECT length(bytes) FROM reverse_diffs WHERE patch_id=?1"},
      {&drop_reverse, "DELETE FROM reverse_diffs WHERE patch_id=?1"},
      {&mark_no_reverse,
       "UPDATE patches SET reverse_diff_bytes=0 WHERE patch_id=?1"},
      {&drop_patch, "DELETE FROM patches WHERE patch_id=?1"},
      {&drop_files, "DELETE FROM files WHERE patch_id=?1"},
      {&drop_sources, "DELETE FROM provenance WHERE patch_id=?1"},
      {&drop_log, "DELETE FROM branch_log WHERE patch_id=?1"},
      {&drop_rollbacks, "DELETE FROM rollbacks WHERE patch_id=?1"},
      {&drop_rollback, "DELETE FROM rollbacks WHERE patch_id=?1 AND job_id=?2"},
  };
  for (const auto& [statement, sql] : all) {
    if (int rc = statement->prepare(db.get(), sql); rc != sqlite::kOk) {
      return rc;
    }
  }
  return sqlite::kOk;
}

struct Patches::Reader {
  Database db;
  Statement summary, all, by_repo, by_outcome, by_path, by_license, by_vector;
  Statement has_path, has_license, has_vector;
  Statement by_fingerprint, by_session, by_digest;
  Statement has_fingerprint, has_session;
  Statement files, sources, branch_log, rollbacks, reverse_diff;
  Statement suite, contributors, metrics;

  int prepare();
  Result<std::optional<PatchRecord>> one(const std::string& patch_id,
                                         const std::string& tenant);
  Result<std::vector<PatchSource>> sources_of(const std::string& patch_id);
  Result<void> origin_of(const std::string& patch_id, PatchRecord* patch);
  // Runs `row` for each row of `statement`, whose parameters are bound.
  Result<void> each(Statement& statement, const std::function<bool()>& row);
};

int Patches::Reader::prepare() {
  const ReadSql& sql = read_sql();
  const std::pair<Statement*, const std::string*> wanted[] = {
      {&summary, &sql.summary},
      {&all, &sql.all},
      {&by_repo, &sql.by_repo},
      {&by_outcome, &sql.by_outcome},
      {&by_path, &sql.by_path},
      {&by_license, &sql.by_license},
      {&by_vector, &sql.by_vector},
      {&has_path, &sql.has_path},
      {&has_license, &sql.has_license},
      {&has_vector, &sql.has_vector},
      {&files, &sql.files},
      {&sources, &sql.sources},
      {&branch_log, &sql.branch_log},
      {&rollbacks, &sql.rollbacks},
      {&reverse_diff, &sql.reverse_diff},
      {&by_fingerprint, &sql.by_fingerprint},
      {&by_session, &sql.by_session},
      {&by_digest, &sql.by_digest},
      {&has_fingerprint, &sql.has_fingerprint},
      {&has_session, &sql.has_session},
      {&suite, &sql.suite},
      {&contributors, &sql.contributors},
      {&metrics, &sql.metrics},
  };
  for (const auto& [statement, text] : wanted) {
    if (int rc = statement->prepare(db.get(), *text); rc != sqlite::kOk) {
      return rc;
    }
  }
  return sqlite::kOk;
}

std::vector<std::string> Patches::read_statements() {
  const ReadSql& sql = read_sql();
  return {sql.summary,         sql.all,         sql.by_repo,
          sql.by_outcome,      sql.by_path,     sql.by_license,
          sql.by_vector,       sql.has_path,    sql.has_license,
          sql.has_vector,      sql.files,       sql.sources,
          sql.branch_log,      sql.rollbacks,   sql.reverse_diff,
          sql.by_fingerprint,  sql.by_session,  sql.by_digest,
          sql.has_fingerprint, sql.has_session, sql.suite,
          sql.contributors,    sql.metrics};
}

// --- open ---

Patches::Patches(std::string dir, Store* files, const PatchLimits& limits)
    : dir_(std::move(dir)), files_(files), limits_(limits) {}

Patches::~Patches() = default;

Result<std::unique_ptr<Patches>> Patches::open(const std::string& dir,
                                               Store* files,
                                               const PatchLimits& limits) {
  std::unique_ptr<Patches> patches(new Patches(dir, files, limits));
  if (auto r = patches->start(); !r) return r.error();
  return patches;
}

Result<void> Patches::start() {
  if (mkdir(dir_.c_str(), 0700) != 0 && errno != EEXIST) {
    return Error{Code::io,
                 "patches: mkdir " + dir_ + ": " + std::strerror(errno)};
  }
  auto opened = open_writer();
  if (!opened && opened.error().code == Code::corrupt) {
    if (auto r = put_aside(); !r) return r;
    opened = open_writer();
  }
  return opened;
}

Result<void> Patches::open_writer() {
  auto made = std::make_unique<Writer>();
  sqlite::Setup setup{"patches", newest_schema(), kSchemaVersion};
  setup.upgrades = kUpgrades;
  if (auto r = made->db.open(dir_ + "/patches.db", setup); !r) return r;
  if (auto r = add_tenant(made->db); !r) return r;
  if (int rc = made->prepare(); rc != sqlite::kOk) {
    return made->db.error(rc, "prepare patches.db");
  }
  Statement meta, waiting;
  int rc = meta.prepare(made->db.get(), "SELECT key,value FROM meta");
  bool owed = access((dir_ + "/rebuild").c_str(), F_OK) == 0;
  while (rc == sqlite::kOk || rc == sqlite::kRow) {
    if ((rc = meta.step()) != sqlite::kRow) break;
    if (meta.text_at(0) == "patches") patches_ = meta.number_at(1);
    if (meta.text_at(0) == "reverse_bytes") reverse_bytes_ = meta.number_at(1);
    if (meta.text_at(0) == "rebuild") owed = owed || meta.number_at(1) != 0;
  }
  if (rc == sqlite::kDone) {
    rc = waiting.prepare(made->db.get(), "SELECT job_id,lsn FROM unblocks");
  }
  unblocks_.clear();
  while (rc == sqlite::kOk || rc == sqlite::kRow) {
    if ((rc = waiting.step()) != sqlite::kRow) break;
    unblocks_[string_at(waiting, 0)] = static_cast<Lsn>(waiting.number_at(1));
  }
  if (rc != sqlite::kDone) return made->db.error(rc, "read patches.db");
  writer_ = std::move(made);
  rebuild_owed_ = owed;
  damaged_ = false;
  return {};
}

// The writer's lock is held.
Result<void> Patches::put_aside() {
  const std::string path = dir_ + "/patches.db";
  LogLine(Severity::error, "patches_damaged",
          path + " is damaged; put aside as " + path +
              ".damaged, rebuilt from the jobs that history still has");
  writer_.reset();
  std::lock_guard lock(read_mutex_);
  reader_.reset();
  for (const char* suffix : {"", "-wal", "-shm"}) {
    std::string from = path + suffix;
    std::string to = path + ".damaged" + suffix;
    unlink(to.c_str());  // an earlier one's log is not this one's
    if (rename(from.c_str(), to.c_str()) != 0 && errno != ENOENT) {
      return Error{Code::io,
                   "patches: put " + from + " aside: " + std::strerror(errno)};
    }
  }
  return {};
}

// --- writing ---

Result<void> Patches::in_transaction(
    const std::function<Result<void>()>& work) {
  const auto patches = patches_, reverse_bytes = reverse_bytes_;
  if (auto r = writer_->db.execute("BEGIN IMMEDIATE"); !r) return r;
  auto done = work();
  if (done) done = save_counters();
  if (done) done = writer_->db.execute("COMMIT");
  if (!done) {
    (void)writer_->db.execute("ROLLBACK").has_value();
    patches_ = patches;
    reverse_bytes_ = reverse_bytes;
  }
  return done;
}

Result<void> Patches::save_counters() {
  for (const auto& [key, value] :
       {std::pair{"patches", patches_},
        std::pair{"reverse_bytes", reverse_bytes_}}) {
    writer_->set_meta.text(1, key);
    writer_->set_meta.number(2, value);
    if (int rc = writer_->set_meta.run(); rc != sqlite::kOk) {
      return writer_->db.error(rc, "write meta");
    }
  }
  return {};
}

namespace {

// The first row's `column`, or nothing.
Result<std::optional<std::string>> text_of_row(const Database& db,
                                               Statement& statement,
                                               int column) {
  int rc = statement.step();
  std::optional<std::string> text;
  if (rc == sqlite::kRow) text = string_at(statement, column);
  if (rc == sqlite::kRow || rc == sqlite::kDone) {
    statement.reset();
    return text;
  }
  Error error = db.error(rc, "read");
  statement.reset();
  return error;
}

}  // namespace

Result<void> Patches::take(const std::vector<HistoryChange>& changes) {
  std::lock_guard lock(write_mutex_);
  Result<void> done;
  if (writer_ == nullptr) done = open_writer();
  if (done) {
    // Most of what ends is no patch and costs nothing here.
    if (std::none_of(changes.begin(), changes.end(),
                     [this](const auto& c) { return concerns(c); })) {
      return {};
    }
    done = write(changes);
  }
  if (!done && done.error().code == Code::corrupt) {
    done = put_aside();
    if (done) done = open_writer();
    if (done) done = write(changes);
  }
  const std::string marker = dir_ + "/rebuild";
  if (done) {
    if (gave_up_) {
      LogLine(Severity::info, "patches_again", "patches are written again");
      rebuild_owed_ = true;
    }
    failures_ = 0;
    gave_up_ = false;
    return {};
  }
  if (!gave_up_ && ++failures_ < kTakeFailuresMax) return done;
  if (!gave_up_) {
    LogLine(Severity::error, "patches_given_up",
            done.error().what +
                "; given up: patches that end now are missing there until it "
                "can be written again and was rebuilt");
    int fd = ::open(marker.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0) close(fd);
  }
  gave_up_ = true;
  return {};
}

// A read that fails says yes: the write will say why.
bool Patches::concerns(const HistoryChange& change) {
  if (change.unblock != nullptr) return true;
  if (change.body != nullptr) {
    const std::string& kind = change.body->job.kind;
    return kind == kPatchKind || kind == kRollbackKind ||
           (!unblocks_.empty() && unblocks_.contains(to_string(change.id)));
  }
  const std::string id = to_string(change.id);
  for (Statement* known : {&writer_->patch_lsn, &writer_->rollback_lsn}) {
    known->text(1, id);
    auto found = text_of_row(writer_->db, *known, 0);
    if (!found || *found) return true;
  }
  return false;
}

Result<void> Patches::write(const std::vector<HistoryChange>& changes) {
  const auto before = unblocks_;
  auto done = in_transaction([&]() -> Result<void> {
    for (const HistoryChange& change : changes) {
      if (!concerns(change)) continue;
      if (auto r = write_one(change); !r) return r;
    }
    return trim();
  });
  if (!done) unblocks_ = before;
  return done;
}

Result<void> Patches::write_one(const HistoryChange& change) {
  if (change.unblock != nullptr) return remember_unblock(change);
  const std::string id = to_string(change.id);
  if (change.body != nullptr) {
    const EndedJob job = ended_job(change);
    if (auto r = write_end(job); !r) return r;
    if (unblocks_.erase(id) == 0) return {};
    writer_->drop_unblock.text(1, id);
    if (int rc = writer_->drop_unblock.run(); rc != sqlite::kOk) {
      return writer_->db.error(rc, "forget an unblock");
    }
    return {};
  }
  // It lives again. A row of a later end is not this one's to take.
  writer_->patch_lsn.text(1, id);
  auto lsn = text_of_row(writer_->db, writer_->patch_lsn, 0);
  if (!lsn) return lsn.error();
  if (*lsn && std::stoull(**lsn) < change.lsn) {
    if (auto r = remove(id); !r) return r;
  }
  writer_->rollback_lsn.text(1, id);
  auto of_rollback = text_of_row(writer_->db, writer_->rollback_lsn, 0);
  if (!of_rollback) return of_rollback.error();
  if (*of_rollback && std::stoull(**of_rollback) < change.lsn) {
    writer_->rollback_lsn.text(1, id);
    auto patch = text_of_row(writer_->db, writer_->rollback_lsn, 1);
    if (!patch) return patch.error();
    writer_->drop_rollback.text(1, **patch);
    writer_->drop_rollback.text(2, id);
    if (int rc = writer_->drop_rollback.run(); rc != sqlite::kOk) {
      return writer_->db.error(rc, "forget a rollback");
    }
  }
  return {};
}

Result<void> Patches::write_end(const EndedJob& job) {
  if (job.kind == kPatchKind) return put_patch(job);
  if (job.kind == kRollbackKind) return put_rollback(job);
  return {};
}

Result<void> Patches::put_patch(const EndedJob& job) {
  Writer& to = *writer_;
  const std::string id = to_string(job.id);
  to.patch_lsn.text(1, id);
  auto lsn = text_of_row(to.db, to.patch_lsn, 0);
  if (!lsn) return lsn.error();
  if (*lsn) {
    if (job.lsn == 0) return fill_in(job);
    if (std::stoull(**lsn) >= job.lsn) return {};  // P2
    if (auto r = remove(id); !r) return r;
  }
  std::string reverse_diff;
  PatchRecord patch = read_patch(job, &reverse_diff);
  to.get_unblock.text(1, id);
  if (int rc = to.get_unblock.step(); rc == sqlite::kRow) {
    patch.approval =
        read_approval(to.get_unblock.text_at(2), to.get_unblock.text_at(1),
                      to.get_unblock.number_at(0));
  }
  to.get_unblock.reset();

  int at = 0;
  Statement& row = to.put_patch;
  auto text = [&](const std::string& value) { row.text(++at, value); };
  auto number = [&](std::int64_t value) { row.number(++at, value); };
  text(patch.patch_id);
  text(patch.state);
  text(patch.outcome);
  text(patch.reason);
  text(patch.repo);
  text(patch.base_rev);
  text(patch.base_commit);
  text(patch.commit);
  text(patch.branch);
  number(patch.pushed ? 1 : 0);
  text(patch.description);
  text(patch.author);
  if (patch.parent_patch_id.empty()) {
    row.null(++at);
  } else {
    text(patch.parent_patch_id);
  }
  text(patch.diff_digest);
  text(patch.approval.state);
  text(patch.approval.actor);
  text(patch.approval.comment);
  text(patch.approval.digest);
  number(patch.approval.at_ms);
  number(patch.lines_added);
  number(patch.lines_removed);
  number(patch.file_count);
  text(patch.tests_before);
  text(patch.tests_after);
  text(patch.newly_failing);
  text(patch.newly_passing);
  number(patch.newly_failing_count);
  number(patch.newly_passing_count);
  number(0);
  row.null(++at);
  number(patch.created_ms);
  number(patch.finished_ms);
  text(patch.tenant);
  number(static_cast<std::int64_t>(job.lsn));
  text(patch.suite);
  int rc = row.run();
  ++patches_;
  std::int64_t position = 0;
  for (const PatchFile& file : patch.files) {
    if (rc != sqlite::kOk) break;
    to.put_file.text(1, id);
    to.put_file.number(2, position++);
    to.put_file.text(3, file.path);
    to.put_file.text(4, file.old_path);
    to.put_file.number(5, file.added);
    to.put_file.number(6, file.removed);
    to.put_file.text(7, file.sha256_before);
    to.put_file.text(8, file.sha256_after);
    rc = to.put_file.run();
  }
  for (const BranchEntry& entry : patch.branch_log) {
    if (rc != sqlite::kOk) break;
    to.put_log.text(1, id);
    to.put_log.number(2, entry.at_ms);
    to.put_log.text(3, entry.job_id);
    to.put_log.text(4, entry.action);
    to.put_log.text(5, entry.branch);
    to.put_log.text(6, entry.commit);
    rc = to.put_log.run();
  }
  if (rc != sqlite::kOk) return to.db.error(rc, "write patch " + id);
  if (auto r = put_origin(patch); !r) return r;
  return keep_reverse_diff(job, reverse_diff);
}

// What a patch was made from, and what is counted of it.
Result<void> Patches::put_origin(const PatchRecord& patch) {
  Writer& to = *writer_;
  const std::string& id = patch.patch_id;
  int rc = sqlite::kOk;
  for (const PatchSource& source : patch.sources) {
    if (rc != sqlite::kOk) break;
    to.put_source.text(1, id);
    to.put_source.number(2, source.position);
    to.put_source.text(3, source.origin);
    to.put_source.text(4, source.vector_id);
    if (source.has_influence) {
      to.put_source.real(5, source.influence);
    } else {
      to.put_source.null(5);
    }
    to.put_source.text(6, source.license);
    to.put_source.text(7, source.license_fingerprint);
    to.put_source.text(8, source.session_id);
    to.put_source.text(9, source.retrieved_at);
    to.put_source.text(10, source.semantic_alerts);
    rc = to.put_source.run();
  }
  for (const PatchContributor& one : patch.contributors) {
    if (rc != sqlite::kOk) break;
    to.put_contributor.text(1, id);
    to.put_contributor.text(2, one.vector_id);
    to.put_contributor.text(3, one.session_id);
    to.put_contributor.real(4, one.influence);
    rc = to.put_contributor.run();
  }
  if (rc == sqlite::kOk && patch.metrics) {
    const PatchMetrics& m = *patch.metrics;
    Statement& row = to.put_metrics;
    int at = 0;
    const auto whole = [&](const std::optional<std::int64_t>& value) {
      ++at;
      value ? row.number(at, *value) : row.null(at);
    };
    const auto real = [&](const std::optional<double>& value) {
      ++at;
      value ? row.real(at, *value) : row.null(at);
    };
    row.text(++at, id);
    whole(m.tests_passed);
    whole(m.tests_failed);
    whole(m.errors);
    whole(m.flaky);
    whole(m.error_trace_count);
    whole(m.lines_changed);
    whole(m.context_tokens);
    real(m.patch_difficulty);
    real(m.effort_estimate);
    row.text(++at, m.roi_tag);
    row.text(++at, m.enhancement_name);
    real(m.enhancement_score);
    whole(m.start_ms);
    whole(m.time_to_completion_ms);
    rc = row.run();
  }
  if (rc != sqlite::kOk) return to.db.error(rc, "write the origin of " + id);
  return {};
}

// A row that an earlier schema made, of a job that history still has. What was
// learned since (who approved, what took it back) stays.
Result<void> Patches::fill_in(const EndedJob& job) {
  Writer& to = *writer_;
  const std::string id = to_string(job.id);
  to.old_patch.text(1, id);
  auto old = text_of_row(to.db, to.old_patch, 0);
  if (!old) return old.error();
  if (!*old) return {};
  std::string reverse_diff;
  const PatchRecord patch = read_patch(job, &reverse_diff);
  to.set_suite.text(1, id);
  to.set_suite.text(2, patch.suite);
  if (int rc = to.set_suite.run(); rc != sqlite::kOk) {
    return to.db.error(rc, "fill in patch " + id);
  }
  return put_origin(patch);
}

// Copied while the job's artifacts are there: a rollback may come years later.
Result<void> Patches::keep_reverse_diff(const EndedJob& job,
                                        const std::string& name) {
  if (name.empty() || files_ == nullptr ||
      std::find(job.artifacts.begin(), job.artifacts.end(), name) ==
          job.artifacts.end()) {
    return {};
  }
  auto staged = files_->artifacts(job.fence);
  if (!staged) return staged.error();
  auto found =
      std::find_if(staged->begin(), staged->end(),
                   [&](const Artifact& one) { return one.name == name; });
  if (found == staged->end() || found->size > kReverseDiffBytesMax ||
      found->size > limits_.reverse_bytes_max || found->size == 0) {
    return {};
  }
  auto file = files_->open_artifact(*found);
  if (!file && file.error().code == Code::not_found) return {};
  if (!file) return file.error();
  auto bytes = read_piece(*file->fd, 0, static_cast<std::size_t>(file->size));
  if (!bytes) return bytes.error();
  if (bytes->size() != file->size) {
    return Error{Code::io, "patches: artifact " + name + " is cut short"};
  }
  const std::string id = to_string(job.id);
  Writer& to = *writer_;
  to.put_reverse.text(1, id);
  to.put_reverse.bytes(2, bytes->data(), bytes->size());
  int rc = to.put_reverse.run();
  Statement mark;
  if (rc == sqlite::kOk) {
    rc = mark.prepare(
        to.db.get(),
        "UPDATE patches SET reverse_diff_bytes=?2 WHERE patch_id=?1");
  }
  if (rc == sqlite::kOk) {
    mark.text(1, id);
    mark.number(2, static_cast<std::int64_t>(bytes->size()));
    rc = mark.run();
  }
  if (rc != sqlite::kOk) return to.db.error(rc, "keep a reverse diff");
  reverse_bytes_ += static_cast<std::int64_t>(bytes->size());
  return {};
}

Result<void> Patches::put_rollback(const EndedJob& job) {
  Writer& to = *writer_;
  const RollbackRecord rollback = read_rollback(job);
  to.own_patch.text(1, rollback.patch_id);
  to.own_patch.text(2, job.tenant);
  auto known = text_of_row(to.db, to.own_patch, 0);
  if (!known) return known.error();
  if (!*known) return {};  // of a patch that its tenant does not know
  to.rollback_lsn.text(1, rollback.job_id);
  auto lsn = text_of_row(to.db, to.rollback_lsn, 0);
  if (!lsn) return lsn.error();
  if (*lsn && (job.lsn == 0 || std::stoull(**lsn) >= job.lsn)) return {};
  Statement& row = to.put_rollback;
  row.text(1, rollback.patch_id);
  row.text(2, rollback.job_id);
  row.number(3, static_cast<std::int64_t>(job.lsn));
  row.text(4, rollback.state);
  row.text(5, rollback.outcome);
  row.text(6, rollback.region);
  row.text(7, rollback.branch);
  row.text(8, rollback.commit);
  row.text(9, rollback.reason);
  row.number(10, rollback.pushed ? 1 : 0);
  row.number(11, rollback.verified ? 1 : 0);
  row.number(12, rollback.restored);
  row.number(13, rollback.created_ms);
  row.number(14, rollback.finished_ms);
  row.text(15, rollback.tests);
  int rc = row.run();
  const bool done = job.state == State::succeeded &&
                    rollback.outcome == "rolled_back" && rollback.restored > 0;
  if (rc == sqlite::kOk && done) {
    to.put_log.text(1, rollback.patch_id);
    to.put_log.number(2, rollback.finished_ms);
    to.put_log.text(3, rollback.job_id);
    to.put_log.text(
        4, rollback.region.empty() ? "rolled_back" : "region_rolled_back");
    to.put_log.text(5, rollback.branch);
    to.put_log.text(6, rollback.commit);
    rc = to.put_log.run();
  }
  if (rc == sqlite::kOk && done && rollback.region.empty()) {
    to.set_rolled_back.text(1, rollback.patch_id);
    to.set_rolled_back.text(2, rollback.job_id);
    rc = to.set_rolled_back.run();
  }
  if (rc == sqlite::kOk) {
    to.trim_rollbacks.text(1, rollback.patch_id);
    rc = to.trim_rollbacks.run();
  }
  if (rc != sqlite::kOk) {
    return to.db.error(rc, "write rollback " + rollback.job_id);
  }
  return {};
}

Result<void> Patches::remember_unblock(const HistoryChange& change) {
  const std::string id = to_string(change.id);
  auto known = unblocks_.find(id);
  if (known != unblocks_.end() && known->second >= change.lsn) return {};
  if (known == unblocks_.end() && unblocks_.size() >= kUnblocksMax) {
    auto oldest = std::min_element(
        unblocks_.begin(), unblocks_.end(),
        [](const auto& a, const auto& b) { return a.second < b.second; });
    writer_->drop_unblock.text(1, oldest->first);
    if (int rc = writer_->drop_unblock.run(); rc != sqlite::kOk) {
      return writer_->db.error(rc, "forget an unblock");
    }
    unblocks_.erase(oldest);
  }
  Statement& row = writer_->put_unblock;
  row.text(1, id);
  row.number(2, static_cast<std::int64_t>(change.lsn));
  row.number(3, change.finished_ms);
  row.text(4, change.unblock->actor);
  row.text(5, change.unblock->input);
  if (int rc = row.run(); rc != sqlite::kOk) {
    return writer_->db.error(rc, "remember an unblock");
  }
  unblocks_[id] = change.lsn;
  return {};
}

// A patch's row and all that hangs on it but its rollbacks.
Result<void> Patches::remove(const std::string& patch_id) {
  Writer& to = *writer_;
  to.reverse_size.text(1, patch_id);
  auto size = text_of_row(to.db, to.reverse_size, 0);
  if (!size) return size.error();
  if (*size) reverse_bytes_ -= std::stoll(**size);
  for (Statement* drop :
       {&to.drop_reverse, &to.drop_files, &to.drop_sources, &to.drop_log,
        &to.drop_contributors, &to.drop_metrics, &to.drop_patch}) {
    drop->text(1, patch_id);
    if (int rc = drop->run(); rc != sqlite::kOk) {
      return to.db.error(rc, "remove patch " + patch_id);
    }
  }
  --patches_;
  return {};
}

// P3.
Result<void> Patches::trim() {
  Writer& to = *writer_;
  while (reverse_bytes_ >
         static_cast<std::int64_t>(limits_.reverse_bytes_max)) {
    auto oldest = text_of_row(to.db, to.oldest_reverse, 0);
    if (!oldest) return oldest.error();
    if (!*oldest) {
      reverse_bytes_ = 0;
      break;
    }
    to.reverse_size.text(1, **oldest);
    auto size = text_of_row(to.db, to.reverse_size, 0);
    if (!size) return size.error();
    if (*size) reverse_bytes_ -= std::stoll(**size);
    for (Statement* drop : {&to.drop_reverse, &to.mark_no_reverse}) {
      drop->text(1, **oldest);
      if (int rc = drop->run(); rc != sqlite::kOk) {
        return to.db.error(rc, "drop a reverse diff");
      }
    }
  }
  while (patches_ > static_cast<std::int64_t>(limits_.patches_max)) {
    auto oldest = text_of_row(to.db, to.oldest, 0);
    if (!oldest) return oldest.error();
    if (!*oldest) {
      patches_ = 0;
      break;
    }
    if (auto r = remove(**oldest); !r) return r;
    to.drop_rollbacks.text(1, **oldest);
    if (int rc = to.drop_rollbacks.run(); rc != sqlite::kOk) {
      return to.db.error(rc, "remove rollbacks");
    }
  }
  return {};
}

// --- rebuilding ---

Result<void> Patches::begin_rebuild() {
  std::lock_guard lock(write_mutex_);
  if (damaged_ && writer_ != nullptr) {
    if (auto r = put_aside(); !r) return r;
  }
  return writer_ == nullptr ? open_writer() : Result<void>();
}

Result<void> Patches::add(const EndedJob& job) {
  std::lock_guard lock(write_mutex_);
  if (writer_ == nullptr) {
    return Error{Code::unavailable, "patches: patches.db is not open"};
  }
  return in_transaction([&]() -> Result<void> {
    if (auto r = write_end(job); !r) return r;
    return trim();
  });
}

Result<void> Patches::end_rebuild() {
  std::lock_guard lock(write_mutex_);
  if (writer_ == nullptr) {
    return Error{Code::unavailable, "patches: patches.db is not open"};
  }
  writer_->set_meta.text(1, "rebuild");
  writer_->set_meta.number(2, 0);
  if (int rc = writer_->set_meta.run(); rc != sqlite::kOk) {
    return writer_->db.error(rc, "write meta");
  }
  unlink((dir_ + "/rebuild").c_str());
  rebuild_owed_ = false;
  return {};
}

// --- reading ---

template <class T>
Result<T> Patches::reading(const std::function<Result<T>(Reader&)>& work) {
  std::lock_guard lock(read_mutex_);
  auto read = [&]() -> Result<T> {
    if (reader_ == nullptr) {
      auto made = std::make_unique<Reader>();
      if (auto r = made->db.open(dir_ + "/patches.db", {"patches"}); !r) {
        return r.error();
      }
      if (int rc = made->prepare(); rc != sqlite::kOk) {
        return made->db.error(rc, "prepare patches.db");
      }
      reader_ = std::move(made);
    }
    return work(*reader_);
  };
  Result<T> result = read();
  if (!result && result.error().code == Code::corrupt) {
    damaged_ = true;
    reader_.reset();
  }
  return result;
}

Result<void> Patches::Reader::each(Statement& statement,
                                   const std::function<bool()>& row) {
  int rc;
  while ((rc = statement.step()) == sqlite::kRow) {
    if (!row()) {
      rc = sqlite::kDone;
      break;
    }
  }
  Result<void> done;
  if (rc != sqlite::kDone) done = db.error(rc, "read");
  statement.reset();
  return done;
}

Result<std::optional<PatchRecord>> Patches::Reader::one(
    const std::string& patch_id, const std::string& tenant) {
  std::optional<PatchRecord> patch;
  summary.text(1, patch_id);
  auto done = each(summary, [&] {
    patch = read_summary(summary);
    return false;
  });
  if (!done) return done.error();
  if (patch && !tenant.empty() && patch->tenant != tenant) patch.reset();
  return patch;
}

Result<std::vector<PatchSource>> Patches::Reader::sources_of(
    const std::string& patch_id) {
  std::vector<PatchSource> out;
  sources.text(1, patch_id);
  auto done = each(sources, [&] {
    PatchSource& source = out.emplace_back();
    source.position = sources.number_at(0);
    source.origin = string_at(sources, 1);
    source.vector_id = string_at(sources, 2);
    source.has_influence = !sources.null_at(3);
    source.influence = sources.real_at(3);
    source.license = string_at(sources, 4);
    source.license_fingerprint = string_at(sources, 5);
    source.session_id = string_at(sources, 6);
    source.retrieved_at = string_at(sources, 7);
    source.semantic_alerts = string_at(sources, 8);
    return true;
  });
  if (!done) return done.error();
  std::stable_sort(out.begin(), out.end(), [](const auto& a, const auto& b) {
    if (a.has_influence != b.has_influence) return a.has_influence;
    return a.influence > b.influence;
  });
  return out;
}

// The suite, the contributors and the metrics.
Result<void> Patches::Reader::origin_of(const std::string& patch_id,
                                        PatchRecord* patch) {
  suite.text(1, patch_id);
  auto text = text_of_row(db, suite, 0);
  if (!text) return text.error();
  patch->suite = text->value_or("");
  contributors.text(1, patch_id);
  auto done = each(contributors, [&] {
    patch->contributors.push_back({string_at(contributors, 0),
                                   string_at(contributors, 1),
                                   contributors.real_at(2)});
    return true;
  });
  if (!done) return done;
  std::stable_sort(
      patch->contributors.begin(), patch->contributors.end(),
      [](const auto& a, const auto& b) { return a.influence > b.influence; });
  metrics.text(1, patch_id);
  return each(metrics, [&] {
    const auto whole = [&](int at) -> std::optional<std::int64_t> {
      if (metrics.null_at(at)) return std::nullopt;
      return metrics.number_at(at);
    };
    const auto real = [&](int at) -> std::optional<double> {
      if (metrics.null_at(at)) return std::nullopt;
      return metrics.real_at(at);
    };
    PatchMetrics& m = patch->metrics.emplace();
    m.tests_passed = whole(0);
    m.tests_failed = whole(1);
    m.errors = whole(2);
    m.flaky = whole(3);
    m.error_trace_count = metrics.number_at(4);
    m.lines_changed = metrics.number_at(5);
    m.context_tokens = whole(6);
    m.patch_difficulty = real(7);
    m.effort_estimate = real(8);
    m.roi_tag = string_at(metrics, 9);
    m.enhancement_name = string_at(metrics, 10);
    m.enhancement_score = real(11);
    m.start_ms = metrics.number_at(12);
    m.time_to_completion_ms = metrics.number_at(13);
    return false;
  });
}

Result<std::optional<PatchRecord>> Patches::find(const std::string& patch_id,
                                                 const std::string& tenant) {
  using Found = std::optional<PatchRecord>;
  return reading<Found>([&](Reader& from) -> Result<Found> {
    auto patch = from.one(patch_id, tenant);
    if (!patch || !*patch) return patch;
    PatchRecord& to = **patch;
    from.files.text(1, patch_id);
    auto done = from.each(from.files, [&] {
      PatchFile& file = to.files.emplace_back();
      file.path = string_at(from.files, 0);
      file.old_path = string_at(from.files, 1);
      file.added = from.files.number_at(2);
      file.removed = from.files.number_at(3);
      file.sha256_before = string_at(from.files, 4);
      file.sha256_after = string_at(from.files, 5);
      return true;
    });
    if (!done) return done.error();
    auto sources = from.sources_of(patch_id);
    if (!sources) return sources.error();
    to.sources = std::move(*sources);
    if (auto r = from.origin_of(patch_id, &to); !r) return r.error();
    from.branch_log.text(1, patch_id);
    done = from.each(from.branch_log, [&] {
      BranchEntry& entry = to.branch_log.emplace_back();
      entry.job_id = string_at(from.branch_log, 0);
      entry.action = string_at(from.branch_log, 1);
      entry.branch = string_at(from.branch_log, 2);
      entry.commit = string_at(from.branch_log, 3);
      entry.at_ms = from.branch_log.number_at(4);
      return true;
    });
    if (!done) return done.error();
    Statement& row = from.rollbacks;
    row.text(1, patch_id);
    done = from.each(row, [&] {
      RollbackRecord& rollback = to.rollbacks.emplace_back();
      rollback.patch_id = patch_id;
      rollback.job_id = string_at(row, 0);
      rollback.state = string_at(row, 1);
      rollback.outcome = string_at(row, 2);
      rollback.region = string_at(row, 3);
      rollback.branch = string_at(row, 4);
      rollback.commit = string_at(row, 5);
      rollback.reason = string_at(row, 6);
      rollback.pushed = row.number_at(7) != 0;
      rollback.verified = row.number_at(8) != 0;
      rollback.restored = row.number_at(9);
      rollback.created_ms = row.number_at(10);
      rollback.finished_ms = row.number_at(11);
      rollback.tests = string_at(row, 12);
      return true;
    });
    if (!done) return done.error();
    return patch;
  });
}

Result<PatchPage> Patches::list(const PatchQuery& query) {
  return reading<PatchPage>([&](Reader& from) -> Result<PatchPage> {
    // One filter drives, by its index; the others look at each hit.
    struct Filter {
      std::vector<std::string> values;  // one of them; empty: no filter
      Statement& drive;
      Statement* has;  // null: a column of the summary
      std::string PatchRecord::*column;
    };
    const auto one = [](const std::string& value) {
      return value.empty() ? std::vector<std::string>()
                           : std::vector<std::string>{value};
    };
    const Filter filters[] = {
        {one(query.vector), from.by_vector, &from.has_vector, nullptr},
        {one(query.session), from.by_session, &from.has_session, nullptr},
        {one(query.license_fingerprint), from.by_fingerprint,
         &from.has_fingerprint, nullptr},
        {one(query.diff_digest), from.by_digest, nullptr,
         &PatchRecord::diff_digest},
        {one(query.license), from.by_license, &from.has_license, nullptr},
        {one(query.path), from.by_path, &from.has_path, nullptr},
        {query.repo, from.by_repo, nullptr, &PatchRecord::repo},
        {one(query.outcome), from.by_outcome, nullptr, &PatchRecord::outcome},
    };
    const Filter* driver = nullptr;
    for (const Filter& filter : filters) {
      if (driver == nullptr && !filter.values.empty()) driver = &filter;
    }
    Statement& drive = driver != nullptr ? driver->drive : from.all;
    // Ids are digits and letters: '~' is above them.
    const std::string below = query.cursor.empty() ? "~" : query.cursor;

    PatchPage page;
    bool more = false;
    std::string last;
    std::optional<Error> failed;
    auto wanted = [&](const PatchRecord& patch) -> Result<bool> {
      for (const Filter& filter : filters) {
        if (&filter == driver || filter.values.empty()) continue;
        if (filter.has == nullptr) {
          if (std::find(filter.values.begin(), filter.values.end(),
                        patch.*filter.column) == filter.values.end()) {
            return false;
          }
          continue;
        }
        filter.has->text(1, patch.patch_id);
        filter.has->text(2, filter.values.front());
        bool there = false;
        auto looked = from.each(*filter.has, [&] {
          there = true;
          return false;
        });
        if (!looked) return looked.error();
        if (!there) return false;
      }
      return true;
    };
    // False: the page is full, or something failed.
    auto visit = [&](const std::string& id) {
      if (page.scanned >= kPatchScanMax ||
          page.patches.size() >= static_cast<std::size_t>(query.limit)) {
        more = true;
        return false;
      }
      ++page.scanned;
      last = id;
      auto patch = from.one(id, query.tenant);
      auto good = patch && *patch ? wanted(**patch) : Result<bool>(false);
      if (!patch || !good) {
        failed = !patch ? patch.error() : good.error();
        return false;
      }
      if (*good) page.patches.push_back(std::move(**patch));
      return true;
    };
    if (driver == nullptr || driver->values.size() == 1) {
      drive.text(1, below);
      if (driver != nullptr) drive.text(2, driver->values.front());
      auto done = from.each(drive, [&] {
        std::string id = string_at(drive, 0);
        return id == last || visit(id);  // the same: twice in one patch
      });
      if (!failed && !done) return done.error();
    } else {
      // Of several values, the newest of what each of them has next.
      for (std::string next = below; !next.empty();) {
        std::string newest;
        for (const std::string& value : driver->values) {
          drive.text(1, next);
          drive.text(2, value);
          auto done = from.each(drive, [&] {
            newest = std::max(newest, string_at(drive, 0));
            return false;
          });
          if (!done) return done.error();
        }
        next = newest;
        if (!next.empty() && !visit(next)) break;
      }
    }
    if (failed) return *failed;
    if (more) page.cursor = last;
    return page;
  });
}

Result<Ancestry> Patches::ancestry(const std::string& patch_id,
                                   const std::string& tenant) {
  return reading<Ancestry>([&](Reader& from) -> Result<Ancestry> {
    Ancestry out;
    std::set<std::string> seen;
    std::string next = patch_id;
    while (!next.empty()) {
      if (seen.contains(next)) {
        out.cycle = true;
        break;
      }
      if (out.patches.size() >= static_cast<std::size_t>(kAncestryMax)) {
        out.truncated = true;
        break;
      }
      auto patch = from.one(next, tenant);
      if (!patch) return patch.error();
      if (!*patch) {
        out.missing = next;
        break;
      }
      auto sources = from.sources_of(next);
      if (!sources) return sources.error();
      if (sources->size() > kAncestrySourcesMax) {
        sources->resize(kAncestrySourcesMax);
      }
      (*patch)->sources = std::move(*sources);
      seen.insert(next);
      next = (*patch)->parent_patch_id;
      out.patches.push_back(std::move(**patch));
    }
    return out;
  });
}

Result<std::optional<std::string>> Patches::reverse_diff(
    const std::string& patch_id, const std::string& tenant) {
  using Found = std::optional<std::string>;
  return reading<Found>([&](Reader& from) -> Result<Found> {
    auto patch = from.one(patch_id, tenant);
    if (!patch) return patch.error();
    if (!*patch) return Found();
    from.reverse_diff.text(1, patch_id);
    return text_of_row(from.db, from.reverse_diff, 0);
  });
}

}  // namespace machina
