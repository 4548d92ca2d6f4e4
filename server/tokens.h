// server/tokens.h
//
// Lease tokens: "<fence, 16 hex>-<16 hex>", the second part the head of an
// HMAC-SHA-256 over the fence's eight big-endian bytes. The key is made with
// the root and kept in <root>/queue/token.key (32 bytes, 0600), so that tokens
// survive restarts.
//
//   K1  A token that this root never made does not verify, compared in
//       constant time.
//   K2  The key file is durable before the first token is made.

#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "queue/ids.h"
#include "queue/result.h"

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

 private:
  Tokens();
  void mac(Fence fence, char hex[16]);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// True where `given` is `secret`; takes a time that depends on `given` alone.
bool same_secret(std::string_view secret, std::string_view given);

}  // namespace machina
