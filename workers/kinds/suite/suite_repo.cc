// A repository's way into a test run: where it may lie, and how a commit of it
// gets into the sandbox without anything of it being trusted.

#include <openssl/evp.h>

#include <algorithm>
#include <filesystem>

#include "queue/base/hex.h"
#include "queue/base/json.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/suite/suite.h"

namespace machina::kinds {
namespace {

namespace fs = std::filesystem;

bool below(const std::string& path, const std::string& root) {
  return path.size() > root.size() + 1 && path.starts_with(root) &&
         (root.ends_with('/') || path[root.size()] == '/');
}

// Without "//", "." and "..", by the text alone, and without a slash at the
// end; what leads above its beginning keeps its "..", and is refused.
std::string plain_path(const std::string& path) {
  std::string plain = fs::path(path).lexically_normal().string();
  while (plain.size() > 1 && plain.ends_with('/')) plain.pop_back();
  return plain;
}

// Runs in the prepare sandbox: $1 is base_rev; $2 "in_repo" or not. One writer
// per mirror at a time, so a lock file that is found was left by a session that
// was killed. The configuration is ours alone; the one of /repo is read by
// upload-pack, which runs nothing that a repository's own file names. A fetch
// that failed is looked at and tried once more: the repository may have been
// repacked meanwhile. Exit 3: no such commit; 4: the repository cannot be read;
// 5: it has no commit; 6: its objects are not named by SHA-1; 7: it holds what
// is neither file, directory nor link, which git would wait for.
constexpr char kPrepareScript[] = R"(
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
resolve() { alive git rev-parse -q --verify --end-of-options "$1^{commit}"; }
full='^[0-9a-f]{40}$'
from=/repo
[ ! -d /repo/.git ] || from=/repo/.git
odd=$(find $from ! -type f ! -type d ! -type l -print -quit 2>/dev/null)
[ -z "$odd" ] || { printf '%s\n' "$odd" >&2; exit 7; }
if [ -f $from/config ] && [ ! -L $from/config ]; then
  format=$(alive git config -f $from/config --no-includes \
    extensions.objectformat || :)
  [ "${format:-sha1}" = sha1 ] || exit 6
fi
if [ "$2" = in_repo ]; then
  alive env GIT_OBJECT_DIRECTORY=$from/objects git cat-file -e "$1^{commit}" ||
    exit 3
fi
if printf %s "$1" | grep -Eq "$full" && resolve "$1"; then exit 0; fi
fetch() {
  alive git fetch -q --no-tags --prune --force --update-shallow \
    --no-write-fetch-head --no-auto-maintenance --no-recurse-submodules \
    file:///repo '+refs/*:refs/*' "$@"
}
fetch_with_head() {
  fetch '+HEAD:refs/machina/HEAD' || return 1
  alive git update-ref --no-deref HEAD refs/machina/HEAD
}
listed() { alive git ls-remote -q --exit-code file:///repo "$@" >/dev/null; }
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
  alive git fetch -q --no-tags --update-shallow --no-write-fetch-head \
    --no-auto-maintenance file:///repo "+$1:refs/machina/commits/$1" || exit 3
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
[ ! -f /mirror/shallow ] || cp /mirror/shallow .git/shallow
[ -z "$2" ] || git unpack-objects -q <"$2"
git -c core.hooksPath=/dev/null -c advice.detachedHead=false \
  checkout -q --detach "$1"
)";

}  // namespace

std::string sha256_hex(const std::string& text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  EVP_Digest(text.data(), text.size(), digest, &size, EVP_sha256(), nullptr);
  return hex(digest, size);
}

namespace {

// The last non-empty line of git's output where it is a commit's name.
std::string commit_in(const std::string& out) {
  std::size_t end = out.find_last_not_of('\n');
  if (end == std::string::npos) return "";
  const std::size_t begin = out.rfind('\n', end);
  std::string line = out.substr(begin == std::string::npos ? 0 : begin + 1);
  line.resize(std::min(line.size(), line.find('\n')));
  return is_commit_name(line) ? line : "";
}

void replace_all(std::string& text, const std::string& from,
                 const std::string& to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos;
       at += to.size()) {
    text.replace(at, from.size(), to);
  }
}

}  // namespace

std::string git_said(const std::string& err, const std::string& repo) {
  // What git adds to every failed fetch, and what a remote's end looks like.
  static constexpr const char* kEmpty[] = {"Could not read from remote",
                                           "Please make sure you have",
                                           "and the repository exists",
                                           "the remote end hung up",
                                           "early EOF",
                                           "index-pack failed",
                                           "hint:",
                                           "fetch-pack: unexpected disconnect"};
  std::string out;
  int lines = 0;
  for (std::size_t at = 0; at < err.size() && lines < 3;) {
    const std::size_t end = std::min(err.find('\n', at), err.size());
    std::string line = err.substr(at, end - at);
    at = end + 1;
    for (const char* head : {"remote: ", "fatal: ", "error: "}) {
      if (line.starts_with(head)) line.erase(0, std::string(head).size());
    }
    const bool empty =
        line.empty() ||
        std::any_of(std::begin(kEmpty), std::end(kEmpty),
                    [&](const char* words) {
                      return line.find(words) != std::string::npos;
                    });
    if (empty) continue;
    replace_all(line, "/repo/.git", repo + "/.git");
    replace_all(line, "'/repo'", "'" + repo + "'");
    replace_all(line, "/repo/", repo + "/");
    replace_all(line, "/mirror/", "its mirror's ");
    replace_all(line, "/work/", "");
    if (out.find(line) != std::string::npos) continue;  // said twice
    out += (lines++ > 0 ? "; " : "") + line;
  }
  return out.empty() ? "git gave no reason" : head_and_tail(out, 400);
}

std::vector<std::string> repo_candidates(const std::string& repo,
                                         const KindSettings& settings) {
  std::vector<std::string> out;
  if (repo.find('\0') != std::string::npos) return out;
  const std::string plain = plain_path(repo);
  const bool absolute = plain.starts_with('/');
  if (!safe_relative_path(absolute ? std::string_view(plain).substr(1)
                                   : plain)) {
    return out;
  }
  for (const std::string& root : settings.repo_roots) {
    if (!absolute) {
      out.push_back(root + "/" + plain);
    } else if (below(plain, root)) {
      out.push_back(plain);
      break;
    }
  }
  return out;
}

Checked<FoundRepo> find_repo(const std::string& repo,
                             const KindSettings& settings) {
  const auto refuse = [&](const std::string& why) {
    return BadField{"repo", "\"" + printable(repo) + "\" " + why};
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
    const fs::path real = fs::canonical(path, error);
    if (error) continue;
    FoundRepo found{real.string(), ""};
    for (const std::string& root : settings.repo_roots) {
      const fs::path real_root = fs::canonical(root, error);
      if (error || !below(found.real, real_root.string())) continue;
      found.kept =
          plain_path(root + "/" + real.lexically_relative(real_root).string());
      break;
    }
    // Outside of the roots nothing is there, so that nobody learns what is.
    if (found.kept.empty()) continue;
    const auto type = [&](const char* name) {
      return fs::symlink_status(real / name, error).type();
    };
    const auto there = [](fs::file_type one) {
      return one != fs::file_type::none && one != fs::file_type::not_found;
    };
    const fs::file_type objects = type("objects");
    if (!there(type(".git")) &&
        !(there(type("HEAD")) && (objects == fs::file_type::directory ||
                                  objects == fs::file_type::symlink))) {
      return refuse("is not a git repository");
    }
    // A name that was reached without a link stays where it has one meaning.
    if (settings.repo_roots.size() == 1 && !repo.starts_with('/') &&
        found.kept == plain_path(path)) {
      found.kept = plain_path(repo);
    }
    return found;
  }
  return refuse("does not exist below the repository roots (" + roots +
                "), or a link on the way to it leads out of them");
}

std::string with_repo(const std::string& payload, const std::string& repo) {
  std::string_view raw;
  json::members(payload, [&](auto key, auto value) {
    if (key == "repo" && json::string(value) != repo) raw = value.raw();
    return true;
  });
  if (!raw.starts_with('"')) return "";
  const auto at = static_cast<std::size_t>(raw.data() - payload.data());
  return payload.substr(0, at) + json::quoted(repo) +
         payload.substr(at + raw.size());
}

Prepared prepare_repo(const std::string& repo, const std::string& base_rev,
                      const Attempt& attempt, Host& host, Millis left_ms,
                      bool in_repo) {
  Prepared out;
  Result<std::unique_ptr<sandbox::Session>> session =
      Error{Code::not_found, "no repository root holds it"};
  for (const auto& path : repo_candidates(repo, host.settings())) {
    sandbox::SessionSpec spec;
    spec.role = sandbox::Role::prepare;
    spec.limits = attempt.limits;
    spec.min_level = attempt.required;
    spec.repo = out.checkout.repo = path;
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
  step.argv = {"/bin/sh", "-c",     std::string(kAlive) + kPrepareScript,
               "prepare", base_rev, in_repo ? "in_repo" : ""};
  step.cwd = "/mirror";
  step.timeout_ms = left_ms;
  sandbox::Watch watch = host.watch();
  watch.on_output = nullptr;  // git's own words are not the job's output
  const sandbox::StepResult ran = (*session)->run(step, watch);
  out.end.usage.add(ran);
  if (const EndCode code = code_of(ran.ended); code != EndCode::none) {
    out.end =
        failed(code, "prepare: " + describe(ran, attempt.limits, left_ms));
    out.end.usage.add(ran);
    return out;
  }
  out.checkout.commit = commit_in(ran.out);
  if (ran.exit_code == 0 && !out.checkout.commit.empty()) {
    out.good = true;
    return out;
  }
  if (ran.exit_code == 3 && !passing_trouble(ran.err)) {
    out.no_commit = true;
    out.end = failed(
        EndCode::invalid_payload,
        "base_rev: \"" + base_rev + "\" is no commit of repository \"" + repo +
            "\": name a branch, a tag or a commit that it has, or leave it "
            "out for HEAD");
  } else if (ran.exit_code == 5) {
    out.end = failed(EndCode::invalid_payload,
                     "repo: \"" + repo + "\" has no commit yet");
  } else if (ran.exit_code == 4 && !passing_trouble(ran.err)) {
    out.end = failed(
        EndCode::invalid_payload,
        "repo: \"" + repo +
            "\" cannot be read as a git repository (all of it must lie inside "
            "its directory: no .git file or link and no alternates that lead "
            "elsewhere); git says: " +
            git_said(ran.err, repo));
  } else if (ran.exit_code == 7) {
    out.end = failed(
        EndCode::invalid_payload,
        "repo: \"" + repo +
            "\" holds something that is neither a file, a directory nor a "
            "link, and git would wait for it: " +
            git_said(ran.err, repo));
  } else if (ran.exit_code == 6) {
    out.end = failed(EndCode::invalid_payload,
                     "repo: \"" + repo +
                         "\" names its objects by SHA-256 "
                         "(extensions.objectFormat): only SHA-1 repositories "
                         "are taken");
  } else {
    const bool ours = ran.err.find("/mirror/") != std::string::npos;
    out.end = failed(
        ours ? EndCode::sandbox : code_of_git(ran),
        "repo: \"" + repo + "\" cannot be prepared: git exited with " +
            std::to_string(ran.exit_code) + ": " + git_said(ran.err, repo));
  }
  out.end.usage.add(ran);
  return out;
}

sandbox::Step checkout_step(const Checkout& checkout) {
  sandbox::Step step;
  step.argv = {"/bin/sh",
               "-c",
               kCheckoutScript,
               "checkout",
               checkout.commit,
               checkout.pack.empty() ? "" : std::string("/work/") + kPackFile};
  return step;
}

}  // namespace machina::kinds
