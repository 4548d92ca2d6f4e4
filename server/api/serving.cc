#include "server/api/serving.h"

#include <algorithm>

namespace machina {

std::shared_ptr<Serving> ServedKinds::asks(std::uint64_t peer,
                                           const LeaseCommand& lease,
                                           Millis wait_ms, Millis now) {
  if (by_worker_.size() >= kServingMax) {
    std::erase_if(by_worker_,
                  [now](const auto& one) { return one.second->until < now; });
    if (by_worker_.size() >= kServingMax) by_worker_.clear();
  }
  std::shared_ptr<Serving>& its = by_worker_[lease.worker];
  if (its == nullptr) its = std::make_shared<Serving>();
  if (its->kinds != lease.kinds || its->until < now) look_again();
  its->kinds = lease.kinds;
  its->until = now + wait_ms + kServingMs;
  its->peer = peer;
  return its;
}

void ServedKinds::worker_ended(const std::string& worker) {
  if (by_worker_.erase(worker) != 0) look_again();
}

void ServedKinds::connection_gone(Serving& its, std::uint64_t peer,
                                  Millis now) {
  // The worker may have asked on another connection since.
  if (its.peer == peer) its.until = std::min(its.until, now + kServingGoneMs);
}

bool ServedKinds::asked_for(const std::string& kind, Millis now) const {
  return std::any_of(by_worker_.begin(), by_worker_.end(),
                     [&](const auto& one) {
                       const Serving& its = *one.second;
                       return its.until >= now &&
                              std::any_of(its.kinds.begin(), its.kinds.end(),
                                          [&](const std::string& pattern) {
                                            return kind_matches(pattern, kind);
                                          });
                     });
}

}  // namespace machina
