// server/api/serving.h
//
// Which kinds are served: what the workers asked for when they leased last, and
// until when that is believed. The loop's thread only.
//
//   SK1  A worker is believed for kServingMs after its last call has waited,
//        for kServingGoneMs where its connection has gone
//        (tests/server/api/serving_test.cc).
//   SK2  At most kServingMax workers and kinds are kept; beyond that the old
//        ones go, then all: what is lost is asked for again within a call.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "queue/base/clock.h"
#include "queue/core/core.h"

namespace machina {

constexpr std::size_t kServingMax = 4096;
constexpr Millis kServingMs = 60'000, kServingGoneMs = 15'000;

// Which kinds a worker asked for, and until when that is believed: it asks or
// renews a lease before then, and a while more; less where it has hung up.
struct Serving {
  std::vector<std::string> kinds;
  Millis until = 0;
  std::uint64_t peer = 0;  // where it asked last
};

class ServedKinds {
 public:
  // A worker asks for leases on the connection `peer` and waits `wait_ms`.
  std::shared_ptr<Serving> asks(std::uint64_t peer, const LeaseCommand& lease,
                                Millis wait_ms, Millis now);
  void worker_ended(const std::string& worker);
  static void connection_gone(Serving& its, std::uint64_t peer, Millis now);
  // Forgets answers, not workers.
  void look_again() { answers_.clear(); }

  // `comes(kind)`: whether a worker that leases the kind is on its way.
  template <class Comes>
  bool serves(const std::string& kind, Millis now, const Comes& comes) {
    if (auto known = answers_.find(kind); known != answers_.end()) {
      return known->second;
    }
    const bool yes = asked_for(kind, now) || comes(kind);
    if (answers_.size() >= kServingMax) answers_.clear();
    return answers_[kind] = yes;
  }

 private:
  bool asked_for(const std::string& kind, Millis now) const;

  std::unordered_map<std::string, std::shared_ptr<Serving>> by_worker_;
  std::unordered_map<std::string, bool> answers_;
};

}  // namespace machina
