#include "queue/shard/shard.h"

#include <fstream>

#include "tests/queue/shard/shard_harness.h"

namespace machina {
namespace {

using ShardTest = ShardHarness;
using Status = Response::Status;

// --- H1 ---

TEST_F(ShardTest, NothingIsSaidBeforeItIsDurable) {
  open();
  JobId known = enqueued(noop());
  gate_->close_gate();
  EnqueueCommand more;
  more.jobs.push_back(noop());
  auto enqueue_at = submit(Command(more));
  auto lease_at = submit(Command(lease_command()));
  GetQuery query;
  query.id = known;
  auto read_at = submit(query);
  CancelCommand cancel;  // of a job that never was: a refusal
  cancel.id = make_job_id(1, 2, 3);
  auto refusal_at = submit(Command(cancel));
  auto list_at = submit(ListQuery{});
  turn_for(100);
  EXPECT_TRUE(answers_.empty());
  gate_->open_gate();
  EXPECT_EQ(await(enqueue_at).items.at(0).answer, Answer::ok);
  EXPECT_EQ(await(lease_at).leases.size(), 1u);
  EXPECT_EQ(await(read_at).views.at(0).id, known);
  EXPECT_EQ(await(refusal_at).items.at(0).answer, Answer::not_found);
  EXPECT_EQ(await(list_at).views.size(), 2u);
}

TEST_F(ShardTest, PoisonAnswersAllWhoWaitAndNeverOk) {
  open();
  enqueued(noop());
  auto parked_lease = [&] {
    LeaseCommand other = lease_command();
    other.kinds = {"absent"};
    return submit(Command(other), 20'000);
  }();
  gate_->fail_from_now();
  EnqueueCommand more;
  more.jobs.push_back(noop());
  auto at = submit(Command(more));
  EXPECT_EQ(await(at).status, Status::poisoned);
  EXPECT_EQ(await(parked_lease).status, Status::poisoned);
  EXPECT_TRUE(shard_->poisoned());
  EXPECT_EQ(enqueue(noop()).status, Status::poisoned);
  // What the core knows and the disk does not is told to no reader either.
  EXPECT_EQ(call(ListQuery{}).status, Status::poisoned);
  EXPECT_FALSE(shard_->close());
}

// --- the life of a job ---

TEST_F(ShardTest, JobIsLeasedWithItsBodyAndCompleted) {
  open();
  NewJob job = noop(R"({"n":1})");
  job.labels = {{"a", "b"}};
  Response made = enqueue(job);
  ASSERT_EQ(made.views.size(), 1u);
  EXPECT_EQ(made.views[0].payload, R"({"n":1})");
  EXPECT_EQ(made.views[0].state, State::ready);
  LeaseView lease = lease_one();
  EXPECT_EQ(lease.job.id, made.items[0].id);
  EXPECT_EQ(lease.job.payload, R"({"n":1})");
  EXPECT_EQ(lease.job.labels, job.labels);
  EXPECT_EQ(lease.job.attempt, 1);
  EXPECT_EQ(lease.expires_at_ms, clock_.wall_ms() + options_.core.lease_ms);
  Response done = complete(lease.fence, R"({"ok":true})");
  ASSERT_EQ(done.items.size(), 1u);
  EXPECT_EQ(done.items[0].answer, Answer::ok);
  EXPECT_EQ(done.views.at(0).state, State::succeeded);
  JobView view = get(made.items[0].id).views.at(0);
  EXPECT_EQ(view.state, State::succeeded);
  EXPECT_EQ(view.result, R"({"ok":true})");
  EXPECT_EQ(view.payload, R"({"n":1})");
  wait_for_history();
  view = get(made.items[0].id).views.at(0);
  EXPECT_EQ(view.state, State::succeeded);
  EXPECT_EQ(view.result, R"({"ok":true})");
}

TEST_F(ShardTest, BodiesBeyondTheCacheComeFromTheLog) {
  options_.body_cache_bytes = 4096;
  open();
  std::vector<JobId> ids;
  for (int i = 0; i < 20; ++i) {
    ids.push_back(
        enqueued(noop("{\"p\":\"" + std::string(2000, 'a' + i) + "\"}")));
  }
  Response response = call(Command(lease_command(20)));
  ASSERT_EQ(response.leases.size(), 20u);
  for (std::size_t i = 0; i < 20; ++i) {
    const JobView& view = response.leases[i].job;
    EXPECT_EQ(view.id, ids[i]);
    EXPECT_EQ(
        view.payload,
        "{\"p\":\"" + std::string(2000, static_cast<char>('a' + i)) + "\"}");
    EXPECT_EQ(complete(response.leases[i].fence).items[0].answer, Answer::ok);
  }
  wait_for_history();
  EXPECT_EQ(get(ids[3]).views.at(0).payload.size(), 2008u);
}

// In the cache, in the log, ended and not yet in history, in history.
TEST_F(ShardTest, F08_WhatAnAnswerMayNotHaveIsLeftOut) {
  options_.body_cache_bytes = 4096;
  const std::string large = "{\"p\":\"" + std::string(50'000, 'x') + "\"}";
  open();
  auto look = [&](const JobId& id, std::uint64_t view_bytes) {
    Request request;
    request.from = {0, 1, ++sequence_};
    GetQuery query;
    query.id = id;
    request.what = query;
    request.view_bytes = view_bytes;
    const Address from = request.from;
    shard_->submit(std::move(request));
    return await(from);
  };
  auto check = [&](const JobId& id, std::uint64_t least, const char* where) {
    SCOPED_TRACE(where);
    const Response all = look(id, UINT64_MAX);
    EXPECT_EQ(all.views.at(0).payload, large);
    EXPECT_EQ(all.left_out, 0u);
    const Response part = look(id, 2048);
    EXPECT_EQ(part.views.at(0).id, id);
    EXPECT_EQ(part.views.at(0).state, all.views.at(0).state);
    EXPECT_TRUE(part.views.at(0).payload.empty());
    EXPECT_TRUE(part.views.at(0).result.empty());
    EXPECT_GE(part.left_out, least);
  };
  const JobId id = enqueued(noop(large));
  check(id, 50'000, "just made");
  for (int i = 0; i < 10; ++i) enqueued(noop(large));
  check(id, 50'000, "in the log");
  const LeaseView lease = lease_one();
  ASSERT_EQ(lease.job.id, id);
  EXPECT_EQ(lease.job.payload, large);
  ASSERT_EQ(complete(lease.fence, large).items.at(0).answer, Answer::ok);
  check(id, 100'000, "ended");
  wait_for_history();
  reopen();
  check(id, 100'000, "in history");
}

TEST_F(ShardTest, F09_WhoHangsUpWhileHistoryIsReadIsNotWaitedFor) {
  open();
  const JobId first = enqueued(noop());
  ASSERT_EQ(complete(lease_one().fence).items.at(0).answer, Answer::ok);
  wait_for_history();
  reopen();
  EnqueueCommand command;
  command.jobs.push_back(noop());
  command.jobs.back().depends_on = {first};
  const Address at = submit(Command(command), 60'000);
  shard_->hurry(0, 1);
  EXPECT_TRUE(await(at).waited_out);
}

TEST_F(ShardTest, LeaseReplyIsBoundedAndTheExcessGoesBack) {
  open();
  for (int i = 0; i < 8; ++i) {
    enqueued(noop("{\"p\":\"" + std::string(1'000'000, 'x') + "\"}"));
  }
  Response response = call(Command(lease_command(8)));
  EXPECT_EQ(response.leases.size(), 4u);
  EXPECT_EQ(shard_->running(), 4u);
  Response rest = call(Command(lease_command(8)));
  ASSERT_EQ(rest.leases.size(), 4u);
  EXPECT_EQ(rest.leases[0].job.attempt, 1);  // the first grant did not count
}

TEST_F(ShardTest, ChildrenOfACompletionLiveAndHaveTheirBodies) {
  options_.body_cache_bytes = 0;
  open();
  enqueued(noop());
  CompleteCommand command = completion(lease_one().fence);
  command.items[0].children.push_back(noop(R"({"child":1})"));
  command.items[0].children.push_back(noop(R"({"child":2})"));
  ASSERT_EQ(call(Command(command)).items.at(0).answer, Answer::ok);
  Response response = call(Command(lease_command(5)));
  ASSERT_EQ(response.leases.size(), 2u);
  EXPECT_EQ(response.leases[0].job.payload, R"({"child":1})");
  EXPECT_EQ(response.leases[1].job.payload, R"({"child":2})");
}

// --- waiting ---

TEST_F(ShardTest, ParkedLeaseIsFedByAnEnqueue) {
  open();
  auto lease_at = submit(Command(lease_command()), 20'000);
  turn_for(20);
  EXPECT_FALSE(answered(lease_at));
  JobId id = enqueued(noop(R"({"fed":1})"));
  Response response = await(lease_at);
  ASSERT_EQ(response.leases.size(), 1u);
  EXPECT_EQ(response.leases[0].job.id, id);
  EXPECT_EQ(response.leases[0].job.payload, R"({"fed":1})");
}

TEST_F(ShardTest, ParkedLeaseIsAnsweredEmptyWhenItsWaitPasses) {
  open();
  auto at = submit(Command(lease_command()), 5000);
  turn_for(10);
  EXPECT_GT(shard_->next_due_ms(), 0);
  clock_.advance(4999);
  turn_for(10);
  EXPECT_FALSE(answered(at));
  clock_.advance(1);
  Response response = await(at);
  EXPECT_EQ(response.status, Status::done);
  EXPECT_TRUE(response.leases.empty());
  // Its number is no longer fed.
  JobId id = enqueued(noop());
  EXPECT_EQ(state_of(id), State::ready);
}

TEST_F(ShardTest, GrantWhoseConnectionClosedIsReleased) {
  open();
  JobId id = enqueued(noop());
  gate_->close_gate();
  auto at = submit(Command(lease_command()), 0, 77);
  turn_for(20);
  EXPECT_EQ(shard_->running(), 1u);
  shard_->abandon(0, 77);
  gate_->open_gate();
  turn_for(50);
  EXPECT_FALSE(answered(at));
  EXPECT_EQ(shard_->running(), 0u);
  LeaseView lease = lease_one();
  EXPECT_EQ(lease.job.id, id);
  EXPECT_EQ(lease.job.attempt, 1);
}

TEST_F(ShardTest, AbandonedParkedCallIsNotFed) {
  open();
  auto at = submit(Command(lease_command()), 20'000, 78);
  turn_for(10);
  shard_->abandon(0, 78);
  JobId id = enqueued(noop());
  EXPECT_EQ(state_of(id), State::ready);
  EXPECT_FALSE(answered(at));
}

TEST_F(ShardTest, WaitReturnsWhenTheJobEnds) {
  open();
  EnqueueCommand command;
  command.jobs.push_back(noop());
  auto wait_at = submit(Command(command), 60'000);
  turn_for(20);
  EXPECT_FALSE(answered(wait_at));
  LeaseView lease = lease_one();
  GetQuery query;
  query.id = lease.job.id;
  query.until_final = true;
  query.wait_ms = 60'000;
  auto get_at = submit(query);
  turn_for(10);
  EXPECT_FALSE(answered(get_at));
  complete(lease.fence, R"({"r":7})");
  for (const Address& at : {wait_at, get_at}) {
    Response response = await(at);
    EXPECT_FALSE(response.waited_out);
    EXPECT_EQ(response.items.at(0).state, State::succeeded);
    EXPECT_EQ(response.views.at(0).state, State::succeeded);
    EXPECT_EQ(response.views.at(0).result, R"({"r":7})");
  }
}

TEST_F(ShardTest, WaitThatPassesSaysSo) {
  open();
  EnqueueCommand command;
  command.jobs.push_back(noop());
  auto at = submit(Command(command), 1000);
  turn_for(10);
  clock_.advance(1001);
  Response response = await(at);
  EXPECT_TRUE(response.waited_out);
  EXPECT_EQ(response.views.at(0).state, State::ready);
}

TEST_F(ShardTest, HeartbeatReturnsOnCancelAndExtendsTheLease) {
  open();
  JobId id = enqueued(noop());
  LeaseView lease = lease_one();
  HeartbeatCommand beat;
  beat.items.push_back({lease.fence, 40, "halfway"});
  auto at = submit(Command(beat), 60'000);
  turn_for(20);
  EXPECT_FALSE(answered(at));
  JobView view = get(id).views.at(0);
  EXPECT_EQ(view.progress_percent, 40);
  EXPECT_EQ(view.progress_message, "halfway");
  clock_.advance(options_.core.lease_ms - 1);
  turn_for(10);
  EXPECT_EQ(shard_->running(), 1u);
  CancelCommand cancel;
  cancel.id = id;
  Response cancelled = call(Command(cancel));
  EXPECT_EQ(cancelled.items.at(0).answer, Answer::ok);
  EXPECT_EQ(cancelled.views.at(0).state, State::running);
  EXPECT_TRUE(cancelled.views.at(0).cancel_requested);
  Response told = await(at);
  ASSERT_EQ(told.items.size(), 1u);
  EXPECT_TRUE(told.items[0].cancel);
  // The answer extended the lease once more.
  clock_.advance(options_.core.lease_ms - 1);
  turn_for(10);
  EXPECT_EQ(shard_->running(), 1u);
  clock_.advance(2);
  EXPECT_TRUE(turn_until([&] { return shard_->running() == 0; }));
  EXPECT_EQ(state_of(id), State::cancelled);
}

TEST_F(ShardTest, HeartbeatOfALostLeaseReturnsAtOnce) {
  open();
  enqueued(noop());
  LeaseView lease = lease_one();
  HeartbeatCommand beat;
  beat.items.push_back({lease.fence, -1, {}});
  auto at = submit(Command(beat), 60'000);
  turn_for(10);
  GoneCommand gone;
  gone.workers = {"w1"};
  call(Command(gone));
  EXPECT_EQ(await(at).items.at(0).answer, Answer::stale_lease);
}

TEST_F(ShardTest, LeaseExpiresWithoutHeartbeats) {
  open();
  JobId id = enqueued(noop());
  lease_one();
  clock_.advance(options_.core.lease_ms + 1);
  EXPECT_TRUE(turn_until([&] { return shard_->running() == 0; }));
  JobView view = get(id).views.at(0);
  EXPECT_EQ(view.state, State::scheduled);
  EXPECT_EQ(view.error_code, EndCode::lease_expired);
}

// --- repeats ---

TEST_F(ShardTest, RepeatedCompleteGetsItsStoredAnswer) {
  open();
  JobId id = enqueued(noop());
  Fence fence = lease_one().fence;
  ASSERT_EQ(complete(fence, R"({"first":1})").items.at(0).answer, Answer::ok);
  auto check = [&] {
    Response again = complete(fence, R"({"second":2})");
    EXPECT_EQ(again.items.at(0).answer, Answer::ok);
    EXPECT_EQ(again.items.at(0).id, id);
    EXPECT_EQ(again.views.at(0).state, State::succeeded);
    EXPECT_EQ(again.views.at(0).result, R"({"first":1})");
  };
  check();
  wait_for_history();
  check();
  reopen();
  check();
  kill();
  open();
  check();
  HeartbeatCommand beat;
  beat.items.push_back({fence, -1, {}});
  EXPECT_EQ(call(Command(beat)).items.at(0).answer, Answer::stale_lease);
}

TEST_F(ShardTest, StaleCompleteIsRefused) {
  open();
  JobId id = enqueued(noop());
  Fence first = lease_one().fence;
  GoneCommand gone;
  gone.workers = {"w1"};
  call(Command(gone));
  Fence second = lease_one().fence;
  EXPECT_GT(second, first);
  EXPECT_EQ(complete(first).items.at(0).answer, Answer::stale_lease);
  EXPECT_EQ(state_of(id), State::running);
  EXPECT_EQ(complete(second).items.at(0).answer, Answer::ok);
  wait_for_history();
  EXPECT_EQ(complete(first).items.at(0).answer, Answer::stale_lease);
  EXPECT_EQ(complete(make_fence(77, 1)).items.at(0).answer,
            Answer::stale_lease);
}

TEST_F(ShardTest, BatchCompleteAnswersEachAndLeasesAgain) {
  open();
  for (int i = 0; i < 6; ++i) enqueued(noop());
  Response first = call(Command(lease_command(3)));
  ASSERT_EQ(first.leases.size(), 3u);
  CompleteCommand command = completion(first.leases[0].fence);
  command.items.push_back(command.items[0]);
  command.items[1].fence = make_fence(99, 9);
  command.items.push_back(command.items[0]);
  command.items[2].fence = first.leases[2].fence;
  command.lease = lease_command(2);
  Response response = call(Command(command));
  ASSERT_EQ(response.items.size(), 3u);
  EXPECT_EQ(response.items[0].answer, Answer::ok);
  EXPECT_EQ(response.items[1].answer, Answer::stale_lease);
  EXPECT_EQ(response.items[2].answer, Answer::ok);
  EXPECT_EQ(response.items[2].state, State::succeeded);
  EXPECT_EQ(response.leases.size(), 2u);
}

TEST_F(ShardTest, CompleteThatLeasesAgainWaitsAndIsFed) {
  open();
  enqueued(noop());
  CompleteCommand command = completion(lease_one().fence);
  command.lease = lease_command();
  auto at = submit(Command(command), 20'000);
  turn_for(20);
  EXPECT_FALSE(answered(at));
  JobId next = enqueued(noop());
  Response response = await(at);
  EXPECT_EQ(response.items.at(0).answer, Answer::ok);
  ASSERT_EQ(response.leases.size(), 1u);
  EXPECT_EQ(response.leases[0].job.id, next);
}

TEST_F(ShardTest, DuplicateIsTheSameJobBeforeAndAfterItsEnd) {
  open();
  NewJob job = noop();
  job.dedup_key = "k";
  job.payload_digest[0] = 5;
  JobId id = enqueued(job);
  auto check = [&](State state) {
    Response again = enqueue(job);
    ASSERT_EQ(again.items.size(), 1u);
    EXPECT_EQ(again.items[0].answer, Answer::duplicate);
    EXPECT_EQ(again.items[0].id, id);
    EXPECT_EQ(again.items[0].state, state);
    EXPECT_TRUE(again.views.at(0).duplicate);
    EXPECT_EQ(again.views.at(0).state, state);
  };
  check(State::ready);
  complete(lease_one().fence);
  check(State::succeeded);
  wait_for_history();
  check(State::succeeded);
  EXPECT_EQ(enqueue(job, 60'000).items.at(0).answer, Answer::duplicate);
  reopen();
  check(State::succeeded);
  job.payload_digest[0] = 6;
  EXPECT_EQ(enqueue(job).items.at(0).answer, Answer::dedup_mismatch);
}

TEST_F(ShardTest, F11_AKeyThatOutlivesItsJobTellsTheTruth) {
  open();
  NewJob job = noop();
  job.dedup_key = "k";
  job.payload_digest[0] = 5;
  job.keep_result_ms = 0;
  JobId id = enqueued(job);
  complete(lease_one().fence);
  const Millis finished = clock_.wall_ms();
  auto check = [&] {
    wait_for_history();
    ASSERT_EQ(get(id).items.at(0).answer, Answer::not_found);
    Response one = enqueue(job, 60'000);
    ASSERT_EQ(one.items.at(0).answer, Answer::duplicate);
    const JobView& view = one.views.at(0);
    EXPECT_EQ(view.id, id);
    EXPECT_EQ(view.state, State::succeeded);
    EXPECT_EQ(view.kind, "noop");
    EXPECT_EQ(view.dedup_key, "k");
    EXPECT_EQ(view.created_ms, created_ms(id));
    EXPECT_EQ(view.finished_ms, finished);
    EXPECT_TRUE(view.duplicate);
    EXPECT_TRUE(view.past_retention);
    EnqueueCommand many;
    many.jobs = {job, noop()};
    Response bulk = call(Command(many));
    EXPECT_EQ(bulk.items.at(0).answer, Answer::duplicate);
    EXPECT_EQ(bulk.items.at(0).state, State::succeeded);
  };
  check();
  reopen();
  check();
  kill();
  open();
  check();
}

// --- clocks ---

class ShardClock : public ShardHarness {
 protected:
  JobId delayed(Millis ms) {
    NewJob job = noop();
    job.delay_ms = ms;
    return enqueued(job);
  }
  JobId at(Millis wall) {
    NewJob job = noop();
    job.run_at_ms = wall;
    return enqueued(job);
  }
  void pass(Millis ms) {
    clock_.advance(ms);
    shard_->turn();
  }
};

TEST_F(ShardClock, F07_AStepWhileItRunsMovesNoDuration) {
  open();
  for (Millis step : {-30'000, -3'600'000, 3'600'000, 30'000, -3'600'000}) {
    JobId id = delayed(3000);
    clock_.jump_wall(step);
    shard_->turn();
    pass(2999);
    EXPECT_EQ(state_of(id), State::scheduled) << step;
    pass(1);
    EXPECT_EQ(state_of(id), State::ready) << step;
    JobId later = at(clock_.wall_ms() + 2000);
    pass(1900);
    EXPECT_EQ(state_of(later), State::scheduled) << step;
    pass(100);
    EXPECT_EQ(state_of(later), State::ready) << step;
    LeaseView lease = lease_one();
    pass(50);
    JobView ended = complete(lease.fence).views.at(0);
    EXPECT_EQ(ended.finished_ms, clock_.wall_ms()) << step;
    EXPECT_EQ(ended.finished_ms - ended.started_ms, 50) << step;
    EXPECT_EQ(created_ms(enqueued(noop())), clock_.wall_ms()) << step;
    // The others are of no interest.
    for (const LeaseView& one : call(Command(lease_command(9))).leases) {
      complete(one.fence);
    }
  }
  EXPECT_EQ(shard_->stats().clock_steps, 5u);
  EXPECT_EQ(shard_->stats().last_clock_step_ms, -3'600'000);
}

TEST_F(ShardClock, F07_ForwardAndCorrectedIsAsIfNothingWas) {
  open();
  JobId id = delayed(3000);
  JobId later = at(clock_.wall_ms() + 4000);
  clock_.jump_wall(2000);
  shard_->turn();
  pass(1000);
  clock_.jump_wall(-2000);
  shard_->turn();
  pass(1999);
  EXPECT_EQ(state_of(id), State::scheduled);
  pass(1);
  EXPECT_EQ(state_of(id), State::ready);
  EXPECT_EQ(state_of(later), State::scheduled);
  pass(1000);
  EXPECT_EQ(state_of(later), State::ready);
}

// Over a restart, and a kill, in the same boot of the machine.
TEST_F(ShardClock, F07_ARestartTakesWhatItTakes) {
  clock_.reboot();
  open();
  for (Millis step : {0, -30'000, -3'600'000, 3'600'000}) {
    JobId id = delayed(10'000);
    pass(1000);
    if (step < 0) {
      kill();
    } else {
      close();
    }
    clock_.jump_wall(step);
    clock_.advance(2000);
    open();
    pass(6999);
    EXPECT_EQ(state_of(id), State::scheduled) << step;
    pass(1);
    EXPECT_EQ(state_of(id), State::ready) << step;
  }
}

// Nobody can tell how long the machine was down but its wall clock.
TEST_F(ShardClock, F07_AfterARebootTheWallClockSaysHowLongItWas) {
  clock_.reboot();
  open();
  JobId id = delayed(10'000);
  close();
  clock_.advance(4000);
  clock_.reboot();
  open();
  pass(5999);
  EXPECT_EQ(state_of(id), State::scheduled);
  pass(1);
  EXPECT_EQ(state_of(id), State::ready);
  // It was set back meanwhile: no time has passed, and none has to be made up.
  id = delayed(10'000);
  close();
  clock_.advance(4000);
  clock_.jump_wall(-3'600'000);
  clock_.reboot();
  open();
  pass(9999);
  EXPECT_EQ(state_of(id), State::scheduled);
  pass(1);
  EXPECT_EQ(state_of(id), State::ready);
}

TEST_F(ShardClock, F07_KeysAndRetentionDoNotFollowTheWallClock) {
  open();
  NewJob job = noop();
  job.dedup_key = "k";
  job.dedup_ttl_ms = 60'000;
  job.keep_result_ms = 30'000;
  JobId id = enqueued(job);
  complete(lease_one().fence);
  clock_.jump_wall(3'600'000);
  wait_for_history();
  EXPECT_EQ(state_of(id), State::succeeded);
  EXPECT_EQ(enqueue(job).items.at(0).answer, Answer::duplicate);
  clock_.jump_wall(-7'200'000);
  clock_.advance(60'000);
  EXPECT_EQ(get(id).items.at(0).answer, Answer::not_found);
  EXPECT_EQ(enqueue(job).items.at(0).answer, Answer::ok);
}

// --- finished jobs ---

TEST_F(ShardTest, DependencyOnAFinishedJobIsAFactFromHistory) {
  open();
  JobId good = enqueued(noop());
  complete(lease_one().fence);
  JobId bad = enqueued(noop());
  CancelCommand cancel;
  cancel.id = bad;
  call(Command(cancel));
  auto check = [&] {
    NewJob after = noop();
    after.depends_on = {good};
    Response ready = enqueue(after);
    EXPECT_EQ(ready.items.at(0).answer, Answer::ok);
    EXPECT_EQ(ready.items.at(0).state, State::ready);
    after.depends_on = {good, bad};
    Response born = enqueue(after);
    EXPECT_EQ(born.items.at(0).answer, Answer::ok);
    EXPECT_EQ(born.items.at(0).state, State::cancelled);
    EXPECT_EQ(born.views.at(0).error_code, EndCode::dependency);
    after.depends_on = {make_job_id(clock_.wall_ms(), 1, 2)};
    EXPECT_EQ(enqueue(after).items.at(0).answer, Answer::unknown_dependency);
  };
  check();
  wait_for_history();
  check();
}

TEST_F(ShardTest, ADependencyOfAnotherTenantIsUnknown) {
  open();
  NewJob job = noop();
  job.tenant = "ours";
  const JobId id = enqueued(job);
  auto check = [&](State state) {
    NewJob after = noop();
    after.depends_on = {id};
    after.tenant = "theirs";
    EXPECT_EQ(enqueue(after).items.at(0).answer, Answer::unknown_dependency);
    after.tenant = "ours";
    const Response own = enqueue(after);
    EXPECT_EQ(own.items.at(0).answer, Answer::ok);
    EXPECT_EQ(own.items.at(0).state, state);
  };
  check(State::waiting);
  complete(lease_one().fence);
  check(State::ready);
  // History does not have the end yet, and the shard does not have the body.
  kill();
  open();
  check(State::ready);
  wait_for_history();
  check(State::ready);
}

TEST_F(ShardTest, CancelOfFinishedJobsTellsWhy) {
  open();
  JobId done = enqueued(noop());
  complete(lease_one().fence);
  JobId gone = enqueued(noop());
  CancelCommand cancel;
  cancel.id = gone;
  EXPECT_EQ(call(Command(cancel)).items.at(0).answer, Answer::ok);
  for (int round = 0; round < 2; ++round) {
    cancel.id = gone;
    EXPECT_EQ(call(Command(cancel)).items.at(0).answer, Answer::already);
    cancel.id = done;
    Response refused = call(Command(cancel));
    EXPECT_EQ(refused.items.at(0).answer, Answer::wrong_state);
    EXPECT_EQ(refused.items.at(0).state, State::succeeded);
    cancel.id = make_job_id(clock_.wall_ms(), 1, 2);
    EXPECT_EQ(call(Command(cancel)).items.at(0).answer, Answer::not_found);
    EXPECT_EQ(get(cancel.id).items.at(0).answer, Answer::not_found);
    wait_for_history();
  }
}

TEST_F(ShardTest, RetryFromHistoryRunsTheSameJobAgain) {
  open();
  for (bool in_history : {false, true}) {
    JobId id = enqueued(noop(R"({"again":1})"));
    CompleteCommand failed = completion(lease_one().fence);
    failed.items[0].outcome.code = EndCode::verdict;
    EXPECT_EQ(call(Command(failed)).items.at(0).state, State::failed);
    if (in_history) wait_for_history();
    RetryCommand retry;
    retry.id = id;
    Response revived = call(Command(retry));
    ASSERT_EQ(revived.items.at(0).answer, Answer::ok);
    EXPECT_EQ(state_of(id), State::ready);
    // Twice at once: the second finds it live.
    EXPECT_EQ(call(Command(retry)).items.at(0).answer, Answer::wrong_state);
    wait_for_history();
    EXPECT_EQ(state_of(id), State::ready);
    kill();
    open();
    LeaseView lease = lease_one();
    EXPECT_EQ(lease.job.id, id);
    EXPECT_EQ(lease.job.payload, R"({"again":1})");
    EXPECT_EQ(lease.job.attempt, 2);
    complete(lease.fence);
    wait_for_history();
    EXPECT_EQ(state_of(id), State::succeeded);
    EXPECT_EQ(call(Command(retry)).items.at(0).answer, Answer::wrong_state);
    retry.id = make_job_id(clock_.wall_ms(), 1, 2);
    EXPECT_EQ(call(Command(retry)).items.at(0).answer, Answer::not_found);
  }
}

TEST_F(ShardTest, KeepNothingIsForgottenOnceCounted) {
  open();
  NewJob job = noop();
  job.keep_result_ms = 0;
  JobId id = enqueued(job);
  EXPECT_EQ(complete(lease_one().fence).views.at(0).state, State::succeeded);
  wait_for_history();
  EXPECT_EQ(get(id).items.at(0).answer, Answer::not_found);
}

TEST_F(ShardTest, BlockedJobShowsWhyAndItsNextLeaseCarriesTheInput) {
  open();
  JobId id = enqueued(noop());
  BlockCommand block;
  block.fence = lease_one().fence;
  block.reason = "approval";
  block.data = R"({"ask":"boss"})";
  ASSERT_EQ(call(Command(block)).items.at(0).answer, Answer::ok);
  JobView view = get(id).views.at(0);
  EXPECT_EQ(view.state, State::blocked);
  EXPECT_EQ(view.blocked_reason, "approval");
  EXPECT_EQ(view.blocked_data, R"({"ask":"boss"})");
  ASSERT_FALSE(view.blocked_token.empty());
  UnblockCommand unblock;
  unblock.id = id;
  unblock.token = "wrong";
  EXPECT_EQ(call(Command(unblock)).items.at(0).answer, Answer::bad_token);
  kill();
  open();
  unblock.token = view.blocked_token;
  unblock.input = R"({"yes":true})";
  ASSERT_EQ(call(Command(unblock)).items.at(0).answer, Answer::ok);
  LeaseView lease = lease_one();
  EXPECT_EQ(lease.job.id, id);
  EXPECT_EQ(lease.job.input, R"({"yes":true})");
  EXPECT_EQ(lease.job.attempt, 1);
}

// --- lists ---

TEST_F(ShardTest, ListPagesOverLiveThenFinished) {
  open();
  std::map<JobId, int> seen;
  for (int i = 0; i < 12; ++i) seen[enqueued(noop())] = 0;
  Response leased = call(Command(lease_command(7)));
  ASSERT_EQ(leased.leases.size(), 7u);
  for (const LeaseView& lease : leased.leases) complete(lease.fence);
  ListQuery query;
  query.limit = 5;
  int pages = 0;
  bool finished = false;
  do {
    Response page = call(query);
    ASSERT_EQ(page.status, Status::done) << page.detail;
    for (const JobView& view : page.views) {
      ++seen.at(view.id);
      EXPECT_TRUE(view.payload.empty());
      EXPECT_TRUE(view.result.empty());
      if (is_final(view.state)) finished = true;
      EXPECT_EQ(is_final(view.state), finished) << "live after finished";
    }
    query.cursor = page.cursor;
    ASSERT_LT(++pages, 20);
  } while (!query.cursor.empty());
  for (const auto& [id, times] : seen) EXPECT_EQ(times, 1) << to_string(id);

  ListQuery ready;
  ready.states = {State::ready};
  EXPECT_EQ(call(ready).views.size(), 5u);
  ListQuery succeeded;
  succeeded.states = {State::succeeded};
  EXPECT_EQ(call(succeeded).views.size(), 7u);
  ListQuery bad;
  bad.cursor = "nonsense";
  EXPECT_EQ(call(bad).status, Status::bad_cursor);
}

// After a burst the places of the jobs that ended come first, and a filter may
// match none of very many: a page without jobs is the end all the same.
TEST_F(ShardTest, F24_APageIsEmptyOnlyAtTheEnd) {
  open();
  EnqueueCommand many;
  for (int i = 0; i < 2 * 2000 + 500; ++i) many.jobs.push_back(noop());
  ASSERT_EQ(call(Command(std::move(many))).status, Status::done);
  NewJob late_one = noop();
  late_one.kind = "late";
  const JobId last = enqueued(late_one);
  auto pages = [&](ListQuery query, std::size_t most) {
    std::size_t jobs = 0;
    for (std::size_t page = 0; page < most; ++page) {
      Response r = call(query);
      EXPECT_EQ(r.status, Status::done) << r.detail;
      jobs += r.views.size();
      if (r.cursor.empty()) return jobs;
      EXPECT_FALSE(r.views.empty()) << "page " << page << " " << r.cursor;
      EXPECT_GT(r.scanned, 0u);
      query.cursor = r.cursor;
    }
    ADD_FAILURE() << "no end";
    return jobs;
  };
  ListQuery late;
  late.kind = "late";
  EXPECT_EQ(pages(late, 2), 1u);  // live ones that do not match come first
  for (int left = 4500; left > 0;) {
    LeaseCommand lease = lease_command(256);
    lease.kinds = {"noop"};
    Response leased = call(Command(lease));
    ASSERT_FALSE(leased.leases.empty());
    left -= static_cast<int>(leased.leases.size());
    CompleteCommand ends;
    for (const LeaseView& view : leased.leases) {
      ends.items.push_back({view.fence, {}, {}});
    }
    call(Command(std::move(ends)));
  }
  ListQuery ready;
  ready.states = {State::ready};
  Response r = call(ready);  // the places before it are free by now
  ASSERT_EQ(r.views.size(), 1u);
  EXPECT_EQ(r.views[0].id, last);
  ListQuery failed;
  failed.states = {State::failed};
  EXPECT_EQ(pages(failed, 1), 0u);  // all that ended was looked at
  ListQuery any;
  any.limit = 1000;
  EXPECT_EQ(pages(any, 12), 4501u);
}

// --- restarts ---

TEST_F(ShardTest, KilledWithoutCloseKeepsJobsDedupAndLeases) {
  open();
  NewJob job = noop(R"({"keep":1})");
  job.dedup_key = "key";
  JobId first = enqueued(job);
  Fence fence = lease_one().fence;
  JobId second = enqueued(noop());
  kill();
  open();
  EXPECT_EQ(enqueue(job).items.at(0).answer, Answer::duplicate);
  EXPECT_EQ(state_of(first), State::running);
  EXPECT_EQ(state_of(second), State::ready);
  // The lease gets its whole time again.
  clock_.advance(options_.core.lease_ms - 1);
  turn_for(10);
  EXPECT_EQ(state_of(first), State::running);
  EXPECT_EQ(complete(fence).items.at(0).answer, Answer::ok);
  LeaseView lease = lease_one();
  EXPECT_EQ(lease.job.id, second);
  EXPECT_GT(lease.fence, fence);
}

TEST_F(ShardTest, CheckpointAndTailGiveTheSameState) {
  options_.checkpoint_log_bytes = 4096;
  options_.checkpoint_ms = 1;
  open();
  std::vector<JobId> ids;
  for (int i = 0; i < 200; ++i) {
    NewJob job = noop("{\"p\":\"" + std::string(500, 'p') + "\"}");
    job.keep_result_ms = 3'600'000;
    ids.push_back(enqueued(job));
    if (i % 2 == 0) complete(lease_one().fence);
    clock_.advance(5);
  }
  kill();
  open();
  EXPECT_GT(report_.segments, 0u);
  int live = 0;
  for (const JobId& id : ids) live += !is_final(state_of(id));
  EXPECT_EQ(live, 100);
  // Bodies of the live are still there, whatever was removed.
  Response leases = call(Command(lease_command(256)));
  ASSERT_EQ(leases.leases.size(), 100u);
  for (const auto& lease : leases.leases) {
    EXPECT_EQ(lease.job.payload.size(), 508u);
  }
}

TEST_F(ShardTest, HistoryIsRebuiltFromTheLogAfterItsFileIsLost) {
  open();
  JobId id = enqueued(noop());
  Fence fence = lease_one().fence;
  complete(fence, R"({"r":1})");
  wait_for_history();
  close();
  for (const auto& entry :
       std::filesystem::directory_iterator(root_ + "/history")) {
    std::filesystem::remove(entry.path());
  }
  open();
  EXPECT_EQ(get(id).views.at(0).result, R"({"r":1})");
  wait_for_history();
  EXPECT_EQ(get(id).views.at(0).result, R"({"r":1})");
  EXPECT_EQ(complete(fence).items.at(0).answer, Answer::ok);
}

TEST_F(ShardTest, SecondServerOnOneRootIsRefused) {
  open();
  TestRandom random(5);
  auto second = Shard::open(*gate_, clock_, random, options_, nullptr);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, Code::conflict);
  EXPECT_NE(second.error().what.find("another server has this root ("),
            std::string::npos)
      << second.error().what;
}

// --- limits and the end ---

TEST_F(ShardTest, LowDiskRefusesEnqueueAndNothingElse) {
  options_.disk_soft_bytes = 1 << 20;
  open();
  enqueued(noop());
  gate_->pretend_free(1000);
  clock_.advance(2000);
  turn_for(30);
  EXPECT_EQ(enqueue(noop()).status, Status::disk_low);
  Fence fence = lease_one().fence;
  EXPECT_EQ(complete(fence).items.at(0).answer, Answer::ok);
  gate_->pretend_free(1 << 30);
  clock_.advance(2000);
  turn_for(30);
  EXPECT_EQ(enqueue(noop()).status, Status::done);
}

#define EXPECT_SAYS(text, part) \
  EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(ShardTest, DiskThatIsLowAtStartIsSaidAndRefusesTheFirstJob) {
  options_.disk_soft_bytes = 0;
  gate_->pretend_total(1ull << 40);
  gate_->pretend_free((4u << 20) - 1);  // four segments of 1 MiB, but a byte
  open();
  for (const std::string& text : {report_.text, shard_->stats().recovery}) {
    EXPECT_SAYS(text, "warning");
    EXPECT_SAYS(text, "4194303 bytes free");
  }
  EXPECT_EQ(shard_->stats().disk_free_bytes, 4194303u);
  Response refused = enqueue(noop());
  EXPECT_EQ(refused.status, Status::disk_low);
  EXPECT_SAYS(refused.detail, "4194303 bytes free, 4194304 needed");
  EXPECT_SAYS(refused.detail, "4 segments of 1 MiB");
  gate_->pretend_free(4u << 20);
  reopen();
  EXPECT_EQ(report_.text.find("warning"), std::string::npos);
  EXPECT_EQ(enqueue(noop()).status, Status::done);
}

TEST_F(ShardTest, BoundsOfASmallFileSystemCanBeMet) {
  options_.disk_soft_bytes = options_.disk_hard_bytes = 0;
  gate_->pretend_total(2u << 20);
  gate_->pretend_free((512u << 10) - 1);
  open();
  EXPECT_SAYS(enqueue(noop()).detail, "1/4 of a file system of 2 MiB");
  EXPECT_EQ(call(Command(lease_command())).status, Status::done);
  gate_->pretend_free((256u << 10) - 1);
  reopen();
  Response refused = call(Command(lease_command()));
  EXPECT_EQ(refused.status, Status::disk_low);
  EXPECT_SAYS(refused.detail, "1/8 of a file system of 2 MiB");
}

TEST_F(ShardTest, DiskBelowTheHardBoundOnlyEndsAndCancels) {
  options_.disk_hard_bytes = 1 << 20;
  open();
  NewJob once = noop();
  once.max_attempts = 1;
  JobId dead = enqueued(once);
  FailCommand fail;
  fail.fence = lease_one().fence;
  fail.outcome.code = EndCode::exit;
  EXPECT_EQ(call(Command(fail)).items.at(0).answer, Answer::ok);
  enqueued(noop());
  Fence first = lease_one().fence;
  enqueued(noop());
  Fence second = lease_one().fence;
  NewJob later = noop();
  later.run_at_ms = clock_.wall_ms() + 3000;
  JobId waiting = enqueued(later);
  Address parked = submit(Command(lease_command()), 60'000);
  turn_for(30);
  EXPECT_FALSE(answered(parked));
  gate_->pretend_free(1000);
  clock_.advance(2000);
  // A call that waits for work is let go, or the next job would be leased.
  EXPECT_TRUE(await(parked).leases.empty());
  EXPECT_EQ(call(Command(lease_command()), 1000).status, Status::disk_low);
  RetryCommand again;
  again.id = dead;
  EXPECT_EQ(call(Command(again)).status, Status::disk_low);
  clock_.advance(2000);  // `waiting` is ready
  CompleteCommand whole = completion(first);
  whole.lease = lease_command();
  Response ended = call(Command(whole));
  EXPECT_EQ(ended.items.at(0).answer, Answer::ok);
  EXPECT_TRUE(ended.leases.empty());
  fail.fence = second;
  EXPECT_EQ(call(Command(fail)).items.at(0).answer, Answer::ok);
  EXPECT_EQ(call(Command(CancelCommand{waiting})).items.at(0).answer,
            Answer::ok);
  gate_->pretend_free(1 << 30);
  clock_.advance(2000);
  turn_for(30);
  EXPECT_EQ(enqueue(noop()).status, Status::done);
}

TEST_F(ShardTest, HistoryThatLagsRefusesEnqueueUntilItHasCaughtUp) {
  options_.history_lag_max_bytes = 100;
  open();
  enqueued(noop());
  Fence fence = lease_one().fence;
  EXPECT_EQ(complete(fence).items.at(0).answer, Answer::ok);
  // The clock stands still, so the row waits for company.
  EXPECT_EQ(enqueue(noop()).status, Status::lagging);
  EXPECT_GT(shard_->stats().history_lag_bytes, 100u);
  wait_for_history();
  EXPECT_EQ(shard_->stats().history_lag_bytes, 0u);
  EXPECT_EQ(enqueue(noop()).status, Status::done);
}

TEST_F(ShardTest, IdleShardSleeps) {
  open();
  enqueued(noop());
  complete(lease_one().fence);
  wait_for_history();
  for (int i = 0; i < 20; ++i) {
    clock_.advance(1000);
    turn_for(5);
  }
  clock_.advance(1000);
  turn_for(20);
  EXPECT_GT(shard_->next_due_ms(), 500);
}

TEST_F(ShardTest, F31_CallsThatWaitHaveTheirBound) {
  open();
  constexpr std::size_t kMost = 65'536;  // kCallsMax of shard_impl.h
  std::vector<Address> parked;
  for (std::size_t i = 0; i < kMost; ++i) {
    parked.push_back(submit(Command(lease_command()), 600'000, 1 + i % 100));
  }
  shard_->turn();
  EXPECT_TRUE(answers_.empty());
  Response over = call(Command(lease_command()), 600'000);
  EXPECT_EQ(over.status, Status::lagging);
  EXPECT_NE(over.detail.find("65536"), std::string::npos) << over.detail;
  // Nothing was granted that nobody hears of: the job goes to the first call.
  JobId id = enqueued(noop());
  Response fed = await(parked.front());
  ASSERT_EQ(fed.leases.size(), 1u);
  EXPECT_EQ(fed.leases[0].job.id, id);
  // A completion is taken all the same; its lease call is another matter.
  submit(Command(lease_command()), 600'000);  // takes the place that is free
  CompleteCommand done = completion(fed.leases[0].fence);
  done.lease = lease_command();
  Response completed = call(Command(done), 600'000);
  EXPECT_EQ(completed.items.at(0).answer, Answer::ok);
  EXPECT_TRUE(completed.leases.empty());
}

TEST_F(ShardTest, DrainAnswersTheParkedAndLeasesNoMore) {
  open();
  JobId held = enqueued(noop());
  Fence fence = lease_one().fence;
  auto parked = submit(Command(lease_command()), 30'000);
  HeartbeatCommand beat;
  beat.items.push_back({fence, -1, {}});
  auto beating = submit(Command(beat), 30'000);
  turn_for(10);
  shard_->drain();
  EXPECT_TRUE(await(parked).leases.empty());
  EXPECT_EQ(await(beating).items.at(0).answer, Answer::ok);
  enqueued(noop());
  EXPECT_EQ(call(Command(lease_command())).status, Status::draining);
  EXPECT_EQ(shard_->running(), 1u);
  shard_->release_all();
  EXPECT_EQ(shard_->running(), 0u);
  JobView view = get(held).views.at(0);
  EXPECT_EQ(view.state, State::ready);
  EXPECT_EQ(view.attempt, 0);
  reopen();
  EXPECT_TRUE(report_.clean);
}

TEST_F(ShardTest, ReadyJobSaysWhenNoWorkerIsStrongEnough) {
  open();
  NewJob job = noop();
  job.min_level = 3;
  JobId id = enqueued(job);
  LeaseCommand weak = lease_command();
  weak.level = 2;
  EXPECT_TRUE(call(Command(weak)).leases.empty());
  EXPECT_TRUE(get(id).views.at(0).waiting_for_level);
  LeaseCommand strong = lease_command();
  strong.level = 3;
  strong.kinds = {"absent"};
  call(Command(strong));
  EXPECT_FALSE(get(id).views.at(0).waiting_for_level);
  clock_.advance(61'000);
  EXPECT_TRUE(get(id).views.at(0).waiting_for_level);
}

TEST_F(ShardTest, AJobSaysThatItWaitsForItsConcurrencyKey) {
  open();
  NewJob job = noop();
  job.concurrency_key = "k";
  job.concurrency_limit = 1;
  JobId first = enqueued(job);
  Response leased = call(Command(lease_command()));
  ASSERT_EQ(leased.leases.size(), 1u);
  Response second = call(Command(EnqueueCommand{{job}, {}}));
  const JobView& view = second.views.at(0);
  EXPECT_TRUE(view.waiting_for_concurrency);
  EXPECT_EQ(view.concurrency_key, "k");
  EXPECT_EQ(view.concurrency_limit, 1);
  EXPECT_TRUE(call(Command(lease_command())).leases.empty());
  EXPECT_TRUE(get(view.id).views.at(0).waiting_for_concurrency);
  EXPECT_FALSE(get(first).views.at(0).waiting_for_concurrency);
  reopen();
  EXPECT_TRUE(get(view.id).views.at(0).waiting_for_concurrency);
  EXPECT_EQ(get(view.id).views.at(0).concurrency_key, "k");
  EXPECT_TRUE(call(Command(lease_command())).leases.empty());
}

TEST_F(ShardTest, BatchOfManyIsOneAnswer) {
  open();
  EnqueueCommand command;
  for (int i = 0; i < 1000; ++i) command.jobs.push_back(noop());
  command.jobs[500].dedup_key = "same";
  command.jobs[501].dedup_key = "same";
  Response response = call(Command(command));
  ASSERT_EQ(response.items.size(), 1000u);
  EXPECT_EQ(response.items[501].answer, Answer::duplicate);
  EXPECT_EQ(response.items[501].id, response.items[500].id);
  EXPECT_EQ(shard_->stats().live_jobs, 999u);
}

}  // namespace
}  // namespace machina
