// queue/base/kind.h
//
// What whoever takes a new job must know of the job's kind. The families of
// workers/kinds make these values; the server gets them in a map by name and
// knows no kind itself.
//
//   N1  `check` looks at the payload's text alone: no file, no clock.
//   N2  `resolve` looks at the host and may hang. It is called on a thread that
//       may be given up, so it refers to nothing that it does not own.
//   N3  What is wrong with a payload is a struct. Nobody parses its text.
//       (kinds_test, NewJobsTest)

#pragma once

#include <functional>
#include <string>

#include "queue/base/job.h"
#include "queue/base/result.h"

namespace machina {

// The member that is wrong, relative to the payload ("argv", "test.runner"),
// and what is wrong with it: value and bound.
struct BadField {
  std::string field, why;
  std::string text() const { return field + ": " + why; }
};
template <class T>
using Checked = Result<T, BadField>;

struct KindFacts {
  // What a job keeps of a payload that was accepted.
  struct Kept {
    std::string payload;  // empty: as it was given
    // Jobs of the same key, whichever their kinds and tenants, run one after
    // another; no client's key is equal to a kind's. Empty: no bound. At most
    // kKindKeyBytesMax bytes ("patch:<path>").
    std::string concurrency_key;
  };
  std::function<Checked<Kept>(const std::string& payload_json)> check;
  // After `check`, which found nothing wrong. What `resolve` finds on the host
  // it finds once: payload and key are of the same thing. Null: the payload
  // alone says all.
  std::function<Checked<Kept>(const std::string& payload_json)> resolve;
  Millis timeout_ms = 120'000;
  int concurrency_limit = 1;  // so many jobs of one key run at a time
};

}  // namespace machina
