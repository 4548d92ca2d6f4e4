// server/api/new_jobs.h
//
// The one door of new jobs: a client's, each of a bulk request, the children of
// a completion.
//
//   check    on the loop, as the job is read   (read_new_job, job_json.h)
//   resolve  on threads of its own             (here)
//   quota    not built yet: Service::admitted() is the place for it
//   shard    Service::submit()
//
// A request whose kinds have no `resolve` is submitted in the same call, and
// nothing is allocated for it. While a request is resolved, the next one of its
// connection is not begun: two requests reach the shard in their order.
//
//   J1  A `resolve` that hangs (a mount that is gone) holds up its own request
//       alone, for resolve_ms: then 503 `resolve-timeout`. The loop and the
//       file threads never wait for it.
//       (NewJobsTest.AResolveThatHangsIsGivenUpAndStopsNobody)
//   J2  At most kResolveThreads threads, and kResolvesMax requests that wait
//       with kResolveBytesMax of payloads; then 503 `busy`.
//       (ResolverTest.TooManyThatWaitAreRefused, TooMuchThatWaitsIsRefused)
//   J3  A request that was read whole is carried out, also where its client has
//       hung up meanwhile. (NewJobsTest.AClientThatHangsUpHasItsJob)
//   J4  The server's end waits for no `resolve`; who waits for one is answered.
//       (NewJobsTest.ADrainAnswersAndWaitsForNoResolve)

#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/api/job_json.h"
#include "server/api/server.h"

namespace machina {

constexpr int kResolveThreads = 4;
constexpr std::size_t kResolvesMax = 1024;
constexpr std::size_t kResolveBytesMax = 64u << 20;  // of payloads

// Threads that run kinds' `resolve`. One that hangs is given up with its thread
// and touches nothing of the server any more.
class Resolver {
 public:
  struct Look {
    std::string kind, payload;
  };
  // For each look what was found, in order; nothing: the time was over.
  using Found = std::vector<std::optional<Checked<KindFacts::Kept>>>;
  using Then = std::function<void(Found)>;

  // `post` runs a function on the loop, from any thread.
  Resolver(const std::map<std::string, KindFacts>& kinds, Clock& clock,
           Millis limit_ms, std::function<void(std::function<void()>)> post);
  ~Resolver();  // J4: tells nobody any more

  // On the loop; `then` is called there, once. False: too many or too much
  // waits (J2).
  bool run(std::vector<Look> looks, Then then);
  // Gives up those whose time is over, or all. On the loop, now and then.
  void give_up(bool all);

 private:
  struct Shared;
  struct Task;
  void answer(std::uint64_t number, Found found);

  struct Waiting {
    std::shared_ptr<Task> task;
    Then then;
    Millis until = 0;
    std::size_t bytes = 0;
  };
  Clock& clock_;
  const Millis limit_ms_;
  std::shared_ptr<Shared> shared_;
  std::map<std::uint64_t, Waiting> waiting_;  // by number; in order of `until`
  std::uint64_t next_ = 0;
  std::size_t bytes_ = 0;  // of all that wait
};

// `problems`: of the entries that have none yet, in order.
template <class Entry>
void note_problems(std::vector<Entry>& entries,
                   std::vector<MaybeProblem>& problems) {
  auto next = problems.begin();
  for (Entry& entry : entries) {
    if (!entry.problem) entry.problem = std::move(*next++);
  }
}

}  // namespace machina
