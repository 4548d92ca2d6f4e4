// server/api/store.h
//
// Files beside the queue: jobs' logs and artifacts. Two threads of its own do
// the work, for the loop never touches a file; results come back through the
// loop's post().
//
//   <root>/logs/<xx>/<job id>/<attempt>-<fence>.log   xx: the id's last byte
//   <root>/artifacts/objects/<aa>/<sha256>            aa: the first byte
//   <root>/artifacts/index/<xx>/<fence>/              xx: the fence's last byte
//       job-<job id>          an empty file: whose attempt it was
//       <sha256>-<name>       a second link to the object
//   <root>/artifacts/tmp/<number>                     emptied at start
//
// The index of an attempt lists what it staged; the job's record lists the
// names that its end claimed. An object that has no link but its own belongs to
// nobody. Where a crash left two links of one name, the later one counts.
//
//   F1  commit() returns after object and index are durable.
//   F2  A log is written by offset: a chunk sent twice leaves one copy; a chunk
//       that starts after the end is refused.
//   F3  No name that came from outside becomes a path of its own: directories
//       are made of hex digits here and held open; nothing follows a link.
//   F4  Logs and artifacts of jobs that are no longer known are removed: the
//       sweep looks at one of 256 buckets at a time, and only at what nobody
//       has written to for kSweepAgeS.
//   F5  Nothing is written that would leave less free than the floor: the room
//       of the queue's log is not for files (Code::full).

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "queue/base/fd.h"
#include "queue/base/ids.h"
#include "queue/base/result.h"

namespace machina {

constexpr std::uint64_t kLogBytesMax = 64u << 20;  // of one attempt
constexpr std::size_t kLogChunkBytesMax = 256 << 10;
constexpr std::uint64_t kArtifactBytesMax = 64u << 20;
constexpr std::size_t kArtifactsStagedMax = 256;  // of one attempt
constexpr std::int64_t kSweepAgeS = 3600;
constexpr std::size_t kSweepMax = 1000;       // looked at in one go
constexpr std::size_t kStoreQueueMax = 4096;  // then 503

struct Artifact {
  std::string name;
  std::string sha256;  // 64 hex digits
  std::uint64_t size = 0;
};
struct OpenedFile {
  std::shared_ptr<Fd> fd;
  std::uint64_t size = 0;
};

// All calls block: for store threads (and tests) only.
class Store {
 public:
  static Result<std::unique_ptr<Store>> open(const std::string& root);

  // How much must be free after each write; any thread. 0, as at first: no
  // bound but the disk's end.
  void set_floor(std::uint64_t free_bytes);

  // The log's size after it. Code::invalid for a gap, Code::too_large.
  Result<std::uint64_t> write_log(const JobId& job, int attempt, Fence fence,
                                  std::uint64_t offset, std::string_view bytes);
  // attempt 0: the last one that wrote. Code::not_found.
  Result<OpenedFile> open_log(const JobId& job, int attempt);

  // One artifact on its way. append() in order, then commit().
  class Upload {
   public:
    virtual ~Upload() = default;  // not committed: leaves nothing
    virtual Result<void> append(std::string_view bytes) = 0;
    virtual Result<Artifact> commit(const JobId& job) = 0;
  };
  Result<std::unique_ptr<Upload>> begin_upload(Fence fence,
                                               const std::string& name);
  // What an attempt staged; empty: nothing.
  Result<std::vector<Artifact>> artifacts(Fence fence);
  Result<OpenedFile> open_artifact(const Artifact& artifact);

  // What of bucket 0..255 is old enough to ask about (F4); forget() removes
  // one of them.
  struct Kept {
    JobId job;
    Fence fence = 0;  // of an index; 0: the job's logs
  };
  std::vector<Kept> kept(int bucket, std::int64_t now_s);
  void forget(const Kept& kept);

  struct Dirs;
  ~Store();

 private:
  Store();
  std::unique_ptr<Dirs> dirs_;
};

// Threads that run closures in order of submission.
class FileThreads {
 public:
  explicit FileThreads(int threads);
  ~FileThreads();  // runs what was submitted
  // False: kStoreQueueMax are waiting.
  bool run(std::function<void()> work);

 private:
  void loop();
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> work_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// 64 hex digits.
std::string sha256_of(std::string_view bytes);
// Up to `max` bytes of an open file from `offset`.
Result<std::string> read_piece(const Fd& fd, std::uint64_t offset,
                               std::size_t max);

}  // namespace machina
