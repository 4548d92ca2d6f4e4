// The numbered list of docs/core-invariants.md, as code.

#include <array>
#include <map>

#include "queue/base/check.h"
#include "queue/core/core_state.h"

namespace machina {
namespace {

class Checker {
 public:
  explicit Checker(const Core::Impl& state) : s_(state) {}

  void check() {
    jobs();
    lines();
    leases();
    edges();
    lists();
    dedups();
    waiters();
    keys();
  }

 private:
  void jobs() {
    by_state_.resize(s_.queues.size());
    jobs_in_line_.resize(s_.lines.size());
    ready_in_line_.resize(s_.lines.size());
    for (std::uint32_t i = 0; i < s_.jobs.end(); ++i) {
      const JobEntry& e = s_.jobs[i];
      if (!(e.flags & kUsed)) continue;
      ++used_;
      if (e.flags & kEnded) {
        CHECK(is_final(static_cast<State>(e.state)));  // C1
        ++ended_;
      } else {
        job(i, e);
      }
      if (s_.extra_slot(e) != kNone) ++extras_;
      for (auto d = e.dependents; d != kNone; d = s_.edges[d].next) {
        CHECK(s_.edges[d].dependency == i);  // C10
        ++edges_out_;
      }
    }
    CHECK(used_ == s_.jobs.used());  // C3
    CHECK(s_.job_index.size() == used_ - ended_);
    CHECK(extras_ == s_.extras.used());
  }

  void job(std::uint32_t i, const JobEntry& e) {
    CHECK(!is_final(static_cast<State>(e.state)));  // C1
    CHECK(s_.find(e.id) == i);                      // C2
    CHECK(e.line < s_.lines.size() && e.tenant < s_.tenants.size());
    CHECK(e.priority <= kPriorityMax);
    CHECK(e.base <= e.attempt && e.attempt <= e.limit);  // C7
    CHECK(e.order < s_.next_order);
    std::uint32_t queue = s_.lines[e.line].queue;
    ++by_state_[queue][e.state];
    ++jobs_in_line_[e.line];
    if (e.flags & kKeyed) {
      const KeyedEntry& own = s_.keyed[e.extra];
      CHECK(own.limit > 0 && s_.groups[own.group].line == e.line);  // C16
      ++keyed_;
      ++jobs_in_group_[own.group];
      ready_in_group_[own.group] += e.state == u8(State::ready);
      running_of_key_[s_.key_slot(e)] += e.state == u8(State::running);
    }
    switch (static_cast<State>(e.state)) {
      case State::waiting:
        waiting(i, e);
        break;
      case State::scheduled:
        scheduled(i, e.flags & kAtWall ? s_.due_wall : s_.due, e);
        break;
      case State::ready:
        if (!(e.flags & kKeyed)) ++ready_in_line_[e.line];
        break;  // list: lines()
      case State::running:
        CHECK(s_.leases[e.a].job == i && s_.leases[e.a].fence != 0);  // C5
        CHECK(e.attempt > e.base);
        ++running_;
        break;
      case State::blocked:
        CHECK(s_.extra_slot(e) != kNone);
        if (e.time > 0) {
          CHECK(e.a < s_.deadlines.size() && s_.deadlines.at(e.a) == i);
          ++deadlines_;
        }
        break;
      default:
        CHECK(false);
    }
    CHECK(!(e.flags & kCancel) || e.state == u8(State::running));  // C8
    CHECK(!(e.flags & kDoomed) || e.state == u8(State::waiting));
    CHECK(!(e.flags & kAtWall) || e.state == u8(State::waiting) ||
          e.state == u8(State::scheduled));  // C4
  }

  void scheduled(std::uint32_t i, const Heap<JobEntry, JobByTime>& heap,
                 const JobEntry& e) {
    CHECK(e.a < heap.size() && heap.at(e.a) == i);  // C4
    ++scheduled_;
  }

  void waiting(std::uint32_t i, const JobEntry& e) {
    if (e.flags & kDoomed) {
      CHECK(e.unmet == 0);  // C11
      ++doomed_;
      return;
    }
    int unmet = 0;
    for (auto d = e.a; d != kNone; d = s_.edges[d].sibling) {
      CHECK(s_.edges[d].dependent == i);  // C10
      ++unmet;
    }
    CHECK(unmet == e.unmet && unmet > 0);
    edges_in_ += static_cast<std::size_t>(unmet);
  }

  void lines() {
    CHECK(s_.due.size() + s_.due_wall.size() == scheduled_);  // C4
    CHECK(s_.deadlines.size() == deadlines_);
    std::size_t used = 0, hungry = 0, with_ready = 0;
    for (std::uint32_t i = 0; i < s_.lines.size(); ++i) {
      const Line& line = s_.lines[i];
      CHECK(line.jobs == jobs_in_line_[i]);  // C13
      std::size_t open = line.open ? line.open->size() : 0;
      CHECK(line.ready == ready_in_line_[i] + open);
      open_ += open;
      used += line.jobs > 0;
      hungry += s_.is_hungry(line);
      with_ready += line.ready > 0;
      if (line.ready > 0) CHECK(s_.ready_lines[line.ready_at] == i);
      if (line.kind.empty()) continue;
      auto found = s_.line_names.find(
          LineKey(s_.queues[line.queue].name, line.kind, line.level).string());
      CHECK(found != s_.line_names.end() && found->second == i);
      lists_of(i, line);
    }
    CHECK(used == s_.lines_used && hungry == s_.hungry);
    CHECK(with_ready == s_.ready_lines.size());
    for (std::size_t i = 0; i < s_.queues.size(); ++i) {
      for (int state = 0; state < u8(State::succeeded); ++state) {
        CHECK(s_.queues[i].by_state[state] == by_state_[i][state]);  // C12
      }
    }
  }

  void lists_of(std::uint32_t at, const Line& line) {
    std::uint64_t ready = 0;
    for (std::size_t i = 0; i < 2 * kPriorities; ++i) {
      const JobList& list = line.lists[i / 2][i % 2];
      std::uint32_t before = kNone;
      for (auto j = list.head; j != kNone; j = s_.jobs[j].a, ++ready) {
        const JobEntry& e = s_.jobs[j];
        CHECK(e.state == u8(State::ready) && e.line == at);  // C4
        CHECK(e.priority == i / 2 && !(e.flags & kKeyed));
        CHECK(((e.flags & kReturned) != 0) == (i % 2 == kReturnedList));
        CHECK(e.b == before);
        CHECK(before == kNone || s_.jobs[before].order < e.order);  // C9
        before = j;
      }
      CHECK(list.tail == before);
    }
    CHECK(ready == ready_in_line_[at]);
    for (std::size_t i = 0; line.open && i < line.open->size(); ++i) {
      const GroupEntry& g = s_.groups[line.open->at(i)];  // C17
      CHECK(g.open && g.line == at && g.position == i);
      if (i == 0) continue;
      CHECK(!GroupByHead::before(g, s_.groups[line.open->at((i - 1) / 2)]));
    }
  }

  void leases() {
    CHECK(s_.leases.used() == running_);  // C5
    CHECK(s_.lease_index.size() == running_);
    CHECK(s_.lease_deadlines.size() == running_);
    std::size_t in_workers = 0;
    for (const auto& [worker, first] : s_.worker_leases) {
      std::uint32_t before = kNone;
      for (auto i = first; i != kNone; i = s_.leases[i].worker_next) {
        const LeaseEntry& lease = s_.leases[i];
        CHECK(lease.worker_name() == worker && lease.worker_before == before);
        CHECK(s_.lease_index.find(lease.fence) == i);
        CHECK(lease.fence <= s_.last_fence);  // C6
        CHECK(s_.jobs[lease.job].a == i);
        CHECK(s_.lease_deadlines.at(lease.position) == i);
        before = i;
        ++in_workers;
      }
    }
    CHECK(in_workers == running_);
    CHECK(s_.epoch == 0 ||
          make_fence(s_.epoch, s_.next_counter) > s_.last_fence);  // C6
  }

  void edges() {
    CHECK(edges_in_ == edges_out_ && edges_in_ == s_.edges.used());  // C10
  }

  void lists() {
    std::size_t doomed = 0, ended = 0;
    for (auto i = s_.doomed.head; i != kNone; i = s_.jobs[i].a, ++doomed) {
      CHECK(s_.jobs[i].flags & kDoomed);
    }
    for (auto i = s_.ended.head; i != kNone; i = s_.jobs[i].a, ++ended) {
      CHECK(s_.jobs[i].flags & kEnded);
    }
    CHECK(doomed == doomed_ && ended == ended_);  // C11
  }

  void dedups() {
    CHECK(s_.dedups.used() == s_.expiries.size());  // C14
    CHECK(s_.dedup_index.size() == s_.expiries.size());
    CHECK(s_.dedup_by_job.size() == s_.expiries.size());
    for (std::size_t i = 0; i < s_.expiries.size(); ++i) {
      std::uint32_t slot = s_.expiries.at(i);
      const DedupEntry& e = s_.dedups[slot];
      CHECK(e.position == i && s_.dedup_index.find(e.key) == slot);
      CHECK(s_.dedup_by_job.find(e.job) == slot);
      CHECK(e.finished == 0 || s_.find(e.job) == kNone);
      if (i == 0) continue;
      CHECK(!DedupByExpiry::before(e, s_.dedups[s_.expiries.at((i - 1) / 2)]));
    }
    for (std::size_t i = 1; i < s_.due.size(); ++i) {
      CHECK(s_.jobs[s_.due.at((i - 1) / 2)].time <=
            s_.jobs[s_.due.at(i)].time);  // C4
    }
    for (std::size_t i = 1; i < s_.due_wall.size(); ++i) {
      CHECK(s_.jobs[s_.due_wall.at((i - 1) / 2)].time <=
            s_.jobs[s_.due_wall.at(i)].time);  // C4
    }
  }

  void waiters() {
    CHECK(s_.waiters.size() == s_.waiter_index.size());  // C15
    std::vector<std::uint32_t> wanted(s_.lines.size());
    for (const Waiter& waiter : s_.waiters) {
      for (std::size_t i = 0; i < waiter.lines.size(); ++i) {
        wanted[i] += waiter.lines[i];
        const Line& line = s_.lines[i];
        if (line.kind.empty()) continue;
        CHECK(waiter.lines[i] == s_.matches(waiter.command, line));
      }
    }
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      CHECK(s_.lines[i].waiters == wanted[i]);
    }
  }

  // Everything about concurrency keys, from the groups that jobs name.
  void keys() {
    CHECK(keyed_ == s_.keyed.used());  // C16
    CHECK(jobs_in_group_.size() == s_.groups.used());
    std::size_t open = 0, ranks = 0;
    std::map<std::uint32_t, std::uint32_t> lines_of_key;
    for (const auto& [at, jobs] : jobs_in_group_) {
      const GroupEntry& g = s_.groups[at];
      CHECK(g.jobs == jobs && s_.group_of(g.key, g.line) == at);
      ++lines_of_key[g.key];
      ranks += ranks_of(at);
      std::uint32_t first = s_.first_ready(g);
      bool may_start = first != kNone && s_.keyed[s_.jobs[first].extra].limit >
                                             s_.keys[g.key].running;
      CHECK(g.open == may_start);  // C17
      if (first != kNone) CHECK(g.order == s_.jobs[first].order);
      open += g.open;
    }
    CHECK(open == open_ && ranks == s_.ranks.used());
    CHECK(lines_of_key.size() == s_.keys.used());
    CHECK(s_.key_index.size() == s_.keys.used());
    for (const auto& [key, lines] : lines_of_key) {
      CHECK(s_.keys[key].running == running_of_key_[key]);  // C16
      CHECK(s_.keys[key].lines == lines);
      CHECK(s_.key_index.find(s_.keys[key].hash) == key);
    }
  }

  std::size_t ranks_of(std::uint32_t group) {
    std::size_t ranks = 0, ready = 0;
    std::uint32_t last = kNone;
    for (auto r = s_.groups[group].ranks; r != kNone; r = s_.ranks[r].next) {
      CHECK(last == kNone || s_.ranks[last].rank < s_.ranks[r].rank);
      last = r;
      ++ranks;
      const JobList& list = s_.ranks[r].list;
      CHECK(list.head != kNone);
      std::uint32_t before = kNone;
      for (auto j = list.head; j != kNone; j = s_.jobs[j].a, ++ready) {
        const JobEntry& e = s_.jobs[j];
        CHECK(e.state == u8(State::ready) && (e.flags & kKeyed));  // C4
        CHECK(s_.keyed[e.extra].group == group);
        CHECK(rank_of(e) == s_.ranks[r].rank && e.b == before);
        CHECK(before == kNone || s_.jobs[before].order < e.order);  // C9
        before = j;
      }
      CHECK(list.tail == before);
    }
    CHECK(ready == ready_in_group_[group]);
    return ranks;
  }

  const Core::Impl& s_;
  std::map<std::uint32_t, std::uint32_t> jobs_in_group_, running_of_key_;
  std::map<std::uint32_t, std::size_t> ready_in_group_;
  std::size_t keyed_ = 0, open_ = 0;
  std::size_t used_ = 0, ended_ = 0, doomed_ = 0, scheduled_ = 0, running_ = 0,
              deadlines_ = 0, extras_ = 0, edges_in_ = 0, edges_out_ = 0;
  std::vector<std::array<std::uint64_t, kStates>> by_state_;
  std::vector<std::uint64_t> jobs_in_line_, ready_in_line_;
};

}  // namespace

void Core::Impl::check_invariants() const { Checker(*this).check(); }

}  // namespace machina
