// tools/cli/client.h
//
// A small HTTP client for the verbs, over the server's Unix socket or TCP. The
// token travels in a header, never in an argument; with MACHINA_API_HMAC_SECRET
// each request over TCP is signed too. curl's door for tools/cli is client.cc.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "queue/base/result.h"

namespace machina {
class Config;
}

namespace machina::cli {

constexpr std::size_t kAnswerBytesMax = 64u << 20;

class Client {
 public:
  struct Request {
    std::string method = "GET";
    std::string path;  // with query
    std::string body;
    std::vector<std::string> headers;  // "Name: value"
    long timeout_ms = 30'000;
  };
  struct Answer {
    long status = 0;
    std::string body;
    std::map<std::string, std::string> headers;  // lower-case names
  };

  // The server that was named: MACHINA_SERVER, the root's socket, or
  // MACHINA_HOST and MACHINA_PORT, whichever was set nearest to the user
  // (command line, environment, file), in this order where equally near. What
  // was named never falls back to another. Where nothing was: ./machina-data's
  // socket if it is there, else http://127.0.0.1:8080. Code::invalid for no
  // such form. tests/e2e/client_test.cc.
  static Result<std::unique_ptr<Client>> open(const Config& config);
  ~Client();

  // Any status is an answer. Fails with Code::unavailable when nobody could be
  // reached, with Code::io when the connection broke after the request may
  // have arrived: then its effect is unknown.
  Result<Answer> call(const Request& request);
  const std::string& where() const { return where_; }

 private:
  Client() = default;
  struct Curl;
  std::unique_ptr<Curl> curl_;
  std::string where_, base_, socket_, token_, secret_;
};

// The three headers that sign a request now, "Name: value".
std::vector<std::string> signature_headers(const std::string& secret,
                                           const std::string& method,
                                           const std::string& path,
                                           const std::string& body);

// Where a server that binds this address is reached from its own host.
std::string url_of(const std::string& host, int port);

// For one path segment or query value.
std::string url_escape(const std::string& text);

}  // namespace machina::cli
