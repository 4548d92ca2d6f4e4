// A Core with a log that is a vector: what a shard does, without disk or time.

#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "queue/core/core.h"

namespace machina {

struct CoreHarness {
  explicit CoreHarness(CoreOptions o = {}) : options(o), core(o) {
    core.set_epoch(1);
    core.on_place([this](Place place, int delta) {
      if ((places[place] += delta) == 0) places.erase(place);
    });
  }

  // Decides, then appends and applies, as a shard does.
  Decision run(const Command& command) {
    core.set_mono(mono);
    Decision d = core.decide(now, ++seed, command);
    for (const Record& decided : d.records) commit(decided);
    for (const auto& fed : d.fed) core.unpark(fed.waiter);
    if (checked) core.check_invariants();
    return d;
  }
  void commit(Record record) {
    record.lsn = core.applied() + 1;
    record.place = 4096 + record.lsn * 512;
    record.bytes = 100;
    log.push_back(record);
    core.apply(record);
  }
  // Ticks until nothing is due, as the shard's turn() does.
  std::vector<Decision> settle() {
    std::vector<Decision> all;
    while (core.next_due() <= now || core.next_due_mono() <= mono) {
      all.push_back(run(TickCommand{}));
      if (all.size() > 100'000) ADD_FAILURE() << "ticks without end";
      if (all.size() > 100'000) break;
    }
    return all;
  }
  void pass(Millis ms) {
    now += ms;
    mono += ms;
  }

  static NewJob job(std::string kind = "noop") {
    NewJob j;
    j.kind = std::move(kind);
    return j;
  }
  ItemAnswer add_item(NewJob j, std::vector<Fact> facts = {}) {
    EnqueueCommand c;
    c.jobs.push_back(std::move(j));
    c.facts = std::move(facts);
    return run(c).items.at(0);
  }
  JobId add(NewJob j) {
    ItemAnswer a = add_item(std::move(j));
    EXPECT_EQ(a.answer, Answer::ok);
    return a.id;
  }
  static LeaseCommand lease_command(std::string worker = "w", int max = 1) {
    LeaseCommand c;
    c.worker = std::move(worker);
    c.kinds = {"*"};
    c.max = max;
    c.level = kLevelMax;
    return c;
  }
  std::vector<GrantAnswer> lease(std::string worker = "w", int max = 1) {
    return run(lease_command(std::move(worker), max)).grants;
  }
  GrantAnswer lease_one(std::string worker = "w") {
    auto grants = lease(std::move(worker));
    EXPECT_EQ(grants.size(), 1u);
    return grants.empty() ? GrantAnswer{} : grants[0];
  }
  ItemAnswer complete(Fence fence, EndCode code = EndCode::none,
                      std::vector<NewJob> children = {}) {
    CompleteCommand c;
    c.items.resize(1);
    c.items[0].fence = fence;
    c.items[0].outcome.code = code;
    c.items[0].children = std::move(children);
    return run(c).items.at(0);
  }
  ItemAnswer fail(Fence fence, EndCode code = EndCode::exit, bool retry = true,
                  Millis after = -1) {
    FailCommand c;
    c.fence = fence;
    c.outcome.code = code;
    c.outcome.message = "it failed";
    c.outcome.retry = retry;
    c.outcome.retry_after_ms = after;
    return run(c).items.at(0);
  }
  ItemAnswer cancel(JobId id) { return run(CancelCommand{id}).items.at(0); }
  State state(JobId id) {
    auto look = core.look(id);
    if (!look) return State::succeeded;
    return look->view.state;
  }
  std::vector<std::byte> image() const { return image_of(core); }
  static std::vector<std::byte> image_of(const Core& c) {
    std::vector<std::byte> bytes;
    c.save(&bytes);
    return bytes;
  }
  // The EndRecord of a job, or null.
  const EndRecord* end_of(JobId id) const {
    for (auto i = log.rbegin(); i != log.rend(); ++i) {
      auto* end = std::get_if<EndRecord>(&i->body);
      if (end && end->id == id) return end;
    }
    return nullptr;
  }
  template <class Body>
  std::vector<Body> records() const {
    std::vector<Body> all;
    for (const Record& r : log) {
      if (auto* body = std::get_if<Body>(&r.body)) all.push_back(*body);
    }
    return all;
  }

  CoreOptions options;
  Core core;
  Millis now = 1'763'000'000'000, mono = 5'000;
  std::uint64_t seed = 0;
  bool checked = true;
  std::vector<Record> log;
  std::map<Place, int> places;
};

}  // namespace machina
