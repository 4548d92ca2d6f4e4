#include "server/http/connection.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace machina {
namespace {

// Answers each request with what it was; can keep answers back.
class Sink final : public ConnectionSink {
 public:
  BodyPlan on_head(std::uint64_t, const Head& head) override {
    if (head.path == "/stream") return {BodyPlan::stream, 1000};
    if (head.path == "/discard") return {BodyPlan::discard, max};
    return {BodyPlan::buffer, max, counted};
  }
  bool may_take() override { return requests.size() < room; }
  std::optional<HttpError> on_held(std::size_t bytes) override {
    held += bytes;
    if (held <= most) return std::nullopt;
    return HttpError{503, "busy", "no"};
  }
  void on_piece(std::uint64_t, std::string_view piece) override {
    streamed += piece;
  }
  void on_request(std::uint64_t sequence, const Head& head,
                  std::string_view body) override {
    requests.push_back(std::string(name(head.method)) + " " +
                       std::string(head.path) + "?" + std::string(head.query) +
                       " " + std::string(head.idempotency_key) + " [" +
                       std::string(body) + "]");
    if (!keep) answer(sequence);
  }
  void on_error(std::uint64_t sequence, const Head&,
                const HttpError& error) override {
    requests.push_back("error " + std::to_string(error.status));
    connection->reply(sequence) += "E" + std::to_string(error.status) + ";";
    connection->finish(sequence);
  }
  void answer(std::uint64_t sequence) {
    connection->reply(sequence) += "R" + std::to_string(sequence) + ";";
    connection->finish(sequence);
  }

  Connection* connection = nullptr;
  std::vector<std::string> requests;
  std::string streamed;
  std::uint64_t max = 100;
  std::size_t room = 1000, held = 0, most = 1000;
  bool keep = false, counted = false;
};

struct Rig {
  Sink sink;
  std::string out;
  Connection connection{sink, out, 0};
  Rig() { sink.connection = &connection; }
  void feed(std::string_view bytes, Millis now = 0) {
    connection.feed(bytes, now);
  }
};

const char kThree[] =
    "POST /a?x=1 HTTP/1.1\r\nHost: h\r\nIdempotency-Key: k\r\n"
    "Content-Length: 5\r\n\r\nhello"
    "GET /b HTTP/1.1\r\nhost:h\r\n\r\n"
    "\r\nPOST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    "3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\n";

TEST(ConnectionTest, AnySplitOfTheBytesGivesTheSameRequests) {
  const std::string text = kThree;
  Rig whole;
  whole.feed(text);
  ASSERT_EQ(whole.sink.requests.size(), 3u);
  EXPECT_EQ(whole.sink.requests[0], "POST /a?x=1 k [hello]");
  EXPECT_EQ(whole.sink.requests[1], "GET /b?  []");
  EXPECT_EQ(whole.sink.requests[2], "POST /c?  [abc0123456789]");
  EXPECT_EQ(whole.out, "R0;R1;R2;");
  for (std::size_t cut = 1; cut < text.size(); ++cut) {
    Rig rig;
    rig.feed(text.substr(0, cut));
    rig.feed(text.substr(cut));
    ASSERT_EQ(rig.sink.requests, whole.sink.requests) << "cut at " << cut;
    ASSERT_EQ(rig.out, whole.out);
  }
  Rig bytes;
  for (char c : text) bytes.feed(std::string(1, c));
  EXPECT_EQ(bytes.sink.requests, whole.sink.requests);
}

TEST(ConnectionTest, RepliesLeaveInRequestOrder) {
  Rig rig;
  rig.sink.keep = true;
  rig.feed(kThree);
  rig.sink.answer(2);
  rig.sink.answer(1);
  EXPECT_EQ(rig.out, "");
  rig.sink.answer(0);
  EXPECT_EQ(rig.out, "R0;R1;R2;");
  rig.sink.answer(1);  // a second answer is none
  EXPECT_EQ(rig.out, "R0;R1;R2;");
}

TEST(ConnectionTest, AReplyInPiecesKeepsItsPlace) {
  Rig rig;
  rig.sink.keep = true;
  rig.feed(kThree);
  rig.connection.reply(1) += "first ";
  rig.sink.answer(2);
  rig.sink.answer(0);
  EXPECT_EQ(rig.out, "R0;first ");
  rig.connection.reply(1) += "second;";
  rig.connection.finish(1);
  EXPECT_EQ(rig.out, "R0;first second;R2;");
}

TEST(ConnectionTest, PipelineIsBounded) {
  Rig rig;
  rig.sink.keep = true;
  std::string many;
  for (int i = 0; i < kPipelineMax + 10; ++i) {
    many += "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
  }
  rig.feed(many);
  EXPECT_EQ(rig.sink.requests.size(), static_cast<std::size_t>(kPipelineMax));
  EXPECT_TRUE(rig.connection.wants_pause());
  for (int i = 0; i < kPipelineMax; ++i) rig.sink.answer(std::uint64_t(i));
  rig.connection.resume(0);
  EXPECT_EQ(rig.sink.requests.size(),
            static_cast<std::size_t>(kPipelineMax) + 10);
  EXPECT_FALSE(rig.connection.wants_pause());
}

// What one reader could take for another request than the next reader does.
TEST(ConnectionTest, AmbiguousMessagesAreRefused) {
  const std::pair<const char*, int> cases[] = {
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n"
       "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
       "Content-Length: 5\r\n\r\n0\r\n\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n"
       "Content-Length: 5\r\n\r\nhello",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n"
       "Content-Length: 6\r\n\r\nhello",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5, 5\r\n\r\nhello", 400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +5\r\n\r\nhello", 400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x5\r\n\r\nhello", 400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: "
       "99999999999999999999\r\n\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
       "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 501},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, "
       "chunked\r\n\r\n0\r\n\r\n",
       501},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, "
       "identity\r\n\r\n0\r\n\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n",
       501},
      {"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
       "0\r\n\r\n",
       400},
      {"GET / HTTP/1.1\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n\tb\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\n Host: h\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400},
      {"GET / HTTP/1.1\nHost: h\n\n", 400},
      {"GET / HTTP/1.1\r\nHost: h\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: h\r\nX: a\rContent-Length: 5\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: h\r\nX: a\x01"
       "b\r\n\r\n",
       400},
      {"GET / HTTP/1.1\r\nHost: h\r\nno colon\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: h\r\n: empty\r\n\r\n", 400},
      {"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400},
      {"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505},
      {"GET / HTTP/1.2\r\nHost: h\r\n\r\n", 505},
      {"GET / HTTP/11\r\nHost: h\r\n\r\n", 400},
      {"GET /\r\nHost: h\r\n\r\n", 400},
      {"g\xffT / HTTP/1.1\r\nHost: h\r\n\r\n", 400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
       "g\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
       "3\nabc\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
       "3\r\nabcd\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
       "3 \r\nabc\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
       "0x3\r\nabc\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
       "ffffffffffffffff3\r\n",
       400},
      {"POST / HTTP/1.1\r\nHost: h\r\nExpect: teapot\r\n\r\n", 417},
  };
  for (const auto& [text, status] : cases) {
    for (bool slowly : {false, true}) {
      Rig rig;
      std::string bytes = text;
      // What follows must never be taken for a request.
      bytes += "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
      if (slowly) {
        for (char c : bytes) rig.feed(std::string(1, c));
      } else {
        rig.feed(bytes);
      }
      std::string expected = "error " + std::to_string(status);
      ASSERT_EQ(rig.sink.requests.size(), 1u) << text;
      EXPECT_EQ(rig.sink.requests[0].substr(0, 6), "error ") << text;
      EXPECT_EQ(rig.sink.requests[0], expected) << text;
      EXPECT_TRUE(rig.connection.lingering()) << text;
    }
  }
}

TEST(ConnectionTest, LimitsOfTheHead) {
  {
    Rig rig;
    rig.feed("GET /" + std::string(kRequestLineMax, 'a'));
    EXPECT_EQ(rig.sink.requests, std::vector<std::string>{"error 414"});
  }
  {
    Rig rig;
    rig.feed("GET /" + std::string(kRequestLineMax, 'a') +
             " HTTP/1.1\r\nHost: h\r\n\r\n");
    EXPECT_EQ(rig.sink.requests, std::vector<std::string>{"error 414"});
  }
  {
    Rig rig;
    rig.feed("GET / HTTP/1.1\r\nHost: h\r\nX: " +
             std::string(kHeadBytesMax, 'a') + "\r\n\r\n");
    EXPECT_EQ(rig.sink.requests, std::vector<std::string>{"error 431"});
  }
  {
    Rig rig;
    rig.feed("GET / HTTP/1.1\r\nHost: h\r\nX: ");
    for (int i = 0; i < 100 && rig.sink.requests.empty(); ++i) {
      rig.feed(std::string(1000, 'a'));
    }
    EXPECT_EQ(rig.sink.requests, std::vector<std::string>{"error 431"});
  }
  {
    Rig rig;
    std::string head = "GET / HTTP/1.1\r\nHost: h\r\n";
    for (std::size_t i = 0; i < kHeaderCountMax; ++i) head += "A: b\r\n";
    rig.feed(head + "\r\n");
    EXPECT_EQ(rig.sink.requests, std::vector<std::string>{"error 431"});
  }
  {
    Rig rig;
    std::string head = "GET / HTTP/1.1\r\nHost: h\r\n";
    for (std::size_t i = 0; i < kHeaderCountMax - 1; ++i) head += "A: b\r\n";
    rig.feed(head + "\r\n");
    EXPECT_EQ(rig.out, "R0;");
  }
}

TEST(ConnectionTest, OversizeBodyIsRefusedBeforeItIsHere) {
  Rig rig;
  rig.feed("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 101\r\n\r\n");
  EXPECT_EQ(rig.out, "E413;");
  EXPECT_TRUE(rig.connection.lingering());
  rig.feed(std::string(101, 'x') + "GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  EXPECT_EQ(rig.sink.requests.size(), 1u);

  Rig chunked;
  chunked.feed(
      "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
      "\r\n60\r\n" +
      std::string(0x60, 'x') + "\r\n5\r\n");
  EXPECT_EQ(chunked.out, "");
  chunked.feed("abcde");
  EXPECT_EQ(chunked.out, "E413;");

  Rig exact;
  exact.feed("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n" +
             std::string(100, 'x'));
  EXPECT_EQ(exact.out, "R0;");
}

TEST(ConnectionTest, ContinueIsSentOnlyToWhoWaits) {
  Rig rig;
  rig.feed(
      "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(rig.out, "HTTP/1.1 100 Continue\r\n\r\n");
  rig.out.clear();
  rig.feed("ab");
  EXPECT_EQ(rig.out, "R0;");

  Rig eager;
  eager.feed(
      "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n"
      "Expect: 100-continue\r\n\r\nab");
  EXPECT_EQ(eager.out, "R0;");

  Rig unwanted;
  unwanted.feed(
      "POST /discard HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(unwanted.out, "R0;");
  EXPECT_TRUE(unwanted.connection.lingering());

  Rig large;
  large.feed(
      "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 200\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(large.out, "E413;");
}

TEST(ConnectionTest, CloseIsHonoured) {
  Rig rig;
  rig.feed(
      "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
      "GET /again HTTP/1.1\r\nHost: h\r\n\r\n");
  EXPECT_EQ(rig.out, "R0;");
  EXPECT_TRUE(rig.connection.lingering());
  Rig old;
  old.feed("GET / HTTP/1.0\r\n\r\n");
  EXPECT_EQ(old.out, "R0;");
  EXPECT_TRUE(old.connection.lingering());
  Rig kept;
  kept.feed("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n");
  EXPECT_FALSE(kept.connection.lingering());
}

TEST(ConnectionTest, StreamsHandOverPiecesAndCanBeHeld) {
  Rig rig;
  rig.sink.max = 10;
  rig.feed("POST /stream HTTP/1.1\r\nHost: h\r\nContent-Length: 20\r\n\r\n");
  rig.feed("0123456789");
  EXPECT_EQ(rig.sink.streamed, "0123456789");
  rig.connection.hold();
  rig.feed("abcde");
  EXPECT_EQ(rig.sink.streamed, "0123456789");
  rig.connection.resume(0);
  EXPECT_EQ(rig.sink.streamed, "0123456789abcde");
  rig.feed("fghij");
  EXPECT_EQ(rig.out, "R0;");
}

TEST(ConnectionTest, DeadlinesEndTheSlow) {
  {
    Rig rig;
    rig.feed("GET / HT", 1000);
    EXPECT_EQ(rig.connection.check_deadline(1000 + kHeadMs),
              Connection::Due::nothing);
    EXPECT_EQ(rig.out, "");
    // Trickling does not help: the head's time runs from its first byte.
    rig.feed("T", 1000 + kHeadMs);
    rig.connection.check_deadline(1001 + kHeadMs);
    EXPECT_EQ(rig.out, "E408;");
    rig.connection.check_deadline(2000 + kHeadMs);
    EXPECT_EQ(rig.connection.check_deadline(2001 + kHeadMs + kLingerMs),
              Connection::Due::close);
  }
  {
    Rig rig;
    rig.feed("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\na", 0);
    rig.feed("b", kBodyPauseMs - 1);
    rig.connection.check_deadline(kBodyPauseMs);
    EXPECT_EQ(rig.out, "");
    // Trickling does not help here either.
    rig.connection.check_deadline(kBodyPauseMs + 1);
    EXPECT_EQ(rig.out, "E408;");
  }
  {
    // The body's time grows with what came of it; a pause ends it all the same.
    Rig rig;
    rig.sink.max = 1 << 20;
    rig.feed("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 900000\r\n\r\n", 0);
    std::string second(kBodyBytesPerS, 'x');
    Millis t = 0;
    for (; t < 2 * kBodyMs && t / 1000 < 26; t += 1000) {
      rig.feed(second, t);
      rig.connection.check_deadline(t);
    }
    EXPECT_EQ(rig.out, "");
    rig.connection.check_deadline(t - 1000 + kBodyPauseMs);
    EXPECT_EQ(rig.out, "");
    rig.connection.check_deadline(t - 1000 + kBodyPauseMs + 1);
    EXPECT_EQ(rig.out, "E408;");
  }
  {
    // A reader of ours that is slow costs the sender nothing.
    Rig rig;
    rig.feed("POST /stream HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\na",
             0);
    rig.connection.hold();
    rig.connection.check_deadline(10 * kBodyMs);
    rig.connection.resume(10 * kBodyMs);
    rig.connection.check_deadline(10 * kBodyMs + kBodyMs);
    EXPECT_EQ(rig.out, "");
    rig.connection.check_deadline(10 * kBodyMs + kBodyMs + 1);
    EXPECT_EQ(rig.out, "E408;");
  }
  {
    // One that never says anything has less time than one that paused.
    Rig rig;
    EXPECT_EQ(rig.connection.check_deadline(kFirstByteMs),
              Connection::Due::nothing);
    EXPECT_EQ(rig.connection.check_deadline(kFirstByteMs + 1),
              Connection::Due::close);
    Rig used;
    used.feed("GET / HTTP/1.1\r\nHost: h\r\n\r\n", 0);
    used.connection.check_deadline(1);
    EXPECT_EQ(used.connection.check_deadline(1 + kIdleMs),
              Connection::Due::nothing);
    EXPECT_EQ(used.connection.check_deadline(2 + kIdleMs),
              Connection::Due::close);
  }
  {
    Rig rig;
    rig.sink.keep = true;
    rig.feed("GET / HTTP/1.1\r\nHost: h\r\n\r\n", 0);
    // A long poll is not idle, however long; after it the time starts anew.
    EXPECT_EQ(rig.connection.check_deadline(10 * kIdleMs),
              Connection::Due::nothing);
    rig.sink.answer(0);
    rig.connection.check_deadline(10 * kIdleMs + 10);
    EXPECT_EQ(rig.connection.check_deadline(11 * kIdleMs),
              Connection::Due::nothing);
    EXPECT_EQ(rig.connection.check_deadline(11 * kIdleMs + 11),
              Connection::Due::close);
  }
}

TEST(ConnectionTest, F09_WhoEndsItsSideHearsTheAnswersToAllThatIsWhole) {
  const std::string get = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
  const std::string part =
      "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\na";
  Rig rig;
  rig.sink.keep = true;
  rig.feed(get + get + part);
  rig.connection.end();
  EXPECT_FALSE(rig.connection.over());
  rig.sink.answer(1);
  EXPECT_FALSE(rig.connection.over());
  rig.sink.answer(0);
  EXPECT_TRUE(rig.connection.over());
  EXPECT_EQ(rig.out, "R0;R1;");
  EXPECT_EQ(rig.sink.requests.size(), 2u);  // the third was never whole

  // Answered before the end was seen, and not sent yet: nothing is lost.
  Rig quick;
  quick.feed(get);
  quick.connection.end();
  EXPECT_TRUE(quick.connection.over());
  EXPECT_EQ(quick.out, "R0;");

  for (const std::string& text : {part, get.substr(0, 9), std::string()}) {
    Rig half;
    half.feed(text);
    half.connection.end();
    EXPECT_TRUE(half.connection.over()) << text;
    EXPECT_EQ(half.out, "");
  }
  Rig bad;
  bad.feed("GET / HTTP/1.1\r\nHost: a b\r\n\r\n" + get);
  bad.connection.end();
  EXPECT_TRUE(bad.connection.over());
  EXPECT_EQ(bad.out, "E400;");

  // More came than may be open at once: it goes on as they are answered.
  Rig many;
  many.sink.keep = true;
  std::string all;
  for (int i = 0; i < kPipelineMax + 30; ++i) all += get;
  many.feed(all);
  many.connection.end();
  for (std::uint64_t i = 0; i < kPipelineMax + 30; ++i) {
    EXPECT_FALSE(many.connection.over()) << i;
    many.sink.answer(i);
    many.connection.resume(0);
  }
  EXPECT_TRUE(many.connection.over());
  EXPECT_EQ(many.sink.requests.size(), kPipelineMax + 30u);
}

TEST(ConnectionTest, F08_NoRequestIsBegunWhileItsAnswerHasNoRoom) {
  const std::string get = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
  Rig rig;
  rig.sink.room = 2;
  rig.feed(get + get + get + get);
  EXPECT_EQ(rig.sink.requests.size(), 2u);
  EXPECT_TRUE(rig.connection.wants_pause());
  rig.connection.resume(0);
  EXPECT_EQ(rig.sink.requests.size(), 2u);
  rig.sink.room = 5;
  rig.connection.resume(0);
  EXPECT_EQ(rig.sink.requests.size(), 4u);
  EXPECT_FALSE(rig.connection.wants_pause());
}

TEST(ConnectionTest, F08_WhatWaitsForAnEarlierAnswerIsCounted) {
  const std::string get = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
  Rig rig;
  rig.sink.keep = true;
  rig.feed(get + get + get);
  rig.sink.answer(1);
  rig.sink.answer(2);
  EXPECT_EQ(rig.connection.kept(), 6u);
  rig.sink.answer(0);
  EXPECT_EQ(rig.out, "R0;R1;R2;");
  EXPECT_EQ(rig.connection.kept(), 0u);
}

TEST(ConnectionTest, F09_OfACountedBodyWhatCameCounts) {
  Rig rig;
  rig.sink.counted = true;
  rig.sink.most = 5;
  rig.feed("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 90\r\n\r\n");
  rig.feed("abc");
  EXPECT_TRUE(rig.sink.requests.empty());
  rig.feed("def");
  EXPECT_EQ(rig.sink.requests, std::vector<std::string>{"error 503"});
  EXPECT_TRUE(rig.connection.lingering());
}

// A head that comes again is not parsed again: what follows it, and what begins
// like it, must be read as ever.
TEST(ConnectionTest, AHeadThatComesAgainMeansTheSame) {
  const std::string get = "GET /a?q=1 HTTP/1.1\r\nHost: h\r\n\r\n";
  const std::string post =
      "POST /p HTTP/1.1\r\nHost: h\r\nIdempotency-Key: k\r\n"
      "Content-Length: 2\r\n\r\n";
  const std::string longer =
      "GET /a?q=1 HTTP/1.1\r\nHost: h\r\nPrefer: wait=1\r\n\r\n";
  const std::string big = "GET /big HTTP/1.1\r\nHost: h\r\nX: " +
                          std::string(2 * kRememberedHeadMax, 'x') + "\r\n\r\n";
  const std::string bad = "GET /a?q=1 HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n";
  const std::vector<std::string> heads = {
      get, get, post + "xy", post + "zz", get,         longer, longer,
      get, big, big,         get,         post + "GE", get};
  const std::vector<std::string> want = {
      "GET /a?q=1  []", "GET /a?q=1  []", "POST /p? k [xy]", "POST /p? k [zz]",
      "GET /a?q=1  []", "GET /a?q=1  []", "GET /a?q=1  []",  "GET /a?q=1  []",
      "GET /big?  []",  "GET /big?  []",  "GET /a?q=1  []",  "POST /p? k [GE]",
      "GET /a?q=1  []"};
  std::string text;
  for (const auto& head : heads) text += head;
  Rig whole;
  whole.feed(text);
  EXPECT_EQ(whole.sink.requests, want);
  for (std::size_t step : {1, 7, 19, 64}) {
    Rig rig;
    for (std::size_t at = 0; at < text.size(); at += step) {
      rig.feed(std::string_view(text).substr(at, step));
    }
    EXPECT_EQ(rig.sink.requests, want) << step;
  }
  Rig wrong;
  wrong.feed(get + get + bad + get);
  EXPECT_EQ(wrong.sink.requests,
            (std::vector<std::string>{want[0], want[0], "error 400"}));
}

}  // namespace
}  // namespace machina
