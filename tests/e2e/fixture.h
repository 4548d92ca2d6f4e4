// tests/e2e/fixture.h
//
// A test per identity: as root where the test runs as root, and always as a
// user without privilege. Each test has its own product; at its end the server
// is asked to drain, must exit 0, and must leave nothing behind.

#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "tests/e2e/harness.h"

namespace machina::e2e {

class EndToEnd : public testing::TestWithParam<Who> {
 protected:
  void SetUp() override {
    if (as_root() && geteuid() != 0) {
      GTEST_SKIP() << "this half needs root; the other half ran as a user";
    }
    product_ = std::make_unique<Product>(GetParam());
  }
  void TearDown() override {
    if (!product_) return;
    if (product_->server() > 0) {
      EXPECT_EQ(product_->stop_server(), 0) << "a drain exits 0\n"
                                            << end_of(product_->log());
    }
    EXPECT_EQ(product_->leftovers(), std::vector<std::string>());
    if (HasFailure()) {
      GTEST_LOG_(INFO) << "the server's log ends:\n"
                       << end_of(product_->log()) << "\nthe pool's:\n"
                       << end_of(read_file(product_->root() + "/pool.log"));
    }
    product_.reset();
  }

  bool as_root() const { return GetParam() == Who::root; }
  // What a job in a sandbox must get here.
  std::string least_level() const { return as_root() ? "L3" : "L2"; }

  // Throw where the server does not come up: a test without one says nothing
  // more, and would say it slowly.
  void start(const Serve& serve = {}) {
    std::string why;
    if (!product_->start(serve, &why)) throw std::runtime_error(why);
  }
  // As in production: token, fsync, and no level below the one promised.
  void start_prod(int workers = 2,
                  const std::map<std::string, std::string>& env = {}) {
    Serve serve;
    serve.env = env;
    serve.profile = "prod";
    serve.workers = workers;
    serve.token = "e2e-token-of-prod";
    if (!as_root()) serve.env["MACHINA_SANDBOX_MIN_LEVEL"] = "L2";
    start(serve);
  }
  void restart() {
    std::string why;
    if (!product_->restart(&why)) throw std::runtime_error(why);
  }
  Product& p() { return *product_; }

  std::unique_ptr<Product> product_;
};

inline std::string identity(const testing::TestParamInfo<Who>& info) {
  return info.param == Who::root ? "AsRoot" : "AsUser";
}

#define MACHINA_BOTH(suite)                                                \
  INSTANTIATE_TEST_SUITE_P(, suite, testing::Values(Who::root, Who::user), \
                           identity)

}  // namespace machina::e2e
