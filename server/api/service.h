// server/api/service.h
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
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "queue/base/json.h"
#include "queue/base/logger.h"
#include "queue/shard/shard.h"
#include "server/api/doorkeeper.h"
#include "server/api/job_json.h"
#include "server/api/metrics.h"
#include "server/api/new_jobs.h"
#include "server/api/own_pool.h"
#include "server/api/patch_rebuild.h"
#include "server/api/patches.h"
#include "server/api/pools.h"
#include "server/api/problem.h"
#include "server/api/route.h"
#include "server/api/server.h"
#include "server/api/serving.h"
#include "server/api/store.h"
#include "server/auth/gate.h"
#include "server/auth/tokens.h"
#include "server/http/connection.h"
#include "server/http/descriptors.h"
#include "server/http/limits.h"
#include "server/http/loop.h"

namespace machina {

constexpr int kRunSyncWaitMs = 300'000;
constexpr int kWaitSecondsMax = 300;  // of Prefer: wait
constexpr std::size_t kAttemptsKeptMax = 65'536;
constexpr std::size_t kUploadHeldMax = 1u << 20;  // then reading stops
constexpr std::size_t kDownloadPieceBytes = 256 * 1024;
constexpr Millis kSweepEveryMs = 10'000;  // all 256 buckets: 43 minutes
// A reader must take this much in this time, while anything waits for it.
constexpr Millis kStalledMs = 60'000;
constexpr std::uint64_t kStalledBytes = 64 * 1024;
// Of a connection: then its next request is not begun.
constexpr std::size_t kUnsentMax = 64u << 10;
// Of all connections together: then no request whose answer may be large is
// begun, and who has taken nothing for kStalledFullMs is cut off. The Unix
// socket has as much beyond it: clients must not shut workers out.
constexpr std::uint64_t kUnsentAllMax = 32u << 20;
constexpr Millis kStalledFullMs = 2'000;
// What is kept free of kUnsentAllMax for a large answer that is being made.
constexpr std::uint64_t kListWeight = 4u << 20, kJobWeight = 128u << 10,
                        kPageWeight = 1u << 20, kDiffWeight = 16u << 20;
constexpr std::uint64_t kItemWeight = 256;  // of one job's of a bulk request
// What Request::view_bytes counts, of an answer that no room is kept for.
constexpr std::uint64_t kSmallAnswerBytes = 2u << 10;
constexpr std::uint64_t kTrimBytes = 8u << 20;  // memory worth giving back
constexpr Millis kStuckMs = 10'000;   // a batch that long: a dead disk
constexpr Millis kLastSyncMs = 1000;  // of a server that is told twice to end
constexpr Millis kDrainLookMs = 20;   // between two looks at what is left
constexpr std::size_t kUnservedMax = 100;  // kinds, of /stats

// A request whose answer there is no room for yet.
struct Later {
  Later(std::uint64_t which, std::uint64_t how_much, const Head& from,
        std::string_view with);
  std::uint64_t sequence, weight;
  std::string text, body;
  Head head;  // its views point into `text`
};

// A reply's parts beside its status and body.
struct Extras {
  std::string_view content_type = "application/json";
  std::string headers;  // whole lines
  bool close = false;
};

// Which of Limits' buckets is which.
enum Limit : std::uint8_t { kRequests = 0, kEnqueues = 1, kRunSyncs = 2 };

struct Peer final : SocketEvents, ConnectionSink {
  Peer(Service& owner, Socket& its_socket, bool is_local, Millis now);

  void on_bytes(std::string_view bytes) override;
  void on_end() override;
  void on_drained() override;
  void on_gone() override;
  void on_hangup() override;

  bool may_take() override;
  std::optional<HttpError> on_held(std::size_t bytes) override;
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
  Visitor visitor;
  bool closed = false;
  Connection connection;
  // Of the request whose head was read last.
  const Route* route = nullptr;
  MaybeProblem refusal;
  std::shared_ptr<Serving> serving;  // of the worker that asked here last
  std::unique_ptr<Sha256> digest;    // of a signed body that comes in pieces
  std::uint64_t weight = 0;          // what is kept for its answers
  bool hung_up = false;              // it will send no more
  std::unique_ptr<Later> later;      // waits for room, by way of crowd_
  int resolving = 0;                 // new_jobs.h: so many of its requests
  bool in_crowd = false;
  std::uint64_t kept = 0;  // Connection::kept(), as it is in weights_
  // An artifact that is coming in.
  struct Upload;
  std::shared_ptr<Upload> upload;
  std::vector<std::uint64_t> streams;  // sequences of open downloads
  std::uint64_t sent = 0;              // when last enough was taken, and
  Millis sent_at;                      // when that was
  std::uint64_t took = 0;              // the same of any byte
  Millis took_at;
  PoolTold told;
};

class Service {
 public:
  Service(const ServerOptions& options, const ServerHooks& hooks);
  ~Service();
  int run();

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
  void give_memory_back();
  void check_peer(Peer& peer, Millis now);
  int finish();
  void stop(int code);
  // --- what goes to the next server, and to a manager (handover.cc) ---
  void pass_sockets();
  void drop_inherited();
  void pulse();
  bool log_stuck();
  [[noreturn]] void leave_at_once();

  // --- peers ---
  SocketEvents* accept(Socket& socket, bool local);
  Peer* peer(std::uint64_t id);
  // Null where the request is answered, or its connection gone.
  Pending* pending_at(const Where& where);
  void forget(Peer& peer);  // tells the shard; the id is dead from here on
  void close(Peer& peer);
  void after(Peer& peer);  // replies were written: flush, linger, resume
  // --- room for answers (routes.cc) ---
  bool crowded(const Peer& peer, std::uint64_t weight) const;
  bool is_front(const Peer& peer, std::uint64_t sequence) const;
  void weigh(Peer& peer, Pending& pending, std::uint64_t weight);
  void unweigh(Peer& peer, Pending& pending);
  void weigh_kept(Peer& peer);
  void keep_room(const Exchange& call);
  std::uint64_t waits_for(Peer& peer) const;
  void join_crowd(Peer& peer);
  bool crowd_goes_on();
  void let_crowd_in();
  void cut_stalled(Peer& peer, Millis now);

  // --- dispatch (routes.cc) ---
  BodyPlan head_read(Peer& peer, std::uint64_t sequence, const Head& head);
  void dispatch(Peer& peer, std::uint64_t sequence, const Head& head,
                std::string_view body);
  void handle(Peer& peer, std::uint64_t sequence, const Head& head,
              std::string_view body);
  // Finds the route; `args` point into the head or into path_.
  MaybeProblem look_at_lease(const Route& route, std::string_view token,
                             bool* wanted);
  MaybeProblem route(const Head& head, const Route** route,
                     std::array<std::string_view, 2>* args);
  // The path as routes see it: decoded. Nothing where it is no path of ours.
  std::optional<std::string_view> plain_path(const Head& head);
  void take_request_id(Pending& pending, const Head& head);

  // --- the line about a request (access.cc) ---
  void note_request(Pending& pending, const Head& head, const Route* route);
  void say_reply(Peer& peer, const Pending& pending, int status);

  // --- replies ---
  void refresh_date();
  void reply(Peer& peer, std::uint64_t sequence, int status,
             std::string_view body, const Extras& extras = {});
  void begin_reply(Peer& peer, std::uint64_t sequence, int status,
                   std::uint64_t body_bytes, const Extras& extras);
  void refuse(Peer& peer, std::uint64_t sequence, const Problem& problem);
  void refuse(const Where& where, const Problem& problem);
  void resume_later(Peer& peer);
  // With the first view of `response`; where something was left out of it,
  // later, when there is room.
  void reply_job(Peer& peer, std::uint64_t sequence, int status,
                 Response& response, Show show, std::string headers = {});
  void ask_left_out(Peer& peer, std::uint64_t sequence, Pending& pending);

  // --- the shard ---
  Request request_of(const Exchange& call);
  void submit(Request request);
  // The same of a command that makes jobs (new_jobs.h). `note`: puts the
  // problems of those that are left out where the answer to a batch is made;
  // null: it is no batch, and the problem is the answer.
  using NoteProblems = void (*)(Pending&, std::vector<MaybeProblem>&);
  void submit_new(Request request, NoteProblems note = nullptr);
  void resolved(const Where& where, Request request, NoteProblems note,
                Resolver::Found found);
  void admitted(Request request);
  // Asks on the server's own behalf.
  void ask(Request request, std::function<void(Response)> then);
  void on_response(Response response);
  std::optional<Problem> problem_of(const ItemAnswer& answer,
                                    std::string_view what) const;
  // Answers with the job `id` as it is now.
  void reply_with_job(Peer& peer, std::uint64_t sequence, const JobId& id,
                      bool payload);

  // --- jobs (routes_jobs.cc) ---
  void enqueue_one(const Exchange& call, const JsonValue& json, Millis wait_ms,
                   std::uint8_t stage);
  void enqueue_many(const Exchange& call, bool lines);
  void took(const Pending& pending);
  JobContext context_of(const Exchange& call);
  // Parses a body that must be one JSON value; replies where it is not.
  bool parse_body(const Exchange& call, bool empty_is_object, JsonValue* json,
                  int depth_max = kJsonDepthMax);
  bool no_members(const Exchange& call);
  std::optional<JobId> job_of(const Exchange& call);

  // --- workers (routes_workers.cc) ---
  std::optional<Fence> lease_of(const Exchange& call);
  MaybeProblem check_token(std::string_view text, Fence* fence);
  MaybeProblem finish_lease(const Peer& peer, LeaseBody* lease);
  // Looks whether what completions claim was staged, then goes on.
  void check_artifacts(
      const Where& where,
      std::vector<std::pair<Fence, std::vector<std::string>>> claims,
      std::function<void(std::vector<MaybeProblem>)> then);
  void append_leases(Peer& peer, JsonWriter& json,
                     std::vector<LeaseView>& leases, std::string_view session);
  // Whether a worker that is connected, or about to be, leases this kind.
  bool served(const std::string& kind);
  void give_back(std::vector<Fence> fences);
  void tool_ended(Fence fence, State state);

  // --- files (routes_files.cc) ---
  void upload_piece(Peer& peer, std::string_view piece);
  void pump_upload(std::shared_ptr<Peer::Upload> upload);
  void with_attempt(const Where& where, Fence fence,
                    std::function<void(JobId, int)> then);
  // `then` gets a job that the principal of `where` sees; another's job is
  // refused as one that does not exist.
  void with_job(const Where& where, const JobId& id,
                std::function<void(JobView&)> then);
  void with_any_job(const Where& where, const JobId& id,
                    std::function<void(JobView&)> then);
  void with_artifacts(const Where& where, const JobId& id,
                      std::function<void(std::vector<Artifact>)> then);
  MaybeProblem no_file_left() const;
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

  // --- patches (routes_patches.cc) ---
  void when_fed(std::function<void()> then);
  void show_patch(
      const Exchange& call,
      std::function<Result<std::optional<std::string>>(const std::string&)>
          make,
      Extras extras = {});

  // --- operations (routes_ops.cc) ---
  std::string unready() const;  // why; empty: ready
  static void add_disk(const DiskState& disk, JsonWriter* json);
  std::optional<Problem> no_room_for_files() const;

  // --- pools (routes_pools.cc) ---
  void report_gone(GoneCommand command, std::function<void(Response)> then);
  void park_sync(Peer& peer, std::uint64_t sequence, const std::string& id,
                 Millis wait_ms);
  void answer_sync(Peer& peer, std::uint64_t sequence);
  void answer_parked(bool all);
  void check_levels();
  void supervise_pool();

  const ServerOptions& options_;
  const ServerHooks& hooks_;
  Clock& clock_;
  std::unique_ptr<Loop> loop_;
  // The shard feeds patches_, which reads what is in store_.
  std::unique_ptr<Store> store_;
  std::unique_ptr<Patches> patches_;
  std::unique_ptr<Shard> shard_;
  std::unique_ptr<Tokens> tokens_;
  std::unique_ptr<Doorkeeper> door_;
  std::unordered_map<ClientKey, int, ClientKeyHash> per_address_;
  // Of large answers that are being made, or wait for earlier ones.
  std::uint64_t weights_ = 0;
  std::uint64_t made_ = 0;           // bytes of answers of this turn
  std::uint64_t unsent_peak_ = 0;    // since memory was last given back
  std::deque<std::uint64_t> crowd_;  // peers that wait for room
  std::string metrics_text_;         // of this turn; empty: not made yet
  std::string path_;                 // decoded
  std::unique_ptr<FileThreads> threads_;
  std::unique_ptr<Resolver> resolver_;
  std::unique_ptr<PatchRebuild> patch_rebuild_;
  Metrics metrics_;
  struct AccessLines {
    AccessLines();
    Allowance requests, trouble;  // how many lines a second
  } access_;
  std::string recovery_;
  int port_ = 0;
  Millis started_mono_ = 0;

  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<std::uint32_t> free_peers_;
  std::vector<std::unique_ptr<Peer>> gone_peers_;  // freed at the turn's end
  std::uint64_t peer_generation_ = 0;
  int connections_ = 0, local_connections_ = 0;  // all; over the Unix socket
  Descriptors descriptors_;
  // Of artifacts and logs that come in or go out, wherever their last holder
  // is.
  std::shared_ptr<std::atomic<int>> files_ =
      std::make_shared<std::atomic<int>>(0);

  std::uint64_t next_ask_ = 0;
  std::unordered_map<std::uint64_t, std::function<void(Response)>> asked_;
  struct Attempt {
    JobId id;
    int number = 0;
    std::string tool;  // its kind, where that is a tool
    Millis since = 0;
    std::shared_ptr<Serving> serving = nullptr;
  };
  std::unordered_map<Fence, Attempt> attempts_;  // of leases handed out
  ServedKinds served_;

  JsonDoc doc_;
  std::string scratch_, date_;
  Millis date_second_ = -1;
  std::uint64_t now_us_ = 0;  // at the turn's start
  std::uint64_t next_request_ = 0;
  Millis armed_at_ = -1;
  Millis last_look_ = 0, last_sweep_ = 0;
  int next_bucket_ = 0;
  bool sweeping_ = false;

  Pools pools_;
  std::unique_ptr<OwnPool> own_pool_;

  bool draining_ = false, handover_ = false, finishing_ = false,
       released_ = false, poisoned_ = false, passed_on_ = false;
  Millis scraped_wall_ = 0;  // when /metrics was last asked for from outside
  Lsn stuck_at_ = 0;         // how far the log was durable at the last look
  Millis stuck_since_ = -1;
  Millis drain_until_ = 0, leave_until_ = 0;
  int exit_code_ = 0;
  int asked_to_stop_ = 0;  // by signal
};

// One of descriptors_.files, until its last holder is gone.
class FileSlot {
 public:
  explicit FileSlot(std::shared_ptr<std::atomic<int>> open)
      : open_(std::move(open)) {
    ++*open_;
  }
  ~FileSlot() { --*open_; }
  FileSlot(const FileSlot&) = delete;

 private:
  std::shared_ptr<std::atomic<int>> open_;
};

struct Peer::Upload {
  std::unique_ptr<FileSlot> slot;
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

// Second halves that several files name: show the job, with its payload or not.
template <Show show>
void got(Service& s, Peer& peer, std::uint64_t sequence, Pending& pending,
         Response& response);
template <Show show>
void acted(Service& s, Peer& peer, std::uint64_t sequence, Pending& pending,
           Response& response);

Problem stale_lease();  // 409
void append_number(std::string* out, std::uint64_t n);
std::vector<Fence> fences_of(const std::vector<LeaseView>& leases);
// CLOCK_MONOTONIC, for how long things took.
std::uint64_t mono_us();
bool is_ndjson(std::string_view content_type);
// The N of "wait=N" in a Prefer header; -1: it has none.
int preferred_wait(std::string_view prefer);
// A query's parameters in order, decoded; nothing where the text is malformed.
std::optional<std::vector<std::pair<std::string, std::string>>> parse_query(
    std::string_view query);
// `query` as it was, but for its cursor; ends in '&' where it is not empty.
std::string without_cursor(std::string_view query);

}  // namespace machina
