// The route table, and the way from a request to its handler.

#include <algorithm>

#include "queue/base/hex.h"
#include "queue/base/utf8.h"
#include "server/api/service.h"

namespace machina {

const std::vector<Route>& routes() {
  static const std::vector<Route> table = [] {
    std::vector<Route> all;
    for (auto rows : {job_routes(), worker_routes(), file_routes(),
                      patch_routes(), pool_routes(), ops_routes()}) {
      all.insert(all.end(), rows.begin(), rows.end());
    }
    return all;
  }();
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
  write_hex(pending.request_id, n);
  pending.request_id_bytes = 16;
}

// --- Which route -----------------------------------------------------------

// A segment is decoded after the path was split: an encoded slash is no
// separator to some and one to others, so no path of ours has it: "". Null: it
// cannot be decoded.
std::optional<std::string_view> Service::plain_path(const Head& head) {
  if (head.path.find('%') == head.path.npos) return head.path;
  path_.clear();
  for (std::size_t i = 0; i < head.path.size(); ++i) {
    char c = head.path[i];
    if (c == '%') {
      if (i + 2 >= head.path.size()) return std::nullopt;
      int high = hex_value(head.path[i + 1]), low = hex_value(head.path[i + 2]);
      if (high < 0 || low < 0) return std::nullopt;
      c = static_cast<char>(high << 4 | low);
      auto u = static_cast<unsigned char>(c);
      if (c == '/' || c == '\\' || u < 0x20 || u == 0x7f) return "";
      i += 2;
    }
    path_ += c;
  }
  if (!valid_utf8(path_)) return std::nullopt;
  return path_;
}

namespace {

// Two readers could take different ones of two parameters of one name.
MaybeProblem parameter_twice(std::string_view query) {
  if (query.empty()) return std::nullopt;
  auto parameters = parse_query(query);
  if (!parameters) return std::nullopt;  // whoever reads it says so
  std::set<std::string_view> seen;
  for (const auto& [name, value] : *parameters) {
    if (!seen.insert(name).second) {
      return bad_field(name, "the parameter is there twice");
    }
  }
  return std::nullopt;
}

}  // namespace

MaybeProblem Service::route(const Head& head, const Route** found,
                            std::array<std::string_view, 2>* args) {
  *found = nullptr;
  Problem p;
  auto path = plain_path(head);
  if (!path) {
    p.detail =
        "path: its percent-encoding is malformed (%XX, two hexadecimal digits, "
        "UTF-8)";
    return p;
  }
  Method method = head.method == Method::head ? Method::get : head.method;
  std::string allow;
  for (const Route& route : routes()) {
    if (!matches(route.pattern, *path, args)) continue;
    if (route.method == method) {
      *found = &route;
      return parameter_twice(head.query);
    }
    std::string_view other = name(route.method);
    if (allow.find(other) == allow.npos) {
      if (!allow.empty()) allow += ", ";
      allow += other;
      if (route.method == Method::get) allow += ", HEAD";
    }
  }
  p.status = allow.empty() ? 404 : 405;
  p.code = allow.empty() ? "not-found" : "method-not-allowed";
  p.detail =
      allow.empty() ? "there is no such path" : "this path takes " + allow;
  p.allow = allow;
  return p;
}

// What is brought for a lease that is none, or no more, is not kept. A
// completion that is repeated has the stored answer, whatever it brings now:
// `wanted` is false.
MaybeProblem Service::look_at_lease(const Route& route, std::string_view token,
                                    bool* wanted) {
  if (!route.pattern.starts_with("/v1/leases/{}")) return std::nullopt;
  Fence fence = 0;
  if (auto p = check_token(token, &fence)) return p;
  *wanted = shard_->leased(fence);
  if (*wanted || (route.flags & Route::repeats) != 0) return std::nullopt;
  return stale_lease();
}

// Decided before the body is read: who asks, what for, how much may come.
BodyPlan Service::head_read(Peer& peer, std::uint64_t sequence,
                            const Head& head) {
  peer.refusal.reset();
  Pending* pending = peer.connection.pending(sequence);
  take_request_id(*pending, head);
  pending->begun_us = mono_us();

  std::array<std::string_view, 2> args;
  MaybeProblem nowhere = route(head, &peer.route, &args);
  std::uint16_t flags = peer.route == nullptr ? 0 : peer.route->flags;
  pending->plain_errors = (flags & Route::plain) != 0;
  note_request(*pending, head, peer.route);
  BodyPlan plan{BodyPlan::buffer, options_.max_body_bytes};
  peer.refusal =
      door_->let_in(peer.visitor, head, peer.route, &pending->limits);
  if (!peer.refusal) peer.refusal = std::move(nowhere);
  if (peer.route != nullptr && peer.route->max_body != 0) {
    plan.max = peer.route->max_body;
  }
  pending->principal = peer.visitor.principal;
  bool wanted = true;
  if (!peer.refusal) {
    peer.refusal =
        Doorkeeper::look_at_scopes(*peer.route, *peer.visitor.principal);
  }
  if (!peer.refusal) {
    peer.refusal = look_at_lease(*peer.route, args[0], &wanted);
  }
  bool stream = (flags & Route::stream) != 0;
  if (stream && !peer.refusal) {
    // A streamed body's handler begins here and ends in dispatch().
    peer.route->handle(
        *this,
        Exchange{peer, sequence, head, *peer.visitor.principal, {}, args});
  }
  if (peer.visitor.entry == Gate::Entry::after_body) {
    // Even what will be refused is read: its digest says who asked, and before
    // that nothing is told.
    if (stream) {
      plan.kind = BodyPlan::stream;
      if (peer.digest == nullptr) peer.digest = std::make_unique<Sha256>();
      (void)peer.digest->finish();
    } else {
      // What came counts, not what was announced.
      plan.counted = !peer.visitor.proved;
    }
  } else if (peer.refusal || !wanted) {
    plan.kind = BodyPlan::discard;
  } else if (stream) {
    plan.kind = BodyPlan::stream;
  }
  return plan;
}

void Service::dispatch(Peer& peer, std::uint64_t sequence, const Head& head,
                       std::string_view body) {
  bool stream =
      peer.route != nullptr && (peer.route->flags & Route::stream) != 0;
  door_->release(peer.visitor);
  if (peer.visitor.entry == Gate::Entry::after_body) {
    HexDigest digest = stream ? peer.digest->finish() : Sha256::of(body);
    if (auto p =
            door_->let_in_signed(peer.visitor, head, peer.route, digest,
                                 &peer.connection.pending(sequence)->limits)) {
      // What was staged of the body stays out.
      if (peer.upload != nullptr && peer.upload->sequence == sequence) {
        peer.upload->dead = true;
        peer.upload.reset();
      }
      peer.refusal.reset();
      return refuse(peer, sequence, *p);
    }
  }
  if (peer.refusal) {
    Problem p = std::move(*peer.refusal);
    peer.refusal.reset();
    refuse(peer, sequence, p);
    return;
  }
  if (stream) {
    peer.upload->complete = true;
    pump_upload(peer.upload);
    return;
  }
  // Small ones, the most by far, are not weighed. What a job is answered with
  // that was small when it was asked for: reply_job().
  const std::uint64_t weight = peer.route->weigh != nullptr
                                   ? peer.route->weigh(head, body)
                                   : peer.route->weight;
  if (weight > kSmallAnswerBytes) {
    const bool alone = weight > kUnsentMax;
    if (alone) peer.connection.mark_large(sequence);
    // What stays behind another answer would be kept as long as that one is.
    if ((alone && !is_front(peer, sequence)) || crowded(peer, weight)) {
      peer.later = std::make_unique<Later>(sequence, weight, head, body);
      return join_crowd(peer);
    }
    weigh(peer, *peer.connection.pending(sequence), weight);
  }
  handle(peer, sequence, head, body);
}

void Service::handle(Peer& peer, std::uint64_t sequence, const Head& head,
                     std::string_view body) {
  std::array<std::string_view, 2> args;
  auto path = plain_path(head);
  matches(peer.route->pattern, *path, &args);
  peer.route->handle(*this, Exchange{peer, sequence, head,
                                     *peer.visitor.principal, body, args});
}

// --- Room for answers -------------------------------------------------------

Later::Later(std::uint64_t which, std::uint64_t how_much, const Head& from,
             std::string_view with)
    : sequence(which), weight(how_much), body(with), head(from) {
  std::size_t bytes = 0;
  for (auto view : kHeadViews) bytes += (from.*view).size();
  text.reserve(bytes);
  for (auto view : kHeadViews) {
    const std::size_t at = text.size();
    text += from.*view;
    head.*view = std::string_view(text).substr(at);
  }
}

// What the peers have not taken yet, what this turn has made for them, and what
// those may come to that are being made.
bool Service::crowded(const Peer& peer, std::uint64_t weight) const {
  return loop_->unsent_bytes() + made_ + weights_ + weight >
         (peer.local ? 2 * kUnsentAllMax : kUnsentAllMax);
}

bool Service::is_front(const Peer& peer, std::uint64_t sequence) const {
  return peer.connection.first_open() == sequence;
}

void Service::weigh(Peer& peer, Pending& pending, std::uint64_t weight) {
  pending.room += weight;
  peer.weight += weight;
  weights_ += weight;
}

void Service::unweigh(Peer& peer, Pending& pending) {
  const std::uint64_t room = std::exchange(pending.room, 0);
  peer.weight -= room;
  weights_ -= room;
}

void Service::weigh_kept(Peer& peer) {
  const std::uint64_t kept = peer.connection.kept();
  weights_ += kept - peer.kept;
  peer.kept = kept;
}

// The answer may say again what was told: it is made at once where there is
// room for it now.
void Service::keep_room(const Exchange& call) {
  Peer& peer = call.peer;
  const std::uint64_t bytes = call.body.size();
  if (bytes <= kSmallAnswerBytes || crowded(peer, bytes)) return;
  if (is_front(peer, call.sequence) ||
      peer.weight + peer.kept + bytes <= kUnsentMax) {
    weigh(peer, *peer.connection.pending(call.sequence), bytes);
  }
}

// How much room the first of its answers waits for; 0: it does not.
std::uint64_t Service::waits_for(Peer& peer) const {
  const std::uint64_t front = peer.connection.first_open();
  const Pending* pending = peer.connection.pending(front);
  if (pending == nullptr) return 0;
  if (peer.later != nullptr && peer.later->sequence == front) {
    return peer.later->weight;
  }
  return pending->left_out;
}

// Who has not taken what was made for him gets no place: on_drained().
void Service::join_crowd(Peer& peer) {
  if (peer.in_crowd || peer.socket.unsent() > kUnsentMax ||
      waits_for(peer) == 0) {
    return;
  }
  peer.in_crowd = true;
  crowd_.push_back(peer.id);
  // This turn may be over, and nothing else to come.
  if (crowd_.size() == 1) loop_->post([this] { let_crowd_in(); });
}

// Whether the first that waits for room has it, or has gone.
bool Service::crowd_goes_on() {
  if (crowd_.empty()) return false;
  Peer* p = peer(crowd_.front());
  if (p == nullptr) return true;
  const std::uint64_t weight = waits_for(*p);
  return weight == 0 || !crowded(*p, weight);
}

void Service::let_crowd_in() {
  while (crowd_goes_on()) {
    Peer* p = peer(crowd_.front());
    crowd_.pop_front();
    if (p == nullptr) continue;
    p->in_crowd = false;
    const std::uint64_t weight = waits_for(*p);
    if (weight == 0) continue;
    const std::uint64_t sequence = p->connection.first_open();
    Pending& pending = *p->connection.pending(sequence);
    weigh(*p, pending, weight);
    if (p->later != nullptr && p->later->sequence == sequence) {
      const auto later = std::move(p->later);
      handle(*p, sequence, later->head, later->body);
    } else {
      ask_left_out(*p, sequence, pending);
    }
    after(*p);
  }
}

// While room is short it is not for those who do not take what was made, nor
// for what waits behind a call that is parked.
void Service::cut_stalled(Peer& peer, Millis now) {
  if (!crowd_.empty() && peer.kept > kSmallAnswerBytes && !poisoned_) {
    shard_->hurry(0, peer.id);
  }
  const std::uint64_t sent = peer.socket.sent();
  if (peer.socket.unsent() == 0 || sent != peer.took) {
    peer.took = sent;
    peer.took_at = now;
    return;
  }
  if (now - peer.took_at <= kStalledFullMs ||
      (crowd_.empty() && loop_->unsent_bytes() < kUnsentAllMax / 2)) {
    return;
  }
  metrics_.cut_off();
  close(peer);
}

// --- Query strings ---------------------------------------------------------

namespace {

std::optional<std::string> decoded(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '+') {
      out += ' ';
    } else if (text[i] != '%') {
      out += text[i];
    } else {
      if (i + 2 >= text.size()) return std::nullopt;
      int high = hex_value(text[i + 1]), low = hex_value(text[i + 2]);
      if (high < 0 || low < 0) return std::nullopt;
      out += static_cast<char>(high << 4 | low);
      i += 2;
    }
  }
  if (!valid_utf8(out)) return std::nullopt;
  return out;
}

}  // namespace

std::string without_cursor(std::string_view query) {
  std::string rest;
  while (!query.empty()) {
    std::size_t end = std::min(query.find('&'), query.size());
    std::string_view one = query.substr(0, end);
    query.remove_prefix(std::min(end + 1, query.size()));
    if (one.empty() || one.substr(0, 7) == "cursor=") continue;
    rest += std::string(one) + "&";
  }
  return rest;
}

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
