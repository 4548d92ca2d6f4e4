// server/http/limits.h
//
// How much each client may ask: token buckets by client. A bucket of a limit
// of `rpm` holds at most rpm and gains rpm/60 a second, so that one that is
// left alone for a minute is full: forgetting it then changes nothing, and the
// table needs no sweep.
//
//   B1  At most kClientsMax clients are remembered. While all of them are busy,
//       further ones share a bucket.
//   B2  A request takes from each of its limits or from none.
//   B3  A client is an IPv4 address or an IPv6 /64, with its credential.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>

#include "queue/base/clock.h"

namespace machina {

constexpr std::size_t kClientsMax = 65'536;
constexpr std::size_t kLimits = 3;
constexpr Millis kRefillMs = 60'000;  // an empty bucket is full after it

// Who is at the other end of a connection.
struct ClientAddress {
  // As in an IPv6 header; IPv4 as ::ffff:a.b.c.d; zero: the Unix socket.
  std::array<std::uint8_t, 16> bytes{};
  // What limits count by: the whole of an IPv4 address, a /64 of IPv6.
  ClientAddress counted() const;
  std::string text() const;
  bool operator==(const ClientAddress&) const = default;
};

struct ClientKey {
  ClientAddress address;
  std::uint8_t credential = 0;
  bool operator==(const ClientKey&) const = default;
};
struct ClientKeyHash {
  std::size_t operator()(const ClientKey& key) const;
};

// What a reply says of the limits that its request took from.
struct LimitNote {
  std::uint8_t mask = 0;
  std::int32_t left[kLimits] = {};
  std::int32_t full_s[kLimits] = {};  // until the bucket is full
};

class Limits {
 public:
  // Per minute; 0: none of this limit.
  explicit Limits(std::array<std::uint32_t, kLimits> rpm,
                  std::size_t clients_max = kClientsMax);

  std::uint8_t active() const { return active_; }
  std::uint32_t rpm(std::size_t limit) const { return rpm_[limit]; }

  struct Taken {
    int wait_s = 0;  // 0: taken. Else nothing was; seconds until it may be
    std::size_t limit = 0;  // which one ran out
    LimitNote note;
  };
  // One of each limit in `mask`.
  Taken take(const ClientKey& key, std::uint8_t mask, Millis now);
  // Seconds until one of `limit` could be taken; 0: now. Takes nothing.
  int wait_s(const ClientKey& key, std::size_t limit, Millis now);
  // `n` more of `limit`, whether they are there or not: what is owed is paid
  // before the next is taken.
  void charge(const ClientKey& key, std::size_t limit, double n, Millis now,
              LimitNote* note);

  std::size_t clients() const { return clients_.size(); }

 private:
  struct Client {
    double tokens[kLimits] = {};
    Millis at = 0, used = 0;
    const ClientKey* key = nullptr;
    Client *before = nullptr, *after = nullptr;  // by last use
  };
  Client& client(const ClientKey& key, Millis now);
  void refill(Client& c, Millis now) const;
  void touch(Client& c);
  void unlink(Client& c);
  int wait_of(const Client& c, std::size_t limit) const;
  void note(const Client& c, std::uint8_t mask, LimitNote* out) const;

  std::array<std::uint32_t, kLimits> rpm_;
  std::uint8_t active_ = 0;
  std::size_t max_;
  std::unordered_map<ClientKey, Client, ClientKeyHash> clients_;
  Client *newest_ = nullptr, *oldest_ = nullptr;
  Client shared_;  // B1
};

}  // namespace machina
