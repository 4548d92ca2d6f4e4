#include "queue/core/core.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "queue/base/check.h"
#include "queue/core/core_state.h"

namespace machina {
namespace {

constexpr Millis kNever = std::numeric_limits<Millis>::max();

std::uint64_t mix(std::uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

std::uint64_t JobById::hash(const JobId& id) { return place_of(id); }

std::uint64_t LeaseByFence::hash(Fence fence) { return mix(fence); }

std::uint64_t QueueEntry::live() const {
  std::uint64_t sum = 0;
  for (int i = 0; i < u8(State::succeeded); ++i) sum += by_state[i];
  return sum;
}

LineKey::LineKey(std::string_view queue, std::string_view kind, Level level)
    : size_(queue.size() + kind.size() + 2) {
  char* at = bytes_;
  if (size_ > sizeof(bytes_)) {
    longer_.resize(size_);
    at = longer_.data();
  }
  std::memcpy(at, queue.data(), queue.size());
  at += queue.size();
  *at++ = '\0';  // which no name holds
  std::memcpy(at, kind.data(), kind.size());
  at[kind.size()] = static_cast<char>(level);
}

KeyHash dedup_key_of(const NewJob& job) {
  char bytes[kTenantBytesMax + kQueueBytesMax + kDedupKeyBytesMax + 2];
  std::size_t size =
      job.tenant.size() + job.queue.size() + job.dedup_key.size() + 2;
  std::string longer;  // of a key over its bound: refused before it comes here
  char* at = bytes;
  if (size > sizeof(bytes)) {
    longer.resize(size);
    at = longer.data();
  }
  const char* begin = at;
  auto add = [&at](std::string_view text) {
    std::memcpy(at, text.data(), text.size());
    at += text.size();
  };
  add(job.tenant);
  *at++ = '\0';
  add(job.queue);
  *at++ = '\0';
  add(job.dedup_key);
  XXH128_hash_t hash = XXH3_128bits(begin, size);
  return {hash.low64, hash.high64};
}

// A client's keys are its tenant's own. What a kind's key names, a repository,
// is one for all tenants. The first byte keeps the two apart.
KeyHash concurrency_key_of(const NewJob& job) {
  std::string bytes(1, job.kind_key ? 'k' : 'c');
  if (!job.kind_key) bytes.append(job.tenant).push_back('\0');
  bytes.append(job.concurrency_key);
  XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return {hash.low64, hash.high64};
}

std::uint64_t dedup_digest_of(const NewJob& job) {
  std::uint64_t parts[3] = {XXH3_64bits(job.kind.data(), job.kind.size()),
                            job.payload_digest[0], job.payload_digest[1]};
  return XXH3_64bits(parts, sizeof(parts));
}

bool Core::Impl::matches(const LeaseCommand& c, std::string_view queue,
                         std::string_view kind, Level level) const {
  if (level > c.level) return false;
  if (!c.queues.empty() &&
      std::find(c.queues.begin(), c.queues.end(), queue) == c.queues.end()) {
    return false;
  }
  return std::any_of(c.kinds.begin(), c.kinds.end(),
                     [kind](const std::string& pattern) {
                       return kind_matches(pattern, kind);
                     });
}

Core::Core(const CoreOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}
Core::~Core() = default;

void Core::apply(const Record& record) { impl_->apply(record); }

// --- what is not durable ---

void Core::set_epoch(std::uint32_t writer_epoch) {
  Impl& s = *impl_;
  CHECK(writer_epoch < (1u << 24));
  CHECK(writer_epoch >= s.last_fence >> 40);
  s.epoch = writer_epoch;
  // Far from where the last writers' ids counted.
  s.next_id = writer_epoch * 0x9e3779b9ull;
  s.next_counter = 1;
  if (s.last_fence >> 40 == writer_epoch) {
    s.next_counter = (s.last_fence & ((1ULL << 40) - 1)) + 1;
  }
  s.totals = CoreTotals{};  // what was replayed was counted once before
}

void Core::restart_leases(Millis mono) {
  Impl& s = *impl_;
  s.mono = mono;
  std::vector<std::uint32_t> all;
  for (std::size_t i = 0; i < s.lease_deadlines.size(); ++i) {
    all.push_back(s.lease_deadlines.at(i));
  }
  for (std::uint32_t slot : all) {
    s.leases[slot].deadline = mono + s.options.lease_ms;
    s.lease_deadlines.update(slot);
  }
}

void Core::set_mono(Millis mono) { impl_->mono = mono; }

void Core::heartbeat(Fence fence, Millis deadline_mono, int percent,
                     std::string_view message) {
  Impl& s = *impl_;
  std::uint32_t slot = s.lease_index.find(fence);
  if (slot == kNone) return;
  LeaseEntry& lease = s.leases[slot];
  lease.deadline = deadline_mono;
  s.lease_deadlines.update(slot);
  if (percent >= 0)
    lease.percent = static_cast<std::int8_t>(std::min(percent, 100));
  if (message.empty()) return;
  std::size_t bytes = std::min(message.size(), sizeof(lease.progress));
  while (bytes < message.size() && bytes > 0 &&
         (message[bytes] & 0xc0) == 0x80) {
    --bytes;  // not inside a character
  }
  lease.progress_bytes = static_cast<std::uint8_t>(bytes);
  std::memcpy(lease.progress, message.data(), bytes);
}

void Core::park(const LeaseCommand& command) {
  Impl& s = *impl_;
  CHECK(command.waiter != 0);
  CHECK(!s.waiter_index.contains(command.waiter));
  auto at = s.waiters.insert(s.waiters.end(), Waiter{command, {}});
  at->command.holding.reset();  // those were released when it was decided
  at->lines.resize(s.lines.size());
  for (std::uint32_t i = 0; i < s.lines.size(); ++i) {
    Line& line = s.lines[i];
    if (!s.matches(command, line)) continue;
    bool was_hungry = s.is_hungry(line);
    at->lines[i] = true;
    ++line.waiters;
    s.hungry += static_cast<std::size_t>(s.is_hungry(line) - was_hungry);
  }
  ++s.waiters_by_level[std::min(command.level, kLevelMax)];
  s.waiter_index.emplace(command.waiter, at);
}

void Core::unpark(std::uint64_t waiter) {
  Impl& s = *impl_;
  auto found = s.waiter_index.find(waiter);
  if (found == s.waiter_index.end()) return;
  const Waiter& w = *found->second;
  for (std::uint32_t i = 0; i < w.lines.size(); ++i) {
    if (!w.lines[i]) continue;
    Line& line = s.lines[i];
    bool was_hungry = s.is_hungry(line);
    --line.waiters;
    s.hungry += static_cast<std::size_t>(s.is_hungry(line) - was_hungry);
  }
  --s.waiters_by_level[std::min(w.command.level, kLevelMax)];
  s.waiters.erase(found->second);
  s.waiter_index.erase(found);
}

std::size_t Core::parked() const { return impl_->waiters.size(); }

JobId Core::leased_job(Fence fence) const {
  std::uint32_t slot = impl_->lease_index.find(fence);
  return slot == kNone ? JobId{} : impl_->jobs[impl_->leases[slot].job].id;
}

// --- what is due ---

Millis Core::next_due() const {
  const Impl& s = *impl_;
  if (s.hungry > 0 || s.ended.head != kNone || s.doomed.head != kNone) {
    return 0;
  }
  Millis next = kNever;
  if (!s.due.empty()) next = std::min(next, s.jobs[s.due.top()].time);
  if (!s.due_wall.empty()) {
    next = std::min(next, s.jobs[s.due_wall.top()].time - s.offset);
  }
  if (!s.deadlines.empty()) {
    next = std::min(next, s.jobs[s.deadlines.top()].time);
  }
  if (!s.expiries.empty()) {
    next = std::min(next, s.dedups[s.expiries.top()].expiry + kForgetLateMs);
  }
  return next;
}

Millis Core::next_due_mono() const {
  const Impl& s = *impl_;
  if (s.lease_deadlines.empty()) return kNever;
  return s.leases[s.lease_deadlines.top()].deadline;
}

// --- looking ---

bool Core::live(const JobId& id) const { return impl_->find(id) != kNone; }

std::optional<Core::Look> Core::look(const JobId& id) const {
  std::uint32_t slot = impl_->find(id);
  if (slot == kNone) return std::nullopt;
  return impl_->look(slot);
}

Core::Standing Core::standing(const JobId& id) const {
  std::uint32_t slot = impl_->find(id);
  CHECK(slot != kNone);
  const JobEntry& e = impl_->jobs[slot];
  return {impl_->lines[e.line].kind, e.time};
}

Core::Look Core::Impl::look(std::uint32_t slot) const {
  const JobEntry& e = jobs[slot];
  const Line& line = lines[e.line];
  Look look;
  look.body_place = e.body_place;
  look.body_bytes = e.body_bytes;
  JobView& v = look.view;
  v.id = e.id;
  v.state = static_cast<State>(e.state);
  v.kind = line.kind;
  v.queue = queues[line.queue].name;
  v.tenant = tenants[e.tenant];
  v.priority = e.priority;
  v.attempt = e.attempt;
  v.max_attempts = e.limit;
  v.created_ms = created_ms(e.id);
  v.min_level = line.level;
  v.fsync = options.fsync;
  v.cancel_requested = e.flags & kCancel;
  if (v.state == State::blocked) {
    v.blocked_deadline_ms = wall(e.time);
  } else {
    v.run_at_ms = e.flags & kAtWall ? e.time : wall(e.time);
  }
  if (extra_slot(e) != kNone) {
    const ExtraEntry& extra = extras[extra_slot(e)];
    look.note_place = extra.note_place;
    look.note_bytes = extra.note_bytes;
    v.error_code = static_cast<EndCode>(extra.error_code);
    v.error_attempt = extra.error_attempt;
    v.error_message.assign(extra.message, extra.message_bytes);
  }
  if (v.state == State::running) {
    const LeaseEntry& lease = leases[e.a];
    v.fence = lease.fence;
    v.worker = lease.worker_name();
    v.started_ms = wall(lease.started);
    v.progress_percent = lease.percent;
    v.progress_message.assign(lease.progress, lease.progress_bytes);
  }
  if (e.flags & kDoomed) {
    // The record is still to come, but nothing else can become of it.
    v.state = State::cancelled;
    v.error_code = EndCode::dependency;
  }
  if (v.state == State::ready && line.level > 0) {
    std::uint32_t all = 0, strong = 0;
    for (int i = 0; i <= kLevelMax; ++i) {
      std::uint32_t here = leases_by_level[i] + waiters_by_level[i];
      all += here;
      if (i >= line.level) strong += here;
    }
    v.waiting_for_level = all > 0 && strong == 0;
  }
  if (v.state == State::ready && (e.flags & kKeyed)) {
    const KeyedEntry& own = keyed[e.extra];
    const GroupEntry& group = groups[own.group];
    v.waiting_for_concurrency =
        !group.open || own.limit <= keys[group.key].running;
  }
  return look;
}

std::uint64_t Core::scan(std::uint64_t cursor, std::size_t examine,
                         const std::function<bool(const Look&)>& visit) const {
  const Impl& s = *impl_;
  for (; cursor < s.jobs.end(); ++cursor, --examine) {
    if (examine == 0) return cursor;
    const JobEntry& e = s.jobs[static_cast<std::uint32_t>(cursor)];
    if (!(e.flags & kUsed) || (e.flags & kEnded)) continue;
    if (!visit(s.look(static_cast<std::uint32_t>(cursor)))) {
      return cursor + 1 < s.jobs.end() ? cursor + 1 : 0;
    }
  }
  return 0;
}

std::map<std::string, std::uint64_t> Core::ready_kinds() const {
  const Impl& s = *impl_;
  std::map<std::string, std::uint64_t> kinds;
  for (std::uint32_t at : s.ready_lines) {
    const Line& line = s.lines[at];
    kinds[line.kind] += line.ready;
  }
  return kinds;
}

std::vector<QueueCounts> Core::counts() const {
  const Impl& s = *impl_;
  std::vector<QueueCounts> all(s.queues.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].queue = s.queues[i].name;
    std::copy(std::begin(s.queues[i].by_state), std::end(s.queues[i].by_state),
              all[i].by_state);
  }
  for (std::uint32_t at : s.ready_lines) {
    const Line& line = s.lines[at];
    Millis& oldest = all[line.queue].oldest_ready_ms;
    for (const auto& pair : line.lists) {
      for (const JobList& list : pair) {
        if (list.head == kNone) continue;
        Millis since = s.wall(s.jobs[list.head].time);
        if (oldest == 0 || since < oldest) oldest = since;
      }
    }
    // Of those with a key, what goes next; who waits for a slot is not late.
    if (!line.open || line.open->empty()) continue;
    Millis since =
        s.wall(s.jobs[s.first_ready(s.groups[line.open->top()])].time);
    if (oldest == 0 || since < oldest) oldest = since;
  }
  return all;
}

const CoreTotals& Core::totals() const { return impl_->totals; }
std::uint64_t Core::live_jobs() const { return impl_->job_index.size(); }
std::uint64_t Core::reserved_bytes() const {
  return impl_->job_index.size() * kReservePerJob +
         impl_->leases.used() * kReservePerLease;
}
Lsn Core::applied() const { return impl_->applied; }
Millis Core::time() const { return impl_->time; }
Millis Core::clock_offset() const { return impl_->offset; }
const ClockAnchor& Core::clock_anchor() const { return impl_->anchor; }
void Core::on_place(PlaceHook hook) { impl_->place_hook = std::move(hook); }

void Core::save(std::vector<std::byte>* out) const { impl_->save(out); }
Result<void> Core::load(std::span<const std::byte> bytes) {
  return impl_->load(bytes);
}
void Core::check_invariants() const { impl_->check_invariants(); }

}  // namespace machina
