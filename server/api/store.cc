#include "server/api/store.h"

#include <dirent.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "queue/base/check.h"
#include "queue/base/hex.h"
#include "queue/base/numbers.h"

namespace machina {
namespace {

constexpr std::size_t kDigestDigits = 64;

Error failure(const std::string& what) {
  Code code = errno == ENOENT                      ? Code::not_found
              : errno == ENOSPC || errno == EDQUOT ? Code::full
                                                   : Code::io;
  return Error{code, what + ": " + std::strerror(errno)};
}

Result<void> make_dir(int at, const std::string& name) {
  if (mkdirat(at, name.c_str(), 0700) != 0 && errno != EEXIST) {
    return failure("mkdir " + name);
  }
  return {};
}

Fd open_dir(int at, const std::string& name) {
  return Fd(openat(at, name.c_str(),
                   O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
}

// The directory `name`, made and synced into its parent where it is missing.
Result<Fd> enter(int at, const std::string& name) {
  Fd dir = open_dir(at, name);
  if (dir) return dir;
  if (auto made = make_dir(at, name); !made) return made.error();
  if (fsync(at) != 0) return failure("sync the directory of " + name);
  dir = open_dir(at, name);
  if (!dir) return failure("open " + name);
  return dir;
}

// Empty too where it cannot be read.
std::vector<std::string> names_in(int dir) {
  std::vector<std::string> names;
  int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* listing = copy < 0 ? nullptr : fdopendir(copy);
  if (listing == nullptr) {
    if (copy >= 0) close(copy);
    return names;
  }
  while (dirent* entry = readdir(listing)) {
    if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
  }
  closedir(listing);
  return names;
}

std::string log_dir_of(const JobId& job, std::string* bucket) {
  std::string id = to_string(job);
  *bucket = id.substr(id.size() - 2);
  return id;
}

}  // namespace

struct Store::Dirs {
  Fd logs, objects, index, tmp;
  std::atomic<std::uint64_t> next_tmp{0}, floor{0};
  std::mutex mutex;  // links come and go one at a time
};

namespace {

// F5. Asked before each piece, not now and then: a second of uploads is much.
Result<void> room_for(const Store::Dirs& dirs, std::size_t bytes) {
  const std::uint64_t floor = dirs.floor.load(std::memory_order_relaxed);
  struct statvfs disk {};
  if (floor == 0 || fstatvfs(dirs.tmp.get(), &disk) != 0) return {};
  const auto free = static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize;
  if (free >= floor + bytes) return {};
  return Error{Code::full,
               "disk: " + std::to_string(free) + " bytes are free, " +
                   std::to_string(floor + bytes) +
                   " are needed for this piece of a file: uploads stop where "
                   "new jobs do; make room on the file system of the root, and "
                   "send it again"};
}

}  // namespace

void Store::set_floor(std::uint64_t free_bytes) { dirs_->floor = free_bytes; }

Store::Store() : dirs_(std::make_unique<Dirs>()) {}
Store::~Store() = default;

Result<std::unique_ptr<Store>> Store::open(const std::string& root) {
  Fd top(::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!top) return failure("open " + root);
  std::unique_ptr<Store> store(new Store());
  Dirs& dirs = *store->dirs_;
  auto logs = enter(top.get(), "logs");
  if (!logs) return logs.error();
  dirs.logs = std::move(*logs);
  auto artifacts = enter(top.get(), "artifacts");
  if (!artifacts) return artifacts.error();
  struct {
    const char* name;
    Fd* fd;
  } const below[] = {
      {"objects", &dirs.objects}, {"index", &dirs.index}, {"tmp", &dirs.tmp}};
  bool made_one = false;
  for (const auto& [name, fd] : below) {
    *fd = open_dir(artifacts->get(), name);
    if (*fd) continue;
    if (auto r = make_dir(artifacts->get(), name); !r) return r.error();
    *fd = open_dir(artifacts->get(), name);
    if (!*fd) return failure(std::string("open artifacts/") + name);
    made_one = true;
  }
  if (made_one && fsync(artifacts->get()) != 0) {
    return failure("sync artifacts");
  }
  // What an upload left behind when the server died.
  for (const std::string& name : names_in(dirs.tmp.get())) {
    unlinkat(dirs.tmp.get(), name.c_str(), 0);
  }
  return store;
}

// --- Logs ------------------------------------------------------------------

Result<std::uint64_t> Store::write_log(const JobId& job, int attempt,
                                       Fence fence, std::uint64_t offset,
                                       std::string_view bytes) {
  if (auto room = room_for(*dirs_, bytes.size()); !room) return room.error();
  std::string bucket, id = log_dir_of(job, &bucket);
  std::string name = std::to_string(attempt) + "-" + fence_hex(fence) + ".log";
  Fd outer = open_dir(dirs_->logs.get(), bucket);
  if (!outer) {
    if (auto made = make_dir(dirs_->logs.get(), bucket); !made) {
      return made.error();
    }
    outer = open_dir(dirs_->logs.get(), bucket);
    if (!outer) return failure("open logs/" + bucket);
  }
  Fd dir = open_dir(outer.get(), id);
  if (!dir) {
    if (auto made = make_dir(outer.get(), id); !made) return made.error();
    dir = open_dir(outer.get(), id);
    if (!dir) return failure("open logs/" + bucket + "/" + id);
  }
  Fd file(openat(dir.get(), name.c_str(),
                 O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file) return failure("open log " + id);
  struct stat info;
  if (fstat(file.get(), &info) != 0) return failure("stat log " + id);
  auto size = static_cast<std::uint64_t>(info.st_size);
  if (offset > size) {
    return Error{Code::invalid, "offset: " + std::to_string(offset) +
                                    " is beyond the log's end, " +
                                    std::to_string(size)};
  }
  if (offset + bytes.size() > kLogBytesMax) {
    return Error{Code::too_large, "offset: the log would pass " +
                                      std::to_string(kLogBytesMax) + " bytes"};
  }
  if (!write_all_at(file.get(), bytes, offset)) {
    return failure("log " + id + ": write");
  }
  return std::max(size, offset + bytes.size());
}

Result<OpenedFile> Store::open_log(const JobId& job, int attempt) {
  std::string bucket, id = log_dir_of(job, &bucket);
  Fd dir = open_dir(dirs_->logs.get(), bucket + "/" + id);
  if (!dir) return Error{Code::not_found, "no log"};
  // An attempt that was given back leaves its number to the next one; the
  // greater fence is the later.
  std::string best;
  std::pair<int, Fence> best_key{-1, 0};
  for (const std::string& name : names_in(dir.get())) {
    std::size_t dash = name.find('-');
    const auto number =
        parse_number<int>(std::string_view(name).substr(0, dash));
    if (dash == name.npos || !number) continue;
    if (attempt != 0 && *number != attempt) continue;
    auto fence = parse_fence_hex(std::string_view(name).substr(dash + 1, 16));
    if (!fence || std::pair{*number, *fence} <= best_key) continue;
    best_key = {*number, *fence};
    best = name;
  }
  if (best.empty()) return Error{Code::not_found, "no log of that attempt"};
  OpenedFile file;
  file.fd = std::make_shared<Fd>(
      openat(dir.get(), best.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  struct stat info;
  if (!*file.fd || fstat(file.fd->get(), &info) != 0) {
    return failure("open log " + id);
  }
  file.size = static_cast<std::uint64_t>(info.st_size);
  return file;
}

// --- Artifacts -------------------------------------------------------------

namespace {

class UploadImpl final : public Store::Upload {
 public:
  UploadImpl(Store::Dirs& dirs, Fence fence, std::string name)
      : dirs_(dirs), fence_(fence), context_(EVP_MD_CTX_new()) {
    artifact_.name = std::move(name);
    CHECK(EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1);
  }
  ~UploadImpl() override {
    EVP_MD_CTX_free(context_);
    if (!tmp_.empty()) unlinkat(dirs_.tmp.get(), tmp_.c_str(), 0);
  }

  Result<void> begin() {
    tmp_ = std::to_string(dirs_.next_tmp.fetch_add(1));
    file_ = Fd(openat(dirs_.tmp.get(), tmp_.c_str(),
                      O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!file_) return failure("create an artifact");
    return {};
  }

  Result<void> append(std::string_view bytes) override {
    if (auto room = room_for(dirs_, bytes.size()); !room) return room;
    if (!write_all_at(file_.get(), bytes, artifact_.size)) {
      return failure("write");
    }
    artifact_.size += bytes.size();
    CHECK(EVP_DigestUpdate(context_, bytes.data(), bytes.size()) == 1);
    return {};
  }

  // F1: first the object, then the link that names it.
  Result<Artifact> commit(const JobId& job) override {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned n = 0;
    CHECK(EVP_DigestFinal_ex(context_, digest, &n) == 1);
    artifact_.sha256 = hex(digest, n);
    if (fsync(file_.get()) != 0) return failure("sync an artifact");
    // A sweep between rename and link would find an object of nobody.
    std::lock_guard<std::mutex> lock(dirs_.mutex);
    auto objects = enter(dirs_.objects.get(), artifact_.sha256.substr(0, 2));
    if (!objects) return objects.error();
    // Where it is there already that one stays: it has its links.
    if (linkat(dirs_.tmp.get(), tmp_.c_str(), objects->get(),
               artifact_.sha256.c_str(), 0) != 0 &&
        errno != EEXIST) {
      return failure("link an artifact");
    }
    if (fsync(objects->get()) != 0) return failure("sync artifacts/objects");
    unlinkat(dirs_.tmp.get(), tmp_.c_str(), 0);
    tmp_.clear();
    if (auto ok = link_into_index(objects->get(), job); !ok) return ok.error();
    return artifact_;
  }

 private:
  Result<void> link_into_index(int objects, const JobId& job) {
    std::string fence = fence_hex(fence_);
    auto outer = enter(dirs_.index.get(), fence.substr(14));
    if (!outer) return outer.error();
    auto dir = enter(outer->get(), fence);
    if (!dir) return dir.error();
    Fd owner(openat(dir->get(), ("job-" + to_string(job)).c_str(),
                    O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!owner) return failure("mark an artifact index");
    std::vector<std::string> old;
    std::string mine = artifact_.sha256 + "-" + artifact_.name;
    std::size_t count = 0;
    for (const std::string& entry : names_in(dir->get())) {
      if (entry.size() <= kDigestDigits + 1) continue;
      ++count;
      if (entry.substr(kDigestDigits + 1) == artifact_.name && entry != mine) {
        old.push_back(entry);
      }
    }
    if (count >= kArtifactsStagedMax && old.empty()) {
      return Error{Code::too_large, "artifact: more than " +
                                        std::to_string(kArtifactsStagedMax) +
                                        " in one attempt"};
    }
    // Even one that is there is made anew: its time is what counts.
    unlinkat(dir->get(), mine.c_str(), 0);
    if (linkat(objects, artifact_.sha256.c_str(), dir->get(), mine.c_str(),
               0) != 0) {
      return failure("index an artifact");
    }
    for (const std::string& entry : old) {
      unlinkat(dir->get(), entry.c_str(), 0);
    }
    if (fsync(dir->get()) != 0) return failure("sync an artifact index");
    return {};
  }

  Store::Dirs& dirs_;
  Fence fence_;
  EVP_MD_CTX* context_;
  Artifact artifact_;
  std::string tmp_;
  Fd file_;
};

}  // namespace

Result<std::unique_ptr<Store::Upload>> Store::begin_upload(
    Fence fence, const std::string& name) {
  auto upload = std::make_unique<UploadImpl>(*dirs_, fence, name);
  if (auto begun = upload->begin(); !begun) return begun.error();
  return std::unique_ptr<Upload>(std::move(upload));
}

Result<std::vector<Artifact>> Store::artifacts(Fence fence) {
  std::string name = fence_hex(fence);
  std::lock_guard<std::mutex> lock(dirs_->mutex);
  Fd dir = open_dir(dirs_->index.get(), name.substr(14) + "/" + name);
  if (!dir) {
    if (errno == ENOENT) return std::vector<Artifact>();
    return failure("open an artifact index");
  }
  struct Found {
    Artifact artifact;
    timespec linked{};
  };
  std::map<std::string, Found> by_name;
  for (const std::string& entry : names_in(dir.get())) {
    if (entry.size() <= kDigestDigits + 1) continue;  // whose it is
    struct stat info;
    if (fstatat(dir.get(), entry.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) {
      return failure("stat an artifact");
    }
    Found found;
    found.artifact.sha256 = entry.substr(0, kDigestDigits);
    found.artifact.name = entry.substr(kDigestDigits + 1);
    found.artifact.size = static_cast<std::uint64_t>(info.st_size);
    found.linked = info.st_ctim;
    Found& best = by_name[found.artifact.name];
    bool later = found.linked.tv_sec != best.linked.tv_sec
                     ? found.linked.tv_sec > best.linked.tv_sec
                     : found.linked.tv_nsec > best.linked.tv_nsec;
    if (best.artifact.name.empty() || later) best = std::move(found);
  }
  std::vector<Artifact> artifacts;
  for (auto& [_, found] : by_name) {
    artifacts.push_back(std::move(found.artifact));
  }
  return artifacts;
}

Result<OpenedFile> Store::open_artifact(const Artifact& artifact) {
  std::string path = artifact.sha256.substr(0, 2) + "/" + artifact.sha256;
  OpenedFile file;
  file.fd = std::make_shared<Fd>(openat(dirs_->objects.get(), path.c_str(),
                                        O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  struct stat info;
  if (!*file.fd || fstat(file.fd->get(), &info) != 0) {
    return failure("open artifact " + artifact.sha256);
  }
  file.size = static_cast<std::uint64_t>(info.st_size);
  return file;
}

// --- The sweep --------------------------------------------------------------

namespace {

bool old_enough(int at, const std::string& name, std::int64_t now_s) {
  struct stat info;
  return fstatat(at, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0 &&
         S_ISDIR(info.st_mode) && info.st_mtime + kSweepAgeS < now_s;
}

std::string bucket_name(int bucket) {
  auto byte = static_cast<unsigned char>(bucket);
  return hex(&byte, 1);
}

// Takes an index's links away, and each object that has no other.
void remove_links(Store::Dirs& dirs, int dir,
                  const std::vector<std::string>& entries) {
  for (const std::string& entry : entries) {
    if (entry.size() <= kDigestDigits + 1) continue;
    struct stat info;
    bool last = fstatat(dir, entry.c_str(), &info, AT_SYMLINK_NOFOLLOW) == 0 &&
                info.st_nlink <= 2;
    unlinkat(dir, entry.c_str(), 0);
    if (!last) continue;
    Fd objects = open_dir(dirs.objects.get(), entry.substr(0, 2));
    if (objects) {
      unlinkat(objects.get(), entry.substr(0, kDigestDigits).c_str(), 0);
    }
  }
}

void remove_dir(int at, const std::string& name) {
  Fd dir = open_dir(at, name);
  if (!dir) return;
  for (const std::string& entry : names_in(dir.get())) {
    unlinkat(dir.get(), entry.c_str(), 0);
  }
  unlinkat(at, name.c_str(), AT_REMOVEDIR);
}

}  // namespace

std::vector<Store::Kept> Store::kept(int bucket, std::int64_t now_s) {
  std::vector<Kept> kept;
  Fd logs = open_dir(dirs_->logs.get(), bucket_name(bucket));
  if (logs) {
    for (const std::string& name : names_in(logs.get())) {
      auto id = parse_job_id(name);
      if (kept.size() >= kSweepMax) return kept;
      if (id && old_enough(logs.get(), name, now_s)) kept.push_back({*id, 0});
    }
  }
  Fd index = open_dir(dirs_->index.get(), bucket_name(bucket));
  if (!index) return kept;
  for (const std::string& name : names_in(index.get())) {
    auto fence = parse_fence_hex(name);
    if (kept.size() >= kSweepMax) return kept;
    if (!fence || !old_enough(index.get(), name, now_s)) continue;
    Fd dir = open_dir(index.get(), name);
    if (!dir) continue;
    for (const std::string& entry : names_in(dir.get())) {
      if (entry.rfind("job-", 0) != 0) continue;
      if (auto id = parse_job_id(std::string_view(entry).substr(4))) {
        kept.push_back({*id, *fence});
      }
    }
  }
  return kept;
}

void Store::forget(const Kept& kept) {
  if (kept.fence == 0) {
    std::string bucket, id = log_dir_of(kept.job, &bucket);
    Fd outer = open_dir(dirs_->logs.get(), bucket);
    if (outer) remove_dir(outer.get(), id);
    return;
  }
  std::string fence = fence_hex(kept.fence);
  std::lock_guard<std::mutex> lock(dirs_->mutex);
  Fd outer = open_dir(dirs_->index.get(), fence.substr(14));
  if (!outer) return;
  Fd dir = open_dir(outer.get(), fence);
  if (!dir) return;
  std::vector<std::string> entries = names_in(dir.get());
  // The mark goes last: a crash half-way leaves something to find again.
  remove_links(*dirs_, dir.get(), entries);
  remove_dir(outer.get(), fence);
}

std::string sha256_of(std::string_view bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned n = 0;
  CHECK(EVP_Digest(bytes.data(), bytes.size(), digest, &n, EVP_sha256(),
                   nullptr) == 1);
  return hex(digest, n);
}

Result<std::string> read_piece(const Fd& fd, std::uint64_t offset,
                               std::size_t max) {
  std::string bytes(max, '\0');
  std::size_t got = 0;
  while (got < max) {
    ssize_t n = pread(fd.get(), bytes.data() + got, max - got,
                      static_cast<off_t>(offset + got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return failure("read");
    if (n == 0) break;
    got += static_cast<std::size_t>(n);
  }
  bytes.resize(got);
  return bytes;
}

// --- Threads ---------------------------------------------------------------

FileThreads::FileThreads(int threads) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { loop(); });
}

FileThreads::~FileThreads() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  ready_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool FileThreads::run(std::function<void()> work) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (work_.size() >= kStoreQueueMax) return false;
    work_.push_back(std::move(work));
  }
  ready_.notify_one();
  return true;
}

void FileThreads::loop() {
  while (true) {
    std::function<void()> work;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      ready_.wait(lock, [this] { return stopping_ || !work_.empty(); });
      if (work_.empty()) return;
      work = std::move(work_.front());
      work_.pop_front();
    }
    work();
  }
}

}  // namespace machina
