// Signed requests as people make them: `machina sign` with curl, a few lines of
// Python, and the verbs of the command line; against the real binary.

#include <sys/stat.h>

#include <fstream>

#include "tests/e2e/fixture.h"
#include "tests/support/places.h"

namespace machina::e2e {
namespace {

constexpr const char* kSecret = "e2e-secret-of-signatures";

// docs/http-api.md shows the same client.
constexpr const char* kPython = R"(
import hashlib, hmac, http.client, os, secrets, sys, time

def call(port, method, path, body=b""):
    secret = open(os.environ["MACHINA_API_HMAC_SECRET_FILE"], "rb").read().strip()
    ts, nonce = str(int(time.time())), secrets.token_hex(16)
    text = "\n".join([ts, nonce, method, path, hashlib.sha256(body).hexdigest(), ""])
    signature = hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, {
        "X-Machina-Ts": ts, "X-Machina-Nonce": nonce,
        "X-Machina-Signature": "v1=" + signature})
    return connection.getresponse().status

port = int(sys.argv[1])
assert call(port, "POST", "/v1/jobs?", b'{"kind":"ext.python"}') == 201
assert call(port, "GET", "/v1/jobs?limit=2&kind=ext.python") == 200
assert call(port, "GET", "/v1/jobs?kind=%65xt.python") == 200
assert call(port, "GET", "/nowhere") == 404
)";

class Signing : public EndToEnd {
 protected:
  void serve() {
    secret_file_ = p().dir() + "/secret";
    write(secret_file_, std::string(kSecret) + "\n");
    chmod(secret_file_.c_str(), 0600);
    EXPECT_EQ(chown(secret_file_.c_str(), as_root() ? 0 : p().uid(), gid_t(-1)),
              0);
    Serve serve;
    serve.workers = 0;
    serve.env["MACHINA_API_HMAC_SECRET_FILE"] = secret_file_;
    start(serve);
  }
  static void write(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
    chmod(path.c_str(), 0644);
  }
  int sh(const std::string& line) {
    return p().shell("cd " + p().root() + " && S=" + secret_file_ +
                     " U=" + p().url() + " M=" + kBinary +
                     " && export MACHINA_API_HMAC_SECRET_FILE=$S && " + line);
  }
  std::string secret_file_;
};

TEST_P(Signing, CurlWithTheHeadersThatSignPrints) {
  serve();
  EXPECT_EQ(p().get("/v1/jobs").status, 401);
  EXPECT_EQ(sh("echo '{\"kind\":\"ext.curl\"}' > body.json && "
               "$M sign POST /v1/jobs --body @body.json > headers && "
               "curl -sf -H @headers --data-binary @body.json $U/v1/jobs"),
            0);
  // Once.
  EXPECT_EQ(sh("test 401 = $(curl -s -o /dev/null -w '%{http_code}' "
               "-H @headers --data-binary @body.json $U/v1/jobs)"),
            0);
  EXPECT_EQ(sh("$M sign GET '/v1/jobs?kind=ext.curl' | "
               "curl -sf -H @- \"$U/v1/jobs?kind=ext.curl\" | grep ext.curl"),
            0);
  // Other bytes than those that were signed.
  EXPECT_EQ(sh("$M sign POST /v1/jobs --body '{}' | "
               "curl -s -H @- -d '{ }' $U/v1/jobs | grep unauthorized"),
            0);
  // A whole URL, a body from standard input, the secret by option.
  EXPECT_EQ(sh("env -u MACHINA_API_HMAC_SECRET_FILE $M sign --secret-file $S "
               "post $U/v1/jobs --body @- < body.json > h2 && "
               "curl -sf -H @h2 --data-binary @body.json $U/v1/jobs"),
            0);
}

TEST_P(Signing, TheVerbsSignByThemselves) {
  serve();
  const std::map<std::string, std::string> env = {
      {"MACHINA_API_HMAC_SECRET_FILE", secret_file_},
      {"MACHINA_SERVER", p().url()}};
  Ended e = p().run({"enqueue", "ext.cli", "--json"}, env);
  EXPECT_EQ(e.code, 0) << e.err;
  e = p().run({"list", "--kind", "ext.cli", "--json"}, env);
  EXPECT_EQ(e.code, 0) << e.err;
  EXPECT_NE(e.out.find("ext.cli"), std::string::npos);
  e = p().run({"list"}, {{"MACHINA_SERVER", p().url()}});
  EXPECT_EQ(e.code, 4);
  EXPECT_NE(e.err.find("MACHINA_API_HMAC_SECRET"), std::string::npos) << e.err;
  e = p().run({"list"}, {{"MACHINA_SERVER", p().url()},
                         {"MACHINA_API_HMAC_SECRET", "another-secret"}});
  EXPECT_EQ(e.code, 4);
  e = p().run({"sign", "FROB", "/v1/jobs"}, env);
  EXPECT_EQ(e.code, 2) << e.out;
  EXPECT_NE(e.err.find("METHOD: \"FROB\""), std::string::npos) << e.err;
  e = p().run({"sign", "GET", "/v1/jobs"});
  EXPECT_EQ(e.code, 2);
  EXPECT_NE(e.err.find("MACHINA_API_HMAC_SECRET"), std::string::npos);
  e = p().run({"sign", "GET", "v1/jobs"}, env);
  EXPECT_EQ(e.code, 2);
  e = p().run({"sign", "GET", "/v1/jobs", "--secret-file", "/nowhere"});
  EXPECT_EQ(e.code, 2);
  EXPECT_NE(e.err.find("/nowhere"), std::string::npos);
  e = p().run({"sign", "GET", "/v1/jobs"},
              {{"MACHINA_API_HMAC_SECRET", "a"},
               {"MACHINA_API_HMAC_SECRET_FILE", secret_file_}});
  EXPECT_EQ(e.code, 2);
  EXPECT_NE(e.err.find("keep one"), std::string::npos) << e.err;
  // The secret is nowhere that others see.
  EXPECT_EQ(p().log().find(kSecret), std::string::npos);
  EXPECT_EQ(sh("! grep -a -q " + std::string(kSecret) +
               " /proc/$(cat machina.pid)/environ"),
            0);
}

TEST_P(Signing, APythonClient) {
  serve();
  write(p().dir() + "/client.py", kPython);
  if (sh("/usr/bin/python3 -c 1") != 0) GTEST_SKIP() << "no python3 here";
  EXPECT_EQ(sh("/usr/bin/python3 " + p().dir() + "/client.py " +
               std::to_string(p().port())),
            0);
}

TEST_P(Signing, ARestartLetsNoSignatureInAgain) {
  serve();
  const std::string again =
      "test 401 = $(curl -s -o /dev/null -w '%{http_code}' -H @h $U/v1/jobs)";
  EXPECT_EQ(sh("$M sign GET /v1/jobs > h && curl -sf -H @h $U/v1/jobs"), 0);
  EXPECT_EQ(sh(again), 0);
  EXPECT_EQ(p().stop_server(), 0);
  std::string why;
  ASSERT_TRUE(p().restart(&why)) << why;
  EXPECT_EQ(sh(again), 0);
  EXPECT_EQ(sh("$M sign GET /v1/jobs > h && curl -sf -H @h $U/v1/jobs"), 0);
  // The file of nonces is written behind the answer.
  const std::string nonces = p().root() + "/queue/nonces";
  for (int i = 0; i < 500; ++i) {
    struct stat info;
    if (stat(nonces.c_str(), &info) == 0 && info.st_size >= 200 + 32) break;
    usleep(10'000);
  }
  p().kill_server();
  ASSERT_TRUE(p().restart(&why)) << why;
  EXPECT_EQ(sh(again), 0);
  EXPECT_EQ(sh("$M sign GET /v1/jobs > h && curl -sf -H @h $U/v1/jobs"), 0);
}

MACHINA_BOTH(Signing);

}  // namespace
}  // namespace machina::e2e
