// workers/kinds/patch/patch.h
//
// patch.apply: is this diff good for this repository? Phases, each in a sandbox
// of its own; only the two test phases run anything of the project's.
//
//   check    the diff's text (diff.h), in the worker
//   prepare  as the repository's owner: the mirror, base_rev (suite_repo.cc)
//   approval where it is required: a block that binds digest and base commit
//   apply    git's own apply to the base's index; the commit, its bundle, the
//            reverse diff and the hashes are made here      (patch_apply.cc)
//   before   the suite at the base                          (suite.cc)
//   after    the suite at the commit; what newly fails runs again
//   land     with `push`: as the repository's owner, the objects and then the
//            branch are linked into the repository          (patch_land.cc)
//   result   the gate and the JSON of it                    (patch_report.cc)
//
//   P1  The user's checkout, index and HEAD are never written; without `push`
//       nothing of the repository is. With it, only objects and one new branch.
//   P2  What is committed is what git made of the diff, compared path by path
//       with what the diff said; nothing of the project has run by then.
//   P3  The commit's id depends on the job, the base and the diff alone: every
//       attempt makes the same one, so landing twice is landing once.
//   P4  A verdict names its reason; a hang, a crash or a forged report of the
//       suite is one, not an endless retry.

#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "queue/base/result.h"
#include "workers/kinds/patch/diff.h"
#include "workers/kinds/run.h"
#include "workers/kinds/suite/suite.h"

namespace machina::kinds {

Family patch_family(const KindSettings& settings);  // patch.rollback, too

struct PatchPayload {
  std::string repo, base_rev = "HEAD";
  std::string diff;                         // or
  std::string artifact_job, artifact_name;  // "<job id>/<name>"
  std::string description, branch, author, parent_patch_id;
  std::optional<TestPayload> test;
  bool baseline = true, push = false, approval = false;
};
// Also judges the diff where it is in the payload: what is no diff is invalid.
// What may not be applied is left to the attempt, which has a result to say so.
Checked<PatchPayload> parse_patch(const std::string& payload,
                                  const KindSettings& settings);
// Empty, or why git would not have it as a branch's name.
std::string branch_problem(const std::string& name);

// Goes before a script that works on commits of the mirror: a repository of its
// own in /work/git that borrows the mirror's objects, with an index and no
// checkout, in which no attribute, filter or hook has a say.
inline constexpr char kBorrowingGit[] = R"sh(
umask 022
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null LC_ALL=C
git -c init.defaultBranch=main init -q --bare --template= /work/git
export GIT_DIR=/work/git GIT_WORK_TREE=/work/tree GIT_INDEX_FILE=/work/index
mkdir -p /work/out /work/tree $GIT_DIR/objects/info $GIT_DIR/info
echo /mirror/objects >$GIT_DIR/objects/info/alternates
[ ! -f /mirror/shallow ] || cp /mirror/shallow $GIT_DIR/shallow
echo '* -text -filter -ident -working-tree-encoding !diff' \
  >$GIT_DIR/info/attributes
cat >>$GIT_DIR/config <<END
[core]
	bare = false
	hooksPath = /dev/null
	symlinks = false
	protectHFS = true
	protectNTFS = true
[pack]
	threads = 1
END
)sh";

// --- apply ---

struct ChangedFile {
  std::string path;
  unsigned old_mode = 0, new_mode = 0;  // 0: not there
  std::int64_t added = 0, removed = 0;  // -1: not text
  std::string sha256_before, sha256_after;
};
struct Conflict {
  std::string path, reason;
  int hunk = 0;  // from 1; 0: not one hunk's
};
struct Applied {
  enum class How { committed, unchanged, conflict, refused, failed };
  How how = How::failed;
  std::string reason;  // of all but committed
  std::string commit;
  std::vector<ChangedFile> files;
  std::vector<Conflict> conflicts;
  std::string bundle, reverse_diff;
  End end;  // failed: how the attempt ends; usage always
};
struct CommitWords {
  std::string branch, author_name, author_email, message;
  std::int64_t seconds = 0;  // of both dates
};
Applied apply_diff(const std::string& text, const Diff& diff,
                   const CommitWords& words, const Checkout& base,
                   const Attempt& attempt, Host& host, Millis left_ms);
// The pack inside a bundle; empty where there is none.
std::string pack_of(const std::string& bundle);

// --- land ---

struct Landed {
  enum class How { done, refused, failed };
  How how = How::failed;
  std::string reason;  // refused
  // Refused because the branch is no longer what it was, or another writer
  // holds it: who looks again may find another answer.
  bool moved = false;
  End end;  // failed; usage always
};
// `check_only`: says what would be refused and changes nothing.
Landed land_branch(const std::string& branch, const std::string& commit,
                   const std::string& bundle, const Checkout& base,
                   bool check_only, const Attempt& attempt, Host& host,
                   Millis left_ms);
// A branch that is there goes from `old` to `commit`, whose parent that is; any
// other value is refused, as is a branch that is checked out.
Landed move_branch(const std::string& branch, const std::string& old,
                   const std::string& commit, const std::string& bundle,
                   const Checkout& base, const Attempt& attempt, Host& host,
                   Millis left_ms);
inline constexpr char kLandHandler[] = "land";
int land_handler(int in_fd, int out_fd);

// --- the gate and the result ---

struct TestPhase {
  bool ran = false, valid = false;  // valid: a report with at least one case
  // Cut off when its share of the job's time was over: that tells of the time,
  // and nothing of the tests.
  bool out_of_time = false;
  // Of a suite that is one case: what failed in it cannot be told from what
  // fails later.
  bool one_case = false;
  // The run does not say where a case is defined, and its id may: a report of
  // pytest's form has the module in it. Of no other id is a file believed.
  bool id_is_module = false;
  bool alone = false;   // what failed ran again without the other cases
  std::string problem;  // what ended it, where it is not valid
  SuiteRun run;
};
// Whether what failed in it can be compared with a later run.
bool tells(const TestPhase& phase);
// Of the artifact that its report becomes.
const char* report_name(const TestPhase& phase, bool after);
// Runs the suite and says in `phase` what came of it; or the end of the attempt
// where it is nobody's verdict.
std::optional<End> run_test_phase(TestPhase& phase, const TestPayload& suite,
                                  const Checkout& checkout,
                                  const SuiteOptions& options,
                                  const Attempt& attempt, Host& host,
                                  Usage& usage);
// The cases of the commit that the first run was of, once more: whether ids
// stay. Listed by pytest, run again by the others. `ran` stays false where that
// gave no list.
std::optional<End> list_again(TestPhase& listed, const TestPayload& suite,
                              const Checkout& checkout, Millis left_ms,
                              const Attempt& attempt, Host& host, Usage& usage);
// One case in two runs: its id, and which of those with that id.
struct CaseKey {
  std::string id;
  std::uint32_t nth = 1;
  bool teardown = false;  // its teardown, which fails apart from its body
  auto operator<=>(const CaseKey&) const = default;
};
std::string shown(const CaseKey& key);  // "id", or "id#2" for a second one

// The gate. Cases are compared by id and number; where a run has more of one id
// than the other, by their counts.
//
//   G1  Every case that passed before, and every one that was to be reached
//       then and was not, is seen to pass after, or `accepted` is false.
//   G2  One that is not there any more is excused only where the patch deletes
//       or renames the file that it is in, or removes the line that defines it
//       or its class, and adds no line that defines the name in that file.
//       Which file and lines these are, the run says; else nothing is excused,
//       but for a module's file that is gone (id_is_module).
//   G3  A run after the patch that is not known to be complete, or that ended
//       in a way that its report does not explain, is no yes. One before the
//       patch excuses only what it saw fail. (verdict_test, F01_... F02_...)
struct Gate {
  bool accepted = true;
  std::string reason;
  std::vector<CaseKey> newly_failing, newly_passing;
  std::vector<CaseKey> missing;  // to be seen to pass, and not seen
  // Ids that only one of the runs has: where neither is empty, ids may change
  // from run to run (changing_ids).
  std::vector<std::string> only_before, only_after;
};
Gate judge_patch(const TestPhase& before, const TestPhase& after, bool baseline,
                 const TakenAway& taken);
// Which cases passed only when they ran again, or empty: the patch may have
// made them depend on what ran before.
std::string flaky_note(const TestPhase& after);
// A gate that says no where ids come and go: the reason, with ids, or empty.
// `listed`: the cases of the same commit as `before`, listed once more; what is
// not in it again is proven to change. Null: it could not be listed, and ids
// that differ in their digits alone are told as a guess.
bool ids_may_change(const Gate& gate);
std::string changing_ids(const Gate& gate, const TestPhase* listed);
// Puts that at the head of the reason.
void note_changing_ids(Gate& gate, const TestPhase& listed);
// The cases that fail or err in it.
std::set<CaseKey> failing_cases(const TestPhase& phase);
// "{"before","after", and each list with "<name>_truncated"}", or "null" where
// nothing ran.
using NamedCases = std::pair<const char*, const std::vector<CaseKey>*>;
std::string tests_json(const TestPhase* before, const TestPhase* after,
                       const std::vector<NamedCases>& lists);
bool newly_fails(const TestPhase& before, const TestOutcome& after);

struct PatchReport {
  std::string outcome, reason, base_commit, commit, branch;
  std::string diff_digest;  // "sha256:<hex>"
  bool pushed = false;
  std::vector<ChangedFile> files;
  std::vector<Conflict> conflicts;
  const TestPhase* before = nullptr;
  const TestPhase* after = nullptr;  // null: no tests were asked for
  Gate gate;
  bool has_reverse = false, has_bundle = false;
};
inline constexpr int kRerunsMin = 2;              // of what newly fails
inline constexpr Millis kListMs = 60'000;         // to list cases again
inline constexpr Millis kLandReserveMs = 10'000;  // of the time, at most
inline constexpr char kBundleName[] = "patch.bundle";
inline constexpr char kReverseName[] = "reverse.diff";
inline constexpr char kDiffName[] = "patch.diff";
std::string patch_result(const std::string& patch_id,
                         const PatchReport& report);
// The data of a block for approval: digest, base commit, files and counts.
std::string approval_data(const std::string& digest,
                          const std::string& base_commit, const Diff& diff);

}  // namespace machina::kinds
