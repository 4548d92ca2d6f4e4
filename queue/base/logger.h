// queue/base/logger.h
//
// What a process says of itself: one line per event, as JSON or as text, for
// the people who operate it. (The log, queue/wal/log.h, is something else.)
//
//   text  2026-11-21T15:27:12.123Z info server listening: on http://... k=v
//   json  {"ts":"2026-...Z","level":"info","component":"server",
//          "event":"listening","msg":"on http://...","k":"v"}
//
//   Y1  A line is one line: control characters, quotes and bytes that are not
//       UTF-8 are escaped, a field is cut at kLogFieldBytesMax, a line at
//       kLogLineBytesMax. What a client sent cannot look like a line.
//   Y2  Nobody waits: a line that finds no room is dropped and counted, and the
//       next one that finds room is followed by the count. Where that could not
//       be written either it is said again, until it was.
//   Y3  A file that cannot be written (full disk) costs its lines, no more.
//   Y4  Nothing below this call knows a secret: callers hand over no token,
//       header, query, payload or result.
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
// Of this process, from here on. Until start_logger() each line is one
// write to standard error, which is dropped where it would block.
void set_logger(const LoggerOptions& options);
void set_logger(std::string component);  // the rest as before: after a fork
bool logs_at(Severity severity);         // whether such a line would be kept

// Starts the thread that writes: to `file`, or to standard error where that is
// null. Lines that other processes write to the pipe `collect` are written
// too (-1: none). After every fork that goes on without exec.
void start_logger(std::unique_ptr<LineFile> file, int collect = -1);
// Opens the file anew, by name: somebody has moved it. Any thread.
void reopen_logger();
// Writes what waits, for at most `patience`, and ends the thread. What is said
// after it goes to standard error.
void stop_logger(Millis patience);
// Lines lost so far: no room, or the file could not take them.
std::uint64_t log_lines_dropped();

// One line: said when it is destroyed.
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
  // The whole line, for whoever says it himself; empty where it is not kept.
  std::string take();

 private:
  bool on_;
  std::string line_;
};

// How often something may be said: `per_second`, the rest counted.
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
