// server/api/job_json.h
//
// Jobs as JSON: what clients and workers send becomes queue values, with every
// default filled in and every bound checked; what the queue shows becomes the
// job object of docs/http-api.md.
//
//   B1  Unknown members are refused (unknown-field); members of the contract
//       that are not built yet are refused too (not-implemented).
//   B2  A problem names the field, the value and the bound.

#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "queue/base/clock.h"
#include "queue/base/job.h"
#include "queue/base/json.h"
#include "queue/core/core.h"
#include "server/api/problem.h"
#include "server/api/server.h"

namespace machina {

// Bounds of members that the queue itself does not bound.
constexpr Millis kDelayMsMax = 315'360'000'000;    // ten years
constexpr Millis kTimeoutMsMax = 7 * 86'400'000;   // a week
constexpr Millis kRetryMsMax = 30 * 86'400'000ll;  // 30 days
constexpr Millis kDedupTtlMsMax = 30 * 86'400'000ll;
constexpr Millis kKeepMsMax = 315'360'000'000;
constexpr Millis kWaitMsMax = 30'000;  // of leases and syncs
constexpr std::size_t kArtifactNameBytesMax = 128;
constexpr std::size_t kArtifactsPerAttemptMax = 256;
constexpr std::size_t kBlockReasonBytesMax = 256;
constexpr std::size_t kBlockDataBytesMax = 64 * 1024;
// What a 413 for a job's submission adds.
constexpr char kLargeDiff[] =
    "; a patch's diff may be an artifact of another job instead "
    "(payload.diff_artifact)";
constexpr std::size_t kPatternsMax = 64;  // kinds, queues of a lease
constexpr std::size_t kSandboxBytesMax = 4096;

using MaybeProblem = std::optional<Problem>;

// What every new job of a request shares.
struct JobContext {
  const ServerOptions& options;
  Clock& clock;                       // for delays
  std::string_view traceparent = {};  // checked
  std::string_view request_id = {};
  std::string_view idempotency_key = {};
  std::string_view tenant = "default";
};

// With its kind's `check`. Where needs_host() says so, take_kept() with what
// the kind's `resolve` found is still to come.
MaybeProblem read_new_job(const JsonValue& json, const JobContext& context,
                          NewJob* job);
bool needs_host(const ServerOptions& options, const NewJob& job);
MaybeProblem take_kept(const ServerOptions& options,
                       Checked<KindFacts::Kept> kept, NewJob* job);
// What is wrong with the child `index` of a completion.
Problem of_child(Problem problem, std::size_t index);
// `token` is read too where it is not null (batches); the token member is
// otherwise unknown.
MaybeProblem read_completion(const JsonValue& json, const JobContext& context,
                             CompleteCommand::Item* item, std::string* token);
MaybeProblem read_failure(const JsonValue& json, Outcome* outcome);
MaybeProblem read_block(const JsonValue& json, BlockCommand* block);
constexpr std::size_t kSessionBytesMin = 16, kSessionBytesMax = 128;

// Tokens of `holding` are left as text.
struct LeaseBody {
  LeaseCommand command;
  std::optional<std::vector<std::string>> holding;
  std::string session;  // its secret; empty: a first call
  Millis wait_ms = 0;
};
// Of a worker's or a pool's session; null is as absent.
MaybeProblem read_session(const JsonValue& v, std::string* secret);
MaybeProblem read_lease(const JsonValue& json, LeaseBody* lease);
struct HeartbeatBody {
  struct Item {
    std::string token;
    int percent = -1;
    std::string message;
  };
  std::vector<Item> items;
  Millis wait_ms = 0;
};
MaybeProblem read_heartbeat(const JsonValue& json, HeartbeatBody* out);

// Single members; `field` is their full name for problems.
// "0..86400000 ms": the unit is what the field's name ends in.
std::string range_text(std::string_view field, std::int64_t min,
                       std::int64_t max);
MaybeProblem read_integer(const JsonValue& v, std::string_view field,
                          std::int64_t min, std::int64_t max,
                          std::int64_t* out);
MaybeProblem read_string(const JsonValue& v, std::string_view field,
                         std::size_t max_bytes, std::string* out);
MaybeProblem read_bool(const JsonValue& v, std::string_view field, bool* out);
MaybeProblem read_level(const JsonValue& v, std::string_view field, Level* out);
Problem unknown_field(std::string_view field);
std::string level_name(Level level);
std::optional<Level> parse_level(std::string_view text);
bool valid_artifact_name(std::string_view name);

// How much of a job is shown: all; without payload (workers' verbs); without
// payload and result (lists).
enum class Show { all, no_payload, summary };
// `served`: whether a worker that is connected serves the kind, where that is
// said. `waiting_reason`: why no worker can take it, where it waits for one.
void append_job(JsonWriter& json, const JobView& job, Show show,
                std::optional<bool> served = std::nullopt,
                std::string_view waiting_reason = {});

}  // namespace machina
