#include "server/store.h"

#include <dirent.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <map>

#include "queue/check.h"

namespace machina {
namespace {

constexpr std::size_t kIndexBytesMax = 1 << 20;

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

OwnedFd open_dir(int at, const std::string& name) {
  return OwnedFd(openat(at, name.c_str(),
                        O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
}

// The directory `name`, made and synced into its parent where it is missing.
Result<OwnedFd> enter(int at, const std::string& name) {
  OwnedFd dir = open_dir(at, name);
  if (dir) return dir;
  if (auto made = make_dir(at, name); !made) return made.error();
  if (fsync(at) != 0) return failure("sync the directory of " + name);
  dir = open_dir(at, name);
  if (!dir) return failure("open " + name);
  return dir;
}

Result<void> write_all(int fd, std::string_view bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    ssize_t n =
        pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return failure("write");
    bytes.remove_prefix(static_cast<std::size_t>(n));
    offset += static_cast<std::uint64_t>(n);
  }
  return {};
}

std::string log_dir_of(const JobId& job, std::string* bucket) {
  std::string id = to_string(job);
  *bucket = id.substr(id.size() - 2);
  return id;
}

std::string hex(const unsigned char* bytes, std::size_t n) {
  std::string text;
  for (std::size_t i = 0; i < n; ++i) {
    text += "0123456789abcdef"[bytes[i] >> 4];
    text += "0123456789abcdef"[bytes[i] & 15];
  }
  return text;
}

}  // namespace

OwnedFd::~OwnedFd() {
  if (fd_ >= 0) close(fd_);
}

struct Store::Dirs {
  OwnedFd logs, objects, index, tmp;
  std::atomic<std::uint64_t> next_tmp{0};
  std::mutex index_mutex;  // index files are read, then appended to
};

Store::Store() : dirs_(std::make_unique<Dirs>()) {}
Store::~Store() = default;

Result<std::unique_ptr<Store>> Store::open(const std::string& root) {
  OwnedFd top(::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
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
    OwnedFd* fd;
  } const below[] = {
      {"objects", &dirs.objects}, {"index", &dirs.index}, {"tmp", &dirs.tmp}};
  for (const auto& [name, fd] : below) {
    auto dir = enter(artifacts->get(), name);
    if (!dir) return dir.error();
    *fd = std::move(*dir);
  }
  // What an upload left behind when the server died.
  int copy = openat(dirs.tmp.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (DIR* listing = copy < 0 ? nullptr : fdopendir(copy)) {
    while (dirent* entry = readdir(listing)) {
      if (entry->d_name[0] != '.') unlinkat(dirs.tmp.get(), entry->d_name, 0);
    }
    closedir(listing);
  }
  return store;
}

// --- Logs ------------------------------------------------------------------

Result<std::uint64_t> Store::write_log(const JobId& job, int attempt,
                                       Fence fence, std::uint64_t offset,
                                       std::string_view bytes) {
  std::string bucket, id = log_dir_of(job, &bucket);
  std::string name = std::to_string(attempt) + "-" + fence_hex(fence) + ".log";
  OwnedFd outer = open_dir(dirs_->logs.get(), bucket);
  if (!outer) {
    if (auto made = make_dir(dirs_->logs.get(), bucket); !made) {
      return made.error();
    }
    outer = open_dir(dirs_->logs.get(), bucket);
    if (!outer) return failure("open logs/" + bucket);
  }
  OwnedFd dir = open_dir(outer.get(), id);
  if (!dir) {
    if (auto made = make_dir(outer.get(), id); !made) return made.error();
    dir = open_dir(outer.get(), id);
    if (!dir) return failure("open logs/" + bucket + "/" + id);
  }
  OwnedFd file(openat(dir.get(), name.c_str(),
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
  if (auto written = write_all(file.get(), bytes, offset); !written) {
    return Error{written.error().code,
                 "log " + id + ": " + written.error().what};
  }
  return std::max(size, offset + bytes.size());
}

Result<OpenedFile> Store::open_log(const JobId& job, int attempt) {
  std::string bucket, id = log_dir_of(job, &bucket);
  OwnedFd dir = open_dir(dirs_->logs.get(), bucket + "/" + id);
  if (!dir) return Error{Code::not_found, "no log"};
  // An attempt that was given back leaves its number to the next one; the
  // greater fence is the later.
  std::string best;
  std::pair<int, Fence> best_key{-1, 0};
  int copy = openat(dir.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* listing = copy < 0 ? nullptr : fdopendir(copy);
  if (listing == nullptr) return failure("list log " + id);
  while (dirent* entry = readdir(listing)) {
    std::string_view name = entry->d_name;
    int number = 0;
    auto [end, e] =
        std::from_chars(name.data(), name.data() + name.size(), number);
    if (e != std::errc() || *end != '-') continue;
    if (attempt != 0 && number != attempt) continue;
    std::string_view rest =
        name.substr(static_cast<std::size_t>(end - name.data()) + 1);
    auto fence = parse_fence_hex(rest.substr(0, 16));
    if (!fence || std::pair{number, *fence} <= best_key) continue;
    best_key = {number, *fence};
    best = name;
  }
  closedir(listing);
  if (best.empty()) return Error{Code::not_found, "no log of that attempt"};
  OpenedFile file;
  file.fd = std::make_shared<OwnedFd>(
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
    file_ = OwnedFd(openat(dirs_.tmp.get(), tmp_.c_str(),
                           O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!file_) return failure("create an artifact");
    return {};
  }

  Result<void> append(std::string_view bytes) override {
    if (auto ok = write_all(file_.get(), bytes, artifact_.size); !ok) {
      return ok.error();
    }
    artifact_.size += bytes.size();
    CHECK(EVP_DigestUpdate(context_, bytes.data(), bytes.size()) == 1);
    return {};
  }

  // F1: first the object, then the line that names it.
  Result<Artifact> commit() override {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned n = 0;
    CHECK(EVP_DigestFinal_ex(context_, digest, &n) == 1);
    artifact_.sha256 = hex(digest, n);
    if (fsync(file_.get()) != 0) return failure("sync an artifact");
    auto dir = enter(dirs_.objects.get(), artifact_.sha256.substr(0, 2));
    if (!dir) return dir.error();
    if (renameat(dirs_.tmp.get(), tmp_.c_str(), dir->get(),
                 artifact_.sha256.c_str()) != 0) {
      return failure("rename an artifact");
    }
    tmp_.clear();
    if (fsync(dir->get()) != 0) return failure("sync artifacts/objects");
    if (auto ok = append_index(); !ok) return ok.error();
    return artifact_;
  }

 private:
  Result<void> append_index() {
    std::lock_guard<std::mutex> lock(dirs_.index_mutex);
    std::string name = fence_hex(fence_);
    auto dir = enter(dirs_.index.get(), name.substr(14));
    if (!dir) return dir.error();
    OwnedFd file(openat(dir->get(), name.c_str(),
                        O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    struct stat info;
    if (!file || fstat(file.get(), &info) != 0) {
      return failure("open an artifact index");
    }
    auto size = static_cast<std::uint64_t>(info.st_size);
    std::string line = artifact_.sha256 + " " + std::to_string(artifact_.size) +
                       " " + artifact_.name + "\n";
    if (size + line.size() > kIndexBytesMax) {
      return Error{Code::too_large, "too many artifacts in one attempt"};
    }
    char last = '\n';
    if (size > 0 &&
        pread(file.get(), &last, 1, static_cast<off_t>(size) - 1) != 1) {
      return failure("read an artifact index");
    }
    if (last != '\n') line.insert(0, "\n");  // a crash tore the last line
    if (auto ok = write_all(file.get(), line, size); !ok) return ok.error();
    if (fsync(file.get()) != 0 || fsync(dir->get()) != 0) {
      return failure("sync an artifact index");
    }
    return {};
  }

  Store::Dirs& dirs_;
  Fence fence_;
  EVP_MD_CTX* context_;
  Artifact artifact_;
  std::string tmp_;
  OwnedFd file_;
};

// "<sha256> <size> <name>"; false for a torn or foreign line.
bool parse_line(std::string_view line, Artifact* artifact) {
  if (line.size() < 68 || line[64] != ' ') return false;
  std::size_t space = line.find(' ', 65);
  if (space == line.npos || space + 1 >= line.size()) return false;
  artifact->sha256 = line.substr(0, 64);
  if (artifact->sha256.find_first_not_of("0123456789abcdef") != line.npos) {
    return false;
  }
  auto [end, e] =
      std::from_chars(line.data() + 65, line.data() + space, artifact->size);
  if (e != std::errc() || end != line.data() + space) return false;
  artifact->name = line.substr(space + 1);
  return true;
}

}  // namespace

Result<std::unique_ptr<Store::Upload>> Store::begin_upload(
    Fence fence, const std::string& name) {
  auto upload = std::make_unique<UploadImpl>(*dirs_, fence, name);
  if (auto begun = upload->begin(); !begun) return begun.error();
  return std::unique_ptr<Upload>(std::move(upload));
}

Result<std::vector<Artifact>> Store::artifacts(Fence fence) {
  std::string name = fence_hex(fence);
  std::string text;
  {
    std::lock_guard<std::mutex> lock(dirs_->index_mutex);
    OwnedFd file(openat(dirs_->index.get(),
                        (name.substr(14) + "/" + name).c_str(),
                        O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    if (!file) {
      if (errno == ENOENT) return std::vector<Artifact>();
      return failure("open an artifact index");
    }
    auto read = read_piece(file, 0, kIndexBytesMax);
    if (!read) return read.error();
    text = std::move(*read);
  }
  std::map<std::string, Artifact> by_name;
  std::string_view left = text;
  while (true) {
    std::size_t end = left.find('\n');
    if (end == left.npos) break;
    Artifact artifact;
    if (parse_line(left.substr(0, end), &artifact)) {
      by_name[artifact.name] = artifact;
    }
    left.remove_prefix(end + 1);
  }
  std::vector<Artifact> artifacts;
  for (auto& [_, artifact] : by_name) artifacts.push_back(std::move(artifact));
  return artifacts;
}

Result<OpenedFile> Store::open_artifact(const Artifact& artifact) {
  std::string path = artifact.sha256.substr(0, 2) + "/" + artifact.sha256;
  OpenedFile file;
  file.fd = std::make_shared<OwnedFd>(openat(
      dirs_->objects.get(), path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  struct stat info;
  if (!*file.fd || fstat(file.fd->get(), &info) != 0) {
    return failure("open artifact " + artifact.sha256);
  }
  file.size = static_cast<std::uint64_t>(info.st_size);
  return file;
}

Result<std::string> read_piece(const OwnedFd& fd, std::uint64_t offset,
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
