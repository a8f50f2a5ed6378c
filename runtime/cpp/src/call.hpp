// One call of a handle: what it may be cancelled by, and memory that is handed from one block's cache to the next.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>

#include "error.hpp"

namespace tarflow::internal {

// A backend that can end a running operator from another thread sets `interrupt`, and `resume` to undo it.
class Call {
 public:
  void begin() {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ = true;
    cancelled_ = false;
    if (resume) resume();
  }

  void end() {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ = false;
  }

  // From any thread.
  void cancel() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!running_) return;
    cancelled_ = true;
    if (interrupt) interrupt();
  }

  bool cancelled() const { return cancelled_; }

  // Throws Cancelled if it was.
  void check() const {
    if (cancelled_) throw Cancelled();
  }

  std::function<void()> interrupt, resume;  // set once, before the first call
  std::shared_ptr<void> engine;             // the backend's own part of a call
  std::unique_ptr<std::byte[]> memory[2];
  std::size_t memory_size[2] = {0, 0};

 private:
  std::mutex mutex_;
  bool running_ = false;
  std::atomic<bool> cancelled_{false};
};

}  // namespace tarflow::internal
