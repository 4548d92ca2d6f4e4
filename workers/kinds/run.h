// workers/kinds/run.h
//
// What a kind's code is given to run one attempt and what it gives back. A kind
// sees its worker as a Host; it opens no connection and reads no clock but for
// its own deadline.

#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "queue/base/job.h"
#include "queue/base/result.h"
#include "workers/kinds/kinds.h"
#include "workers/sandbox/sandbox.h"

namespace machina::kinds {

struct Attempt {
  std::string job_id, tenant, kind, payload, sandbox, traceparent, request_id;
  std::string input;  // raw JSON: what an unblock gave, or empty
  int number = 1;
  Millis timeout_ms = 0;
  Level required = 0;
  sandbox::Limits limits;  // the kind's, with the job's `sandbox` applied
};

// "TRACEPARENT=..." and "JOB_REQUEST_ID=...", of what the attempt has: for
// every step that runs what the job brought.
std::vector<std::string> trace_variables(const Attempt& attempt);

struct Usage {
  Millis wall_ms = 0, cpu_ms = 0;
  std::uint64_t max_rss_bytes = 0, disk_bytes = 0, output_bytes = 0;
  // In a process that others share: all but wall_ms is "unavailable".
  bool shared = false;
  void add(const sandbox::StepResult& step);
  void add(const Usage& part);
  std::string json() const;
};

// How an attempt ended. `none` with `verdict_fail` false is a pass.
struct End {
  EndCode code = EndCode::none;  // verdict: the work was done, the answer is no
  std::string message;
  std::string result;        // raw JSON or empty
  std::string side_effects;  // raw JSON or empty
  std::vector<std::string> artifacts;
  Usage usage;
  bool retry = true;
  // Not empty: the attempt ends waiting for somebody's answer instead; `code`
  // and the rest but `usage` say nothing then.
  std::string block_reason, block_data;  // a word; raw JSON
};
End failed(EndCode code, std::string message);
End bad_payload(const BadField& problem);
End not_served(const std::string& kind);
// What apply_sandbox() refused, which no later attempt changes.
End bad_sandbox(const Error& refused);
End too_weak(Level required, Level given);
// Whether a text from outside is one JSON value.
bool whole_json(std::string_view text);

// The worker, as a kind sees it.
class Host {
 public:
  virtual ~Host() = default;
  virtual Result<std::unique_ptr<sandbox::Session>> open(
      const sandbox::SessionSpec& spec) = 0;
  // With cancel and wake filled in; live output goes to the job's log.
  virtual sandbox::Watch watch() = 0;
  virtual bool cancelled() const = 0;
  virtual void progress(int percent, const std::string& message) = 0;
  virtual void log(std::string_view bytes) = 0;
  // Stages an artifact; returns when the server has it.
  virtual Result<void> artifact(const std::string& name,
                                std::string_view bytes) = 0;
  // An artifact of another job of the same tenant. Code::not_found,
  // Code::too_large, Code::unavailable (cancelled).
  virtual Result<std::string> fetch_artifact(const std::string& job_id,
                                             const std::string& name,
                                             std::size_t bytes_max) = 0;
  // What the server knows of a patch, as JSON, or what takes it back.
  // Code::not_found, Code::unavailable (cancelled).
  virtual Result<std::string> fetch_patch(const std::string& patch_id,
                                          bool reverse_diff) = 0;
  virtual const KindSettings& settings() const = 0;
};

// The code of a step that did not simply exit; none where it did.
EndCode code_of(sandbox::Ended ended);
// The code of a put() that failed: `disk`; `invalid_payload` where no workspace
// can hold such a file; `sandbox` only where the sandbox failed.
EndCode code_of_put(const Error& error);
// The code of git's end, by what it said: `disk` of the workspace;
// `invalid_payload` where it names what the repository holds, which is the same
// each time; else `sandbox`: another attempt may find it otherwise.
EndCode code_of_git(const sandbox::StepResult& ran);
// What git says where a second attempt may see another state.
bool passing_trouble(const std::string& err);
// A sentence about it: "killed by signal 9", "ran longer than 500 ms".
std::string describe(const sandbox::StepResult& step,
                     const sandbox::Limits& limits, Millis timeout_ms);

// The job's `sandbox` member on top of the kind's limits. Code::invalid names
// the member; Code::unavailable is a profile this worker cannot give.
Result<void> apply_sandbox(const std::string& json, sandbox::Limits& limits,
                           Level& required);

// "LN" of a level, and back.
std::string level_name(Level level);

// Cuts `text` to its first and last bytes with a line that says so.
std::string head_and_tail(std::string_view text, std::size_t bytes_max);

}  // namespace machina::kinds
