// One thread that computes what waits. Requests share a batch if they ask for the same guidance.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <tarflow.hpp>
#include <thread>
#include <vector>

#include "job.hpp"
#include "metrics.hpp"

class Batcher {
 public:
  Batcher(tarflow::Flow& flow, const Settings& settings, Metrics& metrics);
  ~Batcher();

  // Waits for the samples, until the job's deadline and as long as its client does; then the work is given up. Throws
  // Refusal.
  void run(const std::shared_ptr<Job>& job);

  std::size_t waiting();

 private:
  void work();
  void take();
  void draw();
  void finish(int status, const std::string& error);
  bool nobody_waits() const;

  tarflow::Flow& flow_;
  const Settings& settings_;
  Metrics& metrics_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Job>> waiting_;
  std::vector<std::shared_ptr<Job>> running_;
  bool stopping_ = false;
  std::thread worker_;  // last: it uses the rest
};
