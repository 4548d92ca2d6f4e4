// queue/base/fd.h
//
// A file descriptor that closes itself, and transfers that survive signals and
// short counts.
//
//   FD1  A moved descriptor has one owner; assigning closes what was held.
//        (FdTest.ADescriptorHasOneOwner)
//   FD2  write_all and read_all transfer every byte or answer false.
//        (FdTest.EveryByteGoesThroughAPipe)
//
// Not for code between fork and exec, which may call only what is
// async-signal-safe.

#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "queue/base/result.h"

namespace machina {

class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    reset(other.release());
    return *this;
  }
  ~Fd() { reset(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd = -1) {
    if (fd_ >= 0 && fd_ != fd) ::close(fd_);
    fd_ = fd;
  }

 private:
  int fd_;
};

// False with errno. The end of the file is an error of read_all: errno is 0.
bool write_all(int fd, std::string_view bytes);
bool write_all_at(int fd, std::string_view bytes, std::uint64_t offset);
bool read_all(int fd, void* into, std::size_t size);

// Everything that a regular file holds, at most `bytes_max`; `what` names the
// file in an error. Code::io for what is no regular file, Code::too_large.
Result<std::string> read_file(int fd, std::size_t bytes_max,
                              const std::string& what);

}  // namespace machina
