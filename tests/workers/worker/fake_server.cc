#include "tests/workers/worker/fake_server.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "queue/base/check.h"
#include "queue/base/job.h"

namespace machina {

using nlohmann::json;
using std::chrono::milliseconds;

namespace {

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  return address;
}

}  // namespace

FakeServer::FakeServer(const std::string& path) : path_(path) { listen(); }

FakeServer::~FakeServer() {
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
  }
  go_away();
  for (auto& thread : threads_) thread.join();
}

void FakeServer::listen() {
  ::unlink(path_.c_str());
  listener_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const sockaddr_un address = address_of(path_);
  CHECK(::bind(listener_, reinterpret_cast<const sockaddr*>(&address),
               sizeof address) == 0);
  CHECK(::listen(listener_, 128) == 0);
  accepting_ = std::thread([this, fd = listener_] { accept_loop(fd); });
}

void FakeServer::accept_loop(int listener) {
  for (;;) {
    const int fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) return;
    std::lock_guard lock(mutex_);
    if (away_) {
      ::close(fd);
      continue;
    }
    open_.insert(fd);
    threads_.emplace_back([this, fd] { serve(fd); });
  }
}

void FakeServer::go_away() {
  {
    std::lock_guard lock(mutex_);
    away_ = true;
    for (const int fd : open_) ::shutdown(fd, SHUT_RDWR);
  }
  changed_.notify_all();
  if (listener_ < 0) return;
  ::shutdown(listener_, SHUT_RDWR);
  accepting_.join();
  ::close(listener_);
  ::unlink(path_.c_str());
  listener_ = -1;
}

void FakeServer::come_back() {
  {
    std::lock_guard lock(mutex_);
    away_ = false;
  }
  listen();
}

Result<int> FakeServer::connect() const {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const sockaddr_un address = address_of(path_);
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&address),
                sizeof address) == 0) {
    return fd;
  }
  ::close(fd);
  return Error{Code::unavailable, "refused"};
}

void FakeServer::serve(int fd) {
  std::string in;
  for (bool good = true; good;) {
    std::size_t head;
    while ((head = in.find("\r\n\r\n")) == std::string::npos) {
      char buffer[65536];
      const ssize_t n = ::recv(fd, buffer, sizeof buffer, 0);
      if (n <= 0) {
        good = false;
        break;
      }
      in.append(buffer, static_cast<std::size_t>(n));
    }
    if (!good) break;
    const std::string header = in.substr(0, head);
    std::size_t length = 0;
    const auto at = header.find("Content-Length: ");
    if (at != std::string::npos) length = std::stoul(header.substr(at + 16));
    while (in.size() < head + 4 + length) {
      char buffer[65536];
      const ssize_t n = ::recv(fd, buffer, sizeof buffer, 0);
      if (n <= 0) {
        good = false;
        break;
      }
      in.append(buffer, static_cast<std::size_t>(n));
    }
    if (!good) break;
    const std::string body = in.substr(head + 4, length);
    body_max_seen = std::max(body_max_seen.load(), body.size());
    in.erase(0, head + 4 + length);
    const auto space = header.find(' ');
    const std::string method = header.substr(0, space);
    const std::string target =
        header.substr(space + 1, header.find(' ', space + 1) - space - 1);
    const Reply reply = answer(method, target, body);
    std::string out = "HTTP/1.1 " + std::to_string(reply.status) + " X\r\n";
    if (reply.status != 204) {
      out += "Content-Type: application/json\r\nContent-Length: " +
             std::to_string(reply.body.size()) + "\r\n";
    }
    out += "\r\n" + reply.body;
    good = ::send(fd, out.data(), out.size(), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(out.size());
  }
  std::lock_guard lock(mutex_);
  open_.erase(fd);
  ::close(fd);
}

FakeServer::Reply FakeServer::answer(const std::string& method,
                                     const std::string& target,
                                     const std::string& body) {
  std::unique_lock lock(mutex_);
  if (answer_500 > 0) {
    --answer_500;
    return {500, "{}"};
  }
  const bool raw = method == "GET" ||
                   target.find("/log?") != std::string::npos ||
                   target.find("/artifacts/") != std::string::npos;
  json request = raw ? json() : json::parse(body, nullptr, false);
  if (request.is_discarded()) return {400, "{\"code\":\"json\"}"};
  if (target == "/v1/leases") {
    ++lease_calls;
    return lease(request, lock);
  }
  if (target == "/v1/leases/heartbeat") return heartbeat(request, lock);
  if (target.starts_with("/v1/pools/")) return sync(request, lock);
  if (target == "/v1/leases/complete") {
    json items = json::array();
    for (const auto& item : request["items"]) {
      const std::string token = item["token"];
      if (finish(token, item, false)) {
        items.push_back({{"token", token}, {"state", "succeeded"}});
      } else {
        items.push_back({{"token", token}, {"problem", {{"status", 409}}}});
      }
    }
    json leases = json::array();
    if (request.contains("lease")) leases = grant(request["lease"], lock);
    return {200, json{{"items", items}, {"leases", leases}}.dump()};
  }
  if (method == "GET") return read_job(target);
  // /v1/leases/{token}/verb
  const std::string rest = target.substr(std::strlen("/v1/leases/"));
  const std::string token = rest.substr(0, rest.find('/'));
  const std::string verb = rest.substr(rest.find('/') + 1);
  if (verb == "complete" || verb == "fail") {
    return {finish(token, request, verb == "fail") ? 200 : 409, "{}"};
  }
  Job* job = holder(token);
  if (job == nullptr) return {409, "{}"};
  if (verb == "release") {
    ++job->releases;
    --job->attempt;
    take_back(*job);
    return {200, "{}"};
  }
  if (verb == "block") {
    job->end = request;
    job->state = "blocked";
    by_token_.erase(token);
    ended_tokens_.insert(token);
    ++job->completions;
    changed_.notify_all();
    return {200, "{}"};
  }
  if (verb.starts_with("log?offset=")) {
    const std::size_t offset = std::stoul(verb.substr(11));
    if (offset > job->log.size()) return {409, "{}"};
    job->log.resize(std::max(job->log.size(), offset + body.size()));
    job->log.replace(offset, body.size(), body);
    return {200, "{}"};
  }
  if (method == "PUT" && verb.starts_with("artifacts/")) {
    job->artifacts[verb.substr(10)] = body;
    return {200, "{}"};
  }
  return {404, "{}"};
}

// /v1/jobs/{id}[/artifacts[/{name}]]
FakeServer::Reply FakeServer::read_job(const std::string& target) {
  const std::string rest = target.substr(std::strlen("/v1/jobs/"));
  const std::size_t slash = rest.find('/');
  const auto at = jobs_.find(rest.substr(0, slash));
  if (at == jobs_.end()) return {404, "{}"};
  const auto& artifacts = at->second.artifacts;
  if (slash == std::string::npos) {
    return {200, json{{"id", at->first}, {"tenant", "default"}}.dump()};
  }
  const std::string name = rest.substr(slash + 1);
  if (name == "artifacts") {
    json list = json::array();
    for (const auto& [its, bytes] : artifacts) {
      list.push_back({{"name", its}, {"size_bytes", bytes.size()}});
    }
    return {200, json{{"artifacts", list}}.dump()};
  }
  const auto found = artifacts.find(name.substr(std::strlen("artifacts/")));
  if (found == artifacts.end()) return {404, "{}"};
  return {200, found->second};
}

void FakeServer::stage(const std::string& id, const std::string& name,
                       const std::string& bytes) {
  std::lock_guard lock(mutex_);
  jobs_[id].artifacts[name] = bytes;
}

void FakeServer::unblock(const std::string& id, const json& input) {
  std::lock_guard lock(mutex_);
  Job& job = jobs_[id];
  job.input = input;
  job.state = "ready";
  job.completions = 0;
  --job.attempt;
  ready_.push_back(id);
  changed_.notify_all();
}

void FakeServer::put_back(const std::string& id) {
  std::lock_guard lock(mutex_);
  Job& job = jobs_[id];
  job.state = "ready";
  job.completions = 0;
  ready_.push_back(id);
  changed_.notify_all();
}

FakeServer::Job* FakeServer::holder(const std::string& token) {
  const auto at = by_token_.find(token);
  return at == by_token_.end() ? nullptr : &jobs_[at->second];
}

void FakeServer::take_back(Job& job) {
  const std::string id = by_token_[job.token];
  by_token_.erase(job.token);
  job.token.clear();
  job.state = "ready";
  ready_.push_back(id);
  changed_.notify_all();
}

bool FakeServer::finish(const std::string& token, const json& body, bool fail) {
  if (ended_tokens_.contains(token)) return !fail;
  Job* job = holder(token);
  if (job == nullptr) return false;
  job->end = body;
  ++job->completions;
  if (fail) {
    const std::string code = body["code"];
    if (code == "cancelled") {
      job->state = "cancelled";
    } else if (code == "invalid_payload") {
      job->state = "failed";
    } else if (body.value("retry", true) && job->attempt < 5) {
      take_back(*job);
      return true;
    } else {
      job->state = "dead";
    }
  } else {
    job->state =
        body.value("verdict", "pass") == "pass" ? "succeeded" : "failed";
  }
  by_token_.erase(token);
  ended_tokens_.insert(token);
  changed_.notify_all();
  return true;
}

json FakeServer::grant(const json& request,
                       std::unique_lock<std::mutex>& lock) {
  const auto deadline = std::chrono::steady_clock::now() +
                        milliseconds(request.value("wait_ms", 0));
  const int max = request.value("max", 1);
  leases_max_seen = std::max(leases_max_seen.load(), max);
  json leases = json::array();
  if (request.contains("holding")) {
    const std::string worker = request["worker"];
    std::vector<std::string> others;
    for (const auto& [token, id] : by_token_) others.push_back(token);
    // One worker at a time is tested with this: all leases are its own.
    for (const auto& token : others) {
      Job& job = jobs_[by_token_[token]];
      ++job.releases;
      --job.attempt;
      take_back(job);
    }
  }
  for (;;) {
    for (auto at = ready_.begin();
         at != ready_.end() && static_cast<int>(leases.size()) < max;) {
      Job& job = jobs_[*at];
      const bool wanted = std::any_of(
          request["kinds"].begin(), request["kinds"].end(), [&](const json& k) {
            return kind_matches(k.get<std::string>(), job.kind);
          });
      if (!wanted && !gives_any_kind) {
        ++at;
        continue;
      }
      char token[40];
      std::snprintf(token, sizeof token, "%016x-%016x", ++next_token_, 7);
      job.token = token;
      job.state = "running";
      ++job.attempt;
      by_token_[token] = *at;
      json view = {{"id", *at},
                   {"kind", job.kind},
                   {"tenant", "default"},
                   {"attempt", job.attempt},
                   {"payload", json::parse(job.payload, nullptr, false)}};
      if (job.timeout_ms > 0) view["timeout_ms"] = job.timeout_ms;
      if (!job.input.is_null()) view["input"] = job.input;
      if (!job.sandbox.empty()) view["sandbox"] = json::parse(job.sandbox);
      leases.push_back({{"token", token},
                        {"fence", std::string(token).substr(0, 16)},
                        {"lease_ms", lease_ms.load()},
                        {"job", view}});
      at = ready_.erase(at);
    }
    if (!leases.empty() || away_ || quit_) return leases;
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout) {
      return leases;
    }
  }
}

FakeServer::Reply FakeServer::lease(const json& request,
                                    std::unique_lock<std::mutex>& lock) {
  const json leases = grant(request, lock);
  if (leases.empty()) return {204, ""};
  return {200, json{{"leases", leases}}.dump()};
}

FakeServer::Reply FakeServer::heartbeat(const json& request,
                                        std::unique_lock<std::mutex>& lock) {
  ++heartbeats;
  for (const auto& item : request["items"]) {
    Job* job = holder(item["token"]);
    if (job != nullptr && item.contains("progress")) {
      job->progress.push_back(item["progress"]["message"]);
    }
  }
  changed_.notify_all();
  const auto deadline = std::chrono::steady_clock::now() +
                        milliseconds(request.value("wait_ms", 0));
  for (;;) {
    json items = json::array();
    bool news = away_ || quit_;
    for (const auto& item : request["items"]) {
      const std::string token = item["token"];
      json answer = {{"token", token}, {"cancel", false}};
      const Job* job = holder(token);
      if (job == nullptr) {
        answer["problem"] = {{"code", "stale-lease"}};
        news = true;
      } else if (job->cancel) {
        answer["cancel"] = true;
        news = true;
      }
      items.push_back(answer);
    }
    if (news ||
        changed_.wait_until(lock, deadline) == std::cv_status::timeout) {
      return {200, json{{"items", items}}.dump()};
    }
  }
}

FakeServer::Reply FakeServer::sync(const json& request,
                                   std::unique_lock<std::mutex>& lock) {
  ++syncs_;
  workers_ = request["workers"];
  const auto add = [&request](const char* member, auto* names) {
    if (!request.contains(member)) return;
    for (const auto& name : request[member]) {
      if (std::find(names->begin(), names->end(), name) == names->end()) {
        names->push_back(name);
      }
    }
  };
  add("gone", &gone_);
  add("ended", &ended_);
  changed_.notify_all();
  const int target = target_;
  const bool drain = drain_;
  const int serial = syncs_;
  changed_.wait_for(lock, milliseconds(request.value("wait_ms", 0)), [&] {
    return target_ != target || drain_ != drain || away_ || quit_ ||
           syncs_ != serial || static_cast<int>(workers_.size()) != target;
  });
  return {200, json{{"target", target_}, {"drain", drain_}}.dump()};
}

void FakeServer::add(const std::string& id, const std::string& kind,
                     const std::string& payload, long timeout_ms,
                     const std::string& sandbox) {
  std::lock_guard lock(mutex_);
  Job& job = jobs_[id];
  job.kind = kind;
  job.payload = payload;
  job.timeout_ms = timeout_ms;
  job.sandbox = sandbox;
  ready_.push_back(id);
  changed_.notify_all();
}

FakeServer::Job FakeServer::job(const std::string& id) {
  std::lock_guard lock(mutex_);
  return jobs_[id];
}

bool FakeServer::wait(const std::function<bool()>& done, int ms) {
  const auto deadline = std::chrono::steady_clock::now() + milliseconds(ms);
  while (!done()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return true;
}

bool FakeServer::wait_state(const std::string& id, const std::string& state,
                            int ms) {
  return wait([&] { return job(id).state == state; }, ms);
}

void FakeServer::cancel(const std::string& id) {
  std::lock_guard lock(mutex_);
  jobs_[id].cancel = true;
  changed_.notify_all();
}

void FakeServer::steal(const std::string& id) {
  std::lock_guard lock(mutex_);
  by_token_.erase(jobs_[id].token);
  jobs_[id].token = "somebody-else";
  changed_.notify_all();
}

void FakeServer::set_target(int target, bool drain) {
  std::lock_guard lock(mutex_);
  target_ = target;
  drain_ = drain;
  changed_.notify_all();
}

json FakeServer::workers() {
  std::lock_guard lock(mutex_);
  return workers_;
}

std::vector<std::string> FakeServer::gone() {
  std::lock_guard lock(mutex_);
  return gone_;
}

std::vector<std::string> FakeServer::ended() {
  std::lock_guard lock(mutex_);
  return ended_;
}

int FakeServer::syncs() {
  std::lock_guard lock(mutex_);
  return syncs_;
}

}  // namespace machina
