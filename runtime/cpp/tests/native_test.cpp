// The native engine of libtarflow: decodes as ONNX Runtime does, and to the same bits in any batch.
#include "instruction_sets.hpp"
#include "support.hpp"

using support::failure;
using support::instruction_sets;
using support::Lowered;
namespace fs = std::filesystem;

namespace {

using Labels = std::vector<std::int64_t>;

tarflow::OpenOptions native(const char* precision = nullptr, int threads = 0) {
  tarflow::OpenOptions options;
  options.provider = "native";
  options.precision = precision;
  options.threads = threads;
  return options;
}

}  // namespace

TEST_CASE("native: samples are ONNX Runtime's, guided, unlabelled and certified by it") {
  tarflow::Flow cpu(TARFLOW_DEMO), flow(TARFLOW_DEMO, native(nullptr, 2));
  const std::string expected = "native fp32 (" + instruction_sets().front() + "), 2 threads";
  CHECK(flow.shape().backend == expected);
  tarflow::SampleOptions how;
  how.certify = 1;
  how.seed = 5;
  for (const double guidance : {0.0, 1.5}) {
    how.guidance = guidance;
    how.attention_temperature = guidance == 0 ? 1 : 0.8;
    how.annealed = guidance != 0;
    CHECK(support::largest(flow.sample({0, 3, 9, -1, 5}, how), cpu.sample({0, 3, 9, -1, 5}, how)) < 1e-5F);
    for (const float error : flow.certificate(5)) CHECK(error < 1e-4F);
  }
}

TEST_CASE("native: samples of a bundle have the same bits in any batch, by any threads, in one block's memory and shared") {
  tarflow::SampleOptions how;
  how.denoise = 0;
  how.guidance = 1;
  how.seed = 3;
  Labels labels;
  for (std::int64_t i = 0; i < 33; ++i) labels.push_back(i % 10);
  for (const char* precision : {"fp32", "int16", "int8", "bf16"}) {
    CAPTURE(precision);
    const std::vector<float> expected = tarflow::Flow(TARFLOW_DEMO, native(precision, 1)).sample(labels, how);
    tarflow::Flow flow(TARFLOW_DEMO, native(precision, 3));
    tarflow::Flow other = flow.share();
    for (const std::int64_t batch : {1, 3, 8, 0}) {
      tarflow::SampleOptions in_batches = how;
      in_batches.batch_size = batch;
      CHECK(other.sample(labels, in_batches) == expected);
    }
    tarflow::SampleOptions later = how;
    later.first_sample = 21;
    later.reproducible = 1;
    const std::vector<float> some = flow.sample({1, 2, 3}, later);
    CHECK(std::equal(some.begin(), some.end(), expected.begin() + 21 * 64));
    if (precision != std::string("int8")) continue;
    tarflow::OpenOptions options = native(precision, 2);
    options.low_memory = 1;
    CHECK(tarflow::Flow(TARFLOW_DEMO, options).sample(labels, how) == expected);
  }
}

TEST_CASE("native: fewer bits in the weights cost what they are said to") {
  tarflow::SampleOptions how;
  how.denoise = 0;
  const Labels labels = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  const auto exact = tarflow::Flow(TARFLOW_DEMO, native("fp32")).sample(labels, how);
  const auto off = [&](const char* precision) {
    return support::largest(tarflow::Flow(TARFLOW_DEMO, native(precision)).sample(labels, how), exact);
  };
  CHECK(off("fp32") == 0);
  const float int16 = off("int16"), bf16 = off("bf16"), int8 = off("int8");
  CHECK(int16 > 0);
  CHECK(int16 < 2e-3F);
  CHECK(bf16 > int16);
  CHECK(bf16 < 0.5F);
  CHECK(int8 > int16);
  CHECK(int8 < 1.0F);
}

TEST_CASE("native: options that others do not have are refused in words") {
  const auto said = [](const char* provider, const char* precision) {
    return failure([&] {
      tarflow::OpenOptions options = native(precision);
      options.provider = provider;
      tarflow::Flow flow(TARFLOW_DEMO, options);
    });
  };
  CHECK(said("native", "fp8").says("`precision` is 'fp8'; expected one of fp32, int16, bf16, int8"));
  CHECK(said("cpu", "int16").says("use `provider` native"));
  CHECK(said("cuda", "fp32").status == TARFLOW_INPUT);
  const Lowered isa("abacus");
  const auto unknown = said("native", nullptr);
  CHECK(unknown.status == TARFLOW_INPUT);
  CHECK(unknown.says("TARFLOW_ISA is 'abacus'; this machine has "));
}

TEST_CASE("native: what is open stays what was hashed") {
  tarflow::SampleOptions how;
  how.denoise = 0;
  const support::Copy copy, written;
  tarflow::Flow flow(copy.folder.string(), native());
  fs::remove_all(copy.folder);  // the file is still open
  const std::vector<float> expected = tarflow::Flow(TARFLOW_DEMO, native()).sample({4}, how);
  CHECK(flow.sample({4}, how) == expected);
  tarflow::Flow late(written.folder.string(), native());
  {
    std::fstream file(written.folder / "weights.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-4, std::ios::end);
    file.write("\0\0\0\0", 4);
  }
  const auto found = failure([&] { late.sample({4}, how); });
  CHECK(found.status == TARFLOW_BUNDLE);
  CHECK(found.says("was changed after its hash was checked; open the bundle again"));
}
