#include "server/api/service.h"

#include <fcntl.h>
#include <malloc.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <future>

#include "queue/base/check.h"

namespace machina {
namespace {

constexpr int kExitConfiguration = 2;
constexpr int kExitDamage = 65;
constexpr int kExitPoisoned = 74;
constexpr int kExitLocked = 75;
constexpr int kFileThreads = 2;
constexpr Millis kLookMs = 500;

int exit_code_of(const Error& error) {
  switch (error.code) {
    case Code::conflict:
      return kExitLocked;
    case Code::corrupt:
      return kExitDamage;
    case Code::io:
    case Code::full:
      return kExitPoisoned;
    default:
      return kExitConfiguration;
  }
}

bool hangup_ignored() {
  struct sigaction now {};
  return sigaction(SIGHUP, nullptr, &now) == 0 && now.sa_handler == SIG_IGN;
}

bool write_file(const std::string& path, const std::string& text) {
  std::string temporary = path + ".tmp";
  int fd = open(temporary.c_str(),
                O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return false;
  bool ok =
      write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  ok = close(fd) == 0 && ok;
  return ok && rename(temporary.c_str(), path.c_str()) == 0;
}

}  // namespace

int run_server(const ServerOptions& options, const ServerHooks& hooks) {
  Service service(options, hooks);
  return service.run();
}

Service::Service(const ServerOptions& options, const ServerHooks& hooks)
    : options_(options),
      hooks_(hooks),
      clock_(system_clock()),
      pools_(options, clock_) {}

Service::~Service() = default;

// --- Life ------------------------------------------------------------------

int Service::run() {
  started_mono_ = clock_.mono_ms();
  if (int code = open(); code != 0) {
    // The log may be open by now: leave it clean.
    if (shard_ != nullptr && !shard_->poisoned()) (void)shard_->close();
    threads_.reset();
    resolver_.reset();
    return code;
  }
  loop_->run();
  return finish();
}

int Service::open() {
  if (options_.api_token.empty() && options_.hmac_secret.empty() &&
      !is_loopback(options_.host)) {
    LogLine(Severity::error, "start_failed",
            "host: " + options_.host +
                " is not a loopback address; without MACHINA_API_TOKEN or "
                "MACHINA_API_HMAC_SECRET only loopback is served");
    return kExitConfiguration;
  }
  auto descriptors =
      take_descriptors(options_.connections_max, options_.workers);
  if (!descriptors) {
    LogLine(Severity::error, "start_failed", descriptors.error().what);
    return kExitConfiguration;
  }
  descriptors_ = *descriptors;
  if (descriptors_.fewer) {
    LogLine(
        Severity::warn, "descriptors_few",
        "MACHINA_API_CONNECTIONS: " + std::to_string(options_.connections_max) +
            " is cut to " + std::to_string(descriptors_.connections) +
            ", for want of descriptors (ulimit -Hn, LimitNOFILE=)");
  }
  auto loop = Loop::make(options_.io_uring);
  if (!loop) {
    LogLine(Severity::error, "start_failed", loop.error().what);
    return kExitPoisoned;
  }
  loop_ = std::move(*loop);
  own_pool_ = std::make_unique<OwnPool>(options_, clock_, *loop_, pools_);
  if (int code = recover(); code != 0) return code;
  return listen();
}

int Service::recover() {
  RecoveryReport report;
  auto shard = hooks_.open_shard(&report);
  if (!shard) {
    LogLine(Severity::error, "start_failed", shard.error().what);
    return exit_code_of(shard.error());
  }
  shard_ = std::move(*shard);
  recovery_ = report.text;
  if (!recovery_.empty())
    LogLine(Severity::info, "recovery", "recovery: " + recovery_);

  auto store = Store::open(options_.root);
  if (!store) {
    LogLine(Severity::error, "start_failed", store.error().what);
    return exit_code_of(store.error());
  }
  store_ = std::move(*store);
  // SQLite has a dozen syncs to make for a new file; what follows has others.
  auto opened_patches = std::async(std::launch::async, [this] {
    return Patches::open(options_.root + "/patches", store_.get());
  });
  auto tokens = Tokens::open(options_.root + "/queue/token.key");
  if (!tokens) {
    LogLine(Severity::error, "start_failed", tokens.error().what);
    return exit_code_of(tokens.error());
  }
  tokens_ = std::move(*tokens);
  auto door =
      Doorkeeper::open(options_, hooks_.credentials, clock_, *loop_, metrics_);
  if (!door) {
    LogLine(Severity::error, "start_failed", door.error().what);
    return exit_code_of(door.error());
  }
  door_ = std::move(*door);
  auto patches = opened_patches.get();
  if (!patches) {
    LogLine(Severity::error, "start_failed", patches.error().what);
    return exit_code_of(patches.error());
  }
  patches_ = std::move(*patches);
  shard_->feed_to(patches_.get());
  threads_ = std::make_unique<FileThreads>(kFileThreads);
  resolver_ = std::make_unique<Resolver>(
      options_.kinds, clock_, options_.resolve_ms,
      [this](std::function<void()> run) { loop_->post(std::move(run)); });
  patch_rebuild_ = std::make_unique<PatchRebuild>(
      *patches_, *threads_, *loop_, clock_,
      [this](Request request, std::function<void(Response)> then) {
        ask(std::move(request), std::move(then));
      });
  shard_->on_send([this](Response r) { on_response(std::move(r)); });
  Loop* loop = loop_.get();
  shard_->on_wake([loop] { loop->wake(); });
  return 0;
}

int Service::listen() {
  loop_->on_accept([this](Socket& s, bool local) { return accept(s, local); });
  loop_->on_turn([this] { turn(); });
  // The lock is ours by now: a socket that is there is stale.
  if (!options_.socket_path.empty()) {
    auto ok = loop_->listen_unix(options_.socket_path, options_.inherited);
    if (!ok) {
      LogLine(Severity::error, "start_failed", ok.error().what);
      return kExitConfiguration;
    }
  }
  auto port =
      loop_->listen_tcp(options_.host, options_.port, options_.inherited);
  if (!port) {
    LogLine(Severity::error, "start_failed", port.error().what);
    return kExitConfiguration;
  }
  port_ = *port;
  drop_inherited();
  if (hooks_.signals) {
    auto drain = [this] {
      if (++asked_to_stop_ > 1) leave_at_once();
      begin_drain(false);
    };
    loop_->on_signal(SIGTERM, drain);
    loop_->on_signal(SIGINT, drain);
    loop_->on_signal(SIGUSR2, [this] { begin_drain(true); });
    // A terminal that closes asks us to stop, unless nohup said otherwise; with
    // a log file it is logrotate's.
    if (options_.reopen_on_hangup) {
      loop_->on_signal(SIGHUP, [] { reopen_logger(); });
    } else if (!hangup_ignored()) {
      loop_->on_signal(SIGHUP, drain);
    }
  }
  loop_->every(std::max<Millis>(10, options_.scan_ms),
               [this] { housekeeping(); });
  if (!options_.port_file.empty() &&
      !write_file(options_.port_file, std::to_string(port_) + "\n")) {
    LogLine(Severity::error, "start_failed",
            "port file: cannot write " + options_.port_file + ": " +
                std::strerror(errno));
    return kExitConfiguration;
  }
  LogLine(Severity::info, "listening",
          "listening on http://" + options_.host + ":" + std::to_string(port_) +
              ", profile " + (options_.prod ? "prod" : "dev") +
              ", durability " + (options_.shard.log.fsync ? "fsync" : "os") +
              ", io_uring " + (loop_->together() ? "on" : "off") + ", root " +
              options_.root + ", " + descriptors_.text());
  if (!options_.not_promised.empty()) {
    LogLine(Severity::warn, "not_promised",
            "not promised: " + options_.not_promised);
  }
  supervise_pool();
  arm_timer();
  refresh_date();
  if (hooks_.listening) hooks_.listening(port_);
  if (options_.events.listening) {
    options_.events.listening(port_, loop_->listening());
  }
  return 0;
}

// What happens once per iteration, after all that came in was submitted: the
// shard decides, logs and sends; then the loop writes every socket once.
void Service::turn() {
  if (finishing_ && leave_until_ == 0) return;
  now_us_ = mono_us();
  refresh_date();
  door_->gate().flush();
  if (!poisoned_) {
    shard_->turn();
    check_poison();
    arm_timer();
  }
  if (draining_) advance_drain();
  made_ = 0;  // what is left of it is in unsent_bytes() after this turn
  metrics_text_.clear();
  if (crowd_goes_on()) loop_->post([this] { let_crowd_in(); });
  gone_peers_.clear();
}

void Service::arm_timer() {
  Millis due = shard_->next_due_ms();
  if (due < 0) return;
  Millis at = clock_.mono_ms() + due;
  if (armed_at_ >= 0 && armed_at_ <= at) return;  // it will look again then
  armed_at_ = at;
  loop_->set_timer(due, [this] { armed_at_ = -1; });
}

void Service::housekeeping() {
  Millis now = clock_.mono_ms();
  if (now - last_look_ >= kLookMs) {
    last_look_ = now;
    for (auto& p : peers_) {
      if (p != nullptr && !p->closed) check_peer(*p, loop_->now());
    }
    check_levels();
    served_.look_again();
    if (std::string why = door_->gate().trouble(); !why.empty()) {
      LogLine(Severity::error, "nonces_not_kept",
              "nonces are not kept on disk any more; the next start refuses "
              "what was signed before it: " +
                  why);
    }
  }
  give_memory_back();
  resolver_->give_up(false);
  // Samples are bounded: taken often, none is lost between two scrapes.
  if (!poisoned_) metrics_.absorb(shard_->stats());
  if (now - last_sweep_ >= kSweepEveryMs) {
    last_sweep_ = now;
    sweep();
  }
  patch_rebuild_->look();
  answer_parked(false);
  supervise_pool();
  store_->set_floor(shard_->disk().soft_bytes);
  pulse();
}

// Large answers leave holes in the heap that it would keep.
void Service::give_memory_back() {
  const std::uint64_t unsent = loop_->unsent_bytes();
  unsent_peak_ = std::max(unsent_peak_, unsent);
  if (unsent_peak_ < kTrimBytes || unsent > kTrimBytes / 8) return;
  unsent_peak_ = 0;
  ::malloc_trim(0);
}

void Service::check_peer(Peer& peer, Millis now) {
  std::uint64_t sent = peer.socket.sent();
  if (peer.socket.unsent() == 0 || sent - peer.sent >= kStalledBytes) {
    peer.sent = sent;
    peer.sent_at = now;
  }
  cut_stalled(peer, now);
  if (peer.closed) return;
  if (now - peer.sent_at > kStalledMs ||
      peer.connection.check_deadline(now) == Connection::Due::close) {
    close(peer);
  } else {
    after(peer);
  }
}

void Service::check_poison() {
  if (!shard_->poisoned() || poisoned_) return;
  poisoned_ = true;
  patch_rebuild_->stop();
  ShardStats stats = shard_->stats();
  LogLine(Severity::error, "poisoned",
          "the log is poisoned, stopping: " + stats.poison_cause);
  // Nobody knows what the disk kept: whoever waits hears "unknown".
  Problem p;
  p.status = 503;
  p.code = "poisoned";
  p.detail = "the log failed; whether this was done is unknown";
  for (auto& peer : peers_) {
    if (peer == nullptr) continue;
    for (auto s = peer->connection.first_open(); s < peer->connection.next();
         ++s) {
      refuse(*peer, s, p);
    }
  }
  stop(kExitPoisoned);
}

void Service::stop(int code) {
  exit_code_ = code;
  finishing_ = true;
  loop_->stop_listening(passed_on_);
  loop_->stop();
}

// --- Draining --------------------------------------------------------------

void Service::begin_drain(bool handover) {
  if (draining_ || poisoned_) return;
  draining_ = true;
  handover_ = handover;
  LogLine(Severity::info, "draining",
          handover ? "handing over: no new leases, the pool runs on"
                   : "draining: no new leases, running jobs may finish");
  drain_until_ = clock_.mono_ms() + (handover ? 0 : options_.drain_ms);
  if (handover) pass_sockets();
  pulse();
  shard_->drain();
  pools_.drain(!handover);
  patch_rebuild_->stop();
  answer_parked(true);
  loop_->wake();
}

// Steps: jobs finish or go back; pools leave; requests get their answers; stop.
void Service::advance_drain() {
  if (poisoned_ || (finishing_ && leave_until_ == 0)) return;
  Millis now = clock_.mono_ms();
  if (!released_) {
    if (!handover_ && shard_->running() > 0) {
      if (now < drain_until_) return;
      LogLine(Severity::warn, "released",
              "releasing " + std::to_string(shard_->running()) +
                  " jobs that did not finish within " +
                  std::to_string(options_.drain_ms) + " ms");
      shard_->release_all();
    }
    released_ = true;
    resolver_->give_up(true);  // J4
    leave_until_ = now + (handover_ ? 500 : kPoolLeaveMs);
    shard_->turn();
  }
  bool waiting = false;
  if (!handover_) {
    waiting = own_pool_->stays(now, leave_until_);
    for (auto& p : peers_) {
      if (p != nullptr && !p->told.pool.empty()) waiting = true;
    }
  }
  for (auto& p : peers_) {
    if (p != nullptr && !p->connection.idle() && !p->connection.lingering()) {
      waiting = true;
    }
    // Whoever has just been let in may be about to ask.
    if (handover_ && p != nullptr && p->connection.next() == 0) waiting = true;
  }
  if (waiting && now < leave_until_) {
    armed_at_ = now + kDrainLookMs;
    loop_->set_timer(kDrainLookMs, [this] { armed_at_ = -1; });
    return;
  }
  leave_until_ = 0;
  resolver_->give_up(true);
  if (!handover_) own_pool_->end_left_behind();
  stop(exit_code_);
}

int Service::finish() {
  int code = exit_code_;
  loop_->finish(2'000);
  threads_.reset();  // before the loop that they post to
  resolver_.reset();
  if (auto kept = door_->gate().close(); !kept) {
    LogLine(Severity::error, "nonces_not_kept",
            "the next start refuses what was signed before it: " +
                kept.error().what);
  }
  if (!poisoned_) {
    auto closed = shard_->close();
    if (!closed) {
      LogLine(Severity::error, "close_failed",
              "closing the log failed: " + closed.error().what);
      code = kExitPoisoned;
    }
  }
  shard_.reset();
  loop_.reset();
  if (code == 0) {
    LogLine(Severity::info, "stopped", handover_ ? "handed over" : "drained");
  } else {
    LogLine(Severity::error, "stopped",
            "stopped with exit code " + std::to_string(code))
        .with("code", code);
  }
  return code;
}

// --- Peers -----------------------------------------------------------------

Peer::Peer(Service& owner, Socket& its_socket, bool is_local, Millis now)
    : service(owner),
      socket(its_socket),
      local(is_local),
      visitor{its_socket, is_local},
      connection(*this, its_socket.out(), now),
      sent_at(now),
      took_at(now) {}

SocketEvents* Service::accept(Socket& socket, bool local) {
  // Workers come by the Unix socket: a flood of clients must not shut them out,
  // nor do they take clients' places.
  const bool full =
      local ? local_connections_ >= descriptors_.local
            : connections_ - local_connections_ >= descriptors_.connections;
  int* of_address = nullptr;
  if (!local) {
    of_address = &per_address_[ClientKey{socket.address().counted(), 0}];
  }
  if (full || finishing_ ||
      (of_address != nullptr &&
       *of_address >= options_.connections_per_address)) {
    if (of_address != nullptr && *of_address == 0) {
      per_address_.erase(ClientKey{socket.address().counted(), 0});
    }
    metrics_.connection_refused();
    Problem p;
    p.status = 503;
    p.code = "busy";
    p.detail = finishing_ ? "connection: the server is stopping"
               : full
                   ? "connection: " +
                         std::to_string(local ? descriptors_.local
                                              : descriptors_.connections) +
                         " are open" + (local ? " over the Unix socket" : "") +
                         ", the most that may be: the server has no descriptor "
                         "left for more" +
                         (local || descriptors_.fewer
                              ? ""
                              : " clients (MACHINA_API_CONNECTIONS)")
                   : "connection: " +
                         std::to_string(options_.connections_per_address) +
                         " of this address are open, the most that may be "
                         "(MACHINA_API_CONNECTIONS_PER_ADDRESS)";
    std::string body;
    append_problem(&body, p);
    socket.out() +=
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
        "Content-Type: application/problem+json\r\nContent-Length: " +
        std::to_string(body.size()) + "\r\nConnection: close\r\n\r\n" + body;
    return nullptr;
  }
  std::uint32_t index;
  if (free_peers_.empty()) {
    index = static_cast<std::uint32_t>(peers_.size());
    peers_.emplace_back();
  } else {
    index = free_peers_.back();
    free_peers_.pop_back();
  }
  ++connections_;
  if (local) ++local_connections_;
  if (of_address != nullptr) ++*of_address;
  peers_[index] = std::make_unique<Peer>(*this, socket, local, loop_->now());
  peers_[index]->id = (++peer_generation_ << 20) | index;
  return peers_[index].get();
}

Peer* Service::peer(std::uint64_t id) {
  std::size_t index = id & ((1u << 20) - 1);
  if (index >= peers_.size() || peers_[index] == nullptr) return nullptr;
  Peer* p = peers_[index].get();
  return p->id == id && !p->closed ? p : nullptr;
}

Pending* Service::pending_at(const Where& where) {
  Peer* p = peer(where.peer);
  return p == nullptr ? nullptr : p->connection.pending(where.sequence);
}

void Service::forget(Peer& peer) {
  if (peer.closed) return;
  peer.closed = true;
  door_->release(peer.visitor);
  weights_ -= std::exchange(peer.weight, 0) + std::exchange(peer.kept, 0);
  if (peer.serving != nullptr) {
    ServedKinds::connection_gone(*peer.serving, peer.id, loop_->now());
  }
  if (peer.upload != nullptr) peer.upload->dead = true;
  if (shard_ != nullptr && !poisoned_) shard_->abandon(0, peer.id);
}

void Service::close(Peer& peer) {
  forget(peer);
  peer.socket.close();
}

void Peer::on_gone() {
  service.forget(*this);
  // Someone up the stack may still hold this: it dies at the turn's end.
  if (!local) {
    auto found = service.per_address_.find({socket.address().counted(), 0});
    if (--found->second == 0) service.per_address_.erase(found);
  }
  std::size_t index = id & ((1u << 20) - 1);
  service.gone_peers_.push_back(std::move(service.peers_[index]));
  service.free_peers_.push_back(static_cast<std::uint32_t>(index));
  --service.connections_;
  if (local) --service.local_connections_;
}

void Peer::on_bytes(std::string_view bytes) {
  if (closed) return;
  connection.feed(bytes, service.loop_->now());
  service.after(*this);
}

void Peer::on_end() {
  if (closed) return;
  on_hangup();
  if (upload != nullptr && !upload->complete) {
    upload->dead = true;  // its body will never be whole
    upload.reset();
  }
  service.door_->release(visitor);
  connection.end();
  service.after(*this);
}

// Whoever ends its sending side may be gone, or may still read: nobody can tell
// before it is sent something. So what it waits for is not waited for any more,
// and it is answered at once with how things are.
void Peer::on_hangup() {
  if (closed || hung_up) return;
  hung_up = true;
  if (service.poisoned_ || service.shard_ == nullptr) return;
  service.shard_->hurry(0, id);
  for (const Where& where : service.pools_.take_parked(id)) {
    service.answer_sync(*this, where.sequence);
  }
}

void Peer::on_drained() {
  if (closed) return;
  if (!streams.empty()) service.pump_streams(*this);
  service.join_crowd(*this);
  service.resume_later(*this);
  service.after(*this);  // it may have been paused for what was unsent
}

// Before an answer is made: is what was made for it taken?
bool Peer::may_take() {
  return socket.unsent() <= kUnsentMax && connection.large_open() == 0 &&
         later == nullptr && resolving == 0;
}

std::optional<HttpError> Peer::on_held(std::size_t bytes) {
  return service.door_->hold(visitor, bytes);
}

BodyPlan Peer::on_head(std::uint64_t sequence, const Head& head) {
  return service.head_read(*this, sequence, head);
}

void Peer::on_request(std::uint64_t sequence, const Head& head,
                      std::string_view body) {
  service.dispatch(*this, sequence, head, body);
}

void Peer::on_piece(std::uint64_t sequence, std::string_view piece) {
  if (visitor.entry == Gate::Entry::after_body) digest->update(piece);
  if (upload != nullptr && upload->sequence == sequence) {
    service.upload_piece(*this, piece);
  }
}

void Peer::on_error(std::uint64_t sequence, const Head& head,
                    const HttpError& error) {
  if (upload != nullptr) upload->dead = true;
  service.door_->release(visitor);
  Problem p;
  p.status = error.status;
  p.code = error.code;
  p.detail = error.detail;
  if (error.status == 503) p.retry_after = 1;
  if (error.status == 413 && head.path == "/v1/jobs") p.detail += kLargeDiff;
  service.refuse(*this, sequence, p);
}

void Service::after(Peer& peer) {
  if (peer.closed) return;
  if (peer.connection.over() && peer.socket.unsent() == 0) return close(peer);
  if (peer.connection.lingering()) {
    peer.socket.touch();
    peer.socket.end();
    peer.socket.pause(false);
    return;
  }
  if (!peer.socket.out().empty()) peer.socket.touch();
  // A peer that asks and does not read is not asked on.
  peer.socket.pause(peer.connection.wants_pause() ||
                    peer.socket.unsent() > kUnsentMax);
}

// --- Replies ---------------------------------------------------------------

void append_number(std::string* out, std::uint64_t n) {
  char digits[20];
  char* at = digits + sizeof digits;
  do {
    *--at = static_cast<char>('0' + n % 10);
    n /= 10;
  } while (n != 0);
  out->append(at, static_cast<std::size_t>(digits + sizeof digits - at));
}

// Once a turn: what a reply says of the time is to the second.
void Service::refresh_date() {
  Millis second = clock_.wall_ms() / 1000;
  if (second != date_second_) {
    date_second_ = second;
    char text[64];
    time_t t = static_cast<time_t>(second);
    tm parts;
    gmtime_r(&t, &parts);
    std::strftime(text, sizeof text, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n",
                  &parts);
    date_ = text;
  }
}

void Service::begin_reply(Peer& peer, std::uint64_t sequence, int status,
                          std::uint64_t body_bytes, const Extras& extras) {
  made_ += std::min(body_bytes, std::uint64_t{kListWeight}) + 512;
  Pending* pending = peer.connection.pending(sequence);
  std::string& out = peer.connection.reply(sequence);
  out += "HTTP/1.1 ";
  append_number(&out, static_cast<std::uint64_t>(status));
  out += ' ';
  out += reason_phrase(status);
  out += "\r\n";
  out += date_;
  if (status != 204) {
    out += "Content-Type: ";
    out += extras.content_type;
    out += "\r\nContent-Length: ";
    append_number(&out, body_bytes);
    out += "\r\n";
  }
  if (pending != nullptr && pending->request_id_bytes > 0) {
    out += "X-Request-Id: ";
    out.append(pending->request_id, pending->request_id_bytes);
    out += "\r\n";
  }
  out += extras.headers;
  if (pending != nullptr && pending->limits.mask != 0) {
    door_->append_limits(&out, pending->limits);
  }
  if (extras.close || peer.connection.closes(sequence)) {
    out += "Connection: close\r\n";
  } else if (!peer.connection.is_http11(sequence)) {
    out += "Connection: keep-alive\r\n";
  }
  out += "\r\n";
  metrics_.request(status);
  if (pending != nullptr) say_reply(peer, *pending, status);
}

void Service::reply(Peer& peer, std::uint64_t sequence, int status,
                    std::string_view body, const Extras& extras) {
  if (peer.closed || peer.connection.pending(sequence) == nullptr) return;
  begin_reply(peer, sequence, status, body.size(), extras);
  unweigh(peer, *peer.connection.pending(sequence));
  if (status != 204 && !peer.connection.is_head(sequence)) {
    peer.connection.reply(sequence) += body;
  }
  peer.connection.finish(sequence, extras.close);
  peer.socket.touch();
  weigh_kept(peer);
  if (peer.connection.lingering()) {
    weights_ -= std::exchange(peer.weight, 0);  // no more is answered
    peer.socket.end();
  }
  join_crowd(peer);
  resume_later(peer);
  if (!peer.streams.empty()) pump_streams(peer);
}

// Freed slots may let the next pipelined requests in; not at once, where one
// may be in the middle of being handled.
void Service::resume_later(Peer& peer) {
  if (!peer.connection.wants_pause()) return;
  loop_->post([this, id = peer.id] {
    if (Peer* p = this->peer(id)) {
      // An upload decides for itself when it goes on.
      if (p->upload == nullptr) p->connection.resume(loop_->now());
      after(*p);
    }
  });
}

void Service::refuse(Peer& peer, std::uint64_t sequence,
                     const Problem& problem) {
  if (peer.closed) return;
  Pending* pending = peer.connection.pending(sequence);
  if (pending == nullptr) return;
  if (pending->head_sent) {
    close(peer);  // the head is out: only an early end tells the truth now
    return;
  }
  std::string body;
  Extras extras;
  if (pending->plain_errors) {
    JsonWriter json(body);
    json.begin_object();
    json.key("ok").boolean(false);
    json.key("error").string(problem.detail);
    json.key("code").string(problem.code);
    json.end_object();
  } else {
    append_problem(&body, problem);
    extras.content_type = "application/problem+json";
  }
  if (problem.retry_after > 0) {
    extras.headers +=
        "Retry-After: " + std::to_string(problem.retry_after) + "\r\n";
  }
  if (!problem.allow.empty()) {
    extras.headers += "Allow: " + problem.allow + "\r\n";
  }
  if (problem.status == 401) {
    extras.headers += "WWW-Authenticate: ";
    extras.headers += door_->gate().challenge();
    extras.headers += "\r\n";
  }
  reply(peer, sequence, problem.status, body, extras);
}

void Service::refuse(const Where& where, const Problem& problem) {
  if (Peer* p = peer(where.peer)) refuse(*p, where.sequence, problem);
}

void Service::refuse_error(const Where& where, const Error& error) {
  Problem p;
  p.detail = error.what;
  switch (error.code) {
    case Code::not_found:
      p.status = 404;
      p.code = "not-found";
      break;
    case Code::too_large:
      p.status = 413;
      p.code = "too-large";
      break;
    case Code::full:
      p.status = 507;
      p.code = "disk-full";
      p.retry_after = 10;
      break;
    case Code::invalid:
      p.status = 409;
      p.code = "bad-offset";
      break;
    default:
      p.status = 500;
      p.code = "io";
      LogLine(Severity::error, "request_failed",
              "request failed: " + error.what);
  }
  refuse(where, p);
}

namespace {

// The answer with a job that there was no room for.
struct LeftOut final : PendingExtra {
  int status = 200;
  Show show = Show::all;
  std::string headers;
  JobView view;  // as it was then, without payload and result
};

Answerer reply_left_out;

}  // namespace

void Service::reply_job(Peer& peer, std::uint64_t sequence, int status,
                        Response& response, Show show, std::string headers) {
  JobView& view = response.views.front();
  if (response.left_out != 0) {
    Pending& pending = *peer.connection.pending(sequence);
    auto waits = std::make_unique<LeftOut>();
    waits->status = status;
    waits->show = show;
    waits->headers = std::move(headers);
    waits->view = std::move(view);
    pending.then = reply_left_out;
    pending.extra = std::move(waits);
    pending.left_out = response.left_out;
    unweigh(peer, pending);
    return join_crowd(peer);
  }
  scratch_.clear();
  JsonWriter json(scratch_);
  append_job(json, view, show,
             show == Show::no_payload ? std::nullopt
                                      : std::optional(served(view.kind)),
             pools_.waiting_reason(view));
  Extras extras;
  extras.headers = std::move(headers);
  reply(peer, sequence, status, scratch_, extras);
}

void Service::ask_left_out(Peer& peer, std::uint64_t sequence,
                           Pending& pending) {
  const auto& waits = static_cast<const LeftOut&>(*pending.extra);
  pending.left_out = 0;
  Request request;
  request.from = Address{0, peer.id, sequence};
  GetQuery get;
  get.id = waits.view.id;
  get.payload = waits.show == Show::all;
  request.what = get;
  request.with_payload = get.payload;
  submit(std::move(request));
}

// There was room, and the job was asked for again.
namespace {

void reply_left_out(Service& s, Peer& peer, std::uint64_t sequence,
                    Pending& pending, Response& response) {
  auto waits =
      std::unique_ptr<LeftOut>(static_cast<LeftOut*>(pending.extra.release()));
  Show show = waits->show;
  if (response.views.empty() || response.views.front().id.is_nil()) {
    // It was done, and nothing keeps its result any more.
    response.left_out = 0;
    response.views.assign(1, std::move(waits->view));
    show = Show::no_payload;
  }
  JobView& view = response.views.front();
  view.duplicate = waits->view.duplicate;
  if (waits->status == 202 && is_final(view.state)) waits->status = 200;
  s.reply_job(peer, sequence, waits->status, response, show,
              std::move(waits->headers));
}

}  // namespace

// --- The shard -------------------------------------------------------------

Request Service::request_of(const Exchange& call) {
  Request request;
  request.from = Address{0, call.peer.id, call.sequence};
  return request;
}

void Service::submit(Request request) {
  if (poisoned_) {
    Response response;
    response.to = request.from;
    response.status = Response::Status::poisoned;
    on_response(std::move(response));
    return;
  }
  // Who has hung up may still read, but is not waited for.
  if (Peer* p = peer(request.from.connection)) {
    if (p->hung_up) {
      request.wait_ms = 0;
      if (auto* get = std::get_if<GetQuery>(&request.what)) get->wait_ms = 0;
    }
    const Pending* pending = p->connection.pending(request.from.sequence);
    request.view_bytes =
        kSmallAnswerBytes + (pending == nullptr ? 0 : pending->room);
  }
  // The call of a worker that died may be read after its pool's report. A lease
  // would go to nobody, and hold its job until it runs out.
  if (auto* command = std::get_if<Command>(&request.what)) {
    if (auto* complete = std::get_if<CompleteCommand>(command);
        complete != nullptr && complete->lease &&
        pools_.has_ended(complete->lease->session)) {
      complete->lease.reset();
    }
    if (auto* lease = std::get_if<LeaseCommand>(command);
        lease != nullptr && pools_.has_ended(lease->session)) {
      Problem p;
      p.status = 409;
      p.code = "stale-lease";
      p.detail = "session: its pool has reported that this worker has ended";
      return refuse(Where{request.from.connection, request.from.sequence}, p);
    }
  }
  shard_->submit(std::move(request));
}

void Service::ask(Request request, std::function<void(Response)> then) {
  request.from = Address{0, 0, ++next_ask_};
  asked_[next_ask_] = std::move(then);
  submit(std::move(request));
}

std::optional<Problem> Service::problem_of(const ItemAnswer& answer,
                                           std::string_view what) const {
  Problem p;
  switch (answer.answer) {
    case Answer::ok:
    case Answer::duplicate:
    case Answer::already:
      return std::nullopt;
    case Answer::not_found:
      p.status = 404;
      p.code = "not-found";
      p.detail = std::string(what) + ": unknown, or past its retention";
      return p;
    case Answer::wrong_state:
      p.status = 409;
      p.code = "wrong-state";
      p.detail = std::string(what) + ": its state is " +
                 std::string(name(answer.state));
      if (!answer.detail.empty()) p.detail += "; " + answer.detail;
      return p;
    case Answer::stale_lease:
      return stale_lease();
    case Answer::dedup_mismatch:
      p.status = 422;
      p.code = "dedup-mismatch";
      p.field = "dedup_key";
      p.detail = "dedup_key: a job with this key has another kind or payload";
      if (!answer.id.is_nil()) p.detail += " (" + to_string(answer.id) + ")";
      return p;
    case Answer::queue_full:
      p.status = 429;
      p.code = "queue-full";
      p.retry_after = 1;
      p.detail = "queue: MACHINA_QUEUE_MAX live jobs (" +
                 std::to_string(options_.shard.core.queue_max) +
                 ") or the most distinct queues are reached";
      return p;
    case Answer::dedup_full:
      p.status = 429;
      p.code = "dedup-full";
      p.retry_after = 1;
      p.field = "dedup_key";
      p.detail = "dedup_key: the window holds its most keys, " +
                 std::to_string(options_.shard.core.dedup_max);
      return p;
    case Answer::unknown_dependency:
      p = bad_field(
          "depends_on",
          shown(answer.detail.empty() ? to_string(answer.id) : answer.detail) +
              " is no job that is known");
      p.code = "unknown-dependency";
      return p;
    case Answer::bad_token:
      p.status = 409;
      p.code = "wrong-token";
      p.field = "token";
      p.detail =
          "token: it is not this job's blocked.token, which is another one "
          "each "
          "time the job blocks; read the job again";
      return p;
    case Answer::dependency:
      p.status = 409;
      p.code = "dependency";
      p.field = "depends_on";
      p.detail = "depends_on: " + answer.detail +
                 "; retry that one first, or send "
                 "{\"ignore_dependencies\":true} to run this job all the same";
      return p;
    case Answer::need_facts:
      break;
  }
  p.status = 500;
  p.code = "internal";
  p.detail = "the queue gave no answer";
  return p;
}

std::vector<Fence> fences_of(const std::vector<LeaseView>& leases) {
  std::vector<Fence> fences;
  for (const LeaseView& lease : leases) fences.push_back(lease.fence);
  return fences;
}

void Service::on_response(Response response) {
  if (response.to.connection == 0) {
    auto found = asked_.find(response.to.sequence);
    if (found == asked_.end()) return;
    auto then = std::move(found->second);
    asked_.erase(found);
    then(std::move(response));
    return;
  }
  Peer* p = peer(response.to.connection);
  std::uint64_t sequence = response.to.sequence;
  Pending* pending = p == nullptr ? nullptr : p->connection.pending(sequence);
  if (pending == nullptr) {
    // Nobody is there to hear of these leases.
    give_back(fences_of(response.leases));
    return;
  }
  // What was promised is not taken back because it cannot be shown whole.
  if (pending->then == &reply_left_out &&
      response.status == Response::Status::disk_low) {
    response.status = Response::Status::done;
    response.views.clear();
  }
  if (auto problem = failure_of(response)) {
    refuse(*p, sequence, *problem);
    return;
  }
  CHECK(pending->then != nullptr);  // a response that nobody asked for
  pending->then(*this, *p, sequence, *pending, response);
}

void Service::reply_with_job(Peer& peer, std::uint64_t sequence,
                             const JobId& id, bool payload) {
  Pending* pending = peer.connection.pending(sequence);
  if (pending == nullptr) return;
  pending->then = payload ? got<Show::all> : got<Show::no_payload>;
  Request request;
  request.from = Address{0, peer.id, sequence};
  GetQuery get;
  get.id = id;
  get.payload = payload;
  request.what = get;
  request.with_payload = payload;
  submit(std::move(request));
}

void Service::give_back(std::vector<Fence> fences) {
  if (fences.empty() || poisoned_) return;
  Request request;
  ReleaseCommand release;
  release.fences = std::move(fences);
  request.what = Command(std::move(release));
  ask(std::move(request), [](const Response&) {});
}

}  // namespace machina
