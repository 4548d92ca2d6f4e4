// server/service.h
//
// The server's one object: peers (connections), routes, what is asked of the
// shard and what comes back. Private to server/.
//
//   bytes -> Connection -> Peer::on_request -> dispatch() (routes.cc)
//         -> a handler (routes_*.cc) -> submit() -> the shard
//   the shard -> on_response() -> the handler's other half -> reply()
//
// Everything here runs on the loop's thread. Files are touched on store
// threads only, whose results come back by Loop::post.

#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "queue/shard.h"
#include "server/connection.h"
#include "server/job_json.h"
#include "server/json.h"
#include "server/loop.h"
#include "server/metrics.h"
#include "server/problem.h"
#include "server/server.h"
#include "server/store.h"
#include "server/tokens.h"

namespace machina {

constexpr std::size_t kLeaseReplyBytesMax = 4u << 20;
constexpr int kRunSyncWaitMs = 300'000;
constexpr int kWaitSecondsMax = 300;  // of Prefer: wait
constexpr std::size_t kPoolsMax = 64;
constexpr std::size_t kFactsBytesMax = 16 * 1024;  // of one worker
constexpr int kWorkersMax = 64;                    // of one pool
constexpr std::size_t kAttemptsKeptMax = 65'536;
constexpr std::size_t kUploadHeldMax = 1u << 20;  // then reading stops
constexpr std::size_t kDownloadPieceBytes = 256 * 1024;
constexpr Millis kSweepEveryMs = 10'000;  // all 256 buckets: 43 minutes
constexpr Millis kStalledMs = 60'000;     // a reader that takes nothing
constexpr Millis kPoolGraceMs = 2'000;
constexpr Millis kPoolSilentMs = 45'000;  // a pool not heard of is gone
constexpr Millis kPoolLeaveMs = 1'500;    // how long a drain waits for pools

class Service;
struct Peer;

enum class PendingOp : std::uint8_t {
  none,
  enqueue,
  enqueue_many,
  get,
  act,
  list,
  lease,
  heartbeat,
  complete,
  complete_many,
  lease_act,
  sync,
  stream,
};

// What a handler is given. The views die with the call.
struct Exchange {
  Peer& peer;
  std::uint64_t sequence;
  const Head& head;
  std::string_view body;
  std::array<std::string_view, 2> args;
};

struct Route {
  Method method;
  std::string_view pattern;  // "/v1/jobs/{}/cancel"
  void (Service::*handle)(const Exchange&);
  enum Flags : std::uint8_t { none = 0, open = 1, raw = 2, stream = 4 };
  std::uint8_t flags = none;
  std::uint64_t max_body = 0;  // 0: the configured one
};

// A reply's parts beside its status and body.
struct Extras {
  std::string_view content_type = "application/json";
  std::string headers;  // whole lines
  bool close = false;
};

// Addresses one request; survives the peer.
struct Where {
  std::uint64_t peer = 0, sequence = 0;
};

struct Peer final : SocketEvents, ConnectionSink {
  Peer(Service& owner, Socket& its_socket, bool is_local, Millis now);

  void on_bytes(std::string_view bytes) override;
  void on_end() override;
  void on_drained() override;
  void on_gone() override;

  BodyPlan on_head(std::uint64_t sequence, const Head& head) override;
  void on_piece(std::uint64_t sequence, std::string_view piece) override;
  void on_request(std::uint64_t sequence, const Head& head,
                  std::string_view body) override;
  void on_error(std::uint64_t sequence, const Head& head,
                const HttpError& error) override;

  Service& service;
  Socket& socket;
  std::uint64_t id = 0;
  bool local;
  bool closed = false;
  Connection connection;
  // Of the request whose head was read last.
  const Route* route = nullptr;
  MaybeProblem refusal;
  // An artifact that is coming in.
  struct Upload;
  std::shared_ptr<Upload> upload;
  std::vector<std::uint64_t> streams;  // sequences of open downloads
  std::size_t unsent = 0;              // at the last look, and
  Millis unsent_since = 0;             // since when it is no less
  std::string told_pool;               // the pool that syncs here
  int told_target = -1;
  bool told_drain = false;
};

class Service {
 public:
  Service(const ServerOptions& options, const ServerHooks& hooks);
  ~Service();
  int run();

 private:
  friend struct Peer;
  static const std::vector<Route>& routes();

  // --- life (service.cc) ---
  int open();  // 0, or an exit code
  int recover();
  int listen();
  void turn();
  void arm_timer();
  void housekeeping();
  void begin_drain(bool handover);
  void advance_drain();
  void check_poison();
  void check_peer(Peer& peer, Millis now);
  int finish();
  void stop(int code);
  void say(const std::string& line);

  // --- peers ---
  SocketEvents* accept(Socket& socket, bool local);
  Peer* peer(std::uint64_t id);
  void forget(Peer& peer);  // tells the shard; the id is dead from here on
  void close(Peer& peer);
  void after(Peer& peer);  // replies were written: flush, linger, resume

  // --- dispatch (routes.cc) ---
  BodyPlan head_read(Peer& peer, std::uint64_t sequence, const Head& head);
  void dispatch(Peer& peer, std::uint64_t sequence, const Head& head,
                std::string_view body);
  bool authorized(const Peer& peer, const Head& head) const;
  void take_request_id(Pending& pending, const Head& head);

  // --- replies ---
  void refresh_date();
  void reply(Peer& peer, std::uint64_t sequence, int status,
             std::string_view body, const Extras& extras = {});
  void begin_reply(Peer& peer, std::uint64_t sequence, int status,
                   std::uint64_t body_bytes, const Extras& extras);
  void refuse(Peer& peer, std::uint64_t sequence, const Problem& problem);
  void refuse(const Where& where, const Problem& problem);
  void reply_job(Peer& peer, std::uint64_t sequence, int status,
                 const JobView& view, Show show, std::string headers = {});

  // --- the shard ---
  Request request_of(const Exchange& call);
  void submit(Request request);
  // Asks on the server's own behalf.
  void ask(Request request, std::function<void(Response)> then);
  void on_response(Response response);
  std::optional<Problem> failure_of(const Response& response) const;
  std::optional<Problem> problem_of(const ItemAnswer& answer,
                                    std::string_view what) const;
  // Answers with the job `id` as it is now.
  void reply_with_job(Peer& peer, std::uint64_t sequence, const JobId& id,
                      bool payload);

  // --- jobs (routes_jobs.cc) ---
  void post_jobs(const Exchange& call);
  void post_enqueue(const Exchange& call);
  void post_run_sync(const Exchange& call);
  void enqueue_one(const Exchange& call, const JsonValue& json, Millis wait_ms,
                   std::uint8_t stage);
  void enqueue_many(const Exchange& call, bool lines);
  void get_job(const Exchange& call);
  void list_jobs(const Exchange& call);
  void cancel_job(const Exchange& call);
  void retry_job(const Exchange& call);
  void unblock_job(const Exchange& call);
  void enqueued(Peer& peer, std::uint64_t sequence, Pending& pending,
                Response& response);
  void enqueued_many(Peer& peer, std::uint64_t sequence, Pending& pending,
                     Response& response);
  void got(Peer& peer, std::uint64_t sequence, Pending& pending,
           Response& response);
  void acted(Peer& peer, std::uint64_t sequence, Pending& pending,
             Response& response);
  void listed(Peer& peer, std::uint64_t sequence, Pending& pending,
              Response& response);
  void took(const Pending& pending);
  JobContext context_of(const Exchange& call);
  // Parses a body that must be one JSON value; replies where it is not.
  bool parse_body(const Exchange& call, bool empty_is_object, JsonValue* json);
  bool no_members(const Exchange& call);
  std::optional<JobId> job_of(const Exchange& call);

  // --- workers (routes_workers.cc) ---
  void post_leases(const Exchange& call);
  void post_heartbeat(const Exchange& call);
  void post_complete(const Exchange& call);
  void post_complete_many(const Exchange& call);
  void post_fail(const Exchange& call);
  void post_block(const Exchange& call);
  void post_release(const Exchange& call);
  std::optional<Fence> lease_of(const Exchange& call);
  MaybeProblem check_token(std::string_view text, Fence* fence);
  MaybeProblem finish_lease(LeaseBody* lease);
  // Looks whether what completions claim was staged, then goes on.
  void check_artifacts(
      const Where& where,
      std::vector<std::pair<Fence, std::vector<std::string>>> claims,
      std::function<void(std::vector<MaybeProblem>)> then);
  void leased(Peer& peer, std::uint64_t sequence, Pending& pending,
              Response& response);
  void append_leases(JsonWriter& json, std::vector<LeaseView>& leases);
  void heartbeaten(Peer& peer, std::uint64_t sequence, Pending& pending,
                   Response& response);
  void completed(Peer& peer, std::uint64_t sequence, Pending& pending,
                 Response& response);
  void completed_many(Peer& peer, std::uint64_t sequence, Pending& pending,
                      Response& response);
  void give_back(std::vector<Fence> fences);

  // --- files (routes_files.cc) ---
  void post_log(const Exchange& call);
  void put_artifact(const Exchange& call);
  void upload_piece(Peer& peer, std::string_view piece);
  void pump_upload(std::shared_ptr<Peer::Upload> upload);
  void get_logs(const Exchange& call);
  void list_artifacts(const Exchange& call);
  void get_artifact(const Exchange& call);
  void with_attempt(const Where& where, Fence fence,
                    std::function<void(JobId, int)> then);
  void with_job(const Where& where, const JobId& id,
                std::function<void(JobView&)> then);
  void with_artifacts(const Where& where, const JobId& id,
                      std::function<void(std::vector<Artifact>)> then);
  void send_file(const Where& where, OpenedFile file, Extras extras);
  void pump_streams(Peer& peer);
  void sweep();
  void sweep_next(std::shared_ptr<std::vector<Store::Kept>> kept);
  // Runs on a store thread; `then` on the loop. Refuses `where` with 503 where
  // the threads have too much to do.
  template <class T>
  void on_store(const Where& where, std::function<T()> work,
                std::function<void(T)> then);
  void refuse_error(const Where& where, const Error& error);

  // --- operations (routes_ops.cc) ---
  void get_health(const Exchange& call);
  void get_ready(const Exchange& call);
  void get_stats(const Exchange& call);
  void get_metrics(const Exchange& call);
  void post_shutdown(const Exchange& call);
  void get_root(const Exchange& call);
  void not_built(const Exchange& call);
  std::string unready() const;  // why; empty: ready

  // --- pools (pools.cc) ---
  struct Pool {
    std::string host;
    struct Worker {
      std::string name, facts;
      int level = -1;
      bool busy = false;
    };
    std::vector<Worker> workers;
    Millis seen_mono = 0, seen_wall = 0;
    Where parked;  // its waiting sync
    Millis answer_at = 0;
  };
  void post_sync(const Exchange& call);
  void get_workers(const Exchange& call);
  void put_scale(const Exchange& call);
  bool read_sync(const Exchange& call, const JsonValue& json, Pool* pool,
                 std::vector<std::string>* gone, Millis* wait_ms);
  void answer_sync(Peer& peer, std::uint64_t sequence);
  void answer_parked(bool all);
  void supervise_pool();
  void check_levels();
  bool pool_heard() const;
  WorkerNumbers worker_numbers() const;

  const ServerOptions& options_;
  const ServerHooks& hooks_;
  Clock& clock_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<Shard> shard_;
  std::unique_ptr<Tokens> tokens_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<FileThreads> threads_;
  Metrics metrics_;
  std::string recovery_;
  int port_ = 0;
  Millis started_mono_ = 0;

  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<std::uint32_t> free_peers_;
  std::vector<std::unique_ptr<Peer>> gone_peers_;  // freed at the turn's end
  std::uint64_t peer_generation_ = 0;
  int connections_ = 0;

  std::uint64_t next_ask_ = 0;
  std::unordered_map<std::uint64_t, std::function<void(Response)>> asked_;
  struct Attempt {
    JobId id;
    int number = 0;
  };
  std::unordered_map<Fence, Attempt> attempts_;  // of leases handed out

  JsonDoc doc_;
  std::string scratch_, date_;
  Millis date_second_ = -1;
  std::uint64_t now_us_ = 0;  // at the turn's start
  std::uint64_t next_request_ = 0;
  Millis armed_at_ = -1;
  Millis last_look_ = 0, last_sweep_ = 0;
  int next_bucket_ = 0;
  bool sweeping_ = false;

  std::map<std::string, Pool> pools_;
  int target_ = 0;
  bool pool_running_ = false;
  Millis pool_started_ = 0, pool_start_at_ = 0, pool_backoff_ = 0;
  bool warned_level_ = false, level_passed_ = false;

  bool draining_ = false, handover_ = false, finishing_ = false,
       released_ = false, poisoned_ = false;
  Millis drain_until_ = 0, leave_until_ = 0;
  int exit_code_ = 0;
  int asked_to_stop_ = 0;  // by signal
};

struct Peer::Upload {
  std::uint64_t peer = 0, sequence = 0;
  Fence fence = 0;
  std::string name;
  std::string waiting;  // read, and not yet given to the store
  std::uint64_t size = 0;
  bool busy = false;      // a store thread has it
  bool complete = false;  // the body is all here
  bool dead = false;
  std::shared_ptr<Store::Upload> file;
  std::optional<Error> error;
};

template <class T>
void Service::on_store(const Where& where, std::function<T()> work,
                       std::function<void(T)> then) {
  bool taken = threads_->run([this, work = std::move(work),
                              then = std::move(then)]() mutable {
    auto result = std::make_shared<T>(work());
    loop_->post([result, then = std::move(then)] { then(std::move(*result)); });
  });
  if (taken) return;
  Problem p;
  p.status = 503;
  p.code = "busy";
  p.detail = "too many file operations are waiting";
  p.retry_after = 1;
  refuse(where, p);
}

// CLOCK_MONOTONIC, for how long things took.
std::uint64_t mono_us();
// A query's parameters in order, decoded; nothing where the text is malformed.
std::optional<std::vector<std::pair<std::string, std::string>>> parse_query(
    std::string_view query);

}  // namespace machina
