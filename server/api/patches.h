// server/api/patches.h
//
// Where patches came from and what became of them: one row for each patch.apply
// job that ended, however it ended, and for each patch.rollback. SQLite,
// <root>/patches/patches.db. It outlives the jobs: their keep time does not
// touch it.
//
//   patches      one row a patch (patch_id is the job's id)
//   files        of a patch: path, lines, the hashes before and after
//   provenance   of a patch: origin, vector, influence, licence and the
//                fingerprint of its text, session, alerts
//   contributors of a patch: what each vector of a session gave, summed up
//   metrics      of a patch: tests, lines, time, what its context says, score
//   branch_log   what was done to a branch, by which job
//   rollbacks    one row a patch.rollback job of a patch that is known
//   unblocks     who let a blocked job go on, until that job's end is here
//   reverse_diffs  what a rollback needs when the job's artifacts are gone
//   meta         counters; whether a rebuild is owed
//
//   P1  Fed like history (queue/history/end_sink.h): what ended is durable here
//   before
//       history's applied() passes it.
//   P2  Exactly once in effect: rows are made by id, and an end replaces only
//       what an earlier end (by lsn) of the same job left. An explicit retry
//       takes the row away: a job that lives is no patch yet.
//   P3  At most `patches_max` rows and `reverse_bytes_max` bytes of reverse
//       diffs; beyond them the oldest go first, reverse diffs before rows. A
//       reverse diff of more than kReverseDiffBytesMax is not kept.
//   P4  A file that is no database any more is put aside as "<name>.damaged",
//       said on stderr, and begun anew; a rebuild is then owed. So it is where
//       the file is missing, and after kTakeFailuresMax failures in a row,
//       when what should be written is left out, loudly: the queue never
//       stands still for this store.
//   P5  A schema of a later version is refused with Code::newer. One of an
//       earlier version is brought up when it is opened, in one transaction;
//       what its rows lack is filled in from the jobs that history still has.
//   P6  No read scans: each goes by an index (tests look at the query plans).
//   P7  Version 0.1.0 (schema 2, no tenants) and this program open, read and
//       write each other's files. (PatchesTest.AFileOfVersion010Is...,
//       Version010ReadsAndWritesWhatThisVersionWrote)
//
// Not for the loop thread: every call but the inline ones blocks. take() is
// called by the history thread, the others by any.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "queue/base/result.h"
#include "queue/history/end_sink.h"
#include "server/api/patch_record.h"
#include "server/api/store.h"

namespace machina {

constexpr int kTakeFailuresMax = 20;          // a second apart
constexpr std::size_t kUnblocksMax = 10'000;  // that wait for their job's end
constexpr std::uint64_t kPatchScanMax = 10'000;  // looked at for one page
constexpr int kAncestryMax = 256;
constexpr std::size_t kAncestrySourcesMax = 16;  // shown of each ancestor

struct PatchLimits {
  std::uint64_t patches_max = 1'000'000;
  std::uint64_t reverse_bytes_max = 4ull << 30;
};

// All that is set must hold.
struct PatchQuery {
  std::string tenant;                          // empty: any, as below
  std::string license, vector, path, outcome;  // empty: any
  std::string license_fingerprint, session;    // the same
  std::string diff_digest;                     // "sha256:<hex>"
  // The spellings of one repository, of which one was submitted; empty: any.
  std::vector<std::string> repo;
  int limit = 50;
  std::string cursor;  // the patch id to go on below, or empty
};

struct PatchPage {
  std::vector<PatchRecord> patches;  // newest first, summaries
  std::string cursor;                // empty: the end
  std::uint64_t scanned = 0;
};

struct Ancestry {
  std::vector<PatchRecord> patches;  // child first; sources: the strongest
  bool truncated = false;            // kAncestryMax came before the root
  bool cycle = false;                // the next one was there already
  std::string missing;               // a parent that is not known, or empty
};

class Patches final : public EndSink {
 public:
  // `files` has the artifacts of jobs and may be null; it outlives this.
  static Result<std::unique_ptr<Patches>> open(const std::string& dir,
                                               Store* files,
                                               const PatchLimits& limits = {});
  ~Patches() override;

  Result<void> take(const std::vector<HistoryChange>& changes) override;

  // A rebuild: whoever knows finished jobs hands each over, all patches before
  // all rollbacks, then says that it is done. What is there already stays.
  bool rebuild_owed() const { return rebuild_owed_ || damaged_; }
  Result<void> begin_rebuild();
  Result<void> add(const EndedJob& job);
  Result<void> end_rebuild();

  // Of one tenant, where `tenant` is not empty: another's is not there.
  Result<std::optional<PatchRecord>> find(const std::string& patch_id,
                                          const std::string& tenant = {});
  Result<PatchPage> list(const PatchQuery& query);
  Result<Ancestry> ancestry(const std::string& patch_id,
                            const std::string& tenant = {});
  // Nothing where none is kept.
  Result<std::optional<std::string>> reverse_diff(
      const std::string& patch_id, const std::string& tenant = {});

  // The statements behind the reads, for a look at their plans (P6).
  static std::vector<std::string> read_statements();

 private:
  struct Writer;
  struct Reader;
  Patches(std::string dir, Store* files, const PatchLimits& limits);

  Result<void> start();
  Result<void> open_writer();
  Result<void> put_aside();
  Result<void> write(const std::vector<HistoryChange>& changes);
  Result<void> write_one(const HistoryChange& change);
  Result<void> write_end(const EndedJob& job);
  Result<void> put_patch(const EndedJob& job);
  Result<void> put_origin(const PatchRecord& patch);
  Result<void> fill_in(const EndedJob& job);
  Result<void> put_rollback(const EndedJob& job);
  Result<void> remove(const std::string& patch_id);
  Result<void> remember_unblock(const HistoryChange& change);
  Result<void> keep_reverse_diff(const EndedJob& job, const std::string& name);
  Result<void> trim();
  Result<void> save_counters();
  Result<void> in_transaction(const std::function<Result<void>()>& work);
  bool concerns(const HistoryChange& change);
  // Runs `work` with the reader; corruption is noted (P4).
  template <class T>
  Result<T> reading(const std::function<Result<T>(Reader&)>& work);

  const std::string dir_;
  Store* const files_;
  const PatchLimits limits_;

  std::mutex write_mutex_;
  std::unique_ptr<Writer> writer_;
  std::int64_t patches_ = 0, reverse_bytes_ = 0;
  std::unordered_map<std::string, Lsn> unblocks_;  // by job id
  int failures_ = 0;
  bool gave_up_ = false;

  std::mutex read_mutex_;
  std::unique_ptr<Reader> reader_;

  std::atomic<bool> rebuild_owed_{false}, damaged_{false};
};

}  // namespace machina
