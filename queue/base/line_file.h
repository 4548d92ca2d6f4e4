// queue/base/line_file.h
//
// A file of lines that cannot grow without bound: at max_bytes it is renamed to
// NAME.1 (and NAME.1 to NAME.2 ...) and begun anew; what is over total_bytes
// goes, oldest first.
//
//   F1  NAME and its predecessors together hold at most total_bytes and a line,
//       each at most max_bytes and a line.
//   F2  At any moment each line is in exactly one of them, and they are whole
//       files: they are only renamed.
//   F3  One process writes it. Where somebody else moved it away (logrotate),
//       reopen() begins a new one; without that the moved one is written on.
//
// tests/queue/base/logger_test.cc

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "queue/base/result.h"

namespace machina {

class LineFile {
 public:
  static constexpr int kKeptMax = 100;  // predecessors
  // `dir_fd` is taken over. Fails with Code::io where it cannot be opened for
  // appending, or is no regular file. At least one predecessor is kept: where
  // total_bytes is less than two files, they are smaller.
  static Result<std::unique_ptr<LineFile>> open(int dir_fd, std::string name,
                                                std::uint64_t max_bytes,
                                                std::uint64_t total_bytes);
  // The same by path; its directory must exist.
  static Result<std::unique_ptr<LineFile>> open(const std::string& path,
                                                std::uint64_t max_bytes,
                                                std::uint64_t total_bytes);
  // Whether that would succeed just now. Makes nothing.
  static Result<void> examine(const std::string& path);
  ~LineFile();

  // Whole lines. How many bytes of them were written, as whole lines: all, or
  // it failed. Then part of the next line may have been, too, and the next call
  // begins a new one.
  std::size_t append(std::string_view lines);
  void reopen();
  // What append() writes to; changes with a rotation. -1: not open.
  int fd() const { return fd_; }
  const std::string& name() const { return name_; }

 private:
  LineFile(int dir_fd, std::string name, std::uint64_t max_bytes,
           std::uint64_t total_bytes);
  bool open_now();
  void rotate();
  void drop_oldest() const;

  int dir_, fd_ = -1;
  std::string name_;
  std::uint64_t max_bytes_, total_bytes_, size_ = 0;
  int error_ = 0;  // of the last open_now()
  bool torn_ = false;
};

}  // namespace machina
