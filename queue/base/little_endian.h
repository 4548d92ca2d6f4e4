// queue/base/little_endian.h
//
// Whole numbers at fixed offsets, least significant byte first: how every
// file of the log is laid out.

#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstring>

namespace machina {

static_assert(std::endian::native == std::endian::little,
              "the log's files are written by copying; port put/get first");

template <std::integral T>
void put(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof(value));
}

template <std::integral T>
T get(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

}  // namespace machina
