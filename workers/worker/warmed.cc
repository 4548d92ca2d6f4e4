#include "workers/worker/warmed.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "workers/kinds/handler.h"
#include "workers/kinds/run.h"

namespace machina {

using kinds::End;
using std::chrono::milliseconds;
using Steady = std::chrono::steady_clock;

struct Warmed::Planned {
  std::optional<End> end;  // decided without the handler
  const Lease* lease = nullptr;
  std::uint32_t sequence = 0;
  Millis timeout_ms = 0;
  bool quick = false;
};

namespace {

Millis since(Steady::time_point start) {
  return std::chrono::duration_cast<milliseconds>(Steady::now() - start)
      .count();
}

}  // namespace

void Warmed::close() {
  if (socket_ >= 0) ::close(socket_);
  socket_ = -1;
  session_.reset();
  group_.reset();
  in_.clear();
}

Result<void> Warmed::open(const std::shared_ptr<const HandlerGroup>& group) {
  if (socket_ >= 0 && group_ == group) return {};
  close();
  sandbox::SessionSpec spec;
  spec.limits = group->limits;
  spec.min_level = level_;
  auto session = slot_.open(spec);
  if (!session) return session.error();
  auto socket = (*session)->start_service(group->program);
  if (!socket) return socket.error();
  group_ = group;
  session_ = std::move(*session);
  socket_ = *socket;
  return {};
}

Warmed::Planned Warmed::plan(const Lease& lease, const HandlerGroup* group) {
  Planned job;
  const auto kind = kinds_.find(lease.kind);
  if (kind == kinds_.end() || kind->second.group.get() != group) {
    job.end = kinds::not_served(lease.kind);
    return job;
  }
  sandbox::Limits limits = group->limits;
  Level required = required_;
  if (auto fits = kinds::apply_sandbox(lease.sandbox, limits, required);
      !fits) {
    job.end = kinds::bad_sandbox(fits.error());
    return job;
  }
  if (required > level_) {
    job.end = kinds::too_weak(required, level_);
    return job;
  }
  job.lease = &lease;
  job.sequence = ++sequence_;
  job.timeout_ms =
      lease.timeout_ms > 0 ? lease.timeout_ms : kind->second.timeout_ms;
  job.quick =
      kind->second.quick != nullptr && kind->second.quick(lease.payload);
  return job;
}

Warmed::Ends Warmed::run(const std::shared_ptr<const HandlerGroup>& group,
                         const std::vector<Lease>& leases,
                         const OnSlow& on_slow) {
  Ends ends(leases.size());
  std::vector<Planned> plan;
  plan.reserve(leases.size());
  for (const Lease& lease : leases) {
    plan.push_back(this->plan(lease, group.get()));
  }

  for (std::size_t i = 0; i < leases.size();) {
    if (heartbeat_.alarm()->load()) {
      const Stop stop = heartbeat_.stop_of(leases[i].token);
      if (stop != Stop::none) {
        // Never started: cancelled at once, else simply given back.
        if (stop == Stop::cancelled) {
          ends[i] = kinds::failed(EndCode::cancelled, "cancelled");
        }
        ++i;
        continue;
      }
    }
    if (plan[i].end) {
      ends[i] = std::move(plan[i].end);
      ++i;
      continue;
    }
    if (auto opened = open(group); !opened) {
      ends[i] = kinds::failed(EndCode::sandbox, opened.error().what);
      // The others go back and may come again at once: not in a busy loop.
      std::this_thread::sleep_for(milliseconds(100));
      return ends;
    }
    std::string frames;
    std::size_t to = i;
    do {
      const Lease& lease = *plan[to].lease;
      kinds::append_call(frames, plan[to].sequence, lease.attempt, lease.kind,
                         lease.payload);
      ++to;
    } while (plan[i].quick && to < leases.size() && plan[to].quick &&
             !plan[to].end && frames.size() < (256u << 10));
    if (!send(frames, plan[i].timeout_ms)) {
      ends[i] = lost_handler(plan[i].timeout_ms);
      return ends;
    }
    if (!receive(plan, i, to, ends, leases, on_slow)) return ends;
    i = to;
  }
  return ends;
}

bool Warmed::send(const std::string& frames, Millis timeout_ms) {
  // The handler answers while it reads, so replies are taken in between: two
  // full sockets would wait for each other.
  std::size_t at = 0;
  const auto deadline = Steady::now() + milliseconds(timeout_ms);
  while (at < frames.size()) {
    const ssize_t n = ::send(socket_, frames.data() + at, frames.size() - at,
                             MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      at += static_cast<std::size_t>(n);
      continue;
    }
    if (n < 0 && errno != EAGAIN && errno != EINTR) return false;
    pollfd item{socket_, POLLIN | POLLOUT, 0};
    ::poll(&item, 1, 1000);
    if ((item.revents & POLLIN) != 0) {
      char buffer[64 << 10];
      const ssize_t got = ::recv(socket_, buffer, sizeof buffer, MSG_DONTWAIT);
      if (got == 0) return false;
      if (got > 0) in_.append(buffer, static_cast<std::size_t>(got));
    }
    if (Steady::now() >= deadline) return false;
  }
  return true;
}

namespace {

// Nothing: no outcome that this worker knows.
std::optional<End> end_of(kinds::HandlerOutcome outcome, const Lease& lease,
                          std::string message, std::string result) {
  using kinds::HandlerOutcome;
  End end;
  switch (outcome) {
    case HandlerOutcome::pass:
    case HandlerOutcome::verdict:
      if (outcome == HandlerOutcome::verdict) end.code = EndCode::verdict;
      end.message = std::move(message);
      end.result = std::move(result);
      return end;
    case HandlerOutcome::failed:
      return kinds::failed(EndCode::exit, std::move(message));
    case HandlerOutcome::bad_payload:
      return kinds::failed(EndCode::invalid_payload, std::move(message));
    case HandlerOutcome::unknown_kind:
      return kinds::not_served(lease.kind);
  }
  return std::nullopt;
}

}  // namespace

// One whole answer off the front of in_, if it is there.
Warmed::Took Warmed::take_answer(End& end, const Planned& job) {
  kinds::HandlerAnswer head;
  if (in_.size() < sizeof head) return Took::nothing;
  std::memcpy(&head, in_.data(), sizeof head);
  const bool bounded = head.sequence == job.sequence &&
                       head.message_bytes <= kMessageBytesMax &&
                       head.result_bytes <= kinds::kHandlerResultBytesMax;
  const std::size_t whole =
      sizeof head + head.message_bytes + head.result_bytes;
  if (bounded && in_.size() < whole) return Took::nothing;
  std::optional<End> made;
  if (bounded) {
    const std::size_t result_at = sizeof head + head.message_bytes;
    made = end_of(head.outcome, *job.lease,
                  in_.substr(sizeof head, head.message_bytes),
                  in_.substr(result_at, head.result_bytes));
  }
  // A built-in is our own code. Another program's result could spoil the body
  // in which the ends of the whole batch travel.
  if (made && !group_->program.argv.empty() && !made->result.empty() &&
      !kinds::whole_json(made->result)) {
    made = kinds::failed(EndCode::sandbox, "the handler's result is no JSON");
    made->retry = false;
  }
  if (!made) {
    end = kinds::failed(EndCode::sandbox, "the handler answered out of turn");
    return Took::nonsense;
  }
  end = std::move(*made);
  in_.erase(0, whole);
  return Took::answer;
}

bool Warmed::receive(const std::vector<Planned>& plan, std::size_t from,
                     std::size_t to, Ends& ends,
                     const std::vector<Lease>& leases, const OnSlow& on_slow) {
  auto start = Steady::now();
  bool told = false;
  for (std::size_t i = from; i < to;) {
    End end;
    if (const Took took = take_answer(end, plan[i]); took != Took::nothing) {
      end.usage.shared = true;
      end.usage.wall_ms = since(start);
      ends[i] = std::move(end);
      if (took == Took::nonsense) {
        close();
        return false;
      }
      start = Steady::now();
      ++i;
      continue;
    }
    const Millis ran = since(start);
    if (ran >= plan[i].timeout_ms) {
      close();
      ends[i] = kinds::failed(
          EndCode::timeout,
          "ran longer than " + std::to_string(plan[i].timeout_ms) + " ms");
      ends[i]->usage.wall_ms = ran;
      return false;
    }
    if (ran >= kSlowMs && !told && to == from + 1) {
      told = true;
      on_slow(i, ends);
    }
    pollfd items[2] = {{socket_, POLLIN, 0}, {heartbeat_.wake_fd(), POLLIN, 0}};
    const Millis wait =
        std::min(plan[i].timeout_ms - ran,
                 told || to != from + 1 ? Millis{1000} : kSlowMs - ran);
    ::poll(items, 2, static_cast<int>(std::max<Millis>(wait, 1)));
    if ((items[1].revents & POLLIN) != 0) {
      const Stop stop = heartbeat_.stop_of(leases[i].token);
      if (stop != Stop::none) {
        close();
        if (stop == Stop::cancelled) {
          ends[i] = kinds::failed(EndCode::cancelled, "cancelled");
          ends[i]->usage.wall_ms = since(start);
        }
        return false;
      }
      // Another lease's alarm: it waits its turn, and this one goes on.
      if (items[0].revents == 0) ::poll(items, 1, 5);
    }
    if (items[0].revents == 0) continue;
    char buffer[64 << 10];
    const ssize_t n = ::recv(socket_, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n > 0) {
      in_.append(buffer, static_cast<std::size_t>(n));
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
      ends[i] = lost_handler(plan[i].timeout_ms);
      ends[i]->usage.wall_ms = since(start);
      return false;
    }
  }
  return true;
}

// The handler's socket has ended: how did it die?
End Warmed::lost_handler(Millis timeout_ms) {
  const sandbox::StepResult died = session_->wait_service(3000);
  EndCode code = kinds::code_of(died.ended);
  if (code == EndCode::none) code = EndCode::exit;
  End end = kinds::failed(
      code, "the handler's process " +
                kinds::describe(died, group_->limits, timeout_ms));
  close();
  return end;
}

}  // namespace machina
