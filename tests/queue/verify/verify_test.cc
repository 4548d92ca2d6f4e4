// `machina wal`: a real log in a real directory, then one thing wrong with it.
// Whatever it was, not a byte is changed by looking.

#include "queue/verify/verify.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "queue/base/crc32c.h"
#include "queue/core/core.h"
#include "queue/wal/log.h"
#include "queue/wal/segment.h"

namespace machina {
namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<char>;

class Verify : public ::testing::Test {
 protected:
  Verify() {
    char path[] = "/tmp/machina-verify-XXXXXX";
    dir_ = mkdtemp(path);
  }
  ~Verify() override {
    std::error_code ignored;
    fs::remove_all(dir_, ignored);
  }

  // --- a server, as far as its files are concerned ---

  void open() {
    storage_ = std::move(*open_posix_storage(dir_));
    core_ = std::make_unique<Core>(CoreOptions{});
    core_->on_place([this](Place place, int delta) {
      if (log_) {
        log_->need(place, delta);
      } else {
        needs_[place] += delta;
      }
    });
    needs_.clear();
    LogOptions options;
    options.own_thread = options.spares = options.direct = false;
    options.segment_bytes = 64 << 10;
    options.first_segment_bytes = 32 << 10;
    options.batch_bytes_max = 32 << 10;
    auto log = FileLog::open(
        *storage_, options, 0,
        [&](Lsn, std::span<const std::byte> image) -> Result<void> {
          return image.empty() ? Result<void>() : core_->load(image);
        },
        [&](const Record& record) -> Result<void> {
          if (record.lsn > core_->applied()) core_->apply(record);
          return {};
        },
        &report_);
    ASSERT_TRUE(log) << log.error().what;
    log_ = std::move(*log);
    for (const auto& [place, delta] : needs_) {
      if (delta != 0) log_->need(place, delta);
    }
    core_->set_epoch(log_->writer_epoch());
  }
  Decision run(const Command& command) {
    Decision d = core_->decide(now_ += 10, ++seed_, command);
    for (Record& record : d.records) {
      EXPECT_TRUE(log_->append(&record));
      core_->apply(record);
    }
    write();
    return d;
  }
  void write() {
    do {
      log_->flush();
      log_->write_one();
      log_->poll();
    } while (log_->durable() < core_->applied());
  }
  // Jobs with bodies of `bytes`; every third is leased and done.
  void work(int jobs, std::size_t bytes = 1500) {
    for (int i = 0; i < jobs; ++i) {
      NewJob job;
      job.kind = i % 2 ? "noop" : "test.run";
      job.payload = "{\"p\":\"" + std::string(bytes, 'p') + "\"}";
      job.request_id = "request-" + std::to_string(i);
      if (i % 4 == 0) job.concurrency_key = "k";
      job.concurrency_limit = 1;
      run(EnqueueCommand{{job}, {}});
      if (i % 3) continue;
      LeaseCommand lease;
      lease.worker = "w";
      lease.kinds = {"*"};
      for (const GrantAnswer& g : run(lease).grants) {
        CompleteCommand done;
        done.items.push_back({g.fence, {}, {}});
        done.items[0].outcome.result = "\"the result\"";
        run(done);
      }
    }
  }
  void checkpoint() {
    log_->set_history_applied(core_->applied());
    std::vector<std::byte> image;
    core_->save(&image);
    log_->checkpoint(core_->applied(), core_->time(), std::move(image));
    while (log_->checkpointing()) {
      log_->write_one();
      log_->poll();
    }
  }
  void close() { ASSERT_TRUE(log_->close()); }
  void kill() {
    log_.reset();
    storage_.reset();
  }
  // Some segments, two checkpoints, and more behind them.
  void make(bool clean = true) {
    open();
    work(40);
    checkpoint();
    work(40);
    checkpoint();
    work(40);
    if (clean) close();
    kill();
  }

  // --- its files ---

  std::map<std::string, Bytes> files() const {
    std::map<std::string, Bytes> all;
    for (const auto& entry : fs::recursive_directory_iterator(dir_)) {
      std::string name = fs::relative(entry.path(), dir_);
      // The manifest of before: its room is kept, its bytes mean nothing.
      if (name == "wal/MANIFEST.tmp") continue;
      all[name] = entry.is_regular_file() ? read(name) : Bytes{};
    }
    return all;
  }
  Bytes read(const std::string& name) const {
    std::ifstream file(dir_ + "/" + name, std::ios::binary | std::ios::ate);
    Bytes bytes(static_cast<std::size_t>(file.tellg()), '\0');
    file.seekg(0);
    file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return bytes;
  }
  void put(const std::string& name, const Bytes& bytes) const {
    std::ofstream file(dir_ + "/" + name, std::ios::binary | std::ios::trunc);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  std::vector<std::string> names(const std::string& end) const {
    std::vector<std::string> found;
    for (const auto& [name, bytes] : files()) {
      if (name.ends_with(end)) found.push_back(name);
    }
    return found;
  }
  void flip(const std::string& name, std::size_t offset) const {
    Bytes bytes = read(name);
    ASSERT_LT(offset, bytes.size());
    bytes[offset] = static_cast<char>(bytes[offset] ^ 0x10);
    put(name, bytes);
  }

  // Verifies, replays where a start would, and looks that nothing changed.
  LogReport verify() {
    auto before = files();
    auto report = verify_files(dir_, {});
    EXPECT_TRUE(report) << report.error().what;
    if (!report) return {};
    if (report->starts()) {
      auto replayed = replay_log(dir_, *report, {});
      EXPECT_TRUE(replayed) << replayed.error().what;
      if (replayed) {
        live_ = replayed->live_jobs;
        for (const LogFinding& f : replayed->findings) {
          report->findings.push_back(f);
        }
      }
    }
    EXPECT_TRUE(before == files()) << "looking has changed something";
    return *report;
  }
  bool starts() {
    bool good = false;
    auto kept = files();
    {
      auto storage = std::move(*open_posix_storage(dir_));
      LogOptions options;
      options.own_thread = options.spares = options.direct = false;
      good = FileLog::open(
                 *storage, options, ~Lsn{0},
                 [](Lsn, std::span<const std::byte>) { return Result<void>(); },
                 [](const Record&) { return Result<void>(); }, nullptr)
                 .has_value();
    }
    fs::remove_all(dir_ + "/wal");
    fs::create_directory(dir_ + "/wal");
    for (const auto& [name, bytes] : kept) {
      if (name != "wal") put(name, bytes);
    }
    return good;
  }
  // One finding, in `file`; and the verdict on starting is a start's.
  LogFinding expect_damage(const std::string& file) {
    LogReport report = verify();
    EXPECT_FALSE(report.findings.empty()) << file;
    bool named = false;
    LogFinding found;
    for (const LogFinding& f : report.findings) {
      if (f.file == file && !named) found = f;
      named |= f.file == file;
    }
    EXPECT_TRUE(named) << file << " is not named, but "
                       << (report.findings.empty() ? ""
                                                   : report.findings[0].what);
    EXPECT_EQ(report.starts(), starts()) << file << ": " << found.what;
    return found;
  }

  std::vector<RecordLine> inspect(const InspectFilter& filter = {},
                                  std::string path = "") {
    auto before = files();
    std::vector<RecordLine> lines;
    auto end = inspect_log(path.empty() ? dir_ : path, filter,
                           [&](const RecordLine& line) {
                             lines.push_back(line);
                             return true;
                           });
    EXPECT_TRUE(end) << end.error().what;
    if (end) end_ = *end;
    EXPECT_TRUE(before == files());
    return lines;
  }
  static std::string field(const RecordLine& line, const std::string& name) {
    for (const RecordField& f : line.fields) {
      if (f.name == name) return f.value;
    }
    return "";
  }

  std::string dir_;
  std::unique_ptr<Storage> storage_;
  std::unique_ptr<FileLog> log_;
  std::unique_ptr<Core> core_;
  RecoveryReport report_;
  std::map<Place, int> needs_;
  Millis now_ = 1'763'000'000'000;
  std::uint64_t seed_ = 0, live_ = 0;
  InspectEnd end_;
};

TEST_F(Verify, AWholeLogIsWhole) {
  make();
  LogReport report = verify();
  EXPECT_TRUE(report.findings.empty()) << report.findings[0].what;
  EXPECT_TRUE(report.clean_end);
  EXPECT_EQ(report.last, core_->applied());
  EXPECT_EQ(report.durable, core_->applied());
  EXPECT_EQ(live_, core_->live_jobs());
  EXPECT_EQ(report.torn_bytes, 0u);
  EXPECT_GT(names(".seg").size(), 2u);
  std::uint64_t records = 0;
  for (const LogFile& f : report.files) {
    if (f.kind != "segment") continue;
    EXPECT_EQ(f.verdict, LogFile::Verdict::whole) << f.name;
    records += f.records;
  }
  EXPECT_EQ(records, report.records);
}

TEST_F(Verify, AKilledServersLogIsWholeToo) {
  make(false);
  EXPECT_TRUE(verify().findings.empty());
}

TEST_F(Verify, ARestartedServersLogIsWhole) {
  make(false);
  open();
  work(10);
  kill();
  LogReport report = verify();
  EXPECT_TRUE(report.findings.empty()) << report.findings[0].what;
  EXPECT_EQ(live_, core_->live_jobs());
}

TEST_F(Verify, ATornTailIsNamedAndNoDamage) {
  make(false);
  std::string last = names(".seg").back();
  Bytes bytes = read(last);
  // A batch of which only the second half came to the disk.
  Bytes torn(bytes.size() > 8192 ? 5000 : 4096, 'x');
  bytes.resize(pad_to(bytes.size(), 4096));
  bytes.insert(bytes.end(), torn.begin(), torn.end());
  put(last, bytes);
  LogReport report = verify();
  EXPECT_TRUE(report.findings.empty());
  EXPECT_GE(report.torn_bytes, torn.size());
  EXPECT_EQ(report.last, core_->applied());
  EXPECT_TRUE(starts());
}

TEST_F(Verify, ALastBatchThatNobodyVouchedForIsTorn) {
  open();
  work(6);
  Lsn before = core_->applied();
  NewJob job;
  job.kind = "noop";
  run(EnqueueCommand{{job}, {}});
  kill();
  std::string last = names(".seg").back();
  Bytes bytes = read(last);
  while (!bytes.empty() && bytes.back() == 0) bytes.pop_back();
  flip(last, bytes.size() - 1);
  LogReport report = verify();
  EXPECT_TRUE(report.findings.empty());
  EXPECT_EQ(report.last, before);
  EXPECT_GT(report.torn_bytes, 0u);
  // Which jobs it may concern: the header of the batch still holds.
  EXPECT_EQ(report.torn_first, before + 1);
  EXPECT_EQ(report.torn_last, core_->applied());
  // It may have been acknowledged and damaged since: nobody says it was not.
  for (const LogFile& file : report.files) {
    EXPECT_EQ(file.note.find("acknowledged"), file.note.npos) << file.note;
  }
  EXPECT_TRUE(starts());
}

// After a clean end MANIFEST vouches for the last batch too.
TEST_F(Verify, ALastBatchOfACleanLogIsDamagedNotTorn) {
  open();
  work(6);
  close();
  kill();
  std::string last = names(".seg").back();
  Bytes bytes = read(last);
  while (!bytes.empty() && bytes.back() == 0) bytes.pop_back();
  flip(last, bytes.size() - 1);
  LogFinding f = expect_damage(last);
  EXPECT_TRUE(f.stops_start);
  EXPECT_EQ(f.last, core_->applied());
  EXPECT_EQ(verify().torn_bytes, 0u);
}

// Segments older than a gap are kept for the bodies in them. One ends where the
// next says, if that is there.
TEST_F(Verify, TheLastBatchOfAKeptSegmentIsVouchedForByTheNext) {
  open();
  work(120);
  checkpoint();
  work(40);
  checkpoint();
  work(40);
  close();
  kill();
  auto segments = names(".seg");
  ASSERT_GT(segments.size(), 4u);
  fs::remove(dir_ + "/" + segments[2]);
  for (int i : {0, 1}) {
    SCOPED_TRACE(segments[i]);
    Bytes bytes = read(segments[i]);
    std::size_t end = bytes.size();
    while (end > 0 && bytes[end - 1] == 0) --end;
    flip(segments[i], end - 1);
    LogReport report = verify();
    put(segments[i], bytes);
    EXPECT_TRUE(report.starts());
    bool named = false;
    for (const LogFinding& f : report.findings) named |= f.file == segments[i];
    EXPECT_EQ(named, i == 0) << "what follows the other is gone";
    for (const LogFile& file : report.files) {
      EXPECT_EQ(file.note.find("acknowledged"), file.note.npos) << file.note;
    }
  }
}

// Every place where a byte of the log lies.
TEST_F(Verify, AFlippedBitAnywhereIsFound) {
  make();
  const auto whole = files();
  std::uint64_t looked = 0;
  for (const auto& [name, bytes] : whole) {
    if (bytes.empty()) continue;
    std::size_t end = bytes.size();
    bool segment = name.ends_with(".seg");
    if (segment) {  // behind its last batch lies nothing
      while (end > 0 && bytes[end - 1] == 0) --end;
      end = std::max<std::size_t>(end, kSegmentDataOffset);
    }
    std::set<std::size_t> offsets = {0, 8, 50, 4091, 4092, end - 1};
    for (std::size_t i = 0; i < 4; ++i) offsets.insert(end * i / 4 + 3);
    if (name == names(".seg").front()) {  // each part of a batch's header
      for (std::size_t at : {8192, 8196, 8200, 8216, 8224, 8240, 8252, 8256,
                             8260, 8264, 8270, 8300}) {
        offsets.insert(at);
      }
    }
    for (std::size_t offset : offsets) {
      if (offset >= end) continue;
      SCOPED_TRACE(name + " at " + std::to_string(offset));
      flip(name, offset);
      LogFinding f = expect_damage(name);
      EXPECT_LE(f.offset, offset);
      if (segment && offset >= kSegmentDataOffset && f.first != 0) {
        EXPECT_LE(f.first, f.last);
      }
      put(name, bytes);
      ++looked;
    }
  }
  EXPECT_GT(looked, 40u);
  EXPECT_TRUE(verify().findings.empty());
}

// The records' own checksums do not cover what fills a record up to the next;
// the batch's does.
TEST_F(Verify, TheBytesBetweenRecordsCount) {
  make();
  const std::string first = names(".seg").front();
  std::uint64_t gap = 0;
  for (const RecordLine& line : inspect()) {
    const std::uint64_t end = line.offset + kRecordHeaderBytes + line.bytes;
    if (line.file == first && end % 8 != 0 && gap == 0) gap = end;
  }
  ASSERT_NE(gap, 0u);
  ASSERT_EQ(read(first)[gap], 0);
  flip(first, gap);
  EXPECT_LE(expect_damage(first).offset, gap);
}

// A batch whose every checksum holds, and which went on from another.
TEST_F(Verify, ABatchOfAnotherLineIsDamage) {
  make();
  const std::string first = names(".seg").front();
  Bytes bytes = read(first);
  const auto all = std::as_writable_bytes(std::span(bytes));
  auto segment = decode_segment_headers(all.first(kSegmentDataOffset));
  ASSERT_TRUE(segment);
  auto batch = decode_batch_header(all.subspan(kSegmentDataOffset), *segment,
                                   kSegmentDataOffset);
  ASSERT_TRUE(batch);
  batch->prev_header_crc ^= 1;
  const std::uint64_t size =
      pad_to(kBatchHeaderBytes + batch->payload_bytes, kBlockBytes);
  seal_batch(&*batch, *segment, kSegmentDataOffset,
             all.subspan(kSegmentDataOffset, size));
  put(first, bytes);
  EXPECT_LE(expect_damage(first).offset, kSegmentDataOffset);
}

TEST_F(Verify, DamageIsListedInEachPlace) {
  make();
  auto segments = names(".seg");
  ASSERT_GT(segments.size(), 2u);
  flip(segments[0], 9000);
  flip(segments[1], 9000);
  LogReport report = verify();
  std::set<std::string> named;
  for (const LogFinding& f : report.findings) named.insert(f.file);
  EXPECT_TRUE(named.contains(segments[0]) && named.contains(segments[1]));
}

TEST_F(Verify, AMissingSegmentIsDamage) {
  open();
  work(120);
  close();
  kill();
  for (const std::string& name : names(".seg")) {
    SCOPED_TRACE(name);
    Bytes bytes = read(name);
    fs::remove(dir_ + "/" + name);
    LogReport report = verify();
    EXPECT_FALSE(report.findings.empty());
    EXPECT_FALSE(report.starts());
    EXPECT_FALSE(starts());
    put(name, bytes);
  }
}

TEST_F(Verify, ASegmentThatOnlyLiveJobsNeedIsMissed) {
  make();
  int missed = 0;
  for (const std::string& name : names(".seg")) {
    SCOPED_TRACE(name);
    Bytes bytes = read(name);
    fs::remove(dir_ + "/" + name);
    LogReport report = verify();
    EXPECT_EQ(report.starts(), starts());
    for (const LogFinding& f : report.findings) {
      missed += f.what.find("a live job needs") != f.what.npos;
    }
    put(name, bytes);
  }
  EXPECT_GT(missed, 0);
}

TEST_F(Verify, ATruncatedFileIsDamage) {
  make();
  for (const auto& [name, bytes] : files()) {
    if (bytes.empty()) continue;
    for (std::size_t size : {std::size_t{0}, std::size_t{100},
                             std::size_t{5000}, bytes.size() / 2}) {
      if (size >= bytes.size()) continue;
      bool zeros = true;
      for (std::size_t i = size; i < bytes.size(); ++i) zeros &= bytes[i] == 0;
      if (zeros) continue;
      SCOPED_TRACE(name + " cut to " + std::to_string(size));
      put(name, Bytes(bytes.begin(),
                      bytes.begin() + static_cast<std::ptrdiff_t>(size)));
      expect_damage(name);
      put(name, bytes);
    }
  }
}

// Of a later format: a start goes by the first copy that is whole.
TEST_F(Verify, AManifestOfALaterFormatStopsAStartWhereItIsReadFirst) {
  make();
  const Bytes whole = read("wal/MANIFEST");
  for (const std::size_t copy : {0u, 1u}) {
    Bytes bytes = whole;
    auto part = std::as_writable_bytes(std::span(bytes)).subspan(copy * 4096);
    part[10] = std::byte{0xfe};  // what it needs
    const std::uint32_t crc = crc32c(0, part.first(4092));
    std::memcpy(part.data() + 4092, &crc, sizeof crc);
    put("wal/MANIFEST", bytes);
    const LogFinding f = expect_damage("wal/MANIFEST");
    EXPECT_EQ(f.offset, copy * 4096);
    EXPECT_EQ(f.stops_start, copy == 0) << f.what;
    EXPECT_NE(f.what.find("needs log format"), std::string::npos) << f.what;
  }
}

TEST_F(Verify, AMissingManifestIsDamage) {
  make();
  fs::remove(dir_ + "/wal/MANIFEST");
  LogFinding f = expect_damage("wal/MANIFEST");
  EXPECT_TRUE(f.stops_start);
}

TEST_F(Verify, AMissingCheckpointIsDamageAndTheOlderOneServes) {
  make();
  fs::remove(dir_ + "/" + names(".ckpt").back());
  LogReport report = verify();
  EXPECT_FALSE(report.findings.empty());
  EXPECT_TRUE(report.starts());
  EXPECT_EQ(live_, core_->live_jobs());
}

TEST_F(Verify, AnotherLogsFileIsDamage) {
  make();
  std::string own = dir_;
  auto kept = files();
  fs::remove_all(dir_ + "/wal");
  make();
  std::string name = names(".seg").front();
  put(name, kept[name]);
  expect_damage(name);
}

TEST_F(Verify, NothingThereIsNotFound) {
  auto report = verify_files(dir_, {});
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, Code::not_found);
  EXPECT_TRUE(files().empty());
  fs::create_directory(dir_ + "/wal");
  EXPECT_TRUE(verify().findings.empty());
  EXPECT_EQ(names("").size(), 1u);
}

TEST_F(Verify, ARunningServerIsNamed) {
  open();
  auto held = hold_log(dir_);
  ASSERT_FALSE(held);
  EXPECT_EQ(held.error().code, Code::conflict);
  EXPECT_NE(held.error().what.find("process " + std::to_string(getpid())),
            std::string::npos)
      << held.error().what;
  kill();
  EXPECT_TRUE(hold_log(dir_));
}

TEST_F(Verify, InspectShowsEveryRecordOnceInOrder) {
  open();
  work(60);
  kill();
  std::vector<RecordLine> lines = inspect();
  ASSERT_EQ(lines.size(), core_->applied());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    EXPECT_EQ(lines[i].lsn, i + 1);
  }
  EXPECT_TRUE(end_.notes.empty());
  EXPECT_EQ(lines[0].type, "enqueue");
  EXPECT_EQ(field(lines[0], "kind"), "test.run");
  EXPECT_EQ(field(lines[0], "payload_bytes"), "1508");
}

TEST_F(Verify, InspectFilters) {
  open();
  work(60);
  kill();
  InspectFilter range;
  range.from = 7;
  range.to = 9;
  EXPECT_EQ(inspect(range).size(), 3u);
  InspectFilter limit;
  limit.limit = 4;
  EXPECT_EQ(inspect(limit).size(), 4u);
  JobId first = inspect()[0].id;
  InspectFilter job;
  job.job = first;
  std::vector<RecordLine> lines = inspect(job);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[1].type, "grant");
  EXPECT_EQ(lines[2].type, "end");
  EXPECT_EQ(field(lines[2], "result_bytes"), "12");
  InspectFilter request;
  request.request_id = "request-0";
  lines = inspect(request);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[2].id, first);
  InspectFilter kind;
  kind.kind = "noop";
  kind.type = "enqueue";
  EXPECT_EQ(inspect(kind).size(), 30u);
  std::string one = names(".seg").front();
  EXPECT_LT(inspect({}, dir_ + "/" + one).size(), core_->applied());
}

TEST_F(Verify, InspectHidesDataAndTokens) {
  open();
  NewJob job;
  job.kind = "noop";
  job.payload = R"({"word":"unseen"})";
  run(EnqueueCommand{{job}, {}});
  LeaseCommand lease;
  lease.worker = "w";
  lease.kinds = {"*"};
  Fence fence = run(lease).grants.at(0).fence;
  Decision block = run(BlockCommand{fence, "approval", R"({"a":"unseen"})", 0});
  std::string token = block.items.at(0).detail;
  ASSERT_EQ(token.size(), 32u);
  run(UnblockCommand{block.items[0].id, token, R"("unseen")", "me"});
  kill();
  auto all = [this](bool payload) {
    InspectFilter filter;
    filter.payload = payload;
    std::string text;
    for (const RecordLine& line : inspect(filter)) {
      for (const RecordField& f : line.fields) text += f.name + f.value + " ";
    }
    return text;
  };
  EXPECT_EQ(all(false).find("unseen"), std::string::npos);
  EXPECT_NE(all(true).find("unseen"), std::string::npos);
  EXPECT_EQ(all(true).find(token), std::string::npos);
  EXPECT_NE(all(false).find("approval"), std::string::npos);
}

TEST_F(Verify, InspectGoesOnBehindDamage) {
  open();
  work(90);
  close();
  kill();
  auto segments = names(".seg");
  ASSERT_GT(segments.size(), 2u);
  flip(segments[1], 9000);
  std::vector<RecordLine> lines = inspect();
  EXPECT_TRUE(end_.damaged);
  ASSERT_FALSE(end_.notes.empty());
  EXPECT_NE(end_.notes[0].find(segments[1]), std::string::npos);
  EXPECT_LT(lines.size(), core_->applied());
  EXPECT_EQ(lines.back().lsn, core_->applied());
}

}  // namespace
}  // namespace machina
