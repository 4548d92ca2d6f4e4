// tests/workers/kinds/probe/probe.h
//
// A family written for the test: this folder and one row in the test's table
// are all that it takes.
//
//   probe.box      sandboxed: a program in a session of its own
//   probe.warm     warmed, by a built-in handler
//   probe.also     the same group: the same process
//   probe.unknown  the same group, whose handler does not know it
//   probe.own      warmed, by a program of its own (argv)
//
// A payload is {} or has members of `check` below. A warmed result is
// {"process":"<as long as the process lives>","payload":<the job's>}.

#pragma once

#include "workers/kinds/kinds.h"

namespace machina {

Family probe_family(const KindSettings& settings);

}  // namespace machina
