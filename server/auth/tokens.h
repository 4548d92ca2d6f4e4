// server/auth/tokens.h
//
// Lease tokens: "<fence, 16 hex>-<16 hex>", the second part the head of an
// HMAC-SHA-256 over the fence's eight big-endian bytes. The key is made with
// the root and kept in <root>/queue/token.key (32 bytes, 0600), so that tokens
// survive restarts.
//
// And workers' sessions: a worker's name is no credential, the secret of its
// session is. A session is known by a number made of both with the same key,
// which is what the log keeps.
//
//   K1  A token that this root never made does not verify, compared in
//       constant time.
//   K2  The key file is durable before the first token is made.

#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "queue/base/ids.h"
#include "queue/base/result.h"

namespace machina {

class Tokens {
 public:
  // Reads the key from `path`, or makes it.
  static Result<std::unique_ptr<Tokens>> open(const std::string& path);
  ~Tokens();

  void append(std::string* out, Fence fence);
  std::string make(Fence fence) {
    std::string text;
    append(&text, fence);
    return text;
  }
  struct Checked {
    bool formed = false;  // false: 404
    bool ours = false;    // false: 409
    Fence fence = 0;
  };
  Checked check(std::string_view text);
  // Never 0. Who does not know the secret cannot make it; bit 0 is `local`.
  std::uint64_t session(std::string_view worker, std::string_view secret,
                        bool local);

 private:
  Tokens();
  std::uint64_t mac(std::string_view bytes);
  void mac(Fence fence, char hex[16]);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace machina
