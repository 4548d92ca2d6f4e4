#include "workers/worker/worker.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <mutex>
#include <thread>

#include "queue/base/json.h"
#include "queue/base/logger.h"
#include "queue/base/utf8.h"
#include "workers/kinds/run.h"
#include "workers/worker/heartbeat.h"
#include "workers/worker/http_client.h"
#include "workers/worker/job_log.h"
#include "workers/worker/protocol.h"
#include "workers/worker/retry.h"
#include "workers/worker/sandbox_counts.h"
#include "workers/worker/warmed.h"

namespace machina {
namespace {

using kinds::End;
using std::chrono::milliseconds;
using Steady = std::chrono::steady_clock;

constexpr Millis kParkMs = 10'000;  // a lease call that finds nothing
constexpr Millis kRefusedMinMs = 20, kRefusedMaxMs = 1000;
constexpr Millis kWarmedRunMs = 50;  // then other kinds get a look-in
constexpr Millis kLogPatienceMs = 5000;
constexpr std::size_t kCompletionBytesMax = 1u
                                            << 20;  // of several ends' results
constexpr Millis kCutOffMs = 300'000;
constexpr int kWarmedLinesPerSecond = 20;

KindSettings settings_of(const WorkerOptions& options) {
  KindSettings settings;
  settings.prod = options.prod;
  settings.repo_roots = options.repo_roots;
  settings.shell_allowed_exe = options.shell_allowed_exe;
  settings.shell_timeout_ms = options.shell_timeout_ms;
  settings.shell_stdout_max = options.shell_stdout_max;
  settings.shell_stderr_max = options.shell_stderr_max;
  return settings;
}

bool refused(int status) {
  return status / 100 == 4 && status != 408 && status != 429;
}

// The pause between two tries of one call. A server that says "not now" is left
// in peace for ever longer; one that is away may be back at any moment.
class Rest {
 public:
  void after(const Result<HttpClient::Reply>& reply) {
    if (reply) away_.reset();
    std::this_thread::sleep_for(
        milliseconds(reply ? refused_.next() : away_.next()));
  }

 private:
  Retry away_;
  Retry refused_{kRefusedMinMs, kRefusedMaxMs};
};

}  // namespace

class Worker::Impl : public kinds::Host {
 public:
  Impl(const WorkerOptions& options, sandbox::Slot& slot,
       sandbox::Report report)
      : options_(options),
        slot_(slot),
        report_(std::move(report)),
        settings_(settings_of(options)),
        kinds_(kinds_of(options.families, settings_)),
        client_(connect()),
        heartbeat_(connect(), [this](const auto& id) { tell_busy(id); }),
        log_(connect()),
        warmed_(slot_, kinds_, report_.level, options.min_level, heartbeat_) {
    for (const auto& [name, kind] : kinds_) {
      const bool wanted =
          options.kinds.empty() ||
          std::any_of(options.kinds.begin(), options.kinds.end(),
                      [&](const auto& p) { return kind_matches(p, name); });
      if (!wanted) continue;
      leased_.push_back(name);
      if (kind.warmed()) group_kinds_[kind.group].push_back(name);
    }
    for (Level level = 0; level <= kLevelMax; ++level) {
      isolation_[level] = sandbox::isolation_json(report_, level);
    }
  }

  void run() {
    tell("{\"state\":\"idle\",\"isolation\":" + isolation_[report_.level] +
         "}");
    std::vector<Lease> leases;
    while (!stopping_) {
      if (leases.empty()) leases = lease(leased_, 1, kParkMs);
      if (leases.empty()) continue;
      const auto kind = kinds_.find(leases.front().kind);
      if (kind != kinds_.end() && kind->second.warmed()) {
        leases = run_warmed(kind->second.group, std::move(leases));
      } else {
        leases = run_sandboxed(leases.front());
      }
      tell_counts();
    }
    give_back(leases);
    forget_stray_grants();
    warmed_.close();
  }

  void stop() {
    std::lock_guard lock(park_mutex_);
    stopping_ = true;
    if (parked_) client_.interrupt();
  }

  void release_now() {
    releasing_ = true;
    stop();
    heartbeat_.release_all();
  }

  // --- kinds::Host ---

  Result<std::unique_ptr<sandbox::Session>> open(
      const sandbox::SessionSpec& spec) override {
    return slot_.open(spec);
  }

  sandbox::Watch watch() override {
    sandbox::Watch watch;
    watch.cancel = heartbeat_.alarm();
    watch.wake_fd = heartbeat_.wake_fd();
    watch.on_output = [this](int, std::span<const std::byte> bytes) {
      log_.append({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    };
    return watch;
  }

  bool cancelled() const override { return *heartbeat_.alarm(); }

  void progress(int percent, const std::string& message) override {
    heartbeat_.progress(current_, percent, message);
  }

  void log(std::string_view bytes) override { log_.append(bytes); }

  Result<void> artifact(const std::string& name,
                        std::string_view bytes) override {
    const std::string path = "/v1/leases/" + current_ + "/artifacts/" + name;
    for (Rest rest; !cancelled();) {
      const auto reply =
          client_.send("PUT", path, bytes, "application/octet-stream", 30'000);
      if (reply && reply->status / 100 == 2) return {};
      if (reply && refused(reply->status)) {
        return Error{Code::invalid, name + ": the server answered " +
                                        std::to_string(reply->status)};
      }
      rest.after(reply);
    }
    return Error{Code::unavailable, "cancelled"};
  }

  Result<std::string> fetch_patch(const std::string& patch_id,
                                  bool reverse_diff) override {
    const auto reply =
        get("/v1/patches/" + patch_id + (reverse_diff ? "/reverse_diff" : ""));
    if (!reply) return reply.error();
    if (reply->status == 200) return reply->body;
    return Error{Code::not_found,
                 "patch " + patch_id +
                     (reverse_diff ? " has no reverse diff" : " is not known")};
  }

  Result<std::string> fetch_artifact(const std::string& job_id,
                                     const std::string& name,
                                     std::size_t bytes_max) override {
    std::string there;  // what it has, for who misspelt
    const auto missing = [&] {
      return Error{Code::not_found, "job " + job_id + " has no artifact \"" +
                                        name + "\"; it has " +
                                        (there.empty() ? "none" : there)};
    };
    const std::string job = "/v1/jobs/" + job_id;
    const auto head = get(job);
    if (!head) return head.error();
    std::string tenant;
    json::members(head->body, [&](auto key, auto value) {
      if (key == "tenant") tenant = json::string(value).value_or("");
      return true;
    });
    // Another tenant's job is no more to be seen than one that is not there.
    if (head->status != 200 || tenant != tenant_) {
      return Error{Code::not_found,
                   "there is no job " + job_id +
                       " of this tenant, or its retention has passed and its "
                       "artifacts went with it"};
    }
    const auto listed = get(job + "/artifacts");
    if (!listed) return listed.error();
    std::int64_t size = -1;
    json::members(listed->body, [&](auto key, auto list) {
      if (key != "artifacts") return true;
      return json::elements(list, [&](auto item) {
        std::string its_name;
        std::int64_t its_size = 0;
        json::members(item, [&](auto k, auto value) {
          if (k == "name") its_name = json::string(value).value_or("");
          if (k == "size_bytes") its_size = json::integer(value).value_or(0);
          return true;
        });
        if (its_name == name) size = its_size;
        if (there.size() < 500) there += (there.empty() ? "" : ", ") + its_name;
        return true;
      });
    });
    if (size < 0) return missing();
    if (static_cast<std::uint64_t>(size) > bytes_max) {
      return Error{Code::too_large, std::to_string(size) + " bytes; at most " +
                                        std::to_string(bytes_max)};
    }
    auto bytes = get(job + "/artifacts/" + name);
    if (!bytes) return bytes.error();
    if (bytes->status != 200) return missing();
    if (bytes->body.size() > bytes_max) {
      return Error{Code::too_large,
                   "more than " + std::to_string(bytes_max) + " bytes"};
    }
    return std::move(bytes->body);
  }

  const KindSettings& settings() const override { return settings_; }

 private:
  HttpClient::Connect connect() {
    return [this] { return slot_.connect_server(); };
  }

  // Asks until there is an answer that is not the server's trouble.
  Result<HttpClient::Reply> get(const std::string& path) {
    for (Rest rest; !cancelled();) {
      auto reply = client_.send("GET", path, "", "application/json", 30'000);
      if (reply && (reply->status / 100 == 2 || refused(reply->status))) {
        return reply;
      }
      rest.after(reply);
    }
    return Error{Code::unavailable, "cancelled"};
  }

  // About one attempt; the rest of the line is its caller's.
  static LogLine& about(LogLine& line, const Lease& lease) {
    return line.with("request_id", lease.request_id)
        .with("job", lease.job_id)
        .with("attempt", lease.attempt)
        .with("kind", lease.kind);
  }

  void say_begun(const Lease& lease) const {
    LogLine line(Severity::info, "attempt_started", "an attempt starts");
    about(line, lease);
  }

  // `rate`: warmed attempts come by the thousand.
  void say_ended(const Lease& lease, const End& end, Allowance* rate) {
    const bool broken = end.code == EndCode::sandbox ||
                        end.code == EndCode::isolation_unavailable;
    const Severity severity = broken ? Severity::warn : Severity::info;
    if (!logs_at(severity)) return;
    if (rate != nullptr && !broken) {
      const auto now = std::chrono::duration_cast<milliseconds>(
          Steady::now().time_since_epoch());
      if (!rate->take(now.count())) return;
    }
    // What a job printed is its own: the message only where we made it.
    LogLine line(severity, "attempt_ended", broken ? end.message : "it ended");
    about(line, lease)
        .with("code", end.code == EndCode::none ? "ok" : name(end.code))
        .with("duration_ms", end.usage.wall_ms);
    if (rate == nullptr) return;
    if (const auto n = rate->suppressed(); n > 0) {
      line.with("suppressed", static_cast<std::int64_t>(n));
    }
  }

  // --- facts for the pool ---

  // False: there is no room in the pipe.
  bool tell(const std::string& json_line) const {
    if (options_.facts_fd < 0) return false;
    const std::string line = json_line + "\n";
    return ::write(options_.facts_fd, line.data(), line.size()) > 0;
  }

  void tell_counts() {
    if (options_.facts_fd < 0) return;
    SandboxCounts counts = slot_.take();
    const std::uint64_t dropped = log_lines_dropped();
    counts.log_dropped = dropped - dropped_told_;
    if (counts.empty()) return;
    if (tell("{\"counts\":" + counts.json() + "}")) {
      dropped_told_ = dropped;
    } else {
      counts.log_dropped = 0;
      slot_.put_back(counts);
    }
  }

  void tell_busy(const std::string& job_id) const {
    tell(job_id.empty()
             ? std::string("{\"state\":\"idle\"}")
             : "{\"state\":\"busy\",\"job\":" + json::quoted(job_id) + "}");
  }

  // --- leasing ---

  LeaseAsk lease_request(const std::vector<std::string>& kinds, int max,
                         Millis wait_ms) const {
    LeaseAsk request;
    request.worker = options_.name;
    request.session = options_.session;
    request.kinds = kinds;
    request.max = max;
    request.wait_ms = wait_ms;
    request.level = report_.level;
    request.forget_others = strays_;
    return request;
  }

  // Empty: none, or not now (then it has paused).
  std::vector<Lease> lease(const std::vector<std::string>& kinds, int max,
                           Millis wait_ms) {
    {
      std::lock_guard lock(park_mutex_);
      if (stopping_) return {};
      parked_ = true;
    }
    const auto reply = client_.post(
        "/v1/leases", write_lease_request(lease_request(kinds, max, wait_ms)),
        wait_ms + 5000);
    {
      std::lock_guard lock(park_mutex_);
      parked_ = false;
      client_.resume();  // later calls are not to be interrupted
    }
    if (!reply) {
      strays_ = true;  // it may have been granted and the answer lost
      leave_if_cut_off();
      if (!stopping_) lease_rest_.after(reply);
      return {};
    }
    cut_off_since_ = {};
    if (reply->status != 200 && reply->status != 204) {
      // One line for as long as it says the same, a drain for instance.
      if (reply->status != refusal_) {
        LogLine(Severity::warn, "lease_refused", utf8_head(reply->body, 300))
            .with("status", reply->status);
      }
      refusal_ = reply->status;
      lease_rest_.after(reply);
      return {};
    }
    refusal_ = 0;
    strays_ = false;
    lease_rest_ = Rest();
    return take_leases(*reply);
  }

  // A pool leaves long before this when its server is away. A worker that still
  // gets no answer has lost its own way there and makes room for another.
  void leave_if_cut_off() {
    const auto now = Steady::now();
    if (cut_off_since_ == Steady::time_point()) cut_off_since_ = now;
    if (now - cut_off_since_ < milliseconds(kCutOffMs) || stopping_) return;
    LogLine(Severity::error, "cut_off",
            "no answer from the server for too long");
    stopping_ = true;
  }

  std::vector<Lease> take_leases(const HttpClient::Reply& reply) {
    if (reply.status != 200) return {};
    auto leases = parse_leases(reply.body);
    if (leases) return std::move(*leases);
    LogLine(Severity::error, "lease_malformed", leases.error().what);
    strays_ = true;
    return {};
  }

  void give_back(const std::vector<Lease>& leases) {
    for (const Lease& lease : leases) release(lease.token);
  }

  void release(const std::string& token) {
    heartbeat_.drop(token);
    // Where this fails the lease runs out, or the pool reports us gone.
    (void)client_.post("/v1/leases/" + token + "/release", "{}");
  }

  // A grant that crossed with our leaving goes back without costing its job an
  // attempt: a lease call that wants nothing and holds nothing.
  void forget_stray_grants() {
    if (!strays_) return;
    LeaseAsk request = lease_request({"machina.none"}, 1, 0);
    (void)client_.post("/v1/leases", write_lease_request(request), 2000);
  }

  // --- warmed kinds ---

  using Group = std::shared_ptr<const HandlerGroup>;

  std::vector<Lease> run_warmed(const Group& group, std::vector<Lease> leases) {
    const std::vector<std::string>& kinds = group_kinds_[group];
    const auto until = Steady::now() + milliseconds(kWarmedRunMs);
    while (!leases.empty()) {
      heartbeat_.hold(leases);
      std::vector<bool> told(leases.size(), false);
      const auto on_slow = [&](std::size_t at, const Warmed::Ends& so_far) {
        report_batch(leases, so_far, told, at, {});
        for (std::size_t i = at + 1; i < leases.size(); ++i) {
          release(leases[i].token);
          told[i] = true;
        }
      };
      const auto ends = warmed_.run(group, leases, on_slow);
      const bool more = !stopping_ && Steady::now() < until;
      auto next = report_batch(leases, ends, told, leases.size(),
                               more ? kinds : std::vector<std::string>());
      for (std::size_t i = 0; i < leases.size(); ++i) {
        if (told[i]) continue;
        // Not started, or the lease is another's by now.
        if (heartbeat_.stop_of(leases[i].token) != Stop::lost) {
          release(leases[i].token);
        }
      }
      heartbeat_.drop_all();
      leases = std::move(next);
      if (stopping_ && releasing_) break;
    }
    return leases;
  }

  // Reports the ends of [0, to) that are there and were not told yet, and
  // leases jobs of `next` in the same trip, where there are any.
  std::vector<Lease> report_batch(const std::vector<Lease>& leases,
                                  const Warmed::Ends& ends,
                                  std::vector<bool>& told, std::size_t to,
                                  const std::vector<std::string>& next) {
    std::string items;
    for (std::size_t i = 0; i < to; ++i) {
      if (told[i] || !ends[i]) continue;
      told[i] = true;
      const Lease& lease = leases[i];
      say_ended(lease, *ends[i], &warmed_lines_);
      if (heartbeat_.alarm()->load() &&
          heartbeat_.stop_of(lease.token) == Stop::lost) {
        continue;
      }
      const std::string& isolation = isolation_of(lease);
      if (ends[i]->code == EndCode::none || ends[i]->code == EndCode::verdict) {
        // A body beyond the server's bound would lose all of its ends.
        if (!items.empty() &&
            items.size() + ends[i]->result.size() > kCompletionBytesMax) {
          complete(items, false, {}, 0);
          items.clear();
        }
        if (!items.empty()) items += ',';
        append_completion(items, lease.token, *ends[i], isolation);
      } else {
        fail(lease.token, *ends[i], isolation);
      }
    }
    return complete(items, !next.empty(), next, Warmed::kBatchMax);
  }

  const std::string& isolation_of(const Lease& lease) const {
    sandbox::Limits ignored;
    Level required = options_.min_level;
    if (!lease.sandbox.empty()) {
      (void)kinds::apply_sandbox(lease.sandbox, ignored, required).has_value();
    }
    return isolation_[std::min(required, kLevelMax)];
  }

  // Completes `items` (may be empty) and leases again where `more`. Retried
  // until the server has answered.
  std::vector<Lease> complete(const std::string& items, bool more,
                              const std::vector<std::string>& kinds, int max) {
    if (items.empty())
      return more ? lease(kinds, max, 0) : std::vector<Lease>();
    for (Rest rest;;) {
      std::string body = "{\"items\":[" + items + "]";
      if (more) {
        body +=
            ",\"lease\":" + write_lease_request(lease_request(kinds, max, 0));
      }
      body += '}';
      const auto reply = client_.post("/v1/leases/complete", body, 15'000);
      if (reply && reply->status == 200) {
        strays_ = false;
        note_refusals(reply->body);
        return more ? take_leases(*reply) : std::vector<Lease>();
      }
      if (reply && refused(reply->status)) {
        LogLine(Severity::error, "completion_refused",
                utf8_head(reply->body, 300))
            .with("status", reply->status);
        return {};
      }
      strays_ = strays_ || more;
      rest.after(reply);
    }
  }

  // A lease that is another's by now needs nothing more. A completion that the
  // server does not take would leave its job running until the lease is out.
  void note_refusals(const std::string& body) {
    if (body.find("\"problem\"") == std::string::npos) return;
    const auto answers = parse_items(body);
    if (!answers) return;
    for (const ItemReply& answer : *answers) {
      if (answer.problem.empty()) continue;
      LogLine(Severity::warn, "completion_refused", answer.problem)
          .with("fence", answer.token.substr(0, 16))
          .with("status", answer.status);
      if (answer.status / 100 != 4 || answer.status == 409 ||
          answer.status == 404) {
        continue;
      }
      fail(answer.token,
           kinds::failed(EndCode::sandbox,
                         "the server refused the result: " + answer.problem),
           "");
    }
  }

  void fail(const std::string& token, const End& end,
            const std::string& isolation) {
    const std::string body = write_failure(end, isolation);
    for (Rest rest;;) {
      const auto reply = client_.post("/v1/leases/" + token + "/fail", body);
      if (reply && (reply->status == 200 || refused(reply->status))) {
        if (reply->status != 200) {
          LogLine(Severity::warn, "failure_refused",
                  "the server did not take an attempt's end")
              .with("fence", token.substr(0, 16))
              .with("status", reply->status);
        }
        return;
      }
      rest.after(reply);
    }
  }

  void block(const std::string& token, const End& end) {
    const std::string body = write_block(end);
    for (Rest rest;;) {
      const auto reply = client_.post("/v1/leases/" + token + "/block", body);
      if (reply && (reply->status == 200 || refused(reply->status))) {
        if (reply->status != 200) {
          LogLine(Severity::warn, "block_refused",
                  "the server did not let an attempt wait")
              .with("fence", token.substr(0, 16))
              .with("status", reply->status);
        }
        return;
      }
      rest.after(reply);
    }
  }

  // --- sandboxed kinds ---

  std::vector<Lease> run_sandboxed(const Lease& lease) {
    warmed_.close();  // the slot is this job's alone
    current_ = lease.token;
    heartbeat_.hold({lease});
    say_begun(lease);
    End end = attempt(lease);
    say_ended(lease, end, nullptr);
    const Stop stop = heartbeat_.stop_of(lease.token);
    if (stop == Stop::lost) {
      heartbeat_.drop_all();
      LogLine line(Severity::warn, "lease_lost", "the lease was lost");
      about(line, lease).with("fence", lease.token.substr(0, 16));
      return {};
    }
    if (end.code == EndCode::cancelled && stop == Stop::released) {
      release(lease.token);
      heartbeat_.drop_all();
      return {};
    }
    log_.finish(client_, kLogPatienceMs);
    std::vector<Lease> next;
    const std::string& isolation = isolation_of(lease);
    if (!end.block_reason.empty()) {
      block(lease.token, end);
    } else if (end.code == EndCode::none || end.code == EndCode::verdict) {
      std::string item;
      append_completion(item, lease.token, end, isolation);
      next = complete(item, !stopping_, leased_, 1);
    } else {
      fail(lease.token, end, isolation);
    }
    heartbeat_.drop_all();
    return next;
  }

  End attempt(const Lease& lease) {
    const auto kind = kinds_.find(lease.kind);
    if (kind == kinds_.end() || kind->second.run == nullptr) {
      return kinds::not_served(lease.kind);
    }
    kinds::Attempt attempt;
    attempt.job_id = lease.job_id;
    attempt.tenant = tenant_ = lease.tenant;
    attempt.kind = lease.kind;
    attempt.input = lease.input;
    attempt.payload = lease.payload;
    attempt.traceparent = lease.traceparent;
    attempt.request_id = lease.request_id;
    attempt.number = lease.attempt;
    attempt.timeout_ms =
        lease.timeout_ms > 0 ? lease.timeout_ms : kind->second.timeout_ms;
    attempt.required = options_.min_level;
    attempt.limits = kind->second.limits;
    if (auto fits = kinds::apply_sandbox(lease.sandbox, attempt.limits,
                                         attempt.required);
        !fits) {
      return kinds::bad_sandbox(fits.error());
    }
    if (attempt.required > report_.level) {
      return kinds::too_weak(attempt.required, report_.level);
    }
    log_.begin(lease.token, 2 * attempt.limits.output_bytes);
    return kind->second.run(attempt, *this);
  }

  const WorkerOptions options_;
  CountedSlot slot_;
  const sandbox::Report report_;
  const KindSettings settings_;
  const KindMap kinds_;
  std::vector<std::string> leased_;
  std::map<Group, std::vector<std::string>> group_kinds_;
  std::array<std::string, kLevelMax + 1> isolation_;  // by requested level

  HttpClient client_;
  Heartbeat heartbeat_;
  JobLog log_;
  Warmed warmed_;
  std::string current_;  // the sandboxed job's token
  std::string tenant_;   // and its tenant
  bool strays_ = false;  // a grant may have been lost on the way
  Rest lease_rest_;
  Steady::time_point cut_off_since_;
  std::uint64_t dropped_told_ = 0;  // lines lost that the pool knows of
  Allowance warmed_lines_{kWarmedLinesPerSecond};
  int refusal_ = 0;  // the status that lease calls were last refused with
  std::atomic<bool> stopping_{false}, releasing_{false};
  std::mutex park_mutex_;
  bool parked_ = false;  // in a lease call, the one call that stop() ends
};

Worker::Worker(const WorkerOptions& options, sandbox::Slot& slot,
               sandbox::Report report)
    : impl_(std::make_unique<Impl>(options, slot, std::move(report))) {}
Worker::~Worker() = default;
void Worker::run() { impl_->run(); }
void Worker::stop() { impl_->stop(); }
void Worker::release_now() { impl_->release_now(); }

}  // namespace machina
