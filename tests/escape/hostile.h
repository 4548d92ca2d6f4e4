// tests/escape/hostile.h
//
// Hostile acts, run as a program inside the sandbox: this test's own binary is
// put into the workspace and started there with the act's name. An act says
// what it got, and exits 0 when it was contained.

#pragma once

#include <string>
#include <vector>

namespace machina::escape {

// What the outside planted for the act to find.
struct Bait {
  std::string secret;    // a file that only the worker's uid may read
  std::string writable;  // a directory anybody may write to
  std::string abstract;  // an abstract socket's name
  std::string path;      // a Unix socket's path
  int port = 0;          // a listener on the host's loopback
  int worker = 0;        // the worker's pid
};

std::vector<std::string> act_names();
// `argv` after "--act": name, then the bait's members.
int act_main(int argc, char** argv);
std::vector<std::string> to_words(const Bait& bait);

}  // namespace machina::escape
