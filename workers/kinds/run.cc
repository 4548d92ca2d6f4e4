#include "workers/kinds/run.h"

#include <algorithm>

#include "queue/base/json.h"
#include "queue/base/utf8.h"

namespace machina::kinds {

using sandbox::Ended;

std::vector<std::string> trace_variables(const Attempt& attempt) {
  std::vector<std::string> all;
  if (!attempt.traceparent.empty()) {
    all.push_back("TRACEPARENT=" + attempt.traceparent);
  }
  if (!attempt.request_id.empty()) {
    all.push_back("JOB_REQUEST_ID=" + attempt.request_id);
  }
  return all;
}

void Usage::add(const sandbox::StepResult& step) {
  wall_ms += step.wall_ms;
  cpu_ms += step.cpu_ms;
  max_rss_bytes = std::max(max_rss_bytes, step.max_rss_bytes);
  disk_bytes = std::max(disk_bytes, step.disk_bytes);
  output_bytes += step.output_bytes;
}

void Usage::add(const Usage& part) {
  wall_ms += part.wall_ms;
  cpu_ms += part.cpu_ms;
  max_rss_bytes = std::max(max_rss_bytes, part.max_rss_bytes);
  disk_bytes = std::max(disk_bytes, part.disk_bytes);
  output_bytes += part.output_bytes;
}

std::string Usage::json() const {
  if (shared) {
    return "{\"wall_ms\":" + std::to_string(wall_ms) +
           ",\"cpu_ms\":\"unavailable\",\"max_rss_bytes\":\"unavailable\","
           "\"disk_bytes\":\"unavailable\","
           "\"output_bytes\":\"unavailable\"}";
  }
  return "{\"wall_ms\":" + std::to_string(wall_ms) +
         ",\"cpu_ms\":" + std::to_string(cpu_ms) +
         ",\"max_rss_bytes\":" + std::to_string(max_rss_bytes) +
         ",\"disk_bytes\":" + std::to_string(disk_bytes) +
         ",\"output_bytes\":" + std::to_string(output_bytes) + "}";
}

End failed(EndCode code, std::string message) {
  End end;
  end.code = code;
  end.message = std::move(message);
  end.retry = code != EndCode::invalid_payload;
  return end;
}

End bad_payload(const BadField& problem) {
  return failed(EndCode::invalid_payload, problem.text());
}

End not_served(const std::string& kind) {
  return failed(EndCode::sandbox, "kind " + kind + " is not served here");
}

End bad_sandbox(const Error& refused) {
  End end =
      failed(refused.code == Code::invalid ? EndCode::invalid_payload
                                           : EndCode::isolation_unavailable,
             refused.what);
  end.retry = false;
  return end;
}

End too_weak(Level required, Level given) {
  return failed(EndCode::isolation_unavailable,
                "needs " + level_name(required) + ", this worker gives " +
                    level_name(given));
}

EndCode code_of(Ended ended) {
  switch (ended) {
    case Ended::exited:
      return EndCode::none;
    case Ended::signalled:
      return EndCode::signal;
    case Ended::timeout:
      return EndCode::timeout;
    case Ended::oom:
      return EndCode::oom;
    case Ended::pids:
      return EndCode::pids;
    case Ended::disk:
      return EndCode::disk;
    case Ended::output:
      return EndCode::output;
    case Ended::cancelled:
      return EndCode::cancelled;
    case Ended::isolation:
      return EndCode::isolation_unavailable;
    case Ended::failed:
      return EndCode::sandbox;
  }
  return EndCode::sandbox;
}

EndCode code_of_put(const Error& error) {
  switch (error.code) {
    case Code::full:
    case Code::too_large:
      return EndCode::disk;
    case Code::invalid:
    case Code::not_found:
      return EndCode::invalid_payload;
    default:
      return EndCode::sandbox;
  }
}

namespace {

template <std::size_t N>
bool says_one_of(const std::string& err, const char* const (&signs)[N]) {
  return std::any_of(std::begin(signs), std::end(signs), [&](auto* sign) {
    return err.find(sign) != std::string::npos;
  });
}

}  // namespace

bool passing_trouble(const std::string& err) {
  static constexpr const char* kSigns[] = {"No space left",
                                           "annot allocate memory",
                                           "ut of memory",
                                           "Resource temporarily unavailable",
                                           "Input/output error",
                                           "unable to create temporary",
                                           "Too many open files",
                                           "died of signal",
                                           "early EOF",
                                           "hung up",
                                           "unexpected disconnect",
                                           "inflate returned"};
  return says_one_of(err, kSigns);
}

EndCode code_of_git(const sandbox::StepResult& ran) {
  // What git says of a repository that holds what it cannot read or check out.
  static constexpr const char* kSigns[] = {"bad object",
                                           "not a valid object",
                                           "corrupt",
                                           "missing blob",
                                           "missing tree",
                                           "missing commit",
                                           "unable to read",
                                           "ould not read",
                                           "invalid path",
                                           "File name too long",
                                           "BOM is required",
                                           "failed to encode",
                                           "Permission denied",
                                           "unable to create file",
                                           "unable to checkout",
                                           "not a git repository",
                                           "bad revision",
                                           "unknown revision",
                                           "dubious ownership",
                                           "is empty"};
  if (ran.err.find("No space left") != std::string::npos) return EndCode::disk;
  // A signal's: somebody killed git, which says nothing about the repository.
  if (ran.exit_code > 128 || passing_trouble(ran.err)) return EndCode::sandbox;
  return says_one_of(ran.err, kSigns) ? EndCode::invalid_payload
                                      : EndCode::sandbox;
}

std::string describe(const sandbox::StepResult& step,
                     const sandbox::Limits& limits, Millis timeout_ms) {
  const auto mib = [](std::uint64_t n) { return std::to_string(n) + " MiB"; };
  std::string text;
  switch (step.ended) {
    case Ended::exited:
      text = "exited with " + std::to_string(step.exit_code);
      break;
    case Ended::signalled:
      text = "killed by signal " + std::to_string(step.signal);
      break;
    case Ended::timeout:
      text = "ran longer than " + std::to_string(timeout_ms) + " ms";
      if (limits.cpu_ms > 0) {
        text += " or used more than " + std::to_string(limits.cpu_ms) +
                " ms of processor time";
      }
      break;
    case Ended::oom:
      // Of a cgroup, which counts the workspace's files too.
      if (step.detail == sandbox::kDetailOwnMemory) {
        return "over its memory limit of " + mib(limits.memory_mb) +
               " (memory_mb)";
      }
      if (step.detail == sandbox::kDetailSockets) {
        return "over the memory that its sockets may hold";
      }
      text = "over its memory limit of " +
             mib(limits.memory_mb + limits.disk_mb) + " (memory_mb " +
             std::to_string(limits.memory_mb) + " + disk_mb " +
             std::to_string(limits.disk_mb) + ", files included)";
      break;
    case Ended::pids:
      text = "over its limit of " + std::to_string(limits.pids) + " processes";
      break;
    case Ended::disk:
      if (step.detail == sandbox::kDetailInodes) {
        return "out of inodes: " +
               std::to_string(sandbox::inodes_max(limits.disk_mb)) +
               " files and directories at most with disk_mb " +
               std::to_string(limits.disk_mb);
      }
      text = "over its disk limit of " + mib(limits.disk_mb);
      break;
    case Ended::output:
      text = "wrote more than 16 times " + std::to_string(limits.output_bytes) +
             " bytes of output";
      break;
    case Ended::cancelled:
      text = "cancelled";
      break;
    case Ended::isolation:
      text = "the sandbox is weaker than required";
      break;
    case Ended::failed:
      text = "the sandbox failed";
      break;
  }
  if (!step.detail.empty()) text += ": " + step.detail;
  return text;
}

std::string level_name(Level level) { return "L" + std::to_string(level); }

namespace {

// A positive integer member; false with `problem` set where it is not.
bool limit(std::string_view key, const JsonValue& value, std::uint64_t least,
           std::uint64_t& into, std::string& problem,
           std::uint64_t most = std::uint64_t{1} << 62) {
  const auto number = json::integer(value);
  if (!number || *number < static_cast<std::int64_t>(least) ||
      *number > static_cast<std::int64_t>(most)) {
    problem = "sandbox." + std::string(key) + ": " + std::string(value.raw()) +
              " is not an integer of at least " + std::to_string(least);
    if (most < std::uint64_t{1} << 62) {
      problem += " and at most " + std::to_string(most);
    }
    return false;
  }
  into = static_cast<std::uint64_t>(*number);
  return true;
}

}  // namespace

Result<void> apply_sandbox(const std::string& text, sandbox::Limits& limits,
                           Level& required) {
  if (text.empty() || text == "null") return {};
  std::string problem;
  bool net = false;
  const bool good = json::members(text, [&](auto key, auto value) {
    constexpr std::uint64_t kMost = sandbox::kMegabytesMax;
    if (key == "memory_mb") {
      return limit(key, value, 1, limits.memory_mb, problem, kMost);
    }
    if (key == "disk_mb") {
      return limit(key, value, 1, limits.disk_mb, problem, kMost);
    }
    if (key == "pids") {
      return limit(key, value, 1, limits.pids, problem, sandbox::kPidsMax);
    }
    if (key == "cpu_ms") return limit(key, value, 0, limits.cpu_ms, problem);
    if (key == "output_bytes") {
      return limit(key, value, 1, limits.output_bytes, problem);
    }
    if (key == "min_level") {
      const std::string_view raw = value.raw();
      if (raw.size() == 4 && raw[1] == 'L' && raw[2] >= '0' && raw[2] <= '4') {
        required = static_cast<Level>(raw[2] - '0');
        return true;
      }
    } else if (key == "profile") {
      if (value.raw() == "\"strict\"") return true;
      net = value.raw() == "\"net\"";
      if (net) return true;
    } else if (key == "allow_hosts") {
      net = net || value.raw() != "[]";
      return true;
    }
    problem = "sandbox." + std::string(key) + ": " + std::string(value.raw()) +
              " is not understood by this worker";
    return false;
  });
  if (!problem.empty()) return Error{Code::invalid, problem};
  if (!good) return Error{Code::invalid, "sandbox: not an object"};
  if (net) {
    return Error{Code::unavailable,
                 "sandbox.profile: \"net\" is not available: this worker has "
                 "no egress proxy, and a job without one gets no network"};
  }
  return {};
}

std::string head_and_tail(std::string_view text, std::size_t bytes_max) {
  if (text.size() <= bytes_max) return std::string(text);
  const std::string_view head = utf8_head(text, bytes_max / 2);
  const std::string_view tail = utf8_tail(text, bytes_max / 2);
  return std::string(head) + "\n[... " +
         std::to_string(text.size() - head.size() - tail.size()) +
         " bytes are missing ...]\n" + std::string(tail);
}

}  // namespace machina::kinds
