// queue/verify/verify.h
//
// A log at rest, looked at by a person: is every byte of it what was written,
// and what does it say. For `machina wal`; a server does not use it.
//
//   V1  Nothing is written, made, renamed or synced, whatever is found.
//   V2  Whatever the bytes, it comes to an end with a report or an Error.
//       replay_log() alone may stop the process (CHECK) on records that are
//       checksummed and yet impossible: call it in a process of its own.
//   V3  verify_files() and inspect_log() hold one batch in memory at a time.
//
// Where the log ends is judged as in recovery.h: a tail that nothing sound says
// was durable is torn, and no damage. Whether it was acknowledged cannot be
// told: a batch is vouched for by what is written after it, and after the last
// one nothing was. Either the crash cut it off, before anybody was told, or it
// was whole and has been damaged since. Damage is listed wherever it is, also
// where a start would not look.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/ids.h"
#include "queue/base/result.h"

namespace machina {

struct LogFinding {  // something that is not as it was written
  std::string file;  // "wal/MANIFEST"
  std::uint64_t offset = 0;
  Lsn first = 0, last = 0;  // 0: no record is concerned
  std::string what;
  bool stops_start = false;  // a server would refuse to start
};

struct LogFile {
  enum class Verdict { whole, torn, damaged, unused };
  std::string name;
  std::string kind;  // manifest, checkpoint, segment, other
  Verdict verdict = Verdict::whole;
  Lsn first = 0, last = 0;  // of its records; a checkpoint's: its lsn
  std::uint64_t records = 0, bytes = 0;
  std::string note;
};
std::string_view name(LogFile::Verdict);

struct LogReport {
  std::vector<LogFile> files;
  std::vector<LogFinding> findings;  // empty: no damage
  bool clean_end = false;            // shut down at the last record
  Lsn first = 0, last = 0;           // records that a start would keep
  Lsn durable = 0;                   // known synced
  Lsn checkpoint = 0;                // the one a start would load; 0: none
  std::uint64_t records = 0, bytes = 0;
  std::uint64_t torn_bytes = 0;  // behind the last record
  // The records that the torn tail held; 0 where its headers do not say.
  Lsn torn_first = 0, torn_last = 0;
  bool starts() const;
};

// Which log lies in `dir` (<root>/queue), by its MANIFEST: a copy has the same
// name. not_found where no log has begun; corrupt, newer, io.
struct LogIdentity {
  std::string uuid;  // 32 hex digits
};
Result<LogIdentity> log_identity(const std::string& dir);

// Whether a start would come past the log's MANIFEST: what follows it is read
// by the start alone. Good where no log is there. corrupt, newer, io.
Result<void> examine_log(const std::string& dir);

using LogProgress = std::function<void(std::uint64_t done, std::uint64_t of)>;

// `dir` is <root>/queue. Checks every file below it. not_found: there is no
// log; io.
Result<LogReport> verify_files(const std::string& dir,
                               const LogProgress& progress);

struct ReplayReport {
  std::uint64_t live_jobs = 0, running = 0, records = 0;
  std::vector<LogFinding> findings;
};
// Loads each checkpoint, replays the log from the one that a start would load,
// and checks the state's invariants and that each live job's body is there.
// Only where `report` starts().
Result<ReplayReport> replay_log(const std::string& dir, const LogReport& report,
                                const LogProgress& progress);

// Keeps servers from starting on `dir` until it is destroyed. conflict: one
// runs there; the error says which. Null where there is no lock to take.
class LogHold {
 public:
  virtual ~LogHold() = default;
};
Result<std::unique_ptr<LogHold>> hold_log(const std::string& dir);

// --- what the records say --------------------------------------------------

struct RecordField {
  enum class Type { text, number, time, json };
  std::string name, value;
  Type type = Type::text;
};
struct RecordLine {
  Lsn lsn = 0;
  Millis time = 0;
  std::string type;  // enqueue, grant, ...
  JobId id;          // nil: promote, forget, clock
  std::uint32_t bytes = 0;
  std::string file;
  std::uint64_t offset = 0;
  std::vector<RecordField> fields;
};

// Jobs that --kind and --request-id follow beyond their submissions.
constexpr std::size_t kFollowMax = 100'000;

struct InspectFilter {
  Lsn from = 1, to = ~Lsn{0};
  std::optional<JobId> job;
  std::string kind, request_id;  // of submissions; then all of those jobs
  std::string type;              // of record
  std::uint64_t limit = ~std::uint64_t{0};
  bool payload = false;  // payloads, results and other data as they are
};
struct InspectEnd {
  std::uint64_t shown = 0, looked_at = 0;
  std::vector<std::string> notes;  // what could not be read, and what was left
  bool damaged = false;
};

// `path` is <root>/queue or one .seg file. Shows records in order of lsn until
// `visit` returns false. Tokens are never shown. not_found, corrupt (a file
// that is no segment), io.
Result<InspectEnd> inspect_log(
    const std::string& path, const InspectFilter& filter,
    const std::function<bool(const RecordLine&)>& visit);

}  // namespace machina
