#include "workers/kinds/patch/patch_rollback.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <map>
#include <set>
#include <thread>

#include "queue/base/hex.h"
#include "queue/base/ids.h"
#include "queue/base/json.h"
#include "queue/base/utf8.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/patch/patch.h"

namespace machina::kinds {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kFactsBytesMax = 16u << 20;
constexpr std::size_t kBundleMax = 60u << 20;
constexpr std::size_t kReverseDiffMax = 16u << 20;
constexpr std::size_t kListedMax = 1000;          // paths named in a result
constexpr std::size_t kMergesMax = 200;           // files merged three-way
constexpr std::size_t kShownDiffMax = 24u << 10;  // of a block's data
constexpr std::size_t kShownConflictsMax = 100;   // the same
constexpr char kAlready[] = "already_rolled_back";
constexpr std::string_view kThePatch = "the patch";  // of a gate's reason
constexpr int kLooksMax = 8;  // at a branch that keeps moving
constexpr std::int64_t kLineMax = 100'000'000;
constexpr char kNoTime[] =
    " (no more of the job's time was left for them: submit it with a longer "
    "timeout_ms, or with \"test\": null to run none)";
constexpr char kNothing[] = "0000000000000000000000000000000000000000";

// Ours alone, as for patch.apply. $1 tip, $2 the patch's commit, $3 the last
// rollback's commit or "-", $4 this job. Exit 11: the commit is gone and no
// reverse diff is there; 12: that does not apply; 13: the tip cannot be read.
constexpr char kLookScript[] = R"sh(
mkdir -p /work/now
[ ! -f /work/patch.pack ] || git unpack-objects -q --strict </work/patch.pack
alive git read-tree "$1" || exit 13
there() { alive git cat-file -e "$1" 2>/dev/null; }
if [ -n "$2" ] && there "$2^{tree}" && there "$2^1^{tree}"; then
  post=$(git rev-parse "$2^{tree}") pre=$(git rev-parse "$2^1^{tree}")
elif [ -f /work/reverse.diff ]; then
  cp /work/index /work/index1
  alive env GIT_INDEX_FILE=/work/index1 git apply --cached \
    --whitespace=nowarn /work/reverse.diff || exit 12
  post=$(git rev-parse "$1^{tree}")
  pre=$(GIT_INDEX_FILE=/work/index1 git write-tree)
else
  exit 11
fi
raw() { git --literal-pathspecs diff-tree -r -z --no-renames --raw "$@"; }
git diff-tree -r -z --no-renames --name-only "$post" "$pre" >/work/out/names
{
  printf 'patch\0'; raw "$post" "$pre"
  printf 'tip\0'
  xargs -0 git --literal-pathspecs diff-tree -r -z --no-renames --raw \
    "$post" "$1" -- </work/out/names
  if [ "$3" != - ] && there "$3^{tree}"; then
    printf 'ours\0'
    xargs -0 git --literal-pathspecs diff-tree -r -z --no-renames --raw \
      "$post" "$3" -- </work/out/names
  fi
} >/work/out/facts
xargs -0 git --literal-pathspecs ls-tree -r -z --full-tree --name-only "$1" -- \
  </work/out/names >/work/out/there
if [ -s /work/out/there ]; then
  git checkout-index -q -z --stdin --prefix=/work/now/ </work/out/there
  printf 'hash\0' >>/work/out/facts
  (cd /work/now && xargs -0 sha256sum -z -- </work/out/there) >>/work/out/facts
fi
echo "$post $pre"
git log -1 --format=%B "$1" >/work/message
if grep -qxF "Machina-Rollback: $4" /work/message; then echo mine; fi
)sh";

constexpr char kGit[] = R"sh(
umask 022
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null LC_ALL=C
export GIT_DIR=/work/git GIT_WORK_TREE=/work/tree GIT_INDEX_FILE=/work/index
)sh";

// $1 post, $2 pre, $3 path.
constexpr char kHunksScript[] = R"sh(
git --literal-pathspecs diff-tree -r -p -U0 --no-renames --full-index \
  --no-textconv --no-ext-diff --src-prefix=a/ --dst-prefix=b/ "$1" "$2" \
  -- "$3" >/work/out/region.diff
)sh";

// $1 post, $2 path, $3 its blob at the tip, $4 its blob in post. Prints the
// blob with the region taken back. Exit 12: changed in the same lines since.
constexpr char kRegionScript[] = R"sh(
export GIT_INDEX_FILE=/work/index2
git read-tree "$1"
alive git apply --cached --unidiff-zero --whitespace=nowarn \
  /work/region.diff || exit 12
back=$(git rev-parse ":0:$2")
if [ "$3" != "$4" ]; then
  git cat-file blob "$3" >/work/tip
  git cat-file blob "$4" >/work/post
  git cat-file blob "$back" >/work/back
  alive git merge-file -q -p /work/tip /work/post /work/back >/work/merged || exit 12
  back=$(git hash-object -w --no-filters /work/merged)
fi
echo "$back"
)sh";

// $1 tip, $2 branch, $3 what the bundle leaves out; the message on standard
// input. Exit 12: a path is in the way; 14: nothing changes.
constexpr char kCommitScript[] = R"sh(
alive git update-index -z --index-info </work/entries || exit 12
tree=$(git write-tree)
old=$(git rev-parse "$1^{tree}")
[ "$tree" != "$old" ] || exit 14
commit=$(git commit-tree "$tree" -p "$1")
git diff-tree -r -z --no-renames --name-only "$1" "$commit" >/work/out/changed
xargs -0 git --literal-pathspecs ls-tree -r -z --full-tree --name-only \
  "$commit" -- </work/out/changed >/work/out/left
: >/work/out/hashes
if [ -s /work/out/left ]; then
  mkdir -p /work/then
  git checkout-index -q -z --stdin --prefix=/work/then/ </work/out/left
  (cd /work/then && xargs -0 sha256sum -z -- </work/out/left) \
    >/work/out/hashes
fi
git diff-tree -p -r -M --full-index --no-textconv --no-ext-diff \
  --src-prefix=a/ --dst-prefix=b/ "$commit" "$1" >/work/out/undo.diff
git update-ref "refs/heads/$2" "$commit"
git bundle create -q /work/out/rollback.bundle "refs/heads/$2" "^$3"
echo "$commit"
echo "$tree"
)sh";

// Lines "tip post pre" of blobs in /work/merges; for each the blob of the tip
// with what lies between post and pre taken back, or "-" where both changed the
// same lines.
constexpr char kMergeScript[] = R"sh(
while read -r tip post pre; do
  git cat-file blob "$tip" >/work/tip
  git cat-file blob "$post" >/work/post
  git cat-file blob "$pre" >/work/pre
  if alive git merge-file -q -p /work/tip /work/post /work/pre >/work/merged \
    2>/dev/null; then
    git hash-object -w --no-filters /work/merged
  else
    echo -
  fi
done </work/merges
)sh";

// $1 tip. What /work/entries would change of it, as a diff for a person.
constexpr char kShowScript[] = R"sh(
export GIT_INDEX_FILE=/work/index3
git read-tree "$1"
alive git update-index -z --index-info </work/entries || exit 12
git diff-index --cached -p --no-renames --no-textconv --no-ext-diff \
  --src-prefix=a/ --dst-prefix=b/ "$1" >/work/out/shown.diff
)sh";

std::string_view take_until(std::string_view& text, char end) {
  const std::size_t at = text.find(end);
  const std::string_view part = text.substr(0, at);
  text.remove_prefix(at == std::string_view::npos ? text.size() : at + 1);
  return part;
}

// Mode and blob of a path in a tree; mode 000000: not there.
struct Entry {
  std::string mode = "000000", blob = kNothing;
  bool operator==(const Entry&) const = default;
  bool there() const { return mode != "000000"; }
};

struct FileState {
  Entry post, pre, tip, ours;
  bool has_ours = false;
  std::string hash;  // of its bytes at the tip; empty: not there
};

using Files = std::map<std::string, FileState, std::less<>>;

// ":mode mode blob blob status NUL path NUL"; false: something else.
bool read_change(std::string_view item, std::string_view& rest, Entry* from,
                 Entry* to, std::string* path) {
  if (!item.starts_with(':')) return false;
  item.remove_prefix(1);
  from->mode = std::string(take_until(item, ' '));
  to->mode = std::string(take_until(item, ' '));
  from->blob = std::string(take_until(item, ' '));
  to->blob = std::string(take_until(item, ' '));
  *path = std::string(take_until(rest, '\0'));
  return !path->empty();
}

bool read_facts(std::string_view text, Files& files) {
  std::string section;
  while (!text.empty()) {
    const std::string_view item = take_until(text, '\0');
    if (item == "patch" || item == "tip" || item == "ours" || item == "hash") {
      section = std::string(item);
      for (auto& [_, file] : files) {
        if (section == "tip") file.tip = file.post;
        if (section == "ours") file.ours = file.post, file.has_ours = true;
      }
      continue;
    }
    if (section == "hash") {
      if (item.size() < 67) return false;
      auto found = files.find(item.substr(66));
      if (found != files.end()) found->second.hash = item.substr(0, 64);
      continue;
    }
    Entry from, to;
    std::string path;
    if (!read_change(item, text, &from, &to, &path)) return false;
    if (section == "patch") {
      files[path].post = from;
      files[path].pre = to;
      continue;
    }
    auto found = files.find(path);
    if (found == files.end()) continue;  // below a path that is now a directory
    (section == "tip" ? found->second.tip : found->second.ours) = to;
  }
  return true;
}

std::string last_line(std::string_view out, std::size_t index) {
  while (index-- > 0) take_until(out, '\n');
  return std::string(take_until(out, '\n'));
}

// What the server knows of the patch.
struct Known {
  std::string outcome, repo, branch, commit, description, rolled_back_by;
  std::string suite;  // of the patch's tests, raw JSON, or empty
  std::string base_commit;
  bool pushed = false;
  struct Hashes {
    std::string before, after;
  };
  std::map<std::string, Hashes, std::less<>> files;
  std::string last_rollback;  // its commit
};

Known read_known(const std::string& text) {
  Known out;
  const auto word = [](const JsonValue& value) {
    return json::string(value).value_or("");
  };
  json::members(text, [&](auto key, auto value) {
    if (key == "outcome") out.outcome = word(value);
    if (key == "repo") out.repo = word(value);
    if (key == "branch") out.branch = word(value);
    if (key == "commit") out.commit = word(value);
    if (key == "base_commit") out.base_commit = word(value);
    if (key == "description") out.description = word(value);
    if (key == "rolled_back_by") out.rolled_back_by = word(value);
    if (key == "pushed") out.pushed = json::boolean(value).value_or(false);
    if (key == "test" && value.is_object()) out.suite = value.raw();
    if (key == "files") {
      json::elements(value, [&](auto file) {
        std::string path;
        Known::Hashes hashes;
        json::members(file, [&](auto name, auto part) {
          if (name == "path") path = word(part);
          if (name == "sha256_before") hashes.before = word(part);
          if (name == "sha256_after") hashes.after = word(part);
          return true;
        });
        out.files[path] = hashes;
        return true;
      });
    }
    if (key == "rollbacks") {
      json::elements(value, [&](auto rollback) {
        std::string outcome, commit;
        json::members(rollback, [&](auto name, auto part) {
          if (name == "outcome") outcome = word(part);
          if (name == "commit") commit = word(part);
          return true;
        });
        // Newest first.
        if (outcome == "rolled_back" && out.last_rollback.empty()) {
          out.last_rollback = commit;
        }
        return true;
      });
    }
    return true;
  });
  return out;
}

// The commit that a bundle of one branch builds on.
std::string base_of(const std::string& bundle) {
  const std::size_t at = bundle.find("\n-");
  const std::size_t end = bundle.find("\n\n");
  if (at == std::string::npos || end == std::string::npos || at > end) {
    return "";
  }
  std::string name = bundle.substr(at + 2, 64);
  name.resize(std::min(name.size(), name.find_first_not_of(kHexDigits)));
  return is_commit_name(name) ? name : "";
}

class RollbackRun {
 public:
  RollbackRun(RollbackPayload payload, const Attempt& attempt, Host& host)
      : payload_(std::move(payload)),
        attempt_(attempt),
        host_(host),
        deadline_(Clock::now() +
                  std::chrono::milliseconds(attempt.timeout_ms)) {}

  End run() {
    if (auto end = learn()) return finish(std::move(*end));
    for (int round = 1;; ++round) {
      if (auto end = prepare()) return finish(std::move(*end));
      if (auto end = look()) return finish(std::move(*end));
      if (auto end = choose()) return finish(std::move(*end));
      if (auto end = commit()) return finish(std::move(*end));
      if (auto end = test()) return finish(std::move(*end));
      End end = publish();
      // Somebody was faster: another rollback of this patch, or a push. What
      // the branch is now decides anew.
      if (!moved_ || round == kLooksMax || host_.cancelled()) {
        return finish(std::move(end));
      }
      look_again();
    }
  }

 private:
  using MaybeEnd = std::optional<End>;

  Millis left() const {
    return std::max<Millis>(
        1, std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ -
                                                                 Clock::now())
               .count());
  }

  // --- the record ---

  MaybeEnd learn() {
    host_.progress(0, "looking up the patch");
    auto record = host_.fetch_patch(payload_.patch_id, false);
    if (!record && record.error().code == Code::not_found) {
      return failed(EndCode::invalid_payload,
                    "patch_id: patch " + payload_.patch_id +
                        " is not known: a patch is known when its patch.apply "
                        "job has ended (machina patches list)");
    }
    if (!record) {
      const bool gone = record.error().code == Code::unavailable;
      return failed(gone ? EndCode::cancelled : EndCode::upstream,
                    record.error().what);
    }
    known_ = read_known(*record);
    if (known_.outcome != "applied" || !is_commit_name(known_.commit) ||
        !branch_problem(known_.branch).empty()) {
      return outcome("rejected", "patch_id: patch " + payload_.patch_id +
                                     " was not applied (its outcome is " +
                                     known_.outcome +
                                     "): there is nothing to take back");
    }
    if (auto end = choose_suite()) return end;
    read_answer();
    if (!known_.pushed && !known_.rolled_back_by.empty()) {
      return outcome(kAlready,
                     "job " + known_.rolled_back_by + " took it back");
    }
    return std::nullopt;
  }

  MaybeEnd choose_suite() {
    if (payload_.test) suite_ = payload_.test;
    if (!payload_.own_test || known_.suite.empty()) return std::nullopt;
    Fields fields(known_.suite);
    read_suite(fields, suite_.emplace());
    const auto good = fields.done();
    if (good) return std::nullopt;
    return failed(EndCode::invalid_payload,
                  "test: the suite that patch " + payload_.patch_id +
                      " came with cannot be used (" + good.error().text() +
                      "): give one in `test`, or null to run none");
  }

  // What somebody said when the job was blocked.
  void read_answer() {
    json::members(attempt_.input, [&](auto key, auto value) {
      if (key == "approve") denied_ = !json::boolean(value).value_or(true);
      if (key == "digest") approved_ = json::string(value).value_or("");
      return true;
    });
  }

  // --- the repository, and the tip ---

  MaybeEnd prepare() {
    host_.progress(10, "preparing the repository");
    std::string rev = "refs/heads/" + known_.branch;
    if (!known_.pushed) {
      auto bundle =
          host_.fetch_artifact(payload_.patch_id, kBundleName, kBundleMax);
      if (!bundle && bundle.error().code == Code::unavailable) {
        return failed(EndCode::cancelled, bundle.error().what);
      }
      if (!bundle || pack_of(*bundle).empty() || base_of(*bundle).empty()) {
        return outcome("rejected",
                       "the patch was never pushed and its bundle is gone "
                       "with its job: there is nothing to take back");
      }
      pack_ = pack_of(*bundle);
      rev = base_of(*bundle);
    }
    Prepared prepared = prepare_repo(known_.repo, rev, attempt_, host_, left());
    usage_.add(prepared.end.usage);
    if (!prepared.good) {
      if (prepared.end.code != EndCode::invalid_payload) {
        return std::move(prepared.end);
      }
      // The patch was made of this repository once.
      const bool no_rev = prepared.end.message.starts_with("base_rev:");
      return outcome(
          "conflict",
          !no_rev ? prepared.end.message
          : known_.pushed
              ? "branch " + known_.branch + " is not there any more"
              : "the base of the patch, " + rev + ", is not there any more");
    }
    base_ = prepared.checkout;
    tip_ = known_.pushed ? base_.commit : known_.commit;
    return std::nullopt;
  }

  // --- what the files are now ---

  MaybeEnd look() {
    host_.progress(40, "comparing the files");
    sandbox::SessionSpec spec;
    spec.limits = attempt_.limits;
    spec.min_level = attempt_.required;
    spec.mirror = base_.mirror;
    auto session = host_.open(spec);
    if (!session) return failed(EndCode::sandbox, session.error().what);
    session_ = std::move(*session);
    if (!pack_.empty()) {
      if (auto end = put("patch.pack", pack_)) return end;
    }
    const std::string ours =
        is_commit_name(known_.last_rollback) ? known_.last_rollback : "-";
    sandbox::Step step;
    const std::string script =
        std::string(kAlive) + kBorrowingGit + kLookScript;
    step.argv = {"/bin/sh", "-c",          script, "look",
                 tip_,      known_.commit, ours,   attempt_.job_id};
    sandbox::StepResult ran;
    if (auto end = run_step(step, &ran)) return end;
    if (ran.exit_code == 11) {
      // The branch was rewritten: the commit is not in it any more.
      auto diff = host_.fetch_patch(payload_.patch_id, true);
      if (!diff && diff.error().code == Code::unavailable) {
        return failed(EndCode::cancelled, diff.error().what);
      }
      if (!diff || diff->size() > kReverseDiffMax) {
        return outcome("conflict", "commit " + known_.commit +
                                       " is not in the repository any more, "
                                       "and no reverse diff was kept");
      }
      rewritten_ = true;
      if (auto end = put("reverse.diff", *diff)) return end;
      step.argv[2] = "rm -rf /work/git; " + script;
      if (auto end = run_step(step, &ran)) return end;
      if (ran.exit_code == 12) {
        return outcome("conflict",
                       "commit " + known_.commit +
                           " is not in the repository any more, and what "
                           "takes the patch back does not apply to " +
                           tip_);
      }
    }
    if (ran.exit_code != 0) return git_trouble("look", ran);
    const auto facts = session_->collect("out/facts", kFactsBytesMax);
    if (!facts || !read_facts(*facts, files_) || files_.empty()) {
      return failed(EndCode::sandbox, "look: git's answer cannot be read");
    }
    const std::string trees = last_line(ran.out, 0);
    post_ = trees.substr(0, trees.find(' '));
    pre_ = trees.substr(std::min(trees.find(' ') + 1, trees.size()));
    landed_before_ = last_line(ran.out, 1) == "mine";
    return std::nullopt;
  }

  // --- what is to be restored ---

  enum class Now { before, after, ours, changed };
  Now now(const std::string& path, const FileState& file) const {
    if (file.tip == file.pre) return Now::before;
    const auto known = known_.files.find(path);
    const bool recorded = known != known_.files.end();
    if (file.tip == file.post) {
      // What the server wrote down, and what git holds, agree.
      const bool same = !recorded || known->second.after == file.hash;
      return same && (recorded || !rewritten_) ? Now::after : Now::changed;
    }
    return file.has_ours && file.tip == file.ours ? Now::ours : Now::changed;
  }

  MaybeEnd choose() {
    // An earlier attempt landed it and died before it could say so.
    if (landed_before_) {
      commit_ = tip_;
      verified_ = true;
      for (const auto& [path, file] : files_) {
        if (payload_.path.empty() || path == payload_.path) {
          restored_.emplace_back(path, file.hash);
        }
      }
      return outcome("rolled_back", "");
    }
    bool all_before = true;
    std::vector<std::string> wanted;
    for (const auto& [path, file] : files_) {
      if (!payload_.path.empty() && path != payload_.path) continue;
      wanted.push_back(path);
      const Now state = now(path, file);
      all_before = all_before && state == Now::before;
      if (state == Now::changed) {
        conflicts_.push_back({path,
                              file.tip.there()
                                  ? "it has changed since the patch"
                                  : "it was removed since the patch",
                              0});
      }
    }
    // Whatever the branch has become meanwhile: somebody said no.
    if (denied_) {
      return outcome("conflict",
                     "the rollback was denied: nothing was touched");
    }
    if (wanted.empty()) {
      return outcome("rejected",
                     "region.path: the patch did not change \"" +
                         std::string(utf8_head(payload_.path, 200)) + "\"");
    }
    if (!conflicts_.empty()) {
      if (auto end = merge(wanted)) return end;
    }
    if (all_before) {
      return outcome(kAlready, "every file is as it was before the patch");
    }
    if (payload_.start_line > 0) return choose_lines(files_[payload_.path]);
    for (const std::string& path : wanted) {
      const FileState& file = files_[path];
      if (file.tip != file.pre && merged_.count(path) == 0) {
        restore(path, file.pre);
      }
    }
    return std::nullopt;
  }

  // --- what changed since ---

  // A file that both have, as text that can be merged with what came since.
  bool may_merge(const std::string& path) const {
    const FileState& file = files_.at(path);
    const auto regular = [](const Entry& entry) {
      return entry.mode == "100644" || entry.mode == "100755";
    };
    // Of a file that is as the patch left it, but not as the server wrote it
    // down, nobody knows what it should be.
    return payload_.start_line == 0 && file.tip != file.post &&
           regular(file.tip) && regular(file.post) && regular(file.pre);
  }

  // Merges three-way what changed since (`conflicts_`). Nothing: somebody said
  // yes to just that, and it is to be restored so.
  MaybeEnd merge(const std::vector<std::string>& wanted) {
    const std::size_t changed = conflicts_.size();
    const std::string what = std::to_string(changed) +
                             (changed == 1 ? " file has" : " files have") +
                             " changed since the patch: nothing was touched";
    std::string lines;
    std::vector<std::string> paths;
    for (const Conflict& one : conflicts_) {
      if (!may_merge(one.path) || paths.size() >= kMergesMax) continue;
      const FileState& file = files_.at(one.path);
      lines +=
          file.tip.blob + " " + file.post.blob + " " + file.pre.blob + "\n";
      paths.push_back(one.path);
    }
    if (!paths.empty()) {
      sandbox::StepResult ran;
      if (auto end = put("merges", lines)) return end;
      if (auto end = run_script("merge", kMergeScript, {}, &ran)) return end;
      if (ran.exit_code != 0) return git_trouble("merge", ran);
      std::string_view rest = ran.out;
      for (const std::string& path : paths) {
        const std::string blob(take_until(rest, '\n'));
        if (!is_commit_name(blob)) continue;
        const FileState& file = files_.at(path);
        merged_[path] = {
            file.tip.mode == file.post.mode ? file.pre.mode : file.tip.mode,
            blob};
      }
    }
    const bool all = merged_.size() == changed;
    if (!payload_.block) {
      const char* hint =
          payload_.start_line > 0 ? ""
          : all ? "; git can merge it: on_conflict \"block\" shows the merge "
                  "and waits for a yes to it"
                : "";
      merged_.clear();
      return outcome("conflict", what + hint);
    }
    std::string digest, diff;
    if (all) {
      for (const std::string& path : wanted) {
        const FileState& file = files_.at(path);
        const auto merged = merged_.find(path);
        if (merged != merged_.end()) {
          restore(path, merged->second);
        } else if (file.tip != file.pre) {
          restore(path, file.pre);
        }
      }
      digest = "sha256:" + sha256_hex(tip_ + '\n' + entries_);
      if (approved_ == digest) {
        entries_.clear();
        wanted_.clear();
        conflicts_.clear();
        for (const auto& [path, entry] : merged_) restore(path, entry);
        return std::nullopt;
      }
      sandbox::StepResult ran;
      if (auto end = put("entries", entries_)) return end;
      if (auto end = run_script("show", kShowScript, {tip_}, &ran)) return end;
      if (ran.exit_code != 0) return git_trouble("show", ran);
      auto shown = session_->collect("out/shown.diff", kFactsBytesMax);
      if (!shown) return failed(EndCode::sandbox, shown.error().what);
      diff = std::move(*shown);
    }
    End end;
    end.block_reason = "conflict";
    end.block_data = conflict_data(digest, diff);
    return end;
  }

  // What the job waits with: what changed since, and the merge where there is
  // one. Without a digest there is nothing to say yes to: somebody mends the
  // branch, and the job looks again.
  std::string conflict_data(const std::string& digest,
                            const std::string& diff) const {
    std::string out = "{\"patch_id\":" + json::quoted(payload_.patch_id) +
                      ",\"branch\":" + json::quoted(known_.branch) +
                      ",\"tip\":" + json::quoted(tip_) + ",\"digest\":" +
                      (digest.empty() ? "null" : json::quoted(digest)) +
                      ",\"conflicts\":[";
    std::size_t n = 0;
    for (const Conflict& one : conflicts_) {
      if (n == kShownConflictsMax || out.size() > kShownDiffMax) break;
      out += (n++ > 0 ? ",{\"path\":" : "{\"path\":") + json::quoted(one.path) +
             ",\"reason\":" + json::quoted(one.reason) +
             ",\"merges\":" + (merged_.count(one.path) > 0 ? "true" : "false") +
             "}";
    }
    std::string shown = diff.substr(0, kShownDiffMax);
    while (json::quoted(shown).size() > kShownDiffMax) {
      shown.resize(shown.size() / 2);
    }
    // Whole lines, and so whole characters.
    if (shown.size() < diff.size()) shown.resize(shown.rfind('\n') + 1);
    return out + "],\"conflicts_truncated\":" +
           (n < conflicts_.size() ? "true" : "false") +
           ",\"diff\":" + (digest.empty() ? "null" : json::quoted(shown)) +
           ",\"diff_truncated\":" +
           (shown.size() < diff.size() ? "true" : "false") + "}";
  }

  MaybeEnd choose_lines(const FileState& file) {
    if (!file.post.there() || !file.pre.there()) {
      return outcome("rejected",
                     "region.start_line: the patch made or removed the whole "
                     "file; name its path alone");
    }
    sandbox::Step step;
    step.argv = {"/bin/sh",    "-c",  std::string(kAlive) + kGit + kHunksScript,
                 "hunks",      post_, pre_,
                 payload_.path};
    sandbox::StepResult ran;
    if (auto end = run_step(step, &ran)) return end;
    auto diff = session_->collect("out/region.diff", kFactsBytesMax);
    if (ran.exit_code != 0 || !diff) return git_trouble("region", ran);
    const std::string hunks =
        hunks_in_region(*diff, payload_.start_line, payload_.end_line);
    if (hunks.empty()) {
      return outcome("no_change", "the patch changed none of these lines");
    }
    if (auto end = put("region.diff", hunks)) return end;
    step.argv = {"/bin/sh",
                 "-c",
                 std::string(kAlive) + kGit + kRegionScript,
                 "region",
                 post_,
                 payload_.path,
                 file.tip.blob,
                 file.post.blob};
    if (auto end = run_step(step, &ran)) return end;
    if (ran.exit_code == 12) {
      conflicts_.push_back({payload_.path, "its lines have changed since", 0});
      return outcome("conflict", "the lines have changed since the patch");
    }
    const std::string blob = last_line(ran.out, 0);
    if (ran.exit_code != 0 || !is_commit_name(blob)) {
      return git_trouble("region", ran);
    }
    if (blob == file.tip.blob) {
      return outcome(kAlready, "these lines are as they were before the patch");
    }
    restore(payload_.path, {file.tip.mode, blob});
    return std::nullopt;
  }

  void restore(const std::string& path, const Entry& entry) {
    entries_ += entry.mode + " " + entry.blob + "\t" + path;
    entries_ += '\0';
    wanted_.push_back(path);
  }

  // --- the commit ---

  MaybeEnd commit() {
    host_.progress(60, "making the commit");
    if (auto end = put("entries", entries_)) return end;
    sandbox::Step step;
    step.argv = {"/bin/sh",
                 "-c",
                 std::string(kAlive) + kGit + kCommitScript,
                 "commit",
                 tip_,
                 known_.branch,
                 known_.pushed ? tip_ : base_.commit};
    std::string date = "0";
    if (const auto id = parse_job_id(attempt_.job_id)) {
      date = std::to_string(created_ms(*id) / 1000);
    }
    date += " +0000";
    for (const char* who : {"AUTHOR", "COMMITTER"}) {
      const std::string name = std::string("GIT_") + who;
      step.env.push_back(name + "_NAME=Machina");
      step.env.push_back(name + "_EMAIL=machina@localhost");
      step.env.push_back(name + "_DATE=" + date);
    }
    std::string what =
        known_.description.substr(0, known_.description.find('\n'));
    if (what.empty()) what = "a patch";
    step.stdin_data = "Roll back \"" + what +
                      "\"\n\nMachina-Patch: " + payload_.patch_id +
                      "\nMachina-Rollback: " + attempt_.job_id + "\n";
    sandbox::StepResult ran;
    if (auto end = run_step(step, &ran)) return end;
    if (ran.exit_code == 12) {
      return outcome("conflict",
                     "a file that came since is in the way; git says: " +
                         git_said(ran.err, known_.repo));
    }
    if (ran.exit_code == 14) {
      return outcome(kAlready, "nothing would change");
    }
    commit_ = last_line(ran.out, 0);
    as_before_ = last_line(ran.out, 1) == pre_;
    if (ran.exit_code != 0 || !is_commit_name(commit_)) {
      commit_.clear();
      return git_trouble("commit", ran);
    }
    auto changed = session_->collect("out/changed", kFactsBytesMax);
    auto hashes = session_->collect("out/hashes", kFactsBytesMax);
    auto bundle = session_->collect("out/rollback.bundle", kBundleMax);
    if (!changed || !hashes || !bundle || pack_of(*bundle).empty()) {
      commit_.clear();
      return failed(EndCode::sandbox, "commit: git's answer cannot be read");
    }
    bundle_ = std::move(*bundle);
    // One that is too long excuses nothing.
    auto undo = session_->collect("out/undo.diff", kReverseDiffMax);
    taken_ = undo ? read_taken_away(*undo) : TakenAway();
    if (auto end = verify(*changed, *hashes)) {
      commit_.clear();
      return end;
    }
    return std::nullopt;
  }

  // Exactly the files that were meant, with the bytes from before the patch.
  MaybeEnd verify(std::string_view paths, std::string_view hashes) {
    std::map<std::string, std::string, std::less<>> changed;
    while (!paths.empty()) changed.emplace(take_until(paths, '\0'), "");
    while (!hashes.empty()) {
      const std::string_view item = take_until(hashes, '\0');
      if (item.size() < 67) continue;
      auto found = changed.find(item.substr(66));
      if (found != changed.end()) found->second = item.substr(0, 64);
    }
    bool good = changed.size() == wanted_.size();
    for (const std::string& path : wanted_) {
      const auto found = changed.find(path);
      const auto known = known_.files.find(path);
      good = good && found != changed.end();
      if (found == changed.end()) continue;
      restored_.emplace_back(path, found->second);
      if (payload_.start_line > 0 || merged_.count(path) > 0) continue;
      if (known == known_.files.end()) {
        good = good && !rewritten_;
      } else {
        good = good && known->second.before == found->second;
      }
    }
    verified_ = good;
    if (good) return std::nullopt;
    restored_.clear();
    return outcome("conflict",
                   "what would be restored is not what was recorded before "
                   "the patch: nothing was touched");
  }

  // --- tests ---

  MaybeEnd run_phase(TestPhase& phase, const std::string& commit,
                     const std::string& pack, const std::string& what,
                     int percent, Millis time) {
    Checkout checkout = base_;
    checkout.commit = commit;
    checkout.pack = pack;
    SuiteOptions options;
    options.timeout_ms = std::max<Millis>(1, time);
    options.retries = std::max(kRerunsMin, suite_->retries);
    options.percent = percent;
    options.what = what;
    options.again = [this, &phase](const TestOutcome& tests) {
      return &phase == &before_ ? false : newly_fails(before_, tests);
    };
    return run_test_phase(phase, *suite_, checkout, options, attempt_, host_,
                          usage_);
  }

  MaybeEnd test() {
    if (!suite_) return std::nullopt;
    if (auto end = run_phase(before_, tip_, pack_,
                             "the tests before the rollback", 65, left() / 3)) {
      return end;
    }
    const Millis rest = left() - std::min(kLandReserveMs, left() / 10);
    if (auto end = run_phase(after_, commit_, pack_of(bundle_),
                             "the tests after the rollback", 75,
                             as_before_ ? rest : rest / 2)) {
      return end;
    }
    gate_ = judge_patch(before_, after_, true, taken_);
    for (std::size_t at = 0;
         (at = gate_.reason.find(kThePatch, at)) != std::string::npos;) {
      gate_.reason.replace(at, kThePatch.size(), "the rollback");
    }
    if (gate_.accepted) return std::nullopt;
    // As with patch.apply: a run that was cut off is no verdict, and another
    // that is cut off too does not make it one.
    if (after_.out_of_time) {
      return tests_failed(no_verdict() + kNoTime);
    }
    // What the patch had mended fails again, as it should. Of the same files a
    // verdict holds for both; that there was none has to be seen.
    if ((!as_before_ || !after_.valid) && is_commit_name(known_.base_commit)) {
      if (auto end = run_phase(
              at_base_, known_.base_commit, "", "the tests before the patch",
              85, left() - std::min(kLandReserveMs, left() / 10))) {
        return end;
      }
    }
    const auto failed_once =
        at_base_.out_of_time ? std::set<CaseKey>() : failing_cases(at_base_);
    const auto take_again = [&](std::vector<CaseKey>& cases) {
      const auto again = std::stable_partition(
          cases.begin(), cases.end(), [&](const CaseKey& key) {
            return !as_before_ && failed_once.count(key) == 0;
          });
      failing_again_.insert(failing_again_.end(), again, cases.end());
      cases.erase(again, cases.end());
    };
    take_again(gate_.newly_failing);
    // Whatever would have come of these: they failed before the patch, or all
    // files are those from before.
    take_again(gate_.missing);
    const bool dead_before =
        at_base_.ran && !at_base_.valid && !at_base_.out_of_time;
    const TestOutcome& now = after_.run.tests;
    const bool whole = after_.valid && !now.broken && now.suite.complete &&
                       now.suite.dropped == 0;
    if ((whole || (as_before_ && (after_.valid || dead_before))) &&
        gate_.newly_failing.empty() && gate_.missing.empty()) {
      gate_.accepted = true;
      gate_.reason = !after_.valid
                         ? "the tests gave no verdict after the rollback, nor "
                           "before the patch: " +
                               after_.problem
                     : whole ? cases(failing_again_.size(), "fails", "fail") +
                                   " again, as before the patch"
                             : "the tests gave no whole verdict, of files that "
                               "are all those from before the patch";
      if (const std::string flaky = flaky_note(after_); !flaky.empty()) {
        gate_.reason += "; " + flaky;
      }
      return std::nullopt;
    }
    if (at_base_.out_of_time) {
      return tests_failed(
          (after_.valid ? cases(gate_.newly_failing.size(),
                                "fails (or is gone) after the rollback",
                                "fail (or are gone) after the rollback")
                        : no_verdict()) +
          "; whether that was so before the patch is not known, " +
          at_base_.problem + kNoTime);
    }
    std::string ids;
    if (ids_may_change(gate_)) {
      TestPhase listed;
      Checkout checkout = base_;
      checkout.commit = tip_;
      checkout.pack = pack_;
      if (auto end = list_again(listed, *suite_, checkout, left(), attempt_,
                                host_, usage_)) {
        return end;
      }
      ids = changing_ids(gate_, listed.ran ? &listed : nullptr);
      if (!ids.empty()) ids += "; ";
    }
    if (after_.valid && gate_.newly_failing.empty()) {
      return tests_failed(ids + gate_.reason);
    }
    return tests_failed(
        ids + (!after_.valid
                   ? no_verdict()
                   : cases(gate_.newly_failing.size(),
                           "fails (or is gone) after the rollback that fails",
                           "fail (or are gone) after the rollback that fail") +
                         " neither on the branch now nor before the patch"));
  }

  std::string no_verdict() const {
    return "the tests gave no verdict after the rollback: " + after_.problem;
  }

  MaybeEnd tests_failed(const std::string& why) {
    verified_ = false;
    commit_.clear();
    bundle_.clear();
    restored_.clear();
    return outcome("tests_failed", why + ": nothing was touched");
  }

  static std::string cases(std::size_t n, const char* one, const char* many) {
    return std::to_string(n) + (n == 1 ? " case " : " cases ") +
           (n == 1 ? one : many);
  }

  // --- landing ---

  void look_again() {
    before_ = after_ = at_base_ = TestPhase();
    gate_ = Gate();
    failing_again_.clear();
    merged_.clear();
    as_before_ = false;
    moved_ = rewritten_ = landed_before_ = verified_ = false;
    session_.reset();
    files_.clear();
    wanted_.clear();
    staged_.clear();
    restored_.clear();
    conflicts_.clear();
    for (std::string* text : {&tip_, &post_, &pre_, &commit_, &bundle_,
                              &entries_, &outcome_, &reason_}) {
      text->clear();
    }
    host_.progress(10, "the branch is being moved by another: looking again");
    std::this_thread::sleep_for(
        std::min(pause_, std::chrono::milliseconds(left())));
    pause_ *= 2;
  }

  End publish() {
    session_.reset();
    stage(kBundleName, bundle_);
    if (!known_.pushed) {
      return outcome("rolled_back",
                     "the patch was never pushed: the bundle has its branch "
                     "with the rollback on top, the repository is untouched" +
                         (gate_.reason.empty() ? "" : "; " + gate_.reason));
    }
    if (host_.cancelled()) {
      commit_.clear();
      return failed(EndCode::cancelled, "cancelled");
    }
    host_.progress(90, "moving the branch");
    Landed landed = move_branch(known_.branch, tip_, commit_, bundle_, base_,
                                attempt_, host_, left());
    usage_.add(landed.end.usage);
    if (landed.how == Landed::How::done) {
      return outcome("rolled_back", gate_.reason);
    }
    commit_.clear();
    restored_.clear();
    verified_ = false;
    if (landed.how == Landed::How::failed) return std::move(landed.end);
    moved_ = landed.moved;
    return outcome("conflict", landed.reason);
  }

  // --- steps ---

  MaybeEnd run_script(const char* name, const char* script,
                      const std::vector<std::string>& args,
                      sandbox::StepResult* out) {
    sandbox::Step step;
    step.argv = {"/bin/sh", "-c", std::string(kAlive) + kGit + script, name};
    step.argv.insert(step.argv.end(), args.begin(), args.end());
    return run_step(std::move(step), out);
  }

  MaybeEnd put(const std::string& name, std::string_view bytes) {
    auto done = session_->put(name, bytes);
    if (done) return std::nullopt;
    return failed(code_of_put(done.error()), name + ": " + done.error().what);
  }

  // An end where it did not simply exit.
  MaybeEnd run_step(sandbox::Step step, sandbox::StepResult* out) {
    step.timeout_ms = left();
    sandbox::Watch watch = host_.watch();
    watch.on_output = nullptr;
    *out = session_->run(step, watch);
    usage_.add(*out);
    const EndCode code = code_of(out->ended);
    if (code == EndCode::none) return std::nullopt;
    return failed(code, step.argv[3] + ": " +
                            describe(*out, attempt_.limits, step.timeout_ms));
  }

  End git_trouble(const std::string& what, const sandbox::StepResult& ran) {
    return failed(code_of_git(ran), what + ": git exited with " +
                                        std::to_string(ran.exit_code) + ": " +
                                        git_said(ran.err, known_.repo));
  }

  // --- the end ---

  End outcome(const std::string& name, const std::string& reason) {
    End end;
    outcome_ = name;
    reason_ = reason;
    if (name == "conflict" || name == "rejected" || name == "tests_failed") {
      end.code = EndCode::verdict;
      end.message = name + (reason.empty() ? "" : ": " + reason);
    }
    return end;
  }

  void stage(const std::string& name, const std::string& bytes) {
    if (bytes.empty() || host_.cancelled() || is_staged(name)) return;
    if (host_.artifact(name, bytes)) staged_.push_back(name);
  }

  bool is_staged(const std::string& name) const {
    return std::find(staged_.begin(), staged_.end(), name) != staged_.end();
  }

  End finish(End end) {
    session_.reset();
    end.usage = usage_;
    if (!end.block_reason.empty()) return end;
    if (end.code != EndCode::none && end.code != EndCode::verdict) return end;
    stage("output-before.log", before_.run.output);
    stage(report_name(before_, false), before_.run.report);
    stage("output-after.log", after_.run.output);
    stage(report_name(after_, true), after_.run.report);
    end.artifacts = staged_;
    end.side_effects = side_effects_json();
    end.result = result();
    host_.progress(100, outcome_);
    return end;
  }

  std::string result() const {
    const auto or_null = [](const std::string& text) {
      return text.empty() ? std::string("null") : json::quoted(text);
    };
    const bool done = outcome_ == "rolled_back";
    std::string out = "{\"patch_id\":" + json::quoted(payload_.patch_id) +
                      ",\"outcome\":" + json::quoted(outcome_) +
                      ",\"restored\":[";
    std::size_t n = 0;
    for (const auto& [path, hash] : restored_) {
      if (n == kListedMax) break;
      out += (n++ > 0 ? ",{\"path\":" : "{\"path\":") + json::quoted(path) +
             ",\"sha256\":" + or_null(hash) + "}";
    }
    out += "],\"restored_count\":" + std::to_string(restored_.size());
    const bool verified = done ? verified_ : outcome_ == kAlready;
    out += std::string(",\"verified\":") + (verified ? "true" : "false");
    out += ",\"commit\":" + or_null(done ? commit_ : "");
    out += ",\"branch\":" + or_null(known_.branch);
    // Whether the branch in the repository holds it, whoever put it there.
    const bool there = known_.pushed && (done || outcome_ == kAlready);
    out += std::string(",\"pushed\":") + (there ? "true" : "false");
    out += ",\"bundle_artifact\":" +
           or_null(is_staged(kBundleName) ? kBundleName : "") + ",\"tests\":" +
           tests_json(&before_, &after_,
                      {{"newly_failing", &gate_.newly_failing},
                       {"newly_passing", &gate_.newly_passing},
                       {"missing", &gate_.missing},
                       {"failing_again", &failing_again_}}) +
           ",\"conflicts\":[";
    n = 0;
    for (const Conflict& one : conflicts_) {
      if (n == kListedMax) break;
      out += (n++ > 0 ? ",{\"path\":" : "{\"path\":") + json::quoted(one.path) +
             ",\"reason\":" + json::quoted(one.reason) + "}";
    }
    return out + "],\"reason\":" + or_null(reason_) + "}";
  }

  const RollbackPayload payload_;
  const Attempt& attempt_;
  Host& host_;
  const Clock::time_point deadline_;
  Known known_;
  bool rewritten_ = false, landed_before_ = false;
  bool verified_ = false, moved_ = false;
  std::optional<TestPayload> suite_;
  TestPhase before_, after_, at_base_;
  Gate gate_;
  std::vector<CaseKey> failing_again_;  // as before the patch
  TakenAway taken_;                     // by the rollback
  bool as_before_ = false;  // all files are those from before the patch
  bool denied_ = false;
  std::string approved_;  // the digest that was said yes to
  std::map<std::string, Entry, std::less<>> merged_;  // of what changed since
  std::chrono::milliseconds pause_{50};               // before the next look
  Checkout base_;
  std::string pack_, tip_, post_, pre_, commit_, bundle_, entries_;
  std::unique_ptr<sandbox::Session> session_;
  Files files_;
  std::vector<std::string> wanted_, staged_;
  std::vector<std::pair<std::string, std::string>> restored_;
  std::vector<Conflict> conflicts_;
  std::string outcome_, reason_;
  Usage usage_;
};

// "a,b" or "a" of a hunk's head; b is 1 where it is left out.
bool read_range(std::string_view text, std::int64_t* start,
                std::int64_t* lines) {
  *lines = 1;
  const char* end = text.data() + text.size();
  auto [at, e] = std::from_chars(text.data(), end, *start);
  if (e != std::errc()) return false;
  if (at == end) return true;
  if (*at != ',') return false;
  auto [last, e2] = std::from_chars(at + 1, end, *lines);
  return e2 == std::errc() && last == end;
}

}  // namespace

std::string hunks_in_region(const std::string& diff, std::int64_t start,
                            std::int64_t end) {
  std::string head, out;
  std::string_view rest = diff;
  bool in_head = true, keep = false;
  // Without context a line that begins with "@@ -" is a hunk's head: bodies
  // begin with '+', '-' or '\'.
  while (!rest.empty()) {
    const std::size_t stop = rest.find('\n');
    const std::string_view line =
        rest.substr(0, stop == std::string_view::npos ? stop : stop + 1);
    rest.remove_prefix(line.size());
    if (line.starts_with("@@ -")) {
      in_head = false;
      std::string_view ranges = line.substr(4);
      std::int64_t at = 0, lines = 0;
      keep = read_range(take_until(ranges, ' '), &at, &lines);
      // No old lines: the patch removed lines between `at` and the next.
      keep = keep && (lines > 0 ? at <= end && at + lines - 1 >= start
                                : at <= end && at + 1 >= start);
    }
    if (in_head) {
      head += line;
    } else if (keep) {
      out += line;
    }
  }
  return out.empty() ? out : head + out;
}

Checked<RollbackPayload> parse_rollback(const std::string& payload) {
  Fields fields(payload);
  fields.only({"patch_id", "region", "test", "on_conflict"});
  RollbackPayload out;
  out.patch_id = fields.text("patch_id", 64);
  if (!parse_job_id(out.patch_id)) {
    fields.fail("patch_id", out.patch_id.empty()
                                ? "it is missing: the id of a patch.apply job"
                                : "\"" + printable(out.patch_id) +
                                      "\" is no patch's id, which is the id "
                                      "of its patch.apply job (machina "
                                      "patches list)");
  }
  if (fields.has("region")) {
    Fields region = fields.object("region");
    region.only({"path", "start_line", "end_line"});
    out.path = region.text("path", kPathBytesMax);
    if (!safe_relative_path(out.path)) {
      region.fail("path", "a relative path of a file that the patch changed");
    }
    out.start_line = region.number("start_line", 1, kLineMax, 0);
    out.end_line = region.number("end_line", 1, kLineMax, out.start_line);
    if (region.has("end_line") && !region.has("start_line")) {
      region.fail("end_line", "start_line is missing");
    } else if (out.end_line < out.start_line) {
      region.fail("end_line", std::to_string(out.end_line) +
                                  " is before start_line, " +
                                  std::to_string(out.start_line));
    }
    fields.take_error(region);
  }
  out.own_test = !fields.has("test");
  if (fields.has("test") && !fields.is_null("test")) {
    Fields test = fields.object("test");
    read_test_member(test, out.test.emplace());
    fields.take_error(test);
  }
  const std::string on_conflict = fields.text("on_conflict", 64, "fail");
  if (on_conflict != "fail" && on_conflict != "block") {
    fields.fail("on_conflict", "\"" + printable(on_conflict) +
                                   "\" is neither \"fail\" nor \"block\"");
  }
  out.block = on_conflict == "block";
  if (auto good = fields.done(); !good) return good.error();
  return out;
}

End run_rollback(const Attempt& attempt, Host& host) {
  auto payload = parse_rollback(attempt.payload);
  if (!payload) return bad_payload(payload.error());
  return RollbackRun(std::move(*payload), attempt, host).run();
}

// Which repository it is of stands in the patch's record alone: no key. The
// branch moves from its expected old value or not at all.
Kind patch_rollback() {
  Kind rollback;
  rollback.name = "patch.rollback";
  rollback.run = run_rollback;
  rollback.timeout_ms = 300'000;
  rollback.limits = {1024, 1024, 256, 0, 8 << 20};
  rollback.check = [](const std::string& payload) -> Checked<Kind::Kept> {
    if (auto good = parse_rollback(payload); !good) return good.error();
    return Kind::Kept{};
  };
  return rollback;
}

}  // namespace machina::kinds
