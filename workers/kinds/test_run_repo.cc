// A repository's way into a test run: where it may lie, and how a commit of it
// gets into the sandbox without anything of it being trusted.

#include <openssl/evp.h>

#include <algorithm>
#include <filesystem>

#include "workers/kinds/fields.h"
#include "workers/kinds/test_run.h"

namespace machina::kinds {
namespace {

namespace fs = std::filesystem;

bool below(const std::string& path, const std::string& root) {
  return path.size() > root.size() + 1 && path.starts_with(root) &&
         (root.ends_with('/') || path[root.size()] == '/');
}

// Runs in the prepare sandbox: $1 is base_rev. One writer per mirror at a time,
// so a lock file that is found was left by a session that was killed. The
// configuration is ours alone; the one of /repo is read by upload-pack, which
// runs nothing that a repository's own file names. A fetch that failed is
// looked at and tried once more: the repository may have been repacked
// meanwhile. Exit 3: no such commit; 4: the repository cannot be read; 5: it
// has no commit.
constexpr char kPrepareScript[] = R"(
set -eu
umask 022
exec 9>/mirror/machina.lock
flock 9
cat >/mirror/machina.gitconfig <<END
[safe]
	directory = *
[core]
	hooksPath = /dev/null
	fsmonitor = false
[gc]
	auto = 0
[maintenance]
	auto = false
[protocol]
	allow = never
[protocol "file"]
	allow = always
[uploadpack]
	allowAnySHA1InWant = true
[init]
	defaultBranch = main
END
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/mirror/machina.gitconfig
export GIT_DIR=/mirror GIT_TERMINAL_PROMPT=0 GIT_OPTIONAL_LOCKS=0
[ -f /mirror/HEAD ] || git init -q --bare --template= /mirror
find /mirror -name '*.lock' ! -name machina.lock -delete
find /mirror/objects -name 'tmp_*' -delete
resolve() { git rev-parse -q --verify --end-of-options "$1^{commit}"; }
full='^[0-9a-f]{40}$'
if printf %s "$1" | grep -Eq "$full" && resolve "$1"; then exit 0; fi
fetch() {
  git fetch -q --no-tags --prune --force --no-write-fetch-head \
    --no-auto-maintenance --no-recurse-submodules file:///repo \
    '+refs/*:refs/*' "$@"
}
fetch_with_head() {
  fetch '+HEAD:refs/machina/HEAD' || return 1
  git update-ref --no-deref HEAD refs/machina/HEAD
}
listed() { git ls-remote -q --exit-code file:///repo "$@" >/dev/null; }
if ! fetch_with_head; then
  found=0
  listed HEAD || found=$?
  case $found in
    0) fetch_with_head || exit 4 ;;
    2) found=0
      listed || found=$?
      [ "$found" != 2 ] || exit 5
      git symbolic-ref HEAD refs/machina/none
      fetch || exit 4 ;;
    *) exit 4 ;;
  esac
fi
if printf %s "$1" | grep -Eq "$full" && ! resolve "$1" >/dev/null; then
  git fetch -q --no-tags --no-write-fetch-head --no-auto-maintenance \
    file:///repo "+$1:refs/machina/commits/$1" || exit 3
fi
resolve "$1" || exit 3
)";

// Runs in the job's sandbox: objects are borrowed from the mirror, so nothing
// is copied but the files of one commit.
constexpr char kCheckoutScript[] = R"(
set -eu
umask 022
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null
mkdir -p /work/repo
cd /work/repo
git -c init.defaultBranch=main init -q --template= .
mkdir -p .git/objects/info
echo /mirror/objects >.git/objects/info/alternates
git -c core.hooksPath=/dev/null -c advice.detachedHead=false \
  checkout -q --detach "$1"
)";

std::string sha256_hex(const std::string& text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  EVP_Digest(text.data(), text.size(), digest, &size, EVP_sha256(), nullptr);
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (unsigned i = 0; i < size; ++i) {
    out += kHex[digest[i] >> 4];
    out += kHex[digest[i] & 15];
  }
  return out;
}

// The last non-empty line of git's output where it is a commit's name.
std::string commit_in(const std::string& out) {
  std::size_t end = out.find_last_not_of('\n');
  if (end == std::string::npos) return "";
  const std::size_t begin = out.rfind('\n', end);
  std::string line = out.substr(begin == std::string::npos ? 0 : begin + 1);
  line.resize(std::min(line.size(), line.find('\n')));
  const bool hex =
      line.size() >= 40 && line.size() <= 64 &&
      line.find_first_not_of("0123456789abcdef") == std::string::npos;
  return hex ? line : "";
}

// What a second attempt can see in another state: the worker's own side.
bool passing_trouble(const std::string& err) {
  static constexpr const char* kSigns[] = {
      "No space left",      "annot allocate memory",
      "ut of memory",       "Resource temporarily unavailable",
      "Input/output error", "unable to create temporary",
      "Too many open files"};
  return std::any_of(std::begin(kSigns), std::end(kSigns), [&](auto* sign) {
    return err.find(sign) != std::string::npos;
  });
}

std::string tail(const std::string& text, std::size_t bytes) {
  return text.size() <= bytes ? text : text.substr(text.size() - bytes);
}

}  // namespace

std::vector<std::string> repo_candidates(const std::string& repo,
                                         const KindSettings& settings) {
  std::vector<std::string> out;
  const bool absolute = repo.starts_with('/');
  if (!safe_relative_path(absolute ? std::string_view(repo).substr(1) : repo)) {
    return out;
  }
  for (const std::string& root : settings.repo_roots) {
    if (!absolute) {
      out.push_back(root + "/" + repo);
    } else if (below(repo, root)) {
      out.push_back(repo);
      break;
    }
  }
  return out;
}

Result<void> check_repo(const std::string& repo, const KindSettings& settings) {
  const auto refuse = [&](const std::string& why) {
    return Error{Code::invalid, "repo: \"" + repo.substr(0, 200) + "\" " + why};
  };
  const auto candidates = repo_candidates(repo, settings);
  std::string roots;
  for (const std::string& root : settings.repo_roots) {
    roots += (roots.empty() ? "" : ", ") + root;
  }
  if (candidates.empty()) {
    return refuse("is not below one of the repository roots (" + roots + ")");
  }
  for (const std::string& path : candidates) {
    std::error_code error;
    const auto real = fs::canonical(path, error);
    if (error) continue;
    const bool inside =
        std::any_of(settings.repo_roots.begin(), settings.repo_roots.end(),
                    [&](const std::string& root) {
                      const auto real_root = fs::canonical(root, error);
                      return !error && below(real.string(), real_root.string());
                    });
    if (!inside) {
      return refuse("leads out of the repository roots (" + roots + ")");
    }
    if (fs::exists(real / ".git", error) ||
        (fs::exists(real / "HEAD", error) &&
         fs::is_directory(real / "objects", error))) {
      return {};
    }
    return refuse("is not a git repository");
  }
  return refuse("does not exist below the repository roots (" + roots + ")");
}

Prepared prepare_repo(const TestPayload& payload, const Attempt& attempt,
                      Host& host, Millis left_ms) {
  Prepared out;
  Result<std::unique_ptr<sandbox::Session>> session =
      Error{Code::not_found, "no repository root holds it"};
  for (const auto& path : repo_candidates(payload.repo, host.settings())) {
    sandbox::SessionSpec spec;
    spec.role = sandbox::Role::prepare;
    spec.limits = attempt.limits;
    spec.min_level = attempt.required;
    spec.repo = path;
    spec.mirror = out.checkout.mirror = sha256_hex(path);
    session = host.open(spec);
    if (session || session.error().code != Code::not_found) break;
  }
  if (!session) {
    const bool wrong = session.error().code == Code::not_found ||
                       session.error().code == Code::invalid;
    out.end = failed(wrong ? EndCode::invalid_payload : EndCode::sandbox,
                     "repo: " + session.error().what);
    return out;
  }
  sandbox::Step step;
  step.argv = {"/bin/sh", "-c", kPrepareScript, "prepare", payload.base_rev};
  step.cwd = "/mirror";
  step.timeout_ms = left_ms;
  sandbox::Watch watch = host.watch();
  watch.on_output = nullptr;  // git's own words are not the job's output
  const sandbox::StepResult ran = (*session)->run(step, watch);
  out.end.usage.add(ran);
  if (const EndCode code = code_of(ran.ended); code != EndCode::none) {
    const Usage usage = out.end.usage;
    out.end =
        failed(code, "prepare: " + describe(ran, attempt.limits, left_ms));
    out.end.usage = usage;
    return out;
  }
  out.checkout.commit = commit_in(ran.out);
  if (ran.exit_code == 0 && !out.checkout.commit.empty()) {
    out.good = true;
    return out;
  }
  if (ran.exit_code == 3) {
    out.end = failed(EndCode::invalid_payload,
                     "base_rev: \"" + payload.base_rev +
                         "\" is no commit of this repository");
  } else if (ran.exit_code == 5) {
    out.end = failed(EndCode::invalid_payload,
                     "repo: \"" + payload.repo + "\" has no commit yet");
  } else if (ran.exit_code == 4 && !passing_trouble(ran.err)) {
    out.end = failed(
        EndCode::invalid_payload,
        "repo: \"" + payload.repo +
            "\" cannot be read as a git repository (all of it must lie inside "
            "its directory: no .git file or link and no alternates that lead "
            "elsewhere); git: " +
            tail(ran.err, 400));
  } else {
    out.end = failed(EndCode::sandbox, "prepare: git exited with " +
                                           std::to_string(ran.exit_code) +
                                           ": " + tail(ran.err + ran.out, 500));
  }
  return out;
}

sandbox::Step checkout_step(const Checkout& checkout) {
  sandbox::Step step;
  step.argv = {"/bin/sh", "-c", kCheckoutScript, "checkout", checkout.commit};
  return step;
}

}  // namespace machina::kinds
