// workers/worker/protocol.h
//
// The workers' verbs of docs/http-api.md, as a worker writes and reads them.
// Text in, text out; no connection.

#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "queue/base/job.h"
#include "queue/base/result.h"
#include "workers/kinds/run.h"

namespace machina {

struct Lease {
  std::string token;
  Millis lease_ms = 30'000;
  std::string job_id, tenant, kind, payload = "{}", sandbox, traceparent,
                                    request_id;
  std::string input;  // raw JSON of an unblock; empty: none
  int attempt = 1;
  Millis timeout_ms = 0;  // 0: the kind's default
};
// The `leases` member of a reply. Code::invalid on anything else.
Result<std::vector<Lease>> parse_leases(std::string_view reply);

struct LeaseAsk {
  std::string worker;
  std::string session;  // the secret by which its leases are its own
  std::vector<std::string> kinds;
  int max = 1;
  Millis wait_ms = 0;
  Level level = 0;
  bool forget_others = false;  // `holding`: none; what else it has is released
};
std::string write_lease_request(const LeaseAsk& request);

// One item of POST /v1/leases/complete. `isolation` is raw JSON.
void append_completion(std::string& out, const std::string& token,
                       const kinds::End& end, const std::string& isolation);
// The body of POST /v1/leases/{token}/fail.
std::string write_failure(const kinds::End& end, const std::string& isolation);

// The body of POST /v1/leases/{token}/block.
std::string write_block(const kinds::End& end);

struct HeartbeatItem {
  std::string token;
  int percent = -1;  // -1: nothing to report
  std::string message;
};
std::string write_heartbeat(const std::vector<HeartbeatItem>& items,
                            Millis wait_ms);
struct HeartbeatAnswer {
  std::string token;
  bool cancel = false, lost = false;
};
Result<std::vector<HeartbeatAnswer>> parse_heartbeat(std::string_view reply);

// Per item of a batch: the token, and whether the server refused it.
struct ItemReply {
  std::string token, problem;
  int status = 0;  // of the problem
};
Result<std::vector<ItemReply>> parse_items(std::string_view reply);

}  // namespace machina
