// server/auth/nonces.h
//
// Which signatures were used: each works once, also over a restart and a clock
// that is set. Nonces live in two generations, each of kLives times the window;
// the older is dropped whole, and with it goes the range of the times of its
// signatures: a signature from a range whose nonces are gone is not taken any
// more, whatever the clock says by then.
//
//   <root>/queue/nonces       the younger generation; header, then 16 bytes
//   <root>/queue/nonces.old   a nonce: its hash, the time of its signature
//
// The files are written behind the requests' back by a thread of their own,
// once a turn of the loop, and synced when the server stops.
//
//   O1  A nonce that was recorded is refused for as long as its signature could
//       be fresh: never forgotten to make room (kNoncesMax: then no signed
//       request is taken), nor by a clock that steps.
//   O2  After a stop, and after a kill, what was recorded is still refused. (In
//       a kill what the last turn recorded may be lost; its requests had no
//       answer yet.) After a power cut: all that was signed before the start.
//   O3  Looking and recording take constant time; nothing here blocks but
//       open() and close().

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/result.h"

namespace machina {

constexpr std::size_t kNoncesMax = 1u << 22;  // of one generation
constexpr std::size_t kNonceRangesMax = 8;

// A set of 64-bit keys that grows in small steps.
class KeySet {
 public:
  KeySet();
  bool has(std::uint64_t key) const;
  void add(std::uint64_t key);
  void clear();
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kShards = 64;
  struct Shard {
    std::vector<std::uint64_t> slots;  // 0: free
    std::size_t used = 0;
  };
  std::vector<Shard> shards_;
  std::size_t size_ = 0;
};

class Nonces {
 public:
  // `dir`: where the files are; empty: none are kept (tests). `window_ms`: how
  // far a signature's time may be from ours. `boot`: what names this run of the
  // machine. `max`: how many a generation holds.
  static Result<std::unique_ptr<Nonces>> open(const std::string& dir,
                                              Millis window_ms, Millis wall_ms,
                                              Millis mono_ms,
                                              const std::string& boot,
                                              std::size_t max = kNoncesMax);
  ~Nonces();

  enum class Found { fresh, used, full };
  // `full`: `max` are there; it ends in retry_s() at the latest. Records
  // nothing.
  Found look(std::string_view nonce, std::int64_t ts_ms, Millis mono_ms);
  void record(std::string_view nonce, std::int64_t ts_ms);
  int retry_s(Millis mono_ms) const;
  // Once a turn: hands what was recorded to the thread.
  void flush();
  // Writes and syncs all. Nothing may be recorded after it.
  Result<void> close();
  // What went wrong with the files, once; empty: nothing did.
  std::string trouble();

  std::size_t size() const;

 private:
  Nonces();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// /proc/sys/kernel/random/boot_id; empty where there is none.
std::string current_boot();

}  // namespace machina
