#include "workers/worker/sandbox_counts.h"

#include <chrono>
#include <csignal>

#include "queue/base/json.h"

namespace machina {
namespace {

using sandbox::Ended;

// Runs its session and counts how steps end.
class CountedSession final : public sandbox::Session {
 public:
  CountedSession(CountedSlot& slot, std::unique_ptr<sandbox::Session> session)
      : slot_(slot), session_(std::move(session)) {}

  sandbox::StepResult run(const sandbox::Step& step,
                          const sandbox::Watch& watch) override {
    return counted(session_->run(step, watch));
  }
  Result<int> start_service(const sandbox::Step& program) override {
    return session_->start_service(program);
  }
  sandbox::StepResult wait_service(Millis timeout_ms) override {
    return counted(session_->wait_service(timeout_ms));
  }
  Result<void> put(const std::string& path, std::string_view bytes) override {
    return session_->put(path, bytes);
  }
  Result<std::string> collect(const std::string& path,
                              std::size_t max_bytes) override {
    return session_->collect(path, max_bytes);
  }

 private:
  sandbox::StepResult counted(sandbox::StepResult step) {
    slot_.ended(step);
    return step;
  }
  CountedSlot& slot_;
  std::unique_ptr<sandbox::Session> session_;
};

// The index in kDenied; -1: nothing was stopped.
int denied_by(const sandbox::StepResult& step) {
  switch (step.ended) {
    case Ended::timeout:
      return 0;
    case Ended::oom:
      return 1;
    case Ended::pids:
      return 2;
    case Ended::disk:
      return 3;
    case Ended::output:
      return 4;
    case Ended::signalled:  // SIGSYS is the filter's alone
      return step.signal == SIGSYS ? 5 : -1;
    case Ended::isolation:
      return 6;
    case Ended::exited:
    case Ended::cancelled:
    case Ended::failed:
      break;
  }
  return -1;
}

bool count(const JsonValue& value, std::uint64_t* into) {
  const auto number = json::integer(value);
  if (!number || *number < 0) return false;
  *into = static_cast<std::uint64_t>(*number);
  return true;
}

}  // namespace

void SandboxCounts::add(const SandboxCounts& other) {
  for (std::size_t i = 0; i < starts.size(); ++i) starts[i] += other.starts[i];
  for (std::size_t i = 0; i < denied.size(); ++i) denied[i] += other.denied[i];
  starts_us += other.starts_us;
  log_dropped += other.log_dropped;
}

void SandboxCounts::started(std::uint64_t took_us) {
  ++starts[bucket_of(static_cast<double>(took_us) / 1e6)];
  starts_us += took_us;
}

void SandboxCounts::ended(const sandbox::StepResult& step) {
  const int at = denied_by(step);
  if (at >= 0) ++denied[static_cast<std::size_t>(at)];
}

std::string SandboxCounts::json() const {
  std::string out = "{\"starts\":[";
  for (std::size_t i = 0; i < starts.size(); ++i) {
    if (i > 0) out += ',';
    out += std::to_string(starts[i]);
  }
  out += "],\"starts_us\":" + std::to_string(starts_us) + ",\"denied\":{";
  for (std::size_t i = 0; i < denied.size(); ++i) {
    if (i > 0) out += ',';
    out.append("\"").append(kDenied[i]).append("\":");
    out += std::to_string(denied[i]);
  }
  return out + "},\"log_dropped\":" + std::to_string(log_dropped) + "}";
}

Result<SandboxCounts> SandboxCounts::parse(std::string_view text) {
  SandboxCounts out;
  std::size_t at = 0;
  const bool good = json::members(text, [&](auto key, auto value) {
    if (key == "starts") {
      return json::elements(value, [&](auto number) {
        return at < out.starts.size() && count(number, &out.starts[at++]);
      });
    }
    if (key == "starts_us") return count(value, &out.starts_us);
    if (key == "log_dropped") return count(value, &out.log_dropped);
    if (key != "denied") return false;
    return json::members(value, [&](auto what, auto number) {
      for (std::size_t i = 0; i < kDenied.size(); ++i) {
        if (kDenied[i] == what) return count(number, &out.denied[i]);
      }
      return false;
    });
  });
  if (!good || at != out.starts.size()) {
    return Error{Code::invalid, "sandbox counts are malformed"};
  }
  return out;
}

Result<std::unique_ptr<sandbox::Session>> CountedSlot::open(
    const sandbox::SessionSpec& spec) {
  using std::chrono::steady_clock;
  const auto begun = steady_clock::now();
  auto session = slot_.open(spec);
  if (!session) return session;
  const auto took = std::chrono::duration_cast<std::chrono::microseconds>(
      steady_clock::now() - begun);
  {
    const std::lock_guard lock(mutex_);
    counts_.started(static_cast<std::uint64_t>(took.count()));
  }
  return std::unique_ptr<sandbox::Session>(
      std::make_unique<CountedSession>(*this, std::move(*session)));
}

SandboxCounts CountedSlot::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(counts_, {});
}

void CountedSlot::put_back(const SandboxCounts& counts) {
  const std::lock_guard lock(mutex_);
  counts_.add(counts);
}

void CountedSlot::ended(const sandbox::StepResult& step) {
  const std::lock_guard lock(mutex_);
  counts_.ended(step);
}

}  // namespace machina
