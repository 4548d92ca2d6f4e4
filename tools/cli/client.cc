#include "tools/cli/client.h"

#include <curl/curl.h>
#include <dlfcn.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <type_traits>

#include "server/auth/signature.h"
#include "tools/config.h"
#include "tools/root.h"
#include "tools/trust.h"

namespace machina::cli {
namespace {

constexpr long kConnectMs = 3000;

bool is_socket(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0 && S_ISSOCK(status.st_mode);
}

// What is known of a socket to which connect() failed with `error`.
std::string why_no_socket(const std::string& path, int error) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0) {
    return error == EAGAIN
               ? "the server takes no connection now; it has no descriptor "
                 "left, or too much to do"
               : "nobody listens there";
  }
  return errno == EACCES ? "its directory is closed to this user"
                         : "there is none";
}

// Which server is meant. What was set nearest to the user counts (command
// line, environment, file), and never another: a server that was named and is
// not there is an error, not a reason to speak to somebody else's. Set equally
// near, --server comes before --root, and that before the address.
Result<std::string> server_of(const Config& config) {
  const auto near = [&](const char* name) {
    return config.values().find(name)->second.nearness();
  };
  const int address = std::max(near("MACHINA_HOST"), near("MACHINA_PORT"));
  const int root = near("MACHINA_ROOT");
  const int server = near("MACHINA_SERVER");
  if (server > 0 && server >= std::max(root, address)) {
    // The rest of a shell variable that is not set. It names no server, and
    // somebody meant one.
    if (config.typed().server.empty()) {
      return Error{Code::invalid,
                   "MACHINA_SERVER (" +
                       config.values().find("MACHINA_SERVER")->second.origin +
                       "): it is empty; name a server (--server) or its root "
                       "(--root), or leave it out"};
    }
    return config.typed().server;
  }
  const std::string socket = root_socket(config.typed().root);
  const bool by_root = root > 0 && root >= address;
  // Nobody named anything: the root that `machina serve` takes here, if it is
  // there, else its address.
  if (by_root || (address == 0 && is_socket(socket))) return socket;
  if (config.typed().port == 0) {
    return Error{Code::invalid,
                 "MACHINA_PORT: 0 names no server's port; name the server's "
                 "root (--root) or address (--server)"};
  }
  return url_of(config.typed().host, config.typed().port);
}

std::size_t take_body(char* bytes, std::size_t size, std::size_t count,
                      void* to) {
  auto* answer = static_cast<Client::Answer*>(to);
  if (answer->body.size() + size * count > kAnswerBytesMax) return 0;
  answer->body.append(bytes, size * count);
  return size * count;
}

std::size_t take_header(char* bytes, std::size_t size, std::size_t count,
                        void* to) {
  auto* answer = static_cast<Client::Answer*>(to);
  std::string line(bytes, size * count);
  std::size_t colon = line.find(':');
  if (line.starts_with("HTTP/")) answer->headers.clear();  // after a 100
  if (colon != std::string::npos) {
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) {
      return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32)
                                  : static_cast<char>(c);
    });
    std::size_t first = line.find_first_not_of(" \t", colon + 1);
    std::size_t last = line.find_last_not_of(" \t\r\n");
    answer->headers[name] = first == std::string::npos || last < first
                                ? ""
                                : line.substr(first, last - first + 1);
  }
  return size * count;
}

bool never_arrived(CURLcode code) {
  return code == CURLE_COULDNT_CONNECT || code == CURLE_COULDNT_RESOLVE_HOST ||
         code == CURLE_URL_MALFORMAT || code == CURLE_UNSUPPORTED_PROTOCOL ||
         code == CURLE_COULDNT_RESOLVE_PROXY;
}

// What stands in the request line for `url`.
std::string path_of(const std::string& url) {
  std::size_t slash = url.find('/', url.find("://") + 3);
  return slash == std::string::npos ? "/" : url.substr(slash);
}

}  // namespace

std::vector<std::string> signature_headers(const std::string& secret,
                                           const std::string& method,
                                           const std::string& path,
                                           const std::string& body) {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  std::string ts =
      std::to_string(std::int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000);
  std::string nonce = random_nonce();
  HexDigest hex =
      Signer(secret).sign({ts, nonce, method, path}, Sha256::of(body));
  return {"X-Machina-Ts: " + ts, "X-Machina-Nonce: " + nonce,
          "X-Machina-Signature: " + std::string(kSignaturePrefix) +
              std::string(hex.data(), hex.size())};
}

namespace {

// libcurl, loaded when a verb first speaks HTTP: it and the thirty libraries
// behind it take 12 ms, for which no start of a server or worker should wait.
struct Library {
  decltype(&::curl_global_init) global_init = nullptr;
  decltype(&::curl_easy_init) init = nullptr;
  decltype(&::curl_easy_cleanup) cleanup = nullptr;
  decltype(&::curl_easy_reset) reset = nullptr;
  decltype(&::curl_easy_setopt) set = nullptr;
  decltype(&::curl_easy_perform) perform = nullptr;
  decltype(&::curl_easy_getinfo) info = nullptr;
  decltype(&::curl_easy_strerror) text = nullptr;
  decltype(&::curl_slist_append) append = nullptr;
  decltype(&::curl_slist_free_all) free_all = nullptr;
  std::string problem;  // empty: all of it is there

  Library() {
    void* library = ::dlopen("libcurl.so.4", RTLD_NOW | RTLD_LOCAL);
    bool all = library != nullptr;
    auto find = [&](auto* function, const char* name) {
      if (!all) return;
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(
          ::dlsym(library, name));
      all = *function != nullptr;
    };
    find(&global_init, "curl_global_init");
    find(&init, "curl_easy_init");
    find(&cleanup, "curl_easy_cleanup");
    find(&reset, "curl_easy_reset");
    find(&set, "curl_easy_setopt");
    find(&perform, "curl_easy_perform");
    find(&info, "curl_easy_getinfo");
    find(&text, "curl_easy_strerror");
    find(&append, "curl_slist_append");
    find(&free_all, "curl_slist_free_all");
    if (!all) {
      const char* why = ::dlerror();
      problem = std::string("libcurl.so.4 cannot be loaded (") +
                (why != nullptr ? why : "?") + "); install libcurl4";
    } else if (global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK) {
      problem = "libcurl did not start";
    }
  }
};

const Library& curl() {
  static const Library library;
  return library;
}

}  // namespace

struct Client::Curl {
  CURL* handle = curl().init();
  ~Curl() { curl().cleanup(handle); }
};

Client::~Client() = default;

Result<std::unique_ptr<Client>> Client::open(const Config& config) {
  if (!curl().problem.empty()) return Error{Code::io, curl().problem};
  std::unique_ptr<Client> client(new Client);
  client->curl_ = std::make_unique<Curl>();
  if (client->curl_->handle == nullptr) {
    return Error{Code::io, "libcurl gave no handle"};
  }
  client->token_ = config.typed().api_token;
  client->secret_ = config.typed().api_hmac_secret;

  auto named = server_of(config);
  if (!named) return named.error();
  std::string server = std::move(*named);
  if (server.starts_with("unix:")) server = server.substr(5);
  if (server.starts_with("/")) {
    if (server.size() > kSocketPathBytesMax) {
      return Error{Code::invalid, "--server: \"" + server + "\" has " +
                                      std::to_string(server.size()) +
                                      " bytes, a socket's path has at most " +
                                      std::to_string(kSocketPathBytesMax)};
    }
    // Who could put another socket there would be sent the token.
    if (auto ok = check_trusted("the server's socket", server, true); !ok) {
      return ok.error();
    }
    client->socket_ = server;
    client->base_ = "http://localhost";
  } else if (server.starts_with("http://") || server.starts_with("https://")) {
    while (server.ends_with('/')) server.pop_back();
    client->base_ = server;
  } else {
    return Error{Code::invalid, "--server: \"" + server +
                                    "\" must be http://HOST:PORT or the "
                                    "absolute path of a socket"};
  }
  client->where_ = server;
  return client;
}

Result<Client::Answer> Client::call(const Request& request) {
  CURL* handle = curl_->handle;
  const Library& lib = curl();
  lib.reset(handle);
  auto set = [&](CURLoption option, auto value) {
    lib.set(handle, option, value);
  };
  std::string url = base_ + request.path;
  Answer answer;
  char why[CURL_ERROR_SIZE] = "";
  set(CURLOPT_URL, url.c_str());
  set(CURLOPT_PATH_AS_IS, 1L);
  set(CURLOPT_PROTOCOLS_STR, "http,https");
  set(CURLOPT_NOPROXY, "*");
  set(CURLOPT_NOSIGNAL, 1L);
  set(CURLOPT_ERRORBUFFER, &why[0]);
  set(CURLOPT_CONNECTTIMEOUT_MS, kConnectMs);
  set(CURLOPT_TIMEOUT_MS, request.timeout_ms);
  set(CURLOPT_WRITEFUNCTION, &take_body);
  set(CURLOPT_WRITEDATA, &answer);
  set(CURLOPT_HEADERFUNCTION, &take_header);
  set(CURLOPT_HEADERDATA, &answer);
  if (!socket_.empty()) {
    set(CURLOPT_UNIX_SOCKET_PATH, socket_.c_str());
  }
  set(CURLOPT_CUSTOMREQUEST, request.method.c_str());
  if (request.method != "GET") {
    set(CURLOPT_POSTFIELDS, request.body.data());
    set(CURLOPT_POSTFIELDSIZE_LARGE,
        static_cast<curl_off_t>(request.body.size()));
  }
  curl_slist* headers = nullptr;
  for (const auto& header : request.headers) {
    headers = lib.append(headers, header.c_str());
  }
  if (request.method != "GET") {
    headers = lib.append(headers, "Content-Type: application/json");
    headers = lib.append(headers, "Expect:");
  }
  if (!token_.empty()) {
    headers = lib.append(headers, ("Authorization: Bearer " + token_).c_str());
  }
  if (!secret_.empty() && socket_.empty()) {
    for (const auto& header :
         signature_headers(secret_, request.method, path_of(url),
                           request.method == "GET" ? "" : request.body)) {
      headers = lib.append(headers, header.c_str());
    }
  }
  set(CURLOPT_HTTPHEADER, headers);
  CURLcode code = lib.perform(handle);
  lib.info(handle, CURLINFO_RESPONSE_CODE, &answer.status);
  lib.free_all(headers);
  if (code == CURLE_OK) return answer;
  if (code == CURLE_COULDNT_CONNECT && !socket_.empty()) {
    // What libcurl says is of the host in the URL, which nobody asked for.
    long why_not = 0;
    lib.info(handle, CURLINFO_OS_ERRNO, &why_not);
    return Error{Code::unavailable,
                 "cannot reach the socket " + socket_ + ": " +
                     why_no_socket(socket_, static_cast<int>(why_not))};
  }
  std::string what = *why != '\0' ? why : lib.text(code);
  return Error{never_arrived(code) ? Code::unavailable : Code::io,
               where_ + ": " + what};
}

std::string url_of(const std::string& host, int port) {
  std::string to = host;
  // One that listens everywhere is asked here.
  if (to == "0.0.0.0") to = "127.0.0.1";
  if (to == "::" || to == "[::]") to = "::1";
  if (to.find(':') != std::string::npos && to[0] != '[') to = "[" + to + "]";
  return "http://" + to + ":" + std::to_string(port);
}

std::string url_escape(const std::string& text) {
  constexpr char kHex[] = "0123456789ABCDEF";
  std::string out;
  for (unsigned char c : text) {
    bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                 (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' ||
                 c == '~';
    if (plain) {
      out += static_cast<char>(c);
    } else {
      out += {'%', kHex[c >> 4], kHex[c & 15]};
    }
  }
  return out;
}

}  // namespace machina::cli
