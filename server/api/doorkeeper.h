// server/api/doorkeeper.h
//
// Who may come in, and how often: credentials, rates, and the bodies that are
// kept until their signature can be checked. Knows no job and no connection's
// bytes; the loop's thread only.
//
//   head -> let_in() -> refused | in | entry == after_body
//   body -> let_in_signed() -> refused | in
//
//   DK1  One answer for every wrong credential; the log has the cause, at most
//        every kCauseEveryMs (ServerLife.BearerIsNeededOnTcpOnly).
//   DK2  An address that guesses too much is not told whether its next guess is
//        right (tests/server/auth/gate_test.cc).
//   DK3  What a request may spend is taken once, after it was let in
//        (tests/server/auth/gate_test.cc).
//   DK4  Bodies that wait for their signature have kUnprovedBytesMax together;
//        beyond that the request is answered 503 (the same test).

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "queue/base/clock.h"
#include "server/api/job_json.h"
#include "server/api/metrics.h"
#include "server/api/route.h"
#include "server/api/server.h"
#include "server/auth/gate.h"
#include "server/http/limits.h"
#include "server/http/loop.h"

namespace machina {

// Wrong credentials from one address: this many at once, and a minute.
constexpr std::uint32_t kWrongCredentialsPerMinute = 600;
constexpr Millis kCauseEveryMs = 10'000;  // a log line on refused credentials
// Of bodies that are kept until their signature can be checked: bytes that
// came, all together.
constexpr std::uint64_t kUnprovedBytesMax = 64u << 20;

// What the door keeps of a connection.
struct Visitor {
  Socket& socket;
  bool local;  // comes by the Unix socket
  // Of the request whose head was read last:
  Gate::Entry entry = Gate::Entry::granted;
  const Principal* principal = nullptr;
  Millis head_wall_ms = 0;
  std::uint64_t reserved = 0;   // of kUnprovedBytesMax
  bool proved = false;          // a credential was right on this connection
  std::uint8_t credential = 0;  // 1: token, 2: signature
};

class Doorkeeper {
 public:
  static Result<std::unique_ptr<Doorkeeper>> open(
      const ServerOptions& options, const std::vector<Credential>& more,
      Clock& clock, const Loop& loop, Metrics& metrics);

  // A refusal, or none; then the request is in, or its body decides. `route`
  // may be null: an unknown path. `note` is what the reply says of the limits.
  MaybeProblem let_in(Visitor& visitor, const Head& head, const Route* route,
                      LimitNote* note);
  MaybeProblem let_in_signed(Visitor& visitor, const Head& head,
                             const Route* route, const HexDigest& body,
                             LimitNote* note);
  // 403 where the principal has not the scope that the route needs.
  static MaybeProblem look_at_scopes(const Route& route, const Principal& who);
  // For each job of a bulk request but the first.
  void spend_jobs(const Visitor& visitor, LimitNote* note, std::size_t jobs);
  void append_limits(std::string* out, const LimitNote& note) const;

  // `bytes` more of an unproved body; release() when its fate is known.
  std::optional<HttpError> hold(Visitor& visitor, std::size_t bytes);
  void release(Visitor& visitor);

  Gate& gate() { return *gate_; }

 private:
  Doorkeeper(const ServerOptions& options, Clock& clock, const Loop& loop,
             Metrics& metrics);
  MaybeProblem unauthorized(Visitor& visitor, Gate::Cause cause,
                            bool presented);
  MaybeProblem spend(Visitor& visitor, const Head& head, const Route* route,
                     LimitNote* note);

  Clock& clock_;
  const Loop& loop_;
  Metrics& metrics_;
  std::unique_ptr<Gate> gate_;
  Limits limits_, wrong_;  // of requests; of wrong credentials (bucket 0)
  std::uint64_t unproved_bytes_ = 0;
  Millis cause_said_ms_ = -kCauseEveryMs;
  std::uint64_t causes_unsaid_ = 0;
};

}  // namespace machina
