// workers/worker/warmed.h
//
// Runs warmed jobs in the resident, confined process of their kinds' group.
// Leases come in batches of one group and run in turn; what is known to be
// quick is pipelined, what may be slow runs alone.
//
//   W1  A job that may be slow is sent only when all before it are done, and
//       nothing is sent behind it: what was not sent was not started.
//   W2  As soon as one has run for kSlowMs, `on_slow` may hand back the leases
//       of those behind it and report those before it.
//   W3  A handler that died, hung or was cancelled is replaced before the next
//       job; its death costs the job that it ran, no other.
//   W4  Two groups never share a process: another group's jobs find the slot
//       empty. (ProbeTest.GroupsNeverShareAProcess)

#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "workers/kinds/kinds.h"
#include "workers/sandbox/sandbox.h"
#include "workers/worker/heartbeat.h"
#include "workers/worker/protocol.h"

namespace machina {

class Warmed {
 public:
  static constexpr Millis kSlowMs = 20;
  static constexpr int kBatchMax = 64;

  // `level`: what this worker gives; `required`: of jobs that name none.
  Warmed(sandbox::Slot& slot, const KindMap& kinds, Level level, Level required,
         Heartbeat& heartbeat)
      : slot_(slot),
        kinds_(kinds),
        level_(level),
        required_(required),
        heartbeat_(heartbeat) {}
  ~Warmed() { close(); }

  // Ends in the order of the leases; nullopt: not started, to be released.
  using Ends = std::vector<std::optional<kinds::End>>;
  // The job at `index` is slow; `ends` has those before it. Called once per
  // batch at most; afterwards only that job is still this batch's.
  using OnSlow = std::function<void(std::size_t index, const Ends& ends)>;
  // A lease of a kind that is not `group`'s fails its attempt.
  Ends run(const std::shared_ptr<const HandlerGroup>& group,
           const std::vector<Lease>& leases, const OnSlow& on_slow);

  // Before a job needs the slot for itself.
  void close();

 private:
  struct Planned;
  Planned plan(const Lease& lease, const HandlerGroup* group);
  Result<void> open(const std::shared_ptr<const HandlerGroup>& group);
  kinds::End lost_handler(Millis timeout_ms);
  // Answers of the jobs [from, to) that were sent; false: the handler is gone
  // and ends[k] of the one it held is set.
  bool receive(const std::vector<Planned>& plan, std::size_t from,
               std::size_t to, Ends& ends, const std::vector<Lease>& leases,
               const OnSlow& on_slow);
  enum class Took { nothing, answer, nonsense };
  Took take_answer(kinds::End& end, const Planned& job);
  bool send(const std::string& frames, Millis timeout_ms);

  sandbox::Slot& slot_;
  const KindMap& kinds_;
  const Level level_, required_;
  Heartbeat& heartbeat_;
  std::shared_ptr<const HandlerGroup> group_;  // whose process it is
  std::unique_ptr<sandbox::Session> session_;
  int socket_ = -1;
  std::string in_;  // received, not yet taken
  std::uint32_t sequence_ = 0;
};

}  // namespace machina
