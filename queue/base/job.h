// queue/base/job.h
//
// A job's words: its states, how an attempt can end, what a client may ask for
// and what a job looks like from outside. Values only; shared by the queue,
// the server and the workers.
//
//            +-------- dependencies unmet --------+
//   submit -> waiting -> scheduled -> ready -> running -> succeeded
//                          ^           ^        |  |  +-> failed
//                          |           |        |  |  +-> blocked -> ready
//                          |           + lease -+  +----> cancelled
//                          +--- retry  -  ends  -+------> dead

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/ids.h"

namespace machina {

enum class State : std::uint8_t {
  waiting = 0,    // dependencies unmet
  scheduled = 1,  // delayed, or between two attempts
  ready = 2,
  running = 3,
  blocked = 4,
  succeeded = 5,  // final, as all that follow
  failed = 6,
  cancelled = 7,
  dead = 8,
};
constexpr int kStates = 9;
constexpr bool is_final(State s) { return s >= State::succeeded; }
std::string_view name(State);
std::optional<State> parse_state(std::string_view);

// How an attempt (or a job) ended. `none` is success, or not ended yet.
enum class EndCode : std::uint8_t {
  none = 0,
  exit,
  signal,
  timeout,
  oom,
  pids,
  disk,
  output,
  sandbox,
  isolation_unavailable,
  lease_expired,
  worker_died,
  upstream,  // retried
  verdict,
  invalid_payload,  // -> failed
  cancelled,
  dependency,  // -> cancelled
};
constexpr int kEndCodes = 17;
std::string_view name(EndCode);
std::optional<EndCode> parse_end_code(std::string_view);

// How strong a sandbox is: L0 none .. L4 a virtual machine.
using Level = std::uint8_t;
constexpr Level kLevelMax = 4;

// Bounds. Each is part of the API's contract (docs/http-api.md).
constexpr std::size_t kKindBytesMax = 64;
constexpr std::size_t kQueueBytesMax = 64;
constexpr std::size_t kTenantBytesMax = 64;
constexpr std::size_t kWorkerBytesMax = 64;
constexpr std::size_t kDedupKeyBytesMax = 256;
constexpr std::size_t kConcurrencyKeyBytesMax = 256;  // of a client's
constexpr std::size_t kKindKeyBytesMax = 4352;        // of a kind's: a path
constexpr int kConcurrencyLimitMax = 10000;
constexpr std::size_t kDependsOnMax = 100;
constexpr std::size_t kLabelsMax = 16;
constexpr std::size_t kLabelKeyBytesMax = 64;
constexpr std::size_t kLabelValueBytesMax = 256;
constexpr std::size_t kPayloadBytesMax = 1 << 20;
constexpr std::size_t kResultBytesMax = 1 << 20;
constexpr std::size_t kMessageBytesMax = 4096;
constexpr int kPriorityMax = 9;
constexpr int kMaxAttemptsMax = 1000;
constexpr int kLeasesPerCallMax = 256;
constexpr int kBatchMax = 10000;  // jobs in one array or NDJSON request

// kind: [a-z][a-z0-9_]*(\.[a-z0-9_]+)*, at most 64 bytes.
bool valid_kind(std::string_view);
// queue, worker, label key: [A-Za-z0-9_][A-Za-z0-9_.:-]*, at most 64 bytes.
bool valid_name(std::string_view);
// "*", "test.*" or an exact kind. `*` stands only at the end.
bool valid_kind_pattern(std::string_view);
bool kind_matches(std::string_view pattern, std::string_view kind);

// What a client asks for; defaults are filled in by the server before it gets
// here. JSON members are raw, valid JSON text.
struct NewJob {
  std::string kind;
  std::string queue = "default";
  std::string tenant = "default";
  std::string payload = "{}";
  int priority = 5;
  Millis run_at_ms = 0;  // wall; 0: at once
  Millis delay_ms = 0;   // instead, where > 0: so long after it was accepted;
                         // a record has run_at_ms for it
  bool run_at_is_wall = false;  // of a record: run_at_ms was asked for, as a
                                // time of day; else it is how the wall clock
                                // stood when the delay was counted
  int max_attempts = 5;
  Millis retry_min_ms = 1000;
  Millis retry_max_ms = 300000;
  Millis timeout_ms = 0;  // 0: the kind's default
  Millis keep_result_ms = 86400000;
  std::string dedup_key;  // empty: none
  Millis dedup_ttl_ms = 300000;
  std::uint64_t payload_digest[2] = {0, 0};  // XXH3-128 of the canonical JSON,
                                             // set where dedup_key is
  std::vector<JobId> depends_on;
  std::string concurrency_key;          // empty: none
  std::uint16_t concurrency_limit = 0;  // where there is a key: 1..; else 0
  bool kind_key = false;  // the kind set it; no client's key is equal to it
  std::vector<std::pair<std::string, std::string>> labels;
  Level min_level = 0;
  std::string sandbox;      // raw JSON object or empty
  std::string traceparent;  // or empty
  std::string request_id;   // or empty
  bool operator==(const NewJob&) const = default;
};

// How an attempt ended, as the worker that held it says. JSON members are raw.
struct Outcome {
  EndCode code = EndCode::none;  // none: pass
  std::string message;
  std::string result;        // or empty: null
  std::string isolation;     // raw JSON object or empty
  std::string usage;         // "
  std::string side_effects;  // "
  std::vector<std::string> artifacts;
  bool retry = true;           // fail: false -> dead at once
  Millis retry_after_ms = -1;  // fail: replaces the backoff where >= 0
  bool operator==(const Outcome&) const = default;
};

// A job as anyone may see it. Built by the queue from its live entry, or from
// history; times are wall-clock milliseconds, 0 is none.
struct JobView {
  JobId id;
  State state = State::ready;
  std::string kind, queue, tenant;
  int priority = 5;
  int attempt = 0, max_attempts = 5;
  Millis created_ms = 0, run_at_ms = 0, started_ms = 0, finished_ms = 0;
  Millis timeout_ms = 0;
  std::string payload;  // raw JSON; empty where it was not asked for
  std::string result, isolation, usage, side_effects;  // raw JSON or empty
  EndCode error_code = EndCode::none;
  std::string error_message;
  int error_attempt = 0;
  int progress_percent = -1;  // -1: none was reported
  std::string progress_message;
  std::vector<std::pair<std::string, std::string>> labels;
  std::string dedup_key;
  bool duplicate = false;
  // Its dedup key is all that is left: id, kind, queue, tenant, state, attempt,
  // created_ms, finished_ms, error_code and dedup_key are true, the rest says
  // nothing.
  bool past_retention = false;
  std::vector<JobId> depends_on;
  std::vector<std::string> artifacts;
  bool fsync = true;  // "durability": "fsync", else "os"
  Level min_level = 0;
  bool waiting_for_level = false;  // ready, and no worker at its level leases
  std::string concurrency_key;     // empty: none
  int concurrency_limit = 0;
  bool kind_key = false;                 // the key is its kind's
  bool waiting_for_concurrency = false;  // ready, and its key has no slot free
  std::string sandbox;                   // raw JSON or empty
  std::string blocked_reason, blocked_data, blocked_token, input;
  Millis blocked_deadline_ms = 0;
  bool cancel_requested = false;
  std::string worker;
  std::string traceparent, request_id;
  Fence fence = 0;  // of the current lease, or of the last
};

// Which jobs a list asks for.
constexpr std::uint64_t kListBytesMax = 4u << 20;
struct ListQuery {
  std::vector<State> states;                                // empty: any
  std::string kind, queue;                                  // empty: any
  std::vector<std::pair<std::string, std::string>> labels;  // history only
  Millis since_ms = 0, until_ms = 0;  // by creation; 0: open
  int limit = 50;
  std::uint64_t bytes = kListBytesMax;  // about; one job more than it is given
  std::string cursor;                   // opaque, from the last page
};

}  // namespace machina
