#include "opening.hpp"

#include <algorithm>
#include <array>
#include <regex>
#include <utility>

#include "error.hpp"

namespace tarflow::internal {
namespace {

// A number of up to four digits, or (the beginning of) a UUID.
bool is_device(const std::string& text) {
  static const std::regex device("[0-9]{1,4}|((GPU|MIG)-)?[0-9a-f-]{4,36}", std::regex::icase);
  return std::regex_match(text, device);
}

constexpr std::array<const char*, 5> kProviders = {"auto", "native", "cpu", "cuda", "tensorrt"};
constexpr std::array<const char*, 4> kNative = {"fp32", "int16", "bf16", "int8"};

template <std::size_t N>
std::string one_of(const std::array<const char*, N>& names) {
  std::string all;
  for (const char* name : names) all += (all.empty() ? "one of " : ", ") + std::string(name);
  return all;
}

// "cuda:1" is cuda, and 1.
std::pair<std::string, std::string> checked_provider(const char* said) {
  const std::string all = said != nullptr && *said != '\0' ? said : "auto", provider = all.substr(0, all.find(':'));
  const std::string device = provider.size() < all.size() ? all.substr(provider.size() + 1) : "";
  const bool known = std::find(kProviders.begin(), kProviders.end(), provider) != kProviders.end();
  const bool on_device = provider == "cuda" || provider == "tensorrt";
  if (known && (provider.size() == all.size() || (on_device && is_device(device)))) return {provider, device};
  throw field_error("provider", "'" + all + "'",
                    one_of(kProviders) + "; cuda and tensorrt may name a GPU, as in cuda:1");
}

std::string checked_precision(const char* said, const std::string& provider) {
  if (said == nullptr || *said == '\0') return "";
  const std::string precision = said;
  if (std::find(kNative.begin(), kNative.end(), precision) == kNative.end()) {
    throw field_error("precision", "'" + precision + "'", one_of(kNative));
  }
  if (provider == "native" || provider == "auto") return precision;
  throw field_error("precision", "'" + precision + "'",
                    "none but for the native engine: others compute in the bundle's own; use `provider` native");
}

int checked_threads(int threads) {
  if (threads < 0 || threads > 65536) throw field_error("threads", threads, "1 to 65536, or 0 for one a core");
  return threads;
}

}  // namespace

Opening::Opening(const tarflow_open_options& said)
    : provider(checked_provider(said.provider).first),
      device(checked_provider(said.provider).second),
      precision(checked_precision(said.precision, provider)),
      onnxruntime(said.onnxruntime != nullptr ? said.onnxruntime : ""),
      threads(checked_threads(said.threads)),
      spinning(said.spinning != 0),
      one_block(said.low_memory != 0),
      cuda_graph(said.cuda_graph != 0),
      log(said.log),
      user(said.user) {}

Opening::Opening(const Opening& like, const char* provider)
    : provider(provider),
      precision(like.precision),
      onnxruntime(like.onnxruntime),
      threads(like.threads),
      spinning(like.spinning),
      one_block(like.one_block),
      cuda_graph(like.cuda_graph),
      log(like.log),
      user(like.user) {}

}  // namespace tarflow::internal
