// The tensors of a weights.safetensors that is in memory. Nothing it says is believed: whatever is read was checked first.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace tarflow::native {

// What a weights file or a shape has wrong, in a sentence.
struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type { f32, f16, bf16, i8, other };

struct Tensor {
  Type type = Type::other;
  std::vector<std::int64_t> shape;
  const std::uint8_t* data = nullptr;

  std::int64_t count() const;
  // Numbers `start` to `start + count - 1` as floats.
  void read(std::int64_t start, std::int64_t count, float* out) const;
};

class Safetensors {
 public:
  // Refers to `file`. Throws Wrong.
  Safetensors(const std::uint8_t* file, std::uint64_t size);

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  // Throws Wrong if there is none of this name and shape.
  const Tensor& get(const std::string& name, const std::vector<std::int64_t>& shape) const;
  std::vector<float> floats(const std::string& name, const std::vector<std::int64_t>& shape) const;

 private:
  std::map<std::string, Tensor> tensors_;
};

}  // namespace tarflow::native
