#include "queue/record/record.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace machina {
namespace {

JobId id_of(std::uint64_t n) { return make_job_id(1'700'000'000'000, n, n); }

EnqueueRecord full_enqueue(std::uint64_t n) {
  EnqueueRecord r;
  r.id = id_of(n);
  r.job.kind = "test.run";
  r.job.queue = "q-1";
  r.job.tenant = "acme";
  r.job.payload = R"({"a":[1,2,3]})";
  r.job.priority = 9;
  r.job.run_at_ms = 1'700'000'000'123;
  r.job.max_attempts = 1000;
  r.job.retry_min_ms = 0;
  r.job.retry_max_ms = 1LL << 40;
  r.job.timeout_ms = 5;
  r.job.keep_result_ms = 0;
  r.job.dedup_key = "key";
  r.job.dedup_ttl_ms = 77;
  r.job.payload_digest[0] = ~0ULL;
  r.job.payload_digest[1] = 1;
  r.job.depends_on = {id_of(n + 1), id_of(n + 2)};
  r.job.labels = {{"a", "b"}, {"c", ""}};
  r.job.min_level = 4;
  r.job.sandbox = R"({"profile":"strict"})";
  r.job.traceparent = "00-abc";
  r.job.request_id = "rid";
  r.state = State::waiting;
  r.unmet = {id_of(n + 2)};
  r.revived = static_cast<std::uint8_t>(State::dead);
  r.attempt = 65535;
  r.created_ms = 1'700'000'000'000;
  return r;
}

Outcome full_outcome() {
  Outcome o;
  o.code = EndCode::verdict;
  o.message = std::string("m\0n", 3);
  o.result = "{}";
  o.isolation = R"({"level":"L3"})";
  o.usage = R"({"cpu_ms":1})";
  o.side_effects = "[]";
  o.artifacts = {"junit.xml", ""};
  o.retry = false;
  o.retry_after_ms = 12;
  return o;
}

// One of each type with every member set, and one of each with none.
std::vector<Record> samples() {
  std::vector<Record> all;
  auto add = [&all](RecordBody body) {
    Record record;
    record.time_ms = 1'763'000'000'000 + static_cast<Millis>(all.size());
    record.body = std::move(body);
    all.push_back(std::move(record));
  };
  add(full_enqueue(1));
  add(GrantRecord{id_of(2), make_fence(7, 9), 3, 4, "worker-1"});
  add(GrantRecord{id_of(2), make_fence(7, 9), 3, 4, "worker-1", ~0ULL});
  EndRecord end{id_of(3),
                make_fence(7, 9),
                State::failed,
                3,
                1ULL << 60,
                0xffffffff,
                17,
                1,
                "w",
                full_outcome(),
                {full_enqueue(5), EnqueueRecord{}}};
  add(end);
  add(RetryRecord{id_of(4), ~0ULL, EndCode::upstream, 9, 1, "message"});
  add(ReleaseRecord{id_of(5), 1});
  add(BlockRecord{id_of(6), 2, "why", "{}", "token", 99});
  add(UnblockRecord{id_of(7), "{}", "me"});
  add(CancelRecord{id_of(8)});
  add(PromoteRecord{{id_of(1), id_of(2), id_of(3)}});
  add(ForgetRecord{1'763'000'000'000, 0xffffffff});
  add(ClockRecord{-3'600'000, 0xfedcba9876543210, 86'400'000});
  EnqueueRecord with_key = full_enqueue(8);
  with_key.job.concurrency_key = "customer 7";
  with_key.job.concurrency_limit = 3;
  add(with_key);
  with_key.job.kind_key = true;
  with_key.job.concurrency_limit = kConcurrencyLimitMax;
  add(with_key);
  add(EnqueueRecord{});
  add(GrantRecord{});
  add(EndRecord{});
  add(RetryRecord{});
  add(ReleaseRecord{});
  add(BlockRecord{});
  add(UnblockRecord{});
  add(CancelRecord{});
  add(PromoteRecord{});
  add(ForgetRecord{});
  add(ClockRecord{});
  return all;
}

std::vector<std::byte> bytes_of(const Record& record) {
  std::vector<std::byte> bytes;
  encode(record, &bytes);
  return bytes;
}

TEST(Record, EveryTypeComesBackAsItWas) {  // R1
  for (const Record& record : samples()) {
    std::vector<std::byte> bytes = bytes_of(record);
    Result<Record> back = decode(type_of(record), bytes);
    ASSERT_TRUE(back) << back.error().what;
    EXPECT_EQ(back->time_ms, record.time_ms);
    EXPECT_TRUE(back->body == record.body) << static_cast<int>(type_of(record));
  }
}

TEST(Record, EncodeAppends) {
  std::vector<std::byte> bytes(3, std::byte{42});
  encode(samples()[1], &bytes);
  EXPECT_EQ(bytes[2], std::byte{42});
  std::span<const std::byte> tail = std::span(bytes).subspan(3);
  EXPECT_TRUE(decode(RecordType::grant, tail));
}

TEST(Record, ASmallJobIsSmall) {
  Record record;
  record.time_ms = 1'763'000'000'000;
  EnqueueRecord r;
  r.id = id_of(1);
  r.job.kind = "noop";
  r.created_ms = record.time_ms;
  record.body = r;
  EXPECT_LE(bytes_of(record).size(), 100u);
}

TEST(Record, EveryTruncationAndExtensionIsRefused) {  // R2
  for (const Record& record : samples()) {
    std::vector<std::byte> bytes = bytes_of(record);
    for (std::size_t n = 0; n < bytes.size(); ++n) {
      Result<Record> cut = decode(type_of(record), std::span(bytes).first(n));
      ASSERT_FALSE(cut) << n;
      EXPECT_EQ(cut.error().code, Code::corrupt);
    }
    bytes.push_back(std::byte{0});
    EXPECT_FALSE(decode(type_of(record), bytes));
  }
}

TEST(Record, AnUnknownTypeIsNewer) {  // R3
  std::vector<std::byte> bytes(64);
  for (int type : {0, 13, 127, 128, 255}) {
    Result<Record> r = decode(static_cast<RecordType>(type), bytes);
    ASSERT_FALSE(r);
    EXPECT_EQ(r.error().code, Code::newer);
  }
}

TEST(Record, F20_ASessionMakesAGrantNewerAndIsNeverNought) {
  Record record;
  record.body = GrantRecord{id_of(2), 1, 1, 0, "w", 7};
  EXPECT_EQ(type_of(record), RecordType::session_grant);
  auto bytes = bytes_of(record);
  EXPECT_FALSE(decode(RecordType::grant, bytes));
  std::fill(bytes.end() - 8, bytes.end(), std::byte{0});
  EXPECT_FALSE(decode(RecordType::session_grant, bytes));
}

TEST(Record, ALengthIsNotBelieved) {
  // time 0, 16 bytes of id, then a reason's length of 2^63.
  std::vector<std::byte> bytes(1 + 16, std::byte{0});
  for (int i = 0; i < 9; ++i) bytes.push_back(std::byte{0x80});
  bytes.push_back(std::byte{1});
  EXPECT_FALSE(decode(RecordType::unblock, bytes));
  EXPECT_FALSE(decode(RecordType::promote, std::span(bytes).first(11)));
}

TEST(Record, ImpossibleEnumsAreRefused) {
  Record record;
  GrantRecord grant;
  grant.level = kLevelMax + 1;
  record.body = grant;
  EXPECT_FALSE(decode(RecordType::grant, bytes_of(record)));
  EndRecord end;
  end.state = State::running;
  record.body = end;
  EXPECT_FALSE(decode(RecordType::end, bytes_of(record)));
}

// R2: mutated and random bytes give a record or an error; where they give a
// record, that record's encoding is exactly those bytes.
TEST(Record, AnyBytesGiveARecordOrAnError) {
  std::mt19937_64 random(20261120);
  std::vector<Record> all = samples();
  int decoded = 0;
  auto check = [&decoded](RecordType type, std::span<const std::byte> bytes) {
    Result<Record> r = decode(type, bytes);
    if (!r) return;
    ++decoded;
    std::vector<std::byte> again = bytes_of(*r);
    ASSERT_EQ(again.size(), bytes.size());
    ASSERT_EQ(std::memcmp(again.data(), bytes.data(), bytes.size()), 0);
  };
  for (int round = 0; round < 60'000; ++round) {
    const Record& record = all[random() % all.size()];
    std::vector<std::byte> bytes = bytes_of(record);
    for (int hits = 1 + static_cast<int>(random() % 4); hits > 0; --hits) {
      bytes[random() % bytes.size()] = std::byte(random());
    }
    if (random() % 8 == 0) bytes.resize(random() % (bytes.size() + 1));
    check(type_of(record), bytes);
  }
  for (int round = 0; round < 60'000; ++round) {
    std::vector<std::byte> bytes(random() % 96);
    for (std::byte& b : bytes) {
      b = std::byte(random() % 3 == 0 ? random() : random() % 4);
    }
    check(static_cast<RecordType>(1 + random() % 10), bytes);
  }
  EXPECT_GT(decoded, 1000);  // the loop reaches past the errors
}

}  // namespace
}  // namespace machina
