// workers/worker/http_client.h
//
// HTTP/1.1 to the server over connections that somebody else makes: workers and
// pool hold no right to its socket, the spawner does. One client is one
// kept-alive connection and is used by one thread; interrupt() and resume()
// alone may be called from any.
//
// Not libcurl: 7.88, Debian 12's, ignores CURL_SOCKOPT_ALREADY_CONNECTED and
// connects again, which a connected Unix socket refuses. What is needed of
// HTTP here is small: a request with a length, an answer with a length.
//
//   C1  send() ends by its timeout, by interrupt(), or with an answer.
//   C2  No answer means unknown: the server may have done it.
//   C3  A reply longer than kReplyBytesMax is an error, not memory.

#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <string_view>

#include "queue/base/job.h"
#include "queue/base/result.h"

namespace machina {

class HttpClient {
 public:
  static constexpr std::size_t kReplyBytesMax = 6u << 20;
  static constexpr std::size_t kHeaderBytesMax = 16u << 10;
  static constexpr Millis kCallMs = 10'000;

  using Connect = std::function<Result<int>()>;  // a connected descriptor
  struct Reply {
    int status = 0;
    std::string body;
  };

  explicit HttpClient(Connect connect);
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  // Code::unavailable: no answer. Code::conflict: interrupted.
  Result<Reply> post(const std::string& path, std::string_view json,
                     Millis timeout_ms = kCallMs);
  Result<Reply> send(const char* method, const std::string& path,
                     std::string_view bytes, const char* type,
                     Millis timeout_ms = kCallMs);

  // Ends the call that is running, and every later one, until resume().
  void interrupt();
  void resume();

 private:
  Result<void> open();
  void close();
  Result<void> wait(short event, std::int64_t deadline_ms);
  Result<void> write(std::string_view head, std::string_view body,
                     std::int64_t deadline_ms);
  Result<Reply> read(std::int64_t deadline_ms);
  Result<void> fill(std::int64_t deadline_ms);

  const Connect connect_;
  const int wake_fd_;
  std::atomic<bool> interrupted_{false};
  int fd_ = -1;
  std::string in_;
};

}  // namespace machina
