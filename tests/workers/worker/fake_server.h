// The workers' verbs of the server, over a Unix socket, in memory: as much of
// the protocol as a worker and a pool need to be tested against. It can go
// away and come back, refuse, cancel, and take a lease from its holder.

#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "queue/base/result.h"

namespace machina {

class FakeServer {
 public:
  struct Job {
    std::string kind, payload = "{}", sandbox;
    long timeout_ms = 0;
    std::string state = "ready";  // running succeeded failed cancelled dead
    int attempt = 0;
    std::string token;
    bool cancel = false;
    int releases = 0, completions = 0;
    nlohmann::json end;  // the body of the last complete or fail
    std::string log;
    std::map<std::string, std::string> artifacts;
    std::vector<std::string> progress;
    nlohmann::json input;  // of an unblock; null: none
  };

  explicit FakeServer(const std::string& path);
  ~FakeServer();

  const std::string& path() const { return path_; }
  // What a spawner would do.
  Result<int> connect() const;

  void add(const std::string& id, const std::string& kind,
           const std::string& payload = "{}", long timeout_ms = 0,
           const std::string& sandbox = "");
  Job job(const std::string& id);
  void stage(const std::string& id, const std::string& name,
             const std::string& bytes);  // an artifact
  // Waits for a state; false after the time.
  bool wait_state(const std::string& id, const std::string& state,
                  int ms = 20'000);
  bool wait(const std::function<bool()>& done, int ms = 20'000);
  void cancel(const std::string& id);
  // A job that waits for an answer runs again with it.
  void unblock(const std::string& id, const nlohmann::json& input);
  // As though its worker had died: the next lease is another attempt.
  void put_back(const std::string& id);
  // The lease ends here, and another holds it from now on.
  void steal(const std::string& id);
  void go_away();  // closes every connection, refuses new ones
  void come_back();

  // Of pools.
  void set_target(int target, bool drain = false);
  nlohmann::json workers();  // of the last sync
  std::vector<std::string> gone();
  std::vector<std::string> ended();
  int syncs();

  std::atomic<int> leases_max_seen{0};
  std::atomic<std::size_t> body_max_seen{0};  // bytes
  std::atomic<int> heartbeats{0}, lease_calls{0};
  std::atomic<long> lease_ms{30'000};
  std::atomic<int> answer_500{0};           // the next so many calls
  std::atomic<bool> gives_any_kind{false};  // whatever kinds were asked for

 private:
  struct Reply {
    int status = 200;
    std::string body;
  };
  void listen();
  void accept_loop(int fd);
  void serve(int fd);
  Reply answer(const std::string& method, const std::string& target,
               const std::string& body);
  Reply lease(const nlohmann::json& request,
              std::unique_lock<std::mutex>& lock);
  nlohmann::json grant(const nlohmann::json& request,
                       std::unique_lock<std::mutex>& lock);
  Reply heartbeat(const nlohmann::json& request,
                  std::unique_lock<std::mutex>& lock);
  Reply sync(const nlohmann::json& request, std::unique_lock<std::mutex>& lock);
  Reply read_job(const std::string& target);
  bool finish(const std::string& token, const nlohmann::json& body, bool fail);
  Job* holder(const std::string& token);
  void take_back(Job& job);

  const std::string path_;
  int listener_ = -1;
  std::thread accepting_;
  std::vector<std::thread> threads_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Job> jobs_;
  std::deque<std::string> ready_;
  std::map<std::string, std::string> by_token_;
  std::set<std::string> ended_tokens_;
  std::set<int> open_;
  bool away_ = false, quit_ = false;
  int next_token_ = 0;
  int target_ = 0, syncs_ = 0;
  bool drain_ = false;
  nlohmann::json workers_;
  std::vector<std::string> gone_, ended_;
};

}  // namespace machina
