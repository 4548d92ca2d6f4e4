#include "queue/base/fd.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>

namespace machina {

bool write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  return true;
}

bool write_all_at(int fd, std::string_view bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    const ssize_t n =
        ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(n));
    offset += static_cast<std::uint64_t>(n);
  }
  return true;
}

bool read_all(int fd, void* into, std::size_t size) {
  auto* at = static_cast<char*>(into);
  while (size > 0) {
    errno = 0;
    const ssize_t n = ::read(fd, at, size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n;
    size -= static_cast<std::size_t>(n);
  }
  return true;
}

Result<std::string> read_file(int fd, std::size_t bytes_max,
                              const std::string& what) {
  struct stat status {};
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    return Error{Code::io, what + ": not a regular file"};
  }
  // One byte more than allowed, so that a file that grows is noticed.
  std::string bytes(bytes_max + 1, '\0');
  std::size_t have = 0;
  while (have < bytes.size()) {
    const ssize_t n = ::read(fd, bytes.data() + have, bytes.size() - have);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error{Code::io, what + ": " + std::strerror(errno)};
    if (n == 0) break;
    have += static_cast<std::size_t>(n);
  }
  if (have > bytes_max) {
    return Error{Code::too_large,
                 what + ": more than " + std::to_string(bytes_max) + " bytes"};
  }
  bytes.resize(have);
  return bytes;
}

}  // namespace machina
