// server/auth/signature.h
//
// What a request signature is, for the server that checks one and the command
// line that makes one. HMAC-SHA-256, as hex, over five lines, each with its
// newline:
//
//     ts \n nonce \n METHOD \n path-with-query \n sha256hex(body) \n
//
// ts as it was sent (seconds, or milliseconds from 2e10 on), the path as it is
// in the request line. Headers: X-Machina-Ts, X-Machina-Nonce and
// X-Machina-Signature, "v1=" and the hex.
//
//   W1  The key never leaves the object; signatures are compared in constant
//       time.
//   W2  A nonce has at most kNonceBytesMax bytes of a closed alphabet, so that
//       no two requests share a canonical string.

#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace machina {

constexpr std::size_t kNonceBytesMax = 128;
constexpr std::string_view kSignaturePrefix = "v1=";

using HexDigest = std::array<char, 64>;  // lower case

// SHA-256 of bytes that come in pieces.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  void update(std::string_view bytes);
  HexDigest finish();  // and starts anew
  static HexDigest of(std::string_view bytes);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct SignedParts {
  std::string_view ts, nonce, method, target;
};

class Signer {
 public:
  explicit Signer(std::string_view secret);  // not empty
  ~Signer();
  Signer(const Signer&) = delete;

  HexDigest sign(const SignedParts& parts, const HexDigest& body);
  // `given`: the header's value. False for any other form too; the time taken
  // does not depend on where it differs.
  bool holds(const SignedParts& parts, const HexDigest& body,
             std::string_view given);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// [A-Za-z0-9._~+/=:-]{1,128}
bool valid_nonce(std::string_view nonce);
// X-Machina-Ts in milliseconds since 1970; nothing where it is no such number.
std::optional<std::int64_t> signature_time_ms(std::string_view ts);
// 32 hex digits that were never used before.
std::string random_nonce();

}  // namespace machina
