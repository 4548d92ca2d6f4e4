// What is refused before anything is served, with its exit code and one line
// that says why; and the command line's own answers.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <span>

#include "queue/wal/manifest.h"
#include "queue/wal/segment.h"
#include "tests/e2e/fixture.h"
#include "tests/support/places.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

class Startup : public EndToEnd {
 protected:
  Ended serve(std::vector<std::string> more,
              std::map<std::string, std::string> env = {},
              const std::string& root = "") {
    std::vector<std::string> args = {"serve", "--root",
                                     root.empty() ? p().root() : root};
    auto unless_given = [&](const std::string& name, const std::string& value) {
      if (std::find(more.begin(), more.end(), name) != more.end()) return;
      args.push_back(name);
      args.push_back(value);
    };
    unless_given("--port", std::to_string(p().port()));
    unless_given("--workers", "0");
    args.insert(args.end(), more.begin(), more.end());
    return p().run(args, env, 8000);
  }
  static void write(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  }
  std::size_t kept() {
    Json answer = p().get("/v1/jobs?kind=ext.keep&limit=100").json();
    return answer.is_object() ? answer["jobs"].size() : 0;
  }
  void expect_refused(const Ended& e, int code,
                      const std::vector<std::string>& words) {
    EXPECT_EQ(e.code, code) << e.out << e.err;
    for (const std::string& word : words) {
      EXPECT_NE(e.err.find(word), std::string::npos)
          << "'" << word << "' is missing in: " << e.err;
    }
  }
};

TEST_P(Startup, OptionsAndVariables) {
  expect_refused(serve({"--prot", "1"}), 2, {"--prot"});
  expect_refused(serve({"--workers", "65"}), 2, {"65", "64"});
  expect_refused(serve({"--workers", "many"}), 2, {"many"});
  expect_refused(serve({"--profile", "production"}), 2, {"production"});
  expect_refused(serve({}, {{"MACHINA_LEASE_SM", "1"}}), 2,
                 {"MACHINA_LEASE_SM", "MACHINA_LEASE_MS"});
  expect_refused(serve({}, {{"MACHINA_LEASE_MS", "abc"}}), 2,
                 {"MACHINA_LEASE_MS", "abc"});
  expect_refused(serve({}, {{"MACHINA_LEASE_MS", "-1"}}), 2,
                 {"MACHINA_LEASE_MS", "-1"});
  expect_refused(serve({"--host", "0.0.0.0"}), 2, {"0.0.0.0"});
  expect_refused(serve({"--host", "bogus"}), 2, {"bogus", "not an address"});
  expect_refused(p().run({"frobnicate"}), 2, {"frobnicate"});
}

TEST_P(Startup, EitherNameOfASetting) {
  const std::string own = "MACHINA_POLICY_RLIMIT_CPU";
  const std::string also = "MACHINA_POLICY_RLIMIT_CPU_SEC";
  expect_refused(serve({"--check"}, {{own, "3"}, {also, "4"}}), 2,
                 {own + " (environment): \"3\"", also + " (environment): \"4\"",
                  "keep one"});
  EXPECT_EQ(serve({"--check"}, {{own, "3"}, {also, "3"}}).code, 0);
  const Ended shown = serve({"--print-config"}, {{also, "3"}});
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_NE(shown.out.find("\n" + own + "=3 "), std::string::npos) << shown.out;
  EXPECT_NE(shown.out.find("environment, " + also), std::string::npos);
}

TEST_P(Startup, TheOriginalsVariablesExportedWhole) {
  std::map<std::string, std::string> env;
  std::ifstream file(std::string(kSourceDir) + "/tests/support/original.env");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("MACHINA_")) {
      env[line.substr(0, line.find('='))] = line.substr(line.find('=') + 1);
    }
  }
  ASSERT_GE(env.size(), 71u);
  ASSERT_EQ(p().shell("mkdir -p -m 700 " + p().root()), 0);
  const Ended e = serve({"--check", "--unsafe-fs"}, env);
  EXPECT_EQ(e.code, 0) << e.out << e.err;
}

TEST_P(Startup, ProductionRefusesWhatItCannotPromise) {
  std::map<std::string, std::string> token = {
      {"MACHINA_API_TOKEN", "e2e-token-of-prod"}};
  expect_refused(serve({"--profile", "prod"}), 2, {"MACHINA_API_TOKEN"});
  token["MACHINA_WAL_FSYNC"] = "0";
  expect_refused(serve({"--profile", "prod"}, token), 2, {"MACHINA_WAL_FSYNC"});
  token.erase("MACHINA_WAL_FSYNC");
  expect_refused(serve({"--profile", "prod"}, token, p().dir() + "/none"), 2,
                 {p().dir() + "/none"});
  if (!as_root()) {
    // Below its level: as a user there is no L3.
    expect_refused(serve({"--profile", "prod", "--workers", "1"}, token), 2,
                   {"L3"});
  }
}

TEST_P(Startup, RootsThatAreNotOurs) {
  expect_refused(serve({}, {}, "/"), 2, {"/"});
  expect_refused(serve({}, {}, "/home"), 2, {"/home"});
  std::string foreign = p().dir() + "/foreign";
  fs::create_directory(foreign);
  chmod(foreign.c_str(), 0700);
  uid_t other = as_root() ? 12345 : 0;
  if (geteuid() != 0) GTEST_SKIP() << "needs root to make another's directory";
  ASSERT_EQ(chown(foreign.c_str(), other, other), 0);
  expect_refused(serve({}, {}, foreign), 2, {foreign});
  EXPECT_TRUE(fs::is_empty(foreign)) << "nothing is half done";
  std::string file = p().dir() + "/file";
  std::ofstream(file) << "x";
  expect_refused(serve({}, {}, file), 2, {file});
  expect_refused(serve({}, {}, p().dir() + "/" + std::string(120, 'r')), 2,
                 {"107"});
}

TEST_P(Startup, PortAndRootAreTaken) {
  start();
  std::string id = p().submit({{"kind", "noop"}, {"delay_ms", 60000}});
  std::string other = p().dir() + "/other";
  ASSERT_EQ(p().shell("mkdir -m 700 " + other), 0);
  expect_refused(serve({}, {}, other), 2, {std::to_string(p().port())});
  Ended second = serve({"--port", "0"});
  expect_refused(second, 75, {p().root()});
  EXPECT_EQ(p().job(id)["state"], "scheduled") << "the first is unharmed";
}

TEST_P(Startup, LogFromANewerVersionIsRefusedAndLeftAlone) {
  Serve quiet;
  quiet.workers = 0;
  start(quiet);
  for (int i = 0; i < 50; ++i) p().submit({{"kind", "ext.keep"}});
  ASSERT_EQ(p().stop_server(), 0);
  // A feature bit that this build does not know, in both copies.
  std::string path = p().root() + "/queue/wal/MANIFEST";
  std::string old = e2e::read_file(path);
  auto manifest = decode_manifest(std::as_bytes(std::span(old)));
  ASSERT_TRUE(manifest.has_value()) << "where is the manifest?";
  manifest->feature_incompat |= std::uint64_t{1} << 40;
  std::vector<std::byte> bytes = encode_manifest(*manifest);
  std::string newer(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  write(path, newer);
  expect_refused(serve({}), 2,
                 {"MANIFEST", std::to_string(manifest->feature_incompat)});
  EXPECT_EQ(e2e::read_file(path), newer) << "it was touched";
  // Whoever has the newer program still has it all.
  write(path, old);
  start(quiet);
  EXPECT_EQ(kept(), 50u);
}

// The bit must be there for the older program, which knows none.
TEST_P(Startup, F31_KeysSetABitAndAnUnknownBitIsSaidToBeNewer) {
  Serve quiet;
  quiet.workers = 0;
  start(quiet);
  auto segments = [&] {
    std::map<std::string, SegmentHeader> found;
    for (const auto& entry :
         fs::directory_iterator(p().root() + "/queue/wal")) {
      if (entry.path().extension() != ".seg") continue;
      std::string bytes = e2e::read_file(entry.path()).substr(0, 8192);
      auto header = decode_segment_headers(std::as_bytes(std::span(bytes)));
      EXPECT_TRUE(header.has_value()) << entry.path();
      if (header) found[entry.path()] = *header;
    }
    return found;
  };
  for (int i = 0; i < 3; ++i) p().submit({{"kind", "ext.keep"}});
  const std::uint64_t always = kFeatureClock | kFeatureSessions;
  for (const auto& [path, header] : segments()) {
    EXPECT_EQ(header.feature_incompat, always) << path;
  }
  p().submit({{"kind", "ext.keep"}, {"concurrency_key", "one"}});
  p().kill_server();
  std::string path;
  SegmentHeader last;
  for (const auto& [name, header] : segments()) {
    if (header.seq > last.seq) path = name, last = header;
  }
  EXPECT_EQ(last.feature_incompat, always | kFeatureConcurrencyKeys);
  EXPECT_FALSE(check_features(last.feature_incompat, 0).has_value());
  // And we are the older program of one to come.
  std::string old = e2e::read_file(path), newer = old;
  last.feature_incompat |= std::uint64_t{1} << 41;
  std::vector<std::byte> copy(kSegmentHeaderBytes);
  encode_segment_header(&last, std::span<std::byte, kSegmentHeaderBytes>(
                                   copy.data(), kSegmentHeaderBytes));
  for (std::size_t at : {std::size_t{0}, kSegmentHeaderBytes}) {
    newer.replace(at, copy.size(), reinterpret_cast<const char*>(copy.data()),
                  copy.size());
  }
  write(path, newer);
  expect_refused(serve({}), 2,
                 {fs::path(path).filename().string(), "newer version",
                  std::to_string(last.feature_incompat)});
  EXPECT_TRUE(e2e::read_file(path) == newer) << "it was touched";
  write(path, old);
  restart();
  EXPECT_EQ(kept(), 4u);
}

TEST_P(Startup, DamageToWhatWasDurableIsRefusedNotCut) {
  start_prod(0);
  for (int i = 0; i < 50; ++i) p().submit({{"kind", "ext.keep"}});
  p().kill_server();
  std::string segment, bytes;
  std::size_t at = std::string::npos;
  for (const auto& entry : fs::directory_iterator(p().root() + "/queue/wal")) {
    if (!entry.is_regular_file()) continue;
    bytes = e2e::read_file(entry.path());
    at = bytes.find("ext.keep");
    segment = entry.path();
    if (at != std::string::npos) break;
  }
  ASSERT_NE(at, std::string::npos) << "no file of the log holds the jobs";
  std::string flipped = bytes;
  flipped[at] = static_cast<char>(flipped[at] ^ 1);
  write(segment, flipped);
  std::map<std::string, std::string> env = {
      {"MACHINA_API_TOKEN", "e2e-token-of-prod"}};
  expect_refused(serve({"--profile", "prod"}, env), 65,
                 {fs::path(segment).filename().string()});
  EXPECT_TRUE(e2e::read_file(segment) == flipped) << "evidence is kept";
  write(segment, bytes);
  restart();
  EXPECT_EQ(kept(), 50u);
}

TEST_P(Startup, CommandLineAnswersWithItsExitCodes) {
  Ended none = p().run({"get", "x", "--server", p().url()});
  EXPECT_EQ(none.code, 3) << none.err;
  std::string gone = p().dir() + "/none.sock";
  none = p().run({"stats", "--server", gone});
  EXPECT_EQ(none.code, 3) << none.err;
  EXPECT_NE(none.err.find(gone), std::string::npos) << none.err;
  EXPECT_NE(none.err.find("machina serve"), std::string::npos) << none.err;
  EXPECT_EQ(none.err.find("localhost"), std::string::npos) << none.err;
  start();
  std::string server = p().url();
  Ended e = p().run({"enqueue", "noop", "--payload", R"({"echo":{"a":1}})",
                     "--wait", "--json", "--server", server});
  EXPECT_EQ(e.code, 0) << e.out << e.err;
  Json job = Json::parse(e.out, nullptr, false);
  ASSERT_TRUE(job.is_object()) << e.out;
  EXPECT_EQ(job["state"], "succeeded");
  std::string id = job["id"];
  EXPECT_EQ(p().run({"get", id, "--server", server}).code, 0);
  EXPECT_EQ(p().run({"list", "--server", server}).code, 0);
  EXPECT_EQ(p().run({"logs", id, "--server", server}).code, 0);
  EXPECT_EQ(p().run({"stats", "--json", "--server", server}).code, 0);
  EXPECT_EQ(p().run({"scale", "1", "--server", server}).code, 0);
  EXPECT_EQ(p().run({"cancel", id, "--server", server}).code, 4);
  e = p().run({"enqueue", "noop", "--payload", R"({"fail":true})", "--wait",
               "--server", server});
  EXPECT_EQ(e.code, 1) << e.out << e.err;
  e = p().run({"enqueue", "NOOP", "--server", server});
  EXPECT_EQ(e.code, 4) << e.out << e.err;
  EXPECT_NE(e.err.find("NOOP"), std::string::npos) << e.err;
  EXPECT_EQ(p().run({"enqueue", "--server", server}).code, 2);
  // Without --server: the root's own socket.
  EXPECT_EQ(p().run({"stats"}, {{"MACHINA_ROOT", p().root()}}).code, 0);
  e = p().run({"version"});
  EXPECT_EQ(e.code, 0);
  EXPECT_NE(e.out.find("0."), std::string::npos) << e.out;
}

TEST_P(Startup, DoctorSaysWhatThisHostGives) {
  Ended e =
      p().run({"doctor", "--json"}, {{"MACHINA_SECCOMP_ENABLE", "1"}}, 30000);
  EXPECT_EQ(e.code, 0) << e.out << e.err;
  Json report = Json::parse(e.out, nullptr, false);
  ASSERT_TRUE(report.is_object()) << e.out;
  EXPECT_GE(report.value("level", ""), least_level()) << e.out;
}

MACHINA_BOTH(Startup);

}  // namespace
}  // namespace machina::e2e
