// What was done so far, for whoever watches.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

struct Metrics {
  std::atomic<std::uint64_t> samples{0}, batches{0}, batched{0}, timeouts{0}, hangups{0}, nonfinite{0}, microseconds{0};
  std::mutex mutex;
  std::map<int, std::uint64_t> answers;  // by HTTP code

  void answered(int code) {
    const std::lock_guard<std::mutex> lock(mutex);
    ++answers[code];
  }
};

// In Prometheus' text format; `waiting` requests are in the queue.
std::string page_of(Metrics& metrics, std::size_t waiting);
