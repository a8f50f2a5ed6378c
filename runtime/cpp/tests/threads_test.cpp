#include <atomic>
#include <chrono>
#include <thread>

#include "support.hpp"
#include "tensorrt/turn.hpp"

using support::failure;

TEST_SUITE_BEGIN("threads");

TEST_CASE("handles that share weights draw at the same time, and the same") {
  tarflow::OpenOptions options;
  options.threads = 1;
  tarflow::Flow flow(TARFLOW_DEMO, options);
  tarflow::SampleOptions how;
  how.reproducible = 1;
  how.seed = 2;
  const std::vector<std::int64_t> labels(3, 5);
  const std::vector<float> expected = flow.sample(labels, how);
  std::vector<std::thread> threads;
  std::atomic<int> equal{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, mine = std::make_shared<tarflow::Flow>(flow.share())] {
      for (int k = 0; k < 3; ++k) equal += mine->sample(labels, how) == expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(equal == 12);
}

TEST_CASE("a second call meanwhile is told that the handle is busy") {
  tarflow::Flow flow(TARFLOW_DEMO);
  struct Shared {
    tarflow::Flow* flow;
    int status = 0;
  } shared{&flow};
  tarflow::SampleOptions how;
  how.user = &shared;
  how.progress = [](void* user, std::int64_t done, std::int64_t, int, int) {
    auto* to = static_cast<Shared*>(user);
    if (done == 1) {
      std::thread([to] { to->status = failure([to] { to->flow->noise(0, 0, 1); }).status; }).join();
    }
    return 0;
  };
  flow.sample({1}, how);
  CHECK(shared.status == TARFLOW_BUSY);
}

TEST_CASE("cancel ends the running call within a step, and only that") {
  tarflow::Flow flow(TARFLOW_DEMO);
  flow.cancel();  // nothing runs, nothing happens
  CHECK_NOTHROW(flow.sample({1}));
  struct Seen {
    tarflow::Flow* flow;
    std::atomic<std::int64_t> done{0};
  } seen{&flow};
  tarflow::SampleOptions how;
  how.user = &seen;
  how.progress = [](void* user, std::int64_t done, std::int64_t, int, int) {
    auto* to = static_cast<Seen*>(user);
    to->done = done;
    if (done == 20) to->flow->cancel();  // from a callback
    return 0;
  };
  CHECK(failure([&] { flow.sample({1, 2}, how); }).status == TARFLOW_CANCELLED);
  CHECK(seen.done == 20);
  int cancelled = 0;
  for (int i = 0; i < 10; ++i) {  // from another thread, at any moment: encoding and denoising too
    how.progress = nullptr;
    how.certify = 1;
    std::atomic<bool> ended{false};
    std::thread canceller([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5 * i));
      while (!ended) flow.cancel();
    });
    try {
      flow.sample(std::vector<std::int64_t>(64, 1), how);
    } catch (const tarflow::Error& error) {
      CHECK(error.status == TARFLOW_CANCELLED);
      ++cancelled;
    }
    ended = true;
    canceller.join();
  }
  CHECK(cancelled > 0);
  CHECK_NOTHROW(flow.sample({1}));
}

TEST_CASE("after another thread's cancel at most one more step is told of") {
  tarflow::Flow flow(TARFLOW_DEMO);
  std::atomic<std::int64_t> done{0};
  tarflow::SampleOptions how;
  how.user = &done;
  how.batch_size = 1;
  how.progress = [](void* user, std::int64_t step, std::int64_t, int, int) {
    *static_cast<std::atomic<std::int64_t>*>(user) = step;
    return 0;
  };
  for (int i = 0; i < 5; ++i) {
    done = 0;
    std::int64_t at_cancel = 0;
    std::thread canceller([&] {
      while (done < 20 * i + 10) std::this_thread::yield();
      flow.cancel();
      at_cancel = done;
    });
    const auto found = failure([&] { flow.sample(std::vector<std::int64_t>(5000, 1), how); });  // 300,000 steps
    canceller.join();
    CHECK(found.status == TARFLOW_CANCELLED);
    CHECK(at_cancel >= 20 * i + 10);
    CHECK(done - at_cancel <= 1);  // one may have been between its check and its callback
  }
}

TEST_CASE("a call that waits for its turn ends when it is cancelled, and the turn goes on") {
  using namespace tarflow::internal;
  Turns turns;
  Call first, second, third;
  for (Call* call : {&first, &second, &third}) {
    turns.prepare(*call);
    call->begin();
  }
  auto turn = std::make_unique<Turn>(turns, first);
  std::atomic<int> cancelled{0}, entered{0};
  const auto waiting = [&](const Call& call) {
    try {
      const Turn mine(turns, call);
      ++entered;
    } catch (const Cancelled&) {
      ++cancelled;
    }
  };
  std::thread one(waiting, std::cref(second)), other(waiting, std::cref(third));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  second.cancel();
  one.join();  // would wait for ever: the turn is still the first's
  CHECK(cancelled == 1);
  CHECK(entered == 0);
  turn.reset();
  other.join();
  CHECK(entered == 1);
  second.end();
  second.begin();  // its next call is not cancelled
  waiting(second);
  CHECK(entered == 2);
}

TEST_SUITE_END();
