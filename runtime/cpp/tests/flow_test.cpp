#include "support.hpp"

using support::failure;
using support::largest;
namespace fs = std::filesystem;

namespace {

using Labels = std::vector<std::int64_t>;

Labels golden_labels() {
  const std::string content = support::read(fs::path(TARFLOW_DEMO) / "golden.safetensors");
  std::uint64_t length = 0;
  std::memcpy(&length, content.data(), 8);
  const auto offsets = support::Json::parse(content.substr(8, length)).at("labels").at("data_offsets");
  const std::size_t begin = offsets[0], end = offsets[1];
  Labels labels((end - begin) / 8);
  std::memcpy(labels.data(), content.data() + 8 + length + begin, end - begin);
  return labels;
}

std::vector<float> golden(const char* name) {
  return support::tensor(fs::path(TARFLOW_DEMO) / "golden.safetensors", name);
}

}  // namespace

TEST_CASE("the golden pairs of PyTorch come out, with a certificate") {
  tarflow::Flow flow(TARFLOW_DEMO);
  tarflow::SampleOptions how;
  how.certify = 1;
  how.denoise = 0;
  const Labels labels = golden_labels();
  CHECK(largest(flow.decode(golden("noise"), labels, how), golden("images")) < 1e-5F);
  for (const float error : flow.certificate(labels.size())) CHECK(error < 1e-4F);
  const std::vector<float> nats = flow.log_likelihood(golden("images"), labels);
  const std::vector<double> found = flow.log_prob(labels.size());
  for (std::size_t i = 0; i < nats.size(); ++i) CHECK(std::abs(found[i] - nats[i]) < 1e-4);
  how.denoise = TARFLOW_DENOISE_AS_TRAINED;
  CHECK(largest(flow.decode(golden("noise"), labels, how), golden("denoised")) < 1e-5F);
  CHECK(largest(flow.denoise(golden("images"), labels), golden("denoised")) < 1e-5F);
  CHECK(largest(flow.encode(golden("images"), labels).first, golden("noise")) < 1e-4F);
}

TEST_CASE("a certificate changes no sample, guided or not") {  // unguided, denoising goes on from what it encoded
  tarflow::Flow flow(TARFLOW_DEMO);
  tarflow::SampleOptions how;
  for (const double guidance : {0.0, 1.0}) {
    how.guidance = guidance;
    how.certify = 0;
    const std::vector<float> plain = flow.sample(Labels(20, 6), how);
    how.certify = 1;
    CHECK(flow.sample(Labels(20, 6), how) == plain);
  }
}

TEST_CASE("classes have the names that the bundle gives them, else their numbers") {
  const support::Copy copy;
  CHECK(tarflow::Flow(copy.folder.string()).class_name(3) == "3");
  copy.edit([](support::Json& manifest) {
    manifest["class_names"] = support::Json(10, "digit");
    manifest["class_names"][3] = "drei \u00e4\u00a0";
  });
  tarflow::Flow flow(copy.folder.string());
  CHECK(flow.class_name(3) == "drei \u00e4\u00a0");
  CHECK(flow.share().class_name(9) == "digit");
  CHECK(flow.class_name(10) == "10");
  CHECK(flow.class_name(-1) == "-1");
  CHECK(tarflow_class_name(nullptr, 0) == nullptr);
}

TEST_CASE("log-likelihood is the change of variables") {
  tarflow::Flow flow(TARFLOW_DEMO);
  const Labels labels = golden_labels();
  const auto [latents, log_det] = flow.encode(golden("images"), labels);
  const std::vector<float> nats = flow.log_likelihood(golden("images"), labels);
  const auto numbers = static_cast<std::size_t>(flow.shape().image_numbers);
  for (std::size_t i = 0; i < labels.size(); ++i) {
    double expected = double(log_det[i]) * double(numbers);
    for (std::size_t k = 0; k < numbers; ++k)
      expected -= 0.5 * std::pow(latents[i * numbers + k], 2) + 0.5 * std::log(2 * std::acos(-1.0));
    CHECK(nats[i] == doctest::Approx(expected).epsilon(1e-5));
  }
}

TEST_CASE("samples agree in any batch, and with one block in memory at a time") {
  tarflow::Flow flow(TARFLOW_DEMO);
  tarflow::SampleOptions how;
  how.seed = 8;
  how.first_sample = 1000;
  const std::vector<float> all = flow.sample(Labels(9, 4), how);
  how.batch_size = 2;
  CHECK(largest(flow.sample(Labels(9, 4), how), all) < 1e-5F);
  tarflow::OpenOptions options;
  options.low_memory = 1;
  options.spinning = 0;
  CHECK(largest(tarflow::Flow(TARFLOW_DEMO, options).sample(Labels(9, 4), how), all) < 1e-5F);
}

TEST_CASE("noise of the header is the noise that samples start from") {
  tarflow::Flow flow(TARFLOW_DEMO);
  tarflow::SampleOptions how;
  how.seed = 77;
  how.first_sample = 18446744073709551612U;
  const std::vector<float> noise = flow.noise(how.seed, how.first_sample, 4);
  CHECK(flow.decode(noise, Labels(4, -1)) == flow.sample(Labels(4, -1), how));
  CHECK(failure([&] { flow.sample(Labels(5, -1), how); }).says("2^64 - 1"));
  CHECK(failure([&] { flow.noise(0, UINT64_MAX, 2); }).status == TARFLOW_INPUT);
  how.reproducible = 1;
  CHECK_NOTHROW(flow.sample(Labels(4, -1), how));
}

TEST_CASE("what cannot be meant is refused in one sentence") {
  tarflow::Flow flow(TARFLOW_DEMO);
  const auto refused = [&](const std::function<void(tarflow::SampleOptions&)>& change, const char* words,
                           const Labels& labels = {1}) {
    tarflow::SampleOptions how;
    change(how);
    const auto found = failure([&] { flow.sample(labels, how); });
    CHECK(found.status == TARFLOW_INPUT);
    CHECK_MESSAGE(found.says(words), found.message);
  };
  using How = tarflow::SampleOptions;
  refused([](How&) {}, "label 10 is out of range", {10});
  refused([](How&) {}, "label -2 is out of range; this model has classes 0 to 9, and -1 for none", {-2});
  refused([](How&) {}, "`n` is 0", {});
  refused([](How& how) { how.guidance = -1; }, "`guidance` is -1; expected 0 (none) or a positive number");
  refused([](How& how) { how.guidance = NAN; }, "`guidance` is nan");
  refused([](How& how) { how.guided = "c"; }, "`guided` is 'c'; expected ab, a (log_scale) or b (shift)");
  refused([](How& how) { how.attention_temperature = 0; }, "`attention_temperature` is 0");
  refused([](How& how) { how.attention_temperature = 2; }, "does nothing without guidance");
  refused([](How& how) { how.guidance = 1; }, "does nothing for samples without a label", {-1});
  refused([](How& how) { how.batch_size = -1; }, "`batch_size` is -1");
  refused([](How& how) { how.denoise = -2; }, "`denoise` is -2");
  refused([](How& how) { how.denoise = INFINITY; }, "`denoise` is inf");
  refused([](How& how) { how.size = 0; },
          "`tarflow_sample_options.size` is 0; expected what tarflow_sample_defaults() sets");
  CHECK(failure([&] { flow.decode({1, 2}, {1}); }).status == TARFLOW_INPUT);
  CHECK(failure([&] {
          flow.decode(std::vector<float>(64, NAN), {1});
        }).says("`noise` is not finite, the first at row 0"));
  CHECK(failure([&] { flow.denoise(std::vector<float>(64, INFINITY), {1}); }).says("`images` is not finite"));
  CHECK(failure([&] { flow.denoise(std::vector<float>(64), {1}, -1); }).says("`strength` is -1"));
  CHECK(failure([&] { flow.certificate(1); }).says("without `certify`"));
  CHECK(failure([&] { flow.log_prob(1); }).says("without `certify`"));
  tarflow_flow* handle = nullptr;
  CHECK(tarflow_open(TARFLOW_DEMO, nullptr, &handle) == TARFLOW_OK);
  float image[64];
  CHECK(tarflow_sample(handle, INT64_MAX, nullptr, nullptr, image) == TARFLOW_INPUT);
  CHECK(tarflow_sample(handle, -1, nullptr, nullptr, image) == TARFLOW_INPUT);
  CHECK(tarflow_sample(handle, 1, nullptr, nullptr, nullptr) == TARFLOW_INPUT);
  CHECK(tarflow_decode(handle, 1, nullptr, nullptr, nullptr, image) == TARFLOW_INPUT);
  CHECK(tarflow_sample(nullptr, 1, nullptr, nullptr, image) == TARFLOW_INPUT);
  CHECK(tarflow_sample(handle, 1, nullptr, nullptr, image) == TARFLOW_OK);
  tarflow_close(handle);
  tarflow_close(nullptr);
  CHECK(tarflow_open(TARFLOW_DEMO, nullptr, nullptr) == TARFLOW_INPUT);
  CHECK(tarflow_open(nullptr, nullptr, &handle) == TARFLOW_INPUT);
  CHECK(tarflow_sample(handle, 1, nullptr, nullptr, image) == TARFLOW_INPUT);  // not open
  const std::string closed = tarflow_error(handle);
  CHECK(closed.find("not open: tarflow_open failed with: `bundle` is NULL") != std::string::npos);
  CHECK(tarflow_sample(handle, 1, nullptr, nullptr, image) == TARFLOW_INPUT);
  CHECK(tarflow_error(handle) == closed);
  tarflow_close(handle);
}

TEST_CASE("samples that overflow are named in the log, and drawn again if asked") {
  tarflow::OpenOptions options;
  std::string said;
  options.user = &said;
  options.log = [](void* user, int level, const char* message) {
    if (level == TARFLOW_LOG_WARNING) *static_cast<std::string*>(user) += message;
    return 0;
  };
  tarflow::Flow flow(TARFLOW_DEMO, options);
  tarflow::SampleOptions how;
  how.guidance = 60;  // the dynamics diverge for some
  how.denoise = 0;
  how.seed = 1;
  const auto broken = [](const std::vector<float>& images) {
    return std::count_if(images.begin(), images.end(), [](float x) { return !std::isfinite(x); });
  };
  const std::vector<float> images = flow.sample(Labels(32, 8), how);
  const auto before = broken(images);
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 0; row < 32; ++row) {
    if (broken({images.begin() + 64 * row, images.begin() + 64 * (row + 1)}) > 0) rows.push_back(row);
  }
  CHECK(!rows.empty());
  CHECK(flow.nonfinite() == rows);
  CHECK(flow.nonfinite() == rows);  // asking changes nothing
  CHECK(said.find("of 32 samples are not finite (") != std::string::npos);
  how.redraw_nonfinite = 1;
  const auto after = broken(flow.sample(Labels(32, 8), how));
  CHECK(before > 0);
  CHECK(after < before);
  CHECK(failure([&] { flow.decode(flow.noise(0, 0, 1), {1}, how); }).says("cannot be redrawn"));
}

TEST_CASE("results that are not finite are named after every call, and only after that") {
  tarflow::Flow flow(TARFLOW_DEMO);
  std::vector<float> images(3 * 64, 0.0F);
  images[64 + 7] = 3e38F;  // finite, and nothing that comes of it is
  const Labels labels(3, 1), second{1};
  CHECK(flow.nonfinite().empty());
  flow.encode(images, labels);
  CHECK(flow.nonfinite() == second);
  flow.sample({1});
  CHECK(flow.nonfinite().empty());
  flow.log_likelihood(images, labels);
  CHECK(flow.nonfinite() == second);
  CHECK(failure([&] { flow.encode(images, Labels(3, 99)); }).status == TARFLOW_INPUT);
  CHECK(flow.nonfinite().empty());
  flow.denoise(images, labels);
  CHECK(flow.nonfinite() == second);
  flow.noise(0, 0, 2);
  CHECK(flow.nonfinite().empty());
  tarflow_flow* handle = nullptr;
  REQUIRE(tarflow_open(TARFLOW_DEMO, nullptr, &handle) == TARFLOW_OK);
  std::int64_t which = 9, count = 9;
  CHECK(tarflow_encode(handle, 3, images.data(), nullptr, nullptr, nullptr) == TARFLOW_OK);
  CHECK(tarflow_nonfinite(handle, nullptr, 0, &count) == TARFLOW_OK);
  CHECK(count == 1);
  CHECK(tarflow_nonfinite(handle, &which, 1, &count) == TARFLOW_OK);
  CHECK(which == 1);
  CHECK(tarflow_nonfinite(handle, nullptr, 1, &count) == TARFLOW_INPUT);
  CHECK(tarflow_nonfinite(handle, &which, -1, &count) == TARFLOW_INPUT);
  CHECK(tarflow_nonfinite(handle, &which, 1, nullptr) == TARFLOW_INPUT);
  tarflow_close(handle);
}

TEST_CASE("the log callback can cancel too") {
  tarflow::OpenOptions options;
  options.log = [](void*, int, const char*) { return 1; };
  CHECK(failure([&] { tarflow::Flow flow(TARFLOW_DEMO, options); }).status == TARFLOW_CANCELLED);
}

TEST_CASE("a program compiled with a shorter or longer struct is understood") {
  tarflow::Flow flow(TARFLOW_DEMO);
  struct Longer {
    tarflow::SampleOptions known;
    std::uint64_t more = 0;
  } longer;
  longer.known.seed = 3;
  longer.known.size = sizeof longer;
  const std::vector<float> expected = flow.sample({2}, longer.known);
  longer.more = 1;
  CHECK(failure([&] { flow.sample({2}, longer.known); }).says("does not know"));
  tarflow::SampleOptions shorter;
  shorter.seed = 3;
  shorter.guidance = 7;  // lies behind what is said to be known
  shorter.size = offsetof(tarflow_sample_options, guidance);
  CHECK(flow.sample({2}, shorter) == expected);
  tarflow_shape shape{};
  shape.size = offsetof(tarflow_shape, tokens);
  tarflow_flow* handle = nullptr;
  REQUIRE(tarflow_open(TARFLOW_DEMO, nullptr, &handle) == TARFLOW_OK);
  CHECK(tarflow_get_shape(handle, &shape) == TARFLOW_OK);
  CHECK(shape.image_size == 8);
  CHECK(shape.tokens == 0);
  tarflow_shape partial{};
  for (partial.size = sizeof(std::size_t); partial.size <= sizeof partial; ++partial.size) {  // whole fields, or nothing
    partial.name = partial.bundle = nullptr;
    CHECK(tarflow_get_shape(handle, &partial) == TARFLOW_OK);
    CHECK((partial.name != nullptr) == (partial.size >= offsetof(tarflow_shape, precision)));
    CHECK((partial.bundle != nullptr) == (partial.size == sizeof partial));
  }
  tarflow_close(handle);
  auto* const wild = reinterpret_cast<const char*>(0x41);  // half of it is said to be known
  tarflow_open_options open = tarflow_open_defaults();
  open.provider = wild;
  for (open.size = sizeof open.size; open.size < offsetof(tarflow_open_options, onnxruntime); ++open.size) {
    REQUIRE(tarflow_open(TARFLOW_DEMO, &open, &handle) == TARFLOW_OK);
    if (open.size + 1 < offsetof(tarflow_open_options, onnxruntime)) tarflow_close(handle);
  }
  tarflow_sample_options ask = tarflow_sample_defaults();
  ask.guided = wild;
  float image[64];
  for (ask.size = offsetof(tarflow_sample_options, guided); ask.size < offsetof(tarflow_sample_options, annealed); ++ask.size)
    CHECK(tarflow_sample(handle, 1, nullptr, &ask, image) == TARFLOW_OK);
  shape.size = 0;
  CHECK(tarflow_get_shape(handle, &shape) == TARFLOW_INPUT);
  tarflow_close(handle);
}

TEST_CASE("callbacks see every step and every block, and can cancel") {
  tarflow::Flow flow(TARFLOW_DEMO);
  struct Seen {
    std::vector<std::int64_t> done;
    std::vector<int> blocks;
    std::vector<std::uint64_t> firsts;
    std::vector<float> last;
    std::int64_t total = 0, stop = -1;
  } seen;
  tarflow::SampleOptions how;
  how.user = &seen;
  how.denoise = 0;
  how.first_sample = 14;
  how.reproducible = 1;
  how.progress = [](void* user, std::int64_t done, std::int64_t total, int, int) {
    auto* to = static_cast<Seen*>(user);
    to->done.push_back(done);
    to->total = total;
    return int(done == to->stop);
  };
  how.preview = [](void* user, int block, std::uint64_t first, std::int64_t count, const float* images) {
    auto* to = static_cast<Seen*>(user);
    to->blocks.push_back(block);
    to->firsts.push_back(first);
    if (block == 0) to->last.insert(to->last.end(), images, images + count * 64);
    return 0;
  };
  const std::vector<float> images = flow.sample(Labels(5, 1), how);  // tiles 14...15 and 16...18
  CHECK(seen.total == 2 * 4 * 15);
  CHECK(seen.done.size() == 120);
  CHECK(seen.done.back() == 120);
  CHECK(seen.blocks == std::vector<int>{3, 2, 1, 0, 3, 2, 1, 0});
  CHECK(seen.firsts == std::vector<std::uint64_t>{14, 14, 14, 14, 16, 16, 16, 16});
  CHECK(seen.last == images);  // the last preview is the raw sample
  seen.stop = 7;
  CHECK(failure([&] { flow.sample(Labels(5, 1), how); }).status == TARFLOW_CANCELLED);
  how.progress = nullptr;
  how.preview = [](void*, int block, std::uint64_t, std::int64_t, const float*) { return int(block == 2); };
  CHECK(failure([&] { flow.sample(Labels(5, 1), how); }).status == TARFLOW_CANCELLED);
  CHECK_NOTHROW(flow.sample({1}));
}

TEST_CASE("opening and closing a thousand times loses nothing") {  // under LeakSanitizer, and by what is resident
  const auto resident = [] {
    std::ifstream file("/proc/self/statm");
    std::int64_t all = 0, pages = 0;
    file >> all >> pages;
    return pages * 4096;
  };
  std::int64_t before = 0;
  for (int i = 0; i < 1000; ++i) {
    if (i == 100) before = resident();
    tarflow::Flow flow(TARFLOW_DEMO);
    tarflow::Flow other = flow.share();
    if (i % 50 == 0) other.sample({1});  // sessions are made when they are first needed
    REQUIRE(std::string(other.shape().bundle).size() == 64);
  }
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they keep freed memory
  CHECK(resident() - before < 8 << 20);
#else
  CHECK(before > 0);
#endif
}
