#include "workers/worker/warmed.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "workers/kinds/noop.h"

namespace machina {

using kinds::End;
using std::chrono::milliseconds;
using Steady = std::chrono::steady_clock;

struct Warmed::Planned {
  std::optional<End> end;  // decided without the handler
  kinds::NoopPayload payload;
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
  in_.clear();
}

Result<void> Warmed::open() {
  if (socket_ >= 0) return {};
  close();
  sandbox::SessionSpec spec;
  spec.limits = kind_.limits;
  spec.min_level = level_;
  auto session = slot_.open(spec);
  if (!session) return session.error();
  auto socket = (*session)->start_service(sandbox::BuiltinId::noop);
  if (!socket) return socket.error();
  session_ = std::move(*session);
  socket_ = *socket;
  return {};
}

Warmed::Ends Warmed::run(const std::vector<Lease>& leases,
                         const OnSlow& on_slow) {
  Ends ends(leases.size());
  std::vector<Planned> plan(leases.size());
  for (std::size_t i = 0; i < leases.size(); ++i) {
    const Lease& lease = leases[i];
    Planned& p = plan[i];
    sandbox::Limits limits = kind_.limits;
    Level required = required_;
    auto payload = kinds::parse_noop(lease.payload);
    if (!payload) {
      p.end = kinds::failed(EndCode::invalid_payload, payload.error().what);
      continue;
    }
    if (auto fits = kinds::apply_sandbox(lease.sandbox, limits, required);
        !fits) {
      const bool invalid = fits.error().code == Code::invalid;
      p.end = kinds::failed(
          invalid ? EndCode::invalid_payload : EndCode::isolation_unavailable,
          fits.error().what);
      p.end->retry = false;
      continue;
    }
    if (required > level_) {
      p.end =
          kinds::failed(EndCode::isolation_unavailable,
                        "needs " + kinds::level_name(required) +
                            ", this worker gives " + kinds::level_name(level_));
      continue;
    }
    p.payload = *payload;
    p.payload.request.sequence = ++sequence_;
    p.payload.request.attempt = static_cast<std::uint32_t>(lease.attempt);
    p.timeout_ms = lease.timeout_ms > 0 ? lease.timeout_ms : kind_.timeout_ms;
    p.quick = p.payload.request.sleep_ms == 0 && p.payload.request.crash == 0;
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
    if (auto opened = open(); !opened) {
      ends[i] = kinds::failed(EndCode::sandbox, opened.error().what);
      // The others go back and may come again at once: not in a busy loop.
      std::this_thread::sleep_for(milliseconds(100));
      return ends;
    }
    std::string frames;
    std::size_t to = i;
    do {
      kinds::append_frame(frames, plan[to].payload);
      ++to;
    } while (plan[i].quick && to < leases.size() && plan[to].quick &&
             !plan[to].end && frames.size() < (256u << 10));
    if (!send(frames)) {
      ends[i] = lost_handler();
      return ends;
    }
    if (!receive(plan, i, to, ends, leases, on_slow)) return ends;
    i = to;
  }
  return ends;
}

bool Warmed::send(const std::string& frames) {
  // The handler answers while it reads, so replies are taken in between: two
  // full sockets would wait for each other.
  std::size_t at = 0;
  const auto deadline = Steady::now() + milliseconds(kind_.timeout_ms);
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

// One whole reply off the front of in_, if it is there.
bool Warmed::take_reply(End& end, std::uint32_t sequence) {
  kinds::NoopReply reply;
  if (in_.size() < sizeof reply) return false;
  std::memcpy(&reply, in_.data(), sizeof reply);
  if (reply.sequence != sequence ||
      reply.result_bytes > kinds::kNoopReplyBytesMax) {
    end = kinds::failed(EndCode::sandbox, "the handler answered out of turn");
    return true;
  }
  if (in_.size() < sizeof reply + reply.result_bytes) return false;
  switch (reply.outcome) {
    case kinds::NoopOutcome::exit:
      end = kinds::failed(EndCode::exit, "failed as asked (fail_attempts)");
      break;
    case kinds::NoopOutcome::verdict:
      end.code = EndCode::verdict;
      end.message = "failed as asked (fail)";
      [[fallthrough]];
    default:
      end.result = in_.substr(sizeof reply, reply.result_bytes);
  }
  in_.erase(0, sizeof reply + reply.result_bytes);
  return true;
}

bool Warmed::receive(const std::vector<Planned>& plan, std::size_t from,
                     std::size_t to, Ends& ends,
                     const std::vector<Lease>& leases, const OnSlow& on_slow) {
  auto start = Steady::now();
  bool told = false;
  for (std::size_t i = from; i < to;) {
    End end;
    if (take_reply(end, plan[i].payload.request.sequence)) {
      const bool broken = end.code == EndCode::sandbox;
      end.usage.shared = true;
      end.usage.wall_ms = since(start);
      ends[i] = std::move(end);
      if (broken) {
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
      ends[i] = lost_handler();
      ends[i]->usage.wall_ms = since(start);
      return false;
    }
  }
  return true;
}

// The handler's socket has ended: how did it die?
End Warmed::lost_handler() {
  const sandbox::StepResult died = session_->wait_service(3000);
  EndCode code = kinds::code_of(died.ended);
  if (code == EndCode::none) code = EndCode::exit;
  End end = kinds::failed(
      code, "the handler's process " +
                kinds::describe(died, kind_.limits, kind_.timeout_ms));
  close();
  return end;
}

}  // namespace machina
