// workers/kinds/test/test_run.h
//
// test.run: a project's tests, from a git repository at a commit or from files
// in the payload: the suite of suite.h, once, and its result.

#pragma once

#include "workers/kinds/kinds.h"

namespace machina::kinds {

Family test_family(const KindSettings& settings);

}  // namespace machina::kinds
