#include "workers/kinds/noop.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <cstring>

#include "queue/base/json_view.h"
#include "queue/base/utf8.h"

namespace machina::kinds {
namespace {

bool number(std::string_view key, std::string_view value, std::uint32_t most,
            std::uint32_t& into, std::string& problem) {
  const auto parsed = json::integer(value);
  if (!parsed || *parsed < 0 || *parsed > most) {
    problem = std::string(key) + ": " + std::string(utf8_head(value, 80)) +
              " is not an integer in 0.." + std::to_string(most);
    return false;
  }
  into = static_cast<std::uint32_t>(*parsed);
  return true;
}

bool flag(std::string_view key, std::string_view value, std::uint32_t& into,
          std::string& problem) {
  const auto parsed = json::boolean(value);
  if (!parsed) {
    problem = std::string(key) + ": " + std::string(utf8_head(value, 80)) +
              " is not true or false";
    return false;
  }
  into = *parsed ? 1 : 0;
  return true;
}

bool read_all(int fd, void* into, std::size_t bytes) {
  auto* at = static_cast<char*>(into);
  while (bytes > 0) {
    const ssize_t n = ::read(fd, at, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n;
    bytes -= static_cast<std::size_t>(n);
  }
  return true;
}

bool write_all(int fd, const std::string& out) {
  std::size_t at = 0;
  while (at < out.size()) {
    const ssize_t n = ::write(fd, out.data() + at, out.size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += static_cast<std::size_t>(n);
  }
  return true;
}

void sleep_for(std::uint32_t ms) {
  timespec left{static_cast<time_t>(ms / 1000),
                static_cast<long>(ms % 1000) * 1'000'000};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

// One job. What a failing attempt says is its code, so it has no result.
void serve(const NoopRequest& request, std::string_view echo,
           std::string& out) {
  if (request.crash != 0) abort();
  if (request.sleep_ms > 0) sleep_for(request.sleep_ms);
  NoopReply reply;
  reply.sequence = request.sequence;
  std::string result;
  if (request.attempt <= request.fail_attempts) {
    reply.outcome = NoopOutcome::exit;
  } else {
    if (request.fail != 0) reply.outcome = NoopOutcome::verdict;
    result = "{\"echo\":" + std::string(echo) + "}";
  }
  reply.result_bytes = static_cast<std::uint32_t>(result.size());
  out.append(reinterpret_cast<const char*>(&reply), sizeof reply);
  out += result;
}

}  // namespace

Result<NoopPayload> parse_noop(const std::string& payload) {
  NoopPayload out;
  std::string problem;
  const bool good = json::members(payload, [&](auto key, auto value) {
    NoopRequest& r = out.request;
    if (key == "echo") {
      out.echo = value;
      return true;
    }
    if (key == "sleep_ms")
      return number(key, value, kNoopSleepMsMax, r.sleep_ms, problem);
    if (key == "fail_attempts")
      return number(key, value, kMaxAttemptsMax, r.fail_attempts, problem);
    if (key == "fail") return flag(key, value, r.fail, problem);
    if (key == "crash") return flag(key, value, r.crash, problem);
    problem = std::string(key) + ": not a member of this kind's payload";
    return false;
  });
  if (!problem.empty()) return Error{Code::invalid, problem};
  if (!good) return Error{Code::invalid, "payload: not a JSON object"};
  out.request.echo_bytes = static_cast<std::uint32_t>(out.echo.size());
  return out;
}

void append_frame(std::string& out, const NoopPayload& payload) {
  out.append(reinterpret_cast<const char*>(&payload.request),
             sizeof payload.request);
  out += payload.echo;
}

// Reads as much as there is and answers what is whole, so that a pipelined run
// costs one read and one write.
int noop_handler(int in_fd, int out_fd) {
  std::string in, out;
  char buffer[64 << 10];
  for (;;) {
    const ssize_t n = ::read(in_fd, buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n == 0 ? 0 : 1;
    in.append(buffer, static_cast<std::size_t>(n));
    std::size_t at = 0;
    NoopRequest request;
    while (in.size() - at >= sizeof request) {
      std::memcpy(&request, in.data() + at, sizeof request);
      if (request.echo_bytes > kPayloadBytesMax) return 2;
      const std::size_t whole = sizeof request + request.echo_bytes;
      if (in.size() - at < whole) {
        // A large echo: the rest of it comes next, and nothing else does.
        const std::size_t have = in.size() - at;
        in.resize(at + whole);
        if (!read_all(in_fd, in.data() + at + have, whole - have)) return 1;
      }
      serve(
          request,
          std::string_view(in).substr(at + sizeof request, request.echo_bytes),
          out);
      at += whole;
      if (out.size() > sizeof buffer) {
        if (!write_all(out_fd, out)) return 1;
        out.clear();
      }
    }
    in.erase(0, at);
    if (!write_all(out_fd, out)) return 1;
    out.clear();
  }
}

}  // namespace machina::kinds
