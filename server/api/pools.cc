// Pools of workers: what they report, how they are scaled, and how one is
// started where none is there.

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>

#include "server/api/service.h"

namespace machina {
namespace {

constexpr int kPoolLocked = 75;
constexpr std::size_t kGrantedMax = 4096;
// It cannot serve here, and has said why in <root>/pool.trouble.
constexpr int kPoolUnusable = 69;
constexpr int kUnusableTries = 3;
constexpr Millis kUnusableRetryMs = 60'000;
constexpr std::size_t kTroubleBytesMax = 4096;  // of reason and remedy, each
constexpr Millis kBackoffMinMs = 250, kBackoffMaxMs = 30'000;
constexpr Millis kLockedRetryMs = 5'000, kRanWellMs = 10'000;

// False where `path` is locked by another process: a pool is there.
bool lock_is_free(const std::string& path) {
  int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return true;
  bool is_free = flock(fd, LOCK_EX | LOCK_NB) == 0;
  close(fd);  // lets go of it
  return is_free;
}

void append_trouble(JsonWriter& json, const PoolTrouble* why) {
  if (why == nullptr) return void(json.null());
  json.begin_object();
  json.key("reason").string(why->reason);
  json.key("remedy").string(why->remedy);
  json.end_object();
}

}  // namespace

// --- What pools say --------------------------------------------------------

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

}  // namespace

bool Service::read_sync(const Exchange& call, const JsonValue& json, Pool* pool,
                        std::vector<std::string>* gone,
                        std::vector<std::string>* ended, Millis* wait_ms) {
  auto fail = [&](const Problem& p) {
    refuse(call.peer, call.sequence, p);
    return false;
  };
  for (JsonValue m = json.first(); m; m = m.next()) {
    MaybeProblem p;
    if (m.key() == "host") {
      p = read_string(m, "host", 256, &pool->host);
    } else if (m.key() == "wait_ms") {
      p = read_integer(m, "wait_ms", 0, kWaitMsMax, wait_ms);
    } else if (m.key() == "session") {
      p = read_session(m, &pool->session);
    } else if (m.key() == "counts") {
      pool->counts.emplace();
      if (!read_counts(m, &*pool->counts)) {
        return fail(
            bad_field("counts", "starts has " + std::to_string(kBuckets + 1) +
                                    " counts, denied at most " +
                                    std::to_string(kDeniedMax) + " names"));
      }
    } else if (m.key() == "trouble") {
      if (!m.is_object()) {
        return fail(bad_field("trouble", "an object is needed"));
      }
      for (JsonValue f = m.first(); f && !p; f = f.next()) {
        std::string* into = f.key() == "reason"   ? &pool->trouble.reason
                            : f.key() == "remedy" ? &pool->trouble.remedy
                                                  : nullptr;
        p = into == nullptr ? unknown_field(f.key())
                            : read_string(f, f.key(), kTroubleBytesMax, into);
      }
    } else if (m.key() == "workers" || m.key() == "gone" ||
               m.key() == "ended") {
      if (!m.is_array()) {
        return fail(bad_field(m.key(), "an array is needed"));
      }
      std::size_t count = 0;
      for (JsonValue v = m.first(); v; v = v.next()) {
        // More may be gone than can run: those replaced since the last sync.
        std::size_t max = m.key() == "workers" ? kWorkersMax : 1024;
        if (++count > max) {
          return fail(bad_field(m.key(), "more than " + std::to_string(max)));
        }
        if (m.key() != "workers") {
          auto* names = m.key() == "gone" ? gone : ended;
          p = read_string(v, m.key(), kWorkerBytesMax, &names->emplace_back());
          if (p) return fail(*p);
          continue;
        }
        if (!v.is_object() || v.raw().size() > kFactsBytesMax) {
          return fail(bad_field("workers", "each is an object of at most " +
                                               std::to_string(kFactsBytesMax) +
                                               " bytes"));
        }
        Pool::Worker worker;
        for (JsonValue f = v.first(); f; f = f.next()) {
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
          } else if (f.key() == "pool" || f.key() == "host" ||
                     f.key() == "seen_at") {
            return fail(bad_field(
                "workers", std::string(f.key()) + " is the server's to say"));
          }
          JsonWriter(worker.facts).key_escaped(f.key()).raw(f.raw());
          worker.facts += ',';
        }
        if (!worker.name.empty()) pool->listed.insert(worker.name);
        pool->workers.push_back(std::move(worker));
      }
    } else {
      p = unknown_field(m.key());
    }
    if (p) return fail(*p);
  }
  return true;
}

namespace {

bool called_after(const std::string& worker, const std::string& pool) {
  return worker.starts_with(pool + "-");
}

}  // namespace

// Which leases end. A pool that shows the session that its workers lease with
// ends just those. One that shows none (of a version before sessions) may speak
// of workers that it was the first to list, or that are called after it.
GoneCommand Service::gone_of(const std::string& id, const Pool& said,
                             std::vector<std::string> gone) const {
  GoneCommand command;
  for (std::string& name : gone) {
    Session session = 0;
    if (!said.session.empty()) {
      session = tokens_->session(name, said.session, true);
    } else {
      if (!said.listed.contains(name) && !called_after(name, id)) {
        Saying(Severity::warn, "gone_ignored",
               "a pool says that a worker is gone which is not its own")
            .with("pool", id)
            .with("worker", name);
        continue;
      }
    }
    command.workers.push_back(std::move(name));
    command.sessions.push_back(session);
  }
  return command;
}

// The leases of workers that are no more end, or go back where they were
// `ended`; `then` is called when that is durable, or refused.
void Service::report_gone(GoneCommand command,
                          std::function<void(Response)> then) {
  for (const std::string& worker : command.workers)
    served_.worker_ended(worker);
  Request request;
  request.what.emplace<Command>(std::move(command));
  ask(std::move(request), std::move(then));
}

static void post_sync(Service& s, const Exchange& call) {
  // What a pool says of its workers is believed: that they are dead, how
  // strong their sandboxes are. So it must come from this host's own user.
  if (!call.peer.local) {
    return s.refuse(call.peer, call.sequence,
                    not_implemented("",
                                    "pools over TCP: a pool reports over "
                                    "the server's Unix socket"));
  }
  if (!valid_name(call.args[0]) || call.args[0].size() > kWorkerBytesMax) {
    Problem p;
    p.status = 404;
    p.code = "not-found";
    p.detail = "pool: " + shown(call.args[0]) + " is no pool's id";
    return s.refuse(call.peer, call.sequence, p);
  }
  JsonValue json;
  if (!s.parse_body(call, true, &json)) return;
  Service::Pool said;
  std::vector<std::string> gone, ended;
  Millis wait_ms = 0;
  if (!s.read_sync(call, json, &said, &gone, &ended, &wait_ms)) return;
  std::string id(call.args[0]);
  if (s.pools_.count(id) == 0 && s.pools_.size() >= kPoolsMax) {
    return s.refuse(
        call.peer, call.sequence,
        bad_field("pool", "more than " + std::to_string(kPoolsMax) + " pools"));
  }
  for (const auto& [other, theirs] : s.pools_) {
    if (other == id) continue;
    std::erase_if(said.listed, [&](const std::string& name) {
      return theirs.listed.contains(name) || called_after(name, other);
    });
  }
  if (auto known = s.pools_.find(id); known != s.pools_.end()) {
    auto& listed = known->second.listed;
    if (listed.size() <= kListedMax) said.listed.merge(listed);
  }
  std::vector<GoneCommand> reports;
  for (auto* names : {&gone, &ended}) {
    GoneCommand command = s.gone_of(id, said, std::move(*names));
    command.ended = names == &ended;
    if (s.gone_sessions_.size() > kGoneSessionsMax) s.gone_sessions_.clear();
    s.gone_sessions_.insert(command.sessions.begin(), command.sessions.end());
    if (!command.workers.empty()) reports.push_back(std::move(command));
  }
  Service::Pool& pool = s.pools_[id];
  // A pool has one open sync: an older one was left behind.
  Where old = pool.parked;
  said.seen_mono = s.clock_.mono_ms();
  said.seen_wall = s.clock_.wall_ms();
  if (said.counts) s.metrics_.pool_counts(id, *said.counts);
  s.pool_trouble_ = {};
  s.pool_unusable_times_ = 0;
  pool = std::move(said);
  if (Peer* p = s.peer(old.peer)) s.answer_sync(*p, old.sequence);

  s.check_levels();
  if (reports.empty())
    return s.park_sync(call.peer, call.sequence, id, wait_ms);
  // A pool forgets what it was answered 200 to: nothing that the log did not
  // take may be.
  struct Reported {
    std::size_t open;
    MaybeProblem refused;
  };
  auto reported = std::make_shared<Reported>(Reported{reports.size(), {}});
  const Where where{call.peer.id, call.sequence};
  for (GoneCommand& report : reports) {
    s.report_gone(std::move(report), [=, &s](const Response& response) {
      if (auto p = s.failure_of(response)) reported->refused = std::move(p);
      if (--reported->open > 0) return;
      if (reported->refused) return s.refuse(where, *reported->refused);
      if (Peer* p = s.peer(where.peer)) {
        s.park_sync(*p, where.sequence, id, wait_ms);
      }
    });
  }
}

// What it reported is durable: it is answered, or waits for news.
void Service::park_sync(Peer& peer, std::uint64_t sequence,
                        const std::string& id, Millis wait_ms) {
  // What this connection was told before need not be told again; a new one may
  // be there because the last answer was lost.
  bool news = peer.told_pool != id || peer.told_target != target_ ||
              peer.told_drain != (draining_ && !handover_);
  peer.told_pool = id;
  auto pool = pools_.find(id);
  if (news || wait_ms == 0 || draining_ || peer.hung_up ||
      pool == pools_.end()) {
    return answer_sync(peer, sequence);
  }
  pool->second.parked = {peer.id, sequence};
  pool->second.answer_at = pool->second.seen_mono + wait_ms;
}

void Service::answer_sync(Peer& peer, std::uint64_t sequence) {
  bool drain = draining_ && !handover_;
  peer.told_target = target_;
  peer.told_drain = drain;
  reply(peer, sequence, 200,
        "{\"target\":" + std::to_string(target_) +
            ",\"drain\":" + (drain ? "true" : "false") + "}");
}

// Answers the waiting syncs: all, or those whose time has come.
void Service::answer_parked(bool all) {
  Millis now = clock_.mono_ms();
  for (auto it = pools_.begin(); it != pools_.end();) {
    Pool& pool = it->second;
    Peer* p = peer(pool.parked.peer);
    if (p != nullptr && (all || now >= pool.answer_at)) {
      Where where = pool.parked;
      pool.parked = {};
      pool.seen_mono = now;
      answer_sync(*p, where.sequence);
      after(*p);
    }
    bool silent = now - pool.seen_mono > kPoolSilentMs;
    it = silent ? pools_.erase(it) : std::next(it);
  }
}

void Service::answer_parked(Peer& peer) {
  for (auto& [_, pool] : pools_) {
    if (pool.parked.peer != peer.id) continue;
    const Where where = std::exchange(pool.parked, {});
    answer_sync(peer, where.sequence);
  }
}

// --- What is shown of them -------------------------------------------------

void Service::worker_asks(const std::string& worker) { granted_.erase(worker); }

void Service::worker_got(const LeaseView& lease) {
  // Workers that belong to no pool have names of their own choosing.
  if (granted_.size() >= kGrantedMax) granted_.clear();
  granted_[lease.job.worker] = lease.job.id;
}

std::string Service::job_of(const Pool::Worker& worker) const {
  const auto granted = granted_.find(worker.name);
  if (granted != granted_.end()) return to_string(granted->second);
  return worker.state == "busy" ? worker.job : "";
}

WorkerNumbers Service::worker_numbers() const {
  WorkerNumbers numbers;
  numbers.configured = target_;
  for (const auto& [_, pool] : pools_) {
    for (const Pool::Worker& worker : pool.workers) {
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

const PoolTrouble* Service::trouble() const {
  const PoolTrouble* why =
      pool_trouble_.reason.empty() ? nullptr : &pool_trouble_;
  for (const auto& [_, pool] : pools_) {
    for (const Pool::Worker& worker : pool.workers) {
      if (worker.level >= 0) return nullptr;
    }
    if (!pool.trouble.reason.empty()) why = &pool.trouble;
  }
  return why;
}

std::string_view Service::waiting_reason(const JobView& job) const {
  if (job.state != State::ready) return {};
  if (options_.kinds.find(job.kind) == options_.kinds.end()) return {};
  const PoolTrouble* why = trouble();
  return why == nullptr ? std::string_view() : std::string_view(why->reason);
}

// Our pool has ended because it cannot serve here.
void Service::pool_unusable() {
  std::ifstream file(options_.root + "/pool.trouble");
  std::string reason, remedy;
  std::getline(file, reason);
  std::getline(file, remedy);
  if (reason.empty()) reason = "the pool cannot serve here; see its log";
  reason.resize(std::min(reason.size(), kTroubleBytesMax));
  remedy.resize(std::min(remedy.size(), kTroubleBytesMax));
  pool_trouble_ = {reason, remedy};
  if (++pool_unusable_times_ < kUnusableTries) return;
  pool_start_at_ = clock_.mono_ms() + kUnusableRetryMs;
  if (pool_unusable_times_ > kUnusableTries) return;
  Saying(Severity::error, "pool_unusable",
         "no job can run here, and the pool is not started again but once a "
         "minute: " +
             reason)
      .with("remedy", remedy);
}

static void get_workers(Service& s, const Exchange& call) {
  WorkerNumbers numbers = s.worker_numbers();
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  json.key("workers").begin_array();
  for (const auto& [id, pool] : s.pools_) {
    for (const Service::Pool::Worker& worker : pool.workers) {
      json.begin_object();
      json.key("pool").string(id);
      json.key("host").string(pool.host);
      json.key("seen_at").time(pool.seen_wall);
      const std::string job = s.job_of(worker);
      std::string state = worker.state;
      // What a pool says of a start may come after the first job's.
      if ((state == "idle" || state == "starting") && !job.empty()) {
        state = "busy";
      }
      if (!state.empty()) json.key("state").string(state);
      if (!job.empty()) json.key("job").string(job);
      std::string_view facts = worker.facts;
      if (!facts.empty()) json.raw(facts.substr(0, facts.size() - 1));
      json.end_object();
    }
  }
  json.end_array();
  json.key("configured").number(numbers.configured);
  json.key("reported").number(numbers.reported);
  json.key("busy").number(numbers.busy);
  json.key("trouble");
  append_trouble(json, s.trouble());
  json.key("pools").begin_array();
  for (const auto& [id, pool] : s.pools_) {
    json.begin_object();
    json.key("pool").string(id);
    json.key("host").string(pool.host);
    json.key("seen_at").time(pool.seen_wall);
    json.key("workers").number(static_cast<std::uint64_t>(pool.workers.size()));
    json.key("trouble");
    append_trouble(json, pool.trouble.reason.empty() ? nullptr : &pool.trouble);
    json.end_object();
  }
  json.end_array().end_object();
  s.reply(call.peer, call.sequence, 200, body);
}

static void put_scale(Service& s, const Exchange& call) {
  JsonValue json;
  if (!s.parse_body(call, true, &json)) return;
  std::int64_t count = -1;
  for (JsonValue m = json.first(); m; m = m.next()) {
    MaybeProblem p;
    if (m.key() == "count") {
      p = read_integer(m, "count", 0, kWorkersMax, &count);
    } else if (m.key() == "min" || m.key() == "max") {
      p = not_implemented(std::string(m.key()),
                          "min and max: this version scales by count only");
    } else {
      p = unknown_field(m.key());
    }
    if (p) return s.refuse(call.peer, call.sequence, *p);
  }
  if (count < 0) {
    return s.refuse(call.peer, call.sequence,
                    bad_field("count", "it is missing"));
  }
  if (count > s.target_) s.scaled_mono_ = s.clock_.mono_ms();
  s.target_ = static_cast<int>(count);
  s.served_.look_again();
  s.reply(call.peer, call.sequence, 200,
          "{\"configured\":" + std::to_string(s.target_) + "}");
  s.pool_start_at_ = 0;
  s.pool_unusable_times_ = 0;
  s.answer_parked(true);
  s.supervise_pool();
}

// --- Starting one ----------------------------------------------------------

bool Service::pool_heard() const {
  Millis now = clock_.mono_ms();
  for (const auto& [_, pool] : pools_) {
    if (now - pool.seen_mono < kPoolSilentMs) return true;
  }
  return false;
}

// Whether the pool that was heard of, started by somebody else, is no more:
// its lock is free, and was at the look before.
bool Service::pool_left() {
  Millis now = clock_.mono_ms();
  if (now - pool_looked_ < kPoolLookMs) return false;
  pool_looked_ = now;
  if (!lock_is_free(options_.root + "/pool.lock")) return false;
  Saying(Severity::info, "pool_left", "the pool has left");
  pools_.clear();
  return true;
}

// Whether a pool is still there. It would wait for a server that does not come
// back, so one that has not heard of the drain in time (it was just starting,
// or between two calls) is told by a signal. To be killed is for those that
// stay even then: a service manager starts again whoever did not end by itself.
bool Service::pool_stays(Millis now) {
  if (!options_.events.end_pool) return pool_running_;
  if (!pool_running_ && lock_is_free(options_.root + "/pool.lock")) {
    return false;
  }
  if (!pool_asked_ && now >= leave_until_ - kPoolLeaveMs + kPoolHearMs) {
    pool_asked_ = true;
    options_.events.end_pool(false);
  }
  return true;
}

void Service::end_pool_left_behind() {
  if (pool_running_) ::kill(pool_pid_, SIGKILL);  // ours, and not reaped
  if (!options_.events.end_pool) return;
  if (lock_is_free(options_.root + "/pool.lock")) return;
  Saying(Severity::warn, "pool_killed",
         "the pool did not leave within " + std::to_string(kPoolLeaveMs) +
             " ms and is killed");
  options_.events.end_pool(true);
}

void Service::supervise_pool() {
  if (draining_ || poisoned_ || pool_running_ || target_ == 0 ||
      options_.pool_argv.empty()) {
    return;
  }
  Millis now = clock_.mono_ms();
  if (now < pool_start_at_ || (pool_heard() && !pool_left())) return;
  // One that outlived the last server has the lock and will call soon.
  if (now - started_mono_ < kPoolGraceMs &&
      !lock_is_free(options_.root + "/pool.lock")) {
    pool_start_at_ = now + 250;
    return;
  }
  Loop::Child child;
  child.argv = options_.pool_argv;
  // As many as there are to be, from the first: none is started for nothing.
  child.argv.insert(child.argv.end(), {"--workers", std::to_string(target_)});
  child.env = options_.pool_env;
  child.output = options_.root + "/logs/pool.log";
  pool_started_ = now;
  auto started = loop_->start(child, [this](int code) {
    pool_running_ = false;
    Millis ended = clock_.mono_ms();
    if (code == kPoolLocked) {
      pool_start_at_ = ended + kLockedRetryMs;
      return;
    }
    if (ended - pool_started_ > kRanWellMs) pool_backoff_ = 0;
    pool_backoff_ = std::clamp(pool_backoff_ * 2, kBackoffMinMs, kBackoffMaxMs);
    pool_start_at_ = ended + pool_backoff_;
    // Whatever it reported is no longer so.
    pools_.clear();
    if (draining_) {
      loop_->wake();
      return;
    }
    if (code == kPoolUnusable) {
      pool_unusable();
      if (pool_unusable_times_ >= kUnusableTries) return;
    } else {
      pool_unusable_times_ = 0;
    }
    Saying(Severity::error, "pool_ended",
           "the pool ended with code " + std::to_string(code) + "; see " +
               options_.root + "/pool.log; starting another in " +
               std::to_string(pool_backoff_) + " ms")
        .with("code", code);
  });
  if (!started) {
    pool_backoff_ = std::clamp(pool_backoff_ * 2, kBackoffMinMs, kBackoffMaxMs);
    pool_start_at_ = now + pool_backoff_;
    Saying(Severity::error, "pool_not_started", started.error().what);
    return;
  }
  pool_pid_ = *started;
  pool_running_ = true;
}

// What the workers' canaries found, against what is required.
void Service::check_levels() {
  if (level_passed_ && warned_level_) return;
  int reported = 0, best = -1;
  for (const auto& [_, pool] : pools_) {
    for (const Pool::Worker& worker : pool.workers) {
      if (worker.level < 0) continue;
      ++reported;
      best = std::max(best, worker.level);
    }
  }
  if (reported == 0) return;
  if (best >= options_.min_level) level_passed_ = true;
  if (!options_.prod) {
    if (best < 2 && !warned_level_) {
      Saying(Severity::warn, "isolation_low",
             "the sandbox reaches only " +
                 level_name(static_cast<Level>(best)) +
                 " here; run `machina doctor` to see why");
    }
    warned_level_ = true;
    return;
  }
  if (level_passed_ || draining_ || target_ == 0 || reported < target_) return;
  Saying(Severity::error, "isolation_low",
         "no worker reaches isolation level " + level_name(options_.min_level) +
             " (the best is " + level_name(static_cast<Level>(best)) +
             "); run `machina doctor`, or set MACHINA_SANDBOX_MIN_LEVEL");
  exit_code_ = 2;
  begin_drain(false);
}

std::span<const Route> pool_routes() {
  static constexpr Route kRows[] = {
      {Method::post, "/v1/pools/{}/sync", post_sync, Route::worker},
      {Method::get, "/v1/workers", get_workers, Route::operate, 0, kPageWeight},
      {Method::put, "/v1/workers/scale", put_scale, Route::operate},
  };
  return kRows;
}

}  // namespace machina
