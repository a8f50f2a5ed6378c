// What a graph of a stranger may do: read weights from one file, and compute with the operators that exports write.
// FORMAT.md, "Graphs".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tarflow::internal {

constexpr std::uint64_t kGraphLimit = std::uint64_t{256} << 20;  // bytes; kilobytes are normal, and a mask of T * T

// Throws Error(TARFLOW_BUNDLE) for a graph with an operator, in functions and sub-graphs too, that is not in
// runtime/operators.txt, an opset of another domain, or a tensor whose numbers are neither in the graph nor among the
// `weights_size` bytes of the weights file beside it. ONNX Runtime's own operators stand in graphs `for_cuda` alone.
void check_graph(std::string_view content, const std::string& source, std::uint64_t weights_size,
                 bool for_cuda = false);

// A tensor that a graph reads from the weights file: its name in the graph, and its `length` bytes there.
struct Weight {
  std::string name;
  std::uint64_t type;  // ONNX's number
  std::vector<std::int64_t> shape;
  std::uint64_t start, length;
};

// All of a graph that was checked.
std::vector<Weight> weights_of(std::string_view content, const std::string& source, std::uint64_t weights_size);

}  // namespace tarflow::internal
