#include "server/http/http_parser.h"

#include <llhttp.h>

#include <algorithm>
#include <cstring>

#include "queue/base/check.h"

namespace machina {
namespace {

char lower(char c) { return c >= 'A' && c <= 'Z' ? char(c + 32) : c; }

std::string_view trim(std::string_view s) {
  while (!s.empty() && (s.front() == ' ' || s.front() == '\t')) {
    s.remove_prefix(1);
  }
  while (!s.empty() && (s.back() == ' ' || s.back() == '\t')) {
    s.remove_suffix(1);
  }
  return s;
}

bool is_token_char(unsigned char c) {
  static constexpr std::string_view kOther = "!#$%&'*+-.^_`|~";
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         (c >= '0' && c <= '9') || kOther.find(char(c)) != kOther.npos;
}

// Methods of RFC 9110 and 5789; of others we do not know what they would mean.
bool known_method(std::string_view method) {
  static constexpr std::string_view kKnown[] = {"GET",     "HEAD",   "POST",
                                                "PUT",     "DELETE", "CONNECT",
                                                "OPTIONS", "TRACE",  "PATCH"};
  return std::find(std::begin(kKnown), std::end(kKnown), method) !=
         std::end(kKnown);
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The request line's outer words; its target is finish_target()'s.
std::optional<HttpError> check_words(std::string_view method,
                                     std::string_view version) {
  for (unsigned char c : method) {
    if (!is_token_char(c)) {
      return HttpError{400, "bad-request", "the method is no token"};
    }
  }
  // llhttp knows protocols that are not ours.
  if (version.size() != 8 || !version.starts_with("HTTP/") ||
      !is_digit(version[5]) || version[6] != '.' || !is_digit(version[7])) {
    return HttpError{400, "bad-request",
                     "the request line's version is not HTTP's"};
  }
  if (version[5] != '1' || version[7] > '1') {
    return HttpError{
        505, "http-version",
        std::string(version) + ": only HTTP/1.0 and HTTP/1.1 are spoken"};
  }
  if (!known_method(method)) {
    return HttpError{501, "not-implemented",
                     "method " + std::string(method.substr(0, 32)) +
                         ": GET, HEAD, POST, PUT and DELETE are there"};
  }
  return std::nullopt;
}

// A name that some reader before or behind us may take for one of a header that
// frames the body: the same letters and digits, other characters between.
bool looks_like_framing(std::string_view field) {
  if (field.size() < 13) return false;
  for (std::string_view framing : {"transferencoding", "contentlength"}) {
    std::size_t at = 0;
    bool same = true;
    for (char c : field) {
      c = lower(c);
      if (!is_digit(c) && (c < 'a' || c > 'z')) continue;
      same = same && at < framing.size() && framing[at] == c;
      ++at;
    }
    if (same && at == framing.size()) return true;
  }
  return false;
}

// What the class comment promises beyond llhttp. `bytes` ends in CRLF CRLF.
std::optional<HttpError> check_lines(std::string_view bytes) {
  std::size_t lines = 0;
  while (!bytes.empty()) {
    std::size_t lf = bytes.find('\n');
    if (lf == bytes.npos || lf == 0 || bytes[lf - 1] != '\r') {
      return HttpError{400, "bad-request", "a header line ends in a bare LF"};
    }
    std::string_view line = bytes.substr(0, lf - 1);
    bytes.remove_prefix(lf + 1);
    for (unsigned char c : line) {
      if ((c < 0x20 && c != '\t') || c == 0x7f) {
        return HttpError{400, "bad-request",
                         "a header line holds a control byte"};
      }
    }
    if (lines == 0) {
      if (line.size() > kRequestLineMax) {
        return HttpError{414, "uri-too-long",
                         "the request line has " + std::to_string(line.size()) +
                             " bytes; at most " +
                             std::to_string(kRequestLineMax)};
      }
      std::size_t first = line.find(' '), last = line.rfind(' ');
      if (first == line.npos || first == last || first == 0 ||
          line.find(' ', first + 1) != last || last == first + 1 ||
          line.find('\t') != line.npos) {
        return HttpError{400, "bad-request",
                         "the request line is not METHOD TARGET VERSION"};
      }
      if (auto error =
              check_words(line.substr(0, first), line.substr(last + 1))) {
        return error;
      }
    } else if (!line.empty()) {
      if (line[0] == ' ' || line[0] == '\t') {
        return HttpError{400, "bad-request", "a header line is folded"};
      }
      std::size_t i = 0;
      while (i < line.size() &&
             is_token_char(static_cast<unsigned char>(line[i]))) {
        ++i;
      }
      if (i == 0 || i == line.size() || line[i] != ':') {
        return HttpError{400, "bad-request", "a header line has no valid name"};
      }
      std::string_view field = line.substr(0, i);
      if (looks_like_framing(field) &&
          !equals_ignoring_case(field, "content-length") &&
          !equals_ignoring_case(field, "transfer-encoding")) {
        return HttpError{400, "bad-request",
                         "header " + std::string(field.substr(0, 64)) +
                             " only looks like Content-Length or "
                             "Transfer-Encoding"};
      }
    }
    ++lines;
  }
  if (lines > kHeaderCountMax + 2) {  // the request line and the empty one
    return HttpError{
        431, "headers-too-large",
        "more than " + std::to_string(kHeaderCountMax) + " headers"};
  }
  return std::nullopt;
}

Method method_of(std::uint8_t method) {
  switch (method) {
    case HTTP_GET:
      return Method::get;
    case HTTP_POST:
      return Method::post;
    case HTTP_PUT:
      return Method::put;
    case HTTP_DELETE:
      return Method::del;
    case HTTP_HEAD:
      return Method::head;
    default:
      return Method::other;
  }
}

}  // namespace

bool equals_ignoring_case(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (lower(a[i]) != lower(b[i])) return false;
  }
  return true;
}

bool has_token(std::string_view value, std::string_view token) {
  while (!value.empty()) {
    std::size_t comma = value.find(',');
    if (equals_ignoring_case(trim(value.substr(0, comma)), token)) return true;
    if (comma == value.npos) break;
    value.remove_prefix(comma + 1);
  }
  return false;
}

std::string_view name(Method method) {
  switch (method) {
    case Method::get:
      return "GET";
    case Method::post:
      return "POST";
    case Method::put:
      return "PUT";
    case Method::del:
      return "DELETE";
    case Method::head:
      return "HEAD";
    case Method::other:
      break;
  }
  return "?";
}

// --- llhttp ----------------------------------------------------------------

// An authority as Host carries it: a name or an address, and maybe a port.
bool valid_host(std::string_view host) {
  std::size_t end;
  if (host.starts_with('[')) {
    end = host.find(']');
    if (end == host.npos || end == 1) return false;
    if (host.substr(1, end - 1).find_first_not_of("0123456789abcdefABCDEF:.") !=
        host.npos) {
      return false;
    }
    ++end;
  } else {
    end = std::min(host.find(':'), host.size());
    if (end == 0 || end > 255) return false;
    for (char c : host.substr(0, end)) {
      if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
            (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_' ||
            c == '~')) {
        return false;
      }
    }
  }
  if (end == host.size()) return true;
  std::string_view port = host.substr(end + 1);
  return host[end] == ':' && port.size() <= 5 &&
         port.find_first_not_of("0123456789") == port.npos;
}

// What may not come after a body that was framed, routed and let in without it.
bool forbidden_trailer(std::string_view field) {
  static constexpr std::string_view kForbidden[] = {
      "content-length",  "transfer-encoding", "host",   "authorization",
      "content-type",    "content-encoding",  "cookie", "connection",
      "expect",          "content-range",     "prefer", "max-forwards",
      "idempotency-key", "traceparent",       "origin", "x-request-id"};
  for (std::string_view name : kForbidden) {
    if (equals_ignoring_case(field, name)) return true;
  }
  if (looks_like_framing(field)) return true;
  return field.size() > 10 &&
         equals_ignoring_case(field.substr(0, 10), "x-machina-");
}

struct HeadParser::Impl {
  llhttp_t parser;
  llhttp_settings_t settings;

  std::string_view url, field, value;
  Head* head = nullptr;
  std::optional<HttpError> error;
  std::uint32_t seen = 0;
  bool says_close = false, says_keep_alive = false;
  std::string_view encoding;
  bool complete = false;

  static Impl& of(llhttp_t* p) { return *static_cast<Impl*>(p->data); }

  // llhttp may hand over one part in several spans; they are adjacent.
  static void extend(std::string_view* view, const char* at, std::size_t n) {
    if (view->empty()) {
      *view = std::string_view(at, n);
    } else {
      *view = std::string_view(view->data(),
                               static_cast<std::size_t>(at - view->data()) + n);
    }
  }

  void refuse(int status, const char* code, std::string detail) {
    if (!error) error = HttpError{status, code, std::move(detail)};
  }
  enum Seen : std::uint32_t {
    kHost = 1,
    kLength = 2,
    kEncoding = 4,
    kOrigin = 8,
    kExpect = 16,
    kTraceparent = 32,
    kContentType = 64,
    kRequestId = 128,
    kAuthorization = 256,
    kIdempotencyKey = 512,
    kTs = 1024,
    kNonce = 2048,
    kSignature = 4096,
    kPrefer = 8192,
  };
  void once(std::uint32_t which, const char* header) {
    if ((seen & which) != 0) {
      refuse(400, "bad-request",
             std::string("header ") + header + " is there twice");
    }
    seen |= which;
  }
  void take(std::uint32_t which, const char* header, std::string_view* into,
            std::string_view v) {
    once(which, header);
    *into = v;
  }
  void header();
  void length(std::string_view v);
  void finish();
  void finish_target();
};

void HeadParser::Impl::length(std::string_view v) {
  once(kLength, "Content-Length");
  if (v.empty() || v.size() > 18 ||
      v.find_first_not_of("0123456789") != v.npos) {
    refuse(400, "bad-request", "Content-Length is not a number");
    return;
  }
  head->has_length = true;
  for (char c : v) {
    head->length = head->length * 10 + static_cast<std::uint64_t>(c - '0');
  }
}

void HeadParser::Impl::header() {
  std::string_view v = trim(value);
  auto is = [this](std::string_view n) {
    return equals_ignoring_case(field, n);
  };
  switch (field.size()) {
    case 4:
      if (is("host")) take(kHost, "Host", &head->host, v);
      break;
    case 6:
      if (is("prefer")) take(kPrefer, "Prefer", &head->prefer, v);
      if (is("origin")) {
        take(kOrigin, "Origin", &head->origin, v);
        head->has_origin = true;
      }
      if (is("expect")) {
        once(kExpect, "Expect");
        if (equals_ignoring_case(v, "100-continue")) {
          head->expect_continue = true;
        } else {
          refuse(417, "expectation-failed",
                 "Expect: only 100-continue is understood");
        }
      }
      break;
    case 10:
      if (is("connection")) {
        says_close = says_close || has_token(v, "close");
        says_keep_alive = says_keep_alive || has_token(v, "keep-alive");
      }
      break;
    case 11:
      if (is("traceparent")) {
        take(kTraceparent, "traceparent", &head->traceparent, v);
      }
      break;
    case 12:
      if (is("content-type")) {
        take(kContentType, "Content-Type", &head->content_type, v);
      } else if (is("x-request-id")) {
        take(kRequestId, "X-Request-Id", &head->request_id, v);
      } else if (is("x-machina-ts")) {
        take(kTs, "X-Machina-Ts", &head->signature_ts, v);
      }
      break;
    case 13:
      if (is("authorization")) {
        take(kAuthorization, "Authorization", &head->authorization, v);
      }
      break;
    case 14:
      if (is("content-length")) length(v);
      break;
    case 15:
      if (is("idempotency-key")) {
        head->has_idempotency_key = true;
        take(kIdempotencyKey, "Idempotency-Key", &head->idempotency_key, v);
      } else if (is("x-machina-nonce")) {
        take(kNonce, "X-Machina-Nonce", &head->nonce, v);
      }
      break;
    case 17:
      if (is("transfer-encoding")) {
        take(kEncoding, "Transfer-Encoding", &encoding, v);
      }
      break;
    case 19:
      if (is("x-machina-signature")) {
        take(kSignature, "X-Machina-Signature", &head->signature, v);
      }
      break;
    default:
      break;
  }
}

// RFC 9112, 3.2: the origin form of whatever form the target came in.
void HeadParser::Impl::finish_target() {
  std::string_view target = url;
  for (unsigned char c : target) {
    if (c <= 0x20 || c >= 0x7f || c == '#') {
      return refuse(400, "bad-request",
                    "the target holds a byte that no URL may hold");
    }
  }
  if (!target.starts_with('/') && target != "*") {
    std::size_t colon = target.find("://");
    if (colon == target.npos ||
        !(equals_ignoring_case(target.substr(0, colon), "http") ||
          equals_ignoring_case(target.substr(0, colon), "https"))) {
      return refuse(400, "bad-request",
                    "the target is neither a path nor an http URL");
    }
    target.remove_prefix(colon + 3);
    std::size_t end = std::min(target.find_first_of("/?"), target.size());
    std::string_view authority = target.substr(0, end);
    if (!equals_ignoring_case(authority, head->host)) {
      return refuse(400, "bad-request",
                    "the target's authority is not that of header Host");
    }
    target.remove_prefix(end);
    if (target.empty()) target = "/";
    if (target.front() != '/') {
      return refuse(400, "bad-request", "the target has no path");
    }
  }
  head->target = target;
  std::size_t mark = target.find('?');
  head->path = target.substr(0, mark);
  if (mark != target.npos) head->query = target.substr(mark + 1);
}

void HeadParser::Impl::finish() {
  head->http11 = parser.http_minor == 1;
  head->method = method_of(parser.method);
  if ((seen & kEncoding) != 0) {
    if ((seen & kLength) != 0) {
      refuse(400, "bad-request",
             "Content-Length and Transfer-Encoding exclude each other");
    } else if (!head->http11) {
      refuse(400, "bad-request", "HTTP/1.0 has no Transfer-Encoding");
    } else if (!equals_ignoring_case(encoding, "chunked")) {
      refuse(501, "not-implemented", "Transfer-Encoding: only chunked");
    }
    head->chunked = true;
  }
  if (head->http11 && (seen & kHost) == 0) {
    refuse(400, "bad-request", "header Host is missing");
  }
  if ((seen & kHost) != 0 && !valid_host(head->host) &&
      (head->http11 || !head->host.empty())) {
    refuse(400, "bad-request", "header Host is no name and no address");
  }
  head->keep_alive =
      head->http11 ? !says_close : says_keep_alive && !says_close;
  finish_target();
}

HeadParser::HeadParser() : impl_(std::make_unique<Impl>()) {
  llhttp_settings_init(&impl_->settings);
  impl_->settings.on_url = [](llhttp_t* p, const char* at, std::size_t n) {
    Impl::extend(&Impl::of(p).url, at, n);
    return 0;
  };
  impl_->settings.on_header_field = [](llhttp_t* p, const char* at,
                                       std::size_t n) {
    Impl::extend(&Impl::of(p).field, at, n);
    return 0;
  };
  impl_->settings.on_header_value = [](llhttp_t* p, const char* at,
                                       std::size_t n) {
    Impl::extend(&Impl::of(p).value, at, n);
    return 0;
  };
  impl_->settings.on_header_value_complete = [](llhttp_t* p) {
    Impl& self = Impl::of(p);
    self.header();
    self.field = self.value = {};
    return 0;
  };
  impl_->settings.on_headers_complete = [](llhttp_t* p) -> int {
    Impl::of(p).complete = true;
    return HPE_PAUSED;  // bodies are ours
  };
  llhttp_init(&impl_->parser, HTTP_REQUEST, &impl_->settings);
  impl_->parser.data = impl_.get();
}

HeadParser::~HeadParser() = default;

std::size_t HeadParser::find_end(std::string_view bytes, std::size_t* scanned) {
  // An empty line ends a head; a bare LF counts here so that a malformed head
  // is refused at once and not waited for.
  std::size_t at = *scanned;
  while (true) {
    std::size_t lf = bytes.find('\n', at);
    if (lf == bytes.npos) break;
    if (lf + 1 < bytes.size() && bytes[lf + 1] == '\n') return lf + 2;
    if (lf + 2 < bytes.size() && bytes[lf + 1] == '\r' &&
        bytes[lf + 2] == '\n') {
      return lf + 3;
    }
    if (lf + 2 >= bytes.size()) {
      *scanned = lf;
      return 0;
    }
    at = lf + 1;
  }
  *scanned = bytes.size();
  return 0;
}

std::optional<HttpError> HeadParser::parse(std::string_view bytes, Head* head) {
  if (bytes.size() > kRememberedHeadMax) return parse_anew(bytes, head);
  if (bytes != text_) {
    text_.assign(bytes);
    if (auto error = parse_anew(text_, &said_)) {
      text_.clear();
      return error;
    }
  }
  *head = said_;
  return std::nullopt;
}

std::optional<HttpError> HeadParser::parse_anew(std::string_view bytes,
                                                Head* head) {
  if (bytes.size() > kHeadBytesMax + kRequestLineMax) {
    return HttpError{431, "headers-too-large",
                     "the head has " + std::to_string(bytes.size()) +
                         " bytes; at most " +
                         std::to_string(kHeadBytesMax + kRequestLineMax)};
  }
  if (auto error = check_lines(bytes)) return error;
  std::size_t line_end = bytes.find('\n');
  if (bytes.size() - line_end > kHeadBytesMax) {
    return HttpError{431, "headers-too-large",
                     "the headers have " +
                         std::to_string(bytes.size() - line_end) +
                         " bytes; at most " + std::to_string(kHeadBytesMax)};
  }
  Impl& self = *impl_;
  llhttp_reset(&self.parser);
  self.url = self.field = self.value = self.encoding = {};
  self.seen = 0;
  self.says_close = self.says_keep_alive = self.complete = false;
  self.error.reset();
  *head = Head{};
  head->method_text = bytes.substr(0, bytes.find(' '));
  self.head = head;
  llhttp_errno e = llhttp_execute(&self.parser, bytes.data(), bytes.size());
  // Ours first: it says which header was wrong.
  if (self.error) return self.error;
  if (!self.complete) {
    const char* reason = llhttp_get_error_reason(&self.parser);
    return HttpError{400, "bad-request",
                     std::string("malformed request: ") +
                         (e == HPE_OK || reason == nullptr || *reason == '\0'
                              ? "it has no end"
                              : reason)};
  }
  self.finish();
  return self.error;
}

// --- Chunked ---------------------------------------------------------------

ChunkedBody::Step ChunkedBody::bad(const char* why) {
  why_ = why;
  return Step::bad;
}

// Collects a line into line_; `data` means that it is whole, in *line.
ChunkedBody::Step ChunkedBody::read_line(std::string_view* bytes,
                                         std::string_view* line,
                                         std::size_t max) {
  while (!bytes->empty()) {
    char c = bytes->front();
    bytes->remove_prefix(1);
    if (c == '\n') {
      if (line_.empty() || line_.back() != '\r') {
        return bad("a chunk line ends in a bare LF");
      }
      line_.pop_back();
      *line = line_;
      return Step::data;
    }
    if (!line_.empty() && line_.back() == '\r') {
      return bad("a chunk line holds a bare CR");
    }
    auto u = static_cast<unsigned char>(c);
    if ((u < 0x20 && c != '\t' && c != '\r') || u == 0x7f) {
      return bad("a chunk line holds a control byte");
    }
    if (line_.size() >= max) return bad("a chunk line is too long");
    line_ += c;
  }
  return Step::more;
}

ChunkedBody::Step ChunkedBody::next(std::string_view* bytes,
                                    std::string_view* piece) {
  while (true) {
    std::string_view line;
    switch (at_) {
      case At::size: {
        Step step = read_line(bytes, &line, kChunkLineMax);
        if (step != Step::data) return step;
        std::size_t digits = 0;
        left_ = 0;
        for (; digits < line.size(); ++digits) {
          char c = lower(line[digits]);
          int v = c >= '0' && c <= '9'   ? c - '0'
                  : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                         : -1;
          if (v < 0) break;
          left_ = left_ << 4 | static_cast<std::uint64_t>(v);
        }
        if (digits == 0 || digits > 15) return bad("a chunk size is not hex");
        // RFC 9112, 7.1.1: there may be blanks before an extension.
        std::size_t after = line.find_first_not_of(" \t", digits);
        if (digits < line.size() &&
            (after == line.npos || line[after] != ';')) {
          return bad("a chunk size is not hex");
        }
        extension_bytes_ += line.size() - digits;
        if (extension_bytes_ > kChunkExtensionsMax) {
          return bad("the chunk extensions are too long");
        }
        line_.clear();
        at_ = left_ == 0 ? At::trailer : At::data;
        break;
      }
      case At::data: {
        if (bytes->empty()) return Step::more;
        std::size_t n = bytes->size() < left_ ? bytes->size()
                                              : static_cast<std::size_t>(left_);
        *piece = bytes->substr(0, n);
        bytes->remove_prefix(n);
        left_ -= n;
        if (left_ == 0) at_ = At::data_end;
        return Step::data;
      }
      case At::data_end: {
        Step step = read_line(bytes, &line, 2);
        if (step != Step::data) return step;
        if (!line.empty()) return bad("a chunk is longer than its size");
        line_.clear();
        at_ = At::size;
        break;
      }
      case At::trailer: {
        Step step = read_line(bytes, &line, kTrailerBytesMax);
        if (step != Step::data) return step;
        trailer_bytes_ += line.size() + 2;
        if (line.empty()) {
          line_.clear();
          return Step::done;
        }
        if (trailer_bytes_ > kTrailerBytesMax) return bad("trailers too long");
        std::size_t colon = 0;
        while (colon < line.size() &&
               is_token_char(static_cast<unsigned char>(line[colon]))) {
          ++colon;
        }
        if (colon == 0 || colon == line.size() || line[colon] != ':') {
          return bad("a trailer has no valid name");
        }
        if (forbidden_trailer(line.substr(0, colon))) {
          return bad("a trailer is of a kind that must come in the head");
        }
        line_.clear();  // trailers are read and dropped
        break;
      }
    }
  }
}

}  // namespace machina
