#include "server/auth/signature.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>

#include <algorithm>

#include "queue/base/check.h"
#include "queue/base/hex.h"

namespace machina {
namespace {

constexpr std::int64_t kMillisFrom = 20'000'000'000;  // 2e10: the year 2603
constexpr std::size_t kTsDigitsMax = 15;

// Looked up once: a fetch by name costs more than a short hash.
const EVP_MD* sha256() {
  static const EVP_MD* md = EVP_MD_fetch(nullptr, "SHA256", nullptr);
  CHECK(md != nullptr);
  return md;
}

HexDigest hex_of(const unsigned char bytes[32]) {
  HexDigest hex;
  write_hex(hex.data(), bytes, 32);
  return hex;
}

}  // namespace

// --- SHA-256 ---------------------------------------------------------------

struct Sha256::Impl {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~Impl() { EVP_MD_CTX_free(context); }
};

Sha256::Sha256() : impl_(std::make_unique<Impl>()) {
  CHECK(impl_->context != nullptr);
  CHECK(EVP_DigestInit_ex2(impl_->context, sha256(), nullptr) == 1);
}

Sha256::~Sha256() = default;

void Sha256::update(std::string_view bytes) {
  CHECK(EVP_DigestUpdate(impl_->context, bytes.data(), bytes.size()) == 1);
}

HexDigest Sha256::finish() {
  unsigned char out[32];
  CHECK(EVP_DigestFinal_ex(impl_->context, out, nullptr) == 1);
  CHECK(EVP_DigestInit_ex2(impl_->context, sha256(), nullptr) == 1);
  return hex_of(out);
}

HexDigest Sha256::of(std::string_view bytes) {
  thread_local Sha256 hash;
  hash.update(bytes);
  return hash.finish();
}

// --- HMAC ------------------------------------------------------------------

struct Signer::Impl {
  EVP_MAC* mac = nullptr;
  EVP_MAC_CTX* context = nullptr;
  ~Impl() {
    EVP_MAC_CTX_free(context);
    EVP_MAC_free(mac);
  }
};

Signer::Signer(std::string_view secret) : impl_(std::make_unique<Impl>()) {
  CHECK(!secret.empty());
  impl_->mac = EVP_MAC_fetch(nullptr, "HMAC", nullptr);
  CHECK(impl_->mac != nullptr);
  impl_->context = EVP_MAC_CTX_new(impl_->mac);
  char digest[] = "SHA256";
  OSSL_PARAM parameters[] = {
      OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
      OSSL_PARAM_construct_end()};
  CHECK(EVP_MAC_init(impl_->context,
                     reinterpret_cast<const unsigned char*>(secret.data()),
                     secret.size(), parameters) == 1);
}

Signer::~Signer() = default;

HexDigest Signer::sign(const SignedParts& parts, const HexDigest& body) {
  // Without a key: the one that the context was made with, used again.
  CHECK(EVP_MAC_init(impl_->context, nullptr, 0, nullptr) == 1);
  auto line = [this](std::string_view text) {
    auto bytes = [](std::string_view s) {
      return reinterpret_cast<const unsigned char*>(s.data());
    };
    CHECK(EVP_MAC_update(impl_->context, bytes(text), text.size()) == 1);
    CHECK(EVP_MAC_update(impl_->context, bytes("\n"), 1) == 1);
  };
  line(parts.ts);
  line(parts.nonce);
  line(parts.method);
  line(parts.target);
  line({body.data(), body.size()});
  unsigned char out[32];
  std::size_t size = 0;
  CHECK(EVP_MAC_final(impl_->context, out, &size, sizeof out) == 1);
  return hex_of(out);
}

bool Signer::holds(const SignedParts& parts, const HexDigest& body,
                   std::string_view given) {
  HexDigest right = sign(parts, body);
  HexDigest copy{};
  bool formed = given.starts_with(kSignaturePrefix) &&
                given.size() == kSignaturePrefix.size() + copy.size();
  if (formed) {
    given.substr(kSignaturePrefix.size()).copy(copy.data(), copy.size());
    for (char& c : copy) {
      if (c >= 'A' && c <= 'F') c = static_cast<char>(c + 32);
    }
  }
  bool same = CRYPTO_memcmp(right.data(), copy.data(), right.size()) == 0;
  OPENSSL_cleanse(right.data(), right.size());
  return formed && same;
}

// --- Parts -----------------------------------------------------------------

bool valid_nonce(std::string_view nonce) {
  constexpr std::string_view kOther = "._~+/=:-";
  return !nonce.empty() && nonce.size() <= kNonceBytesMax &&
         std::all_of(nonce.begin(), nonce.end(), [&](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                  (c >= '0' && c <= '9') || kOther.find(c) != kOther.npos;
         });
}

std::optional<std::int64_t> signature_time_ms(std::string_view ts) {
  if (ts.empty() || ts.size() > kTsDigitsMax) return std::nullopt;
  std::int64_t n = 0;
  for (char c : ts) {
    if (c < '0' || c > '9') return std::nullopt;
    n = n * 10 + (c - '0');
  }
  return n >= kMillisFrom ? n : n * 1000;
}

std::string random_nonce() { return random_hex(32); }

}  // namespace machina
