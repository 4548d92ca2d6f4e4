// tests/bench/json_read.cc
//
// How long one parse takes: queue/base/json.h's JsonDoc against nlohmann::json
// (a tree, and accept(), which builds none), in alternating rounds. Three
// texts: a request with a job, a payload of 16 KiB, a worker's answer with 64
// leases.
//
//   json_read [rounds]

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "queue/base/json.h"

namespace {

using namespace machina;

std::string job_body() {
  std::string out;
  JsonWriter json(out);
  json.begin_object();
  json.key("kind").string("tool.shell").key("queue").string("default");
  json.key("priority").number(5).key("timeout_ms").number(30'000);
  json.key("labels").begin_object();
  json.key("repo").string("payments").key("run").string("2026-11-20");
  json.end_object().key("payload").begin_object().key("argv").begin_array();
  json.string("/usr/bin/python3").string("-m").string("pytest").string("-q");
  json.string("tests/test_ledger.py").end_array();
  json.key("stdin").string("line one\nline two\n").end_object();
  json.key("sandbox").begin_object().key("pids").number(64).end_object();
  json.end_object();
  return out;
}

std::string large_payload() {
  std::string out;
  JsonWriter json(out);
  json.begin_object().key("files").begin_object();
  for (int i = 0; i < 8; ++i) {
    std::string text;
    while (text.size() < 1'900) text += "def test_case():\n    assert f(1)\n";
    json.key("tests/test_" + std::to_string(i) + ".py").string(text);
  }
  json.end_object().end_object();
  return out;
}

std::string lease_answer() {
  std::string out;
  JsonWriter json(out);
  json.begin_object().key("leases").begin_array();
  for (int i = 0; i < 64; ++i) {
    json.begin_object().key("token").string(
        "0000010000000001-0123456789abcdef");
    json.key("fence").string("0000010000000001").key("lease_ms").number(30'000);
    json.key("job").begin_object();
    json.key("id").string("01a1f997-0706-7000-ac13-5f3fe8058ff8");
    json.key("kind").string("noop").key("attempt").number(1);
    json.key("timeout_ms").null().key("sandbox").null();
    json.key("payload").raw(R"({"echo":{"n":17,"text":"hello"}})");
    json.end_object().end_object();
  }
  json.end_array().end_object();
  return out;
}

// Nanoseconds a call.
double time_of(int calls, const std::function<bool()>& parse) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  for (int i = 0; i < calls; ++i) {
    if (!parse()) abort();
  }
  return std::chrono::duration<double, std::nano>(Clock::now() - begin)
             .count() /
         calls;
}

double median(std::vector<double> of) {
  std::sort(of.begin(), of.end());
  return of[of.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 31;
  if (rounds < 1 || rounds > 10'000) {
    std::fprintf(stderr, "json_read [rounds, 1 to 10000]\n");
    return 2;
  }
  const std::pair<const char*, std::string> texts[] = {
      {"job body", job_body()},
      {"16 KiB payload", large_payload()},
      {"64 leases", lease_answer()}};
  for (const auto& [name, text] : texts) {
    const int calls = static_cast<int>(4'000'000 / text.size()) + 1;
    JsonDoc kept;
    std::vector<double> doc, fresh, tree, accept;
    for (int round = 0; round < rounds; ++round) {
      doc.push_back(time_of(calls, [&] { return !kept.parse(text); }));
      tree.push_back(time_of(calls, [&] {
        return !nlohmann::json::parse(text, nullptr, false).is_discarded();
      }));
      fresh.push_back(time_of(calls, [&] { return !JsonDoc().parse(text); }));
      accept.push_back(
          time_of(calls, [&] { return nlohmann::json::accept(text); }));
    }
    std::printf(
        "%-15s %6zu bytes: JsonDoc kept %.0f ns, fresh %.0f ns; nlohmann parse "
        "%.0f ns (%.1fx), accept %.0f ns (%.1fx)\n",
        name, text.size(), median(doc), median(fresh), median(tree),
        median(tree) / median(doc), median(accept),
        median(accept) / median(doc));
  }
}
