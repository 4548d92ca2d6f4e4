// A log over a simulated disk, driven by hand, and the memory of what it was
// told and what it promised.

#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "queue/wal/log.h"
#include "queue/wal/segment.h"
#include "tests/support/sim_storage.h"

namespace machina {

inline LogOptions small_log() {
  LogOptions options;
  options.segment_bytes = 128 << 10;
  options.first_segment_bytes = 32 << 10;
  options.batch_bytes_max = 64 << 10;
  options.own_thread = false;
  options.spares = false;
  return options;
}

// Record number n: recognisable, of a size that depends on n.
inline Record numbered(std::uint64_t n, std::size_t extra = 0,
                       Millis life = 0) {
  EnqueueRecord body;
  std::memcpy(body.id.bytes.data(), &n, sizeof(n));
  body.job.kind = "noop";
  body.job.payload = "\"" + std::string(n % 97 + extra, 'x') + "\"";
  body.created_ms = life;
  Record record;
  record.time_ms = static_cast<Millis>(1000 + n);
  record.body = std::move(body);
  return record;
}

inline std::uint64_t number_of(const Record& record) {
  std::uint64_t n = 0;
  const auto& body = std::get<EnqueueRecord>(record.body);
  std::memcpy(&n, body.id.bytes.data(), sizeof(n));
  return n;
}

class Journal {
 public:
  explicit Journal(std::uint64_t seed = 1, LogOptions with = small_log())
      : disk(seed), options(with), random_(seed ^ 0x5eed) {
    options.random = &random_;
  }

  // Opens; replayed() is then what was visited. Empty on failure, see error().
  bool open(Lsn replay_from = 0) {
    log.reset();
    replayed.clear();
    image.clear();
    loaded = 0;
    report = {};
    auto opened = FileLog::open(
        disk, options, replay_from,
        [&](Lsn lsn, std::span<const std::byte> bytes) -> Result<void> {
          loaded = lsn;
          image.assign(bytes.begin(), bytes.end());
          return {};
        },
        [&](const Record& record) -> Result<void> {
          replayed.push_back(record);
          return {};
        },
        &report);
    if (!opened) {
      error = opened.error();
      bool lossy = !options.fsync &&
                   error.what.find("injected EIO") != std::string::npos;
      if (lossy) promised = std::min(promised, safe);  // see kill()
      return false;
    }
    log = std::move(*opened);
    ++life;
    safe = report.last;
    std::erase_if(lives, [&](auto& e) { return e.first > report.last; });
    return true;
  }

  // Appends `count` records numbered by their lsn; not yet written.
  bool append(int count, std::size_t extra = 0) {
    for (int i = 0; i < count; ++i) {
      Record record = numbered(log->appended() + 1, extra, life);
      if (!log->append(&record)) return false;
      if (record.lsn != log->appended()) return false;
      lives[record.lsn] = life;
      places[record.lsn] = {record.place, record.bytes};
    }
    return true;
  }
  // One batch at a time, no vouching.
  void write() {
    log->flush();
    while (log->durable() < log->appended() && !log->poisoned() &&
           !log->stalled()) {
      log->write_one();
      log->poll();
      log->flush();
    }
    promised = std::max(promised, log->durable());
  }
  // All the work there is, vouching and spares included.
  void settle() {
    do {
      log->flush();
      while (log->write_one()) log->poll();
      log->poll();
    } while (log->durable() < log->appended() && !log->poisoned() &&
             !log->stalled());
    promised = std::max(promised, log->durable());
  }
  bool put(int count, std::size_t extra = 0) {
    if (!append(count, extra)) return false;
    write();
    return !log->poisoned();
  }
  void checkpoint() {
    std::vector<std::byte> bytes(3000);
    Lsn lsn = log->durable();
    std::memcpy(bytes.data(), &lsn, sizeof(lsn));
    log->checkpoint(lsn, 5, std::move(bytes));
    settle();
    if (!log->checkpointing() && !log->poisoned()) safe = std::max(safe, lsn);
  }
  void crash() {
    log.reset();
    if (!options.fsync) promised = std::min(promised, safe);
    disk.crash();
  }
  void kill() {
    // With fsync off a failed sync may have lost what the cache still shows.
    if (!options.fsync && log && log->poisoned())
      promised = std::min(promised, safe);
    log.reset();
    disk.restart();
  }

  // What recovery gave is what was written under those lsns, by the life that
  // wrote it last; nothing promised is missing.
  ::testing::AssertionResult sound() {
    if (report.last < promised)
      return ::testing::AssertionFailure()
             << "ends at " << report.last << ", promised " << promised;
    Lsn next = loaded + 1;
    for (const Record& record : replayed) {
      if (record.lsn <= loaded) continue;
      auto wrote = lives.find(record.lsn);
      Millis by = std::get<EnqueueRecord>(record.body).created_ms;
      bool right = record.lsn == next++ && number_of(record) == record.lsn &&
                   wrote != lives.end() && wrote->second == by;
      if (!right)
        return ::testing::AssertionFailure()
               << "lsn " << record.lsn << " is number " << number_of(record)
               << " of life " << by;
    }
    if (next != report.last + 1)
      return ::testing::AssertionFailure()
             << "replayed to " << next - 1 << " of " << report.last;
    if (loaded != 0) {
      Lsn inside = 0;
      std::memcpy(&inside, image.data(), sizeof(inside));
      if (inside != loaded)
        return ::testing::AssertionFailure() << "a wrong checkpoint";
    }
    return ::testing::AssertionSuccess();
  }

  // The segments on the disk, oldest first.
  std::vector<std::string> segments() {
    std::vector<std::string> found;
    auto names = disk.list("wal");
    for (const auto& name : *names) {
      if (name.ends_with(".seg")) found.push_back("wal/" + name);
    }
    return found;
  }
  // Where batch number n (0: the first) of a segment begins.
  std::uint64_t batch_at(const std::string& name, int n) {
    auto bytes = disk.contents(name);
    auto header = decode_segment_headers(bytes);
    std::uint64_t at = kSegmentDataOffset;
    for (;; --n) {
      auto batch =
          decode_batch_header(std::span(bytes).subspan(at), *header, at);
      if (!batch || n == 0) return at;
      at += pad_to(kBatchHeaderBytes + batch->payload_bytes, kBlockBytes);
    }
  }

  SimStorage disk;
  LogOptions options;
  std::unique_ptr<FileLog> log;
  RecoveryReport report;
  Error error{Code::io, ""};
  std::vector<Record> replayed;
  std::vector<std::byte> image;
  Lsn loaded = 0;
  Lsn promised = 0;
  Lsn safe = 0;     // with fsync off: what survives even a power cut
  Millis life = 0;  // counts openings
  std::map<Lsn, Millis> lives;
  std::map<Lsn, std::pair<Place, std::uint32_t>> places;

 private:
  SeededRandom random_;
};

// Lsns from..to in order, each with the number that was its own.
inline ::testing::AssertionResult is_run(const std::vector<Record>& records,
                                         Lsn from, Lsn to) {
  if (records.size() != to + 1 - from)
    return ::testing::AssertionFailure()
           << records.size() << " records, not " << to + 1 - from;
  for (std::size_t i = 0; i < records.size(); ++i) {
    if (records[i].lsn != from + i || number_of(records[i]) != from + i)
      return ::testing::AssertionFailure()
             << "record " << i << " has lsn " << records[i].lsn
             << " and number " << number_of(records[i]);
  }
  return ::testing::AssertionSuccess();
}

}  // namespace machina
