// queue/wal/checkpoint.h
//
// wal/<lsn>.ckpt: the core's whole state as of an lsn, in chunks that are
// checksummed one by one, with a trailer over all of them. docs/wal-format.md
// has the bytes. The manifest names the two that count and their digests.

#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "queue/base/result.h"
#include "queue/base/storage.h"
#include "queue/wal/log.h"

namespace machina {

// "wal/0000000000000001.ckpt"
std::string checkpoint_name(Lsn lsn);

// Writes the file under a temporary name, syncs, renames and syncs the
// directory. What it returns belongs into the manifest. `room`: a file to write
// it into, whose blocks are there already; empty: a new one. Code::full: there
// is no new file, and the room is as it was or larger.
Result<Manifest::Checkpoint> write_checkpoint(Storage& storage,
                                              const Manifest& manifest, Lsn lsn,
                                              Millis time_ms,
                                              std::span<const std::byte> image,
                                              const std::string& room = "");

// The image. corrupt: anything about the file differs from `expected` or does
// not hold. newer.
Result<std::vector<std::byte>> read_checkpoint(
    Storage& storage, const Manifest& manifest,
    const Manifest::Checkpoint& expected);

}  // namespace machina
