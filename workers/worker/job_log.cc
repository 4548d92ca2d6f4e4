#include "workers/worker/job_log.h"

#include <algorithm>
#include <chrono>

#include "queue/base/utf8.h"

namespace machina {
namespace {

using std::chrono::milliseconds;

}  // namespace

JobLog::JobLog(HttpClient::Connect connect) : client_(std::move(connect)) {
  thread_ = std::thread([this] { loop(); });
}

JobLog::~JobLog() {
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
    client_.interrupt();
  }
  changed_.notify_all();
  thread_.join();
}

void JobLog::begin(const std::string& token, std::size_t cap) {
  std::lock_guard lock(mutex_);
  token_ = token;
  cap_ = cap;
  bytes_.clear();
  sent_ = lost_ = 0;
  refused_ = false;
}

void JobLog::append(std::string_view bytes) {
  std::lock_guard lock(mutex_);
  const std::size_t room = lost_ > 0 ? 0 : cap_ - std::min(cap_, bytes_.size());
  bytes_ += bytes.substr(0, room);
  if (bytes.size() > room) {
    // No part of a character at the cut, if it was not sent yet.
    const std::size_t all = bytes_.size() + bytes.size() - room;
    bytes_.resize(std::max(
        sent_, lost_ > 0 ? bytes_.size() : utf8_whole_end(bytes_).size()));
    lost_ += all - bytes_.size();
  }
  changed_.notify_all();
}

JobLog::Chunk JobLog::next_locked() const {
  return {"/v1/leases/" + token_ + "/log?offset=" + std::to_string(sent_),
          bytes_.substr(sent_, kPostBytesMax)};
}

void JobLog::loop() {
  std::unique_lock lock(mutex_);
  while (!quit_) {
    changed_.wait(lock, [this] {
      return quit_ || (!token_.empty() && !refused_ && sent_ < bytes_.size());
    });
    // What a short job writes is sent once, by finish().
    changed_.wait_for(lock, milliseconds(kEveryMs), [this] { return quit_; });
    if (quit_ || token_.empty() || refused_ || sent_ >= bytes_.size()) continue;
    const Chunk chunk = next_locked();
    const std::string token = token_;
    sending_ = true;
    lock.unlock();
    const auto reply = client_.send("POST", chunk.path, chunk.bytes,
                                    "application/octet-stream");
    lock.lock();
    sending_ = false;
    if (token == token_ && reply) {
      if (reply->status / 100 == 2) {
        sent_ += chunk.bytes.size();
      } else if (reply->status / 100 == 4 && reply->status != 429) {
        refused_ = true;
      }
    }
    changed_.notify_all();
  }
}

void JobLog::finish(HttpClient& client, Millis patience_ms) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !sending_; });
  if (lost_ > 0) {
    bytes_ +=
        "\n[... " + std::to_string(lost_) + " bytes are not in this log ...]\n";
    lost_ = 0;
  }
  const auto deadline =
      std::chrono::steady_clock::now() + milliseconds(patience_ms);
  while (!refused_ && sent_ < bytes_.size()) {
    const Chunk chunk = next_locked();
    const auto reply = client.send("POST", chunk.path, chunk.bytes,
                                   "application/octet-stream");
    if (reply && reply->status / 100 == 2) {
      sent_ += chunk.bytes.size();
      continue;
    }
    if (reply && reply->status / 100 == 4 && reply->status != 429) break;
    if (std::chrono::steady_clock::now() >= deadline) break;
    std::this_thread::sleep_for(milliseconds(100));
  }
  token_.clear();
  bytes_.clear();
}

}  // namespace machina
