// A request on its way in: what it asks for, the facts it needs, the decision,
// the records of it applied and appended, and the first draft of its answer.

#include <algorithm>
#include <cstdlib>

#include "queue/base/check.h"
#include "queue/shard/shard_impl.h"

namespace machina {
namespace {

template <class... Fs>
struct Overload : Fs... {
  using Fs::operator()...;
};
template <class... Fs>
Overload(Fs...) -> Overload<Fs...>;

// What the log needs for these, at most.
std::uint64_t log_bytes(const NewJob& job) {
  std::uint64_t bytes =
      256 + job.kind.size() + job.queue.size() + job.tenant.size() +
      job.payload.size() + job.dedup_key.size() + job.sandbox.size() +
      job.traceparent.size() + job.request_id.size() +
      job.concurrency_key.size() + 2 * sizeof(JobId) * job.depends_on.size();
  for (const auto& [key, value] : job.labels)
    bytes += 8 + key.size() + value.size();
  return bytes;
}

std::uint64_t log_bytes(const Outcome& outcome) {
  std::uint64_t bytes = 256 + outcome.message.size() + outcome.result.size() +
                        outcome.isolation.size() + outcome.usage.size() +
                        outcome.side_effects.size();
  for (const std::string& artifact : outcome.artifacts)
    bytes += 8 + artifact.size();
  return bytes;
}

bool is_read(const Request& request) {
  return !std::holds_alternative<Command>(request.what);
}

}  // namespace

void ShardImpl::submit(Request request) {
  auto call = std::make_shared<Call>();
  call->from = request.from;
  call->response.to = request.from;
  call->with_payload = request.with_payload;
  call->view_bytes = request.view_bytes;
  // H3. What was applied and will never be durable must not be seen either.
  if (log_->poisoned() &&
      (!is_read(request) || core_.applied() > log_->durable())) {
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  // Nothing is decided while what was decided finds no room; nor is it told.
  if (log_->stalled() &&
      (!is_read(request) || core_.applied() > log_->durable())) {
    call->response.status = Response::Status::disk_low;
    call->response.detail = full_words();
    return send(call);
  }
  std::visit(Overload{[&](Command& command) {
                        run_command(call, std::move(command), request.wait_ms);
                      },
                      [&](GetQuery& query) { get(call, query); },
                      [&](ListQuery& query) { list(call, std::move(query)); }},
             request.what);
}

void ShardImpl::run_command(const CallPtr& call, Command command,
                            Millis wait_ms) {
  std::visit(
      Overload{
          [&](EnqueueCommand& c) { enqueue(call, std::move(c), wait_ms, 0); },
          [&](LeaseCommand& c) { lease(call, std::move(c), wait_ms); },
          [&](HeartbeatCommand& c) { heartbeat(call, std::move(c), wait_ms); },
          [&](CompleteCommand& c) { complete(call, std::move(c), wait_ms, 0); },
          [&](RetryCommand& c) {
            if (refuse_if_low(call, disk_hard_)) return;
            retry(call, std::move(c));
          },
          [&](CancelCommand&) {
            if (refuse_if_full(call, 0, promised_but(kReservePerJob))) return;
            change(call, command, Purpose::cancel);
          },
          [&](UnblockCommand& c) {
            const std::uint64_t bytes = c.input.size() + c.actor.size();
            if (refuse_if_low(call, disk_hard_) ||
                refuse_if_full(call, bytes, core_.reserved_bytes()))
              return;
            change(call, command, Purpose::change);
          },
          // What ends a lease has that lease's room.
          [&](FailCommand& c) {
            if (refuse_if_full(call, log_bytes(c.outcome),
                               promised_but(kReservePerLease)))
              return;
            change(call, command, Purpose::view);
          },
          [&](BlockCommand& c) {
            if (refuse_if_full(call, c.reason.size() + c.data.size(),
                               promised_but(kReservePerLease)))
              return;
            change(call, command, Purpose::view);
          },
          [&](auto&) {
            if (refuse_if_full(call, 0, 0)) return;
            change(call, command, Purpose::view);
          }},
      command);
}

// --- commands ---

void ShardImpl::enqueue(const CallPtr& call, EnqueueCommand command,
                        Millis wait_ms, int round) {
  if (history_lag_bytes_ > options_.history_lag_max_bytes) {
    return refuse(call, Response::Status::lagging,
                  "history is " + std::to_string(history_lag_bytes_) +
                      " bytes behind, more than " +
                      std::to_string(options_.history_lag_max_bytes));
  }
  if (log_->staged_bytes() > kStagedBytesMax) {
    return refuse(call, Response::Status::lagging,
                  "the disk is " + std::to_string(log_->staged_bytes()) +
                      " bytes behind");
  }
  if (refuse_if_low(call, disk_soft_)) return;
  auto missing = gather_facts(command.jobs, &command.facts);
  if (!missing.empty()) {
    auto shared = std::make_shared<EnqueueCommand>(std::move(command));
    return fetch_facts(call, std::move(missing), round,
                       [=, this](const std::vector<Fact>& facts) {
                         shared->facts.insert(shared->facts.end(),
                                              facts.begin(), facts.end());
                         enqueue(call, std::move(*shared), wait_ms, round + 1);
                       });
  }
  if (command.jobs.size() == 1 && !command.jobs[0].dedup_key.empty()) {
    const NewJob& job = command.jobs[0];
    call->asked = std::make_unique<JobView>();
    call->asked->kind = job.kind;
    call->asked->queue = job.queue;
    call->asked->tenant = job.tenant;
    call->asked->dedup_key = job.dedup_key;
  }
  auto decision = decide(Command(std::move(command)));
  if (!decision) {
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  call->response.items = std::move(decision->items);
  auto& items = call->response.items;
  call->response.views.resize(items.size());
  const bool one = items.size() == 1;
  call->light = !one;
  // One job, and nothing but that it is there: its record says it all.
  EnqueueRecord* fresh = nullptr;
  if (one && decision->records.size() == 1) {
    fresh = std::get_if<EnqueueRecord>(&decision->records[0].body);
  }
  for (std::size_t i = 0; i < items.size(); ++i) {
    ItemAnswer& item = items[i];
    if (item.answer != Answer::ok && item.answer != Answer::duplicate) continue;
    JobView& view = call->response.views[i];
    // Of many jobs, clients are told id, state and duplicate: no bodies.
    if (fresh != nullptr && fresh->state == item.state) {
      fill_from_new(std::move(*fresh), options_.core.fsync, call->with_payload,
                    &view);
      leave_out(call.get(), &view);
      view.waiting_for_level = view.state == State::ready &&
                               view.min_level > 0 &&
                               !level_seen(view.min_level);
      if (!view.concurrency_key.empty()) {
        auto look = core_.look(item.id);
        view.waiting_for_concurrency =
            look && look->view.waiting_for_concurrency;
      }
    } else if (one || !core_.live(item.id)) {
      want_view(call.get(), i, item.id);
    } else if (item.answer == Answer::duplicate) {
      if (auto look = core_.look(item.id)) view = std::move(look->view);
      item.state = view.state;
    }
    view.id = item.id;
    view.duplicate = item.answer == Answer::duplicate;
    if (!one && item.answer == Answer::ok) view.state = item.state;
  }
  deliver(&*decision);
  if (one && wait_ms > 0 && !items[0].id.is_nil() && core_.live(items[0].id) &&
      !draining_) {
    call->watched = items[0].id;
    if (park(call, Call::Parked::watch, wait_ms)) return;
    call->response.waited_out = true;
  }
  answer(call);
}

static Fact fact_of(const Need& need) {
  Fact fact;
  fact.id = need.id;
  if (need.finished) {
    fact.known = true;
    fact.state = need.finished->end.state;
    fact.tenant = need.finished->body.job.tenant;
  } else if (need.body) {
    fact.known = true;
    fact.state = need.ended->state;
    fact.tenant = need.body->job.tenant;
  }
  return fact;
}

// Adds what the shard knows at once about dependencies that are not live;
// returns those that history must be asked about.
std::vector<JobId> ShardImpl::gather_facts(std::span<const NewJob> jobs,
                                           std::vector<Fact>* facts) const {
  std::vector<JobId> missing;
  for (const NewJob& job : jobs) {
    for (const JobId& id : job.depends_on) {
      if (core_.live(id)) continue;
      auto fact = std::find_if(facts->begin(), facts->end(),
                               [&](const Fact& f) { return f.id == id; });
      EndedPtr ended = find_ended(id);
      // Newer than any fact that history gave. Without its body it does not
      // say whose job it was: a fact that knows the job does.
      if (ended && !ended->body && fact != facts->end() && !fact->known) {
        facts->erase(fact);
        fact = facts->end();
      }
      if (ended && (ended->body || fact != facts->end())) {
        if (fact == facts->end()) fact = facts->insert(fact, Fact{id});
        if (ended->body) fact->tenant = ended->body->job.tenant;
        fact->known = true;
        fact->state = ended->state;
      } else if (fact == facts->end() &&
                 std::find(missing.begin(), missing.end(), id) ==
                     missing.end()) {
        missing.push_back(id);
      }
    }
  }
  return missing;
}

// Asks history, or the log for a job that history does not have yet, on a
// store thread; then goes on with what they said.
void ShardImpl::fetch_facts(
    const CallPtr& call, std::vector<JobId> missing, int round,
    std::function<void(const std::vector<Fact>&)> then) {
  if (round >= kFactRoundsMax) {
    return refuse(call, Response::Status::failed,
                  "the facts about depends_on kept changing");
  }
  auto needs = std::make_shared<std::vector<Need>>();
  for (const JobId& id : missing) {
    Need& need = needs->emplace_back();
    need.id = id;
    need.what = Need::What::finished;
    need.light = true;
    need.with_payload = false;
    need.ended = find_ended(id);
    if (need.ended == nullptr) continue;
    if (need.ended->lsn > log_->durable()) {
      return refuse(call, Response::Status::lagging,
                    "the job's end is not written yet");
    }
    need.what = Need::What::body;
    need.place = need.ended->body_place;
    need.bytes = need.ended->body_bytes;
  }
  for (const Need& need : *needs) pin(need, +1);
  // So that it hears of a client that hangs up meanwhile.
  if (!calls_full()) enlist(call);
  Millis at = now();
  bool posted = store_->post([=, this] {
    for (Need& need : *needs) fetch_need(*log_, *history_, at, &need);
    return [=, this] {
      unlist(call);
      std::vector<Fact> facts;
      std::string error;
      for (const Need& need : *needs) {
        pin(need, -1);
        if (error.empty()) error = need.error;
        facts.push_back(fact_of(need));
      }
      if (!error.empty()) {
        return refuse(call, Response::Status::failed, error);
      }
      if (log_->poisoned()) {
        return refuse(call, Response::Status::poisoned, log_->poison_cause());
      }
      if (log_->stalled()) {
        return refuse(call, Response::Status::disk_low, full_words());
      }
      then(facts);
    };
  });
  if (posted) return;
  for (const Need& need : *needs) pin(need, -1);
  unlist(call);
  refuse(call, Response::Status::failed, "too many file reads");
}

void ShardImpl::lease(const CallPtr& call, LeaseCommand command,
                      Millis wait_ms) {
  if (draining_) {
    return refuse(call, Response::Status::draining, "the server is draining");
  }
  if (refuse_if_low(call, disk_hard_)) return;
  if (calls_full()) {
    return refuse(call, Response::Status::lagging,
                  std::to_string(kCallsMax) +
                      " calls wait or have leases that are not sent yet, "
                      "which is the most");
  }
  if (given_bytes_ > kGivenBytesMax) {
    return refuse(call, Response::Status::lagging,
                  "jobs of " + std::to_string(given_bytes_) +
                      " bytes are on their way to workers, which is the most");
  }
  if (!shorten(&command)) {
    return refuse(call, Response::Status::disk_low, full_words());
  }
  if (log_->lacking()) wait_ms = 0;
  level_seen_mono_[std::min(command.level, kLevelMax)] =
      std::max<Millis>(mono(), 1);
  call->number = next_call_++;
  command.waiter = wait_ms > 0 ? call->number : 0;
  Command whole(std::move(command));
  auto decision = decide(whole);
  if (!decision) {
    call->number = 0;
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  call->response.items = std::move(decision->items);
  give(call, decision->grants);
  deliver(&*decision);
  if (decision->grants.empty() && decision->park && wait_ms > 0 &&
      park(call, Call::Parked::lease, wait_ms)) {
    core_.park(std::get<LeaseCommand>(whole));
    return;
  }
  answer(call);
}

void ShardImpl::heartbeat(const CallPtr& call, HeartbeatCommand command,
                          Millis wait_ms) {
  call->beat = std::move(command);
  auto decision = decide(Command(call->beat));
  if (!decision) {
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  call->response.items = std::move(decision->items);
  deliver(&*decision);
  bool told = call->response.items.empty();
  const auto& items = call->response.items;
  for (std::size_t i = 0; i < items.size() && i < call->beat.items.size();
       ++i) {
    const auto& beat = call->beat.items[i];
    if (items[i].answer != Answer::ok || items[i].cancel) told = true;
    if (items[i].answer != Answer::ok) continue;
    core_.heartbeat(beat.fence, mono() + options_.core.lease_ms,
                    beat.progress_percent, beat.progress_message);
  }
  if (!told && wait_ms > 0 && park(call, Call::Parked::heartbeat, wait_ms)) {
    return;
  }
  answer(call);
}

void ShardImpl::complete(const CallPtr& call, CompleteCommand command,
                         Millis wait_ms, int round) {
  std::vector<JobId> missing;
  for (const auto& item : command.items) {
    if (item.children.empty()) continue;
    auto more = gather_facts(item.children, &command.facts);
    missing.insert(missing.end(), more.begin(), more.end());
  }
  if (!missing.empty()) {
    auto shared = std::make_shared<CompleteCommand>(std::move(command));
    return fetch_facts(call, std::move(missing), round,
                       [=, this](const std::vector<Fact>& facts) {
                         shared->facts.insert(shared->facts.end(),
                                              facts.begin(), facts.end());
                         complete(call, std::move(*shared), wait_ms, round + 1);
                       });
  }
  std::uint64_t bytes = 0, kept = 0;
  for (const auto& item : command.items) {
    bytes += log_bytes(item.outcome) + kGrantBytes;
    kept += kReservePerLease;
    for (const NewJob& child : item.children)
      bytes += log_bytes(child) + kReservePerJob;
  }
  if (refuse_if_full(call, bytes, promised_but(kept))) return;
  call->number = next_call_++;
  if (call->dropped || draining_ || disk_low(disk_hard_) || calls_full() ||
      given_bytes_ > kGivenBytesMax) {
    command.lease.reset();
  }
  if (log_->lacking()) wait_ms = 0;
  if (command.lease && !shorten(&*command.lease)) command.lease.reset();
  if (command.lease) {
    level_seen_mono_[std::min(command.lease->level, kLevelMax)] =
        std::max<Millis>(mono(), 1);
    command.lease->waiter = wait_ms > 0 ? call->number : 0;
  }
  std::vector<Fence> fences;
  for (const auto& item : command.items) fences.push_back(item.fence);
  const std::optional<LeaseCommand> wanted = command.lease;
  auto decision = decide(Command(std::move(command)));
  if (!decision) {
    call->number = 0;
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  call->response.items = std::move(decision->items);
  auto& items = call->response.items;
  call->light = items.size() > 1;
  call->response.views.resize(items.size());
  for (std::size_t i = 0; i < items.size() && i < fences.size(); ++i) {
    if (items[i].answer == Answer::stale_lease) {
      // A repeat of a completion whose answer was lost? (promise 3)
      if (EndedPtr ended = find_ended(fences[i])) {
        items[i].answer = Answer::ok;
        items[i].id = ended->id;
        items[i].state = ended->state;
        if (items.size() == 1) add_ended_view(call.get(), i, ended);
      } else {
        Need fact;
        fact.what = Need::What::by_fence;
        fact.index = i;
        fact.fence = fences[i];
        need(call.get(), std::move(fact));
      }
    } else if (items[i].answer == Answer::ok && items.size() == 1) {
      want_view(call.get(), i, items[i].id);
    }
    call->response.views[i].id = items[i].id;
    if (items.size() > 1) call->response.views[i].state = items[i].state;
  }
  give(call, decision->grants);
  deliver(&*decision);
  if (wanted && decision->grants.empty() && decision->park && wait_ms > 0 &&
      park(call, Call::Parked::lease, wait_ms)) {
    core_.park(*wanted);
    return;
  }
  answer(call);
}

// The commands that change one job, or many without an answer of their own.
void ShardImpl::change(const CallPtr& call, const Command& command,
                       Purpose purpose) {
  JobId asked;
  if (auto* cancel = std::get_if<CancelCommand>(&command)) asked = cancel->id;
  if (auto* unblock = std::get_if<UnblockCommand>(&command)) {
    asked = unblock->id;
  }
  auto decision = decide(command);
  if (!decision) {
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  call->purpose = purpose;
  call->response.items = std::move(decision->items);
  auto& items = call->response.items;
  if (items.size() == 1) {
    call->response.views.resize(1);
    ItemAnswer& item = items[0];
    if (item.answer == Answer::not_found && !asked.is_nil()) {
      item.id = asked;
      want_view(call.get(), 0, asked);
    } else if (!item.id.is_nil() && item.answer != Answer::not_found &&
               item.answer != Answer::stale_lease) {
      want_view(call.get(), 0, item.id);
    }
  }
  deliver(&*decision);
  answer(call);
}

void ShardImpl::retry(const CallPtr& call, RetryCommand command) {
  const JobId id = command.id;
  if (command.body || core_.live(id)) {
    return retry_with(call, std::move(command), UINT64_MAX, 0);
  }
  EndedPtr ended = find_ended(id);
  if (ended && ended->body) {
    command.body = *ended->body;
    command.state = ended->state;
    command.attempt = ended->attempt;
    return retry_with(call, std::move(command), ended->lsn, 0);
  }
  if (ended && ended->lsn > log_->durable()) {
    return refuse(call, Response::Status::lagging,
                  "the job's end is not written yet");
  }
  Need fact;
  fact.id = id;
  fact.what = ended ? Need::What::ended : Need::What::finished;
  fact.ended = ended;
  pin(fact, +1);
  auto shared = std::make_shared<Need>(std::move(fact));
  Millis at = now();
  const bool ignore = command.ignore_dependencies;
  bool posted = store_->post([=, this] {
    fetch_need(*log_, *history_, at, shared.get());
    return [=, this] {
      pin(*shared, -1);
      RetryCommand ready;
      ready.id = id;
      ready.ignore_dependencies = ignore;
      if (!shared->error.empty()) {
        return refuse(call, Response::Status::failed, shared->error);
      }
      Lsn lsn = 0;
      if (shared->finished) {
        ready.body = std::move(shared->finished->body);
        ready.state = shared->finished->end.state;
        ready.attempt = shared->finished->end.attempt;
        lsn = shared->finished->lsn;
      }
      retry_with(call, std::move(ready), lsn, 0);
    };
  });
  if (posted) return;
  pin(*shared, -1);
  refuse(call, Response::Status::failed, "too many file reads");
}

// With what the job was, as of `fetched`.
void ShardImpl::retry_with(const CallPtr& call, RetryCommand command,
                           Lsn fetched, int round) {
  if (log_->poisoned()) {
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  if (refuse_if_full(call, command.body ? log_bytes(command.body->job) : 0,
                     core_.reserved_bytes() + kReservePerJob)) {
    return;
  }
  // It may have been retried and have ended again while we read.
  EndedPtr newer = find_ended(command.id);
  if (newer && newer->lsn > fetched) {
    if (newer->body) command.body = *newer->body;
    command.state = newer->state;
    command.attempt = newer->attempt;
    fetched = newer->lsn;
  }
  if (command.body && !command.ignore_dependencies && !core_.live(command.id)) {
    auto missing = gather_facts({&command.body->job, 1}, &command.facts);
    if (!missing.empty()) {
      auto shared = std::make_shared<RetryCommand>(std::move(command));
      return fetch_facts(call, std::move(missing), round,
                         [=, this](const std::vector<Fact>& facts) {
                           shared->facts.insert(shared->facts.end(),
                                                facts.begin(), facts.end());
                           retry_with(call, std::move(*shared), fetched,
                                      round + 1);
                         });
    }
  }
  change(call, Command(std::move(command)), Purpose::change);
}

// --- queries ---

void ShardImpl::get(const CallPtr& call, const GetQuery& query) {
  call->with_payload = query.payload;
  call->purpose = Purpose::get;
  ItemAnswer item;
  item.id = query.id;
  call->response.items.push_back(std::move(item));
  call->response.views.resize(1);
  if (query.until_final && query.wait_ms > 0 && core_.live(query.id) &&
      !draining_) {
    call->watched = query.id;
    if (park(call, Call::Parked::watch, query.wait_ms)) return;
  }
  want_view(call.get(), 0, query.id);
  if (query.until_final && core_.live(query.id)) {
    call->response.waited_out = true;
  }
  answer(call);
}

// Cursors: "L<n>", n of Core::scan, while the live are listed; then "H<id>",
// of History::list; "H" is its beginning.
void ShardImpl::list(const CallPtr& call, ListQuery query) {
  call->with_payload = false;
  std::string cursor = std::move(query.cursor);
  query.cursor.clear();
  query.limit = std::clamp(query.limit, 1, 1000);
  call->list = std::move(query);
  call->list_until_mono = mono() + kListLookMs;
  bool live = call->list.states.empty();
  for (State state : call->list.states) live = live || !is_final(state);
  if (!call->list.labels.empty()) live = false;
  if (cursor.empty()) {
    return live ? list_live(call, 0) : list_history(call);
  }
  if (cursor[0] == 'H' &&
      (cursor.size() == 1 || parse_job_id(cursor.substr(1)))) {
    call->list.cursor = cursor.substr(1);
    return list_history(call);
  }
  char* end = nullptr;
  std::uint64_t at = 0;
  if (cursor[0] == 'L' && cursor.size() > 1 && cursor.size() <= 21) {
    at = std::strtoull(cursor.c_str() + 1, &end, 10);
  }
  if (end == nullptr || *end != '\0' || at == 0) {
    return refuse(call, Response::Status::bad_cursor,
                  "cursor: not one of this server's");
  }
  list_live(call, at);
}

namespace {

// What a job takes in a list, about.
std::uint64_t bytes_of(const JobView& view) {
  std::uint64_t bytes = 512 + view.error_message.size() +
                        view.progress_message.size() + view.dedup_key.size() +
                        view.sandbox.size() + view.blocked_data.size() +
                        view.input.size() + view.depends_on.size() * 40;
  for (const auto& [key, value] : view.labels) {
    bytes += key.size() + value.size() + 6;
  }
  return bytes;
}

}  // namespace

void ShardImpl::list_live(const CallPtr& call, std::uint64_t cursor) {
  const ListQuery& query = call->list;
  auto& views = call->response.views;
  const auto limit = static_cast<std::size_t>(query.limit);
  std::uint64_t examined = 0, bytes = 0;
  auto wanted = [&](const JobView& view) {
    if (!query.states.empty() &&
        std::find(query.states.begin(), query.states.end(), view.state) ==
            query.states.end()) {
      return false;
    }
    if (!query.kind.empty() && view.kind != query.kind) return false;
    if (!query.queue.empty() && view.queue != query.queue) return false;
    if (view.created_ms < query.since_ms) return false;
    return query.until_ms == 0 || view.created_ms <= query.until_ms;
  };
  cursor = core_.scan(cursor, kLiveExamineMax, [&](const Core::Look& look) {
    ++examined;
    if (!wanted(look.view)) return true;
    views.push_back(look.view);
    JobView& view = views.back();
    // From the cache only: a list reads no bodies.
    if (Body body = cache_.get(view.id)) fill_from_body(*body, false, &view);
    view.payload.clear();
    view.fsync = options_.core.fsync;
    view.waiting_for_level = view.state == State::ready && view.min_level > 0 &&
                             !level_seen(view.min_level);
    bytes += bytes_of(view);
    return views.size() < limit && bytes < query.bytes;
  });
  call->list.bytes -= std::min(bytes, call->list.bytes);
  call->response.scanned += examined;
  if (cursor != 0 && views.empty() && mono() < call->list_until_mono) {
    // Places of jobs that ended, or jobs that do not match: others first.
    call->list_at = cursor;
    call->parked = Call::Parked::list;
    scanning_.push_back(call);
    return;
  }
  if (cursor != 0) {
    call->response.cursor = "L" + std::to_string(cursor);
    return answer(call);
  }
  if (views.size() >= limit || call->list.bytes == 0) {
    call->response.cursor = "H";
    return answer(call);
  }
  list_history(call);
}

void ShardImpl::list_on() {
  if (scanning_.empty()) return;
  CallPtr call = std::move(scanning_.front());
  scanning_.pop_front();
  if (call->dropped) return;
  call->parked = Call::Parked::no;
  list_live(call, call->list_at);
}

// What had ended when the list was asked for should be in it: waits until
// history has caught up that far, within reason.
void ShardImpl::list_history(const CallPtr& call) {
  bool finals = call->list.states.empty();
  for (State state : call->list.states) finals = finals || is_final(state);
  if (!finals) return answer(call);
  call->lsn = core_.applied();
  call->deadline_mono = mono() + kListWaitMs;
  call->parked = Call::Parked::list;
  listing_.push_back(call);
}

// --- decide and commit ---

std::optional<Decision> ShardImpl::decide(Command command) {
  say_clock();
  core_.set_mono(mono());
  Decision decision = core_.decide(now(), random_.next(), std::move(command));
  if (!commit(&decision)) return std::nullopt;
  return decision;
}

// Beyond this point the log has it; nobody is told before it is durable.
bool ShardImpl::commit(Decision* decision) {
  for (Record& record : decision->records) {
    if (auto appended = log_->append(&record); !appended) {
      // Poisoned: what was applied before it is never told to anyone (H3). A
      // record over the batch maximum cannot come from bounded requests.
      CHECK(appended.error().code == Code::io);
      return false;
    }
    if (auto* end = std::get_if<EndRecord>(&record.body)) {
      // The core no longer needs the body's place; history still does.
      log_->need(end->body_place, +1);
    }
    sample_times(record);
    core_.apply(record);
    applied(&record);
  }
  return true;
}

// What the shard itself keeps of a record, the one appended last.
void ShardImpl::applied(Record* record) {
  std::visit(
      Overload{[&](EnqueueRecord& body) {
                 if (body.revived != 0) {
                   auto left = std::make_shared<Ended>();
                   left->id = body.id;
                   left->lsn = record->lsn;
                   left->left = true;
                   remember_ended(std::move(left));
                 }
                 cache_.put(body.id, log_->encoded());
               },
               [&](EndRecord&) { ended(record); },
               [&](RetryRecord& retry) { wake_beats(retry.fence); },
               [&](ReleaseRecord& release) { wake_beats(release.fence); },
               [&](BlockRecord& block) { wake_beats(block.fence); },
               [&](UnblockRecord&) { remember_unblock(*record); },
               [&](CancelRecord& cancel) {
                 if (beats_.empty()) return;
                 if (auto look = core_.look(cancel.id)) {
                   wake_beats(look->view.fence);
                 }
               },
               [](auto&) {}},
      record->body);
}

void ShardImpl::ended(Record* record) {
  auto& end = std::get<EndRecord>(record->body);
  for (EnqueueRecord& child : end.children) {
    std::vector<std::byte> bytes;
    const JobId id = child.id;
    encode(Record{record->time_ms, std::move(child)}, &bytes);
    cache_.put(id, bytes);
  }
  end.children.clear();
  auto made = std::make_shared<Ended>();
  made->id = end.id;
  made->lsn = record->lsn;
  made->fence = end.fence;
  made->by_complete = end.by_complete != 0;
  made->state = end.state;
  made->attempt = end.attempt;
  made->offset_ms = core_.clock_offset();
  made->finished_ms = record->time_ms + made->offset_ms;
  made->body_place = end.body_place;
  made->body_bytes = end.body_bytes;
  made->end_place = record->place;
  made->end_bytes = record->bytes;
  wake_beats(end.fence);
  Body body = cache_.take(end.id);
  std::size_t memory =
      memory_of(end) + (body != nullptr ? memory_of(*body) : 0);
  if (ended_memory_ + memory <= kEndedMemoryMax) {
    made->memory = memory;
    made->body = std::move(body);
    made->end = std::make_shared<const EndRecord>(std::move(end));
  }
  JobId id = made->id;
  remember_ended(std::move(made));
  wake_watchers(id);
}

// The parked lease calls that a decision feeds; then all who waited for what
// it recorded.
void ShardImpl::deliver(Decision* decision) {
  for (Decision::Fed& fed : decision->fed) {
    core_.unpark(fed.waiter);
    auto it = calls_.find(fed.waiter);
    CHECK(it != calls_.end());
    CallPtr call = it->second;
    unpark(call);
    give(call, fed.grants);
    answer(call);
  }
  run_woken();
}

// Puts granted jobs into a lease call's response; those that would make it
// longer than a reply may be go back.
void ShardImpl::give(const CallPtr& call,
                     const std::vector<GrantAnswer>& grants) {
  if (grants.empty()) return;
  ReleaseCommand excess;
  std::size_t total = 0;
  for (const GrantAnswer& grant : grants) {
    auto look = core_.look(grant.id);
    CHECK(look);
    std::size_t bytes =
        look->body_bytes + look->note_bytes + kLeaseOverheadBytes;
    if (!call->response.leases.empty() &&
        total + bytes > kLeaseBodiesBytesMax) {
      excess.fences.push_back(grant.fence);
      continue;
    }
    total += bytes;
    call->grants.push_back(grant.fence);
    LeaseView& lease = call->response.leases.emplace_back();
    lease.fence = grant.fence;
    lease.expires_at_ms = clock_.wall_ms() + options_.core.lease_ms;
    lease.job = std::move(look->view);
    fill_live(*look, call.get(), call->response.leases.size() - 1, true);
  }
  call->given_bytes += total;
  given_bytes_ += total;
  enlist(call);
  release_grants(std::move(excess.fences));
}

}  // namespace machina
