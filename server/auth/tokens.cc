#include "server/auth/tokens.h"

#include <fcntl.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "queue/base/check.h"
#include "queue/base/hex.h"

namespace machina {
namespace {

constexpr std::size_t kKeyBytes = 32;

Error failure(const std::string& what, const std::string& path) {
  return Error{Code::io, what + " " + path + ": " + std::strerror(errno)};
}

Result<void> read_key(int fd, const std::string& path,
                      unsigned char key[kKeyBytes]) {
  struct stat info;
  if (fstat(fd, &info) != 0) return failure("stat", path);
  if (info.st_size != kKeyBytes || (info.st_mode & 077) != 0) {
    return Error{Code::corrupt,
                 path + ": the token key must be 32 bytes, mode 0600"};
  }
  if (pread(fd, key, kKeyBytes, 0) != static_cast<ssize_t>(kKeyBytes)) {
    return failure("read", path);
  }
  return {};
}

// K2: a key that a crash could take back would orphan every lease.
Result<void> make_key(const std::string& path, unsigned char key[kKeyBytes]) {
  if (getrandom(key, kKeyBytes, 0) != static_cast<ssize_t>(kKeyBytes)) {
    return failure("getrandom for", path);
  }
  std::string temporary = path + ".tmp";
  unlink(temporary.c_str());
  int fd =
      open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return failure("create", temporary);
  bool ok = write(fd, key, kKeyBytes) == static_cast<ssize_t>(kKeyBytes) &&
            fsync(fd) == 0;
  ok = close(fd) == 0 && ok;
  if (!ok) return failure("write", temporary);
  if (rename(temporary.c_str(), path.c_str()) != 0) {
    return failure("rename", temporary);
  }
  std::string dir = path.substr(0, path.rfind('/'));
  fd = open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  ok = fd >= 0 && fsync(fd) == 0;
  if (fd >= 0) close(fd);
  if (!ok) return failure("sync", dir);
  return {};
}

}  // namespace

struct Tokens::Impl {
  EVP_MAC* mac = nullptr;
  EVP_MAC_CTX* context = nullptr;
  ~Impl() {
    EVP_MAC_CTX_free(context);
    EVP_MAC_free(mac);
  }
};

Tokens::Tokens() : impl_(std::make_unique<Impl>()) {}
Tokens::~Tokens() = default;

Result<std::unique_ptr<Tokens>> Tokens::open(const std::string& path) {
  unsigned char key[kKeyBytes];
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  Result<void> got;
  if (fd >= 0) {
    got = read_key(fd, path, key);
    close(fd);
  } else if (errno == ENOENT) {
    got = make_key(path, key);
  } else {
    got = failure("open", path);
  }
  if (!got) return got.error();
  std::unique_ptr<Tokens> tokens(new Tokens());
  Impl& impl = *tokens->impl_;
  impl.mac = EVP_MAC_fetch(nullptr, "HMAC", nullptr);
  CHECK(impl.mac != nullptr);
  impl.context = EVP_MAC_CTX_new(impl.mac);
  char digest[] = "SHA256";
  OSSL_PARAM parameters[] = {
      OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
      OSSL_PARAM_construct_end()};
  CHECK(EVP_MAC_init(impl.context, key, kKeyBytes, parameters) == 1);
  OPENSSL_cleanse(key, sizeof key);
  return tokens;
}

std::uint64_t Tokens::mac(std::string_view bytes) {
  unsigned char out[32];
  std::size_t size = 0;
  // Without a key: the one that the context was made with, used again.
  CHECK(EVP_MAC_init(impl_->context, nullptr, 0, nullptr) == 1);
  CHECK(EVP_MAC_update(impl_->context,
                       reinterpret_cast<const unsigned char*>(bytes.data()),
                       bytes.size()) == 1);
  CHECK(EVP_MAC_final(impl_->context, out, &size, sizeof out) == 1);
  std::uint64_t head = 0;
  for (int i = 0; i < 8; ++i) head = head << 8 | out[i];
  return head;
}

void Tokens::mac(Fence fence, char hex[16]) {
  char bytes[8];
  for (int i = 0; i < 8; ++i) {
    bytes[i] = static_cast<char>(fence >> (8 * (7 - i)));
  }
  write_hex(hex, mac({bytes, sizeof bytes}));
}

std::uint64_t Tokens::session(std::string_view worker, std::string_view secret,
                              bool local) {
  // Longer than a fence, and a name has no newline: no two have one text.
  std::string text = "session\n";
  text += worker;
  text += '\n';
  text += secret;
  const std::uint64_t number = (mac(text) & ~std::uint64_t{1}) | local;
  return number != 0 ? number : 2;
}

void Tokens::append(std::string* out, Fence fence) {
  char hex[16];
  mac(fence, hex);
  *out += fence_hex(fence);
  *out += '-';
  out->append(hex, sizeof hex);
}

Tokens::Checked Tokens::check(std::string_view text) {
  Checked result;
  if (text.size() != 33 || text[16] != '-') return result;
  auto fence = parse_fence_hex(text.substr(0, 16));
  // The second part has the same form as a fence.
  if (!fence || !parse_fence_hex(text.substr(17))) return result;
  result.formed = true;
  result.fence = *fence;
  char hex[16];
  mac(*fence, hex);
  result.ours = CRYPTO_memcmp(hex, text.data() + 17, sizeof hex) == 0;
  return result;
}

}  // namespace machina
