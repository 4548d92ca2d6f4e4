#include "tests/e2e/harness.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "tests/support/places.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

constexpr int kReadyMs = 20000;
constexpr unsigned kSlots = 100;  // uids that one product may take

int free_port() {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t n = sizeof a;
  int port = 0;
  if (bind(fd, reinterpret_cast<sockaddr*>(&a), n) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&a), &n) == 0) {
    port = ntohs(a.sin_port);
  }
  close(fd);
  return port;
}

std::vector<pid_t> all_pids() {
  std::vector<pid_t> pids;
  DIR* proc = opendir("/proc");
  if (proc == nullptr) return pids;
  while (dirent* e = readdir(proc)) {
    if (pid_t pid = std::atoi(e->d_name); pid > 0) pids.push_back(pid);
  }
  closedir(proc);
  return pids;
}

// State letter and parent of a process, from its stat line.
bool stat_of(pid_t pid, char* state) {
  std::string line = read_file("/proc/" + std::to_string(pid) + "/stat");
  std::size_t at = line.rfind(')');
  if (at == std::string::npos || at + 2 >= line.size()) return false;
  *state = line[at + 2];
  return true;
}

void split_head(const std::string& head, Answer& answer) {
  std::istringstream lines(head);
  std::string line;
  std::getline(lines, line);
  if (line.size() > 12) answer.status = std::atoi(line.c_str() + 9);
  while (std::getline(lines, line)) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::string name = line.substr(0, colon);
    for (char& c : name) c = static_cast<char>(std::tolower(c));
    std::size_t value = line.find_first_not_of(' ', colon + 1);
    answer.headers[name] = value == std::string::npos ? "" : line.substr(value);
  }
}

std::string unchunk(const std::string& bytes) {
  std::string out;
  for (std::size_t at = 0; at < bytes.size();) {
    std::size_t n = std::strtoul(bytes.c_str() + at, nullptr, 16);
    at = bytes.find("\r\n", at);
    if (n == 0 || at == std::string::npos) break;
    out += bytes.substr(at + 2, n);
    at += 2 + n + 2;
  }
  return out;
}

// Whether `bytes` holds a whole answer; `answer` is filled as far as known.
bool whole(const std::string& bytes, Answer& answer) {
  std::size_t end = bytes.find("\r\n\r\n");
  if (end == std::string::npos) return false;
  split_head(bytes.substr(0, end + 2), answer);
  if (answer.status == 100) return false;
  std::string body = bytes.substr(end + 4);
  auto te = answer.headers.find("transfer-encoding");
  if (te != answer.headers.end()) {
    answer.body = unchunk(body);
    return body.find("0\r\n\r\n") != std::string::npos;
  }
  answer.body = body;
  auto length = answer.headers.find("content-length");
  if (length == answer.headers.end()) {
    return answer.status == 204 || answer.status == 304;
  }
  return body.size() >= std::strtoul(length->second.c_str(), nullptr, 10);
}

}  // namespace

std::ostream& operator<<(std::ostream& out, Who who) {
  return out << (who == Who::root ? "root" : "user");
}

double now_ms() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) * 1e3 +
         static_cast<double>(t.tv_nsec) / 1e6;
}

void sleep_ms(int ms) { usleep(static_cast<useconds_t>(ms) * 1000); }

// Processes that were left to us (a killed server's pool) are buried, so that
// nobody takes a zombie for a living process. Our own children are reaped by
// whoever waits for them, and `known` names those.
void bury_strangers(const std::set<pid_t>& known) {
  for (;;) {
    siginfo_t info{};
    if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0) return;
    if (info.si_pid == 0 || known.count(info.si_pid) > 0) return;
    waitpid(info.si_pid, nullptr, WNOHANG);
  }
}

bool eventually(const std::function<bool()>& condition, int timeout_ms) {
  for (double end = now_ms() + timeout_ms;;) {
    if (condition()) return true;
    if (now_ms() > end) return false;
    sleep_ms(20);
  }
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

std::string end_of(const std::string& text, std::size_t bytes) {
  return text.size() <= bytes ? text : text.substr(text.size() - bytes);
}

bool is_final(const Json& job) {
  if (!job.is_object()) return false;
  std::string s = job.value("state", "");
  return s == "succeeded" || s == "failed" || s == "cancelled" || s == "dead";
}

Json Answer::json() const {
  return Json::parse(body, nullptr, /*allow_exceptions=*/false);
}

// A number below 1000 that no other product has now: its uids follow from it.
// It is held by a lock for as long as `*held` is open.
unsigned take_number(int* held) {
  const std::string dir =
      "/var/tmp/machina-e2e-numbers-" + std::to_string(geteuid());
  fs::create_directories(dir);
  for (unsigned n = 0; n < 1000; ++n) {
    const int fd = open((dir + "/" + std::to_string(n)).c_str(),
                        O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0) {
      *held = fd;
      return n;
    }
    if (fd >= 0) close(fd);
  }
  std::abort();  // somebody runs a thousand of these at once
}

Product::Product(Who who) : who_(who) {
  // What the server leaves to itself (the pool) becomes ours to reap.
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  char name[] = "/var/tmp/machina-e2e-XXXXXX";
  if (mkdtemp(name) == nullptr) std::abort();
  dir_ = name;
  root_ = dir_ + "/root";
  port_ = free_port();
  const unsigned mine = take_number(&number_);
  // One more than the slots: the uid below the first is the pool's.
  slot_uid_base_ = 300001 + mine * (kSlots + 1);
  uid_ = geteuid();
  if (who == Who::user && uid_ == 0) uid_ = 64000 + mine;
  fs::create_directories(root_ + "/repos");
  fs::create_directory(dir_ + "/home");
  // A copy, because a user may not be able to reach the build directory.
  binary_ = dir_ + "/machina";
  fs::copy_file(kBinary, binary_);
  chmod(binary_.c_str(), 0755);
  chmod(dir_.c_str(), 0755);
  chmod(root_.c_str(), 0700);
  for (const std::string& d : {dir_, root_, root_ + "/repos", dir_ + "/home"}) {
    if (chown(d.c_str(), uid_, uid_) != 0) std::abort();
  }
}

Product::~Product() {
  if (server_ > 0) {
    kill(server_, SIGKILL);
    reap(server_, 5000);
  }
  // Killing a parent may start another: until none is left.
  for (int i = 0; i < 100; ++i) {
    std::vector<pid_t> left = processes();
    if (left.empty()) break;
    for (pid_t pid : left) kill(pid, SIGKILL);
    bury_strangers(children_);
    sleep_ms(20);
  }
  for (const std::string& group : control_groups()) {
    for (int slot = 0; slot < 64; ++slot) {
      rmdir((group + "/slot-" + std::to_string(slot)).c_str());
    }
    rmdir(group.c_str());
  }
  std::error_code ignored;
  fs::remove_all(dir_, ignored);
  close(number_);
}

pid_t Product::spawn(const std::vector<std::string>& args,
                     const std::map<std::string, std::string>& env,
                     const std::string& out, const std::string& err) {
  std::map<std::string, std::string> all = {
      {"PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
      {"HOME", dir_ + "/home"},
      {"LANG", "C.UTF-8"}};
  // Under a sanitizer, its options are part of the build under test.
  for (const char* name : {"ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"}) {
    if (const char* value = std::getenv(name)) all[name] = value;
  }
  for (const auto& [name, value] : env) all[name] = value;
  std::vector<std::string> words;
  for (const auto& [name, value] : all) words.push_back(name + "=" + value);
  std::vector<char*> argv, envp;
  for (const auto& a : args) argv.push_back(const_cast<char*>(a.c_str()));
  for (auto& w : words) envp.push_back(w.data());
  argv.push_back(nullptr);
  envp.push_back(nullptr);

  int out_fd =
      open(out.c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
  int err_fd =
      open(err.c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
  pid_t pid = fork();
  if (pid == 0) {
    int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(out_fd, 1);
    dup2(err_fd, 2);
    if (uid_ != geteuid() && (setgroups(0, nullptr) != 0 || setgid(uid_) != 0 ||
                              setuid(uid_) != 0)) {
      _exit(126);
    }
    if (chdir(dir_.c_str()) != 0) _exit(126);
    // A test that is killed takes its server with it.
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    execve(argv[0], argv.data(), envp.data());
    _exit(127);
  }
  close(out_fd);
  close(err_fd);
  children_.insert(pid);
  return pid;
}

int Product::reap(pid_t pid, int timeout_ms) {
  int status = 0;
  if (!eventually([&] { return waitpid(pid, &status, WNOHANG) == pid; },
                  timeout_ms)) {
    return -1;
  }
  children_.erase(pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

bool Product::start(const Serve& serve, std::string* why) {
  if (&serve != &serve_) serve_ = serve;  // a restart: others may read it
  std::vector<std::string> args = {binary_,     "serve",
                                   "--root",    root_,
                                   "--port",    std::to_string(port_),
                                   "--profile", serve.profile,
                                   "--workers", std::to_string(serve.workers)};
  args.insert(args.end(), serve.args.begin(), serve.args.end());
  std::map<std::string, std::string> env = serve.env;
  if (!serve.token.empty()) env["MACHINA_API_TOKEN"] = serve.token;
  if (uid_ == 0 && !env.count("MACHINA_SLOT_UID_BASE")) {
    env["MACHINA_SLOT_UID_BASE"] = std::to_string(slot_uid_base_);
  }
  std::string out = dir_ + "/server.log";
  server_ = spawn(args, env, out, out);
  double end = now_ms() + kReadyMs;
  while (now_ms() < end) {
    if (get("/ready").status == 200) return true;
    int code = reap(server_, 0);
    if (code != -1) {
      server_ = 0;
      *why = "the server ended with " + std::to_string(code) + ": " +
             end_of(log());
      return false;
    }
    sleep_ms(5);
  }
  *why = "not ready in " + std::to_string(kReadyMs) +
         " ms: " + get("/ready").body + "\n" + end_of(log());
  return false;
}

void Product::kill_server() {
  kill(server_, SIGKILL);
  reap(server_, 5000);
  server_ = 0;
}

int Product::stop_server(int timeout_ms) {
  processes();  // to know later whose control groups are ours
  kill(server_, SIGTERM);
  return wait_server(timeout_ms);
}

int Product::wait_server(int timeout_ms) {
  int code = reap(server_, timeout_ms);
  if (code == -1) {
    kill(server_, SIGKILL);
    reap(server_, 5000);
  }
  server_ = 0;
  return code;
}

Ended Product::run(const std::vector<std::string>& args,
                   const std::map<std::string, std::string>& env,
                   int timeout_ms) {
  static int runs = 0;
  std::string base = dir_ + "/run" + std::to_string(++runs);
  std::vector<std::string> all = {binary_};
  all.insert(all.end(), args.begin(), args.end());
  pid_t pid = spawn(all, env, base + ".out", base + ".err");
  Ended ended;
  ended.code = reap(pid, timeout_ms);
  if (ended.code == -1) {
    kill(pid, SIGKILL);
    reap(pid, 5000);
  }
  ended.out = read_file(base + ".out");
  ended.err = read_file(base + ".err");
  return ended;
}

int Product::shell(const std::string& line) {
  pid_t pid = spawn({"/bin/sh", "-c", line}, {}, dir_ + "/shell.log",
                    dir_ + "/shell.log");
  return reap(pid, 60000);
}

bool Product::owns(pid_t pid) const {
  if (pid == getpid()) return false;
  std::string proc = "/proc/" + std::to_string(pid);
  char state = 0;
  if (!stat_of(pid, &state) || state == 'Z' || state == 'X') return false;
  struct stat st {};
  if (stat(proc.c_str(), &st) != 0) return false;
  if (geteuid() == 0) {
    if (who_ == Who::user && st.st_uid == uid_) return true;
    if (st.st_uid + 1 >= slot_uid_base_ &&
        st.st_uid < slot_uid_base_ + kSlots) {
      return true;
    }
  }
  return read_file(proc + "/cmdline").find(dir_) != std::string::npos ||
         read_file(proc + "/environ").find(dir_) != std::string::npos;
}

std::vector<pid_t> Product::processes() const {
  bury_strangers(children_);
  std::vector<pid_t> mine;
  for (pid_t pid : all_pids()) {
    if (owns(pid)) mine.push_back(pid);
  }
  seen_.insert(mine.begin(), mine.end());
  return mine;
}

std::vector<pid_t> Product::processes_with(const std::string& word) const {
  std::vector<pid_t> found;
  for (pid_t pid : processes()) {
    std::istringstream line(
        read_file("/proc/" + std::to_string(pid) + "/cmdline"));
    std::string argument;
    while (std::getline(line, argument, '\0')) {
      if (argument == word) {
        found.push_back(pid);
        break;
      }
    }
  }
  return found;
}

std::vector<pid_t> Product::worker_pids() {
  std::vector<pid_t> pids;
  Json workers = get("/v1/workers").json();
  if (!workers.is_object()) return pids;
  for (const Json& w : workers.value("workers", Json::array())) {
    if (pid_t pid = w.value("pid", 0); pid > 0) pids.push_back(pid);
  }
  return pids;
}

// A spawner's groups are named machina.<its pid>.
std::map<std::string, ino_t> Product::all_control_groups() {
  std::map<std::string, ino_t> found;
  std::error_code error;
  fs::recursive_directory_iterator at(
      "/sys/fs/cgroup", fs::directory_options::skip_permission_denied, error);
  for (; !error && at != fs::end(at); at.increment(error)) {
    struct stat st {};
    if (at->path().filename().string().rfind("machina.", 0) == 0 &&
        stat(at->path().c_str(), &st) == 0) {
      found[at->path()] = st.st_ino;
    }
  }
  return found;
}

std::vector<std::string> Product::control_groups() const {
  std::vector<std::string> found;
  for (const auto& [path, inode] : all_control_groups()) {
    const std::string name = fs::path(path).filename();
    const auto before = groups_before_.find(path);
    const pid_t pid = std::atoi(name.c_str() + 8);
    // Its number may have been given again, to a spawner of another product.
    if (kill(pid, 0) == 0 && !owns(pid)) continue;
    if (seen_.count(pid) > 0 &&
        (before == groups_before_.end() || before->second != inode)) {
      found.push_back(path);
    }
  }
  return found;
}

std::vector<std::string> Product::leftovers(int within_ms) const {
  std::vector<std::string> left;
  auto look = [&] {
    left.clear();
    for (pid_t pid : processes()) {
      std::string line = read_file("/proc/" + std::to_string(pid) + "/cmdline");
      std::replace(line.begin(), line.end(), '\0', ' ');
      left.push_back("process " + std::to_string(pid) + ": " + line);
    }
    std::istringstream mounts(read_file("/proc/self/mountinfo"));
    for (std::string line; std::getline(mounts, line);) {
      if (line.find(dir_) != std::string::npos) left.push_back("mount " + line);
    }
    for (const std::string& group : control_groups()) {
      left.push_back("control group " + group);
    }
    return left.empty();
  };
  eventually(look, within_ms);
  return left;
}

Answer Product::raw(const std::string& bytes) {
  Answer answer;
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_port = htons(static_cast<std::uint16_t>(port_));
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  timeval limit{330, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  if (connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) != 0) {
    close(fd);
    return answer;
  }
  for (std::size_t at = 0; at < bytes.size();) {
    ssize_t n = send(fd, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (n <= 0) break;  // the server may answer before it has read all
    at += static_cast<std::size_t>(n);
  }
  std::string got;
  char buffer[65536];
  bool complete = false;
  while (!complete) {
    ssize_t n = recv(fd, buffer, sizeof buffer, 0);
    if (n <= 0) break;
    got.append(buffer, static_cast<std::size_t>(n));
    complete = whole(got, answer);
  }
  close(fd);
  // Half an answer is none: nobody may act on it.
  if (!complete && answer.headers.count("content-length")) return Answer{};
  return answer;
}

Answer Product::call(const std::string& method, const std::string& path,
                     const std::string& body,
                     const std::vector<std::string>& headers) {
  std::string bytes = method + " " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\n";
  bool typed = false, authorized = false;
  for (const auto& h : headers) {
    bytes += h + "\r\n";
    typed = typed || h.rfind("Content-Type:", 0) == 0;
    authorized = authorized || h.rfind("Authorization:", 0) == 0;
  }
  if (!typed && !body.empty()) bytes += "Content-Type: application/json\r\n";
  if (!authorized && !serve_.token.empty()) {
    bytes += "Authorization: Bearer " + serve_.token + "\r\n";
  }
  if (method != "GET") {
    bytes += "Content-Length: " + std::to_string(body.size()) + "\r\n";
  }
  return raw(bytes + "Connection: close\r\n\r\n" + body);
}

std::string Product::submit(const Json& job) {
  Answer a = post("/v1/jobs", job);
  if (a.status != 201) {
    throw std::runtime_error("submit: " + std::to_string(a.status) + " " +
                             a.body + "\nfor " + job.dump().substr(0, 400));
  }
  return a.json()["id"];
}

Json Product::job(const std::string& id) {
  Answer a = get("/v1/jobs/" + id);
  return a.status == 200 ? a.json() : Json();
}

Json Product::wait_until(const std::string& id,
                         const std::function<bool(const Json&)>& until,
                         int timeout_ms) {
  Json seen;
  eventually(
      [&] {
        bury_strangers(children_);
        Json now = job(id);
        if (now.is_object()) seen = now;
        return seen.is_object() && until(seen);
      },
      timeout_ms);
  return seen;
}

Json Product::wait_state(const std::string& id, const std::string& state,
                         int timeout_ms) {
  Json seen = wait_until(
      id,
      [&](const Json& j) {
        return j.value("state", "") == state || is_final(j);
      },
      timeout_ms);
  EXPECT_EQ(seen.is_object() ? seen.value("state", "") : "unknown", state)
      << seen.dump(1).substr(0, 3000) << "\n"
      << end_of(log());
  return seen;
}

Json Product::wait_end(const std::string& id, int timeout_ms) {
  Json seen = wait_until(id, is_final, timeout_ms);
  EXPECT_TRUE(is_final(seen)) << "not ended in " << timeout_ms
                              << " ms: " << seen.dump(1).substr(0, 3000) << "\n"
                              << end_of(log());
  return seen;
}

std::string Product::log() const { return read_file(dir_ + "/server.log"); }

}  // namespace machina::e2e
