// queue/history.h
//
// The finished jobs, findable: SQLite, one file per UTC day of the job id's
// creation (history/2026-11-20.db), derived from the log and rebuildable from
// it. The only includer of sqlite3.h is history.cc. Rows are self-contained:
// the job's EnqueueRecord and EndRecord as encoded bytes beside the columns
// that are searched.
//
//   Y1  applied() never exceeds what is durable in SQLite (synchronous FULL;
//       applied_lsn is in the same transaction as the rows).
//   Y2  Applying the same record twice leaves one row.
//   Y3  A row whose keep time has passed is not found, and a file whose last
//       row has passed is unlinked.
//
// Not for the loop thread: every call blocks. One thread writes, one reads.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "queue/record.h"
#include "queue/result.h"
#include "queue/shard.h"

namespace machina {

struct FinishedJob {
  Lsn lsn = 0;
  Millis finished_ms = 0;
  EnqueueRecord body;
  EndRecord end;
};

class History {
 public:
  static Result<std::unique_ptr<History>> open(const std::string& dir);
  virtual ~History() = default;

  virtual Lsn applied() const = 0;
  // One transaction per touched file; `through` becomes applied().
  virtual Result<void> apply(const std::vector<FinishedJob>& jobs,
                             Lsn through) = 0;
  // An explicit retry took the job out of history.
  virtual Result<void> remove(const JobId& id) = 0;
  virtual Result<std::optional<FinishedJob>> find(const JobId& id) = 0;
  virtual Result<std::optional<FinishedJob>> find_by_fence(Fence fence) = 0;
  struct Page {
    std::vector<FinishedJob> jobs;  // newest first; bodies without payload
    std::string cursor;             // empty: the end
    std::uint64_t scanned = 0;
  };
  virtual Result<Page> list(const ListQuery& query, Millis now_ms) = 0;
  virtual Result<void> expire(Millis now_ms) = 0;
};

// A finished job as anyone may see it.
JobView view_of(const FinishedJob& job, bool fsync);

}  // namespace machina
