#include "workers/http_client.h"

#include <curl/curl.h>

#include <atomic>
#include <mutex>

namespace machina {
namespace {

// Connections are handed over connected, so the path is never opened; it makes
// libcurl skip the resolver and treat the descriptor as a Unix socket.
constexpr char kNoPath[] = "/machina.sock";
constexpr char kUrlBase[] = "http://machina";

std::size_t on_body(char* data, std::size_t one, std::size_t count,
                    void* into) {
  auto& body = *static_cast<std::string*>(into);
  if (body.size() + one * count > HttpClient::kReplyBytesMax) return 0;
  body.append(data, one * count);
  return one * count;
}

curl_socket_t on_open(void* self, curlsocktype, curl_sockaddr*) {
  const auto& connect = *static_cast<HttpClient::Connect*>(self);
  const Result<int> fd = connect();
  return fd ? *fd : CURL_SOCKET_BAD;
}

int on_opened(void*, curl_socket_t, curlsocktype) {
  return CURL_SOCKOPT_ALREADY_CONNECTED;
}

void global_init() {
  static std::once_flag once;
  std::call_once(once, [] { curl_global_init(CURL_GLOBAL_NOTHING); });
}

}  // namespace

struct HttpClient::State {
  Connect connect;
  CURLM* multi = nullptr;
  CURL* easy = nullptr;
  std::atomic<bool> interrupted{false};
};

HttpClient::HttpClient(Connect connect) : state_(std::make_unique<State>()) {
  global_init();
  state_->connect = std::move(connect);
  state_->multi = curl_multi_init();
  state_->easy = curl_easy_init();
  curl_multi_setopt(state_->multi, CURLMOPT_MAXCONNECTS, 1L);
}

HttpClient::~HttpClient() {
  curl_easy_cleanup(state_->easy);
  curl_multi_cleanup(state_->multi);
}

Result<HttpClient::Reply> HttpClient::post(const std::string& path,
                                           std::string_view json,
                                           Millis timeout_ms) {
  return send("POST", path, json, "application/json", timeout_ms);
}

Result<HttpClient::Reply> HttpClient::send(const char* method,
                                           const std::string& path,
                                           std::string_view bytes,
                                           const char* type,
                                           Millis timeout_ms) {
  CURL* easy = state_->easy;
  Reply reply;
  const std::string url = kUrlBase + path;
  curl_slist* headers = curl_slist_append(nullptr, "Expect:");
  headers = curl_slist_append(headers,
                              ("Content-Type: " + std::string(type)).c_str());
  curl_easy_reset(easy);  // keeps the connection
  curl_easy_setopt(easy, CURLOPT_URL, url.c_str());
  curl_easy_setopt(easy, CURLOPT_UNIX_SOCKET_PATH, kNoPath);
  curl_easy_setopt(easy, CURLOPT_PROXY, "");
  curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http");
  curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, CURL_HTTP_VERSION_1_1);
  curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, on_open);
  curl_easy_setopt(easy, CURLOPT_OPENSOCKETDATA, &state_->connect);
  curl_easy_setopt(easy, CURLOPT_SOCKOPTFUNCTION, on_opened);
  curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, static_cast<long>(timeout_ms));
  curl_easy_setopt(easy, CURLOPT_HTTPHEADER, headers);
  curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
  curl_easy_setopt(easy, CURLOPT_WRITEDATA, &reply.body);
  curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, method);
  curl_easy_setopt(easy, CURLOPT_POST, 1L);
  curl_easy_setopt(easy, CURLOPT_POSTFIELDS, bytes.empty() ? "" : bytes.data());
  curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE_LARGE,
                   static_cast<curl_off_t>(bytes.size()));

  curl_multi_add_handle(state_->multi, easy);
  CURLcode code = CURLE_OK;
  int running = 1;
  while (running > 0 && !state_->interrupted) {
    if (curl_multi_perform(state_->multi, &running) != CURLM_OK) {
      code = CURLE_FAILED_INIT;
      break;
    }
    if (running > 0) {
      curl_multi_poll(state_->multi, nullptr, 0, 1000, nullptr);
    }
  }
  int left = 0;
  while (CURLMsg* message = curl_multi_info_read(state_->multi, &left)) {
    if (message->msg == CURLMSG_DONE) code = message->data.result;
  }
  long status = 0;
  curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
  // An unfinished transfer's connection is closed here: the server sees it.
  curl_multi_remove_handle(state_->multi, easy);
  curl_slist_free_all(headers);
  if (running > 0 && state_->interrupted) {
    return Error{Code::conflict, std::string(method) + " interrupted"};
  }
  if (code != CURLE_OK) {
    return Error{Code::unavailable, std::string(method) + " " + path + ": " +
                                        curl_easy_strerror(code)};
  }
  reply.status = static_cast<int>(status);
  return reply;
}

void HttpClient::interrupt() {
  state_->interrupted = true;
  curl_multi_wakeup(state_->multi);
}

void HttpClient::resume() { state_->interrupted = false; }

}  // namespace machina
