// tests/support/faulty_log.h
//
// A log store that passes all calls to another one, until a test tells it to
// report nothing as durable, or to be poisoned as a deposed owner is.

#pragma once

#include <memory>
#include <string>
#include <utility>

#include "queue/wal/log_store.h"

namespace machina {

// What a test sets, on the shard's thread. It outlives the log store.
struct LogFaults {
  bool hold_durable = false;  // durable() stands still
  std::string poison;         // not empty: poisoned, with this cause
  std::uint64_t refused = 0;  // calls of append() while poisoned
};

class FaultyLog final : public LogStore {
 public:
  FaultyLog(std::unique_ptr<LogStore> base, LogFaults& faults)
      : base_(std::move(base)), faults_(faults) {}

  std::uint32_t writer_epoch() const override { return base_->writer_epoch(); }
  Result<void> append(Record* record) override {
    if (faults_.poison.empty()) return base_->append(record);
    ++faults_.refused;
    return Error{Code::io, faults_.poison};
  }
  std::span<const std::byte> encoded() const override {
    return base_->encoded();
  }
  void flush() override { base_->flush(); }
  void poll() override {
    base_->poll();
    if (!faults_.hold_durable && faults_.poison.empty())
      durable_ = base_->durable();
  }
  void on_wake(std::function<void()> wake) override { base_->on_wake(wake); }
  Lsn appended() const override { return base_->appended(); }
  Lsn durable() const override {
    const bool still = faults_.hold_durable || !faults_.poison.empty();
    return still ? durable_ : base_->durable();
  }
  bool poisoned() const override {
    return !faults_.poison.empty() || base_->poisoned();
  }
  std::string poison_cause() const override {
    return faults_.poison.empty() ? base_->poison_cause() : faults_.poison;
  }
  Result<std::pair<RecordType, std::vector<std::byte>>> read(
      Place place, std::uint32_t bytes) const override {
    return base_->read(place, bytes);
  }
  void need(Place place, int delta) override { base_->need(place, delta); }
  void set_history_applied(Lsn lsn) override {
    base_->set_history_applied(lsn);
  }
  void checkpoint(Lsn lsn, Millis time_ms, Image image) override {
    base_->checkpoint(lsn, time_ms, std::move(image));
  }
  bool checkpointing() const override { return base_->checkpointing(); }
  std::uint64_t bytes_since_checkpoint() const override {
    return base_->bytes_since_checkpoint();
  }
  std::uint64_t kept_for_checkpoints() const override {
    return base_->kept_for_checkpoints();
  }
  void hold(std::uint64_t log_bytes, std::uint64_t checkpoint_bytes) override {
    base_->hold(log_bytes, checkpoint_bytes);
  }
  Room room() const override { return base_->room(); }
  bool lacking() const override { return base_->lacking(); }
  bool stalled() const override { return base_->stalled(); }
  bool fits(std::uint64_t bytes, std::uint64_t keep) const override {
    return base_->fits(bytes, keep);
  }
  Lsn checkpointed() const override { return base_->checkpointed(); }
  std::uint64_t staged_bytes() const override { return base_->staged_bytes(); }
  bool write_one() override { return base_->write_one(); }
  Result<void> close() override {
    auto closed = base_->close();
    if (faults_.poison.empty()) return closed;
    return Error{Code::io, faults_.poison};
  }
  Stats take_stats() override { return base_->take_stats(); }

 private:
  std::unique_ptr<LogStore> base_;
  LogFaults& faults_;
  Lsn durable_ = 0;  // as of the last poll() that was not held
};

// Opens a FileLog behind a FaultyLog.
inline OpenLog faulty(LogFaults& faults) {
  return [&faults](
             Storage& storage, const LogOptions& options, Lsn replay_from,
             const LogStore::Load& load, const LogStore::Visit& visit,
             RecoveryReport* report) -> Result<std::unique_ptr<LogStore>> {
    auto log =
        open_file_log(storage, options, replay_from, load, visit, report);
    if (!log) return log;
    return std::unique_ptr<LogStore>(new FaultyLog(std::move(*log), faults));
  };
}

}  // namespace machina
