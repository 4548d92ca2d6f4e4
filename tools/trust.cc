#include "tools/trust.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <deque>
#include <set>

namespace machina {
namespace {

constexpr int kLinksMax = 40;  // as the kernel

void push_components(const std::string& path, std::deque<std::string>* to) {
  std::deque<std::string> parts;
  for (std::size_t at = 0; at < path.size();) {
    std::size_t end = std::min(path.find('/', at), path.size());
    if (end > at) parts.push_back(path.substr(at, end - at));
    at = end + 1;
  }
  to->insert(to->begin(), parts.begin(), parts.end());
}

std::string parent_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == 0 || slash == std::string::npos ? "/" : path.substr(0, slash);
}

std::string mode_text(mode_t mode) {
  char text[8];
  std::snprintf(text, sizeof text, "%04o", mode & 07777);
  return text;
}

class Walk {
 public:
  Walk(const std::string& what, const std::string& path, bool of_others,
       bool mode_of_file)
      : what_(what), path_(path), mode_of_file_(mode_of_file) {
    trusted_ = {0, ::geteuid()};
    struct stat status {};
    // Within a user namespace root's files may show another owner.
    if (::lstat("/", &status) == 0) trusted_.insert(status.st_uid);
    if (!of_others || ::geteuid() != 0) return;
    // T3: of what is there, or of the directory where it would be.
    std::string there = path;
    while (::stat(there.c_str(), &status) != 0) {
      if (there.find('/') == std::string::npos || there == "/") return;
      there = parent_of(there);
    }
    trusted_.insert(status.st_uid);
  }

  Result<void> run() {
    std::string whole = path_;
    char cwd[4096];
    if (!whole.starts_with('/')) {
      if (::getcwd(cwd, sizeof cwd) == nullptr) return {};
      whole = std::string(cwd) + "/" + whole;
    }
    push_components(whole, &left_);
    std::string at = "/";
    if (auto ok = look(at); !ok) return ok;
    while (!left_.empty()) {
      const std::string name = left_.front();
      left_.pop_front();
      if (name == ".") continue;
      if (name == "..") {
        at = parent_of(at);
        continue;
      }
      const std::string next = (at == "/" ? "" : at) + "/" + name;
      struct stat status {};
      if (::lstat(next.c_str(), &status) != 0) return {};  // T4
      if (!S_ISLNK(status.st_mode)) {
        at = next;
        if (auto ok = look(at); !ok) return ok;
        continue;
      }
      if (auto ok = check_owner(next, status, "a symbolic link"); !ok) {
        return ok;
      }
      std::string target(4096, '\0');
      const ssize_t n = ::readlink(next.c_str(), target.data(), target.size());
      if (n <= 0 || ++links_ > kLinksMax) return {};  // T4
      target.resize(static_cast<std::size_t>(n));
      if (target[0] == '/') at = "/";
      push_components(target, &left_);
    }
    return {};
  }

 private:
  Result<void> look(const std::string& at) {
    struct stat status {};
    if (::lstat(at.c_str(), &status) != 0) return {};
    const bool directory = S_ISDIR(status.st_mode);
    if (auto ok = check_owner(at, status, directory ? "a directory" : "a file");
        !ok) {
      return ok;
    }
    const bool shared = (status.st_mode & 022) != 0;
    const bool judged = directory ? (status.st_mode & S_ISVTX) == 0
                                  : mode_of_file_ && S_ISREG(status.st_mode);
    if (!shared || !judged) return {};
    return refuse(at, "may be written by others (mode " +
                          mode_text(status.st_mode) +
                          (directory ? "), who could put something else below "
                                       "it: chmod go-w "
                                     : "): chmod go-w ") +
                          at + ", or name another path");
  }

  Result<void> check_owner(const std::string& at, const struct stat& status,
                           const std::string& kind) {
    if (trusted_.count(status.st_uid) != 0) return {};
    return refuse(at, "is " + kind + " that belongs to uid " +
                          std::to_string(status.st_uid) + " (mode " +
                          mode_text(status.st_mode) +
                          "), who could lead elsewhere; it must belong to root "
                          "or to uid " +
                          std::to_string(::geteuid()) +
                          ": chown it, or name another path");
  }

  Error refuse(const std::string& at, const std::string& why) {
    return Error{Code::invalid, what_ + ": \"" + path_ + "\"" +
                                    (at == path_ ? " " : ": " + at + " ") +
                                    why};
  }

  const std::string what_, path_;
  const bool mode_of_file_;
  std::set<uid_t> trusted_;
  std::deque<std::string> left_;
  int links_ = 0;
};

}  // namespace

Result<void> check_trusted(const std::string& what, const std::string& path,
                           bool of_others, bool mode_of_file) {
  return Walk(what, path, of_others, mode_of_file).run();
}

}  // namespace machina
