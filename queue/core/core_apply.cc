// The only code that changes durable state. Everything here is a function of
// the state and the record alone.

#include <algorithm>
#include <cstring>

#include "queue/base/check.h"
#include "queue/base/hex.h"
#include "queue/base/utf8.h"
#include "queue/core/core_state.h"

namespace machina {
namespace {

std::uint32_t to_u32(Millis ms) {
  return static_cast<std::uint32_t>(std::clamp<Millis>(ms, 0, 0xffffffff));
}

template <class T>
void list_push(Slab<T>& slab, JobList& list, std::uint32_t slot) {
  slab[slot].a = kNone;
  slab[slot].b = list.tail;
  if (list.tail == kNone) {
    list.head = slot;
  } else {
    slab[list.tail].a = slot;
  }
  list.tail = slot;
}

template <class T>
void list_remove(Slab<T>& slab, JobList& list, std::uint32_t slot) {
  std::uint32_t next = slab[slot].a, before = slab[slot].b;
  (before == kNone ? list.head : slab[before].a) = next;
  (next == kNone ? list.tail : slab[next].b) = before;
}

}  // namespace

void Core::Impl::apply(const Record& record) {
  CHECK(record.lsn == applied + 1);  // append first, then apply
  CHECK(record.time_ms >= time);
  time = record.time_ms;
  std::visit([&](const auto& body) { apply(record, body); }, record.body);
  applied = record.lsn;
  pump();
}

// --- a job begins ---

void Core::Impl::apply(const Record& record, const EnqueueRecord& r) {
  CHECK(find(r.id) == kNone);
  ++next_id;
  const NewJob& job = r.job;
  std::uint32_t slot = jobs.allocate();
  std::uint32_t line = line_for(job.queue, job.kind, job.min_level);
  JobEntry& e = jobs[slot];
  e.id = r.id;
  e.body_place = record.place;
  e.body_bytes = record.bytes;
  e.a = e.b = e.dependents = e.extra = kNone;
  e.line = line;
  e.tenant = tenant_for(job.tenant);
  e.priority = static_cast<std::uint8_t>(job.priority);
  e.flags = kUsed;
  e.retry_min = to_u32(job.retry_min_ms);
  e.retry_max = to_u32(job.retry_max_ms);
  e.base = e.attempt = std::min<std::uint16_t>(r.attempt, 60'000);
  e.limit = static_cast<std::uint16_t>(
      e.base + std::clamp(job.max_attempts, 1, kMaxAttemptsMax));
  if (job.run_at_is_wall) {
    e.flags |= kAtWall;
    e.time = job.run_at_ms;
  } else {
    e.time = job.run_at_ms == 0 ? 0 : job.run_at_ms - offset;
  }
  if (!job.concurrency_key.empty()) {
    set_key(slot, concurrency_key_of(job), job.concurrency_limit);
  }
  job_index.insert(slot);
  use_line(line, +1);
  need(record.place, +1);
  if (r.revived) {
    std::uint64_t& count = queues[lines[line].queue].by_state[r.revived];
    if (count > 0) --count;  // the queue's name may have been forgotten since
    if (std::uint32_t at = dedup_by_job.find(r.id); at != kNone) {
      dedups[at].finished = 0;
    }
  } else {
    if (!job.dedup_key.empty() && job.dedup_ttl_ms > 0) remember(job, r.id);
    ++totals.enqueued;
  }
  CHECK((r.state == State::waiting) == !r.unmet.empty());
  if (r.state != State::ready) {
    enter(slot, r.state);
  } else {
    enter_ready(slot);
  }
  bool lost = false;
  for (const JobId& id : r.unmet) {
    std::uint32_t dependency = find(id);
    CHECK(dependency != slot);
    if (dependency == kNone) {
      lost = true;  // it has ended, and not well
    } else {
      add_edge(dependency, slot);
    }
  }
  if (lost) doom(slot);
}

void Core::Impl::remember(const NewJob& job, const JobId& id) {
  KeyHash key = dedup_key_of(job);
  std::uint32_t slot = dedup_index.find(key);
  bool known = slot != kNone;
  if (known) {
    CHECK(dedups[slot].expiry <= time);
    dedup_by_job.erase(slot);
    dedups[slot].finished = 0;
  } else {
    slot = dedups.allocate();
    dedups[slot].key = key;
    dedup_index.insert(slot);
  }
  DedupEntry& entry = dedups[slot];
  entry.job = id;
  dedup_by_job.insert(slot);
  entry.digest = dedup_digest_of(job);
  entry.expiry = time + job.dedup_ttl_ms;
  if (known) {
    expiries.update(slot);
  } else {
    expiries.push(slot);
  }
}

void Core::Impl::remember_end(const EndRecord& r) {
  std::uint32_t slot = dedup_by_job.find(r.id);
  if (slot == kNone) return;
  DedupEntry& entry = dedups[slot];
  entry.finished = time;
  entry.attempt = r.attempt;
  entry.state = u8(r.state);
  entry.code = static_cast<std::uint8_t>(r.outcome.code);
}

void Core::Impl::apply(const Record&, const ForgetRecord& r) {
  for (std::uint32_t i = 0; i < r.count; ++i) {
    CHECK(!expiries.empty());
    std::uint32_t slot = expiries.top();
    CHECK(dedups[slot].expiry <= r.until_ms);
    expiries.remove(slot);
    dedup_index.erase(slot);
    dedup_by_job.erase(slot);
    dedups.release(slot);
  }
}

// --- an attempt begins and ends ---

void Core::Impl::apply(const Record&, const GrantRecord& r) {
  std::uint32_t slot = find(r.id);
  CHECK(slot != kNone);
  JobEntry& e = jobs[slot];
  CHECK(e.state == u8(State::ready));
  CHECK(r.attempt == e.attempt + 1);
  CHECK(r.fence > last_fence);
  CHECK(!(e.flags & kKeyed) ||
        keyed[e.extra].limit > keys[key_slot(e)].running);
  leave(slot);
  LeaseEntry lease{};
  lease.fence = r.fence;
  lease.started = time;
  lease.deadline = mono + options.lease_ms;
  lease.job = slot;
  lease.level = r.level;
  lease.session = r.session;
  lease.worker_bytes = static_cast<std::uint8_t>(
      std::min(r.worker.size(), sizeof(lease.worker)));
  std::memcpy(lease.worker, r.worker.data(), lease.worker_bytes);
  last_fence = r.fence;
  if (r.fence >> 40 == epoch) {
    next_counter = (r.fence & ((1ULL << 40) - 1)) + 1;
  }
  e.a = add_lease(lease);
  e.attempt = r.attempt;
  e.flags |= kReturned;
  e.time = time;
  enter(slot, State::running);
  ++totals.grants;
}

std::uint32_t Core::Impl::add_lease(const LeaseEntry& lease) {
  std::uint32_t slot = leases.allocate();
  LeaseEntry& e = leases[slot];
  e = lease;
  e.percent = -1;
  e.worker_next = e.worker_before = kNone;
  lease_index.insert(slot);
  lease_deadlines.push(slot);
  ++leases_by_level[e.level];
  auto found = worker_leases.find(e.worker_name());
  if (found == worker_leases.end()) {
    worker_leases.emplace(std::string(e.worker_name()), slot);
  } else {
    e.worker_next = found->second;
    leases[found->second].worker_before = slot;
    found->second = slot;
  }
  return slot;
}

void Core::Impl::end_lease(std::uint32_t slot) {
  LeaseEntry& e = leases[slot];
  if (e.worker_next != kNone) {
    leases[e.worker_next].worker_before = e.worker_before;
  }
  if (e.worker_before != kNone) {
    leases[e.worker_before].worker_next = e.worker_next;
  } else {
    auto found = worker_leases.find(e.worker_name());
    if (e.worker_next == kNone) {
      worker_leases.erase(found);
    } else {
      found->second = e.worker_next;
    }
  }
  --leases_by_level[e.level];
  lease_deadlines.remove(slot);
  lease_index.erase(slot);
  leases.release(slot);
}

void Core::Impl::apply(const Record& record, const EndRecord& r) {
  std::uint32_t slot = find(r.id);
  CHECK(slot != kNone);
  JobEntry& e = jobs[slot];
  bool by_lease = e.state == u8(State::running);
  CHECK(by_lease == (r.fence != 0));
  CHECK(!by_lease || leases[e.a].fence == r.fence);
  CHECK(is_final(r.state));
  leave(slot);
  job_index.erase(slot);
  need(e.body_place, -1);
  if (e.flags & kKeyed) drop_key(slot);
  if (e.extra != kNone) {
    need(extras[e.extra].note_place, -1);
    extras.release(e.extra);
    e.extra = kNone;
  }
  ++queues[lines[e.line].queue].by_state[u8(r.state)];
  ++totals.ended_by_code[static_cast<int>(r.outcome.code)];
  if (r.state == State::dead) ++totals.dead;
  if (r.outcome.code != EndCode::none) {
    ++totals.attempts_failed_by_code[static_cast<int>(r.outcome.code)];
  }
  use_line(e.line, -1);
  remember_end(r);
  if (e.dependents == kNone) {
    jobs.release(slot);
  } else {
    e.state = u8(r.state);
    e.flags |= kEnded;
    list_push(jobs, ended, slot);
  }
  for (const EnqueueRecord& child : r.children) apply(record, child);
}

void Core::Impl::apply(const Record&, const RetryRecord& r) {
  std::uint32_t slot = find(r.id);
  CHECK(slot != kNone);
  JobEntry& e = jobs[slot];
  CHECK(e.state == u8(State::running));
  CHECK(leases[e.a].fence == r.fence);
  leave(slot);
  ++totals.retried;
  ++totals.attempts_failed_by_code[static_cast<int>(r.code)];
  if (r.code == EndCode::worker_died) e.flags |= kDiedOnce;
  ExtraEntry& extra = extra_of(slot);
  extra.error_attempt = r.attempt;
  extra.error_code = static_cast<std::uint8_t>(r.code);
  extra.message_bytes = static_cast<std::uint8_t>(
      utf8_head(r.message, sizeof(extra.message)).size());
  std::memcpy(extra.message, r.message.data(), extra.message_bytes);
  e.time = r.run_at_ms == 0 ? 0 : r.run_at_ms - offset;
  make_due(slot);
}

void Core::Impl::apply(const Record&, const ReleaseRecord& r) {
  std::uint32_t slot = find(r.id);
  CHECK(slot != kNone);
  JobEntry& e = jobs[slot];
  CHECK(e.state == u8(State::running));
  CHECK(leases[e.a].fence == r.fence);
  leave(slot);
  --e.attempt;
  enter_ready(slot);
}

void Core::Impl::apply(const Record& record, const BlockRecord& r) {
  std::uint32_t slot = find(r.id);
  CHECK(slot != kNone);
  JobEntry& e = jobs[slot];
  CHECK(e.state == u8(State::running));
  CHECK(leases[e.a].fence == r.fence);
  leave(slot);
  --e.attempt;
  ExtraEntry& extra = extra_of(slot);
  std::memset(extra.token, 0, sizeof(extra.token));
  for (std::size_t i = 0; i < 32 && i < r.token.size(); ++i) {
    int value = lower_hex_value(r.token[i]);
    CHECK(value >= 0);
    extra.token[i / 2] |= static_cast<std::uint8_t>(i % 2 ? value : value << 4);
  }
  set_note(slot, record.place, record.bytes);
  e.time = r.deadline_ms == 0 ? 0 : r.deadline_ms - offset;
  enter(slot, State::blocked);
}

void Core::Impl::apply(const Record& record, const UnblockRecord& r) {
  std::uint32_t slot = find(r.id);
  CHECK(slot != kNone);
  JobEntry& e = jobs[slot];
  CHECK(e.state == u8(State::blocked));
  leave(slot);
  set_note(slot, record.place, record.bytes);
  enter_ready(slot);
}

void Core::Impl::apply(const Record&, const CancelRecord& r) {
  std::uint32_t slot = find(r.id);
  CHECK(slot != kNone);
  CHECK(jobs[slot].state == u8(State::running));
  jobs[slot].flags |= kCancel;
}

void Core::Impl::apply(const Record&, const PromoteRecord& r) {
  for (const JobId& id : r.ids) {
    std::uint32_t slot = find(id);
    CHECK(slot != kNone);
    CHECK(jobs[slot].state == u8(State::scheduled));
    CHECK(jobs[slot].time <= (jobs[slot].flags & kAtWall ? wall(time) : time));
    leave(slot);
    enter_ready(slot);
  }
}

void Core::Impl::apply(const Record& record, const ClockRecord& r) {
  offset = r.offset_ms;
  if (r.boot != 0) anchor = {record.time_ms, r.boot_ms, r.boot};
}

// --- states ---

void Core::Impl::enter(std::uint32_t slot, State state) {
  bool ordered = state != State::waiting && state != State::running;
  if (ordered) jobs[slot].order = next_order++;
  insert(slot, state);
}

void Core::Impl::insert(std::uint32_t slot, State state) {
  JobEntry& e = jobs[slot];
  e.state = u8(state);
  ++queues[lines[e.line].queue].by_state[e.state];
  if (state == State::waiting) {
    e.a = kNone;
    return;
  }
  if (state == State::running) {  // e.a is the lease
    if (e.flags & kKeyed) use_slot(slot, +1);
    return;
  }
  if (state == State::scheduled) {
    due_of(e).push(slot);
  } else if (state == State::blocked) {
    if (e.time > 0) deadlines.push(slot);
  } else if (e.flags & kKeyed) {
    join_group(slot);
  } else {
    int list = e.flags & kReturned ? kReturnedList : kFreshList;
    list_push(jobs, lines[e.line].lists[e.priority][list], slot);
    count_ready(e.line, +1);
  }
}

void Core::Impl::leave(std::uint32_t slot) {
  JobEntry& e = jobs[slot];
  --queues[lines[e.line].queue].by_state[e.state];
  switch (static_cast<State>(e.state)) {
    case State::waiting:
      if (e.flags & kDoomed) {
        list_remove(jobs, doomed, slot);
      } else {
        drop_edges(slot);
      }
      break;
    case State::scheduled:
      due_of(e).remove(slot);
      break;
    case State::ready: {
      if (e.flags & kKeyed) {
        leave_group(slot);
        break;
      }
      int list = e.flags & kReturned ? kReturnedList : kFreshList;
      list_remove(jobs, lines[e.line].lists[e.priority][list], slot);
      count_ready(e.line, -1);
      break;
    }
    case State::running:
      end_lease(e.a);
      if (e.flags & kKeyed) use_slot(slot, -1);
      break;
    case State::blocked:
      if (e.time > 0) deadlines.remove(slot);
      break;
    default:
      CHECK(false);
  }
  e.a = e.b = kNone;
}

void Core::Impl::make_due(std::uint32_t slot) {
  const JobEntry& e = jobs[slot];
  if (e.time > (e.flags & kAtWall ? wall(time) : time)) {
    enter(slot, State::scheduled);
  } else {
    enter_ready(slot);
  }
}

void Core::Impl::enter_ready(std::uint32_t slot) {
  JobEntry& e = jobs[slot];
  e.time = time;
  e.flags = static_cast<std::uint8_t>(e.flags & ~kAtWall);
  enter(slot, State::ready);
}

ExtraEntry& Core::Impl::extra_of(std::uint32_t slot) {
  JobEntry& e = jobs[slot];
  std::uint32_t& at = e.flags & kKeyed ? keyed[e.extra].extra : e.extra;
  if (at == kNone) at = extras.allocate();
  return extras[at];
}

void Core::Impl::set_note(std::uint32_t slot, Place place,
                          std::uint32_t bytes) {
  ExtraEntry& extra = extra_of(slot);
  need(place, +1);
  need(extra.note_place, -1);
  extra.note_place = place;
  extra.note_bytes = bytes;
}

// --- concurrency keys ---

std::uint32_t Core::Impl::group_of(std::uint32_t key,
                                   std::uint32_t line) const {
  std::uint32_t at = keys[key].groups;
  while (at != kNone && groups[at].line != line) at = groups[at].next;
  return at;
}

std::uint32_t Core::Impl::next_ready(std::uint32_t slot) const {
  const JobEntry& e = jobs[slot];
  if (e.a != kNone) return e.a;
  std::uint32_t at = groups[keyed[e.extra].group].ranks;
  while (at != kNone && ranks[at].rank <= rank_of(e)) at = ranks[at].next;
  return at == kNone ? kNone : ranks[at].list.head;
}

// The job has a line, and no key yet.
void Core::Impl::set_key(std::uint32_t slot, const KeyHash& hash,
                         std::uint16_t limit) {
  JobEntry& e = jobs[slot];
  std::uint32_t key = key_index.find(hash);
  if (key == kNone) {
    key = keys.allocate();
    keys[key].hash = hash;
    keys[key].groups = kNone;
    key_index.insert(key);
  }
  std::uint32_t at = group_of(key, e.line);
  if (at == kNone) {
    at = groups.allocate();
    GroupEntry& g = groups[at];
    g.key = key;
    g.line = e.line;
    g.ranks = g.before = kNone;
    g.next = keys[key].groups;
    if (g.next != kNone) groups[g.next].before = at;
    keys[key].groups = at;
    ++keys[key].lines;
  }
  ++groups[at].jobs;
  std::uint32_t own = keyed.allocate();
  keyed[own].group = at;
  keyed[own].extra = e.extra;
  keyed[own].limit = limit;
  e.extra = own;
  e.flags |= kKeyed;
}

void Core::Impl::drop_key(std::uint32_t slot) {
  JobEntry& e = jobs[slot];
  std::uint32_t own = e.extra, at = keyed[own].group, key = groups[at].key;
  e.extra = keyed[own].extra;
  e.flags = static_cast<std::uint8_t>(e.flags & ~kKeyed);
  keyed.release(own);
  GroupEntry& g = groups[at];
  if (--g.jobs > 0) return;
  (g.before == kNone ? keys[key].groups : groups[g.before].next) = g.next;
  if (g.next != kNone) groups[g.next].before = g.before;
  groups.release(at);
  if (--keys[key].lines > 0) return;
  key_index.erase(key);
  keys.release(key);
}

void Core::Impl::join_group(std::uint32_t slot) {
  const JobEntry& e = jobs[slot];
  std::uint32_t group = keyed[e.extra].group;
  std::uint32_t* at = &groups[group].ranks;
  while (*at != kNone && ranks[*at].rank < rank_of(e)) at = &ranks[*at].next;
  if (*at == kNone || ranks[*at].rank != rank_of(e)) {
    std::uint32_t fresh = ranks.allocate();
    ranks[fresh].rank = rank_of(e);
    ranks[fresh].list = JobList{};
    ranks[fresh].next = *at;
    *at = fresh;
  }
  list_push(jobs, ranks[*at].list, slot);
  refresh(group);
}

void Core::Impl::leave_group(std::uint32_t slot) {
  const JobEntry& e = jobs[slot];
  std::uint32_t group = keyed[e.extra].group;
  std::uint32_t* at = &groups[group].ranks;
  while (ranks[*at].rank != rank_of(e)) at = &ranks[*at].next;
  std::uint32_t rank = *at;
  list_remove(jobs, ranks[rank].list, slot);
  if (ranks[rank].list.head == kNone) {
    *at = ranks[rank].next;
    ranks.release(rank);
  }
  refresh(group);
}

// At most kKeyLinesMax groups look whether they are open now.
void Core::Impl::use_slot(std::uint32_t slot, int delta) {
  KeyEntry& key = keys[key_slot(jobs[slot])];
  key.running += static_cast<std::uint32_t>(delta);
  for (auto at = key.groups; at != kNone; at = groups[at].next) refresh(at);
}

// Its first job or its key's slots may have changed.
void Core::Impl::refresh(std::uint32_t group) {
  GroupEntry& g = groups[group];
  std::uint32_t first = first_ready(g);
  bool open = false;
  if (first != kNone) {
    const JobEntry& e = jobs[first];
    open = keyed[e.extra].limit > keys[g.key].running;
    g.order = e.order;
    g.rank = rank_of(e);
  }
  std::shared_ptr<OpenGroups>& heap = lines[g.line].open;
  if (open && g.open) {
    heap->update(group);
  } else if (open) {
    g.open = true;
    if (!heap) heap = std::make_shared<OpenGroups>(&groups);
    heap->push(group);
    count_ready(g.line, +1);
  } else if (g.open) {
    g.open = false;
    heap->remove(group);
    count_ready(g.line, -1);
  }
}

// --- dependencies ---

// A dependency's dependents are a list whose head's `before` is the tail: those
// who came first are freed first.
void Core::Impl::add_edge(std::uint32_t dependency, std::uint32_t dependent) {
  std::uint32_t edge = edges.allocate();
  JobEntry& to = jobs[dependent];
  std::uint32_t& head = jobs[dependency].dependents;
  edges[edge] = EdgeEntry{dependency, dependent, kNone, edge, to.a, kNone};
  if (head == kNone) {
    head = edge;
  } else {
    std::uint32_t tail = edges[head].before;
    edges[tail].next = edge;
    edges[edge].before = tail;
    edges[head].before = edge;
  }
  to.a = edge;
  ++to.unmet;
}

void Core::Impl::drop_edge(std::uint32_t edge) {
  EdgeEntry e = edges[edge];
  JobEntry& to = jobs[e.dependent];
  std::uint32_t* at = &to.a;
  while (*at != edge) at = &edges[*at].sibling;
  *at = e.sibling;
  --to.unmet;
  std::uint32_t& head = jobs[e.dependency].dependents;
  if (head == edge) {
    head = e.next;
    if (head != kNone) edges[head].before = e.before;
  } else {
    edges[e.before].next = e.next;
    edges[e.next == kNone ? head : e.next].before = e.before;
  }
  edges.release(edge);
}

void Core::Impl::drop_edges(std::uint32_t slot) {
  while (jobs[slot].a != kNone) {
    std::uint32_t edge = jobs[slot].a;
    drop_edge(edge);
  }
}

void Core::Impl::doom(std::uint32_t slot) {
  drop_edges(slot);
  jobs[slot].flags |= kDoomed;
  list_push(jobs, doomed, slot);
}

void Core::Impl::pump() {
  for (std::size_t left = kPumpMax; left > 0 && ended.head != kNone;) {
    std::uint32_t from = ended.head;
    std::uint32_t edge = jobs[from].dependents;
    if (edge == kNone) {
      list_remove(jobs, ended, from);
      jobs.release(from);
      continue;
    }
    --left;
    std::uint32_t slot = edges[edge].dependent;
    if (jobs[from].state != u8(State::succeeded)) {
      doom(slot);
      continue;
    }
    drop_edge(edge);
    if (jobs[slot].unmet > 0) continue;
    leave(slot);
    make_due(slot);
  }
}

// --- names ---

std::uint32_t Core::Impl::line_for(std::string_view queue,
                                   std::string_view kind, Level level) {
  const LineKey key(queue, kind, level);
  auto found = line_names.find(std::string_view(key));
  if (found != line_names.end()) return found->second;
  std::uint32_t in_queue = queue_for(queue);
  std::uint32_t at = static_cast<std::uint32_t>(lines.size());
  if (lines.size() >= options.names_max && lines_used < lines.size()) {
    at = 0;
    while (lines[at].jobs > 0) ++at;
    forget_line(at);
  } else {
    lines.emplace_back();
  }
  Line& line = lines[at];
  line.kind = kind;
  line.level = level;
  line.queue = in_queue;
  line_names.emplace(key.string(), at);
  match_waiters(at);
  return at;
}

std::uint32_t Core::Impl::queue_for(std::string_view name) {
  auto found = queue_names.find(name);
  if (found != queue_names.end()) return found->second;
  std::uint32_t at = static_cast<std::uint32_t>(queues.size());
  if (queues.size() >= options.names_max) {
    // Forget a queue without live jobs, its counters and its lines' names.
    for (std::uint32_t i = 0; i < queues.size(); ++i) {
      if (queues[i].live() == 0) at = i;
    }
  }
  if (at == queues.size()) {
    queues.emplace_back();
  } else {
    for (std::uint32_t i = 0; i < lines.size(); ++i) {
      if (lines[i].queue == at && lines[i].jobs == 0) forget_line(i);
    }
    queue_names.erase(queues[at].name);
    queues[at] = QueueEntry{};
  }
  queues[at].name = name;
  queue_names.emplace(std::string(name), at);
  return at;
}

// An empty kind: the slot has no name and waits to be used again.
void Core::Impl::forget_line(std::uint32_t at) {
  const Line& old = lines[at];
  if (old.kind.empty()) return;
  line_names.erase(
      LineKey(queues[old.queue].name, old.kind, old.level).string());
  lines[at] = Line{};
  match_waiters(at);
}

std::uint16_t Core::Impl::tenant_for(std::string_view name) {
  auto found = tenant_names.find(name);
  if (found != tenant_names.end()) {
    return static_cast<std::uint16_t>(found->second);
  }
  CHECK(tenants.size() < 0xffff);  // decide() refuses before
  tenants.emplace_back(name);
  tenant_names.emplace(std::string(name), tenants.size() - 1);
  return static_cast<std::uint16_t>(tenants.size() - 1);
}

void Core::Impl::use_line(std::uint32_t at, int delta) {
  Line& line = lines[at];
  bool before = line.jobs > 0;
  line.jobs += static_cast<std::uint64_t>(delta);
  bool after = line.jobs > 0;
  lines_used += static_cast<std::size_t>(after - before);
}

void Core::Impl::count_ready(std::uint32_t at, int delta) {
  Line& line = lines[at];
  bool was_hungry = is_hungry(line);
  bool was_ready = line.ready > 0;
  line.ready += static_cast<std::uint64_t>(delta);
  hungry += static_cast<std::size_t>(is_hungry(line) - was_hungry);
  if (!was_ready && line.ready > 0) {
    line.ready_at = static_cast<std::uint32_t>(ready_lines.size());
    ready_lines.push_back(at);
  } else if (was_ready && line.ready == 0) {
    std::uint32_t last = ready_lines.back();
    ready_lines[line.ready_at] = last;
    lines[last].ready_at = line.ready_at;
    ready_lines.pop_back();
    line.ready_at = kNone;
  }
}

// A line is new, or its slot means something else now: no job is in it.
void Core::Impl::match_waiters(std::uint32_t at) {
  Line& line = lines[at];
  line.waiters = 0;
  for (Waiter& waiter : waiters) {
    if (waiter.lines.size() <= at) waiter.lines.resize(at + 1);
    waiter.lines[at] = matches(waiter.command, line);
    line.waiters += waiter.lines[at];
  }
}

}  // namespace machina
