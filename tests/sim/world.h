// One simulated world: clients, workers and operators against the real core
// and the real log over a simulated disk, until one of many deaths; then
// recovery, judged by the oracle (model.h); again and again; at last everything
// is healed and must drain. All of it follows from one seed.
//
// Survive mode checks, after every recovery:
//   - it starts, whatever the crash did to what was not synced
//   - no answered request is missing: what recovery kept reaches at least as
//     far as the furthest answer ever given (lost 201, undone completion,
//     forgotten cancel are all this)
//   - what it kept is, byte for byte and at the same places, a prefix of what
//     was decided; nothing else
//   - the core equals the oracle folded over that prefix
//   - a second recovery gives the same
//   - whoever waits for a while waits just that long, however the wall clock is
//     set and whether a server runs or not; run_at is never early by the wall
//   - a disk that was full, and no more, neither poisoned the log nor kept it
//     from going on when there was room again
// and after every step the core's own invariants and every answer: duplicates,
// stale leases, repeats.
//
// Detect mode flips bits of what was durable, anywhere in the directory: the
// start is refused, or nothing that was answered is missing or different.

#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "queue/wal/log.h"
#include "tests/sim/model.h"
#include "tests/support/sim_storage.h"

namespace machina::sim {

// Bugs that the simulation must find; see sim_test.cc.
enum Planted {
  kNothingPlanted = 0,
  kForgetsToSync,          // of the log's segments
  kForgetsCheckpointSync,  //
  kForgetsDirSync,         //
  kAnswersEarly,           // before the log is durable
  kForgetsEpoch,           // fences begin where the log's end says
};

struct Tally {
  std::uint64_t steps = 0, records = 0, answers = 0, lives = 0, crashes = 0,
                cuts = 0, torn = 0, poisoned = 0, refused = 0, checkpoints = 0,
                syncs = 0, drained = 0, flips = 0, duplicates = 0, stale = 0,
                bodies = 0, clock_steps = 0, stalls = 0;
  void add(const Tally&);
  std::string text() const;
};

class World {
 public:
  explicit World(std::uint64_t seed, Planted planted = kNothingPlanted);
  ~World();

  void survive();  // throws Wrong
  void detect();   // throws Wrong
  const Tally& tally() const { return tally_; }

 private:
  struct Pending {  // an answer that waits for the disk
    Lsn lsn = 0;
    std::vector<GrantAnswer> grants;
  };

  // --- the server ---
  bool start();  // false: the disk died under it, or it refused
  void stop(bool power_cut);
  bool serve(const Command&);  // false: poisoned
  void turn();
  void work(std::uint64_t pieces);
  void release_answers();
  void checkpoint();
  bool dead() const { return !log_ || log_->poisoned(); }
  void plan_death();
  bool wait_for_room();  // while the log is stalled
  void judge_recovery();

  // --- the others ---
  void pass(Millis ms);
  void set_clock();
  void step();
  Command next_command();
  NewJob new_job();
  LeaseCommand lease();
  std::vector<Fact> facts(const std::vector<NewJob>&) const;
  void judge(const Command&, const Decision&);
  void judge_hunger(const LeaseCommand& c, const char* who);
  void judge_item(const NewJob&, const ItemAnswer&, Millis now);
  void read_a_body();
  JobId some_job();
  Fence some_fence();
  void drain();

  std::uint64_t below(std::uint64_t n) { return chance_.below(n); }
  bool one_in(std::uint64_t n) { return chance_.one_in(n); }
  Millis mono() const { return elapsed_ - booted_; }
  Millis now() const { return clock_.now(mono()); }
  ClockReading clocks() const { return {mono(), wall_, boot_}; }
  void look_at_clock();
  void note_patience(const Record&, Millis elapsed, Millis offset, bool here);
  void judge_times(const Record&);
  void judge_patience() const;

  SeededRandom chance_, decisions_, log_random_;
  Planted planted_;
  bool only_full_ = false;  // nothing else is wrong with this life's disk
  SimStorage disk_;
  std::unique_ptr<Storage> faulty_;  // a planted fault over disk_
  Storage* storage_;
  LogOptions log_options_;
  CoreOptions core_options_;
  bool use_dedup_, use_deps_, use_delays_, use_park_, use_children_, use_block_,
      use_keys_;

  std::unique_ptr<Core> core_;
  std::unique_ptr<FileLog> log_;
  std::map<Place, int> needs_;
  std::deque<Pending> pending_;
  std::uint64_t waiters_ = 0;
  std::map<std::uint64_t, LeaseCommand> parked_;
  RecoveryReport report_;
  Error error_{Code::io, ""};
  std::vector<std::byte> loaded_image_;

  // The oracle's memory. records_[i] has lsn i + 1.
  std::vector<Record> records_;
  Model model_;
  Fence last_fence_ever_ = 0;
  std::uint32_t last_epoch_ = 0;
  Lsn history_ = 0;  // what history has, durably
  Lsn answered_ = 0;
  std::vector<Fence> held_;  // told to workers, however long ago
  std::vector<JobId> ids_;
  // Time as it is, the machine's last start, and what the wall clock shows,
  // which is set now and then.
  Millis elapsed_ = 1000, booted_ = 0, wall_ = 1'763'000'000'000;
  Millis wall_max_ = wall_;
  std::uint64_t boot_ = 1;
  ServerClock clock_;
  bool anchored_ = false;  // this boot is in the log
  // When what waits for a while may go on, as time really passes. A reboot
  // forgets it: how long that took is for the wall clock to say.
  std::map<JobId, Millis> patience_;
  // When each of records_ was written, and in which boot.
  std::vector<std::pair<Millis, std::uint64_t>> written_;
  Tally tally_;
};

}  // namespace machina::sim
