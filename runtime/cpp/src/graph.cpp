// A reader of as much of ONNX's wire format (protobuf) as check_graph takes. It knows every place where a node, a
// tensor or an opset may stand, steps over all else, and looks at no byte twice. Sub-graphs wait in a list: however
// deep they nest, nothing recurses. runtime/graph.py is the same in Python.
#include "graph.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "error.hpp"
#include "manifest.hpp"
#include "operators.hpp"

namespace tarflow::internal {
namespace {

constexpr std::int64_t kMostFields = 1 << 18;  // an export's graphs have some hundred for each layer

enum class Message { kModel, kTraining, kFunction, kGraph, kNode, kAttribute, kSparseTensor, kTensor, kOpset };

// A field of a message that holds another.
struct Inner {
  Message outer;
  std::uint64_t number;
  Message inner;
};
constexpr Inner kInner[] = {
    {Message::kModel, 7, Message::kGraph},           {Message::kModel, 8, Message::kOpset},
    {Message::kModel, 20, Message::kTraining},       {Message::kModel, 25, Message::kFunction},
    {Message::kTraining, 1, Message::kGraph},        {Message::kTraining, 2, Message::kGraph},
    {Message::kFunction, 7, Message::kNode},         {Message::kFunction, 9, Message::kOpset},
    {Message::kFunction, 11, Message::kAttribute},   {Message::kGraph, 1, Message::kNode},
    {Message::kGraph, 5, Message::kTensor},          {Message::kGraph, 15, Message::kSparseTensor},
    {Message::kNode, 5, Message::kAttribute},        {Message::kAttribute, 5, Message::kTensor},
    {Message::kAttribute, 6, Message::kGraph},       {Message::kAttribute, 10, Message::kTensor},
    {Message::kAttribute, 11, Message::kGraph},      {Message::kAttribute, 22, Message::kSparseTensor},
    {Message::kAttribute, 23, Message::kSparseTensor}, {Message::kSparseTensor, 1, Message::kTensor},
    {Message::kSparseTensor, 2, Message::kTensor},
};
constexpr std::uint64_t kNodeOperator = 4, kNodeDomain = 7, kOpsetDomain = 1, kKey = 1, kValue = 2;
constexpr std::uint64_t kTensorSize = 1, kTensorType = 2, kTensorName = 8, kTensorPlace = 13;

constexpr std::string_view kOwn = "com.microsoft:";

// A field that is bytes: a text, a message, a list.
struct Field {
  std::uint64_t number;
  std::string_view bytes;
};
using Fields = std::vector<Field>;
using Numbers = std::vector<std::pair<std::uint64_t, std::uint64_t>>;  // fields that are whole numbers, and those

std::string shown(std::string_view text) {
  std::string said = "'";
  for (const char c : text.substr(0, 80)) said += c >= ' ' && c <= '~' ? c : '?';
  return said + (text.size() > 80 ? "...'" : "'");
}

class Graph {
 public:
  Graph(const std::string& source, std::uint64_t weights_size, bool for_cuda)
      : source_(source), weights_size_(weights_size), for_cuda_(for_cuda) {}

  void check(std::string_view content) {
    walk(content, [this](Message kind, const Fields& fields, const Numbers&) {
      if (kind == Message::kNode) check_operator(text(fields, kNodeDomain), text(fields, kNodeOperator));
      if (kind == Message::kOpset) check_domain(text(fields, kOpsetDomain));
      if (kind == Message::kTensor) place(fields);
    });
  }

  std::vector<Weight> weights(std::string_view content) {
    std::vector<Weight> found;
    walk(content, [&](Message kind, const Fields& fields, const Numbers& numbers) {
      const std::optional<Place> place = kind == Message::kTensor ? this->place(fields) : std::nullopt;
      if (!place) return;
      Weight weight{std::string(text(fields, kTensorName)), 0, {}, place->first, place->second};
      for (const auto& [field, number] : numbers) {
        if (field == kTensorType) weight.type = number;
        if (field == kTensorSize) weight.shape.push_back(static_cast<std::int64_t>(number));
      }
      found.push_back(std::move(weight));
    });
    return found;
  }

 private:
  using Place = std::pair<std::uint64_t, std::uint64_t>;  // first byte and length

  // Calls visit(kind, fields, numbers) of every message that matters.
  template <class Visit>
  void walk(std::string_view content, const Visit& visit) {
    std::vector<std::pair<Message, std::string_view>> waiting = {{Message::kModel, content}};
    while (!waiting.empty()) {
      const auto [kind, bytes] = waiting.back();
      waiting.pop_back();
      Numbers numbers;
      const Fields fields = read(bytes, numbers);
      for (const Field& field : fields) {
        for (const Inner& known : kInner) {
          if (known.outer == kind && known.number == field.number) waiting.emplace_back(known.inner, field.bytes);
        }
      }
      visit(kind, fields, numbers);
    }
  }

  Error refused(const std::string& what) const {
    return bundle_error("'" + source_ + "' " + what + "; copy the bundle again, or export it again");
  }

  Error damaged(const std::string& what) const { return refused("is no ONNX graph, or damaged: " + what); }

  // The fields of a message that are bytes. Those that are whole numbers go to `numbers`.
  Fields read(std::string_view message, Numbers& numbers) {
    Fields found;
    while (!message.empty()) {
      if (--left_ < 0) throw damaged("it has too many fields");
      const std::uint64_t tag = number(message);
      const std::uint64_t encoding = tag >> 32 == 0 ? tag & 7 : 7;
      std::uint64_t length = 0;
      switch (encoding) {
        case 0: numbers.emplace_back(tag >> 3, number(message)); continue;
        case 1: length = 8; break;
        case 2: length = number(message); break;
        case 5: length = 4; break;
        default: throw damaged("a field is of no known kind");  // others went out of use
      }
      if (length > message.size()) throw damaged("a field ends behind what holds it");
      if (encoding == 2) found.push_back({tag >> 3, message.substr(0, length)});
      message.remove_prefix(length);
    }
    return found;
  }

  // Seven bits a byte, the lowest first.
  std::uint64_t number(std::string_view& message) const {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      if (message.empty()) throw damaged("a number ends behind what holds it");
      const auto byte = static_cast<unsigned char>(message.front());
      message.remove_prefix(1);
      value |= std::uint64_t{byte & 127U} << shift;
      if (byte < 128) return value;
    }
    throw damaged("a number does not end");
  }

  // A field that is text; empty where there is none. Twice the same would be for others to choose from.
  std::string_view text(const Fields& fields, std::uint64_t number) const {
    const Field* found = nullptr;
    for (const Field& field : fields) {
      if (field.number != number) continue;
      if (found != nullptr) {
        throw refused("is damaged: it says " + shown(found->bytes) + " and " + shown(field.bytes) + " in one place");
      }
      found = &field;
    }
    return found != nullptr ? found->bytes : std::string_view();
  }

  // ONNX Runtime's own operators, of which some versions trust what they are given, for the CUDA provider alone.
  bool taken(std::string_view one) const { return for_cuda_ || one.substr(0, kOwn.size()) != kOwn; }

  void check_operator(std::string_view domain, std::string_view name) const {
    if (domain.empty()) domain = "ai.onnx";
    const auto known = [&](std::string_view one) {
      return taken(one) && one.size() == domain.size() + 1 + name.size() && one.substr(0, domain.size()) == domain &&
             one[domain.size()] == ':' && one.substr(domain.size() + 1) == name;
    };
    if (std::any_of(kOperators.begin(), kOperators.end(), known)) return;
    throw refused("computes with " + shown(std::string(domain.substr(0, 80)) + ":" + std::string(name.substr(0, 80))) +
                  ", which no export writes: it was not opened");
  }

  void check_domain(std::string_view domain) const {
    const auto known = [&](std::string_view one) { return taken(one) && one.substr(0, one.find(':')) == domain; };
    if (domain.empty() || std::any_of(kOperators.begin(), kOperators.end(), known)) return;
    throw refused("has operators of the domain " + shown(domain) + ", which no export writes: it was not opened");
  }

  // Where a tensor's numbers are: inside the weights file, or in the graph, if it says nothing.
  std::optional<Place> place(const Fields& tensor) {
    std::optional<std::string_view> location, offset, length;
    for (const Field& field : tensor) {
      if (field.number != kTensorPlace) continue;
      Numbers none;
      const Fields entry = read(field.bytes, none);
      const std::string_view key = text(entry, kKey);
      auto* said = key == "location" ? &location : key == "offset" ? &offset : key == "length" ? &length : nullptr;
      if (said == nullptr || said->has_value()) {
        throw refused("is damaged: " + shown(key) + " of a tensor; expected location, offset, length, once each");
      }
      *said = text(entry, kValue);
    }
    if (!location && !offset && !length) return std::nullopt;
    if (location != kWeights) {
      throw refused("reads weights from " + shown(location.value_or("")) + "; expected '" + kWeights +
                    "', and nothing else: it was not opened");
    }
    const std::uint64_t from = natural(offset), bytes = natural(length);
    if (from + bytes > weights_size_) {
      throw refused("reads " + text_of(bytes) + " bytes from byte " + text_of(from) + " on of '" + kWeights +
                    "', which has " + text_of(weights_size_));
    }
    return Place(from, bytes);
  }

  std::uint64_t natural(std::optional<std::string_view> said) const {
    const std::string_view text = said.value_or("");
    if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string_view::npos) {
      throw refused("is damaged: it reads weights at " + shown(text) + "; expected a number");
    }
    std::uint64_t value = 0;
    for (const char digit : text) value = 10 * value + static_cast<std::uint64_t>(digit - '0');
    return value;
  }

  const std::string& source_;
  const std::uint64_t weights_size_;
  const bool for_cuda_;
  std::int64_t left_ = kMostFields;
};

}  // namespace

void check_graph(std::string_view content, const std::string& source, std::uint64_t weights_size, bool for_cuda) {
  Graph(source, weights_size, for_cuda).check(content);
}

std::vector<Weight> weights_of(std::string_view content, const std::string& source, std::uint64_t weights_size) {
  return Graph(source, weights_size, true).weights(content);
}

}  // namespace tarflow::internal
