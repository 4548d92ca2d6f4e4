// queue/base/check.h
//
// CHECK stops the process on a broken invariant of our own: it prints the
// expression and the place, and aborts; recovery does the rest. It is on in
// every build. Never CHECK bytes that came from outside: those get a Result.

#pragma once

namespace machina {

[[noreturn]] void check_failed(const char* expression, const char* file,
                               int line);

}  // namespace machina

#define CHECK(condition)        \
  (static_cast<bool>(condition) \
       ? void(0)                \
       : ::machina::check_failed(#condition, __FILE__, __LINE__))
