// server/http/http_parser.h
//
// The head of an HTTP/1.1 request: from bytes to names, strictly. llhttp finds
// the parts (http_parser.cc is its only includer; every leniency off); a scan
// of ours goes first and refuses what llhttp 8.1 lets pass: lines that end in a
// bare LF or CR, control bytes, folded lines, a space before the colon. What
// two readers could take for two different requests is refused:
//
//   P1  Content-Length with Transfer-Encoding, either of them twice, Host
//   twice,
//       malformed, or missing on 1.1: 400. Transfer-Encoding but `chunked`:
//       501. So is each header twice that we take one value of.
//   P2  A head is at most kHeadBytesMax and kHeaderCountMax headers (431), its
//       first line at most kRequestLineMax (414).
//       A name that only looks like one of the two that frame: 400.
//   P3  Chunked bodies: hex sizes, CRLF only, a line at most kChunkLineMax, all
//       extensions at most kChunkExtensionsMax; a trailer that would change how
//       a request is read is refused, others are dropped.
//   P4  A target is a path, or an absolute one whose authority is Host's.
//
// Views in a Head point into the bytes that were parsed.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace machina {

constexpr std::size_t kRequestLineMax = 8 * 1024;
constexpr std::size_t kHeadBytesMax = 16 * 1024;
constexpr std::size_t kHeaderCountMax = 100;
constexpr std::size_t kChunkLineMax = 256;
constexpr std::size_t kChunkExtensionsMax = 4 * 1024;
constexpr std::size_t kTrailerBytesMax = 4 * 1024;

enum class Method : std::uint8_t { get, post, put, del, head, other };
std::string_view name(Method);

struct Head {
  Method method = Method::other;
  std::string_view method_text;          // as it was sent
  std::string_view target, path, query;  // the target in origin form
  bool http11 = true;
  bool keep_alive = true;
  bool chunked = false;
  bool has_length = false;
  std::uint64_t length = 0;
  bool expect_continue = false;
  bool has_origin = false;           // also an empty one
  bool has_idempotency_key = false;  // the same
  std::string_view host, origin, authorization, content_type, prefer,
      idempotency_key, request_id, traceparent, signature_ts, nonce, signature;
};

inline constexpr std::string_view Head::*kHeadViews[] = {
    &Head::method_text,     &Head::target,       &Head::path,
    &Head::query,           &Head::host,         &Head::origin,
    &Head::authorization,   &Head::content_type, &Head::prefer,
    &Head::idempotency_key, &Head::request_id,   &Head::traceparent,
    &Head::signature_ts,    &Head::nonce,        &Head::signature};

// Why bytes are no request; answered and then the connection ends.
struct HttpError {
  int status = 400;
  const char* code = "bad-request";
  std::string detail;
};

// Most heads of a connection are the one before again, byte for byte: that one
// is remembered, with what it says.
constexpr std::size_t kRememberedHeadMax = 1024;

class HeadParser {
 public:
  HeadParser();
  ~HeadParser();
  HeadParser(const HeadParser&) = delete;

  // The size of the head at the start of `bytes`, its empty line included; 0:
  // not all there yet. `scanned` carries the search across calls; start at 0.
  static std::size_t find_end(std::string_view bytes, std::size_t* scanned);

  // The same where `bytes` begin with the remembered head, else 0.
  std::size_t remembered(std::string_view bytes) const {
    return bytes.starts_with(text_) ? text_.size() : 0;
  }

  // `bytes` is exactly one head. Nothing: `head` is filled in, with views into
  // `bytes` or into what is remembered until the next call.
  std::optional<HttpError> parse(std::string_view bytes, Head* head);

 private:
  struct Impl;
  std::optional<HttpError> parse_anew(std::string_view bytes, Head* head);

  std::unique_ptr<Impl> impl_;
  std::string text_;  // remembered: empty, or a head without error
  Head said_;         // what it says; views into text_
};

// Takes a chunked body apart.
class ChunkedBody {
 public:
  enum class Step { more, data, done, bad };
  // Consumes from `bytes`. `data`: `piece` is a part of the body; call again.
  Step next(std::string_view* bytes, std::string_view* piece);
  const char* why() const { return why_; }

 private:
  enum class At { size, data, data_end, trailer } at_ = At::size;
  Step bad(const char* why);
  Step read_line(std::string_view* bytes, std::string_view* line,
                 std::size_t max);

  std::string line_;
  std::uint64_t left_ = 0;
  std::size_t trailer_bytes_ = 0, extension_bytes_ = 0;
  const char* why_ = "";
};

// True where a comma-separated header value has `token` (any case).
bool has_token(std::string_view value, std::string_view token);
bool equals_ignoring_case(std::string_view a, std::string_view b);

}  // namespace machina
