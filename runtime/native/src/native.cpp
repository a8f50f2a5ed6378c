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
  tarflow_native_decoding(tarflow_native_model& of, std::shared_ptr<const Block> part, const Batch& given)
      : model(of),
        block(std::move(part)),
        batch(of.shape, given, of.own().take(), block->precision == Precision::int8),
        whole(block, of.shape, of.kernels, batch, of.threads) {}

  // Patches start + 1 ... stop of some images, from those before each.
  void run(Decoding& decoding, std::int64_t start, std::int64_t stop, const std::vector<std::int64_t>& images, Team& team) {
    const std::int64_t patch_dim = model.shape.patch_dim, tokens = model.shape.tokens;
    std::vector<float> found(images.size() * static_cast<std::size_t>(patch_dim));
    for (std::int64_t position = start; position < stop; ++position) {
      decoding.evaluate(position, 1, images, team, found.data());
      const float* from = found.data();
      for (const std::int64_t image : images) {
        std::copy_n(from, patch_dim, batch.x + (image * tokens + position + 1) * patch_dim);
        from += patch_dim;
      }
    }
  }

  // With the model's threads, or alone where they are busy: the bits are the same. Many images are divided among the
  // threads, none of which waits for another until all is done: while one reads keys, another multiplies.
  void run(std::int64_t start, std::int64_t stop) {
    constexpr std::int64_t kLane = 16;  // rows: fewer gain more from sharing each product
    Crew& crew = model.own();
    const std::unique_lock<std::mutex> turn(crew.sharing, std::try_to_lock);
    const std::int64_t rows = batch.images * batch.branches;
    const std::int64_t count = turn.owns_lock() ? std::min(std::int64_t{model.threads}, batch.images) : 1;
    const bool divided = count > 1 && rows >= kLane * count;
    std::vector<std::vector<std::int64_t>> images(static_cast<std::size_t>(divided ? count : 1));
    for (std::int64_t image = 0; image < batch.images; ++image)
      images[static_cast<std::size_t>(image * std::int64_t(images.size()) / batch.images)].push_back(image);
    if (!divided) return run(whole, start, stop, images[0], turn.owns_lock() ? crew.team : model.alone);
    while (std::int64_t(lanes.size()) < count)
      lanes.push_back(std::make_unique<Decoding>(block, model.shape, model.kernels, batch, 1));
    const double forever = 1e15;  // multiplications: a thread that is put aside for a while is waited for
    crew.team.run(count, forever, [&](std::int64_t lane, int) {
      const auto at = static_cast<std::size_t>(lane);
      run(*lanes[at], start, stop, images[at], model.alone);
    });
  }

  // evaluate() with the model's threads, or alone where they are busy: the bits are the same.
  void evaluate(std::int64_t position, std::int64_t window, const std::vector<std::int64_t>& images, float* found) {
    Crew& crew = model.own();
    const std::unique_lock<std::mutex> turn(crew.sharing, std::try_to_lock);
    whole.evaluate(position, window, images, turn.owns_lock() ? crew.team : model.alone, found);
  }

  tarflow_native_model& model;
  const std::shared_ptr<const Block> block;
  Held batch;
  Decoding whole;
  std::vector<std::unique_ptr<Decoding>> lanes;
};

namespace {

Shape checked(const tarflow_native_shape& given) {
  const Shape shape = {given.tokens, given.patch_dim, given.width,   given.head_dim,
                       given.layers, given.blocks,    given.classes, given.nvp != 0};
  shape.check();
  return shape;
}

void check_window(const Shape& shape, std::int64_t position, std::int64_t window) {
  const std::int64_t tokens = shape.tokens;
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

const char* tarflow_native_slower() {
  const char* isa = tarflow_native_isa();
  if (isa == nullptr || isa == std::string("baseline")) return "without AVX2 and FMA it is the slower one";
  if (isa == std::string("neon")) return "on Arm nobody has measured which is faster";
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
    *decoding = new tarflow_native_decoding(*model, model->block(block), given);
  });
}

void tarflow_native_end(tarflow_native_decoding* decoding) {
  if (decoding == nullptr) return;
  if (!decoding->model.one_block) guarded([&] { decoding->model.own().give(std::move(decoding->batch.cache)); });
  delete decoding;
}

float* tarflow_native_x(tarflow_native_decoding* decoding) { return decoding->batch.x.data(); }

int tarflow_native_run(tarflow_native_decoding* decoding, int64_t start, int64_t stop) {
  return guarded([&] {
    if (start >= stop) return;
    check_window(decoding->model.shape, start, stop - start);
    decoding->run(start, stop);
  });
}

int tarflow_native_evaluate(tarflow_native_decoding* decoding, int64_t position, int64_t window, const uint8_t* rows,
                            float* found) {
  return guarded([&] {
    const tarflow_native_model& model = decoding->model;
    const std::int64_t images = decoding->batch.images;
    check_window(model.shape, position, window);
    const std::int64_t size = window * model.shape.patch_dim;
    std::vector<std::int64_t> chosen;
    for (std::int64_t image = 0; image < images; ++image)
      if (rows == nullptr || rows[image] != 0) chosen.push_back(image);
    if (chosen.empty()) return;
    const bool all = static_cast<std::int64_t>(chosen.size()) == images;
    std::vector<float> some(all ? 0 : chosen.size() * static_cast<std::size_t>(size));
    decoding->evaluate(position, window, chosen, all ? found : some.data());
    for (std::size_t i = 0; i < chosen.size() && !all; ++i)
      std::copy_n(some.data() + static_cast<std::int64_t>(i) * size, size, found + chosen[i] * size);
  });
}
