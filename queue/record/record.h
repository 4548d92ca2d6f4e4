// queue/record/record.h
//
// What the log holds: one Record for each thing that was decided. A record is
// an outcome, never an input: nothing in it is decided again at replay, and no
// clock is read to apply it. Layouts: docs/wal-records.md.
//
//   R1  decode(encode(r)) == r for every record.
//   R2  decode() of any bytes at all returns a record or an Error; it never
//       reads past them nor allocates more than a small multiple of them.
//   R3  A type with bit 7 set may be skipped by a reader that does not know
//       it; any other unknown type is Code::newer.

#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "queue/base/job.h"
#include "queue/base/result.h"

namespace machina {

enum class RecordType : std::uint8_t {
  enqueue = 1,  // a job exists (first commit, or an explicit retry's renewal)
  grant = 2,    // a lease began
  end = 3,      // a job reached a final state
  retry = 4,    // an attempt failed; the job waits for its next
  release = 5,  // a lease was given back; the attempt does not count
  block = 6,    // an attempt ended waiting for outside input
  unblock = 7,  // the input came
  cancel = 8,   // a running job was asked to stop
  promote = 9,  // scheduled jobs became ready
  forget = 10,  // dedup keys expired
  session_grant = 11,  // a grant that says its worker's session
  clock = 12,          // how the wall clock stands to the log's time
};

// The body: everything the client asked for, as kept for the job's life.
struct EnqueueRecord {
  JobId id;
  NewJob job;
  State state = State::ready;  // waiting, scheduled or ready
  std::vector<JobId> unmet;    // those of depends_on not yet succeeded
  std::uint8_t revived = 0;    // the final state (6..8) that an explicit
                               // retry took it out of; 0: a new job
  std::uint16_t attempt = 0;   // revived: attempts so far
  Millis created_ms = 0;
  bool operator==(const EnqueueRecord&) const = default;
};
struct GrantRecord {
  JobId id;
  Fence fence = 0;
  std::uint16_t attempt = 0;  // this one's number
  Level level = 0;            // of the worker
  std::string worker;
  std::uint64_t session =
      0;  // of the worker (queue/core/core.h); 0: none is known
  bool operator==(const GrantRecord&) const = default;
};
struct EndRecord {
  JobId id;
  Fence fence = 0;  // 0: not by a lease (cancelled while it waited, dependency)
  State state = State::succeeded;
  std::uint16_t attempt = 0;
  Place body_place = 0;  // where its EnqueueRecord lies
  std::uint32_t body_bytes = 0;
  Millis started_ms = 0;
  std::uint8_t by_complete = 0;  // ended by /complete: a repeat gets it again
  std::string worker;
  Outcome outcome;
  std::vector<EnqueueRecord> children;  // committed with it (promise 3)
  bool operator==(const EndRecord&) const = default;
};
struct RetryRecord {
  JobId id;
  Fence fence = 0;
  EndCode code = EndCode::exit;
  std::uint16_t attempt = 0;  // the one that failed
  Millis run_at_ms = 0;       // 0: ready at once
  std::string message;
  bool operator==(const RetryRecord&) const = default;
};
struct ReleaseRecord {
  JobId id;
  Fence fence = 0;
  bool operator==(const ReleaseRecord&) const = default;
};
struct BlockRecord {
  JobId id;
  Fence fence = 0;
  std::string reason, data;  // data: raw JSON or empty
  std::string token;         // needed to unblock
  Millis deadline_ms = 0;    // wall; 0: none
  bool operator==(const BlockRecord&) const = default;
};
struct UnblockRecord {
  JobId id;
  std::string input, actor;  // input: raw JSON or empty
  bool operator==(const UnblockRecord&) const = default;
};
struct CancelRecord {
  JobId id;
  bool operator==(const CancelRecord&) const = default;
};
struct PromoteRecord {
  std::vector<JobId> ids;  // <= 256
  bool operator==(const PromoteRecord&) const = default;
};
struct ForgetRecord {
  Millis until_ms = 0;      // dedup keys that expired at or before it,
  std::uint32_t count = 0;  // the first `count` of them in order of expiry
  bool operator==(const ForgetRecord&) const = default;
};

// Other times than a record's own are wall clock, as it stood to the log's time
// when the record was made.
struct ClockRecord {
  Millis offset_ms = 0;    // the wall clock less the log's time, from here on
  std::uint64_t boot = 0;  // the boot whose monotonic clock is meant, 0: none
  Millis boot_ms = 0;      // what that said at the record's time
  bool operator==(const ClockRecord&) const = default;
};

using RecordBody =
    std::variant<EnqueueRecord, GrantRecord, EndRecord, RetryRecord,
                 ReleaseRecord, BlockRecord, UnblockRecord, CancelRecord,
                 PromoteRecord, ForgetRecord, ClockRecord>;

struct Record {
  Millis time_ms = 0;  // of the server's clock: queue/core/server_clock.h
  RecordBody body;
  Lsn lsn = 0;              // set by append, and by recovery
  Place place = 0;          // "
  std::uint32_t bytes = 0;  // encoded size, "
};

RecordType type_of(const Record&);

// What a reader must know beside the first format, one bit each. A program that
// meets a bit which it does not know refuses the log as newer, before it reads
// a record. Whoever gives records a new type or member gives it a bit here.
constexpr std::uint64_t kFeatureConcurrencyKeys = 1;  // jobs have them
constexpr std::uint64_t kFeatureClock = 2;  // time is the server's own: clock
                                            // records, run_at as a time of
                                            // day, images in parts
constexpr std::uint64_t kFeatureSessions = 4;  // grants say whose session it is
// Those that this record needs: its segment must carry them.
std::uint64_t features_of(const Record&);

void encode(const Record&, std::vector<std::byte>* out);  // appends
Result<Record> decode(RecordType type, std::span<const std::byte> bytes);

}  // namespace machina
