#include "server/api/pools.h"

#include <algorithm>

#include "queue/base/logger.h"

namespace machina {

// --- The body of a sync ----------------------------------------------------

namespace {

// False where it is not what a pool writes (workers/worker/sandbox_counts.h).
bool read_counts(const JsonValue& json, PoolCounts* counts) {
  auto number = [](const JsonValue& v, std::uint64_t* out) {
    auto n = v.is_number() ? v.as_integer() : std::nullopt;
    if (!n || *n < 0) return false;
    *out = static_cast<std::uint64_t>(*n);
    return true;
  };
  if (!json.is_object()) return false;
  for (JsonValue m = json.first(); m; m = m.next()) {
    bool good = false;
    if (m.key() == "starts" && m.is_array() && m.size() == kBuckets + 1) {
      std::size_t at = 0;
      good = true;
      for (JsonValue v = m.first(); v; v = v.next()) {
        good = number(v, &counts->starts[at++]) && good;
      }
    } else if (m.key() == "starts_us") {
      good = number(m, &counts->starts_us);
    } else if (m.key() == "log_dropped") {
      good = number(m, &counts->log_dropped);
    } else if (m.key() == "denied" && m.is_object() && m.size() <= kDeniedMax) {
      good = true;
      for (JsonValue v = m.first(); v; v = v.next()) {
        good = valid_name(v.key()) &&
               number(v, &counts->denied[std::string(v.key())]) && good;
      }
    }
    if (!good) return false;
  }
  return true;
}

MaybeProblem read_pool_counts(const JsonValue& json, PoolReport* pool) {
  pool->counts.emplace();
  if (read_counts(json, &*pool->counts)) return std::nullopt;
  return bad_field("counts", "starts has " + std::to_string(kBuckets + 1) +
                                 " counts, denied at most " +
                                 std::to_string(kDeniedMax) + " names");
}

MaybeProblem read_trouble(const JsonValue& json, PoolTrouble* trouble) {
  if (!json.is_object()) return bad_field("trouble", "an object is needed");
  MaybeProblem p;
  for (JsonValue f = json.first(); f && !p; f = f.next()) {
    std::string* into = f.key() == "reason"   ? &trouble->reason
                        : f.key() == "remedy" ? &trouble->remedy
                                              : nullptr;
    p = into == nullptr ? unknown_field(f.key())
                        : read_string(f, f.key(), kTroubleBytesMax, into);
  }
  return p;
}

MaybeProblem read_worker(const JsonValue& json, PoolReport* pool) {
  if (!json.is_object() || json.raw().size() > kFactsBytesMax) {
    return bad_field("workers", "each is an object of at most " +
                                    std::to_string(kFactsBytesMax) + " bytes");
  }
  PoolReport::Worker worker;
  for (JsonValue f = json.first(); f; f = f.next()) {
    if ((f.key() == "worker" || f.key() == "name") && f.is_string()) {
      worker.name = f.as_string();
    } else if ((f.key() == "isolation_level" || f.key() == "level") &&
               f.is_string()) {
      if (auto level = parse_level(f.as_string())) worker.level = *level;
    } else if (f.key() == "state" && f.is_string()) {
      worker.state = f.as_string();
      continue;
    } else if (f.key() == "job" && f.is_string()) {
      worker.job = f.as_string();
      continue;
    } else if (f.key() == "pool" || f.key() == "host" || f.key() == "seen_at") {
      return bad_field("workers",
                       std::string(f.key()) + " is the server's to say");
    }
    JsonWriter(worker.facts).key_escaped(f.key()).raw(f.raw());
    worker.facts += ',';
  }
  if (!worker.name.empty()) pool->listed.insert(worker.name);
  pool->workers.push_back(std::move(worker));
  return std::nullopt;
}

// `read` is called with each element, of which there are at most `max`.
template <class Read>
MaybeProblem read_each(const JsonValue& json, std::size_t max,
                       const Read& read) {
  if (!json.is_array()) return bad_field(json.key(), "an array is needed");
  std::size_t count = 0;
  for (JsonValue v = json.first(); v; v = v.next()) {
    if (++count > max) {
      return bad_field(json.key(), "more than " + std::to_string(max));
    }
    if (MaybeProblem p = read(v)) return p;
  }
  return std::nullopt;
}

// More may be gone than can run: those replaced since the last sync.
MaybeProblem read_names(const JsonValue& json,
                        std::vector<std::string>* names) {
  return read_each(json, kGoneNamesMax, [&](const JsonValue& v) {
    return read_string(v, json.key(), kWorkerBytesMax, &names->emplace_back());
  });
}

MaybeProblem read_member(const JsonValue& m, PoolSync* sync) {
  PoolReport& said = sync->report;
  if (m.key() == "host") return read_string(m, "host", 256, &said.host);
  if (m.key() == "wait_ms") {
    return read_integer(m, "wait_ms", 0, kWaitMsMax, &sync->wait_ms);
  }
  if (m.key() == "session") return read_session(m, &said.session);
  if (m.key() == "counts") return read_pool_counts(m, &said);
  if (m.key() == "trouble") return read_trouble(m, &said.trouble);
  if (m.key() == "gone") return read_names(m, &sync->gone);
  if (m.key() == "ended") return read_names(m, &sync->ended);
  if (m.key() == "workers") {
    return read_each(m, kWorkersMax,
                     [&](const JsonValue& v) { return read_worker(v, &said); });
  }
  return unknown_field(m.key());
}

}  // namespace

MaybeProblem read_sync(const JsonValue& json, PoolSync* sync) {
  for (JsonValue m = json.first(); m; m = m.next()) {
    if (MaybeProblem p = read_member(m, sync)) return p;
  }
  return std::nullopt;
}

// --- What they report ------------------------------------------------------

namespace {

bool called_after(const std::string& worker, const std::string& pool) {
  return worker.starts_with(pool + "-");
}

}  // namespace

Pools::Pools(const ServerOptions& options, Clock& clock)
    : options_(options),
      clock_(clock),
      target_(options.workers),
      scaled_mono_(clock.mono_ms()) {}

bool Pools::has_room_for(const std::string& id) const {
  return pools_.contains(id) || pools_.size() < kPoolsMax;
}

// A name is the pool's that was the first to list it.
void Pools::claim_names(const std::string& id, PoolReport* said) const {
  for (const auto& [other, theirs] : pools_) {
    if (other == id) continue;
    std::erase_if(said->listed, [&](const std::string& name) {
      return theirs.listed.contains(name) || called_after(name, other);
    });
  }
  const auto known = pools_.find(id);
  if (known == pools_.end()) return;
  const auto& before = known->second.listed;
  if (before.size() <= kListedMax) {
    said->listed.insert(before.begin(), before.end());
  }
}

// Which leases end. A pool that shows the session that its workers lease with
// ends just those. One that shows none (of a version before sessions) may speak
// of workers that it was the first to list, or that are called after it.
GoneCommand Pools::gone_of(const std::string& id, const PoolReport& said,
                           std::vector<std::string> gone, Tokens& tokens) {
  GoneCommand command;
  for (std::string& name : gone) {
    Session session = 0;
    if (!said.session.empty()) {
      session = tokens.session(name, said.session, true);
    } else if (!said.listed.contains(name) && !called_after(name, id)) {
      LogLine(Severity::warn, "gone_ignored",
              "a pool says that a worker is gone which is not its own")
          .with("pool", id)
          .with("worker", name);
      continue;
    }
    command.workers.push_back(std::move(name));
    command.sessions.push_back(session);
  }
  return command;
}

Pools::Heard Pools::hear(const std::string& id, PoolSync sync, Tokens& tokens) {
  PoolReport& said = sync.report;
  claim_names(id, &said);
  Heard heard;
  for (auto* names : {&sync.gone, &sync.ended}) {
    GoneCommand command = gone_of(id, said, std::move(*names), tokens);
    command.ended = names == &sync.ended;
    if (gone_sessions_.size() > kGoneSessionsMax) gone_sessions_.clear();
    gone_sessions_.insert(command.sessions.begin(), command.sessions.end());
    if (!command.workers.empty()) heard.ends.push_back(std::move(command));
  }
  said.seen_mono = clock_.mono_ms();
  said.seen_wall = clock_.wall_ms();
  own_trouble_ = {};
  PoolReport& pool = pools_[id];
  heard.left_behind = pool.parked;
  pool = std::move(said);
  return heard;
}

bool Pools::heard() const {
  const Millis now = clock_.mono_ms();
  return std::any_of(pools_.begin(), pools_.end(), [&](const auto& pool) {
    return now - pool.second.seen_mono < kPoolSilentMs;
  });
}

// --- Syncs that wait -------------------------------------------------------

// What a connection was told before need not be told again; a new one may be
// there because the last answer was lost.
bool Pools::park(const std::string& id, const Where& where, Millis wait_ms,
                 PoolTold* told) {
  const bool news =
      told->pool != id || told->target != target_ || told->drain != told_drain_;
  told->pool = id;
  const auto pool = pools_.find(id);
  if (news || wait_ms == 0 || draining_ || pool == pools_.end()) return false;
  pool->second.parked = where;
  pool->second.answer_at = pool->second.seen_mono + wait_ms;
  return true;
}

std::string Pools::answer(PoolTold* told) const {
  told->target = target_;
  told->drain = told_drain_;
  return "{\"target\":" + std::to_string(target_) +
         ",\"drain\":" + (told_drain_ ? "true" : "false") + "}";
}

void Pools::answer_due(bool all, const Answer& answer) {
  const Millis now = clock_.mono_ms();
  for (auto it = pools_.begin(); it != pools_.end();) {
    PoolReport& pool = it->second;
    if (pool.parked.peer != 0 && (all || now >= pool.answer_at) &&
        answer(std::exchange(pool.parked, {}))) {
      pool.seen_mono = now;
    }
    const bool silent = now - pool.seen_mono > kPoolSilentMs;
    it = silent ? pools_.erase(it) : std::next(it);
  }
}

std::vector<Where> Pools::take_parked(std::uint64_t peer) {
  std::vector<Where> taken;
  for (auto& [_, pool] : pools_) {
    if (pool.parked.peer != peer) continue;
    taken.push_back(std::exchange(pool.parked, {}));
  }
  return taken;
}

// --- How many there are to be ----------------------------------------------

void Pools::scale(int target) {
  if (target > target_) scaled_mono_ = clock_.mono_ms();
  target_ = target;
}

bool Pools::comes(const std::string& kind) const {
  return target_ > 0 && options_.kinds.contains(kind) &&
         (!options_.pool_argv.empty() || heard()) &&
         clock_.mono_ms() - scaled_mono_ < kPoolComesMs;
}

void Pools::drain(bool tell) {
  draining_ = true;
  told_drain_ = tell;
}

// --- What their workers' canaries found ------------------------------------

bool Pools::too_weak() {
  if (level_passed_ && warned_level_) return false;
  int reported = 0, best = -1;
  for (const auto& [_, pool] : pools_) {
    for (const PoolReport::Worker& worker : pool.workers) {
      if (worker.level < 0) continue;
      ++reported;
      best = std::max(best, worker.level);
    }
  }
  if (reported == 0) return false;
  if (best >= options_.min_level) level_passed_ = true;
  if (!options_.prod) {
    if (best < 2 && !warned_level_) {
      LogLine(Severity::warn, "isolation_low",
              "the sandbox reaches only " +
                  level_name(static_cast<Level>(best)) +
                  " here; run `machina doctor` to see why");
    }
    warned_level_ = true;
    return false;
  }
  if (level_passed_ || draining_ || target_ == 0 || reported < target_) {
    return false;
  }
  LogLine(Severity::error, "isolation_low",
          "no worker reaches isolation level " +
              level_name(options_.min_level) + " (the best is " +
              level_name(static_cast<Level>(best)) +
              "); run `machina doctor`, or set MACHINA_SANDBOX_MIN_LEVEL");
  return true;
}

const PoolTrouble* Pools::trouble() const {
  const PoolTrouble* why =
      own_trouble_.reason.empty() ? nullptr : &own_trouble_;
  for (const auto& [_, pool] : pools_) {
    for (const PoolReport::Worker& worker : pool.workers) {
      if (worker.level >= 0) return nullptr;
    }
    if (!pool.trouble.reason.empty()) why = &pool.trouble;
  }
  return why;
}

std::string_view Pools::waiting_reason(const JobView& job) const {
  if (job.state != State::ready) return {};
  if (options_.kinds.find(job.kind) == options_.kinds.end()) return {};
  const PoolTrouble* why = trouble();
  return why == nullptr ? std::string_view() : std::string_view(why->reason);
}

// --- Who runs what ---------------------------------------------------------

void Pools::worker_got(const LeaseView& lease) {
  // Workers that belong to no pool have names of their own choosing.
  if (granted_.size() >= kGrantedMax) granted_.clear();
  granted_[lease.job.worker] = lease.job.id;
}

std::string Pools::job_of(const PoolReport::Worker& worker) const {
  const auto granted = granted_.find(worker.name);
  if (granted != granted_.end()) return to_string(granted->second);
  return worker.state == "busy" ? worker.job : "";
}

WorkerNumbers Pools::numbers() const {
  WorkerNumbers numbers;
  numbers.configured = target_;
  for (const auto& [_, pool] : pools_) {
    for (const PoolReport::Worker& worker : pool.workers) {
      ++numbers.reported;
      if (worker.state == "busy" || !job_of(worker).empty()) ++numbers.busy;
      if (worker.level >= 0 &&
          (numbers.level < 0 || worker.level < numbers.level)) {
        numbers.level = worker.level;
      }
    }
  }
  return numbers;
}

}  // namespace machina
