// workers/kinds/junit.h
//
// Reading a test runner's JUnit XML. The file was written by untrusted code, so
// it is parsed by a confined handler that holds nothing; what comes back is a
// small form with bounds that the worker checks again.
//
//   request := size:u32 xml
//   reply   := size:u32 frame*      (size of all frames)
//   frame   := 'C' outcome:u8 duration_ms:u32 id_size:u16 id msg_size:u16 msg
//            | 'T' passed:u32 failed:u32 errors:u32 skipped:u32 dropped:u32
//            | 'X' msg_size:u16 msg          the file is no JUnit report
//
//   J1  Memory is bounded whatever the file: input, depth, names, messages and
//       frames have maxima; a document type declaration ends the parse, so no
//       entity can be declared.
//   J2  Every case is counted; those beyond the frames' bound are counted in
//       `dropped`. Failing ones have a bound of their own, so that they are
//       kept though thousands passed before them.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "queue/result.h"

namespace machina::kinds {

constexpr std::size_t kJunitXmlBytesMax = 64u << 20;
constexpr std::size_t kJunitReplyBytesMax = 6u << 20;
constexpr std::size_t kCaseIdBytesMax = 512;
constexpr std::size_t kCaseMessageBytesMax = 2048;

enum class Outcome : std::uint8_t { passed, failed, error, skipped, flaky };
std::string_view name(Outcome);

struct Case {
  std::string id;  // classname::name
  Outcome outcome = Outcome::passed;
  std::uint32_t duration_ms = 0;
  std::string message;
};

struct Suite {
  std::vector<Case> cases;
  std::uint32_t passed = 0, failed = 0, errors = 0, skipped = 0;
  std::uint32_t dropped = 0;  // counted, not listed
};

// Parses and encodes; never fails: a bad file is an 'X' frame.
std::string encode_junit(std::string_view xml);
// Code::invalid: the file was no report (the reason follows), or the frames
// are malformed.
Result<Suite> decode_junit(std::string_view frames);

int junit_handler(int in_fd, int out_fd);

// Sends `xml` to a running handler and reads its reply. The socket is closed.
Result<Suite> ask_junit(int socket_fd, std::string_view xml, int timeout_ms);

}  // namespace machina::kinds
