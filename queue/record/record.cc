#include "queue/record/record.h"

#include <type_traits>
#include <utility>

#include "queue/base/codec.h"

namespace machina {
namespace {

// Which of an EnqueueRecord's rarely used members follow.
enum EnqueueFlag : std::uint64_t {
  kHasDedup = 1,
  kHasDigest = 2,
  kHasDependsOn = 4,
  kHasUnmet = 8,
  kHasLabels = 16,
  kHasSandbox = 32,
  kHasTraceparent = 64,
  kHasRequestId = 128,
  kIsRevived = 256,
  kHasKey = 512,        // unknown to the first programs
  kRunAtIsWall = 1024,  // "
};
constexpr std::uint64_t kEnqueueFlags = 2047;

// A revived job was failed, cancelled or dead.
constexpr std::uint8_t kRevivedMin = static_cast<std::uint8_t>(State::failed);

std::uint64_t enqueue_flags(const EnqueueRecord& r) {
  const NewJob& job = r.job;
  std::uint64_t flags = 0;
  if (!job.dedup_key.empty()) flags |= kHasDedup;
  if (job.payload_digest[0] || job.payload_digest[1]) flags |= kHasDigest;
  if (!job.depends_on.empty()) flags |= kHasDependsOn;
  if (!r.unmet.empty()) flags |= kHasUnmet;
  if (!job.labels.empty()) flags |= kHasLabels;
  if (!job.sandbox.empty()) flags |= kHasSandbox;
  if (!job.traceparent.empty()) flags |= kHasTraceparent;
  if (!job.request_id.empty()) flags |= kHasRequestId;
  if (r.revived || r.attempt) flags |= kIsRevived;
  if (!job.concurrency_key.empty()) flags |= kHasKey;
  if (job.run_at_is_wall) flags |= kRunAtIsWall;
  return flags;
}

void write(Writer& w, const EnqueueRecord& r) {
  const NewJob& job = r.job;
  std::uint64_t flags = enqueue_flags(r);
  w.id(r.id);
  w.number(flags);
  w.u8(static_cast<std::uint8_t>(r.state));
  w.u8(static_cast<std::uint8_t>(job.priority));
  w.u8(job.min_level);
  w.signed_number(r.created_ms);
  w.signed_number(job.run_at_ms);
  w.signed_number(job.max_attempts);
  w.signed_number(job.retry_min_ms);
  w.signed_number(job.retry_max_ms);
  w.signed_number(job.timeout_ms);
  w.signed_number(job.keep_result_ms);
  w.signed_number(job.dedup_ttl_ms);
  w.text(job.kind);
  w.text(job.queue);
  w.text(job.tenant);
  w.text(job.payload);
  if (flags & kHasDedup) w.text(job.dedup_key);
  if (flags & kHasDigest) {
    w.u64(job.payload_digest[0]);
    w.u64(job.payload_digest[1]);
  }
  if (flags & kHasDependsOn) w.ids(job.depends_on);
  if (flags & kHasUnmet) w.ids(r.unmet);
  if (flags & kHasLabels) {
    w.number(job.labels.size());
    for (const auto& [key, value] : job.labels) {
      w.text(key);
      w.text(value);
    }
  }
  if (flags & kHasSandbox) w.text(job.sandbox);
  if (flags & kHasTraceparent) w.text(job.traceparent);
  if (flags & kHasRequestId) w.text(job.request_id);
  if (flags & kIsRevived) {
    w.u8(r.revived);
    w.number(r.attempt);
  }
  if (flags & kHasKey) {
    w.u8(job.kind_key ? 1 : 0);
    w.number(job.concurrency_limit);
    w.text(job.concurrency_key);
  }
}

void write(Writer& w, const GrantRecord& r) {
  w.id(r.id);
  w.u64(r.fence);
  w.number(r.attempt);
  w.u8(r.level);
  w.text(r.worker);
  if (r.session != 0) w.u64(r.session);
}

void write(Writer& w, const Outcome& o) {
  w.u8(static_cast<std::uint8_t>(o.code));
  w.u8(o.retry ? 1 : 0);
  w.signed_number(o.retry_after_ms);
  w.text(o.message);
  w.text(o.result);
  w.text(o.isolation);
  w.text(o.usage);
  w.text(o.side_effects);
  w.number(o.artifacts.size());
  for (const std::string& artifact : o.artifacts) w.text(artifact);
}

void write(Writer& w, const EndRecord& r) {
  w.id(r.id);
  w.u64(r.fence);
  w.u8(static_cast<std::uint8_t>(r.state));
  w.u8(r.by_complete);
  w.number(r.attempt);
  w.number(r.body_place);
  w.number(r.body_bytes);
  w.signed_number(r.started_ms);
  w.text(r.worker);
  write(w, r.outcome);
  w.number(r.children.size());
  for (const EnqueueRecord& child : r.children) write(w, child);
}

void write(Writer& w, const RetryRecord& r) {
  w.id(r.id);
  w.u64(r.fence);
  w.u8(static_cast<std::uint8_t>(r.code));
  w.number(r.attempt);
  w.signed_number(r.run_at_ms);
  w.text(r.message);
}

void write(Writer& w, const ReleaseRecord& r) {
  w.id(r.id);
  w.u64(r.fence);
}

void write(Writer& w, const BlockRecord& r) {
  w.id(r.id);
  w.u64(r.fence);
  w.signed_number(r.deadline_ms);
  w.text(r.reason);
  w.text(r.data);
  w.text(r.token);
}

void write(Writer& w, const UnblockRecord& r) {
  w.id(r.id);
  w.text(r.input);
  w.text(r.actor);
}

void write(Writer& w, const CancelRecord& r) { w.id(r.id); }

void write(Writer& w, const PromoteRecord& r) { w.ids(r.ids); }

void write(Writer& w, const ForgetRecord& r) {
  w.signed_number(r.until_ms);
  w.number(r.count);
}

void write(Writer& w, const ClockRecord& r) {
  w.signed_number(r.offset_ms);
  w.u64(r.boot);
  w.signed_number(r.boot_ms);
}

EnqueueRecord read_enqueue(Reader& r) {
  EnqueueRecord record;
  NewJob& job = record.job;
  record.id = r.id();
  std::uint64_t flags = r.number_to(kEnqueueFlags);
  record.state =
      static_cast<State>(r.u8_below(static_cast<std::uint8_t>(State::running)));
  job.priority = r.u8_below(kPriorityMax + 1);
  job.min_level = r.u8_below(kLevelMax + 1);
  record.created_ms = r.signed_number();
  job.run_at_ms = r.signed_number();
  job.max_attempts = static_cast<int>(r.signed_int());
  job.retry_min_ms = r.signed_number();
  job.retry_max_ms = r.signed_number();
  job.timeout_ms = r.signed_number();
  job.keep_result_ms = r.signed_number();
  job.dedup_ttl_ms = r.signed_number();
  job.kind = r.text();
  job.queue = r.text();
  job.tenant = r.text();
  job.payload = r.text();
  job.run_at_is_wall = (flags & kRunAtIsWall) != 0;
  if (job.run_at_is_wall && job.run_at_ms <= 0) r.fail();
  if (flags & kHasDedup) {
    job.dedup_key = r.text();
    if (job.dedup_key.empty()) r.fail();
  }
  if (flags & kHasDigest) {
    job.payload_digest[0] = r.u64();
    job.payload_digest[1] = r.u64();
  }
  if (flags & kHasDependsOn) job.depends_on = r.ids();
  if (flags & kHasUnmet) record.unmet = r.ids();
  if (flags & kHasLabels) {
    std::uint64_t count = r.count_of(2);
    for (std::uint64_t i = 0; i < count && r.ok(); ++i) {
      std::string key = r.text();
      job.labels.emplace_back(std::move(key), r.text());
    }
  }
  if (flags & kHasSandbox) job.sandbox = r.text();
  if (flags & kHasTraceparent) job.traceparent = r.text();
  if (flags & kHasRequestId) job.request_id = r.text();
  if (flags & kIsRevived) {
    record.revived = r.u8_below(kStates);
    if (record.revived && record.revived < kRevivedMin) r.fail();
    record.attempt = static_cast<std::uint16_t>(r.number_to(0xffff));
  }
  if (flags & kHasKey) {
    job.kind_key = r.u8_below(2) != 0;
    job.concurrency_limit =
        static_cast<std::uint16_t>(r.number_to(kConcurrencyLimitMax));
    job.concurrency_key = r.text();
    if (job.concurrency_limit == 0) r.fail();
  }
  // A flag whose member is empty would make two encodings of one record.
  if (r.ok() && flags != enqueue_flags(record)) r.fail();
  return record;
}

GrantRecord read_grant(Reader& r, bool with_session) {
  GrantRecord record;
  record.id = r.id();
  record.fence = r.u64();
  record.attempt = static_cast<std::uint16_t>(r.number_to(0xffff));
  record.level = r.u8_below(kLevelMax + 1);
  record.worker = r.text();
  if (with_session) {
    record.session = r.u64();
    if (record.session == 0) r.fail();  // that would be a plain grant
  }
  return record;
}

Outcome read_outcome(Reader& r) {
  Outcome outcome;
  outcome.code = static_cast<EndCode>(r.u8_below(kEndCodes));
  outcome.retry = r.u8_below(2) != 0;
  outcome.retry_after_ms = r.signed_number();
  outcome.message = r.text();
  outcome.result = r.text();
  outcome.isolation = r.text();
  outcome.usage = r.text();
  outcome.side_effects = r.text();
  std::uint64_t count = r.count_of(1);
  for (std::uint64_t i = 0; i < count && r.ok(); ++i) {
    outcome.artifacts.push_back(r.text());
  }
  return outcome;
}

EndRecord read_end(Reader& r) {
  EndRecord record;
  record.id = r.id();
  record.fence = r.u64();
  record.state = static_cast<State>(r.u8_below(kStates));
  if (!is_final(record.state)) r.fail();
  record.by_complete = r.u8_below(2);
  record.attempt = static_cast<std::uint16_t>(r.number_to(0xffff));
  record.body_place = r.number();
  record.body_bytes = static_cast<std::uint32_t>(r.number_to(0xffffffff));
  record.started_ms = r.signed_number();
  record.worker = r.text();
  record.outcome = read_outcome(r);
  // The shortest child has 16 bytes of id and 17 of one-byte members.
  std::uint64_t count = r.count_of(33);
  for (std::uint64_t i = 0; i < count && r.ok(); ++i) {
    record.children.push_back(read_enqueue(r));
  }
  return record;
}

RetryRecord read_retry(Reader& r) {
  RetryRecord record;
  record.id = r.id();
  record.fence = r.u64();
  record.code = static_cast<EndCode>(r.u8_below(kEndCodes));
  record.attempt = static_cast<std::uint16_t>(r.number_to(0xffff));
  record.run_at_ms = r.signed_number();
  record.message = r.text();
  return record;
}

ReleaseRecord read_release(Reader& r) {
  ReleaseRecord record;
  record.id = r.id();
  record.fence = r.u64();
  return record;
}

BlockRecord read_block(Reader& r) {
  BlockRecord record;
  record.id = r.id();
  record.fence = r.u64();
  record.deadline_ms = r.signed_number();
  record.reason = r.text();
  record.data = r.text();
  record.token = r.text();
  return record;
}

UnblockRecord read_unblock(Reader& r) {
  UnblockRecord record;
  record.id = r.id();
  record.input = r.text();
  record.actor = r.text();
  return record;
}

ForgetRecord read_forget(Reader& r) {
  ForgetRecord record;
  record.until_ms = r.signed_number();
  record.count = static_cast<std::uint32_t>(r.number_to(0xffffffff));
  return record;
}

ClockRecord read_clock(Reader& r) {
  ClockRecord record;
  record.offset_ms = r.signed_number();
  record.boot = r.u64();
  record.boot_ms = r.signed_number();
  return record;
}

Error newer(RecordType type) {
  return Error{Code::newer,
               "record of unknown type " +
                   std::to_string(static_cast<int>(type)) +
                   ": it was written by a later version of this program"};
}

}  // namespace

// The variant's order is the numbering of the types, but for clock, its last,
// and session_grant, which is a GrantRecord too. A program before them calls
// both a later version's and not damaged.
static_assert(
    std::is_same_v<std::variant_alternative_t<0, RecordBody>, EnqueueRecord>);
static_assert(std::variant_size_v<RecordBody> ==
              static_cast<std::size_t>(RecordType::forget) + 1);

RecordType type_of(const Record& record) {
  if (std::holds_alternative<ClockRecord>(record.body)) {
    return RecordType::clock;
  }
  const auto* grant = std::get_if<GrantRecord>(&record.body);
  if (grant != nullptr && grant->session != 0) return RecordType::session_grant;
  return static_cast<RecordType>(record.body.index() + 1);
}

std::uint64_t features_of(const Record& record) {
  auto of_job = [](const EnqueueRecord& r) {
    return (r.job.concurrency_key.empty() ? 0 : kFeatureConcurrencyKeys) |
           (r.job.run_at_is_wall ? kFeatureClock : 0);
  };
  std::uint64_t features = 0;
  if (auto* job = std::get_if<EnqueueRecord>(&record.body)) {
    features = of_job(*job);
  } else if (auto* end = std::get_if<EndRecord>(&record.body)) {
    for (const EnqueueRecord& child : end->children) features |= of_job(child);
  } else if (std::holds_alternative<ClockRecord>(record.body)) {
    features = kFeatureClock;
  } else if (auto* grant = std::get_if<GrantRecord>(&record.body)) {
    if (grant->session != 0) features = kFeatureSessions;
  }
  return features;
}

void encode(const Record& record, std::vector<std::byte>* out) {
  Writer w(out);
  w.signed_number(record.time_ms);
  std::visit([&w](const auto& body) { write(w, body); }, record.body);
}

Result<Record> decode(RecordType type, std::span<const std::byte> bytes) {
  Reader r(bytes);
  Record record;
  record.time_ms = r.signed_number();
  switch (type) {
    case RecordType::enqueue:
      record.body = read_enqueue(r);
      break;
    case RecordType::grant:
      record.body = read_grant(r, false);
      break;
    case RecordType::end:
      record.body = read_end(r);
      break;
    case RecordType::retry:
      record.body = read_retry(r);
      break;
    case RecordType::release:
      record.body = read_release(r);
      break;
    case RecordType::block:
      record.body = read_block(r);
      break;
    case RecordType::unblock:
      record.body = read_unblock(r);
      break;
    case RecordType::cancel:
      record.body = CancelRecord{r.id()};
      break;
    case RecordType::promote:
      record.body = PromoteRecord{r.ids()};
      break;
    case RecordType::forget:
      record.body = read_forget(r);
      break;
    case RecordType::clock:
      record.body = read_clock(r);
      break;
    case RecordType::session_grant:
      record.body = read_grant(r, true);
      break;
    default:
      return newer(type);
  }
  if (!r.done()) {
    return Error{Code::corrupt,
                 "record of type " + std::to_string(static_cast<int>(type)) +
                     " with " + std::to_string(bytes.size()) +
                     " bytes is ill-formed at byte " + std::to_string(r.at())};
  }
  return record;
}

}  // namespace machina
