// workers/worker/job_log.h
//
// A job's live output on its way to the server. append() never waits; a thread
// sends what has gathered, every kEveryMs at most; finish() sends the rest.
//
//   G1  At most `cap` bytes of a job are sent; beyond, a line says so.
//   G2  Bytes are named by their offset, so a retry after a lost answer adds
//       nothing twice.
//   G3  A server that is away loses nothing below the cap until finish().

#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#include "queue/base/job.h"
#include "workers/worker/http_client.h"

namespace machina {

class JobLog {
 public:
  static constexpr Millis kEveryMs = 250;
  static constexpr std::size_t kPostBytesMax = 256 << 10;

  explicit JobLog(HttpClient::Connect connect);
  ~JobLog();

  void begin(const std::string& token, std::size_t cap);
  void append(std::string_view bytes);
  // The rest, through the caller's client. Gives up on the first refusal and
  // after `patience_ms` without an answer.
  void finish(HttpClient& client, Millis patience_ms);

 private:
  struct Chunk {
    std::string path, bytes;
  };
  void loop();
  Chunk next_locked() const;

  HttpClient client_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string token_, bytes_;
  std::size_t cap_ = 0, sent_ = 0, lost_ = 0;
  bool sending_ = false, refused_ = false, quit_ = false;
  std::thread thread_;
};

}  // namespace machina
