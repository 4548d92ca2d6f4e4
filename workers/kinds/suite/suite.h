// workers/kinds/suite/suite.h
//
// What test.run and the patch kinds share: a project's tests, from a git
// repository at a commit or from files in the payload, by a runner that leaves
// a report (runners.h) or by a command whose exit code is the verdict.
//
//   prepare  a sandbox that sees the repository read-only and its mirror: git
//            fetches, resolves base_rev            (suite_repo.cc)
//   run      a sandbox that sees the mirror read-only: check-out, `setup`,
//            the runner, re-runs of failed cases    (suite.cc)
//   read     a sandbox that sees nothing: the report (junit.cc, tap.cc)
//   result   suite_report.cc
//
//   T1  Outcomes come from the runner's own report. No report is never a pass,
//       nor is a run in which nothing ran, one whose exit status its report
//       does not explain, or one that did not reach what it was to reach.
//       Reports have names that nobody knows before the run. (isolated_test,
//       F01_... and F02_...)
//   T2  The repository's own git configuration, hooks and attributes run
//       nothing outside a sandbox, and the repository is never written.
//   T3  A result stays below 1 MiB; failing cases are listed before others.

#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "queue/base/result.h"
#include "workers/kinds/run.h"
#include "workers/kinds/suite/junit.h"
#include "workers/kinds/suite/runners.h"

namespace machina::kinds {

class Fields;

struct TestPayload {
  // Of the runner command: a file below the top of the work tree.
  enum class Format { none, junit, tap };
  std::string repo;  // absolute, or a name below a repo root; or empty
  std::vector<std::pair<std::string, std::string>> files;
  std::string base_rev = "HEAD", cwd;
  Runner runner = Runner::pytest;
  Format report = Format::none;
  std::string report_path;
  std::vector<std::string> args, command, env, select;
  std::vector<std::vector<std::string>> setup;
  int retries = 0;
};
// Whether the outcome of a suite is one of many cases, and not of one that
// stands for all of them.
inline bool tells_cases(const TestPayload& suite) {
  return suite.runner != Runner::command ||
         suite.report != TestPayload::Format::none;
}
// The members that say what to run, and nothing else: those of another kind's
// payload that holds a suite (`test`).
void read_test_member(Fields& fields, TestPayload& out);
// The same of test.run's payload, which has repo, files and base_rev beside.
void read_suite(Fields& fields, TestPayload& out);
std::string read_base_rev(Fields& fields);

// Where a `repo` member may point, best first: absolute paths below a root,
// judged by their text alone (a worker may not look there), without "//", "."
// and "..". Empty: nowhere.
std::vector<std::string> repo_candidates(const std::string& repo,
                                         const KindSettings& settings);
// A repository as it was found at submission.
struct FoundRepo {
  std::string real;  // its path with every link followed: one per repository
  std::string kept;  // what the job's `repo` is to be
};
// At submission, where the file system may be asked, and once for all that
// hangs on the answer. A BadField unless one candidate is a git repository
// that is still below a root when every link is followed; the same words for
// what is not there and for what lies outside, there or not.
// `kept` is the directory's own path below its root; or the name below the
// root without "//", "." and "..", where one was given, no link was met and
// there is one root: with several it could mean another directory by the time
// the job runs. The sandbox follows no link, so the job runs on what was looked
// at here, or not at all.
Checked<FoundRepo> find_repo(const std::string& repo,
                             const KindSettings& settings);
// The payload with this `repo`; empty: it has it already.
std::string with_repo(const std::string& payload, const std::string& repo);

std::string sha256_hex(const std::string& text);

// How each script of git's begins. "alive git ..." ends the script where git
// was killed: that says nothing of the repository or the diff, so no exit code
// of the script may come of it. (git's own codes end at 129; merge-file has
// 255.)
inline constexpr char kAlive[] = R"sh(
set -eu
alive() {
  "$@" && return 0
  alive_code=$?
  case $alive_code in 1[3-8][0-9] | 19[0-2]) exit $alive_code ;; esac
  return $alive_code
}
)sh";

// prepare: the mirror's name and the commit that base_rev means.
struct Checkout {
  std::string repo;  // the candidate that was opened
  std::string mirror, commit;
  std::string pack;  // objects that the mirror has not; or empty
};
// Returns the end of the attempt where it cannot go on.
struct Prepared {
  Checkout checkout;
  bool good = false;
  bool no_commit = false;  // why not: base_rev names none
  End end;
};
// `in_repo`: the repository itself must have the commit, not only the mirror,
// which forgets nothing.
Prepared prepare_repo(const std::string& repo, const std::string& base_rev,
                      const Attempt& attempt, Host& host, Millis left_ms,
                      bool in_repo = false);
// git's words on standard error for a person who knows `repo` and not the
// sandbox's paths: at most three lines, 400 bytes.
std::string git_said(const std::string& err, const std::string& repo);
// The step that puts the commit into /work/repo; `pack` lies in kPackFile.
sandbox::Step checkout_step(const Checkout& checkout);
inline constexpr char kPackFile[] = ".machina/patch.pack";  // below /work

// What the runs of a suite came to.
struct TestOutcome {
  Suite suite;
  std::uint32_t flaky = 0;
  bool timed_out = false;
  bool broken = false;  // an error of the run itself, by add_error()
  Millis duration_ms = 0;
};
// Of a re-run of what failed: cases that passed now become flaky. Cases with
// one id are told apart by their number; where the re-run has another number of
// them than the run had, or than failed, nothing is concluded.
void merge_rerun(TestOutcome& all, const Suite& rerun);
// Takes in what the run was to reach (pytest_watch.h): cases that are in it and
// were not reached are added as missing; `where` of the others is filled in.
// Sets `complete` where none is missing.
void expect_cases(Suite& suite, const Suite& record);
// Fills in `where` alone, from such a record of the same run.
void place_cases(Suite& suite, const Suite& record);
void add_error(TestOutcome& all, const std::string& id,
               const std::string& message);
bool passed(const TestOutcome& all);
// The first error of the run itself, or null.
const Case* run_error(const TestOutcome& all);
// "a, b, c and 4 more": ids for a sentence.
std::string some_ids(const std::vector<std::string>& ids);

// One run of a suite in a session of its own, from the check-out to the report.
struct SuiteRun {
  End end;  // code not none: the run was ended before its report; usage always
  TestOutcome tests;
  bool started = false;   // the check-out is there: what follows is the suite's
  bool reported = false;  // the runner's own report is there and believed
  std::string output, report;
  bool tap = false;  // what `report` is: TAP, or JUnit
};
struct SuiteOptions {
  Millis timeout_ms = 0;
  int retries = 0;
  int percent = 10;  // progress while it runs
  std::string what = "running the tests";
  // Says which cases there are: pytest runs nothing (all are missing), the
  // others run once.
  bool list_only = false;
  // Whether what failed is to run again. Absent: while anything failed.
  std::function<bool(const TestOutcome&)> again;
};
SuiteRun run_suite(const TestPayload& payload, const Checkout& checkout,
                   const SuiteOptions& options, const Attempt& attempt,
                   Host& host);

std::string summary(const TestOutcome& all);  // "3 failed, 1 error of 40"
std::string side_effects_json();
// At most so many bytes of cases, those that failed first.
std::string test_result(const TestOutcome& all, const Usage& usage,
                        std::size_t cases_bytes_max);
// What a result leaves for them beside everything else of test.run's.
inline constexpr std::size_t kCasesBytesMax = kResultBytesMax - (16 << 10);

}  // namespace machina::kinds
