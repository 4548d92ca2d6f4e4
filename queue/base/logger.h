// queue/base/logger.h
//
// The logger of a process: one line for each event, as text or as JSON, for the
// people who operate the product. The write-ahead log is in queue/wal/.
//
//   text  2026-11-21T15:27:12.123Z info server listening: on http://... k=v
//   json  {"ts":"2026-...Z","level":"info","component":"server",
//          "event":"listening","msg":"on http://...","k":"v"}
//
//   Y1  A line is one line: control characters, quotes and bytes that are not
//       UTF-8 are escaped, a field is cut at kLogFieldBytesMax, a line at
//       kLogLineBytesMax. What a client sent cannot look like a line.
//   Y2  Logging never blocks. A line that finds no room is dropped and counted.
//       The next line that finds room is followed by a line with the count;
//       that line is repeated until it was written.
//   Y3  When the file cannot be written (a full disk), lines are lost and
//   nothing
//       else happens.
//   Y4  Callers pass no token, header, query, payload or result: a log has no
//       secret.
//
// tests/queue/base/logger_test.cc has a test for each but Y4, which
// tests/e2e/watch_test.cc greps for.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "queue/base/clock.h"
#include "queue/base/line_file.h"

namespace machina {

enum class Severity : std::uint8_t { debug, info, warn, error };

constexpr std::size_t kLogFieldBytesMax = 1024;
// A pipe takes this much from several writers without mixing (PIPE_BUF).
constexpr std::size_t kLogLineBytesMax = 4096;
constexpr std::size_t kLogWaitingBytesMax = 4u << 20;

struct LoggerOptions {
  bool json = false;
  Severity least = Severity::info;
  std::string component;  // server, pool, worker, spawner
  std::string who;        // which pool or worker: a field, or empty
};
// Sets the options of this process. Until start_logger(), each line is one
// write to standard error; a line is dropped when that write would block.
void set_logger(const LoggerOptions& options);
void set_logger(
    std::string component);       // after a fork; keeps the other options
bool logs_at(Severity severity);  // whether a line of it is written

// Starts the thread that writes to `file`, or to standard error when `file` is
// null. The thread also writes the lines that other processes send through the
// pipe `collect` (-1: no pipe). A process that forks without exec calls this
// again in the child.
void start_logger(std::unique_ptr<LineFile> file, int collect = -1);
// Opens the file again by its name, after somebody moved the file. Any thread.
void reopen_logger();
// Writes the waiting lines for at most `patience` milliseconds and ends the
// thread. Later lines go to standard error.
void stop_logger(Millis patience);
// Lines that were lost so far: no room, or a failed write.
std::uint64_t log_lines_dropped();

// One line, written when the object is destroyed.
//   LogLine(Severity::warn, "pool_exit", "the pool ended").with("code", 1);
class LogLine {
 public:
  // `event`: lower case, a word or two joined by '_'; a literal.
  LogLine(Severity severity, std::string_view event, std::string_view msg);
  ~LogLine();
  LogLine(const LogLine&) = delete;
  LogLine& operator=(const LogLine&) = delete;

  // `name` is a literal. An empty text is left out.
  LogLine& with(std::string_view name, std::string_view text);
  LogLine& with(std::string_view name, std::int64_t number);
  // The whole line for a caller that writes it; empty when it is below the
  // level.
  std::string take();

 private:
  bool on_;
  std::string line_;
};

// A limit of lines a second; the others are counted.
class Allowance {
 public:
  explicit Allowance(int per_second) : per_second_(per_second) {}
  // `now_ms`: of a monotonic clock.
  bool take(Millis now_ms) {
    if (now_ms - since_ >= 1000) {
      since_ = now_ms;
      taken_ = 0;
    }
    if (taken_ < per_second_) {
      ++taken_;
      return true;
    }
    ++suppressed_;
    return false;
  }
  // How many were refused since the last call.
  std::uint64_t suppressed() {
    std::uint64_t n = suppressed_;
    suppressed_ = 0;
    return n;
  }

 private:
  int per_second_, taken_ = 0;
  Millis since_ = -1000;
  std::uint64_t suppressed_ = 0;
};

// The words of MACHINA_LOG_LEVEL.
std::string_view name(Severity severity);
Severity parse_severity(std::string_view text);  // an unknown one: info

}  // namespace machina
