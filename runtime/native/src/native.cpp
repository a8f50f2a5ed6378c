#include "native.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "decoding.hpp"
#include "isa.hpp"

using namespace tarflow::native;

namespace {

thread_local std::string last_message;  // NOLINT

int failed(int code, const char* message) noexcept {
  try {
    last_message = message;
  } catch (...) {
    last_message.clear();  // no memory even for that
  }
  return code;
}

template <class Work>
int guarded(const Work& work) noexcept {
  try {
    work();
    return TARFLOW_NATIVE_OK;
  } catch (const Wrong& wrong) {
    return failed(TARFLOW_NATIVE_WRONG, wrong.what());
  } catch (const std::bad_alloc&) {
    return failed(TARFLOW_NATIVE_MEMORY, "there is not enough memory");
  } catch (const std::length_error&) {  // of a vector
    return failed(TARFLOW_NATIVE_MEMORY, "there is not enough memory");
  } catch (const std::system_error&) {  // of a thread
    return failed(TARFLOW_NATIVE_MEMORY, "the machine starts no more threads");
  } catch (const std::exception& error) {
    return failed(TARFLOW_NATIVE_FAULT, error.what());
  }
}

constexpr std::size_t kSpare = 2;

// Threads of one process, what they take turns with, and caches that are left for the next. A forked process begins
// anew: threads stay behind, and what they held in their hands is nobody's.
struct Crew {
  explicit Crew(int threads) : team(threads) {}

  Cache take() {
    const std::lock_guard<std::mutex> lock(keeping);
    if (caches.empty()) return {};
    Cache cache = std::move(caches.back());
    caches.pop_back();
    return cache;
  }

  void give(Cache cache) {
    const std::lock_guard<std::mutex> lock(keeping);
    if (caches.size() < kSpare) caches.push_back(std::move(cache));
  }

  const pid_t process = getpid();
  std::mutex packing, sharing, keeping;
  std::vector<Cache> caches;
  Team team;
};

}  // namespace

struct tarflow_native_model {
  tarflow_native_model(const void* file, std::uint64_t size, const Shape& of, std::vector<Precision> in, int threads_, bool one)
      : weights(static_cast<const std::uint8_t*>(file), size),
        shape(of),
        kernels(best_kernels()),
        precisions(std::move(in)),
        threads(threads_),
        one_block(one),
        blocks(static_cast<std::size_t>(of.blocks)),
        crew(new Crew(threads_)) {}

  ~tarflow_native_model() {
    Crew* last = crew.load();
    if (last->process == getpid()) delete last;
  }

  // This process's.
  Crew& own() {
    Crew* found = crew.load();
    if (found->process == getpid()) return *found;
    auto mine = std::make_unique<Crew>(threads);
    if (crew.compare_exchange_strong(found, mine.get())) return *mine.release();  // the parent's is left alone
    return *found;  // another thread was faster
  }

  std::shared_ptr<const Block> block(std::int64_t index) {
    Crew& mine = own();
    const std::lock_guard<std::mutex> lock(mine.packing);
    std::shared_ptr<const Block>& place = blocks[static_cast<std::size_t>(index)];
    if (place != nullptr) return place;
    if (one_block) std::fill(blocks.begin(), blocks.end(), nullptr);
    const std::unique_lock<std::mutex> turn(mine.sharing);
    place = std::make_shared<Block>(weights, shape, index, precisions[static_cast<std::size_t>(index)], mine.team);
    return place;
  }

  const Safetensors weights;
  const Shape shape;
  const Kernels& kernels;
  const std::vector<Precision> precisions;
  const int threads;
  const bool one_block;
  Team alone{1};  // of callers that come while the threads work for another
  std::vector<std::shared_ptr<const Block>> blocks;
  std::atomic<Crew*> crew;
};

struct tarflow_native_decoding {
  // evaluate() with the model's threads, or alone where they are busy: the bits are the same.
  void evaluate(std::int64_t position, std::int64_t window, const std::vector<std::int64_t>& images, float* found) {
    Crew& crew = model.own();
    const std::unique_lock<std::mutex> turn(crew.sharing, std::try_to_lock);
    decoding.evaluate(position, window, images, turn.owns_lock() ? crew.team : model.alone, found);
  }

  tarflow_native_model& model;
  Decoding decoding;
};

namespace {

Shape checked(const tarflow_native_shape& given) {
  const Shape shape = {given.tokens, given.patch_dim, given.width,   given.head_dim,
                       given.layers, given.blocks,    given.classes, given.nvp != 0};
  shape.check();
  return shape;
}

void check_window(const Decoding& decoding, std::int64_t position, std::int64_t window) {
  const std::int64_t tokens = decoding.shape().tokens;
  if (position < 0 || window < 1 || window >= tokens || position >= tokens - window)
    throw Wrong("a window's last position has no next patch");
}

}  // namespace

const char* tarflow_native_message() { return last_message.c_str(); }

const char* tarflow_native_isa() {
  const char* name = nullptr;
  guarded([&] { name = best_kernels().name; });
  return name;
}

const char* tarflow_native_slower(const tarflow_native_shape* shape, int32_t precision) {
  constexpr double kBatch = 64, kNear = 16 << 20;  // bytes of keys and values that stay in a processor's caches
  const char* isa = tarflow_native_isa();
  if (isa == nullptr || isa == std::string("baseline")) return "without AVX2 and FMA it is the slower one";
  if (isa == std::string("neon")) return "on Arm nobody has measured which is faster";
  const double layers = static_cast<double>(shape->layers), tokens = static_cast<double>(shape->tokens);
  const double cache = 2 * kBatch * layers * tokens * static_cast<double>(shape->width) * sizeof(float);
  if (precision != TARFLOW_NATIVE_INT8 && cache > kNear)
    return "in float32 it is slower for large batches of a model of this size";
  return nullptr;
}

int tarflow_native_open(const void* file, uint64_t size, const tarflow_native_shape* shape, const int32_t* precisions,
                        int32_t threads, int32_t one_block, tarflow_native_model** model) {
  return guarded([&] {
    const Shape of = checked(*shape);
    if (threads < 1 || threads > 64) throw Wrong("threads are not in 1 ... 64");
    std::vector<Precision> in;
    for (std::int64_t k = 0; k < of.blocks; ++k) {
      if (precisions[k] < TARFLOW_NATIVE_FP32 || precisions[k] > TARFLOW_NATIVE_INT8)
        throw Wrong("a block's precision is none of fp32, int16, bf16, int8");
      in.push_back(static_cast<Precision>(precisions[k]));
    }
    *model = new tarflow_native_model(file, size, of, std::move(in), threads, one_block != 0);
  });
}

void tarflow_native_close(tarflow_native_model* model) { delete model; }

int tarflow_native_begin(tarflow_native_model* model, int64_t block, const tarflow_native_batch* batch,
                         tarflow_native_decoding** decoding) {
  return guarded([&] {
    constexpr std::int64_t kMost = std::int64_t{1} << 24;
    if (block < 0 || block >= model->shape.blocks) throw Wrong("the model has no such block");
    if (batch->images < 1 || batch->images > kMost || batch->branches < 1 || batch->branches > 64)
      throw Wrong("a batch of so many images or branches cannot be decoded");
    const Batch given = {batch->images, batch->branches, batch->z, batch->labels, batch->mix, batch->inverse_temperature};
    *decoding = new tarflow_native_decoding{
        *model, Decoding(model->block(block), model->shape, model->kernels, given, model->own().take(), model->threads)};
  });
}

void tarflow_native_end(tarflow_native_decoding* decoding) {
  if (decoding == nullptr) return;
  if (!decoding->model.one_block) guarded([&] { decoding->model.own().give(decoding->decoding.leave()); });
  delete decoding;
}

float* tarflow_native_x(tarflow_native_decoding* decoding) { return decoding->decoding.x(); }

int tarflow_native_run(tarflow_native_decoding* decoding, int64_t start, int64_t stop) {
  return guarded([&] {
    Decoding& own = decoding->decoding;
    if (start >= stop) return;
    check_window(own, start, stop - start);
    const std::int64_t patch_dim = own.shape().patch_dim, tokens = own.shape().tokens;
    std::vector<std::int64_t> all;
    for (std::int64_t image = 0; image < own.images(); ++image) all.push_back(image);
    std::vector<float> found(static_cast<std::size_t>(own.images() * patch_dim));
    for (std::int64_t position = start; position < stop; ++position) {
      decoding->evaluate(position, 1, all, found.data());
      for (std::int64_t image = 0; image < own.images(); ++image)
        std::copy_n(found.data() + image * patch_dim, patch_dim, own.x() + (image * tokens + position + 1) * patch_dim);
    }
  });
}

int tarflow_native_evaluate(tarflow_native_decoding* decoding, int64_t position, int64_t window, const uint8_t* rows,
                            float* found) {
  return guarded([&] {
    Decoding& own = decoding->decoding;
    check_window(own, position, window);
    const std::int64_t size = window * own.shape().patch_dim;
    std::vector<std::int64_t> chosen;
    for (std::int64_t image = 0; image < own.images(); ++image)
      if (rows == nullptr || rows[image] != 0) chosen.push_back(image);
    if (chosen.empty()) return;
    const bool all = static_cast<std::int64_t>(chosen.size()) == own.images();
    std::vector<float> some(all ? 0 : chosen.size() * static_cast<std::size_t>(size));
    decoding->evaluate(position, window, chosen, all ? found : some.data());
    for (std::size_t i = 0; i < chosen.size() && !all; ++i)
      std::copy_n(some.data() + static_cast<std::int64_t>(i) * size, size, found + chosen[i] * size);
  });
}
