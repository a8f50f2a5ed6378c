#include "guidance.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"

namespace tarflow::internal {
namespace {

double checked_scale(double scale) {
  if (scale >= 0 && std::isfinite(scale)) return scale;
  throw field_error("guidance", scale, "0 (none) or a positive number, 1 to 3 is usual");
}

double checked_temperature(double temperature) {
  if (temperature > 0 && std::isfinite(temperature)) return temperature;
  throw field_error("attention_temperature", temperature, "a positive number");
}

// Whether a part, "a" or "b", is among those said.
bool guides(const char* said, char part) {
  const std::string parts = said != nullptr ? said : "ab";
  if (parts == "a" || parts == "b" || parts == "ab") return parts.find(part) != std::string::npos;
  throw field_error("guided", "'" + parts + "'", "ab, a (log_scale) or b (shift)");
}

}  // namespace

Guidance::Guidance(const tarflow_sample_options& said)
    : scale(checked_scale(said.guidance)),
      log_scale(guides(said.guided, 'a')),
      shift(guides(said.guided, 'b')),
      annealed(said.annealed != 0),
      attention_temperature(checked_temperature(said.attention_temperature)) {}

void Guidance::check(const ModelShape& shape, const std::vector<std::int64_t>& classes) const {
  if (none() && attention_temperature != 1) {
    throw input_error("`attention_temperature` " + text_of(attention_temperature) +
                      " does nothing without guidance; give a `guidance` above 0 too");
  }
  if (none()) return;
  if (!shift && !shape.nvp) {
    throw input_error("a volume-preserving model has no log_scale, so guiding 'a' does nothing; guide 'b'");
  }
  const bool unlabelled =
      std::all_of(classes.begin(), classes.end(), [&](std::int64_t label) { return label == shape.classes; });
  if (attention_temperature == 1 && unlabelled) {
    const bool labelled = shape.classes > 0;
    throw input_error("guidance " + text_of(scale) + " does nothing for " +
                      (labelled ? "samples without a label" : "an unconditional model") +
                      " at attention temperature 1: both branches are the same, at twice the cost; " +
                      (labelled ? "give `labels`, or " : "") +
                      "pass an `attention_temperature` other than 1, or guidance 0");
  }
}

Branches Guidance::branches(const ModelShape& shape, std::vector<std::int64_t> classes) const {
  if (none()) return plain(shape, std::move(classes));
  const auto batch = static_cast<std::int64_t>(classes.size()), tokens = shape.tokens();
  Branches found{batch, 2, std::move(classes), {}, {1.0F, static_cast<float>(1 / attention_temperature)}};
  found.classes.resize(static_cast<std::size_t>(2 * batch), shape.classes);
  for (const bool guided : {log_scale, shift}) {
    for (const double sign : {1.0, -1.0}) {  // conditional 1 + s, unconditional -s
      for (std::int64_t i = 0; i < tokens; ++i) {
        const double ramp = annealed ? double(i + 1) / double(std::max<std::int64_t>(tokens - 1, 1)) : 1.0;
        const double s = guided ? scale * ramp : 0.0;
        found.mix.push_back(static_cast<float>(sign > 0 ? 1 + s : -s));
      }
    }
  }
  return found;
}

Branches plain(const ModelShape& shape, std::vector<std::int64_t> classes) {
  const auto batch = static_cast<std::int64_t>(classes.size());
  return {batch, 1, std::move(classes), std::vector<float>(static_cast<std::size_t>(2 * shape.tokens()), 1.0F), {1.0F}};
}

}  // namespace tarflow::internal
