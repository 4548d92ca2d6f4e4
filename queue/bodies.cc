#include "queue/bodies.h"

#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "queue/check.h"

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

BodyCache::BodyCache(std::size_t bytes_max) : bytes_max_(bytes_max) {
  // No entry is smaller than an empty body: the table is never over half full.
  std::size_t most = bytes_max / memory_of(EnqueueRecord{}) + 1;
  std::size_t slots = std::bit_ceil(2 * most);
  mask_ = slots - 1;
  slots_ = static_cast<Slot*>(std::calloc(slots, sizeof(Slot)));
  CHECK(slots_ != nullptr);
}

BodyCache::~BodyCache() {
  while (newest_ != nullptr) {
    Entry* entry = newest_;
    unlink(entry);
    delete entry;
  }
  std::free(slots_);
}

void BodyCache::put(Body body) {
  std::size_t bytes = memory_of(*body);
  if (bytes > bytes_max_) {
    take(body->id);  // what it was before is not what it is now
    return;
  }
  std::size_t hash = JobIdHash()(body->id);
  if (std::size_t old = slot_of(body->id, hash); slots_[old].entry != nullptr) {
    remove(old);
  }
  while (bytes_ + bytes > bytes_max_) {
    remove(slot_of(oldest_->body->id, oldest_->hash));
  }
  std::size_t slot = slot_of(body->id, hash);
  auto* entry = new Entry{std::move(body), bytes, hash, nullptr, nullptr};
  slots_[slot] = {hash, entry};
  link_newest(entry);
  bytes_ += bytes;
  ++size_;
}

Body BodyCache::get(const JobId& id) {
  Entry* entry = slots_[slot_of(id, JobIdHash()(id))].entry;
  if (entry == nullptr) return nullptr;
  if (entry != newest_) {
    unlink(entry);
    link_newest(entry);
  }
  return entry->body;
}

Body BodyCache::take(const JobId& id) {
  std::size_t slot = slot_of(id, JobIdHash()(id));
  return slots_[slot].entry == nullptr ? nullptr : remove(slot);
}

std::size_t BodyCache::slot_of(const JobId& id, std::size_t hash) const {
  std::size_t slot = hash & mask_;
  while (slots_[slot].entry != nullptr &&
         (slots_[slot].hash != hash || slots_[slot].entry->body->id != id)) {
    slot = (slot + 1) & mask_;
  }
  return slot;
}

// Closes the gap, so that no search ends before what it looks for.
void BodyCache::clear_slot(std::size_t gap) {
  std::size_t slot = gap;
  while (true) {
    slot = (slot + 1) & mask_;
    if (slots_[slot].entry == nullptr) break;
    std::size_t home = slots_[slot].hash & mask_;
    // It may move into the gap unless its home lies behind the gap.
    if (((slot - home) & mask_) >= ((slot - gap) & mask_)) {
      slots_[gap] = slots_[slot];
      gap = slot;
    }
  }
  slots_[gap] = {0, nullptr};
}

Body BodyCache::remove(std::size_t slot) {
  Entry* entry = slots_[slot].entry;
  clear_slot(slot);
  unlink(entry);
  bytes_ -= entry->bytes;
  --size_;
  Body body = std::move(entry->body);
  delete entry;
  return body;
}

void BodyCache::link_newest(Entry* entry) {
  entry->newer = nullptr;
  entry->older = newest_;
  (newest_ != nullptr ? newest_->newer : oldest_) = entry;
  newest_ = entry;
}

void BodyCache::unlink(Entry* entry) {
  (entry->newer != nullptr ? entry->newer->older : newest_) = entry->older;
  (entry->older != nullptr ? entry->older->newer : oldest_) = entry->newer;
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
