// tests/workers/worker/isolated_fixture.h
//
// Worker, kinds and the real sandbox together, against a server in memory. As
// whoever runs it: root or not.

#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "tests/workers/worker/fake_server.h"
#include "workers/kinds/kinds.h"
#include "workers/sandbox/sandbox.h"
#include "workers/worker/worker.h"

namespace machina {

class IsolatedTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/var/tmp/machina-isolated-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    root_ = name;
    repos_ = root_ + "/repos";
    std::filesystem::create_directories(repos_);
    register_handlers(built_in_families());
    sandbox::SpawnerOptions spawning;
    spawning.root = root_;
    spawning.repo_roots = {repos_};
    spawning.socket_path = root_ + "/machina.sock";
    mask_ = umask(077);  // as the pool does
    auto spawner = sandbox::Spawner::start(spawning);
    ASSERT_TRUE(spawner) << spawner.error().what;
    spawner_ = std::move(*spawner);
    auto channel = spawner_->open_slot(0);
    ASSERT_TRUE(channel);
    auto slot = sandbox::Slot::attach(*channel);
    ASSERT_TRUE(slot);
    slot_ = std::move(*slot);
    auto report = sandbox::run_canary(*slot_);
    ASSERT_TRUE(report) << report.error().what;
    level_ = report->level;
    server_ = std::make_unique<FakeServer>(spawning.socket_path);
    WorkerOptions options;
    options.name = "p-0-1";
    options.root = root_;
    options.repo_roots = {repos_};
    worker_ = std::make_unique<Worker>(options, *slot_, *report);
    thread_ = std::thread([this] { worker_->run(); });
  }
  void TearDown() override {
    umask(mask_);
    if (worker_) {
      worker_->release_now();
      thread_.join();
    }
    worker_.reset();
    slot_.reset();
    spawner_.reset();
    server_.reset();
    std::filesystem::remove_all(root_);
  }

  FakeServer::Job run(const std::string& kind, const nlohmann::json& payload,
                      long timeout_ms = 0, const std::string& sandbox = "") {
    const std::string id = "job" + std::to_string(++jobs_);
    server_->add(id, kind, payload.dump(), timeout_ms, sandbox);
    EXPECT_TRUE(server_->wait(
        [&] {
          const auto job = server_->job(id);
          return job.completions > 0;
        },
        240'000));
    return server_->job(id);
  }

  FakeServer::Job run_files(const std::map<std::string, std::string>& files,
                            nlohmann::json more = nlohmann::json::object(),
                            long timeout_ms = 0,
                            const std::string& sandbox = "") {
    more["files"] = files;
    return run("test.run", more, timeout_ms, sandbox);
  }

  static void sh(const std::string& command) {
    ASSERT_EQ(system(command.c_str()), 0) << command;
  }

  std::string root_, repos_;
  std::unique_ptr<sandbox::Spawner> spawner_;
  std::unique_ptr<sandbox::Slot> slot_;
  std::unique_ptr<FakeServer> server_;
  std::unique_ptr<Worker> worker_;
  std::thread thread_;
  Level level_ = 0;
  int jobs_ = 0;
  mode_t mask_ = 022;
};

}  // namespace machina
