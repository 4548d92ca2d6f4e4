// The workers' verbs: lease, heartbeat, complete, fail, block, release.

#include "queue/base/check.h"
#include "queue/base/hex.h"
#include "server/api/service.h"

namespace machina {
namespace {

// Which items of a batch went to the shard; the others have their problem.
struct TokenBatch final : PendingExtra {
  struct Item {
    std::string token;
    MaybeProblem problem;
    Fence fence = 0;  // of a completion
  };
  std::vector<Item> items;
  std::string session;  // of the leases that go with it
  std::string worker;   // where more was asked for
};

struct SessionNote final : PendingExtra {
  explicit SessionNote(std::string text) : session(std::move(text)) {}
  std::string session;
};

Problem no_such_token() {
  Problem p;
  p.status = 404;
  p.code = "not-found";
  p.detail = "token: not of the form of a lease's token";
  return p;
}

// A worker's body wraps results and payloads: a batch has them three to six
// levels down.
bool parse_message(Service& s, const Exchange& call, JsonValue* json) {
  return s.parse_body(call, true, json, kJsonMessageDepthMax);
}

// The second halves, defined below.
Answerer leased, heartbeaten, completed, completed_many;

}  // namespace

Problem stale_lease() {
  Problem p;
  p.status = 409;
  p.code = "stale-lease";
  p.detail = "token: the lease is no longer current; nothing was changed";
  return p;
}

// Ill-formed: 404; not one of ours: 409, as one that is no longer current.
MaybeProblem Service::check_token(std::string_view text, Fence* fence) {
  Tokens::Checked checked = tokens_->check(text);
  if (!checked.formed) return no_such_token();
  if (!checked.ours) return stale_lease();
  *fence = checked.fence;
  return std::nullopt;
}

std::optional<Fence> Service::lease_of(const Exchange& call) {
  Fence fence = 0;
  if (auto p = check_token(call.args[0], &fence)) {
    refuse(call.peer, call.sequence, *p);
    return std::nullopt;
  }
  return fence;
}

// --- Leasing ---------------------------------------------------------------

// A worker that shows no session begins one; its name alone gives no right to
// what another session of that name holds.
MaybeProblem Service::finish_lease(const Peer& peer, LeaseBody* lease) {
  if (lease->session.empty()) lease->session = random_hex(32);
  lease->command.session =
      tokens_->session(lease->command.worker, lease->session, peer.local);
  if (!lease->holding) return std::nullopt;
  lease->command.holding.emplace();
  for (const std::string& token : *lease->holding) {
    Tokens::Checked checked = tokens_->check(token);
    if (!checked.formed) {
      return bad_field("holding", "not of the form of a lease's token");
    }
    if (checked.ours) lease->command.holding->push_back(checked.fence);
  }
  return std::nullopt;
}

bool Service::served(const std::string& kind) {
  return served_.serves(kind, loop_->now(), [this](const std::string& its) {
    return pools_.comes(its);
  });
}

static void post_leases(Service& s, const Exchange& call) {
  JsonValue json;
  if (!parse_message(s, call, &json)) return;
  LeaseBody lease;
  MaybeProblem p = read_lease(json, &lease);
  if (!p) p = s.finish_lease(call.peer, &lease);
  if (p) return s.refuse(call.peer, call.sequence, *p);
  Pending* pending = call.peer.connection.pending(call.sequence);
  pending->then = leased;
  pending->extra = std::make_unique<SessionNote>(std::move(lease.session));
  call.peer.serving = s.served_.asks(call.peer.id, lease.command, lease.wait_ms,
                                     s.loop_->now());
  if (!lease.command.holding || lease.command.holding->empty()) {
    s.pools_.worker_asks(lease.command.worker);
  }
  Request request = s.request_of(call);
  request.what.emplace<Command>(std::move(lease.command));
  request.wait_ms = lease.wait_ms;
  s.submit(std::move(request));
}

namespace {

// The escaping of names and labels at most sextuples them; what matters here,
// payload and input, is raw.
std::size_t reply_bytes(const JobView& job) {
  return job.payload.size() + job.input.size() + job.blocked_data.size() +
         16 * 1024;
}

}  // namespace

// Writes "session" and "leases":[...]; those that would make the reply too
// long, or that there is no room for, go back.
void Service::append_leases(Peer& peer, JsonWriter& json,
                            std::vector<LeaseView>& leases,
                            std::string_view session) {
  std::vector<Fence> over;
  if (!session.empty()) json.key("session").string(session);
  json.key("leases").begin_array();
  for (LeaseView& lease : leases) {
    const std::size_t bytes = json.size() + reply_bytes(lease.job);
    const bool first = &lease == &leases.front();
    if ((bytes > kLeaseReplyBytesMax && !first) || crowded(peer, bytes)) {
      over.push_back(lease.fence);
      continue;
    }
    if (first) pools_.worker_got(lease);
    json.begin_object();
    json.key("token").string(tokens_->make(lease.fence));
    json.key("fence").string(fence_hex(lease.fence));
    json.key("expires_at").time(lease.expires_at_ms);
    json.key("lease_ms").number(options_.shard.core.lease_ms);
    json.key("job");
    append_job(json, lease.job, Show::all);
    json.end_object();
    if (attempts_.size() >= kAttemptsKeptMax) attempts_.clear();
    Attempt& attempt = attempts_[lease.fence];
    attempt = {lease.job.id, lease.job.attempt, "", clock_.mono_ms(),
               peer.serving};
    if (lease.job.kind.starts_with("tool.")) attempt.tool = lease.job.kind;
  }
  json.end_array();
  give_back(std::move(over));
}

namespace {

void leased(Service& s, Peer& peer, std::uint64_t sequence, Pending& pending,
            Response& response) {
  if (response.leases.empty()) return s.reply(peer, sequence, 204, "");
  if (s.crowded(peer, reply_bytes(response.leases.front().job))) {
    s.give_back(fences_of(response.leases));
    Problem p;
    p.status = 503;
    p.code = "busy";
    p.retry_after = 1;
    p.detail = "answers of " + std::to_string(kUnsentAllMax) +
               " bytes wait for their readers, the most that may";
    return s.refuse(peer, sequence, p);
  }
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  s.append_leases(peer, json, response.leases,
                  static_cast<SessionNote&>(*pending.extra).session);
  json.end_object();
  s.reply(peer, sequence, 200, body);
}

}  // namespace

static void post_heartbeat(Service& s, const Exchange& call) {
  JsonValue json;
  if (!parse_message(s, call, &json)) return;
  HeartbeatBody heartbeat;
  if (auto p = read_heartbeat(json, &heartbeat)) {
    return s.refuse(call.peer, call.sequence, *p);
  }
  auto batch = std::make_unique<TokenBatch>();
  HeartbeatCommand command;
  bool all_good = true;
  for (auto& item : heartbeat.items) {
    Fence fence = 0;
    MaybeProblem problem = s.check_token(item.token, &fence);
    if (!problem) {
      auto known = s.attempts_.find(fence);
      if (known != s.attempts_.end() && known->second.serving != nullptr) {
        Millis& until = known->second.serving->until;
        until = std::max(
            until,
            s.loop_->now() +
                std::max<Millis>(kServingMs, s.options_.shard.core.lease_ms));
      }
      command.items.push_back({fence, item.percent, std::move(item.message)});
    } else {
      all_good = false;
    }
    batch->items.push_back({std::move(item.token), std::move(problem)});
  }
  Pending* pending = call.peer.connection.pending(call.sequence);
  pending->then = heartbeaten;
  pending->extra = std::move(batch);
  if (command.items.empty()) {
    Response none;
    return heartbeaten(s, call.peer, call.sequence, *pending, none);
  }
  Request request = s.request_of(call);
  request.what.emplace<Command>(std::move(command));
  request.wait_ms = all_good ? heartbeat.wait_ms : 0;
  s.submit(std::move(request));
}

namespace {

void heartbeaten(Service& s, Peer& peer, std::uint64_t sequence,
                 Pending& pending, Response& response) {
  auto& batch = static_cast<TokenBatch&>(*pending.extra);
  Millis expires = s.clock_.wall_ms() + s.options_.shard.core.lease_ms;
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  json.key("items").begin_array();
  std::size_t next = 0;
  for (TokenBatch::Item& item : batch.items) {
    MaybeProblem problem = std::move(item.problem);
    bool cancel = false;
    if (!problem) {
      const ItemAnswer answer =
          next < response.items.size()
              ? response.items[next]
              : ItemAnswer{Answer::stale_lease, {}, {}, {}, {}};
      ++next;
      problem = s.problem_of(answer, "lease");
      cancel = answer.cancel;
    }
    json.begin_object();
    json.key("token").string(item.token);
    if (problem) {
      std::string text;
      append_problem(&text, *problem);
      json.key("expires_at").null();
      json.key("cancel").boolean(false);
      json.key("problem").raw(text);
    } else {
      json.key("expires_at").time(expires);
      json.key("cancel").boolean(cancel);
      json.key("problem").null();
    }
    json.end_object();
  }
  json.end_array().end_object();
  s.reply(peer, sequence, 200, body);
}

}  // namespace

// --- Completing ------------------------------------------------------------

void Service::check_artifacts(
    const Where& where,
    std::vector<std::pair<Fence, std::vector<std::string>>> claims,
    std::function<void(std::vector<MaybeProblem>)> then) {
  Store* store = store_.get();
  auto work = [store, claims = std::move(claims)] {
    std::vector<MaybeProblem> problems;
    for (const auto& [fence, names] : claims) {
      MaybeProblem& problem = problems.emplace_back();
      if (names.empty()) continue;
      auto staged = store->artifacts(fence);
      if (!staged) {
        problem.emplace();
        problem->status = 500;
        problem->code = "io";
        problem->detail = staged.error().what;
        continue;
      }
      for (const std::string& name : names) {
        bool there = false;
        for (const Artifact& artifact : *staged) {
          there = there || artifact.name == name;
        }
        if (!there) {
          problem = bad_field("artifacts", shown(name) +
                                               " was not uploaded by this "
                                               "attempt");
          break;
        }
      }
    }
    return problems;
  };
  on_store<std::vector<MaybeProblem>>(where, std::move(work), std::move(then));
}

static void post_complete(Service& s, const Exchange& call) {
  auto fence = s.lease_of(call);
  JsonValue json;
  if (!fence || !parse_message(s, call, &json)) return;
  auto item = std::make_shared<CompleteCommand::Item>();
  item->fence = *fence;
  if (auto p = read_completion(json, s.context_of(call), item.get(), nullptr)) {
    return s.refuse(call.peer, call.sequence, *p);
  }
  call.peer.connection.pending(call.sequence)->then = completed;
  s.keep_room(call);
  Request request = s.request_of(call);
  request.with_payload = false;
  if (item->outcome.artifacts.empty()) {
    CompleteCommand command;
    command.items.push_back(std::move(*item));
    request.what.emplace<Command>(std::move(command));
    return s.submit_new(std::move(request));
  }
  Where where{call.peer.id, call.sequence};
  s.check_artifacts(where, {{*fence, item->outcome.artifacts}},
                    [&s, where, item](std::vector<MaybeProblem> problems) {
                      if (problems[0]) return s.refuse(where, *problems[0]);
                      Request later;
                      later.from = Address{0, where.peer, where.sequence};
                      later.with_payload = false;
                      CompleteCommand command;
                      command.items.push_back(std::move(*item));
                      later.what.emplace<Command>(std::move(command));
                      s.submit_new(std::move(later));
                    });
}

namespace {

void completed(Service& s, Peer& peer, std::uint64_t sequence, Pending&,
               Response& response) {
  if (response.items.empty()) return s.refuse(peer, sequence, stale_lease());
  const ItemAnswer& answer = response.items.front();
  if (auto p = s.problem_of(answer, "lease"))
    return s.refuse(peer, sequence, *p);
  if (!response.views.empty() && !response.views.front().id.is_nil()) {
    const JobView& job = response.views.front();
    s.metrics_.tool_ended(job.kind, job.state == State::succeeded,
                          job.finished_ms - job.started_ms);
    return s.reply_job(peer, sequence, 200, response, Show::no_payload);
  }
  s.reply_with_job(peer, sequence, answer.id, false);
}

}  // namespace

static void post_complete_many(Service& s, const Exchange& call) {
  JsonValue json;
  if (!parse_message(s, call, &json)) return;
  auto fail = [&](const Problem& p) { s.refuse(call.peer, call.sequence, p); };
  JsonValue items;
  LeaseBody lease;
  bool with_lease = false;
  for (JsonValue m = json.first(); m; m = m.next()) {
    if (m.key() == "items") {
      items = m;
    } else if (m.key() == "lease") {
      with_lease = !m.is_null();
      if (!with_lease) continue;
      MaybeProblem p = read_lease(m, &lease);
      if (!p) p = s.finish_lease(call.peer, &lease);
      if (p) {
        p->field = "lease." + p->field;
        p->detail = "lease." + p->detail;
        return fail(*p);
      }
    } else {
      return fail(unknown_field(m.key()));
    }
  }
  if (!items || !items.is_array()) {
    return fail(bad_field("items", "an array of completions is needed"));
  }
  auto batch = std::make_unique<TokenBatch>();
  auto command = std::make_shared<CompleteCommand>();
  JobContext context = s.context_of(call);
  bool artifacts = false;
  int index = 0;
  for (JsonValue v = items.first(); v; v = v.next(), ++index) {
    if (index >= kLeasesPerCallMax) {
      return fail(
          bad_field("items", "more than " + std::to_string(kLeasesPerCallMax)));
    }
    CompleteCommand::Item item;
    TokenBatch::Item entry;
    entry.problem = read_completion(v, context, &item, &entry.token);
    if (!entry.problem) entry.problem = s.check_token(entry.token, &item.fence);
    entry.fence = item.fence;
    if (!entry.problem) {
      artifacts = artifacts || !item.outcome.artifacts.empty();
      command->items.push_back(std::move(item));
    } else {
      entry.problem->index = index;
    }
    batch->items.push_back(std::move(entry));
  }
  if (with_lease) {
    call.peer.serving = s.served_.asks(call.peer.id, lease.command,
                                       lease.wait_ms, s.loop_->now());
    batch->worker = lease.command.worker;
    command->lease = std::move(lease.command);
    batch->session = std::move(lease.session);
  }
  Pending* pending = call.peer.connection.pending(call.sequence);
  pending->then = completed_many;
  pending->extra = std::move(batch);
  Where where{call.peer.id, call.sequence};
  Millis wait = with_lease ? lease.wait_ms : 0;
  auto go = [&s, where, wait, command] {
    Peer* p = s.peer(where.peer);
    if (command->items.empty() && !command->lease) {
      Response none;
      Pending* waiting =
          p == nullptr ? nullptr : p->connection.pending(where.sequence);
      if (waiting != nullptr) {
        completed_many(s, *p, where.sequence, *waiting, none);
      }
      return;
    }
    Request request;
    request.from = Address{0, where.peer, where.sequence};
    request.wait_ms = wait;
    request.with_payload = command->lease.has_value();  // of the leases' jobs
    request.what.emplace<Command>(std::move(*command));
    s.submit_new(std::move(request), [](Pending& batched, auto& problems) {
      note_problems(static_cast<TokenBatch&>(*batched.extra).items, problems);
    });
  };
  if (!artifacts) return go();
  std::vector<std::pair<Fence, std::vector<std::string>>> claims;
  for (const auto& item : command->items) {
    claims.emplace_back(item.fence, item.outcome.artifacts);
  }
  s.check_artifacts(
      where, std::move(claims),
      [&s, where, command, go](std::vector<MaybeProblem> problems) {
        // What claims an artifact that is not there is not submitted.
        Peer* p = s.peer(where.peer);
        Pending* waiting =
            p == nullptr ? nullptr : p->connection.pending(where.sequence);
        if (waiting == nullptr) return;
        auto& entries = static_cast<TokenBatch&>(*waiting->extra).items;
        std::vector<CompleteCommand::Item> kept;
        std::size_t at = 0;
        for (TokenBatch::Item& entry : entries) {
          if (entry.problem) continue;
          if (problems[at]) {
            entry.problem = std::move(problems[at]);
          } else {
            kept.push_back(std::move(command->items[at]));
          }
          ++at;
        }
        command->items = std::move(kept);
        go();
      });
}

namespace {

void completed_many(Service& s, Peer& peer, std::uint64_t sequence,
                    Pending& pending, Response& response) {
  auto& batch = static_cast<TokenBatch&>(*pending.extra);
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  json.key("items").begin_array();
  std::size_t next = 0;
  for (TokenBatch::Item& item : batch.items) {
    MaybeProblem problem = std::move(item.problem);
    json.begin_object();
    json.key("token").string(item.token);
    if (!problem) {
      std::size_t at = next++;
      const ItemAnswer answer =
          at < response.items.size()
              ? response.items[at]
              : ItemAnswer{Answer::stale_lease, {}, {}, {}, {}};
      problem = s.problem_of(answer, "lease");
      if (!problem) {
        State state =
            at < response.views.size() && !response.views[at].id.is_nil()
                ? response.views[at].state
                : answer.state;
        json.key("state").string(name(state));
        s.tool_ended(item.fence, state);
      }
    }
    if (problem) {
      std::string text;
      append_problem(&text, *problem);
      json.key("problem").raw(text);
    }
    json.end_object();
  }
  json.end_array();
  if (response.leases.empty()) s.pools_.worker_asks(batch.worker);
  s.append_leases(peer, json, response.leases, batch.session);
  json.end_object();
  s.reply(peer, sequence, 200, body);
}

}  // namespace

// One that completed, pass or fail; what fails otherwise comes by acted().
void Service::tool_ended(Fence fence, State state) {
  auto found = attempts_.find(fence);
  if (found == attempts_.end() || found->second.tool.empty()) return;
  metrics_.tool_ended(found->second.tool, state == State::succeeded,
                      clock_.mono_ms() - found->second.since);
  found->second.tool.clear();  // a repeated completion is the same end
}

// --- Other ends of an attempt ----------------------------------------------

static void post_fail(Service& s, const Exchange& call) {
  auto fence = s.lease_of(call);
  JsonValue json;
  if (!fence || !parse_message(s, call, &json)) return;
  auto command = std::make_shared<FailCommand>();
  command->fence = *fence;
  if (auto p = read_failure(json, &command->outcome)) {
    return s.refuse(call.peer, call.sequence, *p);
  }
  call.peer.connection.pending(call.sequence)->then = acted<Show::no_payload>;
  s.keep_room(call);
  Where where{call.peer.id, call.sequence};
  auto go = [&s, where, command] {
    Request request;
    request.from = Address{0, where.peer, where.sequence};
    request.with_payload = false;
    request.what.emplace<Command>(std::move(*command));
    s.submit(std::move(request));
  };
  if (command->outcome.artifacts.empty()) return go();
  s.check_artifacts(where, {{*fence, command->outcome.artifacts}},
                    [&s, where, go](std::vector<MaybeProblem> problems) {
                      if (problems[0]) return s.refuse(where, *problems[0]);
                      go();
                    });
}

static void post_block(Service& s, const Exchange& call) {
  auto fence = s.lease_of(call);
  JsonValue json;
  if (!fence || !parse_message(s, call, &json)) return;
  BlockCommand command;
  command.fence = *fence;
  if (auto p = read_block(json, &command)) {
    return s.refuse(call.peer, call.sequence, *p);
  }
  call.peer.connection.pending(call.sequence)->then = acted<Show::no_payload>;
  Request request = s.request_of(call);
  request.with_payload = false;
  request.what.emplace<Command>(std::move(command));
  s.submit(std::move(request));
}

static void post_release(Service& s, const Exchange& call) {
  auto fence = s.lease_of(call);
  if (!fence || !s.no_members(call)) return;
  call.peer.connection.pending(call.sequence)->then = acted<Show::no_payload>;
  ReleaseCommand command;
  command.fences.push_back(*fence);
  Request request = s.request_of(call);
  request.with_payload = false;
  request.what.emplace<Command>(std::move(command));
  s.submit(std::move(request));
}

std::span<const Route> worker_routes() {
  static constexpr Route kRows[] = {
      {Method::post, "/v1/leases", post_leases, Route::worker},
      {Method::post, "/v1/leases/complete", post_complete_many, Route::worker},
      {Method::post, "/v1/leases/heartbeat", post_heartbeat, Route::worker},
      {Method::post, "/v1/leases/{}/complete", post_complete,
       Route::worker | Route::repeats},
      {Method::post, "/v1/leases/{}/fail", post_fail, Route::worker},
      {Method::post, "/v1/leases/{}/block", post_block, Route::worker},
      {Method::post, "/v1/leases/{}/release", post_release, Route::worker},
  };
  return kRows;
}

}  // namespace machina
