#include "workers/kinds/fields.h"

#include <algorithm>

#include "queue/base/hex.h"
#include "queue/base/json.h"
#include "queue/base/utf8.h"
#include "workers/kinds/run.h"

namespace machina::kinds {
namespace {

std::string shortened(const std::string& text, std::size_t bytes) {
  if (text.size() <= bytes) return text;
  return std::string(utf8_head(text, bytes - 3)) + "...";
}

std::string shown(const nlohmann::json& value) {
  std::string text =
      value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return shortened(std::move(text), 80);
}

bool is_control(char c) {
  const auto byte = static_cast<unsigned char>(c);
  return byte < 0x20 || byte == 0x7F;
}

bool has_control(const std::string& text) {
  return std::any_of(text.begin(), text.end(), is_control);
}

// In the order of directories: what lies below "a" follows "a" at once.
bool before_as_path(const std::string& a, const std::string& b) {
  const auto rank = [](char c) {
    return c == '/' ? -1 : static_cast<int>(static_cast<unsigned char>(c));
  };
  return std::lexicographical_compare(
      a.begin(), a.end(), b.begin(), b.end(),
      [&](char x, char y) { return rank(x) < rank(y); });
}

bool has_nul(const std::string& text) {
  return text.find('\0') != std::string::npos;
}

}  // namespace

// By the server's own reader: what it refuses would cost the other ends of a
// batch theirs.
bool whole_json(std::string_view text) { return !JsonDoc().parse(text); }

std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (is_control(c)) {
      out += "\\u00";
      out += kHexDigits[static_cast<unsigned char>(c) >> 4];
      out += kHexDigits[c & 15];
    } else {
      out += c;
    }
  }
  return shortened(std::move(out), 200);
}

Fields::Fields(const std::string& json)
    : object_(nlohmann::json::parse(json, nullptr, false)) {
  if (object_.is_discarded()) {
    error_ = BadField{"payload", "not JSON"};
  } else if (!object_.is_object()) {
    error_ = BadField{"payload", shown(object_) + " is not an object"};
  }
  if (error_) object_ = nlohmann::json::object();
}

Fields::Fields(const nlohmann::json& object, std::string prefix)
    : object_(object), prefix_(std::move(prefix)) {
  if (object_.is_object()) return;
  const std::string name = prefix_.substr(0, prefix_.size() - 1);
  error_ = BadField{name, shown(object_) + " is not an object"};
  object_ = nlohmann::json::object();
}

void Fields::only(std::initializer_list<std::string_view> names) {
  for (const auto& item : object_.items()) {
    if (std::find(names.begin(), names.end(), item.key()) == names.end()) {
      fail(item.key(), "not a member of this kind's payload");
      return;
    }
  }
}

bool Fields::has(const char* name) const { return find(name) != nullptr; }

bool Fields::is_null(const char* name) const {
  const nlohmann::json* value = find(name);
  return value != nullptr && value->is_null();
}

void Fields::fail(const std::string& field, const std::string& what) {
  if (!error_) error_ = BadField{prefix_ + printable(field), what};
}

const nlohmann::json* Fields::find(const char* name) const {
  const auto at = object_.find(name);
  return at == object_.end() ? nullptr : &*at;
}

std::string Fields::text(const char* name, std::size_t bytes_max,
                         const std::string& absent) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return absent;
  if (!value->is_string()) {
    fail(name, shown(*value) + " is not a string");
    return absent;
  }
  const auto& text = value->get_ref<const std::string&>();
  if (text.size() > bytes_max) {
    fail(name, std::to_string(text.size()) + " bytes; at most " +
                   std::to_string(bytes_max));
  }
  return text;
}

bool Fields::flag(const char* name, bool absent) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return absent;
  if (!value->is_boolean()) {
    fail(name, shown(*value) + " is not true or false");
    return absent;
  }
  return value->get<bool>();
}

std::int64_t Fields::number(const char* name, std::int64_t least,
                            std::int64_t most, std::int64_t absent) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return absent;
  const bool fits =
      value->is_number_integer() && (!value->is_number_unsigned() ||
                                     value->get<std::uint64_t>() <= INT64_MAX);
  if (!fits || value->get<std::int64_t>() < least ||
      value->get<std::int64_t>() > most) {
    const std::string_view field = name;
    fail(name, shown(*value) + " is not an integer in " +
                   std::to_string(least) + ".." + std::to_string(most) +
                   (field.ends_with("_ms")      ? " ms"
                    : field.ends_with("_bytes") ? " bytes"
                    : field.ends_with("_mb")    ? " MB"
                                                : ""));
    return absent;
  }
  return value->get<std::int64_t>();
}

std::vector<std::string> Fields::list(const std::string& field,
                                      const nlohmann::json& value,
                                      std::size_t count_max,
                                      std::size_t bytes_max) {
  std::vector<std::string> out;
  if (!value.is_array()) {
    fail(field, shown(value) + " is not a list of strings");
    return out;
  }
  if (value.size() > count_max) {
    fail(field, std::to_string(value.size()) + " items; at most " +
                    std::to_string(count_max));
    return out;
  }
  for (const auto& item : value) {
    const std::string where = field + "[" + std::to_string(out.size()) + "]";
    if (!item.is_string()) {
      fail(where, shown(item) + " is not a string");
      return out;
    }
    const auto& text = item.get_ref<const std::string&>();
    if (text.size() > bytes_max) {
      fail(where, std::to_string(text.size()) + " bytes; at most " +
                      std::to_string(bytes_max));
    }
    if (has_nul(text)) fail(where, "holds a NUL character");
    out.push_back(text);
  }
  return out;
}

std::vector<std::string> Fields::texts(const char* name, std::size_t count_max,
                                       std::size_t bytes_max) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return {};
  return list(name, *value, count_max, bytes_max);
}

std::vector<std::vector<std::string>> Fields::commands(const char* name,
                                                       std::size_t count_max) {
  std::vector<std::vector<std::string>> out;
  const nlohmann::json* value = find(name);
  if (value == nullptr) return out;
  if (!value->is_array() || value->size() > count_max) {
    fail(name, shown(*value) + " is not a list of at most " +
                   std::to_string(count_max) + " commands");
    return out;
  }
  for (const auto& item : *value) {
    const std::string where =
        std::string(name) + "[" + std::to_string(out.size()) + "]";
    out.push_back(list(where, item, kArgumentsMax, kArgumentBytesMax));
    if (out.back().empty() || out.back()[0].empty()) {
      fail(where, "a command needs a program to run");
    }
  }
  return out;
}

std::vector<std::pair<std::string, std::string>> Fields::map(
    const char* name, std::size_t count_max, std::size_t bytes_max) {
  std::vector<std::pair<std::string, std::string>> out;
  const nlohmann::json* value = find(name);
  if (value == nullptr) return out;
  if (!value->is_object()) {
    fail(name, shown(*value) + " is not an object of strings");
    return out;
  }
  if (value->size() > count_max) {
    fail(name, std::to_string(value->size()) + " members; at most " +
                   std::to_string(count_max));
    return out;
  }
  for (const auto& item : value->items()) {
    const std::string where = std::string(name) + "." + item.key();
    if (!item.value().is_string()) {
      fail(where, shown(item.value()) + " is not a string");
      return out;
    }
    const auto& text = item.value().get_ref<const std::string&>();
    if (text.size() > bytes_max) {
      fail(where, std::to_string(text.size()) + " bytes; at most " +
                      std::to_string(bytes_max));
    }
    out.emplace_back(item.key(), text);
  }
  return out;
}

Fields Fields::object(const char* name) {
  const nlohmann::json* value = find(name);
  return Fields(value == nullptr ? nlohmann::json::object() : *value,
                prefix_ + name + ".");
}

std::vector<Fields> Fields::objects(const char* name, std::size_t count_max) {
  std::vector<Fields> out;
  const nlohmann::json* value = find(name);
  if (value == nullptr) return out;
  if (!value->is_array()) {
    fail(name, shown(*value) + " is not a list of objects");
    return out;
  }
  if (value->size() > count_max) {
    fail(name, std::to_string(value->size()) + " items; at most " +
                   std::to_string(count_max));
    return out;
  }
  for (const auto& item : *value) {
    out.emplace_back(item,
                     prefix_ + name + "[" + std::to_string(out.size()) + "].");
  }
  return out;
}

void Fields::at_most(const char* name, std::size_t bytes_max) {
  const nlohmann::json* value = find(name);
  if (value == nullptr) return;
  const std::size_t size =
      value->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
          .size();
  if (size > bytes_max) {
    fail(name,
         std::to_string(size) + " bytes; at most " + std::to_string(bytes_max));
  }
}

void Fields::finite(const char* name) {
  const nlohmann::json* value = find(name);
  if (value != nullptr && !value->is_number()) {
    fail(name, shown(*value) + " is not a number");
  }
}

void Fields::take_error(const Fields& part) {
  if (!error_) error_ = part.error_;
}

Checked<void> Fields::done() const {
  if (!error_) return {};
  return *error_;
}

bool safe_relative_path(std::string_view path) {
  if (path.empty() || path.size() > kPathBytesMax || path.front() == '/' ||
      path.find('\0') != std::string_view::npos) {
    return false;
  }
  while (!path.empty()) {
    const std::size_t slash = path.find('/');
    const std::string_view part = path.substr(0, slash);
    if (part.empty() || part == "." || part == ".." || part.size() > 255) {
      return false;
    }
    if (slash == std::string_view::npos) return true;
    path.remove_prefix(slash + 1);
  }
  return false;  // ends with a slash
}

std::vector<std::string> environment(Fields& fields, const char* name) {
  std::vector<std::string> out;
  for (const auto& [key, value] :
       fields.map(name, kVariablesMax, kVariableBytesMax)) {
    bool good =
        !key.empty() && key.size() <= 128 && !(key[0] >= '0' && key[0] <= '9');
    for (const char c : key) {
      good = good && ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                      (c >= '0' && c <= '9') || c == '_');
    }
    if (!good) {
      fields.fail(std::string(name) + "." + key,
                  "a variable's name is [A-Za-z_][A-Za-z0-9_]*, at most 128 "
                  "bytes");
    }
    if (has_nul(value)) {
      fields.fail(std::string(name) + "." + key, "holds a NUL character");
    }
    out.push_back(key + "=" + value);
  }
  return out;
}

std::vector<std::pair<std::string, std::string>> files(Fields& fields,
                                                       const char* name) {
  auto out = fields.map(name, kFilesMax, 1 << 20);
  const std::string prefix = std::string(name) + ".";
  std::vector<std::string> paths;
  for (const auto& [path, text] : out) {
    if (has_control(path)) {
      fields.fail(prefix + path, "a file's name holds no control characters");
    } else if (!safe_relative_path(path)) {
      fields.fail(prefix + path,
                  "a file's name is a relative path without . and .., at most "
                  "1024 bytes");
    }
    paths.push_back(path);
  }
  std::sort(paths.begin(), paths.end(), before_as_path);
  for (std::size_t i = 1; i < paths.size(); ++i) {
    const std::string& file = paths[i - 1];
    if (paths[i].size() > file.size() && paths[i].starts_with(file) &&
        paths[i][file.size()] == '/') {
      fields.fail(prefix + file, "is a file and also the directory of \"" +
                                     printable(paths[i]) + "\"");
    }
  }
  return out;
}

std::string directory(Fields& fields, const char* name) {
  const std::string path = fields.text(name, kPathBytesMax);
  if (path.empty() || path == ".") return "";
  if (!safe_relative_path(path)) {
    fields.fail(name, "\"" + printable(path) +
                          "\" is not a relative path without . and .. inside "
                          "the workspace");
  }
  return path;
}

}  // namespace machina::kinds
