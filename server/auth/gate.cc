#include "server/auth/gate.h"

#include "queue/base/hex.h"
#include "server/auth/tokens.h"

namespace machina {
namespace {

constexpr std::string_view kBearer = "bearer ";

bool has_bearer(const Head& head) {
  return head.authorization.size() >= kBearer.size() - 1 &&
         equals_ignoring_case(head.authorization.substr(0, kBearer.size() - 1),
                              kBearer.substr(0, kBearer.size() - 1));
}

std::string_view bearer_of(const Head& head) {
  if (head.authorization.size() <= kBearer.size() ||
      !equals_ignoring_case(head.authorization.substr(0, kBearer.size()),
                            kBearer)) {
    return {};
  }
  std::string_view given = head.authorization.substr(kBearer.size());
  while (!given.empty() && given.front() == ' ') given.remove_prefix(1);
  return given;
}

SignedParts parts_of(const Head& head) {
  return {head.signature_ts, head.nonce.substr(0, kNonceBytesMax),
          head.method_text, head.target};
}

}  // namespace

Result<std::unique_ptr<Gate>> Gate::open(const Options& options, Millis wall_ms,
                                         Millis mono_ms) {
  std::unique_ptr<Gate> gate(new Gate());
  gate->options_ = options;
  gate->options_.secret.clear();
  gate->options_.token.clear();
  gate->tokens_ = std::move(gate->options_.credentials);
  if (!options.token.empty()) {
    gate->tokens_.push_back({options.token, {"default", "token"}});
  }
  for (const Credential& row : gate->tokens_) {
    gate->one_tenant_ &= row.principal.tenant == gate->local_.tenant;
  }
  if (!options.secret.empty()) {
    gate->local_.name = "secret";
    gate->signer_ = std::make_unique<Signer>(options.secret);
    auto nonces = Nonces::open(options.nonce_dir, options.window_ms, wall_ms,
                               mono_ms, current_boot(), options.nonces_max);
    if (!nonces) return nonces.error();
    gate->nonces_ = std::move(*nonces);
  }
  return gate;
}

std::string_view Gate::challenge() const {
  if (!signs()) return "Bearer";
  return !tokens_.empty() ? "Bearer, Machina-HMAC-SHA256"
                          : "Machina-HMAC-SHA256";
}

std::string_view Gate::text(Cause cause) {
  switch (cause) {
    case Cause::none:
      return "none";
    case Cause::no_credential:
      return "no credential";
    case Cause::one_is_missing:
      return "token and signature are both needed, one is missing";
    case Cause::wrong_token:
      return "wrong token";
    case Cause::malformed_signature:
      return "malformed X-Machina-Ts or X-Machina-Nonce";
    case Cause::stale_signature:
      return "X-Machina-Ts is outside MACHINA_API_HMAC_TTL_SEC: is a clock "
             "wrong?";
    case Cause::wrong_signature:
      return "the signature does not hold";
    case Cause::used_nonce:
      return "the nonce was used before";
  }
  return "?";
}

Gate::Entry Gate::look(const Head& head, Cause* cause, bool* presented,
                       const Principal** who) const {
  *presented = false;
  *who = &local_;
  if (!closed()) return Entry::granted;
  bool bearer = !tokens_.empty() && has_bearer(head);
  bool signature = signs() && (!head.signature.empty() || !head.nonce.empty() ||
                               !head.signature_ts.empty());
  *presented = bearer || signature;
  if (!*presented) {
    *cause = Cause::no_credential;
    return Entry::refused;
  }
  if (bearer) {
    const Principal* found = nullptr;
    for (const Credential& row : tokens_) {
      if (same_secret(row.token, bearer_of(head))) found = &row.principal;
    }
    if (found == nullptr) {
      *cause = Cause::wrong_token;
      return Entry::refused;
    }
    *who = found;
  }
  if (options_.all && !tokens_.empty() && signs() && !(bearer && signature)) {
    *cause = Cause::one_is_missing;
    return Entry::refused;
  }
  return signature ? Entry::after_body : Entry::granted;
}

Gate::Entry Gate::verify(const Head& head, const HexDigest& body,
                         Millis head_wall_ms, Millis mono_ms, Cause* cause) {
  bool holds = signer_->holds(parts_of(head), body, head.signature);
  auto ts = signature_time_ms(head.signature_ts);
  if (!ts || !valid_nonce(head.nonce)) {
    *cause = Cause::malformed_signature;
    return Entry::refused;
  }
  if (!holds) {
    *cause = Cause::wrong_signature;
    return Entry::refused;
  }
  Millis late = head_wall_ms - *ts;
  if (late > options_.window_ms || -late > options_.window_ms) {
    *cause = Cause::stale_signature;
    return Entry::refused;
  }
  switch (nonces_->look(head.nonce, *ts, mono_ms)) {
    case Nonces::Found::used:
      *cause = Cause::used_nonce;
      return Entry::refused;
    case Nonces::Found::full:
      return Entry::full;
    case Nonces::Found::fresh:
      break;
  }
  return Entry::granted;
}

void Gate::record(const Head& head) {
  nonces_->record(head.nonce, *signature_time_ms(head.signature_ts));
}

}  // namespace machina
