#include "server/auth/nonces.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>

#include "queue/base/check.h"
#include "queue/base/fd.h"

namespace machina {
namespace {

constexpr char kMagic[8] = {'M', 'N', 'O', 'N', 'C', 'E', '1', '\n'};

struct Entry {
  std::uint64_t key;
  std::int64_t ts_ms;
};
static_assert(sizeof(Entry) == 16);

// Times of signatures whose nonces are gone.
struct Range {
  std::int64_t low, high;
};

struct FileHeader {
  char magic[8];
  std::uint64_t clean;  // 1: all that was recorded is here, and synced
  char boot[48];
  std::uint64_t range_count;
  Range ranges[kNonceRangesMax];
};

std::uint64_t key_of(std::string_view nonce) {
  std::uint64_t h = 0xcbf29ce484222325ull;  // FNV-1a, then mixed
  for (unsigned char c : nonce) h = (h ^ c) * 0x100000001b3ull;
  h ^= h >> 32;
  h *= 0xd6e8feb86659fd93ull;
  h ^= h >> 32;
  return h == 0 ? 1 : h;
}

void add_range(std::vector<Range>* ranges, Range range) {
  ranges->push_back(range);
  std::sort(ranges->begin(), ranges->end(),
            [](const Range& a, const Range& b) { return a.low < b.low; });
  std::vector<Range> merged;
  for (const Range& r : *ranges) {
    if (!merged.empty() && r.low <= merged.back().high + 1) {
      merged.back().high = std::max(merged.back().high, r.high);
    } else {
      merged.push_back(r);
    }
  }
  // Too many: the oldest two become one, which refuses what lies between.
  while (merged.size() > kNonceRangesMax) {
    merged[1].low = merged[0].low;
    merged.erase(merged.begin());
  }
  *ranges = std::move(merged);
}

Error failure(const std::string& what, const std::string& path) {
  return Error{Code::io, what + " " + path + ": " + std::strerror(errno)};
}

std::string_view bytes_of(const void* data, std::size_t size) {
  return {static_cast<const char*>(data), size};
}

}  // namespace

std::string current_boot() {
  char text[48];
  int fd = ::open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return "";
  ssize_t n = ::read(fd, text, sizeof text - 1);
  ::close(fd);
  std::string id(text, n > 0 ? static_cast<std::size_t>(n) : 0);
  while (!id.empty() && id.back() == '\n') id.pop_back();
  return id;
}

// --- KeySet ----------------------------------------------------------------

// Sharded, so that one growth moves a 64th of the keys: no turn is held up.
KeySet::KeySet() : shards_(kShards) {}

bool KeySet::has(std::uint64_t key) const {
  const Shard& shard = shards_[key % kShards];
  if (shard.slots.empty()) return false;
  std::size_t mask = shard.slots.size() - 1;
  for (std::size_t i = (key >> 6) & mask;; i = (i + 1) & mask) {
    if (shard.slots[i] == key) return true;
    if (shard.slots[i] == 0) return false;
  }
}

void KeySet::add(std::uint64_t key) {
  Shard& shard = shards_[key % kShards];
  auto put = [](std::vector<std::uint64_t>* slots, std::uint64_t k) {
    std::size_t mask = slots->size() - 1, i = (k >> 6) & mask;
    while ((*slots)[i] != 0) i = (i + 1) & mask;
    (*slots)[i] = k;
  };
  if ((shard.used + 1) * 3 > shard.slots.size() * 2) {
    std::vector<std::uint64_t> larger(
        std::max<std::size_t>(16, shard.slots.size() * 2));
    for (std::uint64_t k : shard.slots) {
      if (k != 0) put(&larger, k);
    }
    shard.slots.swap(larger);
  }
  put(&shard.slots, key);
  ++shard.used;
  ++size_;
}

void KeySet::clear() {
  for (Shard& shard : shards_) shard = Shard();
  size_ = 0;
}

// --- Nonces ----------------------------------------------------------------

struct Nonces::Impl {
  struct Generation {
    KeySet keys;
    std::int64_t low = std::numeric_limits<std::int64_t>::max();
    std::int64_t high = std::numeric_limits<std::int64_t>::min();
    void add(std::uint64_t key, std::int64_t ts_ms) {
      keys.add(key);
      low = std::min(low, ts_ms);
      high = std::max(high, ts_ms);
    }
  };
  Generation young, old;
  std::vector<Range> gone;
  Millis life_ms = 0, born_ms = 0;
  std::size_t max = kNoncesMax;
  std::string dir, boot;

  // Between the loop and the thread. `turned`: begin a new file first.
  struct Batch {
    bool turned = false;
    std::vector<Range> gone;
    std::vector<Entry> entries;
  };
  std::vector<Entry> recorded;  // the loop's, until flush()
  std::mutex mutex;
  std::condition_variable ready;
  std::vector<Batch> waiting;
  bool stopping = false, failed = false, told = false;
  std::string why;
  std::thread thread;
  int fd = -1;  // the thread's

  std::string path(const char* suffix = "") const {
    return dir + "/nonces" + suffix;
  }
  bool kept() const { return !dir.empty(); }
  void turn_over(Millis mono_ms);
  void give(Batch batch);
  void run();
  void distrust();
  Result<void> begin_file(const std::vector<Range>& ranges);
  Result<void> load(const std::string& file, Millis window_ms, Millis wall_ms,
                    std::vector<Entry>* live, bool* known, bool* clean);
};

Nonces::Nonces() : impl_(std::make_unique<Impl>()) {}

Nonces::~Nonces() { (void)close(); }

Result<void> Nonces::Impl::begin_file(const std::vector<Range>& ranges) {
  FileHeader header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  boot.copy(header.boot, sizeof header.boot - 1);
  header.range_count = ranges.size();
  std::copy(ranges.begin(), ranges.end(), header.ranges);
  std::string temporary = path(".tmp");
  unlink(temporary.c_str());
  int next =
      ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (next < 0) return failure("create", temporary);
  if (!write_all(next, bytes_of(&header, sizeof header))) {
    Error error = failure("write", temporary);
    ::close(next);
    return error;
  }
  if (fd >= 0) ::close(fd);
  fd = next;
  return {};
}

// Entries that can be fresh still, or again, are kept; the others leave their
// range behind.
Result<void> Nonces::Impl::load(const std::string& file, Millis window_ms,
                                Millis wall_ms, std::vector<Entry>* live,
                                bool* known, bool* clean) {
  int in = ::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (in < 0) {
    if (errno == ENOENT) return {};
    return failure("open", file);
  }
  *known = true;
  FileHeader header{};
  bool ok = ::read(in, &header, sizeof header) ==
                static_cast<ssize_t>(sizeof header) &&
            std::memcmp(header.magic, kMagic, sizeof kMagic) == 0 &&
            header.range_count <= kNonceRangesMax;
  header.boot[sizeof header.boot - 1] = '\0';
  if (!ok || boot != header.boot) {
    // A torn file, or another run of the machine: it may lack its end.
    *clean = *clean && ok && header.clean == 1;
  }
  for (std::size_t i = 0; ok && i < header.range_count; ++i) {
    add_range(&gone, header.ranges[i]);
  }
  Range past{std::numeric_limits<std::int64_t>::max(),
             std::numeric_limits<std::int64_t>::min()};
  std::vector<Entry> piece(4096);
  while (ok) {
    ssize_t n = ::read(in, piece.data(), piece.size() * sizeof(Entry));
    if (n <= 0) break;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n) / sizeof(Entry);
         ++i) {
      const Entry& e = piece[i];
      if (e.key == 0) continue;
      if (e.ts_ms < wall_ms - window_ms || live->size() >= max) {
        past.low = std::min(past.low, e.ts_ms);
        past.high = std::max(past.high, e.ts_ms);
      } else {
        live->push_back(e);
      }
    }
  }
  ::close(in);
  if (past.low <= past.high) add_range(&gone, past);
  return {};
}

Result<std::unique_ptr<Nonces>> Nonces::open(const std::string& dir,
                                             Millis window_ms, Millis wall_ms,
                                             Millis mono_ms,
                                             const std::string& boot,
                                             std::size_t max) {
  std::unique_ptr<Nonces> nonces(new Nonces());
  Impl& impl = *nonces->impl_;
  impl.dir = dir;
  impl.boot = boot;
  impl.max = max;
  // A signature is fresh from `window` before its time to `window` after it.
  impl.life_ms = 2 * window_ms + 1000;
  impl.born_ms = mono_ms;
  if (!impl.kept()) return nonces;
  std::vector<Entry> live;
  bool known = false, clean = true;
  for (const char* suffix : {".old", ""}) {
    auto ok =
        impl.load(impl.path(suffix), window_ms, wall_ms, &live, &known, &clean);
    if (!ok) return ok.error();
  }
  if (known && !clean) {
    add_range(&impl.gone,
              {std::numeric_limits<std::int64_t>::min() / 2, wall_ms});
  }
  if (auto ok = impl.begin_file(impl.gone); !ok) return ok.error();
  for (const Entry& e : live) impl.young.add(e.key, e.ts_ms);
  if (!write_all(impl.fd, bytes_of(live.data(), live.size() * sizeof(Entry)))) {
    return failure("write", impl.path(".tmp"));
  }
  if (rename(impl.path(".tmp").c_str(), impl.path().c_str()) != 0) {
    return failure("rename", impl.path(".tmp"));
  }
  unlink(impl.path(".old").c_str());
  impl.thread = std::thread([&impl] { impl.run(); });
  return nonces;
}

void Nonces::Impl::turn_over(Millis mono_ms) {
  if (old.low <= old.high) add_range(&gone, {old.low, old.high});
  old = std::move(young);
  young = Generation();
  born_ms = mono_ms;
  if (!kept()) return;
  Batch batch;  // what was recorded belongs to the file that ends here
  batch.entries.swap(recorded);
  give(std::move(batch));
  batch = Batch();
  batch.turned = true;
  batch.gone = gone;
  give(std::move(batch));
}

Nonces::Found Nonces::look(std::string_view nonce, std::int64_t ts_ms,
                           Millis mono_ms) {
  Impl& impl = *impl_;
  if (mono_ms - impl.born_ms >= impl.life_ms) {
    bool long_ago = mono_ms - impl.born_ms >= 2 * impl.life_ms;
    impl.turn_over(mono_ms);
    if (long_ago) impl.turn_over(mono_ms);
  }
  std::uint64_t key = key_of(nonce);
  if (impl.young.keys.has(key) || impl.old.keys.has(key)) return Found::used;
  for (const Range& range : impl.gone) {
    if (ts_ms >= range.low && ts_ms <= range.high) return Found::used;
  }
  return impl.young.keys.size() >= impl.max ? Found::full : Found::fresh;
}

void Nonces::record(std::string_view nonce, std::int64_t ts_ms) {
  std::uint64_t key = key_of(nonce);
  impl_->young.add(key, ts_ms);
  if (impl_->kept()) impl_->recorded.push_back({key, ts_ms});
}

int Nonces::retry_s(Millis mono_ms) const {
  Millis left = impl_->born_ms + impl_->life_ms - mono_ms;
  return static_cast<int>(std::max<Millis>(left + 999, 1000) / 1000);
}

std::size_t Nonces::size() const {
  return impl_->young.keys.size() + impl_->old.keys.size();
}

// --- The files -------------------------------------------------------------

void Nonces::Impl::give(Batch batch) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (failed) return;  // said by trouble(); what is in memory still counts
    if (!batch.turned && !waiting.empty()) {
      auto& last = waiting.back().entries;
      last.insert(last.end(), batch.entries.begin(), batch.entries.end());
    } else {
      waiting.push_back(std::move(batch));
    }
  }
  ready.notify_one();
}

void Nonces::flush() {
  if (impl_->recorded.empty()) return;
  Impl::Batch batch;
  batch.entries.swap(impl_->recorded);
  impl_->give(std::move(batch));
}

// The next start must not trust a file that lacks its end, nor the one before
// it, behind which nothing came.
void Nonces::Impl::distrust() {
  const std::uint64_t none = 0;
  if (fd >= 0) (void)!pwrite(fd, &none, sizeof none, 0);
  for (const char* suffix : {"", ".old"}) {
    int file = ::open(path(suffix).c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (file < 0) continue;
    (void)!pwrite(file, &none, sizeof none, 0);
    ::close(file);
  }
}

void Nonces::Impl::run() {
  std::unique_lock<std::mutex> lock(mutex);
  while (true) {
    ready.wait(lock, [this] { return stopping || !waiting.empty(); });
    if (waiting.empty()) return;
    std::vector<Batch> batches;
    batches.swap(waiting);
    lock.unlock();
    std::string trouble;
    for (Batch& batch : batches) {
      if (batch.turned) {
        rename(path().c_str(), path(".old").c_str());
        auto ok = begin_file(batch.gone);
        if (!ok) {
          trouble = ok.error().what;
        } else if (rename(path(".tmp").c_str(), path().c_str()) != 0) {
          trouble = failure("rename", path(".tmp")).what;
        }
      }
      if (trouble.empty() && fd >= 0 &&
          !write_all(fd, bytes_of(batch.entries.data(),
                                  batch.entries.size() * sizeof(Entry)))) {
        trouble = failure("write", path()).what;
      }
    }
    // Without the lock, which the event loop waits for: the disk may hang.
    if (!trouble.empty()) distrust();
    lock.lock();
    if (!trouble.empty()) {
      failed = true;
      why = trouble;
      waiting.clear();
      if (stopping) return;
    }
  }
}

std::string Nonces::trouble() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  if (!impl_->failed || impl_->told) return "";
  impl_->told = true;
  return impl_->why;
}

Result<void> Nonces::close() {
  Impl& impl = *impl_;
  if (!impl.thread.joinable()) return {};
  flush();
  {
    std::lock_guard<std::mutex> lock(impl.mutex);
    impl.stopping = true;
  }
  impl.ready.notify_one();
  impl.thread.join();
  Result<void> result;
  if (impl.failed) result = Error{Code::io, impl.why};
  // Both files are whole before either says so.
  int old = ::open(impl.path(".old").c_str(), O_WRONLY | O_CLOEXEC);
  std::uint64_t clean = 1;
  for (int fd : {old, impl.fd}) {
    if (fd < 0 || !result) continue;
    bool ok = fsync(fd) == 0 &&
              pwrite(fd, &clean, sizeof clean, offsetof(FileHeader, clean)) ==
                  static_cast<ssize_t>(sizeof clean) &&
              fsync(fd) == 0;
    if (!ok) result = failure("sync", impl.path());
  }
  if (old >= 0) ::close(old);
  if (impl.fd >= 0) ::close(impl.fd);
  impl.fd = -1;
  return result;
}

}  // namespace machina
