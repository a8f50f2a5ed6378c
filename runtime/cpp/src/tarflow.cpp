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
  std::memcpy(&known, given, std::min(sizeof(T), given->size));
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

template <class T>
void require(const T* pointer, const char* name, int64_t n = 1) {
  if (n < 1) throw field_error("n", n, "1 or more");
  if (pointer == nullptr) throw field_error(name, std::string("NULL"), "a pointer");
}

Request request(Flow& of, int64_t n, const float* noise, const int64_t* labels, const tarflow_sample_options* options) {
  of.certificate.clear();  // one of a call before would pass for this one's
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
    (*flow)->flow = std::make_unique<Flow>(std::make_shared<const Opened>(bundle, opening));
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
    std::memcpy(shape, &known, std::min(size, sizeof known));
  });
}

int tarflow_sample(tarflow_flow* flow, int64_t n, const int64_t* labels, const tarflow_sample_options* options,
                   float* images) {
  return run(flow, [&](Flow& on) {
    require(images, "images", n);
    on.sample(request(on, n, nullptr, labels, options), images);
  });
}

int tarflow_decode(tarflow_flow* flow, int64_t n, const float* noise, const int64_t* labels,
                   const tarflow_sample_options* options, float* images) {
  return run(flow, [&](Flow& on) {
    require(noise, "noise", n);
    require(images, "images", n);
    on.sample(request(on, n, noise, labels, options), images);
  });
}

int tarflow_certificate(tarflow_flow* flow, int64_t n, float* errors) {
  return run(flow, [&](Flow& of) {
    require(errors, "errors", n);
    if (of.certificate.empty()) throw input_error("the last samples were drawn without `certify`; set it to 1");
    if (static_cast<std::uint64_t>(n) != of.certificate.size()) {
      throw field_error("n", n, text_of(of.certificate.size()) + ", as many samples as were drawn last");
    }
    std::copy(of.certificate.begin(), of.certificate.end(), errors);
  });
}

int tarflow_encode(tarflow_flow* flow, int64_t n, const float* images, const int64_t* labels, float* latents,
                   float* log_det) {
  return run(flow, [&](Flow& on) {
    require(images, "images", n);
    on.encode(Images(on.model().shape, n, images, labels), latents, log_det);
  });
}

int tarflow_log_likelihood(tarflow_flow* flow, int64_t n, const float* images, const int64_t* labels, float* nats) {
  return run(flow, [&](Flow& on) {
    require(images, "images", n);
    require(nats, "nats", n);
    on.log_likelihood(Images(on.model().shape, n, images, labels), nats);
  });
}

int tarflow_denoise(tarflow_flow* flow, int64_t n, const float* images, const int64_t* labels, double strength,
                    float* denoised) {
  return run(flow, [&](Flow& on) {
    require(images, "images", n);
    require(denoised, "denoised", n);
    on.denoise(Images(on.model().shape, n, images, labels), strength, denoised);
  });
}

int tarflow_noise(tarflow_flow* flow, uint64_t seed, uint64_t first, int64_t n, float* noise) {
  return run(flow, [&](Flow& of) {
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
