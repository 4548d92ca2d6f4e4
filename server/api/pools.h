// server/api/pools.h
//
// What pools of workers report, and how many workers there are to be. Knows no
// connection and no child process (own_pool.h); the loop's thread only.
//
//   sync -> read_sync() -> hear() -> park() -> answer_due() | take_parked()
//
//   PL1  A pool may end the leases of its own workers only: of its session, or
//        of names that it was the first to list
//        (PoolsTest.APoolEndsOnlyItsOwnWorkers).
//   PL2  A session that its pool has reported as ended leases nothing any more
//        (PoolsTest.AnEndedSessionIsRemembered).
//   PL3  A sync waits only where its connection knows the target already; it
//        is answered once (PoolsTest.ASyncWaitsUntilThereIsNews).
//   PL4  A pool that has said nothing for kPoolSilentMs is forgotten
//        (PoolsTest.ASilentPoolIsForgotten).
//   PL5  There is no trouble while any worker has proven a level
//        (PoolsTest.OneGoodWorkerIsNoTrouble).
//   PL6  At most kPoolsMax pools, kWorkersMax workers and kListedMax names of
//        each, kGoneSessionsMax sessions, kGrantedMax grants
//        (PoolsTest.ReportsAreBounded, WorkerRoutes.PoolsReportAndAreScaled).

#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/json.h"
#include "server/api/job_json.h"
#include "server/api/metrics.h"
#include "server/api/route.h"
#include "server/api/server.h"
#include "server/auth/tokens.h"

namespace machina {

constexpr std::size_t kPoolsMax = 64;
constexpr std::size_t kFactsBytesMax = 16 * 1024;  // of one worker
constexpr int kWorkersMax = 64;                    // of one pool
constexpr std::size_t kListedMax = 4096;           // names, of one pool
constexpr std::size_t kGoneNamesMax = 1024;        // of one report
constexpr std::size_t kGoneSessionsMax = 4096;     // then they are forgotten
constexpr std::size_t kGrantedMax = 4096;          // then they are forgotten
constexpr std::size_t kTroubleBytesMax = 4096;     // of reason and remedy, each
constexpr Millis kPoolSilentMs = 45'000;  // a pool not heard of is gone
constexpr Millis kPoolComesMs = 30'000;   // until a pool's workers may ask

// Why a pool can run no job, and what to change (workers/pool/pool.h, P7).
struct PoolTrouble {
  std::string reason, remedy;
};

// What a pool said last.
struct PoolReport {
  struct Worker {
    std::string name, facts;  // facts: raw members but `state` and `job`
    std::string state, job;   // as the pool says
    int level = -1;
  };
  std::string host;
  std::vector<Worker> workers;
  std::string session;           // of this sync
  std::set<std::string> listed;  // its workers, also those that are no more
  PoolTrouble trouble;
  std::optional<PoolCounts> counts;
  Millis seen_mono = 0, seen_wall = 0;
  Where parked;  // its waiting sync
  Millis answer_at = 0;
};

// The body of a sync.
struct PoolSync {
  PoolReport report;
  std::vector<std::string> gone, ended;  // names of workers
  Millis wait_ms = 0;
};

// What a connection was told last.
struct PoolTold {
  std::string pool;  // the pool that syncs there; empty: none does
  int target = -1;
  bool drain = false;
};

// Nothing, or what is wrong with the body.
MaybeProblem read_sync(const JsonValue& json, PoolSync* sync);

class Pools {
 public:
  // True: the sync is answered. False: its connection is gone.
  using Answer = std::function<bool(const Where&)>;

  Pools(const ServerOptions& options, Clock& clock);

  // --- what they report ---
  bool has_room_for(const std::string& id) const;
  // Which leases end by this report, and the older sync of the same pool, which
  // was left behind.
  struct Heard {
    std::vector<GoneCommand> ends;
    Where left_behind;
  };
  Heard hear(const std::string& id, PoolSync sync, Tokens& tokens);
  // What such a worker had sent before must not lease: nobody would hear of it.
  bool has_ended(Session session) const {
    return gone_sessions_.contains(session);
  }
  // Forgets what was reported: the pool is no more.
  void forget() { pools_.clear(); }
  bool heard() const;  // of any, not long ago

  // --- syncs that wait ---
  // False: it has to be answered at once.
  bool park(const std::string& id, const Where& where, Millis wait_ms,
            PoolTold* told);
  std::string answer(PoolTold* told) const;
  // All, or those whose time has come.
  void answer_due(bool all, const Answer& answer);
  std::vector<Where> take_parked(std::uint64_t peer);

  // --- how many there are to be ---
  int target() const { return target_; }
  void scale(int target);
  // Whether a worker that leases this kind is on its way.
  bool comes(const std::string& kind) const;
  // `tell`: pools are to leave.
  void drain(bool tell);
  bool draining() const { return draining_; }

  // --- what their workers' canaries found ---
  // True: no worker reaches the level that is required, and the server stops.
  bool too_weak();
  bool level_passed() const { return level_passed_; }
  // Of a pool that is there, or of ours that could not stay; nothing while any
  // worker has proven a level.
  const PoolTrouble* trouble() const;
  void ours_has_trouble(PoolTrouble why) { own_trouble_ = std::move(why); }
  // The reason for a job that waits, and is of a kind that pools run; or "".
  std::string_view waiting_reason(const JobView& job) const;

  // --- who runs what ---
  // A pool is told of attempts that last, and tells it later; the lease calls
  // know at once. A worker's call that asks for leases says that it has none
  // (or names them); a grant, that it runs one.
  void worker_asks(const std::string& worker) { granted_.erase(worker); }
  void worker_got(const LeaseView& lease);
  // The job it runs, or empty.
  std::string job_of(const PoolReport::Worker& worker) const;
  WorkerNumbers numbers() const;
  const std::map<std::string, PoolReport>& all() const { return pools_; }

 private:
  void claim_names(const std::string& id, PoolReport* said) const;
  static GoneCommand gone_of(const std::string& id, const PoolReport& said,
                             std::vector<std::string> gone, Tokens& tokens);

  const ServerOptions& options_;
  Clock& clock_;
  std::map<std::string, PoolReport> pools_;
  std::set<Session> gone_sessions_;
  std::unordered_map<std::string, JobId> granted_;  // by worker
  PoolTrouble own_trouble_;                         // of the one that we start
  int target_;
  Millis scaled_mono_;  // when workers were last asked for
  bool draining_ = false, told_drain_ = false;
  bool warned_level_ = false, level_passed_ = false;
};

}  // namespace machina
