// sign: the headers that sign one request, for curl and for scripts.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "tools/cli/cli.h"

namespace machina::cli {
namespace {

// What an artifact may have; larger is no request's body.
constexpr std::size_t kBodyBytesMax = 64u << 20;

struct Given {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string method, path, body;
};

// TEXT, @FILE or @- as curl's --data-binary takes them: each byte counts.
Result<std::string> body_of(const std::string& text) {
  if (!text.starts_with('@')) return text;
  std::string name = text.substr(1);
  std::ifstream file;
  if (name != "-") {
    file.open(name, std::ios::binary);
    if (!file) return Error{Code::invalid, "--body: cannot read " + name};
  }
  std::istream& in = name == "-" ? std::cin : file;
  std::string bytes;
  char piece[65536];
  while (in.read(piece, sizeof piece) || in.gcount() > 0) {
    bytes.append(piece, static_cast<std::size_t>(in.gcount()));
    if (bytes.size() > kBodyBytesMax) {
      return Error{Code::invalid, "--body: more than " +
                                      std::to_string(kBodyBytesMax) +
                                      " bytes; no request takes more"};
    }
  }
  if (in.bad()) return Error{Code::invalid, "--body: cannot read " + name};
  return bytes;
}

int sign(const Given& given) {
  std::string method = given.method;
  std::transform(method.begin(), method.end(), method.begin(),
                 [](unsigned char c) {
                   return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32)
                                               : static_cast<char>(c);
                 });
  static constexpr std::string_view kMethods[] = {"GET", "POST", "PUT",
                                                  "DELETE", "HEAD"};
  if (std::find(std::begin(kMethods), std::end(kMethods), method) ==
      std::end(kMethods)) {
    return fail(kUsage, "METHOD: \"" + harmless(given.method) +
                            "\" is none; GET, POST, PUT, DELETE or HEAD");
  }
  // A whole URL is as good as its path.
  std::string path = given.path;
  if (path.starts_with("http://") || path.starts_with("https://")) {
    std::size_t slash = path.find('/', path.find("://") + 3);
    path = slash == std::string::npos ? "/" : path.substr(slash);
  }
  bool visible = std::all_of(path.begin(), path.end(), [](unsigned char c) {
    return c > 0x20 && c < 0x7f && c != '#';
  });
  if (!path.starts_with('/') || !visible) {
    return fail(kUsage, "PATH: \"" + harmless(given.path) +
                            "\" must be the path with its query, as curl "
                            "sends it, such as /v1/jobs?limit=10");
  }
  auto body = body_of(given.body);
  if (!body) return fail(kUsage, body.error().what);
  auto config = load(*given.settings);
  if (!config) return kUsage;
  for (const auto& line : config->open_secrets()) {
    std::cerr << "warning: " << line << "\n";
  }
  const std::string& secret = config->typed().api_hmac_secret;
  if (secret.empty()) {
    return fail(kUsage,
                "there is no secret: set MACHINA_API_HMAC_SECRET or "
                "MACHINA_API_HMAC_SECRET_FILE, or give --secret-file FILE");
  }
  nlohmann::ordered_json all;
  for (const auto& header : signature_headers(secret, method, path, *body)) {
    std::size_t colon = header.find(": ");
    all[header.substr(0, colon)] = header.substr(colon + 2);
    if (!given.settings->json) std::cout << header << "\n";
  }
  if (given.settings->json) std::cout << all.dump() << "\n";
  return kOk;
}

}  // namespace

void add_sign(Verb& app) {
  auto given = std::make_shared<Given>();
  Verb verb = app.add_verb(
      "sign",
      "Print the headers that sign a request: curl -H @<(machina sign "
      "...)");
  verb.add_option("method", given->method, "GET, POST, PUT or DELETE")
      .required();
  verb.add_option("path", given->path, "with its query, as it is sent")
      .required();
  verb.add_option("--body", given->body, "TEXT, @FILE or @-: the bytes sent")
      .shown_as("BODY");
  add_setting(verb, given->settings, "--secret-file",
              "MACHINA_API_HMAC_SECRET_FILE",
              "else MACHINA_API_HMAC_SECRET or ..._FILE");
  add_common(verb, given->settings);
  verb.run([given] { return sign(*given); });
}

}  // namespace machina::cli
