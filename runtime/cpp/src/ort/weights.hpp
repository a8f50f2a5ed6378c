// Weights on a GPU, once for all graphs of a block: without them every session would bring a copy of its own.
#pragma once

#include <map>
#include <memory>
#include <tuple>

#include "bundle.hpp"
#include "graph.hpp"
#include "ort/device.hpp"
#include "ort/tensors.hpp"

namespace tarflow::internal {

class Sessions;

// Whoever uses it, or lets go of what it gave, touches the device.
class DeviceWeights {
 public:
  explicit DeviceWeights(const Sessions& sessions) : sessions_(sessions) {}

  // Lets the session that is opened with `options` take a graph's weights from here. They are there until nobody holds
  // what is returned, which has to outlive the session.
  std::shared_ptr<const void> give(OrtSessionOptions* options, std::size_t block, const std::string& graph);

 private:
  struct Tensor {
    std::unique_ptr<Buffer> memory;
    Owned<OrtValue> value;
  };
  using Block = std::map<std::tuple<std::uint64_t, Shape, std::uint64_t>, Tensor>;  // by first byte, shape and type

  const Sessions& sessions_;
  std::map<std::size_t, std::weak_ptr<Block>> blocks_;
};

}  // namespace tarflow::internal
