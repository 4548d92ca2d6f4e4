#include "tests/workers/kinds/probe/probe.h"

#include <random>

#include "workers/kinds/handler.h"
#include "workers/kinds/run.h"

namespace machina {
namespace {

constexpr char kHandler[] = "probe";

// The frames of workers/kinds/handler.h in another language.
constexpr char kProgram[] = R"py(
import os, struct, sys
def read(n):
    got = b''
    while len(got) < n:
        piece = os.read(0, n - len(got))
        if not piece: sys.exit(0)
        got += piece
    return got
process = os.urandom(8).hex().encode()
while True:
    sequence, attempt, kind, payload = struct.unpack('=4I', read(16))
    read(kind)
    payload = read(payload)
    result = b'{"process":"%s","payload":%s}' % (process, payload)
    if b'garbage' in payload: result = b'}{'
    os.write(1, struct.pack('=4I', sequence, 0, 0, len(result)) + result)
)py";

void handle(const kinds::HandlerInput& in, kinds::HandlerOutput& out) {
  static const std::string process = std::to_string(std::random_device{}());
  out.result = "{\"process\":\"" + process +
               "\",\"payload\":" + std::string(in.payload) + "}";
}

int handler(int in_fd, int out_fd) {
  static constexpr kinds::Handler kHandlers[] = {{"probe.warm", handle},
                                                 {"probe.also", handle}};
  return kinds::serve_handlers(kHandlers, in_fd, out_fd);
}

kinds::End run_box(const kinds::Attempt& attempt, kinds::Host& host) {
  sandbox::SessionSpec spec;
  spec.limits = attempt.limits;
  spec.min_level = attempt.required;
  auto session = host.open(spec);
  if (!session) return kinds::failed(EndCode::sandbox, session.error().what);
  sandbox::Step step;
  step.argv = {"/usr/bin/echo", "probed"};
  const auto ran = (*session)->run(step, host.watch());
  kinds::End end;
  end.usage.add(ran);
  end.code = kinds::code_of(ran.ended);
  end.result = ran.out == "probed\n" ? "{\"probed\":true}" : "null";
  return end;
}

Checked<Kind::Kept> check(const std::string& payload) {
  if (payload.find("wrong") != payload.npos) {
    return BadField{"wrong", "this kind has no such member"};
  }
  return Kind::Kept{};
}

Checked<Kind::Kept> resolve(const std::string& payload) {
  if (payload.find("missing") != payload.npos) {
    return BadField{"missing", "this host has none"};
  }
  return Kind::Kept{R"({"resolved":true})", ""};
}

Kind warmed(const char* name, std::shared_ptr<const HandlerGroup> group) {
  Kind kind;
  kind.name = name;
  kind.check = check;
  kind.group = std::move(group);
  return kind;
}

}  // namespace

Family probe_family(const KindSettings&) {
  HandlerGroup built_in, own;
  built_in.program.builtin = kHandler;
  built_in.limits = {256, 1, 4, 0, 1 << 20};
  own.program.argv = {"/usr/bin/python3", "-S", "-c", kProgram};
  own.limits = {256, 1, 4, 0, 1 << 20};
  const auto group = std::make_shared<const HandlerGroup>(std::move(built_in));
  Kind box;
  box.name = "probe.box";
  box.check = check;
  box.resolve = resolve;
  box.limits = {256, 16, 16, 0, 1 << 20};
  box.run = run_box;
  return {{std::move(box), warmed("probe.warm", group),
           warmed("probe.also", group), warmed("probe.unknown", group),
           warmed("probe.own",
                  std::make_shared<const HandlerGroup>(std::move(own)))},
          {{kHandler, handler}}};
}

}  // namespace machina
