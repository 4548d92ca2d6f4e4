#include "tools/promises.h"

#include <arpa/inet.h>

namespace machina {
namespace {

// Less can be guessed.
constexpr std::size_t kTokenBytesMin = 16;

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
  bool token = !config.text("MACHINA_API_TOKEN").empty();
  const std::string& host = config.text("MACHINA_HOST");
  if (!is_address(host)) {
    lines.push_back("MACHINA_HOST: \"" + host +
                    "\" is not an address; use 127.0.0.1, or that of an "
                    "interface");
  }
  bool hmac = !config.text("MACHINA_API_HMAC_SECRET").empty();

  // Signatures come with a later version; to accept the secret and check
  // nothing would be a lie, whatever the profile.
  if (hmac && !token) {
    lines.push_back(
        "only MACHINA_API_HMAC_SECRET is set, and this version does not check "
        "request signatures yet: set MACHINA_API_TOKEN or "
        "MACHINA_API_TOKEN_FILE");
  } else if (config.prod() && !token) {
    lines.push_back(
        "the prod profile needs authentication: set MACHINA_API_TOKEN or "
        "MACHINA_API_TOKEN_FILE");
  } else if (!token && is_address(config.text("MACHINA_HOST")) &&
             !names_loopback(config.text("MACHINA_HOST"))) {
    lines.push_back("MACHINA_HOST: \"" + config.text("MACHINA_HOST") +
                    "\" can be reached from outside and there is no "
                    "MACHINA_API_TOKEN: set one, or use 127.0.0.1");
  }
  const std::size_t token_bytes = config.text("MACHINA_API_TOKEN").size();
  if (config.prod() && token && token_bytes < kTokenBytesMin) {
    lines.push_back("MACHINA_API_TOKEN has " + std::to_string(token_bytes) +
                    " bytes; the prod profile wants at least " +
                    std::to_string(kTokenBytesMin) +
                    " (openssl rand -hex 24 makes one)");
  }
  if (config.prod()) {
    for (const auto& line : config.open_secrets()) lines.push_back(line);
  }
  if (!config.flag("MACHINA_WAL_ENABLE")) {
    lines.push_back(
        config.prod()
            ? "the prod profile needs the log: MACHINA_WAL_ENABLE must be 1"
            : "MACHINA_WAL_ENABLE=0: there is no queue without its log; for "
              "speed set MACHINA_WAL_FSYNC=0");
  }
  if (config.prod() && !config.flag("MACHINA_WAL_FSYNC")) {
    lines.push_back(
        "the prod profile needs the log's syncs: MACHINA_WAL_FSYNC must be 1");
  }
  if (config.prod() && !config.flag("MACHINA_SECCOMP_ENABLE") &&
      config.number("MACHINA_SANDBOX_MIN_LEVEL") > 2) {
    lines.push_back(
        "MACHINA_SECCOMP_ENABLE=0 allows level L2 at most, below "
        "MACHINA_SANDBOX_MIN_LEVEL=" +
        config.text("MACHINA_SANDBOX_MIN_LEVEL") +
        ": set it to 1, or lower the level on purpose");
  }
  if (config.number("MACHINA_SANDBOX_MIN_LEVEL") > 3) {
    lines.push_back(
        "MACHINA_SANDBOX_MIN_LEVEL=L4 needs a virtual machine, which this "
        "version has no provider for: L3 is its strongest");
  }
  if (config.flag("MACHINA_BWRAP_REQUIRED")) {
    lines.push_back(
        "MACHINA_BWRAP_REQUIRED=1: this version has no bwrap provider, only "
        "its own launcher; unset it");
  }
  return lines;
}

std::string not_promised(const Config& config) {
  std::vector<std::string> parts;
  if (!config.flag("MACHINA_WAL_FSYNC")) {
    parts.emplace_back(
        "that a 201 survives a power cut (MACHINA_WAL_FSYNC=0; a kill -9 it "
        "does)");
  }
  if (config.number("MACHINA_SANDBOX_MIN_LEVEL") < 3) {
    parts.push_back("full isolation (MACHINA_SANDBOX_MIN_LEVEL=" +
                    config.text("MACHINA_SANDBOX_MIN_LEVEL") +
                    "; each job says what it had)");
  }
  if (!config.flag("MACHINA_SECCOMP_ENABLE")) {
    parts.emplace_back(
        "an allow-list of system calls (MACHINA_SECCOMP_ENABLE=0: the worst "
        "are denied)");
  }
  if (config.text("MACHINA_API_TOKEN").empty()) {
    parts.emplace_back(
        "to know who calls (no MACHINA_API_TOKEN: any user of this machine "
        "may)");
  }
  if (!config.text("MACHINA_API_HMAC_SECRET").empty()) {
    parts.emplace_back("that request signatures are accepted (bearer only)");
  }
  if (config.number("MACHINA_API_RPM") > 0 ||
      config.number("MACHINA_API_ENQUEUE_RPM") > 0 ||
      config.number("MACHINA_API_RUNSYNC_RPM") > 0) {
    parts.emplace_back("the rate limits (MACHINA_API_*RPM come later)");
  }
  if (config.text("MACHINA_SECCOMP_PROFILE") == "net" ||
      config.flag("MACHINA_SECCOMP_ALLOW_NET")) {
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
