#include "server/http_parser.h"

#include <llhttp.h>

#include <cstring>

#include "queue/check.h"

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

struct HeadParser::Impl {
  llhttp_t parser;
  llhttp_settings_t settings;

  std::string_view url, field, value;
  Head* head = nullptr;
  std::optional<HttpError> error;
  bool saw_host = false, saw_length = false, saw_encoding = false;
  std::string_view encoding, connection;
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
  void once(bool* seen, const char* header) {
    if (*seen) {
      refuse(400, "bad-request",
             std::string("header ") + header + " is there twice");
    }
    *seen = true;
  }
  void header();
  void finish();
};

void HeadParser::Impl::header() {
  std::string_view v = trim(value);
  auto is = [this](std::string_view n) {
    return equals_ignoring_case(field, n);
  };
  switch (field.size()) {
    case 4:
      if (is("host")) {
        once(&saw_host, "Host");
        head->host = v;
      }
      break;
    case 6:
      if (is("prefer")) head->prefer = v;
      if (is("origin")) head->origin = v;
      if (is("expect")) {
        if (equals_ignoring_case(v, "100-continue")) {
          head->expect_continue = true;
        } else {
          refuse(417, "expectation-failed",
                 "Expect: only 100-continue is understood");
        }
      }
      break;
    case 10:
      if (is("connection")) connection = v;
      break;
    case 11:
      if (is("traceparent")) head->traceparent = v;
      break;
    case 12:
      if (is("content-type")) head->content_type = v;
      if (is("x-request-id")) head->request_id = v;
      break;
    case 13:
      if (is("authorization")) head->authorization = v;
      break;
    case 14:
      if (is("content-length")) {
        once(&saw_length, "Content-Length");
        if (v.empty() || v.size() > 18 ||
            v.find_first_not_of("0123456789") != v.npos) {
          refuse(400, "bad-request", "Content-Length is not a number");
          break;
        }
        head->has_length = true;
        for (char c : v) head->length = head->length * 10 + (c - '0');
      }
      break;
    case 15:
      if (is("idempotency-key")) head->idempotency_key = v;
      break;
    case 17:
      if (is("transfer-encoding")) {
        once(&saw_encoding, "Transfer-Encoding");
        encoding = v;
      }
      break;
    default:
      break;
  }
}

void HeadParser::Impl::finish() {
  head->http11 = parser.http_minor == 1;
  head->method = method_of(parser.method);
  if (parser.http_major != 1) {
    refuse(505, "http-version", "only HTTP/1.0 and HTTP/1.1 are spoken");
  }
  if (saw_encoding) {
    if (saw_length) {
      refuse(400, "bad-request",
             "Content-Length and Transfer-Encoding exclude each other");
    } else if (!head->http11) {
      refuse(400, "bad-request", "HTTP/1.0 has no Transfer-Encoding");
    } else if (!equals_ignoring_case(encoding, "chunked")) {
      refuse(501, "not-implemented", "Transfer-Encoding: only chunked");
    }
    head->chunked = true;
  }
  if (head->http11 && !saw_host) {
    refuse(400, "bad-request", "header Host is missing");
  }
  head->keep_alive = head->http11 ? !has_token(connection, "close")
                                  : has_token(connection, "keep-alive");
  head->target = url;
  std::size_t mark = url.find('?');
  head->path = url.substr(0, mark);
  if (mark != url.npos) head->query = url.substr(mark + 1);
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
  self.url = self.field = self.value = self.encoding = self.connection = {};
  self.saw_host = self.saw_length = self.saw_encoding = self.complete = false;
  self.error.reset();
  *head = Head{};
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
        if (digits < line.size() && line[digits] != ';') {
          return bad("a chunk size is not hex");
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
        line_.clear();  // trailers are read and dropped
        break;
      }
    }
  }
}

}  // namespace machina
