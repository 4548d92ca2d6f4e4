// workers/worker/sandbox_counts.h
//
// How many sandboxes were started, how long that took, and what they stopped.
// A worker counts, tells its pool in a line of facts, and begins again; the
// pool adds up and tells the server its sum since the pool began, so that a
// report that was lost or came twice changes nothing and a worker's end loses
// nothing.
//
// What is counted is what the kernel or the sandbox says of a step's end. A
// system call that the filter refused with an errno is not: nobody hears of it.

#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "queue/base/buckets.h"
#include "workers/sandbox/sandbox.h"

namespace machina {

struct SandboxCounts {
  // What a sandbox stopped: `what` of machina_sandbox_denied_total.
  static constexpr std::array<std::string_view, 7> kDenied = {
      "time", "memory", "pids", "disk", "output", "syscall", "isolation"};

  std::array<std::uint64_t, kBuckets + 1> starts{};  // by bucket
  std::uint64_t starts_us = 0;                       // their sum
  std::array<std::uint64_t, kDenied.size()> denied{};
  std::uint64_t log_dropped = 0;  // lines that workers could not say

  bool empty() const { return *this == SandboxCounts{}; }
  void add(const SandboxCounts& other);
  void started(std::uint64_t took_us);
  void ended(const sandbox::StepResult& step);
  // {"starts":[...],"starts_us":N,"denied":{...},"log_dropped":N}
  std::string json() const;
  // Code::invalid where it is anything else.
  static Result<SandboxCounts> parse(std::string_view json);
  bool operator==(const SandboxCounts&) const = default;
};

// A slot whose sandboxes are counted. take() is the counts since the last.
class CountedSlot final : public sandbox::Slot {
 public:
  explicit CountedSlot(sandbox::Slot& slot) : slot_(slot) {}
  Result<std::unique_ptr<sandbox::Session>> open(
      const sandbox::SessionSpec& spec) override;
  Result<int> connect_server() override { return slot_.connect_server(); }

  SandboxCounts take();
  void put_back(const SandboxCounts& counts);  // they could not be told
  void ended(const sandbox::StepResult& step);

 private:
  sandbox::Slot& slot_;
  std::mutex mutex_;
  SandboxCounts counts_;
};

}  // namespace machina
