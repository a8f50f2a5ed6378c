// Threads of the native engine: every unit once, whoever does it; nothing lost, nothing left running.
#include "team.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "support.hpp"
#include "synthetic.hpp"

using tarflow::native::Team;

namespace {

constexpr double kWorthIt = 1e6;  // multiplications: more than it costs to share them

}  // namespace

TEST_SUITE_BEGIN("threads");

TEST_CASE("each unit of a work is done once, before the work is over, by whatever threads there are") {
  for (const int threads : {1, 2, 3, 5}) {
    Team team(threads);
    std::vector<int> done(70000);  // not atomic: no two threads may meet in one
    int expected = 0;
    for (int round = 0; round < 300; ++round) {
      const std::int64_t units = round == 7 ? 70000 : 1 + round * 7 % 50;  // more than a range counts, once
      std::atomic<int> strangers{0};
      team.run(units, kWorthIt, [&](std::int64_t unit, int thread) {
        ++done[static_cast<std::size_t>(unit)];
        if (thread < 0 || thread >= threads) ++strangers;
      });
      expected += 1;
      REQUIRE(strangers == 0);
      REQUIRE(done[0] == expected);
      REQUIRE(std::all_of(done.begin(), done.begin() + units, [](int times) { return times > 0; }));
    }
    std::int64_t all = 0, wanted = 70000 - (1 + 7 * 7 % 50);
    for (const int times : done) all += times;
    for (int round = 0; round < 300; ++round) wanted += 1 + round * 7 % 50;
    CHECK(all == wanted);
  }
}

TEST_CASE("a work sees what the one before it wrote, also when threads have gone to sleep between them") {
  Team team(3);
  std::vector<std::int64_t> numbers(64, 1), next(64);
  for (int round = 0; round < 40; ++round) {
    if (round % 10 == 9) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    team.run(64, kWorthIt, [&](std::int64_t unit, int) {
      const auto i = static_cast<std::size_t>(unit);
      next[i] = (numbers[i] + numbers[(i + 1) % 64]) % 1000003;
    });
    numbers.swap(next);
  }
  std::vector<std::int64_t> alone(64, 1);
  for (int round = 0; round < 40; ++round) {
    for (std::size_t i = 0; i < 64; ++i) next[i] = (alone[i] + alone[(i + 1) % 64]) % 1000003;
    alone.swap(next);
  }
  CHECK(numbers == alone);
}

TEST_CASE("what a unit throws reaches who asked, when no other is being worked on, and the team goes on") {
  Team team(3);
  for (int round = 0; round < 50; ++round) {
    std::vector<int> done(30);
    const auto work = [&](std::int64_t unit, int) {
      if (unit % 10 == round % 10) throw std::runtime_error("unit");
      ++done[static_cast<std::size_t>(unit)];
    };
    CHECK_THROWS_WITH(team.run(30, kWorthIt, work), "unit");
    const int before = std::accumulate(done.begin(), done.end(), 0);
    team.run(30, kWorthIt, [&](std::int64_t unit, int) { ++done[static_cast<std::size_t>(unit)]; });
    CHECK(std::accumulate(done.begin(), done.end(), 0) == before + 30);
  }
}

TEST_CASE("after a thread was put aside, what is short is done without it, and what is long still with it") {
  Team team(2);
  std::atomic<int> begun{0};
  const auto meet = [&] {  // both threads, or ten seconds
    ++begun;
    for (int i = 0; begun < 2 && i < 10000; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return begun == 2;
  };
  team.run(2, kWorthIt, [&](std::int64_t, int thread) {
    meet();
    if (thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  });
  int strangers = 0;
  team.run(2, kWorthIt, [&](std::int64_t, int thread) { strangers += thread; });
  CHECK(strangers == 0);
  begun = 0;
  std::atomic<int> met{0};
  team.run(2, 1e9, [&](std::int64_t, int) { met += meet(); });
  CHECK(met == 2);
}

TEST_CASE("teams come and go, idle, asleep or never used") {
  for (int round = 0; round < 50; ++round) {
    Team team(1 + round % 4);
    if (round % 3 == 0) continue;
    std::atomic<int> sum{0};
    team.run(20, kWorthIt, [&](std::int64_t unit, int) { sum += static_cast<int>(unit); });
    CHECK(sum == 190);
    if (round % 3 == 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST_CASE("several callers decode with one model at once, to the bits of one") {
  const synthetic::Shape& shape = synthetic::kOdd;
  const std::string weights = synthetic::weights(shape);
  const std::vector<std::int32_t> precisions(2, TARFLOW_NATIVE_INT16);
  tarflow_native_model* model = nullptr;
  REQUIRE(tarflow_native_open(weights.data(), weights.size(), &shape, precisions.data(), 2, 0, &model) == 0);
  std::vector<std::vector<float>> found(4);
  {
    std::vector<std::thread> callers;
    for (std::vector<float>& mine : found)
      callers.emplace_back([&] { mine = synthetic::samples(model, shape, {2, 3, true, 1}); });
    for (std::thread& caller : callers) caller.join();
  }
  const std::vector<float> alone = synthetic::samples(model, shape, {2, 3, true, 1});
  REQUIRE(!alone.empty());
  for (const std::vector<float>& mine : found) CHECK(mine == alone);
  tarflow_native_close(model);
}

TEST_CASE("handles of one bundle draw natively at the same time, and one of them is cancelled") {
  tarflow::OpenOptions options;
  options.provider = "native";
  options.threads = 2;
  tarflow::Flow flow(TARFLOW_DEMO, options);
  tarflow::SampleOptions how;
  how.denoise = 0;
  const std::vector<std::int64_t> labels(9, 5);
  const std::vector<float> expected = flow.sample(labels, how);
  std::atomic<int> equal{0}, cancelled{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&, i, mine = std::make_shared<tarflow::Flow>(flow.share())] {
      tarflow::SampleOptions own = how;
      own.user = mine.get();
      if (i == 2)
        own.progress = [](void* user, std::int64_t done, std::int64_t, int, int) {
          if (done == 20) static_cast<tarflow::Flow*>(user)->cancel();
          return 0;
        };
      for (int k = 0; k < 3; ++k) {
        try {
          equal += mine->sample(labels, own) == expected;
        } catch (const tarflow::Error& error) {
          cancelled += error.status == TARFLOW_CANCELLED;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(equal == 6);
  CHECK(cancelled == 3);
}

TEST_SUITE_END();
