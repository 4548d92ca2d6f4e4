// workers/kinds/patch/diff.h
//
// What a unified diff asks for, judged by its text alone before git or anything
// else reads it: which paths, which modes, how many lines. Whether it applies
// is git's to say; whether it may be tried is said here.
//
//   diff   := (noise | file)*            noise: a mail's head, a diffstat, ...
//   file   := ["diff --git a/P b/P" extended*] ["--- a/P" "+++ b/P" hunk*]
//   hunk   := "@@ -n[,n] +n[,n] @@" with exactly the lines it counts
//
//   D1  A diff that is accepted names only relative paths below the top without
//       `.`, `..`, `.git` in any spelling that git or a file system takes for
//       it, control characters, or a file that is also a directory or a link.
//   D2  Modes are 100644 and 100755; 120000 only for a link whose target is
//       known and stays inside. No submodule, no binary patch, no NUL byte.
//   D3  Headers of git that name one file in two ways agree, or it is refused;
//       of two names that `diff -u` gives one file, git's rule takes one.
//   D4  Time and memory are linear in the text; every count has a bound.
//
// Parsers differ, so nothing is believed of a patch for having passed: what git
// made of it is compared with `paths` afterwards (patch.cc).

#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace machina::kinds {

constexpr std::size_t kDiffBytesMax = 4u << 20;
constexpr std::size_t kDiffFilesMax = 1000;
constexpr std::size_t kDiffHunksMax = 20'000;
constexpr std::size_t kDiffPathBytesMax = 1024;
constexpr std::size_t kDiffDepthMax = 64;

struct DiffHunk {
  std::uint64_t old_start = 0, old_lines = 0, new_start = 0, new_lines = 0;
  bool context = false;  // at least one line of it stays as it is
};

struct DiffFile {
  std::string old_path, new_path;       // empty: /dev/null
  unsigned old_mode = 0, new_mode = 0;  // octal; 0: not said
  bool created = false, deleted = false, renamed = false, copied = false;
  std::uint64_t added = 0, removed = 0;
  std::vector<DiffHunk> hunks;
  std::string link_target;  // of a link that it makes or changes
};

struct Diff {
  // Not ok: `problem` is a sentence that names the line. `malformed`: it is no
  // diff; `refused`: it is one, and it may not be applied.
  enum class Verdict { ok, malformed, refused };
  Verdict verdict = Verdict::ok;
  std::string problem;

  std::vector<DiffFile> files;
  std::set<std::string> paths;  // every path that it may change
  std::set<std::string> links;  // those of them that it says are links
  int strip = 1;                // leading components of names that are no path
  // Where every name says that nothing is stripped only by being there twice
  // ("src/a.c" and "src/a.c"): what may be stripped instead. -1: nothing.
  int other_strip = -1;
  std::uint64_t added = 0, removed = 0;
};
// `strip`: what is stripped from names; -1: as they say.
Diff read_diff(std::string_view text, int strip = -1);

// What a patch takes away, read from git's own diff that undoes it (with -M and
// the prefixes a/ and b/): what that adds, the patch removed. Only lines that
// begin with `def`, `async def` or `class` are kept, and of JavaScript those
// that have a quote in them.
struct TakenAway {
  struct Line {
    std::uint64_t number = 0;  // before the patch
    std::string text;          // with its indentation
  };
  std::set<std::string> files;  // deleted or renamed: the path from before
  // By path from before, in the order of the lines; at most kTakenLinesMax
  // each: what is left out excuses nothing.
  std::map<std::string, std::vector<Line>> gone;
  std::map<std::string, std::vector<Line>> come;  // the same; `number` after
};
constexpr std::size_t kTakenLinesMax = 5000;
TakenAway read_taken_away(std::string_view undo);
// Whether tests of such a file are calls with the name in quotes.
bool names_tests_in_quotes(std::string_view path);
// Whether such a line defines `name`: "def name(", "class name:", ...
bool defines(std::string_view line, std::string_view word,
             std::string_view name);

// Empty, or why this path may not be patched.
std::string path_problem(std::string_view path);
// Empty, or why a link at `path` may not point to `target`.
std::string link_problem(std::string_view path, std::string_view target);
// Whether git, on any file system, could take this component for `.git`.
bool is_dot_git(std::string_view component);

}  // namespace machina::kinds
