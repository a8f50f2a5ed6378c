// The way a GPU takes, on the CPU: the resident graph with its state in the provider's memory.
#include "ort/backend.hpp"
#include "support.hpp"

using namespace tarflow::internal;

TEST_CASE("the graph for devices solves every block as the step graph does, guided too") {
  const Bundle bundle(TARFLOW_DEMO);
  tarflow_open_options options = tarflow_open_defaults();
  options.threads = 1;
  options.provider = "cpu";
  OrtBackend steps(bundle, Opening(options), false);
  OrtBackend resident(bundle, Opening(options), true);
  Call call, other;
  steps.prepare(call);
  resident.prepare(other);
  const std::int64_t batch = 3, tokens = 16;
  std::vector<float> z(static_cast<std::size_t>(batch * 64)), x(z.size()), y(z.size());
  for (std::size_t i = 0; i < z.size(); ++i) z[i] = std::sin(static_cast<float>(i));
  for (const std::int64_t count : {1, 2}) {
    Branches branches{batch, count, {1, 2, 3}, {}, {1.0F}};
    branches.classes.resize(static_cast<std::size_t>(count * batch), 10);
    branches.inverse_temperature.resize(static_cast<std::size_t>(count), 0.7F);
    for (std::int64_t i = 0; i < 2 * count * tokens; ++i)
      branches.mix.push_back(i / tokens % count == 0 ? 1.5F : -0.5F);
    for (std::size_t block = 0; block < 4; ++block) {
      int seen = 0;
      steps.invert({call, block, branches}, z.data(), x.data(), [](std::int64_t) {});
      resident.invert({other, block, branches}, z.data(), y.data(),
                      [&](std::int64_t position) { CHECK(position == seen++); });
      CHECK(seen == 15);
      CHECK(support::largest(x, y) < 1e-5F);
    }
  }
}
