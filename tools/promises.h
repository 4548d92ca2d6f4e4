// tools/promises.h
//
// What the settings forbid, and what they do not promise: the rules that look
// at several variables at once and are asked when a server starts.

#pragma once

#include <string>
#include <vector>

#include "tools/config.h"

namespace machina {

// Why `serve` must not start under these settings, a line each; none: it may.
std::vector<std::string> start_refusals(const Config& config);

// One line for the operator: what is not promised under these settings, as the
// end of a sentence that begins "not promised: ".
std::string not_promised(const Config& config);

// 127.0.0.0/8, ::1 or localhost.
bool names_loopback(const std::string& host);

}  // namespace machina
