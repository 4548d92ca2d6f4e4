#include "server/http/sockets.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "queue/base/check.h"

namespace machina {
namespace {

constexpr std::size_t kReadBytes = 64 * 1024;
constexpr int kReadsMax = 4;
// The first read of each is made together with others'. What lies this far
// apart does not compete for one place in the processor's caches.
constexpr std::size_t kFirstReadBytes = 16 * 1024;
constexpr std::size_t kFirstReadStride = kFirstReadBytes + 17 * 64;
constexpr int kEventsMax = 1024;  // of one wait(); the rest are the next one's
constexpr int kAcceptsMax = 64;   // "
constexpr int kBacklog = 1024;
// A socket's buffer that grew past this is given back once it is empty.
constexpr std::size_t kKeepBytes = 64 * 1024;

// All that can be told to who connects when there is no descriptor to keep.
constexpr std::string_view kNoDescriptor =
    "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
    "Content-Type: application/problem+json\r\nContent-Length: 141\r\n"
    "Connection: close\r\n\r\n"
    "{\"type\":\"/problems/busy\",\"title\":\"busy\",\"status\":503,"
    "\"detail\":\"connection: the server has no descriptor left; try again "
    "later\",\"code\":\"busy\"}";

constexpr std::uint32_t kToRead = EPOLLIN | EPOLLRDHUP | EPOLLET;

union SocketAddress {
  sockaddr any;
  sockaddr_in four;
  sockaddr_in6 six;
  sockaddr_un local;
  sockaddr_storage room;
};

Error failure(const std::string& what, int code) {
  return Error{code == EADDRINUSE ? Code::conflict : Code::io,
               what + ": " + std::strerror(code)};
}

constexpr int kPolledMs = 10;  // how often those without a watch are looked at

int spare_descriptor() { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }

}  // namespace

// What the epoll set gives back.
struct Sockets::Watched {
  virtual ~Watched() = default;
  virtual void ready(std::uint32_t events) = 0;
};

struct Sockets::Listener final : Watched {
  Listener(Sockets& its_owner, int its_fd, bool is_local, std::string its_path,
           std::string its_name)
      : owner(its_owner),
        fd(its_fd),
        local(is_local),
        path(std::move(its_path)),
        name(std::move(its_name)) {}
  ~Listener() override { close(); }
  void ready(std::uint32_t) override {
    if (fd >= 0) owner.accept(*this);
  }
  void close() {
    if (fd >= 0) ::close(std::exchange(fd, -1));
  }

  Sockets& owner;
  int fd;
  bool rests = false;  // not in the set: it could not be served
  const bool local;
  const std::string path;  // of a Unix socket, removed with it
  const std::string name;
};

// --- A client's socket -----------------------------------------------------

class SocketImpl final : public Socket, public Sockets::Watched {
 public:
  SocketImpl(Sockets& owner, int fd, bool local, const ClientAddress& address)
      : owner_(owner), fd_(fd), local_(local) {
    address_ = address;
  }
  ~SocketImpl() override { CHECK(closing_); }

  void touch() override {
    if (dirty_ || closing_) return;
    dirty_ = true;
    owner_.dirty_.push_back(this);
  }
  std::size_t unsent() const override {
    return out_.size() + rest_.size() - rest_at_;
  }
  std::uint64_t sent() const override { return sent_; }
  void pause(bool paused) override {
    if (paused == paused_ || closing_) return;
    paused_ = paused;
    if (!paused && unread_) look_again();
  }
  void end() override {
    ending_ = true;
    touch();
  }
  void close() override;
  std::string remote() const override;

  void ready(std::uint32_t events) override {
    if (events & EPOLLOUT) flush();
    if (paused_ && !closing_) {
      // Nobody reads, so this is the only word of it.
      if ((events & EPOLLERR) != 0) return close();
      if ((events & (EPOLLRDHUP | EPOLLHUP)) != 0) events_->on_hangup();
    }
    if (events & ~std::uint32_t{EPOLLOUT}) {
      // After the last bytes comes the end, which has no edge of its own.
      wants_read((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0);
    }
  }

 private:
  friend class Sockets;
  void look_again() {
    if (queued_) return;
    queued_ = true;
    owner_.again_.push_back(this);
  }
  void wants_read(bool to_the_end);
  bool reads_on() const { return !closing_ && !ended_ && !paused_; }
  void read(const char* first, ssize_t bytes);
  bool took(const char* bytes, std::size_t room, ssize_t n);

  void flush();
  bool sends_out() const {  // and nothing else
    return !closing_ && rest_.empty() && !out_.empty();
  }
  bool send_rest();
  void count() {
    owner_.unsent_bytes_ += unsent() - counted_;
    counted_ = unsent();
  }
  void sent_out(ssize_t n, bool had);
  void watch(bool for_room);

  Sockets& owner_;
  SocketEvents* events_ = nullptr;
  int fd_;
  std::string rest_;  // what the kernel did not take, from rest_at_ on
  std::size_t rest_at_ = 0;
  std::size_t counted_ = 0;  // of this one in unsent_bytes_
  std::uint64_t sent_ = 0;
  const bool local_;
  bool dirty_ = false, closing_ = false, ending_ = false, shut_ = false,
       paused_ = false, ended_ = false;
  bool unread_ = false;    // an edge was seen, and not the end of its bytes
  bool at_end_ = false;    // that edge told of the end, too
  bool queued_ = false;    // is in again_
  bool listed_ = false;    // is in reads_
  bool for_room_ = false;  // the epoll set tells when there is room to write
  bool polled_ = false;    // is in owner_.polled_, not in the epoll set
};

// There may be bytes, and the end behind them: read when all are known of whom
// that is true.
void SocketImpl::wants_read(bool to_the_end) {
  unread_ = true;
  at_end_ = at_end_ || to_the_end;
  if (listed_) return;
  listed_ = true;
  owner_.reads_.push_back(this);
}

// `first` came of a read made together with others'; it may have been paused by
// one of them since, and gets those bytes all the same.
void SocketImpl::read(const char* first, ssize_t bytes) {
  if (closing_ || took(first, kFirstReadBytes, bytes)) return;
  for (int i = 1; i < kReadsMax; ++i) {
    if (!reads_on()) return;
    char* buffer = owner_.buffer_.data();
    ssize_t n = ::recv(fd_, buffer, kReadBytes, 0);
    if (took(buffer, kReadBytes, n >= 0 ? n : -errno)) return;
  }
  look_again();
}

// What a read of up to `room` bytes brought: how many, or -errno. True where
// there is no more to read now.
bool SocketImpl::took(const char* bytes, std::size_t room, ssize_t n) {
  if (n > 0) {
    const bool all = !at_end_ && static_cast<std::size_t>(n) < room;
    // Before the call, in which the owner may pause, resume or close.
    if (all) unread_ = false;
    events_->on_bytes(std::string_view(bytes, static_cast<std::size_t>(n)));
    return all;
  }
  if (n == -EINTR) return false;
  if (n == 0) {
    ended_ = true;
    unread_ = false;
    events_->on_end();
  } else if (n == -EAGAIN) {
    unread_ = at_end_ = false;
  } else {
    close();
  }
  return true;
}

// What the kernel did not take before. True where it has taken all of it now.
bool SocketImpl::send_rest() {
  while (rest_at_ < rest_.size()) {
    ssize_t n = ::send(fd_, rest_.data() + rest_at_, rest_.size() - rest_at_,
                       MSG_NOSIGNAL);
    if (n >= 0) {
      rest_at_ += static_cast<std::size_t>(n);
      sent_ += static_cast<std::uint64_t>(n);
      // Less than all: its buffer is full. The edge that tells of room must be
      // asked for before it is (watch), not after another try.
      if (rest_at_ < rest_.size()) break;
    } else if (errno == EAGAIN) {
      break;
    } else if (errno != EINTR) {
      close();
      return false;
    }
  }
  if (rest_at_ < rest_.size()) {
    watch(true);
    return false;
  }
  std::string().swap(rest_);
  rest_at_ = 0;
  return true;
}

void SocketImpl::flush() {
  dirty_ = false;
  if (closing_) return;
  const bool had = unsent() != 0;
  if (!rest_.empty() && !send_rest()) {
    if (!closing_) count();
    return;
  }
  ssize_t n = 0;
  if (!out_.empty()) {
    n = ::send(fd_, out_.data(), out_.size(), MSG_NOSIGNAL);
    if (n < 0) n = -errno;
  }
  sent_out(n, had);
}

// What a send of out_ came to: bytes, or -errno. `had`: there was something.
void SocketImpl::sent_out(ssize_t n, bool had) {
  dirty_ = false;
  if (closing_) return;
  if (n < 0 && n != -EAGAIN && n != -EINTR) return close();
  const std::size_t taken = n < 0 ? 0 : static_cast<std::size_t>(n);
  sent_ += taken;
  if (taken < out_.size()) {
    rest_ = std::exchange(out_, {});
    rest_at_ = taken;
    count();
    return watch(true);
  }
  if (out_.capacity() > kKeepBytes) {
    std::string().swap(out_);
  } else {
    out_.clear();
  }
  count();
  if (for_room_) watch(false);
  if (ending_ && !shut_) {
    shut_ = true;
    ::shutdown(fd_, SHUT_WR);
  }
  if (had) events_->on_drained();
}

void SocketImpl::watch(bool for_room) {
  // Also where nothing changes: it asks anew, so no edge is lost.
  for_room_ = for_room;
  if (polled_) return;
  epoll_event event{};
  event.events = kToRead | (for_room ? EPOLLOUT : 0u);
  event.data.ptr = static_cast<Sockets::Watched*>(this);
  CHECK(epoll_ctl(owner_.epoll_, EPOLL_CTL_MOD, fd_, &event) == 0);
}

void SocketImpl::close() {
  if (closing_) return;
  closing_ = true;
  owner_.unsent_bytes_ -= std::exchange(counted_, 0);
  // By name: a child that was just forked may hold it open for a moment.
  if (polled_) {
    std::erase(owner_.polled_, this);
  } else {
    epoll_ctl(owner_.epoll_, EPOLL_CTL_DEL, fd_, nullptr);
  }
  ::close(fd_);
  owner_.closed_.push_back(this);
}

std::string SocketImpl::remote() const {
  if (local_) return "unix";
  SocketAddress from{};
  socklen_t size = sizeof from;
  if (closing_ || getpeername(fd_, &from.any, &size) != 0) return "";
  char host[INET6_ADDRSTRLEN] = "";
  if (from.any.sa_family == AF_INET) {
    inet_ntop(AF_INET, &from.four.sin_addr, host, sizeof host);
    return std::string(host) + ":" + std::to_string(ntohs(from.four.sin_port));
  }
  inet_ntop(AF_INET6, &from.six.sin6_addr, host, sizeof host);
  return "[" + std::string(host) +
         "]:" + std::to_string(ntohs(from.six.sin6_port));
}

// --- The set ---------------------------------------------------------------

Sockets::Sockets(int epoll, int spare, bool together)
    : epoll_(epoll),
      spare_(spare),
      events_(kEventsMax),
      calls_(together),
      buffer_(kReadBytes),
      first_buffers_(SocketCalls::kMax * kFirstReadStride) {}

Result<std::unique_ptr<Sockets>> Sockets::make(bool together) {
  int epoll = epoll_create1(EPOLL_CLOEXEC);
  if (epoll < 0) return failure("epoll", errno);
  return std::unique_ptr<Sockets>(
      new Sockets(epoll, spare_descriptor(), together));
}

Sockets::~Sockets() {
  stop_listening(false);
  close_all();
  reap();
  if (spare_ >= 0) ::close(spare_);
  ::close(epoll_);
}

Result<void> Sockets::watch(int fd) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) {
    return failure("epoll", errno);
  }
  return {};
}

void Sockets::wait(int ms) {
  if (!again_.empty()) ms = 0;
  if (!polled_.empty()) ms = ms < 0 ? kPolledMs : std::min(ms, kPolledMs);
  events_ready_ = epoll_wait(epoll_, events_.data(), kEventsMax, ms);
  if (events_ready_ > 0) return;
  for (auto& listener : listeners_) {
    if (listener->rests) watch(*listener, true);  // a while has passed
  }
}

bool Sockets::serve() {
  // Those that are added meanwhile wait for the next time.
  std::vector<SocketImpl*> again;
  again.swap(again_);
  for (SocketImpl* socket : again) {
    socket->queued_ = false;
    socket->wants_read(false);
  }
  // A socket that is closed here lives until reap().
  look_at_polled();
  bool other = false;
  for (int i = 0; i < events_ready_; ++i) {
    const epoll_event& event = events_[static_cast<std::size_t>(i)];
    if (event.data.ptr == nullptr) {
      other = true;
    } else {
      static_cast<Watched*>(event.data.ptr)->ready(event.events);
    }
  }
  events_ready_ = 0;
  read();
  return other;
}

// Those that the epoll set has no place for, until it has one.
void Sockets::look_at_polled() {
  if (polled_.empty()) return;
  std::vector<SocketImpl*> still;
  std::vector<pollfd> items;
  for (SocketImpl* socket : polled_) {
    epoll_event event{};
    event.events = kToRead | (socket->for_room_ ? EPOLLOUT : 0u);
    event.data.ptr = static_cast<Watched*>(socket);
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, socket->fd_, &event) == 0) {
      socket->polled_ = false;
      continue;
    }
    still.push_back(socket);
    const int room = socket->for_room_ ? POLLOUT : 0;
    items.push_back(
        {socket->fd_, static_cast<short>(POLLIN | POLLRDHUP | room), 0});
  }
  polled_ = still;
  if (items.empty() || ::poll(items.data(), items.size(), 0) <= 0) return;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (items[i].revents == 0 || still[i]->closing_) continue;
    // poll()'s bits are epoll's.
    static_cast<Watched*>(still[i])->ready(
        static_cast<std::uint32_t>(items[i].revents));
  }
}

// What is read of one may have another paused or closed, but adds none.
void Sockets::read() {
  for (std::size_t at = 0; at < reads_.size();) {
    std::size_t n = 0;
    while (at < reads_.size() && n < SocketCalls::kMax) {
      SocketImpl* socket = reads_[at++];
      socket->listed_ = false;
      if (!socket->reads_on()) continue;
      SocketCalls::Call& call = call_[n];
      call = {};
      call.fd = socket->fd_;
      call.to = first_buffers_.data() + n * kFirstReadStride;
      call.bytes = kFirstReadBytes;
      called_[n++] = socket;
    }
    calls_.run({call_.data(), n});
    for (std::size_t i = 0; i < n; ++i) {
      called_[i]->read(call_[i].to, call_[i].result);
    }
  }
  reads_.clear();
}

void Sockets::flush() {
  for (std::size_t at = 0; at < dirty_.size();) {
    const std::size_t begin = at;
    std::size_t n = 0;
    // Nobody is told of anything before all are sent: out() stays where it is.
    for (; at < dirty_.size() && n < SocketCalls::kMax; ++at) {
      SocketImpl* socket = dirty_[at];
      if (!socket->sends_out()) continue;
      SocketCalls::Call& call = call_[n];
      call = {};
      call.kind = SocketCalls::Call::send;
      call.fd = socket->fd_;
      call.from = socket->out_.data();
      call.bytes = socket->out_.size();
      called_[n++] = socket;
    }
    const std::size_t end = at;
    calls_.run({call_.data(), n});
    std::size_t next = 0;
    for (std::size_t i = begin; i < end; ++i) {
      SocketImpl* socket = dirty_[i];
      if (next < n && called_[next] == socket) {
        socket->sent_out(call_[next++].result, true);
      } else {
        socket->flush();
      }
    }
  }
  dirty_.clear();
}

void Sockets::reap() {
  for (std::size_t i = 0; i < closed_.size(); ++i) {
    SocketImpl* socket = closed_[i];
    if (socket->dirty_) std::erase(dirty_, socket);
    if (socket->queued_) std::erase(again_, socket);
    if (socket->listed_) std::erase(reads_, socket);
    if (socket->events_ != nullptr) socket->events_->on_gone();
    sockets_.erase(socket);
    delete socket;
  }
  closed_.clear();
  stopped_.clear();
}

bool Sockets::unsent() const {
  return std::any_of(sockets_.begin(), sockets_.end(), [](SocketImpl* socket) {
    return !socket->closing_ && socket->unsent() != 0;
  });
}

void Sockets::close_all() {
  for (SocketImpl* socket : sockets_) socket->close();
}

// --- Accepting -------------------------------------------------------------

namespace {

bool allowed_peer(int fd) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  return peer.uid == 0 || peer.uid == geteuid();
}

ClientAddress address_of(const SocketAddress& from) {
  ClientAddress address;
  if (from.any.sa_family == AF_INET6) {
    std::memcpy(address.bytes.data(), &from.six.sin6_addr, 16);
  } else {
    address.bytes[10] = address.bytes[11] = 0xff;
    std::memcpy(address.bytes.data() + 12, &from.four.sin_addr, 4);
  }
  return address;
}

}  // namespace

// Whether the set tells when somebody connects.
void Sockets::watch(Listener& listener, bool on) {
  epoll_event event{};
  event.events = on ? EPOLLIN : 0u;
  event.data.ptr = static_cast<Watched*>(&listener);
  epoll_ctl(epoll_, EPOLL_CTL_MOD, listener.fd, &event);
  listener.rests = !on;
}

void Sockets::accept(Listener& listener) {
  if (spare_ < 0) spare_ = spare_descriptor();
  for (int i = 0; i < kAcceptsMax; ++i) {
    int fd =
        accept4(listener.fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
      admit(fd, listener);
    } else if ((errno == EMFILE || errno == ENFILE) && spare_ >= 0) {
      ::close(std::exchange(spare_, -1));
      fd = accept4(listener.fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd >= 0) {
        (void)!::send(fd, kNoDescriptor.data(), kNoDescriptor.size(),
                      MSG_NOSIGNAL);
        ::close(fd);
      }
      spare_ = spare_descriptor();
      if (fd < 0) return;
    } else if (errno == EMFILE || errno == ENFILE) {
      // Somebody took the spare's place. It would be ready for ever.
      return watch(listener, false);
    } else if (errno != EINTR && errno != ECONNABORTED) {
      return;  // none is left
    }
  }
}

void Sockets::admit(int fd, const Listener& listener) {
  SocketAddress from{};
  ClientAddress address;
  if (listener.local) {
    if (!allowed_peer(fd)) {
      ::close(fd);
      return;
    }
  } else {
    socklen_t size = sizeof from;
    if (getpeername(fd, &from.any, &size) != 0) {
      ::close(fd);  // it has gone already
      return;
    }
    address = address_of(from);
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  auto* socket = new SocketImpl(*this, fd, listener.local, address);
  sockets_.insert(socket);
  socket->events_ = accept_(*socket, listener.local);
  epoll_event event{};
  event.events = kToRead;
  event.data.ptr = static_cast<Watched*>(socket);
  if (socket->events_ == nullptr) {
    // A refusal may have left a last word in out().
    if (!socket->out_.empty()) {
      (void)!::send(fd, socket->out_.data(), socket->out_.size(), MSG_NOSIGNAL);
    }
    socket->close();
  } else if (!socket->closing_ &&
             epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) {
    if (errno != ENOSPC && errno != ENOMEM) return socket->close();
    socket->polled_ = true;
    polled_.push_back(socket);
  }
}

// --- Listening -------------------------------------------------------------

namespace {

// Whether `fd` is a TCP socket that listens at `where`; port 0 asks for any.
bool listens_at(int fd, const SocketAddress& where) {
  int on = 0, type = 0;
  socklen_t size = sizeof on;
  if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &size) != 0 || on == 0) {
    return false;
  }
  size = sizeof type;
  if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 ||
      type != SOCK_STREAM) {
    return false;
  }
  SocketAddress is{};
  size = sizeof is;
  if (getsockname(fd, &is.any, &size) != 0 ||
      is.any.sa_family != where.any.sa_family) {
    return false;
  }
  if (is.any.sa_family == AF_INET) {
    return is.four.sin_addr.s_addr == where.four.sin_addr.s_addr &&
           (where.four.sin_port == 0 ||
            is.four.sin_port == where.four.sin_port);
  }
  return std::memcmp(&is.six.sin6_addr, &where.six.sin6_addr,
                     sizeof is.six.sin6_addr) == 0 &&
         is.six.sin6_scope_id == where.six.sin6_scope_id &&
         (where.six.sin6_port == 0 || is.six.sin6_port == where.six.sin6_port);
}

// What a Unix socket's file is known by, or empty where there is none.
std::string socket_name(const std::string& path) {
  struct stat there {};
  if (lstat(path.c_str(), &there) != 0 || !S_ISSOCK(there.st_mode)) return "";
  return "socket-" + std::to_string(there.st_dev) + "-" +
         std::to_string(there.st_ino);
}

Result<int> bind_tcp(const SocketAddress& where, const std::string& name) {
  int fd = socket(where.any.sa_family,
                  SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return failure("cannot listen on " + name, errno);
  int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  socklen_t size =
      where.any.sa_family == AF_INET ? sizeof where.four : sizeof where.six;
  if (bind(fd, &where.any, size) == 0) return fd;
  int code = errno;
  close(fd);
  return failure("cannot listen on " + name, code);
}

Result<int> bind_unix(const std::string& path) {
  SocketAddress where{};
  where.local.sun_family = AF_UNIX;
  std::memcpy(where.local.sun_path, path.c_str(), path.size() + 1);
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return failure("cannot listen on " + path, errno);
  // The mode must be right from the first moment: bind under a tight umask.
  mode_t old = umask(0177);
  int bound = bind(fd, &where.any, sizeof where.local);
  int code = errno;
  umask(old);
  if (bound == 0) return fd;
  close(fd);
  return failure("cannot listen on " + path, code);
}

}  // namespace

Result<int> Sockets::listen_tcp(const std::string& host, int port,
                                const std::vector<ListeningSocket>& inherited) {
  const std::string address = host == "localhost" ? "127.0.0.1" : host;
  SocketAddress where{};
  if (inet_pton(AF_INET, address.c_str(), &where.four.sin_addr) == 1) {
    where.four.sin_family = AF_INET;
    where.four.sin_port = htons(static_cast<std::uint16_t>(port));
  } else if (inet_pton(AF_INET6, address.c_str(), &where.six.sin6_addr) == 1) {
    where.six.sin6_family = AF_INET6;
    where.six.sin6_port = htons(static_cast<std::uint16_t>(port));
  } else {
    return Error{Code::invalid,
                 "host: \"" + host + "\" is not an IPv4 or IPv6 address"};
  }
  const std::string name = host + ":" + std::to_string(port);
  int fd = -1;
  for (const auto& socket : inherited) {
    if (fd < 0 && listens_at(socket.fd, where)) fd = socket.fd;
  }
  if (fd < 0) {
    auto bound = bind_tcp(where, name);
    if (!bound) return bound.error();
    fd = *bound;
  }
  auto begun = begin_listening(fd, false, "", "http", name);
  if (!begun) return begun.error();
  socklen_t size = sizeof where;
  getsockname(fd, &where.any, &size);
  return ntohs(where.any.sa_family == AF_INET6 ? where.six.sin6_port
                                               : where.four.sin_port);
}

Result<void> Sockets::listen_unix(
    const std::string& path, const std::vector<ListeningSocket>& inherited) {
  if (path.size() > sizeof(sockaddr_un::sun_path) - 1) {
    return Error{Code::invalid, "socket path: \"" + path + "\" has " +
                                    std::to_string(path.size()) +
                                    " bytes; at most 107 fit"};
  }
  const std::string there = socket_name(path);
  int fd = -1;
  for (const auto& socket : inherited) {
    if (!there.empty() && socket.name == there) fd = socket.fd;
  }
  if (fd < 0) {
    // What is there belongs to a server that is gone: we hold the lock.
    struct stat status;
    if (lstat(path.c_str(), &status) == 0) {
      if (!S_ISSOCK(status.st_mode)) {
        return Error{Code::conflict, path + " exists and is not a socket"};
      }
      unlink(path.c_str());
    }
    auto bound = bind_unix(path);
    if (!bound) return bound.error();
    fd = *bound;
  }
  return begin_listening(fd, true, path, socket_name(path), path);
}

// Takes `fd`, also where it fails.
Result<void> Sockets::begin_listening(int fd, bool local,
                                      const std::string& path,
                                      const std::string& name,
                                      const std::string& where) {
  auto listener = std::make_unique<Listener>(*this, fd, local, path, name);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = static_cast<Watched*>(listener.get());
  // One that was inherited may block.
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0 ||
      fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 || ::listen(fd, kBacklog) != 0 ||
      epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) {
    return failure("cannot listen on " + where, errno);
  }
  listeners_.push_back(std::move(listener));
  return {};
}

std::vector<ListeningSocket> Sockets::listening() const {
  std::vector<ListeningSocket> sockets;
  for (const auto& listener : listeners_) {
    sockets.push_back({listener->fd, listener->name});
  }
  return sockets;
}

void Sockets::stop_listening(bool passed_on) {
  for (auto& listener : listeners_) {
    if (!listener->path.empty() && !passed_on) unlink(listener->path.c_str());
    // By name: who shares it holds it open.
    epoll_ctl(epoll_, EPOLL_CTL_DEL, listener->fd, nullptr);
    listener->close();
    stopped_.push_back(std::move(listener));  // serve() may be at it
  }
  listeners_.clear();
}

}  // namespace machina
