// Jobs' logs and artifacts, in and out. The loop never touches a file: bytes go
// to store threads in pieces, one at a time for each request, and come back the
// same way; a reader or writer that is slow holds only itself up.

#include <algorithm>

#include "queue/base/check.h"
#include "queue/base/numbers.h"
#include "server/api/service.h"

namespace machina {
namespace {

// A file on its way out.
struct Download final : PendingExtra {
  std::unique_ptr<FileSlot> slot;
  std::shared_ptr<Fd> fd;
  std::uint64_t offset = 0, size = 0;
  bool reading = false;
};

Problem not_found(std::string detail) {
  Problem p;
  p.status = 404;
  p.code = "not-found";
  p.detail = std::move(detail);
  return p;
}

}  // namespace

// --- Whose attempt, which job ----------------------------------------------

// A heartbeat tells whether the lease is current and which job it is of; the
// job tells the attempt's number.
void Service::with_attempt(const Where& where, Fence fence,
                           std::function<void(JobId, int)> then) {
  Request request;
  HeartbeatCommand heartbeat;
  heartbeat.items.push_back({fence, -1, ""});
  request.what.emplace<Command>(std::move(heartbeat));
  ask(std::move(request),
      [this, where, fence, then = std::move(then)](Response response) {
        if (auto p = failure_of(response)) return refuse(where, *p);
        if (response.items.empty()) {
          response.items.push_back({Answer::stale_lease, {}, {}, {}, {}});
        }
        const ItemAnswer& answer = response.items.front();
        if (auto p = problem_of(answer, "lease")) return refuse(where, *p);
        auto known = attempts_.find(fence);
        if (known != attempts_.end()) {
          return then(known->second.id, known->second.number);
        }
        // Granted before this server started.
        with_any_job(where, answer.id, [this, fence, then](JobView& view) {
          if (attempts_.size() >= kAttemptsKeptMax) attempts_.clear();
          attempts_[fence] = {view.id, view.attempt};
          then(view.id, view.attempt);
        });
      });
}

void Service::with_job(const Where& where, const JobId& id,
                       std::function<void(JobView&)> then) {
  with_any_job(where, id, [this, where, then = std::move(then)](JobView& view) {
    const Pending* waiting = pending_at(where);
    if (waiting == nullptr) return;
    if (!waiting->principal->sees(view.tenant)) {
      return refuse(where, no_such_job());
    }
    then(view);
  });
}

void Service::with_any_job(const Where& where, const JobId& id,
                           std::function<void(JobView&)> then) {
  Request request;
  GetQuery get;
  get.id = id;
  get.payload = false;
  request.what = get;
  request.with_payload = false;
  request.view_bytes = kJobWeight;  // what it waits for, but no large result
  ask(std::move(request),
      [this, where, then = std::move(then)](Response response) {
        if (auto p = failure_of(response)) return refuse(where, *p);
        if (response.views.empty() || response.views.front().id.is_nil()) {
          return refuse(where, no_such_job());
        }
        then(response.views.front());
      });
}

// --- Logs ------------------------------------------------------------------

static void post_log(Service& s, const Exchange& call) {
  auto fence = s.lease_of(call);
  if (!fence) return;
  auto parameters = parse_query(call.head.query);
  std::optional<std::uint64_t> offset;
  MaybeProblem problem;
  if (!parameters) {
    problem = bad_field("offset", "malformed query");
    parameters.emplace();
  }
  for (const auto& [name, value] : *parameters) {
    if (name != "offset") {
      problem = unknown_field(name);
    } else if (offset = parse_number<std::uint64_t>(value);
               !offset || *offset > kLogBytesMax) {
      problem = bad_field("offset", shown(value) + " is not an integer in " +
                                        range_text("_bytes", 0, kLogBytesMax));
    }
  }
  if (!problem && !offset) problem = bad_field("offset", "it is missing");
  if (!problem) problem = s.no_room_for_files();
  if (problem) return s.refuse(call.peer, call.sequence, *problem);
  Where where{call.peer.id, call.sequence};
  auto bytes = std::make_shared<std::string>(call.body);
  s.with_attempt(
      where, *fence,
      [&s, where, fence = *fence, at = *offset, bytes](JobId id, int attempt) {
        Store* store = s.store_.get();
        s.on_store<Result<std::uint64_t>>(
            where,
            [store, id, attempt, fence, at, bytes] {
              return store->write_log(id, attempt, fence, at, *bytes);
            },
            [&s, where](Result<std::uint64_t> size) {
              if (!size) return s.refuse_error(where, size.error());
              if (Peer* p = s.peer(where.peer)) {
                s.reply(*p, where.sequence, 200,
                        "{\"size_bytes\":" + std::to_string(*size) + "}");
              }
            });
      });
}

static void get_logs(Service& s, const Exchange& call) {
  auto id = s.job_of(call);
  if (!id) return;
  auto parameters = parse_query(call.head.query);
  MaybeProblem problem;
  int attempt = 0;
  if (!parameters) {
    problem = bad_field("query", "malformed percent-encoding");
    parameters.emplace();
  }
  for (const auto& [name, value] : *parameters) {
    if (name == "attempt") {
      auto n = parse_number<std::uint64_t>(value);
      if (!n || *n < 1 || *n > kMaxAttemptsMax) {
        problem =
            bad_field("attempt", shown(value) + " is not an integer in " +
                                     range_text("attempt", 1, kMaxAttemptsMax));
      } else {
        attempt = static_cast<int>(*n);
      }
    } else if (name == "follow") {
      if (value != "0") {
        problem = not_implemented(
            "follow", "follow: this version does not have it; ask again");
      }
    } else {
      problem = unknown_field(name);
    }
  }
  if (problem) return s.refuse(call.peer, call.sequence, *problem);
  Where where{call.peer.id, call.sequence};
  s.with_job(where, *id, [&s, where, id = *id, attempt](JobView& view) {
    if (attempt > view.attempt) {
      return s.refuse(
          where, not_found("attempt: " + std::to_string(attempt) +
                           "; the job had " + std::to_string(view.attempt)));
    }
    Store* store = s.store_.get();
    s.on_store<Result<OpenedFile>>(
        where, [store, id, attempt] { return store->open_log(id, attempt); },
        [&s, where](Result<OpenedFile> file) {
          Extras extras;
          extras.content_type = "text/plain; charset=utf-8";
          extras.headers = "X-Content-Type-Options: nosniff\r\n";
          if (file) return s.send_file(where, *file, std::move(extras));
          if (file.error().code != Code::not_found) {
            return s.refuse_error(where, file.error());
          }
          // An attempt that wrote nothing has an empty log.
          if (Peer* p = s.peer(where.peer)) {
            s.reply(*p, where.sequence, 200, "", extras);
          }
        });
  });
}

// --- Artifacts in ----------------------------------------------------------

// Files are refused first: their room is wanted for what was promised.
std::optional<Problem> Service::no_room_for_files() const {
  const DiskState disk = shard_->disk();
  if (disk.level == DiskLevel::ok) return std::nullopt;
  Problem p;
  p.status = 507;
  p.code = "disk-low";
  p.detail = disk.says;
  p.retry_after = 10;
  return p;
}

// Called when the head is read; the body follows in pieces.
static void put_artifact(Service& s, const Exchange& call) {
  if (auto p = s.no_room_for_files()) {
    call.peer.refusal = std::move(*p);
    return;
  }
  Fence fence = 0;
  if (auto p = s.check_token(call.args[0], &fence)) {
    call.peer.refusal = std::move(*p);
    return;
  }
  if (!valid_artifact_name(call.args[1])) {
    call.peer.refusal =
        bad_field("name", shown(call.args[1]) +
                              " is not of the form "
                              "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}");
    return;
  }
  if (auto busy = s.no_file_left()) {
    call.peer.refusal = std::move(busy);
    return;
  }
  auto upload = std::make_shared<Peer::Upload>();
  upload->slot = std::make_unique<FileSlot>(s.files_);
  upload->peer = call.peer.id;
  upload->sequence = call.sequence;
  upload->fence = fence;
  upload->name = call.args[1];
  call.peer.upload = std::move(upload);
}

void Service::upload_piece(Peer& peer, std::string_view piece) {
  Peer::Upload& upload = *peer.upload;
  if (upload.error) return;  // what still comes is dropped
  upload.waiting += piece;
  upload.size += piece.size();
  if (upload.waiting.size() >= kUploadHeldMax) peer.connection.hold();
  if (upload.waiting.size() >= kDownloadPieceBytes) pump_upload(peer.upload);
}

// One step at a time: a piece to the file; at the end, is the lease still
// current; then make it durable; then answer.
void Service::pump_upload(std::shared_ptr<Peer::Upload> upload) {
  if (upload->busy || upload->dead) return;
  Where where{upload->peer, upload->sequence};
  Store* store = store_.get();
  if (upload->error || (upload->complete && upload->waiting.empty() &&
                        upload->file != nullptr)) {
    if (!upload->complete) return;
    Peer* p = peer(upload->peer);
    if (p != nullptr && p->upload == upload) p->upload.reset();
    if (upload->error) return refuse_error(where, *upload->error);
    upload->busy = true;
    with_attempt(where, upload->fence, [this, where, upload](JobId id, int) {
      on_store<Result<Artifact>>(
          where, [upload, id] { return upload->file->commit(id); },
          [this, where](Result<Artifact> done) {
            if (!done) return refuse_error(where, done.error());
            std::string body;
            JsonWriter json(body);
            json.begin_object();
            json.key("name").string(done->name);
            json.key("size_bytes").number(done->size);
            json.key("sha256").string(done->sha256);
            json.end_object();
            if (Peer* waiting = peer(where.peer)) {
              reply(*waiting, where.sequence, 200, body);
            }
          });
    });
    return;
  }
  upload->busy = true;
  auto piece = std::make_shared<std::string>();
  piece->swap(upload->waiting);
  on_store<Result<void>>(
      where,
      [store, upload, piece]() -> Result<void> {
        if (upload->file == nullptr) {
          auto file = store->begin_upload(upload->fence, upload->name);
          if (!file) return file.error();
          upload->file = std::move(*file);
        }
        return upload->file->append(*piece);
      },
      [this, upload](Result<void> written) {
        upload->busy = false;
        if (!written) upload->error = written.error();
        Peer* p = peer(upload->peer);
        if (p == nullptr) return;
        // The next one may have begun behind it.
        if (p->upload == upload) p->connection.resume(loop_->now());
        if (upload->complete || upload->error ||
            upload->waiting.size() >= kDownloadPieceBytes) {
          pump_upload(upload);
        }
        after(*p);
      });
}

// --- Artifacts out ---------------------------------------------------------

// What is shown: all that is staged while it runs, then what was claimed.
void Service::with_artifacts(const Where& where, const JobId& id,
                             std::function<void(std::vector<Artifact>)> then) {
  with_job(where, id, [this, where, then = std::move(then)](JobView& view) {
    Store* store = store_.get();
    bool all = view.state == State::running;
    on_store<Result<std::vector<Artifact>>>(
        where,
        [store, fence = view.fence, all,
         names = view.artifacts]() -> Result<std::vector<Artifact>> {
          auto staged = store->artifacts(fence);
          if (!staged || all) return staged;
          std::vector<Artifact> claimed;
          for (Artifact& artifact : *staged) {
            if (std::find(names.begin(), names.end(), artifact.name) !=
                names.end()) {
              claimed.push_back(std::move(artifact));
            }
          }
          return claimed;
        },
        [this, where, then](Result<std::vector<Artifact>> artifacts) {
          if (!artifacts) return refuse_error(where, artifacts.error());
          then(std::move(*artifacts));
        });
  });
}

static void list_artifacts(Service& s, const Exchange& call) {
  auto id = s.job_of(call);
  if (!id) return;
  Where where{call.peer.id, call.sequence};
  s.with_artifacts(where, *id, [&s, where](std::vector<Artifact> artifacts) {
    std::string body;
    JsonWriter json(body);
    json.begin_object();
    json.key("artifacts").begin_array();
    for (const Artifact& artifact : artifacts) {
      json.begin_object();
      json.key("name").string(artifact.name);
      json.key("size_bytes").number(artifact.size);
      json.key("sha256").string(artifact.sha256);
      json.end_object();
    }
    json.end_array().end_object();
    if (Peer* p = s.peer(where.peer)) s.reply(*p, where.sequence, 200, body);
  });
}

static void get_artifact(Service& s, const Exchange& call) {
  auto id = s.job_of(call);
  if (!id) return;
  Where where{call.peer.id, call.sequence};
  std::string name(call.args[1]);
  s.with_artifacts(
      where, *id, [&s, where, name](std::vector<Artifact> artifacts) {
        auto found = std::find_if(
            artifacts.begin(), artifacts.end(),
            [&](const Artifact& artifact) { return artifact.name == name; });
        if (found == artifacts.end()) {
          return s.refuse(where,
                          not_found("artifact: the job has none of the name " +
                                    shown(name)));
        }
        Store* store = s.store_.get();
        s.on_store<Result<OpenedFile>>(
            where,
            [store, artifact = *found] {
              return store->open_artifact(artifact);
            },
            [&s, where, name](Result<OpenedFile> file) {
              if (!file) return s.refuse_error(where, file.error());
              Extras extras;
              extras.content_type = "application/octet-stream";
              extras.headers =
                  "X-Content-Type-Options: nosniff\r\n"
                  "Content-Disposition: attachment; filename=\"" +
                  name + "\"\r\n";
              s.send_file(where, *file, std::move(extras));
            });
      });
}

// --- Files out -------------------------------------------------------------

MaybeProblem Service::no_file_left() const {
  if (*files_ < descriptors_.files) return std::nullopt;
  Problem p;
  p.status = 503;
  p.code = "busy";
  p.retry_after = 1;
  p.detail = "artifacts and logs: " + std::to_string(descriptors_.files) +
             " are on their way, the most that may be";
  return p;
}

void Service::send_file(const Where& where, OpenedFile file, Extras extras) {
  if (auto busy = no_file_left()) return refuse(where, *busy);
  Peer* p = peer(where.peer);
  if (p == nullptr) return;
  Pending* pending = p->connection.pending(where.sequence);
  if (pending == nullptr) return;
  begin_reply(*p, where.sequence, 200, file.size, extras);
  unweigh(*p, *pending);  // its pieces are made as they are taken
  auto download = std::make_unique<Download>();
  download->slot = std::make_unique<FileSlot>(files_);
  download->fd = std::move(file.fd);
  download->size = p->connection.is_head(where.sequence) ? 0 : file.size;
  pending->head_sent = true;
  pending->extra = std::move(download);
  p->streams.push_back(where.sequence);
  p->socket.touch();
  pump_streams(*p);
}

// Reads the next piece of the reply that is at the front, if it is one of
// these and the peer has taken what it was sent.
void Service::pump_streams(Peer& peer) {
  if (peer.closed) return;
  std::uint64_t front = peer.connection.first_open();
  auto found = std::find(peer.streams.begin(), peer.streams.end(), front);
  if (found == peer.streams.end()) return;
  Pending* pending = peer.connection.pending(front);
  if (pending == nullptr) {
    peer.streams.erase(found);
    return;
  }
  auto& download = static_cast<Download&>(*pending->extra);
  if (download.offset >= download.size) {
    peer.streams.erase(found);
    peer.connection.finish(front);
    weigh_kept(peer);
    join_crowd(peer);
    peer.socket.touch();
    resume_later(peer);
    after(peer);
    return pump_streams(peer);
  }
  if (download.reading || peer.socket.unsent() > kDownloadPieceBytes) return;
  download.reading = true;
  std::size_t n = static_cast<std::size_t>(std::min<std::uint64_t>(
      kDownloadPieceBytes, download.size - download.offset));
  Where where{peer.id, front};
  on_store<Result<std::string>>(
      where,
      [fd = download.fd, at = download.offset, n] {
        return read_piece(*fd, at, n);
      },
      [this, where, n](Result<std::string> piece) {
        Peer* p = this->peer(where.peer);
        if (p == nullptr) return;
        Pending* waiting = p->connection.pending(where.sequence);
        if (waiting == nullptr) return;
        // The length is promised already: all that is left is to break off.
        if (!piece || piece->size() != n) return close(*p);
        auto& open = static_cast<Download&>(*waiting->extra);
        open.reading = false;
        open.offset += n;
        p->connection.reply(where.sequence) += *piece;
        p->socket.touch();
        pump_streams(*p);
      });
}

// --- The sweep --------------------------------------------------------------

// One bucket after the other (F4): its old entries are listed, the jobs are
// asked for one at a time, and what belongs to none of them goes.
void Service::sweep() {
  if (sweeping_ || draining_ || poisoned_) return;
  sweeping_ = true;
  int bucket = next_bucket_++ % 256;
  Store* store = store_.get();
  std::int64_t now_s = clock_.wall_ms() / 1000;
  bool taken = threads_->run([this, store, bucket, now_s] {
    auto kept =
        std::make_shared<std::vector<Store::Kept>>(store->kept(bucket, now_s));
    loop_->post([this, kept] { sweep_next(kept); });
  });
  if (!taken) sweeping_ = false;
}

void Service::sweep_next(std::shared_ptr<std::vector<Store::Kept>> kept) {
  if (kept->empty() || draining_ || poisoned_) {
    sweeping_ = false;
    return;
  }
  Store::Kept one = kept->back();
  kept->pop_back();
  Request request;
  GetQuery get;
  get.id = one.job;
  get.payload = false;
  request.what = get;
  request.with_payload = false;
  request.view_bytes = kSmallAnswerBytes;
  ask(std::move(request), [this, one, kept](Response response) {
    bool unknown =
        response.status == Response::Status::done &&
        (response.views.empty() || response.views.front().id.is_nil());
    if (unknown) {
      Store* store = store_.get();
      threads_->run([store, one] { store->forget(one); });
    }
    sweep_next(kept);
  });
}

std::span<const Route> file_routes() {
  static constexpr Route kRows[] = {
      {Method::get, "/v1/jobs/{}/logs", get_logs, 0, 0, kDownloadPieceBytes},
      {Method::get, "/v1/jobs/{}/artifacts", list_artifacts, 0, 0, kJobWeight},
      {Method::get, "/v1/jobs/{}/artifacts/{}", get_artifact, 0, 0,
       kDownloadPieceBytes},
      {Method::post, "/v1/leases/{}/log", post_log, Route::raw | Route::worker,
       kLogChunkBytesMax},
      {Method::put, "/v1/leases/{}/artifacts/{}", put_artifact,
       Route::raw | Route::stream | Route::worker, kArtifactBytesMax},
  };
  return kRows;
}

}  // namespace machina
