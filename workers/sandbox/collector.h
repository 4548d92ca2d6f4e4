// workers/sandbox/collector.h
//
// put() and collect(): a built-in that runs as a step of its own, confined
// under the slot's uid, and reaches files below /work without following
// anything a job may have planted. What it answers travels in its exit code.

#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "queue/base/result.h"
#include "workers/sandbox/sandbox.h"

namespace machina::sandbox {

// `path` is relative to /work, or absolute and below it; Code::invalid for one
// that has "..", or leaves /work in any other way.
Result<std::string> put_request(const std::string& path,
                                std::string_view bytes);
Result<std::string> collect_request(const std::string& path,
                                    std::size_t max_bytes);
std::optional<Error> collector_error(const StepResult& result,
                                     const std::string& path);

}  // namespace machina::sandbox
