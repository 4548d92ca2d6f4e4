// What two readers could take for different requests (RFC 9112): each is
// refused by the real server, over a raw socket, with one answer; then the
// connection ends, and what came behind is never carried out.

#include "server/http/http_parser.h"
#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

class Smuggling : public ServerTest {
 protected:
  // Sends `text`, then a request that must not be seen.
  void refused(const std::string& text, int status) {
    Client c = tcp();
    c.send(text);
    c.send(
        "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
        "Content-Length: 19\r\n\r\n{\"kind\":\"smuggled\"}");
    Reply r = c.reply();
    EXPECT_EQ(r.status, status) << text << "\n" << r.body;
    EXPECT_EQ(r.headers["connection"], "close") << text;
    EXPECT_EQ(r.headers["content-type"], "application/problem+json") << text;
    EXPECT_NE(r.body.find("\"detail\""), r.body.npos) << text;
    c.end();
    EXPECT_TRUE(c.at_end()) << text;
    EXPECT_EQ(c.reply(100).status, 0) << text << ": a second answer";
  }
  void nothing_was_smuggled() {
    Client c = tcp();
    EXPECT_EQ(c.get("/v1/jobs").json()["jobs"].size(), 0u);
  }
};

const std::string kGet = "GET /health HTTP/1.1\r\nHost: localhost\r\n";
const std::string kPost = "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n";
const std::string kChunked = kPost + "Transfer-Encoding: chunked\r\n\r\n";

TEST_F(Smuggling, Lengths) {
  start();
  for (const char* headers :
       {"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "Content-Length: 4\r\nContent-Length: 30\r\n",
        "Content-Length: 4\r\ncontent-length: 4\r\n",
        "Content-Length: 4, 4\r\n", "Content-Length: 4,\r\n",
        "Content-Length: +4\r\n", "Content-Length: -4\r\n",
        "Content-Length: 0x4\r\n", "Content-Length: 4 4\r\n",
        "Content-Length: 4a\r\n", "Content-Length: \r\n",
        "Content-Length: 4.0\r\n", "Content-Length: \"4\"\r\n",
        "Content-Length: 18446744073709551620\r\n",
        "Content-Length: 9999999999999999999\r\n",
        "Content-Length: \x0b"
        "4\r\n"}) {
    refused(kPost + headers + "\r\n0\r\n\r\n", 400);
  }
  nothing_was_smuggled();
}

TEST_F(Smuggling, TransferEncodings) {
  start();
  const std::pair<const char*, int> cases[] = {
      {"Transfer-Encoding: gzip\r\n", 501},
      {"Transfer-Encoding: gzip, chunked\r\n", 501},
      {"Transfer-Encoding: xchunked\r\n", 501},
      {"Transfer-Encoding: chunked, identity\r\n", 400},
      {"Transfer-Encoding: chunked, chunked\r\n", 400},
      {"Transfer-Encoding: chunked;q=1\r\n", 501},
      {"Transfer-Encoding: \"chunked\"\r\n", 501},
      {"Transfer-Encoding: identity\r\n", 501},
      {"Transfer-Encoding: \r\n", 501},
      {"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400},
      {"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", 400},
      {"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", 400},
      {"Transfer-Encoding : chunked\r\n", 400},
      {" Transfer-Encoding: chunked\r\n", 400},
      {"Transfer-Encoding: \x0b"
       "chunked\r\n",
       400},
      {"Transfer-Encoding:\r\n chunked\r\n", 400},
      {"X: y\r\n\tTransfer-Encoding: chunked\r\n", 400},
      {"Transfer-Encoding: chunked\rX: y\r\n", 400},
  };
  for (const auto& [headers, status] : cases) {
    refused(kPost + headers + "\r\n0\r\n\r\n", status);
  }
  refused(
      "POST /v1/jobs HTTP/1.0\r\nHost: localhost\r\n"
      "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
      400);
  nothing_was_smuggled();
  // In another case, and with white space around it, it is the same word.
  Client c = tcp();
  c.send(kPost +
         "Transfer-Encoding: \tChunked \r\n\r\nC\r\n{\"kind\":\"a\"}\r\n"
         "0\r\n\r\n");
  EXPECT_EQ(c.reply().status, 201);
}

TEST_F(Smuggling, Chunks) {
  start();
  std::string ext(kChunkLineMax, 'x');
  std::string many;
  for (std::size_t n = 0; n <= kChunkExtensionsMax; n += 200) {
    many += "1;" + std::string(200, 'x') + "\r\n \r\n";
  }
  for (const std::string& body :
       {std::string("g\r\n"),
        std::string("\r\n"),
        std::string("-1\r\n"),
        std::string("0x1\r\n"),
        std::string("+1\r\n"),
        std::string(" 1\r\n"),
        std::string("1 \r\n"),
        std::string("1\nX\r\n"),
        std::string("1\rX\r\n"),
        std::string("1\r\nXY\r\n"),
        std::string("1\r\nX\n0\r\n\r\n"),
        std::string("fffffffffffffffff\r\n"),
        std::string("10000000000000001\r\n"),
        "1;" + ext + "\r\n",
        many,
        std::string("1;a\x01=b\r\nX\r\n"),
        std::string("1;a\rb\r\nX\r\n"),
        std::string("1;a=\"\nb\"\r\nX\r\n"),
        std::string("0\r\nContent-Length: 4\r\n\r\n"),
        std::string("0\r\nTransfer-Encoding: chunked\r\n\r\n"),
        std::string("0\r\nHost: evil\r\n\r\n"),
        std::string("0\r\nAuthorization: Bearer x\r\n\r\n"),
        std::string("0\r\nX-Machina-Signature: v1=0\r\n\r\n"),
        std::string("0\r\nX : y\r\n\r\n"),
        std::string("0\r\n folded\r\n\r\n"),
        std::string("0\r\nX: y\nZ: w\r\n\r\n"),
        std::string("0\r\nno\r\n\r\n"),
        "0\r\nX: " + std::string(kTrailerBytesMax, 'x') + "\r\n\r\n"}) {
    refused(kChunked + body, 400);
  }
  refused(kChunked + "fffffff\r\n" + std::string(3u << 20, 'x'), 413);
  nothing_was_smuggled();
  // Short extensions and plain trailers are read and dropped.
  Client c = tcp();
  c.send(kChunked + "C;a=\"b\"\r\n{\"kind\":\"a\"}\r\n0;z\r\nX: y\r\n\r\n");
  EXPECT_EQ(c.reply().status, 201);
  EXPECT_EQ(c.get("/health").status, 200);
}

TEST_F(Smuggling, Hosts) {
  start();
  const std::string get = "GET /health HTTP/1.1\r\n";
  for (const char* headers : {"",
                              "Host: a\r\nHost: a\r\n",
                              "Host: a\r\nhost: b\r\n",
                              "Host: \r\n",
                              "Host: a b\r\n",
                              "Host: a,b\r\n",
                              "Host: a/b\r\n",
                              "Host: a@b\r\n",
                              "Host: a?b\r\n",
                              "Host: http://a\r\n",
                              "Host: a:b\r\n",
                              "Host: a:123456\r\n",
                              "Host: :80\r\n",
                              "Host: [::1\r\n",
                              "Host: [g]\r\n",
                              "Host: []\r\n",
                              "Host: [::1]80\r\n",
                              "Host: a\\b\r\n",
                              "Host: a\xff\r\n",
                              "Host: a%2fb\r\n"}) {
    refused(get + headers + "\r\n", 400);
  }
  for (const char* host :
       {"localhost", "localhost:8080", "127.0.0.1:1", "[::1]", "[::1]:80",
        "my_host.internal", "a:", "LOCALHOST"}) {
    Client c = tcp();
    c.send(get + "Host: " + host + "\r\n\r\n");
    EXPECT_EQ(c.reply().status, 200) << host;
  }
}

TEST_F(Smuggling, Targets) {
  start();
  const std::string end = " HTTP/1.1\r\nHost: localhost:80\r\n\r\n";
  for (const char* target :
       {"http://evil.test/health", "http://localhost/health",
        "http://localhost:80@evil.test/health", "http://u@localhost:80/health",
        "http:///health", "http://localhost:80?x", "ftp://localhost:80/health",
        "health", "localhost:80", "/health#x", "//", "?x", "http:/health"}) {
    bool path = std::string(target) == "//";
    if (path) continue;  // a path, if an odd one: 404
    refused("GET " + std::string(target) + end, 400);
  }
  for (const char* target :
       {"http://localhost:80/health", "HTTP://LOCALHOST:80/health",
        "https://localhost:80/health?x=y", "/health?"}) {
    Client c = tcp();
    c.send("GET " + std::string(target) + end);
    EXPECT_EQ(c.reply().status, 200) << target;
  }
  Client c = tcp();
  c.send("GET http://localhost:80" + end);
  EXPECT_EQ(c.reply().json()["name"], "machina");
  c.send("GET //" + end);
  EXPECT_EQ(c.reply().status, 404);
  c.send("OPTIONS *" + end);
  EXPECT_EQ(c.reply().status, 404);
}

TEST_F(Smuggling, Lines) {
  start();
  using namespace std::string_literals;
  for (const std::string& text :
       {kGet + "X: a\r\n b\r\n\r\n",
        kGet + "X: a\r\n\tb\r\n\r\n",
        kGet + "X : a\r\n\r\n",
        kGet + "X\t: a\r\n\r\n",
        kGet + ": a\r\n\r\n",
        kGet + "no colon\r\n\r\n",
        kGet + "X(: a\r\n\r\n",
        kGet + "X: a\rb\r\n\r\n",
        kGet + "X: a\nY: b\r\n\r\n",
        kGet + "X: a\x00"
               "b\r\n\r\n"s,
        kGet + "X\x00: a\r\n\r\n"s,
        kGet + "X: a\x7f\r\n\r\n",
        kGet + "X: a\r\r\n\r\n",
        kGet + "\n",
        "GET /health HTTP/1.1\nHost: localhost\r\n\r\n"s,
        "GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /health  HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET\t/health HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /health HTTP/1.1 \r\nHost: localhost\r\n\r\n"s,
        " GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /he\x01lth HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /he\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "G\x80T /health HTTP/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /health\r\nHost: localhost\r\n\r\n"s,
        "GET /health http/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /health HTTP/1.10\r\nHost: localhost\r\n\r\n"s,
        "GET /health HTTP/11\r\nHost: localhost\r\n\r\n"s,
        "GET /health HTTP/1\r\nHost: localhost\r\n\r\n"s,
        "GET /health HTTPS/1.1\r\nHost: localhost\r\n\r\n"s,
        "GET /health ICE/1.0\r\nHost: localhost\r\n\r\n"s,
        "GET /health RTSP/1.0\r\nHost: localhost\r\n\r\n"s,
        "GET /health RTSP/1.1\r\nHost: localhost\r\n\r\n"s,
        "\r\n\r\n\r\n\r\n\r\n"s + kGet + "\r\n",
        "\n" + kGet + "\r\n",
        "\x16\x03\x01\x02\r\n\r\n"s}) {
    refused(text, 400);
  }
  Client c = tcp();
  c.send("\r\n\r\n\r\n\r\n" + kGet + "\r\n");
  EXPECT_EQ(c.reply().status, 200);
  // Versions and methods that are none of ours have answers of their own.
  for (const char* version : {"0.9", "1.2", "1.9", "2.0", "3.0"}) {
    refused("GET /health HTTP/"s + version + "\r\nHost: localhost\r\n\r\n",
            505);
  }
  for (const char* method : {"FOO", "get", "Get", "PROPFIND", "M-SEARCH", "PRI",
                             "SOURCE", "GETS", "GE"}) {
    for (const char* path : {" /health", " /v1/jobs", " /nowhere"}) {
      refused(
          method + std::string(path) + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
          501);
    }
  }
  nothing_was_smuggled();
}

TEST_F(Smuggling, F22_NamesThatOnlyLookLikeFraming) {
  using namespace std::string_literals;
  start();
  for (const char* name :
       {"Transfer_Encoding", "Content_Length", "Transfer---Encoding",
        "TransferEncoding", "contentlength", "CONTENT.LENGTH",
        "-Content-Length", "Content-Length-", "tRANSFER-eNCODING_",
        "Content!Length"}) {
    refused("POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n"s + name +
                ": 5\r\nContent-Length: 2\r\n\r\n{}",
            400);
    refused(
        "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: "
        "chunked\r\n\r\n0\r\n"s +
            name + ": 5\r\n\r\n",
        400);
  }
  Client c = tcp();
  for (const char* name : {"Content-Length-Of-It", "X-Content-Length",
                           "Transfer-Encodings", "Contents-Length"}) {
    EXPECT_EQ(c.call("GET", "/health", "", name + ": 5\r\n"s).status, 200)
        << name;
  }
  nothing_was_smuggled();
}

TEST_F(Smuggling, F22_BlanksBeforeAChunkExtension) {
  using namespace std::string_literals;
  start();
  for (const char* line : {"e ;a=b", "e\t; a = b", "e;a=b ", "e  \t ;"}) {
    Client c = tcp();
    c.send(
        "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: "
        "chunked\r\n\r\n"s +
        line + "\r\n{\"kind\":\"n.i\"}\r\n0 ;x\r\n\r\n");
    EXPECT_EQ(c.reply().status, 201) << line;
  }
  for (const char* line : {"e ", "e a", "e \t", " e;a"}) {
    refused(
        "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: "
        "chunked\r\n\r\n"s +
            line + "\r\n{\"kind\":\"n.i\"}\r\n0\r\n\r\n",
        400);
  }
}

// One value is taken of each: two are refused, not one of them believed.
TEST_F(Smuggling, RepeatedHeaders) {
  start();
  for (const char* header :
       {"Authorization: Bearer a", "X-Machina-Ts: 1", "X-Machina-Nonce: a",
        "X-Machina-Signature: v1=0", "Idempotency-Key: k", "Content-Type: a/b",
        "X-Request-Id: a", "Origin: null", "traceparent: x",
        "Expect: 100-continue", "Prefer: wait=1"}) {
    std::string line = std::string(header) + "\r\n";
    refused(kPost + line + line + "Content-Length: 0\r\n\r\n", 400);
  }
  // Connection is a list, over as many lines as it likes.
  Client c = tcp();
  c.send(kGet + "Connection: close\r\nConnection: x\r\n\r\n" + kGet + "\r\n");
  EXPECT_EQ(c.reply().headers["connection"], "close");
  EXPECT_EQ(c.reply(200).status, 0);
}

TEST_F(Smuggling, PathsAreDecodedOnce) {
  start();
  Client c = tcp();
  std::string id = c.post("/v1/jobs", R"({"kind":"a"})").json()["id"];
  std::string encoded;
  for (char ch : id) {
    char hex[4];
    std::snprintf(hex, sizeof hex, "%%%02X", static_cast<unsigned>(ch));
    encoded += hex;
  }
  EXPECT_EQ(c.get("/v1/jobs/" + encoded).json()["id"], id);
  EXPECT_EQ(c.get("/v1/%6aobs/" + id).json()["id"], id);
  EXPECT_EQ(c.get("/%68ealth").status, 200);
  for (const char* path :
       {"/v1/jobs/%", "/v1/jobs/%4", "/v1/jobs/%zz", "/v1/jobs/%ff"}) {
    EXPECT_EQ(c.get(path).status, 400) << path;
  }
  for (const char* path :
       {"/v1/jobs%2f0", "/v1/jobs/%2e%2e%2fhealth", "/v1/jobs/%00",
        "/v1/jobs/%5c", "/v1/jobs/%0d%0aX:y", "/v1/jobs/..", "/v1/jobs/%2e%2e",
        "/v1/../health", "/v1/%2E%2e/health", "/./health", "/health/",
        "//health", "/v1/jobs/%2541", "/v1/jobs/.."}) {
    EXPECT_EQ(c.get(path).status, 404) << path;
  }
}

}  // namespace
}  // namespace machina::test
