// Which kinds are served, and for how long that is believed (SK1).

#include "server/api/serving.h"

#include <gtest/gtest.h>

namespace machina::test {
namespace {

class Served : public testing::Test {
 protected:
  std::shared_ptr<Serving> ask(const std::string& worker, std::uint64_t peer,
                               Millis now) {
    LeaseCommand lease;
    lease.worker = worker;
    lease.kinds = {"tool.*"};
    return kinds_.asks(peer, lease, 1000, now);
  }
  // As after the server's next look: an answer is kept until then.
  bool serves(const std::string& kind, Millis now) {
    kinds_.look_again();
    return kinds_.serves(kind, now, [](const std::string&) { return false; });
  }
  ServedKinds kinds_;
};

TEST_F(Served, AKindIsServedUntilTheWorkerIsNotHeardOf) {
  EXPECT_FALSE(serves("tool.make", 0));
  ask("w", 1, 0);
  EXPECT_TRUE(serves("tool.make", 1000 + kServingMs));
  EXPECT_FALSE(serves("tool.make", 1001 + kServingMs));
  EXPECT_FALSE(serves("other", 0));
}

TEST_F(Served, AWorkerThatEndedServesNothing) {
  ask("w", 1, 0);
  kinds_.worker_ended("w");
  EXPECT_FALSE(serves("tool.make", 0));
}

TEST_F(Served, AConnectionThatIsGoneIsBelievedForLess) {
  const auto its = ask("w", 1, 0);
  ask("w", 2, 0);
  ServedKinds::connection_gone(*its, 1, 0);  // it asked on another one since
  EXPECT_TRUE(serves("tool.make", kServingGoneMs + 1));
  ServedKinds::connection_gone(*its, 2, 0);
  EXPECT_TRUE(serves("tool.make", kServingGoneMs));
  EXPECT_FALSE(serves("tool.make", kServingGoneMs + 1));
}

TEST_F(Served, AWorkerOnItsWayCounts) {
  EXPECT_TRUE(
      kinds_.serves("noop", 0, [](const std::string&) { return true; }));
}

}  // namespace
}  // namespace machina::test
