#include "workers/kinds/noop/noop.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include <optional>

#include "queue/base/json.h"
#include "queue/base/utf8.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/handler.h"

namespace machina::kinds {
namespace {

constexpr std::uint32_t kNoopSleepMsMax = 3'600'000;

struct NoopPayload {
  std::uint32_t sleep_ms = 0, fail_attempts = 0;
  bool fail = false, crash = false;
  std::string_view echo = "{}";  // into the payload's text
};

using Problem = std::optional<BadField>;

bool number(std::string_view key, const JsonValue& value, std::uint32_t most,
            std::uint32_t& into, Problem& problem) {
  const auto parsed = json::integer(value);
  if (!parsed || *parsed < 0 || *parsed > most) {
    problem = BadField{std::string(key),
                       std::string(utf8_head(value.raw(), 80)) +
                           " is not an integer in 0.." + std::to_string(most)};
    return false;
  }
  into = static_cast<std::uint32_t>(*parsed);
  return true;
}

bool flag(std::string_view key, const JsonValue& value, bool& into,
          Problem& problem) {
  const auto parsed = json::boolean(value);
  if (!parsed) {
    problem =
        BadField{std::string(key), std::string(utf8_head(value.raw(), 80)) +
                                       " is not true or false"};
    return false;
  }
  into = *parsed;
  return true;
}

void sleep_for(std::uint32_t ms) {
  timespec left{static_cast<time_t>(ms / 1000),
                static_cast<long>(ms % 1000) * 1'000'000};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

Checked<NoopPayload> parse_noop(std::string_view payload) {
  NoopPayload out;
  Problem problem;
  const bool good = json::members(payload, [&](auto key, auto value) {
    if (key == "echo") {
      out.echo = value.raw();
      return true;
    }
    if (key == "sleep_ms")
      return number(key, value, kNoopSleepMsMax, out.sleep_ms, problem);
    if (key == "fail_attempts")
      return number(key, value, kMaxAttemptsMax, out.fail_attempts, problem);
    if (key == "fail") return flag(key, value, out.fail, problem);
    if (key == "crash") return flag(key, value, out.crash, problem);
    problem = BadField{printable(std::string(key)),
                       "not a member of this kind's payload"};
    return false;
  });
  if (problem) return *problem;
  if (!good) return BadField{"payload", "not a JSON object"};
  return out;
}

// What a failing attempt says is its code, so it has no result.
void handle_noop(const HandlerInput& in, HandlerOutput& out) {
  const auto payload = parse_noop(in.payload);
  if (!payload) {
    out.outcome = HandlerOutcome::bad_payload;
    out.message = payload.error().text();
    return;
  }
  if (payload->crash) abort();
  if (payload->sleep_ms > 0) sleep_for(payload->sleep_ms);
  if (in.attempt <= static_cast<int>(payload->fail_attempts)) {
    out.outcome = HandlerOutcome::failed;
    out.message = "failed as asked (fail_attempts)";
    return;
  }
  if (payload->fail) {
    out.outcome = HandlerOutcome::verdict;
    out.message = "failed as asked (fail)";
  }
  out.result = "{\"echo\":";
  out.result += payload->echo;
  out.result += '}';
}

constexpr char kNoop[] = "noop";  // the kind, and its handler

}  // namespace

int noop_handler(int in_fd, int out_fd) {
  static constexpr Handler kHandlers[] = {{kNoop, handle_noop}};
  return serve_handlers(kHandlers, in_fd, out_fd);
}

Family noop_family(const KindSettings&) {
  HandlerGroup group;
  group.program.builtin = kNoop;
  group.limits = {256, 1, 4, 0, 1 << 20};  // a sandbox has a MiB at least
  Kind noop;
  noop.name = kNoop;
  noop.group = std::make_shared<const HandlerGroup>(std::move(group));
  noop.check = [](const std::string& payload) -> Checked<Kind::Kept> {
    if (auto good = parse_noop(payload); !good) return good.error();
    return Kind::Kept{};
  };
  noop.quick = [](const std::string& payload) {
    const auto good = parse_noop(payload);
    return good && good->sleep_ms == 0 && !good->crash;
  };
  return {{std::move(noop)}, {{kNoop, noop_handler}}};
}

}  // namespace machina::kinds
