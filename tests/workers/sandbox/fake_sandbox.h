// A slot without a sandbox: built-in handlers run in a plain child, programs
// are what a test says they are. For what does not depend on isolation.

#pragma once

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "workers/kinds/kinds.h"
#include "workers/sandbox/launch.h"
#include "workers/sandbox/sandbox.h"

namespace machina {

struct FakeSandbox {
  // What Session::run answers.
  std::function<sandbox::StepResult(const sandbox::Step&,
                                    const sandbox::Watch&)>
      program = [](const auto&, const auto&) { return exited(0); };
  std::map<std::string, std::string> files;  // put and collect
  std::atomic<int> opened{0}, services{0};
  std::function<Result<int>()> connect;
  Error open_error{Code::io, ""};  // `what` not empty: open fails so

  static sandbox::StepResult exited(int code, const std::string& out = "") {
    sandbox::StepResult result;
    result.ended = sandbox::Ended::exited;
    result.exit_code = code;
    result.out = out;
    return result;
  }
};

class FakeSession : public sandbox::Session {
 public:
  explicit FakeSession(FakeSandbox& box) : box_(box) {}
  ~FakeSession() override { end_service(SIGKILL); }

  sandbox::StepResult run(const sandbox::Step& step,
                          const sandbox::Watch& watch) override {
    return box_.program(step, watch);
  }

  Result<int> start_service(const sandbox::Step& program) override {
    ++box_.services;
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
      return Error{Code::io, "socketpair"};
    }
    pid_ = fork();
    if (pid_ == 0) {
      close(pair[0]);
      if (const auto run = sandbox::find_builtin(program.builtin)) {
        _exit(run(pair[1], pair[1]));
      }
      dup2(pair[1], 0);
      dup2(pair[1], 1);
      std::vector<char*> argv;
      for (const std::string& word : program.argv) {
        argv.push_back(const_cast<char*>(word.c_str()));
      }
      argv.push_back(nullptr);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(pair[1]);
    return pair[0];
  }

  sandbox::StepResult wait_service(Millis) override {
    sandbox::StepResult result;
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    if (WIFSIGNALED(status)) {
      result.ended = sandbox::Ended::signalled;
      result.signal = WTERMSIG(status);
    } else {
      result.ended = sandbox::Ended::exited;
      result.exit_code = WEXITSTATUS(status);
    }
    return result;
  }

  Result<void> put(const std::string& path, std::string_view bytes) override {
    box_.files[path] = std::string(bytes);
    return {};
  }

  Result<std::string> collect(const std::string& path,
                              std::size_t max_bytes) override {
    const auto at = box_.files.find(path);
    if (at == box_.files.end()) return Error{Code::not_found, path};
    if (at->second.size() > max_bytes) return Error{Code::too_large, path};
    return at->second;
  }

 private:
  void end_service(int signal) {
    if (pid_ <= 0) return;
    kill(pid_, signal);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

  FakeSandbox& box_;
  int pid_ = -1;
};

class FakeSlot : public sandbox::Slot {
 public:
  explicit FakeSlot(FakeSandbox& box) : box_(box) {
    register_handlers(built_in_families());
  }
  Result<int> connect_server() override { return box_.connect(); }
  Result<std::unique_ptr<sandbox::Session>> open(
      const sandbox::SessionSpec&) override {
    if (!box_.open_error.what.empty()) return box_.open_error;
    ++box_.opened;
    return std::unique_ptr<sandbox::Session>(
        std::make_unique<FakeSession>(box_));
  }

 private:
  FakeSandbox& box_;
};

inline sandbox::Report fake_report(Level level) {
  sandbox::Report report;
  report.level = level;
  return report;
}

}  // namespace machina
