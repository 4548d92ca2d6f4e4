// The durable state as bytes. The layout is docs/wal-records.md, "The
// checkpoint's image"; it names jobs by id and lines by position, never by
// slot, so that what it says does not depend on how the slabs came to be.

#include <cstring>

#include "queue/base/check.h"
#include "queue/base/codec.h"
#include "queue/core/core_state.h"

namespace machina {
namespace {

// "MMCHCKP3": a number says what is in it; all of it is written. The others are
// read: "MMCHCKP1", and "MMCHCKP2" with concurrency keys.
constexpr std::uint64_t kMagic = 0x33504b4348434d4dULL;
constexpr std::uint64_t kMagicFirst = 0x31504b4348434d4dULL;
constexpr std::uint64_t kMagicKeys = 0x32504b4348434d4dULL;
enum Part : std::uint64_t {
  kPartKeys = 1,      // jobs with concurrency keys
  kPartKeysEnds = 2,  // how the jobs of dedup keys ended
  kPartClock = 4,     // how the wall clock stands; jobs that wait for it
};
constexpr std::uint64_t kParts = 7;
// Of a lease's level: its session follows.
constexpr std::uint8_t kWithSession = 128;
constexpr std::uint8_t kKeptFlags = kCancel | kReturned | kDiedOnce;
// The shortest a job can be: its id and one byte for each other field.
constexpr std::size_t kJobBytesMin = 16 + 14;
constexpr std::size_t kJobBytesLikely = 56;

class Saver {
 public:
  Saver(const Core::Impl& state, std::vector<std::byte>* out)
      : s_(state), w_(out) {}

  void save() {
    w_.u64(kMagic);
    w_.number(kParts);
    w_.number(s_.applied);
    w_.signed_number(s_.time);
    w_.signed_number(s_.offset);
    w_.signed_number(s_.anchor.time_ms);
    w_.u64(s_.anchor.boot);
    w_.signed_number(s_.anchor.boot_ms);
    w_.number(s_.next_order);
    w_.u64(s_.last_fence);
    names();
    ready();
    ready_with_keys();
    others();
    w_.number(length(s_.doomed));
    for (auto i = s_.doomed.head; i != kNone; i = s_.jobs[i].a) job(i);
    w_.number(length(s_.ended));
    for (auto i = s_.ended.head; i != kNone; i = s_.jobs[i].a) {
      w_.id(s_.jobs[i].id);
      w_.u8(s_.jobs[i].state);
      dependents(i);
    }
    dedups();
  }

 private:
  void names() {
    w_.number(s_.tenants.size());
    for (const std::string& tenant : s_.tenants) w_.text(tenant);
    w_.number(s_.queues.size());
    for (const QueueEntry& queue : s_.queues) {
      w_.text(queue.name);
      for (int i = u8(State::succeeded); i < kStates; ++i) {
        w_.number(queue.by_state[i]);
      }
    }
    w_.number(s_.lines_used);
    ordinals_.resize(s_.lines.size());
    std::uint32_t ordinal = 0;
    for (std::size_t i = 0; i < s_.lines.size(); ++i) {
      const Line& line = s_.lines[i];
      if (line.jobs == 0) continue;
      ordinals_[i] = ordinal++;
      w_.number(line.queue);
      w_.text(line.kind);
      w_.u8(line.level);
    }
  }

  void ready() {
    for (const Line& line : s_.lines) {
      if (line.jobs == 0) continue;
      for (const auto& pair : line.lists) {
        for (const JobList& list : pair) {
          w_.number(length(list));
          for (auto i = list.head; i != kNone; i = s_.jobs[i].a) job(i);
        }
      }
    }
  }

  void ready_with_keys() {
    std::uint64_t count = 0;
    auto each = [this](const auto& visit) {
      for (std::uint32_t i = 0; i < s_.groups.end(); ++i) {
        if (s_.groups[i].jobs == 0) continue;  // free
        auto slot = s_.first_ready(s_.groups[i]);
        for (; slot != kNone; slot = s_.next_ready(slot)) visit(slot);
      }
    };
    each([&count](std::uint32_t) { ++count; });
    w_.number(count);
    each([this](std::uint32_t slot) { job(slot); });
  }

  void others() {
    std::uint64_t count = 0;
    auto each = [this](const auto& visit) {
      for (std::uint32_t i = 0; i < s_.jobs.end(); ++i) {
        const JobEntry& e = s_.jobs[i];
        bool other = (e.flags & kUsed) && !(e.flags & (kEnded | kDoomed)) &&
                     e.state != u8(State::ready);
        if (other) visit(i);
      }
    };
    each([&count](std::uint32_t) { ++count; });
    w_.number(count);
    each([this](std::uint32_t i) {
      w_.u8(s_.jobs[i].state);
      job(i);
    });
  }

  void job(std::uint32_t slot) {
    const JobEntry& e = s_.jobs[slot];
    w_.id(e.id);
    w_.number(ordinals_[e.line]);
    w_.number(e.body_place);
    w_.number(e.body_bytes);
    w_.number(e.order);
    w_.signed_number(e.time);
    w_.number(e.retry_min);
    w_.number(e.retry_max);
    w_.number(e.attempt);
    w_.number(e.base);
    w_.number(e.limit);
    w_.number(e.tenant);
    w_.u8(e.priority);
    std::uint32_t note = s_.extra_slot(e);
    w_.u8(
        static_cast<std::uint8_t>((e.flags & (kKeptFlags | kKeyed | kAtWall)) |
                                  (note == kNone ? 0 : kUsed)));
    if (e.flags & kKeyed) {
      const KeyHash& hash = s_.keys[s_.key_slot(e)].hash;
      w_.u64(hash.low);
      w_.u64(hash.high);
      w_.number(s_.keyed[e.extra].limit);
    }
    dependents(slot);
    if (note != kNone) extra(s_.extras[note]);
    if (e.state == u8(State::running)) lease(s_.leases[e.a]);
  }

  void extra(const ExtraEntry& e) {
    w_.number(e.note_place);
    w_.number(e.note_bytes);
    std::string_view token(reinterpret_cast<const char*>(e.token),
                           sizeof(e.token));
    w_.text(token);
    w_.number(e.error_attempt);
    w_.u8(e.error_code);
    w_.text({e.message, e.message_bytes});
  }

  void lease(const LeaseEntry& e) {
    w_.u64(e.fence);
    w_.signed_number(e.started);
    w_.u8(static_cast<std::uint8_t>(e.level | (e.session ? kWithSession : 0)));
    w_.text(e.worker_name());
    if (e.session != 0) w_.u64(e.session);
  }

  void dependents(std::uint32_t slot) {
    std::uint64_t count = 0;
    std::uint32_t first = s_.jobs[slot].dependents;
    for (auto i = first; i != kNone; i = s_.edges[i].next) ++count;
    w_.number(count);
    for (auto i = first; i != kNone; i = s_.edges[i].next) {
      w_.id(s_.jobs[s_.edges[i].dependent].id);
    }
  }

  void dedups() {
    w_.number(s_.expiries.size());
    for (std::size_t i = 0; i < s_.expiries.size(); ++i) {
      const DedupEntry& e = s_.dedups[s_.expiries.at(i)];
      w_.u64(e.key.low);
      w_.u64(e.key.high);
      w_.id(e.job);
      w_.u64(e.digest);
      w_.signed_number(e.expiry);
      w_.signed_number(e.finished);
      if (e.finished == 0) continue;
      w_.u8(e.state);
      w_.u8(e.code);
      w_.number(e.attempt);
    }
  }

  std::uint64_t length(const JobList& list) const {
    std::uint64_t count = 0;
    for (auto i = list.head; i != kNone; i = s_.jobs[i].a) ++count;
    return count;
  }

  const Core::Impl& s_;
  Writer w_;
  std::vector<std::uint32_t> ordinals_;  // of lines that have jobs
};

// Believes nothing: whatever the bytes, the state either fails to load or
// satisfies check_invariants().
class Loader {
 public:
  Loader(Core::Impl* state, std::span<const std::byte> bytes)
      : s_(*state), r_(bytes) {}

  Result<void> load() {
    std::uint64_t magic = r_.u64();
    if (magic == kMagic) {
      parts_ = r_.number();
      if (parts_ & ~kParts) {
        return Error{Code::newer,
                     "checkpoint image: it has parts that this program does "
                     "not know: it was written by a later version"};
      }
    } else if (magic == kMagicKeys) {
      parts_ = kPartKeys;
    } else if (magic != kMagicFirst) {
      r_.fail();
    }
    s_.applied = r_.number();
    s_.time = r_.signed_number();
    if (parts_ & kPartClock) {
      s_.offset = r_.signed_number();
      s_.anchor.time_ms = r_.signed_number();
      s_.anchor.boot = r_.u64();
      s_.anchor.boot_ms = r_.signed_number();
    }
    s_.next_order = r_.number();
    s_.last_fence = r_.u64();
    names();
    ready();
    if (parts_ & kPartKeys) ready_with_keys();
    others();
    doomed();
    ended();
    edges();
    dedups();
    if (r_.done()) return {};
    return Error{Code::corrupt, "checkpoint image: ill-formed at byte " +
                                    std::to_string(r_.at()) +
                                    (why_ ? ": " : "") + (why_ ? why_ : "")};
  }

 private:
  bool ok(bool good, const char* why) {
    if (!good && !why_) why_ = why;
    if (!good) r_.fail();
    return r_.ok();
  }

  void names() {
    std::uint64_t count = r_.count_of(1);
    for (; count > 0 && r_.ok(); --count) {
      std::string name = r_.text();
      bool fresh = !s_.tenant_names.contains(name);
      if (ok(fresh && s_.tenants.size() < 0xffff, "tenants")) {
        s_.tenant_for(name);
      }
    }
    count = r_.count_of(5);
    for (; count > 0 && r_.ok(); --count) {
      QueueEntry queue;
      queue.name = r_.text();
      for (int i = u8(State::succeeded); i < kStates; ++i) {
        queue.by_state[i] = r_.number();
      }
      std::uint32_t at = static_cast<std::uint32_t>(s_.queues.size());
      if (!ok(s_.queue_names.emplace(queue.name, at).second, "queues")) return;
      s_.queues.push_back(std::move(queue));
    }
    count = r_.count_of(3);
    for (; count > 0 && r_.ok(); --count) {
      Line line;
      line.queue = static_cast<std::uint32_t>(r_.number());
      line.kind = r_.text();
      line.level = r_.u8_below(kLevelMax + 1);
      bool good = line.queue < s_.queues.size() && !line.kind.empty();
      if (!ok(good, "lines")) return;
      std::string key =
          LineKey(s_.queues[line.queue].name, line.kind, line.level).string();
      std::uint32_t at = static_cast<std::uint32_t>(s_.lines.size());
      if (!ok(s_.line_names.emplace(key, at).second, "lines")) return;
      s_.lines.push_back(std::move(line));
    }
  }

  void ready() {
    for (std::uint32_t at = 0; at < s_.lines.size() && r_.ok(); ++at) {
      for (std::size_t i = 0; i < 2 * kPriorities && r_.ok(); ++i) {
        std::uint64_t count = r_.count_of(kJobBytesMin);
        for (std::uint64_t before = 0; count > 0 && r_.ok(); --count) {
          std::uint32_t slot = job(State::ready);
          if (slot == kNone) return;
          const JobEntry& e = s_.jobs[slot];
          bool returned = i % 2 == kReturnedList;
          bool good = e.line == at && e.priority == i / 2 &&
                      returned == ((e.flags & kReturned) != 0) &&
                      !(e.flags & kKeyed) && e.order > before;
          before = e.order;
          ok(good, "a ready job is out of place");
        }
      }
    }
  }

  void ready_with_keys() {
    std::uint64_t count = r_.count_of(kJobBytesMin);
    for (; count > 0 && r_.ok(); --count) {
      std::uint32_t slot = job(State::ready);
      if (slot == kNone) return;
      const JobEntry& e = s_.jobs[slot];
      bool in_order = e.b == kNone || s_.jobs[e.b].order < e.order;
      ok((e.flags & kKeyed) && in_order, "a ready job is out of place");
    }
  }

  void others() {
    std::uint64_t count = r_.count_of(1 + kJobBytesMin);
    for (; count > 0 && r_.ok(); --count) {
      State state = static_cast<State>(r_.u8_below(u8(State::succeeded)));
      if (ok(state != State::ready, "states")) job(state);
    }
    for (const Line& line : s_.lines) ok(line.jobs > 0, "an empty line");
  }

  void doomed() {
    std::uint64_t count = r_.count_of(kJobBytesMin);
    for (; count > 0 && r_.ok(); --count) {
      std::uint32_t slot = job(State::waiting);
      if (slot == kNone) return;
      s_.jobs[slot].flags |= kDoomed;
      link(s_.doomed, slot);
    }
  }

  void ended() {
    std::uint64_t count = r_.count_of(18);
    for (; count > 0 && r_.ok(); --count) {
      std::uint32_t slot = s_.jobs.allocate();
      JobEntry& e = s_.jobs[slot];
      e.id = r_.id();
      e.state = r_.u8_below(kStates);
      e.flags = kUsed | kEnded;
      e.dependents = e.extra = kNone;
      link(s_.ended, slot);
      if (!ok(is_final(static_cast<State>(e.state)), "ended")) return;
      dependents(slot);
    }
  }

  std::uint32_t job(State state) {
    std::uint32_t slot = s_.jobs.allocate();
    JobEntry& e = s_.jobs[slot];
    e.a = e.b = e.dependents = e.extra = kNone;
    e.flags = kUsed;
    e.id = r_.id();
    e.line = static_cast<std::uint32_t>(r_.number_to(kNone));
    e.body_place = r_.number();
    e.body_bytes = static_cast<std::uint32_t>(r_.number_to(kNone));
    e.order = r_.number();
    e.time = r_.signed_number();
    e.retry_min = static_cast<std::uint32_t>(r_.number_to(kNone));
    e.retry_max = static_cast<std::uint32_t>(r_.number_to(kNone));
    e.attempt = static_cast<std::uint16_t>(r_.number_to(0xffff));
    e.base = static_cast<std::uint16_t>(r_.number_to(0xffff));
    e.limit = static_cast<std::uint16_t>(r_.number_to(0xffff));
    e.tenant = static_cast<std::uint16_t>(r_.number_to(0xffff));
    e.priority = r_.u8_below(kPriorities);
    std::uint8_t flags = r_.u8();
    bool running = state == State::running;
    const int known = kKeptFlags | kUsed | (parts_ & kPartKeys ? kKeyed : 0) |
                      (parts_ & kPartClock ? kAtWall : 0);
    const bool at_wall = state == State::waiting || state == State::scheduled;
    bool good = (flags & ~known) == 0 && e.line < s_.lines.size() &&
                e.tenant < s_.tenants.size() && e.order < s_.next_order &&
                e.base <= e.attempt && e.attempt <= e.limit &&
                e.base < e.limit && (running || !(flags & kCancel)) &&
                (at_wall || !(flags & kAtWall)) &&
                (!running || ((flags & kReturned) && e.attempt > e.base));
    if (!ok(good, "a job") || !ok(s_.find(e.id) == kNone, "an id twice")) {
      return kNone;
    }
    e.flags =
        static_cast<std::uint8_t>(kUsed | (flags & (kKeptFlags | kAtWall)));
    s_.job_index.insert(slot);
    s_.use_line(e.line, +1);
    s_.need(e.body_place, +1);
    if (flags & kKeyed) {
      KeyHash hash;
      hash.low = r_.u64();
      hash.high = r_.u64();
      std::uint64_t limit = r_.number_to(kConcurrencyLimitMax);
      if (!ok(r_.ok() && limit > 0, "a concurrency key")) return kNone;
      s_.set_key(slot, hash, static_cast<std::uint16_t>(limit));
    }
    dependents(slot);
    if (flags & kUsed) extra(slot);
    bool blocked = state == State::blocked;
    if (!ok(!blocked || s_.extra_slot(e) != kNone,
            "a blocked job without a token")) {
      return kNone;
    }
    if (running) e.a = lease(slot);
    if (!r_.ok()) return kNone;
    s_.insert(slot, state);
    return slot;
  }

  void extra(std::uint32_t slot) {
    ExtraEntry& e = s_.extra_of(slot);
    e.note_place = r_.number();
    e.note_bytes = static_cast<std::uint32_t>(r_.number_to(kNone));
    std::string token = r_.text();
    e.error_attempt = static_cast<std::uint16_t>(r_.number_to(0xffff));
    e.error_code = r_.u8_below(kEndCodes);
    std::string message = r_.text();
    bool good =
        token.size() == sizeof(e.token) && message.size() <= sizeof(e.message);
    if (!ok(good, "a job's note")) return;
    std::memcpy(e.token, token.data(), token.size());
    std::memcpy(e.message, message.data(), message.size());
    e.message_bytes = static_cast<std::uint8_t>(message.size());
    s_.need(e.note_place, +1);
  }

  std::uint32_t lease(std::uint32_t slot) {
    LeaseEntry e{};
    e.job = slot;
    e.fence = r_.u64();
    e.started = r_.signed_number();
    const std::uint8_t level = r_.u8_below(kWithSession + kLevelMax + 1);
    e.level = level & ~kWithSession;
    std::string worker = r_.text();
    if ((level & kWithSession) != 0) e.session = r_.u64();
    bool good = e.level <= kLevelMax &&
                (e.session != 0 || (level & kWithSession) == 0) &&
                e.fence > 0 && e.fence <= s_.last_fence &&
                worker.size() <= sizeof(e.worker) &&
                s_.lease_index.find(e.fence) == kNone;
    if (!ok(good, "a lease")) return kNone;
    std::memcpy(e.worker, worker.data(), worker.size());
    e.worker_bytes = static_cast<std::uint8_t>(worker.size());
    return s_.add_lease(e);
  }

  void dependents(std::uint32_t slot) {
    std::uint64_t count = r_.count_of(sizeof(JobId));
    for (; count > 0 && r_.ok(); --count) waits_.emplace_back(slot, r_.id());
  }

  // All jobs are known by now.
  void edges() {
    if (!r_.ok()) return;
    for (const auto& [dependency, id] : waits_) {
      std::uint32_t slot = s_.find(id);
      bool good = slot != kNone && slot != dependency &&
                  s_.jobs[slot].state == u8(State::waiting) &&
                  !(s_.jobs[slot].flags & kDoomed) && s_.jobs[slot].unmet < 255;
      if (!ok(good, "a dependency")) return;
      s_.add_edge(dependency, slot);
    }
    for (std::uint32_t i = 0; i < s_.jobs.end(); ++i) {
      const JobEntry& e = s_.jobs[i];
      bool waits = e.state == u8(State::waiting) && !(e.flags & kDoomed);
      if (!ok(!waits || e.unmet > 0, "a job waits for nothing")) return;
    }
  }

  void dedups() {
    std::uint64_t count = r_.count_of(41);
    for (; count > 0 && r_.ok(); --count) {
      std::uint32_t slot = s_.dedups.allocate();
      DedupEntry& e = s_.dedups[slot];
      e.key.low = r_.u64();
      e.key.high = r_.u64();
      e.job = r_.id();
      e.digest = r_.u64();
      e.expiry = r_.signed_number();
      if (parts_ & kPartKeysEnds) e.finished = r_.signed_number();
      if (e.finished != 0) {
        e.state = r_.u8_below(kStates);
        e.code = r_.u8_below(kEndCodes);
        e.attempt = static_cast<std::uint16_t>(r_.number_to(0xffff));
        const bool ended = is_final(static_cast<State>(e.state));
        if (!ok(ended && s_.find(e.job) == kNone, "a dedup key's end")) return;
      }
      const bool fresh = s_.dedup_index.find(e.key) == kNone &&
                         s_.dedup_by_job.find(e.job) == kNone;
      if (!ok(fresh, "a dedup key twice")) return;
      s_.dedup_index.insert(slot);
      s_.dedup_by_job.insert(slot);
      s_.expiries.push(slot);
    }
  }

  void link(JobList& list, std::uint32_t slot) {
    s_.jobs[slot].a = kNone;
    s_.jobs[slot].b = list.tail;
    (list.tail == kNone ? list.head : s_.jobs[list.tail].a) = slot;
    list.tail = slot;
  }

  Core::Impl& s_;
  Reader r_;
  std::uint64_t parts_ = 0;
  const char* why_ = nullptr;
  std::vector<std::pair<std::uint32_t, JobId>> waits_;
};

}  // namespace

void Core::Impl::save(std::vector<std::byte>* out) const {
  out->reserve(out->size() + jobs.used() * kJobBytesLikely);
  Saver(*this, out).save();
}

// All that Saver looks at.
std::unique_ptr<const Core::Impl> Core::Impl::freeze() {
  auto frozen = std::make_unique<Impl>(options);
  frozen->applied = applied;
  frozen->time = time;
  frozen->offset = offset;
  frozen->anchor = anchor;
  frozen->next_order = next_order;
  frozen->last_fence = last_fence;
  frozen->jobs = jobs.share();
  frozen->extras = extras.share();
  frozen->leases = leases.share();
  frozen->edges = edges.share();
  frozen->dedups = dedups.share();
  frozen->keyed = keyed.share();
  frozen->keys = keys.share();
  frozen->groups = groups.share();
  frozen->ranks = ranks.share();
  frozen->expiries.share(expiries);
  frozen->lines = lines;
  frozen->lines_used = lines_used;
  frozen->queues = queues;
  frozen->tenants = tenants;
  frozen->doomed = doomed;
  frozen->ended = ended;
  return frozen;
}

std::shared_ptr<const Core::Frozen> Core::freeze() {
  return std::make_shared<const Frozen>(impl_->freeze());
}
Core::Frozen::Frozen(std::unique_ptr<const Impl> state)
    : state_(std::move(state)) {}
Core::Frozen::~Frozen() = default;
void Core::Frozen::save(std::vector<std::byte>* out) const {
  state_->save(out);
}

std::uint64_t Core::image_features(std::span<const std::byte> image) {
  switch (Reader(image).u64()) {
    case kMagic:
      return kFeatureClock | kFeatureSessions | kFeatureConcurrencyKeys;
    case kMagicKeys:
      return kFeatureConcurrencyKeys;
    default:
      return 0;
  }
}

Result<void> Core::Impl::load(std::span<const std::byte> bytes) {
  CHECK(applied == 0 && jobs.used() == 0 && lines.empty());
  return Loader(this, bytes).load();
}

}  // namespace machina
