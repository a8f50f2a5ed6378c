// An HTTP service on libtarflow:
//
//   service BUNDLE [--port 8080] [--queue 64] [--batch 64] [--timeout-ms 30000] [--threads 0]
//
//   POST /v1/samples  {"labels": [3, 7], "seed": 1, "index": 0, "guidance": 1.0, "format": "png", "timeout_ms": 5000}
//                     or {"n": 4, ...} without labels; format png or raw (float32).
//                     Sample k is sample index + k of the seed, whoever shares its batch.
//                     Samples that are not finite are named in X-Tarflow-Nonfinite; a picture of them is refused (422).
//   GET /healthz, /readyz, /metrics
//
// Requests that wait are computed together, in whole tiles of 16 rows. Work that nobody waits for, because its time is
// over or its clients have hung up, ends within a step. Listens on 127.0.0.1. SIGTERM: drain, then stop.
#include <httplib.h>
#include <png.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <tarflow.hpp>
#include <thread>

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Settings {
  std::string bundle;
  int port = 8080;
  std::size_t queue = 64;  // requests waiting
  std::size_t batch = 64;  // samples computed together
  int timeout_ms = 30000;
  int threads = 0;
};

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
  int connection = -1;  // its client's socket
  Bell bell;            // rings when it is done
  bool done = false, abandoned = false;  // guarded by the batcher's mutex; what follows is the asker's once done
  int status = TARFLOW_OK;
  std::string error;
  std::vector<float> images;
};

struct Metrics {
  std::atomic<std::uint64_t> samples{0}, batches{0}, batched{0}, timeouts{0}, hangups{0}, nonfinite{0}, microseconds{0};
  std::mutex mutex;
  std::map<int, std::uint64_t> answers;  // by HTTP code

  void answered(int code) {
    const std::lock_guard<std::mutex> lock(mutex);
    ++answers[code];
  }
};

// One thread that computes what waits. Requests share a batch if they ask for the same guidance.
class Batcher {
 public:
  Batcher(tarflow::Flow& flow, const Settings& settings, Metrics& metrics)
      : flow_(flow), settings_(settings), metrics_(metrics) {
    running_.reserve(settings.queue);  // taking a batch allocates nothing, so it cannot fail
    worker_ = std::thread([this] { work(); });
  }

  ~Batcher() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }

  // Waits for the samples, until the job's deadline and as long as its client does; then the work is given up.
  void run(const std::shared_ptr<Job>& job) {
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

  std::size_t waiting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return waiting_.size();
  }

 private:
  // Until the bell rings or the client hangs up; false when the time is over.
  static bool wait(const Job& job) {
    pollfd watched[] = {{job.bell.file(), POLLIN, 0}, {job.connection, POLLRDHUP, 0}};
    for (;;) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(job.deadline - Clock::now()).count();
      if (left <= 0) return false;
      if (poll(watched, 2, static_cast<int>(left)) > 0) return true;
    }
  }

  void work() {
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
      metrics_.microseconds += static_cast<std::uint64_t>(
          std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - started).count());
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
  }

  // The oldest request, and those behind it that can share its batch.
  void take() {
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
  void draw() {
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

  // For what is computed now; `mutex_` is held.
  bool nobody_waits() const {
    return !running_.empty() &&
           std::all_of(running_.begin(), running_.end(), [](const auto& job) { return job->abandoned; });
  }

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

// The socket of a request, which httplib does not tell: the one whose other end is the client's. -1 if it is gone.
int connection_of(const httplib::Request& request) {
  std::error_code error;
  for (std::filesystem::directory_iterator at("/proc/self/fd", error), end; !error && at != end; at.increment(error)) {
    const int file = std::atoi(at->path().filename().c_str());
    sockaddr_in peer{}, own{};  // the service listens on 127.0.0.1 alone
    socklen_t peer_size = sizeof peer, own_size = sizeof own;
    if (getpeername(file, reinterpret_cast<sockaddr*>(&peer), &peer_size) == 0 && peer.sin_family == AF_INET &&
        getsockname(file, reinterpret_cast<sockaddr*>(&own), &own_size) == 0 &&
        ntohs(peer.sin_port) == request.remote_port && ntohs(own.sin_port) == request.local_port)
      return file;
  }
  return -1;
}

template <class T>
T field(const Json& body, const char* name, T missing, double least, double most) {
  const auto found = body.find(name);
  if (found == body.end()) return missing;
  const bool right = std::is_integral_v<T> ? found->is_number_integer() : found->is_number();
  if (!right || !(found->get<double>() >= least && found->get<double>() <= most)) {
    std::ostringstream message;
    message << "'" << name << "' is " << found->dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 60)
            << "; expected " << (std::is_integral_v<T> ? "an integer" : "a number") << " from " << least << " to "
            << most;
    throw Refusal{400, message.str()};
  }
  return found->get<T>();
}

std::shared_ptr<Job> read_job(const std::string& text, const Settings& settings, const tarflow_shape& shape) {
  const Json body = Json::parse(text, nullptr, false);
  if (!body.is_object()) throw Refusal{400, "the body is no JSON object"};
  for (const auto& [name, value] : body.items()) {
    static const char* const known[] = {"labels", "n", "seed", "index", "guidance", "format", "timeout_ms"};
    if (std::none_of(std::begin(known), std::end(known), [&](const char* k) { return name == k; })) {
      throw Refusal{400, "'" + name + "' is unknown; expected labels or n, seed, index, guidance, format, timeout_ms"};
    }
  }
  auto job = std::make_shared<Job>();
  if (body.contains("labels")) {
    const Json& labels = body["labels"];
    if (!labels.is_array() || body.contains("n")) throw Refusal{400, "expected either 'labels', an array, or 'n'"};
    for (const Json& label : labels) {
      const double value = label.is_number_integer() ? label.get<double>() : -2;  // exact where it matters
      if (!(value >= -1 && value < shape.classes)) {
        throw Refusal{400, "label " + label.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 60) +
                               " is out of range; expected -1 (none) to " + std::to_string(shape.classes - 1)};
      }
      job->labels.push_back(label.get<std::int64_t>());
    }
  } else {
    job->labels.assign(field<std::size_t>(body, "n", 1, 1, double(settings.batch)), -1);
  }
  if (job->labels.empty() || job->labels.size() > settings.batch) {
    throw Refusal{400, std::to_string(job->labels.size()) + " samples asked for; expected 1 to " +
                           std::to_string(settings.batch)};
  }
  job->seed = field<std::uint64_t>(body, "seed", 0, 0, 0x1p64);
  job->index = field<std::uint64_t>(body, "index", 0, 0, 0x1p63);
  job->guidance = field<double>(body, "guidance", 0, 0, 100);
  const bool unlabelled =
      std::all_of(job->labels.begin(), job->labels.end(), [](std::int64_t label) { return label < 0; });
  if (job->guidance > 0 && unlabelled)
    throw Refusal{400, "guidance does nothing without labels; give labels, or guidance 0"};
  const Json format = body.value("format", Json("png"));
  if (format != "png" && format != "raw") throw Refusal{400, "expected 'format' png or raw"};
  job->raw = format == "raw";
  job->deadline = Clock::now() + std::chrono::milliseconds(
                                     field<int>(body, "timeout_ms", settings.timeout_ms, 1, settings.timeout_ms));
  return job;
}

// All images in one row.
std::string png(const std::vector<float>& images, std::size_t n, const tarflow_shape& shape) {
  const auto side = static_cast<std::size_t>(shape.image_size);
  const std::size_t channels = shape.channels == 3 ? 3 : 1, width = side * n, pixels = side * side;
  std::vector<png_byte> bytes(width * side * channels);
  for (std::size_t i = 0; i < n; ++i) {
    const float* image = images.data() + i * static_cast<std::size_t>(shape.image_numbers);
    for (std::size_t at = 0; at < pixels * channels; ++at) {
      const std::size_t channel = at / pixels, y = at % pixels / side, x = at % side;
      const float value = std::min(255.0F, std::max(0.0F, (image[at] + 1) * 127.5F + 0.5F));
      bytes[((y * width) + i * side + x) * channels + channel] = static_cast<png_byte>(value);
    }
  }
  png_image header{};
  header.version = PNG_IMAGE_VERSION;
  header.width = static_cast<png_uint_32>(width);
  header.height = static_cast<png_uint_32>(side);
  header.format = channels == 3 ? PNG_FORMAT_RGB : PNG_FORMAT_GRAY;
  png_alloc_size_t size = 0;
  std::string file;
  if (png_image_write_to_memory(&header, nullptr, &size, 0, bytes.data(), 0, nullptr) != 0) {
    file.resize(size);
    if (png_image_write_to_memory(&header, file.data(), &size, 0, bytes.data(), 0, nullptr) != 0)
      return file.substr(0, size);
  }
  throw Refusal{500, header.message};
}

// Samples of a finished job that are not finite, as a list of their indices; "" if there are none.
std::string nonfinite(const Job& job, const tarflow_shape& shape, Metrics& metrics) {
  const auto numbers = static_cast<std::ptrdiff_t>(shape.image_numbers);
  std::uint64_t broken = 0;
  std::string indices;
  for (std::size_t i = 0; i < job.labels.size(); ++i) {
    const auto image = job.images.begin() + static_cast<std::ptrdiff_t>(i) * numbers;
    if (std::all_of(image, image + numbers, [](float number) { return std::isfinite(number); })) continue;
    if (++broken <= 100) indices += (broken > 1 ? "," : "") + std::to_string(job.index + i);
  }
  if (broken == 0) return "";
  if (broken > 100) indices += ",...";
  metrics.nonfinite += broken;
  std::cerr << "service: " + std::to_string(broken) + " of " + std::to_string(job.labels.size()) + " samples of seed " +
                   std::to_string(job.seed) + " are not finite (" + indices + ")\n";
  return indices;
}

std::string metrics_page(Metrics& metrics, std::size_t waiting) {
  std::ostringstream page;
  const auto counter = [&](const char* name, const char* help, double value, const char* type = "counter") {
    page << "# HELP tarflow_" << name << " " << help << "\n# TYPE tarflow_" << name << " " << type << "\ntarflow_"
         << name << " " << value << "\n";
  };
  page.precision(15);
  counter("samples_total", "Samples drawn.", double(metrics.samples));
  counter("batches_total", "Batches computed.", double(metrics.batches));
  counter("batched_requests_total", "Requests in those batches.", double(metrics.batched));
  counter("compute_seconds_total", "Time spent computing.", double(metrics.microseconds) / 1e6);
  counter("nonfinite_samples_total", "Samples among them that were not finite.", double(metrics.nonfinite));
  counter("abandoned_requests_total", "Requests that ran into their timeout.", double(metrics.timeouts));
  counter("hung_up_requests_total", "Requests whose client left before the answer.", double(metrics.hangups));
  counter("queue_requests", "Requests waiting now.", double(waiting), "gauge");
  page << "# HELP tarflow_responses_total Answers to POST /v1/samples.\n# TYPE tarflow_responses_total counter\n";
  const std::lock_guard<std::mutex> lock(metrics.mutex);
  for (const auto& [code, count] : metrics.answers)
    page << "tarflow_responses_total{code=\"" << code << "\"} " << count << "\n";
  return page.str();
}

void refuse(httplib::Response& response, const Refusal& refusal) {
  response.status = refusal.code;
  if (refusal.code == 429) response.set_header("Retry-After", "1");
  response.set_content(Json{{"error", refusal.message}}.dump(-1, ' ', false, Json::error_handler_t::replace),
                       "application/json");
}

// Waits for SIGTERM or SIGINT, which every thread has blocked. The server then takes no new connections, and
// listen_after_bind returns when those there are have their answers.
class Ender {
 public:
  Ender(httplib::Server& server, const sigset_t& ends, std::atomic<bool>& draining)
      : draining_(draining), thread_([&, ends] {
          int signal = 0;
          sigwait(&ends, &signal);
          draining_ = true;
          while (!over_ && !server.is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          server.stop();  // would be lost before the server runs
        }) {}

  ~Ender() {
    over_ = true;
    if (!draining_) kill(getpid(), SIGTERM);  // the server failed: let the thread go
    thread_.join();
  }

 private:
  std::atomic<bool>& draining_;
  std::atomic<bool> over_{false};
  std::thread thread_;
};

Settings read_arguments(int argc, char** argv) {
  Settings settings;
  const auto usage = [&](const std::string& what) {
    std::cerr << "service: " << what << "\nusage: " << argv[0]
              << " BUNDLE [--port N] [--queue N] [--batch N] [--timeout-ms N] [--threads N]\n";
    std::exit(2);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      if (!settings.bundle.empty()) usage("two bundles are named");
      settings.bundle = word;
      continue;
    }
    char* end = nullptr;
    const long value = ++i < argc ? std::strtol(argv[i], &end, 10) : -1;
    if (i >= argc || end == argv[i] || *end != '\0' || value < 0 || value > 1000000) usage(word + " needs a number");
    if (word == "--port" && value < 65536)
      settings.port = static_cast<int>(value);
    else if (word == "--queue" && value > 0 && value <= 1024)
      settings.queue = static_cast<std::size_t>(value);
    else if (word == "--batch" && value > 0)
      settings.batch = static_cast<std::size_t>(value);
    else if (word == "--timeout-ms" && value > 0)
      settings.timeout_ms = static_cast<int>(value);
    else if (word == "--threads")
      settings.threads = static_cast<int>(value);
    else
      usage(word + " " + std::to_string(value) + " is not understood");
  }
  if (settings.bundle.empty()) usage("no bundle is named");
  return settings;
}

}  // namespace

int main(int argc, char** argv) {
  const Settings settings = read_arguments(argc, argv);
  sigset_t ends;  // blocked in every thread but the one that waits for them
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);
  try {
    tarflow::OpenOptions options;
    options.threads = settings.threads;
    tarflow::Flow flow(settings.bundle, options);
    flow.sample({-1});  // loads the graphs now, not in somebody's request
    Metrics metrics;
    Batcher batcher(flow, settings, metrics);
    std::atomic<bool> draining{false};

    httplib::Server server;
    server.new_task_queue = [&] {
      return new httplib::ThreadPool(2 * settings.queue + 8);
    };  // waiting, computing, others
    server.set_payload_max_length(64 << 10);
    int listening = -1;
    server.set_socket_options([&](socket_t socket) {
      const int yes = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
      listening = socket;
    });
    server.set_keep_alive_timeout(1);  // seconds: how long draining waits for idle connections
    server.Get("/healthz", [](const httplib::Request&, httplib::Response& response) {
      response.set_content("ok\n", "text/plain");
    });
    server.Get("/readyz", [&](const httplib::Request&, httplib::Response& response) {
      response.status = draining ? 503 : 200;
      response.set_content(draining ? "draining\n" : "ready\n", "text/plain");
    });
    server.Get("/metrics", [&](const httplib::Request&, httplib::Response& response) {
      response.set_content(metrics_page(metrics, batcher.waiting()), "text/plain; version=0.0.4");
    });
    server.Post("/v1/samples", [&](const httplib::Request& request, httplib::Response& response) {
      try {
        const auto job = read_job(request.body, settings, flow.shape());
        job->connection = connection_of(request);
        batcher.run(job);
        const std::size_t n = job->labels.size();
        const std::string shape = std::to_string(n) + "," + std::to_string(flow.shape().channels) + "," +
                                  std::to_string(flow.shape().image_size) + "," +
                                  std::to_string(flow.shape().image_size);
        response.set_header("X-Tarflow-Shape", shape);
        const std::string broken = nonfinite(*job, flow.shape(), metrics);
        if (!broken.empty()) {
          response.set_header("X-Tarflow-Nonfinite", broken);
          if (!job->raw)
            throw Refusal{422, "samples " + broken + " are not finite and make no picture; use weaker guidance, other "
                                   "samples of the seed, or format raw, which keeps them"};
        }
        if (job->raw) {
          response.set_content(reinterpret_cast<const char*>(job->images.data()), job->images.size() * sizeof(float),
                               "application/octet-stream");
        } else {
          response.set_content(png(job->images, n, flow.shape()), "image/png");
        }
      } catch (const Refusal& refusal) {
        refuse(response, refusal);
      } catch (const std::exception& error) {
        refuse(response, {500, error.what()});
      }
      metrics.answered(response.status > 0 ? response.status : 200);
    });

    const int port = settings.port != 0 ? (server.bind_to_port("127.0.0.1", settings.port) ? settings.port : -1)
                                        : server.bind_to_any_port("127.0.0.1");
    if (port < 0) {
      std::cerr << "service: port " << settings.port << " of 127.0.0.1 cannot be had; choose another with --port\n";
      return 3;
    }
    listen(listening, 1024);  // httplib's backlog of 5 resets connections of a burst
    Ender ender(server, ends, draining);
    std::cout << "listening on 127.0.0.1:" << port << " with " << flow.shape().backend << std::endl;
    const bool ended = server.listen_after_bind();
    std::cout << "stopped after " << metrics.samples << " samples" << std::endl;
    return ended ? 0 : 3;
  } catch (const tarflow::Error& error) {
    std::cerr << "service: " << error.what() << "\n";
    return error.status;
  } catch (const std::exception& error) {
    std::cerr << "service: " << error.what() << "\n";
    return TARFLOW_MACHINE;
  }
}
