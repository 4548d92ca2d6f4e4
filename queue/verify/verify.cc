#include "queue/verify/verify.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <map>
#include <set>
#include <unordered_set>

#include "queue/base/storage.h"
#include "queue/core/core.h"
#include "queue/wal/checkpoint.h"
#include "queue/wal/manifest.h"
#include "queue/wal/recovery.h"
#include "queue/wal/segment.h"
#include "queue/wal/window.h"

namespace machina {
namespace {

constexpr std::uint64_t kNoBatch = std::numeric_limits<std::uint64_t>::max();
constexpr std::size_t kCopyBytes = 4096;
constexpr std::size_t kNamedPlacesMax = 20;  // findings for lost bodies

bool all_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(),
                     [](std::byte b) { return b == std::byte{0}; });
}

std::string number(std::uint64_t n) { return std::to_string(n); }

// How far a segment's batches hold, and why not further.
struct Walked {
  std::uint64_t at = kSegmentDataOffset;  // behind the last that holds
  std::uint64_t batch_seq = 0;            // the one that should begin there
  Lsn next = 0;                           // its first lsn
  std::uint32_t prev_crc = 0;
  std::uint64_t records = 0;
  Lsn durable = 0;
  bool reached = false;  // the batch that the walk was to end with
  std::string why;
  std::uint64_t bad_padding = 0;  // offset, 0: none
};

// A record that holds; false ends the walk.
using Visit = std::function<Result<bool>(const RecordFrame&,
                                         std::span<const std::byte> body,
                                         std::uint64_t offset, Lsn lsn)>;

class Walker {
 public:
  Walker(const File& file, const SegmentHeader& header)
      : window_(file), header_(header) {
    w_.batch_seq = header.first_batch_seq;
    w_.next = header.first_lsn;
    w_.prev_crc = header.crc;
    w_.durable = header.durable_lsn;
  }

  // Up to the end of batch `last_seq`, or the first that does not hold.
  Result<Walked> run(std::uint64_t last_seq, const Visit& visit,
                     const std::function<void(std::uint64_t)>& moved) {
    for (;;) {
      if (last_seq != kNoBatch && w_.batch_seq > last_seq) {
        w_.reached = true;
        return w_;
      }
      auto size = batch(visit);
      if (!size) return size.error();
      if (*size == 0) return w_;
      w_.at += *size;
      ++w_.batch_seq;
      if (moved) moved(*size);
    }
  }

 private:
  Result<std::uint64_t> no(std::string why) {
    w_.why = std::move(why);
    return std::uint64_t{0};
  }

  Result<std::uint64_t> batch(const Visit& visit) {
    auto head = window_.at(w_.at, kBatchHeaderBytes);
    if (!head) return head.error();
    if (head->size() < kBatchHeaderBytes) {
      w_.why = "the file ends";
      return std::uint64_t{0};
    }
    auto b = decode_batch_header(*head, header_, w_.at);
    if (!b) {
      if (all_zero(*head)) {
        w_.why = "no batch";
        return std::uint64_t{0};
      }
      return no("the checksum of the batch's header fails");
    }
    w_.durable = std::max(w_.durable, b->durable_lsn);
    if (b->seq != w_.batch_seq || b->prev_header_crc != w_.prev_crc ||
        b->first_lsn != w_.next) {
      return no("batch " + number(b->seq) +
                " does not go on from the one before it");
    }
    std::uint64_t used = kBatchHeaderBytes + b->payload_bytes;
    std::uint64_t size = pad_to(used, kBlockBytes);
    auto whole = window_.at(w_.at, size);
    if (!whole) return whole.error();
    if (whole->size() < used) return no("the file ends within a batch");
    auto payload = whole->subspan(kBatchHeaderBytes, b->payload_bytes);
    if (!payload_holds(*b, header_, w_.at, payload)) {
      return no("the checksum of the batch's records fails");
    }
    auto padding = whole->subspan(used);
    if (!all_zero(padding) && w_.bad_padding == 0)
      w_.bad_padding = w_.at + used;
    auto ok = records(*b, payload, visit);
    if (!ok) return ok.error();
    if (!*ok) return std::uint64_t{0};
    w_.prev_crc = b->header_crc;
    return size;
  }

  Result<bool> records(const BatchHeader& b, std::span<const std::byte> payload,
                       const Visit& visit) {
    std::size_t at = 0;
    for (std::uint32_t n = 0; n < b.records; ++n) {
      std::uint64_t offset = w_.at + kBatchHeaderBytes + at;
      auto rest = payload.subspan(std::min(at, payload.size()));
      auto frame = check_record(rest, header_, offset);
      if (!frame) {
        w_.why = "offset " + number(offset) +
                 ": the record's checksum fails inside a batch that holds";
        return false;
      }
      if (visit) {
        auto go_on =
            visit(*frame, rest.subspan(kRecordHeaderBytes, frame->bytes),
                  offset, w_.next);
        if (!go_on) return go_on;
        if (!*go_on) {
          w_.why = "enough";
          return false;
        }
      }
      ++w_.next;
      ++w_.records;
      at += record_room(frame->bytes);
    }
    return true;
  }

  Window window_;
  const SegmentHeader& header_;
  Walked w_;
};

// What lies at and behind an offset: bytes that are not zero, the greatest lsn
// that a batch header among them vouches for, and the last that one names.
struct Behind {
  std::uint64_t bytes = 0;
  Lsn durable = 0, last = 0;
};
Result<Behind> look_behind(const File& file, const SegmentHeader& header,
                           std::uint64_t at) {
  Behind behind;
  Window window(file);
  for (;; at += kBlockBytes) {
    auto block = window.at(at, kBlockBytes);
    if (!block) return block.error();
    if (block->empty()) return behind;
    if (all_zero(*block)) continue;
    behind.bytes += block->size();
    if (auto batch = decode_batch_header(*block, header, at)) {
      behind.durable = std::max(behind.durable, batch->durable_lsn);
      behind.last = std::max(behind.last, batch->last_lsn());
    }
  }
}

class Verifier {
 public:
  Verifier(Storage& storage, const LogProgress& progress)
      : storage_(storage), progress_(progress) {}

  Result<LogReport> run() {
    auto names = storage_.list("wal");
    if (!names) {
      if (names.error().code != Code::not_found) return names.error();
      return Error{Code::not_found, "there is no log: " + names.error().what};
    }
    for (const std::string& name : *names) {
      auto ok = measure("wal/" + name);
      if (!ok) return ok.error();
    }
    if (auto ok = manifest(); !ok) return ok.error();
    if (auto ok = checkpoints(); !ok) return ok.error();
    if (auto ok = find(); !ok) return ok.error();
    if (auto ok = walk_live(); !ok) return ok.error();
    if (auto ok = walk_kept(); !ok) return ok.error();
    for (const FoundSegment& segment : chain_.dead) {
      LogFile& file = file_of(segment.name);
      file.verdict = LogFile::Verdict::unused;
      file.note = "cut off by an earlier start; the next removes it";
    }
    verdicts();
    return std::move(report_);
  }

 private:
  // Every name gets its line; most are filled in later.
  Result<void> measure(const std::string& name) {
    auto opened = storage_.open(name, OpenMode::read);
    if (!opened) {
      finding(name, 0, 0, 0, "cannot be opened: " + opened.error().what, true);
      LogFile lost;
      lost.name = name;
      lost.kind = "other";
      report_.files.push_back(std::move(lost));
      return {};
    }
    auto bytes = (*opened)->size();
    if (!bytes) return bytes.error();
    LogFile file;
    file.name = name;
    file.bytes = *bytes;
    file.kind = name == "wal/MANIFEST"    ? "manifest"
                : name.ends_with(".seg")  ? "segment"
                : name.ends_with(".ckpt") ? "checkpoint"
                                          : "other";
    if (file.kind == "other") {
      file.verdict = LogFile::Verdict::unused;
      file.note = name == "wal/LOCK"     ? "the servers' lock"
                  : name == kManifestTmp ? "the manifest before"
                  : name.starts_with("wal/held-") ||
                          name.starts_with("wal/spare-") ||
                          name.starts_with("wal/checkpoint-room")
                      ? "room that is held"
                  : name.ends_with(".tmp") ? "unfinished; the next start "
                                             "removes it"
                                           : "not a file of the log";
    } else {
      total_ += file.bytes;
    }
    report_.bytes += file.bytes;
    report_.files.push_back(std::move(file));
    return {};
  }

  LogFile& file_of(const std::string& name) {
    for (LogFile& file : report_.files) {
      if (file.name == name) return file;
    }
    LogFile& file = report_.files.emplace_back();
    file.name = name;
    return file;
  }
  bool there(const std::string& name) const {
    return std::any_of(report_.files.begin(), report_.files.end(),
                       [&](const LogFile& f) { return f.name == name; });
  }

  LogFinding& finding(const std::string& file, std::uint64_t offset, Lsn first,
                      Lsn last, std::string what, bool stops) {
    report_.findings.push_back(
        {file, offset, first, last, std::move(what), stops});
    return report_.findings.back();
  }

  void moved(std::uint64_t bytes) {
    done_ += bytes;
    if (progress_) progress_(std::min(done_, total_), total_);
  }

  bool any_of_kind(std::string_view kind) const {
    return std::any_of(report_.files.begin(), report_.files.end(),
                       [&](const LogFile& f) { return f.kind == kind; });
  }

  Result<void> manifest() {
    const char* name = "wal/MANIFEST";
    if (!there(name)) {
      if (any_of_kind("segment") || any_of_kind("checkpoint")) {
        file_of(name).kind = "manifest";
        finding(name, 0, 0, 0,
                "it is missing, and other files of a log are there", true);
      }
      return {};
    }
    auto bytes = read_file(storage_, name, 2 * kCopyBytes);
    if (!bytes) {
      finding(name, 0, 0, 0, bytes.error().what, true);
      return {};
    }
    moved(bytes->size());
    std::optional<Manifest> sound;
    std::vector<LogFinding> bad;
    for (std::size_t i = 0; i < 2; ++i) {
      std::size_t at = std::min(i * kCopyBytes, bytes->size());
      std::size_t size = std::min(kCopyBytes, bytes->size() - at);
      std::vector<std::byte> copy(
          bytes->begin() + static_cast<std::ptrdiff_t>(at),
          bytes->begin() + static_cast<std::ptrdiff_t>(at + size));
      auto decoded = decode_manifest(copy);
      if (decoded) {
        if (!sound) sound = *decoded;
      } else {
        bad.push_back(
            {name, i * kCopyBytes, 0, 0,
             "copy " + number(i + 1) + " of 2: " + decoded.error().what,
             // A start reads the second only where the first is damaged.
             decoded.error().code == Code::newer && i == 0});
      }
    }
    for (LogFinding& one : bad) {
      one.stops_start |= !sound;
      if (!one.stops_start) one.what += "; a start would use the other copy";
      report_.findings.push_back(std::move(one));
    }
    if (!sound) return {};
    has_manifest_ = true;
    manifest_ = *sound;
    report_.durable = manifest_.durable_lsn;
    report_.clean_end = manifest_.clean;
    LogFile& file = file_of(name);
    file.note =
        std::string(manifest_.clean ? "clean end" : "not shut down clean") +
        ", durable to lsn " + number(manifest_.durable_lsn) + ", epoch " +
        number(manifest_.writer_epoch);
    return {};
  }

  Result<void> checkpoints() {
    std::set<std::string> named;
    bool newest_bad = false;
    int sound = 0, listed = 0;
    for (int i = 0; i < 2 && has_manifest_; ++i) {
      const auto& expected = manifest_.checkpoint[i];
      if (expected.lsn == 0) continue;
      ++listed;
      std::string name = checkpoint_name(expected.lsn);
      named.insert(name);
      LogFile& file = file_of(name);
      file.kind = "checkpoint";
      file.first = file.last = expected.lsn;
      auto image = read_checkpoint(storage_, manifest_, expected);
      moved(file.bytes);
      if (!image) {
        newest_bad |= i == 0;
        finding(name, 0, expected.lsn, expected.lsn,
                image.error().what + (i == 0 ? "; a start would use the older "
                                               "one, or the whole log"
                                             : ""),
                image.error().code != Code::corrupt);
        continue;
      }
      ++sound;
      if (report_.checkpoint == 0) report_.checkpoint = expected.lsn;
      file.note = i == 0 ? "the newest" : "the one before";
    }
    if (listed == 2 && sound == 0) {
      finding("wal/MANIFEST", 80, 0, 0, "neither of its checkpoints holds",
              true);
    }
    for (LogFile& file : report_.files) {
      if (file.kind != "checkpoint" || named.contains(file.name)) continue;
      file.verdict = LogFile::Verdict::unused;
      file.note = has_manifest_ ? "MANIFEST does not name it"
                                : "without MANIFEST it cannot be checked";
      done_ += file.bytes;
    }
    return {};
  }

  // Both headers of each segment; those with one that holds are the chain.
  Result<void> find() {
    std::vector<FoundSegment> found;
    for (LogFile& file : report_.files) {
      if (file.kind != "segment") continue;
      auto opened = storage_.open(file.name, OpenMode::read);
      if (!opened) continue;  // a finding already
      std::vector<std::byte> bytes(kSegmentDataOffset);
      auto got = (*opened)->read_at(0, bytes);
      if (!got) return got.error();
      bytes.resize(*got);
      moved(*got);
      std::optional<SegmentHeader> sound;
      std::vector<LogFinding> bad;
      for (std::size_t i = 0; i < 2; ++i) {
        std::size_t at = std::min(i * kSegmentHeaderBytes, bytes.size());
        auto header = decode_segment_header(std::span(bytes).subspan(at));
        if (header && sound && header->crc != sound->crc) {
          bad.push_back({file.name, i * kSegmentHeaderBytes, 0, 0,
                         "its two headers differ", false});
        } else if (header) {
          if (!sound) sound = *header;
        } else {
          bad.push_back(
              {file.name, i * kSegmentHeaderBytes, 0, 0,
               "header " + number(i + 1) + " of 2: " + header.error().what,
               header.error().code == Code::newer});
        }
      }
      for (LogFinding& one : bad) {
        one.stops_start |= !sound;
        if (sound) {
          one.first = sound->first_lsn;
          one.what += "; a start would use the other header";
        }
        report_.findings.push_back(std::move(one));
      }
      if (!sound) continue;
      if (!has_manifest_ && found.empty()) {
        manifest_.log_uuid[0] = sound->log_uuid[0];
        manifest_.log_uuid[1] = sound->log_uuid[1];
      }
      if (sound->log_uuid[0] != manifest_.log_uuid[0] ||
          sound->log_uuid[1] != manifest_.log_uuid[1] ||
          segment_name(sound->first_lsn) != file.name) {
        finding(file.name, 32, sound->first_lsn, 0,
                "it belongs to another log or place", true);
        continue;
      }
      file.first = sound->first_lsn;
      found.push_back({file.name, *sound});
    }
    chain_ = link_segments(std::move(found));
    return {};
  }

  Result<void> walk_live() {
    auto& live = chain_.live;
    const Lsn covered = report_.checkpoint;
    if (live.empty()) {
      if (manifest_.begun && !any_of_kind("segment")) {
        finding("wal", 0, 1, std::max<Lsn>(manifest_.durable_lsn, 1),
                "MANIFEST knows of segments, and none is there", true);
      }
      return {};
    }
    report_.first = live.front().header.first_lsn;
    if (report_.first > covered + 1) {
      finding(live.front().name, 0, covered + 1, report_.first - 1,
              "these are in no segment and no checkpoint: a segment is missing",
              true);
    }
    // The first that a start reads.
    std::size_t needed = live.size() - 1;
    while (needed > 0 && live[needed].header.first_lsn > covered + 1) --needed;

    std::vector<Walked> walks;
    Lsn vouched = manifest_.durable_lsn;
    std::size_t end = live.size();  // the first segment with a break
    std::uint64_t torn = 0;
    Lsn torn_last = 0;
    for (std::size_t i = 0; i < live.size(); ++i) {
      const SegmentHeader& header = live[i].header;
      bool last = i + 1 == live.size();
      auto file = storage_.open(live[i].name, OpenMode::read);
      if (!file) return file.error();
      auto walked =
          Walker(**file, header)
              .run(last ? kNoBatch : live[i + 1].header.prev.batch_seq,
                   understood(live[i].name),
                   [this](std::uint64_t n) { moved(n); });
      if (!walked) return walked.error();
      bool broken = last || !walked->reached;
      bool clean = last && manifest_.clean && end == live.size() &&
                   manifest_.durable_lsn == walked->next - 1;
      if (broken && !clean) {
        auto behind = look_behind(**file, header, walked->at);
        if (!behind) return behind.error();
        torn += behind->bytes;
        torn_last = std::max(torn_last, behind->last);
        vouched = std::max(vouched, behind->durable);
      }
      if (!last && walked->reached &&
          live[i + 1].header.prev !=
              ChainLink{header.seq, walked->batch_seq - 1, walked->next - 1,
                        walked->prev_crc}) {
        walked->reached = false;
        walked->why = "the next segment does not go on from here";
        broken = true;
      }
      if (broken && end == live.size()) end = i;
      vouched = std::max({vouched, header.durable_lsn, walked->durable});
      ends_[live[i].name] = walked->at;
      walks.push_back(std::move(*walked));
    }
    report_.durable = vouched;
    for (std::size_t i = 0; i < live.size(); ++i) {
      const Walked& w = walks[i];
      bool last = i + 1 == live.size();
      LogFile& file = file_of(live[i].name);
      file.first = live[i].header.first_lsn;
      file.last = w.next - 1;
      file.records = w.records;
      report_.records += w.records;
      if (w.bad_padding != 0) {
        finding(file.name, w.bad_padding, 0, 0,
                "bytes between two batches are not zero; no record is touched",
                false);
      }
      if (!last && w.reached) continue;
      Lsn lost_to = last ? vouched : live[i + 1].header.prev.last_lsn;
      bool damaged = judge(w.next, vouched, torn != 0) == TailVerdict::damaged;
      if (damaged) {
        Lsn to = std::max(w.next, std::min(lost_to, vouched));
        finding(file.name, w.at, w.next, to,
                w.why + "; this was durable and cannot be read whole",
                i >= needed);
        continue;
      }
      if (i > end) {
        file.note = "behind the torn end";
        continue;
      }
      if (torn != 0) {
        file.verdict = LogFile::Verdict::torn;
        report_.torn_bytes = torn;
        report_.torn_first = w.next;
        report_.torn_last = torn_last >= w.next ? torn_last : 0;
        file.note =
            "a torn tail of " + number(torn) + " bytes from offset " +
            number(w.at) + ", lsn " + number(w.next) +
            (report_.torn_last > w.next ? " to " + number(report_.torn_last)
                                        : "") +
            "; a start drops it";
      }
    }
    report_.last = walks[std::min(end, walks.size() - 1)].next - 1;
    if (report_.last < covered && report_.findings.empty()) {
      finding(live.back().name, walks.back().at, report_.last + 1, covered,
              "the log ends before its checkpoint", true);
    }
    return {};
  }

  // Where a segment ended, as the one behind it says. Null: that one is gone.
  const ChainLink* end_of(const SegmentHeader& header) const {
    for (const auto* list : {&chain_.kept, &chain_.live}) {
      for (const FoundSegment& next : *list) {
        if (next.header.prev.segment_seq == header.seq)
          return &next.header.prev;
      }
    }
    return nullptr;
  }

  // Kept for the bodies in them.
  Result<void> walk_kept() {
    for (const FoundSegment& segment : chain_.kept) {
      auto file = storage_.open(segment.name, OpenMode::read);
      if (!file) return file.error();
      const ChainLink* end = end_of(segment.header);
      auto walked =
          Walker(**file, segment.header)
              .run(end ? end->batch_seq : kNoBatch, understood(segment.name),
                   [this](std::uint64_t n) { moved(n); });
      if (!walked) return walked.error();
      Behind behind;
      if (!walked->reached) {
        auto looked = look_behind(**file, segment.header, walked->at);
        if (!looked) return looked.error();
        behind = *looked;
      }
      // All of it was durable before the next segment was begun.
      if (end) behind.durable = std::max(behind.durable, end->last_lsn);
      LogFile& line = file_of(segment.name);
      line.last = walked->next - 1;
      line.records = walked->records;
      report_.records += walked->records;
      line.note = "kept for the jobs that it holds";
      ends_[segment.name] = walked->at;
      if (walked->bad_padding != 0) {
        finding(segment.name, walked->bad_padding, 0, 0,
                "bytes between two batches are not zero; no record is touched",
                false);
      }
      if (!walked->reached && behind.durable >= walked->next) {
        finding(segment.name, walked->at, walked->next, behind.durable,
                walked->why + "; this was durable and cannot be read whole",
                false);
      } else if (behind.bytes != 0) {
        line.note += "; " + number(behind.bytes) +
                     " bytes follow that nothing says were durable";
      }
    }
    return {};
  }

  // Each record must be one that this program understands.
  Visit understood(const std::string& name) {
    return
        [this, name](const RecordFrame& frame, std::span<const std::byte> body,
                     std::uint64_t offset, Lsn lsn) -> Result<bool> {
          auto record = decode(static_cast<RecordType>(frame.type), body);
          if (record) return true;
          if (record.error().code == Code::newer && (frame.type & 0x80))
            return true;
          finding(name, offset, lsn, lsn, record.error().what, true);
          return true;
        };
  }

  void verdicts() {
    for (const LogFinding& one : report_.findings) {
      for (LogFile& file : report_.files) {
        if (file.name != one.file) continue;
        file.verdict = LogFile::Verdict::damaged;
        file.note = "";
      }
    }
    if (progress_) progress_(total_, total_);
  }

  Storage& storage_;
  const LogProgress& progress_;
  LogReport report_;
  Manifest manifest_;
  bool has_manifest_ = false;
  Chain chain_;
  std::map<std::string, std::uint64_t> ends_;
  std::uint64_t done_ = 0, total_ = 0;
};

// Where each segment's own records lie, as places.
struct Ground {
  Place begin = 0, end = 0;
};

class Replayer {
 public:
  Replayer(Storage& storage, const LogReport& report,
           const LogProgress& progress)
      : storage_(storage), report_(report), progress_(progress) {}

  Result<ReplayReport> run() {
    auto manifest = read_manifest(storage_);
    if (!manifest) return manifest.error();
    if (!*manifest) return std::move(out_);  // an empty root
    for (const auto& checkpoint : (*manifest)->checkpoint) {
      if (checkpoint.lsn == 0) continue;
      auto ok = load(**manifest, checkpoint);
      if (!ok) return ok.error();
    }
    if (!core_) {
      core_ = std::make_unique<Core>(CoreOptions{});
      watch();
    }
    auto found = find_segments(storage_, **manifest);
    if (!found) return found.error();
    Chain chain = link_segments(std::move(*found));
    for (std::size_t i = 0; i < chain.live.size(); ++i) {
      auto ok = replay(chain.live, i);
      if (!ok) return ok.error();
      if (core_->applied() >= report_.last) break;
    }
    core_->check_invariants();
    for (const auto* list : {&chain.live, &chain.kept}) {
      for (const FoundSegment& segment : *list) {
        auto ok = hold(segment);
        if (!ok) return ok.error();
      }
    }
    bodies();
    out_.live_jobs = core_->live_jobs();
    for (const QueueCounts& queue : core_->counts()) {
      out_.running += queue.by_state[static_cast<int>(State::running)];
    }
    return std::move(out_);
  }

 private:
  // The first that loads is replayed from; the other must load, too.
  Result<void> load(const Manifest& manifest,
                    const Manifest::Checkpoint& checkpoint) {
    auto image = read_checkpoint(storage_, manifest, checkpoint);
    if (!image) {  // verify_files() said so
      return image.error().code == Code::io ? Result<void>(image.error())
                                            : Result<void>();
    }
    const bool first = core_ == nullptr;
    auto core = std::make_unique<Core>(CoreOptions{});
    Core& loading = *core;
    if (first) {
      core_ = std::move(core);
      watch();
    }
    auto loaded = loading.load(*image);
    if (loaded) {
      loading.check_invariants();
      return {};
    }
    out_.findings.push_back({checkpoint_name(checkpoint.lsn), 0, checkpoint.lsn,
                             checkpoint.lsn, loaded.error().what, first});
    if (first) {
      core_.reset();
      places_.clear();
    }
    return {};
  }

  void watch() {
    core_->on_place([this](Place place, int delta) {
      if ((places_[place] += delta) == 0) places_.erase(place);
    });
  }

  Result<void> replay(const std::vector<FoundSegment>& live, std::size_t i) {
    const FoundSegment& segment = live[i];
    bool last = i + 1 == live.size();
    if (!last && live[i + 1].header.first_lsn <= core_->applied() + 1)
      return {};
    auto file = storage_.open(segment.name, OpenMode::read);
    if (!file) return file.error();
    auto apply = [&](const RecordFrame& frame, std::span<const std::byte> body,
                     std::uint64_t offset, Lsn lsn) -> Result<bool> {
      if (lsn > report_.last) return false;
      if (lsn <= core_->applied()) return true;
      auto record = decode(static_cast<RecordType>(frame.type), body);
      if (!record) return record.error();
      record->lsn = lsn;
      record->place = segment.header.base + offset;
      record->bytes = frame.bytes;
      core_->apply(*record);
      ++out_.records;
      if (progress_ && out_.records % 4096 == 0) {
        progress_(lsn, std::max(report_.last, lsn));
      }
      return true;
    };
    auto walked = Walker(**file, segment.header)
                      .run(last ? kNoBatch : live[i + 1].header.prev.batch_seq,
                           apply, {});
    if (!walked) return walked.error();
    return {};
  }

  Result<void> hold(const FoundSegment& segment) {
    auto file = storage_.open(segment.name, OpenMode::read);
    if (!file) return file.error();
    auto bytes = (*file)->size();
    if (!bytes) return bytes.error();
    const SegmentHeader& h = segment.header;
    grounds_[h.base] = {h.base, h.base + std::min(h.bytes, *bytes)};
    return {};
  }

  // Every live job's body lies in a segment that is there.
  void bodies() {
    std::uint64_t lost = 0;
    for (const auto& [place, count] : places_) {
      auto at = grounds_.upper_bound(place);
      bool there = at != grounds_.begin() && place < std::prev(at)->second.end;
      if (there) continue;
      if (++lost > kNamedPlacesMax) continue;
      out_.findings.push_back({"wal", 0, 0, 0,
                               "what a live job needs lies at place " +
                                   number(place) +
                                   ", in a segment that is missing",
                               false});
    }
    if (lost <= kNamedPlacesMax) return;
    out_.findings.push_back({"wal", 0, 0, 0,
                             "and " + number(lost - kNamedPlacesMax) +
                                 " more places that live jobs need",
                             false});
  }

  Storage& storage_;
  const LogReport& report_;
  const LogProgress& progress_;
  ReplayReport out_;
  std::map<Place, int> places_;
  std::unique_ptr<Core> core_;  // calls back into places_
  std::map<Place, Ground> grounds_;
};

class Held : public LogHold {
 public:
  explicit Held(std::unique_ptr<Storage::Lock> lock) : lock_(std::move(lock)) {}

 private:
  std::unique_ptr<Storage::Lock> lock_;
};

}  // namespace

std::string_view name(LogFile::Verdict verdict) {
  switch (verdict) {
    case LogFile::Verdict::whole:
      return "whole";
    case LogFile::Verdict::torn:
      return "torn";
    case LogFile::Verdict::damaged:
      return "damaged";
    case LogFile::Verdict::unused:
      return "unused";
  }
  return "?";
}

bool LogReport::starts() const {
  return std::none_of(findings.begin(), findings.end(),
                      [](const LogFinding& f) { return f.stops_start; });
}

Result<LogIdentity> log_identity(const std::string& dir) {
  auto storage = open_posix_storage(dir);
  if (!storage) return storage.error();
  auto manifest = read_manifest(**storage);
  if (!manifest) return manifest.error();
  if (!*manifest || !(*manifest)->begun) {
    return Error{Code::not_found, dir + ": no log has begun here"};
  }
  char text[40];
  std::snprintf(text, sizeof text, "%016llx%016llx",
                static_cast<unsigned long long>((*manifest)->log_uuid[0]),
                static_cast<unsigned long long>((*manifest)->log_uuid[1]));
  return LogIdentity{text};
}

Result<void> examine_log(const std::string& dir) {
  auto storage = open_posix_storage(dir);
  auto manifest = storage ? find_manifest(**storage)
                          : Result<std::optional<Manifest>>(storage.error());
  if (manifest || manifest.error().code == Code::not_found) return {};
  return manifest.error();
}

Result<LogReport> verify_files(const std::string& dir,
                               const LogProgress& progress) {
  auto storage = open_posix_storage(dir);
  if (!storage) return storage.error();
  return Verifier(**storage, progress).run();
}

Result<ReplayReport> replay_log(const std::string& dir, const LogReport& report,
                                const LogProgress& progress) {
  auto storage = open_posix_storage(dir);
  if (!storage) return storage.error();
  return Replayer(**storage, report, progress).run();
}

Result<std::unique_ptr<LogHold>> hold_log(const std::string& dir) {
  auto lock = share_posix_lock(dir, "wal/LOCK");
  if (!lock) return lock.error();
  if (!*lock) return std::unique_ptr<LogHold>();
  return std::unique_ptr<LogHold>(std::make_unique<Held>(std::move(*lock)));
}

}  // namespace machina
