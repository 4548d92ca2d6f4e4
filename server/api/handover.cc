// What passes to the next server, and how the server is for whoever watches
// over it.

#include <unistd.h>

#include <algorithm>
#include <csignal>

#include "server/api/service.h"

namespace machina {

// From here on new connections wait in the sockets' queues, for the server
// that takes them next; what is connected already is answered here.
void Service::pass_sockets() {
  if (!options_.events.pass_sockets) return;
  passed_on_ = options_.events.pass_sockets(loop_->listening());
  if (passed_on_) loop_->stop_listening(true);
}

// What was inherited and is not what the settings ask for.
void Service::drop_inherited() {
  auto used = loop_->listening();
  for (const auto& socket : options_.inherited) {
    bool is_used = std::any_of(used.begin(), used.end(), [&](const auto& mine) {
      return mine.fd == socket.fd;
    });
    if (!is_used) ::close(socket.fd);
  }
}

void Service::pulse() {
  if (!options_.events.pulse) return;
  ServerPulse now;
  now.unready = unready();
  now.draining = draining_;
  now.handover = handover_;
  now.log_stuck = log_stuck();
  options_.events.pulse(now);
}

// The log thread took a batch and has not come back from the disk with it.
bool Service::log_stuck() {
  if (poisoned_ || shard_ == nullptr) return true;
  Shard::Progress at = shard_->progress();
  Millis now = clock_.mono_ms();
  if (stuck_since_ < 0 || at.durable >= at.applied || at.durable != stuck_at_) {
    stuck_at_ = at.durable;
    stuck_since_ = now;
  }
  return now - stuck_since_ > kStuckMs;
}

// Asked to end for the second time: the pool does not outlive that, and with
// it go its jobs, which lose no attempt by it. Where the disk does not answer,
// the next pool finds in pool.lock whose doing that was.
void Service::leave_at_once() {
  if (options_.events.end_pool) options_.events.end_pool(true);
  GoneCommand gone;
  gone.ended = true;
  for (const auto& [_, pool] : pools_.all()) {
    for (const PoolReport::Worker& worker : pool.workers) {
      gone.workers.push_back(worker.name);
    }
  }
  bool known = gone.workers.empty() || poisoned_ || finishing_;
  if (!known) {
    Request request;
    request.what.emplace<Command>(std::move(gone));
    ask(std::move(request), [&known](const Response&) { known = true; });
  }
  for (const Millis until = clock_.mono_ms() + kLastSyncMs;
       !known && !shard_->poisoned() && clock_.mono_ms() < until;) {
    shard_->turn();
    if (!known) ::usleep(1000);
  }
  if (options_.events.left) options_.events.left();
  _exit(128 + SIGTERM);
}

}  // namespace machina
