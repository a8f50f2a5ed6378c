// Prints, for each precision, a hash of guided samples' bits: the same line on every machine, in every instruction set.
//   bits [THREADS]
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "synthetic.hpp"

int main(int argc, char** argv) {
  const char* const names[] = {"fp32", "int16", "bf16", "int8"};
  const std::string weights = synthetic::weights(synthetic::kOdd);
  if (tarflow_native_isa() == nullptr) return std::fprintf(stderr, "%s\n", tarflow_native_message()), 1;
  std::fprintf(stderr, "%s\n", tarflow_native_isa());
  for (std::int32_t precision = 0; precision < 4; ++precision) {
    const std::vector<std::int32_t> all(synthetic::kOdd.blocks, precision);
    tarflow_native_model* model = nullptr;
    if (tarflow_native_open(weights.data(), weights.size(), &synthetic::kOdd, all.data(), argc > 1 ? std::atoi(argv[1]) : 2,
                            0, &model) != 0)
      return std::fprintf(stderr, "%s\n", tarflow_native_message()), 1;
    synthetic::Draw draw;
    draw.images = 3;
    draw.guided = true;
    const std::vector<float> samples = synthetic::samples(model, synthetic::kOdd, draw);
    if (samples.empty()) return std::fprintf(stderr, "%s\n", tarflow_native_message()), 1;
    for (const float number : samples)
      if (!std::isfinite(number)) return std::fprintf(stderr, "%s: not finite\n", names[precision]), 1;
    std::printf("%s %016" PRIx64 "\n", names[precision], synthetic::hash(samples));
    tarflow_native_close(model);
  }
  return 0;
}
