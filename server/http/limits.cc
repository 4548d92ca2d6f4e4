#include "server/http/limits.h"

#include <arpa/inet.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace machina {
namespace {

constexpr std::uint8_t kMapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

bool is_v4(const ClientAddress& a) {
  return std::memcmp(a.bytes.data(), kMapped, sizeof kMapped) == 0;
}

}  // namespace

ClientAddress ClientAddress::counted() const {
  ClientAddress a = *this;
  if (!is_v4(a)) std::fill(a.bytes.begin() + 8, a.bytes.end(), std::uint8_t{0});
  return a;
}

std::string ClientAddress::text() const {
  char out[INET6_ADDRSTRLEN] = "";
  if (bytes == decltype(bytes){}) return "socket";
  if (is_v4(*this)) {
    inet_ntop(AF_INET, bytes.data() + 12, out, sizeof out);
  } else {
    inet_ntop(AF_INET6, bytes.data(), out, sizeof out);
  }
  return out;
}

std::size_t ClientKeyHash::operator()(const ClientKey& key) const {
  std::uint64_t a, b;
  std::memcpy(&a, key.address.bytes.data(), 8);
  std::memcpy(&b, key.address.bytes.data() + 8, 8);
  std::uint64_t h = (a ^ (b + key.credential) * 0x9e3779b97f4a7c15ull);
  h ^= h >> 32;
  h *= 0xd6e8feb86659fd93ull;
  return static_cast<std::size_t>(h ^ h >> 32);
}

Limits::Limits(std::array<std::uint32_t, kLimits> rpm, std::size_t clients_max)
    : rpm_(rpm), max_(clients_max) {
  for (std::size_t i = 0; i < kLimits; ++i) {
    if (rpm_[i] > 0) active_ |= static_cast<std::uint8_t>(1u << i);
    shared_.tokens[i] = rpm_[i];
  }
}

void Limits::unlink(Client& c) {
  (c.before != nullptr ? c.before->after : newest_) = c.after;
  (c.after != nullptr ? c.after->before : oldest_) = c.before;
  c.before = c.after = nullptr;
}

// To the front of the list.
void Limits::touch(Client& c) {
  if (newest_ == &c) return;
  if (c.before != nullptr || c.after != nullptr || oldest_ == &c) unlink(c);
  c.after = newest_;
  if (newest_ != nullptr) newest_->before = &c;
  newest_ = &c;
  if (oldest_ == nullptr) oldest_ = &c;
}

void Limits::refill(Client& c, Millis now) const {
  Millis passed = now - c.at;
  if (passed <= 0) return;
  c.at = now;
  for (std::size_t i = 0; i < kLimits; ++i) {
    double full = rpm_[i];
    double gained = full * static_cast<double>(passed) / kRefillMs;
    c.tokens[i] = std::min(full, c.tokens[i] + gained);
  }
}

Limits::Client& Limits::client(const ClientKey& key, Millis now) {
  auto found = clients_.find(key);
  if (found == clients_.end()) {
    // Two at most: the table shrinks again after a flood.
    for (int i = 0; i < 2 && oldest_ != nullptr; ++i) {
      Client& last = *oldest_;
      refill(last, now);
      bool full = true;
      for (std::size_t l = 0; l < kLimits; ++l) {
        full = full && last.tokens[l] >= rpm_[l];
      }
      if (!full) {
        // One in debt must not keep those behind it.
        if (now - last.used < kRefillMs) break;
        touch(last);
        last.used = now;
        continue;
      }
      ClientKey gone = *last.key;
      unlink(last);
      clients_.erase(gone);
    }
    if (clients_.size() >= max_) {
      refill(shared_, now);
      return shared_;
    }
    found = clients_.try_emplace(key).first;
    Client& made = found->second;
    made.key = &found->first;
    made.at = now;
    for (std::size_t l = 0; l < kLimits; ++l) made.tokens[l] = rpm_[l];
  }
  Client& c = found->second;
  refill(c, now);
  touch(c);
  c.used = now;
  return c;
}

int Limits::wait_of(const Client& c, std::size_t limit) const {
  if (rpm_[limit] == 0 || c.tokens[limit] >= 1) return 0;
  double seconds = (1 - c.tokens[limit]) * 60 / rpm_[limit];
  return static_cast<int>(std::clamp(std::ceil(seconds - 1e-9), 1.0, 1e9));
}

void Limits::note(const Client& c, std::uint8_t mask, LimitNote* out) const {
  out->mask = mask;
  for (std::size_t i = 0; i < kLimits; ++i) {
    if ((mask >> i & 1) == 0) continue;
    double full = rpm_[i];
    out->left[i] = static_cast<std::int32_t>(std::max(0.0, c.tokens[i]));
    out->full_s[i] = static_cast<std::int32_t>(
        std::min(1e9, std::ceil((full - c.tokens[i]) * 60 / full - 1e-9)));
  }
}

Limits::Taken Limits::take(const ClientKey& key, std::uint8_t mask,
                           Millis now) {
  Taken taken;
  mask &= active_;
  if (mask == 0) return taken;
  Client& c = client(key, now);
  for (std::size_t i = 0; i < kLimits; ++i) {
    if ((mask >> i & 1) == 0) continue;
    int wait = wait_of(c, i);
    if (wait > taken.wait_s) {
      taken.wait_s = wait;
      taken.limit = i;
    }
  }
  for (std::size_t i = 0; taken.wait_s == 0 && i < kLimits; ++i) {
    if ((mask >> i & 1) != 0) c.tokens[i] -= 1;
  }
  note(c, mask, &taken.note);
  return taken;
}

int Limits::wait_s(const ClientKey& key, std::size_t limit, Millis now) {
  if (rpm_[limit] == 0) return 0;
  auto found = clients_.find(key);
  if (found == clients_.end()) {
    if (clients_.size() < max_) return 0;
    return wait_of(client(key, now), limit);
  }
  refill(found->second, now);
  return wait_of(found->second, limit);
}

void Limits::charge(const ClientKey& key, std::size_t limit, double n,
                    Millis now, LimitNote* out) {
  if (rpm_[limit] == 0 || n <= 0) return;
  Client& c = client(key, now);
  c.tokens[limit] -= n;
  std::uint8_t mask = out->mask;
  note(c, mask, out);
}

}  // namespace machina
