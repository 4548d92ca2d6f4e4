// queue/wal/manifest.h
//
// wal/MANIFEST: which checkpoints count, the writer's epoch, and how far the
// log was durable when it was written. The struct is in queue/wal/log.h.
//
// The file is two like copies of 4096 bytes, replaced whole by rename, so that
// it is always there whole, and one bad sector does not lose it.

#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "queue/base/result.h"
#include "queue/base/storage.h"
#include "queue/wal/log.h"

namespace machina {

std::vector<std::byte> encode_manifest(const Manifest& manifest);
// corrupt, newer.
Result<Manifest> decode_manifest(std::span<const std::byte> bytes);

// Nothing where there is no such file.
Result<std::optional<Manifest>> read_manifest(Storage& storage);
// The same of a log that is to be opened: corrupt where it is missing and what
// it would name is there.
Result<std::optional<Manifest>> find_manifest(Storage& storage);
// The manifest to come, and room for it: what was the manifest before.
constexpr char kManifestTmp[] = "wal/MANIFEST.tmp";
// Durable when it returns: tmp, sync, exchange, sync_dir. Code::full: the
// manifest is the one before.
Result<void> write_manifest(Storage& storage, const Manifest& manifest);

// Reads all of a file of at most `max` bytes.
Result<std::vector<std::byte>> read_file(Storage& storage,
                                         std::string_view name,
                                         std::uint64_t max);

}  // namespace machina
