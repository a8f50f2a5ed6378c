// The native library by its own C ABI: the same bits whatever else is different, and no harm of what is wrong.
#include <sys/wait.h>

#include <memory>

#include "buffer.hpp"
#include "instruction_sets.hpp"
#include "support.hpp"
#include "synthetic.hpp"

using support::instruction_sets;
using support::Lowered;

namespace {

using Model = std::unique_ptr<tarflow_native_model, void (*)(tarflow_native_model*)>;

constexpr std::int32_t kAll[] = {TARFLOW_NATIVE_FP32, TARFLOW_NATIVE_INT16, TARFLOW_NATIVE_BF16, TARFLOW_NATIVE_INT8};

Model open_model(const std::string& weights, const synthetic::Shape& shape, std::int32_t precision, int threads) {
  const std::vector<std::int32_t> all(static_cast<std::size_t>(shape.blocks), precision);
  tarflow_native_model* made = nullptr;
  const int code = tarflow_native_open(weights.data(), weights.size(), &shape, all.data(), threads, 0, &made);
  REQUIRE_MESSAGE(code == TARFLOW_NATIVE_OK, tarflow_native_message());
  return {made, tarflow_native_close};
}

bool same_bits(const float* a, const float* b, std::size_t count) { return std::memcmp(a, b, count * sizeof *a) == 0; }

}  // namespace

TEST_CASE("native: a sample's bits are its own in any batch and place, by any threads and in windows, guided too") {
  const synthetic::Shape& shape = synthetic::kOdd;
  const std::string weights = synthetic::weights(shape);
  const auto numbers = static_cast<std::size_t>(shape.tokens * shape.patch_dim);
  for (const std::int32_t precision : kAll) {
    CAPTURE(precision);
    for (const bool guided : {false, true}) {
      if (!guided && precision != TARFLOW_NATIVE_FP32) continue;  // one branch is as two are
      const auto expected = synthetic::samples(open_model(weights, shape, precision, 1).get(), shape, {0, 33, guided, 1});
      REQUIRE(expected.size() == 33 * numbers);
      for (const int threads : {1, 2, 3}) {
        const Model model = open_model(weights, shape, precision, threads);
        for (const synthetic::Draw& draw : {synthetic::Draw{0, 1, guided, 1}, {30, 3, guided, 1}, {7, 8, guided, 1},
                                            {0, 33, guided, 1}, {5, 3, guided, 4}, {11, 2, guided, 11}}) {
          if (draw.images == 33 && threads != 3) continue;
          const std::vector<float> found = synthetic::samples(model.get(), shape, draw);
          REQUIRE(found.size() == static_cast<std::size_t>(draw.images) * numbers);
          CHECK(same_bits(found.data(), expected.data() + static_cast<std::size_t>(draw.first) * numbers, found.size()));
        }
      }
    }
  }
}

TEST_CASE("native: every instruction set makes the same bits") {
  const std::string weights = synthetic::weights(synthetic::kOdd);
  for (const std::int32_t precision : kAll) {
    CAPTURE(precision);
    std::vector<std::uint64_t> hashes;
    for (const std::string& name : instruction_sets()) {
      const Lowered isa(name.c_str());
      CHECK(tarflow_native_isa() == name);
      const Model model = open_model(weights, synthetic::kOdd, precision, 2);
      for (const std::int64_t images : {1, 9}) {
        const auto found = synthetic::samples(model.get(), synthetic::kOdd, {0, images, true, 1});
        REQUIRE(!found.empty());
        hashes.push_back(synthetic::hash(found));
        CHECK_MESSAGE(hashes.back() == hashes[images == 1 ? 0 : 1], name);
      }
    }
    CHECK(hashes.size() >= 2);
    CHECK(hashes[0] != hashes[1]);
  }
}

TEST_CASE("native: models of other sizes decode, without classes and without log_scales too") {
  for (const synthetic::Shape& shape : {synthetic::Shape{1, 3, 8, 8, 1, 1, 0, 1}, synthetic::Shape{2, 1, 4, 1, 1, 2, 0, 0},
                                        synthetic::Shape{70, 33, 20, 10, 1, 1, 1, 0}, synthetic::Shape{5, 64, 64, 64, 3, 1, 7, 1}}) {
    const std::string weights = synthetic::weights(shape);
    for (const std::int32_t precision : kAll) {
      std::uint64_t first = 0;
      for (const std::string& name : instruction_sets()) {
        const Lowered isa(name.c_str());
        const auto found = synthetic::samples(open_model(weights, shape, precision, 2).get(), shape, {0, 2, true, 1});
        REQUIRE(found.size() == static_cast<std::size_t>(2 * shape.tokens * shape.patch_dim));
        for (const float number : found) REQUIRE(std::isfinite(number));
        if (first == 0) first = synthetic::hash(found);
        CHECK(synthetic::hash(found) == first);
      }
    }
  }
}

TEST_CASE("native: a sample that overflows leaves no trace in others, nor in the next batch") {
  const synthetic::Shape& shape = synthetic::kOdd;
  const std::string weights = synthetic::weights(shape);
  const auto numbers = static_cast<std::size_t>(shape.tokens * shape.patch_dim);
  for (const std::string& name : instruction_sets()) {
    const Lowered isa(name.c_str());
    for (const std::int32_t precision : kAll) {
      const Model model = open_model(weights, shape, precision, 2);
      std::vector<float> sound(3 * numbers, 0.5F), wild = sound;
      REQUIRE(synthetic::decode(model.get(), shape, 0, {0, 3, true, 1}, sound) == 0);
      for (const float strange : {3e38F, INFINITY, NAN}) {
        std::vector<float> mixed(3 * numbers, 0.5F);
        mixed[numbers + 2] = strange;
        REQUIRE(synthetic::decode(model.get(), shape, 0, {0, 3, true, 1}, mixed) == 0);
        CHECK(!std::isfinite(mixed[2 * numbers - 1]));
        CHECK(same_bits(mixed.data(), sound.data(), numbers));
        CHECK(same_bits(mixed.data() + 2 * numbers, sound.data() + 2 * numbers, numbers));
      }
      REQUIRE(synthetic::decode(model.get(), shape, 0, {0, 3, true, 1}, wild) == 0);
      CHECK(wild == sound);
    }
  }
}

TEST_CASE("native: what cannot be is refused, and nothing is left of it") {
  const synthetic::Shape& shape = synthetic::kOdd;
  const std::string weights = synthetic::weights(shape);
  const std::vector<std::int32_t> all(2, TARFLOW_NATIVE_FP32);
  tarflow_native_model* made = nullptr;
  const auto opened = [&](const std::string& file, const synthetic::Shape& of, int threads) {
    return tarflow_native_open(file.data(), file.size(), &of, all.data(), threads, 0, &made);
  };
  CHECK(opened(weights, shape, 0) == TARFLOW_NATIVE_WRONG);
  CHECK(opened(weights, shape, 65) == TARFLOW_NATIVE_WRONG);
  CHECK(opened(weights.substr(0, 700), shape, 1) == TARFLOW_NATIVE_WRONG);
  CHECK(opened("", shape, 1) == TARFLOW_NATIVE_WRONG);
  synthetic::Shape huge = shape;
  huge.tokens = std::int64_t{1} << 40;
  CHECK(opened(weights, huge, 1) == TARFLOW_NATIVE_WRONG);
  CHECK(made == nullptr);
  synthetic::Shape wider = shape;
  wider.width = 96;
  const Model other = open_model(weights, wider, TARFLOW_NATIVE_FP32, 1);  // weights are looked at when they are needed
  CHECK(synthetic::samples(other.get(), wider, {}).empty());
  CHECK(std::string(tarflow_native_message()).find("has another shape or type than the model") != std::string::npos);
  const Model model = open_model(weights, shape, TARFLOW_NATIVE_FP32, 1);
  std::vector<float> x(65, 0.0F);
  std::int64_t label = 3;
  const float ones[26] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  tarflow_native_batch batch = {1, 1, x.data(), &label, ones, ones};
  tarflow_native_decoding* decoding = nullptr;
  CHECK(tarflow_native_begin(model.get(), 0, &batch, &decoding) == TARFLOW_NATIVE_WRONG);
  label = -1;
  CHECK(tarflow_native_begin(model.get(), 2, &batch, &decoding) == TARFLOW_NATIVE_WRONG);
  batch.images = 0;
  CHECK(tarflow_native_begin(model.get(), 0, &batch, &decoding) == TARFLOW_NATIVE_WRONG);
  batch.images = 1;
  REQUIRE(tarflow_native_begin(model.get(), 0, &batch, &decoding) == TARFLOW_NATIVE_OK);
  CHECK(tarflow_native_run(decoding, 0, 13) == TARFLOW_NATIVE_WRONG);
  CHECK(tarflow_native_run(decoding, -1, 2) == TARFLOW_NATIVE_WRONG);
  CHECK(tarflow_native_evaluate(decoding, 10, 3, nullptr, x.data()) == TARFLOW_NATIVE_WRONG);
  CHECK(tarflow_native_evaluate(decoding, INT64_MAX, INT64_MAX, nullptr, x.data()) == TARFLOW_NATIVE_WRONG);
  CHECK(tarflow_native_run(decoding, 0, 12) == TARFLOW_NATIVE_OK);
  tarflow_native_end(decoding);
}

TEST_CASE("native: sizes that overflow are memory that is not there, never a buffer that is too small") {
  using tarflow::native::Buffer;
  using tarflow::native::product;
  constexpr std::int64_t kLarge = std::int64_t{1} << 40;
  CHECK(product({kLarge, 3, 5}) == 15 * kLarge);
  CHECK_THROWS_AS(product({kLarge, kLarge}), std::bad_alloc);
  CHECK_THROWS_AS(product({kLarge, kLarge, 0}), std::bad_alloc);
  CHECK_THROWS_AS(Buffer<float>(-1), std::bad_alloc);
  CHECK_THROWS_AS(Buffer<float>(INT64_MAX), std::bad_alloc);
  CHECK_THROWS_AS(Buffer<double>(std::int64_t{1} << 62), std::bad_alloc);
  CHECK(Buffer<float>(0).count() == 0);
}

TEST_CASE("native: a forked process decodes with a model that it was born with") {
  const synthetic::Shape& shape = synthetic::kOdd;
  const std::string weights = synthetic::weights(shape);
  const Model model = open_model(weights, shape, TARFLOW_NATIVE_FP32, 2);
  const std::vector<float> expected = synthetic::samples(model.get(), shape, {0, 9, true, 1});
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) _exit(synthetic::samples(model.get(), shape, {0, 9, true, 1}) == expected ? 0 : 1);
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(synthetic::samples(model.get(), shape, {0, 9, true, 1}) == expected);
}
