// workers/kinds/handler.h
//
// The frames between a worker and the resident process of a handler group
// (workers/kinds/kinds.h). One stream socket; the process answers every call in
// the order of the calls. The process is confined before it reads a byte, and
// the worker checks what it answers.
//
//   call   := HandlerCall kind payload          (payload: raw JSON)
//   answer := HandlerAnswer message result      (result: raw JSON, or nothing)
//
// Numbers are of the machine's byte order: both ends are on one machine. A
// group's own program (argv) has the socket as its standard input and output.
//
//   G1  A kind that the process does not know fails its attempt; the process
//       goes on. (ProbeTest.AKindThatTheGroupDoesNotKnowFails)
//   G2  Beyond a kind's `check` and `quick`, which see text only, a payload is
//       read by the process alone, which is confined.

#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "queue/base/job.h"

namespace machina::kinds {

struct HandlerCall {
  std::uint32_t sequence = 0;
  std::uint32_t attempt = 1;
  std::uint32_t kind_bytes = 0;     // at most kKindBytesMax
  std::uint32_t payload_bytes = 0;  // at most kPayloadBytesMax
};
enum class HandlerOutcome : std::uint32_t {
  pass = 0,
  verdict = 1,       // the work was done, the answer is no
  failed = 2,        // another attempt may do better
  bad_payload = 3,   // none will
  unknown_kind = 4,  // G1
};
struct HandlerAnswer {
  std::uint32_t sequence = 0;  // the call's
  HandlerOutcome outcome = HandlerOutcome::pass;
  std::uint32_t message_bytes = 0;  // at most kMessageBytesMax
  std::uint32_t result_bytes = 0;   // at most kHandlerResultBytesMax
};
// The server refuses a result of more than kResultBytesMax and says so.
constexpr std::size_t kHandlerResultBytesMax = kPayloadBytesMax + 64;

// The body of a warmed kind: what comes in, and what goes out.
struct HandlerInput {
  std::string_view payload;  // raw JSON
  int attempt = 1;
};
struct HandlerOutput {
  HandlerOutcome outcome = HandlerOutcome::pass;
  std::string message, result;  // result: raw JSON, or empty
};
struct Handler {
  std::string_view kind;
  void (*handle)(const HandlerInput& in, HandlerOutput& out);
};

void append_call(std::string& out, std::uint32_t sequence, int attempt,
                 std::string_view kind, std::string_view payload);

// A group's process: answers calls until end-of-file. Runs confined.
int serve_handlers(std::span<const Handler> handlers, int in_fd, int out_fd);

}  // namespace machina::kinds
