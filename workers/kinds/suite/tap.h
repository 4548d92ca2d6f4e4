// workers/kinds/suite/tap.h
//
// Reading the Test Anything Protocol, versions 12 to 14, as strictly as a
// report must be read whose text was written by untrusted code. As junit.h, it
// is read by a confined handler and comes back in the same frames.
//
//   tap    := ["TAP version N"] (plan point* | point* plan)
//   plan   := "1..N" ["# SKIP" why]
//   point  := ["not "] "ok" [number] ["-"] [name] ["# SKIP"|"# TODO" why]
//             [yaml] | subtest point | point "{" subtest "}"
//   subtest: a whole tap, four spaces further in, before the point that ends it
//   yaml:    "---" to "...", two spaces further in than its point
//   Lines of any other form are no TAP: a program may print what it likes.
//
//   A1  Accepted only if it is all there: one plan on each level, as many
//   points
//       as it says, numbers that count from 1, every subtest and block of yaml
//       ended, no "Bail out!". Anything else is an error that names the line.
//   A2  A case is a point without points below it; its id is the names on the
//       way to it, joined by " > ", or "test N" for a point without a name. A
//       point that fails though nothing below it does is a case too. One that
//       says ok though a case below it failed is an error.
//   A3  "# SKIP" and "# TODO" make it skipped, whatever it says: what is still
//   to
//       be done neither fails nor passes.
//   A4  Time and memory are linear in the text; every count has a bound.
//   (tests/workers/kinds/tap_test.cc)

#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "queue/base/result.h"
#include "workers/kinds/suite/junit.h"

namespace machina::kinds {

constexpr std::size_t kTapDepthMax = 64;
constexpr std::size_t kTapCasesMax = 100'000;

// Code::invalid: why it is no whole TAP.
Result<std::vector<Case>> read_tap(std::string_view text);

// As of junit.h.
std::string encode_tap(std::string_view text);
inline constexpr char kTapHandler[] = "tap";
int tap_handler(int in_fd, int out_fd);

}  // namespace machina::kinds
