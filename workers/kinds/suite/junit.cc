#include "workers/kinds/suite/junit.h"

#include <errno.h>
#include <expat.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>

#include "queue/base/fd.h"
#include "queue/base/utf8.h"

namespace machina::kinds {
namespace {

constexpr int kDepthMax = 64;
constexpr std::size_t kChunkBytes = 64 << 10;
constexpr std::size_t kFailingBytesMax = 3u << 20;
constexpr std::size_t kOtherBytesMax = 36u << 20;
constexpr std::size_t kTextTailBytes = 1000;

template <class T>
void put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void put_text(std::string& out, std::string_view text, std::size_t most) {
  text = utf8_head(text, most);
  put(out, static_cast<std::uint16_t>(text.size()));
  out += text;
}

// --- in the handler ---

// pytest's words for an error that is not the body's; the second are older.
bool says_teardown(std::string_view message) {
  return message.starts_with("failed on teardown") ||
         message.starts_with("test teardown failure");
}

bool one_of(std::string_view word,
            std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// What an attribute `status` or `result` makes of a case without a child that
// says so: some runners have no other sign of a case that did not run.
Outcome outcome_of_status(std::string_view status) {
  std::string word(status.substr(0, 32));
  for (char& c : word) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  if (one_of(word, {"", "run", "ok", "pass", "passed", "success", "successful",
                    "completed", "done"})) {
    return Outcome::passed;
  }
  if (one_of(word, {"notrun", "not run", "not_run", "disabled", "skip",
                    "skipped", "ignored", "suppressed", "pending", "todo"})) {
    return Outcome::skipped;
  }
  if (one_of(word, {"fail", "failed", "failure"})) return Outcome::failed;
  return Outcome::error;
}

// An attribute that counts; absent or no number: nothing is said.
std::uint32_t count_of(const char* text) {
  std::uint32_t n = 0;
  std::from_chars(text, text + std::strlen(text), n);
  return n;
}

class Reader {
 public:
  explicit Reader(XML_Parser parser) : parser_(parser) {
    XML_SetUserData(parser, this);
    XML_SetElementHandler(parser, on_start, on_end);
    XML_SetCharacterDataHandler(parser, on_text);
    XML_SetStartDoctypeDeclHandler(parser, on_doctype);
  }

  // Empty: good so far.
  const std::string& problem() const { return problem_; }
  bool saw_root() const { return saw_root_; }
  std::string frames() && { return std::move(frames_).take(); }

 private:
  void stop(const std::string& why) {
    if (problem_.empty()) problem_ = why;
    XML_StopParser(parser_, XML_FALSE);
  }

  static void on_doctype(void* self, const char*, const char*, const char*,
                         int) {
    static_cast<Reader*>(self)->stop("it declares a document type");
  }

  static const char* attribute(const char** attributes, const char* name) {
    for (; attributes[0] != nullptr; attributes += 2) {
      if (std::strcmp(attributes[0], name) == 0) return attributes[1];
    }
    return "";
  }

  static void on_start(void* data, const char* element,
                       const char** attributes) {
    auto& self = *static_cast<Reader*>(data);
    if (++self.depth_ > kDepthMax) return self.stop("it is nested too deeply");
    if (self.depth_ == 1) {
      self.saw_root_ = std::strcmp(element, "testsuites") == 0 ||
                       std::strcmp(element, "testsuite") == 0;
      if (!self.saw_root_) return self.stop("its root is not testsuites");
      self.begin_suite(attributes);
    } else if (const char* colon = std::strrchr(element, ':');
               colon != nullptr && is_ours(colon + 1)) {
      self.stop("it has names with a prefix, \"" +
                std::string(std::string_view(element).substr(0, 100)) + "\"");
    } else if (std::strcmp(element, "testsuite") == 0 && !self.in_case_) {
      self.begin_suite(attributes);
    } else if (std::strcmp(element, "testcase") == 0) {
      if (self.in_case_) return self.stop("it has a case inside a case");
      ++self.levels_.back().has.tests;
      self.begin_case(attributes);
    } else if (self.in_case_ && self.depth_ == self.case_depth_ + 1) {
      self.note(element, attributes);
    } else if (one_of(element, {"failure", "error"})) {
      self.take_suite_failure(element, attributes);
    }
  }

  static bool is_ours(std::string_view name) {
    return one_of(name, {"testsuites", "testsuite", "testcase", "failure",
                         "error", "skipped"});
  }

  struct Counts {
    std::uint32_t tests = 0, broken = 0, skipped = 0;
  };
  struct Level {
    std::string name;
    Counts says, has;
    std::uint32_t teardowns = 0;  // that failed: pytest counts them as tests
    int depth = 0;
    // `tests` counts something else: assertions (Catch2 is known by its
    // hostname, doctest by cases that are all "run") or subtests (pytest).
    bool other_tests = false, like_doctest = false;
  };

  void begin_suite(const char** attributes) {
    Level level;
    level.name = utf8_head(attribute(attributes, "name"), kCaseIdBytesMax);
    level.says.tests = count_of(attribute(attributes, "tests"));
    // Not their sum: an error may be counted as a failure too.
    level.says.broken = std::max(count_of(attribute(attributes, "failures")),
                                 count_of(attribute(attributes, "errors")));
    for (const char* skips : {"skipped", "disabled", "skip", "ignored"}) {
      level.says.skipped += count_of(attribute(attributes, skips));
    }
    level.depth = depth_;
    level.other_tests =
        level.name == "pytest" ||
        std::strcmp(attribute(attributes, "hostname"), "tbd") == 0;
    level.like_doctest = *attribute(attributes, "disabled") == '\0' &&
                         *attribute(attributes, "skipped") == '\0';
    levels_.push_back(std::move(level));
  }

  // A suite may list more than it counts, and leave out what it skipped.
  void end_suite() {
    const Level level = std::move(levels_.back());
    levels_.pop_back();
    const Counts& says = level.says;
    const Counts& has = level.has;
    const std::uint32_t unlisted =
        says.skipped - std::min(says.skipped, has.skipped);
    const bool doctest = level.like_doctest && has.tests > 0;
    const std::string suite = "its suite \"" + level.name + "\" counts ";
    if (!level.other_tests && !doctest &&
        says.tests > std::uint64_t{has.tests} + level.teardowns + unlisted) {
      stop(suite + std::to_string(says.tests) + " tests and lists " +
           std::to_string(has.tests));
    }
    if (says.broken > has.broken) {
      stop(suite + std::to_string(says.broken) + " failures or errors and " +
           "lists " + std::to_string(has.broken));
    }
    if (levels_.empty()) return;
    Level& outer = levels_.back();
    outer.has.tests += has.tests;
    outer.has.broken += has.broken;
    outer.has.skipped += has.skipped;
    outer.teardowns += level.teardowns;
    outer.other_tests = outer.other_tests || level.other_tests;
    outer.like_doctest = outer.like_doctest && level.like_doctest;
  }

  // Of a whole suite (setUpClass and the like): a case of its own.
  void take_suite_failure(const char* element, const char** attributes) {
    if (in_case_ || levels_.empty() || levels_.back().depth + 1 != depth_) {
      return stop("it has a <" + std::string(element) + "> where none can be");
    }
    ++levels_.back().has.tests;  // node's own reporter counts it
    static const char* kNone[] = {nullptr};
    begin_case(kNone);
    nameless_ = false;
    case_.id = levels_.back().name + "::(suite)";
    note(element, attributes);
  }

  static void on_end(void* data, const char*) {
    auto& self = *static_cast<Reader*>(data);
    const int depth = self.depth_--;
    if (self.depth_ < self.text_depth_) self.into_ = nullptr;
    if (self.in_case_ && depth == self.case_depth_) self.end_case();
    if (!self.levels_.empty() && depth == self.levels_.back().depth) {
      self.end_suite();
    }
  }

  static void on_text(void* data, const char* text, int size) {
    auto& self = *static_cast<Reader*>(data);
    if (self.into_ == nullptr) return;
    self.into_->append(text, static_cast<std::size_t>(size));
    if (self.into_->size() > 8 * kTextTailBytes) {
      *self.into_ = std::string(utf8_tail(*self.into_, kTextTailBytes));
    }
  }

  void begin_case(const char** attributes) {
    const std::string_view classname = attribute(attributes, "classname");
    std::string_view name = attribute(attributes, "name");
    case_ = Case{};
    nameless_ = name.find_first_not_of(" \t\r\n") == std::string_view::npos;
    if (nameless_) name = "(a case without a name)";
    // ctest, which always has a status, says the name twice; a pytest function
    // may be named as its file is.
    if (classname != name || *attribute(attributes, "status") == '\0') {
      case_.id = classname.substr(0, kCaseIdBytesMax);
    }
    if (!case_.id.empty()) case_.id += "::";
    case_.id += name.substr(0, kCaseIdBytesMax);
    case_.id = std::string(utf8_head(case_.id, kCaseIdBytesMax));
    not_run_ = std::strcmp(attribute(attributes, "status"), "notrun") == 0;
    status_ = outcome_of_status(attribute(attributes, "status"));
    levels_.back().like_doctest =
        levels_.back().like_doctest &&
        std::strcmp(attribute(attributes, "status"), "run") == 0;
    if (status_ == Outcome::passed) {
      status_ = outcome_of_status(attribute(attributes, "result"));
    }
    noted_ = false;
    case_depth_ = depth_;
    const double seconds = std::strtod(attribute(attributes, "time"), nullptr);
    if (std::isfinite(seconds) && seconds > 0) {
      case_.duration_ms = static_cast<std::uint32_t>(
          std::lround(std::min(seconds * 1000, 4e9)));
    }
    text_.clear();
    output_.clear();
    in_case_ = true;
  }

  void collect_into(std::string& text) {
    into_ = &text;
    text_depth_ = depth_;
  }

  // <failure>, <error> or <skipped> inside a case. An error outranks a failure,
  // and either outranks a skip; an error of the teardown is kept apart.
  void note(const char* element, const char** attributes) {
    const std::string_view what = element;
    Outcome outcome = Outcome::error;
    if (what == "failure") {
      outcome = Outcome::failed;
    } else if (what == "skipped") {
      outcome = Outcome::skipped;
    } else if (one_of(what,
                      {"properties", "system-out", "system-err", "flakyFailure",
                       "flakyError", "rerunFailure", "rerunError"})) {
      if (what.starts_with("system-")) collect_into(output_);
      if (what.starts_with("flaky") || what.starts_with("rerun")) {
        ++levels_.back().has.broken;
      }
      return;
    }
    std::string message(attribute(attributes, "message"));
    // ctest's words for what the test itself asked for begin with SKIP_; the
    // others say why it could not be run.
    const bool unable =
        not_run_ && !message.empty() && !message.starts_with("SKIP_");
    if (what == "skipped" && unable) {
      outcome = Outcome::error;
    } else if (what != "error" && outcome == Outcome::error) {
      message = "the report says <" + std::string(what.substr(0, 100)) +
                ">, which is no outcome that is known";
    }
    noted_ = true;
    Counts& has = levels_.back().has;
    ++(what == "skipped" ? has.skipped : has.broken);
    const bool stronger = case_.outcome == Outcome::passed ||
                          outcome == Outcome::error ||
                          case_.outcome == Outcome::skipped;
    if (outcome == Outcome::error && says_teardown(message)) {
      case_.teardown = true;
      ++levels_.back().teardowns;
    } else if (case_.body == Outcome::passed || outcome == Outcome::error ||
               case_.body == Outcome::skipped) {
      case_.body = outcome;
    }
    if (!stronger) return;
    case_.outcome = outcome;
    case_.message = utf8_head(message, kTextTailBytes);
    text_.clear();
    collect_into(text_);
  }

  // pytest writes a second element for a teardown that fails after a body that
  // failed: one case all the same.
  void number_case() {
    const bool second = case_.teardown && case_.body == Outcome::passed &&
                        last_failed_ && case_.id == last_id_;
    if (second) case_.body = Outcome::failed;
    std::uint32_t& seen = seen_[case_.id];
    if (!second) ++seen;
    case_.nth = seen;
    last_failed_ = !case_.teardown && case_.body == Outcome::failed;
    last_id_ = case_.id;
  }

  void end_case() {
    if (!in_case_) return;
    in_case_ = false;
    into_ = nullptr;
    if (!noted_) case_.outcome = case_.body = status_;
    Counts& has = levels_.back().has;
    if (!noted_ && status_ == Outcome::skipped) ++has.skipped;
    if (!noted_ && status_ != Outcome::passed && status_ != Outcome::skipped) {
      ++has.broken;
    }
    if (nameless_ && (case_.outcome == Outcome::passed ||
                      case_.outcome == Outcome::skipped)) {
      return;
    }
    number_case();
    const bool failing =
        case_.outcome == Outcome::failed || case_.outcome == Outcome::error;
    // A failure without a word: what the case printed.
    if (failing && case_.message.empty() && text_.empty()) text_ = output_;
    if (!text_.empty()) {
      if (!case_.message.empty()) case_.message += '\n';
      case_.message += utf8_tail(text_, kTextTailBytes);
    }
    frames_.add(case_);
  }

  XML_Parser parser_;
  std::string problem_, text_, output_;
  std::string* into_ = nullptr;  // where text goes: one of the two, or nowhere
  CaseFrames frames_;
  Case case_;
  std::unordered_map<std::string, std::uint32_t> seen_;  // cases of each id
  std::string last_id_;
  std::vector<Level> levels_;  // the suites that are open
  Outcome status_ = Outcome::passed;
  int depth_ = 0, text_depth_ = 0, case_depth_ = 0;
  bool saw_root_ = false, in_case_ = false, not_run_ = false;
  bool nameless_ = false, noted_ = false, last_failed_ = false;
};

std::string no_junit(const std::string& why) {
  return no_report("not a JUnit report: " + why);
}

// --- in the worker ---

// Takes values off the front; after a short one every answer is zero.
class Cursor {
 public:
  explicit Cursor(std::string_view bytes) : left_(bytes) {}
  bool good() const { return good_; }
  bool empty() const { return left_.empty(); }

  template <class T>
  T take() {
    T value{};
    if (left_.size() < sizeof value) {
      good_ = false;
      return value;
    }
    std::memcpy(&value, left_.data(), sizeof value);
    left_.remove_prefix(sizeof value);
    return value;
  }

  std::string text(std::size_t most) {
    const std::size_t size = take<std::uint16_t>();
    if (size > most || size > left_.size()) {
      good_ = false;
      return "";
    }
    std::string out(left_.substr(0, size));
    left_.remove_prefix(size);
    return out;
  }

 private:
  std::string_view left_;
  bool good_ = true;
};

using Clock = std::chrono::steady_clock;

// poll() for one event until the deadline.
bool ready(int fd, short event, Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
                        deadline - Clock::now())
                        .count();
  pollfd item{fd, event, 0};
  return left > 0 && ::poll(&item, 1, static_cast<int>(left)) == 1;
}

bool send_by(int fd, std::string_view bytes, Clock::time_point deadline) {
  while (!bytes.empty()) {
    const ssize_t n =
        ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      bytes.remove_prefix(static_cast<std::size_t>(n));
    } else if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
      if (!ready(fd, POLLOUT, deadline)) return false;
    } else {
      return false;
    }
  }
  return true;
}

bool receive_by(int fd, char* at, std::size_t bytes,
                Clock::time_point deadline) {
  while (bytes > 0) {
    const ssize_t n = ::recv(fd, at, bytes, MSG_DONTWAIT);
    if (n > 0) {
      at += n;
      bytes -= static_cast<std::size_t>(n);
    } else if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
      if (!ready(fd, POLLIN, deadline)) return false;
    } else {
      return false;
    }
  }
  return true;
}

Result<Suite> talk(int fd, std::string_view xml, int timeout_ms) {
  const auto deadline = Clock::now() + std::chrono::milliseconds(timeout_ms);
  std::string head;
  put(head, static_cast<std::uint32_t>(xml.size()));
  std::uint32_t size = 0;
  if (!send_by(fd, head, deadline) || !send_by(fd, xml, deadline) ||
      !receive_by(fd, reinterpret_cast<char*>(&size), sizeof size, deadline) ||
      size > kJunitReplyBytesMax) {
    return Error{Code::unavailable, "the report's parser gave no answer"};
  }
  std::string frames(size, '\0');
  if (!receive_by(fd, frames.data(), size, deadline)) {
    return Error{Code::unavailable, "the report's parser stopped half-way"};
  }
  return decode_junit(frames);
}

}  // namespace

std::string_view name(Outcome outcome) {
  switch (outcome) {
    case Outcome::passed:
      return "passed";
    case Outcome::failed:
      return "failed";
    case Outcome::error:
      return "error";
    case Outcome::skipped:
      return "skipped";
    case Outcome::flaky:
      return "flaky";
    case Outcome::missing:
      return "missing";
  }
  return "error";
}

void CaseFrames::add(Case one) {
  ++counts_[static_cast<int>(one.outcome)];
  const bool failing =
      one.outcome == Outcome::failed || one.outcome == Outcome::error;
  // A failing one that has no room left for its message is listed without.
  const bool apart =
      failing && failing_.size() + one.message.size() + 2 * kCaseIdBytesMax <
                     kFailingBytesMax;
  if (failing && !apart) one.message.clear();
  std::string& out = apart ? failing_ : others_;
  const std::size_t most = apart ? kFailingBytesMax : kOtherBytesMax;
  if (out.size() + one.id.size() + one.message.size() + 24 > most) {
    ++dropped_;
    return;
  }
  out += 'C';
  put(out, static_cast<std::uint8_t>(one.outcome));
  put(out, static_cast<std::uint8_t>(one.body));
  put(out, static_cast<std::uint8_t>(one.teardown));
  put(out, one.nth);
  put(out, one.duration_ms);
  put_text(out, one.id, kCaseIdBytesMax);
  put_text(out, one.message, kCaseMessageBytesMax);
}

std::string CaseFrames::take() && {
  std::string out = std::move(failing_);
  out += others_;
  out += 'T';
  for (const std::uint32_t n : counts_) put(out, n);
  put(out, dropped_);
  return out;
}

std::string no_report(const std::string& why) {
  std::string out = "X";
  put_text(out, why, 1000);
  return out;
}

std::string encode_junit(std::string_view xml) {
  if (xml.size() > kJunitXmlBytesMax) return no_junit("it is too large");
  XML_Parser parser = XML_ParserCreate(nullptr);
  if (parser == nullptr) return no_junit("no memory for a parser");
  Reader reader(parser);
  std::string problem;
  for (std::size_t at = 0; problem.empty();) {
    const std::size_t size = std::min(kChunkBytes, xml.size() - at);
    const bool last = at + size == xml.size();
    if (XML_Parse(parser, xml.data() + at, static_cast<int>(size), last) !=
        XML_STATUS_OK) {
      problem = reader.problem().empty()
                    ? std::string(XML_ErrorString(XML_GetErrorCode(parser))) +
                          " in line " +
                          std::to_string(XML_GetCurrentLineNumber(parser))
                    : reader.problem();
    }
    at += size;
    if (last) break;
  }
  XML_ParserFree(parser);
  if (!problem.empty()) return no_junit(problem);
  return std::move(reader).frames();
}

Result<Suite> decode_junit(std::string_view frames) {
  Suite suite;
  Cursor in(frames);
  bool totals = false;
  while (in.good() && !in.empty()) {
    const char type = in.take<char>();
    if (type == 'C') {
      Case one;
      const auto outcome = in.take<std::uint8_t>();
      const auto body = in.take<std::uint8_t>();
      const auto teardown = in.take<std::uint8_t>();
      constexpr auto kLast = static_cast<std::uint8_t>(Outcome::skipped);
      if (outcome > kLast || body > kLast || teardown > 1) break;
      one.outcome = static_cast<Outcome>(outcome);
      one.body = static_cast<Outcome>(body);
      one.teardown = teardown == 1;
      one.nth = in.take<std::uint32_t>();
      if (one.nth == 0 || one.nth > frames.size()) break;
      one.duration_ms = in.take<std::uint32_t>();
      one.id = in.text(kCaseIdBytesMax);
      one.message = in.text(kCaseMessageBytesMax);
      suite.cases.push_back(std::move(one));
    } else if (type == 'T') {
      for (auto* n : {&suite.passed, &suite.failed, &suite.errors,
                      &suite.skipped, &suite.dropped}) {
        *n = in.take<std::uint32_t>();
      }
      totals = in.good() && in.empty();
      break;
    } else if (type == 'X') {
      return Error{Code::invalid, in.text(1000)};
    } else {
      break;
    }
  }
  if (!totals) {
    return Error{Code::invalid, "the report's parser gave malformed frames"};
  }
  return suite;
}

int junit_handler(int in_fd, int out_fd) {
  return report_handler(in_fd, out_fd, encode_junit);
}

int report_handler(int in_fd, int out_fd,
                   std::string (*encode)(std::string_view)) {
  std::uint32_t size = 0;
  if (!read_all(in_fd, &size, sizeof size)) return 1;
  if (size > kJunitXmlBytesMax) return 2;
  std::string xml(size, '\0');
  if (!read_all(in_fd, xml.data(), size)) return 1;
  const std::string frames = encode(xml);
  std::string head;
  put(head, static_cast<std::uint32_t>(frames.size()));
  return write_all(out_fd, head) && write_all(out_fd, frames) ? 0 : 1;
}

Result<Suite> ask_junit(int socket_fd, std::string_view xml, int timeout_ms) {
  auto suite = xml.size() > kJunitXmlBytesMax
                   ? Result<Suite>(Error{Code::invalid, "too large"})
                   : talk(socket_fd, xml, timeout_ms);
  ::close(socket_fd);
  return suite;
}

}  // namespace machina::kinds
