// What should happen. Nothing here changes the state: a Draft holds what has
// been decided so far in this command, so that its later parts see the earlier.

#include <algorithm>
#include <map>
#include <queue>
#include <set>
#include <tuple>
#include <utility>

#include "queue/base/check.h"
#include "queue/base/hex.h"
#include "queue/core/core_state.h"

namespace machina {
namespace {

constexpr std::uint32_t kUnset = kNone - 1;

class Chance {  // splitmix64
 public:
  explicit Chance(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t x = state_ += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
  }

 private:
  std::uint64_t state_;
};

std::string hex32(std::uint64_t a, std::uint64_t b) {
  return fence_hex(a) + fence_hex(b);
}

// Takes as long wherever the first difference is.
bool same_token(const std::uint8_t (&token)[16], std::string_view hex) {
  char text[32];
  write_hex(text, token, sizeof token);
  return same_secret({text, sizeof text}, hex);
}

EndCode attempt_code(EndCode code) {
  bool not_an_attempts = code == EndCode::none || code == EndCode::dependency;
  return not_an_attempts ? EndCode::exit : code;
}

}  // namespace

class Draft {
 public:
  Draft(const Core::Impl& state, Millis now, std::uint64_t seed)
      : s_(state),
        now_(std::max(now, state.time)),
        wall_(s_.wall(now_)),
        chance_(seed) {}

  void decide(EnqueueCommand&);
  void decide(const LeaseCommand&);
  void decide(const HeartbeatCommand&);
  void decide(const CompleteCommand&);
  void decide(const FailCommand&);
  void decide(const BlockCommand&);
  void decide(const ReleaseCommand&);
  void decide(const CancelCommand&);
  void decide(const RetryCommand&);
  void decide(const UnblockCommand&);
  void decide(const GoneCommand&);
  void decide(const ClockCommand&);
  void decide(const TickCommand&);

  Decision finish();

 private:
  // A job that these records make ready.
  struct NewReady {
    JobId id;
    std::uint32_t line = kNone;
    std::string queue, kind;  // where line is kNone: it is new
    Level level = 0;
    std::uint8_t priority = 0;
    bool returned = false;
    std::uint16_t attempt = 0;  // made so far
    bool taken = false;         // or it cannot be, in this decision
    std::uint32_t unmet = 0;    // in new_waiting_: dependencies left
    std::uint16_t limit = 0;    // 0: no concurrency key
    KeyHash key;
    std::uint32_t group = kNone;  // or its key has no job in its line yet
    std::string line_key;         // where there is a key
  };
  using Key = std::tuple<int, int, std::uint64_t>;  // least first

  // A ready job with a concurrency key, of those behind it in its group none
  // goes before it. `heap`: where its group is in its line's heap, or kNone.
  struct Candidate {
    Key key;
    std::uint32_t group = kNone, job = kNone;
    std::size_t heap = kNoHeap;
    bool freed = false;  // counts in freed_left_
    bool operator<(const Candidate& other) const { return other.key < key; }
  };
  static constexpr std::size_t kNoHeap = ~std::size_t{0};
  using Walk = std::priority_queue<Candidate>;

  template <class Body>
  void record(Body body) {
    out_.records.push_back(Record{now_, std::move(body)});
  }

  // enqueue
  Answer admit(NewJob&&, const std::vector<Fact>&, EnqueueRecord*, ItemAnswer*);
  bool hidden(std::uint32_t slot, const NewJob&) const;
  Answer check_dependencies(const NewJob&, const std::vector<Fact>&,
                            EnqueueRecord*, ItemAnswer*) const;
  Answer check_dependencies(const RetryCommand&, EnqueueRecord*,
                            ItemAnswer*) const;
  void admit_children(const CompleteCommand::Item&, const std::vector<Fact>&,
                      EndRecord* parent, ItemAnswer*);
  bool dedup_hit(const NewJob&, ItemAnswer*);
  bool has_room(const NewJob&, bool dedup, ItemAnswer*) const;
  bool has_key_room(const NewJob&, std::string_view line_key,
                    ItemAnswer*) const;
  void admitted(const EnqueueRecord&);
  void decide_again();
  JobId new_id() {
    // The count of its last bits: see place_of().
    const std::uint64_t count = s_.next_id + new_ids_++;
    const std::uint64_t chance = chance_.next();
    const JobId id =
        make_job_id(wall_, chance >> 62, chance << 32 | (count & 0xffffffff));
    s_.job_index.expect(id);  // it will be inserted soon
    return id;
  }

  // leases
  std::uint32_t lease_of(Fence fence) const;  // kNone also if ended in here
  std::uint32_t job_of(std::uint32_t lease) const {
    return s_.leases[lease].job;
  }
  EndRecord end_of(std::uint32_t slot, State, EndCode) const;
  void end_attempt(std::uint32_t slot, const Outcome&, ItemAnswer*);
  void end_now(std::uint32_t slot, State, EndCode, std::string message);
  void release(std::uint32_t lease);
  void release_others(const LeaseCommand&);
  Millis backoff_ms(const JobEntry&);
  void lease_ends(Fence fence, std::uint32_t slot);

  // handing out
  void ready_again(std::uint32_t slot, std::uint16_t attempt);
  void foresee(std::uint32_t slot, bool succeeded);
  bool is_due(const JobEntry& e) const {
    return e.time <= (e.flags & kAtWall ? wall_ : now_);
  }
  bool may_feed() const { return will_lease_ || !s_.waiters.empty(); }
  void sort_new_ready();
  Key key_of(const NewReady&, std::size_t i) const;
  Key key_of(const JobEntry&) const;
  std::uint32_t first_in(const Line&) const;
  std::uint32_t next_in(std::uint32_t slot) const;
  std::uint32_t next_list(const Line&, std::size_t from) const;
  bool wants(const LeaseCommand&, const Waiter*, const NewReady&) const;
  std::vector<GrantAnswer> pick(const LeaseCommand&, const Waiter*,
                                std::size_t max);
  GrantAnswer grant(const LeaseCommand&, const JobId&, std::uint16_t attempt);
  std::uint32_t running(const KeyHash&) const;
  bool may_start(std::uint32_t slot) const;
  bool new_may_start(std::size_t i);
  bool behind_stuck(const Candidate&) const;
  std::uint32_t first_left(std::uint32_t group) const;
  void open_freed();
  void offer(Walk*, std::uint32_t group, std::size_t heap, bool freed);
  Walk* walk_of(std::uint32_t line);
  const Candidate* next_with_key(std::uint32_t line);
  Candidate pop(std::uint32_t line);
  void take(std::uint32_t line);
  void lease(const LeaseCommand&);
  void feed();
  void promote();

  // ticks
  void forget();

  const Core::Impl& s_;
  const Millis now_;   // of the server's clock
  const Millis wall_;  // what the wall clock shows then
  Chance chance_;
  Decision out_;

  std::set<Fence> ended_leases_;
  std::map<JobId, State> ended_jobs_;
  std::map<KeyHash, std::pair<JobId, std::uint64_t>> new_keys_;
  std::set<std::string, std::less<>> new_lines_;  // without live jobs before
  std::set<std::string> new_tenants_;
  std::map<KeyHash, std::set<std::string, std::less<>>>
      new_groups_;  // key -> lines
  std::uint64_t new_concurrency_keys_ = 0;
  std::uint64_t new_jobs_ = 0;
  std::uint64_t new_ids_ = 0;
  std::uint64_t grants_ = 0;
  bool will_lease_ = false;
  bool is_tick_ = false;  // feeds what apply() made ready by itself, too

  std::map<std::uint32_t, int> met_;  // dependencies, of waiting jobs
  bool foresees_ = true;
  bool more_ends_ = false;  // later items of this command may end jobs
  // Children that wait for a job which such an item may end.
  std::vector<NewReady> new_waiting_;
  std::map<JobId, std::vector<std::size_t>> new_dependents_;  // of new_waiting_
  std::vector<NewReady> new_ready_;
  bool new_ready_sorted_ = true;
  std::size_t new_ready_left_ = 0;
  std::vector<std::uint32_t> cursors_;  // by line: its next ready job

  // Of concurrency keys. All slots that this command frees are free before the
  // first is taken: what cannot start once cannot in this decision.
  std::map<KeyHash, int> slots_;            // taken less given back
  std::set<std::uint32_t> freed_keys_;      // not yet looked at
  std::vector<std::uint32_t> freed_lines_;  // that had nothing to give before
  std::size_t freed_left_ = 0;              // groups that opened thereby
  std::map<std::uint32_t, Walk> walks_;     // by line: its open groups
  std::map<std::uint32_t, std::uint32_t>
      first_left_;  // by group, once taken of
  // The foremost new one of a group that may not start, by key and line.
  std::map<std::pair<KeyHash, std::string>, Key> stuck_;
};

Decision Core::decide(Millis now, std::uint64_t seed, Command command) const {
  Draft draft(*impl_, now, seed);
  std::visit([&draft](auto& c) { draft.decide(c); }, command);
  Decision decision = draft.finish();
  for (const ItemAnswer& item : decision.items) {
    // A counter for metrics, not state.
    if (item.answer == Answer::duplicate) ++impl_->totals.duplicates;
  }
  return decision;
}

Decision Draft::finish() {
  if (new_ready_left_ > 0 || is_tick_ || !freed_keys_.empty() ||
      freed_left_ > 0) {
    feed();
  }
  return std::move(out_);
}

// --- enqueue ---

void Draft::decide(EnqueueCommand& c) {
  out_.records.reserve(c.jobs.size());
  out_.items.reserve(c.jobs.size());
  bool need_facts = false;
  for (NewJob& job : c.jobs) {
    ItemAnswer& item = out_.items.emplace_back();
    EnqueueRecord r;
    item.answer = admit(std::move(job), c.facts, &r, &item);
    need_facts |= item.answer == Answer::need_facts;
    if (item.answer != Answer::ok) continue;
    admitted(r);
    record(std::move(r));
  }
  if (need_facts) decide_again();
}

// All of the command will be, once the facts are here: nobody is told "ok".
void Draft::decide_again() {
  for (ItemAnswer& item : out_.items) item.answer = Answer::need_facts;
  out_.records.clear();
  new_ready_.clear();
  new_ready_left_ = 0;
}

// Takes the job only where the answer is ok.
Answer Draft::admit(NewJob&& job, const std::vector<Fact>& facts,
                    EnqueueRecord* r, ItemAnswer* item) {
  if (dedup_hit(job, item)) return item->answer;
  Answer answer = check_dependencies(job, facts, r, item);
  if (answer != Answer::ok) return answer;
  if (!has_room(job, !job.dedup_key.empty(), item)) return item->answer;
  r->id = new_id();
  r->job = std::move(job);
  NewJob& taken = r->job;
  taken.priority = std::clamp(taken.priority, 0, kPriorityMax);
  taken.min_level = std::min(taken.min_level, kLevelMax);
  if (taken.concurrency_key.empty()) {
    taken.concurrency_limit = 0;
    taken.kind_key = false;
  } else {
    taken.concurrency_limit = static_cast<std::uint16_t>(
        std::clamp<int>(taken.concurrency_limit, 1, kConcurrencyLimitMax));
  }
  r->created_ms = wall_;
  taken.run_at_is_wall = taken.delay_ms == 0 && taken.run_at_ms > 0;
  if (taken.delay_ms > 0) {
    taken.run_at_ms = wall_ + std::exchange(taken.delay_ms, 0);
  }
  if (!r->unmet.empty()) {
    r->state = State::waiting;
  } else {
    r->state = taken.run_at_ms > wall_ ? State::scheduled : State::ready;
  }
  item->id = r->id;
  if (item->state != State::cancelled) item->state = r->state;
  return Answer::ok;
}

bool Draft::dedup_hit(const NewJob& job, ItemAnswer* item) {
  if (job.dedup_key.empty()) return false;
  KeyHash key = dedup_key_of(job);
  std::uint64_t digest = dedup_digest_of(job);
  std::pair<JobId, std::uint64_t> known;
  std::uint32_t slot = s_.dedup_index.find(key);
  if (auto here = new_keys_.find(key); here != new_keys_.end()) {
    known = here->second;
  } else if (slot != kNone && now_ < s_.dedups[slot].expiry) {
    known = {s_.dedups[slot].job, s_.dedups[slot].digest};
  } else {
    return false;
  }
  item->id = known.first;
  item->answer =
      known.second == digest ? Answer::duplicate : Answer::dedup_mismatch;
  std::uint32_t live = s_.find(known.first);
  if (live != kNone) {
    item->state = static_cast<State>(s_.jobs[live].state);
  } else if (slot != kNone && s_.dedups[slot].finished != 0) {
    const DedupEntry& e = s_.dedups[slot];
    item->state = static_cast<State>(e.state);
    item->code = static_cast<EndCode>(e.code);
    item->attempt = e.attempt;
    item->finished_ms = s_.wall(e.finished);
  }
  return true;
}

// The live job of another tenant does not exist for this one.
bool Draft::hidden(std::uint32_t slot, const NewJob& job) const {
  return slot != kNone && s_.tenants[s_.jobs[slot].tenant] != job.tenant;
}

Answer Draft::check_dependencies(const NewJob& job,
                                 const std::vector<Fact>& facts,
                                 EnqueueRecord* r, ItemAnswer* item) const {
  for (const JobId& id : job.depends_on) {
    const std::uint32_t slot = s_.find(id);
    if (hidden(slot, job)) {
      item->detail = to_string(id);
      return Answer::unknown_dependency;
    }
    auto ended = ended_jobs_.find(id);
    State state = State::waiting;
    if (ended != ended_jobs_.end()) {
      state = ended->second;
    } else if (slot == kNone) {
      auto fact = std::find_if(facts.begin(), facts.end(),
                               [&id](const Fact& f) { return f.id == id; });
      item->detail = to_string(id);
      if (fact == facts.end()) return Answer::need_facts;
      if (!fact->known || fact->tenant != job.tenant) {
        return Answer::unknown_dependency;
      }
      item->detail.clear();
      state = fact->state;
    }
    if (state == State::succeeded) continue;
    if (is_final(state)) item->state = State::cancelled;  // born so
    if (std::find(r->unmet.begin(), r->unmet.end(), id) == r->unmet.end()) {
      r->unmet.push_back(id);
    }
  }
  return Answer::ok;
}

bool Draft::has_room(const NewJob& job, bool dedup, ItemAnswer* item) const {
  const CoreOptions& o = s_.options;
  auto full = [item](Answer answer, std::string bound, std::uint64_t value) {
    item->answer = answer;
    item->detail = std::move(bound) + " " + std::to_string(value);
    return false;
  };
  // A job that ends in this command makes room for its child.
  if (s_.job_index.size() + new_jobs_ >= o.queue_max + ended_jobs_.size()) {
    return full(Answer::queue_full, "live jobs: MACHINA_QUEUE_MAX",
                o.queue_max);
  }
  if (dedup && s_.dedup_index.size() + new_keys_.size() >= o.dedup_max) {
    return full(Answer::dedup_full, "live dedup keys: dedup_max", o.dedup_max);
  }
  const LineKey key(job.queue, job.kind, job.min_level);
  auto line = s_.line_names.find(std::string_view(key));
  bool in_use = line != s_.line_names.end() && s_.lines[line->second].jobs > 0;
  if (!in_use && s_.lines_used + new_lines_.size() >= o.names_max &&
      !new_lines_.contains(std::string_view(key))) {
    return full(Answer::queue_full,
                "distinct (queue, kind, min_level): names_max", o.names_max);
  }
  if (!s_.tenant_names.contains(job.tenant) &&
      !new_tenants_.contains(job.tenant) &&
      s_.tenants.size() + new_tenants_.size() >= o.names_max) {
    return full(Answer::queue_full, "tenants: names_max", o.names_max);
  }
  return job.concurrency_key.empty() || has_key_room(job, key, item);
}

bool Draft::has_key_room(const NewJob& job, std::string_view line_key,
                         ItemAnswer* item) const {
  const std::uint64_t keys_max = s_.options.concurrency_keys_max;
  KeyHash hash = concurrency_key_of(job);
  std::uint32_t key = s_.key_index.find(hash);
  auto added = new_groups_.find(hash);
  bool fresh = key == kNone && added == new_groups_.end();
  if (fresh && s_.key_index.size() + new_concurrency_keys_ >= keys_max) {
    item->answer = Answer::queue_full;
    item->detail = "distinct concurrency keys of live jobs: " +
                   ("concurrency_keys_max " + std::to_string(keys_max));
    return false;
  }
  std::size_t lines = key == kNone ? 0 : s_.keys[key].lines;
  if (added != new_groups_.end()) {
    if (added->second.contains(line_key)) return true;
    lines += added->second.size();
  }
  auto line = s_.line_names.find(line_key);
  bool known = key != kNone && line != s_.line_names.end() &&
               s_.group_of(key, line->second) != kNone;
  if (known || lines < kKeyLinesMax) return true;
  item->answer = Answer::queue_full;
  item->detail =
      "distinct (queue, kind, min_level) of one concurrency_key: at most " +
      std::to_string(kKeyLinesMax);
  return false;
}

// What later items of this command must know of it.
void Draft::admitted(const EnqueueRecord& r) {
  const NewJob& job = r.job;
  ++new_jobs_;
  if (!r.revived && !job.dedup_key.empty() && job.dedup_ttl_ms > 0) {
    new_keys_[dedup_key_of(job)] = {r.id, dedup_digest_of(job)};
  }
  const LineKey key(job.queue, job.kind, job.min_level);
  auto line = s_.line_names.find(std::string_view(key));
  bool known = line != s_.line_names.end();
  if (!known || s_.lines[line->second].jobs == 0)
    new_lines_.insert(key.string());
  if (!s_.tenant_names.contains(job.tenant)) new_tenants_.insert(job.tenant);
  KeyHash hash;
  std::uint32_t group = kNone;
  if (!job.concurrency_key.empty()) {
    hash = concurrency_key_of(job);
    std::uint32_t in_use = s_.key_index.find(hash);
    if (in_use != kNone && known) group = s_.group_of(in_use, line->second);
    if (group == kNone) {
      auto& added = new_groups_[hash];
      if (in_use == kNone && added.empty()) ++new_concurrency_keys_;
      added.insert(key.string());
    }
  }
  const bool waits = more_ends_ && r.state == State::waiting;
  if ((r.state != State::ready && !waits) || !may_feed()) return;
  NewReady& ready = (waits ? new_waiting_ : new_ready_).emplace_back();
  ready.id = r.id;
  ready.line = known ? line->second : kNone;
  if (!known) {
    ready.queue = job.queue;
    ready.kind = job.kind;
    ready.level = job.min_level;
  }
  ready.priority = static_cast<std::uint8_t>(job.priority);
  ready.attempt = r.attempt;
  ready.limit = job.concurrency_limit;
  if (ready.limit > 0) {
    ready.key = hash;
    ready.group = group;
    ready.line_key = key.string();
  }
  if (waits) {
    ready.unmet = static_cast<std::uint32_t>(r.unmet.size());
    ready.taken = job.run_at_ms > wall_;
    for (const JobId& id : r.unmet) {
      new_dependents_[id].push_back(new_waiting_.size() - 1);
    }
    return;
  }
  new_ready_sorted_ = false;
  ++new_ready_left_;
}

void Draft::decide(const RetryCommand& c) {
  ItemAnswer& item = out_.items.emplace_back();
  item.id = c.id;
  std::uint32_t slot = s_.find(c.id);
  if (slot != kNone) {
    item.answer = Answer::wrong_state;
    item.state = static_cast<State>(s_.jobs[slot].state);
    return;
  }
  if (!c.body) {
    item.answer = Answer::not_found;
    return;
  }
  item.state = c.state;
  if (c.state != State::failed && c.state != State::dead &&
      c.state != State::cancelled) {
    item.answer = Answer::wrong_state;
    return;
  }
  EnqueueRecord r = *c.body;
  r.unmet.clear();
  if (!c.ignore_dependencies) {
    item.answer = check_dependencies(c, &r, &item);
    if (item.answer != Answer::ok) return;
  }
  if (!has_room(r.job, false, &item)) return;
  r.id = c.id;
  r.state = r.unmet.empty() ? State::ready : State::waiting;
  r.revived = u8(c.state);
  r.attempt = static_cast<std::uint16_t>(std::clamp(c.attempt, 0, 60'000));
  item.state = r.state;
  admitted(r);
  record(std::move(r));
}

// It waits for what lives, and is refused for what ended otherwise than well.
// Of a dependency that nobody knows any more it is asked whether the job was
// ever past waiting for it: it had succeeded then.
Answer Draft::check_dependencies(const RetryCommand& c, EnqueueRecord* r,
                                 ItemAnswer* item) const {
  const std::vector<JobId>& waited = c.body->unmet;
  for (const JobId& id : c.body->job.depends_on) {
    const std::uint32_t slot = s_.find(id);
    const bool theirs = hidden(slot, c.body->job);
    if (slot != kNone && !theirs) {
      if (std::find(r->unmet.begin(), r->unmet.end(), id) == r->unmet.end()) {
        r->unmet.push_back(id);
      }
      continue;
    }
    auto fact = std::find_if(c.facts.begin(), c.facts.end(),
                             [&id](const Fact& f) { return f.id == id; });
    item->detail = to_string(id);
    if (!theirs && fact == c.facts.end()) return Answer::need_facts;
    const bool known =
        !theirs && fact->known && fact->tenant == c.body->job.tenant;
    if (known && fact->state != State::succeeded) {
      item->detail += " ended " + std::string(name(fact->state));
      return Answer::dependency;
    }
    const bool passed =
        c.attempt > c.body->attempt ||
        std::find(waited.begin(), waited.end(), id) == waited.end();
    if (!known && !passed) {
      item->detail +=
          " is past its retention, and had not succeeded when it was last seen";
      return Answer::dependency;
    }
    item->detail.clear();
  }
  return Answer::ok;
}

// --- ends ---

std::uint32_t Draft::lease_of(Fence fence) const {
  if (ended_leases_.contains(fence)) return kNone;
  return s_.lease_index.find(fence);
}

// Its fence is stale from here on, and its key's slot free.
void Draft::lease_ends(Fence fence, std::uint32_t slot) {
  ended_leases_.insert(fence);
  const JobEntry& e = s_.jobs[slot];
  if (!(e.flags & kKeyed) || !may_feed()) return;
  std::uint32_t key = s_.key_slot(e);
  --slots_[s_.keys[key].hash];
  freed_keys_.insert(key);
}

EndRecord Draft::end_of(std::uint32_t slot, State state, EndCode code) const {
  const JobEntry& e = s_.jobs[slot];
  EndRecord r;
  r.id = e.id;
  r.state = state;
  r.attempt = e.attempt;
  r.body_place = e.body_place;
  r.body_bytes = e.body_bytes;
  r.outcome.code = code;
  if (e.state == u8(State::running)) {
    const LeaseEntry& lease = s_.leases[e.a];
    r.fence = lease.fence;
    r.started_ms = s_.wall(lease.started);
    r.worker = lease.worker_name();
  }
  return r;
}

void Draft::end_now(std::uint32_t slot, State state, EndCode code,
                    std::string message) {
  EndRecord r = end_of(slot, state, code);
  r.outcome.message = std::move(message);
  ended_jobs_[r.id] = state;
  if (r.fence) lease_ends(r.fence, slot);
  record(std::move(r));
}

void Draft::decide(const CompleteCommand& c) {
  will_lease_ = c.lease.has_value();
  for (const CompleteCommand::Item& done : c.items) {
    ItemAnswer& item = out_.items.emplace_back();
    std::uint32_t lease = lease_of(done.fence);
    if (lease == kNone) {
      item.answer = Answer::stale_lease;
      continue;
    }
    std::uint32_t slot = job_of(lease);
    bool pass = done.outcome.code == EndCode::none;
    EndRecord r =
        end_of(slot, pass ? State::succeeded : State::failed, EndCode::none);
    r.by_complete = 1;
    r.outcome = done.outcome;
    item.id = r.id;
    item.state = State::running;
    more_ends_ = &done != &c.items.back();
    if (!done.children.empty()) {
      admit_children(done, c.facts, &r, &item);
      if (item.answer != Answer::ok) continue;
    }
    item.state = r.state;
    ended_jobs_[r.id] = r.state;
    lease_ends(r.fence, slot);
    record(std::move(r));
    foresee(slot, pass);
  }
  if (c.lease) lease(*c.lease);
}

// All of them or none, as if their parent had ended.
void Draft::admit_children(const CompleteCommand::Item& done,
                           const std::vector<Fact>& facts, EndRecord* parent,
                           ItemAnswer* item) {
  Decision kept = std::move(out_);
  out_ = Decision{};
  Draft trial = *this;
  out_ = std::move(kept);
  trial.ended_jobs_[parent->id] = parent->state;
  // A worker serves all tenants: its credential does not say whose child it is.
  const std::string& tenant = s_.tenants[s_.jobs[s_.find(parent->id)].tenant];
  for (const NewJob& job : done.children) {
    EnqueueRecord child;
    ItemAnswer answer;
    NewJob own = job;
    own.tenant = tenant;
    answer.answer = trial.admit(std::move(own), facts, &child, &answer);
    if (answer.answer == Answer::duplicate) continue;
    if (answer.answer != Answer::ok) {
      item->answer = answer.answer;
      item->detail = answer.detail;
      return;
    }
    trial.admitted(child);
    parent->children.push_back(std::move(child));
  }
  chance_ = trial.chance_;
  new_ids_ = trial.new_ids_;
  for (const EnqueueRecord& child : parent->children) admitted(child);
}

void Draft::decide(const FailCommand& c) {
  ItemAnswer& item = out_.items.emplace_back();
  std::uint32_t lease = lease_of(c.fence);
  if (lease == kNone) {
    item.answer = Answer::stale_lease;
    return;
  }
  const std::uint32_t slot = job_of(lease);
  // Only a client cancels: a worker may say so when it was told to.
  if (c.outcome.code == EndCode::cancelled &&
      !(s_.jobs[slot].flags & kCancel)) {
    item.answer = Answer::wrong_state;
    item.id = s_.jobs[slot].id;
    item.state = State::running;
    item.detail = "code: cancelled is for a job that was asked to stop";
    return;
  }
  end_attempt(slot, c.outcome, &item);
}

// The one place that knows what becomes of a job whose attempt did not work.
void Draft::end_attempt(std::uint32_t slot, const Outcome& outcome,
                        ItemAnswer* item) {
  const JobEntry& e = s_.jobs[slot];
  EndCode code = attempt_code(outcome.code);
  State state = State::dead;
  bool again = false;
  if ((e.flags & kCancel) || code == EndCode::cancelled) {
    state = State::cancelled;
    code = EndCode::cancelled;
  } else if (code == EndCode::verdict || code == EndCode::invalid_payload) {
    state = State::failed;
  } else {
    again = outcome.retry && e.attempt < e.limit;
  }
  if (!again) {
    EndRecord r = end_of(slot, state, code);
    r.outcome = outcome;
    r.outcome.code = code;
    lease_ends(r.fence, slot);
    ended_jobs_[r.id] = state;
    item->id = r.id;
    item->state = state;
    record(std::move(r));
    return;
  }
  RetryRecord r;
  r.id = e.id;
  r.fence = s_.leases[e.a].fence;
  r.code = code;
  r.attempt = e.attempt;
  r.message = outcome.message;
  bool first_death = code == EndCode::worker_died && !(e.flags & kDiedOnce);
  if (outcome.retry_after_ms >= 0) {
    const Millis wait = std::min<Millis>(outcome.retry_after_ms, e.retry_max);
    r.run_at_ms = wait > 0 ? wall_ + wait : 0;
  } else if (!first_death) {
    r.run_at_ms = wall_ + backoff_ms(e);
    if (r.run_at_ms <= wall_) r.run_at_ms = 0;
  }
  lease_ends(r.fence, slot);
  item->id = r.id;
  item->state = r.run_at_ms == 0 ? State::ready : State::scheduled;
  if (r.run_at_ms == 0) ready_again(slot, e.attempt);
  record(std::move(r));
}

Millis Draft::backoff_ms(const JobEntry& e) {
  int retry = std::max(e.attempt - e.base, 1);
  std::uint64_t wait = e.retry_min;
  for (int i = 1; i < retry && wait < e.retry_max; ++i) wait *= 2;
  wait += chance_.next() % 251;
  return static_cast<Millis>(std::min<std::uint64_t>(wait, e.retry_max));
}

void Draft::decide(const BlockCommand& c) {
  ItemAnswer& item = out_.items.emplace_back();
  std::uint32_t lease = lease_of(c.fence);
  if (lease == kNone) {
    item.answer = Answer::stale_lease;
    return;
  }
  std::uint32_t slot = job_of(lease);
  item.id = s_.jobs[slot].id;
  if (s_.jobs[slot].flags & kCancel) {
    item.state = State::cancelled;
    end_now(slot, State::cancelled, EndCode::cancelled,
            "cancelled while it ran");
    return;
  }
  BlockRecord r;
  r.id = item.id;
  r.fence = c.fence;
  r.reason = c.reason;
  r.data = c.data;
  std::uint64_t a = chance_.next();
  r.token = hex32(a, chance_.next());
  if (c.deadline_ms > 0) r.deadline_ms = wall_ + c.deadline_ms;
  item.state = State::blocked;
  item.detail = r.token;
  lease_ends(c.fence, slot);
  record(std::move(r));
}

void Draft::decide(const UnblockCommand& c) {
  ItemAnswer& item = out_.items.emplace_back();
  item.id = c.id;
  std::uint32_t slot = s_.find(c.id);
  if (slot == kNone) {
    item.answer = Answer::not_found;
    return;
  }
  const JobEntry& e = s_.jobs[slot];
  item.state = static_cast<State>(e.state);
  if (e.state != u8(State::blocked)) {
    item.answer = Answer::wrong_state;
    item.detail = "only a blocked job waits for an unblock";
    return;
  }
  if (!same_token(s_.extras[s_.extra_slot(e)].token, c.token)) {
    item.answer = Answer::bad_token;
    return;
  }
  item.state = State::ready;
  ready_again(slot, e.attempt);
  record(UnblockRecord{c.id, c.input, c.actor});
}

void Draft::decide(const ReleaseCommand& c) {
  for (Fence fence : c.fences) {
    ItemAnswer& item = out_.items.emplace_back();
    std::uint32_t lease = lease_of(fence);
    if (lease == kNone) {
      item.answer = Answer::stale_lease;
      continue;
    }
    const JobEntry& e = s_.jobs[job_of(lease)];
    item.id = e.id;
    item.state = e.flags & kCancel ? State::cancelled : State::ready;
    release(lease);
  }
}

void Draft::release(std::uint32_t lease) {
  std::uint32_t slot = job_of(lease);
  const JobEntry& e = s_.jobs[slot];
  if (e.flags & kCancel) {
    end_now(slot, State::cancelled, EndCode::cancelled,
            "cancelled while it ran");
    return;
  }
  lease_ends(s_.leases[lease].fence, slot);
  ready_again(slot, static_cast<std::uint16_t>(e.attempt - 1));
  record(ReleaseRecord{e.id, s_.leases[lease].fence});
}

void Draft::decide(const CancelCommand& c) {
  ItemAnswer& item = out_.items.emplace_back();
  item.id = c.id;
  std::uint32_t slot = s_.find(c.id);
  if (slot == kNone) {
    item.answer = Answer::not_found;
    return;
  }
  const JobEntry& e = s_.jobs[slot];
  if (e.state == u8(State::running)) {
    item.state = State::running;
    if (e.flags & kCancel) {
      item.answer = Answer::already;
    } else {
      record(CancelRecord{c.id});
    }
    return;
  }
  item.state = State::cancelled;
  if (e.flags & kDoomed) {
    item.answer = Answer::already;
    return;
  }
  end_now(slot, State::cancelled, EndCode::cancelled, "");
}

void Draft::decide(const HeartbeatCommand& c) {
  for (const HeartbeatCommand::Item& beat : c.items) {
    ItemAnswer& item = out_.items.emplace_back();
    std::uint32_t lease = lease_of(beat.fence);
    if (lease == kNone) {
      item.answer = Answer::stale_lease;
      continue;
    }
    const JobEntry& e = s_.jobs[job_of(lease)];
    item.id = e.id;
    item.state = State::running;
    item.cancel = e.flags & kCancel;
  }
}

void Draft::decide(const GoneCommand& c) {
  Outcome outcome;
  outcome.code = EndCode::worker_died;
  for (std::size_t i = 0; i < c.workers.size(); ++i) {
    const std::string& worker = c.workers[i];
    const Session session = i < c.sessions.size() ? c.sessions[i] : 0;
    auto found = s_.worker_leases.find(worker);
    if (found == s_.worker_leases.end()) continue;
    outcome.message = "worker " + worker + " died";
    for (std::uint32_t at = found->second; at != kNone;
         at = s_.leases[at].worker_next) {
      if (ended_leases_.contains(s_.leases[at].fence)) continue;
      const Session its = s_.leases[at].session;
      if (its != 0 &&
          (session == 0 ? (its & kLocalSession) == 0 : its != session)) {
        continue;  // another worker's of that name
      }
      if (c.ended) {
        release(at);
        continue;
      }
      ItemAnswer item;
      end_attempt(job_of(at), outcome, &item);
      out_.items.push_back(std::move(item));
    }
  }
}

// --- leases ---

void Draft::decide(const LeaseCommand& c) {
  will_lease_ = true;
  lease(c);
}

void Draft::lease(const LeaseCommand& c) {
  if (c.holding) release_others(c);
  promote();
  std::size_t max =
      static_cast<std::size_t>(std::clamp(c.max, 1, kLeasesPerCallMax));
  out_.grants = pick(c, nullptr, max);
  out_.park = out_.grants.empty() && c.waiter != 0;
}

void Draft::release_others(const LeaseCommand& c) {
  auto found = s_.worker_leases.find(c.worker);
  if (found == s_.worker_leases.end()) return;
  std::set<Fence> holding(c.holding->begin(), c.holding->end());
  for (std::uint32_t at = found->second; at != kNone;
       at = s_.leases[at].worker_next) {
    Fence fence = s_.leases[at].fence;
    if (s_.leases[at].session != c.session) continue;
    if (holding.contains(fence) || ended_leases_.contains(fence)) continue;
    release(at);
  }
}

void Draft::ready_again(std::uint32_t slot, std::uint16_t attempt) {
  if (!may_feed()) return;
  const JobEntry& e = s_.jobs[slot];
  NewReady& ready = new_ready_.emplace_back();
  ready.id = e.id;
  ready.line = e.line;
  ready.priority = e.priority;
  ready.returned = e.flags & kReturned;
  ready.attempt = attempt;
  if (e.flags & kKeyed) {
    const Line& line = s_.lines[e.line];
    ready.limit = s_.keyed[e.extra].limit;
    ready.key = s_.keys[s_.key_slot(e)].hash;
    ready.group = s_.keyed[e.extra].group;
    ready.line_key =
        LineKey(s_.queues[line.queue].name, line.kind, line.level).string();
  }
  new_ready_sorted_ = false;
  ++new_ready_left_;
}

// Higher priority first; then those returned by an attempt, then those never
// leased; then in the order in which they became ready.
Draft::Key Draft::key_of(const JobEntry& e) const {
  return {kPriorityMax - e.priority, e.flags & kReturned ? 0 : 1, e.order};
}
Draft::Key Draft::key_of(const NewReady& r, std::size_t i) const {
  return {kPriorityMax - r.priority, r.returned ? 0 : 1, s_.next_order + i};
}

// What apply() will make ready when this job has ended, so that it is handed
// out in the same decision, and in its turn: jobs of the state, and after them
// children of this command's earlier items. Once there is more than one record
// walks, apply() is behind and the rest is left to a Tick.
void Draft::foresee(std::uint32_t slot, bool succeeded) {
  if (!foresees_ || !may_feed() || s_.ended.head != kNone) return;
  std::vector<std::uint32_t> freed;
  std::size_t walked = 0;
  for (std::uint32_t edge = s_.jobs[slot].dependents; edge != kNone;
       edge = s_.edges[edge].next) {
    foresees_ = ++walked <= kPumpMax;
    if (!foresees_) return;
    if (!succeeded) continue;
    std::uint32_t dependent = s_.edges[edge].dependent;
    const JobEntry& e = s_.jobs[dependent];
    if (++met_[dependent] == e.unmet && is_due(e)) {
      freed.push_back(dependent);
    }
  }
  auto children = new_dependents_.find(s_.jobs[slot].id);
  const bool has_children = children != new_dependents_.end();
  if (has_children) walked += children->second.size();
  foresees_ = walked <= kPumpMax;
  if (!foresees_) return;
  for (std::uint32_t dependent : freed) {
    ready_again(dependent, s_.jobs[dependent].attempt);
  }
  if (!succeeded || !has_children) return;
  for (std::size_t child : children->second) {
    NewReady& waits = new_waiting_[child];
    if (--waits.unmet > 0 || waits.taken) continue;
    new_ready_.push_back(std::move(waits));
    new_ready_sorted_ = false;
    ++new_ready_left_;
  }
}

void Draft::sort_new_ready() {
  if (new_ready_sorted_) return;
  std::stable_sort(new_ready_.begin(), new_ready_.end(),
                   [this](const NewReady& a, const NewReady& b) {
                     return key_of(a, 0) < key_of(b, 0);
                   });
  new_ready_sorted_ = true;
}

// A line's ready jobs in order: list 2p + q is priority 9 - p, returned then
// fresh.
std::uint32_t Draft::next_list(const Line& line, std::size_t from) const {
  for (std::size_t i = from; i < 2 * kPriorities; ++i) {
    std::uint32_t head = line.lists[kPriorityMax - i / 2][i % 2].head;
    if (head != kNone) return head;
  }
  return kNone;
}
std::uint32_t Draft::first_in(const Line& line) const {
  return next_list(line, 0);
}
std::uint32_t Draft::next_in(std::uint32_t slot) const {
  const JobEntry& e = s_.jobs[slot];
  if (e.a != kNone) return e.a;
  std::size_t list = 2u * (kPriorityMax - e.priority) +
                     (e.flags & kReturned ? kReturnedList : kFreshList);
  return next_list(s_.lines[e.line], list + 1);
}

bool Draft::wants(const LeaseCommand& c, const Waiter* waiter,
                  const NewReady& r) const {
  if (r.line == kNone) return s_.matches(c, r.queue, r.kind, r.level);
  if (waiter) return waiter->lines[r.line];
  return s_.matches(c, s_.lines[r.line]);
}

// --- concurrency keys ---

std::uint32_t Draft::running(const KeyHash& hash) const {
  std::uint32_t key = s_.key_index.find(hash);
  std::int64_t count = key == kNone ? 0 : s_.keys[key].running;
  auto here = slots_.find(hash);
  if (here != slots_.end()) count += here->second;
  return static_cast<std::uint32_t>(count);
}

bool Draft::may_start(std::uint32_t slot) const {
  const JobEntry& e = s_.jobs[slot];
  return s_.keyed[e.extra].limit > running(s_.keys[s_.key_slot(e)].hash);
}

// The first job of a group that this decision has not handed out.
std::uint32_t Draft::first_left(std::uint32_t group) const {
  auto found = first_left_.find(group);
  return found != first_left_.end() ? found->second
                                    : s_.first_ready(s_.groups[group]);
}

// Nobody overtakes within a group: who stands behind one that cannot start
// cannot either. False is for the rest of this decision.
bool Draft::new_may_start(std::size_t i) {
  NewReady& r = new_ready_[i];
  if (r.limit == 0) return true;
  bool may = r.limit > running(r.key) && !stuck_.contains({r.key, r.line_key});
  if (may && r.group != kNone) {
    std::uint32_t first = first_left(r.group);
    bool behind = first != kNone && key_of(s_.jobs[first]) < key_of(r, i);
    may = !behind || may_start(first);
  }
  if (may) return true;
  stuck_.emplace(std::pair(r.key, r.line_key), key_of(r, i));
  r.taken = true;
  --new_ready_left_;
  return false;
}

// Groups that are closed in the state, and whose key has given a slot back.
void Draft::open_freed() {
  for (std::uint32_t key : std::exchange(freed_keys_, {})) {
    for (auto g = s_.keys[key].groups; g != kNone; g = s_.groups[g].next) {
      const GroupEntry& group = s_.groups[g];
      if (group.open || group.ranks == kNone) continue;
      if (s_.lines[group.line].ready == 0) freed_lines_.push_back(group.line);
      offer(walk_of(group.line), g, kNoHeap, true);
      ++freed_left_;
    }
  }
}

void Draft::offer(Walk* walk, std::uint32_t group, std::size_t heap,
                  bool freed) {
  std::uint32_t job = first_left(group);
  walk->push({key_of(s_.jobs[job]), group, job, heap, freed});
}

// Made when it is first asked for: a heap's root; pop() adds what is below.
Draft::Walk* Draft::walk_of(std::uint32_t line) {
  auto [at, fresh] = walks_.try_emplace(line);
  const auto& open = s_.lines[line].open;
  if (fresh && open && !open->empty()) {
    offer(&at->second, open->top(), 0, false);
  }
  return &at->second;
}

Draft::Candidate Draft::pop(std::uint32_t line) {
  Walk* walk = walk_of(line);
  Candidate top = walk->top();
  walk->pop();
  if (top.heap != kNoHeap) {
    const OpenGroups& open = *s_.lines[line].open;
    for (std::size_t below : {2 * top.heap + 1, 2 * top.heap + 2}) {
      if (below < open.size()) offer(walk, open.at(below), below, false);
    }
  }
  return top;
}

// Whether a job that this decision makes ready goes before it, and waits.
bool Draft::behind_stuck(const Candidate& candidate) const {
  if (stuck_.empty()) return false;
  const GroupEntry& group = s_.groups[candidate.group];
  const Line& line = s_.lines[group.line];
  auto found = stuck_.find(
      {s_.keys[group.key].hash,
       LineKey(s_.queues[line.queue].name, line.kind, line.level).string()});
  return found != stuck_.end() && found->second < candidate.key;
}

// What a line's groups would give next, or null.
const Draft::Candidate* Draft::next_with_key(std::uint32_t line) {
  const auto& open = s_.lines[line].open;
  if (!walks_.contains(line) && (!open || open->empty())) return nullptr;
  Walk* walk = walk_of(line);
  while (!walk->empty()) {
    if (may_start(walk->top().job) && !behind_stuck(walk->top())) {
      return &walk->top();
    }
    if (pop(line).freed) --freed_left_;
  }
  return nullptr;
}

void Draft::take(std::uint32_t line) {
  Candidate taken = pop(line);
  const JobEntry& e = s_.jobs[taken.job];
  ++slots_[s_.keys[s_.key_slot(e)].hash];
  taken.job = s_.next_ready(taken.job);
  first_left_[taken.group] = taken.job;
  if (taken.job == kNone) {
    if (taken.freed) --freed_left_;
    return;
  }
  taken.key = key_of(s_.jobs[taken.job]);
  taken.heap = kNoHeap;
  walk_of(line)->push(taken);
}

std::vector<GrantAnswer> Draft::pick(const LeaseCommand& c,
                                     const Waiter* waiter, std::size_t max) {
  sort_new_ready();
  if (cursors_.size() < s_.lines.size()) {
    cursors_.resize(s_.lines.size(), kUnset);
  }
  open_freed();
  std::vector<std::uint32_t> mine;
  auto consider = [&](std::uint32_t at) {
    bool match = waiter ? waiter->lines[at] : s_.matches(c, s_.lines[at]);
    if (!match) return;
    if (cursors_[at] == kUnset) cursors_[at] = first_in(s_.lines[at]);
    mine.push_back(at);
  };
  for (std::uint32_t at : s_.ready_lines) consider(at);
  for (std::uint32_t at : freed_lines_) consider(at);
  std::vector<GrantAnswer> grants;
  std::size_t fresh = 0;  // of new_ready_
  while (grants.size() < max) {
    std::uint32_t best = kNone;
    bool with_key = false;
    Key best_key{};
    // These first: one that may not start holds up who is behind it.
    while (fresh < new_ready_.size() &&
           (new_ready_[fresh].taken || !wants(c, waiter, new_ready_[fresh]) ||
            !new_may_start(fresh))) {
      ++fresh;
    }
    for (std::uint32_t at : mine) {
      if (cursors_[at] != kNone) {
        Key key = key_of(s_.jobs[cursors_[at]]);
        if (best == kNone || key < best_key) {
          best = at;
          best_key = key;
          with_key = false;
        }
      }
      const Candidate* keyed = next_with_key(at);
      if (keyed && (best == kNone || keyed->key < best_key)) {
        best = at;
        best_key = keyed->key;
        with_key = true;
      }
    }
    bool has_fresh = fresh < new_ready_.size();
    if (has_fresh &&
        (best == kNone || key_of(new_ready_[fresh], fresh) < best_key)) {
      NewReady& r = new_ready_[fresh];
      r.taken = true;
      --new_ready_left_;
      if (r.limit > 0) ++slots_[r.key];
      grants.push_back(grant(c, r.id, r.attempt));
    } else if (with_key) {
      const JobEntry& e = s_.jobs[next_with_key(best)->job];
      take(best);
      grants.push_back(grant(c, e.id, e.attempt));
    } else if (best != kNone) {
      const JobEntry& e = s_.jobs[cursors_[best]];
      cursors_[best] = next_in(cursors_[best]);
      grants.push_back(grant(c, e.id, e.attempt));
    } else {
      break;
    }
  }
  return grants;
}

GrantAnswer Draft::grant(const LeaseCommand& c, const JobId& id,
                         std::uint16_t attempt) {
  CHECK(s_.next_counter + grants_ < (1ULL << 40));
  GrantRecord r;
  r.id = id;
  r.fence = make_fence(s_.epoch, s_.next_counter + grants_++);
  r.attempt = static_cast<std::uint16_t>(attempt + 1);
  r.level = std::min(c.level, kLevelMax);
  r.worker = c.worker;
  r.session = c.session;
  GrantAnswer answer{id, r.fence};
  record(std::move(r));
  return answer;
}

// Parked calls take what became ready, in the order in which they came.
void Draft::feed() {
  std::size_t budget = kFeedMax;
  open_freed();
  for (const Waiter& waiter : s_.waiters) {
    if (budget == 0 ||
        (s_.hungry == 0 && new_ready_left_ == 0 && freed_left_ == 0)) {
      return;
    }
    std::size_t max = static_cast<std::size_t>(
        std::clamp(waiter.command.max, 1, kLeasesPerCallMax));
    std::vector<GrantAnswer> grants =
        pick(waiter.command, &waiter, std::min(max, budget));
    if (grants.empty()) continue;
    budget -= grants.size();
    out_.fed.push_back({waiter.command.waiter, std::move(grants)});
  }
}

// --- time passes ---

void Draft::promote() {
  PromoteRecord r;
  for (const auto* heap : {&s_.due, &s_.due_wall}) {
    if (heap->empty() || !is_due(s_.jobs[heap->top()])) continue;
    for (std::uint32_t slot :
         heap->first(kTickMax - r.ids.size(),
                     [this](const JobEntry& e) { return is_due(e); })) {
      r.ids.push_back(s_.jobs[slot].id);
      ready_again(slot, s_.jobs[slot].attempt);
    }
  }
  if (!r.ids.empty()) record(std::move(r));
}

void Draft::forget() {
  if (s_.expiries.empty()) return;
  if (s_.dedups[s_.expiries.top()].expiry + kForgetLateMs > now_) return;
  std::size_t count =
      s_.expiries
          .first(kForgetMax,
                 [this](const DedupEntry& e) { return e.expiry <= now_; })
          .size();
  record(ForgetRecord{now_, static_cast<std::uint32_t>(count)});
}

void Draft::decide(const ClockCommand& c) {
  record(ClockRecord{c.offset_ms, c.boot, c.boot_ms});
}

void Draft::decide(const TickCommand&) {
  is_tick_ = true;
  Outcome expired;
  expired.code = EndCode::lease_expired;
  expired.message = "the lease expired";
  std::vector<std::uint32_t> leases = s_.lease_deadlines.first(
      kTickMax, [this](const LeaseEntry& e) { return e.deadline <= s_.mono; });
  for (std::uint32_t lease : leases) {
    ItemAnswer item;
    end_attempt(job_of(lease), expired, &item);
  }
  std::vector<std::uint32_t> blocked = s_.deadlines.first(
      kTickMax, [this](const JobEntry& e) { return e.time <= now_; });
  for (std::uint32_t slot : blocked) {
    end_now(slot, State::dead, EndCode::timeout,
            "no input came before the deadline");
  }
  std::uint32_t lost = s_.doomed.head;
  for (std::size_t i = 0; i < kTickMax && lost != kNone; ++i) {
    end_now(lost, State::cancelled, EndCode::dependency,
            "a job it depends on did not succeed");
    lost = s_.jobs[lost].a;
  }
  promote();
  forget();
  // Any record walks edges (pump()); this one is only for that.
  if (s_.ended.head != kNone && out_.records.empty()) record(PromoteRecord{});
}

}  // namespace machina
