#include "tensorrt/backend.hpp"

#include <NvInferRuntime.h>

#include "gpus.hpp"
#include "tensorrt/steps.hpp"
#include "tensorrt/turn.hpp"

namespace tarflow::internal {
namespace {

// The caller's own, unless another one is asked for.
int device_of(const Opening& opening) {
  return opening.device.empty() ? current_device() : numbered_gpu(opening.device);
}

Here this_machine(const Opening& opening) {
  int devices = 0;
  const cudaError_t status =
      cudaGetDeviceCount(&devices);  // before any runtime: without a driver it is a bogus pointer
  if (status != cudaSuccess || devices == 0) {
    throw machine_error(std::string("no NVIDIA GPU can be used here (") + cudaGetErrorName(status) +
                        "): engines need one, with its driver; use `provider` cpu");
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device_of(opening)), "describe the device");
  const int version = getInferLibVersion();  // 110400 is 11.4.0
  return {"tensorrt", text_of(version / 10000) + "." + text_of(version / 100 % 100) + "." + text_of(version % 100),
          properties.name, text_of(properties.major) + "." + text_of(properties.minor)};
}

// Everything runs on one stream, for one caller at a time.
class TensorRtBackend final : public Backend {
 public:
  TensorRtBackend(const Bundle& bundle, const Opening& opening)
      : shape_(bundle.manifest.shape),
        cuda_graph_(opening.cuda_graph),
        here_(this_machine(opening)),
        device_(device_of(opening)) {
    const OnDevice device(device_);
    engines_ = std::make_unique<Engines>(bundle, opening, here_);
    arrays_ = std::make_unique<Arrays>(engines_->stream);
  }

  ~TensorRtBackend() override {
    int before = 0;  // nothing may be thrown here
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaStreamSynchronize(engines_->stream);
    arrays_.reset();
    engines_.reset();
    cudaSetDevice(before);
  }

  void prepare(Call& call) const override { turns_.prepare(call); }

  std::string description() const override {
    return "TensorRT " + here_.version + " " + engines_->built.record.precision->name + ", " + here_.gpu;
  }

  void invert(const Pass& pass, const float* z, float* x, const OnStep& on_step) override {
    const Turn turn(turns_, pass.call);
    const OnDevice device(device_);
    const std::vector<Part> parts = parts_of(pass.branches.batch, profile(pass, kStep));
    for (const Part& part : parts) {
      const bool last = &part == &parts.back();  // the watcher counts the steps of one part alone
      Steps steps(*engines_, *arrays_, pass, part, z);
      steps.run(cuda_graph_, [&](std::int64_t position) {
        pass.call.check();
        if (last) on_step(position);
      });
      steps.read(x);
    }
  }

  void forward(const Pass& pass, const float* x, float* z, float* log_det) override {
    const Turn turn(turns_, pass.call);
    const OnDevice device(device_);
    const Branches& branches = pass.branches;
    for (const Part& part : parts_of(branches.batch, profile(pass, kForward))) {
      pass.call.check();
      const std::vector<Tensor> inputs = {
          upload("x", part, x), labels_of(branches, part, *arrays_),
          arrays_->upload("mix", branches.mix, {2, branches.count, shape_.tokens()}),
          arrays_->upload("inverse_temperature", branches.inverse_temperature, {branches.count})};
      void* const found = arrays_->place("z", part.batch * shape_.numbers() * 4);
      void* const sum = arrays_->place("log_det", part.batch * 4);
      launch(pass, kForward, inputs, {{"z", found, {}}, {"log_det", sum, {}}});
      arrays_->download(z + part.start * shape_.numbers(), found, part.rows * shape_.numbers());
      arrays_->download(log_det + part.start, sum, part.rows);
    }
  }

  void gradient(const Pass& pass, const float* x, float* grad) override {
    const Turn turn(turns_, pass.call);
    const OnDevice device(device_);
    for (const Part& part : parts_of(pass.branches.batch, profile(pass, kGradient))) {
      pass.call.check();
      const std::vector<float> ones(static_cast<std::size_t>(part.batch), 1.0F);
      const std::vector<Tensor> inputs = {upload("x", part, x), labels_of(pass.branches, part, *arrays_),
                                          upload("grad_z", part, grad),
                                          arrays_->upload("grad_log_det", ones, {part.batch})};
      void* const found = arrays_->place("grad_x", part.batch * shape_.numbers() * 4);
      launch(pass, kGradient, inputs, {{"grad_x", found, {}}});
      arrays_->download(grad + part.start * shape_.numbers(), found, part.rows * shape_.numbers());
    }
  }

 private:
  Profile profile(const Pass& pass, Kind kind) const { return engines_->profile(kind, pass.branches.count).second; }

  void launch(const Pass& pass, Kind kind, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
    engines_->launch(pass.block, kind, engines_->profile(kind, pass.branches.count).first, inputs, outputs);
  }

  Tensor upload(const char* name, const Part& part, const float* x) {
    return arrays_->upload(name, images_of(shape_, part, x), {part.batch, shape_.tokens(), shape_.patch_dim()});
  }

  const ModelShape& shape_;
  const bool cuda_graph_;
  const Here here_;
  const int device_;
  mutable Turns turns_;
  std::unique_ptr<Engines> engines_;
  std::unique_ptr<Arrays> arrays_;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, const Opening& opening) {
  return std::make_unique<TensorRtBackend>(bundle, opening);
}

}  // namespace tarflow::internal
