#include "opening.hpp"

#include <algorithm>
#include <array>

#include "error.hpp"

namespace tarflow::internal {
namespace {

constexpr std::array<const char*, 4> kProviders = {"auto", "cpu", "cuda", "tensorrt"};

std::string checked_provider(const char* said) {
  const std::string provider = said != nullptr ? said : "cpu";
  if (std::find(kProviders.begin(), kProviders.end(), provider) != kProviders.end()) return provider;
  std::string known;
  for (const char* name : kProviders) known += (known.empty() ? "" : ", ") + std::string(name);
  throw field_error("provider", "'" + provider + "'", "one of " + known);
}

int checked_threads(int threads) {
  if (threads < 0) throw field_error("threads", threads, "1 or more, or 0 for one a core");
  return threads;
}

}  // namespace

Opening::Opening(const tarflow_open_options& said)
    : provider(checked_provider(said.provider)),
      onnxruntime(said.onnxruntime != nullptr ? said.onnxruntime : ""),
      threads(checked_threads(said.threads)),
      spinning(said.spinning != 0),
      one_block(said.low_memory != 0),
      cuda_graph(said.cuda_graph != 0),
      log(said.log),
      user(said.user) {}

Opening::Opening(const Opening& like, const char* provider)
    : provider(provider),
      onnxruntime(like.onnxruntime),
      threads(like.threads),
      spinning(like.spinning),
      one_block(like.one_block),
      cuda_graph(like.cuda_graph),
      log(like.log),
      user(like.user) {}

}  // namespace tarflow::internal
