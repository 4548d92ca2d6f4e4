// queue/history/sqlite.h
//
// SQLite, as far as it is used here: connections and prepared statements. The
// only includer of sqlite3.h is sqlite.cc. Who writes a file has one connection
// that creates, writes and checkpoints it (WAL mode, synchronous FULL: a commit
// is durable); readers have others. A file is open in one process at a time.
//
// Not for the loop thread: every call blocks. A connection and its statements
// are used by one thread at a time.

#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "queue/base/result.h"

struct sqlite3;
struct sqlite3_stmt;

namespace machina::sqlite {

// SQLite's own result codes, those that are more than "it failed".
constexpr int kOk = 0;
constexpr int kRow = 100;
constexpr int kDone = 101;

// Finalized with its owner, which must not outlive its connection's use.
class Statement {
 public:
  Statement() = default;
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;
  ~Statement();

  // Each of these returns a result code.
  int prepare(sqlite3* db, const std::string& sql);
  int step();
  int run();  // one step and a reset; kOk also where there was a row
  void reset();

  // Parameters count from 1. What is bound is not copied: it must live until
  // the next reset().
  void number(int at, std::int64_t value);
  void real(int at, double value);
  void bytes(int at, const void* data, std::size_t size);
  void text(int at, std::string_view value);
  void null(int at);

  // Of the row that is there, columns count from 0. Views die with the next
  // step() or reset().
  std::int64_t number_at(int column);
  double real_at(int column);
  std::string_view text_at(int column);
  bool null_at(int column);

 private:
  sqlite3_stmt* stmt_ = nullptr;
};

struct Setup {
  // Goes before every error: "history".
  std::string what;
  // Made where user_version is 0, in one transaction. Null for a reader, which
  // creates, writes and checkpoints nothing.
  const char* schema = nullptr;
  int version = 1;  // user_version; a greater one is Code::newer
  int checkpoint_pages = 1000;
  // From version n+1 to n+2 by the n-th, for a file that an earlier version
  // made: all that are needed in one transaction, or none of them.
  std::span<const char* const> upgrades = {};
};

class Database {
 public:
  Database() = default;
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;
  ~Database();

  // Code::corrupt where the file is no database, Code::newer, Code::full,
  // Code::io.
  Result<void> open(const std::string& path, const Setup& setup);
  Result<void> execute(const char* sql);
  // What result code `rc` of the last call was about.
  Error error(int rc, const std::string& doing) const;
  sqlite3* get() { return db_; }

 private:
  Result<std::int64_t> read_version(const std::string& path, int known);

  sqlite3* db_ = nullptr;
  std::string what_;
};

}  // namespace machina::sqlite
