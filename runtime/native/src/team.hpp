// Threads that share the parts of one piece of work, and that nobody has to wait for.
//
// A piece of work is cut into units; each thread has its own range of them, which keeps a range's weights near one core,
// and takes from the others' when it is through. Whoever asked works too: a thread that the system has put aside costs
// nothing, but for a unit that it had begun. When that has happened, the team works without it for a while.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace tarflow::native {

class Team {
 public:
  explicit Team(int threads);  // throws std::system_error where the machine starts no more of them
  ~Team();  // joins its threads
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // work(unit, thread) for each unit below `units`, the caller being thread 0. Work worth less than waking others
  // (`cost` in multiplications) is done by the caller alone. Throws what a unit threw, once no other is being worked on.
  // One caller at a time.
  template <class Work>
  void run(std::int64_t units, double cost, const Work& work) {
    constexpr std::int64_t kMost = 0xffff;  // a range counts in sixteen bits
    for (std::int64_t first = 0; first < units; first += kMost) {
      const auto part = [&](std::int64_t unit, int thread) { work(first + unit, thread); };
      const auto call = [](const void* what, std::int64_t unit, int thread) {
        (*static_cast<decltype(&part)>(what))(unit, thread);
      };
      share(units - first < kMost ? units - first : kMost, cost, call, &part);
    }
  }

 private:
  using Call = void (*)(const void* work, std::int64_t unit, int thread);
  struct alignas(64) Range {
    std::atomic<std::uint64_t> word{0};  // number of the work (32 bits), next unit (16), and the unit to stop at (16)
  };

  void share(std::int64_t units, double cost, Call call, const void* work);
  void serve(int thread);
  bool wait_for_work(std::uint32_t seen);
  void take_part(std::uint32_t number, int thread);
  void wait_for_others(std::uint32_t units, double patience);
  void end();

  const int threads_;
  std::vector<Range> ranges_;
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> work_{nullptr};
  alignas(64) std::atomic<std::uint32_t> number_{0};  // of the work
  alignas(64) std::atomic<std::uint32_t> done_{0};    // units
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<bool> ending_{false};
  std::uint32_t alone_ = 0, impatience_ = 0;  // how many works are still done alone; how often that was for the better
  std::mutex mutex_;                          // of sleeping, and of failure_
  std::exception_ptr failure_;                // the first of a work
  std::condition_variable wake_;
  std::vector<std::thread> others_;
};

}  // namespace tarflow::native
