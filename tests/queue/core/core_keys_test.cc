// Concurrency keys: at most `limit` jobs of a key run at a time, the others
// stay ready, in order, in nobody's way, and start as soon as a slot is free.

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "core_harness.h"

namespace machina {
namespace {

NewJob keyed(std::string key = "k", int limit = 1, std::string kind = "noop") {
  NewJob j = CoreHarness::job(std::move(kind));
  j.concurrency_key = std::move(key);
  j.concurrency_limit = static_cast<std::uint16_t>(limit);
  return j;
}

bool held(const CoreHarness& h, JobId id) {
  auto look = h.core.look(id);
  return look && look->view.state == State::ready &&
         look->view.waiting_for_concurrency;
}

std::vector<JobId> ids_of(const std::vector<GrantAnswer>& grants) {
  std::vector<JobId> ids;
  for (const GrantAnswer& g : grants) ids.push_back(g.id);
  return ids;
}

// A parked call of a worker; its number is `waiter`.
void park(CoreHarness& h, std::uint64_t waiter, LeaseCommand c) {
  c.waiter = waiter;
  Decision d = h.run(c);
  ASSERT_TRUE(d.park && d.grants.empty());
  h.core.park(c);
  h.core.check_invariants();
}

void park(CoreHarness& h, std::uint64_t waiter) {
  park(h, waiter, CoreHarness::lease_command("p" + std::to_string(waiter)));
}

TEST(CoreKeys, OneAtATimeAndNobodyElseWaits) {
  CoreHarness h;
  JobId a = h.add(keyed()), b = h.add(keyed()), c = h.add(keyed());
  JobId other = h.add(CoreHarness::job());
  EXPECT_FALSE(held(h, a) || held(h, b));  // none runs: what lacks is a worker
  auto grants = h.lease("w", 10);
  EXPECT_EQ(ids_of(grants), (std::vector{a, other}));
  EXPECT_TRUE(held(h, b) && held(h, c));
  EXPECT_FALSE(held(h, a) || held(h, other));
  EXPECT_TRUE(h.lease("w", 10).empty());
  h.complete(grants[0].fence);
  EXPECT_FALSE(held(h, b) || held(h, c));
  EXPECT_EQ(ids_of(h.lease("w", 10)), std::vector{b});
  EXPECT_TRUE(held(h, c));
}

TEST(CoreKeys, AsManyAsTheLimitSays) {
  CoreHarness h;
  std::vector<JobId> all;
  for (int i = 0; i < 7; ++i) all.push_back(h.add(keyed("k", 3)));
  auto grants = h.lease("w", 10);
  EXPECT_EQ(ids_of(grants), std::vector(all.begin(), all.begin() + 3));
  h.complete(grants[1].fence);
  EXPECT_EQ(ids_of(h.lease("w", 10)), std::vector{all[3]});
  h.complete(grants[0].fence);
  h.complete(grants[2].fence);
  EXPECT_EQ(ids_of(h.lease("w", 10)), (std::vector{all[4], all[5]}));
}

TEST(CoreKeys, ACompletionHandsTheNextToTheSameCall) {
  CoreHarness h;
  h.add(keyed());
  JobId b = h.add(keyed()), c = h.add(keyed());
  GrantAnswer first = h.lease_one();
  CompleteCommand done;
  done.items.push_back({first.fence, {}, {}});
  done.lease = CoreHarness::lease_command("w", 5);
  EXPECT_EQ(ids_of(h.run(done).grants), std::vector{b});
  EXPECT_TRUE(held(h, c));
}

TEST(CoreKeys, EveryEndOfALeaseFeedsAParkedCallInItsDecision) {
  auto feeds = [](const char* what, auto end, bool itself_first) {
    SCOPED_TRACE(what);
    CoreHarness h;
    h.options.lease_ms = 30'000;
    JobId a = h.add(keyed()), b = h.add(keyed());
    Fence fence = h.lease_one("dying").fence;
    park(h, 1);
    Decision d = end(h, fence);
    ASSERT_EQ(d.fed.size(), 1u);
    EXPECT_EQ(ids_of(d.fed[0].grants), std::vector{itself_first ? a : b});
    EXPECT_EQ(held(h, itself_first ? b : a),
              h.state(itself_first ? b : a) == State::ready);
  };
  auto fail = [](CoreHarness& h, Fence fence, Millis after) {
    FailCommand c;
    c.fence = fence;
    c.outcome.code = EndCode::exit;
    c.outcome.retry_after_ms = after;
    return h.run(c);
  };
  feeds(
      "complete",
      [](CoreHarness& h, Fence f) {
        CompleteCommand c;
        c.items.push_back({f, {}, {}});
        return h.run(c);
      },
      false);
  feeds(
      "retry later", [&](CoreHarness& h, Fence f) { return fail(h, f, 500); },
      false);
  // Those returned by an attempt go before those never leased.
  feeds(
      "retry at once", [&](CoreHarness& h, Fence f) { return fail(h, f, 0); },
      true);
  feeds(
      "release",
      [](CoreHarness& h, Fence f) { return h.run(ReleaseCommand{{f}}); }, true);
  feeds(
      "block",
      [](CoreHarness& h, Fence f) {
        return h.run(BlockCommand{f, "why", "{}", 0});
      },
      false);
  feeds(
      "worker gone",
      [](CoreHarness& h, Fence) { return h.run(GoneCommand{{"dying"}}); },
      true);
  feeds(
      "expiry",
      [](CoreHarness& h, Fence) {
        h.pass(40'000);
        return h.run(TickCommand{});
      },
      false);
}

TEST(CoreKeys, WhatDoesNotRunHoldsNoSlot) {
  CoreHarness h;
  JobId a = h.add(keyed()), b = h.add(keyed()), c = h.add(keyed());
  Decision blocked = h.run(BlockCommand{h.lease_one().fence, "why", "{}", 0});
  EXPECT_EQ(h.state(a), State::blocked);
  GrantAnswer second = h.lease_one();
  EXPECT_EQ(second.id, b);
  // Its input comes while b runs: it waits, and then goes first.
  h.run(UnblockCommand{a, blocked.items[0].detail, "{}", "me"});
  EXPECT_TRUE(held(h, a) && held(h, c));
  EXPECT_TRUE(h.lease().empty());
  h.fail(second.fence, EndCode::exit, true, 5'000);
  EXPECT_EQ(h.state(b), State::scheduled);
  GrantAnswer third = h.lease_one();
  EXPECT_EQ(third.id, a);
  // Its time comes while a runs.
  h.pass(6'000);
  h.settle();
  EXPECT_TRUE(held(h, b));
  h.complete(third.fence);
  EXPECT_EQ(h.lease_one().id, b);
}

TEST(CoreKeys, PriorityAndOrderHoldWithinAKey) {
  CoreHarness h;
  NewJob low = keyed(), high = keyed();
  low.priority = 1;
  high.priority = 9;
  GrantAnswer now = (h.add(keyed()), h.lease_one());
  JobId l1 = h.add(low), m1 = h.add(keyed()), h1 = h.add(high),
        h2 = h.add(high), l2 = h.add(low);
  std::vector<JobId> order;
  for (int i = 0; i < 5; ++i) {
    h.complete(now.fence);
    now = h.lease_one();
    order.push_back(now.id);
  }
  EXPECT_EQ(order, (std::vector{h1, h2, m1, l1, l2}));
}

TEST(CoreKeys, AHeldJobKeepsItsPlaceAmongTheOthers) {
  CoreHarness h;
  h.add(keyed());
  JobId b = h.add(keyed());
  JobId x = h.add(CoreHarness::job()), y = h.add(CoreHarness::job());
  GrantAnswer first = h.lease_one();
  EXPECT_EQ(h.lease_one().id, x);  // not behind b
  h.complete(first.fence);
  EXPECT_EQ(h.lease_one().id, b);  // which is older than y
  EXPECT_EQ(h.lease_one().id, y);
}

TEST(CoreKeys, EachJobsOwnLimitCountsAndNobodyOvertakesInALine) {
  CoreHarness h;
  JobId a = h.add(keyed("k", 2)), one = h.add(keyed("k", 1)),
        b = h.add(keyed("k", 2));
  auto grants = h.lease("w", 10);
  EXPECT_EQ(ids_of(grants), std::vector{a});
  EXPECT_TRUE(held(h, one) && held(h, b));  // b: behind one that waits
  h.complete(grants[0].fence);
  grants = h.lease("w", 10);
  // b may run beside `one`: its own limit is 2.
  EXPECT_EQ(ids_of(grants), (std::vector{one, b}));
}

TEST(CoreKeys, ANewJobDoesNotOvertakeInItsOwnDecision) {
  CoreHarness h;
  h.add(keyed("k", 2));
  h.lease_one();
  park(h, 1, CoreHarness::lease_command("p", 5));
  EnqueueCommand c;
  c.jobs = {keyed("k", 1), keyed("k", 2), keyed("x", 1), keyed("x", 1)};
  Decision d = h.run(c);
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(ids_of(d.fed[0].grants), std::vector{d.items[2].id});
  EXPECT_TRUE(held(h, d.items[0].id) && held(h, d.items[1].id));
  EXPECT_TRUE(held(h, d.items[3].id));
  // Nor what stands before it already.
  park(h, 2);
  c.jobs = {keyed("k", 2)};
  d = h.run(c);
  EXPECT_TRUE(d.fed.empty());
  EXPECT_TRUE(held(h, d.items[0].id));
}

TEST(CoreKeys, AFreeSlotGoesToWhateverMatches) {
  CoreHarness h;
  JobId x = h.add(keyed("k", 1, "x"));
  NewJob strong = keyed("k", 1, "y");
  strong.min_level = 3;
  JobId y = h.add(strong), z = h.add(keyed("k", 1, "z"));
  LeaseCommand only_z = CoreHarness::lease_command("wz");
  only_z.kinds = {"z"};
  // x and y are older, but nobody takes them: they hold no slot.
  Fence fence = h.run(only_z).grants.at(0).fence;
  EXPECT_TRUE(held(h, x) && held(h, y));
  LeaseCommand weak = CoreHarness::lease_command("weak");
  weak.kinds = {"y"};
  weak.level = 2;
  park(h, 1, weak);
  LeaseCommand mighty = weak;
  mighty.level = 3;
  park(h, 2, mighty);
  CompleteCommand done;
  done.items.push_back({fence, {}, {}});
  Decision d = h.run(done);
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(d.fed[0].waiter, 2u);
  EXPECT_EQ(ids_of(d.fed[0].grants), std::vector{y});
  EXPECT_TRUE(held(h, x));
  EXPECT_EQ(h.core.live(z), false);
}

TEST(CoreKeys, CancelWorksOnHeldAndOnRunningOnes) {
  CoreHarness h;
  JobId a = h.add(keyed()), b = h.add(keyed()), c = h.add(keyed());
  Fence fence = h.lease_one().fence;
  EXPECT_EQ(h.cancel(b).state, State::cancelled);
  EXPECT_FALSE(h.core.live(b));
  EXPECT_EQ(h.cancel(a).state, State::running);  // and keeps its slot
  EXPECT_TRUE(held(h, c));
  EXPECT_TRUE(h.lease().empty());
  h.fail(fence, EndCode::cancelled);
  EXPECT_EQ(h.lease_one().id, c);
}

TEST(CoreKeys, ACancelledFirstLetsTheNextGo) {
  CoreHarness h;
  h.add(keyed("k", 2));
  h.lease_one();
  JobId one = h.add(keyed("k", 1)), two = h.add(keyed("k", 2));
  park(h, 1);
  EXPECT_TRUE(held(h, two));
  h.cancel(one);
  auto ticks = h.settle();
  ASSERT_EQ(ticks.size(), 1u);
  ASSERT_EQ(ticks[0].fed.size(), 1u);
  EXPECT_EQ(ids_of(ticks[0].fed[0].grants), std::vector{two});
}

TEST(CoreKeys, DependentsChildrenAndRevivedJobsAreHeldToo) {
  CoreHarness h;
  JobId parent = h.add(CoreHarness::job("parent"));
  NewJob waits = keyed();
  waits.depends_on = {parent};
  JobId dependent = h.add(waits);
  JobId first = h.add(keyed());
  auto grants = h.lease("w", 10);
  ASSERT_EQ(ids_of(grants), (std::vector{parent, first}));
  h.complete(grants[0].fence, EndCode::none, {keyed()});
  JobId child = h.end_of(parent)->children.at(0).id;
  EXPECT_TRUE(held(h, dependent) && held(h, child));
  EnqueueRecord body = h.records<EnqueueRecord>().back();
  h.complete(grants[1].fence, EndCode::verdict);
  GrantAnswer next = h.lease_one();
  RetryCommand again{first, body, State::failed, 1};
  again.body->id = first;
  EXPECT_EQ(h.run(again).items.at(0).state, State::ready);
  EXPECT_TRUE(held(h, first));
  std::set<JobId> order{next.id};
  for (int i = 0; i < 2; ++i) {
    h.complete(next.fence);
    next = h.lease_one();
    order.insert(next.id);
  }
  EXPECT_EQ(order, (std::set{dependent, child, first}));
}

TEST(CoreKeys, ADuplicateOfAHeldJobIsThatJob) {
  CoreHarness h;
  h.add(keyed());
  h.lease_one();
  NewJob j = keyed();
  j.dedup_key = "d";
  JobId b = h.add(j);
  ItemAnswer again = h.add_item(j);
  EXPECT_EQ(again.answer, Answer::duplicate);
  EXPECT_EQ(again.id, b);
  EXPECT_TRUE(held(h, b));
}

TEST(CoreKeys, TenantsAndKindsHaveTheirOwn) {
  CoreHarness h;
  NewJob mine = keyed("repo:/a"), theirs = mine, of_kind = mine;
  theirs.tenant = "other";
  of_kind.kind_key = true;
  NewJob of_other_kind = of_kind;
  of_other_kind.kind = "other.kind";
  of_other_kind.tenant = "other";
  JobId a = h.add(mine), b = h.add(theirs), c = h.add(of_kind);
  JobId d = h.add(of_other_kind);  // a repository is one for all
  EXPECT_EQ(ids_of(h.lease("w", 10)), (std::vector{a, b, c}));
  EXPECT_TRUE(held(h, d));
}

TEST(CoreKeys, ARestartFindsThemAsTheyWere) {
  CoreHarness h;
  JobId a = h.add(keyed()), b = h.add(keyed()), c = h.add(keyed("x", 2));
  NewJob delayed = keyed();
  delayed.run_at_ms = h.now + 1000;
  h.add(delayed);
  GrantAnswer first = h.lease_one();
  ASSERT_EQ(first.id, a);
  std::vector<std::byte> image = h.image();
  Core again(h.options);
  ASSERT_TRUE(again.load(image));
  again.check_invariants();
  EXPECT_EQ(CoreHarness::image_of(again), image);
  EXPECT_TRUE(again.look(b)->view.waiting_for_concurrency);
  EXPECT_FALSE(again.look(c)->view.waiting_for_concurrency);
  again.set_epoch(2);
  Decision d = again.decide(h.now, 1, CoreHarness::lease_command("w", 10));
  EXPECT_EQ(ids_of(d.grants), std::vector{c});
}

TEST(CoreKeys, BoundsAreNamed) {
  CoreOptions o;
  o.concurrency_keys_max = 3;
  CoreHarness h(o);
  EnqueueCommand c;
  for (const char* key : {"a", "b", "a", "c", "d"})
    c.jobs.push_back(keyed(key));
  Decision d = h.run(c);
  EXPECT_EQ(d.items[3].answer, Answer::ok);
  EXPECT_EQ(d.items[4].answer, Answer::queue_full);
  EXPECT_NE(d.items[4].detail.find("concurrency_keys_max 3"),
            std::string::npos);
  EXPECT_EQ(h.add_item(keyed("e")).answer, Answer::queue_full);
  EXPECT_EQ(h.add_item(keyed("b")).answer, Answer::ok);
  for (const GrantAnswer& g : h.lease("w", 10)) h.complete(g.fence);
  EXPECT_EQ(h.add_item(keyed("e")).answer, Answer::ok);  // c's is free again

  EnqueueCommand wide;
  for (int i = 0; i < 70; ++i) {
    wide.jobs.push_back(keyed("b", 1, "kind" + std::to_string(i)));
  }
  d = h.run(wide);
  int ok = 0;
  for (const ItemAnswer& item : d.items) ok += item.answer == Answer::ok;
  EXPECT_EQ(ok, 63);  // and the one of kind noop
  EXPECT_NE(d.items[69].detail.find("at most 64"), std::string::npos);
  EXPECT_EQ(h.add_item(keyed("b", 1, "kind5")).answer, Answer::ok);
  EXPECT_EQ(h.add_item(keyed("b", 1, "kind69")).answer, Answer::queue_full);
}

TEST(CoreKeys, NothingIsLeftWhenTheLastJobOfAKeyHasEnded) {
  CoreHarness h;
  std::vector<std::byte> empty = h.image();
  for (int i = 0; i < 20; ++i) h.add(keyed("k" + std::to_string(i % 5), 2));
  for (int round = 0; round < 20 && h.core.live_jobs() > 0; ++round) {
    for (const GrantAnswer& g : h.lease("w", 10)) h.complete(g.fence);
  }
  EXPECT_EQ(h.core.live_jobs(), 0u);
  h.core.check_invariants();
  // Counters, and the names of a queue and a kind; no job, no key.
  EXPECT_LT(h.image().size(), empty.size() + 64);
}

// No step looks at those that are held: this would take minutes.
TEST(CoreKeys, FiftyThousandHeldJobsCostNothing) {
  CoreHarness h;
  h.checked = false;
  constexpr int kJobs = 50'000;
  EnqueueCommand c;
  for (int i = 0; i < 1000; ++i) c.jobs.push_back(keyed());
  for (int i = 0; i < kJobs / 1000; ++i) h.run(c);
  JobId other = h.add(CoreHarness::job("other"));
  GrantAnswer now = h.lease_one();
  EXPECT_EQ(h.lease_one().id, other);
  CompleteCommand done;
  done.lease = CoreHarness::lease_command("w", 256);
  for (int i = 0; i < kJobs - 1; ++i) {
    done.items.assign(1, {now.fence, {}, {}});
    Decision d = h.run(done);
    ASSERT_EQ(d.grants.size(), 1u);
    now = d.grants[0];
  }
  h.core.check_invariants();
}

// Bytes that a program wrote before there were keys.
std::vector<std::byte> from_hex(std::string_view hex) {
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(
        std::byte(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16)));
  }
  return bytes;
}

TEST(CoreKeys, AnImageOfTheVersionBeforeLoadsAndIsWrittenAnew) {
  std::vector<std::byte> image = from_hex(
      "4d4d4348434b50310980f8e8afcf66070200000000010000010764656661756c"
      "74010764656661756c7400000000040001610000016200000163000001640000"
      "0000000000000000000002019a7afd1e0078009ca8a164477d78010080406405"
      "80f8e8afcf66e807e0a71200000500050000019a7afd1e007000802d8a5e87af"
      "ea62008044640680f8e8afcf66e807e0a7120000050005000000000000000000"
      "0000000000000000000000000000000000000000000000000000000000000000"
      "0000000000000000000000000000000000000000000000000000000000040301"
      "9a7afd1e007400beeb8da1658eec67008024640180f8e8afcf66e807e0a71201"
      "000500051001019a7afd1e007400b3466f8a7b81a989010000000001000080f8"
      "e8afcf660402773104019a7afd1e007800bfc846100bfc1e42018028640400e8"
      "07e0a71200000500051100803c641063cbe1e459320dd7044c3cd7f43c661c00"
      "000000019a7afd1e007400b3466f8a7b81a98902802c640000e807e0a7120000"
      "050005000001019a7afd1e007800a474c66a4b98b030038030640390c6e9afcf"
      "66e807e0a7120000050005000000000195888057cb03864b7a683d806e3ef53a"
      "019a7afd1e007000802d8a5e87afea629609b3c192e1e50dc0c78db0cf66");
  Core core{CoreOptions{}};
  auto loaded = core.load(image);
  ASSERT_TRUE(loaded) << loaded.error().what;
  core.check_invariants();
  EXPECT_EQ(core.live_jobs(), 6u);
  // In today's format, which says the same.
  const std::vector<std::byte> anew = CoreHarness::image_of(core);
  Core again{CoreOptions{}};
  loaded = again.load(anew);
  ASSERT_TRUE(loaded) << loaded.error().what;
  again.check_invariants();
  EXPECT_EQ(again.live_jobs(), 6u);
  EXPECT_EQ(CoreHarness::image_of(again), anew);
}

TEST(CoreKeys, ARecordOfTheVersionBeforeReadsAndIsWrittenTheSame) {
  std::vector<std::byte> bytes = from_hex(
      "f6f9e8afcf66019a7afd1e007c008000000000000009ff0300070282f8e8afcf"
      "669e94eaafcf660ad00fc0cf240080f0b252c0cf2408746573742e72756e0171"
      "0461636d65077b2261223a317d02646b0b000000000000000c00000000000000"
      "0100000000000178008000000000000003010000000000017800800000000000"
      "000301016b0176027b7d027470037269640603");
  auto record = decode(RecordType::enqueue, bytes);
  ASSERT_TRUE(record) << record.error().what;
  const EnqueueRecord& r = std::get<EnqueueRecord>(record->body);
  EXPECT_EQ(r.job.kind, "test.run");
  EXPECT_EQ(r.job.request_id, "rid");
  EXPECT_EQ(r.attempt, 3);
  EXPECT_EQ(r.job.concurrency_key, "");
  EXPECT_EQ(r.job.concurrency_limit, 0);
  std::vector<std::byte> again;
  encode(*record, &again);
  EXPECT_EQ(again, bytes);
}

}  // namespace
}  // namespace machina
