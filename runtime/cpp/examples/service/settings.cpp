#include "settings.hpp"

#include <cstdlib>
#include <iostream>

Settings read_arguments(int argc, char** argv) {
  Settings settings;
  const auto usage = [&](const std::string& what) {
    std::cerr << "service: " << what << "\nusage: " << argv[0]
              << " BUNDLE [--port N] [--queue N] [--batch N] [--timeout-ms N] [--threads N]\n";
    std::exit(2);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      if (!settings.bundle.empty()) usage("two bundles are named");
      settings.bundle = word;
      continue;
    }
    char* end = nullptr;
    const long value = ++i < argc ? std::strtol(argv[i], &end, 10) : -1;
    if (i >= argc || end == argv[i] || *end != '\0' || value < 0 || value > 1000000) usage(word + " needs a number");
    if (word == "--port" && value < 65536)
      settings.port = static_cast<int>(value);
    else if (word == "--queue" && value > 0 && value <= 1024)
      settings.queue = static_cast<std::size_t>(value);
    else if (word == "--batch" && value > 0)
      settings.batch = static_cast<std::size_t>(value);
    else if (word == "--timeout-ms" && value > 0)
      settings.timeout_ms = static_cast<int>(value);
    else if (word == "--threads")
      settings.threads = static_cast<int>(value);
    else
      usage(word + " " + std::to_string(value) + " is not understood");
  }
  if (settings.bundle.empty()) usage("no bundle is named");
  return settings;
}
