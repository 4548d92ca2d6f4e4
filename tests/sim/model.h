// The oracle: what the records mean, written a second time and simply, with
// maps and strings, sharing no code with the core. It folds each record that
// the core decides, and complains (throws Wrong) of one that breaks a promise:
//
//   - no job but what was asked for; an id is never used twice
//   - a job has at most one current lease; fences rise strictly over all lives
//   - attempts <= allowed; attempts = leases - releases since the last retry
//   - nothing is leased before its time or before what it depends on
//   - first leases per (queue, priority, kind, level) are in commit order
//   - final states are final, but for an explicit retry
//   - at most `limit` jobs of one concurrency key run when one of them starts,
//     and none that may start is left while a parked call wants it
//   - a dedup key is given to a new job only after its window
//   - logged time never goes back, whatever is done to the wall clock

#pragma once

#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "queue/core/core.h"

namespace machina::sim {

struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ModelJob {
  NewJob job;
  State state = State::ready;
  std::set<JobId> unmet;
  bool doomed = false, cancel = false, leased_before = false;
  int attempt = 0, base = 0;
  Fence fence = 0;
  Millis run_at = 0, deadline = 0;  // by the log's time
  bool at_wall = false;             // run_at is a time of day
  std::uint64_t ready = 0;          // order of becoming ready
  std::uint64_t commit = 0;         // order of commit among all jobs
  std::uint64_t born = 0;           // order of enqueue
  std::string token;
  Lsn body_lsn = 0;
  Place body_place = 0;
  std::uint32_t body_bytes = 0;
};

struct ModelKey {
  JobId id;
  Millis expiry = 0;
  std::string kind;
  std::uint64_t digest[2] = {0, 0};
};

class Model {
 public:
  void fold(const Record&);

  // The unexpired entry of a job's key, or null.
  const ModelKey* key_of(const NewJob&, Millis now) const;
  // A ready job that this call could be given, or a nil id.
  JobId leasable(const LeaseCommand&) const;
  // How the core differs from this, or empty.
  std::string difference(const Core&) const;

  std::map<JobId, ModelJob> live;
  std::map<JobId, State> ended;
  std::map<JobId, EnqueueRecord> bodies;  // of all that ever were
  std::map<Fence, State> completed;       // by /complete, and how
  Fence last_fence = 0;
  Millis time = 0, offset = 0;  // the log's, and the wall clock's to it

 private:
  Millis server_time(Millis at, bool wall) const {
    return at == 0 || wall ? at : at - offset;
  }
  using Key = std::tuple<std::string, std::string, std::string>;
  using Fifo =
      std::tuple<std::string, std::string, int, Level, std::string, bool>;
  static Fifo fifo_of(const NewJob&);
  static std::string key_text(const NewJob&);
  bool waits_for_slot(const ModelJob&) const;

  void fold(const Record&, const EnqueueRecord&);
  void fold(const Record&, const GrantRecord&);
  void fold(const Record&, const EndRecord&);
  void fold(const Record&, const RetryRecord&);
  void fold(const Record&, const ReleaseRecord&);
  void fold(const Record&, const BlockRecord&);
  void fold(const Record&, const UnblockRecord&);
  void fold(const Record&, const CancelRecord&);
  void fold(const Record&, const PromoteRecord&);
  void fold(const Record&, const ForgetRecord&);
  void fold(const Record&, const ClockRecord&);
  ModelJob& job(const JobId&, State must_be);
  ModelJob& held(const JobId&, Fence);
  void free_slot(const ModelJob&);
  void unready(const ModelJob&);
  void make_ready(const JobId&, ModelJob&);
  void make_due(const JobId&, ModelJob&);

  std::map<Key, ModelKey> keys_;
  std::map<Fifo, std::set<std::pair<std::uint64_t, JobId>>> fresh_;
  std::map<std::string, int> running_;  // by concurrency key
  // The ready jobs of a key by line, in their order.
  using Line = std::tuple<std::string, std::string, Level, std::string>;
  using Rank = std::tuple<int, bool, std::uint64_t>;
  std::map<Line, std::map<Rank, JobId>> lines_;
  static Line line_of(const NewJob&);
  static Rank rank_of(const ModelJob&);
  std::uint64_t commits_ = 0, births_ = 0, readies_ = 0;
};

}  // namespace machina::sim
