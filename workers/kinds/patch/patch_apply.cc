// From a diff to a commit: git's own apply on the base's index, in a sandbox
// that sees the mirror read-only and runs nothing of the project. No file is
// checked out for it, so no attribute, filter or line ending of the repository
// has a say; what git made is then compared with what the diff said.

#include <algorithm>
#include <charconv>

#include "queue/base/utf8.h"
#include "workers/kinds/patch/patch.h"

namespace machina::kinds {
namespace {

constexpr std::size_t kFactsBytesMax = 16u << 20;
constexpr std::size_t kArtifactMax = 60u << 20;
constexpr std::size_t kLinksMax = 64;

// $1 base, $2 branch, $3 components to strip; the message on standard input.
// Exit 10: does not apply (git's words on standard error); 11: is there
// already; 12: changes nothing; 13: the base cannot be read.
constexpr char kApplyScript[] = R"sh(
mkdir -p /work/before /work/after
alive git read-tree "$1" || exit 13
cp /work/index /work/index0
apply() { alive git apply --cached --whitespace=nowarn "-p$strip" "$@"; }
strip=$3
if ! apply /work/patch.diff; then
  ! apply --check --reverse /work/patch.diff 2>/dev/null || exit 11
  exit 10
fi
tree=$(git write-tree)
base=$(git rev-parse "$1^{tree}")
[ "$tree" != "$base" ] || exit 12
commit=$(git commit-tree "$tree" -p "$1")
changed() { git diff-tree -r -z --no-renames "$@"; }
changed --raw --numstat --no-textconv --no-ext-diff "$1" "$commit" \
  >/work/out/facts
changed --name-only --diff-filter=MDT "$1" "$commit" >/work/out/old
changed --name-only --diff-filter=MAT "$1" "$commit" >/work/out/new
hashes() {
  [ -s "$1" ] || return 0
  GIT_INDEX_FILE=$2 git checkout-index -q -z --stdin --prefix="$3/" <"$1"
  cd "$3"
  printf '%s\0' "$4" >>/work/out/facts
  xargs -0 sha256sum -z -- <"$1" >>/work/out/facts
}
hashes /work/out/old /work/index0 /work/before before
hashes /work/out/new /work/index /work/after after
git diff-tree -p -r -M --binary --full-index --no-textconv --no-ext-diff \
  --src-prefix=a/ --dst-prefix=b/ "$commit" "$1" >/work/out/reverse.diff
git update-ref "refs/heads/$2" "$commit"
git bundle create -q /work/out/patch.bundle "refs/heads/$2" "^$1"
echo "$commit"
)sh";

Applied ended(Applied out, Applied::How how, std::string reason) {
  out.how = how;
  out.reason = std::move(reason);
  return out;
}

Applied broken(Applied out, EndCode code, const std::string& message) {
  const Usage usage = out.end.usage;
  out.how = Applied::How::failed;
  out.end = failed(code, message);
  out.end.usage = usage;
  return out;
}

std::string_view take_until(std::string_view& text, char end) {
  const std::size_t at = text.find(end);
  const std::string_view part = text.substr(0, at);
  text.remove_prefix(at == std::string_view::npos ? text.size() : at + 1);
  return part;
}

unsigned octal(std::string_view text) {
  unsigned value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, 8);
  return value;
}

std::int64_t count(std::string_view text) {
  std::int64_t value = -1;  // "-": not text
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

// What the script wrote of the commit: raw entries, then numbers, then hashes.
bool read_facts(std::string_view text, std::vector<ChangedFile>& files) {
  std::map<std::string, std::size_t, std::less<>> at;
  const auto file = [&](std::string_view path) -> ChangedFile* {
    const auto found = at.find(path);
    return found == at.end() ? nullptr : &files[found->second];
  };
  bool before = false, after = false;
  while (!text.empty()) {
    std::string_view item = take_until(text, '\0');
    if (item.starts_with(':') && !before && !after) {
      ChangedFile one;
      item.remove_prefix(1);
      one.old_mode = octal(take_until(item, ' '));
      one.new_mode = octal(take_until(item, ' '));
      one.path = std::string(take_until(text, '\0'));
      if (one.path.empty()) return false;
      at.emplace(one.path, files.size());
      files.push_back(std::move(one));
    } else if (item == "before") {
      before = true;
      after = false;
    } else if (item == "after") {
      after = true;
      before = false;
    } else if (before || after) {
      if (item.size() < 67) return false;
      ChangedFile* one = file(item.substr(66));
      if (one == nullptr) return false;
      (before ? one->sha256_before : one->sha256_after) =
          std::string(item.substr(0, 64));
    } else {
      const std::int64_t added = count(take_until(item, '\t'));
      const std::int64_t removed = count(take_until(item, '\t'));
      ChangedFile* one = file(item);
      if (one == nullptr) return false;
      one->added = added;
      one->removed = removed;
    }
  }
  return true;
}

// Empty, or what git made that the diff did not say. An error: it cannot be
// told.
Result<std::string> difference(const Diff& diff,
                               const std::vector<ChangedFile>& files,
                               sandbox::Session& session) {
  std::size_t links = 0;
  for (const ChangedFile& file : files) {
    const std::string name = "path \"" + file.path + "\" ";
    if (diff.paths.count(file.path) == 0) {
      return name + "would change, and the diff does not name it so";
    }
    if (const std::string why = path_problem(file.path); !why.empty()) {
      return name + why;
    }
    if (file.old_mode == 0160000 || file.new_mode == 0160000) {
      return name + "is a submodule: submodules are not patched";
    }
    // A few lines of a file that git does not take for text: what takes them
    // back would be no text either.
    const bool edited = std::any_of(
        diff.files.begin(), diff.files.end(), [&](const DiffFile& one) {
          return !one.hunks.empty() &&
                 (one.old_path == file.path || one.new_path == file.path);
        });
    if (file.added < 0 && edited) {
      return name +
             "is binary to git (it holds a NUL byte): only text can be "
             "reviewed "
             "and applied";
    }
    const bool known = file.new_mode == 0 || file.new_mode == 0100644 ||
                       file.new_mode == 0100755 || file.new_mode == 0120000;
    if (!known) return name + "would have a mode that is not allowed";
    if (file.new_mode != 0120000) continue;
    if (++links > kLinksMax) {
      return "more than " + std::to_string(kLinksMax) + " symbolic links";
    }
    const auto target =
        session.collect("after/" + file.path, kDiffPathBytesMax + 1);
    if (!target && target.error().code != Code::too_large) {
      return target.error();
    }
    const std::string why =
        target ? link_problem(file.path, *target) : "has too long a target";
    if (!why.empty()) {
      return "symbolic link \"" + file.path + "\" " + why;
    }
  }
  return std::string();
}

// Of a file: what git says, in words that name no index.
std::string conflict_reason(std::string_view words) {
  if (words == "already exists in index" ||
      words == "already exists in working directory") {
    return "the diff makes it, and it is there already";
  }
  if (words == "does not exist in index" ||
      words == "No such file or directory") {
    return "it is not there";
  }
  if (words == "wrong type") {
    return "it is there with another type than the diff says (a file, a "
           "program or a symbolic link)";
  }
  if (words == "patch does not apply") {
    return "what is there is not what the diff expects";
  }
  return std::string(utf8_head(words, 300));
}

// The path between quotes that a line begins with, where the diff has it.
std::string quoted_path(std::string_view line, const Diff& diff) {
  const std::size_t open = line.find('\'');
  const std::size_t close = line.rfind('\'');
  if (open == close) return "";
  const std::string path(line.substr(open + 1, close - open - 1));
  return diff.paths.count(path) > 0 ? path : "";
}

// git's words on standard error, as conflicts.
std::vector<Conflict> conflicts_in(std::string_view err, const Diff& diff) {
  std::vector<Conflict> out;
  const auto hunk_at = [&](const std::string& path, std::uint64_t line,
                           bool* context) {
    for (const DiffFile& file : diff.files) {
      if (file.old_path != path && file.new_path != path) continue;
      for (std::size_t i = 0; i < file.hunks.size(); ++i) {
        const DiffHunk& hunk = file.hunks[i];
        if (hunk.old_start == line ||
            (hunk.old_lines == 0 && hunk.old_start + 1 == line)) {
          *context = hunk.context;
          return static_cast<int>(i) + 1;
        }
      }
    }
    return 0;
  };
  const auto told = [&](const std::string& path) {
    return std::any_of(out.begin(), out.end(),
                       [&](const Conflict& one) { return one.path == path; });
  };
  while (!err.empty() && out.size() < kDiffFilesMax) {
    std::string_view line = take_until(err, '\n');
    if (!line.starts_with("error: ")) continue;
    line.remove_prefix(7);
    Conflict one;
    if (line.starts_with("patch failed: ")) {
      line.remove_prefix(14);
      const std::size_t colon = line.rfind(':');
      if (colon == std::string_view::npos) continue;
      one.path = std::string(line.substr(0, colon));
      const std::int64_t number = count(line.substr(colon + 1));
      bool context = true;
      one.hunk =
          hunk_at(one.path, static_cast<std::uint64_t>(number), &context);
      one.reason = "the lines around line " + std::to_string(number) +
                   " are not those that the hunk expects";
      if (!context) {
        one.reason +=
            "; the hunk has no line of context, and without one its place is "
            "not sure: make the diff with context (git's default is 3 lines, "
            "not -U0)";
      }
    } else if (line.starts_with("new mode (") &&
               line.find(" does not match old mode (") !=
                   std::string_view::npos) {
      // "new mode (120000) of PATH does not match old mode (100644)"
      const std::size_t from = line.find(") of ") + 5;
      one.path = std::string(
          line.substr(from, line.find(" does not match old mode (") - from));
      one.reason =
          "the diff turns a file into a symbolic link, or the reverse, in one "
          "piece: git takes that as a removal and a new file, as its own diff "
          "writes it";
    } else if (line.starts_with("unable to add cache entry for ")) {
      one.path = std::string(line.substr(30));
      if (told(one.path)) continue;
      one.reason = "a file and a directory have the same name";
    } else if (line.ends_with(" appears as both a file and as a directory")) {
      one.path = quoted_path(line, diff);
      one.reason =
          "a file of the repository has the name of its directory, or a "
          "directory its name";
    } else {
      for (const std::string& path : diff.paths) {
        if (line.starts_with(path + ": ")) {
          one.path = path;
          line.remove_prefix(path.size() + 2);
          break;
        }
      }
      // Said of the file after "patch failed", or alone.
      if (line == "patch does not apply" && told(one.path)) continue;
      if (one.path.empty()) one.path = quoted_path(line, diff);
      one.reason = conflict_reason(line);
    }
    out.push_back(std::move(one));
  }
  return out;
}

// What git refuses though our own reading let it pass.
bool refused_by_git(std::string_view err) {
  return err.find("beyond a symbolic link") != std::string_view::npos ||
         err.find("invalid path") != std::string_view::npos ||
         err.find("corrupt patch") != std::string_view::npos ||
         err.find("patch with only garbage") != std::string_view::npos ||
         err.find("No valid patches in input") != std::string_view::npos ||
         err.find("git diff header") != std::string_view::npos ||
         err.find("inconsistent ") != std::string_view::npos;
}

// Why, in words that say what to look at.
std::string refusal(std::string_view err, const Diff& diff) {
  std::string_view line = err.substr(0, err.find('\n'));
  for (std::string_view rest = err; !rest.empty();) {
    const std::string_view one = take_until(rest, '\n');
    if (one.starts_with("error: ") && refused_by_git(one)) {
      line = one;
      break;
    }
  }
  if (line.starts_with("error: ")) line.remove_prefix(7);
  const std::string path = quoted_path(line, diff);
  if (line.find("beyond a symbolic link") != std::string_view::npos &&
      !path.empty()) {
    return "path \"" + path + "\" lies below a symbolic link of the repository";
  }
  return "git does not take the diff: " + std::string(utf8_head(line, 400));
}

std::string last_word(std::string_view out) {
  while (out.ends_with('\n')) out.remove_suffix(1);
  const std::size_t begin = out.rfind('\n');
  return std::string(begin == std::string_view::npos ? out
                                                     : out.substr(begin + 1));
}

}  // namespace

std::string pack_of(const std::string& bundle) {
  const std::size_t at = bundle.find("\n\n");
  if (at == std::string::npos || !bundle.starts_with("# v2 git bundle\n")) {
    return "";
  }
  return bundle.substr(at + 2);
}

Applied apply_diff(const std::string& text, const Diff& diff,
                   const CommitWords& words, const Checkout& base,
                   const Attempt& attempt, Host& host, Millis left_ms) {
  Applied out;
  sandbox::SessionSpec spec;
  spec.limits = attempt.limits;
  spec.min_level = attempt.required;
  spec.mirror = base.mirror;
  auto session = host.open(spec);
  if (!session) return broken(out, EndCode::sandbox, session.error().what);
  if (auto put = (*session)->put("patch.diff", text); !put) {
    return broken(out, code_of_put(put.error()), "apply: " + put.error().what);
  }
  sandbox::Step step;
  step.argv = {"/bin/sh",
               "-c",
               std::string(kAlive) + kBorrowingGit + kApplyScript,
               "apply",
               base.commit,
               words.branch,
               std::to_string(diff.strip)};
  const std::string date = "@" + std::to_string(words.seconds) + " +0000";
  step.env = {"GIT_AUTHOR_NAME=" + words.author_name,
              "GIT_AUTHOR_EMAIL=" + words.author_email,
              "GIT_AUTHOR_DATE=" + date,
              "GIT_COMMITTER_NAME=Machina",
              "GIT_COMMITTER_EMAIL=machina@localhost",
              "GIT_COMMITTER_DATE=" + date};
  step.stdin_data = words.message;
  step.timeout_ms = left_ms;
  sandbox::Watch watch = host.watch();
  watch.on_output = nullptr;  // git's own words are not the job's output
  const sandbox::StepResult ran = (*session)->run(step, watch);
  out.end.usage.add(ran);
  if (const EndCode code = code_of(ran.ended); code != EndCode::none) {
    return broken(out, code,
                  "apply: " + describe(ran, attempt.limits, left_ms));
  }
  switch (ran.exit_code) {
    case 0:
      break;
    case 10:
      if (refused_by_git(ran.err)) {
        return ended(std::move(out), Applied::How::refused,
                     refusal(ran.err, diff));
      }
      out.conflicts = conflicts_in(ran.err, diff);
      return ended(std::move(out), Applied::How::conflict,
                   "the diff does not apply to " + base.commit +
                       " (see conflicts): make it again on that commit, or "
                       "name another as base_rev");
    case 11:
      return ended(std::move(out), Applied::How::unchanged,
                   "what the diff changes is there already");
    case 12:
      return ended(std::move(out), Applied::How::unchanged,
                   "the diff changes nothing");
    case 13:
      return broken(out, EndCode::invalid_payload,
                    "repo: the tree of " + base.commit +
                        " cannot be read; git says: " +
                        git_said(ran.err, "the repository"));
    default:
      return broken(out, code_of_git(ran),
                    "apply: git exited with " + std::to_string(ran.exit_code) +
                        ": " + git_said(ran.err, "the repository"));
  }
  const auto facts = (*session)->collect("out/facts", kFactsBytesMax);
  if (!facts || !read_facts(*facts, out.files) || out.files.empty()) {
    return broken(out, EndCode::sandbox,
                  "apply: what git made of the diff cannot be read");
  }
  const auto why = difference(diff, out.files, **session);
  if (!why) return broken(out, EndCode::sandbox, "apply: " + why.error().what);
  if (!why->empty()) {
    out.files.clear();
    return ended(std::move(out), Applied::How::refused, *why);
  }
  auto reverse = (*session)->collect("out/reverse.diff", kArtifactMax);
  auto bundle = (*session)->collect("out/patch.bundle", kArtifactMax);
  if (!reverse || !bundle) {
    const Error& error = reverse ? bundle.error() : reverse.error();
    if (error.code == Code::too_large) {
      out.files.clear();
      return ended(std::move(out), Applied::How::refused,
                   "the files it changes are too large: " + error.what);
    }
    return broken(out, EndCode::sandbox, "apply: " + error.what);
  }
  out.commit = last_word(ran.out);
  out.reverse_diff = std::move(*reverse);
  out.bundle = std::move(*bundle);
  if (pack_of(out.bundle).empty()) {
    return broken(out, EndCode::sandbox, "apply: git made no bundle");
  }
  out.how = Applied::How::committed;
  return out;
}

}  // namespace machina::kinds
