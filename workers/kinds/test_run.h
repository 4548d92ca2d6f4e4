// workers/kinds/test_run.h
//
// test.run: a project's tests, from a git repository at a commit or from files
// in the payload, by pytest or by a command whose exit code is the verdict.
//
//   prepare  a sandbox that sees the repository read-only and its mirror: git
//            fetches, resolves base_rev            (test_run_repo.cc)
//   run      a sandbox that sees the mirror read-only: check-out, `setup`,
//            the runner, re-runs of failed cases    (test_run.cc)
//   read     a sandbox that sees nothing: the JUnit report (junit.cc)
//   result   test_run_report.cc
//
//   T1  Outcomes come from the runner's own report. No report is never a pass,
//       nor is a run in which nothing ran.
//   T2  The repository's own git configuration, hooks and attributes run
//       nothing outside a sandbox, and the repository is never written.
//   T3  A result stays below 1 MiB; failing cases are listed before others.

#pragma once

#include <string>
#include <utility>
#include <vector>

#include "queue/result.h"
#include "workers/kinds/junit.h"
#include "workers/kinds/run.h"

namespace machina::kinds {

struct TestPayload {
  enum class Runner { pytest, command };
  std::string repo;  // absolute, or a name below a repo root; or empty
  std::vector<std::pair<std::string, std::string>> files;
  std::string base_rev = "HEAD", cwd;
  Runner runner = Runner::pytest;
  std::vector<std::string> args, command, env, select;
  std::vector<std::vector<std::string>> setup;
  int retries = 0;
};
Result<TestPayload> parse_test(const std::string& payload,
                               const KindSettings& settings);

// Where a `repo` member may point, best first: absolute paths below a root,
// judged by their text alone (a worker may not look there). Empty: nowhere.
std::vector<std::string> repo_candidates(const std::string& repo,
                                         const KindSettings& settings);
// At submission, where the file system may be asked: Code::invalid unless one
// candidate is a git repository that is still below a root when every link is
// followed.
Result<void> check_repo(const std::string& repo, const KindSettings& settings);

// prepare: the mirror's name and the commit that base_rev means.
struct Checkout {
  std::string mirror, commit;
};
// Returns the end of the attempt where it cannot go on.
struct Prepared {
  Checkout checkout;
  bool good = false;
  End end;
};
Prepared prepare_repo(const TestPayload& payload, const Attempt& attempt,
                      Host& host, Millis left_ms);
// The step that puts the commit into /work/repo.
sandbox::Step checkout_step(const Checkout& checkout);

// What the runs of a suite came to.
struct TestOutcome {
  Suite suite;
  std::uint32_t flaky = 0;
  bool timed_out = false;
  Millis duration_ms = 0;
};
// Of a re-run of what failed: cases that passed now become flaky.
void merge_rerun(TestOutcome& all, const Suite& rerun);
void add_error(TestOutcome& all, const std::string& id,
               const std::string& message);
bool passed(const TestOutcome& all);
std::string summary(const TestOutcome& all);  // "3 failed, 1 error of 40"
std::string side_effects_json();
std::string test_result(const TestOutcome& all, const Usage& usage);

}  // namespace machina::kinds
