// server/api/route.h
//
// A route: a row that names a method, a path and the function that answers it.
// Each routes_*.cc has the rows of its own functions; a route is
// added there and nowhere else (docs/decisions/0084-a-route-is-one-row.md).
//
//   request -> row.handle(service, exchange) -> reply(), or
//              pending.then = <second half>, and submit()
//   the shard's response -> pending.then(...) -> reply()
//
//   RT1  Every row of clients that takes an id or lists has a row in the table of
//        tests/server/api/tenants_test.cc: without one that test is red.

#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "server/http/http_parser.h"

namespace machina {

class Service;
struct Peer;
struct Principal;

// Addresses one request; survives the peer.
struct Where {
  std::uint64_t peer = 0, sequence = 0;
};

// What a handler is given. The views die with the call.
struct Exchange {
  Peer& peer;
  std::uint64_t sequence;
  const Head& head;
  const Principal& principal;
  std::string_view body;
  std::array<std::string_view, 2> args;
};

struct Route {
  Method method;
  std::string_view pattern;  // "/v1/jobs/{}/cancel"
  void (*handle)(Service&, const Exchange&);
  enum Flags : std::uint16_t {
    none = 0,
    open = 1,       // needs no credential, and is not limited
    raw = 2,        // its body is not JSON
    stream = 4,     // its body is handed over in pieces
    enqueue = 8,    // counts against MACHINA_API_ENQUEUE_RPM
    waits = 16,     // counts against MACHINA_API_RUNSYNC_RPM
    may_wait = 32,  // so, where the request has Prefer: wait
    // Is not limited: a late heartbeat costs a job. Needs the scope `worker`.
    worker = 64,
    plain = 128,    // /enqueue's error form
    repeats = 256,  // a lease that has ended gets its stored answer again
    operate = 512,  // needs the scope `operate`
  };
  std::uint16_t flags = none;
  std::uint64_t max_body = 0;  // 0: the configured one
  std::uint64_t weight = 0;    // how large its answer may be; 0: small
  // Where the size of the answer depends on the request; else `weight` counts.
  std::uint64_t (*weigh)(const Head& head, std::string_view body) = nullptr;
};

// The rows, by the file that has their functions.
std::span<const Route> job_routes();     // routes_jobs.cc
std::span<const Route> worker_routes();  // routes_workers.cc
std::span<const Route> file_routes();    // routes_files.cc
std::span<const Route> patch_routes();   // routes_patches.cc
std::span<const Route> pool_routes();    // routes_pools.cc
std::span<const Route> ops_routes();     // routes_ops.cc

// All of them; the first row that matches counts.
const std::vector<Route>& routes();

// A path of the plan that this version does not have: 501.
void not_built(Service& s, const Exchange& call);

}  // namespace machina
