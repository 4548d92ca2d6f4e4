// workers/worker/warmed.h
//
// Runs warmed jobs (noop) in a resident, confined handler. Leases come in
// batches and run in turn; what is known to be quick is pipelined, what may be
// slow runs alone.
//
//   W1  A job that may be slow is sent only when all before it are done, and
//       nothing is sent behind it: what was not sent was not started.
//   W2  As soon as one has run for kSlowMs, `on_slow` may hand back the leases
//       of those behind it and report those before it.
//   W3  A handler that died, hung or was cancelled is replaced before the next
//       job; its death costs the job that it ran, no other.

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
  Warmed(sandbox::Slot& slot, const Kind& kind, Level level, Level required,
         Heartbeat& heartbeat)
      : slot_(slot),
        kind_(kind),
        level_(level),
        required_(required),
        heartbeat_(heartbeat) {}
  ~Warmed() { close(); }

  // Ends in the order of the leases; nullopt: not started, to be released.
  using Ends = std::vector<std::optional<kinds::End>>;
  // The job at `index` is slow; `ends` has those before it. Called once per
  // batch at most; afterwards only that job is still this batch's.
  using OnSlow = std::function<void(std::size_t index, const Ends& ends)>;
  Ends run(const std::vector<Lease>& leases, const OnSlow& on_slow);

  // Before a job needs the slot for itself.
  void close();

 private:
  struct Planned;
  Result<void> open();
  kinds::End lost_handler();
  // Answers of the jobs [from, to) that were sent; false: the handler is gone
  // and ends[k] of the one it held is set.
  bool receive(const std::vector<Planned>& plan, std::size_t from,
               std::size_t to, Ends& ends, const std::vector<Lease>& leases,
               const OnSlow& on_slow);
  bool take_reply(kinds::End& end, std::uint32_t sequence);
  bool send(const std::string& frames);

  sandbox::Slot& slot_;
  const Kind& kind_;
  const Level level_, required_;
  Heartbeat& heartbeat_;
  std::unique_ptr<sandbox::Session> session_;
  int socket_ = -1;
  std::string in_;  // received, not yet taken
  std::uint32_t sequence_ = 0;
};

}  // namespace machina
