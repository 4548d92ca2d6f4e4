#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>

#include "queue/base/check.h"
#include "queue/wal/checkpoint.h"
#include "queue/wal/log_impl.h"
#include "queue/wal/manifest.h"

namespace machina {
namespace {

constexpr std::size_t kSpareStepBytes = 256 << 10;
constexpr auto kSparePause = std::chrono::milliseconds(4);
// The end of a held file that a record of this size may find too short.
constexpr std::uint64_t kWasteBytes = 64 << 10;

// Records that a held file of `bytes` takes for certain, each of at most
// `record` bytes: none where one of that size is more than the whole file.
std::uint64_t room_in(std::uint64_t bytes, std::uint64_t record) {
  if (kSegmentDataOffset + room_for(kBatchHeaderBytes + record) > bytes)
    return 0;
  std::uint64_t lost = kSegmentDataOffset + kBlockBytes +
                       std::min(bytes / 8, std::max(record, kWasteBytes));
  return bytes > lost ? bytes - lost : 0;
}

}  // namespace

void FileLog::Impl::checkpoint(Lsn lsn, Millis time_ms, Image image) {
  CHECK(!checkpointing_ && lsn <= durable_);
  checkpoint_grown_ = std::exchange(bytes_since_checkpoint_, 0);
  std::lock_guard hold(mutex_);
  if (lsn == 0 || lsn <= manifest_.checkpoint[0].lsn) return;  // nothing new
  checkpoint_lsn_ = lsn;
  checkpointing_ = true;
  checkpoint_job_ = CheckpointJob{lsn, time_ms, features_, std::move(image)};
  keeper_ready_.notify_one();
}

void FileLog::Impl::release() {
  if (!may_release_) return;
  Lsn covered;
  {
    std::lock_guard hold(mutex_);
    covered = manifest_.checkpoint[1].lsn;
  }
  covered = std::min(covered, history_applied_);
  std::vector<std::string> names;
  {
    std::unique_lock hold(table_mutex_);
    for (auto it = table_.begin(); it != table_.end();) {
      auto next = std::next(it);
      if (next == table_.end() || next->second->header.first_lsn > covered + 1)
        break;
      if (it->second->needs == 0) {
        if (it->second->reader) readers_.fetch_sub(1);
        names.push_back(it->second->name);
        table_.erase(it);
      }
      it = next;
    }
  }
  if (names.empty()) return;
  std::lock_guard hold(mutex_);
  removals_.insert(removals_.end(), names.begin(), names.end());
  keeper_ready_.notify_one();
}

std::uint64_t FileLog::Impl::kept_for_checkpoints() const {
  std::uint64_t bytes = 0;
  std::shared_lock hold(table_mutex_);
  for (auto it = table_.begin(); it != table_.end(); ++it) {
    auto next = std::next(it);
    if (next == table_.end() ||
        next->second->header.first_lsn > history_applied_ + 1)
      break;
    if (it->second->needs == 0) bytes += it->second->header.bytes;
  }
  return bytes;
}

void FileLog::Impl::need(Place place, int delta) {
  if (place == 0) return;
  std::shared_lock hold(table_mutex_);
  auto it = table_.upper_bound(place);
  if (it == table_.begin()) return;
  --it;
  Segment& segment = *it->second;
  if (place >= segment.header.base + segment.header.bytes) return;
  segment.needs += delta;
  CHECK(segment.needs >= 0);
}

// --- the keeper thread -------------------------------------------------------

bool FileLog::Impl::wants_spare() const {
  return options_.spares && options_.fsync && spare_wanted_ &&
         std::none_of(held_.begin(), held_.end(),
                      [](const Held& held) { return held.zeroed; });
}

// Held files that are not the spare: as large as a segment without one.
std::uint64_t FileLog::Impl::unit_bytes() const {
  std::uint64_t bytes = options_.segment_bytes;
  if (options_.fsync) bytes = std::min(bytes, kPlainSegmentBytes);
  return pad_to(bytes, kBlockBytes);
}

std::uint64_t FileLog::Impl::units_held() const {
  std::uint64_t bytes = 0;
  for (const Held& held : held_) {
    if (!held.spare) bytes += room_in(held.bytes, 0);
  }
  return bytes;
}

bool FileLog::Impl::wants_room() const {
  if (!options_.hold || room_refused_) return false;
  return units_held() < hold_log_ || room_bytes_ < hold_checkpoint_;
}

// Under mutex_, after any change of what is held or to be held.
void FileLog::Impl::settle_room() {
  if (stalled() || !options_.hold || room_refused_) return;
  if (units_held() >= hold_log_ && room_bytes_ >= hold_checkpoint_)
    lacking_ = false;
}

void FileLog::Impl::hold(std::uint64_t log_bytes,
                         std::uint64_t checkpoint_bytes) {
  std::lock_guard hold(mutex_);
  hold_log_ = log_bytes;
  hold_checkpoint_ = pad_to(checkpoint_bytes, kBlockBytes);
  room_refused_ = false;
  spare_wanted_ = true;
  // What was needed for a short while goes back, but for a few.
  for (auto it = held_.begin();
       it != held_.end() && units_held() > hold_log_ + 4 * unit_bytes();) {
    if (it->spare) {
      ++it;
      continue;
    }
    removals_.push_back(it->name);
    it = held_.erase(it);
  }
  settle_room();
  keeper_ready_.notify_one();
}

// Of the segment being written, behind what is staged.
std::uint64_t FileLog::Impl::tail_room() const {
  std::uint64_t used = tail_offset_ + (open_ ? open_->padded() : 0);
  used += 2 * kBlockBytes;  // the next batch's header, a vouching batch
  return tail_held_ && used < tail_bytes_ ? tail_bytes_ - used : 0;
}

FileLog::Room FileLog::Impl::room() const {
  std::lock_guard hold(mutex_);
  Room room;
  room.held = tail_room();
  for (const Held& held : held_) room.held += room_in(held.bytes, 0);
  room.lacking = lacking();
  room.stalled = stalled();
  if (room.lacking || room.stalled) room.why = lacking_why_;
  return room;
}

bool FileLog::Impl::fits(std::uint64_t bytes, std::uint64_t keep) const {
  std::lock_guard hold(mutex_);
  if (stalled()) return false;
  const std::uint64_t record =
      std::min<std::uint64_t>(bytes, options_.batch_bytes_max);
  std::uint64_t room = tail_room();
  const bool tail = bytes <= room;
  if (!tail) room = 0;  // what is left of it is lost
  for (const Held& held : held_) room += room_in(held.bytes, tail ? 0 : record);
  return room >= bytes && room - bytes >= keep;
}

bool FileLog::Impl::keep_one() {
  if (do_checkpoint()) return true;
  std::vector<std::string> names;
  bool room = false, spare = false;
  {
    std::lock_guard hold(mutex_);
    if (poisoned()) return false;
    names.swap(removals_);
    room = names.empty() && wants_room();
    spare = names.empty() && !room && wants_spare();
  }
  if (names.empty() && !room && !spare) return false;
  auto ok = room ? make_room() : spare ? make_spare() : run_removals(names);
  if (!ok) poison(ok.error());
  return true;
}

bool FileLog::Impl::do_checkpoint() {
  std::optional<CheckpointJob> job;
  {
    std::lock_guard hold(mutex_);
    if (!checkpoint_job_ || poisoned()) return false;
    job.swap(checkpoint_job_);
    checkpoint_busy_ = true;
  }
  auto ok = run_checkpoint(*job);
  job.reset();  // what it holds is much, and should go before it is done
  const bool full = !ok && ok.error().code == Code::full;
  if (!ok && !full) poison(ok.error());
  {
    std::lock_guard hold(mutex_);
    checkpoint_full_ = full;
    if (full) {
      lacking_ = true;
      lacking_why_ = ok.error().what;
    }
    checkpoint_busy_ = false;
    checkpoint_done_ = true;
    done_ready_.notify_all();
  }
  wake_owner();
  return true;
}

Result<void> FileLog::Impl::run_checkpoint(const CheckpointJob& job) {
  if (!options_.fsync) {
    // Never again, whatever it was (S3).
    if (auto ok = sync_unsynced(); !ok) return Error{Code::io, ok.error().what};
  }
  Manifest manifest;
  std::string room;
  {
    std::lock_guard hold(mutex_);
    manifest = manifest_;
    if (std::exchange(room_bytes_, 0) != 0) room = kRoomName;
  }
  manifest.feature_incompat |= job.features;
  const Manifest::Checkpoint oldest = manifest.checkpoint[1];
  auto written = write_checkpoint(storage_, manifest, job.lsn, job.time_ms,
                                  job.image(), room);
  if (!written) return written.error();
  ++manifest.generation;
  manifest.checkpoint[1] = manifest.checkpoint[0];
  manifest.checkpoint[0] = *written;
  manifest.durable_lsn = std::max(manifest.durable_lsn, writer_->synced());
  manifest.time_ms = std::max(manifest.time_ms, job.time_ms);
  if (auto ok = write_manifest(storage_, manifest); !ok) {
    // Nobody names it.
    if (ok.error().code == Code::full)
      (void)storage_.remove(checkpoint_name(job.lsn)).has_value();
    return ok;
  }
  {
    std::lock_guard hold(mutex_);
    manifest_ = manifest;
  }
  // From here on no one may need the third.
  bool gone = oldest.lsn == 0 || oldest.lsn == manifest.checkpoint[0].lsn ||
              oldest.lsn == manifest.checkpoint[1].lsn;
  if (gone) return {};
  return storage_.remove(checkpoint_name(oldest.lsn));
}

// With fsync off a checkpoint must not outlive the bodies that it points at.
Result<void> FileLog::Impl::sync_unsynced() {
  Lsn written;
  {
    std::lock_guard hold(mutex_);
    written = written_;
  }
  for (const std::string& name : writer_->take_unsynced()) {
    auto file = storage_.open(name, OpenMode::write);
    if (!file) return file.error();
    if (auto ok = (*file)->sync(); !ok) return ok;
  }
  writer_->set_synced(written);
  return {};
}

Result<void> FileLog::Impl::run_removals(
    const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (auto ok = storage_.remove(name); !ok) return ok;
  }
  {
    std::lock_guard hold(mutex_);
    room_refused_ = false;  // there is some now
  }
  return storage_.sync_dir("wal");
}

// One more file that is held, or the checkpoint's room.
Result<void> FileLog::Impl::make_room() {
  std::string name = kRoomName;
  std::uint64_t bytes = 0;
  bool log = false;
  {
    std::lock_guard hold(mutex_);
    log = units_held() < hold_log_;
    bytes = log ? unit_bytes() : hold_checkpoint_;
    if (log) name = "wal/held-" + std::to_string(++spare_number_) + ".tmp";
  }
  auto file = storage_.open(name, log ? OpenMode::create : OpenMode::write);
  if (!file && !log && file.error().code == Code::not_found)
    file = storage_.open(name, OpenMode::create);
  if (!file) return no_room(file.error(), "");
  auto ok = allocate(**file, bytes);
  if (ok) ok = (*file)->sync();
  file->reset();
  if (!ok) return no_room(ok.error(), log ? name : "");
  std::lock_guard hold(mutex_);
  if (log) {
    held_.push_back({name, bytes, false, false});
  } else {
    room_bytes_ = bytes;
  }
  settle_room();
  return {};
}

// Not even tried where it cannot be: a try takes the last of the room from
// others, if only for a moment.
Result<void> FileLog::Impl::allocate(File& file, std::uint64_t bytes) {
  auto size = file.size();
  if (!size) return size.error();
  auto free = storage_.free_bytes();
  if (free && *size < bytes && *free < bytes - *size)
    return Error{Code::full, "no space for " + std::to_string(bytes - *size) +
                                 " bytes that are to be held: " +
                                 std::to_string(*free) + " are free"};
  return file.allocate(bytes);
}

// A full disk is no fault of the log's: whoever asked for room hears of it.
Result<void> FileLog::Impl::no_room(const Error& error,
                                    const std::string& name) {
  if (error.code != Code::full) return error;
  {
    std::lock_guard hold(mutex_);
    room_refused_ = true;
    lacking_ = true;
    lacking_why_ = error.what;
  }
  wake_owner();
  if (name.empty()) return {};
  return storage_.remove(name);
}

// The next segment, before it is needed: its blocks first, then zeros. A full
// disk is no fault of the log's: it then goes on without.
Result<void> FileLog::Impl::make_spare() {
  Held spare;
  {
    std::lock_guard hold(mutex_);
    spare_wanted_ = false;
    for (const Held& held : held_) {
      if (held.spare) spare = held;
    }
    if (spare.name.empty())
      spare.name = "wal/spare-" + std::to_string(++spare_number_) + ".tmp";
  }
  if (spare.bytes == 0) {
    auto file = storage_.open(spare.name, OpenMode::create);
    if (!file && file.error().code == Code::full) return {};
    if (!file) return file.error();
    spare.bytes = pad_to(options_.segment_bytes, kBlockBytes);
    spare.spare = true;
    if (auto ok = allocate(**file, spare.bytes); !ok) {
      if (ok.error().code != Code::full) return ok;
      return storage_.remove(spare.name);
    }
    std::lock_guard hold(mutex_);
    held_.push_back(spare);
    zeroing_ = spare.name;
  } else {
    // It may have been taken since.
    std::lock_guard hold(mutex_);
    for (const Held& held : held_) {
      if (held.name == spare.name) zeroing_ = spare.name;
    }
    if (zeroing_.empty()) return {};
  }
  auto ok = zero_spare(spare);
  std::lock_guard hold(mutex_);
  bool whole = ok && !zeroing_.empty();
  zeroing_.clear();
  for (Held& held : held_) {
    if (held.name == spare.name) held.zeroed = whole && !stop_;
  }
  done_ready_.notify_all();
  if (!ok && ok.error().code == Code::full) return {};
  return ok;
}

// Written politely: small steps, each synced, with pauses, unless the log will
// soon want it.
Result<void> FileLog::Impl::zero_spare(const Held& spare) {
  // As durable the zeros go past the page cache, which would copy each of them
  // once more and keep it; they are as many bytes as the log itself writes.
  auto file = storage_.open(
      spare.name, options_.direct ? OpenMode::durable : OpenMode::write);
  if (!file) return file.error();
  BatchBuffer zeros;
  zeros.reserve(kSpareStepBytes, 0);
  std::memset(zeros.data(), 0, kSpareStepBytes);
  for (std::uint64_t at = 0; at < spare.bytes;) {
    std::size_t step =
        std::min<std::uint64_t>(kSpareStepBytes, spare.bytes - at);
    auto ok = (*file)->write_at(at, {zeros.data(), step});
    if (ok && !options_.direct) ok = (*file)->sync();
    if (!ok) return ok;
    at += step;
    if (!pause_spare(spare)) break;
  }
  return {};
}

// False when there is no use in going on.
bool FileLog::Impl::pause_spare(const Held& spare) {
  if (!options_.own_thread) return true;
  do_checkpoint();
  std::unique_lock hold(mutex_);
  if (wants_room()) {
    hold.unlock();
    if (auto ok = make_room(); !ok) poison(ok.error());
    hold.lock();
  }
  bool urgent = tail_offset_ > tail_bytes_ / 2;
  if (!urgent) keeper_ready_.wait_for(hold, kSparePause, [&] { return stop_; });
  bool taken = std::none_of(held_.begin(), held_.end(), [&](const Held& held) {
    return held.name == spare.name;
  });
  if (taken || stop_ || poisoned()) zeroing_.clear();
  return !zeroing_.empty();
}

void FileLog::Impl::run_keeper() {
  for (;;) {
    {
      std::unique_lock hold(mutex_);
      keeper_ready_.wait(hold, [this] {
        return stop_ ||
               (!poisoned() && (checkpoint_job_ || !removals_.empty() ||
                                wants_room() || wants_spare()));
      });
      if (stop_) return;
    }
    keep_one();
  }
}

}  // namespace machina
