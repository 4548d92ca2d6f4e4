// tests/bench/noop_worker.cc
//
// A worker process of no work: leases many jobs, completes them all and leases
// again in the same trip (POST /v1/leases/complete), one keep-alive connection.
// Ends when it has met --idle-ms without a job after its first one. Prints one
// line: how many it completed and when (monotonic) the first was leased and
// the last completion was answered.

#include <unistd.h>

#include "http_client.h"

namespace {

using namespace machina::bench;

constexpr char kUsage[] =
    "usage: bench_noop_worker --port P [--name W] [--kind ext.bench] [--max 64]"
    "\n  [--idle-ms 1500] [--patience-ms 20000] [--header 'Name: value']...";

constexpr std::string_view kTokenKey = "\"token\":\"";

// The tokens of the leases in an answer. Only a lease has a member "token"
// beside its own "fence"; items of the completion carry one too, so the search
// starts at "leases".
std::vector<std::string> tokens(std::string_view body) {
  std::vector<std::string> found;
  std::size_t at = body.find("\"leases\"");
  while (at != std::string_view::npos) {
    at = body.find(kTokenKey, at);
    if (at == std::string_view::npos) break;
    at += kTokenKey.size();
    std::size_t end = body.find('"', at);
    if (end == std::string_view::npos) break;
    found.emplace_back(body.substr(at, end - at));
    at = end;
  }
  return found;
}

std::size_t count(std::string_view body, std::string_view text) {
  std::size_t n = 0;
  for (std::size_t at = body.find(text); at != std::string_view::npos;
       at = body.find(text, at + text.size())) {
    ++n;
  }
  return n;
}

}  // namespace

int main(int argc, char** argv) {
  Options options(argc, argv, kUsage);
  int port = static_cast<int>(options.number("port", 0));
  if (port <= 0) fail(kUsage);
  const auto headers = options.all("header");
  const double idle =
      static_cast<double>(options.number("idle-ms", 1500)) / 1e3;
  const double patience =
      static_cast<double>(options.number("patience-ms", 20000)) / 1e3;
  const std::string lease =
      R"({"worker":")" +
      options.text("name", "bench-" + std::to_string(getpid())) +
      R"(","kinds":[")" + options.text("kind", "ext.bench") + R"("],"max":)" +
      std::to_string(options.number("max", 64)) + R"(,"wait_ms":100})";
  const std::string ask = request("POST", "/v1/leases", headers, lease);

  int fd = connect_loopback(port);
  Answer answer;
  long completed = 0, trips = 0;
  double first = 0, last = 0, start = now();
  std::vector<std::string> held;
  for (;;) {
    if (held.empty()) {
      round_trip(fd, ask, answer);
      if (answer.status() != 200 && answer.status() != 204) {
        fail("lease: " + std::to_string(answer.status()) + " " +
             std::string(answer.body().substr(0, 600)));
      }
      if (answer.status() == 200) held = tokens(answer.body());
      if (held.empty()) {
        double quiet = now() - (last > 0 ? last : start);
        if (quiet > (last > 0 ? idle : patience)) break;
        continue;
      }
      if (first == 0) first = now();
    }
    std::string body = R"({"items":[)";
    for (std::size_t i = 0; i < held.size(); ++i) {
      body += (i == 0 ? R"({"token":")" : R"(,{"token":")") + held[i] + R"("})";
    }
    body += R"(],"lease":)" + lease + "}";
    round_trip(fd, request("POST", "/v1/leases/complete", headers, body),
               answer);
    if (answer.status() != 200) {
      fail("complete: " + std::to_string(answer.status()) + " " +
           std::string(answer.body().substr(0, 600)));
    }
    std::size_t ended = count(answer.body(), "\"state\":\"succeeded\"");
    if (ended != held.size()) {
      fail("complete: " + std::to_string(ended) + " of " +
           std::to_string(held.size()) +
           " ended: " + std::string(answer.body().substr(0, 600)));
    }
    completed += static_cast<long>(ended);
    ++trips;
    last = now();
    held = tokens(answer.body());
  }
  std::printf("completed=%ld trips=%ld first=%.6f last=%.6f\n", completed,
              trips, first, last);
  return completed > 0 ? 0 : 1;
}
