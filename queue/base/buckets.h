// queue/base/buckets.h
//
// The upper bounds, in seconds, of every histogram in /metrics. Here because a
// pool counts sandbox starts in the same buckets and reports them (docs/
// http-api.md, Pools).

#pragma once

#include <cstddef>

namespace machina {

inline constexpr double kSecondsBuckets[] = {
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25,   0.5,     1,      2.5,   5,      10,    30,   60,    300};
inline constexpr std::size_t kBuckets =
    sizeof kSecondsBuckets / sizeof *kSecondsBuckets;

// The one that `seconds` is counted in; kBuckets: over them all.
constexpr std::size_t bucket_of(double seconds) {
  std::size_t i = 0;
  while (i < kBuckets && seconds > kSecondsBuckets[i]) ++i;
  return i;
}

}  // namespace machina
