// tests/support/sim_storage.h
//
// A Storage over a simulated disk that breaks every promise a disk may break,
// by seed and so repeatably.
//
// Each file has two images: what a reader sees (the cache) and what is on the
// disk, and the set of 512-byte sectors in which they differ. sync() makes them
// equal; a crash() gives each such sector its own fate. Names work the same
// way: a directory's changes since its last sync_dir() are undone from some
// point on.
//
//   survive: kill_at(), crash(), restart(), fail_sync_at(), fail_write_at(),
//            set_quota().   Nothing that was synced is lost.
//   detect:  flip(), lose_write_at(). Something that was synced is lost; the
//            log must say so.
//
// Operations are counted from 1: each open, write, sync, rename, remove,
// make_dir and sync_dir is one. After a kill every call fails until crash() or
// restart(), which also end the life of all open files and locks.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/storage.h"

namespace machina {

// Repeatable chance (splitmix64).
class SeededRandom : public Random {
 public:
  explicit SeededRandom(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() override;
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }
  bool one_in(std::uint64_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

class SimStorage : public Storage {
 public:
  explicit SimStorage(std::uint64_t seed);
  ~SimStorage() override;

  // --- what goes wrong, and when (0: never) ---
  void kill_at(std::uint64_t operation);    // counted by operations()
  void fail_sync_at(std::uint64_t sync);    // counted by syncs(): EIO
  void fail_write_at(std::uint64_t write);  // counted by writes(): EIO
  void lose_write_at(std::uint64_t write);  // says yes, and keeps nothing
  void set_quota(std::uint64_t bytes);      // of all files; 0: none

  // Power cut: unsynced sectors are kept, lost or zero, unsynced names undone.
  void crash();
  // The process died, the machine did not: the cache is what a reader sees.
  void restart();

  // --- looking and meddling ---
  std::uint64_t operations() const, syncs() const, writes() const;
  bool killed() const;
  bool exists(const std::string& name) const;
  std::uint64_t bytes_used() const;
  std::vector<std::byte> contents(const std::string& name) const;
  void flip(const std::string& name, std::uint64_t offset,
            std::uint8_t mask = 1);  // cache and disk
  void overwrite(const std::string& name, std::uint64_t offset,
                 std::span<const std::byte> bytes);  // cache and disk
  std::uint64_t digest() const;  // of all that a reader sees

  // --- Storage ---
  Result<std::unique_ptr<File>> open(std::string_view name,
                                     OpenMode mode) override;
  Result<std::vector<std::string>> list(std::string_view dir) override;
  Result<void> make_dir(std::string_view dir) override;
  Result<void> rename(std::string_view from, std::string_view to) override;
  Result<void> exchange(std::string_view one, std::string_view other) override;
  Result<void> remove(std::string_view name) override;
  Result<void> sync_dir(std::string_view dir) override;
  Result<std::unique_ptr<Lock>> lock(std::string_view name) override;
  Result<std::uint64_t> free_bytes() override;

 private:
  struct Node;
  struct NameChange;
  class SimFile;
  class SimLock;
  using Names = std::map<std::string, std::shared_ptr<Node>>;

  Result<void> step(const char* what, const std::string& name);
  bool stale(std::uint64_t life) const { return life != life_; }
  Result<void> write(Node& node, const std::string& name, bool durable,
                     std::uint64_t offset, std::span<const std::byte> bytes);
  Result<void> sync(Node& node, const std::string& name);
  Result<void> allocate(Node& node, const std::string& name,
                        std::uint64_t bytes);
  void land(Node& node, std::set<std::uint64_t> sectors);
  void lose_names();
  void end_life();
  std::uint64_t used() const;

  mutable std::mutex mutex_;
  SeededRandom random_;
  Names names_;                      // as seen now
  Names disk_names_;                 // as synced
  std::vector<NameChange> changes_;  // since, in order
  std::set<std::string> dirs_, disk_dirs_;
  std::set<std::string> locks_;
  std::uint64_t life_ = 1;
  std::uint64_t operations_ = 0, syncs_ = 0, writes_ = 0;
  std::uint64_t kill_at_ = 0, fail_sync_at_ = 0, fail_write_at_ = 0;
  std::uint64_t lose_write_at_ = 0, quota_ = 0;
  bool killed_ = false;
};

}  // namespace machina
