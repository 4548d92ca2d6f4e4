// Pools over HTTP: a pool's sync, what is shown of workers, how many there are
// to be. What pools said is in pools.h.

#include "server/api/service.h"

namespace machina {

// --- A pool's sync ---------------------------------------------------------

// The leases of workers that are no more end, or go back where they were
// `ended`; `then` is called when that is durable, or refused.
void Service::report_gone(GoneCommand command,
                          std::function<void(Response)> then) {
  for (const std::string& worker : command.workers)
    served_.worker_ended(worker);
  Request request;
  request.what.emplace<Command>(std::move(command));
  ask(std::move(request), std::move(then));
}

static void post_sync(Service& s, const Exchange& call) {
  // What a pool says of its workers is believed: that they are dead, how
  // strong their sandboxes are. So it must come from this host's own user.
  if (!call.peer.local) {
    return s.refuse(call.peer, call.sequence,
                    not_implemented("",
                                    "pools over TCP: a pool reports over "
                                    "the server's Unix socket"));
  }
  if (!valid_name(call.args[0]) || call.args[0].size() > kWorkerBytesMax) {
    Problem p;
    p.status = 404;
    p.code = "not-found";
    p.detail = "pool: " + shown(call.args[0]) + " is no pool's id";
    return s.refuse(call.peer, call.sequence, p);
  }
  JsonValue json;
  if (!s.parse_body(call, true, &json)) return;
  PoolSync sync;
  if (MaybeProblem p = read_sync(json, &sync)) {
    return s.refuse(call.peer, call.sequence, *p);
  }
  std::string id(call.args[0]);
  if (!s.pools_.has_room_for(id)) {
    return s.refuse(
        call.peer, call.sequence,
        bad_field("pool", "more than " + std::to_string(kPoolsMax) + " pools"));
  }
  const Millis wait_ms = sync.wait_ms;
  if (sync.report.counts) s.metrics_.pool_counts(id, *sync.report.counts);
  s.own_pool_->pool_serves();
  Pools::Heard heard = s.pools_.hear(id, std::move(sync), *s.tokens_);
  // A pool has one open sync: an older one was left behind.
  if (Peer* p = s.peer(heard.left_behind.peer)) {
    s.answer_sync(*p, heard.left_behind.sequence);
  }
  s.check_levels();
  if (heard.ends.empty()) {
    return s.park_sync(call.peer, call.sequence, id, wait_ms);
  }
  // A pool forgets what it was answered 200 to: nothing that the log did not
  // take may be.
  struct Reported {
    std::size_t open;
    MaybeProblem refused;
  };
  auto reported = std::make_shared<Reported>(Reported{heard.ends.size(), {}});
  const Where where{call.peer.id, call.sequence};
  for (GoneCommand& report : heard.ends) {
    s.report_gone(std::move(report), [=, &s](const Response& response) {
      if (auto p = failure_of(response)) reported->refused = std::move(p);
      if (--reported->open > 0) return;
      if (reported->refused) return s.refuse(where, *reported->refused);
      if (Peer* p = s.peer(where.peer)) {
        s.park_sync(*p, where.sequence, id, wait_ms);
      }
    });
  }
}

// What it reported is durable: it is answered, or waits for news.
void Service::park_sync(Peer& peer, std::uint64_t sequence,
                        const std::string& id, Millis wait_ms) {
  const Millis wait = peer.hung_up ? 0 : wait_ms;
  if (pools_.park(id, {peer.id, sequence}, wait, &peer.told)) return;
  answer_sync(peer, sequence);
}

void Service::answer_sync(Peer& peer, std::uint64_t sequence) {
  reply(peer, sequence, 200, pools_.answer(&peer.told));
}

void Service::answer_parked(bool all) {
  pools_.answer_due(all, [this](const Where& where) {
    Peer* p = peer(where.peer);
    if (p == nullptr) return false;
    answer_sync(*p, where.sequence);
    after(*p);
    return true;
  });
}

void Service::check_levels() {
  if (!pools_.too_weak()) return;
  exit_code_ = 2;
  begin_drain(false);
}

void Service::supervise_pool() {
  if (!poisoned_) own_pool_->supervise();
}

// --- What is shown of them -------------------------------------------------

namespace {

void append_trouble(JsonWriter& json, const PoolTrouble* why) {
  if (why == nullptr) return void(json.null());
  json.begin_object();
  json.key("reason").string(why->reason);
  json.key("remedy").string(why->remedy);
  json.end_object();
}

}  // namespace

static void get_workers(Service& s, const Exchange& call) {
  WorkerNumbers numbers = s.pools_.numbers();
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  json.key("workers").begin_array();
  for (const auto& [id, pool] : s.pools_.all()) {
    for (const PoolReport::Worker& worker : pool.workers) {
      json.begin_object();
      json.key("pool").string(id);
      json.key("host").string(pool.host);
      json.key("seen_at").time(pool.seen_wall);
      const std::string job = s.pools_.job_of(worker);
      std::string state = worker.state;
      // What a pool says of a start may come after the first job's.
      if ((state == "idle" || state == "starting") && !job.empty()) {
        state = "busy";
      }
      if (!state.empty()) json.key("state").string(state);
      if (!job.empty()) json.key("job").string(job);
      std::string_view facts = worker.facts;
      if (!facts.empty()) json.raw(facts.substr(0, facts.size() - 1));
      json.end_object();
    }
  }
  json.end_array();
  json.key("configured").number(numbers.configured);
  json.key("reported").number(numbers.reported);
  json.key("busy").number(numbers.busy);
  json.key("trouble");
  append_trouble(json, s.pools_.trouble());
  json.key("pools").begin_array();
  for (const auto& [id, pool] : s.pools_.all()) {
    json.begin_object();
    json.key("pool").string(id);
    json.key("host").string(pool.host);
    json.key("seen_at").time(pool.seen_wall);
    json.key("workers").number(static_cast<std::uint64_t>(pool.workers.size()));
    json.key("trouble");
    append_trouble(json, pool.trouble.reason.empty() ? nullptr : &pool.trouble);
    json.end_object();
  }
  json.end_array().end_object();
  s.reply(call.peer, call.sequence, 200, body);
}

static void put_scale(Service& s, const Exchange& call) {
  JsonValue json;
  if (!s.parse_body(call, true, &json)) return;
  std::int64_t count = -1;
  for (JsonValue m = json.first(); m; m = m.next()) {
    MaybeProblem p;
    if (m.key() == "count") {
      p = read_integer(m, "count", 0, kWorkersMax, &count);
    } else if (m.key() == "min" || m.key() == "max") {
      p = not_implemented(std::string(m.key()),
                          "min and max: this version scales by count only");
    } else {
      p = unknown_field(m.key());
    }
    if (p) return s.refuse(call.peer, call.sequence, *p);
  }
  if (count < 0) {
    return s.refuse(call.peer, call.sequence,
                    bad_field("count", "it is missing"));
  }
  s.pools_.scale(static_cast<int>(count));
  s.served_.look_again();
  s.reply(call.peer, call.sequence, 200,
          "{\"configured\":" + std::to_string(count) + "}");
  s.own_pool_->start_soon();
  s.answer_parked(true);
  s.supervise_pool();
}

std::span<const Route> pool_routes() {
  static constexpr Route kRows[] = {
      {Method::post, "/v1/pools/{}/sync", post_sync, Route::worker},
      {Method::get, "/v1/workers", get_workers, Route::operate, 0, kPageWeight},
      {Method::put, "/v1/workers/scale", put_scale, Route::operate},
  };
  return kRows;
}

}  // namespace machina
