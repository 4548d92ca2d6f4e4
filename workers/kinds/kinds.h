// workers/kinds/kinds.h
//
// What a kind of job is: one value. A family makes its kinds by one function;
// the table in families.cc names each family once, and that is all that the
// rest of the program knows of it.
//
//   Y1  A kind has a `run` (a sandbox for each attempt) or a group (warmed),
//   and
//       never both. Whoever has neither fails its attempt.
//       (kinds_test, F31_EachKindIsWarmedOrHasARunOfItsOwn)
//   Y2  A name or a handler that two families claim stops the program at its
//       start. (kinds_test, TwoFamiliesMayNotClaimOneName)

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "queue/base/kind.h"
#include "workers/sandbox/sandbox.h"

namespace machina {

namespace kinds {
struct Attempt;
struct End;
class Host;
}  // namespace kinds

// A resident process in a session of its own, which answers the jobs of its
// kinds one after another (workers/kinds/handler.h). Kinds that point to one
// group share its process.
struct HandlerGroup {
  sandbox::Step program;  // a built-in of the family, or an argv
  sandbox::Limits limits;
};

// `check` and `resolve`, the part that takes a job in, are KindFacts'.
struct Kind : KindFacts {
  std::string name;
  // Of an attempt's session. A warmed kind has its group's.
  sandbox::Limits limits;
  // Runs one attempt in a session of its own (workers/kinds/run.h).
  kinds::End (*run)(const kinds::Attempt&, kinds::Host&) = nullptr;
  std::shared_ptr<const HandlerGroup> group;  // warmed
  // Of a warmed kind: whether this payload is known to be done at once, so that
  // others may be sent behind it. Null: no payload is.
  bool (*quick)(const std::string& payload_json) = nullptr;
  bool warmed() const { return group != nullptr; }
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

struct Family {
  std::vector<Kind> kinds;
  // Programs of the family that run confined, without exec.
  std::vector<sandbox::NamedBuiltin> handlers;
};
using MakeFamily = Family (*)(const KindSettings& settings);
using Families = std::span<const MakeFamily>;

// The table (families.cc).
Families built_in_families();

// By name.
using KindMap = std::map<std::string, Kind>;
KindMap kinds_of(Families families, const KindSettings& settings);
// Before the spawner is forked: gives the sandbox the families' handlers.
void register_handlers(Families families);

}  // namespace machina
