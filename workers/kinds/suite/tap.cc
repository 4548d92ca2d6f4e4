#include "workers/kinds/suite/tap.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <unordered_map>

#include "queue/base/utf8.h"

namespace machina::kinds {
namespace {

constexpr std::size_t kIndent = 4;  // of a subtest
constexpr std::size_t kNotesBytesMax = 2 * kCaseMessageBytesMax;

bool starts_word(std::string_view text, std::string_view word) {
  if (text.size() < word.size()) return false;
  return std::equal(word.begin(), word.end(), text.begin(), [](char a, char b) {
    return a == (b >= 'A' && b <= 'Z' ? static_cast<char>(b - 'A' + 'a') : b);
  });
}

void skip_spaces(std::string_view& text) {
  text.remove_prefix(std::min(text.size(), text.find_first_not_of(" \t")));
}

std::string_view trimmed(std::string_view text) {
  skip_spaces(text);
  while (text.ends_with(' ') || text.ends_with('\t')) text.remove_suffix(1);
  return text;
}

std::optional<std::uint64_t> number(std::string_view& text) {
  std::uint64_t n = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc() || end == text.data()) return std::nullopt;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return n;
}

// A point's line, taken apart.
struct Point {
  bool ok = false, skip = false, todo = false, opens = false;
  std::optional<std::uint64_t> number;
  std::string name;
  std::string_view why;
  double ms = 0;

  Outcome outcome() const {
    if (skip || todo) return Outcome::skipped;
    return ok ? Outcome::passed : Outcome::failed;
  }
};

// "\#" and "\\" of a name stand for "#" and "\".
std::string unescaped(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool escape = text[i] == '\\' && i + 1 < text.size() &&
                        (text[i + 1] == '\\' || text[i + 1] == '#');
    out += text[escape ? ++i : i];
  }
  return out;
}

// What stands behind an unescaped "#" that a space precedes.
bool take_directive(Point& point, std::string_view text) {
  skip_spaces(text);
  if (starts_word(text, "skip")) {
    point.skip = true;
    point.why = trimmed(text.substr(std::min(text.size(), text.find(' '))));
    return true;
  }
  if (starts_word(text, "todo") &&
      (text.size() == 4 || text[4] == ' ' || text[4] == ':')) {
    point.todo = true;
    point.why = trimmed(text.substr(4));
    return true;
  }
  if (starts_word(text, "time=")) {  // it differs from run to run
    point.ms = std::strtod(std::string(text.substr(5, 20)).c_str(), nullptr);
    const bool ms = text.find("ms") != std::string_view::npos;
    if (!ms) point.ms *= 1000;
    return true;
  }
  return false;
}

std::optional<Point> point_in(std::string_view text) {
  Point point;
  point.ok = !text.starts_with("not ");
  if (!point.ok) text.remove_prefix(4);
  if (!text.starts_with("ok")) return std::nullopt;
  text.remove_prefix(2);
  if (!text.empty() && text[0] != ' ' && text[0] != '\t') return std::nullopt;
  skip_spaces(text);
  std::string_view after = text;
  const auto n = number(after);
  if (n && (after.empty() || after[0] == ' ' || after[0] == '\t')) {
    point.number = n;
    text = after;
    skip_spaces(text);
  }
  if (text.starts_with('-')) text.remove_prefix(1);
  text = trimmed(text);
  if (text == "{" || text.ends_with(" {")) {
    point.opens = true;
    text.remove_suffix(1);
    text = trimmed(text);
  }
  std::size_t cut = text.size();
  for (std::size_t i = 0; i < text.size() && cut == text.size(); ++i) {
    if (text[i] == '\\') {
      ++i;
    } else if (text[i] == '#' && (i == 0 || text[i - 1] == ' ') &&
               take_directive(point, text.substr(i + 1))) {
      cut = i;
    }
  }
  point.name = unescaped(trimmed(text.substr(0, cut)));
  return point;
}

class TapReader {
 public:
  Result<std::vector<Case>> read(std::string_view text) {
    levels_.emplace_back();
    while (!text.empty() && problem_.empty()) {
      const std::size_t end = text.find('\n');
      std::string_view line = text.substr(0, end);
      text.remove_prefix(end == text.npos ? text.size() : end + 1);
      if (line.ends_with('\r')) line.remove_suffix(1);
      ++at_;
      take(line);
    }
    if (problem_.empty()) finish();
    if (!problem_.empty()) return Error{Code::invalid, problem_};
    for (Case& one : cases_) {
      one.id = std::string(utf8_head(one.id, kCaseIdBytesMax));
      one.message = std::string(utf8_head(one.message, kCaseMessageBytesMax));
    }
    return std::move(cases_);
  }

 private:
  struct Level {
    std::uint64_t points = 0;
    std::optional<std::uint64_t> plan;
    bool plan_last = false;       // nothing may follow it
    std::size_t first_case = 0;   // of those below the point that ends it
    std::optional<Point> opened;  // by "point {"
  };

  void fail(const std::string& what) {
    if (problem_.empty()) {
      problem_ = "line " + std::to_string(at_) + ": " + what;
    }
  }

  void take(std::string_view line) {
    const std::size_t indent =
        std::min(line.size(), line.find_first_not_of(' '));
    std::string_view text = line.substr(indent);
    if (in_yaml_) return take_yaml(text, indent);
    if (text == "---" && after_point_ && indent == point_indent_ + 2) {
      in_yaml_ = true;
      return;
    }
    if (text.starts_with('#')) return take_comment(text);
    // Whatever stands before it, as prove reads it.
    const std::string_view word =
        line.substr(std::min(line.size(), line.find_first_not_of(" \t\v\f")));
    if (word.starts_with("Bail out!")) {
      return fail("it says \"" + std::string(utf8_head(word, 200)) + "\"");
    }
    if (indent % kIndent != 0) return;
    const std::size_t level = indent / kIndent;
    if (text == "}" && levels_.size() > 1 && level + 2 == levels_.size() &&
        levels_.back().opened) {
      const Point point = *levels_.back().opened;
      return end_level(point);
    }
    if (text.starts_with("TAP version ")) return take_version(text.substr(12));
    if (auto point = point_in(text)) return take_point(*point, level, indent);
    if (text.starts_with("1..")) take_plan(text.substr(3), level);
  }

  void take_version(std::string_view text) {
    const auto version = number(text);
    if (!version || !trimmed(text).empty() || *version < 12 || *version > 14) {
      fail("a version of TAP that is none of 12, 13, 14");
    }
  }

  // Opens the level where that is the next one; false: it is none.
  bool enter(std::size_t level) {
    if (level < levels_.size()) return true;
    if (level > levels_.size() || levels_.size() >= kTapDepthMax) {
      fail(level > levels_.size() ? "it is further in than its subtest"
                                  : "subtests are nested too deeply");
      return false;
    }
    Level next;
    next.first_case = cases_.size();
    if (opens_) {
      // What the point itself said counts when its block ends.
      next.opened = std::move(*opens_);
      if (has_case_) cases_.pop_back();
      --levels_.back().points;
      next.first_case = cases_.size();
    }
    opens_.reset();
    levels_.push_back(std::move(next));
    after_point_ = has_case_ = false;
    return true;
  }

  void take_plan(std::string_view text, std::size_t level) {
    const auto count = number(text);
    std::string_view rest = trimmed(text);
    if (!count || !(rest.empty() || rest.starts_with('#'))) return;
    if (level + 1 < levels_.size()) {
      return fail("a plan, and the subtest before it has not ended");
    }
    if (!enter(level)) return;
    Level& here = levels_.back();
    if (here.plan) return fail("a second plan");
    here.plan = *count;
    here.plan_last = here.points > 0;
    if (here.plan_last && here.points != *count) miscounted(here);
    after_point_ = false;
    opens_.reset();
  }

  void take_point(const Point& point, std::size_t level, std::size_t indent) {
    if (level + 1 < levels_.size()) {
      if (level + 2 < levels_.size() || levels_.back().opened) {
        return fail("the subtest before it has not ended");
      }
      return end_level(point);
    }
    if (!enter(level)) return;
    count(point);
    add(point);
    point_indent_ = indent;
    after_point_ = true;
    opens_.reset();
    if (point.opens) opens_ = std::make_unique<Point>(point);
  }

  // A point of the current level.
  void count(const Point& point) {
    Level& here = levels_.back();
    if (here.plan_last) return fail("a test after the plan that ended them");
    ++here.points;
    if (here.plan && here.points > *here.plan) return miscounted(here);
    if (point.number && *point.number != here.points) {
      fail("number " + std::to_string(*point.number) + " where " +
           std::to_string(here.points) + " is next");
    }
  }

  void miscounted(const Level& level) {
    fail("the plan is 1.." + std::to_string(*level.plan) + ", and there " +
         (level.points == 1 ? "is " : "are ") + std::to_string(level.points) +
         (level.points == 1 ? " test" : " tests"));
  }

  void add(const Point& point) {
    if (cases_.size() >= kTapCasesMax) {
      return fail("more than " + std::to_string(kTapCasesMax) + " cases");
    }
    Case one;
    one.id = named(point);
    one.outcome = point.outcome();
    one.duration_ms = milliseconds(point.ms);
    if (point.todo || point.skip) {
      one.message = point.todo ? "todo" : "";
      if (!point.why.empty()) {
        one.message +=
            (one.message.empty() ? "" : ": ") + std::string(point.why);
      }
    }
    cases_.push_back(std::move(one));
    has_case_ = true;
  }

  std::string named(const Point& point) const {
    return point.name.empty() ? "test " + std::to_string(levels_.back().points)
                              : point.name;
  }

  static std::uint32_t milliseconds(double ms) {
    if (!std::isfinite(ms) || ms <= 0) return 0;
    return static_cast<std::uint32_t>(std::lround(std::min(ms, 4e9)));
  }

  // `point` is what the last level was about.
  void end_level(const Point& point) {
    const Level below = std::move(levels_.back());
    levels_.pop_back();
    if (!below.plan) return fail("the subtest before it has no plan");
    if (*below.plan != below.points) return miscounted(below);
    count(point);
    if (!problem_.empty()) return;
    bool failing = false;
    const std::string prefix = named(point) + " > ";
    for (std::size_t i = below.first_case; i < cases_.size(); ++i) {
      Case& one = cases_[i];
      // A name that is longer already says no more by what stands before it.
      if (one.id.size() <= kCaseIdBytesMax) one.id.insert(0, prefix);
      if (one.outcome != Outcome::failed) continue;
      failing = true;
      if (point.outcome() == Outcome::skipped) {
        one.outcome = Outcome::skipped;
        one.message.insert(0, "todo, as all of its subtest\n");
      }
    }
    if (failing && point.outcome() == Outcome::passed) {
      return fail("it says ok of a subtest of which a case failed");
    }
    has_case_ = false;
    if (cases_.size() == below.first_case ||
        (!failing && point.outcome() == Outcome::failed)) {
      add(point);
    }
    point_indent_ = (levels_.size() - 1) * kIndent;
    after_point_ = true;
    opens_.reset();
  }

  // Diagnostics behind a point that failed say why.
  void take_comment(std::string_view text) {
    if (!has_case_ || !after_point_ || text.starts_with("# Subtest")) return;
    if (cases_.back().outcome != Outcome::failed) return;
    text.remove_prefix(1);
    note(trimmed(text));
  }

  void note(std::string_view line) {
    std::string& message = cases_.back().message;
    if (message.size() + line.size() > kNotesBytesMax) return;
    if (!message.empty()) message += '\n';
    message += line;
  }

  void take_yaml(std::string_view text, std::size_t indent) {
    if (indent == point_indent_ + 2 && text == "...") {
      in_yaml_ = false;
      return;
    }
    if (!has_case_) return;
    static constexpr std::string_view kDuration = "duration_ms: ";
    if (indent == point_indent_ + 2 && text.starts_with(kDuration)) {
      const std::string value(text.substr(kDuration.size(), 30));
      cases_.back().duration_ms =
          milliseconds(std::strtod(value.c_str(), nullptr));
    } else if (cases_.back().outcome == Outcome::failed) {
      note(text);
    }
  }

  void finish() {
    if (in_yaml_) return fail("a block of yaml that does not end");
    if (levels_.size() > 1) return fail("a subtest that does not end");
    const Level& top = levels_.back();
    if (!top.plan) {
      return fail(top.points == 0 ? "neither a plan nor a test was found"
                                  : "the plan is missing");
    }
    if (*top.plan != top.points) miscounted(top);
  }

  std::size_t at_ = 0;  // the line's number
  std::string problem_;
  std::vector<Level> levels_;
  std::vector<Case> cases_;
  // Of the point just read: whether anything may still belong to it, whether
  // the last case is its, and whether it may open a block.
  bool after_point_ = false, has_case_ = false, in_yaml_ = false;
  std::size_t point_indent_ = 0;
  // A pointer, because g++ 12 at -O2 takes an empty optional for one in use.
  std::unique_ptr<Point> opens_;
};

}  // namespace

Result<std::vector<Case>> read_tap(std::string_view text) {
  return TapReader().read(text);
}

std::string encode_tap(std::string_view text) {
  auto cases = read_tap(text);
  if (!cases) return no_report("not a whole TAP: " + cases.error().what);
  CaseFrames frames;
  std::unordered_map<std::string, std::uint32_t> seen;
  for (Case& one : *cases) {
    one.nth = ++seen[one.id];
    one.body = one.outcome;
    frames.add(std::move(one));
  }
  return std::move(frames).take();
}

int tap_handler(int in_fd, int out_fd) {
  return report_handler(in_fd, out_fd, encode_tap);
}

}  // namespace machina::kinds
