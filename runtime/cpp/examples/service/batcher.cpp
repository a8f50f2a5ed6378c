#include "batcher.hpp"

#include <poll.h>

#include <algorithm>

namespace {

// Until the bell rings or the client hangs up; false when the time is over.
bool wait(const Job& job) {
  pollfd watched[] = {{job.bell.file(), POLLIN, 0}, {job.connection, POLLRDHUP, 0}};
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(job.deadline - Clock::now()).count();
    if (left <= 0) return false;
    if (poll(watched, 2, static_cast<int>(left)) > 0) return true;
  }
}

}  // namespace

Batcher::Batcher(tarflow::Flow& flow, const Settings& settings, Metrics& metrics)
    : flow_(flow), settings_(settings), metrics_(metrics) {
  running_.reserve(settings.queue);  // taking a batch allocates nothing, so it cannot fail
  worker_ = std::thread([this] { work(); });
}

Batcher::~Batcher() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  worker_.join();
}

void Batcher::run(const std::shared_ptr<Job>& job) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_.size() >= settings_.queue)
      throw Refusal{429, "the queue of " + std::to_string(settings_.queue) + " requests is full"};
    waiting_.push_back(job);
  }
  changed_.notify_all();
  const bool in_time = wait(*job);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (job->done) {
    if (job->status == TARFLOW_INPUT) throw Refusal{400, job->error};
    if (job->status != TARFLOW_OK) throw Refusal{500, job->error};
    return;
  }
  job->abandoned = true;
  waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), job), waiting_.end());
  if (nobody_waits()) flow_.cancel();  // between two calls of the batch it does nothing: draw() asks as well
  ++(in_time ? metrics_.hangups : metrics_.timeouts);
  if (in_time) throw Refusal{499, "the client hung up; the work was given up"};  // for the metrics: nobody reads it
  throw Refusal{504, "not ready within the timeout; the work was given up"};
}

std::size_t Batcher::waiting() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return waiting_.size();
}

void Batcher::work() {
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      take();
    }
    const auto started = Clock::now();
    int status = TARFLOW_OK;
    std::string error;
    try {
      draw();
    } catch (const tarflow::Error& failure) {
      status = failure.status;
      error = failure.what();
    } catch (const std::exception& failure) {
      status = TARFLOW_MACHINE;
      error = failure.what();
    }
    const auto spent = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - started);
    metrics_.microseconds += static_cast<std::uint64_t>(spent.count());
    finish(status, error);
  }
}

// The oldest request, and those behind it that can share its batch. `mutex_` is held.
void Batcher::take() {
  running_.push_back(std::move(waiting_.front()));
  waiting_.pop_front();
  const double guidance = running_[0]->guidance;
  std::size_t samples = running_[0]->labels.size();
  for (auto at = waiting_.begin(); at != waiting_.end();) {
    if ((*at)->guidance == guidance && samples + (*at)->labels.size() <= settings_.batch) {
      samples += (*at)->labels.size();
      running_.push_back(std::move(*at));
      at = waiting_.erase(at);
    } else {
      ++at;
    }
  }
}

// Computes what is in `running_`, which this thread alone changes.
void Batcher::draw() {
  std::vector<float> noise;
  std::vector<std::int64_t> labels;
  for (const auto& job : running_) {
    const std::vector<float> own = flow_.noise(job->seed, job->index, job->labels.size());
    noise.insert(noise.end(), own.begin(), own.end());
    labels.insert(labels.end(), job->labels.begin(), job->labels.end());
  }
  tarflow::SampleOptions how;
  how.reproducible = 1;
  how.guidance = running_[0]->guidance;
  how.user = this;
  how.progress = [](void* batcher, std::int64_t, std::int64_t, int, int) {
    auto* to = static_cast<Batcher*>(batcher);
    const std::lock_guard<std::mutex> lock(to->mutex_);
    return to->nobody_waits() ? 1 : 0;  // asked every step, so that no moment is missed
  };
  const std::vector<float> images = flow_.decode(noise, labels, how);
  auto from = images.begin();
  for (const auto& job : running_) {
    const auto size = static_cast<std::ptrdiff_t>(job->labels.size()) * flow_.shape().image_numbers;
    job->images.assign(from, from + size);
    from += size;
  }
}

void Batcher::finish(int status, const std::string& error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& job : running_) {
    if (status == TARFLOW_OK) metrics_.samples += job->labels.size();
    job->status = status;
    job->error = error;
    job->done = true;
    job->bell.ring();
  }
  ++metrics_.batches;
  metrics_.batched += running_.size();
  running_.clear();
}

// For what is computed now; `mutex_` is held.
bool Batcher::nobody_waits() const {
  return !running_.empty() &&
         std::all_of(running_.begin(), running_.end(), [](const auto& job) { return job->abandoned; });
}
