#include "metrics.hpp"

#include <sstream>

std::string page_of(Metrics& metrics, std::size_t waiting) {
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
