// workers/kinds/noop.h
//
// noop: does nothing, in the ways that a test needs. Its handler is warmed: a
// resident process, confined before it reads a byte, that is sent frames over
// one socket and answers them in order.
//
//   request := NoopRequest echo      (echo: raw JSON, request.echo_bytes long)
//   reply   := NoopReply result      (result: raw JSON, reply.result_bytes)
//
// Both ends are the same build of one program on one machine, so the structs
// travel as they lie in memory. The worker still bounds what it reads: the
// handler is the less trusted end.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "queue/base/job.h"
#include "queue/base/result.h"

namespace machina::kinds {

struct NoopRequest {
  std::uint32_t sequence = 0;
  std::uint32_t sleep_ms = 0;
  std::uint32_t attempt = 1;
  std::uint32_t fail_attempts = 0;
  std::uint32_t fail = 0;
  std::uint32_t crash = 0;
  std::uint32_t echo_bytes = 0;
};
enum class NoopOutcome : std::uint32_t { pass = 0, verdict = 1, exit = 2 };
struct NoopReply {
  std::uint32_t sequence = 0;
  NoopOutcome outcome = NoopOutcome::pass;
  std::uint32_t result_bytes = 0;
};
constexpr std::uint32_t kNoopSleepMsMax = 3'600'000;
constexpr std::size_t kNoopReplyBytesMax = kPayloadBytesMax + 64;

struct NoopPayload {
  NoopRequest request;
  std::string_view echo = "{}";  // into the payload's text
};
Result<NoopPayload> parse_noop(const std::string& payload);

// The handler: serves until end-of-file. Runs confined.
int noop_handler(int in_fd, int out_fd);

// A frame, and a list of them.
void append_frame(std::string& out, const NoopPayload& payload);

}  // namespace machina::kinds
