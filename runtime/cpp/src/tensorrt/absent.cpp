// Of a library that was built without TensorRT.
#include "error.hpp"
#include "tensorrt/backend.hpp"

namespace tarflow::internal {

std::unique_ptr<Backend> open_tensorrt(const Bundle&, const Opening&) {
  throw machine_error(
      "this libtarflow was built without TensorRT; build it with -DTENSORRT_ROOT=... where the CUDA toolkit is "
      "installed, or use `provider` cuda or cpu");
}

}  // namespace tarflow::internal
