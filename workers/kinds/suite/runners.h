// workers/kinds/suite/runners.h
//
// The programs that run a suite and report on it: how each is called so that it
// leaves a report that a machine can read, and what is refused of its
// arguments.
//
//   runner    program              report
//   pytest    python3 -m pytest    JUnit, by pytest            (suite.cc)
//   unittest  python3 -            JUnit, by a program of ours on top of
//                                  unittest's own API
//   ctest     ctest                JUnit, by ctest
//   node      node --test          JUnit, by a reporter of ours: node's own
//                                  have no file names, and in JUnit no valid
//                                  XML for some names
//   tap       the job's `command`  TAP on standard output
//   command   the job's `command`  its exit code, or the file `report` names
//
//   R1  Each report has an end that is written last (the root's end, the plan),
//       so a runner that left half-way leaves none.
//   R2  What a runner would run and did not reach is not left out in silence:
//       unittest exits with 2, node's reporter adds an error.
//   (tests/workers/runners_test.cc, tests/e2e/runners_test.cc)

#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace machina::kinds {

enum class Runner { pytest, unittest, ctest, node, tap, command };
std::string_view name(Runner);
std::optional<Runner> runner_named(std::string_view text);
std::string all_runners();  // "pytest, unittest, ..."

// Empty, or why an argument cannot be given to it: what the runner sets itself,
// and what lets it end before all cases were reached.
std::string argument_problem(Runner runner, std::string_view argument);

// The same of a command whose report is read: an option of pytest's that ends
// the run at the first failure, which the report does not show.
std::string command_problem(const std::vector<std::string>& command);

struct RunnerCall {
  std::vector<std::string> argv;
  std::string stdin_data;
  std::string file, file_text;  // a file below /work that it needs, or empty
};
// Of unittest, ctest and node. `report`: where it is to write, absolute;
// `file`: where a file that it needs may be put, below /work.
RunnerCall call_runner(Runner runner, const std::vector<std::string>& args,
                       const std::vector<std::string>& select,
                       const std::string& report, const std::string& file);
// Where unittest and node leave the list of where the cases of their report are
// defined (pytest_watch.h), in the same order.
std::string places_of(const std::string& report);
// Prints the tests that `ctest` with these arguments would run, as JUnit: a
// script for "sh -c", and the arguments that it takes.
extern const char kListCtest[];
std::vector<std::string> ctest_list(std::vector<std::string> args,
                                    const std::vector<std::string>& select);
// The end of the id of a file of node's that ended before all of its tests
// could be known.
inline constexpr std::string_view kNodeFile = "::(file)";
// For a person where the program is not there: "python3 ... (Debian: ...)".
std::string what_to_install(Runner runner, const std::string& program);

}  // namespace machina::kinds
