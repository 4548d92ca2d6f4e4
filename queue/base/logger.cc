#include "queue/base/logger.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <mutex>
#include <thread>

#include "queue/base/rfc3339.h"
#include "queue/base/utf8.h"

namespace machina {
namespace {

constexpr std::size_t kPieceBytes = 64 * 1024;
constexpr std::size_t kMsgBytesMax = 2048;

// As the inside of a JSON string; in text lines too, so that one rule holds.
// At most `max` bytes and the dots that say that more was there.
void append_escaped(std::string* out, std::string_view text, std::size_t max,
                    bool quoted = true) {
  std::size_t at = 0;
  const std::size_t end = out->size() + max - std::min<std::size_t>(max, 6);
  while (at < text.size() && out->size() <= end) {
    auto c = static_cast<unsigned char>(text[at]);
    std::size_t length = utf8_length(text.substr(at));
    bool c1 = length == 2 && c == 0xc2 &&
              static_cast<unsigned char>(text[at + 1]) < 0xa0;
    if ((c == '"' && quoted) || c == '\\') {
      *out += '\\';
      *out += static_cast<char>(c);
    } else if (c == '\n') {
      *out += "\\n";
    } else if (c == '\t') {
      *out += "\\t";
    } else if (c < 0x20 || c == 0x7f || length == 0 || c1) {
      unsigned code = c1            ? static_cast<unsigned char>(text[at + 1])
                      : length == 0 ? 0xfffdu
                                    : c;
      char hex[8];
      std::snprintf(hex, sizeof hex, "\\u%04x", code);
      *out += hex;
    } else {
      out->append(text.substr(at, length));
    }
    at += std::max<std::size_t>(1, length);
  }
  if (at < text.size()) *out += "...";
}

bool plain(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return c > ' ' && c < 0x7f && c != '"' && c != '\\' && c != '=';
  });
}

// What other processes wrote: theirs to format, ours to keep harmless.
void make_harmless(std::string* lines) {
  for (char& c : *lines) {
    auto byte = static_cast<unsigned char>(c);
    if ((byte < 0x20 && c != '\n') || byte == 0x7f) c = '?';
  }
}

// How many bytes of it are whole lines.
std::size_t whole_lines(std::string_view text) {
  return text.rfind('\n') + 1;  // npos: 0
}

std::size_t count_lines(std::string_view text) {
  return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
}

// Lines that were lost, and how many of those somebody was told of.
std::atomic<std::uint64_t> g_dropped{0}, g_told{0};

// Y2: what follows the first line that finds room again; empty: none was lost
// since. Told is only what was written: settle it with told().
class Loss {
 public:
  Loss() : told_(g_told), now_(g_dropped) {
    if (now_ == told_) return;
    line_ = LogLine(Severity::warn, "log_dropped", "lines were dropped")
                .with("count", static_cast<std::int64_t>(now_ - told_))
                .with("total", static_cast<std::int64_t>(now_))
                .take();
    if (line_.empty()) told();  // warnings are not said here
  }
  const std::string& line() const { return line_; }
  void told() { g_told.compare_exchange_strong(told_, now_); }

 private:
  std::uint64_t told_, now_;
  std::string line_;
};

class Writer {
 public:
  Writer(std::unique_ptr<LineFile> file, int collect)
      : file_(std::move(file)), collect_(collect) {
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (collect_ >= 0) fcntl(collect_, F_SETFL, O_NONBLOCK);
    if (file_) follow();
    // No signal is this thread's, from its first moment on; a reader that went
    // away is an error here, not our end.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread([this] { run(); }).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  bool put(const std::string& line) {
    {
      std::lock_guard lock(mutex_);
      if (waiting_.size() + line.size() > kLogWaitingBytesMax) return false;
      bool was_empty = waiting_.empty();
      waiting_ += line;
      if (!was_empty) return true;
    }
    nudge();
    return true;
  }

  void reopen() {
    reopen_ = true;
    nudge();
  }

  // False where it took too long: the thread is left to itself.
  bool stop(Millis patience) {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    nudge();
    return ended_.wait_for(lock, std::chrono::milliseconds(patience),
                           [&] { return done_; });
  }

 private:
  void nudge() const {
    const std::uint64_t one = 1;
    (void)!::write(wake_, &one, sizeof one);
  }

  void run() {
    bool stopping = false;
    while (!stopping) {
      wait();
      if (reopen_.exchange(false) && file_) {
        file_->reopen();
        follow();
      }
      std::string lines;
      {
        std::lock_guard lock(mutex_);
        lines.swap(waiting_);
        stopping = stopping_;
      }
      collect(&lines, stopping);
      if (!lines.empty()) write(lines);
    }
    // Notified under the lock: stop() may return, and the process end, as soon
    // as it is let go.
    std::lock_guard lock(mutex_);
    done_ = true;
    ended_.notify_all();
  }

  void wait() const {
    pollfd items[2] = {{wake_, POLLIN, 0}, {collect_, POLLIN, 0}};
    ::poll(items, collect_ >= 0 ? 2 : 1, 1000);
    std::uint64_t ignored;
    (void)!::read(wake_, &ignored, sizeof ignored);
  }

  // Whole lines that came through the pipe. Many at most: other lines wait.
  void collect(std::string* lines, bool all) {
    if (collect_ < 0) return;
    char buffer[kPieceBytes];
    for (int round = 0; round < (all ? 64 : 4); ++round) {
      ssize_t n = ::read(collect_, buffer, sizeof buffer);
      if (n == 0) collect_ = -1;  // nobody writes to it any more
      if (n <= 0) break;
      pipe_.append(buffer, static_cast<std::size_t>(n));
    }
    std::size_t end = pipe_.rfind('\n');
    if (end == pipe_.npos && pipe_.size() > kLogLineBytesMax) {
      pipe_ += '\n';
      end = pipe_.size() - 1;
    }
    if (end == pipe_.npos) return;
    std::string whole = pipe_.substr(0, end + 1);
    pipe_.erase(0, end + 1);
    make_harmless(&whole);
    *lines += whole;
  }

  void write(const std::string& lines) {
    std::size_t kept = put_out(lines);
    g_dropped += count_lines(std::string_view(lines).substr(kept));
    if (kept != lines.size()) return;
    Loss loss;
    // The notice is nobody's line: lost itself, it is said again.
    if (loss.line().empty() || put_out(loss.line()) == 0) return;
    loss.told();
  }

  // How many bytes of `lines` were written, as whole lines.
  std::size_t put_out(std::string_view lines) {
    if (file_ == nullptr) return put_on_stderr(lines);
    int before = file_->fd();
    std::size_t kept = file_->append(lines);
    if (file_->fd() != before) follow();
    return kept;
  }

  std::size_t put_on_stderr(std::string_view lines) {
    if (torn_ && ::write(2, "\n", 1) == 1) torn_ = false;
    std::string_view rest = lines;
    while (!rest.empty()) {
      pollfd item{2, POLLOUT, 0};
      int ready = ::poll(&item, 1, 100);
      if (ready == 0) {  // a reader that stands still
        std::lock_guard lock(mutex_);
        if (!stopping_) continue;
        break;
      }
      // So much at a time goes into a pipe without blocking.
      ssize_t n =
          ::write(2, rest.data(), std::min(rest.size(), kLogLineBytesMax));
      if (n < 0 && errno == EAGAIN) continue;
      if (n <= 0) break;
      rest.remove_prefix(static_cast<std::size_t>(n));
    }
    std::size_t written = lines.size() - rest.size();
    std::size_t kept = whole_lines(lines.substr(0, written));
    torn_ = torn_ || kept != written;
    return kept;
  }

  // What this process prints without us (a failed CHECK) goes to the same file.
  void follow() const {
    if (file_->fd() >= 0) ::dup2(file_->fd(), 2);
  }

  std::unique_ptr<LineFile> file_;
  int collect_, wake_;
  std::string pipe_;   // of the thread: what is not a whole line yet
  bool torn_ = false;  // of the thread: standard error ends within a line
  std::atomic<bool> reopen_{false};
  std::mutex mutex_;  // all that follows
  std::condition_variable ended_;
  std::string waiting_;
  bool stopping_ = false, done_ = false;
};

struct Global {
  std::mutex mutex;  // of `options` while it changes; lines only read it
  LoggerOptions options;
  std::atomic<Severity> least{Severity::info};
  std::atomic<Writer*> writer{nullptr};  // never freed: somebody may be in it
};

// Never destroyed: threads may speak until the very end.
Global& global() {
  static Global* g = new Global;
  return *g;
}

// One write, whole or lost; behind a part of one it begins a new line.
bool write_now(const std::string& line) {
  static std::atomic<bool> torn{false};
  const std::string text = torn.exchange(false) ? "\n" + line : line;
  ssize_t n;
  do {
    n = ::write(2, text.data(), text.size());
  } while (n < 0 && errno == EINTR);
  if (n == static_cast<ssize_t>(text.size())) return true;
  torn = n > 0 || text.size() != line.size();
  return false;
}

void hand_over(const std::string& line) {
  if (Writer* writer = global().writer.load()) {
    if (!writer->put(line)) ++g_dropped;
    return;  // the writer tells of it
  }
  if (!write_now(line)) {
    ++g_dropped;
    return;
  }
  Loss loss;
  if (!loss.line().empty() && write_now(loss.line())) loss.told();
}

}  // namespace

std::string_view name(Severity severity) {
  switch (severity) {
    case Severity::debug:
      return "debug";
    case Severity::info:
      return "info";
    case Severity::warn:
      return "warn";
    case Severity::error:
      break;
  }
  return "error";
}

Severity parse_severity(std::string_view text) {
  for (Severity s : {Severity::debug, Severity::warn, Severity::error}) {
    if (name(s) == text) return s;
  }
  return Severity::info;
}

void set_logger(const LoggerOptions& options) {
  Global& g = global();
  std::lock_guard lock(g.mutex);
  g.options = options;
  g.least = options.least;
}

void set_logger(std::string component) {
  Global& g = global();
  std::lock_guard lock(g.mutex);
  g.options.component = std::move(component);
  g.options.who.clear();
}

bool logs_at(Severity severity) { return severity >= global().least.load(); }

void start_logger(std::unique_ptr<LineFile> file, int collect) {
  global().writer = new Writer(std::move(file), collect);
}

void reopen_logger() {
  if (Writer* writer = global().writer.load()) writer->reopen();
}

void stop_logger(Millis patience) {
  if (Writer* writer = global().writer.exchange(nullptr)) {
    writer->stop(patience);
  }
}

std::uint64_t log_lines_dropped() { return g_dropped; }

LogLine::LogLine(Severity severity, std::string_view event,
                 std::string_view msg)
    : on_(logs_at(severity)) {
  if (!on_) return;
  Global& g = global();
  std::lock_guard lock(g.mutex);
  const LoggerOptions& o = g.options;
  std::string_view component = o.component.empty()
                                   ? std::string_view("machina")
                                   : std::string_view(o.component);
  line_.reserve(256);
  if (o.json) {
    line_ += "{\"ts\":\"";
    append_rfc3339(&line_, system_clock().wall_ms());
    line_.append("\",\"level\":\"").append(name(severity));
    line_.append("\",\"component\":\"").append(component);
    line_.append("\",\"event\":\"").append(event).append("\",\"msg\":\"");
    append_escaped(&line_, msg, kMsgBytesMax);
    line_ += '"';
  } else {
    append_rfc3339(&line_, system_clock().wall_ms());
    line_.append(" ").append(name(severity)).append(" ").append(component);
    line_.append(" ").append(event).append(": ");
    append_escaped(&line_, msg, kMsgBytesMax, false);
  }
  if (!o.who.empty()) with(o.component, o.who);
}

LogLine& LogLine::with(std::string_view name, std::string_view text) {
  if (!on_ || text.empty()) return *this;
  if (line_.size() > kLogLineBytesMax - 64) return *this;
  std::size_t room = kLogLineBytesMax - 48 - line_.size();
  std::string value;
  append_escaped(&value, text, kLogFieldBytesMax);
  if (value.size() + name.size() > room) value = "...";
  if (global().options.json) {
    line_.append(",\"").append(name).append("\":\"").append(value).append("\"");
  } else if (plain(text) && value == text) {
    line_.append(" ").append(name).append("=").append(value);
  } else {
    line_.append(" ").append(name).append("=\"").append(value).append("\"");
  }
  return *this;
}

LogLine& LogLine::with(std::string_view name, std::int64_t number) {
  if (!on_ || line_.size() > kLogLineBytesMax - 64) return *this;
  if (global().options.json) {
    line_.append(",\"").append(name).append("\":");
  } else {
    line_.append(" ").append(name).append("=");
  }
  line_ += std::to_string(number);
  return *this;
}

std::string LogLine::take() {
  if (!on_) return "";
  on_ = false;
  if (global().options.json) line_ += '}';
  line_ += '\n';
  return std::move(line_);
}

LogLine::~LogLine() {
  if (on_) hand_over(take());
}

}  // namespace machina
