// queue/base/storage.h
//
// The only way queue/ reaches a disk: named files in one directory tree,
// written with explicit offsets, made durable by explicit syncs. PosixStorage
// is the disk; tests/support/sim_storage.h is one that loses, tears and
// reorders unsynced writes, fills up, fails and lies.
//
// Names are relative ("wal/00..1.seg"); no name leaves the directory that the
// Storage was opened on.
//
//   S1  A synced range survives a crash. An unsynced one may survive whole, in
//       part (any subset of 512-byte sectors), as zeros, or not at all.
//   S2  A created, renamed or removed name is durable only after sync_dir() of
//       its directory.
//   S3  After one failed sync() of a File, nothing is known about what it
//       holds; the caller must not sync it again (durability.md, promise 7).
//
// All calls block. A File may be used from any thread, by one at a time;
// read_at() by any number at once.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/result.h"

namespace machina {

class File {
 public:
  virtual ~File() = default;

  // Writes all of `bytes` at `offset`, growing the file where needed. With
  // Mode::durable the bytes are synced when it returns. Fails with Code::full
  // on ENOSPC or EDQUOT, else Code::io; how much was written is then unknown.
  virtual Result<void> write_at(std::uint64_t offset,
                                std::span<const std::byte> bytes) = 0;

  // Reads up to bytes.size() bytes; fewer only at the end of the file.
  virtual Result<std::size_t> read_at(std::uint64_t offset,
                                      std::span<std::byte> bytes) const = 0;

  // Data and size to the disk (fdatasync). S3.
  virtual Result<void> sync() = 0;

  // Makes the file at least `bytes` long, of blocks that are its own from now
  // on: no write within them is refused for want of room. What was not written
  // reads as zeros. `bytes` > 0. Code::full: not enough room; the file may have
  // grown.
  virtual Result<void> allocate(std::uint64_t bytes);

  virtual Result<std::uint64_t> size() const = 0;
  virtual Result<void> truncate(std::uint64_t bytes) = 0;
};

enum class OpenMode {
  settled,  // must exist; for reading what the disk itself holds: what the
            // cache has and the disk has not is synced, then forgotten, so
            // that bytes kept in memory by a failed sync are not believed
  read,     // must exist
  write,    // must exist; buffered
  create,   // must not exist; buffered
  durable,  // must exist; each write_at is durable when it returns:
            // O_DIRECT|O_DSYNC where the file system has it (the bytes and
            // offset of every write are then multiples of 4096), else
            // write and fdatasync
};

class Storage {
 public:
  virtual ~Storage() = default;

  virtual Result<std::unique_ptr<File>> open(std::string_view name,
                                             OpenMode mode) = 0;
  virtual Result<std::vector<std::string>> list(std::string_view dir) = 0;
  virtual Result<void> make_dir(std::string_view dir) = 0;  // ok if it exists
  virtual Result<void> rename(std::string_view from, std::string_view to) = 0;
  // As rename(), but `from` then names what `to` named, where the file system
  // can do that; else `from` is gone.
  virtual Result<void> exchange(std::string_view from, std::string_view to) {
    return rename(from, to);
  }
  virtual Result<void> remove(std::string_view name) = 0;
  virtual Result<void> sync_dir(std::string_view dir) = 0;

  // Holds `name` locked for this process until the lock is destroyed. Fails
  // with Code::conflict where another process has it.
  class Lock {
   public:
    virtual ~Lock() = default;
  };
  virtual Result<std::unique_ptr<Lock>> lock(std::string_view name) = 0;

  virtual Result<std::uint64_t> free_bytes() = 0;
  // The size of the file system; 0: unknown.
  virtual Result<std::uint64_t> total_bytes() { return std::uint64_t{0}; }
};

// The directory `path`, which must exist.
Result<std::unique_ptr<Storage>> open_posix_storage(const std::string& path);

// Holds the file `name` below `dir` locked against those who lock() it, beside
// others who hold it like this. Makes nothing: null where there is no such
// file. conflict: it is locked; the error says by which process, where that is
// known.
Result<std::unique_ptr<Storage::Lock>> share_posix_lock(
    const std::string& dir, const std::string& name);

// The kind of file system that holds `path` ("ext4", "xfs", "nfs", "tmpfs",
// "overlay", ...; an unknown one as its magic number in hex), and whether the
// promises above can be believed there. nfs, smb, overlay and tmpfs: no.
std::string filesystem_kind(const std::string& path);
bool filesystem_keeps_promises(std::string_view kind);

}  // namespace machina
