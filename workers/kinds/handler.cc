#include "workers/kinds/handler.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "queue/base/fd.h"

namespace machina::kinds {
namespace {

template <class T>
void append_struct(std::string& out, const T& value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// One job. `made` is kept from call to call for its memory.
void answer(std::span<const Handler> handlers, const HandlerCall& call,
            std::string_view kind, std::string_view payload,
            HandlerOutput& made, std::string& out) {
  made.outcome = HandlerOutcome::pass;
  made.message.clear();
  made.result.clear();
  const auto found =
      std::find_if(handlers.begin(), handlers.end(),
                   [&](const Handler& one) { return one.kind == kind; });
  if (found != handlers.end()) {
    found->handle({payload, static_cast<int>(call.attempt)}, made);
  } else {
    made.outcome = HandlerOutcome::unknown_kind;
  }
  if (made.result.size() > kHandlerResultBytesMax) {
    made.outcome = HandlerOutcome::failed;
    made.message = "the result has more than " +
                   std::to_string(kHandlerResultBytesMax) + " bytes";
    made.result.clear();
  }
  if (made.message.size() > kMessageBytesMax) {
    made.message.resize(kMessageBytesMax);
  }
  append_struct(out,
                HandlerAnswer{call.sequence, made.outcome,
                              static_cast<std::uint32_t>(made.message.size()),
                              static_cast<std::uint32_t>(made.result.size())});
  out += made.message;
  out += made.result;
}

}  // namespace

void append_call(std::string& out, std::uint32_t sequence, int attempt,
                 std::string_view kind, std::string_view payload) {
  append_struct(out, HandlerCall{sequence, static_cast<std::uint32_t>(attempt),
                                 static_cast<std::uint32_t>(kind.size()),
                                 static_cast<std::uint32_t>(payload.size())});
  out += kind;
  out += payload;
}

// Reads as much as there is and answers what is whole, so that a pipelined run
// costs one read and one write.
int serve_handlers(std::span<const Handler> handlers, int in_fd, int out_fd) {
  std::string in, out;
  HandlerOutput made;
  char buffer[64 << 10];
  for (;;) {
    const ssize_t n = ::read(in_fd, buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n == 0 ? 0 : 1;
    in.append(buffer, static_cast<std::size_t>(n));
    std::size_t at = 0;
    HandlerCall call;
    while (in.size() - at >= sizeof call) {
      std::memcpy(&call, in.data() + at, sizeof call);
      if (call.kind_bytes > kKindBytesMax ||
          call.payload_bytes > kPayloadBytesMax) {
        return 2;
      }
      const std::size_t whole =
          sizeof call + call.kind_bytes + call.payload_bytes;
      if (in.size() - at < whole) {
        // A large payload: the rest of it comes next, and nothing else does.
        const std::size_t have = in.size() - at;
        in.resize(at + whole);
        if (!read_all(in_fd, in.data() + at + have, whole - have)) return 1;
      }
      const std::string_view text(in);
      answer(
          handlers, call, text.substr(at + sizeof call, call.kind_bytes),
          text.substr(at + sizeof call + call.kind_bytes, call.payload_bytes),
          made, out);
      at += whole;
      if (out.size() > sizeof buffer) {
        if (!write_all(out_fd, out)) return 1;
        out.clear();
      }
    }
    in.erase(0, at);
    if (!write_all(out_fd, out)) return 1;
    out.clear();
  }
}

}  // namespace machina::kinds
