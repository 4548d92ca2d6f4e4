#include "tests/sim/world.h"

#include <algorithm>
#include <utility>

namespace machina::sim {
namespace {

void must(bool good, const std::string& why) {
  if (!good) throw Wrong(why);
}

std::vector<std::byte> bytes_of(const Record& record) {
  std::vector<std::byte> bytes;
  encode(record, &bytes);
  return bytes;
}

// --- planted faults: what a program with that bug would do to its disk ---

class ForgetfulFile : public File {
 public:
  explicit ForgetfulFile(std::unique_ptr<File> file) : file_(std::move(file)) {}
  Result<void> write_at(std::uint64_t offset,
                        std::span<const std::byte> bytes) override {
    return file_->write_at(offset, bytes);
  }
  Result<std::size_t> read_at(std::uint64_t offset,
                              std::span<std::byte> bytes) const override {
    return file_->read_at(offset, bytes);
  }
  Result<void> sync() override { return {}; }
  Result<void> allocate(std::uint64_t bytes) override {
    return file_->allocate(bytes);
  }
  Result<std::uint64_t> size() const override { return file_->size(); }
  Result<void> truncate(std::uint64_t bytes) override {
    return file_->truncate(bytes);
  }

 private:
  std::unique_ptr<File> file_;
};

// Forgets to sync some files, or directories.
class Forgetful : public Storage {
 public:
  Forgetful(Storage& disk, std::string files, bool dirs)
      : disk_(disk), files_(std::move(files)), dirs_(dirs) {}
  Result<std::unique_ptr<File>> open(std::string_view name,
                                     OpenMode mode) override {
    bool forget = !files_.empty() && name.find(files_) != name.npos;
    if (forget && mode == OpenMode::durable) mode = OpenMode::write;
    auto file = disk_.open(name, mode);
    if (!file || !forget) return file;
    return std::unique_ptr<File>(
        std::make_unique<ForgetfulFile>(std::move(*file)));
  }
  Result<std::vector<std::string>> list(std::string_view dir) override {
    return disk_.list(dir);
  }
  Result<void> make_dir(std::string_view dir) override {
    return disk_.make_dir(dir);
  }
  Result<void> rename(std::string_view from, std::string_view to) override {
    return disk_.rename(from, to);
  }
  Result<void> exchange(std::string_view from, std::string_view to) override {
    return disk_.exchange(from, to);
  }
  Result<void> remove(std::string_view name) override {
    return disk_.remove(name);
  }
  Result<void> sync_dir(std::string_view dir) override {
    if (dirs_) return {};
    return disk_.sync_dir(dir);
  }
  Result<std::unique_ptr<Lock>> lock(std::string_view name) override {
    return disk_.lock(name);
  }
  Result<std::uint64_t> free_bytes() override { return disk_.free_bytes(); }

 private:
  Storage& disk_;
  std::string files_;
  bool dirs_;
};

}  // namespace

void Tally::add(const Tally& t) {
  steps += t.steps;
  records += t.records;
  answers += t.answers;
  lives += t.lives;
  crashes += t.crashes;
  cuts += t.cuts;
  torn += t.torn;
  poisoned += t.poisoned;
  refused += t.refused;
  checkpoints += t.checkpoints;
  syncs += t.syncs;
  drained += t.drained;
  flips += t.flips;
  duplicates += t.duplicates;
  stale += t.stale;
  bodies += t.bodies;
  clock_steps += t.clock_steps;
  stalls += t.stalls;
}

std::string Tally::text() const {
  auto n = [](std::uint64_t value, const char* what) {
    return std::to_string(value) + " " + what;
  };
  return n(steps, "steps, ") + n(records, "records, ") +
         n(answers, "answers, ") + n(lives, "recoveries, ") +
         n(crashes, "crashes (") + n(cuts, "power cuts, ") +
         n(torn, "torn tails), ") + n(poisoned, "poisoned logs, ") +
         n(checkpoints, "checkpoints, ") + n(syncs, "sync points crossed, ") +
         n(duplicates, "duplicates, ") + n(stale, "stale tokens, ") +
         n(bodies, "bodies read, ") + n(clock_steps, "clock steps, ") +
         n(stalls, "waits for room, ") + n(drained, "drained, ") +
         n(flips, "flips, ") + n(refused, "refused");
}

World::World(std::uint64_t seed, Planted planted)
    : chance_(seed),
      decisions_(seed ^ 0xdec1de),
      log_random_(seed ^ 0x106),
      planted_(planted),
      disk_(seed ^ 0xd15c),
      storage_(&disk_) {
  if (planted == kForgetsToSync) {
    faulty_ = std::make_unique<Forgetful>(disk_, ".seg", false);
  } else if (planted == kForgetsCheckpointSync) {
    faulty_ = std::make_unique<Forgetful>(disk_, "ckpt", false);
  } else if (planted == kForgetsDirSync) {
    faulty_ = std::make_unique<Forgetful>(disk_, "", true);
  }
  if (faulty_) storage_ = faulty_.get();
  log_options_.own_thread = false;
  log_options_.random = &log_random_;
  log_options_.spares = one_in(2);
  log_options_.direct = one_in(2);
  log_options_.hold = one_in(2);
  log_options_.segment_bytes = (8 + below(40)) * 4096;
  log_options_.first_segment_bytes = (6 + below(8)) * 4096;
  log_options_.batch_bytes_max = (4 + below(13)) * 4096;
  core_options_.queue_max = 20 + below(200);
  core_options_.dedup_max = 10 + below(50);
  core_options_.lease_ms = 500 + static_cast<Millis>(below(3000));
  core_options_.names_max = 64;
  use_dedup_ = !one_in(4);
  use_deps_ = one_in(2);
  use_delays_ = one_in(2);
  use_park_ = one_in(2);
  use_children_ = one_in(2);
  use_block_ = one_in(2);
  use_keys_ = !one_in(3);
}

World::~World() = default;

// --- the server ---

bool World::start() {
  log_.reset();
  core_ = std::make_unique<Core>(core_options_);
  pending_.clear();
  parked_.clear();
  needs_.clear();
  report_ = {};
  loaded_image_.clear();
  core_->on_place([this](Place place, int delta) {
    if (log_) {
      log_->need(place, delta);
    } else {
      needs_[place] += delta;
    }
  });
  Lsn loaded = 0;
  std::string wrong;
  auto load = [&](Lsn lsn, std::span<const std::byte> image) -> Result<void> {
    loaded = lsn;
    if (image.empty()) return {};
    loaded_image_.assign(image.begin(), image.end());
    return core_->load(image);
  };
  auto visit = [&](const Record& record) -> Result<void> {
    bool known = record.lsn >= 1 && record.lsn <= records_.size();
    if (!known) {
      wrong = "recovery made up lsn " + std::to_string(record.lsn);
    } else {
      const Record& mine = records_[record.lsn - 1];
      if (type_of(mine) != type_of(record) ||
          bytes_of(mine) != bytes_of(record) || mine.place != record.place) {
        wrong = "recovery changed lsn " + std::to_string(record.lsn);
      }
    }
    if (!wrong.empty()) return Error{Code::corrupt, wrong};
    if (record.lsn > loaded) core_->apply(record);
    return {};
  };
  auto opened =
      FileLog::open(*storage_, log_options_, history_, load, visit, &report_);
  if (!wrong.empty()) throw Wrong(wrong);
  if (!opened) {
    error_ = opened.error();
    return false;
  }
  log_ = std::move(*opened);
  for (const auto& [place, delta] : needs_) {
    if (delta) log_->need(place, delta);
  }
  log_->set_history_applied(history_);
  std::uint32_t epoch = log_->writer_epoch();
  if (planted_ == kForgetsEpoch) {
    epoch = 1;
  } else {
    must(epoch > last_epoch_, "the writer epoch did not rise");
  }
  last_epoch_ = std::max(epoch, last_epoch_);
  core_->set_epoch(epoch);
  core_->set_mono(mono());
  core_->restart_leases(mono());
  clock_.start(core_->time(), core_->clock_offset(), core_->clock_anchor(),
               clocks());
  anchored_ = core_->clock_anchor().boot == boot_;
  return true;
}

// What recovery gave is what had to be there.
void World::judge_recovery() {
  ++tally_.lives;
  tally_.torn += report_.dropped_bytes > 0;
  must(report_.last >= answered_,
       "what was answered at lsn " + std::to_string(answered_) +
           " is lost: the log ends at " + std::to_string(report_.last));
  must(report_.last <= records_.size(), "the log is longer than its writer");
  must(core_->applied() == report_.last, "recovery stopped short");
  // Unanswered and lost: never happened.
  records_.resize(report_.last);
  written_.resize(report_.last);
  answered_ = report_.last;  // it is durable and visible from now on
  model_ = Model{};
  patience_.clear();
  for (std::size_t i = 0; i < records_.size(); ++i) {
    model_.fold(records_[i]);
    note_patience(records_[i], written_[i].first, model_.offset,
                  written_[i].second == boot_);
  }
  core_->check_invariants();
  std::string difference = model_.difference(*core_);
  must(difference.empty(), "after recovery: " + difference);
}

void World::stop(bool power_cut) {
  // Some time passes, the machine may start again, the clock may be set.
  pass(static_cast<Millis>(one_in(3) ? below(60'000) : below(20)));
  if (power_cut && one_in(2)) {
    ++boot_;
    booted_ = elapsed_ - static_cast<Millis>(below(2000));
  }
  if (one_in(3)) set_clock();
  tally_.poisoned += log_ && log_->poisoned();
  log_.reset();
  core_.reset();
  pending_.clear();
  ++tally_.crashes;
  if (power_cut) {
    ++tally_.cuts;
    disk_.crash();
  } else {
    disk_.restart();
  }
  disk_.set_quota(0);
}

void World::pass(Millis ms) {
  elapsed_ += ms;
  wall_ += ms;
  wall_max_ = std::max(wall_max_, wall_);
}

// By 30 seconds or up to an hour, either way.
void World::set_clock() {
  const Millis by = one_in(2) ? 30'000 : static_cast<Millis>(below(3'600'000));
  wall_ += one_in(2) ? by : -by;
  wall_max_ = std::max(wall_max_, wall_);
  ++tally_.clock_steps;
}

void World::look_at_clock() {
  const Millis measured = clock_.offset(clocks());
  if (anchored_ && !clock_was_set(core_->clock_offset(), measured)) return;
  anchored_ = true;
  serve(ClockCommand{measured, boot_, mono()});
}

// What a record means for who waits for a while. `here`: it was written since
// the machine's last start.
void World::note_patience(const Record& record, Millis elapsed, Millis offset,
                          bool here) {
  auto wait = [&](const JobId& id, Millis until) {
    patience_.erase(id);
    if (here) patience_[id] = elapsed + until - offset - record.time_ms;
  };
  if (auto* e = std::get_if<EnqueueRecord>(&record.body)) {
    const bool delayed = !e->job.run_at_is_wall && e->job.run_at_ms > 0;
    if (delayed && e->state == State::scheduled) wait(e->id, e->job.run_at_ms);
  } else if (auto* retry = std::get_if<RetryRecord>(&record.body)) {
    if (retry->run_at_ms > 0) wait(retry->id, retry->run_at_ms);
  } else if (auto* block = std::get_if<BlockRecord>(&record.body)) {
    if (block->deadline_ms > 0) wait(block->id, block->deadline_ms);
  } else if (auto* unblock = std::get_if<UnblockRecord>(&record.body)) {
    patience_.erase(unblock->id);
  } else if (auto* end = std::get_if<EndRecord>(&record.body)) {
    patience_.erase(end->id);
  } else if (auto* promote = std::get_if<PromoteRecord>(&record.body)) {
    for (const JobId& id : promote->ids) patience_.erase(id);
  }
}

// No record lets anybody go on too early.
void World::judge_times(const Record& record) {
  auto patient = [this](const JobId& id) {
    auto found = patience_.find(id);
    must(found == patience_.end() || elapsed_ >= found->second,
         to_string(id) + " goes on too early");
  };
  auto at_wall = [this](const JobId& id, Millis run_at) {
    must(wall_ + kClockBackMs >= run_at, to_string(id) + ": run_at is early");
  };
  if (auto* e = std::get_if<EnqueueRecord>(&record.body)) {
    if (e->job.run_at_is_wall && e->state == State::ready && e->revived == 0) {
      at_wall(e->id, e->job.run_at_ms);
    }
  } else if (auto* end = std::get_if<EndRecord>(&record.body)) {
    const bool out_of_time =
        end->outcome.code == EndCode::timeout && end->fence == 0;
    if (out_of_time) patient(end->id);
  } else if (auto* promote = std::get_if<PromoteRecord>(&record.body)) {
    for (const JobId& id : promote->ids) {
      const ModelJob& job = model_.live.at(id);
      if (job.at_wall) at_wall(id, job.run_at);
      patient(id);
    }
  }
  note_patience(record, elapsed_, core_->clock_offset(), true);
}

// Nobody waits for a clock to catch up.
void World::judge_patience() const {
  for (const auto& [id, until] : patience_) {
    must(elapsed_ < until, to_string(id) + " waits " +
                               std::to_string(elapsed_ - until) +
                               " ms too long");
  }
}

bool World::serve(const Command& command) {
  if (dead()) return false;
  if (!std::holds_alternative<ClockCommand>(command)) look_at_clock();
  if (dead()) return false;
  core_->set_mono(mono());
  Decision d = core_->decide(now(), decisions_.next(), command);
  judge(command, d);
  for (Record& record : d.records) {
    if (auto* g = std::get_if<GrantRecord>(&record.body)) {
      must(g->fence > last_fence_ever_, "a fence was issued again");
      last_fence_ever_ = g->fence;
    }
    if (!log_->append(&record)) return false;
    records_.push_back(record);
    written_.emplace_back(elapsed_, boot_);
    judge_times(record);
    model_.fold(record);
    core_->apply(record);
    ++tally_.records;
    if (auto* e = std::get_if<EnqueueRecord>(&record.body)) {
      ids_.push_back(e->id);
    }
    if (auto* e = std::get_if<EndRecord>(&record.body)) {
      for (const EnqueueRecord& child : e->children) ids_.push_back(child.id);
    }
  }
  Pending answer{core_->applied(), d.grants};
  for (const auto& fed : d.fed) {
    core_->unpark(fed.waiter);
    parked_.erase(fed.waiter);
    answer.grants.insert(answer.grants.end(), fed.grants.begin(),
                         fed.grants.end());
  }
  if (planted_ == kAnswersEarly) answer.lsn = std::min(answer.lsn, answered_);
  pending_.push_back(std::move(answer));
  if (planted_ == kAnswersEarly) answered_ = core_->applied();
  if (d.park) {
    auto* complete = std::get_if<CompleteCommand>(&command);
    const LeaseCommand& c =
        complete ? *complete->lease : std::get<LeaseCommand>(command);
    core_->park(c);
    parked_[c.waiter] = c;
  }
  // Whoever asked was given what there was to give.
  const LeaseCommand* asked = std::get_if<LeaseCommand>(&command);
  if (auto* complete = std::get_if<CompleteCommand>(&command)) {
    if (complete->lease) asked = &*complete->lease;
  }
  if (asked && d.grants.size() < static_cast<std::size_t>(asked->max)) {
    judge_hunger(*asked, "a call");
  }
  core_->check_invariants();
  return true;
}

void World::turn() {
  if (!dead()) look_at_clock();
  for (int i = 0; !dead(); ++i) {
    if (core_->next_due() > now() && core_->next_due_mono() > mono()) break;
    must(i < 2000, "ticks without end");
    serve(TickCommand{});
  }
  if (dead()) return;
  judge_patience();
  for (const auto& [waiter, c] : parked_) judge_hunger(c, "a parked call");
  log_->flush();
  work(below(4));
  release_answers();
  if (!dead() && one_in(60)) checkpoint();
}

void World::work(std::uint64_t pieces) {
  for (; pieces > 0 && !dead(); --pieces) {
    if (!log_->write_one()) return;
    log_->poll();
    log_->flush();
  }
}

void World::release_answers() {
  while (!pending_.empty() && pending_.front().lsn <= log_->durable()) {
    for (const GrantAnswer& g : pending_.front().grants) {
      held_.push_back(g.fence);
    }
    answered_ = std::max(answered_, pending_.front().lsn);
    ++tally_.answers;
    pending_.pop_front();
  }
}

void World::checkpoint() {
  if (log_->checkpointing()) return;
  while (!dead() && !log_->stalled() && log_->durable() < core_->applied()) {
    log_->flush();
    work(1);
  }
  if (dead() || log_->stalled() || core_->applied() == 0) return;
  std::vector<std::byte> image;
  core_->save(&image);
  Core again(core_options_);
  must(again.load(image).has_value(), "an image does not load");
  // History is durable by itself; it may lag.
  history_ = std::max(history_, log_->durable() - below(log_->durable() + 1));
  log_->set_history_applied(history_);
  log_->checkpoint(core_->applied(), core_->time(), std::move(image));
  ++tally_.checkpoints;
}

// --- what the world does ---

void World::survive() {
  const int lives = 3 + static_cast<int>(below(6));
  for (int life = 0; life < lives; ++life) {
    plan_death();
    std::uint64_t tries = 0;
    while (!start()) {
      bool excused = disk_.killed() || error_.code == Code::io ||
                     error_.code == Code::full;
      must(excused, "a start was refused: " + error_.what);
      must(++tries < 50, "it never starts: " + error_.what);
      stop(one_in(2));
      if (one_in(2)) plan_death();
    }
    judge_recovery();
    if (one_in(4)) {  // recovery twice gives the same
      disk_.kill_at(0);
      stop(false);
      if (!start()) must(false, "the second recovery failed: " + error_.what);
      judge_recovery();
      plan_death();
    }
    std::uint64_t steps = 20 + below(300);
    for (; steps > 0 && !dead(); --steps) step();
    must(!only_full_ || !log_->poisoned(),
         "a full disk poisoned the log: " + log_->poison_cause());
    if (!dead() && one_in(4)) {
      Result<void> closed = log_->close();
      if (closed) answered_ = core_->applied();
    } else if (!dead()) {
      release_answers();
    }
    tally_.syncs = disk_.syncs();
    stop(one_in(2));
  }
  must(start(), "healed, it does not start: " + error_.what);
  judge_recovery();
  drain();
  tally_.syncs = disk_.syncs();
}

void World::plan_death() {
  only_full_ = false;
  auto soon = [this](std::uint64_t now) {
    return now + 1 + below(one_in(2) ? 30 : 300);
  };
  switch (below(7)) {
    case 0:
    case 1:
    case 2:
      disk_.kill_at(soon(disk_.operations()));
      break;
    case 3:
      disk_.fail_sync_at(soon(disk_.syncs()));
      break;
    case 4:
      disk_.fail_write_at(soon(disk_.writes()));
      break;
    case 5:
      disk_.set_quota(disk_.bytes_used() + 50'000 + below(2'000'000));
      only_full_ = true;
      break;
    default:
      break;
  }
}

void World::step() {
  ++tally_.steps;
  Millis ms = static_cast<Millis>(one_in(40) ? below(5000) : below(30));
  pass(ms);
  if (one_in(100)) set_clock();
  if (one_in(30) && waiters_ > 0) {
    std::uint64_t waiter = 1 + below(waiters_);
    core_->unpark(waiter);
    parked_.erase(waiter);
  }
  if (one_in(10) && !held_.empty()) {
    core_->heartbeat(some_fence(), mono() + core_options_.lease_ms, 10, "ten");
  }
  if (one_in(20)) log_->hold(below(200'000), below(60'000));
  if (log_->stalled() && !wait_for_room()) return;
  if (!serve(next_command())) return;
  turn();
  if (dead()) return;
  if (one_in(8)) {
    std::string difference = model_.difference(*core_);
    must(difference.empty(), difference);
  }
  if (one_in(4)) read_a_body();
}

// Whoever is in charge lets nothing be decided meanwhile. Sooner or later
// somebody makes room.
bool World::wait_for_room() {
  ++tally_.stalls;
  if (one_in(8)) disk_.set_quota(0);
  log_->flush();
  work(4);
  release_answers();
  return !dead() && !log_->stalled();
}

// A body that is durable can be read at the place that the core remembers.
void World::read_a_body() {
  if (model_.live.empty()) return;
  auto at = model_.live.lower_bound(some_job());
  if (at == model_.live.end()) at = model_.live.begin();
  const auto& [id, job] = *at;
  if (job.body_lsn > log_->durable()) return;
  auto look = core_->look(id);
  must(look.has_value(), "a live job is not found");
  auto read = log_->read(look->body_place, look->body_bytes);
  if (!read && disk_.killed()) return;
  must(read.has_value(), "a body cannot be read");
  auto record = decode(read->first, read->second);
  must(record.has_value(), "a body cannot be understood");
  must(bytes_of(*record) == bytes_of(records_[job.body_lsn - 1]),
       "a body is another's");
  ++tally_.bodies;
}

// All faults are gone: everything must come to an end.
void World::drain() {
  wall_ = wall_max_;  // the clock, too
  for (int round = 0; !model_.live.empty(); ++round) {
    must(round < 3000,
         std::to_string(model_.live.size()) + " jobs never end, the first is " +
             std::string(name(model_.live.begin()->second.state)));
    pass(500);
    for (const auto& [id, job] : std::map(model_.live)) {
      if (job.state != State::blocked) continue;
      must(serve(UnblockCommand{id, job.token, "{}", "drain"}), "poisoned");
    }
    LeaseCommand c;
    c.worker = "drainer";
    c.kinds = {"*"};
    c.level = kLevelMax;
    c.max = 64;
    must(serve(c), "poisoned");
    turn();
    while (log_->durable() < core_->applied()) {
      log_->flush();
      work(1);
      must(!dead(), "poisoned while healed: " + log_->poison_cause());
    }
    release_answers();
    CompleteCommand done;
    for (Fence fence : std::exchange(held_, {})) {
      done.items.push_back({fence, {}, {}});
    }
    must(serve(done), "poisoned");
    turn();
  }
  must(core_->live_jobs() == 0 && core_->reserved_bytes() == 0,
       "drained, but not empty");
  ++tally_.drained;
}

void World::detect() {
  must(start(), "an empty disk does not start");
  for (int life = 0; life < 2; ++life) {
    for (std::uint64_t i = 30 + below(200); i > 0 && !dead(); --i) step();
    must(!dead(), "poisoned without a fault");
    for (int i = 0; i < 10'000; ++i) {  // until it is vouched for
      log_->flush();
      bool worked = log_->write_one();
      log_->poll();
      if (!worked && log_->durable() == core_->applied()) break;
    }
    release_answers();
    must(pending_.empty(), "answers wait for ever");
    if (life == 0) {
      stop(one_in(2));
      must(start(), "no fault, and it does not start: " + error_.what);
      judge_recovery();
    }
  }
  stop(true);
  std::vector<std::string> files;
  for (const char* dir : {"", "wal"}) {
    auto names = disk_.list(dir);
    if (!names) continue;
    for (const std::string& name : *names) {
      std::string path = *dir ? std::string(dir) + "/" + name : name;
      if (disk_.exists(path) && !disk_.contents(path).empty()) {
        files.push_back(path);
      }
    }
  }
  must(!files.empty(), "nothing on the disk");
  const std::string& file = files[below(files.size())];
  std::vector<std::byte> bytes = disk_.contents(file);
  std::uint64_t offset = below(bytes.size());
  if (!one_in(5)) {  // most of a file is padding; aim at what is not
    while (offset + 1 < bytes.size() && bytes[offset] == std::byte{0}) ++offset;
    offset += below(std::min<std::uint64_t>(64, bytes.size() - offset));
  }
  std::uint8_t mask = static_cast<std::uint8_t>(1u << below(8));
  ++tally_.flips;
  disk_.flip(file, offset, mask);
  if (!start()) {
    ++tally_.refused;
    bool said = error_.code == Code::corrupt || error_.code == Code::newer;
    must(said, "damage in " + file + " called " + error_.what);
    stop(false);
    disk_.flip(file, offset, mask);
    must(start(), "a refusal changed something: " + error_.what);
  }
  judge_recovery();
  drain();
  tally_.syncs = disk_.syncs();
}

// --- clients, workers, operators ---

JobId World::some_job() {
  if (ids_.empty() || one_in(20)) return make_job_id(1, 2, chance_.next());
  return ids_[ids_.size() - 1 - below(std::min<std::size_t>(ids_.size(), 40))];
}

// Mostly recent ones: current, or just lost.
Fence World::some_fence() {
  if (held_.empty() || one_in(30)) return chance_.next();
  std::size_t recent = std::min<std::size_t>(held_.size(), 16);
  return held_[held_.size() - 1 - below(recent)];
}

NewJob World::new_job() {
  NewJob j;
  j.kind = "k" + std::to_string(below(3));
  j.queue = "q" + std::to_string(below(2));
  j.priority = static_cast<int>(below(3)) * 4;
  j.payload = "\"" + std::string(below(one_in(10) ? 6000 : 200), 'p') + "\"";
  j.max_attempts = 1 + static_cast<int>(below(4));
  j.retry_min_ms = static_cast<Millis>(below(400));
  j.min_level = static_cast<Level>(below(2));
  if (use_dedup_ && one_in(3)) {
    j.dedup_key = "key" + std::to_string(below(25));
    j.dedup_ttl_ms = static_cast<Millis>(below(20'000));
    j.payload_digest[0] = one_in(10);
  }
  if (use_deps_ && one_in(3)) {
    for (std::uint64_t i = 1 + below(3); i > 0; --i) {
      j.depends_on.push_back(some_job());
    }
  }
  if (use_delays_ && one_in(4)) {
    if (one_in(2)) {
      j.run_at_ms = wall_ + static_cast<Millis>(below(4000)) - 500;
    } else {
      j.delay_ms = static_cast<Millis>(below(4000));
    }
  }
  if (use_keys_ && one_in(2)) {
    std::uint64_t key = below(4);
    j.concurrency_key = "c" + std::to_string(key);
    j.concurrency_limit =
        static_cast<std::uint16_t>(1 + (one_in(5) ? below(4) : key % 3));
    j.kind_key = one_in(4);
  }
  return j;
}

std::vector<Fact> World::facts(const std::vector<NewJob>& jobs) const {
  std::vector<Fact> all;
  for (const NewJob& job : jobs) {
    for (const JobId& id : job.depends_on) {
      auto found = model_.ended.find(id);
      bool known = found != model_.ended.end();
      all.push_back({id, known, known ? found->second : State::dead});
    }
  }
  return all;
}

LeaseCommand World::lease() {
  LeaseCommand c;
  c.worker = "w" + std::to_string(below(4));
  c.kinds = {one_in(3) ? "k" + std::to_string(below(3)) : "*"};
  if (one_in(4)) c.queues = {"q" + std::to_string(below(2))};
  c.max = 1 + static_cast<int>(below(8));
  c.level = static_cast<Level>(below(3));
  if (one_in(5)) c.holding = {some_fence(), some_fence()};
  if (use_park_ && one_in(2)) c.waiter = ++waiters_;
  return c;
}

Command World::next_command() {
  switch (below(18)) {
    case 0:
    case 1:
    case 2:
    case 3:
    case 4: {
      EnqueueCommand c;
      for (std::uint64_t i = 1 + below(one_in(8) ? 20 : 3); i > 0; --i) {
        c.jobs.push_back(new_job());
      }
      c.facts = facts(c.jobs);
      return c;
    }
    case 5:
    case 6:
    case 7:
    case 8:
      return lease();
    case 9:
    case 10:
    case 11: {
      CompleteCommand c;
      for (std::uint64_t i = 1 + below(3); i > 0; --i) {
        CompleteCommand::Item item;
        item.fence = some_fence();
        if (one_in(4)) item.outcome.code = EndCode::verdict;
        item.outcome.result = "\"" + std::string(below(300), 'r') + "\"";
        if (use_children_ && one_in(4)) item.children.push_back(new_job());
        for (const Fact& f : facts(item.children)) c.facts.push_back(f);
        c.items.push_back(std::move(item));
      }
      if (one_in(2)) c.lease = lease();
      return c;
    }
    case 12:
    case 13: {
      FailCommand c;
      c.fence = some_fence();
      c.outcome.code = static_cast<EndCode>(1 + below(kEndCodes - 1));
      c.outcome.message = "it failed";
      c.outcome.retry = !one_in(6);
      if (one_in(4)) {
        c.outcome.retry_after_ms = static_cast<Millis>(below(800));
      }
      return c;
    }
    case 14: {
      if (use_block_ && one_in(2)) {
        return BlockCommand{some_fence(), "why", "{}",
                            one_in(2) ? static_cast<Millis>(below(3000)) : 0};
      }
      for (const auto& [id, job] : model_.live) {
        if (job.state != State::blocked || one_in(2)) continue;
        return UnblockCommand{id, one_in(5) ? "wrong" : job.token, "{}", "me"};
      }
      return HeartbeatCommand{{{some_fence(), 1, ""}}};
    }
    case 15:
      return ReleaseCommand{{some_fence(), some_fence()}};
    case 16: {
      if (!one_in(3)) return CancelCommand{some_job()};
      JobId id = some_job();
      RetryCommand c{id, std::nullopt, State::dead, 0};
      auto ended = model_.ended.find(id);
      if (ended != model_.ended.end()) {
        c.body = model_.bodies.at(id);
        c.state = ended->second;
        c.attempt = 1;
        c.ignore_dependencies = one_in(3);
        c.facts = facts({c.body->job});
      }
      return c;
    }
    default:
      return GoneCommand{{"w" + std::to_string(below(4))}, one_in(3)};
  }
}

// --- answers, against what the oracle knew before them ---

void World::judge(const Command& command, const Decision& d) {
  auto current = [this](Fence fence) {
    for (const auto& [id, job] : model_.live) {
      if (job.fence == fence && fence != 0) return true;
    }
    return false;
  };
  std::set<Fence> used;
  auto fence_answer = [&](Fence fence, const ItemAnswer& a, bool uses) {
    bool good = current(fence) && !used.contains(fence);
    bool refused_child =
        uses && a.answer != Answer::ok && a.answer != Answer::stale_lease;
    must(good == (a.answer != Answer::stale_lease),
         "a token was judged wrongly: " + fence_hex(fence));
    tally_.stale += !good;
    if (uses && good && !refused_child) used.insert(fence);
  };
  if (auto* c = std::get_if<EnqueueCommand>(&command)) {
    must(d.items.size() == c->jobs.size(), "items are missing");
    for (std::size_t i = 0; i < c->jobs.size(); ++i) {
      judge_item(c->jobs[i], d.items[i], now());
    }
  } else if (auto* done = std::get_if<CompleteCommand>(&command)) {
    must(d.items.size() == done->items.size(), "items are missing");
    for (std::size_t i = 0; i < done->items.size(); ++i) {
      fence_answer(done->items[i].fence, d.items[i], true);
    }
  } else if (auto* failed = std::get_if<FailCommand>(&command)) {
    fence_answer(failed->fence, d.items.at(0), true);
  } else if (auto* block = std::get_if<BlockCommand>(&command)) {
    fence_answer(block->fence, d.items.at(0), true);
  } else if (auto* release = std::get_if<ReleaseCommand>(&command)) {
    for (std::size_t i = 0; i < release->fences.size(); ++i) {
      fence_answer(release->fences[i], d.items.at(i), true);
    }
  } else if (auto* cancel = std::get_if<CancelCommand>(&command)) {
    must((d.items.at(0).answer == Answer::not_found) ==
             !model_.live.contains(cancel->id),
         "a cancel found what is not there, or not what is");
  } else if (auto* retry = std::get_if<RetryCommand>(&command)) {
    bool lost = false, ended = model_.ended.contains(retry->id);
    for (const Fact& f : retry->facts) {
      lost = lost || (f.known && f.state != State::succeeded);
    }
    bool refused = ended && retry->state != State::succeeded && lost &&
                   !retry->ignore_dependencies;
    must(refused == (d.items.at(0).answer == Answer::dependency),
         "a retry without its dependencies was judged wrongly");
  } else if (auto* unblock = std::get_if<UnblockCommand>(&command)) {
    auto found = model_.live.find(unblock->id);
    bool right = found != model_.live.end() &&
                 found->second.state == State::blocked &&
                 found->second.token == unblock->token;
    must(right == (d.items.at(0).answer == Answer::ok),
         "an unblock was judged wrongly");
  }
}

// No slot is free for a job that this call would take.
void World::judge_hunger(const LeaseCommand& c, const char* who) {
  JobId id = model_.leasable(c);
  must(id.is_nil(), std::string(who) + " is left without " + to_string(id));
}

void World::judge_item(const NewJob& job, const ItemAnswer& a, Millis at) {
  if (job.dedup_key.empty()) {
    must(a.answer != Answer::duplicate, "a duplicate without a key");
    return;
  }
  const ModelKey* known = model_.key_of(job, at);
  if (!known) return;  // a new one is checked by the oracle when it is folded
  bool same = known->kind == job.kind &&
              known->digest[0] == job.payload_digest[0] &&
              known->digest[1] == job.payload_digest[1];
  must(a.answer == (same ? Answer::duplicate : Answer::dedup_mismatch) &&
           a.id == known->id,
       "key " + job.dedup_key + " was forgotten or confused");
  auto ended = model_.ended.find(known->id);
  if (ended != model_.ended.end()) {
    must(a.state == ended->second && a.finished_ms > 0,
         "key " + job.dedup_key + " does not know how its job ended");
  }
  ++tally_.duplicates;
}

}  // namespace machina::sim
