#include "safetensors.hpp"

#include <cstring>
#include <limits>

namespace tarflow::native {
namespace {

constexpr std::uint64_t kLargestHeader = std::uint64_t{64} << 20;
constexpr std::int64_t kMostNumbers = std::int64_t{1} << 48;

// Reads the JSON of a header: one object of tensors, each an object of two arrays and a string, and of metadata, strings.
class Header {
 public:
  explicit Header(std::string_view text) : text_(text) {}

  bool take(char what) {
    skip();
    if (at_ >= text_.size() || text_[at_] != what) return false;
    ++at_;
    return true;
  }

  void expect(char what) {
    if (!take(what)) throw Wrong(std::string("the weights' header is no JSON: expected '") + what + "' at byte " +
                                 std::to_string(at_));
  }

  // Escapes are kept as they are: no name of ours has any.
  std::string string() {
    expect('"');
    const std::size_t start = at_;
    while (at_ < text_.size() && text_[at_] != '"') at_ += text_[at_] == '\\' ? 2 : 1;
    if (at_ >= text_.size()) throw Wrong("the weights' header ends in a string");
    return std::string(text_.substr(start, at_++ - start));
  }

  std::int64_t natural() {
    skip();
    const std::size_t start = at_;
    std::int64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      value = 10 * value + (text_[at_] - '0');
      if (value > kMostNumbers) throw Wrong("a number of the weights' header is too large");
    }
    if (at_ == start) throw Wrong("the weights' header is no JSON: expected a number at byte " + std::to_string(at_));
    return value;
  }

  std::vector<std::int64_t> naturals() {
    std::vector<std::int64_t> values;
    expect('[');
    if (take(']')) return values;
    do {
      values.push_back(natural());
    } while (take(','));
    expect(']');
    return values;
  }

  void end() {
    skip();
    if (at_ != text_.size()) throw Wrong("the weights' header goes on behind its end");
  }

 private:
  void skip() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
  }

  const std::string_view text_;
  std::size_t at_ = 0;
};

Type type_of(const std::string& word) {
  if (word == "F32") return Type::f32;
  if (word == "F16") return Type::f16;
  if (word == "BF16") return Type::bf16;
  return word == "I8" ? Type::i8 : Type::other;
}

std::uint64_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::i8 ? 1 : 2; }

float from_half(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 0) {  // below the smallest normal number
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const std::uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T little(const std::uint8_t* at) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) value = static_cast<T>(value | static_cast<T>(T{at[i]} << (8 * i)));
  return value;
}

void read_metadata(Header& header) {
  header.expect('{');
  if (header.take('}')) return;
  do {
    header.string();
    header.expect(':');
    header.string();
  } while (header.take(','));
  header.expect('}');
}

Tensor read_tensor(Header& header, const std::string& name, const std::uint8_t* data, std::uint64_t room) {
  Tensor tensor;
  std::vector<std::int64_t> place;
  header.expect('{');
  do {
    const std::string key = header.string();
    header.expect(':');
    if (key == "dtype")
      tensor.type = type_of(header.string());
    else if (key == "shape")
      tensor.shape = header.naturals();
    else if (key == "data_offsets")
      place = header.naturals();
    else
      throw Wrong("tensor '" + name + "' of the weights has a strange key");
  } while (header.take(','));
  header.expect('}');
  if (place.size() != 2 || place[0] > place[1] || static_cast<std::uint64_t>(place[1]) > room)
    throw Wrong("tensor '" + name + "' does not lie inside the weights file");
  if (tensor.type != Type::other &&
      static_cast<std::uint64_t>(tensor.count()) * bytes_of(tensor.type) != static_cast<std::uint64_t>(place[1] - place[0]))
    throw Wrong("tensor '" + name + "' has another size than its shape says");
  tensor.data = data + place[0];
  return tensor;
}

}  // namespace

std::int64_t Tensor::count() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) {
    if (size != 0 && count > kMostNumbers / size) throw Wrong("a tensor of the weights is too large");
    count *= size;
  }
  return count;
}

void Tensor::read(std::int64_t start, std::int64_t count, float* out) const {
  if (type == Type::f32) {
    std::memcpy(out, data + 4 * start, static_cast<std::size_t>(count) * 4);  // machines here are little-endian
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (type == Type::i8) {
      out[i] = static_cast<float>(static_cast<std::int8_t>(data[start + i]));
      continue;
    }
    const std::uint16_t half = little<std::uint16_t>(data + 2 * (start + i));
    const std::uint32_t bits = std::uint32_t{half} << 16;
    if (type == Type::f16)
      out[i] = from_half(half);
    else
      std::memcpy(out + i, &bits, 4);
  }
}

Safetensors::Safetensors(const std::uint8_t* file, std::uint64_t size) {
  if (size < 8) throw Wrong("the weights file ends before its header");
  const std::uint64_t length = little<std::uint64_t>(file);
  if (length > kLargestHeader || length > size - 8) throw Wrong("the weights file ends inside its header");
  Header header({reinterpret_cast<const char*>(file) + 8, static_cast<std::size_t>(length)});
  header.expect('{');
  if (!header.take('}')) {
    do {
      const std::string name = header.string();
      header.expect(':');
      if (name == "__metadata__")
        read_metadata(header);
      else
        tensors_[name] = read_tensor(header, name, file + 8 + length, size - 8 - length);
    } while (header.take(','));
    header.expect('}');
  }
  header.end();
}

const Tensor& Safetensors::get(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw Wrong("the weights file has no tensor '" + name + "'");
  if (found->second.shape != shape || found->second.type == Type::other)
    throw Wrong("tensor '" + name + "' has another shape or type than the model");
  return found->second;
}

std::vector<float> Safetensors::floats(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const Tensor& tensor = get(name, shape);
  std::vector<float> values(static_cast<std::size_t>(tensor.count()));
  tensor.read(0, tensor.count(), values.data());
  return values;
}

}  // namespace tarflow::native
