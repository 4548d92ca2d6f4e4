// tests/server/api/fake_shard.h
//
// A Shard in memory, good enough to speak to the server: jobs, leases, dedup,
// parked calls. It keeps no log; it can be told to hold its responses back (as
// a slow disk would), to be poisoned, or to answer with a given status.

#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "queue/shard/shard.h"

namespace machina::test {

// What tests turn from their own thread.
struct FakeControl {
  std::atomic<bool> hold{false};
  std::atomic<bool> poison{false};
  std::atomic<int> status{0};  // Response::Status of all that is not a read
  std::atomic<int> disk_level{0};
  std::atomic<std::uint64_t> disk_soft{0};
  std::atomic<int> closed{0}, abandoned{0}, released{0}, gone{0};
  std::atomic<Level> seen_min_level{0};
  std::mutex mutex;
  std::function<void()> wake;  // guarded
  std::optional<NewJob> last;  // guarded: the last job that was submitted
  void poke() {
    std::lock_guard<std::mutex> lock(mutex);
    if (wake) wake();
  }
  NewJob last_job() {
    std::lock_guard<std::mutex> lock(mutex);
    return last.value_or(NewJob{});
  }
};

class FakeShard final : public Shard {
 public:
  explicit FakeShard(FakeControl& control) : control_(control) {}
  ~FakeShard() override {
    std::lock_guard<std::mutex> lock(control_.mutex);
    control_.wake = nullptr;
  }

  void on_send(Send send) override { send_ = std::move(send); }
  void on_wake(std::function<void()> wake) override {
    std::lock_guard<std::mutex> lock(control_.mutex);
    control_.wake = std::move(wake);
  }

  void feed_to(EndSink* sink) override { sink_ = sink; }
  void submit(Request request) override {
    Response response;
    response.to = request.from;
    if (control_.status != 0 && std::holds_alternative<Command>(request.what)) {
      response.status = static_cast<Response::Status>(control_.status.load());
      out_.push_back(std::move(response));
      return;
    }
    if (auto* get = std::get_if<GetQuery>(&request.what)) {
      return get_job(request, *get, std::move(response));
    }
    if (auto* list = std::get_if<ListQuery>(&request.what)) {
      return list_jobs(*list, std::move(response));
    }
    std::visit(
        [&](auto& command) { on(request, command, std::move(response)); },
        std::get<Command>(request.what));
  }

  void abandon(std::uint32_t, std::uint64_t connection) override {
    ++control_.abandoned;
    std::erase_if(parked_, [&](const Parked& p) {
      return p.request.from.connection == connection;
    });
  }

  void hurry(std::uint32_t, std::uint64_t connection) override {
    for (Parked& p : parked_) {
      if (p.request.from.connection == connection) p.until = 0;
    }
  }
  std::map<std::string, std::uint64_t> ready_kinds() const override {
    std::map<std::string, std::uint64_t> kinds;
    for (const auto& [_, job] : jobs_) {
      if (job.view.state == State::ready) ++kinds[job.view.kind];
    }
    return kinds;
  }
  bool leased(Fence fence) const override { return leases_.contains(fence); }
  void turn() override {
    wait_over();
    if (control_.hold) return;
    while (!out_.empty()) {
      Response response = std::move(out_.front());
      out_.pop_front();
      send_(std::move(response));
    }
  }
  Millis next_due_ms() override {
    if (parked_.empty()) return -1;
    Millis next = parked_.front().until;
    for (const Parked& p : parked_) next = std::min(next, p.until);
    return std::max<Millis>(0, next - system_clock().mono_ms());
  }

  void drain() override {
    draining_ = true;
    for (Parked& p : parked_) p.until = 0;
  }
  std::size_t running() const override { return leases_.size(); }
  void release_all() override {
    control_.released += static_cast<int>(leases_.size());
    while (!leases_.empty()) release(leases_.begin()->first);
  }
  Result<void> close() override {
    ++control_.closed;
    return {};
  }
  ShardStats stats() override {
    ShardStats stats;
    QueueCounts counts;
    counts.queue = "default";
    for (const auto& [_, job] : jobs_) {
      ++counts.by_state[static_cast<int>(job.view.state)];
    }
    stats.queues.push_back(counts);
    stats.totals.enqueued = jobs_.size();
    stats.live_jobs = jobs_.size();
    stats.poison_cause = "told to";
    stats.log.sync_us = {140, 150};
    stats.wait_seconds = {{"noop", 0.002}};
    return stats;
  }
  bool poisoned() const override { return control_.poison; }
  DiskState disk() const override {
    DiskState state;
    state.level = static_cast<DiskLevel>(control_.disk_level.load());
    state.soft_bytes = control_.disk_soft;
    if (state.level != DiskLevel::ok) state.says = "it is full; make room";
    return state;
  }

 private:
  struct Job {
    JobView view;
    NewJob body;
  };
  struct Parked {
    Request request;
    Millis until = 0;
    JobId job;  // waits for this job's end; nil: for work
  };

  void answer(Response response, Answer a, const JobId& id = {},
              State state = State::ready) {
    ItemAnswer item;
    item.answer = a;
    item.id = id;
    item.state = state;
    response.items.push_back(item);
    out_.push_back(std::move(response));
  }
  JobView view_of(const JobId& id, bool payload) {
    JobView view = jobs_[id].view;
    if (!payload) view.payload.clear();
    return view;
  }

  void on(Request& request, EnqueueCommand& command, Response response) {
    for (NewJob& job : command.jobs) {
      ItemAnswer item;
      {
        std::lock_guard<std::mutex> lock(control_.mutex);
        control_.last = job;
      }
      control_.seen_min_level = job.min_level;
      auto known = dedup_.find(job.dedup_key);
      if (!job.dedup_key.empty() && known != dedup_.end()) {
        const Job& old = jobs_[known->second];
        item.id = known->second;
        item.state = old.view.state;
        item.answer = old.body.payload_digest[0] == job.payload_digest[0] &&
                              old.body.kind == job.kind
                          ? Answer::duplicate
                          : Answer::dedup_mismatch;
      } else if (job.queue == "full") {
        item.answer = Answer::queue_full;
      } else {
        item.id = add(job);
        item.state = jobs_[item.id].view.state;
        if (!job.dedup_key.empty()) dedup_[job.dedup_key] = item.id;
      }
      response.items.push_back(item);
      response.views.push_back(item.id.is_nil()
                                   ? JobView{}
                                   : view_of(item.id, request.with_payload));
    }
    if (request.wait_ms > 0 && command.jobs.size() == 1 &&
        !response.items[0].id.is_nil()) {
      parked_.push_back({request, system_clock().mono_ms() + request.wait_ms,
                         response.items[0].id});
    } else {
      out_.push_back(std::move(response));
    }
    feed();
  }

  JobId add(const NewJob& job) {
    JobId id = make_job_id(system_clock().wall_ms(), 0, ++next_);
    Job& j = jobs_[id];
    j.body = job;
    JobView& v = j.view;
    v.id = id;
    v.kind = job.kind;
    v.queue = job.queue;
    v.tenant = job.tenant;
    v.priority = job.priority;
    v.max_attempts = job.max_attempts;
    v.created_ms = system_clock().wall_ms();
    v.run_at_ms = job.run_at_ms;
    v.timeout_ms = job.timeout_ms;
    v.payload = job.payload;
    v.labels = job.labels;
    v.dedup_key = job.dedup_key;
    v.depends_on = job.depends_on;
    v.min_level = job.min_level;
    v.sandbox = job.sandbox;
    v.traceparent = job.traceparent;
    v.request_id = job.request_id;
    v.state = job.run_at_ms > v.created_ms ? State::scheduled : State::ready;
    return id;
  }

  bool give(const LeaseCommand& command, Response* response) {
    for (auto& [id, job] : jobs_) {
      if (static_cast<int>(response->leases.size()) >= command.max) break;
      if (job.view.state != State::ready) continue;
      bool wanted = false;
      for (const std::string& kind : command.kinds) {
        wanted = wanted || kind_matches(kind, job.view.kind);
      }
      if (!wanted || job.view.min_level > command.level) continue;
      job.view.state = State::running;
      job.view.worker = command.worker;
      job.view.fence = make_fence(1, ++next_fence_);
      ++job.view.attempt;
      leases_[job.view.fence] = id;
      response->leases.push_back(
          {job.view.fence, system_clock().wall_ms() + 30'000, job.view});
    }
    return !response->leases.empty();
  }
  void on(Request& request, LeaseCommand& command, Response response) {
    if (draining_) {
      response.status = Response::Status::draining;
      out_.push_back(std::move(response));
      return;
    }
    if (!give(command, &response) && request.wait_ms > 0) {
      parked_.push_back(
          {request, system_clock().mono_ms() + request.wait_ms, {}});
      return;
    }
    out_.push_back(std::move(response));
  }
  void feed() {
    for (auto it = parked_.begin(); it != parked_.end();) {
      Response response;
      response.to = it->request.from;
      auto* command = std::get_if<Command>(&it->request.what);
      bool fed = false;
      if (!it->job.is_nil()) {
        if (is_final(jobs_[it->job].view.state)) {
          ItemAnswer item;
          item.id = it->job;
          response.items.push_back(item);
          response.views.push_back(view_of(it->job, true));
          fed = true;
        }
      } else if (auto* lease = std::get_if<LeaseCommand>(command)) {
        fed = give(*lease, &response);
      }
      if (fed) out_.push_back(std::move(response));
      it = fed ? parked_.erase(it) : std::next(it);
    }
  }
  void wait_over() {
    Millis now = system_clock().mono_ms();
    for (auto it = parked_.begin(); it != parked_.end();) {
      if (it->until > now) {
        ++it;
        continue;
      }
      Response response;
      response.to = it->request.from;
      response.waited_out = true;
      auto* command = std::get_if<Command>(&it->request.what);
      if (!it->job.is_nil()) {
        ItemAnswer item;
        item.id = it->job;
        response.items.push_back(item);
        response.views.push_back(view_of(it->job, true));
      } else if (command != nullptr) {
        if (auto* beat = std::get_if<HeartbeatCommand>(command)) {
          beats(*beat, &response);
        }
      }
      out_.push_back(std::move(response));
      it = parked_.erase(it);
    }
  }

  bool beats(const HeartbeatCommand& command, Response* response) {
    bool news = false;
    for (const auto& item : command.items) {
      ItemAnswer a;
      auto lease = leases_.find(item.fence);
      if (lease == leases_.end()) {
        a.answer = Answer::stale_lease;
        news = true;
      } else {
        Job& job = jobs_[lease->second];
        a.id = lease->second;
        a.cancel = job.view.cancel_requested;
        news = news || a.cancel;
        if (item.progress_percent >= 0) {
          job.view.progress_percent = item.progress_percent;
          job.view.progress_message = item.progress_message;
        }
      }
      response->items.push_back(a);
    }
    return news;
  }
  void on(Request& request, HeartbeatCommand& command, Response response) {
    if (!beats(command, &response) && request.wait_ms > 0) {
      parked_.push_back(
          {request, system_clock().mono_ms() + request.wait_ms, {}});
      return;
    }
    out_.push_back(std::move(response));
  }

  void end(Job& job, State state, const Outcome& outcome) {
    JobView& v = job.view;
    v.state = state;
    v.finished_ms = system_clock().wall_ms();
    v.error_code = outcome.code;
    v.error_message = outcome.message;
    v.result = outcome.result;
    v.isolation = outcome.isolation;
    v.usage = outcome.usage;
    v.artifacts = outcome.artifacts;
  }
  void on(Request& request, CompleteCommand& command, Response response) {
    for (auto& item : command.items) {
      ItemAnswer a;
      auto lease = leases_.find(item.fence);
      auto done = completed_.find(item.fence);
      if (lease != leases_.end()) {
        a.id = lease->second;
        end(jobs_[a.id],
            item.outcome.code == EndCode::none ? State::succeeded
                                               : State::failed,
            item.outcome);
        completed_[item.fence] = a.id;
        leases_.erase(lease);
        for (const NewJob& child : item.children) add(child);
      } else if (done != completed_.end()) {
        a.id = done->second;
      } else {
        a.answer = Answer::stale_lease;
      }
      response.items.push_back(a);
      response.views.push_back(a.id.is_nil() ? JobView{}
                                             : view_of(a.id, false));
    }
    feed();
    if (command.lease && !give(*command.lease, &response) &&
        request.wait_ms > 0) {
      // Good enough here: the wait is not modelled for this call.
    }
    out_.push_back(std::move(response));
  }
  void on(Request&, FailCommand& command, Response response) {
    auto lease = leases_.find(command.fence);
    if (lease == leases_.end()) {
      return answer(std::move(response), Answer::stale_lease);
    }
    JobId id = lease->second;
    leases_.erase(lease);
    Job& job = jobs_[id];
    bool again =
        command.outcome.retry && job.view.attempt < job.view.max_attempts;
    end(job, again ? State::scheduled : State::dead, command.outcome);
    answer(std::move(response), Answer::ok, id, job.view.state);
    feed();
  }
  void on(Request&, BlockCommand& command, Response response) {
    auto lease = leases_.find(command.fence);
    if (lease == leases_.end()) {
      return answer(std::move(response), Answer::stale_lease);
    }
    JobId id = lease->second;
    leases_.erase(lease);
    JobView& v = jobs_[id].view;
    v.state = State::blocked;
    v.blocked_reason = command.reason;
    v.blocked_data = command.data;
    v.blocked_token = "secret";
    answer(std::move(response), Answer::ok, id, v.state);
  }
  JobId release(Fence fence) {
    auto lease = leases_.find(fence);
    if (lease == leases_.end()) return {};
    JobId id = lease->second;
    leases_.erase(lease);
    jobs_[id].view.state = State::ready;
    --jobs_[id].view.attempt;
    return id;
  }
  void on(Request&, ReleaseCommand& command, Response response) {
    for (Fence fence : command.fences) {
      JobId id = release(fence);
      if (!id.is_nil()) ++control_.released;
      ItemAnswer a;
      a.id = id;
      if (id.is_nil()) a.answer = Answer::stale_lease;
      response.items.push_back(a);
    }
    out_.push_back(std::move(response));
  }
  void on(Request&, CancelCommand& command, Response response) {
    auto found = jobs_.find(command.id);
    if (found == jobs_.end()) {
      return answer(std::move(response), Answer::not_found);
    }
    JobView& v = found->second.view;
    if (v.state == State::running) {
      v.cancel_requested = true;
      for (Parked& p : parked_) p.until = 0;
    } else if (is_final(v.state) && v.state != State::cancelled) {
      return answer(std::move(response), Answer::wrong_state, v.id, v.state);
    } else {
      v.state = State::cancelled;
      v.error_code = EndCode::cancelled;
    }
    answer(std::move(response), Answer::ok, v.id, v.state);
  }
  void on(Request&, RetryCommand& command, Response response) {
    auto found = jobs_.find(command.id);
    if (found == jobs_.end()) {
      return answer(std::move(response), Answer::not_found);
    }
    JobView& v = found->second.view;
    if (!is_final(v.state) || v.state == State::succeeded) {
      return answer(std::move(response), Answer::wrong_state, v.id, v.state);
    }
    v.state = State::ready;
    v.error_code = EndCode::none;
    answer(std::move(response), Answer::ok, v.id, v.state);
    feed();
  }
  void on(Request&, UnblockCommand& command, Response response) {
    auto found = jobs_.find(command.id);
    if (found == jobs_.end()) {
      return answer(std::move(response), Answer::not_found);
    }
    JobView& v = found->second.view;
    if (v.state != State::blocked) {
      return answer(std::move(response), Answer::wrong_state, v.id, v.state);
    }
    if (command.token != v.blocked_token) {
      return answer(std::move(response), Answer::bad_token, v.id, v.state);
    }
    v.state = State::ready;
    v.input = command.input;
    answer(std::move(response), Answer::ok, v.id, v.state);
    feed();
  }
  void on(Request&, GoneCommand& command, Response response) {
    control_.gone += static_cast<int>(command.workers.size());
    out_.push_back(std::move(response));
  }
  void on(Request&, TickCommand&, Response) {}
  void on(Request&, ClockCommand&, Response) {}

  void get_job(Request& request, const GetQuery& get, Response response) {
    auto found = jobs_.find(get.id);
    if (found == jobs_.end()) {
      return answer(std::move(response), Answer::not_found);
    }
    if (get.until_final && !is_final(found->second.view.state)) {
      parked_.push_back(
          {request, system_clock().mono_ms() + get.wait_ms, get.id});
      return;
    }
    response.views.push_back(view_of(get.id, get.payload));
    out_.push_back(std::move(response));
  }
  void list_jobs(const ListQuery& list, Response response) {
    if (list.cursor == "bad") {
      response.status = Response::Status::bad_cursor;
    }
    std::size_t from = list.cursor.empty()
                           ? 0
                           : std::strtoul(list.cursor.c_str(), nullptr, 10);
    std::size_t at = 0;
    for (auto& [id, job] : jobs_) {
      if (at++ < from) continue;
      if (static_cast<int>(response.views.size()) >= list.limit) {
        response.cursor = std::to_string(at - 1);
        break;
      }
      response.views.push_back(view_of(id, false));
    }
    response.scanned = response.views.size();
    out_.push_back(std::move(response));
  }

  FakeControl& control_;
  EndSink* sink_ = nullptr;
  Send send_;
  std::map<JobId, Job> jobs_;
  std::map<std::string, JobId> dedup_;
  std::map<Fence, JobId> leases_, completed_;
  std::deque<Response> out_;
  std::vector<Parked> parked_;
  std::uint64_t next_ = 0, next_fence_ = 0;
  bool draining_ = false;
};

}  // namespace machina::test
