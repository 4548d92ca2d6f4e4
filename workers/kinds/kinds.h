// workers/kinds/kinds.h
//
// The built-in kinds: for each, the check of its payload at submission (again
// in the worker), its defaults, and how it runs. One file or folder per kind.

#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "queue/base/job.h"
#include "queue/base/result.h"
#include "workers/sandbox/sandbox.h"

namespace machina {

namespace kinds {
struct Attempt;
struct End;
class Host;
}  // namespace kinds

struct Kind {
  // What a job keeps of a payload that was accepted.
  struct Kept {
    std::string payload;  // empty: as it was given
    // Jobs of the same key, whichever their kinds and tenants, run one after
    // another; no client's key is equal to a kind's. Empty: no bound. At most
    // kKindKeyBytesMax bytes ("patch:<path>").
    std::string concurrency_key;
  };
  // At submission. What it looks up it looks up once: payload and key are of
  // the same thing. Code::invalid; `what` is "<field>: <what, value, bound>".
  std::function<Result<Kept>(const std::string& payload_json)> check;
  Millis timeout_ms = 120'000;
  sandbox::Limits limits;
  bool warmed = false;  // served by a resident, confined handler
  // Runs one attempt in a session of its own (workers/kinds/run.h). Null where
  // the kind is warmed: an attempt of such a kind cannot be run this way, and
  // fails.
  kinds::End (*run)(const kinds::Attempt&, kinds::Host&) = nullptr;
};

// Settings that checks depend on.
struct KindSettings {
  bool prod = false;
  std::vector<std::string> repo_roots;         // absolute; <root>/repos first
  std::vector<std::string> shell_allowed_exe;  // empty: the profile's rule
  Millis shell_timeout_ms = 30'000;
  std::uint64_t shell_stdout_max = 131'072;  // bytes of each in a result
  std::uint64_t shell_stderr_max = 131'072;
};

// By name: noop, tool.shell, test.run, patch.apply.
std::map<std::string, Kind> built_in_kinds(const KindSettings& settings);

// Before the spawner is forked: gives the sandbox its compiled-in handlers.
void register_built_in_handlers();

}  // namespace machina
