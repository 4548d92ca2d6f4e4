// queue/base/result.h
//
// Result<T> is a T or the Error that prevented it; Result<T, E> has an error of
// another type, where somebody looks at its parts. It is the only way this
// code reports a failure the outside world can cause: disk, network, client,
// child. A broken invariant is not such a failure; that is CHECK's business
// (queue/base/check.h).
//
// The members carry std::expected's names, so that a later move to C++23 is a
// change to this file alone.

#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace machina {

// What the caller may do about it, and no finer: add a code only when some
// caller branches on it.
enum class Code {
  invalid,      // the caller's input is wrong; `what` names field, value, bound
  not_found,    //
  conflict,     // somebody else has it: a lock, a name
  too_large,    // a named maximum would be passed
  unavailable,  // not now; trying again later may help
  full,         // the disk has no room
  corrupt,      // bytes that were durable are damaged
  newer,        // written by a later version of this program
  io,           // the system said no
};

struct Error {
  Code code;
  std::string what;  // for a person: the operation, its object, the cause
};

template <class T, class E = Error>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(E error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool has_value() const { return state_.index() == 0; }
  explicit operator bool() const { return has_value(); }
  T& operator*() { return *std::get_if<0>(&state_); }
  const T& operator*() const { return *std::get_if<0>(&state_); }
  T* operator->() { return std::get_if<0>(&state_); }
  const T* operator->() const { return std::get_if<0>(&state_); }
  const E& error() const { return *std::get_if<1>(&state_); }

 private:
  std::variant<T, E> state_;
};

template <class E>
class [[nodiscard]] Result<void, E> {
 public:
  Result() = default;
  Result(E error) : error_(std::move(error)) {}

  bool has_value() const { return !error_; }
  explicit operator bool() const { return has_value(); }
  const E& error() const { return *error_; }

 private:
  std::optional<E> error_;
};

}  // namespace machina
