// queue/wal/recovery.h
//
// What an opened directory of segments holds, and where the log ends: the
// decision between a torn tail (dropped) and damage (refused). It never writes
// a byte; after an unclean end it has the disk catch up with its cache before
// it believes what it reads.
//
//   P = the first lsn that is not whole. D = the greatest lsn that anything
//   sound says was durable: batch headers, segment headers, the manifest.
//   P > D: nobody was told about P; the log ends before it.
//   P <= D: somebody was; refuse.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "queue/base/result.h"
#include "queue/base/storage.h"
#include "queue/wal/log.h"
#include "queue/wal/segment.h"

namespace machina {

struct FoundSegment {
  std::string name;  // "wal/....seg"
  SegmentHeader header;
};

// The headers of all wal/*.seg. corrupt: a header does not hold or is of
// another log; newer.
Result<std::vector<FoundSegment>> find_segments(Storage& storage,
                                                const Manifest& manifest);

struct Chain {
  std::vector<FoundSegment> live;  // linked to each other, oldest first
  std::vector<FoundSegment> kept;  // older than these, kept for their bodies
  std::vector<FoundSegment> dead;  // cut off by an earlier recovery
};

// The last segment is the one of greatest number; each names the one before.
Chain link_segments(std::vector<FoundSegment> found);

enum class TailVerdict { whole, torn, damaged };
// Pure: P, D, and whether any byte was found at or behind P.
TailVerdict judge(Lsn first_bad, Lsn vouched, bool bytes_behind);

struct Scan {
  Lsn last = 0;          // P - 1
  Lsn vouched = 0;       // D
  ChainLink link;        // the last good batch
  std::size_t keep = 0;  // live[0, keep) stay in the chain
  std::uint64_t dropped_bytes = 0;
  std::uint64_t records = 0;  // visited
  std::uint64_t visited_bytes = 0;
  Lsn first_visited = 0;
  Millis time_ms = 0;  // greatest logged
};

// Reads live segments (OpenMode::settled unless the end was clean) from the one
// that holds `from` on, visits each record with lsn >= from, and finds the end.
// corrupt (P <= D), newer, io, or what visit said.
Result<Scan> scan_chain(Storage& storage, const Chain& chain,
                        const Manifest& manifest, Lsn from,
                        const FileLog::Visit& visit);

}  // namespace machina
