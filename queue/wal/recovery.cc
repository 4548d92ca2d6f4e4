#include "queue/wal/recovery.h"

#include <algorithm>
#include <map>
#include <optional>

#include "queue/base/little_endian.h"
#include "queue/wal/window.h"

namespace machina {
namespace {

constexpr std::uint8_t kMayBeSkipped = 0x80;  // bit 7 of a record's type

std::string range(Lsn first, Lsn last) {
  return "lsn " + std::to_string(first) +
         (last > first ? ".." + std::to_string(last) : "");
}

bool all_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(),
                     [](std::byte b) { return b == std::byte{0}; });
}

class Scanner {
 public:
  Scanner(Storage& storage, const Chain& chain, const Manifest& manifest,
          Lsn from, const FileLog::Visit& visit)
      : storage_(storage),
        chain_(chain),
        manifest_(manifest),
        from_(from),
        visit_(visit) {}

  Result<Scan> run() {
    const auto& live = chain_.live;
    std::size_t i = live.size() - 1;
    while (i > 0 && live[i].header.first_lsn > from_) --i;
    scan_.link = live[i].header.prev;
    scan_.last = live[i].header.first_lsn - 1;
    scan_.vouched = manifest_.durable_lsn;
    for (const auto& segment : live)
      scan_.vouched = std::max(scan_.vouched, segment.header.durable_lsn);
    for (;; ++i) {
      auto reached = read_segment(i);
      if (!reached) return reached.error();
      if (!*reached || i + 1 == live.size()) break;
    }
    if (auto ok = judge_tail(i); !ok) return ok.error();
    return std::move(scan_);
  }

 private:
  const FoundSegment& segment(std::size_t i) const { return chain_.live[i]; }
  // After a kill the cache may hold what the disk does not; after a failed
  // sync it may even say that it is clean.
  OpenMode read_mode() const {
    return manifest_.clean ? OpenMode::read : OpenMode::settled;
  }
  bool is_last(std::size_t i) const { return i + 1 == chain_.live.size(); }

  // Reads whole batches of segment i. True where they go on to the one that
  // its successor names; false at the first that does not hold (bad_at_).
  Result<bool> read_segment(std::size_t i) {
    const SegmentHeader& header = segment(i).header;
    bad_at_ = 0;
    if (header.prev != scan_.link || header.first_lsn != scan_.last + 1)
      return false;
    scan_.keep = i + 1;
    auto file = storage_.open(segment(i).name, read_mode());
    if (!file) return file.error();
    Window window(**file);
    std::uint64_t at = kSegmentDataOffset, batch_seq = header.first_batch_seq;
    std::uint32_t prev_crc = header.crc;
    for (;; ++batch_seq) {
      bad_at_ = at;
      if (!is_last(i) && batch_seq > segment(i + 1).header.prev.batch_seq)
        return true;
      auto bytes = read_batch(i, window, at, batch_seq, prev_crc);
      if (!bytes) return bytes.error();
      if (*bytes == 0) return false;
      prev_crc = scan_.link.header_crc;
      at += *bytes;
    }
  }

  // The batch's size on disk, 0 where there is none that holds.
  Result<std::uint64_t> read_batch(std::size_t i, Window& window,
                                   std::uint64_t at, std::uint64_t batch_seq,
                                   std::uint32_t prev_crc) {
    const SegmentHeader& header = segment(i).header;
    auto head = window.at(at, kBatchHeaderBytes);
    if (!head) return head.error();
    auto batch = decode_batch_header(*head, header, at);
    if (!batch) return std::uint64_t{0};
    scan_.vouched = std::max(scan_.vouched, batch->durable_lsn);
    if (batch->seq != batch_seq || batch->prev_header_crc != prev_crc ||
        batch->first_lsn != scan_.last + 1)
      return std::uint64_t{0};
    auto whole = window.at(at, kBatchHeaderBytes + batch->payload_bytes);
    if (!whole) return whole.error();
    auto payload = whole->subspan(std::min(kBatchHeaderBytes, whole->size()));
    if (!payload_holds(*batch, header, at, payload)) return std::uint64_t{0};
    if (auto ok = read_records(i, *batch, at + kBatchHeaderBytes, payload); !ok)
      return ok.error();
    scan_.link = {header.seq, batch->seq, scan_.last, batch->header_crc};
    scan_.time_ms = std::max(scan_.time_ms, batch->server_time_ms);
    return pad_to(kBatchHeaderBytes + batch->payload_bytes, kBlockBytes);
  }

  Result<void> read_records(std::size_t i, const BatchHeader& batch,
                            std::uint64_t offset,
                            std::span<const std::byte> payload) {
    const SegmentHeader& header = segment(i).header;
    std::size_t at = 0;
    for (std::uint32_t n = 0; n < batch.records; ++n) {
      auto rest = payload.subspan(std::min(at, payload.size()));
      auto frame = check_record(rest, header, offset + at);
      if (!frame)
        return Error{Code::corrupt,
                     segment(i).name + ": offset " +
                         std::to_string(offset + at) + ": " +
                         range(scan_.last + 1, batch.last_lsn()) +
                         " do not hold inside a batch that does"};
      ++scan_.last;
      if (scan_.last >= from_) {
        auto ok = visit(*frame, rest.subspan(kRecordHeaderBytes, frame->bytes),
                        header.base + offset + at);
        if (!ok) return ok;
      }
      at += record_room(frame->bytes);
    }
    return {};
  }

  Result<void> visit(const RecordFrame& frame, std::span<const std::byte> body,
                     Place place) {
    auto record = decode(static_cast<RecordType>(frame.type), body);
    if (!record) {
      bool skip = record.error().code == Code::newer &&
                  (frame.type & kMayBeSkipped) != 0;
      if (skip) return {};
      return Error{record.error().code,
                   range(scan_.last, scan_.last) + ": " + record.error().what};
    }
    record->lsn = scan_.last;
    record->place = place;
    record->bytes = frame.bytes;
    if (scan_.first_visited == 0) scan_.first_visited = scan_.last;
    ++scan_.records;
    scan_.visited_bytes += record_room(frame.bytes);
    return visit_(*record);
  }

  // What lies at and behind the first bad block: who vouches for it?
  Result<void> judge_tail(std::size_t i) {
    bool clean_end =
        manifest_.clean && is_last(i) && manifest_.durable_lsn == scan_.last;
    if (!clean_end) {
      std::uint64_t at = std::max<std::uint64_t>(bad_at_, kSegmentDataOffset);
      for (std::size_t j = i; j < chain_.live.size(); ++j) {
        if (auto ok = look_behind(j, at); !ok) return ok;
        at = kSegmentDataOffset;
      }
    }
    auto verdict =
        judge(scan_.last + 1, scan_.vouched, scan_.dropped_bytes != 0);
    if (verdict != TailVerdict::damaged) return {};
    return Error{Code::corrupt,
                 segment(i).name + ": offset " + std::to_string(bad_at_) +
                     ": " + range(scan_.last + 1, scan_.vouched) +
                     (scan_.vouched > scan_.last + 1 ? " were" : " was") +
                     " durable and cannot be read whole; nothing was changed"};
  }

  Result<void> look_behind(std::size_t i, std::uint64_t at) {
    auto file = storage_.open(segment(i).name, read_mode());
    if (!file) return file.error();
    Window window(**file);
    for (;; at += kBlockBytes) {
      auto block = window.at(at, kBlockBytes);
      if (!block) return block.error();
      if (block->empty()) return {};
      if (all_zero(*block)) continue;
      scan_.dropped_bytes += block->size();
      auto batch = decode_batch_header(*block, segment(i).header, at);
      if (batch) scan_.vouched = std::max(scan_.vouched, batch->durable_lsn);
    }
  }

  Storage& storage_;
  const Chain& chain_;
  const Manifest& manifest_;
  const Lsn from_;
  const FileLog::Visit& visit_;
  Scan scan_;
  std::uint64_t bad_at_ = 0;
};

}  // namespace

Result<std::vector<FoundSegment>> find_segments(Storage& storage,
                                                const Manifest& manifest) {
  auto names = storage.list("wal");
  if (!names) return names.error();
  std::vector<FoundSegment> found;
  for (const std::string& name : *names) {
    if (!name.ends_with(".seg")) continue;
    FoundSegment segment;
    segment.name = "wal/" + name;
    auto file = storage.open(segment.name, OpenMode::read);
    if (!file) return file.error();
    std::vector<std::byte> bytes(kSegmentDataOffset);
    auto got = (*file)->read_at(0, bytes);
    if (!got) return got.error();
    bytes.resize(*got);
    auto header = decode_segment_headers(bytes);
    if (!header)
      return Error{header.error().code,
                   segment.name + ": offset 0: " + header.error().what};
    segment.header = *header;
    if (header->log_uuid[0] != manifest.log_uuid[0] ||
        header->log_uuid[1] != manifest.log_uuid[1] ||
        segment_name(header->first_lsn) != segment.name)
      return Error{Code::corrupt,
                   segment.name + " belongs to another log or place"};
    found.push_back(std::move(segment));
  }
  return found;
}

Chain link_segments(std::vector<FoundSegment> found) {
  std::map<std::uint64_t, FoundSegment> by_seq;
  for (auto& segment : found)
    by_seq.emplace(segment.header.seq, std::move(segment));
  Chain chain;
  if (by_seq.empty()) return chain;
  std::uint64_t seq = by_seq.rbegin()->first;
  for (auto it = by_seq.find(seq); it != by_seq.end(); it = by_seq.find(seq)) {
    seq = it->second.header.prev.segment_seq;
    chain.live.push_back(std::move(it->second));
    by_seq.erase(it);
  }
  std::reverse(chain.live.begin(), chain.live.end());
  const SegmentHeader& first = chain.live.front().header;
  for (auto& [number, segment] : by_seq) {
    bool older =
        number < first.seq && segment.header.first_lsn < first.first_lsn;
    (older ? chain.kept : chain.dead).push_back(std::move(segment));
  }
  return chain;
}

TailVerdict judge(Lsn first_bad, Lsn vouched, bool bytes_behind) {
  if (first_bad <= vouched) return TailVerdict::damaged;
  return bytes_behind ? TailVerdict::torn : TailVerdict::whole;
}

Result<Scan> scan_chain(Storage& storage, const Chain& chain,
                        const Manifest& manifest, Lsn from,
                        const FileLog::Visit& visit) {
  return Scanner(storage, chain, manifest, from, visit).run();
}

}  // namespace machina
