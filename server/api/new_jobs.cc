#include "server/api/new_jobs.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "server/api/service.h"

namespace machina {

// --- Resolver --------------------------------------------------------------

struct Resolver::Task {
  std::uint64_t number = 0;
  std::vector<Look> looks;
  std::atomic<bool> given_up{false};
};

// What the threads hold, and all that they hold: it outlives the server where
// one of them hangs.
struct Resolver::Shared {
  std::map<std::string, KindFacts> kinds;
  std::mutex mutex;
  std::condition_variable ready;
  std::deque<std::shared_ptr<Task>> tasks;
  std::function<void(std::uint64_t, Found)> tell;  // null: nobody listens
  struct Thread {
    std::thread thread;
    bool looking = false;  // it may hang
  };
  std::deque<Thread> threads;

  void loop(Thread* own);
  Found look(const Task& task) const;
};

Resolver::Found Resolver::Shared::look(const Task& task) const {
  Found found;
  for (const Look& look : task.looks) {
    found.emplace_back();
    if (task.given_up) continue;
    found.back() = kinds.at(look.kind).resolve(look.payload);
  }
  return found;
}

void Resolver::Shared::loop(Thread* own) {
  std::unique_lock lock(mutex);
  for (;;) {
    ready.wait(lock, [&] { return !tell || !tasks.empty(); });
    if (!tell) return;
    const auto task = std::move(tasks.front());
    tasks.pop_front();
    own->looking = true;
    lock.unlock();
    Found found = look(*task);
    lock.lock();
    own->looking = false;
    if (tell) tell(task->number, std::move(found));
  }
}

Resolver::Resolver(const std::map<std::string, KindFacts>& kinds, Clock& clock,
                   Millis limit_ms,
                   std::function<void(std::function<void()>)> post)
    : clock_(clock), limit_ms_(limit_ms), shared_(std::make_shared<Shared>()) {
  shared_->kinds = kinds;
  shared_->tell = [this, post = std::move(post)](std::uint64_t number,
                                                 Found found) {
    auto kept = std::make_shared<Found>(std::move(found));
    post([this, number, kept] { answer(number, std::move(*kept)); });
  };
  const bool any = std::any_of(kinds.begin(), kinds.end(), [](const auto& k) {
    return k.second.resolve != nullptr;
  });
  for (int i = 0; any && i < kResolveThreads; ++i) {
    auto& own = shared_->threads.emplace_back();
    own.thread = std::thread([s = shared_, &own] { s->loop(&own); });
  }
}

Resolver::~Resolver() {
  std::vector<std::thread> ending;
  {
    std::lock_guard lock(shared_->mutex);
    shared_->tell = nullptr;
    for (auto& one : shared_->threads) {
      if (one.looking) {
        one.thread.detach();
      } else {
        ending.push_back(std::move(one.thread));
      }
    }
  }
  shared_->ready.notify_all();
  for (std::thread& thread : ending) thread.join();
}

bool Resolver::run(std::vector<Look> looks, Then then) {
  std::size_t bytes = 0;
  for (const Look& look : looks) bytes += look.payload.size();
  if (waiting_.size() >= kResolvesMax ||
      (!waiting_.empty() && bytes_ + bytes > kResolveBytesMax)) {
    return false;
  }
  bytes_ += bytes;
  auto task = std::make_shared<Task>();
  task->number = ++next_;
  task->looks = std::move(looks);
  waiting_[task->number] = {task, std::move(then), clock_.mono_ms() + limit_ms_,
                            bytes};
  {
    std::lock_guard lock(shared_->mutex);
    shared_->tasks.push_back(std::move(task));
  }
  shared_->ready.notify_one();
  return true;
}

void Resolver::answer(std::uint64_t number, Found found) {
  auto known = waiting_.find(number);
  if (known == waiting_.end()) return;  // given up
  const Then then = std::move(known->second.then);
  bytes_ -= known->second.bytes;
  waiting_.erase(known);
  then(std::move(found));
}

void Resolver::give_up(bool all) {
  const Millis now = waiting_.empty() ? 0 : clock_.mono_ms();
  while (!waiting_.empty()) {
    auto& [number, first] = *waiting_.begin();
    if (!all && now < first.until) return;
    first.task->given_up = true;
    {
      // No thread is to spend its time on what nobody waits for.
      std::lock_guard lock(shared_->mutex);
      std::erase(shared_->tasks, first.task);
    }
    answer(number, Found(first.task->looks.size()));
  }
}

// --- The door --------------------------------------------------------------

namespace {

// The new jobs of each item of a command that makes some.
std::vector<std::vector<NewJob*>> new_jobs_of(Request& request) {
  std::vector<std::vector<NewJob*>> items;
  auto& command = std::get<Command>(request.what);
  if (auto* enqueue = std::get_if<EnqueueCommand>(&command)) {
    for (NewJob& job : enqueue->jobs) items.push_back({&job});
  } else if (auto* complete = std::get_if<CompleteCommand>(&command)) {
    for (auto& item : complete->items) {
      auto& jobs = items.emplace_back();
      for (NewJob& job : item.children) jobs.push_back(&job);
    }
  }
  return items;
}

bool any_needs(const ServerOptions& options, const std::vector<NewJob>& jobs) {
  return std::any_of(jobs.begin(), jobs.end(), [&](const NewJob& job) {
    return needs_host(options, job);
  });
}

bool any_needs(const ServerOptions& options, const Request& request) {
  const auto& command = std::get<Command>(request.what);
  if (const auto* enqueue = std::get_if<EnqueueCommand>(&command)) {
    return any_needs(options, enqueue->jobs);
  }
  const auto& items = std::get<CompleteCommand>(command).items;
  return std::any_of(items.begin(), items.end(), [&](const auto& item) {
    return any_needs(options, item.children);
  });
}

template <class T>
void erase_refused(std::vector<T>& items,
                   const std::vector<MaybeProblem>& problems) {
  std::size_t at = 0;
  std::erase_if(items, [&](const T&) { return problems[at++].has_value(); });
}

// Without the items that have a problem. False: nothing is left to do.
bool leave_out(Request& request, const std::vector<MaybeProblem>& problems) {
  auto& command = std::get<Command>(request.what);
  if (auto* enqueue = std::get_if<EnqueueCommand>(&command)) {
    erase_refused(enqueue->jobs, problems);
    return !enqueue->jobs.empty();
  }
  auto& complete = std::get<CompleteCommand>(command);
  erase_refused(complete.items, problems);
  return !complete.items.empty() || complete.lease;
}

Problem resolve_timeout(Millis limit_ms, bool ending) {
  Problem p;
  p.status = 503;
  p.code = "resolve-timeout";
  p.field = "payload";
  p.retry_after = 1;
  p.detail = ending
                 ? "payload: the server ends, and this host did not answer yet "
                   "where the job's repository or program lies; send it again"
                 : "payload: this host did not answer within " +
                       std::to_string(limit_ms) +
                       " ms where the job's repository or program lies; a file "
                       "system may hang";
  return p;
}

}  // namespace

void Service::submit_new(Request request, NoteProblems note) {
  // A completion that is repeated gets the stored answer: its children are
  // there already, and the host is not asked for them again.
  if (auto* complete =
          std::get_if<CompleteCommand>(&std::get<Command>(request.what))) {
    for (auto& item : complete->items) {
      if (!item.children.empty() && !shard_->leased(item.fence)) {
        item.children.clear();
      }
    }
  }
  if (!any_needs(options_, request)) return admitted(std::move(request));
  const Where where{request.from.connection, request.from.sequence};
  auto held = std::make_shared<Request>(std::move(request));
  std::vector<Resolver::Look> looks;
  for (const auto& jobs : new_jobs_of(*held)) {
    for (const NewJob* job : jobs) {
      if (needs_host(options_, *job))
        looks.push_back({job->kind, job->payload});
    }
  }
  if (released_) {  // J4: what is found later, nobody hears of
    Resolver::Found nothing(looks.size());
    return resolved(where, std::move(*held), note, std::move(nothing));
  }
  const bool taken = resolver_->run(
      std::move(looks), [this, where, held, note](Resolver::Found found) {
        if (Peer* p = peer(where.peer)) {
          --p->resolving;
          resume_later(*p);
        }
        resolved(where, std::move(*held), note, std::move(found));
      });
  if (!taken) {
    Problem p;
    p.status = 503;
    p.code = "busy";
    p.retry_after = 1;
    p.detail = "requests wait for a look at this host, the most that may: " +
               std::to_string(kResolvesMax) + ", or " +
               std::to_string(kResolveBytesMax >> 20) + " MiB of payloads";
    return refuse(where, p);
  }
  if (Peer* p = peer(where.peer)) ++p->resolving;
}

// `found`: for each of the request's jobs that needed the host, in order.
void Service::resolved(const Where& where, Request request, NoteProblems note,
                       Resolver::Found found) {
  std::vector<MaybeProblem> problems;
  bool any = false;
  std::size_t next = 0;
  auto& command = std::get<Command>(request.what);
  const bool children = std::holds_alternative<CompleteCommand>(command);
  for (const auto& jobs : new_jobs_of(request)) {
    MaybeProblem& problem = problems.emplace_back();
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      if (!needs_host(options_, *jobs[i])) continue;
      auto& one = found[next++];
      if (problem) continue;
      problem = one ? take_kept(options_, std::move(*one), jobs[i])
                    : resolve_timeout(options_.resolve_ms, released_);
      if (problem && children) problem = of_child(std::move(*problem), i);
    }
    any = any || problem;
  }
  Peer* p = peer(where.peer);
  if (p == nullptr) request.wait_ms = 0;  // J3
  if (any) {
    if (note == nullptr) return refuse(where, *problems.front());
    Pending* pending =
        p == nullptr ? nullptr : p->connection.pending(where.sequence);
    if (pending != nullptr) note(*pending, problems);
    if (!leave_out(request, problems)) {
      Response none;
      none.to = request.from;
      return on_response(std::move(none));
    }
  }
  admitted(std::move(request));
}

void Service::admitted(Request request) { submit(std::move(request)); }

}  // namespace machina
