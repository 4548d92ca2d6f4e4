// workers/pool/pool_process.h
//
// What the pool does to processes: to itself once, to workers each time.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "queue/base/result.h"

namespace machina {

// Gives up root for `uid` (and the gid of the same number) for good: all ids,
// groups and capabilities, read back. Not root: nothing to give up.
Result<void> drop_privilege(std::uint32_t uid);

// A program that can be started after drop_privilege() though its path may not
// be searched then (a build below /root).
class Program {
 public:
  static Result<Program> open(const std::string& path);
  Program(Program&& other) noexcept;
  ~Program();
  Program& operator=(Program&&) = delete;

  // Starts it with descriptors 3 (`channel`) and 4 (`facts`), which stay the
  // caller's to close; no other is inherited but 0, 1, 2. It is killed when
  // this process dies. Returns the pid.
  Result<int> start(const std::vector<std::string>& argv,
                    const std::vector<std::string>& env, int channel,
                    int facts) const;

 private:
  Program(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  int fd_ = -1;
  std::string path_;
};
constexpr int kWorkerChannelFd = 3, kWorkerFactsFd = 4;

}  // namespace machina
