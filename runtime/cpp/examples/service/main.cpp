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
#include <signal.h>

#include <atomic>
#include <filesystem>
#include <iostream>
#include <thread>

#include "answers.hpp"
#include "batcher.hpp"

namespace {

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

// The routes, answered in the pool's threads.
void route(httplib::Server& server, tarflow::Flow& flow, const Settings& settings, Batcher& batcher, Metrics& metrics) {
  server.Get("/healthz",
             [](const httplib::Request&, httplib::Response& response) { response.set_content("ok\n", "text/plain"); });
  server.Get("/metrics", [&](const httplib::Request&, httplib::Response& response) {
    response.set_content(page_of(metrics, batcher.waiting()), "text/plain; version=0.0.4");
  });
  server.Post("/v1/samples", [&](const httplib::Request& request, httplib::Response& response) {
    try {
      const auto job = read_job(request.body, settings, flow.shape());
      job->connection = connection_of(request);
      batcher.run(job);
      answer(response, *job, flow.shape(), metrics);
    } catch (const Refusal& refusal) {
      refuse(response, refusal);
    } catch (const std::exception& error) {
      refuse(response, {500, error.what()});
    }
    metrics.answered(response.status > 0 ? response.status : 200);
  });
}

// A port of 127.0.0.1, any for 0; below 0 if it cannot be had.
int bind_port(httplib::Server& server, int port) {
  if (port == 0) return server.bind_to_any_port("127.0.0.1");
  return server.bind_to_port("127.0.0.1", port) ? port : -1;
}

// Serves until a signal ends it; the exit code.
int serve(tarflow::Flow& flow, const Settings& settings, const sigset_t& ends) {
  Metrics metrics;
  Batcher batcher(flow, settings, metrics);
  std::atomic<bool> draining{false};
  httplib::Server server;
  // Requests that wait, those that are computed, and others.
  server.new_task_queue = [&] { return new httplib::ThreadPool(2 * settings.queue + 8); };
  server.set_payload_max_length(64 << 10);
  server.set_keep_alive_timeout(10);  // seconds of silence, on a busy machine too; draining waits as long
  int listening = -1;
  server.set_socket_options([&](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    listening = socket;
  });
  server.Get("/readyz", [&](const httplib::Request&, httplib::Response& response) {
    response.status = draining ? 503 : 200;
    response.set_content(draining ? "draining\n" : "ready\n", "text/plain");
  });
  route(server, flow, settings, batcher, metrics);
  const int port = bind_port(server, settings.port);
  if (port < 0) {
    std::cerr << "service: port " << settings.port << " of 127.0.0.1 cannot be had; choose another with --port\n";
    return TARFLOW_MACHINE;
  }
  listen(listening, 1024);  // httplib's backlog of 5 resets connections of a burst
  Ender ender(server, ends, draining);
  std::cout << "listening on 127.0.0.1:" << port << " with " << flow.shape().backend << std::endl;
  const bool ended = server.listen_after_bind();
  std::cout << "stopped after " << metrics.samples << " samples" << std::endl;
  return ended ? TARFLOW_OK : TARFLOW_MACHINE;
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
    return serve(flow, settings, ends);
  } catch (const tarflow::Error& error) {
    std::cerr << "service: " << error.what() << "\n";
    return error.status;
  } catch (const std::exception& error) {
    std::cerr << "service: " << error.what() << "\n";
    return TARFLOW_MACHINE;
  }
}
