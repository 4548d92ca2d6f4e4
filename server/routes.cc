// The route table, and the way from a request to its handler.

#include <algorithm>

#include "server/service.h"

namespace machina {

const std::vector<Route>& Service::routes() {
  using S = Service;
  using M = Method;
  constexpr auto open = Route::open;
  constexpr auto raw = Route::raw;
  constexpr std::uint8_t stream = Route::raw | Route::stream;
  static const std::vector<Route> table = {
      {M::post, "/v1/jobs", &S::post_jobs},
      {M::post, "/v1/leases", &S::post_leases},
      {M::post, "/v1/leases/complete", &S::post_complete_many},
      {M::post, "/v1/leases/heartbeat", &S::post_heartbeat},
      {M::get, "/v1/jobs", &S::list_jobs},
      {M::get, "/v1/jobs/{}", &S::get_job},
      {M::post, "/v1/jobs/cancel", &S::not_built},
      {M::post, "/v1/jobs/retry", &S::not_built},
      {M::post, "/v1/jobs/delete", &S::not_built},
      {M::post, "/v1/jobs/{}/cancel", &S::cancel_job},
      {M::post, "/v1/jobs/{}/retry", &S::retry_job},
      {M::post, "/v1/jobs/{}/unblock", &S::unblock_job},
      {M::get, "/v1/jobs/{}/logs", &S::get_logs},
      {M::get, "/v1/jobs/{}/artifacts", &S::list_artifacts},
      {M::get, "/v1/jobs/{}/artifacts/{}", &S::get_artifact},
      {M::post, "/v1/leases/{}/complete", &S::post_complete},
      {M::post, "/v1/leases/{}/fail", &S::post_fail},
      {M::post, "/v1/leases/{}/block", &S::post_block},
      {M::post, "/v1/leases/{}/release", &S::post_release},
      {M::post, "/v1/leases/{}/log", &S::post_log, raw, kLogChunkBytesMax},
      {M::put, "/v1/leases/{}/artifacts/{}", &S::put_artifact, stream,
       kArtifactBytesMax},
      {M::post, "/v1/pools/{}/sync", &S::post_sync},
      {M::get, "/v1/workers", &S::get_workers},
      {M::put, "/v1/workers/scale", &S::put_scale},
      {M::post, "/enqueue", &S::post_enqueue},
      {M::post, "/run_sync", &S::post_run_sync},
      {M::get, "/health", &S::get_health, open},
      {M::get, "/ready", &S::get_ready, open},
      {M::get, "/stats", &S::get_stats},
      {M::get, "/metrics", &S::get_metrics, open},
      {M::post, "/shutdown", &S::post_shutdown},
      {M::get, "/", &S::get_root, open},
      {M::get, "/openapi.json", &S::not_built, open},
      {M::get, "/v1/queues", &S::not_built},
      {M::put, "/v1/queues/{}", &S::not_built},
      {M::post, "/v1/queues/{}/pause", &S::not_built},
      {M::post, "/v1/queues/{}/resume", &S::not_built},
      {M::get, "/v1/schedules/{}", &S::not_built},
      {M::put, "/v1/schedules/{}", &S::not_built},
      {M::del, "/v1/schedules/{}", &S::not_built},
      {M::get, "/v1/events", &S::not_built},
  };
  return table;
}

namespace {

// Segments of `pattern` that are "{}" take one non-empty segment of `path`.
bool matches(std::string_view pattern, std::string_view path,
             std::array<std::string_view, 2>* args) {
  std::size_t taken = 0;
  while (true) {
    std::size_t hole = pattern.find('{');
    if (hole == pattern.npos) return pattern == path;
    if (path.substr(0, hole) != pattern.substr(0, hole)) return false;
    pattern.remove_prefix(hole + 2);
    path.remove_prefix(hole);
    std::size_t end = std::min(path.find('/'), path.size());
    if (end == 0) return false;
    (*args)[taken++] = path.substr(0, end);
    path.remove_prefix(end);
  }
}

Problem unauthorized() {
  Problem p;
  p.status = 401;
  p.code = "unauthorized";
  p.detail = "a valid bearer token is needed";
  return p;
}

// Without a token whoever is on this machine may ask; a web page that a browser
// on it has open may not. It shows itself by the page's origin, or, where its
// name was made to point here, by that name.
bool from_a_page(const Head& head) {
  if (head.host.empty()) return false;  // HTTP/1.0; no browser
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
  return !head.origin.empty() &&
         head.origin != "http://" + std::string(head.host);
}

Problem forbidden() {
  Problem p;
  p.status = 403;
  p.code = "forbidden";
  p.detail =
      "Host, Origin: without MACHINA_API_TOKEN only requests to a loopback "
      "name, and from no other page, are taken";
  return p;
}

bool plain_request_id(std::string_view id) {
  if (id.empty() || id.size() > kRequestIdBytesMax) return false;
  return std::all_of(id.begin(), id.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' ||
           c == ':' || c == '/' || c == '+' || c == '=';
  });
}

}  // namespace

std::uint64_t mono_us() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000 +
         static_cast<std::uint64_t>(t.tv_nsec) / 1000;
}

bool Service::authorized(const Peer& peer, const Head& head) const {
  if (peer.local || options_.api_token.empty()) return true;
  std::string_view given = head.authorization;
  constexpr std::string_view kBearer = "bearer ";
  if (given.size() <= kBearer.size() ||
      !equals_ignoring_case(given.substr(0, kBearer.size()), kBearer)) {
    return false;
  }
  given.remove_prefix(kBearer.size());
  while (!given.empty() && given.front() == ' ') given.remove_prefix(1);
  return same_secret(options_.api_token, given);
}

void Service::take_request_id(Pending& pending, const Head& head) {
  if (plain_request_id(head.request_id)) {
    pending.request_id_bytes =
        static_cast<std::uint8_t>(head.request_id.size());
    head.request_id.copy(pending.request_id, head.request_id.size());
    return;
  }
  // Unique in a run and unlike the last run's; no more is asked of it.
  std::uint64_t n =
      (++next_request_ +
       static_cast<std::uint64_t>(started_mono_) * 0x100000001b3ull) *
      0x9e3779b97f4a7c15ull;
  for (int i = 0; i < 16; ++i, n >>= 4) {
    pending.request_id[i] = "0123456789abcdef"[n & 15];
  }
  pending.request_id_bytes = 16;
}

// Decided before the body is read: who asks, what for, how much may come.
BodyPlan Service::head_read(Peer& peer, std::uint64_t sequence,
                            const Head& head) {
  peer.route = nullptr;
  peer.refusal.reset();
  Pending* pending = peer.connection.pending(sequence);
  take_request_id(*pending, head);
  pending->begun_us = mono_us();

  std::array<std::string_view, 2> args;
  std::string allow;
  for (const Route& route : routes()) {
    if (!matches(route.pattern, head.path, &args)) continue;
    if (route.method == head.method) {
      peer.route = &route;
      break;
    }
    std::string_view method = name(route.method);
    if (allow.find(method) == allow.npos) {
      if (!allow.empty()) allow += ", ";
      allow += method;
    }
  }
  BodyPlan plan{BodyPlan::buffer, options_.max_body_bytes};
  bool open = peer.route != nullptr && (peer.route->flags & Route::open) != 0;
  if (!open && !authorized(peer, head)) {
    peer.refusal = unauthorized();
  } else if (!open && !peer.local && options_.api_token.empty() &&
             from_a_page(head)) {
    peer.refusal = forbidden();
  } else if (peer.route == nullptr) {
    Problem p;
    p.status = allow.empty() ? 404 : 405;
    p.code = allow.empty() ? "not-found" : "method-not-allowed";
    p.detail =
        allow.empty() ? "there is no such path" : "this path takes " + allow;
    p.allow = allow;
    peer.refusal = std::move(p);
  } else {
    if (peer.route->max_body != 0) plan.max = peer.route->max_body;
    if ((peer.route->flags & Route::stream) != 0) {
      // A streamed body's handler begins here and ends in dispatch().
      (this->*peer.route->handle)(Exchange{peer, sequence, head, {}, args});
      if (!peer.refusal) plan.kind = BodyPlan::stream;
    }
  }
  if (peer.refusal) plan.kind = BodyPlan::discard;
  return plan;
}

void Service::dispatch(Peer& peer, std::uint64_t sequence, const Head& head,
                       std::string_view body) {
  if (peer.refusal) {
    Problem p = std::move(*peer.refusal);
    peer.refusal.reset();
    refuse(peer, sequence, p);
    return;
  }
  if ((peer.route->flags & Route::stream) != 0) {
    peer.upload->complete = true;
    pump_upload(peer.upload);
    return;
  }
  std::array<std::string_view, 2> args;
  matches(peer.route->pattern, head.path, &args);
  (this->*peer.route->handle)(Exchange{peer, sequence, head, body, args});
}

// --- Query strings ---------------------------------------------------------

namespace {

std::optional<std::string> decoded(std::string_view text) {
  std::string out;
  auto digit = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '+') {
      out += ' ';
    } else if (text[i] != '%') {
      out += text[i];
    } else {
      if (i + 2 >= text.size()) return std::nullopt;
      int high = digit(text[i + 1]), low = digit(text[i + 2]);
      if (high < 0 || low < 0) return std::nullopt;
      out += static_cast<char>(high << 4 | low);
      i += 2;
    }
  }
  if (!valid_utf8(out)) return std::nullopt;
  return out;
}

}  // namespace

std::optional<std::vector<std::pair<std::string, std::string>>> parse_query(
    std::string_view query) {
  std::vector<std::pair<std::string, std::string>> parameters;
  while (!query.empty()) {
    std::size_t end = std::min(query.find('&'), query.size());
    std::string_view one = query.substr(0, end);
    query.remove_prefix(std::min(end + 1, query.size()));
    if (one.empty()) continue;
    std::size_t equals = std::min(one.find('='), one.size());
    auto name = decoded(one.substr(0, equals));
    auto value = decoded(one.substr(std::min(equals + 1, one.size())));
    if (!name || !value) return std::nullopt;
    parameters.emplace_back(std::move(*name), std::move(*value));
  }
  return parameters;
}

}  // namespace machina
