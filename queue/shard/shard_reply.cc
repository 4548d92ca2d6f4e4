// An answer on its way out: its views filled from what is at hand, held until
// the log is durable (H1), completed from files by a store thread, sent.

#include <algorithm>

#include "queue/base/check.h"
#include "queue/base/logger.h"
#include "queue/shard/shard_impl.h"

namespace machina {

namespace {

// An assignment would keep the memory.
void let_go(std::string* text) { std::string().swap(*text); }

}  // namespace

// --- views ---

void ShardImpl::want_view(Call* call, std::size_t index, const JobId& id) {
  if (add_live_view(call, index, id)) return;
  if (EndedPtr ended = find_ended(id)) {
    return add_ended_view(call, index, ended);
  }
  Need missing;
  missing.what = Need::What::finished;
  missing.index = index;
  missing.id = id;
  need(call, std::move(missing));
}

bool ShardImpl::add_live_view(Call* call, std::size_t index, const JobId& id) {
  auto look = core_.look(id);
  if (!look) return false;
  JobView& view = call->response.views[index];
  bool duplicate = call->response.items[index].answer == Answer::duplicate;
  view = std::move(look->view);
  view.duplicate = duplicate;
  call->response.items[index].state = view.state;
  fill_live(*look, call, index, false);
  return true;
}

// `look.view` has been moved to its slot; what it lacks is added.
void ShardImpl::fill_live(const Core::Look& look, Call* call, std::size_t index,
                          bool of_lease) {
  JobView& view =
      of_lease ? call->response.leases[index].job : call->response.views[index];
  view.fsync = options_.core.fsync;
  view.waiting_for_level = view.state == State::ready && view.min_level > 0 &&
                           !level_seen(view.min_level);
  if (Body body = cache_.get(view.id)) {
    fill_from_body(*body, of_lease || call->with_payload, &view);
    if (!of_lease) leave_out(call, &view);
  } else if (!of_lease && call->with_payload &&
             look.body_bytes > call->view_bytes) {
    call->response.left_out += look.body_bytes;  // not even read
  } else {
    Need missing;
    missing.what = Need::What::body;
    missing.index = index;
    missing.of_lease = of_lease;
    missing.id = view.id;
    missing.fence = view.fence;
    missing.place = look.body_place;
    missing.bytes = look.body_bytes;
    need(call, std::move(missing));
  }
  if (look.note_place == 0) return;
  Need missing;
  missing.what = Need::What::note;
  missing.index = index;
  missing.of_lease = of_lease;
  missing.id = view.id;
  missing.fence = view.fence;
  missing.place = look.note_place;
  missing.bytes = look.note_bytes;
  need(call, std::move(missing));
}

void ShardImpl::add_ended_view(Call* call, std::size_t index,
                               const EndedPtr& ended) {
  if (!call->light && (ended->body == nullptr || ended->end == nullptr)) {
    Need missing;
    missing.what = Need::What::ended;
    missing.index = index;
    missing.id = ended->id;
    missing.ended = ended;
    return need(call, std::move(missing));
  }
  JobView& view = call->response.views[index];
  if (call->light) {
    view.id = ended->id;
    view.state = ended->state;
    return settle_item(call, index, ended->state);
  }
  fill_from_body(*ended->body, call->with_payload, &view);
  fill_from_end(*ended->end, ended->finished_ms, &view);
  leave_out(call, &view);
  view.fsync = options_.core.fsync;
  settle_item(call, index, ended->state);
}

void ShardImpl::leave_out(Call* call, JobView* view) {
  std::uint64_t bytes = 0;
  std::string* const parts[] = {&view->payload, &view->result,
                                &view->blocked_data, &view->input};
  for (const std::string* part : parts) bytes += part->size();
  if (bytes <= call->view_bytes) return;
  call->response.left_out += bytes;
  for (std::string* part : parts) let_go(part);
}

// The job that item `index` asks about is finished.
void ShardImpl::settle_item(Call* call, std::size_t index, State state) {
  if (index >= call->response.items.size()) return;
  ItemAnswer& item = call->response.items[index];
  item.state = state;
  if (item.answer == Answer::duplicate) {
    call->response.views[index].duplicate = true;
  }
  if (item.answer != Answer::not_found) return;
  bool cancelled =
      call->purpose == Purpose::cancel && state == State::cancelled;
  item.answer = cancelled ? Answer::already : Answer::wrong_state;
}

// --- needs ---

void ShardImpl::need(Call* call, Need need) {
  pin(need, +1);
  need.light = call->light;
  if (!need.of_lease) need.view_bytes = call->view_bytes;
  need.with_payload = need.of_lease || call->with_payload;
  call->needs.push_back(std::move(need));
}

// Keeps the log's segments until they have been read.
void ShardImpl::pin(const Need& need, int delta) {
  if (need.place != 0) log_->need(need.place, delta);
  if (need.ended == nullptr) return;
  if (need.ended->body_place != 0) log_->need(need.ended->body_place, delta);
  if (need.ended->end_place != 0) log_->need(need.ended->end_place, delta);
}

void ShardImpl::drop_needs(Call* call) {
  for (const Need& need : call->needs) pin(need, -1);
  call->needs.clear();
}

namespace {

constexpr std::uint32_t kKeptPayloadBytes = 16 << 10;  // not worth a copy

// What the answer will not have is not brought to the loop's thread either.
void leave_out(Need* need) {
  if (!need->finished) return;
  std::string& payload = need->finished->body.job.payload;
  std::string& result = need->finished->end.outcome.result;
  if (need->light || !need->with_payload) let_go(&payload);
  if (need->light) let_go(&result);
  const std::uint64_t bytes = payload.size() + result.size();
  if (bytes <= need->view_bytes) return;
  need->left_out = bytes;
  let_go(&payload);
  let_go(&result);
}

}  // namespace

void fetch_need(const LogStore& log, History& history, Millis at, Need* need) {
  switch (need->what) {
    case Need::What::body: {
      auto body = read_body(log, need->id, need->place, need->bytes);
      if (body) {
        need->body = std::move(*body);
        if (!need->with_payload && need->bytes > kKeptPayloadBytes) {
          auto bare = std::make_shared<EnqueueRecord>(*need->body);
          let_go(&bare->job.payload);
          need->body = std::move(bare);
        }
      } else {
        need->error = body.error().what;
      }
      return;
    }
    case Need::What::note: {
      auto note = read_record(log, need->place, need->bytes);
      if (note) {
        need->note = std::move(*note);
      } else {
        need->error = note.error().what;
      }
      return;
    }
    case Need::What::ended: {
      const Ended& ended = *need->ended;
      auto body = read_body(log, ended.id, ended.body_place, ended.body_bytes);
      auto end = read_record(log, ended.end_place, ended.end_bytes);
      if (!body || !end) {
        need->error = !body ? body.error().what : end.error().what;
        return;
      }
      FinishedJob job;
      job.lsn = ended.lsn;
      job.finished_ms = ended.finished_ms;
      job.body = **body;
      if (auto* found = std::get_if<EndRecord>(&end->body)) {
        job.end = std::move(*found);
      }
      need->finished = std::move(job);
      return leave_out(need);
    }
    case Need::What::finished:
    case Need::What::by_fence: {
      auto found = need->what == Need::What::finished
                       ? history.find(need->id, at)
                       : history.find_by_fence(need->fence, at);
      if (found) {
        need->finished = std::move(*found);
      } else {
        need->error = found.error().what;
      }
      return leave_out(need);
    }
  }
}

void ShardImpl::fetch(const CallPtr& call) {
  auto needs = std::make_shared<std::vector<Need>>(std::move(call->needs));
  call->needs.clear();
  Millis at = now();
  bool posted = store_->post([=, this] {
    for (Need& need : *needs) fetch_need(*log_, *history_, at, &need);
    return [=, this] { fetched(call, needs.get()); };
  });
  if (posted) return;
  for (const Need& need : *needs) pin(need, -1);
  refuse(call, Response::Status::failed, "too many file reads are waiting");
}

void ShardImpl::fetched(const CallPtr& call, std::vector<Need>* needs) {
  std::vector<Fence> unreadable;
  bool again = false;
  for (Need& need : *needs) {
    pin(need, -1);
    // An explicit retry may have taken it out of history while we looked.
    if (need.what == Need::What::finished && !need.finished &&
        need.error.empty() &&
        (core_.live(need.id) || find_ended(need.id) != nullptr)) {
      want_view(call.get(), need.index, need.id);
      again = true;
      continue;
    }
    settle(call.get(), &need, &unreadable);
  }
  // A job whose body cannot be read is not sent. Its lease is left to expire,
  // so that its attempts end some time instead of being granted for ever.
  for (Fence fence : unreadable) {
    std::erase_if(call->response.leases,
                  [&](const LeaseView& l) { return l.fence == fence; });
    std::erase(call->grants, fence);
  }
  if (call->response.status == Response::Status::failed) {
    return refuse(call, Response::Status::failed,
                  std::string(call->response.detail));
  }
  // What was looked for twice is newer than what the call was held for.
  if (again) return answer(call);
  send(call);
}

void ShardImpl::settle(Call* call, Need* need, std::vector<Fence>* unreadable) {
  if (!need->error.empty()) {
    LogLine(Severity::error, "read_failed", need->error);
    if (need->of_lease) {
      unreadable->push_back(need->fence);
    } else {
      // Half a stored answer would be a wrong one.
      call->response.status = Response::Status::failed;
      call->response.detail = need->error;
    }
    return;
  }
  if (need->finished || need->what == Need::What::finished) {
    return settle_finished(call, need);
  }
  if (need->what == Need::What::by_fence) return;  // it stays stale
  JobView& view = need->of_lease ? call->response.leases[need->index].job
                                 : call->response.views[need->index];
  if (need->body != nullptr) {
    fill_from_body(*need->body, need->with_payload, &view);
  }
  if (need->note) fill_from_note(*need->note, &view);
  if (!need->of_lease) leave_out(call, &view);
}

void ShardImpl::settle_finished(Call* call, Need* need) {
  auto& items = call->response.items;
  if (need->index >= items.size()) return;
  ItemAnswer& item = items[need->index];
  if (!need->finished) {
    if (call->purpose == Purpose::get) item.answer = Answer::not_found;
    if (item.answer == Answer::duplicate) settle_forgotten(call, need->index);
    return;
  }
  const FinishedJob& job = *need->finished;
  if (need->what == Need::What::by_fence) {
    if (job.end.by_complete == 0 || job.end.fence != need->fence) return;
    item.answer = Answer::ok;
    item.id = job.body.id;
  }
  JobView& view = call->response.views[need->index];
  view = view_of(job, options_.core.fsync);
  call->response.left_out += need->left_out;
  settle_item(call, need->index, job.end.state);
}

// History keeps nothing of it any more; its key says how it ended. Where even
// that is not known there is nothing true to say but that it is gone.
void ShardImpl::settle_forgotten(Call* call, std::size_t index) {
  ItemAnswer& item = call->response.items[index];
  if (item.finished_ms == 0) {
    item.answer = Answer::not_found;
    return;
  }
  JobView& view = call->response.views[index];
  if (call->asked != nullptr) view = std::move(*call->asked);
  view.id = item.id;
  view.state = item.state;
  view.attempt = item.attempt;
  view.created_ms = created_ms(item.id);
  view.finished_ms = item.finished_ms;
  view.error_code = item.code;
  view.error_attempt = item.attempt;
  view.duplicate = true;
  view.past_retention = true;
}

// --- out ---

void ShardImpl::answer(const CallPtr& call) {
  call->lsn = core_.applied();
  held_.push_back(call);
}

void ShardImpl::refuse(const CallPtr& call, Response::Status status,
                       std::string detail) {
  drop_needs(call.get());
  std::vector<Fence> grants = std::move(call->grants);
  call->grants.clear();
  call->response = Response{};
  call->response.to = call->from;
  call->response.status = status;
  call->response.detail = std::move(detail);
  if (status == Response::Status::poisoned) return send(call);
  release_grants(std::move(grants));
  answer(call);
}

void ShardImpl::release_held() {
  const Lsn durable = log_->durable();
  // The front is taken before it is sent: sending may bring the next request.
  while (!held_.empty() && held_.front()->lsn <= durable) {
    CallPtr call = std::move(held_.front());
    held_.pop_front();
    if (call->dropped) {
      drop_needs(call.get());
    } else if (call->needs.empty()) {
      send(call);
    } else {
      fetch(call);
    }
  }
}

void ShardImpl::send(const CallPtr& call) {
  unlist(call);
  call->grants.clear();
  forget_given(call.get());
  if (call->dropped) return;
  call->dropped = true;  // once
  if (send_) send_(std::move(call->response));
}

// H3: nobody knows what the disk kept of what is not durable.
void ShardImpl::fail_all_poisoned() {
  if (!told_poison_) {
    told_poison_ = true;
    LogLine(Severity::error, "log_poisoned",
            "the log is poisoned: " + log_->poison_cause());
  }
  std::deque<CallPtr> held;
  held.swap(held_);
  for (const CallPtr& call : held) {
    refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  std::vector<CallPtr> parked;
  for (const auto& [number, call] : calls_) {
    if (call->parked != Call::Parked::no) parked.push_back(call);
  }
  for (const CallPtr& call : parked) {
    unpark(call);
    refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  std::vector<CallPtr> listing;
  listing.swap(listing_);
  listing.insert(listing.end(), scanning_.begin(), scanning_.end());
  scanning_.clear();
  for (const CallPtr& call : listing) {
    refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
}

void ShardImpl::release_grants(std::vector<Fence> fences) {
  if (fences.empty() || log_->poisoned()) return;
  ReleaseCommand release;
  release.fences = std::move(fences);
  if (auto decision = decide(Command(std::move(release)))) {
    deliver(&*decision);
  }
}

void ShardImpl::abandon(std::uint32_t io, std::uint64_t connection) {
  auto it = by_connection_.find({io, connection});
  if (it == by_connection_.end()) return;
  std::vector<std::uint64_t> numbers = std::move(it->second);
  by_connection_.erase(it);
  std::vector<Fence> unsent;
  for (std::uint64_t number : numbers) {
    auto found = calls_.find(number);
    if (found == calls_.end()) continue;
    CallPtr call = found->second;
    if (call->parked != Call::Parked::no) {
      unpark(call);
      drop_needs(call.get());
    }
    unsent.insert(unsent.end(), call->grants.begin(), call->grants.end());
    call->grants.clear();
    forget_given(call.get());
    call->dropped = true;
    calls_.erase(number);
  }
  release_grants(std::move(unsent));
}

void ShardImpl::hurry(std::uint32_t io, std::uint64_t connection) {
  auto it = by_connection_.find({io, connection});
  if (it == by_connection_.end()) return;
  const std::vector<std::uint64_t> numbers = it->second;
  for (std::uint64_t number : numbers) {
    auto found = calls_.find(number);
    if (found == calls_.end()) continue;
    CallPtr call = found->second;
    call->hurried = true;
    // A list waits for what is sure to come.
    if (call->parked == Call::Parked::no || call->parked == Call::Parked::list)
      continue;
    timed_out(call);
  }
}

void ShardImpl::enlist(const CallPtr& call) {
  if (call->number == 0) call->number = next_call_++;
  if (!calls_.emplace(call->number, call).second) return;
  CHECK(calls_.size() <= kCallsMax);
  by_connection_[{call->from.io, call->from.connection}].push_back(
      call->number);
}

void ShardImpl::forget_given(Call* call) {
  given_bytes_ -= std::exchange(call->given_bytes, 0);
}

void ShardImpl::unlist(const CallPtr& call) {
  if (call->number == 0 || calls_.erase(call->number) == 0) return;
  auto it = by_connection_.find({call->from.io, call->from.connection});
  if (it == by_connection_.end()) return;
  std::erase(it->second, call->number);
  if (it->second.empty()) by_connection_.erase(it);
}

}  // namespace machina
