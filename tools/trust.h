// tools/trust.h
//
// Whether a path leads where its owner meant it to: what ssh asks of the files
// that it believes (StrictModes).
//
//   T1  Each component from / on belongs to root (or to whoever owns /), or to
//       the effective user; links too, and they are followed component by
//       component in the same way.
//   T2  No directory on the way may be written by its group or by others,
//       unless it is sticky (/tmp), where nobody replaces what is another's.
//   T3  Root may be led to another user's directory or file, but then through
//       components of root's and that one user's alone.
//   T4  What is not there is not judged: whoever opens it will say so.
//
// tests/tools/trust_test.cc has a test for each.

#pragma once

#include <string>

#include "queue/base/result.h"

namespace machina {

// `what` is the name of the setting, for the error: Code::invalid, one line
// with the component, its owner or mode, and what to change. With `of_others`
// T3 holds; without, root too is led to what is root's alone. `mode_of_file`:
// also of a file at the end, whether others may write it.
Result<void> check_trusted(const std::string& what, const std::string& path,
                           bool of_others, bool mode_of_file = true);

}  // namespace machina
