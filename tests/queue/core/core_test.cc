// Each promise of the core, by the hazard that it guards against.

#include "queue/core/core.h"

#include <set>

#include "core_harness.h"

namespace machina {
namespace {

// --- dedup ---

NewJob keyed(std::string key, Millis ttl = 1000) {
  NewJob j = CoreHarness::job();
  j.dedup_key = std::move(key);
  j.dedup_ttl_ms = ttl;
  j.payload_digest[0] = 7;
  return j;
}

RetryCommand retry_of(const CoreHarness& h, JobId id);
void reload(CoreHarness& h, Core* again);

TEST(CoreDedup, AHitIsTheFirstJobEvenAfterItEnded) {
  CoreHarness h;
  JobId id = h.add(keyed("k"));
  EXPECT_EQ(h.add_item(keyed("k")).answer, Answer::duplicate);
  h.complete(h.lease_one().fence);
  ItemAnswer again = h.add_item(keyed("k"));
  EXPECT_EQ(again.answer, Answer::duplicate);
  EXPECT_EQ(again.id, id);
  EXPECT_EQ(h.core.totals().duplicates, 2u);
}

TEST(CoreDedup, TheWindowEndsExactlyAtItsLength) {
  CoreHarness h;
  JobId first = h.add(keyed("k", 1000));
  h.pass(999);
  EXPECT_EQ(h.add_item(keyed("k")).answer, Answer::duplicate);
  h.pass(1);  // not forgotten yet, but over
  ItemAnswer fresh = h.add_item(keyed("k", 1000));
  EXPECT_EQ(fresh.answer, Answer::ok);
  EXPECT_NE(fresh.id, first);
  h.pass(999);  // the second window counts from the second commit
  EXPECT_EQ(h.add_item(keyed("k")).id, fresh.id);
}

TEST(CoreDedup, AHitDoesNotRenewTheWindow) {
  CoreHarness h;
  h.add(keyed("k", 1000));
  h.pass(900);
  h.add_item(keyed("k", 1000));
  h.pass(100);
  EXPECT_EQ(h.add_item(keyed("k")).answer, Answer::ok);
}

TEST(CoreDedup, AnotherPayloadOrKindIsAMismatch) {
  CoreHarness h;
  h.add(keyed("k"));
  NewJob other = keyed("k");
  other.payload_digest[1] = 1;
  EXPECT_EQ(h.add_item(other).answer, Answer::dedup_mismatch);
  other = keyed("k");
  other.kind = "other";
  EXPECT_EQ(h.add_item(other).answer, Answer::dedup_mismatch);
}

TEST(CoreDedup, QueuesAndTenantsDoNotShareKeys) {
  CoreHarness h;
  h.add(keyed("k"));
  NewJob other = keyed("k");
  other.queue = "other";
  EXPECT_EQ(h.add_item(other).answer, Answer::ok);
  other = keyed("k");
  other.tenant = "acme";
  EXPECT_EQ(h.add_item(other).answer, Answer::ok);
  // No key can be written so that it reads like another queue's.
  other = keyed("ult");
  other.queue = "defa";
  EXPECT_EQ(h.add_item(other).answer, Answer::ok);
}

TEST(CoreDedup, TwoInOneArrayAreOneJob) {
  CoreHarness h;
  EnqueueCommand c;
  c.jobs = {keyed("k"), keyed("k"), keyed("other")};
  Decision d = h.run(c);
  EXPECT_EQ(d.items[0].answer, Answer::ok);
  EXPECT_EQ(d.items[1].answer, Answer::duplicate);
  EXPECT_EQ(d.items[1].id, d.items[0].id);
  EXPECT_EQ(d.items[2].answer, Answer::ok);
  EXPECT_EQ(h.core.live_jobs(), 2u);
}

TEST(CoreDedup, FullRefusesAndNeverEvicts) {
  CoreOptions o;
  o.dedup_max = 2;
  CoreHarness h(o);
  JobId a = h.add(keyed("a", 1000));
  h.add(keyed("b", 5000));
  EXPECT_EQ(h.add_item(keyed("c")).answer, Answer::dedup_full);
  EXPECT_EQ(h.add_item(CoreHarness::job()).answer, Answer::ok);
  EXPECT_EQ(h.add_item(keyed("a")).id, a);
  h.pass(2000);
  h.settle();
  EXPECT_EQ(h.records<ForgetRecord>().size(), 1u);
  EXPECT_EQ(h.add_item(keyed("c")).answer, Answer::ok);
}

TEST(CoreDedup, ExpiredKeysAreForgottenInOrder) {
  CoreHarness h;
  for (int i = 0; i < 100; ++i) h.add(keyed("k" + std::to_string(i), 10 + i));
  h.pass(60 + 1000);
  h.settle();
  h.pass(1'000'000);
  h.settle();
  std::uint32_t forgotten = 0;
  for (const ForgetRecord& r : h.records<ForgetRecord>()) forgotten += r.count;
  EXPECT_EQ(forgotten, 100u);
}

TEST(CoreDedup, F11_AKeyKnowsHowItsJobEnded) {
  CoreHarness h;
  struct End {
    EndCode code;
    State state;
  };
  std::vector<JobId> ids;
  const End ends[] = {{EndCode::none, State::succeeded},
                      {EndCode::verdict, State::failed},
                      {EndCode::cancelled, State::cancelled},
                      {EndCode::exit, State::dead}};
  for (const End& end : ends) {
    JobId id = h.add(keyed(std::string(name(end.state)), 100'000));
    ids.push_back(id);
    if (end.state == State::cancelled) {
      h.cancel(id);
    } else if (end.state == State::dead) {
      h.fail(h.lease_one().fence, end.code, false);
    } else {
      h.complete(h.lease_one().fence, end.code);
    }
    h.pass(10);
  }
  auto check = [&](Core& core) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      EnqueueCommand c;
      c.jobs.push_back(keyed(std::string(name(ends[i].state)), 100'000));
      ItemAnswer a = core.decide(h.now, 1, c).items.at(0);
      EXPECT_EQ(a.answer, Answer::duplicate);
      EXPECT_EQ(a.id, ids[i]);
      EXPECT_EQ(a.state, ends[i].state);
      EXPECT_EQ(a.code, ends[i].code);
      EXPECT_EQ(a.finished_ms, h.now - 40 + 10 * static_cast<Millis>(i));
    }
  };
  check(h.core);
  Core again(h.options);
  reload(h, &again);
  again.check_invariants();
  check(again);
  EXPECT_EQ(h.image_of(again), h.image());
  // Retried, it lives; what it was is forgotten until it ends again.
  h.run(retry_of(h, ids[3]));
  ItemAnswer live = h.add_item(keyed("dead", 100'000));
  EXPECT_EQ(live.state, State::ready);
  EXPECT_EQ(live.finished_ms, 0);
  h.complete(h.lease_one().fence);
  EXPECT_EQ(h.add_item(keyed("dead", 100'000)).state, State::succeeded);
}

TEST(CoreDedup, SurvivesAnImage) {
  CoreHarness h;
  JobId id = h.add(keyed("k"));
  Core again(h.options);
  ASSERT_TRUE(again.load(h.image()));
  again.set_epoch(2);
  Decision d = again.decide(h.now, 1, EnqueueCommand{{keyed("k")}, {}});
  EXPECT_EQ(d.items[0].answer, Answer::duplicate);
  EXPECT_EQ(d.items[0].id, id);
}

// --- order ---

TEST(CoreOrder, FirstLeasesKeepCommitOrderAcrossKinds) {
  CoreHarness h;
  std::vector<JobId> ids;
  for (int i = 0; i < 30; ++i) {
    ids.push_back(h.add(CoreHarness::job("k" + std::to_string(i % 7))));
  }
  for (int i = 0; i < 30; i += 3) {
    auto grants = h.lease("w", 3);
    ASSERT_EQ(grants.size(), 3u);
    for (int j = 0; j < 3; ++j) EXPECT_EQ(grants[j].id, ids[i + j]);
  }
}

TEST(CoreOrder, HigherPriorityGoesFirst) {
  CoreHarness h;
  std::vector<JobId> by_priority(10);
  for (int p : {3, 9, 0, 5, 1, 8, 2, 7, 6, 4}) {
    NewJob j = CoreHarness::job();
    j.priority = p;
    by_priority[p] = h.add(j);
  }
  auto grants = h.lease("w", 10);
  ASSERT_EQ(grants.size(), 10u);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(grants[i].id, by_priority[9 - i]);
}

TEST(CoreOrder, ARedeliveryDoesNotDisturbFirstLeases) {
  CoreHarness h;
  JobId a = h.add(CoreHarness::job());
  JobId b = h.add(CoreHarness::job("other"));
  JobId c = h.add(CoreHarness::job());
  GrantAnswer first = h.lease_one();
  EXPECT_EQ(first.id, a);
  h.run(ReleaseCommand{{first.fence}});
  auto grants = h.lease("w", 3);
  ASSERT_EQ(grants.size(), 3u);
  EXPECT_EQ(grants[0].id, a);
  EXPECT_EQ(grants[1].id, b);
  EXPECT_EQ(grants[2].id, c);
}

TEST(CoreOrder, OrderSurvivesAnImage) {
  CoreHarness h;
  std::vector<JobId> ids;
  for (int i = 0; i < 50; ++i) ids.push_back(h.add(CoreHarness::job()));
  for (int i = 0; i < 50; i += 2) h.cancel(ids[i]);
  for (int i = 0; i < 25; ++i) ids.push_back(h.add(CoreHarness::job()));
  Core again(h.options);
  ASSERT_TRUE(again.load(h.image()));
  again.set_epoch(2);
  Decision d = again.decide(h.now, 1, CoreHarness::lease_command("w", 100));
  ASSERT_EQ(d.grants.size(), 50u);
  for (int i = 0; i < 25; ++i) EXPECT_EQ(d.grants[i].id, ids[2 * i + 1]);
  for (int i = 0; i < 25; ++i) EXPECT_EQ(d.grants[25 + i].id, ids[50 + i]);
}

// --- who may lease what ---

TEST(CoreLease, KindsQueuesAndLevelsAreRespected) {
  CoreHarness h;
  NewJob j = CoreHarness::job("test.run");
  j.queue = "slow";
  j.min_level = 3;
  JobId id = h.add(j);
  LeaseCommand c = CoreHarness::lease_command();
  c.level = 2;
  EXPECT_TRUE(h.run(c).grants.empty());
  c.level = 3;
  c.kinds = {"test.report", "tool.*"};
  EXPECT_TRUE(h.run(c).grants.empty());
  c.kinds = {"test.*"};
  c.queues = {"default"};
  EXPECT_TRUE(h.run(c).grants.empty());
  c.queues = {"default", "slow"};
  auto grants = h.run(c).grants;
  ASSERT_EQ(grants.size(), 1u);
  EXPECT_EQ(grants[0].id, id);
}

TEST(CoreLease, AtMostOneCurrentLease) {
  CoreHarness h;
  h.add(CoreHarness::job());
  EXPECT_EQ(h.lease("a").size(), 1u);
  EXPECT_EQ(h.lease("b").size(), 0u);
}

TEST(CoreLease, FencesRiseAcrossRestarts) {
  CoreHarness h;
  h.add(CoreHarness::job());
  Fence first = h.lease_one().fence;
  h.run(ReleaseCommand{{first}});
  Core again(h.options);
  for (const Record& r : h.log) again.apply(r);
  again.set_epoch(2);
  Decision d = again.decide(h.now, 1, CoreHarness::lease_command());
  ASSERT_EQ(d.grants.size(), 1u);
  EXPECT_GT(d.grants[0].fence, first);
  EXPECT_EQ(d.grants[0].fence, make_fence(2, 1));
}

TEST(CoreLease, HoldingReleasesTheWorkersOtherLeases) {
  CoreHarness h;
  for (int i = 0; i < 3; ++i) h.add(CoreHarness::job());
  auto mine = h.lease("me", 2);
  auto other = h.lease("you");
  LeaseCommand c = CoreHarness::lease_command("me");
  c.max = 5;
  c.holding = {mine[1].fence};
  Decision d = h.run(c);
  EXPECT_TRUE(h.core.leased_job(mine[0].fence).is_nil());
  EXPECT_FALSE(h.core.leased_job(mine[1].fence).is_nil());
  EXPECT_FALSE(h.core.leased_job(other[0].fence).is_nil());
  ASSERT_EQ(d.grants.size(), 1u);  // what was lost on the way, again
  EXPECT_EQ(d.grants[0].id, mine[0].id);
  EXPECT_EQ(h.core.look(mine[0].id)->view.attempt, 1);
}

// A worker's name is no credential: its session is.
TEST(CoreLease, F20_ANameAloneReleasesNothing) {
  CoreHarness h;
  for (int i = 0; i < 2; ++i) h.add(CoreHarness::job());
  LeaseCommand mine = CoreHarness::lease_command("w");
  mine.session = 10;
  const Fence first = h.run(mine).grants.at(0).fence;
  auto holds = [](Core& core, Fence fence) {
    return !core.leased_job(fence).is_nil();
  };
  for (Session session : {Session{0}, Session{11}, Session{12}}) {
    LeaseCommand thief = CoreHarness::lease_command("w");
    thief.kinds = {"none"};
    thief.session = session;
    thief.holding.emplace();
    h.run(thief);
    EXPECT_TRUE(holds(h.core, first)) << session;
  }
  // What is kept of a lease has its session, too.
  Core again(h.options);
  ASSERT_TRUE(again.load(h.image()));
  again.set_epoch(2);
  mine.kinds = {"none"};
  mine.holding.emplace();
  EXPECT_EQ(again.decide(h.now, 1, mine).records.size(), 1u);
  EXPECT_EQ(h.image(), CoreHarness::image_of(again));
  h.run(mine);
  EXPECT_FALSE(holds(h.core, first));
}

TEST(CoreLease, F20_GoneEndsLeasesOfTheSessionThatIsShown) {
  CoreHarness h;
  for (int i = 0; i < 3; ++i) h.add(CoreHarness::job());
  auto lease = [&](Session session) {
    LeaseCommand c = CoreHarness::lease_command("w");
    c.session = session;
    return h.run(c).grants.at(0).fence;
  };
  const Fence by_tcp = lease(10), local = lease(20 | kLocalSession),
              shown = lease(30 | kLocalSession);
  auto held = [&] {
    return std::vector<bool>{!h.core.leased_job(by_tcp).is_nil(),
                             !h.core.leased_job(local).is_nil(),
                             !h.core.leased_job(shown).is_nil()};
  };
  h.run(GoneCommand{{"w"}, false, {40 | kLocalSession}});
  EXPECT_EQ(held(), (std::vector<bool>{true, true, true}));
  h.run(GoneCommand{{"w"}, false, {30 | kLocalSession}});
  EXPECT_EQ(held(), (std::vector<bool>{true, true, false}));
  h.run(GoneCommand{{"w"}, false, {0}});
  EXPECT_EQ(held(), (std::vector<bool>{true, false, false}));
}

TEST(CoreLease, AStaleTokenChangesNothing) {
  CoreHarness h;
  h.add(CoreHarness::job());
  Fence old = h.lease_one().fence;
  h.fail(old, EndCode::exit, true, 0);
  Fence current = h.lease_one().fence;
  auto before = h.image();
  EXPECT_EQ(h.complete(old).answer, Answer::stale_lease);
  EXPECT_EQ(h.fail(old).answer, Answer::stale_lease);
  EXPECT_EQ(h.run(ReleaseCommand{{old}}).items[0].answer, Answer::stale_lease);
  EXPECT_EQ(h.run(BlockCommand{old, "", "", 0}).items[0].answer,
            Answer::stale_lease);
  HeartbeatCommand beat;
  beat.items.push_back({old, 1, ""});
  EXPECT_EQ(h.run(beat).items[0].answer, Answer::stale_lease);
  EXPECT_EQ(h.image(), before);
  EXPECT_EQ(h.complete(current).answer, Answer::ok);
}

TEST(CoreLease, ExpiryIsNeverEarlyAndHeartbeatsPutItOff) {
  CoreOptions o;
  o.lease_ms = 1000;
  CoreHarness h(o);
  h.add(CoreHarness::job());
  GrantAnswer g = h.lease_one();
  h.pass(999);
  h.settle();
  EXPECT_FALSE(h.core.leased_job(g.fence).is_nil());
  h.core.heartbeat(g.fence, h.mono + 1000, 50, "half");
  EXPECT_EQ(h.core.look(g.id)->view.progress_percent, 50);
  h.pass(999);
  h.settle();
  EXPECT_FALSE(h.core.leased_job(g.fence).is_nil());
  h.pass(1);
  h.settle();
  EXPECT_TRUE(h.core.leased_job(g.fence).is_nil());
  ASSERT_EQ(h.records<RetryRecord>().size(), 1u);
  EXPECT_EQ(h.records<RetryRecord>()[0].code, EndCode::lease_expired);
  auto failed = [&](EndCode code) {
    return h.core.totals().attempts_failed_by_code[static_cast<int>(code)];
  };
  // A failure that is retried is one all the same; no end is counted yet.
  EXPECT_EQ(failed(EndCode::lease_expired), 1u);
  EXPECT_EQ(
      h.core.totals().ended_by_code[static_cast<int>(EndCode::lease_expired)],
      0u);
}

TEST(CoreLease, AWallClockJumpExpiresNothing) {
  CoreHarness h;
  h.add(CoreHarness::job());
  GrantAnswer g = h.lease_one();
  h.now += 86'400'000;
  h.settle();
  EXPECT_FALSE(h.core.leased_job(g.fence).is_nil());
}

TEST(CoreLease, ARestartGivesEachLeaseItsFullTime) {
  CoreOptions o;
  o.lease_ms = 1000;
  CoreHarness h(o);
  h.add(CoreHarness::job());
  GrantAnswer g = h.lease_one();
  Core again(o);
  for (const Record& r : h.log) again.apply(r);
  again.set_epoch(2);
  again.restart_leases(77'000);
  EXPECT_EQ(again.next_due_mono(), 78'000);
  EXPECT_EQ(again.leased_job(g.fence), g.id);
}

// --- how attempts end ---

TEST(CoreRetry, BackoffDoublesUpToItsMaximum) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.retry_min_ms = 1000;
  j.retry_max_ms = 3000;
  j.max_attempts = 6;
  JobId id = h.add(j);
  for (Millis want : {1000, 2000, 3000, 3000, 3000}) {
    h.fail(h.lease_one().fence);
    RetryRecord r = h.records<RetryRecord>().back();
    EXPECT_GE(r.run_at_ms, h.now + want);
    EXPECT_LE(r.run_at_ms, h.now + want + 250);
    EXPECT_EQ(h.state(id), State::scheduled);
    EXPECT_EQ(h.core.next_due(), r.run_at_ms);
    h.pass(r.run_at_ms - h.now - 1);
    h.settle();
    EXPECT_EQ(h.state(id), State::scheduled);
    h.pass(1);
    h.settle();
    EXPECT_EQ(h.state(id), State::ready);
  }
  EXPECT_EQ(h.fail(h.lease_one().fence, EndCode::oom).state, State::dead);
  EXPECT_EQ(h.end_of(id)->state, State::dead);
  EXPECT_EQ(h.end_of(id)->outcome.code, EndCode::oom);
  EXPECT_EQ(h.end_of(id)->attempt, 6);
}

TEST(CoreRetry, RetryAfterReplacesTheBackoff) {
  CoreHarness h;
  h.add(CoreHarness::job());
  h.fail(h.lease_one().fence, EndCode::upstream, true, 12'345);
  EXPECT_EQ(h.records<RetryRecord>()[0].run_at_ms, h.now + 12'345);
}

TEST(CoreRetry, F12_NoWaitIsLongerThanTheMaximum) {
  for (Millis after : {Millis{-1}, Millis{90'000}}) {
    CoreHarness h;
    NewJob j = CoreHarness::job();
    j.max_attempts = 200;
    j.retry_min_ms = 900;
    j.retry_max_ms = 1000;
    JobId id = h.add(j);
    for (int i = 0; i < 100; ++i) {
      h.fail(h.lease_one().fence, EndCode::exit, true, after);
      Millis wait = h.core.look(id)->view.run_at_ms - h.now;
      EXPECT_LE(wait, 1000);
      EXPECT_GE(wait, 900);
      h.pass(wait);
      h.settle();
    }
  }
}

TEST(CoreRetry, WithoutRetryItIsDeadAtOnce) {
  CoreHarness h;
  JobId id = h.add(CoreHarness::job());
  EXPECT_EQ(h.fail(h.lease_one().fence, EndCode::exit, false).state,
            State::dead);
  EXPECT_EQ(h.end_of(id)->attempt, 1);
}

TEST(CoreRetry, AVerdictIsNeverRetried) {
  CoreHarness h;
  h.add(CoreHarness::job());
  h.add(CoreHarness::job());
  EXPECT_EQ(h.fail(h.lease_one().fence, EndCode::invalid_payload).state,
            State::failed);
  EXPECT_EQ(h.complete(h.lease_one().fence, EndCode::verdict).state,
            State::failed);
}

TEST(CoreRetry, TheFirstWorkerDeathIsRetriedAtOnceTheSecondWaits) {
  CoreHarness h;
  JobId id = h.add(CoreHarness::job());
  h.lease_one("a");
  h.run(GoneCommand{{"a"}});
  EXPECT_EQ(h.state(id), State::ready);
  h.lease_one("b");
  h.run(GoneCommand{{"b"}});
  EXPECT_EQ(h.state(id), State::scheduled);
  EXPECT_EQ(h.core.look(id)->view.error_code, EndCode::worker_died);
  EXPECT_EQ(h.core.look(id)->view.error_attempt, 2);
}

TEST(CoreRetry, GoneEndsAllLeasesOfThatWorkerOnly) {
  CoreHarness h;
  for (int i = 0; i < 5; ++i) h.add(CoreHarness::job());
  h.lease("a", 3);
  auto other = h.lease("b", 2);
  h.run(GoneCommand{{"a", "nobody"}});
  EXPECT_EQ(h.records<RetryRecord>().size(), 3u);
  for (const GrantAnswer& g : other) {
    EXPECT_FALSE(h.core.leased_job(g.fence).is_nil());
  }
}

TEST(CoreRetry, F10_AnAttemptThatWasEndedFromOutsideCountsNothing) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.max_attempts = 1;
  JobId id = h.add(j);
  JobId other = h.add(j);
  h.lease_one("a");
  h.lease_one("b");
  h.run(GoneCommand{{"b"}});
  h.run(GoneCommand{{"a", "nobody"}, true});
  EXPECT_EQ(h.records<ReleaseRecord>().size(), 1u);
  EXPECT_EQ(h.state(id), State::ready);
  EXPECT_EQ(h.core.look(id)->view.attempt, 0);
  EXPECT_EQ(h.end_of(other)->state, State::dead);  // died by itself
  h.lease_one("a");
  h.cancel(id);
  h.run(GoneCommand{{"a"}, true});
  EXPECT_EQ(h.end_of(id)->state, State::cancelled);
}

TEST(CoreRetry, AReleaseCountsNoAttempt) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.max_attempts = 1;
  JobId id = h.add(j);
  for (int i = 0; i < 5; ++i) {
    GrantAnswer g = h.lease_one();
    EXPECT_EQ(h.core.look(id)->view.attempt, 1);
    h.run(ReleaseCommand{{g.fence}});
    EXPECT_EQ(h.core.look(id)->view.attempt, 0);
  }
  EXPECT_EQ(h.fail(h.lease_one().fence).state, State::dead);
}

TEST(CoreRetry, AnErrorsMessageIsKeptUntilTheNextEnd) {
  CoreHarness h;
  JobId id = h.add(CoreHarness::job());
  FailCommand c;
  c.fence = h.lease_one().fence;
  c.outcome.code = EndCode::exit;
  for (int i = 0; i < 50; ++i) c.outcome.message += "\xe2\x82\xac";  // euros
  h.run(c);
  std::string shown = h.core.look(id)->view.error_message;
  EXPECT_EQ(shown.size(), 120u);
  EXPECT_EQ(c.outcome.message.substr(0, 120), shown);
}

// Puts the core through an image in place.
void reload(CoreHarness& h, Core* again) {
  ASSERT_TRUE(again->load(h.image()));
  again->set_epoch(2);
  again->set_mono(h.mono);
}

TEST(CoreRetry, AnImageRemembersTheFirstWorkerDeath) {
  CoreHarness h;
  h.add(CoreHarness::job());
  h.lease_one("a");
  h.run(GoneCommand{{"a"}});
  h.lease_one("b");
  Core again(h.options);
  reload(h, &again);
  Decision d = again.decide(h.now, 1, GoneCommand{{"b"}});
  ASSERT_EQ(d.records.size(), 1u);
  EXPECT_GT(std::get<RetryRecord>(d.records[0].body).run_at_ms, h.now);
}

// --- an explicit retry ---

RetryCommand retry_of(const CoreHarness& h, JobId id) {
  RetryCommand c{id, std::nullopt, State::dead, 0};
  for (const auto& r : h.records<EnqueueRecord>()) {
    if (r.id == id) c.body = r;
  }
  if (const EndRecord* end = h.end_of(id)) {
    c.state = end->state;
    c.attempt = end->attempt;
  }
  return c;
}

TEST(CoreRevive, RenewsTheAllowanceAndLeavesDedupAlone) {
  CoreHarness h;
  NewJob j = keyed("k", 1000);
  j.max_attempts = 2;
  JobId id = h.add(j);
  h.fail(h.lease_one().fence, EndCode::exit, true, 0);
  h.fail(h.lease_one().fence);
  EXPECT_EQ(h.core.counts()[0].by_state[8], 1u);
  EXPECT_EQ(h.run(retry_of(h, id)).items[0].answer, Answer::ok);
  EXPECT_EQ(h.state(id), State::ready);
  EXPECT_EQ(h.core.counts()[0].by_state[8], 0u);
  EXPECT_EQ(h.fail(h.lease_one().fence, EndCode::exit, true, 0).state,
            State::ready);
  EXPECT_EQ(h.fail(h.lease_one().fence).state, State::dead);
  EXPECT_EQ(h.end_of(id)->attempt, 4);
  h.pass(1000);
  EXPECT_EQ(h.add_item(keyed("k")).answer, Answer::ok);  // the old window
}

TEST(CoreRevive, AnImageRemembersWhereTheBackoffBegins) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.retry_min_ms = 1000;
  j.max_attempts = 3;
  JobId id = h.add(j);
  for (int i = 0; i < 3; ++i)
    h.fail(h.lease_one().fence, EndCode::exit, true, 0);
  h.run(retry_of(h, id));
  FailCommand fail;
  fail.fence = h.lease_one().fence;
  fail.outcome.code = EndCode::exit;
  Core again(h.options);
  reload(h, &again);
  Decision d = again.decide(h.now, 1, fail);
  ASSERT_EQ(d.records.size(), 1u);
  EXPECT_LE(std::get<RetryRecord>(d.records[0].body).run_at_ms, h.now + 1250);
}

TEST(CoreRevive, OnlyWhatEndedOtherwiseThanWell) {
  CoreHarness h;
  JobId live = h.add(CoreHarness::job());
  EXPECT_EQ(h.run(retry_of(h, live)).items[0].answer, Answer::wrong_state);
  EXPECT_EQ(h.run(retry_of(h, live)).items[0].state, State::ready);
  h.complete(h.lease_one().fence);
  EXPECT_EQ(h.run(retry_of(h, live)).items[0].answer, Answer::wrong_state);
  JobId unknown = make_job_id(1, 2, 3);
  EXPECT_EQ(h.run(retry_of(h, unknown)).items[0].answer, Answer::not_found);
}

TEST(CoreRevive, F12_ADependencyThatDidNotSucceedIsRefused) {
  CoreHarness h;
  JobId root = h.add(CoreHarness::job("root"));
  NewJob j = CoreHarness::job("after");
  j.depends_on = {root};
  JobId id = h.add(j);
  h.fail(h.lease_one().fence, EndCode::verdict);
  h.settle();
  ASSERT_EQ(h.end_of(id)->state, State::cancelled);
  RetryCommand c = retry_of(h, id);
  EXPECT_EQ(h.run(c).items[0].answer, Answer::need_facts);
  EXPECT_TRUE(h.run(c).records.empty());
  c.facts = {{root, true, State::failed}};
  ItemAnswer refused = h.run(c).items[0];
  EXPECT_EQ(refused.answer, Answer::dependency);
  EXPECT_EQ(refused.detail, to_string(root) + " ended failed");
  // Past its retention: it had not succeeded when it was last seen.
  c.facts = {{root, false, State::succeeded}};
  EXPECT_EQ(h.run(c).items[0].answer, Answer::dependency);
  EXPECT_FALSE(h.core.live(id));
  // Where it runs again, the job waits for it.
  EXPECT_EQ(h.run(retry_of(h, root)).items[0].answer, Answer::ok);
  c.facts.clear();
  ItemAnswer waits = h.run(c).items[0];
  EXPECT_EQ(waits.answer, Answer::ok);
  EXPECT_EQ(waits.state, State::waiting);
  EXPECT_EQ(h.state(id), State::waiting);
  Core again(h.options);
  reload(h, &again);
  EXPECT_EQ(h.image_of(again), h.image());
  h.complete(h.lease_one().fence);
  EXPECT_EQ(h.state(id), State::ready);
  EXPECT_EQ(h.lease_one().id, id);
}

TEST(CoreRevive, F12_DependenciesAreIgnoredOnlyOnRequest) {
  CoreHarness h;
  JobId root = h.add(CoreHarness::job("root"));
  NewJob j = CoreHarness::job("after");
  j.depends_on = {root};
  JobId id = h.add(j);
  h.fail(h.lease_one().fence, EndCode::verdict);
  h.settle();
  RetryCommand c = retry_of(h, id);
  c.ignore_dependencies = true;
  EXPECT_EQ(h.run(c).items[0].answer, Answer::ok);
  EXPECT_EQ(h.lease_one().id, id);
}

TEST(CoreRevive, F12_AJobThatRanHadItsDependencies) {
  CoreHarness h;
  JobId root = h.add(CoreHarness::job("root"));
  NewJob j = CoreHarness::job("after");
  j.depends_on = {root};
  JobId id = h.add(j);
  h.complete(h.lease_one().fence);
  h.fail(h.lease_one().fence, EndCode::verdict);
  RetryCommand c = retry_of(h, id);
  c.facts = {{root, false, State::succeeded}};
  EXPECT_EQ(h.run(c).items[0].answer, Answer::ok);
  // Another one, that began when it had succeeded, and was cancelled.
  NewJob late = CoreHarness::job("late");
  late.depends_on = {root};
  late.run_at_ms = h.now + 1000;
  ItemAnswer made = h.add_item(late, {{root, true, State::succeeded}});
  h.cancel(made.id);
  c = retry_of(h, made.id);
  c.facts = {{root, false, State::succeeded}};
  EXPECT_EQ(h.run(c).items[0].answer, Answer::ok);
}

// --- cancel ---

TEST(CoreCancel, EveryStateThatHoldsNoWorkerEndsAtOnce) {
  CoreHarness h;
  JobId ready = h.add(CoreHarness::job());
  NewJob j = CoreHarness::job();
  j.run_at_ms = h.now + 1000;
  JobId scheduled = h.add(j);
  j = CoreHarness::job();
  j.depends_on = {ready};
  JobId waiting = h.add(j);
  for (JobId id : {waiting, scheduled, ready}) {
    ItemAnswer a = h.cancel(id);
    EXPECT_EQ(a.answer, Answer::ok);
    EXPECT_EQ(a.state, State::cancelled);
    EXPECT_EQ(h.end_of(id)->outcome.code, EndCode::cancelled);
    EXPECT_EQ(h.cancel(id).answer, Answer::not_found);  // history answers
  }
}

TEST(CoreCancel, ARunningJobIsAskedAndItsEndDecides) {
  CoreHarness h;
  JobId id = h.add(CoreHarness::job());
  Fence fence = h.lease_one().fence;
  EXPECT_EQ(h.cancel(id).state, State::running);
  EXPECT_EQ(h.cancel(id).answer, Answer::already);
  HeartbeatCommand beat;
  beat.items.push_back({fence, -1, ""});
  EXPECT_TRUE(h.run(beat).items[0].cancel);
  EXPECT_TRUE(h.core.look(id)->view.cancel_requested);
  EXPECT_EQ(h.fail(fence, EndCode::signal).state, State::cancelled);
  EXPECT_EQ(h.end_of(id)->outcome.code, EndCode::cancelled);
}

TEST(CoreCancel, AWorkerCannotCancelWhatNobodyCancelled) {
  CoreHarness h;
  JobId id = h.add(CoreHarness::job());
  Fence fence = h.lease_one().fence;
  EXPECT_EQ(h.fail(fence, EndCode::cancelled).answer, Answer::wrong_state);
  EXPECT_EQ(h.core.leased_job(fence), id);
  h.cancel(id);
  EXPECT_EQ(h.fail(fence, EndCode::cancelled).state, State::cancelled);
}

TEST(CoreCancel, AnEarlierCompletionWins) {
  CoreHarness h;
  JobId id = h.add(CoreHarness::job());
  Fence fence = h.lease_one().fence;
  h.cancel(id);
  EXPECT_EQ(h.complete(fence).state, State::succeeded);
}

TEST(CoreCancel, DeathExpiryReleaseAndBlockGiveCancelled) {
  CoreOptions o;
  o.lease_ms = 1000;
  for (int how = 0; how < 4; ++how) {
    CoreHarness h(o);
    JobId id = h.add(CoreHarness::job());
    Fence fence = h.lease_one("w").fence;
    h.cancel(id);
    if (how == 0) h.run(GoneCommand{{"w"}});
    if (how == 1) h.pass(1000);
    if (how == 2) h.run(ReleaseCommand{{fence}});
    if (how == 3) h.run(BlockCommand{fence, "", "", 0});
    h.settle();
    ASSERT_NE(h.end_of(id), nullptr) << how;
    EXPECT_EQ(h.end_of(id)->state, State::cancelled);
  }
}

// --- dependencies ---

NewJob after(std::vector<JobId> ids) {
  NewJob j = CoreHarness::job();
  j.depends_on = std::move(ids);
  return j;
}

TEST(CoreDepends, ReadyWhenTheLastOneSucceeded) {
  CoreHarness h;
  JobId a = h.add(CoreHarness::job("a"));
  JobId b = h.add(CoreHarness::job("b"));
  JobId c = h.add(after({a, b, a}));
  EXPECT_EQ(h.state(c), State::waiting);
  h.complete(h.lease_one().fence);
  EXPECT_EQ(h.state(c), State::waiting);
  h.complete(h.lease_one().fence);
  EXPECT_EQ(h.state(c), State::ready);
}

TEST(CoreDepends, ADelayLaterThanTheDependenciesIsKept) {
  CoreHarness h;
  JobId a = h.add(CoreHarness::job());
  NewJob j = after({a});
  j.run_at_ms = h.now + 500;
  JobId b = h.add(j);
  h.complete(h.lease_one().fence);
  EXPECT_EQ(h.state(b), State::scheduled);
  h.pass(500);
  h.settle();
  EXPECT_EQ(h.state(b), State::ready);
}

TEST(CoreDepends, FailureCascadesAsCancelledWithDependency) {
  CoreHarness h;
  JobId a = h.add(CoreHarness::job());
  JobId b = h.add(after({a}));
  JobId c = h.add(after({b}));
  h.fail(h.lease_one().fence, EndCode::verdict);
  EXPECT_EQ(h.core.look(b)->view.state, State::cancelled);  // cannot be undone
  EXPECT_LE(h.core.next_due(), h.now);
  h.settle();
  for (JobId id : {b, c}) {
    ASSERT_NE(h.end_of(id), nullptr);
    EXPECT_EQ(h.end_of(id)->state, State::cancelled);
    EXPECT_EQ(h.end_of(id)->outcome.code, EndCode::dependency);
  }
  EXPECT_EQ(h.core.live_jobs(), 0u);
}

TEST(CoreDepends, FactsDecideAboutFinishedOnes) {
  CoreHarness h;
  JobId gone = make_job_id(1, 2, 3);
  EXPECT_EQ(h.add_item(after({gone})).answer, Answer::need_facts);
  EXPECT_EQ(h.add_item(after({gone})).detail, to_string(gone));
  ItemAnswer a = h.add_item(after({gone}), {{gone, false, State::dead}});
  EXPECT_EQ(a.answer, Answer::unknown_dependency);
  EXPECT_EQ(a.detail, to_string(gone));
  a = h.add_item(after({gone}), {{gone, true, State::succeeded}});
  EXPECT_EQ(a.state, State::ready);
  a = h.add_item(after({gone}), {{gone, true, State::dead}});
  EXPECT_EQ(a.answer, Answer::ok);
  EXPECT_EQ(a.state, State::cancelled);  // born so
  h.settle();
  EXPECT_EQ(h.end_of(a.id)->outcome.code, EndCode::dependency);
  EXPECT_NE(h.end_of(a.id)->body_place, 0u);
}

// Nobody is told that another tenant's job exists.
TEST(CoreDepends, AnotherTenantsJobIsUnknown) {
  CoreHarness h;
  NewJob ours = CoreHarness::job();
  ours.tenant = "ours";
  const JobId live = h.add(ours), gone = make_job_id(1, 2, 3);
  NewJob theirs = after({live});
  theirs.tenant = "theirs";
  ItemAnswer a = h.add_item(theirs);
  EXPECT_EQ(a.answer, Answer::unknown_dependency);
  EXPECT_EQ(a.detail, to_string(live));
  theirs.depends_on = {gone};
  for (State state : {State::succeeded, State::dead}) {
    a = h.add_item(theirs, {{gone, true, state, "ours"}});
    EXPECT_EQ(a.answer, Answer::unknown_dependency);
    EXPECT_EQ(a.detail, to_string(gone));
  }
  a = h.add_item(theirs, {{gone, true, State::succeeded, "theirs"}});
  EXPECT_EQ(a.state, State::ready);
  NewJob own = after({live});
  own.tenant = "ours";
  EXPECT_EQ(h.add_item(own).state, State::waiting);
}

TEST(CoreDepends, AChildWaitsForJobsOfItsParentsTenant) {
  CoreHarness h;
  NewJob theirs = CoreHarness::job("theirs");
  theirs.tenant = "theirs";
  h.add(theirs);
  const Fence fence = h.lease_one().fence;
  NewJob ours = CoreHarness::job();
  ours.tenant = "ours";
  const JobId live = h.add(ours);
  NewJob child = after({live});
  child.tenant = "ours";  // a worker may say what it likes
  EXPECT_EQ(h.complete(fence, EndCode::none, {child}).answer,
            Answer::unknown_dependency);
}

TEST(CoreRevive, ADependencyOfAnotherTenantIsUnknown) {
  CoreHarness h;
  const JobId root = h.add(CoreHarness::job("root"));
  const JobId id = h.add(after({root}));
  h.fail(h.lease_one().fence, EndCode::verdict);
  h.settle();
  RetryCommand c = retry_of(h, id);
  c.body->job.tenant = "theirs";
  c.facts = {{root, true, State::failed, "default"}};
  const ItemAnswer ended = h.run(c).items[0];
  EXPECT_EQ(ended.answer, Answer::dependency);
  EXPECT_EQ(ended.detail.find("failed"), ended.detail.npos) << ended.detail;
  EXPECT_EQ(h.run(retry_of(h, root)).items[0].answer, Answer::ok);
  c.facts.clear();
  const ItemAnswer live = h.run(c).items[0];
  EXPECT_EQ(live.answer, Answer::dependency);
  EXPECT_EQ(live.detail, ended.detail);
}

TEST(CoreDepends, AMissingFactDecidesNothingOfTheArray) {
  CoreHarness h;
  EnqueueCommand c;
  c.jobs = {CoreHarness::job(), after({make_job_id(1, 2, 3)})};
  Decision d = h.run(c);
  EXPECT_TRUE(d.records.empty());
  for (const ItemAnswer& a : d.items) EXPECT_EQ(a.answer, Answer::need_facts);
}

TEST(CoreDepends, AManyTimesNeededJobCostsEachRecordABoundedWalk) {
  CoreHarness h;
  h.checked = false;
  JobId root = h.add(CoreHarness::job("root"));
  for (int i = 0; i < 3000; ++i) h.add(after({root}));
  h.complete(h.lease_one().fence);
  auto ready = [&h] { return h.core.counts()[0].by_state[2]; };
  EXPECT_EQ(ready(), 256u);
  Core again(h.options);  // in the middle of it
  ASSERT_TRUE(again.load(h.image()));
  again.check_invariants();
  h.settle();
  EXPECT_EQ(ready(), 3000u);
  h.core.check_invariants();
}

TEST(CoreDepends, ManyDependentsOfAFailureEndByTicksOf256) {
  CoreHarness h;
  h.checked = false;
  JobId root = h.add(CoreHarness::job("root"));
  for (int i = 0; i < 1000; ++i) h.add(after({root}));
  h.cancel(root);
  for (const Decision& tick : h.settle()) {
    EXPECT_LE(tick.records.size(), 257u);
  }
  EXPECT_EQ(h.core.live_jobs(), 0u);
  h.core.check_invariants();
}

// --- completion with children ---

TEST(CoreComplete, ChildrenAreInTheSameRecord) {
  CoreHarness h;
  JobId parent = h.add(CoreHarness::job());
  Fence fence = h.lease_one().fence;
  NewJob child = after({parent});
  std::size_t before = h.log.size();
  EXPECT_EQ(h.complete(fence, EndCode::none, {child, keyed("k")}).answer,
            Answer::ok);
  EXPECT_EQ(h.log.size(), before + 1);
  EXPECT_EQ(h.end_of(parent)->children.size(), 2u);
  EXPECT_EQ(h.core.live_jobs(), 2u);
  JobId first = h.end_of(parent)->children[0].id;
  EXPECT_EQ(h.state(first), State::ready);  // its parent has succeeded
  EXPECT_EQ(h.core.look(first)->body_place, h.log.back().place);
}

TEST(CoreComplete, AChildThatIsRefusedRefusesTheCompletion) {
  CoreHarness h;
  h.add(CoreHarness::job());
  Fence fence = h.lease_one().fence;
  NewJob child = after({make_job_id(1, 2, 3)});
  auto before = h.image();
  EXPECT_EQ(h.complete(fence, EndCode::none, {keyed("k"), child}).answer,
            Answer::need_facts);
  EXPECT_EQ(h.image(), before);
  EXPECT_EQ(h.complete(fence).answer, Answer::ok);
}

TEST(CoreComplete, ADuplicateChildIsNotMadeTwice) {
  CoreHarness h;
  h.add(keyed("k"));
  Fence fence = h.lease_one().fence;
  EXPECT_EQ(
      h.complete(fence, EndCode::none, {keyed("k"), keyed("n"), keyed("n")})
          .answer,
      Answer::ok);
  EXPECT_EQ(h.core.live_jobs(), 1u);
}

// Their last bits say where they lie in the tables (place_of): jobs that come
// with one record, or with records of one millisecond, must not share them.
TEST(CoreComplete, NoTwoIdsOfARunCountTheSame) {
  CoreHarness h;
  std::set<std::uint32_t> counts;
  auto count = [&](const JobId& id) {
    std::uint32_t n = 0;
    for (int i = 12; i < 16; ++i) n = n << 8 | id.bytes[i];
    EXPECT_TRUE(counts.insert(n).second) << to_string(id);
  };
  for (int i = 0; i < 8; ++i) count(h.add(CoreHarness::job()));
  auto grants = h.lease("w", 8);
  ASSERT_EQ(grants.size(), 8u);
  CompleteCommand many;
  for (int i = 0; i < 4; ++i) {
    many.items.push_back({grants[i].fence, {}, {}});
    many.items.back().children = {CoreHarness::job(), CoreHarness::job(),
                                  CoreHarness::job()};
  }
  const std::size_t before = h.log.size();
  h.run(many);
  for (int i = 4; i < 8; ++i) {
    h.complete(grants[i].fence, EndCode::none,
               {CoreHarness::job(), CoreHarness::job(), CoreHarness::job()});
  }
  std::size_t children = 0;
  for (std::size_t i = before; i < h.log.size(); ++i) {
    auto* end = std::get_if<EndRecord>(&h.log[i].body);
    if (end == nullptr) continue;
    for (const EnqueueRecord& child : end->children) count(child.id);
    children += end->children.size();
  }
  EXPECT_EQ(children, 24u);
  count(h.add(CoreHarness::job()));
}

TEST(CoreComplete, OneFenceTwiceInABatchCountsOnce) {
  CoreHarness h;
  for (int i = 0; i < 3; ++i) h.add(CoreHarness::job());
  auto g = h.lease("w", 2);
  CompleteCommand c;
  c.items = {{g[0].fence, {}, {}}, {g[0].fence, {}, {}}, {g[1].fence, {}, {}}};
  c.lease = CoreHarness::lease_command("w", 4);
  c.lease->holding = std::vector<Fence>{};
  Decision d = h.run(c);
  EXPECT_EQ(d.items[0].answer, Answer::ok);
  EXPECT_EQ(d.items[1].answer, Answer::stale_lease);
  EXPECT_EQ(d.items[2].answer, Answer::ok);
  EXPECT_EQ(d.grants.size(), 1u);
  EXPECT_EQ(h.core.live_jobs(), 1u);
}

// --- blocked ---

TEST(CoreBlock, NeedsItsTokenAndCountsNoAttempt) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.max_attempts = 1;
  JobId id = h.add(j);
  ItemAnswer blocked =
      h.run(BlockCommand{h.lease_one().fence, "approval", "{}", 0}).items[0];
  EXPECT_EQ(h.state(id), State::blocked);
  EXPECT_EQ(h.lease("w").size(), 0u);
  Place note = h.core.look(id)->note_place;
  EXPECT_EQ(note, h.log.back().place);
  std::string wrong(32, '0');
  EXPECT_EQ(h.run(UnblockCommand{id, wrong, "", ""}).items[0].answer,
            Answer::bad_token);
  EXPECT_EQ(h.run(UnblockCommand{id, "", "", ""}).items[0].answer,
            Answer::bad_token);
  EXPECT_EQ(
      h.run(UnblockCommand{id, blocked.detail, "{}", "me"}).items[0].answer,
      Answer::ok);
  EXPECT_EQ(h.state(id), State::ready);
  EXPECT_EQ(h.core.look(id)->note_place, h.log.back().place);
  EXPECT_FALSE(h.places.contains(note));
  EXPECT_EQ(h.run(UnblockCommand{id, blocked.detail, "", ""}).items[0].answer,
            Answer::wrong_state);
  GrantAnswer g = h.lease_one();
  EXPECT_EQ(h.core.look(id)->view.attempt, 1);
  EXPECT_EQ(h.complete(g.fence).answer, Answer::ok);
  EXPECT_TRUE(h.places.empty());
}

TEST(CoreBlock, ItsDeadlineEndsIt) {
  CoreHarness h;
  JobId id = h.add(CoreHarness::job());
  h.run(BlockCommand{h.lease_one().fence, "approval", "", 500});
  EXPECT_EQ(h.core.look(id)->view.blocked_deadline_ms, h.now + 500);
  h.pass(499);
  h.settle();
  EXPECT_EQ(h.state(id), State::blocked);
  h.pass(1);
  h.settle();
  EXPECT_EQ(h.end_of(id)->state, State::dead);
  EXPECT_EQ(h.end_of(id)->outcome.code, EndCode::timeout);
}

// --- delays ---

TEST(CoreDelay, NotBeforeItsTimeAndThenAtOnce) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.run_at_ms = h.now + 100;
  JobId id = h.add(j);
  EXPECT_EQ(h.core.next_due(), h.now + 100);
  h.pass(99);
  EXPECT_EQ(h.lease("w").size(), 0u);
  h.pass(1);
  EXPECT_EQ(h.lease_one().id, id);  // without waiting for a Tick
}

TEST(CoreDelay, AClockThatGoesBackDelaysOnly) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.run_at_ms = h.now + 100;
  h.add(j);
  h.now -= 50'000;
  h.add(CoreHarness::job());  // time in the log does not go back
  EXPECT_EQ(h.log.back().time_ms, h.log.front().time_ms);
  EXPECT_EQ(h.lease("w", 5).size(), 1u);
}

TEST(CoreDelay, F07_OnlyATimeOfDayFollowsTheWallClock) {
  CoreHarness h;
  auto add = [&](Millis delay, Millis run_at) {
    NewJob j = CoreHarness::job();
    j.delay_ms = delay;
    j.run_at_ms = run_at;
    return h.add(j);
  };
  JobId delayed = add(5000, 0);
  JobId at = add(0, h.now + 5000);
  EXPECT_EQ(h.core.look(delayed)->view.run_at_ms, h.now + 5000);
  // An hour back: one waits as long as before, one an hour longer.
  h.run(ClockCommand{-3'600'000, 0, 0});
  EXPECT_EQ(h.core.look(delayed)->view.run_at_ms, h.now + 5000 - 3'600'000);
  EXPECT_EQ(h.core.look(at)->view.run_at_ms, h.now + 5000);
  Core again(h.options);
  reload(h, &again);
  EXPECT_EQ(h.image_of(again), h.image());
  EXPECT_EQ(again.next_due(), h.now + 5000);
  h.pass(5000);
  h.settle();
  EXPECT_EQ(h.state(delayed), State::ready);
  EXPECT_EQ(h.state(at), State::scheduled);
  EXPECT_EQ(h.core.next_due(), h.now + 3'600'000);
  // Set right again, and by a second too far.
  h.run(ClockCommand{1000, 0, 0});
  h.settle();
  EXPECT_EQ(h.state(at), State::ready);
  // An hour forward hurries nobody but a time of day.
  delayed = add(5000, 0);
  at = add(0, h.now + 1'800'000);
  h.run(ClockCommand{3'600'000, 0, 0});
  h.settle();
  EXPECT_EQ(h.state(delayed), State::scheduled);
  EXPECT_EQ(h.state(at), State::ready);
}

TEST(CoreDelay, F07_RetriesAndDeadlinesDoNotFollowTheWallClock) {
  for (Millis step : {-3'600'000, -30'000, 30'000, 3'600'000}) {
    CoreHarness h;
    NewJob j = CoreHarness::job();
    j.retry_min_ms = j.retry_max_ms = 1000;
    JobId retried = h.add(j), blocked = h.add(j);
    h.fail(h.lease_one().fence);
    h.run(BlockCommand{h.lease_one().fence, "why", "", 1000});
    h.run(ClockCommand{step, 0, 0});
    EXPECT_EQ(h.core.look(blocked)->view.blocked_deadline_ms,
              h.now + step + 1000);
    h.pass(999);
    h.settle();
    EXPECT_EQ(h.state(retried), State::scheduled);
    EXPECT_EQ(h.state(blocked), State::blocked);
    h.pass(1);
    h.settle();
    EXPECT_EQ(h.state(retried), State::ready);
    ASSERT_NE(h.end_of(blocked), nullptr);
    EXPECT_EQ(h.end_of(blocked)->outcome.code, EndCode::timeout);
    // What is shown of an attempt is how the wall clock stands at its end.
    Fence fence = h.lease_one().fence;
    h.pass(70);
    h.complete(fence);
    EXPECT_EQ(h.end_of(retried)->started_ms, h.now + step - 70);
  }
}

TEST(CoreDelay, ManyDueJobsArePromotedInOrder) {
  CoreHarness h;
  h.checked = false;
  std::vector<JobId> ids;
  for (int i = 0; i < 600; ++i) {
    NewJob j = CoreHarness::job();
    j.run_at_ms = h.now + 10 + i / 2;
    ids.push_back(h.add(j));
  }
  h.pass(1000);
  h.settle();
  EXPECT_EQ(h.records<PromoteRecord>().size(), 3u);
  for (int i = 0; i < 600; i += 200) {
    auto grants = h.lease("w", 200);
    ASSERT_EQ(grants.size(), 200u);
    for (int k = 0; k < 200; ++k) EXPECT_EQ(grants[k].id, ids[i + k]);
  }
}

// --- parked calls ---

LeaseCommand parked(std::uint64_t number, std::string worker = "w") {
  LeaseCommand c = CoreHarness::lease_command(std::move(worker));
  c.waiter = number;
  return c;
}

void park(CoreHarness& h, const LeaseCommand& c) {
  Decision d = h.run(c);
  EXPECT_TRUE(d.park);
  h.core.park(c);
  h.core.check_invariants();
}

TEST(CorePark, AnEnqueueFeedsItInTheSameDecision) {
  CoreHarness h;
  park(h, parked(1));
  EnqueueCommand c;
  c.jobs = {CoreHarness::job(), CoreHarness::job()};
  Decision d = h.run(c);
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(d.fed[0].waiter, 1u);
  ASSERT_EQ(d.fed[0].grants.size(), 1u);
  EXPECT_EQ(d.fed[0].grants[0].id, d.items[0].id);
  EXPECT_EQ(d.records.size(), 3u);
  EXPECT_EQ(h.core.parked(), 0u);
}

TEST(CorePark, FirstComeFirstServedAndOnlyThoseThatMatch) {
  CoreHarness h;
  LeaseCommand picky = parked(1);
  picky.kinds = {"other"};
  park(h, picky);
  park(h, parked(2));
  park(h, parked(3));
  Decision d = h.run(EnqueueCommand{{CoreHarness::job("fresh.kind")}, {}});
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(d.fed[0].waiter, 2u);
  d = h.run(EnqueueCommand{{CoreHarness::job("other")}, {}});
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(d.fed[0].waiter, 1u);
}

TEST(CorePark, TheBestOfAnArrayGoesFirst) {
  CoreHarness h;
  park(h, parked(1));
  EnqueueCommand c;
  c.jobs = {CoreHarness::job(), CoreHarness::job("k2")};
  c.jobs[1].priority = 9;
  Decision d = h.run(c);
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(d.fed[0].grants[0].id, d.items[1].id);
}

TEST(CorePark, DelaysReleasesRetriesAndUnblocksFeedToo) {
  CoreHarness h;
  auto fed_by = [&h](const Command& c) {
    park(h, parked(9));
    Decision d = h.run(c);
    EXPECT_EQ(d.fed.size(), 1u);
    return d.fed.empty() ? GrantAnswer{} : d.fed[0].grants[0];
  };
  NewJob j = CoreHarness::job();
  j.run_at_ms = h.now + 10;
  h.add(j);
  h.pass(0);
  park(h, parked(8));
  h.pass(10);
  auto ticks = h.settle();
  ASSERT_EQ(ticks.size(), 1u);
  ASSERT_EQ(ticks[0].fed.size(), 1u);
  GrantAnswer g = ticks[0].fed[0].grants[0];
  g = fed_by(ReleaseCommand{{g.fence}});
  FailCommand fail;
  fail.fence = g.fence;
  fail.outcome.code = EndCode::exit;
  fail.outcome.retry_after_ms = 0;
  g = fed_by(fail);
  std::string token = h.run(BlockCommand{g.fence, "", "", 0}).items[0].detail;
  g = fed_by(UnblockCommand{g.id, token, "", ""});
  EXPECT_EQ(h.complete(g.fence).answer, Answer::ok);
}

TEST(CorePark, WhatACompletionFreesIsFedInTheSameDecision) {
  CoreHarness h;
  JobId a = h.add(CoreHarness::job());
  JobId b = h.add(CoreHarness::job());
  auto g = h.lease("w", 2);
  JobId c = h.add(after({a, b}));
  park(h, parked(1));
  EXPECT_TRUE(
      h.run(CompleteCommand{{{g[0].fence, {}, {}}}, {}, {}}).fed.empty());
  Decision d = h.run(CompleteCommand{{{g[1].fence, {}, {}}}, {}, {}});
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(d.fed[0].grants[0].id, c);
}

TEST(CorePark, ADependentGoesBeforeAYoungerChild) {
  CoreHarness h;
  JobId a = h.add(CoreHarness::job());
  h.add(CoreHarness::job());
  auto g = h.lease("w", 2);
  JobId dependent = h.add(after({a}));
  CompleteCommand c;
  c.items = {{g[0].fence, {}, {}}, {g[1].fence, {}, {CoreHarness::job()}}};
  c.lease = CoreHarness::lease_command();
  Decision d = h.run(c);
  ASSERT_EQ(d.grants.size(), 1u);
  EXPECT_EQ(d.grants[0].id, dependent);
}

// A command that completes several jobs. A test gives the items children.
struct Batch {
  CoreHarness h;
  std::vector<JobId> ids;
  CompleteCommand c;

  explicit Batch(std::size_t items) {
    for (std::size_t i = 0; i < items; ++i) {
      ids.push_back(h.add(CoreHarness::job()));
    }
    for (const GrantAnswer& g : h.lease("w", static_cast<int>(items))) {
      c.items.push_back({g.fence, {}, {}});
    }
  }
  // The ids of all children, in the order of the items, once the command ran.
  std::vector<JobId> children() const {
    std::vector<JobId> all;
    for (const EndRecord& end : h.records<EndRecord>()) {
      for (const EnqueueRecord& child : end.children) all.push_back(child.id);
    }
    return all;
  }
};

TEST(CorePark, AChildThatALaterItemFreesIsHandedOutInTheSameDecision) {
  Batch b(3);
  b.c.items[0].outcome.code = EndCode::verdict;
  b.c.items[0].children = {after({b.ids[1], b.ids[2]})};
  b.c.lease = CoreHarness::lease_command();
  Decision d = b.h.run(b.c);
  ASSERT_EQ(d.grants.size(), 1u);
  EXPECT_EQ(d.grants[0].id, b.children().at(0));

  Batch fed(2);
  fed.c.items[0].children = {after({fed.ids[1]})};
  park(fed.h, parked(1));
  d = fed.h.run(fed.c);
  ASSERT_EQ(d.fed.size(), 1u);
  EXPECT_EQ(d.fed[0].grants[0].id, fed.children().at(0));
}

TEST(CorePark, AChildThatALaterItemFreesKeepsItsTurn) {
  Batch b(3);
  JobId dependent = b.h.add(after({b.ids[1]}));
  b.c.items[0].children = {after({b.ids[1]})};
  b.c.items[1].children = {CoreHarness::job()};
  b.c.items[2].children = {CoreHarness::job()};
  b.c.lease = CoreHarness::lease_command("w", 4);
  Decision d = b.h.run(b.c);
  auto children = b.children();
  ASSERT_EQ(d.grants.size(), 4u);
  EXPECT_EQ(d.grants[0].id, children.at(1));
  EXPECT_EQ(d.grants[1].id, dependent);
  EXPECT_EQ(d.grants[2].id, children.at(0));
  EXPECT_EQ(d.grants[3].id, children.at(2));
}

TEST(CorePark, AChildThatNoLaterItemFreesIsNotGranted) {
  Batch b(4);
  JobId other = b.h.add(CoreHarness::job("other"));
  NewJob later = after({b.ids[1]});
  later.delay_ms = 10;
  b.c.items[0].children = {after({b.ids[1], b.ids[2]}),  // one does not succeed
                           after({b.ids[1], other}), later};
  b.c.items[2].outcome.code = EndCode::verdict;
  b.c.items[3].children = {after({other})};
  b.c.lease = CoreHarness::lease_command("w", 9);
  b.c.lease->kinds = {"noop"};
  EXPECT_TRUE(b.h.run(b.c).grants.empty());
  b.h.pass(10);
  b.h.settle();
  GrantAnswer g = b.h.lease_one();
  EXPECT_EQ(g.id, other);
  b.h.settle();
}

TEST(CorePark, AFreedChildWithAConcurrencyKeyTakesItsSlot) {
  Batch b(2);
  NewJob keyed = after({b.ids[1]});
  keyed.concurrency_key = "c";
  keyed.concurrency_limit = 1;
  b.c.items[0].children = {keyed, keyed};
  b.c.lease = CoreHarness::lease_command("w", 9);
  Decision d = b.h.run(b.c);
  ASSERT_EQ(d.grants.size(), 1u);
  EXPECT_EQ(d.grants[0].id, b.children().at(0));
}

// One record walks 256 edges: those of children count, too.
TEST(CorePark, ChildrenBeyondOneRecordsWalkAreLeftToATick) {
  for (std::size_t children : {256u, 257u}) {
    Batch b(2);
    b.h.checked = false;
    b.c.items[0].children.assign(children, after({b.ids[1]}));
    b.c.lease = CoreHarness::lease_command("w", 300);
    const std::size_t granted = b.h.run(b.c).grants.size();
    EXPECT_EQ(granted, children == 256 ? 256u : 0u);
    b.h.settle();
    // A call takes 256 at most.
    EXPECT_EQ(b.h.lease("w", 300).size(), children == 256 ? 0u : 256u);
    b.h.core.check_invariants();
  }
}

TEST(CorePark, WhatEndsBeyondOneRecordsWalkFreesIsFedByATick) {
  CoreHarness h;
  h.checked = false;
  JobId root = h.add(CoreHarness::job("root"));
  GrantAnswer g = h.lease_one();
  std::vector<JobId> ids;
  for (int i = 0; i < 300; ++i) ids.push_back(h.add(after({root})));
  park(h, parked(1));
  EXPECT_TRUE(h.run(CompleteCommand{{{g.fence, {}, {}}}, {}, {}}).fed.empty());
  EXPECT_LE(h.core.next_due(), h.now);
  auto ticks = h.settle();
  ASSERT_FALSE(ticks.empty());
  ASSERT_EQ(ticks[0].fed.size(), 1u);
  EXPECT_EQ(ticks[0].fed[0].grants[0].id, ids[0]);
}

TEST(CorePark, WhatApplyHasNotReachedIsNotGranted) {
  for (EndCode code : {EndCode::none, EndCode::verdict}) {
    CoreHarness h;
    h.checked = false;
    JobId root = h.add(CoreHarness::job("root"));
    JobId other = h.add(CoreHarness::job("root"));
    auto g = h.lease("w", 2);
    for (int i = 0; i < 1000; ++i) h.add(after({root}));
    h.add(after({other}));
    CompleteCommand c;
    c.items = {{g[0].fence, {}, {}}, {g[1].fence, {}, {}}};
    c.items[0].outcome.code = code;
    c.lease = CoreHarness::lease_command("w", 200);
    EXPECT_TRUE(h.run(c).grants.empty());
    h.settle();
    h.core.check_invariants();
  }
}

TEST(CorePark, AnUnparkedCallTakesNothing) {
  CoreHarness h;
  park(h, parked(1));
  h.core.unpark(1);
  h.core.unpark(1);
  EXPECT_TRUE(h.run(EnqueueCommand{{CoreHarness::job()}, {}}).fed.empty());
  EXPECT_EQ(h.lease("w").size(), 1u);
}

TEST(CorePark, ALevelThatNobodyHasIsSaid) {
  CoreHarness h;
  NewJob j = CoreHarness::job();
  j.min_level = 3;
  JobId id = h.add(j);
  EXPECT_FALSE(h.core.look(id)->view.waiting_for_level);
  LeaseCommand c = parked(1);
  c.level = 2;
  park(h, c);
  EXPECT_TRUE(h.core.look(id)->view.waiting_for_level);
}

// --- bounds ---

TEST(CoreBounds, QueueFullNamesItsBound) {
  CoreOptions o;
  o.queue_max = 2;
  CoreHarness h(o);
  EnqueueCommand c;
  c.jobs.assign(3, CoreHarness::job());
  Decision d = h.run(c);
  EXPECT_EQ(d.items[1].answer, Answer::ok);
  EXPECT_EQ(d.items[2].answer, Answer::queue_full);
  EXPECT_NE(d.items[2].detail.find("MACHINA_QUEUE_MAX 2"), std::string::npos);
  h.complete(h.lease_one().fence);
  EXPECT_EQ(h.add_item(CoreHarness::job()).answer, Answer::ok);
}

TEST(CoreBounds, AFullQueueStillTakesACompletionsChild) {
  CoreOptions o;
  o.queue_max = 2;
  CoreHarness h(o);
  h.add(CoreHarness::job());
  h.add(CoreHarness::job());
  Fence fence = h.lease_one().fence;
  NewJob child = CoreHarness::job("child");
  EXPECT_EQ(h.complete(fence, EndCode::none, {child, child}).answer,
            Answer::queue_full);
  EXPECT_EQ(h.complete(fence, EndCode::none, {child}).answer, Answer::ok);
  EXPECT_EQ(h.core.live_jobs(), 2u);
}

TEST(CoreBounds, NamesAreBoundedAndUsedAgain) {
  CoreOptions o;
  o.names_max = 4;
  CoreHarness h(o);
  for (int round = 0; round < 50; ++round) {
    EnqueueCommand c;
    for (int i = 0; i < 6; ++i) {
      NewJob j = CoreHarness::job("k" + std::to_string(round * 3 + i));
      j.queue = "q" + std::to_string(round * 5 + i);
      c.jobs.push_back(j);
    }
    Decision d = h.run(c);
    for (int i = 0; i < 6; ++i) {
      EXPECT_EQ(d.items[i].answer, i < 4 ? Answer::ok : Answer::queue_full);
    }
    EXPECT_NE(d.items[5].detail.find("names_max 4"), std::string::npos);
    auto grants = h.lease("w", 10);
    ASSERT_EQ(grants.size(), 4u);
    for (const GrantAnswer& g : grants) h.complete(g.fence);
  }
  EXPECT_LE(h.core.counts().size(), 4u);
}

TEST(CoreBounds, PlacesAreNeededExactlyWhileLive) {
  CoreHarness h;
  JobId a = h.add(CoreHarness::job());
  h.add(CoreHarness::job());
  EXPECT_EQ(h.places.size(), 2u);
  h.cancel(a);
  EXPECT_EQ(h.places.size(), 1u);
  h.complete(h.lease_one().fence);
  EXPECT_TRUE(h.places.empty());
  EXPECT_EQ(h.core.reserved_bytes(), 0u);
}

TEST(CoreBounds, ScanVisitsEachLiveJobOnce) {
  CoreHarness h;
  h.checked = false;
  std::set<JobId> want;
  for (int i = 0; i < 2500; ++i) want.insert(h.add(CoreHarness::job()));
  for (int i = 0; i < 50; ++i) {
    JobId id = *want.begin();
    h.cancel(id);
    want.erase(id);
  }
  std::set<JobId> seen;
  std::uint64_t cursor = 0;
  int calls = 0;
  do {
    cursor = h.core.scan(cursor, 100, [&seen](const Core::Look& look) {
      EXPECT_TRUE(seen.insert(look.view.id).second);
      return seen.size() % 7 != 0;
    });
    ++calls;
  } while (cursor != 0);
  EXPECT_EQ(seen, want);
  EXPECT_GT(calls, 300);
}

TEST(CoreCounts, FollowEveryChange) {
  CoreHarness h;
  h.add(CoreHarness::job());
  NewJob j = CoreHarness::job();
  j.run_at_ms = h.now + 50;
  h.add(j);
  Millis enqueued = h.now;
  h.pass(20);
  QueueCounts c = h.core.counts().at(0);
  EXPECT_EQ(c.queue, "default");
  EXPECT_EQ(c.by_state[1], 1u);
  EXPECT_EQ(c.by_state[2], 1u);
  EXPECT_EQ(c.oldest_ready_ms, enqueued);
  h.complete(h.lease_one().fence);
  c = h.core.counts().at(0);
  EXPECT_EQ(c.by_state[5], 1u);
  EXPECT_EQ(c.oldest_ready_ms, 0);
}

}  // namespace
}  // namespace machina
