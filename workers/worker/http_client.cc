#include "workers/worker/http_client.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include "queue/base/check.h"
#include "queue/base/numbers.h"

namespace machina {
namespace {

Millis now_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch())
      .count();
}

Error no_answer(const std::string& why) { return {Code::unavailable, why}; }

bool same_name(std::string_view a, std::string_view b) {
  return a.size() == b.size() && strncasecmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace

HttpClient::HttpClient(Connect connect)
    : connect_(std::move(connect)),
      wake_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  CHECK(wake_fd_ >= 0);
}

HttpClient::~HttpClient() {
  close();
  ::close(wake_fd_);
}

void HttpClient::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  in_.clear();
}

Result<void> HttpClient::open() {
  if (fd_ >= 0) {
    // A server that closed while we were idle has left an end-of-file; found
    // here, the request is still unsent and a fresh connection takes it.
    char byte;
    const ssize_t n = ::recv(fd_, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return {};
    close();
  }
  auto fd = connect_();
  if (!fd) return fd.error();
  fd_ = *fd;
  ::fcntl(fd_, F_SETFL, O_NONBLOCK);
  ::fcntl(fd_, F_SETFD, FD_CLOEXEC);
  return {};
}

Result<HttpClient::Reply> HttpClient::post(const std::string& path,
                                           std::string_view json,
                                           Millis timeout_ms) {
  return send("POST", path, json, "application/json", timeout_ms);
}

Result<HttpClient::Reply> HttpClient::send(const char* method,
                                           const std::string& path,
                                           std::string_view bytes,
                                           const char* type,
                                           Millis timeout_ms) {
  if (interrupted_) return Error{Code::conflict, "interrupted"};
  if (auto opened = open(); !opened) return opened.error();
  const Millis deadline = now_ms() + timeout_ms;
  const std::string head =
      std::string(method) + " " + path +
      " HTTP/1.1\r\nHost: machina\r\nContent-Type: " + type +
      "\r\nContent-Length: " + std::to_string(bytes.size()) + "\r\n\r\n";
  // An early refusal may come while the body is still being sent, so what the
  // server said is read whether all was sent or not.
  const auto sent = write(head, bytes, deadline);
  if (!sent && sent.error().code == Code::conflict) {
    close();
    return sent.error();
  }
  auto reply = read(deadline);
  if (!sent || !reply) close();
  if (!reply) return reply.error();
  return reply;
}

// For one event on the connection, the interrupt, or the deadline.
Result<void> HttpClient::wait(short event, std::int64_t deadline_ms) {
  pollfd items[2] = {{fd_, event, 0}, {wake_fd_, POLLIN, 0}};
  const Millis left = deadline_ms - now_ms();
  if (left <= 0) return no_answer("no answer in time");
  ::poll(items, 2, static_cast<int>(std::min<Millis>(left, 60'000)));
  if (interrupted_) return Error{Code::conflict, "interrupted"};
  return {};
}

Result<void> HttpClient::write(std::string_view head, std::string_view body,
                               std::int64_t deadline_ms) {
  while (!head.empty() || !body.empty()) {
    iovec parts[2] = {{const_cast<char*>(head.data()), head.size()},
                      {const_cast<char*>(body.data()), body.size()}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    const ssize_t n = ::sendmsg(fd_, &message, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) {
      if (auto good = wait(POLLOUT, deadline_ms); !good) return good;
      continue;
    }
    if (n < 0) return no_answer(std::string("send: ") + strerror(errno));
    const std::size_t sent = static_cast<std::size_t>(n);
    const std::size_t of_head = std::min(sent, head.size());
    head.remove_prefix(of_head);
    body.remove_prefix(sent - of_head);
  }
  return {};
}

// At least one more byte.
Result<void> HttpClient::fill(std::int64_t deadline_ms) {
  for (;;) {
    char buffer[64 << 10];
    const ssize_t n = ::recv(fd_, buffer, sizeof buffer, 0);
    if (n > 0) {
      in_.append(buffer, static_cast<std::size_t>(n));
      return {};
    }
    if (n == 0) return no_answer("the server closed the connection");
    if (errno == EINTR) continue;
    if (errno != EAGAIN) {
      return no_answer(std::string("receive: ") + strerror(errno));
    }
    if (auto good = wait(POLLIN, deadline_ms); !good) return good;
  }
}

namespace {

struct Parsed {
  int status = 0;
  std::size_t length = 0;
  bool keep = true;
};

// The head without its empty line; nullopt where it is not understood.
std::optional<Parsed> parse_head(std::string_view head) {
  Parsed out;
  if (!head.starts_with("HTTP/1.") || head.size() < 12 || head[8] != ' ') {
    return {};
  }
  const auto status = parse_number<int>(head.substr(9, 3));
  if (!status) {
    return {};
  }
  out.status = *status;
  bool has_length = false;
  for (std::size_t at = head.find("\r\n"); at != std::string_view::npos;) {
    const std::size_t begin = at + 2;
    at = head.find("\r\n", begin);
    const std::string_view line = head.substr(begin, at - begin);
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos) return {};
    std::string_view value = line.substr(colon + 1);
    while (value.starts_with(' ')) value.remove_prefix(1);
    while (value.ends_with(' ')) value.remove_suffix(1);
    const std::string_view name = line.substr(0, colon);
    if (same_name(name, "Content-Length")) {
      has_length = true;
      const auto length = parse_number<std::size_t>(value);
      if (!length) return {};
      out.length = *length;
    } else if (same_name(name, "Transfer-Encoding")) {
      return {};
    } else if (same_name(name, "Connection") && same_name(value, "close")) {
      out.keep = false;
    }
  }
  const bool bodiless =
      out.status / 100 == 1 || out.status == 204 || out.status == 304;
  if (bodiless) out.length = 0;
  return bodiless || has_length ? std::optional<Parsed>(out) : std::nullopt;
}

}  // namespace

Result<HttpClient::Reply> HttpClient::read(std::int64_t deadline_ms) {
  for (;;) {
    std::size_t end;
    while ((end = in_.find("\r\n\r\n")) == std::string::npos) {
      if (in_.size() > kHeaderBytesMax) return no_answer("endless headers");
      if (auto good = fill(deadline_ms); !good) return good.error();
    }
    const auto head = parse_head(std::string_view(in_).substr(0, end));
    if (!head) return no_answer("the answer is not understood");
    if (head->length > kReplyBytesMax) return no_answer("too long an answer");
    const std::size_t whole = end + 4 + head->length;
    while (in_.size() < whole) {
      if (auto good = fill(deadline_ms); !good) return good.error();
    }
    Reply reply;
    reply.status = head->status;
    reply.body = in_.substr(end + 4, head->length);
    in_.erase(0, whole);
    if (head->status / 100 == 1) continue;  // interim: the answer follows
    if (!head->keep) close();
    return reply;
  }
}

void HttpClient::interrupt() {
  interrupted_ = true;
  const std::uint64_t one = 1;
  (void)!::write(wake_fd_, &one, sizeof one);
}

void HttpClient::resume() {
  interrupted_ = false;
  std::uint64_t ignored;
  (void)!::read(wake_fd_, &ignored, sizeof ignored);
}

}  // namespace machina
