#include "tools/cli/serve_events.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <sstream>

#include "queue/base/rfc3339.h"
#include "tools/cli/cli.h"
#include "tools/ops.h"

namespace machina::cli {
namespace {

using Steady = std::chrono::steady_clock;

bool is_secret(const std::string& name) {
  const Setting* row = find_setting(name);
  return row != nullptr && row->type == Setting::Type::secret;
}

PidFile pid_file_of(const Config& config, const ServeStart& start) {
  PidFile file;
  file.role = "serve";
  file.id = this_process();
  file.version = MACHINA_VERSION;
  file.started_at = rfc3339_now();
  file.host = config.typed().host;
  file.port = config.typed().port;
  file.workers = config.typed().workers;
  file.profile = config.typed().profile;
  char cwd[4096];
  if (::getcwd(cwd, sizeof cwd) != nullptr) file.cwd = cwd;
  file.argv = start.argv;
  file.environment = start.environment;
  file.secrets = start.secrets;
  if (start.manager.supervised) file.supervisor = "systemd";
  for (const auto& [name, value] : config.values()) {
    const bool hidden = is_secret(name) && !value.text.empty();
    file.settings[name] = hidden ? "set" : value.text;
  }
  return file;
}

// The process at the other end is root or of our own user.
bool trusted_peer(int socket) {
  ucred peer{};
  socklen_t size = sizeof peer;
  return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 &&
         (peer.uid == 0 || peer.uid == ::geteuid());
}

// True where somebody waits for the sockets and has got them.
bool give_to_waiting(const std::string& root,
                     const std::vector<ListeningSocket>& sockets) {
  std::string path = handover_socket(root);
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if (path.size() >= sizeof to.sun_path) return false;
  std::memcpy(to.sun_path, path.c_str(), path.size());
  int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return false;
  std::vector<NamedFd> named;
  for (const auto& each : sockets) named.push_back({each.fd, each.name});
  bool given =
      ::connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0 &&
      trusted_peer(fd) && send_fds(fd, named);
  ::close(fd);
  return given;
}

// One line of a status: what a manager shows.
std::string status_line(const ServerPulse& pulse) {
  if (pulse.log_stuck) return "the disk does not answer";
  if (pulse.draining) {
    return pulse.handover ? "handing over" : "draining: jobs may finish";
  }
  return pulse.unready.empty() ? "ready" : pulse.unready;
}

// Tells the service manager. Nobody listens: nothing is sent.
class Notifier {
 public:
  explicit Notifier(const ServiceEnvironment& manager) : manager_(manager) {}

  bool keeps_sockets() const {
    return manager_.supervised && !manager_.notify_socket.empty();
  }
  bool say(const std::string& lines) const {
    return !manager_.notify_socket.empty() &&
           notify_manager(manager_.notify_socket, lines);
  }
  // The manager keeps them for the next start, also after a crash.
  void store(const std::vector<ListeningSocket>& sockets) const {
    if (!keeps_sockets()) return;
    auto has = [](const auto& all, int fd) {
      return std::any_of(all.begin(), all.end(),
                         [&](const auto& each) { return each.fd == fd; });
    };
    for (const auto& old : manager_.sockets) {
      if (!has(sockets, old.fd)) say("FDSTOREREMOVE=1\nFDNAME=" + old.name);
    }
    for (const auto& each : sockets) {
      if (has(manager_.sockets, each.fd)) continue;  // it has it already
      notify_manager(manager_.notify_socket,
                     "FDSTORE=1\nFDPOLL=0\nFDNAME=" + each.name, {each.fd});
    }
  }
  void pulse(const ServerPulse& now) {
    if (manager_.notify_socket.empty()) return;
    std::string lines;
    const bool ready = now.unready.empty() && !ready_;
    const bool stopping = now.draining && !stopping_;
    if (ready) lines += "READY=1\n";
    if (stopping) lines += "STOPPING=1\n";
    const std::string status = status_line(now);
    if (status != status_) lines += "STATUS=" + status + "\n";
    const auto time = Steady::now();
    if (manager_.watchdog_ms > 0 && !now.log_stuck &&
        time - fed_ >= std::chrono::milliseconds(manager_.watchdog_ms / 3)) {
      lines += "WATCHDOG=1\n";
    }
    // What did not leave is said again at the next pulse.
    if (lines.empty() || !say(lines)) return;
    if (lines.ends_with("WATCHDOG=1\n")) fed_ = time;
    ready_ = ready_ || ready;
    stopping_ = stopping_ || stopping;
    status_ = status;
  }

 private:
  ServiceEnvironment manager_;
  bool ready_ = false, stopping_ = false;
  std::string status_;
  Steady::time_point fed_{};
};

}  // namespace

std::string handover_socket(const std::string& root) {
  return ops_dir(root) + "/handover.sock";
}

ServeStart remember_start(ServiceEnvironment manager) {
  ServeStart start;
  start.manager = std::move(manager);
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::string argument;
  std::getline(file, argument, '\0');  // the program
  while (std::getline(file, argument, '\0')) start.argv.push_back(argument);
  for (const auto& entry : environment()) {
    if (!entry.starts_with("MACHINA_")) continue;
    std::string name = entry.substr(0, entry.find('='));
    if (!is_secret(name)) {
      start.environment.push_back(entry);
    } else if (entry.size() > name.size() + 1) {
      start.secrets.push_back(name);
    }
  }
  return start;
}

ServerEvents serve_events(const Config& config, ServeStart start) {
  auto notifier = std::make_shared<Notifier>(start.manager);
  auto file = std::make_shared<PidFile>(pid_file_of(config, start));
  std::string root = start.root;
  ServerEvents events;
  auto write = [root, file] {
    if (auto ok = write_pid_file(root, *file); !ok) {
      fail(kOk, ok.error().what + "; `machina ops` will not find this server");
    }
  };
  events.locked = [write, notifier] {
    write();
    notifier->say("STATUS=recovering");
  };
  events.listening = [write, file, notifier](
                         int port,
                         const std::vector<ListeningSocket>& sockets) {
    file->port = port;
    write();
    notifier->store(sockets);
  };
  events.pulse = [notifier](const ServerPulse& now) { notifier->pulse(now); };
  events.pass_sockets =
      [root, notifier](const std::vector<ListeningSocket>& sockets) {
        return give_to_waiting(root, sockets) || notifier->keeps_sockets();
      };
  events.end_pool = [root](bool at_once) {
    signal_pool(root, at_once ? SIGKILL : SIGTERM);
  };
  events.left = [root] {
    remove_pid_file(root, "serve");
    // A pool without privilege could only empty its own.
    struct stat status {};
    std::string pool = ops_dir(root) + "/pool.pid";
    if (::lstat(pool.c_str(), &status) == 0 && status.st_size == 0) {
      ::unlink(pool.c_str());
    }
  };
  return events;
}

}  // namespace machina::cli
