// Landing: a new branch in the user's repository. git looks at the pack in a
// directory of its own that borrows the repository's objects, so no
// configuration, hook or attribute of the repository is read; then the handler
// below links objects and branch into place. Each file gets its name when it is
// whole (O_TMPFILE, linkat), so whoever kills it finds nothing half-made.

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "queue/base/fd.h"
#include "queue/base/hex.h"
#include "queue/base/utf8.h"
#include "workers/kinds/patch/patch.h"

namespace machina::kinds {
namespace {

constexpr char kObjects[] = "/work/land/objects";
constexpr char kPack[] = ".machina/patch.pack";

// $1 the commit, $2 its parent. Exit 3: the repository has lost the parent; 4:
// the pack is not what it should be.
constexpr char kVerifyScript[] = R"sh(
umask 022
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null LC_ALL=C
git -c init.defaultBranch=main init -q --bare --template= /work/land
export GIT_DIR=/work/land
from=/repo
[ ! -d /repo/.git ] || from=/repo/.git
mkdir -p $GIT_DIR/objects/info
echo $from/objects >$GIT_DIR/objects/info/alternates
[ ! -f $from/shallow ] || cp $from/shallow $GIT_DIR/shallow
alive git cat-file -e "$2^{commit}" 2>/dev/null || exit 3
git unpack-objects -q --strict </work/.machina/patch.pack || exit 4
[ "$(git rev-parse "$1^@")" = "$2" ] || exit 4
git rev-list --objects --quiet "$1" "^$2" || exit 4
)sh";

// --- inside the sandbox ---

int open_below(int dir, const std::string& path, int flags) {
  open_how how{};
  how.flags = static_cast<std::uint64_t>(flags) | O_CLOEXEC;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
  return static_cast<int>(
      syscall(SYS_openat2, dir, path.c_str(), &how, sizeof(how)));
}

// nullopt with errno: it is not there, or is no readable regular file.
std::optional<std::string> contents(int dir, const std::string& path,
                                    std::size_t bytes_max) {
  const Fd file(open_below(dir, path, O_RDONLY | O_NONBLOCK | O_NOCTTY));
  if (!file) return std::nullopt;
  struct stat st {};
  if (fstat(file.get(), &st) < 0) return std::nullopt;
  if (!S_ISREG(st.st_mode)) {
    errno = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
    return std::nullopt;
  }
  std::string out;
  char buffer[65536];
  for (;;) {
    const ssize_t n = read(file.get(), buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return std::nullopt;
    if (n == 0) return out;
    out.append(buffer, static_cast<std::size_t>(n));
    if (out.size() > bytes_max) {
      errno = EFBIG;
      return std::nullopt;
    }
  }
}

std::string trimmed(std::string text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) {
    text.pop_back();
  }
  return text;
}

struct Stop {
  std::string why;
  bool trouble = false;  // an error, not a refusal
  bool moved = false;    // a refusal: the branch is no longer at `old`
};

class Lander {
 public:
  // `old` empty: a new branch.
  Lander(std::string branch, std::string commit, std::string old,
         bool check_only)
      : branch_(std::move(branch)),
        ref_("refs/heads/" + branch_),
        commit_(std::move(commit)),
        old_(std::move(old)),
        check_only_(check_only) {}

  std::optional<Stop> run() {
    const Fd repo(open("/repo", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!repo) return trouble("the repository");
    const int inner = open_below(repo.get(), ".git", O_RDONLY | O_DIRECTORY);
    const Fd git(inner >= 0 ? inner : dup(repo.get()));
    git_ = git.get();
    if (auto stop = layout()) return stop;
    if (!old_.empty()) return move();
    bool done = false;
    if (auto stop = standing(&done)) return stop;
    if (done) return std::nullopt;
    if (auto stop = checked_out()) return stop;
    if (check_only_) return std::nullopt;
    if (auto stop = link_objects()) return stop;
    return link_branch();
  }

 private:
  static Stop refusal(const std::string& why) { return Stop{why}; }
  static Stop moved(const std::string& why) { return Stop{why, false, true}; }
  static Stop trouble(const std::string& what) {
    const bool no_right =
        errno == EACCES || errno == EPERM || errno == EROFS || errno == ENOTDIR;
    std::string why = what + ": " + std::strerror(errno);
    if (no_right) why += "; the repository's owner must be able to write there";
    return Stop{why, !no_right};
  }

  std::optional<Stop> layout() {
    for (const char* name : {"commondir", "reftable"}) {
      struct stat st {};
      if (fstatat(git_, name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
        return refusal(std::string("the repository has a ") + name +
                       ": its branches are not kept in its own refs/heads; "
                       "push into the repository that this one belongs to");
      }
    }
    const Fd objects(open_below(git_, "objects", O_RDONLY | O_DIRECTORY));
    const Fd refs(open_below(git_, "refs", O_RDONLY | O_DIRECTORY));
    if (!objects || !refs) return trouble("objects or refs");
    return std::nullopt;
  }

  // What the branch is now: ours already, another's, in the way, or nothing.
  std::optional<Stop> standing(bool* done) {
    if (const auto text = contents(git_, ref_, 4096)) {
      *done = trimmed(*text) == commit_;
      if (*done) return std::nullopt;
      return exists(std::string(utf8_head(trimmed(*text), 100)));
    }
    if (errno == ENOTDIR) {
      return refusal("a branch whose name is the beginning of " + branch_ +
                     " is in the way: give another one as branch");
    }
    if (errno == EISDIR) {
      // Empty directories are what deleted branches leave behind.
      if (!empty(ref_, 0)) {
        return refusal("branches below " + branch_ +
                       "/ are in the way: give another one as branch");
      }
    } else if (errno != ENOENT) {
      return trouble(ref_);
    }
    const auto packed = contents(git_, "packed-refs", 64u << 20);
    if (!packed && errno != ENOENT) return trouble("packed-refs");
    std::string_view rest = packed ? std::string_view(*packed) : "";
    while (!rest.empty()) {
      const std::size_t end = rest.find('\n');
      const std::string_view line = rest.substr(0, end);
      rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
      const std::size_t space = line.find(' ');
      if (line.empty() || line[0] == '#' || line[0] == '^' ||
          space == std::string_view::npos) {
        continue;
      }
      const std::string_view value = line.substr(0, space);
      const std::string_view name = line.substr(space + 1);
      if (name == ref_) {
        *done = value == commit_;
        if (*done) return std::nullopt;
        return exists(std::string(utf8_head(value, 100)));
      }
      const auto below = [](std::string_view a, std::string_view b) {
        return a.size() > b.size() && a.starts_with(b) && a[b.size()] == '/';
      };
      if (name.starts_with("refs/heads/") &&
          (below(name, ref_) || below(ref_, name))) {
        return refusal("branch " + std::string(name.substr(11)) +
                       " is in the way of " + branch_ +
                       ": give another one as branch");
      }
    }
    struct stat st {};
    if (fstatat(git_, (ref_ + ".lock").c_str(), &st, AT_SYMLINK_NOFOLLOW) ==
        0) {
      const auto lock = contents(git_, ref_ + ".lock", 4096);
      // Where files cannot be made nameless, a killed attempt leaves this.
      if (lock && trimmed(*lock) == commit_) {
        if (!check_only_) unlinkat(git_, (ref_ + ".lock").c_str(), 0);
      } else {
        return refusal(held_by_another());
      }
    }
    return std::nullopt;
  }

  Stop exists(const std::string& at) const {
    return refusal("branch " + branch_ + " exists already, at " + at +
                   ": give another one as branch, or delete that one");
  }

  std::string held_by_another() const {
    return "another git holds " + ref_ +
           ".lock; wait for it, or remove that file below the repository's "
           ".git "
           "where no git runs any more";
  }

  bool empty(const std::string& path, int depth) {
    const int fd = open_below(git_, path, O_RDONLY | O_DIRECTORY);
    DIR* dir = fd < 0 ? nullptr : fdopendir(fd);
    if (dir == nullptr) {
      if (fd >= 0) close(fd);
      return false;
    }
    bool all = depth < 32;
    while (all) {
      const dirent* entry = readdir(dir);
      if (entry == nullptr) break;
      const std::string name = entry->d_name;
      if (name == "." || name == "..") continue;
      all = empty(path + "/" + name, depth + 1);
    }
    closedir(dir);
    return all;
  }

  std::optional<Stop> checked_out() {
    const auto uses = [&](const std::string& where) -> bool {
      const auto head = contents(git_, where + "HEAD", 4096);
      if (head && trimmed(*head) == "ref: " + ref_) return true;
      for (const char* name :
           {"rebase-merge/head-name", "rebase-apply/head-name"}) {
        const auto rebased = contents(git_, where + name, 4096);
        if (rebased && trimmed(*rebased) == ref_) return true;
      }
      return false;
    };
    if (uses("")) {
      return refusal("branch " + branch_ +
                     " is checked out in the repository: check out another "
                     "one there first");
    }
    const int fd = open_below(git_, "worktrees", O_RDONLY | O_DIRECTORY);
    if (fd < 0) return std::nullopt;
    DIR* dir = fdopendir(fd);
    if (dir == nullptr) {
      close(fd);
      return trouble("worktrees");
    }
    std::optional<Stop> stop;
    while (!stop) {
      const dirent* entry = readdir(dir);
      if (entry == nullptr) break;
      const std::string name = entry->d_name;
      if (name == "." || name == "..") continue;
      if (uses("worktrees/" + name + "/")) {
        stop =
            refusal("branch " + branch_ + " is checked out in the worktree " +
                    name + ": check out another one there first");
      }
    }
    closedir(dir);
    return stop;
  }

  // --- a branch that is there ---

  // What it is at; empty: it is not there.
  std::optional<Stop> value(std::string* out) {
    out->clear();
    if (const auto text = contents(git_, ref_, 4096)) {
      *out = trimmed(*text);
      return std::nullopt;
    }
    if (errno != ENOENT && errno != ENOTDIR && errno != EISDIR) {
      return trouble(ref_);
    }
    const auto packed = contents(git_, "packed-refs", 64u << 20);
    if (!packed && errno != ENOENT) return trouble("packed-refs");
    std::string_view rest = packed ? std::string_view(*packed) : "";
    while (!rest.empty()) {
      const std::string_view line = rest.substr(0, rest.find('\n'));
      rest.remove_prefix(std::min(line.size() + 1, rest.size()));
      const std::size_t space = line.find(' ');
      if (space == std::string_view::npos || line[0] == '#') continue;
      if (line.substr(space + 1) == ref_) *out = line.substr(0, space);
    }
    return std::nullopt;
  }

  std::optional<Stop> expect_old(bool* done) {
    std::string at;
    if (auto stop = value(&at)) return stop;
    *done = at == commit_;
    if (*done || at == old_) return std::nullopt;
    if (at.empty()) {
      return moved("branch " + branch_ + " is not there any more");
    }
    return moved("branch " + branch_ + " has moved meanwhile, to " +
                 std::string(utf8_head(at, 100)));
  }

  // git's own way: the lock file comes whole under its name, the value is
  // looked at again under it, and it becomes the branch.
  std::optional<Stop> move() {
    bool done = false;
    if (auto stop = expect_old(&done)) return stop;
    if (done) return std::nullopt;
    if (auto stop = checked_out()) return stop;
    if (check_only_) return std::nullopt;
    if (auto stop = link_objects()) return stop;
    if (auto stop = make_parents()) return stop;
    const std::size_t last = ref_.rfind('/');
    const Fd parent(
        open_below(git_, ref_.substr(0, last), O_RDONLY | O_DIRECTORY));
    if (!parent) return trouble(ref_.substr(0, last));
    const std::string name = ref_.substr(last + 1), lock = name + ".lock";
    const std::string text = commit_ + "\n";
    for (int round = 0;; ++round) {
      const int error =
          place(parent.get(), lock, lock + "-machina", 0644, [&](int to) {
            const ssize_t n = write(to, text.data(), text.size());
            return n == static_cast<ssize_t>(text.size()) ? 0 : EIO;
          });
      if (!error) break;
      errno = error;
      if (error != EEXIST) return trouble(ref_ + ".lock");
      // An attempt of this job that was killed between lock and rename.
      const auto held = contents(git_, ref_ + ".lock", 4096);
      if (round > 0 || !held || trimmed(*held) != commit_) {
        return moved(held_by_another());
      }
      unlinkat(parent.get(), lock.c_str(), 0);
    }
    auto stop = expect_old(&done);
    if (stop || done) {
      unlinkat(parent.get(), lock.c_str(), 0);
      return stop;
    }
    if (renameat(parent.get(), lock.c_str(), parent.get(), name.c_str()) < 0 ||
        fsync(parent.get()) < 0) {
      stop = trouble(ref_);
      unlinkat(parent.get(), lock.c_str(), 0);
      return stop;
    }
    return std::nullopt;
  }

  // A file that appears under its name whole and synced, or not at all. 0,
  // EEXIST, or another errno. `spare` is the name to use meanwhile where the
  // file system has no nameless files.
  static int place(int dir, const std::string& name, const std::string& spare,
                   mode_t mode, const std::function<int(int)>& fill) {
    int fd = openat(dir, ".", O_TMPFILE | O_WRONLY | O_CLOEXEC, mode);
    const bool nameless = fd >= 0;
    if (!nameless) {
      if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL &&
          errno != ENOENT) {
        return errno;
      }
      unlinkat(dir, spare.c_str(), 0);
      fd = openat(dir, spare.c_str(),
                  O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, mode);
      if (fd < 0) return errno;
    }
    int error = fill(fd);
    if (!error && fchmod(fd, mode) < 0) error = errno;
    if (!error && fdatasync(fd) < 0) error = errno;
    if (!error) {
      const std::string self = "/proc/self/fd/" + std::to_string(fd);
      const int linked = nameless
                             ? linkat(AT_FDCWD, self.c_str(), dir, name.c_str(),
                                      AT_SYMLINK_FOLLOW)
                             : linkat(dir, spare.c_str(), dir, name.c_str(), 0);
      if (linked < 0) error = errno;
    }
    close(fd);
    if (!nameless) unlinkat(dir, spare.c_str(), 0);
    return error;
  }

  static int copy(int from, int to) {
    char buffer[65536];
    for (;;) {
      const ssize_t n = read(from, buffer, sizeof(buffer));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return errno;
      if (n == 0) return 0;
      for (ssize_t at = 0; at < n;) {
        const ssize_t m =
            write(to, buffer + at, static_cast<std::size_t>(n - at));
        if (m < 0 && errno == EINTR) continue;
        if (m < 0) return errno;
        at += m;
      }
    }
  }

  std::optional<Stop> link_objects() {
    const Fd objects(open_below(git_, "objects", O_RDONLY | O_DIRECTORY));
    struct stat st {};
    if (!objects || fstat(objects.get(), &st) < 0) {
      return trouble("objects");
    }
    dir_mode_ = st.st_mode & 0777;
    DIR* dir = opendir(kObjects);
    if (dir == nullptr) return trouble("the verified objects");
    std::optional<Stop> stop;
    while (!stop) {
      const dirent* entry = readdir(dir);
      if (entry == nullptr) break;
      const std::string name = entry->d_name;
      if (name.size() == 2 && is_hex(name))
        stop = link_fan(objects.get(), name);
    }
    closedir(dir);
    if (!stop && fsync(objects.get()) < 0) return trouble("objects");
    return stop;
  }

  std::optional<Stop> link_fan(int objects, const std::string& fan) {
    DIR* dir = opendir((std::string(kObjects) + "/" + fan).c_str());
    if (dir == nullptr) return trouble("the verified objects");
    if (mkdirat(objects, fan.c_str(), dir_mode_) < 0 && errno != EEXIST) {
      closedir(dir);
      return trouble("objects/" + fan);
    }
    const Fd into(open_below(objects, fan, O_RDONLY | O_DIRECTORY));
    std::optional<Stop> stop;
    if (!into) stop = trouble("objects/" + fan);
    while (!stop) {
      const dirent* entry = readdir(dir);
      if (entry == nullptr) break;
      const std::string name = entry->d_name;
      if (!is_commit_name(fan + name)) continue;
      struct stat st {};
      if (fstatat(into.get(), name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0) {
        continue;
      }
      const Fd from(openat(dirfd(dir), name.c_str(), O_RDONLY | O_CLOEXEC));
      const int error =
          from ? place(into.get(), name, "tmp_obj_machina", 0444,
                       [&](int to) { return copy(from.get(), to); })
               : errno;
      errno = error;
      if (error && error != EEXIST) stop = trouble("objects/" + fan);
    }
    closedir(dir);
    if (!stop && fsync(into.get()) < 0) stop = trouble("objects/" + fan);
    return stop;
  }

  // The directories above the branch.
  std::optional<Stop> make_parents() {
    const std::size_t last = ref_.rfind('/');
    for (std::size_t at = ref_.find('/'); at != std::string::npos && at <= last;
         at = ref_.find('/', at + 1)) {
      const std::string part = ref_.substr(0, at);
      const std::size_t slash = part.rfind('/');
      const Fd parent(slash == std::string::npos
                          ? dup(git_)
                          : open_below(git_, part.substr(0, slash),
                                       O_RDONLY | O_DIRECTORY));
      if (!parent ||
          (mkdirat(parent.get(),
                   part.c_str() + (slash == std::string::npos ? 0 : slash + 1),
                   dir_mode_) < 0 &&
           errno != EEXIST)) {
        return trouble(part);
      }
    }
    return std::nullopt;
  }

  std::optional<Stop> link_branch() {
    // An empty directory of that name is in nobody's way.
    remove_empty(ref_, 0);
    if (auto stop = make_parents()) return stop;
    const std::size_t last = ref_.rfind('/');
    const Fd parent(
        open_below(git_, ref_.substr(0, last), O_RDONLY | O_DIRECTORY));
    if (!parent) return trouble(ref_.substr(0, last));
    const std::string name = ref_.substr(last + 1), text = commit_ + "\n";
    const int error =
        place(parent.get(), name, name + ".lock", 0644, [&](int to) {
          const ssize_t n = write(to, text.data(), text.size());
          return n == static_cast<ssize_t>(text.size()) ? 0 : EIO;
        });
    errno = error;
    if (error == EEXIST) {
      const auto now = contents(git_, ref_, 4096);
      if (now && trimmed(*now) == commit_) return std::nullopt;
      return refusal("branch " + branch_ +
                     " has come into being meanwhile: give another one as "
                     "branch, or delete that one");
    }
    if (error) return trouble(ref_);
    if (fsync(parent.get()) < 0) return trouble(ref_);
    return std::nullopt;
  }

  // Directories at and below `path` that hold nothing but such.
  void remove_empty(const std::string& path, int depth) {
    const int fd = open_below(git_, path, O_RDONLY | O_DIRECTORY);
    DIR* dir = fd < 0 ? nullptr : fdopendir(fd);
    if (dir == nullptr) {
      if (fd >= 0) close(fd);
      return;
    }
    std::vector<std::string> children;
    while (const dirent* entry = readdir(dir)) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") children.push_back(name);
    }
    closedir(dir);
    for (const std::string& child : children) {
      if (depth < 32) remove_empty(path + "/" + child, depth + 1);
    }
    const std::size_t slash = path.rfind('/');
    const Fd parent(
        open_below(git_, path.substr(0, slash), O_RDONLY | O_DIRECTORY));
    if (parent) {
      unlinkat(parent.get(), path.c_str() + slash + 1, AT_REMOVEDIR);
    }
  }

  const std::string branch_, ref_, commit_, old_;
  const bool check_only_;
  int git_ = -1;
  mode_t dir_mode_ = 0755;
};

enum : int { kDone = 0, kRefused = 10, kTrouble = 11, kMoved = 12 };

}  // namespace

// in := ("check" | "land") \n branch \n commit \n [old \n]
int land_handler(int in_fd, int out_fd) {
  std::string text;
  char buffer[4096];
  for (;;) {
    const ssize_t n = read(in_fd, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    text.append(buffer, static_cast<std::size_t>(n));
    if (text.size() > 8192) return kTrouble;
  }
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  if (lines.size() == 3) lines.emplace_back();
  if (lines.size() != 4 || !branch_problem(lines[1]).empty() ||
      !is_commit_name(lines[2]) ||
      (!lines[3].empty() && !is_commit_name(lines[3]))) {
    return kTrouble;
  }
  const auto stop =
      Lander(lines[1], lines[2], lines[3], lines[0] == "check").run();
  if (!stop) return kDone;
  (void)!write(out_fd, stop->why.data(), stop->why.size());
  return stop->trouble ? kTrouble : stop->moved ? kMoved : kRefused;
}

// --- the worker's side ---

namespace {

Landed land(const std::string& branch, const std::string& old,
            const std::string& commit, const std::string& bundle,
            const Checkout& base, bool check_only, const Attempt& attempt,
            Host& host, Millis left_ms) {
  Landed out;
  const auto broken = [&](EndCode code, const std::string& message) {
    const Usage usage = out.end.usage;
    out.how = Landed::How::failed;
    out.end = failed(code, "land: " + message);
    out.end.usage = usage;
    return out;
  };
  const auto refused = [&](const std::string& why) {
    out.how = Landed::How::refused;
    out.reason = why;
    return out;
  };
  sandbox::SessionSpec spec;
  spec.role = sandbox::Role::land;
  spec.limits = attempt.limits;
  spec.min_level = attempt.required;
  spec.repo = base.repo;
  auto session = host.open(spec);
  if (!session) return broken(EndCode::sandbox, session.error().what);
  sandbox::Watch watch = host.watch();
  watch.on_output = nullptr;
  if (!check_only) {
    if (auto put = (*session)->put(kPack, pack_of(bundle)); !put) {
      return broken(code_of_put(put.error()), put.error().what);
    }
    sandbox::Step verify;
    verify.argv = {"/bin/sh", "-c",   std::string(kAlive) + kVerifyScript,
                   "land",    commit, base.commit};
    verify.timeout_ms = left_ms;
    const auto ran = (*session)->run(verify, watch);
    out.end.usage.add(ran);
    if (const EndCode code = code_of(ran.ended); code != EndCode::none) {
      return broken(code, describe(ran, attempt.limits, left_ms));
    }
    if (ran.exit_code == 3) {
      return refused("the repository no longer has the base " + base.commit +
                     ": submit the patch again for a commit that is there");
    }
    if (ran.exit_code != 0) {
      return broken(code_of_git(ran), "git exited with " +
                                          std::to_string(ran.exit_code) + ": " +
                                          git_said(ran.err, base.repo));
    }
  }
  sandbox::Step link;
  link.builtin = kLandHandler;
  link.stdin_data =
      (check_only ? "check\n" : "land\n") + branch + "\n" + commit + "\n";
  if (!old.empty()) link.stdin_data += old + "\n";
  link.timeout_ms = left_ms;
  const auto ran = (*session)->run(link, watch);
  out.end.usage.add(ran);
  if (const EndCode code = code_of(ran.ended); code != EndCode::none) {
    return broken(code, describe(ran, attempt.limits, left_ms));
  }
  out.moved = ran.exit_code == kMoved;
  if (ran.exit_code == kRefused || out.moved) return refused(ran.out);
  if (ran.exit_code != kDone) return broken(EndCode::sandbox, ran.out);
  out.how = Landed::How::done;
  return out;
}

}  // namespace

Landed land_branch(const std::string& branch, const std::string& commit,
                   const std::string& bundle, const Checkout& base,
                   bool check_only, const Attempt& attempt, Host& host,
                   Millis left_ms) {
  return land(branch, "", commit, bundle, base, check_only, attempt, host,
              left_ms);
}

Landed move_branch(const std::string& branch, const std::string& old,
                   const std::string& commit, const std::string& bundle,
                   const Checkout& base, const Attempt& attempt, Host& host,
                   Millis left_ms) {
  return land(branch, old, commit, bundle, base, false, attempt, host, left_ms);
}

}  // namespace machina::kinds
