#include "queue/history/sqlite.h"

#include <sqlite3.h>

namespace machina::sqlite {

namespace {

constexpr int kBusyMs = 5000;
// The index of a write-ahead log in memory of this process, which alone opens
// the file. In a file (-shm) it takes blocks of its own at each start, and on a
// full disk, after a kill, there are none: the server would not start.
constexpr char kVfs[] = "unix-excl";

static_assert(kOk == SQLITE_OK && kRow == SQLITE_ROW && kDone == SQLITE_DONE);

}  // namespace

// --- Statement ---

Statement::~Statement() { sqlite3_finalize(stmt_); }

int Statement::prepare(sqlite3* db, const std::string& sql) {
  sqlite3_finalize(stmt_);
  stmt_ = nullptr;
  return sqlite3_prepare_v3(db, sql.c_str(), -1, SQLITE_PREPARE_PERSISTENT,
                            &stmt_, nullptr);
}

int Statement::step() { return sqlite3_step(stmt_); }

int Statement::run() {
  int rc = sqlite3_step(stmt_);
  sqlite3_reset(stmt_);
  return rc == SQLITE_DONE || rc == SQLITE_ROW ? SQLITE_OK : rc;
}

void Statement::reset() { sqlite3_reset(stmt_); }

void Statement::number(int at, std::int64_t value) {
  sqlite3_bind_int64(stmt_, at, value);
}

void Statement::real(int at, double value) {
  sqlite3_bind_double(stmt_, at, value);
}

void Statement::bytes(int at, const void* data, std::size_t size) {
  // A null pointer would bind NULL.
  sqlite3_bind_blob64(stmt_, at, size == 0 ? "" : data, size, SQLITE_STATIC);
}

void Statement::text(int at, std::string_view value) {
  sqlite3_bind_text(stmt_, at, value.empty() ? "" : value.data(),
                    static_cast<int>(value.size()), SQLITE_STATIC);
}

void Statement::null(int at) { sqlite3_bind_null(stmt_, at); }

std::int64_t Statement::number_at(int column) {
  return sqlite3_column_int64(stmt_, column);
}

double Statement::real_at(int column) {
  return sqlite3_column_double(stmt_, column);
}

std::string_view Statement::text_at(int column) {
  auto* data = static_cast<const char*>(sqlite3_column_blob(stmt_, column));
  auto size = static_cast<std::size_t>(sqlite3_column_bytes(stmt_, column));
  return data == nullptr ? std::string_view{} : std::string_view{data, size};
}

bool Statement::null_at(int column) {
  return sqlite3_column_type(stmt_, column) == SQLITE_NULL;
}

// --- Database ---

Database::~Database() { sqlite3_close_v2(db_); }

Error Database::error(int rc, const std::string& doing) const {
  Code code = Code::io;
  if ((rc & 0xff) == SQLITE_FULL) code = Code::full;
  if ((rc & 0xff) == SQLITE_CORRUPT || (rc & 0xff) == SQLITE_NOTADB) {
    code = Code::corrupt;
  }
  const char* text = db_ != nullptr ? sqlite3_errmsg(db_) : sqlite3_errstr(rc);
  return Error{code, what_ + ": " + doing + ": " + text};
}

Result<void> Database::open(const std::string& path, const Setup& setup) {
  what_ = setup.what;
  const bool writer = setup.schema != nullptr;
  int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX;
  if (writer) flags |= SQLITE_OPEN_CREATE;
  int rc = sqlite3_open_v2(path.c_str(), &db_, flags, kVfs);
  if (rc != SQLITE_OK) return error(rc, "open " + path);
  sqlite3_extended_result_codes(db_, 1);
  sqlite3_busy_timeout(db_, kBusyMs);
  if (!writer) {
    sqlite3_db_config(db_, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, nullptr);
    return execute("PRAGMA query_only=1; PRAGMA wal_autocheckpoint=0;");
  }
  if (auto r = execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;");
      !r) {
    return r;
  }
  auto version = read_version(path, setup.version);
  if (!version) return version.error();
  std::string sql =
      "PRAGMA wal_autocheckpoint=" + std::to_string(setup.checkpoint_pages) +
      ";";
  if (*version == 0) {  // just made: one transaction, one sync
    sql += std::string("BEGIN;") + setup.schema +
           "PRAGMA user_version=" + std::to_string(setup.version) + ";COMMIT;";
  } else if (*version < setup.version) {
    sql += "BEGIN;";
    for (std::int64_t v = *version; v < setup.version; ++v) {
      const auto at = static_cast<std::size_t>(v - 1);
      if (at >= setup.upgrades.size()) {
        return Error{Code::io, what_ + ": " + path + " has schema version " +
                                   std::to_string(*version) +
                                   ", which this program cannot bring to " +
                                   std::to_string(setup.version)};
      }
      sql += setup.upgrades[at];
    }
    sql += "PRAGMA user_version=" + std::to_string(setup.version) + ";COMMIT;";
  }
  auto done = execute(sql.c_str());
  if (!done) sqlite3_exec(db_, "ROLLBACK", nullptr, nullptr, nullptr);
  return done;
}

Result<void> Database::execute(const char* sql) {
  int rc = sqlite3_exec(db_, sql, nullptr, nullptr, nullptr);
  if (rc != SQLITE_OK) return error(rc, sql);
  return {};
}

Result<std::int64_t> Database::read_version(const std::string& path,
                                            int known) {
  Statement version;
  int rc = version.prepare(db_, "PRAGMA user_version");
  if (rc == SQLITE_OK) rc = version.step();
  if (rc != SQLITE_ROW) return error(rc, "open " + path);
  if (version.number_at(0) > known) {
    return Error{Code::newer, path + " has schema version " +
                                  std::to_string(version.number_at(0)) +
                                  "; this program knows " +
                                  std::to_string(known)};
  }
  return version.number_at(0);
}

}  // namespace machina::sqlite
