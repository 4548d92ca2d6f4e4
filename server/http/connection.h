// server/http/connection.h
//
// One HTTP/1.1 connection, sans I/O: bytes in, requests out; replies in, bytes
// out. Requests may be pipelined and answered in any order; replies leave in
// the order of the requests.
//
//     head ----> body ----> head ...        a request at a time
//      |          |
//      +-- malformed, too large, `close` --> lingering --> closed
//
// lingering: the last reply is out, our side ends, and what still comes is read
// and dropped (kLingerBytes, kLingerMs), so that the peer sees that reply.
//
//   N1  Replies leave in request order, each exactly once, none after `close`.
//   N2  A body over its plan's maximum is answered 413 before it is all here.
//   N3  At most kPipelineMax requests are open; then reading stops.
//   N4  A first byte must come within kFirstByteMs, a head be whole kHeadMs
//   after
//       its first byte. A body has kBodyMs and a second more for each
//       kBodyBytesPerS that came of it, and may not pause for kBodyPauseMs;
//       what we made it wait does not count. An idle connection ends after
//       kIdleMs.
//   N6  A peer that ends its sending side hears the answers to all that it sent
//       whole, also where the end came with the last byte; then over().
//   N5  Before a request line at most kEmptyLinesMax empty lines are forgiven.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/ids.h"
#include "server/http/http_parser.h"
#include "server/http/limits.h"

namespace machina {

constexpr int kPipelineMax = 64;
constexpr Millis kFirstByteMs = 15'000;
constexpr Millis kHeadMs = 5'000;
constexpr Millis kBodyMs = 15'000;
constexpr std::uint64_t kBodyBytesPerS = 32 * 1024;
constexpr Millis kBodyPauseMs = 15'000;
constexpr int kEmptyLinesMax = 4;
constexpr Millis kIdleMs = 75'000;
constexpr Millis kLingerMs = 5'000;
constexpr std::uint64_t kLingerBytes = 16u << 20;
constexpr std::size_t kRequestIdBytesMax = 64;
constexpr std::size_t kSaidPathBytesMax = 120;

// Makes the reply to a request when the shard has answered it. The owner
// (server/api) has the types; this file only keeps the pointer.
class Service;
struct Peer;
struct Pending;
struct Principal;
struct Response;
using Answerer = void(Service&, Peer&, std::uint64_t sequence, Pending&,
                      Response&);

// What the owner keeps with a request until its reply is written.
struct PendingExtra {
  virtual ~PendingExtra() = default;
};
struct Pending {
  Answerer* then = nullptr;   // what answers it, when the shard has
  bool head_sent = false;     // its reply has begun: only `close` can end it
  bool plain_errors = false;  // /enqueue's error form
  const Principal* principal = nullptr;  // who asks, where it was let in
  Millis begun_ms = 0;
  std::uint64_t begun_us = 0;
  std::uint8_t request_id_bytes = 0;
  char request_id[kRequestIdBytesMax];
  // For the line about this request: its method, and its path or the pattern
  // that it matched. Never a query, never a lease's token.
  std::string_view method, pattern;
  bool quiet = false;  // a worker's verb or a probe: many, and alike
  std::uint8_t path_bytes = 0;
  char path[kSaidPathBytesMax];
  JobId job;                   // the one it made, or nil
  std::uint64_t room = 0;      // kept for its answer
  std::uint64_t left_out = 0;  // of a job that there was no room for yet
  LimitNote limits;            // what its reply says of them
  std::unique_ptr<PendingExtra> extra;
};

struct BodyPlan {
  enum Kind : std::uint8_t {
    buffer,   // hand it over whole
    stream,   // hand over pieces as they come
    discard,  // nobody wants it; still read, so that the next request is found
  } kind = buffer;
  std::uint64_t max = 0;  // over it: 413
  bool counted = false;   // buffer: on_held() is asked for each piece
};

class ConnectionSink {
 public:
  virtual ~ConnectionSink() = default;
  virtual BodyPlan on_head(std::uint64_t sequence, const Head& head) = 0;
  virtual void on_piece(std::uint64_t sequence, std::string_view piece) = 0;
  virtual void on_request(std::uint64_t sequence, const Head& head,
                          std::string_view body) = 0;
  // Whether the next request may be begun now. False: not before resume().
  virtual bool may_take() { return true; }
  // `bytes` more of a counted body are to be kept. Nothing: they are.
  virtual std::optional<HttpError> on_held(std::size_t bytes) {
    (void)bytes;
    return std::nullopt;
  }
  // Must reply at once; the connection lingers after it. `head` is empty where
  // it could not be read.
  virtual void on_error(std::uint64_t sequence, const Head& head,
                        const HttpError& error) = 0;
};

class Connection {
 public:
  Connection(ConnectionSink& sink, std::string& out, Millis now);

  void feed(std::string_view bytes, Millis now);
  // The peer will send no more (N6).
  void end();
  // Ended so, and everything is answered: to be closed once that is sent.
  bool over() const { return over_; }
  // Goes on where kPipelineMax, may_take() or hold() stopped it. Not from
  // within a sink call.
  void resume(Millis now);
  // Stops handing over pieces until resume().
  void hold();
  bool wants_pause() const { return held_ || blocked_; }

  // A reply is written by appending to reply(sequence), then finish(). `close`
  // makes it the last. What is for a sequence that is not open goes nowhere.
  bool open(std::uint64_t sequence) const { return slot(sequence) != nullptr; }
  Pending* pending(std::uint64_t sequence);
  std::string& reply(std::uint64_t sequence);
  // Whether reply() of this one goes straight out.
  bool at_front(std::uint64_t sequence) const { return sequence == base_; }
  void finish(std::uint64_t sequence, bool close = false);
  // Whether the reply must say `Connection: close` (true) for this request.
  bool closes(std::uint64_t sequence) const;
  bool is_http11(std::uint64_t sequence) const;
  bool is_head(std::uint64_t sequence) const;  // its reply has no body
  // Its answer may be large: large_open() counts those that are not finished.
  void mark_large(std::uint64_t sequence);
  int large_open() const { return large_open_; }
  // Bytes of finished replies that wait for an earlier one.
  std::size_t kept() const { return kept_; }

  bool lingering() const { return state_ == State::lingering; }
  bool idle() const { return base_ == next_ && state_ == State::head; }
  std::uint64_t first_open() const { return base_; }
  std::uint64_t next() const { return next_; }

  enum class Due { nothing, close };
  // At least every second: what a deadline (N4) asks for. May reply 408.
  Due check_deadline(Millis now);

 private:
  enum class State : std::uint8_t { head, body, stopped, lingering };
  struct Slot {
    bool done = false, close = false, http11 = true, closes = false,
         head = false, large = false;
    std::string bytes;
    Pending pending;
  };

  const Slot* slot(std::uint64_t sequence) const;
  Slot* slot(std::uint64_t sequence) {
    return const_cast<Slot*>(std::as_const(*this).slot(sequence));
  }
  std::size_t process(std::string_view bytes);
  bool take_head(std::string_view* bytes);
  bool take_body(std::string_view* bytes);
  bool body_piece(std::string_view piece);
  void request_complete(std::string_view body);
  void refuse(const HttpError& error);
  void begin_slot();
  void settle_end();
  void keep_head();
  void advance();
  void linger();

  ConnectionSink& sink_;
  std::string& out_;
  std::string nowhere_;  // where bytes go that nobody waits for
  HeadParser parser_;
  std::string in_;  // what was read and not yet used
  std::size_t scanned_ = 0;
  std::string head_text_;  // of the request whose body is still coming
  Head head_;
  bool head_kept_ = false;
  BodyPlan plan_;
  ChunkedBody chunked_;
  std::uint64_t body_left_ = 0, body_seen_ = 0;
  std::string body_;
  std::vector<Slot> slots_;  // of base_ - sent_ ... next_ - 1
  std::uint64_t base_ = 0;   // the first one not wholly answered
  std::uint64_t next_ = 0;
  std::size_t sent_ = 0;  // slots at the front that are done with
  State state_ = State::head;
  bool held_ = false, blocked_ = false;
  bool ended_ = false, over_ = false;  // N6
  bool processing_ = false;
  int large_open_ = 0;
  std::size_t kept_ = 0;
  Millis now_ = 0;
  Millis since_ = 0;       // what N4 counts from; < 0: from the next check on
  Millis body_since_ = 0;  // when the body began, less what we held it up
  Millis held_since_ = -1;
  bool head_begun_ = false;
  bool fresh_ = true;  // no byte came yet
  int empty_lines_ = 0;
  std::uint64_t lingered_ = 0;
};

}  // namespace machina
