#include "tests/support/sim_storage.h"

#include <algorithm>
#include <utility>

namespace machina {
namespace {

constexpr std::uint64_t kSector = 512;

std::string dir_of(const std::string& name) {
  auto slash = name.rfind('/');
  return slash == std::string::npos ? "." : name.substr(0, slash);
}

std::string plain(std::string_view dir) {
  return dir.empty() ? "." : std::string(dir);
}

}  // namespace

std::uint64_t SeededRandom::next() {
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

struct SimStorage::Node {
  std::vector<std::byte> cache, disk;
  std::set<std::uint64_t> dirty;  // sectors in which they differ
};

// `name` now means `node` (null: nothing); a rename is two of these at once.
struct SimStorage::NameChange {
  std::string dir;
  std::vector<std::pair<std::string, std::shared_ptr<Node>>> set;
};

class SimStorage::SimLock : public Lock {
 public:
  SimLock(SimStorage& storage, std::string name)
      : storage_(storage), name_(std::move(name)), life_(storage.life_) {}
  ~SimLock() override {
    std::lock_guard hold(storage_.mutex_);
    if (life_ == storage_.life_) storage_.locks_.erase(name_);
  }

 private:
  SimStorage& storage_;
  std::string name_;
  std::uint64_t life_;
};

class SimStorage::SimFile : public File {
 public:
  SimFile(SimStorage& storage, std::string name, std::shared_ptr<Node> node,
          OpenMode mode)
      : storage_(storage),
        name_(std::move(name)),
        node_(std::move(node)),
        mode_(mode),
        life_(storage.life_) {}

  Result<void> write_at(std::uint64_t offset,
                        std::span<const std::byte> bytes) override {
    std::lock_guard hold(storage_.mutex_);
    if (auto ok = alive(); !ok) return ok;
    if (mode_ == OpenMode::read || mode_ == OpenMode::settled)
      return Error{Code::io, name_ + " is open for reading"};
    bool durable = mode_ == OpenMode::durable;
    if (durable && (offset % 4096 != 0 || bytes.size() % 4096 != 0))
      return Error{Code::io, name_ + ": direct write is not aligned"};
    return storage_.write(*node_, name_, durable, offset, bytes);
  }

  Result<std::size_t> read_at(std::uint64_t offset,
                              std::span<std::byte> bytes) const override {
    std::lock_guard hold(storage_.mutex_);
    if (auto ok = alive(); !ok) return ok.error();
    if (offset >= node_->cache.size()) return std::size_t{0};
    std::size_t n =
        std::min<std::uint64_t>(bytes.size(), node_->cache.size() - offset);
    std::copy_n(node_->cache.begin() + static_cast<std::ptrdiff_t>(offset), n,
                bytes.begin());
    return n;
  }

  Result<void> sync() override {
    std::lock_guard hold(storage_.mutex_);
    if (auto ok = alive(); !ok) return ok;
    return storage_.sync(*node_, name_);
  }

  Result<void> allocate(std::uint64_t bytes) override {
    std::lock_guard hold(storage_.mutex_);
    if (auto ok = alive(); !ok) return ok;
    return storage_.allocate(*node_, name_, bytes);
  }

  Result<std::uint64_t> size() const override {
    std::lock_guard hold(storage_.mutex_);
    if (auto ok = alive(); !ok) return ok.error();
    return std::uint64_t{node_->cache.size()};
  }

  Result<void> truncate(std::uint64_t bytes) override {
    std::lock_guard hold(storage_.mutex_);
    if (auto ok = alive(); !ok) return ok;
    if (auto ok = storage_.step("truncate", name_); !ok) return ok;
    // Kept simple: the log never truncates, so both images do at once.
    node_->cache.resize(bytes);
    node_->disk.resize(std::min<std::uint64_t>(bytes, node_->disk.size()));
    return {};
  }

 private:
  Result<void> alive() const {
    if (storage_.killed_ || storage_.stale(life_))
      return Error{Code::io, name_ + ": the process was killed"};
    return {};
  }

  SimStorage& storage_;
  std::string name_;
  std::shared_ptr<Node> node_;
  OpenMode mode_;
  std::uint64_t life_;
};

SimStorage::SimStorage(std::uint64_t seed) : random_(seed) {
  dirs_.insert(".");
  disk_dirs_.insert(".");
}
SimStorage::~SimStorage() = default;

void SimStorage::kill_at(std::uint64_t n) { kill_at_ = n; }
void SimStorage::fail_sync_at(std::uint64_t n) { fail_sync_at_ = n; }
void SimStorage::fail_write_at(std::uint64_t n) { fail_write_at_ = n; }
void SimStorage::lose_write_at(std::uint64_t n) { lose_write_at_ = n; }
void SimStorage::set_quota(std::uint64_t bytes) {
  std::lock_guard hold(mutex_);
  quota_ = bytes;
}

// Counts an operation; from the fatal one on, all fail.
Result<void> SimStorage::step(const char* what, const std::string& name) {
  if (killed_) return Error{Code::io, name + ": the process was killed"};
  if (++operations_ == kill_at_) {
    killed_ = true;
    return Error{Code::io, std::string(what) + " " + name +
                               ": the process was killed here"};
  }
  return {};
}

Result<void> SimStorage::write(Node& node, const std::string& name,
                               bool durable, std::uint64_t offset,
                               std::span<const std::byte> bytes) {
  auto alive = step("write", name);
  ++writes_;
  Result<void> result;
  std::size_t size = bytes.size();
  if (!alive) {
    // The fatal one may have been done in part, or whole.
    result = alive;
    size = random_.below(bytes.size() + 1) / kSector * kSector;
  } else if (writes_ == fail_write_at_) {
    result = Error{Code::io, "cannot write " + name + ": injected EIO"};
  } else {
    std::uint64_t end = offset + bytes.size(), now = node.cache.size();
    std::uint64_t grows = end > now ? end - now : 0;
    if (quota_ != 0 && used() + grows > quota_) {
      result = Error{Code::full, "cannot write " + name + ": injected ENOSPC"};
      size = random_.below(bytes.size() + 1) / kSector * kSector;
    }
  }
  bool failed = !result;
  if (durable && failed) {
    // Which of its sectors reached the disk nobody knows; there is no cache.
    std::size_t at = 0;
    while (at < bytes.size()) {
      std::size_t n = std::min<std::size_t>(kSector, bytes.size() - at);
      if (random_.one_in(2)) {
        std::uint64_t end = offset + at + n;
        if (node.cache.size() < end) node.cache.resize(end);
        std::copy_n(
            bytes.begin() + static_cast<std::ptrdiff_t>(at), n,
            node.cache.begin() + static_cast<std::ptrdiff_t>(offset + at));
      }
      at += n;
    }
    node.disk = node.cache;
    node.dirty.clear();
    return result;
  }
  if (writes_ == lose_write_at_) return result;
  if (offset + size > node.cache.size()) node.cache.resize(offset + size);
  std::copy_n(bytes.begin(), size,
              node.cache.begin() + static_cast<std::ptrdiff_t>(offset));
  std::uint64_t first = offset / kSector, end = offset + size;
  if (durable) {  // whole sectors, and on the disk at once
    if (node.disk.size() < end) node.disk.resize(end);
    std::copy_n(bytes.begin(), size,
                node.disk.begin() + static_cast<std::ptrdiff_t>(offset));
    node.dirty.erase(node.dirty.lower_bound(first),
                     node.dirty.lower_bound((end + kSector - 1) / kSector));
  } else {
    for (std::uint64_t at = first; at * kSector < end; ++at)
      node.dirty.insert(node.dirty.end(), at);
  }
  return result;
}

// All of it or nothing; its zeros are as good as written.
Result<void> SimStorage::allocate(Node& node, const std::string& name,
                                  std::uint64_t bytes) {
  if (auto ok = step("allocate", name); !ok) return ok;
  if (bytes == 0)  // as fallocate(2)
    return Error{Code::io, "cannot allocate " + name + ": Invalid argument"};
  const std::uint64_t now = node.cache.size();
  if (bytes <= now) return {};
  if (quota_ != 0 && used() + bytes - now > quota_)
    return Error{Code::full, "cannot allocate " + name + ": injected ENOSPC"};
  node.cache.resize(bytes);
  for (std::uint64_t at = now / kSector; at * kSector < bytes; ++at)
    node.dirty.insert(at);
  return {};
}

// These sectors reach the disk.
void SimStorage::land(Node& node, std::set<std::uint64_t> sectors) {
  if (sectors.empty()) return;
  std::uint64_t end = std::min<std::uint64_t>((*sectors.rbegin() + 1) * kSector,
                                              node.cache.size());
  if (node.disk.size() < end) node.disk.resize(end);
  for (std::uint64_t sector : sectors) {
    std::uint64_t from = sector * kSector;
    std::uint64_t to =
        std::min<std::uint64_t>(from + kSector, node.cache.size());
    if (from < to)
      std::copy(node.cache.begin() + static_cast<std::ptrdiff_t>(from),
                node.cache.begin() + static_cast<std::ptrdiff_t>(to),
                node.disk.begin() + static_cast<std::ptrdiff_t>(from));
    node.dirty.erase(sector);
  }
}

Result<void> SimStorage::sync(Node& node, const std::string& name) {
  if (auto ok = step("sync", name); !ok) return ok;
  if (++syncs_ == fail_sync_at_) {
    // As ext4: some of it is on the disk, all of it is marked clean, and the
    // next sync will say yes.
    std::set<std::uint64_t> landed;
    for (std::uint64_t sector : node.dirty) {
      if (random_.one_in(2)) landed.insert(sector);
    }
    land(node, landed);
    node.dirty.clear();
    return Error{Code::io, "cannot sync " + name + ": injected EIO"};
  }
  land(node, node.dirty);
  if (node.disk.size() < node.cache.size()) node.disk.resize(node.cache.size());
  return {};
}

// --- names ---

Result<std::unique_ptr<File>> SimStorage::open(std::string_view view,
                                               OpenMode mode) {
  std::lock_guard hold(mutex_);
  std::string name(view);
  if (auto ok = step("open", name); !ok) return ok.error();
  auto it = names_.find(name);
  if (mode == OpenMode::create) {
    if (it != names_.end())
      return Error{Code::io, "cannot open " + name + ": it exists"};
    if (!dirs_.contains(dir_of(name)))
      return Error{Code::not_found, "cannot open " + name + ": no directory"};
    auto node = std::make_shared<Node>();
    names_[name] = node;
    changes_.push_back({dir_of(name), {{name, node}}});
    return std::unique_ptr<File>(new SimFile(*this, name, node, mode));
  }
  if (it == names_.end())
    return Error{Code::not_found, "cannot open " + name + ": no such file"};
  if (mode == OpenMode::settled) {
    if (auto ok = sync(*it->second, name); !ok) return ok.error();
    it->second->cache = it->second->disk;
  }
  return std::unique_ptr<File>(new SimFile(*this, name, it->second, mode));
}

Result<std::vector<std::string>> SimStorage::list(std::string_view view) {
  std::lock_guard hold(mutex_);
  std::string dir = plain(view);
  if (killed_) return Error{Code::io, dir + ": the process was killed"};
  if (!dirs_.contains(dir)) return Error{Code::not_found, "cannot list " + dir};
  std::vector<std::string> found;
  for (const auto& [name, node] : names_) {
    if (dir_of(name) == dir) found.push_back(name.substr(name.rfind('/') + 1));
  }
  return found;
}

Result<void> SimStorage::make_dir(std::string_view view) {
  std::lock_guard hold(mutex_);
  if (auto ok = step("make", std::string(view)); !ok) return ok;
  dirs_.insert(std::string(view));
  return {};
}

Result<void> SimStorage::rename(std::string_view from, std::string_view to) {
  std::lock_guard hold(mutex_);
  std::string old_name(from), new_name(to);
  if (auto ok = step("rename", old_name); !ok) return ok;
  auto it = names_.find(old_name);
  if (it == names_.end())
    return Error{Code::not_found, "cannot rename " + old_name};
  auto node = it->second;
  names_.erase(it);
  names_[new_name] = node;
  changes_.push_back(
      {dir_of(new_name), {{old_name, nullptr}, {new_name, node}}});
  return {};
}

Result<void> SimStorage::exchange(std::string_view one,
                                  std::string_view other) {
  {
    std::lock_guard hold(mutex_);
    auto a = names_.find(std::string(one)), b = names_.find(std::string(other));
    if (a != names_.end() && b != names_.end()) {
      if (auto ok = step("exchange", a->first); !ok) return ok;
      std::swap(a->second, b->second);
      changes_.push_back(
          {dir_of(b->first), {{a->first, a->second}, {b->first, b->second}}});
      return {};
    }
  }
  return rename(one, other);
}

Result<void> SimStorage::remove(std::string_view view) {
  std::lock_guard hold(mutex_);
  std::string name(view);
  if (auto ok = step("remove", name); !ok) return ok;
  if (names_.erase(name) == 0)
    return Error{Code::not_found, "cannot remove " + name};
  changes_.push_back({dir_of(name), {{name, nullptr}}});
  return {};
}

Result<void> SimStorage::sync_dir(std::string_view view) {
  std::lock_guard hold(mutex_);
  std::string dir = plain(view);
  if (auto ok = step("sync directory", dir); !ok) return ok;
  if (++syncs_ == fail_sync_at_)
    return Error{Code::io, "cannot sync " + dir + ": injected EIO"};
  if (dir == ".") disk_dirs_ = dirs_;
  std::vector<NameChange> others;
  for (NameChange& change : changes_) {
    if (change.dir != dir) {
      others.push_back(std::move(change));
      continue;
    }
    for (auto& [name, node] : change.set) {
      if (node) {
        disk_names_[name] = node;
      } else {
        disk_names_.erase(name);
      }
    }
  }
  changes_ = std::move(others);
  return {};
}

Result<std::unique_ptr<Storage::Lock>> SimStorage::lock(std::string_view view) {
  std::lock_guard hold(mutex_);
  std::string name(view);
  if (auto ok = step("lock", name); !ok) return ok.error();
  if (!locks_.insert(name).second)
    return Error{Code::conflict, name + " is locked: another server has it"};
  return std::unique_ptr<Lock>(new SimLock(*this, name));
}

Result<std::uint64_t> SimStorage::free_bytes() {
  std::lock_guard hold(mutex_);
  if (quota_ == 0) return std::uint64_t{1} << 40;
  return quota_ > used() ? quota_ - used() : 0;
}

std::uint64_t SimStorage::used() const {
  std::uint64_t bytes = 0;
  for (const auto& [name, node] : names_) bytes += node->cache.size();
  return bytes;
}

// --- faults ---

void SimStorage::end_life() {
  ++life_;
  locks_.clear();
  killed_ = false;
  kill_at_ = fail_sync_at_ = fail_write_at_ = lose_write_at_ = 0;
}

void SimStorage::restart() {
  std::lock_guard hold(mutex_);
  end_life();
}

void SimStorage::crash() {
  std::lock_guard hold(mutex_);
  end_life();
  lose_names();
  for (auto& [name, node] : disk_names_) {
    // 0: all is lost, 1: all is kept, 2: some of it, 3: the first part.
    std::uint64_t mode = random_.below(4);
    std::uint64_t cut =
        node->dirty.empty() ? 0 : random_.below(node->dirty.size() + 1);
    std::uint64_t nth = 0;
    std::set<std::uint64_t> landed, zeros;
    for (std::uint64_t sector : node->dirty) {
      bool keep = mode == 1 || (mode == 2 && random_.one_in(2)) ||
                  (mode == 3 && nth < cut);
      ++nth;
      if (keep) landed.insert(sector);
      if (!keep && mode == 2 && random_.one_in(4)) zeros.insert(sector);
    }
    land(*node, landed);
    for (std::uint64_t sector : zeros) {
      std::uint64_t from = sector * kSector;
      std::uint64_t to =
          std::min<std::uint64_t>(from + kSector, node->disk.size());
      if (from < to)
        std::fill(node->disk.begin() + static_cast<std::ptrdiff_t>(from),
                  node->disk.begin() + static_cast<std::ptrdiff_t>(to),
                  std::byte{0});
    }
    // The size may have been kept without the bytes.
    if (node->disk.size() < node->cache.size() && random_.one_in(3))
      node->disk.resize(node->cache.size());
    node->cache = node->disk;
    node->dirty.clear();
  }
  names_ = disk_names_;
  dirs_ = disk_dirs_;
}

// A journal keeps the first so many of a directory's changes.
void SimStorage::lose_names() {
  std::map<std::string, std::uint64_t> count, keep;
  for (const NameChange& change : changes_) ++count[change.dir];
  for (const auto& [dir, n] : count) keep[dir] = random_.below(n + 1);
  for (const NameChange& change : changes_) {
    if (keep[change.dir] == 0) continue;
    --keep[change.dir];
    for (const auto& [name, node] : change.set) {
      if (node) {
        disk_names_[name] = node;
      } else {
        disk_names_.erase(name);
      }
    }
  }
  changes_.clear();
  std::erase_if(disk_names_, [this](const auto& entry) {
    return !disk_dirs_.contains(dir_of(entry.first));
  });
}

// --- looking and meddling ---

std::uint64_t SimStorage::operations() const {
  std::lock_guard hold(mutex_);
  return operations_;
}
std::uint64_t SimStorage::syncs() const {
  std::lock_guard hold(mutex_);
  return syncs_;
}
std::uint64_t SimStorage::writes() const {
  std::lock_guard hold(mutex_);
  return writes_;
}
bool SimStorage::killed() const {
  std::lock_guard hold(mutex_);
  return killed_;
}
bool SimStorage::exists(const std::string& name) const {
  std::lock_guard hold(mutex_);
  return names_.contains(name);
}
std::uint64_t SimStorage::bytes_used() const {
  std::lock_guard hold(mutex_);
  return used();
}

std::vector<std::byte> SimStorage::contents(const std::string& name) const {
  std::lock_guard hold(mutex_);
  auto it = names_.find(name);
  return it == names_.end() ? std::vector<std::byte>() : it->second->cache;
}

void SimStorage::flip(const std::string& name, std::uint64_t offset,
                      std::uint8_t mask) {
  std::lock_guard hold(mutex_);
  Node& node = *names_.at(name);
  node.cache.at(offset) ^= std::byte{mask};
  if (offset < node.disk.size()) node.disk.at(offset) ^= std::byte{mask};
}

void SimStorage::overwrite(const std::string& name, std::uint64_t offset,
                           std::span<const std::byte> bytes) {
  std::lock_guard hold(mutex_);
  Node& node = *names_.at(name);
  for (auto* image : {&node.cache, &node.disk}) {
    if (image->size() < offset + bytes.size())
      image->resize(offset + bytes.size());
    std::copy(bytes.begin(), bytes.end(),
              image->begin() + static_cast<std::ptrdiff_t>(offset));
  }
}

std::uint64_t SimStorage::digest() const {
  std::lock_guard hold(mutex_);
  std::uint64_t hash = 0xcbf29ce484222325ULL;  // FNV-1a
  auto mix = [&hash](std::uint8_t byte) {
    hash = (hash ^ byte) * 0x100000001b3ULL;
  };
  for (const auto& [name, node] : names_) {
    for (char c : name) mix(static_cast<std::uint8_t>(c));
    for (std::byte b : node->cache) mix(static_cast<std::uint8_t>(b));
  }
  return hash;
}

}  // namespace machina
