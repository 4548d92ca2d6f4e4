// server/api/patch_record.h
//
// What is remembered of a patch: made of how its job ended, shown as JSON
// (docs/http-api.md, Patches). Everything in it came from a client's payload or
// a worker's result, so each text and list has a bound, and what has another
// shape than it should is left out rather than believed.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/job.h"
#include "queue/base/json.h"

namespace machina {

constexpr std::string_view kPatchKind = "patch.apply";
constexpr std::string_view kRollbackKind = "patch.rollback";

// Bounds. Texts are cut, lists end; a result is at most 1 MiB anyway.
constexpr std::size_t kPatchTextBytesMax = 4096;  // description, reason
constexpr std::size_t kPatchNameBytesMax = 1024;  // all other texts
constexpr std::size_t kPatchFilesMax = 10'000;
constexpr std::size_t kPatchSourcesMax = 1'000;  // entries of `provenance`
constexpr std::size_t kPatchCasesMax = 100;      // newly failing, newly passing
constexpr std::size_t kPatchRollbacksMax = 100;  // of one patch; the last ones
constexpr std::size_t kRegionBytesMax = 4096;
constexpr std::size_t kSuiteBytesMax = 256u << 10;  // a longer one is not kept
constexpr std::size_t kAlertsMax = 32;  // semantic alerts of one source
constexpr std::uint64_t kReverseDiffBytesMax = 16u << 20;  // of one patch

struct PatchFile {
  std::string path, old_path;  // old_path: of a rename, else empty
  std::int64_t added = 0, removed = 0;
  std::string sha256_before, sha256_after;  // empty: was not, is not there
};

// One entry of a patch's provenance: what it was made from.
struct PatchSource {
  std::int64_t position = 0;  // as submitted
  std::string origin, vector_id, license, session_id;
  std::string license_fingerprint;  // SHA-256 of the licence's text, or empty
  std::string retrieved_at;         // RFC 3339, as submitted
  std::string semantic_alerts;      // raw JSON: an array of texts, or empty
  double influence = 0;
  bool has_influence = false;
};

// What one vector of one session gave to a patch: the sum of its sources.
struct PatchContributor {
  std::string vector_id, session_id;
  double influence = 0;
};

// What is counted of a patch, and what its `context` says of its making.
struct PatchMetrics {
  // Of the suite after the patch; nothing where no tests ran.
  std::optional<std::int64_t> tests_passed, tests_failed, errors, flaky;
  std::int64_t error_trace_count = 0;  // cases that failed or erred after it
  std::int64_t lines_changed = 0;
  std::optional<std::int64_t> context_tokens;
  std::optional<double> patch_difficulty, effort_estimate;
  std::string roi_tag, enhancement_name;
  std::optional<double> enhancement_score;  // nothing where no tests ran
  Millis start_ms = 0, time_to_completion_ms = 0;
};

struct PatchApproval {
  std::string state = "not_required";  // required, approved, denied
  std::string actor, comment, digest;
  Millis at_ms = 0;
};

struct BranchEntry {
  std::string job_id, action, branch, commit;  // committed, pushed, rolled_back
  Millis at_ms = 0;
};

struct RollbackRecord {
  std::string job_id, patch_id, state, outcome, branch, commit, reason;
  std::string region;  // raw JSON or empty: all of the patch
  // Raw JSON: {"before":{"passed":3,...}|null,"after",...} or empty: none ran.
  std::string tests;
  bool pushed = false, verified = false;
  std::int64_t restored = 0;  // files
  Millis created_ms = 0, finished_ms = 0;
};

struct PatchRecord {
  std::string patch_id;  // the job's id
  std::string tenant;    // the job's
  std::string state, outcome, reason;
  std::string repo, base_rev, base_commit, commit, branch;
  bool pushed = false;
  std::string description, author, parent_patch_id;
  std::string diff_digest;  // "sha256:<hex>" or empty
  PatchApproval approval;
  std::int64_t lines_added = 0, lines_removed = 0, file_count = 0;
  // Raw JSON: {"passed":3,...} or empty; arrays of names, and how many in all.
  std::string tests_before, tests_after, newly_failing, newly_passing;
  std::int64_t newly_failing_count = 0, newly_passing_count = 0;
  std::uint64_t reverse_diff_bytes = 0;  // 0: not kept
  std::string rolled_back_by;            // the job that took all of it back
  Millis created_ms = 0, finished_ms = 0;
  // Of find() alone:
  std::vector<PatchFile> files;
  std::vector<PatchSource> sources;            // by influence, greatest first
  std::vector<PatchContributor> contributors;  // the same
  std::string suite;  // the payload's `test`, raw JSON, or empty
  std::optional<PatchMetrics> metrics;
  std::vector<BranchEntry> branch_log;
  std::vector<RollbackRecord> rollbacks;  // newest first
};

// How a job ended, as far as it matters here.
struct EndedJob {
  JobId id;
  Lsn lsn = 0;  // 0: read back, not fed
  std::string kind, tenant = "default", payload, result;
  State state = State::succeeded;
  std::string message;  // of its error
  Fence fence = 0;      // where its artifacts are
  std::vector<std::string> artifacts;
  Millis created_ms = 0, finished_ms = 0;
};

// `reverse_diff` becomes the name of the artifact with the reverse diff, or
// empty. Never fails: a payload that says nothing gives a record of nothing.
PatchRecord read_patch(const EndedJob& job, std::string* reverse_diff);
RollbackRecord read_rollback(const EndedJob& job);
// The input of an unblock: {"approve","digest","comment"}.
PatchApproval read_approval(std::string_view input, std::string_view actor,
                            Millis at_ms);

// difficulty - time/2 + 2 passed - failed - 1.5 traces + effort/2; time in
// seconds, what is not known is 0.
double enhancement_score(const PatchMetrics& metrics);

// ancestor: a summary with the strongest sources.
enum class ShowPatch { summary, ancestor, all };
void append_patch(JsonWriter& json, const PatchRecord& patch, ShowPatch show);

// At most `max` bytes of `text`, whole characters.
std::string cut(std::string_view text, std::size_t max);

}  // namespace machina
