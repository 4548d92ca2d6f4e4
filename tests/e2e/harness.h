// tests/e2e/harness.h
//
// The real product in a test: the built binary, its own root directory, its own
// port, as root or as a user without any privilege. Nothing is faked here; what
// a test sees is what an operator would see.
//
//   E1  One Product is one directory below /var/tmp. Whatever happens in the
//       test, its destructor ends every process that belongs to it, by pid, and
//       removes the directory.
//   E2  leftovers() names what a stop left behind: processes, mounts, control
//       groups. A clean stop leaves none.
//   E3  As `user`, the server and everything below it runs under a uid of its
//       own that nobody else has, with no group and no capability.

#pragma once

#include <sys/types.h>

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <set>
#include <string>
#include <vector>

namespace machina::e2e {

using Json = nlohmann::json;

enum class Who { root, user };
std::ostream& operator<<(std::ostream& out, Who who);

struct Answer {
  int status = 0;                              // 0: no answer came
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
  Json json() const;  // of the body; null where it is not JSON
};

struct Serve {
  std::string profile = "dev";
  int workers = 2;
  std::map<std::string, std::string> env;
  std::vector<std::string> args;
  std::string token;  // set: MACHINA_API_TOKEN, and sent with each request
};

// How a command line ended.
struct Ended {
  int code = -1;  // exit code; 128 + signal; -1: had to be killed
  std::string out, err;
};

class Product {
 public:
  explicit Product(Who who);
  ~Product();
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  // --- processes ---
  // Starts the server on the root and waits until it is ready. False, with the
  // log's end in `why`, where that takes over 20 s or the server ends.
  bool start(const Serve& serve, std::string* why);
  // The same settings, root and port again.
  bool restart(std::string* why) { return start(serve_, why); }
  pid_t server() const { return server_; }
  void kill_server();  // SIGKILL, and reaped
  // SIGTERM; the exit code, or -1 where it took longer and was killed.
  int stop_server(int timeout_ms = 15000);
  int wait_server(int timeout_ms = 15000);  // the same, without the signal
  // Runs the binary to its end with our identity and environment.
  Ended run(const std::vector<std::string>& args,
            const std::map<std::string, std::string>& env = {},
            int timeout_ms = 15000);
  // A shell line with our identity; its exit code.
  int shell(const std::string& line);
  // Processes that belong to this product: by the root in their command line or
  // environment, or by a uid of its own.
  std::vector<pid_t> processes() const;
  // Of those, the ones whose command line has `word` as an argument.
  std::vector<pid_t> processes_with(const std::string& word) const;
  // Workers as the server reports them: their pids.
  std::vector<pid_t> worker_pids();
  std::vector<std::string> leftovers(int within_ms = 5000) const;
  // Of spawners that processes() ever found.
  std::vector<std::string> control_groups() const;
  // Of any spawner of this host, by path; with them, which directory it is.
  static std::map<std::string, ino_t> all_control_groups();

  // --- HTTP, one connection a request ---
  Answer call(const std::string& method, const std::string& path,
              const std::string& body = "",
              const std::vector<std::string>& headers = {});
  Answer get(const std::string& path) { return call("GET", path); }
  Answer post(const std::string& path, const Json& body) {
    return call("POST", path, body.dump());
  }
  Answer raw(const std::string& bytes);  // exactly these bytes
  // Submits and gives the id; throws where the answer is not 201.
  std::string submit(const Json& job);
  Json job(const std::string& id);  // null where the answer is not 200
  // Polls until `until` holds; the last seen job either way.
  Json wait_until(const std::string& id,
                  const std::function<bool(const Json&)>& until,
                  int timeout_ms = 30000);
  Json wait_state(const std::string& id, const std::string& state,
                  int timeout_ms = 30000);
  Json wait_end(const std::string& id, int timeout_ms = 60000);

  // --- places ---
  const std::string& dir() const { return dir_; }
  const std::string& root() const { return root_; }
  int port() const { return port_; }
  uid_t uid() const { return uid_; }
  Who who() const { return who_; }
  std::string log() const;  // what the server has printed
  std::string url() const {
    return "http://127.0.0.1:" + std::to_string(port_);
  }

 private:
  pid_t spawn(const std::vector<std::string>& args,
              const std::map<std::string, std::string>& env,
              const std::string& out, const std::string& err);
  bool owns(pid_t pid) const;
  int reap(pid_t pid, int timeout_ms);  // exit code, or -1 in time

  Who who_;
  std::set<pid_t> children_;      // started here and not yet reaped
  mutable std::set<pid_t> seen_;  // all that processes() ever found
  // What others had left before: a number in a name may be given again.
  const std::map<std::string, ino_t> groups_before_ = all_control_groups();
  std::string dir_, root_, binary_;
  uid_t uid_ = 0;
  unsigned slot_uid_base_ = 0;
  int number_ = -1;  // the lock that keeps our uids ours
  int port_ = 0;
  pid_t server_ = 0;
  Serve serve_;
};

// Milliseconds, monotonic.
double now_ms();
void sleep_ms(int ms);
bool is_final(const Json& job);
// True as soon as `condition` holds, false when it did not in time.
bool eventually(const std::function<bool()>& condition, int timeout_ms);
std::string read_file(const std::string& path);
std::string end_of(const std::string& text, std::size_t bytes = 3000);

}  // namespace machina::e2e
