// workers/http_client.h
//
// HTTP to the server over connections that somebody else makes: workers and
// pool hold no right to its socket, the spawner does. One client is one
// kept-alive connection and is used by one thread; interrupt() alone may be
// called from any.
//
//   C1  call() ends by its timeout, by interrupt(), or with an answer.
//   C2  No answer means unknown: the server may have done it.
//   C3  A reply longer than kReplyBytesMax is an error, not memory.

#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "queue/job.h"
#include "queue/result.h"

namespace machina {

class HttpClient {
 public:
  static constexpr std::size_t kReplyBytesMax = 6u << 20;
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
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace machina
