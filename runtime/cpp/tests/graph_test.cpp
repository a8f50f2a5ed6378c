// What a graph may do, and what it may not.
#include "graph.hpp"

#include "error.hpp"
#include "operators.hpp"
#include "support.hpp"

using namespace tarflow::internal;

namespace {

std::string number(std::uint64_t value) {
  std::string bytes;
  for (; value > 127; value >>= 7) bytes += static_cast<char>(value | 128);
  return bytes + static_cast<char>(value);
}

// A field of a message, in ONNX's wire format.
std::string field(std::uint64_t which, const std::string& bytes) {
  return number(which << 3 | 2) + number(bytes.size()) + bytes;
}

std::string node(const std::string& name, const std::string& domain = "") {
  return field(4, name) + (domain.empty() ? "" : field(7, domain));
}

std::string entry(const std::string& key, const std::string& value) { return field(13, field(1, key) + field(2, value)); }

std::string stored(const std::string& location, const std::string& offset, const std::string& length) {
  return entry("location", location) + entry("offset", offset) + entry("length", length);
}

std::string model(const std::string& graph) { return field(8, field(1, "")) + field(7, graph); }

std::string refusal(const std::string& content) {
  try {
    check_graph(content, "x.onnx", 100);
  } catch (const Error& error) {
    CHECK(error.status == TARFLOW_BUNDLE);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("every graph of the demo is taken") {
  int graphs = 0;
  for (const auto& file : support::fs::directory_iterator(TARFLOW_DEMO)) {
    if (file.path().extension() != ".onnx") continue;
    const auto weights = support::fs::file_size(support::fs::path(TARFLOW_DEMO) / "weights.safetensors");
    CHECK_NOTHROW(check_graph(support::read(file.path()), "x.onnx", weights));
    CHECK_THROWS_AS(check_graph(support::read(file.path()), "x.onnx", weights / 9), Error);
    ++graphs;
  }
  CHECK(graphs == 16);
}

TEST_CASE("an operator that no export writes is found wherever it hides") {
  CHECK(std::is_sorted(kOperators.begin(), kOperators.end()));
  CHECK(refusal(model(field(1, node("Add") + field(1, "input")) + field(1, node("MatMul", "ai.onnx")))).empty());
  for (const std::string& bad : {node("If"), node("Add", "com.microsoft"), node(""), node("add"), node(std::string(999, 'x'))}) {
    const std::string graph = field(1, bad);
    const auto attribute = [](const std::string& value) { return field(1, node("Add") + field(5, value)); };
    for (const std::string& content :
         {model(graph), model(attribute(field(6, graph))), model(attribute(field(11, graph))),
          field(25, field(7, bad)), field(20, field(1, graph)), field(20, field(2, graph))}) {
      CHECK(refusal(content).find("which no export writes") != std::string::npos);
    }
  }
  CHECK(refusal(field(8, field(1, "com.microsoft"))).find("the domain 'com.microsoft'") != std::string::npos);
  const std::string own = field(8, field(1, "com.microsoft")) + field(7, field(1, node("BiasGelu", "com.microsoft")));
  CHECK_NOTHROW(check_graph(own, "x.onnx", 0, true));
  CHECK_THROWS_AS(check_graph(own, "x.onnx", 0), Error);
  CHECK(refusal(field(25, field(9, field(1, "ai.onnx.ml")))).find("'ai.onnx.ml'") != std::string::npos);
  CHECK(refusal(model(field(1, node("Add") + field(4, "Mul")))).find("in one place") != std::string::npos);
}

TEST_CASE("a tensor lies in the graph or inside the weights file, and nowhere else") {
  const auto refused = [](const std::string& tensor, const char* words) {
    const std::string sparse = field(1, tensor), attribute = field(1, node("Add") + field(5, field(5, tensor)));
    for (const std::string& graph : {field(5, tensor), field(15, sparse), attribute}) {
      const std::string said = refusal(model(graph));
      CHECK_MESSAGE(said.find(words) != std::string::npos, said);
    }
  };
  CHECK(refusal(model(field(5, field(9, "raw")) + field(5, stored("weights.safetensors", "60", "40")))).empty());
  for (const char* elsewhere : {"golden.safetensors", "plans/w.bin", "../weights.safetensors", "./weights.safetensors", ""})
    refused(stored(elsewhere, "0", "4"), "expected 'weights.safetensors', and nothing else");
  refused(stored("weights.safetensors", "61", "40"), "which has 100");
  refused(stored("weights.safetensors", "999999999999999999", "999999999999999999"), "which has 100");
  for (const char* wrong : {"", "-1", " 1", "0x1", "1e1", "9999999999999999999"})
    refused(stored("weights.safetensors", wrong, "4"), "expected a number");
  refused(entry("location", "weights.safetensors") + entry("offset", "0"), "expected a number");
  refused(stored("weights.safetensors", "0", "4") + entry("location", "x"), "once each");
  refused(stored("weights.safetensors", "0", "4") + entry("prepacked", "x"), "once each");
}

TEST_CASE("what is no graph is refused, however deep, large or cut") {
  std::string deep;
  for (int i = 0; i < 1000; ++i) deep = field(1, field(5, field(6, deep)));
  CHECK(refusal(field(7, deep)).find("which no export writes") != std::string::npos);
  std::string many;
  for (int i = 0; i < 200000; ++i) many += field(5, "") + number(1 << 3) + number(7);
  CHECK(refusal(field(7, many)).find("too many fields") != std::string::npos);
  for (const std::string& content :
       {std::string("not a graph"), std::string(100, '\xff'), field(7, "x").substr(0, 2), number(7 << 3 | 3),
        number(7 << 3 | 1) + "1234567", number((std::uint64_t{1} << 35) | 7 << 3 | 2) + std::string(1, '\0')}) {
    CHECK(refusal(content).find("is no ONNX graph, or damaged") != std::string::npos);
  }
}
