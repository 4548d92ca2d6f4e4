// server/auth/gate.h
//
// Who may come in: bearer token, request signature, or both. Decides from a
// head and, for a signature, the digest of the body; keeps no connection.
//
//   head --look()--> granted | refused | after_body --verify()--> granted ...
//
//   A1  Whoever is refused learns nothing of why: Cause is for the log alone,
//       and the signature is computed whatever else is wrong.
//   A2  A nonce is recorded only for a request that is let in, after all else
//       about it was found right.
//   A3  A credential that was sent must be right, even where another is.
//   A4  A token is compared with every row of the table, in constant time: how
//       long that takes tells neither which row it is nor how much is right.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/result.h"
#include "server/auth/nonces.h"
#include "server/auth/principal.h"
#include "server/auth/signature.h"
#include "server/http/http_parser.h"

namespace machina {

class Gate {
 public:
  struct Options {
    std::string token, secret;  // empty: none; their tenant is "default"
    std::vector<Credential> credentials;  // more tokens
    bool all = false;                     // where both are set: both are needed
    Millis window_ms = 60'000;
    std::string nonce_dir;  // empty: nonces are in memory only
    std::size_t nonces_max = kNoncesMax;
  };
  static Result<std::unique_ptr<Gate>> open(const Options& options,
                                            Millis wall_ms, Millis mono_ms);

  bool closed() const { return !tokens_.empty() || signer_ != nullptr; }
  bool signs() const { return signer_ != nullptr; }
  // The value of WWW-Authenticate.
  std::string_view challenge() const;

  enum class Entry : std::uint8_t { granted, after_body, refused, full };
  enum class Cause : std::uint8_t {
    none,
    no_credential,
    one_is_missing,
    wrong_token,
    malformed_signature,
    stale_signature,
    wrong_signature,
    used_nonce,
  };
  static std::string_view text(Cause cause);

  // `presented`: whether it carried a credential that had to be looked at.
  // `who` lives as long as this; of a signed request it holds after verify().
  Entry look(const Head& head, Cause* cause, bool* presented,
             const Principal** who) const;
  // Who comes by the Unix socket; who comes where no credential is needed, or
  // shows a signature.
  const Principal& host() const { return host_; }
  const Principal& local() const { return local_; }
  // For after_body. `head_wall_ms`: when the head came.
  Entry verify(const Head& head, const HexDigest& body, Millis head_wall_ms,
               Millis mono_ms, Cause* cause);
  // For a request that verify() granted.
  void record(const Head& head);
  int retry_s(Millis mono_ms) const { return nonces_->retry_s(mono_ms); }

  // Once a turn.
  void flush() {
    if (nonces_ != nullptr) nonces_->flush();
  }
  Result<void> close() {
    return nonces_ == nullptr ? Result<void>() : nonces_->close();
  }
  std::string trouble() {
    return nonces_ == nullptr ? std::string() : nonces_->trouble();
  }
  // Whether no credential is of another tenant than the rest.
  bool one_tenant() const { return one_tenant_; }
  std::size_t nonces() const {
    return nonces_ == nullptr ? 0 : nonces_->size();
  }

 private:
  Gate() = default;
  Options options_;                 // without tokens and secret
  std::vector<Credential> tokens_;  // one row each
  Principal host_{"default", "host", Principal::all, true};
  Principal local_;
  bool one_tenant_ = true;
  std::unique_ptr<Signer> signer_;
  std::unique_ptr<Nonces> nonces_;
};

}  // namespace machina
