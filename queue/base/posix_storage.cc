#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

#include "queue/base/fd.h"
#include "queue/base/storage.h"

namespace machina {
namespace {

constexpr std::size_t kBlock = 4096;
constexpr int kLockTries = 6;  // a dying process may hold it a little longer
constexpr int kLockPauseMs = 50;
constexpr std::size_t kZerosBytes = 256 << 10;

Error system_error(const char* what, const std::string& name) {
  int error = errno;
  Code code = Code::io;
  if (error == ENOSPC || error == EDQUOT) code = Code::full;
  if (error == ENOENT) code = Code::not_found;
  return {code, std::string(what) + " " + name + ": " + std::strerror(error)};
}

Fd open_at(int dir, const std::string& name, int flags) {
  int fd;
  do {
    fd = ::openat(dir, name.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, 0600);
  } while (fd < 0 && errno == EINTR);
  return Fd(fd);
}

// " (process 123)" where the kernel says who has a flock on this file, else "".
std::string holder_of(int fd) {
  struct stat info;
  if (::fstat(fd, &info) != 0) return "";
  char wanted[64];
  std::snprintf(wanted, sizeof(wanted), "%02x:%02x:%llu", major(info.st_dev),
                minor(info.st_dev),
                static_cast<unsigned long long>(info.st_ino));
  std::unique_ptr<FILE, int (*)(FILE*)> locks(::fopen("/proc/locks", "re"),
                                              ::fclose);
  char line[256];
  while (locks && ::fgets(line, sizeof(line), locks.get()) != nullptr) {
    char kind[16], device[64];
    int pid = 0;
    int got =
        std::sscanf(line, "%*d: %15s %*s %*s %d %63s", kind, &pid, device);
    if (got != 3 || std::strcmp(kind, "FLOCK") != 0 || pid <= 0) continue;
    if (std::strcmp(device, wanted) == 0) {
      return " (process " + std::to_string(pid) + ")";
    }
  }
  return "";
}

bool aligned(std::uint64_t number) { return number % kBlock == 0; }

class PosixFile : public File {
 public:
  // `read_fd` is set where `fd` is O_DIRECT and thus no good for odd reads.
  PosixFile(std::string name, Fd fd, Fd read_fd, bool direct)
      : name_(std::move(name)),
        fd_(std::move(fd)),
        read_fd_(std::move(read_fd)),
        direct_(direct) {}

  Result<void> write_at(std::uint64_t offset,
                        std::span<const std::byte> bytes) override {
    if (!direct_ || aligned(reinterpret_cast<std::uintptr_t>(bytes.data()))) {
      return write_all(offset, bytes);
    }
    std::unique_ptr<std::byte, void (*)(void*)> copy(
        static_cast<std::byte*>(std::aligned_alloc(kBlock, bytes.size())),
        std::free);
    if (!copy) return Error{Code::io, "out of memory writing " + name_};
    std::memcpy(copy.get(), bytes.data(), bytes.size());
    return write_all(offset, {copy.get(), bytes.size()});
  }

  Result<std::size_t> read_at(std::uint64_t offset,
                              std::span<std::byte> bytes) const override {
    int fd = read_fd_ ? read_fd_.get() : fd_.get();
    std::size_t done = 0;
    while (done < bytes.size()) {
      ssize_t n = ::pread(fd, bytes.data() + done, bytes.size() - done,
                          static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return system_error("cannot read", name_);
      if (n == 0) break;
      done += static_cast<std::size_t>(n);
    }
    return done;
  }

  Result<void> sync() override {
    // Not repeated on EINTR: after a failure nothing is known (S3).
    if (::fdatasync(fd_.get()) != 0) return system_error("cannot sync", name_);
    return {};
  }

  Result<std::uint64_t> size() const override {
    struct stat info;
    if (::fstat(fd_.get(), &info) != 0)
      return system_error("cannot stat", name_);
    return static_cast<std::uint64_t>(info.st_size);
  }

  Result<void> allocate(std::uint64_t bytes) override {
    int fd = fd_.get();
    while (::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) != 0) {
      if (errno == EINTR) continue;
      if (errno == EOPNOTSUPP) return File::allocate(bytes);
      return system_error("cannot allocate", name_);
    }
    return {};
  }

  Result<void> truncate(std::uint64_t bytes) override {
    if (::ftruncate(fd_.get(), static_cast<off_t>(bytes)) != 0)
      return system_error("cannot truncate", name_);
    return {};
  }

 private:
  Result<void> write_all(std::uint64_t offset,
                         std::span<const std::byte> bytes) {
    std::size_t done = 0;
    while (done < bytes.size()) {
      ssize_t n = ::pwrite(fd_.get(), bytes.data() + done, bytes.size() - done,
                           static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EINVAL && direct_ && leave_direct()) continue;
      if (n < 0) return system_error("cannot write", name_);
      if (n == 0) return Error{Code::io, "cannot write " + name_ + ": no byte"};
      done += static_cast<std::size_t>(n);
      // A short direct write may end within a block; go on from its start.
      if (direct_ && done < bytes.size()) done -= done % kBlock;
    }
    return {};
  }

  // Some file systems take O_DIRECT at open and refuse the write. O_DSYNC
  // stays: it is what makes the write durable.
  bool leave_direct() {
    int flags = ::fcntl(fd_.get(), F_GETFL);
    if (flags < 0 || ::fcntl(fd_.get(), F_SETFL, flags & ~O_DIRECT) != 0)
      return false;
    direct_ = false;
    return true;
  }

  std::string name_;
  Fd fd_, read_fd_;
  bool direct_;
};

class PosixLock : public Storage::Lock {
 public:
  explicit PosixLock(Fd fd) : fd_(std::move(fd)) {}

 private:
  Fd fd_;
};

class PosixStorage : public Storage {
 public:
  PosixStorage(std::string path, Fd dir)
      : path_(std::move(path)), dir_(std::move(dir)) {}

  Result<std::unique_ptr<File>> open(std::string_view view,
                                     OpenMode mode) override {
    std::string name(view);
    if (auto ok = check_name(name); !ok) return ok.error();
    if (mode == OpenMode::durable) return open_durable(name);
    int flags = O_RDONLY;
    if (mode == OpenMode::write) flags = O_RDWR;
    if (mode == OpenMode::create) flags = O_RDWR | O_CREAT | O_EXCL;
    // Without waiting: somebody may have put a FIFO there.
    Fd fd = open_at(dir_.get(), name, flags | O_NONBLOCK);
    if (!fd) return system_error("cannot open", full(name));
    struct stat status {};
    if (::fstat(fd.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
      return Error{Code::io, full(name) + " is no regular file"};
    }
    // Only clean pages can be dropped, and all are after a sync. No page is
    // then left of those that an earlier, failed sync marked clean.
    bool settled = mode == OpenMode::settled;
    if (settled && (::fdatasync(fd.get()) != 0 ||
                    ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED) != 0))
      return system_error("cannot sync", full(name));
    return std::unique_ptr<File>(
        new PosixFile(full(name), std::move(fd), Fd(), false));
  }

  Result<std::vector<std::string>> list(std::string_view view) override {
    Fd fd = open_dir(view);
    if (!fd) return system_error("cannot list", full(view));
    DIR* dir = ::fdopendir(::dup(fd.get()));
    if (dir == nullptr) return system_error("cannot list", full(view));
    std::vector<std::string> names;
    errno = 0;
    while (dirent* entry = ::readdir(dir)) {
      std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(std::move(name));
      errno = 0;
    }
    int error = errno;
    ::closedir(dir);
    if (error != 0) {
      errno = error;
      return system_error("cannot list", full(view));
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  Result<void> make_dir(std::string_view view) override {
    std::string name(view);
    if (auto ok = check_name(name); !ok) return ok;
    if (::mkdirat(dir_.get(), name.c_str(), 0700) != 0 && errno != EEXIST)
      return system_error("cannot make", full(name));
    return {};
  }

  Result<void> rename(std::string_view from, std::string_view to) override {
    std::string old_name(from), new_name(to);
    if (auto ok = check_name(old_name); !ok) return ok;
    if (auto ok = check_name(new_name); !ok) return ok;
    if (::renameat(dir_.get(), old_name.c_str(), dir_.get(),
                   new_name.c_str()) != 0)
      return system_error("cannot rename", full(old_name));
    return {};
  }

  Result<void> exchange(std::string_view from, std::string_view to) override {
    std::string one(from), other(to);
    if (auto ok = check_name(one); !ok) return ok;
    if (auto ok = check_name(other); !ok) return ok;
    if (::renameat2(dir_.get(), one.c_str(), dir_.get(), other.c_str(),
                    RENAME_EXCHANGE) == 0)
      return {};
    if (errno == ENOENT || errno == EINVAL || errno == ENOSYS)
      return rename(from, to);
    return system_error("cannot rename", full(one));
  }

  Result<void> remove(std::string_view view) override {
    std::string name(view);
    if (auto ok = check_name(name); !ok) return ok;
    if (::unlinkat(dir_.get(), name.c_str(), 0) != 0)
      return system_error("cannot remove", full(name));
    return {};
  }

  Result<void> sync_dir(std::string_view view) override {
    Fd fd = open_dir(view);
    if (!fd || ::fsync(fd.get()) != 0)
      return system_error("cannot sync", full(view));
    return {};
  }

  Result<std::unique_ptr<Lock>> lock(std::string_view view) override {
    std::string name(view);
    if (auto ok = check_name(name); !ok) return ok.error();
    Fd fd = open_at(dir_.get(), name, O_RDWR | O_CREAT);
    if (!fd) return system_error("cannot open", full(name));
    for (int i = 0; i < kLockTries; ++i) {
      if (::flock(fd.get(), LOCK_EX | LOCK_NB) == 0)
        return std::unique_ptr<Lock>(new PosixLock(std::move(fd)));
      if (errno != EWOULDBLOCK && errno != EINTR)
        return system_error("cannot lock", full(name));
      std::this_thread::sleep_for(std::chrono::milliseconds(kLockPauseMs));
    }
    return Error{Code::conflict,
                 full(name) + " is locked: another server has this root" +
                     holder_of(fd.get())};
  }

  Result<std::uint64_t> free_bytes() override {
    struct statvfs info;
    if (::fstatvfs(dir_.get(), &info) != 0)
      return system_error("cannot stat the file system of", path_);
    return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
  }

  Result<std::uint64_t> total_bytes() override {
    struct statvfs info;
    if (::fstatvfs(dir_.get(), &info) != 0)
      return system_error("cannot stat the file system of", path_);
    return static_cast<std::uint64_t>(info.f_blocks) * info.f_frsize;
  }

 private:
  std::string full(std::string_view name) const {
    return path_ + "/" + std::string(name);
  }

  // The names are our own; this catches a slip, and one read from a damaged
  // directory.
  static Result<void> check_name(const std::string& name) {
    bool bad = name.empty() || name.front() == '/' ||
               name.find("..") != std::string::npos ||
               name.find('\0') != std::string::npos;
    if (bad) return Error{Code::invalid, "not a name in this storage: " + name};
    return {};
  }

  Fd open_dir(std::string_view view) {
    std::string name(view.empty() ? "." : view);
    return open_at(dir_.get(), name, O_RDONLY | O_DIRECTORY);
  }

  Result<std::unique_ptr<File>> open_durable(const std::string& name) {
    bool direct = true;
    Fd fd = open_at(dir_.get(), name, O_RDWR | O_DSYNC | O_DIRECT);
    if (!fd && errno == EINVAL) {
      direct = false;
      fd = open_at(dir_.get(), name, O_RDWR | O_DSYNC);
    }
    if (!fd) return system_error("cannot open", full(name));
    Fd read_fd = open_at(dir_.get(), name, O_RDONLY);
    if (!read_fd) return system_error("cannot open", full(name));
    return std::unique_ptr<File>(
        new PosixFile(full(name), std::move(fd), std::move(read_fd), direct));
  }

  std::string path_;
  Fd dir_;
};

struct KnownFileSystem {
  unsigned long magic;
  const char* name;
};
constexpr KnownFileSystem kFileSystems[] = {
    {0xef53, "ext4"},      {0x58465342, "xfs"},     {0x9123683e, "btrfs"},
    {0x2fc12fc1, "zfs"},   {0xf2f52010, "f2fs"},    {0xca451a4e, "bcachefs"},
    {0x6969, "nfs"},       {0xff534d42, "smb"},     {0xfe534d42, "smb"},
    {0x517b, "smb"},       {0x794c7630, "overlay"}, {0x01021994, "tmpfs"},
    {0x858458f6, "tmpfs"}, {0x65735546, "fuse"},    {0x01021997, "9p"},
};

}  // namespace

// For file systems that cannot do better: written bytes have blocks.
Result<void> File::allocate(std::uint64_t bytes) {
  auto now = size();
  if (!now) return now.error();
  const std::vector<std::byte> zeros(kZerosBytes);
  for (std::uint64_t at = *now; at < bytes;) {
    std::size_t step = std::min<std::uint64_t>(zeros.size(), bytes - at);
    if (auto ok = write_at(at, std::span(zeros).first(step)); !ok) return ok;
    at += step;
  }
  return {};
}

Result<std::unique_ptr<Storage>> open_posix_storage(const std::string& path) {
  Fd dir(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir) return system_error("cannot open", path);
  return std::unique_ptr<Storage>(new PosixStorage(path, std::move(dir)));
}

Result<std::unique_ptr<Storage::Lock>> share_posix_lock(
    const std::string& dir, const std::string& name) {
  std::string path = dir + "/" + name;
  Fd fd = open_at(AT_FDCWD, path, O_RDONLY);
  if (!fd && errno == ENOENT) return std::unique_ptr<Storage::Lock>();
  if (!fd) return system_error("cannot open", path);
  if (::flock(fd.get(), LOCK_SH | LOCK_NB) == 0) {
    return std::unique_ptr<Storage::Lock>(new PosixLock(std::move(fd)));
  }
  if (errno != EWOULDBLOCK) return system_error("cannot lock", path);
  return Error{Code::conflict, path + " is locked: a server runs on this root" +
                                   holder_of(fd.get())};
}

std::string filesystem_kind(const std::string& path) {
  struct statfs info;
  if (::statfs(path.c_str(), &info) != 0) return "unknown";
  auto magic = static_cast<unsigned long>(info.f_type) & 0xffffffffUL;
  for (const KnownFileSystem& known : kFileSystems) {
    if (known.magic == magic) return known.name;
  }
  char text[24];
  std::snprintf(text, sizeof(text), "0x%lx", magic);
  return text;
}

bool filesystem_keeps_promises(std::string_view kind) {
  return kind != "nfs" && kind != "smb" && kind != "overlay" &&
         kind != "tmpfs" && kind != "9p";
}

}  // namespace machina
