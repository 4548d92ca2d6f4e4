#include "queue/base/line_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

namespace machina {
namespace {

struct Parts {
  std::string dir, name;
};

Parts parts_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == path.npos) return {".", path};
  return {path.substr(0, slash + 1), path.substr(slash + 1)};
}

Error cannot_open(const std::string& path, int error) {
  return Error{Code::io, "open " + path + ": " + std::strerror(error)};
}

// A second name would make it somebody else's file too.
bool is_a_log(int fd) {
  struct stat info {};
  return fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_nlink == 1;
}

}  // namespace

LineFile::LineFile(int dir_fd, std::string name, std::uint64_t max_bytes,
                   std::uint64_t total_bytes)
    : dir_(dir_fd),
      name_(std::move(name)),
      max_bytes_(
          std::max<std::uint64_t>(1, std::min(max_bytes, total_bytes / 2))),
      total_bytes_(total_bytes) {}

LineFile::~LineFile() {
  if (fd_ >= 0) close(fd_);
  close(dir_);
}

Result<std::unique_ptr<LineFile>> LineFile::open(int dir_fd, std::string name,
                                                 std::uint64_t max_bytes,
                                                 std::uint64_t total_bytes) {
  std::unique_ptr<LineFile> file(
      new LineFile(dir_fd, std::move(name), max_bytes, total_bytes));
  if (!file->open_now()) {
    return cannot_open(file->name_, file->error_);
  }
  file->drop_oldest();
  return file;
}

Result<std::unique_ptr<LineFile>> LineFile::open(const std::string& path,
                                                 std::uint64_t max_bytes,
                                                 std::uint64_t total_bytes) {
  const Parts parts = parts_of(path);
  int dir_fd = ::open(parts.dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (dir_fd < 0) return cannot_open(parts.dir, errno);
  auto file = open(dir_fd, parts.name, max_bytes, total_bytes);
  // By its whole path: the name alone may be anywhere.
  if (!file) return Error{Code::io, file.error().what + " (" + path + ")"};
  return file;
}

Result<void> LineFile::examine(const std::string& path) {
  const Parts parts = parts_of(path);
  int fd = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC | O_NOFOLLOW |
                                    O_NONBLOCK | O_NOCTTY);
  if (fd >= 0) {
    const bool ours = is_a_log(fd);
    close(fd);
    if (ours) return {};
    return cannot_open(path, EINVAL);
  }
  if (errno != ENOENT) return cannot_open(path, errno);
  if (access(parts.dir.c_str(), W_OK | X_OK) != 0) {
    return cannot_open(path, errno);
  }
  return {};
}

bool LineFile::open_now() {
  // O_NONBLOCK: not held up by a pipe of that name, which is refused below.
  int fd = ::openat(dir_, name_.c_str(),
                    O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW |
                        O_NONBLOCK | O_NOCTTY,
                    0600);
  struct stat info {};
  error_ = errno;
  if (fd < 0) return false;
  if (!is_a_log(fd) || fstat(fd, &info) != 0) {
    close(fd);
    error_ = EINVAL;
    return false;
  }
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
  size_ = static_cast<std::uint64_t>(info.st_size);
  torn_ = false;
  return true;
}

void LineFile::reopen() {
  if (open_now()) drop_oldest();  // otherwise the old one is written on
}

std::size_t LineFile::append(std::string_view lines) {
  if (fd_ < 0 && !open_now()) return 0;
  std::size_t kept = 0;
  while (!lines.empty()) {
    if (size_ >= max_bytes_) rotate();
    if (fd_ < 0) return kept;
    // As many whole lines as fit, at least one.
    std::size_t room = static_cast<std::size_t>(std::min<std::uint64_t>(
        max_bytes_ - std::min(size_, max_bytes_), lines.size()));
    std::size_t end = room == lines.size() ? room : lines.rfind('\n', room);
    if (end == lines.npos) end = lines.find('\n');
    end = end == lines.npos ? lines.size() : std::min(end + 1, lines.size());
    if (torn_ && ::write(fd_, "\n", 1) == 1) torn_ = false;
    std::string_view piece = lines.substr(0, end), rest = piece;
    while (!rest.empty()) {
      ssize_t n = ::write(fd_, rest.data(), rest.size());
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        const std::size_t written = piece.size() - rest.size();
        const std::size_t whole = piece.substr(0, written).rfind('\n') + 1;
        torn_ = torn_ || whole != written;
        return kept + whole;
      }
      size_ += static_cast<std::uint64_t>(n);
      rest.remove_prefix(static_cast<std::size_t>(n));
    }
    kept += end;
    lines.remove_prefix(end);
  }
  return kept;
}

// A crash in here leaves a gap in the numbers, no more.
void LineFile::rotate() {
  struct stat ours {
  }, named{};
  bool moved = fstat(fd_, &ours) != 0 ||
               fstatat(dir_, name_.c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0 ||
               ours.st_ino != named.st_ino || ours.st_dev != named.st_dev;
  if (!moved) {
    auto at = [&](int n) { return name_ + "." + std::to_string(n); };
    int last = 0;
    while (last < kKeptMax && faccessat(dir_, at(last + 1).c_str(), F_OK,
                                        AT_SYMLINK_NOFOLLOW) == 0) {
      ++last;
    }
    if (last == kKeptMax) unlinkat(dir_, at(last--).c_str(), 0);
    for (int n = last; n >= 1; --n) {
      renameat(dir_, at(n).c_str(), dir_, at(n + 1).c_str());
    }
    // Where even this fails the old file is begun anew: the bound holds.
    if (renameat(dir_, name_.c_str(), dir_, at(1).c_str()) != 0) {
      (void)!ftruncate(fd_, 0);
    }
  }
  if (!open_now()) {
    close(fd_);
    fd_ = -1;
    return;
  }
  drop_oldest();
}

// F1: the present file counts in full, so that it may still fill.
void LineFile::drop_oldest() const {
  std::uint64_t total = max_bytes_;
  for (int n = 1;; ++n) {
    std::string name = name_ + "." + std::to_string(n);
    struct stat info {};
    if (fstatat(dir_, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) {
      if (n > kKeptMax) return;
      continue;
    }
    total += static_cast<std::uint64_t>(info.st_size);
    if (total > total_bytes_ || n > kKeptMax) {
      unlinkat(dir_, name.c_str(), 0);
    }
  }
}

}  // namespace machina
