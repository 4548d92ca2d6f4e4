// queue/history/history.h
//
// The finished jobs, findable: SQLite, one file per UTC day of the job id's
// creation (history/2026-11-20.db), derived from the log and rebuildable from
// it. Rows are self-contained: the job's EnqueueRecord and EndRecord as encoded
// bytes beside the columns that are searched, so that no log segment is kept
// for a finished job.
//
//   <dir>/history.db      meta(applied, version), buckets(day, expires)
//   <dir>/2026-11-20.db   jobs(id, lsn, finished, expires, state, fence, kind,
//                         queue, head, tail, payload, result), by id and fence
//
//   Y1  applied() never exceeds what is durable in SQLite (synchronous FULL):
//       the days' transactions come first, applied is written after them, and
//       a crash between the two has the same rows applied again (Y2).
//   Y2  Applying the same change twice leaves one row.
//   Y3  A row whose keep time has passed is not found, and a file whose last
//       row has passed is unlinked.
//   Y4  A day's file that is missing or unreadable at open() resets applied()
//       to 0, so that the caller replays what the log still has; an unreadable
//       one is put aside under "<name>.damaged", never deleted.
//   Y5  <dir>/LOCK is held from open() on: Code::conflict where it is taken.
//
// Not for the loop thread: every call blocks. One thread calls apply(),
// rewind() and expire(); the other calls may come from any thread and take
// turns.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "queue/base/job.h"
#include "queue/base/result.h"
#include "queue/record/record.h"

namespace machina {

struct FinishedJob {
  Lsn lsn = 0;
  Millis finished_ms = 0;
  EnqueueRecord body;
  EndRecord end;  // without its children: they are jobs of their own
};

// One thing that the log says happened to history.
struct HistoryChange {
  JobId id;
  Lsn lsn = 0;
  Millis finished_ms = 0;  // as the wall clock showed it
  Millis offset_ms = 0;    // that less the server's clock, by which it is kept
  // Both set: the job finished. Both null: it left history (explicit retry),
  // or, where `unblock` is set, went on: history keeps nothing of that, but an
  // EndSink may want to know who said so.
  std::shared_ptr<const EnqueueRecord> body;
  std::shared_ptr<const EndRecord> end;
  std::shared_ptr<const UnblockRecord> unblock;
};

class History {
 public:
  static Result<std::unique_ptr<History>> open(const std::string& dir);
  virtual ~History() = default;

  virtual Lsn applied() const = 0;
  // In order. One transaction per touched file; `through` becomes applied().
  // Jobs with keep_result_ms 0 get no row. On an Error nothing is promised of
  // the rows and applied() is unchanged; apply them again later.
  virtual Result<void> apply(const std::vector<HistoryChange>& changes,
                             Lsn through) = 0;
  // The log ends at `last`, before applied(): a tail that SQLite had synced was
  // lost with fsync off. Drops the rows above it.
  virtual Result<void> rewind(Lsn last) = 0;
  // Unlinks each file whose last row has passed its keep time.
  virtual Result<void> expire(Millis now_ms) = 0;

  virtual Result<std::optional<FinishedJob>> find(const JobId& id,
                                                  Millis now_ms) = 0;
  virtual Result<std::optional<FinishedJob>> find_by_fence(Fence fence,
                                                           Millis now_ms) = 0;
  struct Page {
    std::vector<FinishedJob> jobs;  // by creation, newest first; without
                                    // payload and result
    std::string cursor;             // empty: the end
    std::uint64_t scanned = 0;      // <= examine
    std::uint64_t bytes = 0;        // of the rows of `jobs`
  };
  // query.cursor is empty or a cursor of an earlier Page, else Code::invalid.
  virtual Result<Page> list(const ListQuery& query, Millis now_ms,
                            std::uint64_t examine = 10'000) = 0;
};

// A finished job as anyone may see it.
JobView view_of(const FinishedJob& job, bool fsync);

}  // namespace machina
