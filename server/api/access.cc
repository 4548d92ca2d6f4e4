// The line about a request: what is noted when its head is read, and what is
// said when its reply is. A path is the client's own text: it is said only
// where it is one of ours and in plain characters, and is cut. Else its pattern
// is, or "other"; the query is left out, and so are leases' tokens.

#include <algorithm>

#include "queue/base/logger.h"
#include "server/api/service.h"

namespace machina {
namespace {

constexpr int kAccessPerSecond = 100, kTroublePerSecond = 20;
constexpr std::string_view kLeases = "/v1/leases/";
constexpr std::string_view kOtherPath = "other";

// Workers' verbs, and what machina top asks every second.
bool asked_often(std::string_view pattern) {
  return pattern.starts_with("/v1/leases") ||
         pattern.starts_with("/v1/pools") || pattern == "/v1/workers" ||
         pattern == "/stats";
}

// What ids and names consist of, as they are written: nothing to decode.
bool said_as_it_is(std::string_view path) {
  return std::all_of(path.begin(), path.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c >= '0' && c <= '9') || c == '/' || c == '-' || c == '_' ||
           c == '.' || c == '~' || c == ':' || c == '@';
  });
}

}  // namespace

Service::AccessLines::AccessLines()
    : requests(kAccessPerSecond), trouble(kTroublePerSecond) {}

void Service::note_request(Pending& pending, const Head& head,
                           const Route* route) {
  pending.method = name(head.method);
  pending.pattern = route == nullptr ? kOtherPath : route->pattern;
  if (route == nullptr) return;
  pending.quiet =
      (route->flags & Route::open) != 0 || asked_often(route->pattern);
  // Without a hole the pattern is the path; with a token it stays a secret.
  if (route->pattern.find('{') == route->pattern.npos ||
      route->pattern.starts_with(kLeases) || !said_as_it_is(head.path)) {
    return;
  }
  pending.path_bytes =
      static_cast<std::uint8_t>(std::min(head.path.size(), kSaidPathBytesMax));
  head.path.copy(pending.path, pending.path_bytes);
}

// On the way of every reply: what is not said must cost next to nothing.
void Service::say_reply(Peer& peer, const Pending& pending, int status) {
  using Access = ServerOptions::Access;
  // A probe that hears "not ready" has had its answer.
  bool trouble = (status >= 500 && !pending.quiet) || status == 500 ||
                 status == 401 || status == 403;
  Severity severity = trouble ? Severity::warn
                      : pending.quiet && options_.access != Access::all
                          ? Severity::debug
                          : Severity::info;
  if (!trouble && options_.access == Access::off) return;
  if (!logs_at(severity)) return;
  Allowance& allowed = trouble ? access_.trouble : access_.requests;
  if ((trouble || options_.access == Access::sampled) &&
      !allowed.take(loop_->now())) {
    return;
  }
  std::uint64_t took_us =
      pending.begun_us == 0 ? 0 : mono_us() - pending.begun_us;
  LogLine line(severity, "request", reason_phrase(status));
  line.with("request_id",
            std::string_view(pending.request_id, pending.request_id_bytes));
  line.with("method", pending.method);
  line.with("path", pending.path_bytes > 0
                        ? std::string_view(pending.path, pending.path_bytes)
                        : pending.pattern);
  line.with("status", status);
  line.with("duration_ms", static_cast<std::int64_t>(took_us / 1000));
  line.with("remote", peer.socket.remote());
  if (!pending.job.is_nil()) line.with("job", to_string(pending.job));
  if (auto n = allowed.suppressed(); n > 0) {
    line.with("suppressed", static_cast<std::int64_t>(n));
  }
}

}  // namespace machina
