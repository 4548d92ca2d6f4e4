#include "queue/shard/bodies.h"

#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "queue/base/check.h"

namespace machina {

std::size_t memory_of(const EnqueueRecord& body) {
  const NewJob& job = body.job;
  std::size_t bytes = sizeof(EnqueueRecord) + 128;  // control block, index
  for (const std::string* text :
       {&job.kind, &job.queue, &job.tenant, &job.payload, &job.dedup_key,
        &job.sandbox, &job.traceparent, &job.request_id,
        &job.concurrency_key}) {
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

namespace {

constexpr std::size_t kUnit = 8;
// The table has room for bodies of this size on average; of smaller ones fewer
// are kept than would fit.
constexpr std::size_t kBodyBytesLikely = 128;

std::uint32_t short_hash(const JobId& id) {
  return static_cast<std::uint32_t>(place_of(id));
}

}  // namespace

BodyCache::BodyCache(std::size_t bytes_max)
    : capacity_(bytes_max / kUnit * kUnit) {
  CHECK(capacity_ / kUnit < UINT32_MAX);
  std::size_t slots = std::bit_ceil(capacity_ / kBodyBytesLikely + 16);
  mask_ = slots - 1;
  slots_ = static_cast<Slot*>(std::calloc(slots, sizeof(Slot)));
  ring_ = static_cast<std::byte*>(std::calloc(1, capacity_ + sizeof(Head)));
  CHECK(slots_ != nullptr && ring_ != nullptr);
}

BodyCache::~BodyCache() {
  std::free(ring_);
  std::free(slots_);
}

void BodyCache::put(const JobId& id, std::span<const std::byte> record) {
  const std::uint32_t hash = short_hash(id);
  // What it was before is not what it is now.
  if (std::size_t old = slot_of(id, hash); slots_[old].at != 0) clear_slot(old);
  std::size_t room = (sizeof(Head) + record.size() + kUnit - 1) / kUnit * kUnit;
  if (!make_room(room)) return;
  const Head head{id, static_cast<std::uint32_t>(record.size()), hash};
  std::memcpy(ring_ + end_, &head, sizeof(head));
  std::memcpy(ring_ + end_ + sizeof(head), record.data(), record.size());
  slots_[slot_of(id, hash)] = {static_cast<std::uint32_t>(end_ / kUnit + 1),
                               hash};
  end_ += room;
  ++size_;
}

Body BodyCache::get(const JobId& id) const {
  return body_in(slots_[slot_of(id, short_hash(id))]);
}

Body BodyCache::take(const JobId& id) {
  std::size_t slot = slot_of(id, short_hash(id));
  Body body = body_in(slots_[slot]);
  if (body != nullptr) clear_slot(slot);
  return body;
}

BodyCache::Head BodyCache::head(std::size_t at) const {
  Head head;
  std::memcpy(&head, ring_ + at, sizeof(head));
  return head;
}

Body BodyCache::body_in(const Slot& slot) const {
  if (slot.at == 0) return nullptr;
  std::size_t at = (slot.at - 1) * kUnit;
  auto record =
      decode(RecordType::enqueue, {ring_ + at + sizeof(Head), head(at).bytes});
  CHECK(record);
  return std::make_shared<const EnqueueRecord>(
      std::move(std::get<EnqueueRecord>(record->body)));
}

std::size_t BodyCache::slot_of(const JobId& id, std::uint32_t hash) const {
  std::size_t slot = hash & mask_;
  while (slots_[slot].at != 0 &&
         (slots_[slot].hash != hash ||
          head((slots_[slot].at - 1) * kUnit).id != id)) {
    slot = (slot + 1) & mask_;
  }
  return slot;
}

// Closes the gap, so that no search ends before what it looks for.
void BodyCache::clear_slot(std::size_t gap) {
  std::size_t slot = gap;
  while (true) {
    slot = (slot + 1) & mask_;
    if (slots_[slot].at == 0) break;
    std::size_t home = slots_[slot].hash & mask_;
    // It may move into the gap unless its home lies behind the gap.
    if (((slot - home) & mask_) >= ((slot - gap) & mask_)) {
      slots_[gap] = slots_[slot];
      gap = slot;
    }
  }
  slots_[gap] = {0, 0};
  --size_;
}

// At end_. False: it will never fit.
bool BodyCache::make_room(std::size_t bytes) {
  if (bytes > capacity_) return false;
  // Half empty: ids lie in runs (place_of), and a search ends at a gap.
  while (size_ > mask_ / 2) drop_oldest();
  while (true) {
    if (wrapped_) {
      if (oldest_ - end_ >= bytes) return true;
      drop_oldest();
    } else {
      if (capacity_ - end_ >= bytes) return true;
      wrapped_ = true;
      wrap_ = std::exchange(end_, 0);
      if (oldest_ == wrap_) wrapped_ = false, oldest_ = 0;  // it was empty
    }
  }
}

void BodyCache::drop_oldest() {
  const Head old = head(oldest_);
  // Unless it was taken, or put again.
  const auto at = static_cast<std::uint32_t>(oldest_ / kUnit + 1);
  std::size_t slot = old.hash & mask_;
  while (slots_[slot].at != 0 && slots_[slot].at != at) {
    slot = (slot + 1) & mask_;
  }
  if (slots_[slot].at == at) clear_slot(slot);
  oldest_ += (sizeof(Head) + old.bytes + kUnit - 1) / kUnit * kUnit;
  if (wrapped_ && oldest_ == wrap_) {
    wrapped_ = false;
    oldest_ = 0;
  }
  // Bodies go one by one as others come: the next one's slot will be wanted.
  __builtin_prefetch(&slots_[head(oldest_).hash & mask_]);
}

// --- reading the log ---

Result<Record> read_record(const LogStore& log, Place place,
                           std::uint32_t bytes) {
  auto read = log.read(place, bytes);
  if (!read) return read.error();
  return decode(read->first, read->second);
}

Result<Body> read_body(const LogStore& log, const JobId& id, Place place,
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
