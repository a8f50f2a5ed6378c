#include "team.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tarflow::native {
namespace {

constexpr double kWorthSharing = 20e3;          // multiplications: about a microsecond, which is what sharing costs
constexpr double kLong = 1e8;  // multiplications: in tens of milliseconds a thread that was put aside has its turn again
constexpr auto kSpin = std::chrono::microseconds(50);      // then a thread sleeps: longer than any pause in a step
constexpr double kPutAside = 100e3, kSlow = 0.3;  // nanoseconds that no unit takes, but for so many a multiplication
constexpr std::uint32_t kLeastAlone = 256;  // works: some milliseconds; twice as many each time

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Part {
  std::uint32_t number;
  std::uint16_t next, stop;
};

std::uint64_t packed(Part part) {
  return std::uint64_t{part.number} << 32 | std::uint64_t{part.next} << 16 | std::uint64_t{part.stop};
}

Part part_of(std::uint64_t word) {
  return {static_cast<std::uint32_t>(word >> 32), static_cast<std::uint16_t>(word >> 16),
          static_cast<std::uint16_t>(word)};
}

}  // namespace

Team::Team(int threads) : threads_(threads), ranges_(static_cast<std::size_t>(threads)) {
  others_.reserve(ranges_.size());
  try {
    for (int thread = 1; thread < threads; ++thread) others_.emplace_back([this, thread] { serve(thread); });
  } catch (...) {
    end();  // those that were started
    throw;
  }
}

Team::~Team() { end(); }

void Team::end() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  for (std::thread& other : others_) other.join();
}

void Team::share(std::int64_t units, double cost, Call call, const void* work) {
  const bool alone = alone_ > 0 && cost < kLong;
  if (threads_ == 1 || units < 2 || cost < kWorthSharing || alone) {
    if (alone) --alone_;
    for (std::int64_t unit = 0; unit < units; ++unit) call(work, unit, 0);
    return;
  }
  call_.store(call, std::memory_order_relaxed);
  work_.store(work, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  const std::uint32_t number = number_.load(std::memory_order_relaxed) + 1;
  for (int thread = 0; thread < threads_; ++thread) {
    const Part part = {number, static_cast<std::uint16_t>(units * thread / threads_),
                       static_cast<std::uint16_t>(units * (thread + 1) / threads_)};
    ranges_[static_cast<std::size_t>(thread)].word.store(packed(part), std::memory_order_release);
  }
  number_.store(number, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) > 0) {
    { const std::lock_guard<std::mutex> lock(mutex_); }  // whoever is about to sleep has looked, or will be woken
    wake_.notify_all();
  }
  take_part(number, 0);
  wait_for_others(static_cast<std::uint32_t>(units), kPutAside + kSlow * cost / static_cast<double>(units));
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Units from one's own range, then from the others'. A unit that was taken keeps the work what it is: whoever asked waits.
void Team::take_part(std::uint32_t number, int thread) {
  for (int i = 0; i < threads_; ++i) {
    std::atomic<std::uint64_t>& word = ranges_[static_cast<std::size_t>((thread + i) % threads_)].word;
    std::uint64_t seen = word.load(std::memory_order_acquire);
    for (Part part = part_of(seen); part.number == number && part.next < part.stop; part = part_of(seen)) {
      Part taken = part;
      ++taken.next;
      if (!word.compare_exchange_weak(seen, packed(taken), std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      try {
        call_.load(std::memory_order_relaxed)(work_.load(std::memory_order_relaxed), part.next, thread);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
      seen = word.load(std::memory_order_acquire);
    }
  }
}

// `patience` in nanoseconds: a thread that takes longer for its last unit was put aside.
void Team::wait_for_others(std::uint32_t units, double patience) {
  const std::chrono::duration<double, std::nano> most(patience);
  const auto begun = std::chrono::steady_clock::now();
  bool put_aside = false;
  for (int i = 1; done_.load(std::memory_order_acquire) != units; ++i) {
    pause();
    if (i % 64 != 0 || std::chrono::steady_clock::now() - begun < most) continue;
    put_aside = true;
    std::this_thread::yield();  // perhaps it waits for this core
  }
  if (put_aside) {
    impatience_ = std::min<std::uint32_t>(impatience_ + 1, 6);
    alone_ = kLeastAlone << impatience_;
  } else if (number_.load(std::memory_order_relaxed) % 1024 == 0 && impatience_ > 0) {
    --impatience_;
  }
}

bool Team::wait_for_work(std::uint32_t seen) {
  const auto begun = std::chrono::steady_clock::now();
  for (int i = 1;; ++i) {
    if (number_.load(std::memory_order_acquire) != seen) return true;
    if (ending_.load(std::memory_order_relaxed)) return false;
    pause();
    if (i % 64 == 0 && std::chrono::steady_clock::now() - begun > kSpin) break;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1, std::memory_order_seq_cst);
  wake_.wait(lock, [&] { return number_.load(std::memory_order_seq_cst) != seen || ending_; });
  asleep_.fetch_sub(1, std::memory_order_relaxed);
  return !ending_;
}

void Team::serve(int thread) {
  std::uint32_t seen = 0;
  while (wait_for_work(seen)) {
    seen = number_.load(std::memory_order_acquire);
    take_part(seen, thread);
  }
}

}  // namespace tarflow::native
