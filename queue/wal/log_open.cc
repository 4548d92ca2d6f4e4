#include <algorithm>
#include <cstdlib>

#include "queue/wal/checkpoint.h"
#include "queue/wal/log_impl.h"
#include "queue/wal/manifest.h"

namespace machina {

Result<void> FileLog::Impl::open(Lsn replay_from, const Load& load,
                                 const Visit& visit, RecoveryReport* report) {
  Lsn covered = 0;
  if (auto ok = start_manifest(); !ok) return ok;
  if (auto ok = load_checkpoint(load, report, &covered); !ok) return ok;
  if (auto ok = recover(replay_from, covered, visit, report); !ok) return ok;
  describe(report);
  start_threads();
  return {};
}

// The lock, and what the manifest says. An empty root gets its first one.
Result<void> FileLog::Impl::start_manifest() {
  if (auto ok = storage_.make_dir("wal"); !ok) return ok;
  auto lock = storage_.lock("wal/LOCK");
  if (!lock) return lock.error();
  lock_ = std::move(*lock);
  if (options_.on_locked) options_.on_locked();
  auto manifest = find_manifest(storage_);
  if (!manifest) return manifest.error();
  if (*manifest) {
    manifest_ = **manifest;
    return {};
  }
  manifest_.log_uuid[0] = random_.next();
  manifest_.log_uuid[1] = random_.next();
  return storage_.sync_dir(".");
}

// Temporary names are of work that was never finished, and so are checkpoints
// that no manifest names.
Result<void> FileLog::Impl::sweep(bool tmp) {
  auto names = storage_.list("wal");
  if (!names) return names.error();
  for (const std::string& name : *names) {
    std::string full = "wal/" + name;
    bool stale = name.ends_with(tmp ? ".tmp" : ".ckpt");
    stale &= full != kManifestTmp && (full != kRoomName || !options_.hold);
    for (const Held& held : held_) stale &= full != held.name || !options_.hold;
    for (const auto& checkpoint : manifest_.checkpoint)
      stale &= checkpoint.lsn == 0 || full != checkpoint_name(checkpoint.lsn);
    if (!stale) continue;
    if (auto ok = storage_.remove(full); !ok) return ok;
  }
  return {};
}

// What an earlier start held is held on: on a full disk it is all there is.
// The spare is told by its name: on a small file system a unit is as large.
Result<void> FileLog::Impl::adopt() {
  if (!options_.hold) return {};
  auto names = storage_.list("wal");
  if (!names) return names.error();
  bool any_spare = false;
  for (const std::string& name : *names) {
    bool room = "wal/" + name == kRoomName;
    bool spare = name.starts_with("spare-");
    bool held = (name.starts_with("held-") || spare) && name.ends_with(".tmp");
    if (!room && !held) continue;
    auto file = storage_.open("wal/" + name, OpenMode::write);
    if (!file) return file.error();
    auto size = (*file)->size();
    if (!size) return size.error();
    // Killed between making the file and giving it blocks, or refused these.
    if (*size == 0) continue;
    // After a power cut it may be shorter than it was, or have holes.
    auto whole = (*file)->allocate(*size);
    if (!whole && whole.error().code != Code::full) return whole;
    if (room) room_bytes_ = whole ? *size : 0;
    if (room || !whole || *size < unit_bytes() || *size % kBlockBytes != 0)
      continue;
    spare = spare && options_.spares && options_.fsync &&
            *size == pad_to(options_.segment_bytes, kBlockBytes);
    // One is enough; sweep() gives back what others took.
    if (spare && std::exchange(any_spare, true)) continue;
    held_.push_back({"wal/" + name, *size, spare, false});
    spare_number_ = std::max<std::uint64_t>(
        spare_number_,
        std::strtoull(name.c_str() + name.find('-') + 1, nullptr, 10));
  }
  return {};
}

Result<void> FileLog::Impl::load_checkpoint(const Load& load,
                                            RecoveryReport* report,
                                            Lsn* covered) {
  Error newest{Code::corrupt, ""};
  for (int i = 0; i < 2; ++i) {
    const auto checkpoint = manifest_.checkpoint[i];
    if (checkpoint.lsn == 0) break;
    auto image = read_checkpoint(storage_, manifest_, checkpoint);
    if (!image && image.error().code != Code::corrupt) return image.error();
    if (!image) {
      if (i == 0) newest = image.error();
      report->checkpoint_fell_back = true;
      continue;
    }
    if (i == 1) {  // the older one is all that counts from here on
      manifest_.checkpoint[0] = checkpoint;
      manifest_.checkpoint[1] = {};
    }
    *covered = report->checkpoint = checkpoint.lsn;
    if (options_.image_features) features_ |= options_.image_features(*image);
    return load(checkpoint.lsn, *image);
  }
  if (manifest_.checkpoint[1].lsn != 0)
    return Error{Code::corrupt, newest.what + "; the older one neither"};
  // None, or the only one is bad: the log then goes back to its first record,
  // because nothing is released before there are two.
  manifest_.checkpoint[0] = {};
  return load(0, {});
}

Result<void> FileLog::Impl::recover(Lsn replay_from, Lsn covered,
                                    const Visit& visit,
                                    RecoveryReport* report) {
  auto found = find_segments(storage_, manifest_);
  if (!found) return found.error();
  for (const FoundSegment& segment : *found)
    next_seq_ = std::max(next_seq_, segment.header.seq + 1);
  Chain chain = link_segments(std::move(*found));
  Scan scan;
  if (chain.live.empty()) {
    if (manifest_.begun)
      return Error{Code::corrupt,
                   "wal: the manifest knows of segments, of lsns up to at "
                   "least " +
                       std::to_string(manifest_.durable_lsn) +
                       ", and none is there"};
  } else {
    if (chain.live.front().header.first_lsn > covered + 1)
      return Error{Code::corrupt,
                   "wal: lsn " + std::to_string(covered + 1) + ".." +
                       std::to_string(chain.live.front().header.first_lsn - 1) +
                       " are in no segment and no checkpoint"};
    Lsn from = std::max(std::min(covered, replay_from) + 1,
                        chain.live.front().header.first_lsn);
    Visit counting = [&](const Record& record) {
      features_ |= features_of(record);  // before there was a bit for them
      if (record.lsn > covered) {
        bytes_since_checkpoint_ += record_room(record.bytes);
      }
      return visit(record);
    };
    auto scanned = scan_chain(storage_, chain, manifest_, from, counting);
    if (!scanned) return scanned.error();
    scan = std::move(*scanned);
    if (scan.last < covered)
      return Error{Code::corrupt,
                   "wal: the log ends at lsn " + std::to_string(scan.last) +
                       ", before its checkpoint at " + std::to_string(covered)};
  }
  report->last = scan.last;
  report->durable = scan.vouched;
  report->clean = manifest_.clean;
  report->dropped_bytes = scan.dropped_bytes;
  report->dropped_from = scan.dropped_bytes != 0 ? scan.last + 1 : 0;
  report->segments = chain.live.size() + chain.kept.size();
  report->records = scan.records;
  report->first_visited = scan.first_visited;
  time_ms_ = std::max(manifest_.time_ms, scan.time_ms);
  // The scan settled the files that it read; this does so for their names.
  if (auto ok = storage_.sync_dir("wal"); !ok) return ok;
  return begin_writing(&chain, scan);
}

// A new epoch, a fresh segment (W4), and only then the end of what was cut off.
Result<void> FileLog::Impl::begin_writing(Chain* chain, const Scan& scan) {
  ChainLink link = scan.link;
  Place base = 0;
  for (const auto* list : {&chain->live, &chain->kept, &chain->dead}) {
    for (const FoundSegment& segment : *list)
      base = std::max(base, segment.header.base + segment.header.bytes);
  }
  for (std::size_t i = scan.keep; i < chain->live.size(); ++i)
    chain->dead.push_back(std::move(chain->live[i]));
  chain->live.resize(scan.keep);
  // A segment that kept no batch has the name that the new one needs: it is
  // replaced by the rename, and the chain goes on from the one before.
  if (!chain->live.empty() &&
      chain->live.back().header.first_lsn == scan.last + 1) {
    link = chain->live.back().header.prev;
    chain->live.pop_back();
  }
  for (const auto* list : {&chain->kept, &chain->live}) {
    for (const FoundSegment& segment : *list) remember(segment);
  }
  appended_ = durable_ = scan.last;
  link.last_lsn = scan.last;

  if (auto ok = adopt(); !ok) return ok;
  if (auto ok = sweep(true); !ok) return ok;
  ++manifest_.generation;
  epoch_ = ++manifest_.writer_epoch;
  manifest_.clean = false;
  features_ |= manifest_.feature_incompat | options_.features;
  manifest_.feature_incompat = features_;
  features_compat_ = manifest_.feature_compat;
  std::copy_n(manifest_.log_uuid, 2, log_uuid_);
  manifest_.durable_lsn = scan.last;
  manifest_.time_ms = time_ms_;
  if (auto ok = write_manifest(storage_, manifest_); !ok) return ok;
  if (auto ok = sweep(false); !ok) return ok;

  writer_ = std::make_unique<LogWriter>(storage_, options_, link, scan.last);
  checkpointed_ = manifest_.checkpoint[0].lsn;
  if (auto ok = begin_tail(base, scan.last + 1); !ok) return ok;
  for (const FoundSegment& segment : chain->dead) {
    if (segment.name == tail_->name) continue;
    if (auto ok = storage_.remove(segment.name); !ok) return ok;
  }
  if (!chain->dead.empty()) {
    if (auto ok = storage_.sync_dir("wal"); !ok) return ok;
  }
  if (manifest_.begun) return {};
  manifest_.begun = true;
  return write_manifest(storage_, manifest_);
}

// A small segment, so that it is there at once; on a full disk one of those
// that are held.
Result<void> FileLog::Impl::begin_tail(Place base, Lsn first_lsn) {
  std::uint64_t bytes =
      std::min(options_.first_segment_bytes, options_.segment_bytes);
  bytes = std::max<std::uint64_t>(bytes, 4 * kBlockBytes);
  tail_ = make_segment(bytes, base, first_lsn);
  tail_->zero_fill = options_.fsync && options_.spares;
  auto entered = writer_->enter(tail_);
  if (!entered && entered.error().code == Code::full) {
    if (auto held = take_held(bytes)) {
      tail_ = make_segment(held->bytes, base, first_lsn);
      tail_->spare = held->name;
      entered = writer_->enter(tail_);
    }
  }
  tail_held_ = entered && options_.hold;
  return entered;
}

void FileLog::Impl::remember(const FoundSegment& found) {
  auto segment = std::make_shared<Segment>();
  segment->header = found.header;
  segment->name = found.name;
  table_[found.header.base] = std::move(segment);
}

void FileLog::Impl::describe(RecoveryReport* report) const {
  std::string text;
  if (report->segments == 0) {
    text = "a new log";
  } else {
    text = "log of " + std::to_string(report->last) + " records in " +
           std::to_string(report->segments) + " segments, " +
           (report->clean ? "shut down clean" : "not shut down clean");
    if (report->checkpoint != 0)
      text += ", checkpoint at lsn " + std::to_string(report->checkpoint);
    if (report->checkpoint_fell_back)
      text += " (the newest checkpoint was bad and was passed over)";
    text += ", " + std::to_string(report->records) + " records replayed";
    if (report->dropped_bytes != 0)
      text += ", a torn tail of " + std::to_string(report->dropped_bytes) +
              " bytes from lsn " + std::to_string(report->dropped_from) +
              " dropped (the crash cut it off, or it was damaged since)";
  }
  report->text = text + "; writer epoch " + std::to_string(epoch_);
}

}  // namespace machina
