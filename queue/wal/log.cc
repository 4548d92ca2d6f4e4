#include "queue/wal/log.h"

#include <iterator>

#include "queue/base/check.h"
#include "queue/wal/log_impl.h"
#include "queue/wal/manifest.h"

namespace machina {
namespace {

constexpr std::size_t kReadersMax = 64;  // files open for read()

}  // namespace

// --- reading -----------------------------------------------------------------

Result<std::pair<RecordType, std::vector<std::byte>>> FileLog::Impl::read(
    Place place, std::uint32_t bytes) const {
  std::shared_ptr<Segment> segment;
  {
    std::shared_lock hold(table_mutex_);
    auto it = table_.upper_bound(place);
    if (it != table_.begin()) segment = std::prev(it)->second;
  }
  std::string at = "log place " + std::to_string(place);
  if (!segment || bytes > options_.batch_bytes_max ||
      place + kRecordHeaderBytes + bytes >
          segment->header.base + segment->header.bytes)
    return Error{Code::not_found, at + " is in no segment that is kept"};
  Error error{Code::io, ""};
  std::shared_ptr<File> file = reader_of(*segment, &error);
  if (!file) return error;
  std::uint64_t offset = place - segment->header.base;
  std::vector<std::byte> data(kRecordHeaderBytes + bytes);
  auto got = file->read_at(offset, data);
  if (!got) return got.error();
  data.resize(*got);
  auto frame = check_record(data, segment->header, offset);
  if (!frame || frame->bytes != bytes)
    return Error{Code::corrupt, segment->name + ": offset " +
                                    std::to_string(offset) +
                                    ": the record's checksum fails"};
  data.erase(data.begin(), data.begin() + kRecordHeaderBytes);
  return std::pair(static_cast<RecordType>(frame->type), std::move(data));
}

std::shared_ptr<File> FileLog::Impl::reader_of(Segment& segment,
                                               Error* error) const {
  {
    std::lock_guard hold(segment.reader_mutex);
    if (segment.reader) return segment.reader;
  }
  auto file = storage_.open(segment.name, OpenMode::read);
  if (!file) {
    *error = file.error();
    return nullptr;
  }
  std::shared_ptr<File> reader = std::move(*file);
  std::shared_lock table(table_mutex_);
  if (readers_.fetch_add(1) >= kReadersMax) {
    for (auto& [base, other] : table_) {  // rare; those in use stay open
      std::lock_guard hold(other->reader_mutex);
      if (other->reader) readers_.fetch_sub(1);
      other->reader.reset();
    }
  }
  std::lock_guard hold(segment.reader_mutex);
  if (segment.reader) readers_.fetch_sub(1);  // another thread was faster
  segment.reader = reader;
  return reader;
}

// --- threads and the end -----------------------------------------------------

void FileLog::Impl::poison(const Error& error) {
  {
    std::lock_guard hold(mutex_);
    if (poisoned()) return;  // the first cause is the one that counts
    cause_ = error.what;
    poisoned_.store(true, std::memory_order_release);
    done_ready_.notify_all();
  }
  wake_owner();
}

void FileLog::Impl::wake_owner() {
  std::function<void()> wake;
  {
    std::lock_guard hold(mutex_);
    wake = wake_;
    done_ready_.notify_all();
  }
  if (wake) wake();
}

void FileLog::Impl::start_threads() {
  if (!options_.own_thread) return;
  writer_thread_ = std::thread([this] { run_writer(); });
  keeper_thread_ = std::thread([this] { run_keeper(); });
}

void FileLog::Impl::stop_threads() {
  {
    std::lock_guard hold(mutex_);
    stop_ = true;
    work_ready_.notify_all();
    keeper_ready_.notify_all();
  }
  if (writer_thread_.joinable()) writer_thread_.join();
  if (keeper_thread_.joinable()) keeper_thread_.join();
}

Result<void> FileLog::Impl::close() {
  if (closed_) return {};
  flush();
  while (!poisoned()) {
    if (!options_.own_thread) {
      while (write_batch() || do_checkpoint()) {
      }
    }
    {
      std::unique_lock hold(mutex_);
      done_ready_.wait(hold, [this] {
        bool idle =
            work_.empty() && !busy_ && !checkpoint_job_ && !checkpoint_busy_;
        return idle || poisoned() || stalled();
      });
    }
    poll();
    if (stalled()) break;
    if (!open_ && staged_.empty()) break;
    flush();
  }
  stop_threads();
  if (poisoned())
    return Error{Code::io, "the log is poisoned: " + poison_cause()};
  if (stalled())
    return Error{Code::full,
                 "records that nobody was told of find no room: " + room().why};
  closed_ = true;
  Result<void> ok;
  if (!options_.fsync) ok = sync_unsynced();
  ++manifest_.generation;
  manifest_.clean = true;
  manifest_.feature_incompat = features_;
  manifest_.durable_lsn = appended_;
  manifest_.time_ms = time_ms_;
  if (ok) ok = write_manifest(storage_, manifest_);
  if (ok) ok = sweep(true);
  if (!ok) poison(ok.error());
  lock_.reset();
  return ok;
}

FileLog::Stats FileLog::Impl::take_stats() {
  Stats stats;
  std::shared_lock table(table_mutex_);
  std::lock_guard hold(mutex_);
  stats = stats_;
  stats.segments = table_.size();
  stats_.sync_us.clear();
  sync_next_ = 0;
  return stats;
}

bool FileLog::Impl::write_one() {
  CHECK(!options_.own_thread);
  return write_batch() || write_vouch() || keep_one();
}

// --- FileLog -----------------------------------------------------------------

FileLog::FileLog(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
FileLog::~FileLog() = default;

Result<std::unique_ptr<FileLog>> FileLog::open(
    Storage& storage, const LogOptions& options, Lsn replay_from,
    const Load& load, const Visit& visit, RecoveryReport* report) {
  RecoveryReport unwanted;
  auto impl = std::make_unique<Impl>(storage, options);
  auto ok = impl->open(replay_from, load, visit,
                       report != nullptr ? report : &unwanted);
  if (!ok) return ok.error();
  return std::unique_ptr<FileLog>(new FileLog(std::move(impl)));
}

std::uint32_t FileLog::writer_epoch() const { return impl_->epoch_; }
Result<void> FileLog::append(Record* record) { return impl_->append(record); }
std::span<const std::byte> FileLog::encoded() const { return impl_->encoded(); }
void FileLog::flush() { impl_->flush(); }
void FileLog::poll() { impl_->poll(); }
void FileLog::on_wake(std::function<void()> wake) { impl_->set_wake(wake); }
Lsn FileLog::appended() const { return impl_->appended_; }
Lsn FileLog::durable() const { return impl_->durable_; }
bool FileLog::poisoned() const { return impl_->poisoned(); }
std::string FileLog::poison_cause() const { return impl_->poison_cause(); }

Result<std::pair<RecordType, std::vector<std::byte>>> FileLog::read(
    Place place, std::uint32_t bytes) const {
  return impl_->read(place, bytes);
}

void FileLog::need(Place place, int delta) { impl_->need(place, delta); }

void FileLog::set_history_applied(Lsn lsn) {
  if (lsn <= impl_->history_applied_) return;
  impl_->history_applied_ = lsn;
  impl_->release();
}

void FileLog::checkpoint(Lsn lsn, Millis time_ms, Image image) {
  impl_->checkpoint(lsn, time_ms, std::move(image));
}
bool FileLog::checkpointing() const { return impl_->checkpointing_; }
Lsn FileLog::checkpointed() const { return impl_->checkpointed_; }
void FileLog::hold(std::uint64_t log_bytes, std::uint64_t checkpoint_bytes) {
  impl_->hold(log_bytes, checkpoint_bytes);
}
FileLog::Room FileLog::room() const { return impl_->room(); }
bool FileLog::lacking() const { return impl_->lacking(); }
bool FileLog::stalled() const { return impl_->stalled(); }
bool FileLog::fits(std::uint64_t bytes, std::uint64_t keep) const {
  return impl_->fits(bytes, keep);
}
std::uint64_t FileLog::kept_for_checkpoints() const {
  return impl_->kept_for_checkpoints();
}
std::uint64_t FileLog::bytes_since_checkpoint() const {
  return impl_->bytes_since_checkpoint_;
}
std::uint64_t FileLog::staged_bytes() const { return impl_->staged_bytes_; }
bool FileLog::write_one() { return impl_->write_one(); }
Result<void> FileLog::close() { return impl_->close(); }
FileLog::Stats FileLog::take_stats() { return impl_->take_stats(); }

Result<std::unique_ptr<LogStore>> open_file_log(Storage& storage,
                                                const LogOptions& options,
                                                Lsn replay_from,
                                                const LogStore::Load& load,
                                                const LogStore::Visit& visit,
                                                RecoveryReport* report) {
  auto log = FileLog::open(storage, options, replay_from, load, visit, report);
  if (!log) return log.error();
  return std::unique_ptr<LogStore>(std::move(*log));
}

}  // namespace machina
