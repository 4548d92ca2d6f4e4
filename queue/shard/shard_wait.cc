// What waits: lease calls for a job, heartbeats for a cancel, clients for a
// job's end; and the timers that bound each wait.

#include <algorithm>

#include "queue/shard/shard_impl.h"

namespace machina {

bool ShardImpl::park(const CallPtr& call, Call::Parked how, Millis wait_ms) {
  if (calls_full() || call->hurried || call->dropped) return false;
  enlist(call);
  call->parked = how;
  call->deadline_mono = mono() + wait_ms;
  timers_.emplace(call->deadline_mono, call->number);
  if (how == Call::Parked::watch) {
    watchers_.emplace(call->watched, call->number);
  } else if (how == Call::Parked::heartbeat) {
    for (const auto& item : call->beat.items) {
      beats_.emplace(item.fence, call->number);
    }
  }
  return true;
}

template <class Map, class Key>
void erase_pair(Map* map, const Key& key, std::uint64_t number) {
  auto [from, to] = map->equal_range(key);
  for (auto it = from; it != to;) {
    it = it->second == number ? map->erase(it) : std::next(it);
  }
}

void ShardImpl::unpark(const CallPtr& call) {
  timers_.erase({call->deadline_mono, call->number});
  if (call->parked == Call::Parked::lease) {
    core_.unpark(call->number);
  } else if (call->parked == Call::Parked::watch) {
    erase_pair(&watchers_, call->watched, call->number);
  } else if (call->parked == Call::Parked::heartbeat) {
    for (const auto& item : call->beat.items) {
      erase_pair(&beats_, item.fence, call->number);
    }
  }
  call->parked = Call::Parked::no;
}

void ShardImpl::timed_out(const CallPtr& call) {
  switch (call->parked) {
    case Call::Parked::watch:
      return finish_watch(call);
    case Call::Parked::heartbeat:
      return finish_beat(call);
    default:
      unpark(call);
      answer(call);
  }
}

void ShardImpl::run_timers() {
  const Millis at = mono();
  while (!timers_.empty() && timers_.begin()->first <= at) {
    auto it = calls_.find(timers_.begin()->second);
    if (it == calls_.end()) {
      timers_.erase(timers_.begin());
      continue;
    }
    CallPtr call = it->second;
    timed_out(call);
  }
}

// The job has ended, or the wait has.
void ShardImpl::finish_watch(const CallPtr& call) {
  unpark(call);
  drop_needs(call.get());
  auto& response = call->response;
  response.waited_out = core_.live(call->watched);
  response.left_out = 0;
  response.views.assign(1, JobView{});
  response.views[0].id = call->watched;
  want_view(call.get(), 0, call->watched);
  answer(call);
}

// A cancel or a problem has come, or the wait has passed.
void ShardImpl::finish_beat(const CallPtr& call) {
  unpark(call);
  HeartbeatCommand again;
  for (const auto& item : call->beat.items) {
    again.items.push_back({item.fence, -1, {}});
  }
  auto decision = decide(Command(again));
  if (!decision) {
    return refuse(call, Response::Status::poisoned, log_->poison_cause());
  }
  call->response.items = std::move(decision->items);
  const auto& items = call->response.items;
  for (std::size_t i = 0; i < items.size() && i < again.items.size(); ++i) {
    if (items[i].answer != Answer::ok) continue;
    core_.heartbeat(again.items[i].fence, mono() + options_.core.lease_ms, -1,
                    {});
  }
  deliver(&*decision);
  answer(call);
}

void ShardImpl::wake_watchers(const JobId& id) {
  if (watchers_.empty()) return;
  auto [from, to] = watchers_.equal_range(id);
  for (auto it = from; it != to; ++it) woken_.push_back(it->second);
}

void ShardImpl::wake_beats(Fence fence) {
  if (beats_.empty() || fence == 0) return;
  auto [from, to] = beats_.equal_range(fence);
  for (auto it = from; it != to; ++it) woken_.push_back(it->second);
}

void ShardImpl::run_woken() {
  while (!woken_.empty()) {
    std::uint64_t number = woken_.back();
    woken_.pop_back();
    auto it = calls_.find(number);
    if (it == calls_.end()) continue;
    CallPtr call = it->second;
    if (call->parked == Call::Parked::watch) finish_watch(call);
    if (call->parked == Call::Parked::heartbeat) finish_beat(call);
  }
}

void ShardImpl::answer_all_parked() {
  std::vector<CallPtr> parked;
  for (const auto& [number, call] : calls_) {
    if (call->parked != Call::Parked::no) parked.push_back(call);
  }
  for (const CallPtr& call : parked) {
    if (call->parked != Call::Parked::no) timed_out(call);
  }
}

void ShardImpl::answer_parked_leases() {
  std::vector<CallPtr> parked;
  for (const auto& [number, call] : calls_) {
    if (call->parked == Call::Parked::lease) parked.push_back(call);
  }
  for (const CallPtr& call : parked) timed_out(call);
}

// Has a worker that strong asked for work lately?
bool ShardImpl::level_seen(Level level) const {
  for (Level l = level; l <= kLevelMax; ++l) {
    Millis seen = level_seen_mono_[l];
    if (seen != 0 && mono() - seen <= kLevelSeenMs) return true;
  }
  return false;
}

}  // namespace machina
