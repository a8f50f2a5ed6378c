// The C API: checks pointers and sizes, turns exceptions into statuses and messages, and lets one call run at a time.
#include "tarflow.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "error.hpp"
#include "flow.hpp"
#include "version.hpp"

using tarflow::internal::Error;
using tarflow::internal::field_error;
using tarflow::internal::Flow;
using tarflow::internal::Images;
using tarflow::internal::input_error;
using tarflow::internal::machine_error;
using tarflow::internal::Opened;
using tarflow::internal::Opening;
using tarflow::internal::Request;
using tarflow::internal::text_of;

struct tarflow_flow {
  std::unique_ptr<Flow> flow;  // null if opening failed
  std::string error, open_error;
  std::atomic<bool> busy{false};
};

namespace {

// How much of a struct is whole fields, if its first `size` bytes are known: a pointer of which half is known is none.
template <class T, class... Field>
std::size_t whole_fields(std::size_t size, Field T::*... fields) {
  if (size >= sizeof(T)) return sizeof(T);
  const T probe{};
  std::size_t whole = 0;
  const auto keep = [&](const void* field, std::size_t length) {
    const auto begin = static_cast<const unsigned char*>(field) - reinterpret_cast<const unsigned char*>(&probe);
    const std::size_t end = static_cast<std::size_t>(begin) + length;
    if (end <= size) whole = end;
  };
  (keep(&(probe.*fields), sizeof(probe.*fields)), ...);
  return whole;
}

std::size_t whole_fields(const tarflow_open_options&, std::size_t size) {
  using T = tarflow_open_options;
  return whole_fields(size, &T::size, &T::provider, &T::onnxruntime, &T::threads, &T::spinning, &T::low_memory, &T::log,
                      &T::user, &T::cuda_graph, &T::precision);
}

std::size_t whole_fields(const tarflow_sample_options&, std::size_t size) {
  using T = tarflow_sample_options;
  return whole_fields(size, &T::size, &T::seed, &T::first_sample, &T::guidance, &T::guided, &T::annealed, &T::certify,
                      &T::attention_temperature, &T::denoise, &T::batch_size, &T::reproducible, &T::redraw_nonfinite,
                      &T::progress, &T::preview, &T::user);
}

std::size_t whole_fields(const tarflow_shape&, std::size_t size) {
  using T = tarflow_shape;
  return whole_fields(size, &T::size, &T::channels, &T::image_size, &T::patch_size, &T::tokens, &T::patch_dim,
                      &T::blocks, &T::layers, &T::width, &T::classes, &T::denoises, &T::image_numbers, &T::name,
                      &T::precision, &T::backend, &T::bundle);
}

// A struct of the caller's, who may have been compiled with a shorter or longer one, as this library knows it. `name`
// is that of its type and of the function that initialises it.
template <class T>
T understood(const T* given, T known, const std::string& name) {
  if (given == nullptr) return known;
  if (given->size < sizeof(std::size_t) || given->size > 4096) {
    throw field_error(name + "_options.size", given->size, "what " + name + "_defaults() sets");
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (std::any_of(bytes + std::min(sizeof(T), given->size), bytes + given->size,
                  [](unsigned char b) { return b != 0; })) {
    throw input_error(name + "_options ask for something that libtarflow " TARFLOW_VERSION
                             " does not know; install the version that the program was compiled with");
  }
  std::memcpy(&known, given, whole_fields(known, given->size));
  return known;
}

// The call ends with a status, whatever happens inside, and leaves its message in the handle.
template <class Work>
int guarded(std::string& message, const Work& work) noexcept {
  const auto keep = [&message](int status, const char* text) {
    try {
      message = text;
    } catch (...) {
      message.clear();
    }
    return status;
  };
  try {
    work();
    return TARFLOW_OK;
  } catch (const Error& error) {
    return keep(error.status, error.what());
  } catch (const std::bad_alloc&) {
    return keep(TARFLOW_MACHINE, "out of memory; use a smaller `n` or `batch_size`");
  } catch (const std::length_error&) {
    return keep(TARFLOW_MACHINE, "out of memory; use a smaller `n` or `batch_size`");
  } catch (const std::exception& error) {
    return keep(TARFLOW_DEFECT, error.what());
  } catch (...) {
    return keep(TARFLOW_DEFECT, "an exception of unknown type");
  }
}

// Runs `work(flow)` unless another call does.
template <class Work>
int run(tarflow_flow* handle, const Work& work) noexcept {
  if (handle == nullptr) return TARFLOW_INPUT;
  if (handle->busy.exchange(true)) return TARFLOW_BUSY;
  const int status = guarded(handle->error, [&] {
    if (!handle->flow) throw input_error("this handle is not open: tarflow_open failed with: " + handle->open_error);
    handle->flow->call.begin();
    work(*handle->flow);
    if (handle->flow->call.cancelled()) throw tarflow::internal::Cancelled();
  });
  if (handle->flow) handle->flow->call.end();
  handle->busy = false;
  return status;
}

// The same for a call whose results may not be finite: what an earlier one left is gone.
template <class Work>
int compute(tarflow_flow* handle, const Work& work) noexcept {
  return run(handle, [&](Flow& on) {
    on.nonfinite.clear();
    work(on);
  });
}

template <class T>
void require(const T* pointer, const char* name, int64_t n = 1) {
  if (n < 1) throw field_error("n", n, "1 or more");
  if (pointer == nullptr) throw field_error(name, std::string("NULL"), "a pointer");
}

// What the last drawing found out of each of its samples.
template <class T>
void tell(const std::vector<T>& found, int64_t n, T* numbers) {
  if (found.empty()) throw input_error("the last samples were drawn without `certify`; set it to 1");
  if (static_cast<std::uint64_t>(n) != found.size()) {
    throw field_error("n", n, text_of(found.size()) + ", as many samples as were drawn last");
  }
  std::copy(found.begin(), found.end(), numbers);
}

Request request(Flow& of, int64_t n, const float* noise, const int64_t* labels, const tarflow_sample_options* options) {
  of.certificate.clear();  // one of a call before would pass for this one's
  of.log_prob.clear();
  return {of.model(), n, noise, labels, understood(options, tarflow_sample_defaults(), "tarflow_sample")};
}

}  // namespace

const char* tarflow_version(void) { return TARFLOW_VERSION; }

int tarflow_abi(void) { return TARFLOW_ABI; }

int tarflow_open(const char* bundle, const tarflow_open_options* options, tarflow_flow** flow) {
  if (flow == nullptr) return TARFLOW_INPUT;
  *flow = new (std::nothrow) tarflow_flow;
  if (*flow == nullptr) return TARFLOW_MACHINE;
  const int status = guarded((*flow)->open_error, [&] {
    require(bundle, "bundle");
    const Opening opening(understood(options, tarflow_open_defaults(), "tarflow_open"));
    try {
      (*flow)->flow = std::make_unique<Flow>(std::make_shared<const Opened>(bundle, opening));
    } catch (const std::bad_alloc&) {
      throw machine_error("out of memory while the bundle was opened; free some, or raise the process's limit");
    }
  });
  std::swap((*flow)->error, (*flow)->open_error);
  if (status != TARFLOW_OK) guarded((*flow)->open_error, [&] { (*flow)->open_error = (*flow)->error; });
  return status;
}

int tarflow_share(tarflow_flow* flow, tarflow_flow** other) {
  if (other == nullptr) return TARFLOW_INPUT;
  *other = nullptr;
  return run(flow, [&](Flow& from) {
    auto made = std::make_unique<tarflow_flow>();
    made->flow = std::make_unique<Flow>(from.opened);
    *other = made.release();
  });
}

int tarflow_get_shape(tarflow_flow* flow, tarflow_shape* shape) {
  return run(flow, [&](Flow& from) {
    require(shape, "shape");
    const auto& manifest = from.model();
    const auto& model = manifest.shape;
    const auto number = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    const std::size_t size = shape->size;
    if (size < sizeof size) throw field_error("shape.size", size, "sizeof(tarflow_shape)");
    const tarflow_shape known = {size,
                                 number(model.channels),
                                 number(model.image_size),
                                 number(model.patch_size),
                                 number(model.tokens()),
                                 number(model.patch_dim()),
                                 number(model.blocks),
                                 number(model.layers),
                                 number(model.width),
                                 number(model.classes),
                                 model.noise_std.value_or(0) > 0 ? 1 : 0,
                                 model.numbers(),
                                 manifest.name.c_str(),
                                 manifest.precision->name,
                                 from.opened->description.c_str(),
                                 from.opened->bundle.hash.c_str()};
    std::memcpy(shape, &known, whole_fields(known, size));
  });
}

const char* tarflow_class_name(tarflow_flow* flow, int64_t label) {
  if (flow == nullptr || !flow->flow) return nullptr;
  const auto& names = flow->flow->model().class_names;  // of an open bundle, which nothing changes
  return label < 0 || static_cast<std::uint64_t>(label) >= names.size() ? nullptr : names[std::size_t(label)].c_str();
}

int tarflow_sample(tarflow_flow* flow, int64_t n, const int64_t* labels, const tarflow_sample_options* options,
                   float* images) {
  return compute(flow, [&](Flow& on) {
    require(images, "images", n);
    on.sample(request(on, n, nullptr, labels, options), images);
  });
}

int tarflow_decode(tarflow_flow* flow, int64_t n, const float* noise, const int64_t* labels,
                   const tarflow_sample_options* options, float* images) {
  return compute(flow, [&](Flow& on) {
    require(noise, "noise", n);
    require(images, "images", n);
    on.sample(request(on, n, noise, labels, options), images);
  });
}

int tarflow_certificate(tarflow_flow* flow, int64_t n, float* errors) {
  return run(flow, [&](Flow& of) {
    require(errors, "errors", n);
    tell(of.certificate, n, errors);
  });
}

int tarflow_log_prob(tarflow_flow* flow, int64_t n, double* nats) {
  return run(flow, [&](Flow& of) {
    require(nats, "nats", n);
    tell(of.log_prob, n, nats);
  });
}

int tarflow_nonfinite(tarflow_flow* flow, int64_t* which, int64_t room, int64_t* count) {
  return run(flow, [&](Flow& of) {
    if (room < 0) throw field_error("room", room, "0 or more rows");
    if (room > 0) require(which, "which");
    require(count, "count");
    *count = static_cast<int64_t>(of.nonfinite.size());
    std::copy_n(of.nonfinite.begin(), std::min(room, *count), which);
  });
}

int tarflow_encode(tarflow_flow* flow, int64_t n, const float* images, const int64_t* labels, float* latents,
                   float* log_det) {
  return compute(flow, [&](Flow& on) {
    require(images, "images", n);
    on.encode(Images(on.model().shape, n, images, labels), latents, log_det);
  });
}

int tarflow_log_likelihood(tarflow_flow* flow, int64_t n, const float* images, const int64_t* labels, float* nats) {
  return compute(flow, [&](Flow& on) {
    require(images, "images", n);
    require(nats, "nats", n);
    on.log_likelihood(Images(on.model().shape, n, images, labels), nats);
  });
}

int tarflow_denoise(tarflow_flow* flow, int64_t n, const float* images, const int64_t* labels, double strength,
                    float* denoised) {
  return compute(flow, [&](Flow& on) {
    require(images, "images", n);
    require(denoised, "denoised", n);
    on.denoise(Images(on.model().shape, n, images, labels), strength, denoised);
  });
}

int tarflow_noise(tarflow_flow* flow, uint64_t seed, uint64_t first, int64_t n, float* noise) {
  return compute(flow, [&](Flow& of) {
    require(noise, "noise", n);
    of.noise(seed, first, n, noise);
  });
}

void tarflow_cancel(tarflow_flow* flow) {
  if (flow != nullptr && flow->flow) flow->flow->call.cancel();
}

const char* tarflow_error(tarflow_flow* flow) {
  if (flow == nullptr) return "no handle: it is NULL, or there was no memory for one";
  return flow->busy ? "another thread's call runs on this handle" : flow->error.c_str();
}

void tarflow_close(tarflow_flow* flow) { delete flow; }
