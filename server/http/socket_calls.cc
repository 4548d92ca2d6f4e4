#include "server/http/socket_calls.h"

#include <liburing.h>
#include <sys/socket.h>

#include <cerrno>

#include "queue/base/check.h"

namespace machina {
namespace {

// A ring costs a little of its own; below this, plain calls are cheaper.
constexpr std::size_t kTogetherMin = 3;

void one(SocketCalls::Call& call) {
  do {
    call.result = call.kind == SocketCalls::Call::receive
                      ? ::recv(call.fd, call.to, call.bytes, MSG_DONTWAIT)
                      : ::send(call.fd, call.from, call.bytes,
                               MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (call.result < 0 && errno == EINTR);
  if (call.result < 0) call.result = -errno;
}

}  // namespace

struct SocketCalls::Ring {
  io_uring ring;
  bool open = false;

  ~Ring() {
    if (open) io_uring_queue_exit(&ring);
  }

  bool make() {
    if (io_uring_queue_init(kMax, &ring, 0) != 0) return false;
    open = true;
    io_uring_probe* probe = io_uring_get_probe_ring(&ring);
    if (probe == nullptr) return false;
    const bool both = io_uring_opcode_supported(probe, IORING_OP_RECV) != 0 &&
                      io_uring_opcode_supported(probe, IORING_OP_SEND) != 0;
    io_uring_free_probe(probe);
    return both;
  }

  void stage(Call& call) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring);
    CHECK(entry != nullptr);  // it has room for kMax
    if (call.kind == Call::receive) {
      io_uring_prep_recv(entry, call.fd, call.to, call.bytes, MSG_DONTWAIT);
    } else {
      io_uring_prep_send(entry, call.fd, call.from, call.bytes,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    io_uring_sqe_set_data(entry, &call);
  }

  // How many results were there.
  std::size_t collect() {
    std::size_t n = 0;
    unsigned head = 0;
    io_uring_cqe* entry = nullptr;
    io_uring_for_each_cqe(&ring, head, entry) {
      static_cast<Call*>(io_uring_cqe_get_data(entry))->result = entry->res;
      ++n;
    }
    io_uring_cq_advance(&ring, static_cast<unsigned>(n));
    return n;
  }

  // How many of the calls, from the first on, the kernel has taken and ended.
  std::size_t run(std::span<Call> calls) {
    for (Call& call : calls) stage(call);
    std::size_t taken = 0, ended = 0;
    while (ended < calls.size()) {
      const int n = io_uring_submit_and_wait(
          &ring, static_cast<unsigned>(calls.size() - ended));
      if (n > 0) taken += static_cast<std::size_t>(n);
      ended += collect();
      if (n < 0 && n != -EINTR) break;
    }
    // What was taken may still write to where it was told.
    while (ended < taken) {
      io_uring_cqe* entry = nullptr;
      const int error = io_uring_wait_cqe(&ring, &entry);
      CHECK(error == 0 || error == -EINTR);
      ended += collect();
    }
    return ended;
  }
};

SocketCalls::SocketCalls(bool together) {
  if (!together) return;
  ring_ = std::make_unique<Ring>();
  if (!ring_->make()) ring_.reset();
}

SocketCalls::~SocketCalls() = default;

void SocketCalls::run(std::span<Call> calls) {
  CHECK(calls.size() <= kMax);
  std::size_t done = 0;
  if (ring_ != nullptr && calls.size() >= kTogetherMin) {
    done = ring_->run(calls);
    if (done < calls.size()) ring_.reset();  // C2
  }
  for (Call& call : calls.subspan(done)) one(call);
  // As ever with these: it was not begun.
  for (Call& call : calls.first(done)) {
    if (call.result == -EINTR) one(call);
  }
}

}  // namespace machina
