#include "queue/wal/manifest.h"

#include <algorithm>

#include "queue/base/crc32c.h"
#include "queue/base/little_endian.h"
#include "queue/wal/segment.h"

namespace machina {
namespace {

constexpr std::uint64_t kManifestMagic = 0x314e414d4843414dULL;  // "MACHMAN1"
constexpr std::uint32_t kClean = 1, kBegun = 2;
constexpr std::size_t kCopyBytes = 4096;
constexpr std::size_t kCrcAt = kCopyBytes - 4;
constexpr char kName[] = "wal/MANIFEST";

Result<Manifest> decode_copy(std::span<const std::byte> bytes) {
  if (bytes.size() < kCopyBytes)
    return Error{Code::corrupt, "wal/MANIFEST is cut short"};
  const std::byte* p = bytes.data();
  if (get<std::uint64_t>(p) != kManifestMagic ||
      crc32c(0, bytes.first(kCrcAt)) != get<std::uint32_t>(p + kCrcAt))
    return Error{Code::corrupt, "wal/MANIFEST: its checksum fails"};
  if (get<std::uint16_t>(p + 10) > kLogFormat)
    return Error{Code::newer, "wal/MANIFEST needs log format " +
                                  std::to_string(get<std::uint16_t>(p + 10))};
  Manifest m;
  m.feature_incompat = get<std::uint64_t>(p + 16);
  m.feature_compat = get<std::uint64_t>(p + 24);
  if (auto ok = check_features(m.feature_incompat); !ok)
    return Error{Code::newer, "wal/MANIFEST: " + ok.error().what};
  m.log_uuid[0] = get<std::uint64_t>(p + 32);
  m.log_uuid[1] = get<std::uint64_t>(p + 40);
  m.generation = get<std::uint64_t>(p + 48);
  m.writer_epoch = get<std::uint32_t>(p + 56);
  auto flags = get<std::uint32_t>(p + 60);
  m.clean = (flags & kClean) != 0;
  m.begun = (flags & kBegun) != 0;
  m.durable_lsn = get<std::uint64_t>(p + 64);
  m.time_ms = get<Millis>(p + 72);
  for (int i = 0; i < 2; ++i) {
    const std::byte* at = p + 80 + 24 * i;
    m.checkpoint[i].lsn = get<std::uint64_t>(at);
    m.checkpoint[i].bytes = get<std::uint64_t>(at + 8);
    m.checkpoint[i].digest = get<std::uint64_t>(at + 16);
  }
  return m;
}

}  // namespace

std::vector<std::byte> encode_manifest(const Manifest& m) {
  std::vector<std::byte> bytes(2 * kCopyBytes);
  std::byte* p = bytes.data();
  put(p, kManifestMagic);
  put(p + 8, kLogFormat);
  put(p + 10, kLogFormat);
  put(p + 16, m.feature_incompat);
  put(p + 24, m.feature_compat);
  put(p + 32, m.log_uuid[0]);
  put(p + 40, m.log_uuid[1]);
  put(p + 48, m.generation);
  put(p + 56, m.writer_epoch);
  put(p + 60, (m.clean ? kClean : 0) | (m.begun ? kBegun : 0));
  put(p + 64, m.durable_lsn);
  put(p + 72, m.time_ms);
  for (int i = 0; i < 2; ++i) {
    std::byte* at = p + 80 + 24 * i;
    put(at, m.checkpoint[i].lsn);
    put(at + 8, m.checkpoint[i].bytes);
    put(at + 16, m.checkpoint[i].digest);
  }
  put(p + kCrcAt, crc32c(0, {p, kCrcAt}));
  std::copy_n(bytes.begin(), kCopyBytes, bytes.begin() + kCopyBytes);
  return bytes;
}

Result<Manifest> decode_manifest(std::span<const std::byte> bytes) {
  auto first = decode_copy(bytes);
  if (first || first.error().code == Code::newer) return first;
  if (bytes.size() < 2 * kCopyBytes) return first;
  auto second = decode_copy(bytes.subspan(kCopyBytes));
  if (second || second.error().code == Code::newer) return second;
  return first;
}

Result<std::optional<Manifest>> read_manifest(Storage& storage) {
  auto bytes = read_file(storage, kName, 2 * kCopyBytes);
  if (!bytes) {
    if (bytes.error().code == Code::not_found) return std::optional<Manifest>();
    return bytes.error();
  }
  auto manifest = decode_manifest(*bytes);
  if (!manifest) return manifest.error();
  return std::optional<Manifest>(*manifest);
}

Result<std::optional<Manifest>> find_manifest(Storage& storage) {
  auto manifest = read_manifest(storage);
  if (!manifest || *manifest) return manifest;
  auto names = storage.list("wal");
  if (!names) return names.error();
  for (const std::string& name : *names) {
    if (name.ends_with(".seg") || name.ends_with(".ckpt"))
      return Error{Code::corrupt,
                   "wal/MANIFEST is missing, and wal/" + name + " is there"};
  }
  return manifest;
}

// The one before is kept as the file of the next, so that no room is needed
// for it on a full disk.
Result<void> write_manifest(Storage& storage, const Manifest& manifest) {
  auto bytes = encode_manifest(manifest);
  auto file = storage.open(kManifestTmp, OpenMode::write);
  if (!file && file.error().code == Code::not_found)
    file = storage.open(kManifestTmp, OpenMode::create);
  if (!file) return file.error();
  auto size = (*file)->size();
  if (!size) return size.error();
  if (*size > bytes.size()) {
    if (auto ok = (*file)->truncate(bytes.size()); !ok) return ok;
  }
  if (auto ok = (*file)->write_at(0, bytes); !ok) return ok;
  if (auto ok = (*file)->sync(); !ok) return ok;
  file->reset();
  if (auto ok = storage.exchange(kManifestTmp, kName); !ok) return ok;
  return storage.sync_dir("wal");
}

Result<std::vector<std::byte>> read_file(Storage& storage,
                                         std::string_view name,
                                         std::uint64_t max) {
  auto file = storage.open(name, OpenMode::read);
  if (!file) return file.error();
  auto size = (*file)->size();
  if (!size) return size.error();
  if (*size > max)
    return Error{Code::corrupt, std::string(name) + " is " +
                                    std::to_string(*size) + " bytes; at most " +
                                    std::to_string(max) + " were written"};
  std::vector<std::byte> bytes(*size);
  auto got = (*file)->read_at(0, bytes);
  if (!got) return got.error();
  bytes.resize(*got);
  return bytes;
}

}  // namespace machina
