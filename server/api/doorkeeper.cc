#include "server/api/doorkeeper.h"

#include <algorithm>

#include "queue/base/logger.h"
#include "server/api/service.h"

namespace machina {
namespace {

// Without a token whoever is on this machine may ask; a web page that a browser
// on it has open may not. It shows itself by the page's origin, or, where its
// name was made to point here, by that name.
bool from_a_page(const Head& head) {
  // HTTP/1.0: no browser, unless something before us made it of a page's.
  if (head.host.empty()) return head.has_origin;
  std::string_view host = head.host;
  if (host.front() == '[') {
    host = host.substr(1, std::min(host.find(']'), host.size()) - 1);
  } else {
    host = host.substr(0, host.find(':'));
  }
  // A name without a dot is nobody's on the internet: it cannot be made to
  // point here by a stranger.
  if (!is_loopback(std::string(host)) && host.find('.') != host.npos) {
    return true;
  }
  return head.has_origin && head.origin != "http://" + std::string(head.host);
}

Problem forbidden() {
  Problem p;
  p.status = 403;
  p.code = "forbidden";
  p.detail =
      "Host, Origin: without MACHINA_API_TOKEN or MACHINA_API_HMAC_SECRET only "
      "requests to a loopback name, and from no other page, are taken";
  return p;
}

}  // namespace

Doorkeeper::Doorkeeper(const ServerOptions& options, Clock& clock,
                       const Loop& loop, Metrics& metrics)
    : clock_(clock),
      loop_(loop),
      metrics_(metrics),
      limits_({options.rpm, options.enqueue_rpm, options.run_sync_rpm}),
      wrong_({kWrongCredentialsPerMinute, 0, 0}) {}

Result<std::unique_ptr<Doorkeeper>> Doorkeeper::open(
    const ServerOptions& options, const std::vector<Credential>& more,
    Clock& clock, const Loop& loop, Metrics& metrics) {
  Gate::Options gate;
  gate.token = options.api_token;
  gate.secret = options.hmac_secret;
  gate.credentials = more;
  gate.all = options.both_credentials;
  gate.window_ms = options.hmac_window_ms;
  gate.nonce_dir = options.root + "/queue";
  auto opened = Gate::open(gate, clock.wall_ms(), clock.mono_ms());
  if (!opened) return opened.error();
  std::unique_ptr<Doorkeeper> door(
      new Doorkeeper(options, clock, loop, metrics));
  door->gate_ = std::move(*opened);
  return door;
}

// One answer whatever was wrong (A1); the log has the cause, now and then.
MaybeProblem Doorkeeper::unauthorized(Visitor& visitor, Gate::Cause cause,
                                      bool presented) {
  metrics_.unauthorized();
  Millis now = loop_.now();
  if (presented) {
    wrong_.take({visitor.socket.address().counted(), 0}, 1u << 0, now);
  }
  if (now - cause_said_ms_ >= kCauseEveryMs) {
    LogLine(Severity::warn, "unauthorized", Gate::text(cause))
        .with("remote", visitor.socket.address().text())
        .with("more", static_cast<std::int64_t>(causes_unsaid_));
    cause_said_ms_ = now;
    causes_unsaid_ = 0;
  } else {
    ++causes_unsaid_;
  }
  Problem p;
  p.status = 401;
  p.code = "unauthorized";
  p.detail = "a valid credential is needed";
  return p;
}

MaybeProblem Doorkeeper::let_in(Visitor& visitor, const Head& head,
                                const Route* route, LimitNote* note) {
  visitor.entry = Gate::Entry::granted;
  visitor.principal = visitor.local ? &gate_->host() : &gate_->local();
  const bool open = route != nullptr && (route->flags & Route::open) != 0;
  if (open || visitor.local) return std::nullopt;
  visitor.credential = 0;
  if (!gate_->closed()) {
    if (from_a_page(head)) return forbidden();
    return spend(visitor, head, route, note);
  }
  Gate::Cause cause = Gate::Cause::none;
  bool presented = false;
  Gate::Entry entry = gate_->look(head, &cause, &presented, &visitor.principal);
  if (presented && !visitor.proved) {
    // Whoever guesses too much is not told whether the next guess was right.
    int wait =
        wrong_.wait_s({visitor.socket.address().counted(), 0}, 0, loop_.now());
    if (wait > 0) {
      metrics_.limited(3);
      Problem p;
      p.status = 429;
      p.code = "rate-limited";
      p.detail =
          "too many wrong credentials came from this address; the next "
          "one is looked at in " +
          std::to_string(wait) + " s";
      p.retry_after = wait;
      return p;
    }
  }
  if (entry == Gate::Entry::refused) {
    return unauthorized(visitor, cause, presented);
  }
  if (entry == Gate::Entry::after_body) {
    visitor.entry = entry;
    visitor.head_wall_ms = clock_.wall_ms();
    return std::nullopt;
  }
  visitor.proved = true;
  visitor.credential = 1;
  return spend(visitor, head, route, note);
}

MaybeProblem Doorkeeper::let_in_signed(Visitor& visitor, const Head& head,
                                       const Route* route,
                                       const HexDigest& body, LimitNote* note) {
  visitor.entry = Gate::Entry::granted;
  Gate::Cause cause = Gate::Cause::none;
  switch (gate_->verify(head, body, visitor.head_wall_ms, clock_.mono_ms(),
                        &cause)) {
    case Gate::Entry::granted:
      break;
    case Gate::Entry::full: {
      Problem p;
      p.status = 503;
      p.code = "nonces-full";
      p.retry_after = gate_->retry_s(clock_.mono_ms());
      p.detail = std::to_string(kNoncesMax) +
                 " nonces are remembered, the most that are; sign again later";
      return p;
    }
    default:
      return unauthorized(visitor, cause, true);
  }
  visitor.proved = true;
  visitor.credential = 2;
  // Refused here, a request may come again with the same signature.
  if (auto limited = spend(visitor, head, route, note)) return limited;
  gate_->record(head);
  return std::nullopt;
}

MaybeProblem Doorkeeper::look_at_scopes(const Route& route,
                                        const Principal& who) {
  const std::uint8_t needed =
      (route.flags & Route::open) != 0      ? 0
      : (route.flags & Route::worker) != 0  ? Principal::worker
      : (route.flags & Route::operate) != 0 ? Principal::operate
                                            : Principal::client;
  if ((who.scopes & needed) == needed) return std::nullopt;
  Problem p;
  p.status = 403;
  p.code = "forbidden";
  p.detail = "this credential has not the scope that the path needs";
  return p;
}

void Doorkeeper::release(Visitor& visitor) {
  unproved_bytes_ -= visitor.reserved;
  visitor.reserved = 0;
}

MaybeProblem Doorkeeper::spend(Visitor& visitor, const Head& head,
                               const Route* route, LimitNote* note) {
  if (limits_.active() == 0) return std::nullopt;
  const std::uint16_t flags = route == nullptr ? 0 : route->flags;
  if ((flags & Route::worker) != 0) return std::nullopt;
  auto mask = static_cast<std::uint8_t>(1u << kRequests);
  if ((flags & Route::enqueue) != 0) mask |= 1u << kEnqueues;
  if ((flags & Route::waits) != 0 ||
      ((flags & Route::may_wait) != 0 && preferred_wait(head.prefer) > 0)) {
    mask |= 1u << kRunSyncs;
  }
  Limits::Taken taken =
      limits_.take({visitor.socket.address().counted(), visitor.credential},
                   mask, loop_.now());
  *note = taken.note;
  if (taken.wait_s == 0) return std::nullopt;
  metrics_.limited(taken.limit);
  static constexpr const char* kVariables[] = {
      "MACHINA_API_RPM", "MACHINA_API_ENQUEUE_RPM", "MACHINA_API_RUNSYNC_RPM"};
  Problem p;
  p.status = 429;
  p.code = "rate-limited";
  p.retry_after = taken.wait_s;
  p.detail = std::string(kVariables[taken.limit]) + ": its " +
             std::to_string(limits_.rpm(taken.limit)) +
             " a minute are used up; the next is taken in " +
             std::to_string(taken.wait_s) + " s";
  return p;
}

void Doorkeeper::spend_jobs(const Visitor& visitor, LimitNote* note,
                            std::size_t jobs) {
  if (jobs < 2 || (note->mask >> kEnqueues & 1) == 0) return;
  limits_.charge({visitor.socket.address().counted(), visitor.credential},
                 kEnqueues, static_cast<double>(jobs - 1), loop_.now(), note);
}

std::optional<HttpError> Doorkeeper::hold(Visitor& visitor, std::size_t bytes) {
  if (unproved_bytes_ + bytes > kUnprovedBytesMax) {
    return HttpError{503, "busy",
                     "bodies of " + std::to_string(kUnprovedBytesMax) +
                         " bytes wait for their signatures, the most that may"};
  }
  unproved_bytes_ += bytes;
  visitor.reserved += bytes;
  return std::nullopt;
}

// draft-ietf-httpapi-ratelimit-headers-10: what the limits are, and what is
// left of them.
void Doorkeeper::append_limits(std::string* out, const LimitNote& note) const {
  *out += "RateLimit-Policy: ";
  const char* comma = "";
  for (std::size_t i = 0; i < kLimits; ++i) {
    if ((note.mask >> i & 1) == 0) continue;
    *out += comma;
    *out += '"';
    *out += kLimitNames[i];
    *out += "\";q=";
    append_number(out, limits_.rpm(i));
    *out += ";w=60";
    comma = ", ";
  }
  *out += "\r\nRateLimit: ";
  comma = "";
  for (std::size_t i = 0; i < kLimits; ++i) {
    if ((note.mask >> i & 1) == 0) continue;
    *out += comma;
    *out += '"';
    *out += kLimitNames[i];
    *out += "\";r=";
    append_number(out, static_cast<std::uint64_t>(note.left[i]));
    *out += ";t=";
    append_number(out, static_cast<std::uint64_t>(note.full_s[i]));
    comma = ", ";
  }
  *out += "\r\n";
}

}  // namespace machina
