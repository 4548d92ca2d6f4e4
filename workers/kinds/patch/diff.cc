#include "workers/kinds/patch/diff.h"

#include <algorithm>
#include <map>
#include <optional>

#include "queue/base/utf8.h"

namespace machina::kinds {
namespace {

constexpr unsigned kFile = 0100644, kProgram = 0100755, kLink = 0120000,
                   kSubmodule = 0160000;

// --- characters ---

std::string shown(std::string_view text) {
  std::string out = "\"";
  for (const char c : utf8_head(text, 200)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) {
      static constexpr char kOctal[] = "01234567";
      out += '\\';
      out += kOctal[byte >> 6];
      out += kOctal[byte >> 3 & 7];
      out += kOctal[byte & 7];
    } else {
      out += c;
    }
  }
  return out + (text.size() > 200 ? "...\"" : "\"");
}

// HFS+ ignores these when it compares names.
std::string without_ignorable(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (i + 2 < text.size()) {
      const auto a = static_cast<unsigned char>(text[i]);
      const auto b = static_cast<unsigned char>(text[i + 1]);
      const auto c = static_cast<unsigned char>(text[i + 2]);
      const bool ignorable =
          (a == 0xE2 && b == 0x80 &&
           ((c >= 0x8C && c <= 0x8F) || (c >= 0xAA && c <= 0xAE))) ||
          (a == 0xE2 && b == 0x81 && c >= 0xAA && c <= 0xAF) ||
          (a == 0xEF && b == 0xBB && c == 0xBF);
      if (ignorable) {
        i += 2;
        continue;
      }
    }
    out += text[i];
  }
  return out;
}

std::string lower(std::string text) {
  for (char& c : text) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

// A component as the most forgiving file system would see it.
std::string folded(std::string_view component) {
  std::string name = lower(without_ignorable(component));
  name.resize(std::min(name.size(), name.find(':')));  // NTFS streams
  while (!name.empty() && (name.back() == ' ' || name.back() == '.')) {
    name.pop_back();
  }
  return name;
}

// Calls each(component) for the parts between slashes; false ends it.
template <class Each>
bool components(std::string_view path, const char* separators, Each each) {
  for (;;) {
    const std::size_t at = path.find_first_of(separators);
    if (!each(path.substr(0, at))) return false;
    if (at == std::string_view::npos) return true;
    path.remove_prefix(at + 1);
  }
}

std::optional<std::uint64_t> number(std::string_view& text) {
  std::uint64_t n = 0;
  std::size_t digits = 0;
  while (digits < text.size() && text[digits] >= '0' && text[digits] <= '9') {
    n = n * 10 + static_cast<unsigned>(text[digits] - '0');
    if (++digits > 9) return std::nullopt;
  }
  if (digits == 0) return std::nullopt;
  text.remove_prefix(digits);
  return n;
}

// A name in git's C style, from its opening quote on; what follows it is left
// in `text`.
std::optional<std::string> unquote(std::string_view& text) {
  std::string out;
  std::size_t i = 1;
  for (; i < text.size() && text[i] != '"'; ++i) {
    if (text[i] != '\\') {
      out += text[i];
      continue;
    }
    if (++i >= text.size()) return std::nullopt;
    static constexpr char kFrom[] = "abtnvfr\"\\", kTo[] = "\a\b\t\n\v\f\r\"\\";
    const char* at = std::find(kFrom, kFrom + 9, text[i]);
    if (at != kFrom + 9) {
      out += kTo[at - kFrom];
      continue;
    }
    if (i + 2 >= text.size()) return std::nullopt;
    unsigned value = 0;
    for (int k = 0; k < 3; ++k) {
      const char c = text[i + static_cast<std::size_t>(k)];
      if (c < '0' || c > '7') return std::nullopt;
      value = value * 8 + static_cast<unsigned>(c - '0');
    }
    if (value > 255) return std::nullopt;
    out += static_cast<char>(value);
    i += 2;
  }
  if (i >= text.size()) return std::nullopt;
  text.remove_prefix(i + 1);
  return out;
}

std::string_view without_cr(std::string_view line) {
  if (line.ends_with('\r')) line.remove_suffix(1);
  return line;
}

// Takes `shape` off the end of `text` where it fits: 0 is any digit, + is a
// sign, the rest is itself.
bool take_off(std::string_view& text, std::string_view shape) {
  if (text.size() < shape.size()) return false;
  const std::string_view end = text.substr(text.size() - shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const bool fits = shape[i] == '0'   ? end[i] >= '0' && end[i] <= '9'
                      : shape[i] == '+' ? end[i] == '+' || end[i] == '-'
                                        : end[i] == shape[i];
    if (!fits) return false;
  }
  text.remove_suffix(shape.size());
  return true;
}

// A name without the time that `diff -u` writes behind it, as git cuts it: also
// where a mail made spaces of the tab.
std::string_view without_time(std::string_view text) {
  std::string_view rest = text;
  if (!take_off(rest, " +0000")) take_off(rest, " +00:00");
  std::string_view seconds = rest;
  while (take_off(seconds, "0")) {
  }
  if (seconds.size() < rest.size() && take_off(seconds, ".") &&
      take_off(seconds, " 00:00:00")) {
    rest = seconds;
  } else {
    take_off(rest, " 00:00:00");
  }
  if (!take_off(rest, "0000-00-00") && !take_off(rest, "00-00-00")) {
    return text;
  }
  if (rest.ends_with('\t')) return rest.substr(0, rest.size() - 1);
  if (!rest.ends_with(' ')) return text;
  while (rest.ends_with(' ')) rest.remove_suffix(1);
  return rest.empty() ? text : rest;
}

// Whether the time behind a name is 1970-01-01 00:00:00 UTC in some zone:
// `diff -N` writes that of a file that is not there.
bool is_epoch(std::string_view text) {
  text.remove_prefix(text.rfind('\t') + 1);  // npos: 0
  const bool west = text.starts_with("1969-12-31 ");
  if (!west && !text.starts_with("1970-01-01 ")) return false;
  text.remove_prefix(11);
  std::string_view zone = text;
  if (!take_off(zone, "0000") && !take_off(zone, "00:00")) return false;
  if (zone.size() < 2 || zone[zone.size() - 2] != ' ') return false;
  const auto two = [](std::string_view digits) {
    return (digits[0] - '0') * 10 + (digits[1] - '0');
  };
  std::string_view shift = text.substr(zone.size());
  const int minutes_shift =
      (two(shift) * 60 + two(shift.substr(shift.size() - 2))) *
      (zone.back() == '-' ? -1 : 1);
  std::string_view time = zone.substr(0, zone.size() - 2);
  while (time.size() > 8 && time.ends_with('0')) time.remove_suffix(1);
  if (time.size() == 9 && time.ends_with('.')) time.remove_suffix(1);
  std::string_view left = time;
  if (!take_off(left, "00:00:00") || !left.empty() || !time.ends_with(":00")) {
    return false;
  }
  const int minutes = two(time) * 60 + two(time.substr(3));
  return minutes - minutes_shift == (west ? 24 * 60 : 0);
}

// --- the parser ---

class Reader {
 public:
  Reader(std::string_view text, int strip) : rest_(text), forced_(strip) {}

  Diff read() {
    if (rest_.size() > kDiffBytesMax) {
      refuse(0, std::to_string(rest_.size()) + " bytes; at most " +
                    std::to_string(kDiffBytesMax));
      return std::move(diff_);
    }
    while (good() && next()) {
      if (line_.starts_with("diff --git ")) {
        git_file();
      } else if (line_.starts_with("--- ") && rest_.starts_with("+++ ")) {
        plain_file();
      } else if (line_.starts_with("@@ -")) {
        malform("a hunk that belongs to no file");
      } else if (line_.starts_with("GIT binary patch") ||
                 (line_.starts_with("Binary files ") &&
                  without_cr(line_).ends_with(" differ"))) {
        binary();
      } else if (line_.starts_with("diff --cc ") ||
                 line_.starts_with("diff --combined ") ||
                 line_.starts_with("@@@ ")) {
        refuse(at_, "a merge's combined diff cannot be applied");
      }
    }
    if (good() && waiting_.empty()) {
      malform(
          "it names no file: neither a \"diff --git\" line nor a \"---\" "
          "and \"+++\" pair was found",
          0);
    }
    if (good()) settle();
    return std::move(diff_);
  }

 private:
  // A header's name: what it says, before anything is stripped.
  struct Name {
    std::string text;
    bool null = false;   // /dev/null
    bool epoch = false;  // of a time that says that the file is not there
  };
  struct Pending {
    DiffFile file;
    std::size_t at = 0;  // its first line
    std::string git_line;
    std::optional<Name> minus, plus;
    std::optional<std::string> from, to;
    bool git = false;
    std::size_t nul_at = 0;  // the first line with a NUL byte; 0: none
  };

  bool good() const { return diff_.verdict == Diff::Verdict::ok; }

  void end(Diff::Verdict verdict, std::size_t at, const std::string& what) {
    if (!good()) return;
    diff_.verdict = verdict;
    diff_.problem = at == 0 ? what : "line " + std::to_string(at) + ": " + what;
  }
  void refuse(std::size_t at, const std::string& what) {
    end(Diff::Verdict::refused, at, what);
  }
  void malform(const std::string& what) { malform(what, at_); }
  void malform(const std::string& what, std::size_t at) {
    end(Diff::Verdict::malformed, at, what);
  }
  void binary() {
    refuse(at_, "a binary patch: only text can be reviewed and applied");
  }

  bool next() {
    if (rest_.empty()) return false;
    const std::size_t end = rest_.find('\n');
    line_ = rest_.substr(0, end);
    rest_.remove_prefix(end == std::string_view::npos ? rest_.size() : end + 1);
    ++at_;
    return true;
  }

  // --- names ---

  // Of a ---, +++ line: to the end, or to the time behind it.
  std::optional<Name> name(std::string_view text, bool git) {
    text = without_cr(text);
    Name out;
    out.epoch = !git && is_epoch(text);
    if (!git) text = without_time(text);
    if (text.starts_with('"')) {
      auto plain = unquote(text);
      if (!plain || !(text.empty() || text[0] == '\t')) {
        malform("a quoted name that does not end");
        return std::nullopt;
      }
      out.text = std::move(*plain);
    } else {
      out.text = std::string(text.substr(0, text.find('\t')));
    }
    out.null = out.text == "/dev/null";
    if (out.text.empty()) {
      malform("an empty name");
      return std::nullopt;
    }
    return out;
  }

  // Of rename and copy lines: never with a prefix.
  std::optional<std::string> bare_name(std::string_view text) {
    text = without_cr(text);
    if (!text.starts_with('"')) return std::string(text);
    auto plain = unquote(text);
    if (!plain || !text.empty()) {
      malform("a quoted name that does not end");
      return std::nullopt;
    }
    return plain;
  }

  // Empty where nothing is left.
  static std::string stripped(const std::string& name, int strip) {
    if (strip == 0) return name;
    const std::size_t slash = name.find('/');
    return slash == std::string::npos ? "" : name.substr(slash + 1);
  }

  // The two names of a "diff --git" line. Unquoted ones may hold spaces: then
  // the line is cut where both halves name the same file.
  struct Two {
    std::string first, second;
  };
  static std::optional<Two> git_names(std::string_view text) {
    Two two;
    if (text.starts_with('"')) {
      auto first = unquote(text);
      if (!first || !text.starts_with(' ')) return std::nullopt;
      text.remove_prefix(1);
      two.first = std::move(*first);
      if (text.starts_with('"')) {
        auto second = unquote(text);
        if (!second || !text.empty()) return std::nullopt;
        two.second = std::move(*second);
      } else {
        two.second = std::string(text);
      }
      return two;
    }
    const std::size_t quote = text.find(" \"");
    if (quote != std::string_view::npos && text.ends_with('"')) {
      two.first = std::string(text.substr(0, quote));
      text.remove_prefix(quote + 1);
      auto second = unquote(text);
      if (!second || !text.empty()) return std::nullopt;
      two.second = std::move(*second);
      return two;
    }
    for (std::size_t at = text.find(' '); at != std::string_view::npos;
         at = text.find(' ', at + 1)) {
      std::string first(text.substr(0, at)), second(text.substr(at + 1));
      const bool bare = first == second;
      const std::string tail = stripped(first, 1);
      if (bare || (!tail.empty() && tail == stripped(second, 1))) {
        return Two{std::move(first), std::move(second)};
      }
    }
    return std::nullopt;
  }

  // --- a file ---

  static unsigned octal(std::string_view text) {
    unsigned mode = 0;
    text = without_cr(text);
    if (text.empty() || text.size() > 6) return 1;
    for (const char c : text) {
      if (c < '0' || c > '7') return 1;
      mode = mode * 8 + static_cast<unsigned>(c - '0');
    }
    return mode;
  }

  void take_mode(unsigned& into, std::string_view text) {
    const unsigned mode = octal(text);
    if (mode == kSubmodule) {
      return refuse(at_, "mode 160000: submodules are not patched");
    }
    if (mode != kFile && mode != kProgram && mode != kLink) {
      return refuse(at_, "mode " + shown(without_cr(text)) +
                             ": a file's mode is 100644, 100755 or 120000");
    }
    if (into != 0 && into != mode) {
      return refuse(at_, "two different modes for one file");
    }
    into = mode;
  }

  void index_line(DiffFile& file, std::string_view text) {
    const std::size_t space = text.find(' ');
    if (space == std::string_view::npos) return;
    unsigned mode = 0;
    take_mode(mode, text.substr(space + 1));
    if (!good()) return;
    take_mode(file.old_mode, text.substr(space + 1));
    if (good()) take_mode(file.new_mode, text.substr(space + 1));
  }

  // One extended header; false where the line is none.
  bool extended(Pending& p) {
    const auto starts = [&](std::string_view word, auto act) {
      if (!line_.starts_with(word)) return false;
      act(line_.substr(word.size()));
      return true;
    };
    DiffFile& f = p.file;
    return starts("old mode ", [&](auto v) { take_mode(f.old_mode, v); }) ||
           starts("new mode ", [&](auto v) { take_mode(f.new_mode, v); }) ||
           starts("deleted file mode ",
                  [&](auto v) {
                    f.deleted = true;
                    take_mode(f.old_mode, v);
                  }) ||
           starts("new file mode ",
                  [&](auto v) {
                    f.created = true;
                    take_mode(f.new_mode, v);
                  }) ||
           starts("copy from ",
                  [&](auto v) {
                    f.copied = true;
                    p.from = bare_name(v);
                  }) ||
           starts("copy to ",
                  [&](auto v) {
                    f.copied = true;
                    p.to = bare_name(v);
                  }) ||
           starts("rename from ",
                  [&](auto v) {
                    f.renamed = true;
                    p.from = bare_name(v);
                  }) ||
           starts("rename to ",
                  [&](auto v) {
                    f.renamed = true;
                    p.to = bare_name(v);
                  }) ||
           // As git takes them: the old words for the same.
           starts("rename old ",
                  [&](auto v) {
                    f.renamed = true;
                    p.from = bare_name(v);
                  }) ||
           starts("rename new ",
                  [&](auto v) {
                    f.renamed = true;
                    p.to = bare_name(v);
                  }) ||
           starts("similarity index ", [](auto) {}) ||
           starts("dissimilarity index ", [](auto) {}) ||
           starts("index ", [&](auto v) { index_line(f, v); });
  }

  void git_file() {
    Pending p;
    p.at = at_;
    p.git = true;
    p.git_line = std::string(without_cr(line_.substr(11)));
    while (good() && !rest_.empty()) {
      const auto saved = rest_;
      const auto saved_line = line_;
      if (rest_.starts_with("--- ")) {
        next();
        p.minus = name(line_.substr(4), true);
        if (!good()) return;
        if (!rest_.starts_with("+++ ")) {
          return malform("\"---\" without \"+++\" after it");
        }
        next();
        p.plus = name(line_.substr(4), true);
        if (!good()) return;
        hunks(p);
        break;
      }
      if (rest_.starts_with("@@ -") || rest_.starts_with("+++ ")) {
        next();
        return malform("a hunk without \"---\" and \"+++\" before it");
      }
      next();
      if (!extended(p)) {
        if (line_.starts_with("GIT binary patch") ||
            (line_.starts_with("Binary files ") &&
             without_cr(line_).ends_with(" differ"))) {
          return binary();
        }
        rest_ = saved;  // noise, or the next file
        line_ = saved_line;
        --at_;
        break;
      }
    }
    if (good()) add(std::move(p));
  }

  void plain_file() {
    Pending p;
    p.at = at_;
    p.minus = name(line_.substr(4), false);
    if (!good()) return;
    next();
    p.plus = name(line_.substr(4), false);
    if (!good()) return;
    if (!rest_.starts_with("@@ -")) return;  // prose that looks like a header
    p.file.created = p.minus->null || (p.minus->epoch && !p.plus->null);
    p.file.deleted = p.plus->null || (p.plus->epoch && !p.file.created);
    hunks(p);
    if (good()) add(std::move(p));
  }

  // --- hunks ---

  std::optional<DiffHunk> hunk_head() {
    std::string_view text = line_.substr(4);
    DiffHunk h;
    const auto range = [&](std::uint64_t& start, std::uint64_t& lines) {
      const auto a = number(text);
      if (!a) return false;
      start = *a;
      lines = 1;
      if (!text.starts_with(',')) return true;
      text.remove_prefix(1);
      const auto b = number(text);
      if (!b) return false;
      lines = *b;
      return true;
    };
    if (!range(h.old_start, h.old_lines) || !text.starts_with(" +")) {
      return std::nullopt;
    }
    text.remove_prefix(2);
    if (!range(h.new_start, h.new_lines) || !text.starts_with(" @@")) {
      return std::nullopt;
    }
    return h;
  }

  void hunks(Pending& p) {
    while (good() && rest_.starts_with("@@ -")) {
      next();
      const auto head = hunk_head();
      if (!head) return malform("not a hunk's head: " + shown(line_));
      if (++hunks_ > kDiffHunksMax) {
        return refuse(at_,
                      "more than " + std::to_string(kDiffHunksMax) + " hunks");
      }
      p.file.hunks.push_back(*head);
      body(p, p.file.hunks.back());
    }
  }

  void body(Pending& p, DiffHunk& head) {
    const std::size_t head_at = at_;
    std::uint64_t old_left = head.old_lines, new_left = head.new_lines;
    char last = 0;
    while (old_left > 0 || new_left > 0) {
      if (!next()) {
        return malform("the hunk ends before the lines that its head counts (" +
                           std::to_string(old_left) + " old and " +
                           std::to_string(new_left) + " new are missing)",
                       head_at);
      }
      const char mark = line_.empty() || line_ == "\r" ? ' ' : line_[0];
      if (p.nul_at == 0 && line_.find('\0') != std::string_view::npos) {
        p.nul_at = at_;
      }
      const bool takes_old = mark == ' ' || mark == '-';
      const bool takes_new = mark == ' ' || mark == '+';
      if (mark == '\\') {
        if (last == 0) return malform("\"\\\" before any line of its hunk");
        continue;
      }
      if (!takes_old && !takes_new) {
        return malform(
            "inside a hunk, a line begins with a space, +, - or \\; "
            "the head at line " +
            std::to_string(head_at) + " may count wrongly");
      }
      if ((takes_old && old_left == 0) || (takes_new && new_left == 0)) {
        return malform("more lines than the hunk's head at line " +
                       std::to_string(head_at) + " counts");
      }
      old_left -= takes_old ? 1 : 0;
      new_left -= takes_new ? 1 : 0;
      if (mark == '+') {
        ++p.file.added;
        if (link_line_.empty()) link_line_ = line_.substr(1);
        ++link_lines_;
      }
      if (mark == '-') ++p.file.removed;
      head.context = head.context || mark == ' ';
      last = mark;
    }
    while (rest_.starts_with("\\ ")) next();
  }

  // --- what it comes to ---

  void add(Pending p) {
    if (waiting_.size() >= kDiffFilesMax) {
      return refuse(p.at,
                    "more than " + std::to_string(kDiffFilesMax) + " files");
    }
    DiffFile& f = p.file;
    if (f.renamed || f.copied) {
      if (!p.from || !p.to) {
        return malform("a rename or copy needs both its from and its to line",
                       p.at);
      }
      if (f.created || f.deleted || (f.renamed && f.copied)) {
        return refuse(p.at, "headers that contradict each other");
      }
    }
    if (p.git && p.minus && p.minus->null != (f.created && !f.deleted)) {
      // Git's own form for an empty file that is made has no --- line at all.
      return refuse(p.at,
                    "\"---\" and the headers before it disagree on "
                    "whether the file is new");
    }
    if (p.git && p.plus && p.plus->null != (f.deleted && !f.created)) {
      return refuse(p.at,
                    "\"+++\" and the headers before it disagree on "
                    "whether the file is deleted");
    }
    if (f.created && f.deleted) {
      return refuse(p.at, "headers that contradict each other");
    }
    f.link_target.clear();
    if (f.new_mode == kLink && f.added > 0) {
      if (link_lines_ != 1 || f.hunks.size() != 1) {
        refuse(p.at, "a symbolic link's target is one line");
      }
      f.link_target = std::string(link_line_);
    }
    link_line_ = {};
    link_lines_ = 0;
    waiting_.push_back(std::move(p));
    note_strip(waiting_.back());
  }

  // How many leading components two names of one file say are no path. As git
  // guesses for `diff -u`: none where a name has but one. -1: nothing.
  static int strip_of(std::string_view a, std::string_view b) {
    const std::size_t ends_a = a.find('/'), ends_b = b.find('/');
    const bool bare_a = ends_a == a.npos, bare_b = ends_b == b.npos;
    if (bare_a || bare_b) return bare_a && bare_b ? 0 : -1;
    if (a.starts_with("./") && b.starts_with("./")) return 1;
    return a.substr(0, ends_a) == b.substr(0, ends_b) ? 0 : 1;
  }

  // How many leading components this file's names say are no path; -1: nothing.
  void note_strip(const Pending& p) {
    int says = -1;
    bool sure = true;  // else it may also be one more
    const auto two_say = [&](const std::string& a, const std::string& b) {
      says = strip_of(a, b);
      sure = says != 0 || a.find('/') == std::string::npos;
    };
    if (p.from && p.to) {
      // These two never have a prefix, so the others tell by their length.
      for (const int strip : {0, 1}) {
        if (says < 0 && git_line_names(p.git_line, *p.from, *p.to, strip)) {
          says = strip;
        }
      }
    } else if (p.minus && p.plus && !p.minus->null && !p.plus->null) {
      two_say(p.minus->text, p.plus->text);
    } else if (p.git) {
      if (const auto two = git_names(p.git_line)) {
        two_say(two->first, two->second);
      }
    } else if (p.minus && p.plus) {
      const std::string& only = p.minus->null ? p.plus->text : p.minus->text;
      if (only.starts_with("a/") || only.starts_with("b/")) says = 1;
      if (only.find('/') == std::string::npos) says = 0;
    }
    if (says < 0) return;
    sure_ = sure_ || sure;
    if (forced_ >= 0) return;
    if (strip_ >= 0 && strip_ != says) {
      refuse(p.at, "some names have a prefix (a/, b/) and some have none");
    }
    strip_ = says;
  }

  void settle() {
    diff_.strip = forced_ >= 0 ? forced_ : strip_ < 0 ? 1 : strip_;
    if (strip_ == 0 && !sure_) diff_.other_strip = 1;
    for (Pending& p : waiting_) {
      resolve(p);
      if (!good()) return;
      diff_.added += p.file.added;
      diff_.removed += p.file.removed;
      diff_.files.push_back(std::move(p.file));
    }
    no_file_is_a_directory();
  }

  // A header's name as a path.
  std::string path_of(const Pending& p, const std::string& raw) {
    if (raw.starts_with('/')) {
      refuse(p.at, "path " + shown(raw) + " is absolute");
      return "";
    }
    // Also what is stripped may not climb.
    components(raw, "/\\", [&](std::string_view part) {
      if (part == "..") {
        refuse(p.at, "path " + shown(raw) + " leaves the repository (..)");
      }
      return good();
    });
    std::string path = stripped(raw, diff_.strip);
    if (path.empty() && good()) {
      refuse(p.at, "path " + shown(raw) + " has no prefix (a/, b/) to strip");
    }
    return path;
  }

  void resolve(Pending& p) {
    DiffFile& f = p.file;
    const auto agree = [&](const std::string& a, const std::string& b) {
      if (good() && a != b) {
        refuse(p.at,
               "its headers name two files: " + shown(a) + " and " + shown(b));
      }
    };
    std::optional<Two> two;
    if (p.git) two = git_names(p.git_line);
    if (f.renamed || f.copied) {
      f.old_path = *p.from;
      f.new_path = *p.to;
      if (p.minus) agree(path_of(p, p.minus->text), f.old_path);
      if (p.plus && good()) agree(path_of(p, p.plus->text), f.new_path);
      if (good()) agree_with_git_line(p);
    } else if (p.minus && p.plus) {
      if (p.minus->null && p.plus->null) {
        return refuse(p.at, "both names are /dev/null");
      }
      if (!p.minus->null) f.old_path = path_of(p, p.minus->text);
      if (!p.plus->null && good()) f.new_path = path_of(p, p.plus->text);
      if (!good()) return;
      if (p.git) {
        if (!p.minus->null && !p.plus->null) agree(f.old_path, f.new_path);
        if (good()) agree_with_git_line(p);
      } else {
        as_one_name(f);
      }
    } else {
      // Headers alone: a mode, or an empty file that comes or goes.
      if (!two) {
        return malform("the \"diff --git\" line does not name one file", p.at);
      }
      const std::string a = path_of(p, two->first);
      const std::string b = good() ? path_of(p, two->second) : "";
      agree(a, b);
      if (!f.created) f.old_path = a;
      if (!f.deleted) f.new_path = b;
      if (good() && !f.created && !f.deleted && f.old_mode == f.new_mode) {
        // "index" alone, or nothing: git takes it for an error.
        malform("a file's headers with neither hunks nor a change of mode",
                p.at);
      }
      if (good() && (f.created || f.deleted) &&
          (f.created ? f.new_mode : f.old_mode) == kLink) {
        refuse(p.at, "a symbolic link without a target");
      }
    }
    if (!good()) return;
    for (const std::string* path : {&f.old_path, &f.new_path}) {
      if (path->empty()) continue;
      if (const std::string why = path_problem(*path); !why.empty()) {
        return refuse(p.at, "path " + shown(*path) + " " + why);
      }
      diff_.paths.insert(*path);
    }
    if (p.nul_at != 0) {
      return refuse(p.nul_at,
                    "the text of " +
                        shown(f.new_path.empty() ? f.old_path : f.new_path) +
                        " holds a NUL byte, so git takes the file "
                        "for binary: only text can be reviewed and "
                        "applied");
    }
    check_link(p);
  }

  // `diff -u` of one file may name it twice: "a.c.orig" and "a.c", "a.c" and
  // "a.c~". Which of the two it is, git's rule says: the second, unless that is
  // the first with something behind it.
  static void as_one_name(DiffFile& f) {
    if (!f.old_path.empty() && !f.new_path.empty()) {
      const bool longer = f.new_path.starts_with(f.old_path);
      (longer ? f.new_path : f.old_path) = longer ? f.old_path : f.new_path;
    }
    if (f.created) f.old_path.clear();
    if (f.deleted) f.new_path.clear();
  }

  void agree_with_git_line(const Pending& p) {
    const DiffFile& f = p.file;
    const std::string& a = f.old_path.empty() ? f.new_path : f.old_path;
    const std::string& b = f.new_path.empty() ? f.old_path : f.new_path;
    if (!git_line_names(p.git_line, a, b, diff_.strip)) {
      refuse(p.at, "the \"diff --git\" line and the names below it disagree");
    }
  }

  // Whether a "diff --git" line may name these two.
  static bool git_line_names(const std::string& line, const std::string& a,
                             const std::string& b, int strip) {
    const auto fits = [&](const std::string& raw, const std::string& path) {
      return stripped(raw, strip) == path;
    };
    if (line.find('"') != std::string::npos) {
      if (const auto two = git_names(line);
          two && fits(two->first, a) && fits(two->second, b)) {
        return true;
      }
    }
    // Where one space separates the two names that the other headers gave.
    for (std::size_t at = line.find(' '); at != std::string::npos;
         at = line.find(' ', at + 1)) {
      if (fits(line.substr(0, at), a) && fits(line.substr(at + 1), b)) {
        return true;
      }
    }
    return false;
  }

  void check_link(const Pending& p) {
    const DiffFile& f = p.file;
    const bool makes = !f.deleted && f.new_mode == kLink;
    if (!makes) return;
    diff_.links.insert(f.new_path);
    if (f.added == 0) return;  // moved as it is; looked at once applied
    if (const std::string why = link_problem(f.new_path, f.link_target);
        !why.empty()) {
      refuse(p.at, "symbolic link " + shown(f.new_path) + " -> " +
                       shown(f.link_target) + " " + why);
    }
  }

  // No path lies below another one that this diff leaves as a file or link.
  void no_file_is_a_directory() {
    std::map<std::string, std::size_t> files;
    for (std::size_t i = 0; i < diff_.files.size(); ++i) {
      if (!diff_.files[i].new_path.empty()) {
        files.emplace(diff_.files[i].new_path, waiting_[i].at);
      }
    }
    for (std::size_t i = 0; i < diff_.files.size(); ++i) {
      const std::string& path = diff_.files[i].new_path;
      for (std::size_t at = path.find('/'); at != std::string::npos;
           at = path.find('/', at + 1)) {
        const std::string parent = path.substr(0, at);
        if (files.count(parent) > 0) {
          return refuse(waiting_[i].at,
                        "path " + shown(path) + " lies below " + shown(parent) +
                            ", which this diff makes a file or a symbolic "
                            "link");
        }
      }
    }
  }

  std::string_view rest_, line_;
  std::size_t at_ = 0;  // the line's number
  std::size_t hunks_ = 0, link_lines_ = 0;
  std::string_view link_line_;
  const int forced_;  // what is stripped, whatever the names say; -1: ask them
  int strip_ = -1;
  bool sure_ = false;
  std::vector<Pending> waiting_;
  Diff diff_;
};

}  // namespace

bool is_dot_git(std::string_view component) {
  const std::string name = folded(component);
  return name == ".git" || name == "git~1";
}

std::string path_problem(std::string_view path) {
  if (path.empty()) return "is empty";
  if (path.size() > kDiffPathBytesMax) {
    return "is " + std::to_string(path.size()) + " bytes long; at most " +
           std::to_string(kDiffPathBytesMax);
  }
  if (path.front() == '/') return "is absolute";
  for (const char c : path) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) return "holds a control character";
  }
  if (!valid_utf8(path)) return "is not UTF-8";
  std::string problem;
  std::size_t depth = 0;
  components(path, "/\\", [&](std::string_view part) {
    const std::string name = folded(part);
    if (part.empty()) {
      problem = "has an empty component";
    } else if (part == ".") {
      problem = "has a component \".\"";
    } else if (part == "..") {
      problem = "leaves the repository (..)";
    } else if (name.empty()) {
      problem = "has a component of nothing but dots and spaces";
    } else if (is_dot_git(part)) {
      problem = "leads into .git";
    } else if (name == ".gitmodules") {
      problem = "is .gitmodules: submodules are not patched";
    } else if (part.size() > 255) {
      problem = "has a component of " + std::to_string(part.size()) +
                " bytes; at most 255";
    } else if (++depth > kDiffDepthMax) {
      problem =
          "is more than " + std::to_string(kDiffDepthMax) + " directories deep";
    }
    return problem.empty();
  });
  return problem;
}

std::string link_problem(std::string_view path, std::string_view target) {
  if (target.empty()) return "points nowhere";
  if (target.size() > kDiffPathBytesMax) {
    return "has a target of " + std::to_string(target.size()) +
           " bytes; at most " + std::to_string(kDiffPathBytesMax);
  }
  if (target.front() == '/' || target.front() == '\\') {
    return "points to an absolute path";
  }
  for (const char c : target) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) {
      return "has a control character in its target";
    }
  }
  auto depth = std::count(path.begin(), path.end(), '/');
  bool down = false;
  std::string problem;
  components(target, "/\\", [&](std::string_view part) {
    if (part == "..") {
      // After a name that may itself be a link, ".." can be anywhere.
      if (down || --depth < 0) problem = "leaves the repository";
    } else if (!part.empty() && part != ".") {
      down = true;
      if (is_dot_git(part)) problem = "points into .git";
    }
    return problem.empty();
  });
  return problem;
}

Diff read_diff(std::string_view text, int strip) {
  return Reader(text, strip).read();
}

namespace {

std::string_view without_indent(std::string_view line) {
  const std::size_t at = line.find_first_not_of(" \t");
  line.remove_prefix(std::min(at, line.size()));
  if (line.starts_with("async ")) {
    line.remove_prefix(6);
    line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
  }
  return line;
}

// "a/P", quoted or not, as git writes it behind "--- " and "+++ "; empty:
// /dev/null. `prefix` is 2 there and 0 behind "rename to ".
std::string git_path(std::string_view text, std::size_t prefix) {
  std::string path;
  if (text.starts_with('"')) {
    path = unquote(text).value_or("");
  } else {
    // Git ends a name that has a space in it with a tab.
    path = std::string(text.substr(0, text.find('\t')));
    if (path == "/dev/null") return "";
  }
  return path.size() > prefix ? path.substr(prefix) : "";
}

}  // namespace

bool defines(std::string_view line, std::string_view word,
             std::string_view name) {
  line = without_indent(line);
  if (!line.starts_with(word)) return false;
  line.remove_prefix(word.size());
  const std::size_t at = line.find_first_not_of(" \t");
  if (at == 0 || at == std::string_view::npos) return false;
  line.remove_prefix(at);
  if (!line.starts_with(name)) return false;
  line.remove_prefix(name.size());
  return line.empty() ||
         std::string_view(" \t\r(:[").find(line[0]) != std::string_view::npos;
}

bool names_tests_in_quotes(std::string_view path) {
  for (const char* end : {".js", ".mjs", ".cjs", ".ts", ".mts", ".cts"}) {
    if (path.ends_with(end)) return true;
  }
  return false;
}

TakenAway read_taken_away(std::string_view undo) {
  TakenAway out;
  std::string from, to;  // of the diff as it stands: after and before the patch
  std::uint64_t old_left = 0, new_left = 0, old_at = 0, new_at = 0;
  bool quoted = false;
  while (!undo.empty()) {
    const std::size_t end = undo.find('\n');
    const std::string_view line = undo.substr(0, end);
    undo.remove_prefix(end == std::string_view::npos ? undo.size() : end + 1);
    if (old_left > 0 || new_left > 0) {
      const char mark = line.empty() ? ' ' : line[0];
      const std::string_view text =
          line.substr(std::min<std::size_t>(1, line.size()));
      const std::string_view word = without_indent(text);
      const bool kept =
          quoted ? text.find_first_of("'\"`") != text.npos
                 : word.starts_with("def ") || word.starts_with("class ");
      if (mark == '+' && kept && out.gone[to].size() < kTakenLinesMax)
        out.gone[to].push_back({new_at, std::string(text)});
      if (mark == '-' && kept)
        out.come[to].push_back({old_at, std::string(text)});
      if (mark != '+' && mark != '\\') ++old_at, old_left -= old_left > 0;
      if (mark != '-' && mark != '\\') ++new_at, new_left -= new_left > 0;
    } else if (line.starts_with("diff --git ")) {
      from.clear();
      to.clear();
    } else if (line.starts_with("rename to ")) {
      to = git_path(line.substr(10), 0);
      out.files.insert(to);
    } else if (line.starts_with("--- ")) {
      from = git_path(line.substr(4), 2);
    } else if (line.starts_with("+++ ")) {
      to = git_path(line.substr(4), 2);
      // It comes back with the undo: the patch deleted it.
      if (from.empty() && !to.empty()) out.files.insert(to);
      if (to.empty()) to = from;
    } else if (line.starts_with("@@ -")) {
      quoted = names_tests_in_quotes(to);
      std::string_view head = line.substr(4);
      const auto range = [&head](std::uint64_t& at, std::uint64_t& left) {
        at = number(head).value_or(0);
        left = 1;
        if (!head.starts_with(',')) return;
        head.remove_prefix(1);
        left = number(head).value_or(0);
      };
      range(old_at, old_left);
      head.remove_prefix(std::min<std::size_t>(2, head.size()));
      range(new_at, new_left);
    }
  }
  return out;
}

}  // namespace machina::kinds
