// workers/kinds/pytest_watch.h
//
// A pytest plugin of ours, written beside the check-out for one run. It says
// which cases pytest selected, which of them came to their end, and where each
// is defined. It also puts off what ends a run early: -x, --maxfail, --stepwise
// (wherever they were given) and a hook's shouldstop and shouldfail.
//
//   record := a JUnit file with one testcase for each selected case, in order:
//             <skipped message=where/>  it came to its end
//             <error message=where/>    it was not reached (or not to its end)
//   where  := file LF file-of-the-definition LF line LF classes LF name
//             classes are joined by "::"; files are below the check-out's top;
//             empty where it is not known
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

namespace machina::kinds {

// The module's text. `record` is the absolute path of the record.
std::string pytest_watch(const std::string& record);

// `where`, taken apart; all empty where it is not known.
struct DefinedAt {
  std::string file, definition, classes, name;
  std::uint64_t line = 0;  // of the definition's `def`; 0: not known
};
DefinedAt read_where(std::string_view where);

}  // namespace machina::kinds
