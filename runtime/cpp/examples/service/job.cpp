#include "job.hpp"

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <type_traits>

namespace {

using Json = nlohmann::json;

std::string shown(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 60);
}

template <class T>
T field(const Json& body, const char* name, T missing, double least, double most) {
  const auto found = body.find(name);
  if (found == body.end()) return missing;
  const bool right = std::is_integral_v<T> ? found->is_number_integer() : found->is_number();
  if (!right || !(found->get<double>() >= least && found->get<double>() <= most)) {
    std::ostringstream message;
    message << "'" << name << "' is " << shown(*found) << "; expected "
            << (std::is_integral_v<T> ? "an integer" : "a number") << " from " << least << " to " << most;
    throw Refusal{400, message.str()};
  }
  return found->get<T>();
}

// A class for each sample; -1 for none.
std::vector<std::int64_t> read_labels(const Json& body, const Settings& settings, const tarflow_shape& shape) {
  if (!body.contains("labels")) {
    return std::vector<std::int64_t>(field<std::size_t>(body, "n", 1, 1, double(settings.batch)), -1);
  }
  const Json& said = body["labels"];
  if (!said.is_array() || body.contains("n")) throw Refusal{400, "expected either 'labels', an array, or 'n'"};
  if (said.empty() || said.size() > settings.batch) {
    throw Refusal{400,
                  std::to_string(said.size()) + " samples asked for; expected 1 to " + std::to_string(settings.batch)};
  }
  std::vector<std::int64_t> labels;
  for (const Json& label : said) {
    const double value = label.is_number_integer() ? label.get<double>() : -2;  // exact where it matters
    if (!(value >= -1 && value < shape.classes)) {
      throw Refusal{400, "label " + shown(label) + " is out of range; expected -1 (none) to " +
                             std::to_string(shape.classes - 1)};
    }
    labels.push_back(label.get<std::int64_t>());
  }
  return labels;
}

}  // namespace

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
  job->labels = read_labels(body, settings, shape);
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
