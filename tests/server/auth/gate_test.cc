// Who may come in, how often, and how many at once.

#include "server/auth/gate.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <fstream>

#include "server/auth/nonces.h"
#include "server/auth/signature.h"
#include "server/http/limits.h"
#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

std::string text(const HexDigest& hex) { return {hex.data(), hex.size()}; }

// Made with Python's hmac and hashlib over the canonical string.
TEST(Signature, KnownAnswers) {
  Signer a(std::string(20, '\x0b'));
  EXPECT_EQ(
      text(a.sign({"1700000000", "n1", "GET", "/v1/jobs"}, Sha256::of(""))),
      "435f0309361e59b540d6121caa299be9dfbc97c29b741c3e091861af73e71155");
  Signer b("Jefe");
  HexDigest body = Sha256::of(R"({"kind":"noop"})");
  SignedParts parts{"1700000000123", "0f8a", "POST", "/v1/jobs?x=1&y=%20"};
  std::string hex =
      "48cac10e0a1d43ba0ce637c0941d9c5a216c3a01ae2daf483bc8f15ea018f483";
  EXPECT_EQ(text(b.sign(parts, body)), hex);
  EXPECT_EQ(text(b.sign(parts, body)), hex);  // the key is used again
  Signer c(std::string(131, 'k'));            // longer than a block
  std::string bytes;
  for (int i = 0; i < 256; ++i) bytes += static_cast<char>(i);
  EXPECT_EQ(text(c.sign({"1700000000", std::string(128, 'a'), "PUT",
                         "/v1/leases/t/artifacts/a"},
                        Sha256::of(bytes))),
            "1a13ca7d00696841aedb8d92df13f6c7a3a170379f8c3af3b362c8c81f12efc9");

  EXPECT_TRUE(b.holds(parts, body, "v1=" + hex));
  std::string upper = hex;
  for (char& ch : upper) ch = static_cast<char>(std::toupper(ch));
  EXPECT_TRUE(b.holds(parts, body, "v1=" + upper));
  EXPECT_FALSE(b.holds(parts, body, hex));
  EXPECT_FALSE(b.holds(parts, body, "v2=" + hex));
  EXPECT_FALSE(b.holds(parts, body, "v1=" + hex.substr(1)));
  EXPECT_FALSE(b.holds(parts, body, "v1=" + hex + "0"));
  EXPECT_FALSE(b.holds(parts, body, ""));
  for (std::size_t i = 0; i < hex.size(); ++i) {
    std::string wrong = hex;
    wrong[i] = wrong[i] == '0' ? '1' : '0';
    EXPECT_FALSE(b.holds(parts, body, "v1=" + wrong));
  }
}

TEST(Signature, FormsOfItsParts) {
  EXPECT_EQ(signature_time_ms("1700000000"), 1'700'000'000'000);
  EXPECT_EQ(signature_time_ms("1700000000123"), 1'700'000'000'123);
  EXPECT_EQ(signature_time_ms("19999999999"), 19'999'999'999'000);
  EXPECT_EQ(signature_time_ms("20000000000"), 20'000'000'000);
  for (const char* bad :
       {"", "-1", "+1", "1.5", " 1", "1e9", "0x1", "9999999999999999"}) {
    EXPECT_FALSE(signature_time_ms(bad)) << bad;
  }
  EXPECT_TRUE(valid_nonce("a"));
  EXPECT_TRUE(valid_nonce(std::string(kNonceBytesMax, 'z')));
  for (const std::string& bad :
       {std::string(), std::string(kNonceBytesMax + 1, 'z'), std::string("a b"),
        std::string("a\nb"), std::string("\xc3\xa9"), std::string("a,b")}) {
    EXPECT_FALSE(valid_nonce(bad)) << bad;
  }
  EXPECT_EQ(random_nonce().size(), 32u);
  EXPECT_NE(random_nonce(), random_nonce());
}

TEST(KeySet, HoldsWhatWasAdded) {
  KeySet set;
  for (std::uint64_t i = 1; i < 50'000; ++i) set.add(i * 0x9e3779b97f4a7c15ull);
  for (std::uint64_t i = 1; i < 50'000; ++i) {
    ASSERT_TRUE(set.has(i * 0x9e3779b97f4a7c15ull));
  }
  for (std::uint64_t i = 50'000; i < 60'000; ++i) {
    ASSERT_FALSE(set.has(i * 0x9e3779b97f4a7c15ull));
  }
  EXPECT_EQ(set.size(), 49'999u);
  set.clear();
  EXPECT_FALSE(set.has(0x9e3779b97f4a7c15ull));
}

class NonceFiles : public testing::Test {
 protected:
  NonceFiles() {
    char path[] = "/tmp/machina-nonces-XXXXXX";
    dir_ = mkdtemp(path);
  }
  ~NonceFiles() override { std::filesystem::remove_all(dir_); }
  std::unique_ptr<Nonces> open(Millis wall, const std::string& boot = "b") {
    auto nonces = Nonces::open(dir_, kWindow, wall, 0, boot);
    EXPECT_TRUE(nonces);
    return std::move(*nonces);
  }
  // A copy of the directory as it is now: what a kill would leave.
  void keep_copy() {
    std::filesystem::remove_all(dir_ + ".kill");
    std::filesystem::copy(dir_, dir_ + ".kill");
  }
  void back_to_copy() {
    std::filesystem::remove_all(dir_);
    std::filesystem::rename(dir_ + ".kill", dir_);
  }
  static constexpr Millis kWindow = 60'000;
  using Found = Nonces::Found;
  std::string dir_;
};

TEST_F(NonceFiles, EachWorksOnce) {
  auto n = std::move(*Nonces::open("", kWindow, 0, 0, ""));
  EXPECT_EQ(n->look("a", 1000, 0), Found::fresh);
  EXPECT_EQ(n->look("a", 1000, 0), Found::fresh);  // looking records nothing
  n->record("a", 1000);
  EXPECT_EQ(n->look("a", 1000, 0), Found::used);
  EXPECT_EQ(n->look("a", 2000, 0), Found::used);  // at another time too
  EXPECT_EQ(n->look("b", 1000, 0), Found::fresh);
}

// A nonce is forgotten with its generation; then its signature's time is what
// refuses it, even if a clock that is set makes that time fresh again.
TEST_F(NonceFiles, WhatIsForgottenIsRefusedByItsTime) {
  auto n = std::move(*Nonces::open("", kWindow, 0, 0, ""));
  const Millis life = 2 * kWindow + 1000;
  n->record("a", 500'000);
  n->record("a2", 510'000);
  EXPECT_EQ(n->look("b", 500'000 + life, life), Found::fresh);
  EXPECT_EQ(n->look("a", 500'000, life), Found::used);
  n->record("b", 500'000 + life);
  EXPECT_EQ(n->look("c", 500'000 + 2 * life, 2 * life), Found::fresh);
  EXPECT_EQ(n->size(), 1u);  // "a" is gone
  EXPECT_EQ(n->look("a", 500'000, 2 * life), Found::used);
  EXPECT_EQ(n->look("z", 505'000, 2 * life), Found::used);
  EXPECT_EQ(n->look("z", 499'999, 2 * life), Found::fresh);
  EXPECT_EQ(n->look("z", 510'001, 2 * life), Found::fresh);
  // A long silence ends both generations.
  n->record("d", 500'000 + 2 * life);
  EXPECT_EQ(n->size(), 2u);
  EXPECT_EQ(n->look("b", 500'000 + life, 9 * life), Found::used);
  EXPECT_EQ(n->size(), 0u);
}

TEST_F(NonceFiles, AStopForgetsNothing) {
  {
    auto n = open(1'000'000);
    n->record("a", 1'000'000);
    n->record("ahead", 1'055'000);
    EXPECT_TRUE(n->close());
  }
  auto n = open(1'001'000, "another boot");
  EXPECT_EQ(n->look("a", 1'000'000, 0), Found::used);
  EXPECT_EQ(n->look("ahead", 1'055'000, 0), Found::used);
  EXPECT_EQ(n->look("b", 1'000'000, 0), Found::fresh);
  struct stat info;
  ASSERT_EQ(stat((dir_ + "/nonces").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(NonceFiles, AKillForgetsNothingAndAPowerCutRefusesWhatCameBefore) {
  auto n = open(1'000'000);
  n->record("a", 1'000'000);
  n->flush();
  for (int i = 0; i < 1000; ++i) {
    if (std::filesystem::file_size(dir_ + "/nonces") % 16 == 0 &&
        std::filesystem::file_size(dir_ + "/nonces") > 200) {
      keep_copy();
    }
    usleep(1000);
    if (i > 200 && std::filesystem::exists(dir_ + ".kill")) break;
  }
  keep_copy();
  n.reset();
  back_to_copy();
  keep_copy();
  {
    auto again = open(1'001'000);
    EXPECT_EQ(again->look("a", 1'000'000, 0), Found::used);
    EXPECT_EQ(again->look("b", 1'000'000, 0), Found::fresh);
  }
  back_to_copy();
  auto other = open(1'020'000, "another boot");
  EXPECT_EQ(other->look("b", 1'020'000, 0), Found::used);
  EXPECT_EQ(other->look("b", 1'020'001, 0), Found::fresh);
}

TEST_F(NonceFiles, ATornFileIsNotTrusted) {
  { open(1'000'000)->record("a", 1'000'000); }
  std::filesystem::resize_file(dir_ + "/nonces", 20);
  auto n = open(1'001'000);
  EXPECT_EQ(n->look("b", 1'001'000, 0), Found::used);
  EXPECT_EQ(n->look("b", 1'001'001, 0), Found::fresh);
}

TEST_F(NonceFiles, GenerationsOnDiskAreTwo) {
  const Millis life = 2 * kWindow + 1000;
  Millis mono = 0;
  {
    auto n = open(0);
    for (int i = 0; i < 5; ++i, mono += life) {
      n->look("x", mono, mono);
      n->record("n" + std::to_string(i), mono);
      n->flush();
    }
    EXPECT_TRUE(n->close());
  }
  auto n = open(mono - life);
  EXPECT_EQ(n->look("n4", mono - life, 0), Found::used);
  EXPECT_EQ(n->look("n3", 3 * life, 0), Found::used);  // of the older file
  EXPECT_EQ(n->look("n0", 0, 0), Found::used);         // by its time
  EXPECT_EQ(n->look("n9", mono, 0), Found::fresh);
  std::size_t files = 0;
  for ([[maybe_unused]] auto& f : std::filesystem::directory_iterator(dir_)) {
    ++files;
  }
  EXPECT_EQ(files, 1u);
}

// Where the disk refuses, what comes later is not kept: the next start takes
// nothing that is older than itself.
TEST_F(NonceFiles, WhatCouldNotBeKeptIsNotTrusted) {
  for (const bool new_file : {true, false}) {
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directory(dir_);
    auto n = open(1'000'000);
    n->record("a", 1'000'000);
    n->flush();
    const Millis life = 2 * kWindow + 1000;
    if (new_file) {
      // The next generation's file cannot be made: its name is a directory's.
      std::filesystem::create_directories(dir_ + "/nonces.tmp/x");
    } else {
      // It is made, and cannot take its place.
      std::filesystem::remove(dir_ + "/nonces");
      std::filesystem::create_directories(dir_ + "/nonces/x");
      std::filesystem::create_directories(dir_ + "/nonces.old/x");
    }
    n->look("x", 1'000'000 + life, life);
    std::string why;
    for (int i = 0; i < 2000 && why.empty(); ++i) {
      why = n->trouble();
      usleep(5000);
    }
    EXPECT_NE(why, "");
    EXPECT_FALSE(n->close());
    n.reset();
    if (!new_file) continue;
    std::filesystem::remove_all(dir_ + "/nonces.tmp");
    auto again = open(1'001'000);
    EXPECT_EQ(again->look("b", 1'001'000, 0), Found::used);
    EXPECT_EQ(again->look("b", 1'001'001, 0), Found::fresh);
  }
}

// Never forgotten to make room: no other signed request comes in.
TEST_F(NonceFiles, AFullTableLetsNothingInAndEndsWithItsGeneration) {
  Gate::Options options;
  options.secret = "s3cret";
  options.nonces_max = 2;
  auto gate = std::move(*Gate::open(options, 1'000'000, 0));
  Signer signer(options.secret);
  const HexDigest body = Sha256::of("");
  const auto enter = [&](const std::string& nonce, Millis mono) {
    const std::string ts = std::to_string(1000 + mono / 1000);
    Head head;
    head.method_text = "GET";
    head.target = "/v1/jobs";
    head.signature_ts = ts;
    head.nonce = nonce;
    const HexDigest sign =
        signer.sign({ts, nonce, head.method_text, head.target}, body);
    const std::string value =
        std::string(kSignaturePrefix) + std::string(sign.begin(), sign.end());
    head.signature = value;
    Gate::Cause cause = Gate::Cause::none;
    const auto entry = gate->verify(head, body, 1'000'000 + mono, mono, &cause);
    if (entry == Gate::Entry::granted) gate->record(head);
    return entry;
  };
  EXPECT_EQ(enter("a", 0), Gate::Entry::granted);
  EXPECT_EQ(enter("b", 0), Gate::Entry::granted);
  EXPECT_EQ(enter("c", 0), Gate::Entry::full);
  EXPECT_EQ(enter("a", 0), Gate::Entry::refused) << "still known as used";
  const int wait = gate->retry_s(0);
  EXPECT_EQ(enter("c", wait * 1000 - 2000), Gate::Entry::full);
  EXPECT_EQ(enter("c", wait * 1000), Gate::Entry::granted);
}

// A signature that may still be fresh is remembered by itself, not by its time,
// which others share.
TEST_F(NonceFiles, WhatIsFreshIsNotRefusedForItsTime) {
  auto n = std::move(*Nonces::open("", kWindow, 0, 0, ""));
  EXPECT_EQ(n->look("x", 0, 0), Found::fresh);
  const Millis at = kWindow + 900, ahead = at + kWindow;
  n->record("a", ahead);
  EXPECT_EQ(n->look("x", 0, kWindow + 1001), Found::fresh);
  EXPECT_EQ(n->look("a", ahead, 2 * kWindow + 2002), Found::used);
  EXPECT_EQ(n->look("b", ahead, 2 * kWindow + 2002), Found::fresh);
}

// What is past when the server starts leaves its time behind: a clock that is
// set back does not make it fresh.
TEST_F(NonceFiles, WhatIsPastAtAStartIsRefusedByItsTime) {
  {
    auto n = open(1'000'000);
    n->record("a", 1'000'000);
    n->record("b", 1'000'500);
    EXPECT_TRUE(n->close());
  }
  auto n = open(1'000'500 + kWindow + 1);
  EXPECT_EQ(n->size(), 0u);
  EXPECT_EQ(n->look("a", 1'000'000, 0), Found::used);
  EXPECT_EQ(n->look("c", 1'000'250, 0), Found::used);
  EXPECT_EQ(n->look("c", 999'999, 0), Found::fresh);
  EXPECT_EQ(n->look("c", 1'000'501, 0), Found::fresh);
}

TEST_F(NonceFiles, SaysWhenToComeAgain) {
  auto n = std::move(*Nonces::open("", kWindow, 0, 0, ""));
  const Millis life = 2 * kWindow + 1000;
  EXPECT_EQ(n->retry_s(0), 121);
  EXPECT_EQ(n->retry_s(1), 121);
  EXPECT_EQ(n->retry_s(life - 1), 1);
  EXPECT_EQ(n->retry_s(life + 5000), 1);
}

// Too many gaps to remember: what lies between the oldest is refused with them.
TEST_F(NonceFiles, NoTimeThatWasUsedIsForgotten) {
  auto n = std::move(*Nonces::open("", kWindow, 0, 0, ""));
  const Millis life = 2 * kWindow + 1000;
  const int many = static_cast<int>(kNonceRangesMax) + 5;
  Millis mono = 0;
  for (int i = 0; i < many; ++i, mono += life) {
    n->look("x", 0, mono);
    n->record("n" + std::to_string(i), i * 10 * life);
  }
  n->look("x", 0, mono);
  n->look("x", 0, mono + life);
  for (int i = 0; i < many; ++i) {
    EXPECT_EQ(n->look("y", i * 10 * life, mono + life), Found::used) << i;
  }
  EXPECT_EQ(n->look("y", 5 * life, mono + life), Found::used);
  EXPECT_EQ(n->look("y", (many - 2) * 10 * life - 1, mono + life),
            Found::fresh);
}

// --- Limits ----------------------------------------------------------------

ClientKey key(int n) {
  ClientKey k;
  k.address.bytes = {0,
                     0,
                     0,
                     0,
                     0,
                     0,
                     0,
                     0,
                     0,
                     0,
                     0xff,
                     0xff,
                     10,
                     std::uint8_t(n >> 16),
                     std::uint8_t(n >> 8),
                     std::uint8_t(n)};
  return k;
}

// Capacity 60, one a second.
TEST(LimitsTest, SixtyAMinuteIsABurstOfSixtyThenOneASecond) {
  Limits limits({60, 0, 0});
  for (int i = 0; i < 60; ++i) {
    Limits::Taken t = limits.take(key(1), 7, 1000);
    ASSERT_EQ(t.wait_s, 0);
    EXPECT_EQ(t.note.mask, 1);
    EXPECT_EQ(t.note.left[0], 59 - i);
    EXPECT_EQ(t.note.full_s[0], i + 1);
  }
  EXPECT_EQ(limits.take(key(1), 7, 1000).wait_s, 1);
  EXPECT_EQ(limits.take(key(2), 7, 1000).wait_s, 0);  // another client
  EXPECT_EQ(limits.take(key(1), 7, 1999).wait_s, 1);
  EXPECT_EQ(limits.take(key(1), 7, 2000).wait_s, 0);
  EXPECT_EQ(limits.take(key(1), 7, 2000).wait_s, 1);
  // Never more than its capacity.
  Limits::Taken t = limits.take(key(1), 7, 10'000'000);
  EXPECT_EQ(t.note.left[0], 59);
}

TEST(LimitsTest, SlowLimitsSayHowLongToWait) {
  Limits limits({1, 0, 0});
  EXPECT_EQ(limits.take(key(1), 1, 0).wait_s, 0);
  EXPECT_EQ(limits.take(key(1), 1, 0).wait_s, 60);
  EXPECT_EQ(limits.take(key(1), 1, 30'000).wait_s, 30);
  EXPECT_EQ(limits.take(key(1), 1, 60'000).wait_s, 0);
}

TEST(LimitsTest, AllOrNothing) {
  Limits limits({10, 2, 0});
  EXPECT_EQ(limits.take(key(1), 3, 0).wait_s, 0);
  EXPECT_EQ(limits.take(key(1), 3, 0).wait_s, 0);
  Limits::Taken t = limits.take(key(1), 3, 0);
  EXPECT_EQ(t.wait_s, 30);
  EXPECT_EQ(t.limit, 1u);
  EXPECT_EQ(t.note.left[0], 8);  // the refused one took nothing
  EXPECT_EQ(limits.take(key(1), 1, 0).wait_s, 0);
}

TEST(LimitsTest, WhatIsOwedIsPaidFirst) {
  Limits limits({0, 60, 0});
  Limits::Taken t = limits.take(key(1), 2, 0);
  limits.charge(key(1), 1, 99, 0, &t.note);
  EXPECT_EQ(t.note.left[1], 0);
  EXPECT_EQ(t.note.full_s[1], 100);
  EXPECT_EQ(limits.take(key(1), 2, 0).wait_s, 41);
  EXPECT_EQ(limits.take(key(1), 2, 41'000).wait_s, 0);
}

TEST(LimitsTest, TheTableIsBoundedAndForgetsTheFull) {
  Limits limits({60, 0, 0}, 100);
  for (int i = 0; i < 100; ++i) limits.take(key(i), 1, 0);
  EXPECT_EQ(limits.clients(), 100u);
  // All busy: the rest share one bucket.
  for (int i = 0; i < 60; ++i) {
    EXPECT_EQ(limits.take(key(1000 + i), 1, 0).wait_s, 0);
  }
  EXPECT_EQ(limits.take(key(2000), 1, 0).wait_s, 1);
  EXPECT_EQ(limits.wait_s(key(2001), 0, 0), 1);    // who only asks, too
  EXPECT_EQ(limits.take(key(5), 1, 0).wait_s, 0);  // one with its own
  EXPECT_EQ(limits.clients(), 100u);
  // Full again: forgotten, two for each that comes; one in debt does not keep
  // the others.
  LimitNote note;
  limits.charge(key(0), 0, 1e6, 0, &note);
  for (int i = 0; i < 90; ++i) limits.take(key(3000 + i), 1, 70'000);
  EXPECT_LE(limits.clients(), 100u);
  EXPECT_GT(limits.take(key(0), 1, 70'000).wait_s, 1000);
  EXPECT_EQ(limits.take(key(4000), 1, 70'000).note.left[0], 59);
}

// Two that are full go for each that comes, also behind one that is in debt and
// was not seen for long.
TEST(LimitsTest, AfterAFloodTheTableShrinks) {
  Limits limits({60, 0, 0}, 100);
  for (int i = 0; i < 100; ++i) limits.take(key(i), 1, 0);
  for (int i = 0; i < 50; ++i) limits.take(key(1000 + i), 1, 70'000);
  EXPECT_EQ(limits.clients(), 50u);

  Limits owed({60, 0, 0}, 100);
  LimitNote note;
  owed.take(key(0), 1, 0);
  owed.charge(key(0), 0, 1e6, 0, &note);
  for (int i = 1; i < 100; ++i) owed.take(key(i), 1, 0);
  for (int i = 0; i < 50; ++i) owed.take(key(1000 + i), 1, 70'000);
  EXPECT_LE(owed.clients(), 52u);
  EXPECT_GT(owed.take(key(0), 1, 70'000).wait_s, 1000);
}

TEST(LimitsTest, AddressesAreCountedByTheirNetwork) {
  ClientAddress a, b, c;
  a.bytes = {0x20, 1, 0xd, 0xb8, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8};
  b.bytes = {0x20, 1, 0xd, 0xb8, 0, 0, 0, 1, 9, 9, 9, 9, 9, 9, 9, 9};
  c.bytes = {0x20, 1, 0xd, 0xb8, 0, 0, 0, 2, 1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_EQ(a.counted(), b.counted());
  EXPECT_NE(a.counted(), c.counted());
  EXPECT_EQ(a.text(), "2001:db8:0:1:102:304:506:708");
  EXPECT_EQ(key(7).address.counted(), key(7).address);
  EXPECT_EQ(key(7).address.text(), "10.0.0.7");
}

// --- The server ------------------------------------------------------------

class GateTest : public ServerTest {
 protected:
  static std::string now_s(int ahead = 0) {
    return std::to_string(time(nullptr) + ahead);
  }
  // The three headers.
  std::string signature(const std::string& method, const std::string& path,
                        const std::string& body, std::string ts = "",
                        std::string nonce = "",
                        const std::string& secret = "s3cret") {
    if (ts.empty()) ts = now_s();
    if (nonce.empty()) nonce = random_nonce();
    return "X-Machina-Ts: " + ts + "\r\nX-Machina-Nonce: " + nonce +
           "\r\nX-Machina-Signature: v1=" +
           text(Signer(secret).sign({ts, nonce, method, path},
                                    Sha256::of(body))) +
           "\r\n";
  }
  Reply signed_call(Client& c, const std::string& method,
                    const std::string& path, const std::string& body = "") {
    return c.call(method, path, body, signature(method, path, body));
  }
};

TEST_F(GateTest, ASignedRequestIsLetInOnce) {
  options_.hmac_secret = "s3cret";
  start();
  Client c = tcp();
  std::string body = R"({"kind":"a"})";
  std::string headers = signature("POST", "/v1/jobs", body);
  EXPECT_EQ(c.post("/v1/jobs", body, headers).status, 201);
  EXPECT_EQ(c.post("/v1/jobs", body, headers).status, 401);
  EXPECT_EQ(tcp().post("/v1/jobs", body, headers).status, 401);
  // The same nonce under another signature.
  std::string ts = now_s();
  EXPECT_EQ(
      c.call("GET", "/v1/jobs", "", signature("GET", "/v1/jobs", "", ts, "one"))
          .status,
      200);
  EXPECT_EQ(
      c.call("GET", "/stats", "", signature("GET", "/stats", "", ts, "one"))
          .status,
      401);
  EXPECT_EQ(c.get("/v1/jobs").status, 401);
  for (const char* path : {"/health", "/ready", "/metrics", "/"}) {
    EXPECT_EQ(c.get(path).status, 200);
  }
  EXPECT_EQ(local().get("/v1/jobs").status, 200);
  EXPECT_EQ(signed_call(c, "GET", "/v1/jobs?limit=1&x%5B=").status, 400);
  EXPECT_EQ(signed_call(c, "GET", "/v1/jobs?limit=1").status, 200);
  EXPECT_EQ(signed_call(c, "GET", "/nowhere").status, 404);
  EXPECT_EQ(signed_call(c, "PATCH", "/v1/jobs", "{}").status, 405);
  EXPECT_EQ(signed_call(c, "POST", "/v1/jobs", R"({"kind":1})").status, 400);
  // In milliseconds, and chunked.
  std::string ms = now_s() + "000";
  c.send("POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n" +
         signature("POST", "/v1/jobs", body, ms) +
         "Transfer-Encoding: chunked\r\n\r\n5\r\n" + body.substr(0, 5) +
         "\r\n7\r\n" + body.substr(5) + "\r\n0\r\n\r\n");
  EXPECT_EQ(c.reply().status, 201);
  EXPECT_EQ(local().get("/v1/jobs").json()["jobs"].size(), 2u);
}

TEST_F(GateTest, AWrongSignatureDoesNotBurnTheNonce) {
  options_.hmac_secret = "s3cret";
  start();
  Client c = tcp();
  std::string ts = now_s(), body = R"({"kind":"a"})";
  EXPECT_EQ(c.post("/v1/jobs", body,
                   signature("POST", "/v1/jobs", body, ts, "n", "wrong"))
                .status,
            401);
  EXPECT_EQ(c.post("/v1/jobs", body,
                   signature("POST", "/v1/jobs", body + " ", ts, "n"))
                .status,
            401);
  EXPECT_EQ(
      c.post("/v1/jobs", body, signature("POST", "/v1/jobs", body, ts, "n"))
          .status,
      201);
}

TEST_F(GateTest, TheTimeMayBeOffBothWaysByTheWindow) {
  options_.hmac_secret = "s3cret";
  options_.hmac_window_ms = 30'000;
  start();
  Client c = tcp();
  for (int off : {-60, -32, 33, 60, 86'400}) {
    EXPECT_EQ(c.call("GET", "/v1/jobs", "",
                     signature("GET", "/v1/jobs", "", now_s(off)))
                  .status,
              401)
        << off;
  }
  for (int off : {-27, 0, 29}) {
    EXPECT_EQ(c.call("GET", "/v1/jobs", "",
                     signature("GET", "/v1/jobs", "", now_s(off)))
                  .status,
              200)
        << off;
  }
}

// One answer for every cause: but for its date and id the same bytes.
TEST_F(GateTest, NoCauseOfA401IsTold) {
  options_.hmac_secret = "s3cret";
  options_.api_token = "t0ken";
  start();
  Client c = tcp();
  const std::string good = signature("GET", "/v1/jobs", "", "", "used");
  EXPECT_EQ(c.call("GET", "/v1/jobs", "", good).status, 200);
  auto sign = [&](const std::string& ts, const std::string& nonce) {
    return signature("GET", "/v1/jobs", "", ts, nonce);
  };
  auto raw = [&](const std::string& headers) {
    Reply r = c.call("GET", "/v1/jobs", "", "X-Request-Id: id\r\n" + headers);
    EXPECT_EQ(r.status, 401) << headers;
    r.headers.erase("date");
    std::string all = r.body;
    for (const auto& [name, value] : r.headers) all += name + ":" + value + ";";
    return all;
  };
  std::string first = raw("");
  EXPECT_NE(first.find("www-authenticate:Bearer, Machina-HMAC-SHA256"),
            first.npos);
  for (const std::string& headers :
       {std::string("Authorization: Bearer wrong\r\n"),
        std::string("Authorization: Basic dDA6\r\n"), good,
        sign(now_s(-100), "a1"), sign(now_s(100), "a2"), sign("abc", "a3"),
        sign("", "bad nonce"), sign(now_s(), std::string(200, 'x')),
        signature("GET", "/v1/job", "", "", "a4"),
        signature("GET", "/v1/jobs", "", "", "a5", "other"),
        std::string("X-Machina-Ts: ") + now_s() + "\r\n",
        std::string("X-Machina-Nonce: n\r\n"),
        std::string("X-Machina-Signature: v1=00\r\n"),
        // Each credential that is sent must be right.
        "Authorization: Bearer wrong\r\n" + sign("", "a6"),
        "Authorization: Bearer t0ken\r\n" + sign(now_s(-100), "a7")}) {
    EXPECT_EQ(raw(headers), first) << headers;
  }
  EXPECT_EQ(
      c.call("GET", "/v1/jobs", "", "Authorization: Bearer t0ken\r\n").status,
      200);
  std::string metrics = c.get("/metrics").body;
  EXPECT_NE(metrics.find("machina_http_unauthorized_total 16"), metrics.npos)
      << metrics.substr(metrics.find("machina_http_unau"), 60);
}

TEST_F(GateTest, BothCanBeAskedFor) {
  options_.hmac_secret = "s3cret";
  options_.api_token = "t0ken";
  options_.both_credentials = true;
  start();
  Client c = tcp();
  const std::string bearer = "Authorization: Bearer t0ken\r\n";
  EXPECT_EQ(c.call("GET", "/v1/jobs", "", bearer).status, 401);
  EXPECT_EQ(signed_call(c, "GET", "/v1/jobs").status, 401);
  EXPECT_EQ(
      c.call("GET", "/v1/jobs", "", bearer + signature("GET", "/v1/jobs", ""))
          .status,
      200);
}

// Nothing of a body that comes in pieces counts before its signature held.
TEST_F(GateTest, AStreamedBodyIsStagedUntilItsSignatureHolds) {
  options_.hmac_secret = "s3cret";
  start();
  Client l = local(), c = tcp();
  std::string token = leased_token(l);
  std::string path = "/v1/leases/" + token + "/artifacts/a.bin";
  std::string list = "/v1/jobs/" + last_job_ + "/artifacts";
  std::string bytes(3'000'000, 'x');
  EXPECT_EQ(c.call("PUT", path, bytes).status, 401);
  EXPECT_EQ(tcp()
                .call("PUT", path, bytes, signature("PUT", path, bytes + "x"))
                .status,
            401);
  EXPECT_EQ(l.get(list).json()["artifacts"].size(), 0u);
  std::string headers = signature("PUT", path, bytes);
  Client d = tcp();
  Reply r = d.call("PUT", path, bytes, headers);
  EXPECT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["size_bytes"], bytes.size());
  EXPECT_EQ(l.get(list).json()["artifacts"].size(), 1u);
  std::string other(2'000'000, 'y');
  EXPECT_EQ(d.call("PUT", path, other, headers).status, 401);
  EXPECT_EQ(d.call("PUT", path, bytes, headers).status, 401);
  EXPECT_EQ(l.get(list).json()["artifacts"][0]["size_bytes"], bytes.size());
  // What is wrong about the path is told only to whoever signed it.
  std::string bad = "/v1/leases/" + token + "/artifacts/.bad";
  EXPECT_EQ(d.call("PUT", bad, bytes).status, 401);
  EXPECT_EQ(d.call("PUT", bad, bytes, signature("PUT", bad, "")).status, 401);
  EXPECT_EQ(signed_call(d, "PUT", bad, bytes).status, 400);
  EXPECT_EQ(
      signed_call(d, "POST", "/v1/leases/" + token + "/log?offset=0", "text")
          .status,
      200);
}

// Before it is known who sends, only so much is kept of what is sent; what is
// only announced costs nobody anything.
TEST_F(GateTest, F09_UnprovedBodiesCountByWhatCame) {
  options_.hmac_secret = "s3cret";
  options_.max_body_bytes = 4u << 20;
  start();
  const std::string head =
      "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX-Machina-Nonce: n\r\n"
      "Expect: 100-continue\r\nContent-Length: 4194304\r\n\r\n";
  std::vector<Client> announced;
  for (int i = 0; i < 40; ++i) {
    announced.push_back(tcp());
    announced.back().send(head);
    EXPECT_EQ(announced.back().reply().status, 100);
  }
  Client c = tcp();
  const std::string body = R"({"kind":"a"})";
  EXPECT_EQ(
      c.post("/v1/jobs", body, signature("POST", "/v1/jobs", body)).status,
      201);
  // 64 MiB that came are full, whoever sent them.
  const std::string most((4u << 20) - 1, 'x');
  int busy = 0;
  for (int i = 0; i < 17; ++i)
    announced[static_cast<std::size_t>(i)].send(most);
  for (int i = 0; i < 17; ++i) {
    Client& one = announced[static_cast<std::size_t>(i)];
    if (!one.more(i == 16 && busy == 0 ? 5000 : 50)) continue;
    Reply r = one.reply();
    EXPECT_EQ(r.status, 503);
    EXPECT_EQ(r.code(), "busy");
    EXPECT_EQ(r.headers["retry-after"], "1");
    ++busy;
  }
  EXPECT_EQ(busy, 1);
  // What comes whole with its head need not wait.
  EXPECT_EQ(
      c.post("/v1/jobs", body, signature("POST", "/v1/jobs", body)).status,
      201);
}

// One that asks and never reads costs only itself.
TEST_F(GateTest, AReaderThatDoesNotReadIsNotAskedOn) {
  start();
  Client deaf = tcp();
  std::string many;
  for (int i = 0; i < 2000; ++i) {
    many += "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
  }
  std::thread sender([&] { deaf.send(many); });
  Client c = tcp();
  for (int i = 0; i < 50; ++i) EXPECT_EQ(c.get("/health").status, 200);
  // Once it reads it gets all of them.
  int got = 0;
  while (got < 2000 && deaf.reply().status == 200) ++got;
  EXPECT_EQ(got, 2000);
  sender.join();
}

TEST_F(GateTest, ARestartForgetsNoNonce) {
  options_.hmac_secret = "s3cret";
  start();
  std::string headers = signature("GET", "/v1/jobs", "");
  EXPECT_EQ(tcp().call("GET", "/v1/jobs", "", headers).status, 200);
  stop();
  exited_ = false;
  start();
  Client c = tcp();
  EXPECT_EQ(c.call("GET", "/v1/jobs", "", headers).status, 401);
  EXPECT_EQ(signed_call(c, "GET", "/v1/jobs").status, 200);
}

TEST_F(GateTest, SixtyFirstRequestWaits) {
  options_.rpm = 60;
  start();
  Client c = tcp();
  int refused = 0;
  Millis began = system_clock().mono_ms();
  for (int i = 0; i < 61; ++i) {
    Reply r = c.get("/v1/jobs");
    EXPECT_EQ(r.headers["ratelimit-policy"], "\"requests\";q=60;w=60");
    EXPECT_EQ(r.headers["ratelimit"].substr(0, 13), "\"requests\";r=");
    if (r.status == 429) {
      ++refused;
      EXPECT_EQ(r.code(), "rate-limited");
      EXPECT_EQ(r.headers["retry-after"], "1");
      EXPECT_EQ(r.headers["ratelimit"].substr(0, 17), "\"requests\";r=0;t=");
    } else {
      EXPECT_EQ(r.status, 200);
    }
  }
  if (system_clock().mono_ms() - began < 1000) {
    EXPECT_EQ(refused, 1);
  }
  // Open routes, the socket and workers' verbs go on.
  EXPECT_EQ(c.get("/health").status, 200);
  EXPECT_EQ(c.get("/health").headers.count("ratelimit"), 0u);
  EXPECT_EQ(local().get("/v1/jobs").status, 200);
  Reply lease = c.post("/v1/leases", R"({"worker":"w","kinds":["x"]})");
  EXPECT_EQ(lease.status, 204);
  std::string metrics = c.get("/metrics").body;
  if (refused == 1) {
    EXPECT_NE(metrics.find("machina_http_rate_limited_total{limit=\"requests\"}"
                           " 1\n"),
              metrics.npos);
  }
}

TEST_F(GateTest, EachLimitCountsItsRoutes) {
  options_.rpm = 1000;
  options_.enqueue_rpm = 5;
  options_.run_sync_rpm = 1;
  start();
  Client c = tcp();
  Reply r = c.post("/v1/jobs", R"([{"kind":"a"},{"kind":"a"},{"kind":"a"}])");
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.headers["ratelimit-policy"],
            "\"requests\";q=1000;w=60, \"enqueue\";q=5;w=60");
  EXPECT_NE(r.headers["ratelimit"].find("\"enqueue\";r=2"), std::string::npos)
      << r.headers["ratelimit"];
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"a"})", "Prefer: wait=0\r\n").status,
            201);
  r = c.post("/enqueue", R"({"kind":"a"})");
  EXPECT_EQ(r.status, 200);
  r = c.post("/enqueue", R"({"kind":"a"})");
  EXPECT_EQ(r.status, 429);
  EXPECT_EQ(r.json()["ok"], false);
  EXPECT_EQ(c.get("/v1/jobs").status, 200);
}

TEST_F(GateTest, WaitingHasALimitOfItsOwn) {
  options_.run_sync_rpm = 1;
  start();
  Client c = tcp(), w = tcp();
  w.start("POST", "/v1/jobs", R"({"kind":"a"})", "Prefer: wait=1\r\n");
  w.reply();
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"a"})", "Prefer: wait=1\r\n").status,
            429);
  EXPECT_EQ(c.post("/run_sync", R"({"kind":"a"})").status, 429);
  EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"a"})").status, 201);
}

TEST_F(GateTest, GuessingIsSlowedDown) {
  options_.api_token = "t0ken";
  start();
  Client good = tcp();
  const std::string right = "Authorization: Bearer t0ken\r\n";
  EXPECT_EQ(good.call("GET", "/v1/jobs", "", right).status, 200);
  Client c = tcp();
  int limited = 0;
  for (int i = 0; i < 5000 && limited == 0; ++i) {
    int status = c.call("GET", "/v1/jobs", "",
                        "Authorization: Bearer " + std::to_string(i) + "\r\n")
                     .status;
    if (status == 429) ++limited;
  }
  EXPECT_EQ(limited, 1);
  // Not even the right one is looked at now, but where it was right before.
  Reply r = tcp().call("GET", "/v1/jobs", "", right);
  if (r.status != 200) {
    EXPECT_EQ(r.status, 429);
    EXPECT_EQ(r.headers["retry-after"], "1");
  }
  EXPECT_EQ(good.call("GET", "/v1/jobs", "", right).status, 200);
  EXPECT_EQ(c.get("/health").status, 200);
  EXPECT_EQ(c.get("/v1/jobs").status, 401);  // no credential is no guess
  for (int i = 0; i < 100; ++i) {
    usleep(100'000);
    if (tcp().call("GET", "/v1/jobs", "", right).status == 200) return;
  }
  FAIL() << "locked out for good";
}

TEST_F(GateTest, OneAddressCannotTakeAllConnections) {
  options_.connections_per_address = 3;
  start();
  Client a = tcp(), b = tcp(), c = tcp();
  EXPECT_EQ(a.get("/health").status, 200);
  EXPECT_EQ(b.get("/health").status, 200);
  EXPECT_EQ(c.get("/health").status, 200);
  Client d = tcp();
  Reply r = d.reply();
  EXPECT_EQ(r.status, 503);
  EXPECT_EQ(r.headers["retry-after"], "1");
  EXPECT_TRUE(d.at_end());
  EXPECT_EQ(local().get("/health").status, 200);
  a.shut();
  for (int i = 0; i < 100; ++i) {
    Client e = tcp();
    if (e.get("/health").status == 200) return;
    usleep(20'000);
  }
  FAIL() << "no room was made";
}

TEST_F(GateTest, TwoHundredSlowSocketsDoNotDelayOthers) {
  start();
  std::vector<Client> slow;
  for (int i = 0; i < 200; ++i) {
    slow.push_back(tcp());
    slow.back().send(i % 2 == 0 ? "GET /hea" : "POST /v1/jobs HTTP/1.1\r\nHo");
  }
  Client c = tcp();
  EXPECT_EQ(c.get("/health").status, 200);
  Millis best = 1000;
  for (int i = 0; i < 20; ++i) {
    Millis began = system_clock().mono_ms();
    EXPECT_EQ(c.get("/health").status, 200);
    best = std::min(best, system_clock().mono_ms() - began);
  }
  EXPECT_LT(best, 50);
}

}  // namespace
}  // namespace machina::test
