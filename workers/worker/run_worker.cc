// The worker's process: what run_worker() does to signals and descriptors.

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <string>
#include <thread>

#include "queue/base/json.h"
#include "queue/base/logger.h"
#include "workers/worker/worker.h"

namespace machina {

int run_worker(const WorkerOptions& options) {
  // Before any thread exists, so that every one inherits the mask and only the
  // thread below sees them.
  sigset_t leave;
  sigemptyset(&leave);
  sigaddset(&leave, SIGTERM);
  sigaddset(&leave, SIGINT);
  sigaddset(&leave, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &leave, nullptr);
  signal(SIGPIPE, SIG_IGN);
  // The pool may be slow to read facts; a worker does not wait for it.
  if (options.facts_fd >= 0) {
    fcntl(options.facts_fd, F_SETFL, O_NONBLOCK);
    fcntl(options.facts_fd, F_SETFD, FD_CLOEXEC);
  }
  auto slot = sandbox::Slot::attach(options.channel_fd);
  if (!slot) {
    LogLine(Severity::error, "start_failed", "no slot: " + slot.error().what);
    return 1;
  }
  auto report = sandbox::run_canary(**slot);
  if (!report) {
    LogLine(Severity::error, "start_failed",
            "the canary could not run: " + report.error().what);
    return 1;
  }
  if (report->level == 0) {
    // No kind of ours can run: nothing is leased, and the pool is told why.
    const sandbox::Trouble& trouble = report->trouble;
    LogLine(Severity::error, "no_sandbox", trouble.reason)
        .with("remedy", trouble.remedy);
    const std::string fact =
        "{\"state\":\"unusable\",\"reason\":" + json::quoted(trouble.reason) +
        ",\"remedy\":" + json::quoted(trouble.remedy) + "}\n";
    (void)!write(options.facts_fd, fact.data(), fact.size());
    return kExitNoSandbox;
  }
  Worker worker(options, **slot, std::move(*report));
  std::thread signals([&] {
    int terms = 0, signal = 0;
    while (sigwait(&leave, &signal) == 0 && signal != SIGUSR1) {
      if (++terms == 1) {
        worker.stop();
      } else {
        worker.release_now();
      }
    }
  });
  worker.run();
  pthread_kill(signals.native_handle(), SIGUSR1);
  signals.join();
  return 0;
}

}  // namespace machina
