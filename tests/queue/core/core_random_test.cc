// Random commands against the core: whatever is decided can be applied, the
// invariants hold after every command, a replay of the records gives the same
// state, and an image gives a core that goes on in the same way.

#include <algorithm>
#include <random>
#include <set>
#include <thread>

#include "core_harness.h"

namespace machina {
namespace {

class Driver {
 public:
  explicit Driver(std::uint64_t seed, CoreOptions options)
      : random_(seed), h_(options) {
    h_.seed = seed * 1'000'000;
  }

  CoreHarness& harness() { return h_; }

  void step() {
    h_.pass(static_cast<Millis>(below(40)));
    if (below(50) == 0) h_.pass(static_cast<Millis>(below(20'000)));
    Command c = command();
    Decision d = h_.run(c);
    learn(d);
    if (d.park) {
      auto* complete = std::get_if<CompleteCommand>(&c);
      h_.core.park(complete ? *complete->lease : std::get<LeaseCommand>(c));
      h_.core.check_invariants();
    }
    for (const Decision& tick : h_.settle()) learn(tick);
  }

  // Everything ends, by itself or by a worker's hand.
  void drain() {
    for (int i = 0; i < 100'000 && h_.core.live_jobs() > 0; ++i) {
      for (const JobId& id : blocked()) learn(h_.run(CancelCommand{id}));
      LeaseCommand c = CoreHarness::lease_command("drainer", 64);
      CompleteCommand done;
      for (const GrantAnswer& g : h_.run(c).grants) {
        done.items.push_back({g.fence, {}, {}});
      }
      h_.run(done);
      h_.pass(1000);
      h_.settle();
    }
    h_.pass(3'600'000);
    h_.settle();
  }

 private:
  std::uint64_t below(std::uint64_t n) { return random_() % n; }
  std::string worker() { return "w" + std::to_string(below(4)); }

  std::vector<JobId> blocked() {
    std::vector<JobId> ids;
    h_.core.scan(0, 1u << 30, [&ids](const Core::Look& look) {
      if (look.view.state == State::blocked) ids.push_back(look.view.id);
      return true;
    });
    return ids;
  }

  JobId some_job() {
    if (ids_.empty() || below(20) == 0) return make_job_id(1, 2, random_());
    std::size_t recent = std::min<std::size_t>(ids_.size(), 30);
    return ids_[ids_.size() - 1 - below(recent)];
  }
  Fence some_fence() {
    if (fences_.empty() || below(20) == 0) return random_();
    std::size_t recent = std::min<std::size_t>(fences_.size(), 12);
    return fences_[fences_.size() - 1 - below(recent)];
  }

  NewJob new_job() {
    NewJob j = CoreHarness::job("k" + std::to_string(below(3)));
    j.queue = "q" + std::to_string(below(3));
    j.priority = static_cast<int>(below(10));
    if (below(30) == 0) j.kind = "rare.k" + std::to_string(below(100));
    if (below(4) == 0) {
      j.dedup_key = "key" + std::to_string(below(20));
      j.dedup_ttl_ms = static_cast<Millis>(below(3000));
      j.payload_digest[0] = below(8) == 0;
    }
    if (below(4) == 0) {
      for (std::uint64_t i = below(4); i > 0; --i) {
        j.depends_on.push_back(some_job());
      }
    }
    if (below(5) == 0) {
      j.run_at_ms = h_.now + static_cast<Millis>(below(2000)) - 200;
    }
    j.max_attempts = 1 + static_cast<int>(below(4));
    j.retry_min_ms = static_cast<Millis>(below(300));
    j.min_level = static_cast<Level>(below(3));
    if (below(2) == 0) {
      std::uint64_t key = below(6);
      j.concurrency_key = "c" + std::to_string(key);
      // Mostly one limit for each key.
      j.concurrency_limit =
          static_cast<std::uint16_t>(1 + (below(4) == 0 ? below(4) : key % 3));
      j.kind_key = below(4) == 0;
    }
    return j;
  }
  std::vector<Fact> facts(const std::vector<NewJob>& jobs) {
    std::vector<Fact> all;
    for (const NewJob& j : jobs) {
      for (const JobId& id : j.depends_on) {
        auto found = final_.find(id);
        bool known = found != final_.end();
        all.push_back({id, known, known ? found->second : State::dead});
      }
    }
    return all;
  }

  LeaseCommand lease() {
    LeaseCommand c =
        CoreHarness::lease_command(worker(), 1 + static_cast<int>(below(5)));
    if (below(3) == 0) c.kinds = {"k" + std::to_string(below(3)), "rare.*"};
    if (below(3) == 0) c.queues = {"q" + std::to_string(below(3))};
    c.level = static_cast<Level>(below(4));
    if (below(4) == 0) {
      c.holding = {some_fence(), some_fence(), some_fence()};
    }
    if (below(2) == 0) c.waiter = ++waiters_;
    return c;
  }

  Outcome outcome() {
    Outcome o;
    o.code = static_cast<EndCode>(1 + below(kEndCodes - 1));
    o.message = std::string(below(300), 'm');
    o.retry = below(6) != 0;
    if (below(4) == 0) o.retry_after_ms = static_cast<Millis>(below(500));
    return o;
  }

  Command command() {
    switch (below(16)) {
      case 0:
      case 1:
      case 2:
      case 3: {
        EnqueueCommand c;
        for (std::uint64_t i = below(3); i <= 2; ++i) {
          c.jobs.push_back(new_job());
        }
        c.facts = facts(c.jobs);
        return c;
      }
      case 4:
      case 5:
      case 6:
        return lease();
      case 7:
      case 8: {
        CompleteCommand c;
        for (std::uint64_t i = below(3); i <= 2; ++i) {
          CompleteCommand::Item item;
          item.fence = some_fence();
          if (below(4) == 0) item.outcome.code = EndCode::verdict;
          if (below(4) == 0) item.children.push_back(new_job());
          if (below(4) == 0) item.children.push_back(new_job());
          for (const Fact& f : facts(item.children)) c.facts.push_back(f);
          c.items.push_back(std::move(item));
        }
        if (below(2) == 0) c.lease = lease();
        return c;
      }
      case 9:
      case 10:
        return FailCommand{some_fence(), outcome()};
      case 11: {
        if (below(2) == 0) {
          return BlockCommand{some_fence(), "why", "{}",
                              static_cast<Millis>(below(2) * 500)};
        }
        if (tokens_.empty()) return UnblockCommand{some_job(), "no", "", ""};
        auto at = tokens_.begin();
        std::advance(at, below(tokens_.size()));
        return UnblockCommand{at->first, at->second, "{}", "me"};
      }
      case 12:
        return ReleaseCommand{{some_fence(), some_fence()}};
      case 13: {
        if (below(3) != 0 || final_.empty()) return CancelCommand{some_job()};
        JobId id = some_job();
        RetryCommand c{id, std::nullopt, State::dead, 0};
        auto body = bodies_.find(id);
        auto end = final_.find(id);
        if (body != bodies_.end() && end != final_.end()) {
          c.body = body->second;
          c.state = end->second;
          c.attempt = 1;
        }
        return c;
      }
      case 14: {
        if (below(3) == 0) return GoneCommand{{worker(), worker()}};
        HeartbeatCommand c;
        c.items.push_back({some_fence(), 50, "half"});
        return c;
      }
      default:
        if (below(2) == 0) h_.core.unpark(1 + below(waiters_ + 1));
        h_.core.heartbeat(some_fence(), h_.mono + 30'000, 7, "seven");
        return TickCommand{};
    }
  }

  void learn(const Decision&) {
    for (; seen_ < h_.log.size(); ++seen_) {
      std::visit([this](const auto& body) { learn_from(body); },
                 h_.log[seen_].body);
    }
  }
  void learn_from(const EnqueueRecord& r) {
    ids_.push_back(r.id);
    bodies_[r.id] = r;
    final_.erase(r.id);
  }
  void learn_from(const GrantRecord& r) {
    ASSERT_TRUE(all_fences_.insert(r.fence).second);
    ASSERT_GT(r.fence, last_fence_);
    last_fence_ = r.fence;
    fences_.push_back(r.fence);
  }
  void learn_from(const EndRecord& r) {
    ASSERT_TRUE(final_.emplace(r.id, r.state).second);
    for (const EnqueueRecord& child : r.children) learn_from(child);
    tokens_.erase(r.id);
  }
  void learn_from(const BlockRecord& r) { tokens_[r.id] = r.token; }
  void learn_from(const UnblockRecord& r) { tokens_.erase(r.id); }
  template <class Other>
  void learn_from(const Other&) {}

  std::mt19937_64 random_;
  CoreHarness h_;
  std::vector<JobId> ids_;
  std::vector<Fence> fences_;
  std::set<Fence> all_fences_;
  Fence last_fence_ = 0;
  std::map<JobId, State> final_;
  std::map<JobId, EnqueueRecord> bodies_;
  std::map<JobId, std::string> tokens_;
  std::uint64_t waiters_ = 0;
  std::size_t seen_ = 0;
};

CoreOptions small() {
  CoreOptions o;
  o.queue_max = 200;
  o.dedup_max = 15;
  o.names_max = 40;
  o.lease_ms = 1500;
  return o;
}

TEST(CoreRandom, WhateverIsDecidedCanBeAppliedAndHolds) {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(seed);
    Driver driver(seed, small());
    for (int i = 0; i < 1500; ++i) driver.step();
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(CoreRandom, AReplayOfTheRecordsGivesTheSameState) {
  for (std::uint64_t seed = 100; seed < 115; ++seed) {
    SCOPED_TRACE(seed);
    Driver driver(seed, small());
    for (int i = 0; i < 800; ++i) driver.step();
    CoreHarness& h = driver.harness();
    Core again(small());
    for (const Record& record : h.log) again.apply(record);
    again.check_invariants();
    ASSERT_EQ(CoreHarness::image_of(again), h.image());
  }
}

// While another thread writes what was frozen, the core goes on.
TEST(CoreRandom, WhatIsFrozenStaysAsItWas) {
  for (std::uint64_t seed = 300; seed < 315; ++seed) {
    SCOPED_TRACE(seed);
    Driver driver(seed, small());
    CoreHarness& h = driver.harness();
    std::vector<
        std::pair<std::shared_ptr<const Core::Frozen>, std::vector<std::byte>>>
        kept;
    for (int round = 0; round < 8; ++round) {
      for (int i = 0; i < 100; ++i) driver.step();
      kept.emplace_back(h.core.freeze(), h.image());
      std::vector<std::byte> written;
      std::thread writer([&written, frozen = kept.back().first]() mutable {
        frozen->save(&written);
        frozen.reset();
      });
      for (int i = 0; i < 50; ++i) driver.step();
      writer.join();
      ASSERT_EQ(written, kept.back().second);
      if (round % 3 == 2) kept.erase(kept.begin());
      h.core.check_invariants();
    }
    for (const auto& [frozen, image] : kept) {
      std::vector<std::byte> written;
      frozen->save(&written);
      ASSERT_EQ(written, image);
    }
  }
}

TEST(CoreRandom, AnImageGoesOnAsItsOriginal) {
  for (std::uint64_t seed = 200; seed < 215; ++seed) {
    SCOPED_TRACE(seed);
    Driver driver(seed, small());
    CoreHarness& h = driver.harness();
    for (int i = 0; i < 400; ++i) driver.step();
    std::vector<std::byte> image = h.image();
    std::size_t at = h.log.size();
    Core loaded(small());
    std::map<Place, int> places;
    loaded.on_place([&](Place place, int delta) {
      if ((places[place] += delta) == 0) places.erase(place);
    });
    ASSERT_TRUE(loaded.load(image));
    loaded.check_invariants();
    ASSERT_EQ(CoreHarness::image_of(loaded), image);
    ASSERT_EQ(places, h.places);
    for (int i = 0; i < 400; ++i) driver.step();
    for (; at < h.log.size(); ++at) loaded.apply(h.log[at]);
    loaded.check_invariants();
    ASSERT_EQ(places, h.places);
    ASSERT_EQ(loaded.live_jobs(), h.core.live_jobs());
    ASSERT_EQ(CoreHarness::image_of(loaded).size(), h.image().size());
    auto text = [](const Core& core) {
      std::set<std::string> all;
      core.scan(0, 1u << 30, [&all](const Core::Look& l) {
        const JobView& v = l.view;
        all.insert(to_string(v.id) + std::string(name(v.state)) + v.kind +
                   std::to_string(v.attempt) + fence_hex(v.fence) +
                   std::to_string(v.run_at_ms) + v.error_message +
                   (v.waiting_for_concurrency ? "held" : ""));
        return true;
      });
      return all;
    };
    ASSERT_EQ(text(loaded), text(h.core));
  }
}

TEST(CoreRandom, EverythingDrainsAndNothingIsLeftOver) {
  for (std::uint64_t seed = 300; seed < 310; ++seed) {
    SCOPED_TRACE(seed);
    Driver driver(seed, small());
    for (int i = 0; i < 800; ++i) driver.step();
    driver.drain();
    CoreHarness& h = driver.harness();
    EXPECT_EQ(h.core.live_jobs(), 0u);
    EXPECT_EQ(h.core.reserved_bytes(), 0u);
    EXPECT_TRUE(h.places.empty());
    for (const QueueCounts& q : h.core.counts()) {
      for (int s = 0; s < 5; ++s) EXPECT_EQ(q.by_state[s], 0u);
    }
  }
}

TEST(CoreRandom, DamagedImagesAreRefusedOrSound) {
  Driver driver(7, small());
  for (int i = 0; i < 600; ++i) driver.step();
  const std::vector<std::byte> image = driver.harness().image();
  std::mt19937_64 random(99);
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::vector<std::byte> bytes = image;
    for (int hits = 1 + static_cast<int>(random() % 3); hits > 0; --hits) {
      bytes[random() % bytes.size()] = std::byte(random());
    }
    if (random() % 10 == 0) bytes.resize(random() % bytes.size());
    Core core(small());
    if (!core.load(bytes)) {
      ++refused;
      continue;
    }
    core.check_invariants();
  }
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace machina
