// What the command line says.
#pragma once

#include <cstddef>
#include <string>

struct Settings {
  std::string bundle;
  int port = 8080;
  std::size_t queue = 64;  // requests waiting
  std::size_t batch = 64;  // samples computed together
  int timeout_ms = 30000;
  int threads = 0;
};

// Ends the process with a sentence on what is wrong.
Settings read_arguments(int argc, char** argv);
