#include "server/http/connection.h"

#include <algorithm>
#include <utility>

namespace machina {
namespace {

// A buffer that grew past this is given back when it is done with.
constexpr std::size_t kKeepBytes = 64 * 1024;

void give_back(std::string* s) {
  if (s->capacity() > kKeepBytes) {
    std::string().swap(*s);
  } else {
    s->clear();
  }
}

HttpError too_large(std::uint64_t max) {
  return HttpError{413, "too-large",
                   "body: more than " + std::to_string(max) +
                       " bytes, the most that is taken here"};
}

}  // namespace

Connection::Connection(ConnectionSink& sink, std::string& out, Millis now)
    : sink_(sink), out_(out), now_(now), since_(now) {}

// --- Replies ---------------------------------------------------------------

const Connection::Slot* Connection::slot(std::uint64_t sequence) const {
  if (sequence < base_ || sequence >= next_) return nullptr;
  return &slots_[sent_ + static_cast<std::size_t>(sequence - base_)];
}

Pending* Connection::pending(std::uint64_t sequence) {
  Slot* s = slot(sequence);
  return s == nullptr || s->done ? nullptr : &s->pending;
}

std::string& Connection::reply(std::uint64_t sequence) {
  Slot* s = slot(sequence);
  if (s == nullptr || s->done) {
    nowhere_.clear();
    return nowhere_;
  }
  return sequence == base_ ? out_ : s->bytes;
}

bool Connection::closes(std::uint64_t sequence) const {
  const Slot* s = slot(sequence);
  return s != nullptr && s->closes;
}

bool Connection::is_http11(std::uint64_t sequence) const {
  const Slot* s = slot(sequence);
  return s == nullptr || s->http11;
}

bool Connection::is_head(std::uint64_t sequence) const {
  const Slot* s = slot(sequence);
  return s != nullptr && s->head;
}

void Connection::mark_large(std::uint64_t sequence) {
  Slot* s = slot(sequence);
  if (s == nullptr || s->done || s->large) return;
  s->large = true;
  ++large_open_;
}

void Connection::finish(std::uint64_t sequence, bool close) {
  Slot* s = slot(sequence);
  if (s == nullptr || s->done) return;
  s->done = true;
  if (s->large) --large_open_;
  kept_ += s->bytes.size();
  s->close = close || s->closes;
  s->pending.extra.reset();
  advance();
}

// Sends what is now at the front.
void Connection::advance() {
  while (base_ < next_ && state_ != State::lingering) {
    Slot& front = slots_[sent_];
    if (!front.done) break;
    bool close = front.close;
    ++base_;
    ++sent_;
    if (base_ < next_ && !close) {
      // The next one's bytes, if it has any, may leave now; more of them may
      // follow by way of reply().
      Slot& after = slots_[sent_];
      out_ += after.bytes;
      if (after.done) kept_ -= after.bytes.size();
      std::string().swap(after.bytes);
    }
    if (close) linger();
  }
  if (base_ == next_) {
    slots_.clear();
    sent_ = 0;
    since_ = -1;
    if (ended_ && !processing_) settle_end();
  } else if (sent_ >= kPipelineMax) {
    slots_.erase(slots_.begin(),
                 slots_.begin() + static_cast<std::ptrdiff_t>(sent_));
    sent_ = 0;
  }
}

void Connection::linger() {
  state_ = State::lingering;
  since_ = -1;
  lingered_ = 0;
  large_open_ = 0;
  kept_ = 0;
  base_ = next_;  // later requests are never answered (N1)
  over_ = ended_;
}

void Connection::begin_slot() {
  slots_.emplace_back();
  ++next_;
}

void Connection::refuse(const HttpError& error) {
  Slot& s = slots_.back();
  s.closes = true;
  state_ = State::stopped;
  sink_.on_error(next_ - 1, head_, error);
}

// --- Requests --------------------------------------------------------------

void Connection::feed(std::string_view bytes, Millis now) {
  now_ = now;
  if (state_ == State::lingering || state_ == State::stopped) {
    lingered_ += bytes.size();
    return;
  }
  if (state_ == State::body) since_ = now;
  if (fresh_) {
    fresh_ = false;
    since_ = now;
  }
  if (in_.empty()) {
    std::size_t used = process(bytes);
    if (state_ == State::head || state_ == State::body) {
      in_.assign(bytes.substr(used));
    }
  } else {
    in_.append(bytes);
    std::size_t used = process(in_);
    in_.erase(0, used);
    if (in_.empty()) give_back(&in_);
  }
}

void Connection::hold() {
  held_ = true;
  if (held_since_ < 0) held_since_ = now_;
}

void Connection::resume(Millis now) {
  now_ = now;
  held_ = false;
  if (held_since_ >= 0) {
    body_since_ += now - held_since_;
    since_ = now;
    held_since_ = -1;
  }
  if (next_ - base_ < kPipelineMax) blocked_ = false;
  if (wants_pause()) return;
  if (!in_.empty() && (state_ == State::head || state_ == State::body)) {
    std::string bytes;
    bytes.swap(in_);
    std::size_t used = process(bytes);
    if (state_ == State::head || state_ == State::body) {
      in_.assign(bytes, used, bytes.npos);
    }
  }
  if (ended_) settle_end();
}

void Connection::end() {
  ended_ = true;
  settle_end();
}

// What is here whole is carried out and answered; what is not whole never will
// be.
void Connection::settle_end() {
  if (wants_pause() && state_ != State::lingering) return;  // resume() goes on
  if (state_ == State::body) {
    // Its slot is the last one.
    Slot& partial = slots_.back();
    partial.done = true;
    if (partial.large) --large_open_;
    slots_.pop_back();
    --next_;
    if (base_ == next_) {
      slots_.clear();
      sent_ = 0;
    }
  }
  if (state_ == State::head || state_ == State::body) {
    state_ = State::stopped;
    std::string().swap(in_);
    std::string().swap(body_);
    if (base_ < next_) slots_.back().closes = true;
  }
  over_ = base_ == next_;
}

std::size_t Connection::process(std::string_view bytes) {
  std::string_view left = bytes;
  processing_ = true;
  while (true) {
    if (held_ || blocked_) break;
    if (state_ == State::head) {
      if (!take_head(&left)) break;
    } else if (state_ == State::body) {
      if (!take_body(&left)) break;
    } else {
      lingered_ += left.size();
      left = {};
      break;
    }
  }
  processing_ = false;
  // What stays behind must not point into `bytes`.
  if (state_ == State::body) keep_head();
  return bytes.size() - left.size();
}

void Connection::keep_head() {
  if (head_kept_) return;
  head_kept_ = true;
  Head again;
  // It was parsed once; the copy parses the same.
  parser_.parse(head_text_, &again);
  head_ = again;
}

bool Connection::take_head(std::string_view* bytes) {
  if (next_ - base_ >= kPipelineMax ||
      (!bytes->empty() && !head_begun_ && !sink_.may_take())) {
    blocked_ = true;
    return false;
  }
  if (!head_begun_) {
    // Empty lines before a request line are forgiven (RFC 9112, 2.2).
    while (bytes->size() >= 2 && (*bytes)[0] == '\r' && (*bytes)[1] == '\n') {
      bytes->remove_prefix(2);
      if (++empty_lines_ > kEmptyLinesMax) {
        begin_slot();
        head_ = Head{};
        refuse(HttpError{400, "bad-request",
                         "more than " + std::to_string(kEmptyLinesMax) +
                             " empty lines before a request"});
        *bytes = {};
        return false;
      }
    }
    if (bytes->empty() || *bytes == "\r") return false;
    empty_lines_ = 0;
    head_begun_ = true;
    since_ = now_;
    scanned_ = 0;
  }
  std::size_t size = parser_.remembered(*bytes);
  if (size == 0) size = HeadParser::find_end(*bytes, &scanned_);
  if (size == 0) {
    bool line_open = bytes->find('\n') == bytes->npos;
    std::size_t max =
        line_open ? kRequestLineMax : kRequestLineMax + kHeadBytesMax;
    if (bytes->size() <= max) return false;
    head_begun_ = false;
    begin_slot();
    head_ = Head{};
    refuse(line_open ? HttpError{414, "uri-too-long",
                                 "the request line has more than " +
                                     std::to_string(kRequestLineMax) + " bytes"}
                     : HttpError{431, "headers-too-large",
                                 "the headers have more than " +
                                     std::to_string(kHeadBytesMax) + " bytes"});
    *bytes = {};
    return false;
  }
  std::string_view text = bytes->substr(0, size);
  head_begun_ = false;
  begin_slot();
  if (auto error = parser_.parse(text, &head_)) {
    head_ = Head{};
    refuse(*error);
    *bytes = {};
    return false;
  }
  bytes->remove_prefix(size);
  Slot& s = slots_.back();
  s.http11 = head_.http11;
  s.head = head_.method == Method::head;
  s.closes = !head_.keep_alive;
  std::uint64_t sequence = next_ - 1;
  plan_ = sink_.on_head(sequence, head_);
  if (head_.has_length && head_.length > plan_.max) {
    refuse(too_large(plan_.max));
    lingered_ += bytes->size();
    *bytes = {};
    return false;
  }
  bool has_body = head_.chunked || head_.length > 0;
  if (has_body && head_.expect_continue && head_.http11) {
    if (plan_.kind == BodyPlan::discard) {
      // The final answer takes the place of the body.
      slots_.back().closes = true;
      state_ = State::stopped;
      sink_.on_request(sequence, head_, {});
      return true;
    }
    if (bytes->empty()) reply(sequence) += "HTTP/1.1 100 Continue\r\n\r\n";
  }
  body_left_ = head_.length;
  body_seen_ = 0;
  body_.clear();
  if (!head_.chunked && plan_.kind == BodyPlan::buffer &&
      bytes->size() >= head_.length) {
    std::string_view body = bytes->substr(0, head_.length);
    bytes->remove_prefix(head_.length);
    request_complete(body);
    return true;
  }
  chunked_ = ChunkedBody();
  head_text_.assign(text);
  head_kept_ = false;
  since_ = body_since_ = now_;
  held_since_ = -1;
  state_ = State::body;
  return true;
}

bool Connection::body_piece(std::string_view piece) {
  body_seen_ += piece.size();
  if (body_seen_ > plan_.max) {
    keep_head();
    refuse(too_large(plan_.max));
    return false;
  }
  if (plan_.kind == BodyPlan::buffer) {
    if (plan_.counted) {
      if (auto error = sink_.on_held(piece.size())) {
        keep_head();
        refuse(*error);
        return false;
      }
    }
    body_ += piece;
  } else if (plan_.kind == BodyPlan::stream && !piece.empty()) {
    sink_.on_piece(next_ - 1, piece);
  }
  return true;
}

// False: more bytes are needed, or none are wanted.
bool Connection::take_body(std::string_view* bytes) {
  if (!head_.chunked) {
    std::size_t n = static_cast<std::size_t>(
        std::min<std::uint64_t>(bytes->size(), body_left_));
    body_left_ -= n;
    std::string_view piece = bytes->substr(0, n);
    bytes->remove_prefix(n);
    if (!body_piece(piece)) return false;
    if (body_left_ > 0) return false;
  } else {
    std::string_view piece;
    ChunkedBody::Step step = chunked_.next(bytes, &piece);
    if (step == ChunkedBody::Step::more) return false;
    if (step == ChunkedBody::Step::bad) {
      keep_head();
      refuse(HttpError{400, "bad-request",
                       std::string("chunked body: ") + chunked_.why()});
      *bytes = {};
      return false;
    }
    if (step == ChunkedBody::Step::data) return body_piece(piece);
  }
  keep_head();
  state_ = State::head;
  request_complete(body_);
  give_back(&body_);
  return true;
}

void Connection::request_complete(std::string_view body) {
  std::uint64_t sequence = next_ - 1;
  bool closes = slots_.back().closes;
  since_ = now_;
  sink_.on_request(sequence, head_, body);
  if (state_ == State::lingering) return;
  if (closes) state_ = State::stopped;
}

// --- Time ------------------------------------------------------------------

Connection::Due Connection::check_deadline(Millis now) {
  now_ = now;
  if (since_ < 0) since_ = now;
  Millis waited = now - since_;
  switch (state_) {
    case State::lingering:
      return waited > kLingerMs || lingered_ > kLingerBytes ? Due::close
                                                            : Due::nothing;
    case State::stopped:
      return Due::nothing;  // a reply is owed, and its maker has a deadline
    case State::body:
      if (!wants_pause() && waited > kBodyPauseMs) {
        refuse(HttpError{408, "request-timeout",
                         "the body paused for more than " +
                             std::to_string(kBodyPauseMs) + " ms"});
      } else if (!wants_pause() &&
                 now - body_since_ >
                     kBodyMs + static_cast<Millis>(body_seen_ * 1000 /
                                                   kBodyBytesPerS)) {
        refuse(HttpError{408, "request-timeout",
                         "the body came slower than " +
                             std::to_string(kBodyBytesPerS) +
                             " bytes a second after its first " +
                             std::to_string(kBodyMs) + " ms"});
      }
      return Due::nothing;
    case State::head:
      if (head_begun_ && waited > kHeadMs) {
        head_begun_ = false;
        begin_slot();
        head_ = Head{};
        refuse(HttpError{
            408, "request-timeout",
            "the headers took more than " + std::to_string(kHeadMs) + " ms"});
        return Due::nothing;
      }
      if (!head_begun_ && base_ == next_ &&
          waited > (fresh_ ? kFirstByteMs : kIdleMs)) {
        return Due::close;
      }
      return Due::nothing;
  }
  return Due::nothing;
}

}  // namespace machina
