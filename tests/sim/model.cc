#include "tests/sim/model.h"

#include <algorithm>

namespace machina::sim {
namespace {

void must(bool good, const std::string& why) {
  if (!good) throw Wrong(why);
}

std::string show(const JobId& id) { return to_string(id); }

}  // namespace

void Model::fold(const Record& record) {
  must(record.time_ms >= time, "logged time went back");
  time = record.time_ms;
  std::visit([&](const auto& body) { fold(record, body); }, record.body);
}

ModelJob& Model::job(const JobId& id, State must_be) {
  auto found = live.find(id);
  must(found != live.end(), show(id) + " is not live");
  must(found->second.state == must_be,
       show(id) + " is " + std::string(name(found->second.state)) + ", not " +
           std::string(name(must_be)));
  return found->second;
}

ModelJob& Model::held(const JobId& id, Fence fence) {
  ModelJob& j = job(id, State::running);
  must(fence != 0 && j.fence == fence, show(id) + ": a stale fence");
  return j;
}

std::string Model::key_text(const NewJob& job) {
  if (job.concurrency_key.empty()) return "";
  if (job.kind_key) return "kind/" + job.concurrency_key;
  return "client/" + job.tenant + "/" + job.concurrency_key;
}

Model::Fifo Model::fifo_of(const NewJob& job) {
  return {job.queue,     job.kind,      job.priority,
          job.min_level, key_text(job), !job.concurrency_key.empty()};
}

// Ready, but its key's slots are taken: those that it asks for, or those that
// one before it in its line asks for.
bool Model::waits_for_slot(const ModelJob& j) const {
  std::string key = key_text(j.job);
  if (j.state != State::ready || key.empty() || j.doomed) return false;
  auto found = running_.find(key);
  int running = found == running_.end() ? 0 : found->second;
  const JobId& id = lines_.at(line_of(j.job)).begin()->second;
  return running >= j.job.concurrency_limit ||
         running >= live.at(id).job.concurrency_limit;
}

Model::Line Model::line_of(const NewJob& job) {
  return {job.queue, job.kind, job.min_level, key_text(job)};
}

Model::Rank Model::rank_of(const ModelJob& j) {
  return {-j.job.priority, !j.leased_before, j.ready};
}

void Model::unready(const ModelJob& j) {
  if (j.state != State::ready || j.job.concurrency_key.empty()) return;
  lines_[line_of(j.job)].erase(rank_of(j));
}

JobId Model::leasable(const LeaseCommand& c) const {
  for (const auto& [id, j] : live) {
    if (j.state != State::ready || j.job.min_level > c.level) continue;
    bool queue = c.queues.empty() ||
                 std::count(c.queues.begin(), c.queues.end(), j.job.queue);
    bool kind = std::any_of(c.kinds.begin(), c.kinds.end(),
                            [&j = j](const std::string& pattern) {
                              return pattern == "*" || pattern == j.job.kind;
                            });
    if (queue && kind && !waits_for_slot(j)) return id;
  }
  return {};
}

void Model::make_ready(const JobId& id, ModelJob& j) {
  j.at_wall = false;
  j.state = State::ready;
  j.ready = ++readies_;
  if (!j.job.concurrency_key.empty()) lines_[line_of(j.job)][rank_of(j)] = id;
  if (j.leased_before) return;
  fresh_[fifo_of(j.job)].insert({++commits_, id});
  j.commit = commits_;
}

void Model::free_slot(const ModelJob& j) {
  if (!j.job.concurrency_key.empty()) --running_[key_text(j.job)];
}

void Model::make_due(const JobId& id, ModelJob& j) {
  if (j.run_at > (j.at_wall ? time + offset : time)) {
    j.state = State::scheduled;
  } else {
    make_ready(id, j);
  }
}

void Model::fold(const Record& record, const EnqueueRecord& r) {
  must(!live.contains(r.id), show(r.id) + " exists twice");
  ModelJob j;
  j.job = r.job;
  j.born = ++births_;
  j.at_wall = r.job.run_at_is_wall;
  j.run_at = server_time(r.job.run_at_ms, j.at_wall);
  j.body_lsn = record.lsn;
  j.body_place = record.place;
  j.body_bytes = record.bytes;
  if (r.revived) {
    auto was = ended.find(r.id);
    must(was != ended.end(), show(r.id) + " revived, but never ended");
    must(was->second != State::succeeded &&
             was->second == static_cast<State>(r.revived),
         show(r.id) + " revived from another state");
    ended.erase(was);
    j.attempt = j.base = r.attempt;
    // It waits for all that live, or was told to ignore them.
    for (const JobId& id : r.job.depends_on) {
      bool unmet = std::count(r.unmet.begin(), r.unmet.end(), id) > 0;
      must(r.unmet.empty() || unmet == live.contains(id),
           show(r.id) + " is retried without a live dependency");
      if (unmet) j.unmet.insert(id);
    }
    if (j.unmet.empty()) {
      j.run_at = 0;
      j.at_wall = false;
    }
  } else {
    must(!bodies.contains(r.id), show(r.id) + ": an id used twice");
    if (!r.job.dedup_key.empty() && r.job.dedup_ttl_ms > 0) {
      must(key_of(r.job, time) == nullptr,
           "dedup key " + r.job.dedup_key + " was forgotten");
      keys_[{r.job.tenant, r.job.queue, r.job.dedup_key}] = {
          r.id,
          time + r.job.dedup_ttl_ms,
          r.job.kind,
          {r.job.payload_digest[0], r.job.payload_digest[1]}};
    }
    for (const JobId& id : r.job.depends_on) {
      bool unmet = std::count(r.unmet.begin(), r.unmet.end(), id) > 0;
      if (live.contains(id)) {
        must(unmet, show(r.id) + " does not wait for a live dependency");
        j.unmet.insert(id);
        continue;
      }
      auto was = ended.find(id);
      must(was != ended.end(), show(r.id) + " depends on an unknown job");
      bool well = was->second == State::succeeded;
      must(well != unmet, show(r.id) + ": a finished dependency misjudged");
      if (!well) j.doomed = true;
    }
  }
  bodies[r.id] = r;
  ModelJob& at = live.emplace(r.id, std::move(j)).first->second;
  if (at.doomed || !at.unmet.empty()) {
    at.state = State::waiting;
  } else {
    make_due(r.id, at);
  }
  must(at.state == r.state, show(r.id) + " begins in the wrong state");
}

void Model::fold(const Record&, const GrantRecord& r) {
  ModelJob& j = job(r.id, State::ready);
  must(r.fence > last_fence, "a fence did not rise");
  last_fence = r.fence;
  must(r.attempt == j.attempt + 1, show(r.id) + ": attempts are miscounted");
  must(r.attempt <= j.base + j.job.max_attempts,
       show(r.id) + " has more attempts than allowed");
  must(r.level >= j.job.min_level, show(r.id) + " is leased below its level");
  if (!j.leased_before) {
    auto& fifo = fresh_[fifo_of(j.job)];
    must(!fifo.empty() && fifo.begin()->second == r.id,
         show(r.id) + " is leased before an older one, " +
             (fifo.empty() ? "none" : show(fifo.begin()->second)));
    fifo.erase(fifo.begin());
  }
  if (std::string key = key_text(j.job); !key.empty()) {
    must(running_[key] < j.job.concurrency_limit,
         show(r.id) + " is leased while " + std::to_string(running_[key]) +
             " of its key run");
    must(!waits_for_slot(j), show(r.id) + " overtakes one of its key");
    ++running_[key];
    unready(j);
  }
  j.state = State::running;
  j.leased_before = true;
  j.attempt = r.attempt;
  j.fence = r.fence;
}

void Model::fold(const Record& record, const EndRecord& r) {
  auto found = live.find(r.id);
  must(found != live.end(), show(r.id) + " ends, but is not live");
  ModelJob& j = found->second;
  must((j.state == State::running) == (r.fence != 0),
       show(r.id) + " ends by a lease that it has not");
  if (r.fence) held(r.id, r.fence);
  if (r.fence) free_slot(j);
  unready(j);
  must(r.body_place == j.body_place && r.body_bytes == j.body_bytes,
       show(r.id) + " ends with another's body");
  must(r.attempt == j.attempt, show(r.id) + " ends with a wrong attempt");
  if (r.state == State::dead && r.fence) {
    must(!j.cancel, show(r.id) + " died though it was cancelled");
  }
  if (r.outcome.code == EndCode::dependency) {
    must(j.doomed, show(r.id) + " ends for a dependency that did not fail");
  }
  must(!j.doomed || r.state == State::cancelled, show(r.id) + " was doomed");
  must(r.state != State::succeeded || r.by_complete, "success by nobody");
  if (r.by_complete) {
    must(completed.emplace(r.fence, r.state).second, "completed twice");
  }
  if (j.state == State::ready && !j.leased_before) {
    fresh_[fifo_of(j.job)].erase({j.commit, r.id});
  }
  live.erase(found);
  must(ended.emplace(r.id, r.state).second, show(r.id) + " ended twice");
  std::vector<std::pair<std::uint64_t, JobId>> freed;
  for (auto& [id, other] : live) {
    if (other.unmet.erase(r.id) == 0) continue;
    if (r.state != State::succeeded) {
      other.doomed = true;
    } else if (other.unmet.empty() && !other.doomed) {
      freed.emplace_back(other.born, id);
    }
  }
  // Children come first: the core tells dependents after the record is in.
  for (const EnqueueRecord& child : r.children) fold(record, child);
  std::sort(freed.begin(), freed.end());
  for (const auto& [order, id] : freed) make_due(id, live.at(id));
}

void Model::fold(const Record&, const RetryRecord& r) {
  ModelJob& j = held(r.id, r.fence);
  must(!j.cancel, show(r.id) + " is retried though it was cancelled");
  must(r.attempt == j.attempt && j.attempt < j.base + j.job.max_attempts,
       show(r.id) + " is retried past its allowance");
  j.fence = 0;
  free_slot(j);
  j.run_at = server_time(r.run_at_ms, false);
  make_due(r.id, j);
}

void Model::fold(const Record&, const ReleaseRecord& r) {
  ModelJob& j = held(r.id, r.fence);
  must(!j.cancel, show(r.id) + " is released though it was cancelled");
  j.fence = 0;
  free_slot(j);
  --j.attempt;
  make_ready(r.id, j);
}

void Model::fold(const Record&, const BlockRecord& r) {
  ModelJob& j = held(r.id, r.fence);
  must(!j.cancel, show(r.id) + " is blocked though it was cancelled");
  j.fence = 0;
  free_slot(j);
  --j.attempt;
  j.state = State::blocked;
  j.token = r.token;
  j.deadline = server_time(r.deadline_ms, false);
}

void Model::fold(const Record&, const UnblockRecord& r) {
  ModelJob& j = job(r.id, State::blocked);
  j.deadline = 0;
  make_ready(r.id, j);
}

void Model::fold(const Record&, const CancelRecord& r) {
  job(r.id, State::running).cancel = true;
}

void Model::fold(const Record&, const PromoteRecord& r) {
  for (const JobId& id : r.ids) {
    ModelJob& j = job(id, State::scheduled);
    must(j.run_at <= (j.at_wall ? time + offset : time),
         show(id) + " is promoted before its time");
    make_ready(id, j);
  }
}

void Model::fold(const Record&, const ClockRecord& r) { offset = r.offset_ms; }

void Model::fold(const Record&, const ForgetRecord& r) {
  must(r.until_ms <= time, "keys are forgotten before their time");
}

const ModelKey* Model::key_of(const NewJob& job, Millis now) const {
  auto found = keys_.find({job.tenant, job.queue, job.dedup_key});
  bool known = found != keys_.end() && now < found->second.expiry;
  return known ? &found->second : nullptr;
}

std::string Model::difference(const Core& core) const {
  if (core.live_jobs() != live.size()) {
    return std::to_string(core.live_jobs()) + " live jobs, not " +
           std::to_string(live.size());
  }
  for (const auto& [id, j] : live) {
    auto look = core.look(id);
    if (!look) return show(id) + " is lost";
    const JobView& v = look->view;
    State state = j.doomed ? State::cancelled : j.state;
    bool same =
        v.state == state && v.attempt == j.attempt && v.kind == j.job.kind &&
        v.queue == j.job.queue && v.priority == j.job.priority &&
        v.fence == j.fence && v.cancel_requested == j.cancel &&
        v.blocked_deadline_ms == (j.deadline ? j.deadline + offset : 0) &&
        v.waiting_for_concurrency == waits_for_slot(j) &&
        v.max_attempts == j.base + j.job.max_attempts &&
        look->body_place == j.body_place && look->body_bytes == j.body_bytes;
    if (!same) {
      return show(id) + " is " + std::string(name(v.state)) + " attempt " +
             std::to_string(v.attempt) + " fence " + fence_hex(v.fence) +
             (v.waiting_for_concurrency ? " held" : "") + ", not " +
             std::string(name(state)) + " attempt " +
             std::to_string(j.attempt) + " fence " + fence_hex(j.fence);
    }
  }
  std::uint64_t finals = 0;
  for (const QueueCounts& q : core.counts()) {
    for (int s = 5; s < kStates; ++s) finals += q.by_state[s];
  }
  if (finals != ended.size()) {
    return std::to_string(finals) + " ended, not " +
           std::to_string(ended.size());
  }
  return "";
}

}  // namespace machina::sim
