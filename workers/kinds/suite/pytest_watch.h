// workers/kinds/suite/pytest_watch.h
//
// A pytest plugin of ours, written beside the check-out for one run. It says
// which cases pytest selected, which of them came to their end, and where each
// is defined. It also puts off what ends a run early: -x, --maxfail, --stepwise
// (wherever they were given) and a hook's shouldstop and shouldfail.
//
//   record := a JUnit file with one testcase for each selected case, in order:
//             <skipped message=where/>  it came to its end
//             <error message=where/>    it was not reached (or not to its end)
//   where  := file LF file-of-the-definition LF line LF classes LF name LF
//             lines-of-the-classes
//             classes are joined by "::", outermost first, and their lines in
//             `file` by ","; files are below the check-out's top; a line is 0
//             and a text empty where it is not known
//
//   W1  The record is there from the end of the collection on, so a run that
//       was killed has one. Nothing in it is believed to be better than the
//       report: it only takes away.
//   W2  The suite runs in the same process and can forge the record, as it can
//       forge the report. A project that means no harm cannot get in its way:
//       module, record and report have names that nobody knows beforehand.
//       (isolated_test and patch_test, F01_...)

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace machina::kinds {

// The module's text. `record` is the absolute path of the record.
std::string pytest_watch(const std::string& record);

// Python: `_place(own, classes, name, function)` is a case's `where`, and
// `_inside(path)` the path below the check-out's top. For what else of ours
// runs in a suite's process (runners.cc).
std::string python_places();
// `text` with the one `mark` in it replaced.
std::string filled(std::string text, const std::string& mark,
                   const std::string& with);

// `where`, taken apart; all empty where it is not known. In a language that has
// tests in calls (`describe("a", ...)`), the classes are the outer calls.
struct DefinedAt {
  struct Class {
    std::string name;
    std::uint64_t line = 0;  // 0: not known
  };
  std::string file, definition, name;
  std::vector<Class> classes;
  std::uint64_t line = 0;  // of the definition's `def`; 0: not known
};
DefinedAt read_where(std::string_view where);

}  // namespace machina::kinds
