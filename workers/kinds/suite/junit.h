// workers/kinds/suite/junit.h
//
// Reading a test runner's JUnit XML. The file was written by untrusted code, so
// it is parsed by a confined handler that holds nothing; what comes back is a
// small form with bounds that the worker checks again.
//
//   request := size:u32 xml
//   reply   := size:u32 frame*      (size of all frames)
//   frame   := 'C' outcome:u8 body:u8 teardown:u8 nth:u32 duration_ms:u32
//              id_size:u16 id msg_size:u16 msg
//            | 'T' passed:u32 failed:u32 errors:u32 skipped:u32 dropped:u32
//            | 'X' msg_size:u16 msg          the file is no JUnit report
//
//   J1  Memory is bounded whatever the file: input, depth, names, messages and
//       frames have maxima; a document type declaration ends the parse, so no
//       entity can be declared.
//   J2  Every case is counted; those beyond the frames' bound are counted in
//       `dropped`. Failing ones have a bound of their own, so that they are
//       kept though thousands passed before them.
//   J3  A <testcase> without a name is no case, unless it failed. A status or a
//       child element that is not known is an error. (junit_test, F02_...)
//   J4  One that ctest could not run (status "notrun": no executable, no
//       required file) is an error, as its exit code says. (F03_...)
//   J5  A report that contradicts itself is none: a suite that counts more
//       tests, failures or errors than it lists, an outcome where none can be,
//       names with a prefix. A failure of a whole suite is a case, "(suite)".
//       (F02_...)

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/result.h"

namespace machina::kinds {

constexpr std::size_t kJunitXmlBytesMax = 64u << 20;
constexpr std::size_t kJunitReplyBytesMax = 40u << 20;
constexpr std::size_t kCaseIdBytesMax = 512;
constexpr std::size_t kCaseMessageBytesMax = 2048;

// missing: the run was to reach it, and did not; nobody knows what it would
// have come to. No report says so of a case: the run does (suite.cc).
enum class Outcome : std::uint8_t {
  passed,
  failed,
  error,
  skipped,
  flaky,
  missing
};
std::string_view name(Outcome);

// A case is known by its id and by which of those with that id it is.
struct Case {
  std::string id;  // classname::name; of ctest, which says it twice, once
  std::uint32_t nth = 1;              // in the order of the report, from 1
  Outcome outcome = Outcome::passed;  // of all of it: what is counted
  // What its body came to. With `teardown` that may be better than `outcome`:
  // then the body came to this, and the teardown failed.
  Outcome body = Outcome::passed;
  bool teardown = false;
  bool of_run = false;  // no case: an error of the run itself
  std::uint32_t duration_ms = 0;
  std::string message;
  // Where it is defined, as the run's own list of cases says (suite.h), or
  // empty.
  std::string where;
};

struct Suite {
  std::vector<Case> cases;
  std::uint32_t passed = 0, failed = 0, errors = 0, skipped = 0;
  std::uint32_t missing = 0;  // expected and not reached; listed in `cases`
  std::uint32_t dropped = 0;  // counted, not listed
  // It is known which cases the run was to reach, and it reached all of them.
  // Never set by the parser: whoever knows the runner sets it.
  bool complete = false;
};

// Cases as frames, counted, within the bounds of a reply.
class CaseFrames {
 public:
  void add(Case one);
  std::string take() &&;  // all of them, and the 'T' frame

 private:
  std::string failing_, others_;
  std::uint32_t counts_[4] = {0, 0, 0, 0};  // by Outcome: passed .. skipped
  std::uint32_t dropped_ = 0;
};
// The 'X' frame.
std::string no_report(const std::string& why);

// Parses and encodes; never fails: a bad file is an 'X' frame.
std::string encode_junit(std::string_view xml);
// Code::invalid: the file was no report (the reason follows), or the frames
// are malformed.
Result<Suite> decode_junit(std::string_view frames);

inline constexpr char kJunitHandler[] = "junit";
int junit_handler(int in_fd, int out_fd);
// A handler of such requests that answers with what `encode` makes of the text.
int report_handler(int in_fd, int out_fd,
                   std::string (*encode)(std::string_view));

// Sends `xml` to a running handler and reads its reply. The socket is closed.
Result<Suite> ask_junit(int socket_fd, std::string_view xml, int timeout_ms);

}  // namespace machina::kinds
