// Turns on what serves one call at a time, given up by calls that are cancelled while they wait.
#pragma once

#include <condition_variable>
#include <mutex>

#include "call.hpp"

namespace tarflow::internal {

class Turns {
 public:
  // A call that waits here wakes when it is cancelled. `this` must outlive the call's use of its backend.
  void prepare(Call& call) {
    call.interrupt = [this] {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }  // or a call could look just before, and sleep just after
      changed_.notify_all();
    };
  }

 private:
  friend class Turn;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool taken_ = false;
};

// A call's turn, from its beginning to its end. Throws Cancelled instead of waiting on.
class Turn {
 public:
  Turn(Turns& turns, const Call& call) : turns_(turns) {
    std::unique_lock<std::mutex> lock(turns.mutex_);
    turns.changed_.wait(lock, [&] { return call.cancelled() || !turns.taken_; });
    if (call.cancelled()) throw Cancelled();
    turns.taken_ = true;
  }
  ~Turn() {
    {
      const std::lock_guard<std::mutex> lock(turns_.mutex_);
      turns_.taken_ = false;
    }
    turns_.changed_.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  Turns& turns_;
};

}  // namespace tarflow::internal
