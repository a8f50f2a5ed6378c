#include "ort/weights.hpp"

#include "files.hpp"
#include "ort/sessions.hpp"

namespace tarflow::internal {
namespace {

// Int8 every session packs for itself.
bool shared(ONNXTensorElementDataType type) {
  return type == kFloat || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ||
         type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
}

// Whether a tensor of this shape has as many bytes as are read.
bool whole(const Weight& weight, std::uint64_t bytes) {
  for (const std::int64_t size : weight.shape) {
    const auto times = static_cast<std::uint64_t>(size);
    if (times == 0 || bytes > weight.length / times) return false;
    bytes *= times;
  }
  return bytes == weight.length;
}

}  // namespace

std::shared_ptr<const void> DeviceWeights::give(OrtSessionOptions* options, std::size_t block,
                                                const std::string& graph) {
  const Bundle& bundle = sessions_.bundle;
  std::shared_ptr<Block> held = blocks_[block].lock();
  if (!held) blocks_[block] = held = std::make_shared<Block>();
  const std::string path = bundle.path(graph);
  const std::string content = File(path).read(bundle.manifest.files.at(graph).size);
  const Mapping mapping(bundle.weights());
  for (const Weight& weight : weights_of(content, path, mapping.size())) {
    const auto type = static_cast<ONNXTensorElementDataType>(weight.type);
    if (!shared(type) || !whole(weight, item_size(type))) continue;  // ONNX Runtime reads these itself, or refuses
    Tensor& tensor = (*held)[{weight.start, weight.shape, weight.type}];
    if (!tensor.value) {
      tensor.memory = std::make_unique<Buffer>(sessions_.device, weight.length);
      sessions_.device.write(tensor.memory->address, static_cast<const std::byte*>(mapping.data()) + weight.start,
                             weight.length);
      tensor.value = sessions_.tensor(tensor.memory->address, weight.shape, type);
    }
    sessions_.library.check(
        sessions_.library.api->AddInitializer(options, weight.name.c_str(), tensor.value.get()), "it refuses weights");
  }
  return held;
}

}  // namespace tarflow::internal
