#include "workers/sandbox/collector.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

enum class Op : std::uint32_t { put, collect };
struct Head {
  Op op = Op::put;
  std::uint32_t path_bytes = 0;
  std::uint64_t bytes = 0;  // put: of the data; collect: at most
};
constexpr std::size_t kDepthMax = 64;

// Exit codes of the built-in.
enum : int { kOk = 0, kInvalid = 10, kTooLarge, kNotFound, kFull, kIo };

Result<std::string> below_work(const std::string& path) {
  std::string relative = path;
  if (relative.starts_with("/work/")) relative = relative.substr(6);
  bool bad = relative.empty() || relative[0] == '/' ||
             relative.size() >= kPathMax ||
             relative.find('\0') != std::string::npos;
  for (std::size_t at = 0; !bad && at <= relative.size();) {
    const std::size_t end = std::min(relative.find('/', at), relative.size());
    const auto part = relative.substr(at, end - at);
    bad = part.empty() || part == "." || part == "..";
    at = end + 1;
  }
  if (bad) return Error{Code::invalid, "path: not below /work: " + path};
  return relative;
}

std::string encode(Op op, const std::string& path, std::uint64_t bytes,
                   std::string_view data) {
  Head head;
  head.op = op;
  head.path_bytes = static_cast<std::uint32_t>(path.size());
  head.bytes = bytes;
  std::string all(reinterpret_cast<const char*>(&head), sizeof(head));
  return all.append(path).append(data);
}

// --- inside the sandbox ---

bool read_exactly(int fd, char* data, std::size_t size) {
  while (size) {
    const ssize_t n = read(fd, data, size);
    if (n <= 0) return false;
    data += n;
    size -= static_cast<std::size_t>(n);
  }
  return true;
}

bool write_exactly(int fd, const char* data, std::size_t size) {
  while (size) {
    const ssize_t n = write(fd, data, size);
    if (n < 0) return false;
    data += n;
    size -= static_cast<std::size_t>(n);
  }
  return true;
}

int open_below(int dir, const char* path, std::uint64_t flags,
               std::uint64_t mode) {
  open_how how{};
  how.flags = flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  how.mode = mode;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
  return static_cast<int>(syscall(SYS_openat2, dir, path, &how, sizeof(how)));
}

int code_of(int error) {
  switch (error) {
    case ENOENT:
      return kNotFound;
    case ENOSPC:
    case EDQUOT:
      return kFull;
    case EFBIG:
      return kTooLarge;
    case ELOOP:
    case EXDEV:
    case ENXIO:
    case ENOTDIR:
    case EISDIR:
    case EACCES:
    case EPERM:
      return kInvalid;
    default:
      return kIo;
  }
}

int do_put(int in, int work, const std::string& path, std::uint64_t bytes) {
  std::size_t depth = 0;
  for (std::size_t at = path.find('/'); at != std::string::npos;
       at = path.find('/', at + 1)) {
    if (++depth > kDepthMax) return kInvalid;
    const std::string parent = path.substr(0, at);
    const std::size_t last = parent.rfind('/');
    const int dir = last == std::string::npos
                        ? dup(work)
                        : open_below(work, parent.substr(0, last).c_str(),
                                     O_RDONLY | O_DIRECTORY, 0);
    if (dir < 0) return code_of(errno);
    const int made = mkdirat(
        dir, parent.c_str() + (last == std::string::npos ? 0 : last + 1), 0755);
    const int error = errno;
    close(dir);
    if (made < 0 && error != EEXIST) return code_of(error);
  }
  const int file = open_below(work, path.c_str(), O_WRONLY | O_CREAT, 0644);
  if (file < 0) return code_of(errno);
  struct stat st {};
  if (fstat(file, &st) < 0 || !S_ISREG(st.st_mode)) return kInvalid;
  if (ftruncate(file, 0) < 0) return code_of(errno);
  std::vector<char> buffer(65536);
  while (bytes) {
    const auto n =
        static_cast<std::size_t>(std::min<std::uint64_t>(bytes, buffer.size()));
    if (!read_exactly(in, buffer.data(), n)) return kIo;
    if (!write_exactly(file, buffer.data(), n)) return code_of(errno);
    bytes -= n;
  }
  return close(file) < 0 ? code_of(errno) : kOk;
}

int do_collect(int out, int work, const std::string& path,
               std::uint64_t max_bytes) {
  const int file = open_below(work, path.c_str(), O_RDONLY, 0);
  if (file < 0) return code_of(errno);
  struct stat st {};
  if (fstat(file, &st) < 0 || !S_ISREG(st.st_mode)) return kInvalid;
  if (static_cast<std::uint64_t>(st.st_size) > max_bytes) return kTooLarge;
  std::vector<char> buffer(65536);
  std::uint64_t sent = 0;
  for (;;) {
    const ssize_t n = read(file, buffer.data(), buffer.size());
    if (n < 0) return kIo;
    if (n == 0) return kOk;
    sent += static_cast<std::uint64_t>(n);
    if (sent > max_bytes) return kTooLarge;
    if (!write_exactly(out, buffer.data(), static_cast<std::size_t>(n))) {
      return kIo;
    }
  }
}

}  // namespace

int collect_builtin(int in_fd, int out_fd) {
  Head head;
  if (!read_exactly(in_fd, reinterpret_cast<char*>(&head), sizeof(head)) ||
      head.path_bytes >= kPathMax) {
    return kInvalid;
  }
  std::string path(head.path_bytes, '\0');
  if (!read_exactly(in_fd, path.data(), path.size())) return kInvalid;
  const int work = open("/work", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (work < 0) return kIo;
  return head.op == Op::put ? do_put(in_fd, work, path, head.bytes)
                            : do_collect(out_fd, work, path, head.bytes);
}

Result<std::string> put_request(const std::string& path,
                                std::string_view bytes) {
  const auto relative = below_work(path);
  if (!relative) return relative.error();
  return encode(Op::put, *relative, bytes.size(), bytes);
}

Result<std::string> collect_request(const std::string& path,
                                    std::size_t max_bytes) {
  const auto relative = below_work(path);
  if (!relative) return relative.error();
  return encode(Op::collect, *relative, max_bytes, {});
}

std::optional<Error> collector_error(const StepResult& result,
                                     const std::string& path) {
  // A workspace that a job left full makes any refusal look like `disk`: the
  // exit code knows better.
  if (result.exit_code < 0 || result.detail.starts_with("exec")) {
    return Error{Code::unavailable, path + ": " + result.detail};
  }
  switch (result.exit_code) {
    case kOk:
      return std::nullopt;
    case kInvalid:
      return Error{Code::invalid, path + ": not a regular file below /work"};
    case kTooLarge:
      return Error{Code::too_large, path + ": larger than allowed"};
    case kNotFound:
      return Error{Code::not_found, path + ": no such file"};
    case kFull:
      return Error{Code::full, path + ": the workspace is full"};
    default:
      return Error{Code::io, path + ": could not be read or written"};
  }
}

}  // namespace machina::sandbox
