// A request: what it asks for, how to tell that it is done, and what came of it.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <tarflow.hpp>
#include <vector>

#include "settings.hpp"

using Clock = std::chrono::steady_clock;

// An answer that is not samples.
struct Refusal {
  int code;
  std::string message;
};

// Wakes a thread that waits in poll().
class Bell {
 public:
  Bell() : file_(eventfd(0, EFD_CLOEXEC)) {
    if (file_ < 0) throw Refusal{503, "too many files are open; raise ulimit -n, or lower --queue"};
  }
  ~Bell() { close(file_); }
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;
  void ring() const { eventfd_write(file_, 1); }
  int file() const { return file_; }

 private:
  const int file_;
};

struct Job {
  std::vector<std::int64_t> labels;
  std::uint64_t seed = 0, index = 0;
  double guidance = 0;
  bool raw = false;
  Clock::time_point deadline;
  int connection = -1;                   // its client's socket
  Bell bell;                             // rings when it is done
  bool done = false, abandoned = false;  // guarded by the batcher's mutex; what follows is the asker's once done
  int status = TARFLOW_OK;
  std::string error;
  std::vector<float> images;
};

// The job that a request's body describes. Throws Refusal.
std::shared_ptr<Job> read_job(const std::string& body, const Settings& settings, const tarflow_shape& shape);
