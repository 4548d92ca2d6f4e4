// workers/kinds/noop/noop.h
//
// noop: does nothing, in the ways that a test needs. Warmed: a group of its own
// with a built-in handler.

#pragma once

#include <string_view>

#include "workers/kinds/kinds.h"

namespace machina::kinds {

Family noop_family(const KindSettings& settings);

// The group's process (workers/kinds/handler.h).
int noop_handler(int in_fd, int out_fd);

}  // namespace machina::kinds
