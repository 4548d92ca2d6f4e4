#include "queue/wal/checkpoint.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>

#include "queue/base/crc32c.h"
#include "queue/base/little_endian.h"
#include "queue/wal/manifest.h"
#include "queue/wal/segment.h"

namespace machina {
namespace {

constexpr std::uint64_t kHeadMagic = 0x31504b434843414dULL;  // "MACHCKP1"
constexpr std::uint64_t kTailMagic = 0x31444e454843414dULL;  // "MACHEND1"
constexpr std::size_t kHeadBytes = 96;
constexpr std::size_t kChunkHeadBytes = 16;
constexpr std::size_t kChunkBytes = 1 << 20;
constexpr std::size_t kTailBytes = 32;
constexpr std::uint64_t kImageBytesMax = 1ull << 36;

// Appends to the file and to the digest of all of it.
class Sink {
 public:
  explicit Sink(File& file) : file_(file), state_(XXH3_createState()) {
    XXH3_64bits_reset(state_.get());
  }
  Result<void> add(std::span<const std::byte> bytes) {
    XXH3_64bits_update(state_.get(), bytes.data(), bytes.size());
    if (auto ok = file_.write_at(bytes_, bytes); !ok) return ok;
    bytes_ += bytes.size();
    return {};
  }
  std::uint64_t bytes() const { return bytes_; }
  std::uint64_t digest() const { return XXH3_64bits_digest(state_.get()); }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  File& file_;
  std::uint64_t bytes_ = 0;
  std::unique_ptr<XXH3_state_t, Free> state_;
};

std::array<std::byte, kHeadBytes> encode_head(const Manifest& manifest, Lsn lsn,
                                              Millis time_ms,
                                              std::uint64_t image_bytes) {
  std::array<std::byte, kHeadBytes> head{};
  std::byte* p = head.data();
  put(p, kHeadMagic);
  put(p + 8, kLogFormat);
  put(p + 10, kLogFormat);
  put(p + 16, manifest.feature_incompat);
  put(p + 24, manifest.feature_compat);
  put(p + 32, manifest.log_uuid[0]);
  put(p + 40, manifest.log_uuid[1]);
  put(p + 48, lsn);
  put(p + 56, time_ms);
  put(p + 64, image_bytes);
  put(p + 72, manifest.writer_epoch);
  put(p + 92, crc32c(0, std::span(head).first(92)));
  return head;
}

Error damaged(const std::string& name, const char* what) {
  return {Code::corrupt, name + ": " + what};
}

Result<std::vector<std::byte>> decode(const std::string& name,
                                      const Manifest& manifest, Lsn lsn,
                                      std::span<const std::byte> bytes) {
  if (bytes.size() < kHeadBytes + kTailBytes)
    return damaged(name, "it is cut short");
  const std::byte* p = bytes.data();
  if (get<std::uint64_t>(p) != kHeadMagic ||
      crc32c(0, bytes.first(92)) != get<std::uint32_t>(p + 92))
    return damaged(name, "its header's checksum fails");
  if (get<std::uint16_t>(p + 10) > kLogFormat)
    return Error{Code::newer, name +
                                  ": it was written by a newer version of "
                                  "this program; use that version"};
  if (auto ok = check_features(get<std::uint64_t>(p + 16)); !ok)
    return Error{Code::newer, name + ": " + ok.error().what};
  if (get<std::uint64_t>(p + 32) != manifest.log_uuid[0] ||
      get<std::uint64_t>(p + 40) != manifest.log_uuid[1] ||
      get<std::uint64_t>(p + 48) != lsn)
    return damaged(name, "it belongs to another log or lsn");
  auto image_bytes = get<std::uint64_t>(p + 64);
  if (image_bytes > bytes.size()) return damaged(name, "its size is wrong");
  std::vector<std::byte> image;
  image.reserve(image_bytes);
  std::size_t at = kHeadBytes;
  std::uint32_t index = 0;
  while (image.size() < image_bytes) {
    if (bytes.size() - at < kChunkHeadBytes)
      return damaged(name, "it is cut short");
    auto size = get<std::uint32_t>(p + at);
    auto number = get<std::uint32_t>(p + at + 4);
    auto hash = get<std::uint64_t>(p + at + 8);
    at += kChunkHeadBytes;
    if (size == 0 || size > image_bytes - image.size() ||
        size > bytes.size() - at || number != index ||
        XXH3_64bits_withSeed(p + at, size, index) != hash)
      return damaged(name, "a chunk's checksum fails");
    image.insert(image.end(), bytes.begin() + static_cast<std::ptrdiff_t>(at),
                 bytes.begin() + static_cast<std::ptrdiff_t>(at + size));
    at += size;
    ++index;
  }
  if (bytes.size() - at != kTailBytes ||
      get<std::uint64_t>(p + at) != kTailMagic ||
      get<std::uint64_t>(p + at + 8) != image_bytes ||
      get<std::uint64_t>(p + at + 16) !=
          XXH3_64bits(image.data(), image.size()) ||
      get<std::uint32_t>(p + at + 24) != index ||
      get<std::uint32_t>(p + at + 28) != crc32c(0, bytes.subspan(at, 28)))
    return damaged(name, "its trailer does not hold");
  return image;
}

Result<Manifest::Checkpoint> write_image(Storage& storage,
                                         const std::string& tmp, bool there,
                                         const Manifest& manifest, Lsn lsn,
                                         Millis time_ms,
                                         std::span<const std::byte> image) {
  auto file = storage.open(tmp, there ? OpenMode::write : OpenMode::create);
  if (!file) return file.error();
  Sink sink(**file);
  if (auto ok = sink.add(encode_head(manifest, lsn, time_ms, image.size()));
      !ok)
    return ok.error();
  std::uint32_t chunks = 0;
  for (std::size_t at = 0; at < image.size(); at += kChunkBytes, ++chunks) {
    auto chunk = image.subspan(at, std::min(kChunkBytes, image.size() - at));
    std::array<std::byte, kChunkHeadBytes> head{};
    put(head.data(), static_cast<std::uint32_t>(chunk.size()));
    put(head.data() + 4, chunks);
    put(head.data() + 8, std::uint64_t{XXH3_64bits_withSeed(
                             chunk.data(), chunk.size(), chunks)});
    if (auto ok = sink.add(head); !ok) return ok.error();
    if (auto ok = sink.add(chunk); !ok) return ok.error();
    // In small parts, so that the log's next sync has not much to wait for.
    if (at + chunk.size() == image.size()) continue;
    if (auto ok = (*file)->sync(); !ok) return ok.error();
  }
  std::array<std::byte, kTailBytes> tail{};
  put(tail.data(), kTailMagic);
  put(tail.data() + 8, std::uint64_t{image.size()});
  put(tail.data() + 16, std::uint64_t{XXH3_64bits(image.data(), image.size())});
  put(tail.data() + 24, chunks);
  put(tail.data() + 28, crc32c(0, std::span(tail).first(28)));
  if (auto ok = sink.add(tail); !ok) return ok.error();
  if (there) {  // what is left over goes
    if (auto ok = (*file)->truncate(sink.bytes()); !ok) return ok.error();
  }
  if (auto ok = (*file)->sync(); !ok) return ok.error();
  return Manifest::Checkpoint{lsn, sink.bytes(), sink.digest()};
}

}  // namespace

std::string checkpoint_name(Lsn lsn) {
  char text[32];
  std::snprintf(text, sizeof(text), "wal/%016llx.ckpt",
                static_cast<unsigned long long>(lsn));
  return text;
}

Result<Manifest::Checkpoint> write_checkpoint(Storage& storage,
                                              const Manifest& manifest, Lsn lsn,
                                              Millis time_ms,
                                              std::span<const std::byte> image,
                                              const std::string& room) {
  std::string name = checkpoint_name(lsn), tmp = name + ".tmp";
  if (!room.empty()) tmp = room;
  auto written =
      write_image(storage, tmp, !room.empty(), manifest, lsn, time_ms, image);
  Result<void> named;
  if (written) named = storage.rename(tmp, name);
  if (!written || !named) {
    Error error = written ? named.error() : written.error();
    if (error.code == Code::full && room.empty())
      (void)storage.remove(tmp).has_value();
    return error;
  }
  if (auto ok = storage.sync_dir("wal"); !ok) return ok.error();
  return written;
}

Result<std::vector<std::byte>> read_checkpoint(
    Storage& storage, const Manifest& manifest,
    const Manifest::Checkpoint& expected) {
  std::string name = checkpoint_name(expected.lsn);
  auto bytes = read_file(storage, name, kImageBytesMax);
  if (!bytes) {
    if (bytes.error().code == Code::not_found)
      return damaged(name, "the manifest names it and it is not there");
    return bytes.error();
  }
  // Decoded first: a file of a later version is not a damaged one.
  auto image = decode(name, manifest, expected.lsn, *bytes);
  if (!image) return image;
  if (bytes->size() != expected.bytes ||
      XXH3_64bits(bytes->data(), bytes->size()) != expected.digest)
    return damaged(name, "it is not the file that the manifest names");
  return image;
}

}  // namespace machina
