// The verbs about the whole: scale and stats.

#include <iostream>
#include <nlohmann/json.hpp>

#include "tools/cli/cli.h"

namespace machina::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string plain(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  return value.is_null() ? "" : value.dump();
}

bool is_table(const Json& value) {
  return value.is_array() && !value.empty() && value[0].is_object();
}

// Nested members as dotted names, arrays of objects as tables of their own.
void flatten(const Json& value, const std::string& prefix, Table* lines,
             std::vector<std::pair<std::string, Json>>* tables) {
  for (const auto& [name, member] : value.items()) {
    std::string full = prefix.empty() ? name : prefix + "." + name;
    if (member.is_object()) {
      flatten(member, full, lines, tables);
    } else if (is_table(member)) {
      tables->emplace_back(full, member);
    } else {
      lines->add({full, plain(member)});
    }
  }
}

void show_table(const std::string& name, const Json& rows) {
  std::vector<std::string> head;
  for (const auto& [column, unused] : rows[0].items()) head.push_back(column);
  Table table(head);
  for (const auto& row : rows) {
    std::vector<std::string> cells;
    for (const auto& column : head) {
      cells.push_back(row.contains(column) ? plain(row[column]) : "");
    }
    table.add(std::move(cells));
  }
  std::cout << "\n" << name << "\n" << table.text();
}

int show(const Settings& settings, const std::string& body) {
  Json answer = Json::parse(body, nullptr, false);
  if (!answer.is_object()) return fail(kRefused, "the answer is not an object");
  if (settings.json) {
    std::cout << harmless_json(answer.dump()) << "\n";
    return kOk;
  }
  Table lines({"NAME", "VALUE"});
  std::vector<std::pair<std::string, Json>> tables;
  flatten(answer, "", &lines, &tables);
  std::cout << lines.text();
  for (const auto& [name, rows] : tables) show_table(name, rows);
  return kOk;
}

int ask_and_show(const Settings& settings, const Client::Request& request) {
  int exit = kOk;
  Asked asked = ask(settings, request, &exit);
  return asked.ok ? show(settings, asked.answer.body) : exit;
}

}  // namespace

void add_operator_verbs(Verb& app) {
  auto settings = std::make_shared<Settings>();
  Verb stats = app.add_verb("stats", "Show queues and counters");
  add_client_settings(stats, settings);
  stats.run([settings] {
    Client::Request request;
    request.path = "/stats";
    return ask_and_show(*settings, request);
  });

  auto scaling = std::make_shared<Settings>();
  auto count = std::make_shared<int>(0);
  Verb scale = app.add_verb("scale", "Set the number of workers");
  scale.add_option("count", *count, "0..64").required().range(0, 64);
  add_client_settings(scale, scaling);
  scale.run([scaling, count] {
    Client::Request request;
    request.method = "PUT";
    request.path = "/v1/workers/scale";
    request.body = "{\"count\":" + std::to_string(*count) + "}";
    return ask_and_show(*scaling, request);
  });
}

}  // namespace machina::cli
