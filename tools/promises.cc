#include "tools/promises.h"

#include <arpa/inet.h>

namespace machina {
namespace {

// Less can be guessed.
constexpr std::size_t kSecretBytesMin = 16;

bool is_address(const std::string& host) {
  in6_addr bytes;
  // fe80::1%eth0 names an interface too.
  std::string plain = host.substr(0, host.find('%'));
  return host == "localhost" ||
         ::inet_pton(AF_INET, host.c_str(), &bytes) == 1 ||
         ::inet_pton(AF_INET6, plain.c_str(), &bytes) == 1;
}

}  // namespace

bool names_loopback(const std::string& host) {
  return host.starts_with("127.") || host == "::1" || host == "[::1]" ||
         host == "localhost";
}

std::vector<std::string> start_refusals(const Config& config) {
  std::vector<std::string> lines;
  bool token = !config.typed().api_token.empty();
  const std::string& host = config.typed().host;
  if (!is_address(host)) {
    lines.push_back("MACHINA_HOST: \"" + host +
                    "\" is not an address; use 127.0.0.1, or that of an "
                    "interface");
  }
  bool hmac = !config.typed().api_hmac_secret.empty();

  if (config.prod() && !token && !hmac) {
    lines.push_back(
        "the prod profile needs authentication: set MACHINA_API_TOKEN or "
        "MACHINA_API_HMAC_SECRET, or one of them as ..._FILE");
  } else if (!token && !hmac && is_address(host) && !names_loopback(host)) {
    lines.push_back("MACHINA_HOST: \"" + host +
                    "\" can be reached from outside and there is no "
                    "MACHINA_API_TOKEN and no MACHINA_API_HMAC_SECRET: set "
                    "one, or use 127.0.0.1");
  }
  if (config.typed().api_credentials == "all" && !(token && hmac)) {
    lines.push_back(
        "MACHINA_API_CREDENTIALS=all needs both MACHINA_API_TOKEN and "
        "MACHINA_API_HMAC_SECRET: set the other, or use any");
  }
  for (const char* name : {"MACHINA_API_TOKEN", "MACHINA_API_HMAC_SECRET"}) {
    const std::size_t bytes = config.text(name).size();
    if (config.prod() && bytes > 0 && bytes < kSecretBytesMin) {
      lines.push_back(std::string(name) + " has " + std::to_string(bytes) +
                      " bytes; the prod profile wants at least " +
                      std::to_string(kSecretBytesMin) +
                      " (openssl rand -hex 24 makes one)");
    }
  }
  if (config.prod()) {
    for (const auto& line : config.open_secrets()) lines.push_back(line);
  }
  if (!config.typed().wal_enable) {
    lines.push_back(
        config.prod()
            ? "the prod profile needs the log: MACHINA_WAL_ENABLE must be 1"
            : "MACHINA_WAL_ENABLE=0: there is no queue without its log; for "
              "speed set MACHINA_WAL_FSYNC=0");
  }
  if (config.prod() && !config.typed().wal_fsync) {
    lines.push_back(
        "the prod profile needs the log's syncs: MACHINA_WAL_FSYNC must be 1");
  }
  if (config.prod() && !config.typed().seccomp_enable &&
      config.typed().sandbox_min_level > 2) {
    lines.push_back(
        "MACHINA_SECCOMP_ENABLE=0 allows level L2 at most, below "
        "MACHINA_SANDBOX_MIN_LEVEL=" +
        config.text("MACHINA_SANDBOX_MIN_LEVEL") +
        ": set it to 1, or lower the level on purpose");
  }
  if (config.typed().sandbox_min_level > 3) {
    lines.push_back(
        "MACHINA_SANDBOX_MIN_LEVEL=L4 needs a virtual machine, which this "
        "version has no provider for: L3 is its strongest");
  }
  if (config.typed().bwrap_required) {
    lines.push_back(
        "MACHINA_BWRAP_REQUIRED=1: this version has no bwrap provider, only "
        "its own launcher; unset it");
  }
  return lines;
}

std::string not_promised(const Config& config) {
  std::vector<std::string> parts;
  if (!config.typed().wal_fsync) {
    parts.emplace_back(
        "that a 201 survives a power cut (MACHINA_WAL_FSYNC=0; a kill -9 it "
        "does)");
  }
  if (config.typed().sandbox_min_level < 3) {
    parts.push_back("full isolation (MACHINA_SANDBOX_MIN_LEVEL=" +
                    config.text("MACHINA_SANDBOX_MIN_LEVEL") +
                    "; each job says what it had)");
  }
  if (!config.typed().seccomp_enable) {
    parts.emplace_back(
        "an allow-list of system calls (MACHINA_SECCOMP_ENABLE=0: the worst "
        "are denied)");
  }
  if (config.typed().api_token.empty() &&
      config.typed().api_hmac_secret.empty()) {
    parts.emplace_back(
        "to know who calls (no MACHINA_API_TOKEN, no MACHINA_API_HMAC_SECRET: "
        "any user of this machine may)");
  }
  if (config.text("MACHINA_SECCOMP_PROFILE") == "net" ||
      config.text("MACHINA_SECCOMP_ALLOW_NET") == "1") {
    parts.emplace_back("any network to a job (the egress proxy comes later)");
  }
  parts.emplace_back(
      "that what a job does outside the queue happens only once");
  std::string line;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    line += (i == 0 ? "" : "; ") + parts[i];
  }
  return line;
}

}  // namespace machina
