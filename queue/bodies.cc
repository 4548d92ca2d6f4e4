#include "queue/bodies.h"

#include <chrono>
#include <cstring>
#include <utility>

namespace machina {

std::size_t JobIdHash::operator()(const JobId& id) const {
  // The low half of a UUIDv7 is chance; the high half keeps forged ids apart.
  std::uint64_t high = 0, low = 0;
  std::memcpy(&high, id.bytes.data(), 8);
  std::memcpy(&low, id.bytes.data() + 8, 8);
  return low ^ (high * 0x9e3779b97f4a7c15ull);
}

std::size_t memory_of(const EnqueueRecord& body) {
  const NewJob& job = body.job;
  std::size_t bytes = sizeof(EnqueueRecord) + 128;  // control block, index
  for (const std::string* text :
       {&job.kind, &job.queue, &job.tenant, &job.payload, &job.dedup_key,
        &job.sandbox, &job.traceparent, &job.request_id}) {
    if (text->capacity() > 15) bytes += text->capacity() + 1;
  }
  bytes += (job.depends_on.capacity() + body.unmet.capacity()) * sizeof(JobId);
  for (const auto& [key, value] : job.labels) {
    bytes += sizeof(job.labels[0]) + key.capacity() + value.capacity();
  }
  return bytes;
}

std::size_t memory_of(const EndRecord& end) {
  const Outcome& outcome = end.outcome;
  std::size_t bytes = sizeof(EndRecord) + 128 + outcome.message.capacity() +
                      outcome.result.capacity() + outcome.isolation.capacity() +
                      outcome.usage.capacity() +
                      outcome.side_effects.capacity();
  for (const std::string& name : outcome.artifacts) {
    bytes += sizeof(name) + name.capacity();
  }
  return bytes;
}

// --- cache ---

void BodyCache::put(Body body) {
  std::size_t bytes = memory_of(*body);
  if (auto old = index_.find(body->id); old != index_.end()) drop(old->second);
  if (bytes > bytes_max_) return;
  while (bytes_ + bytes > bytes_max_) drop(std::prev(order_.end()));
  JobId id = body->id;
  order_.push_front({std::move(body), bytes});
  index_[id] = order_.begin();
  bytes_ += bytes;
}

Body BodyCache::get(const JobId& id) {
  auto it = index_.find(id);
  if (it == index_.end()) return nullptr;
  order_.splice(order_.begin(), order_, it->second);
  return it->second->body;
}

Body BodyCache::take(const JobId& id) {
  auto it = index_.find(id);
  if (it == index_.end()) return nullptr;
  Body body = it->second->body;
  drop(it->second);
  return body;
}

void BodyCache::drop(Order::iterator entry) {
  bytes_ -= entry->bytes;
  index_.erase(entry->body->id);
  order_.erase(entry);
}

// --- reading the log ---

Result<Record> read_record(const Log& log, Place place, std::uint32_t bytes) {
  auto read = log.read(place, bytes);
  if (!read) return read.error();
  return decode(read->first, read->second);
}

Result<Body> read_body(const Log& log, const JobId& id, Place place,
                       std::uint32_t bytes) {
  auto record = read_record(log, place, bytes);
  if (!record) return record.error();
  if (auto* body = std::get_if<EnqueueRecord>(&record->body)) {
    if (body->id == id) {
      return Body(std::make_shared<EnqueueRecord>(std::move(*body)));
    }
  } else if (auto* end = std::get_if<EndRecord>(&record->body)) {
    for (EnqueueRecord& child : end->children) {
      if (child.id != id) continue;
      return Body(std::make_shared<EnqueueRecord>(std::move(child)));
    }
  }
  return Error{Code::corrupt, "body of " + to_string(id) + " at place " +
                                  std::to_string(place) +
                                  ": another record lies there"};
}

// --- store threads ---

StoreThreads::StoreThreads(int threads) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
}

StoreThreads::~StoreThreads() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    wake_ = nullptr;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void StoreThreads::on_wake(std::function<void()> wake) {
  std::lock_guard lock(mutex_);
  wake_ = std::move(wake);
}

bool StoreThreads::post(Task task) {
  {
    std::lock_guard lock(mutex_);
    if (tasks_.size() >= kStoreTasksMax) return false;
    tasks_.push_back(std::move(task));
  }
  ++outstanding_;
  work_.notify_one();
  return true;
}

std::size_t StoreThreads::run_done() {
  std::vector<Done> done;
  {
    std::lock_guard lock(mutex_);
    done.swap(done_);
  }
  outstanding_ -= done.size();
  for (Done& each : done) {
    if (each) each();
  }
  return done.size();
}

void StoreThreads::wait_done(int ms) {
  std::unique_lock lock(mutex_);
  back_.wait_for(lock, std::chrono::milliseconds(ms),
                 [this] { return !done_.empty(); });
}

void StoreThreads::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
    if (stop_) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    Done done = task();
    task = nullptr;
    lock.lock();
    done_.push_back(std::move(done));
    back_.notify_all();
    if (done_.size() > 1 || !wake_) continue;
    auto wake = wake_;
    lock.unlock();
    wake();
    lock.lock();
  }
}

}  // namespace machina
