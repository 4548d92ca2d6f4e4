#include "queue/base/job.h"

#include <iterator>

namespace machina {
namespace {

constexpr std::string_view kStateNames[] = {"waiting", "scheduled", "ready",
                                            "running", "blocked",   "succeeded",
                                            "failed",  "cancelled", "dead"};
static_assert(std::size(kStateNames) == kStates);

constexpr std::string_view kEndCodeNames[] = {"none",
                                              "exit",
                                              "signal",
                                              "timeout",
                                              "oom",
                                              "pids",
                                              "disk",
                                              "output",
                                              "sandbox",
                                              "isolation_unavailable",
                                              "lease_expired",
                                              "worker_died",
                                              "upstream",
                                              "verdict",
                                              "invalid_payload",
                                              "cancelled",
                                              "dependency"};
static_assert(std::size(kEndCodeNames) == kEndCodes);

// <cctype> asks the locale; the contract is ASCII.
bool lower(char c) { return c >= 'a' && c <= 'z'; }
bool digit(char c) { return c >= '0' && c <= '9'; }
bool word(char c) {
  return lower(c) || digit(c) || c == '_' || (c >= 'A' && c <= 'Z');
}

}  // namespace

std::string_view name(State state) {
  return kStateNames[static_cast<int>(state)];
}

std::optional<State> parse_state(std::string_view text) {
  for (int i = 0; i < kStates; ++i) {
    if (text == kStateNames[i]) return static_cast<State>(i);
  }
  return std::nullopt;
}

std::string_view name(EndCode code) {
  return kEndCodeNames[static_cast<int>(code)];
}

std::optional<EndCode> parse_end_code(std::string_view text) {
  for (int i = 0; i < kEndCodes; ++i) {
    if (text == kEndCodeNames[i]) return static_cast<EndCode>(i);
  }
  return std::nullopt;
}

bool valid_kind(std::string_view text) {
  if (text.empty() || text.size() > kKindBytesMax || !lower(text[0])) {
    return false;
  }
  char before = 'a';
  for (char c : text) {
    if (c == '.') {
      if (before == '.') return false;
    } else if (!lower(c) && !digit(c) && c != '_') {
      return false;
    }
    before = c;
  }
  return before != '.';
}

bool valid_name(std::string_view text) {
  if (text.empty() || text.size() > 64 || !word(text[0])) return false;
  for (char c : text) {
    if (!word(c) && c != '.' && c != ':' && c != '-') return false;
  }
  return true;
}

bool valid_kind_pattern(std::string_view text) {
  if (text == "*") return true;
  if (text.ends_with(".*")) text.remove_suffix(2);
  return valid_kind(text);
}

bool kind_matches(std::string_view pattern, std::string_view kind) {
  if (pattern == "*") return true;
  if (pattern.ends_with(".*")) {
    pattern.remove_suffix(1);  // "test.*" is all that starts with "test."
    return kind.size() > pattern.size() && kind.starts_with(pattern);
  }
  return pattern == kind;
}

}  // namespace machina
