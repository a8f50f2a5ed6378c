// Typed access to an untrusted JSON document that names the place when something is wrong.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "error.hpp"

namespace tarflow::internal {

using Json = nlohmann::json;

// A value as a message shows it.
std::string shown(const Json& value);

class JsonReader {
 public:
  // `cure` is what would help.
  JsonReader(std::string source, std::string cure) : source_(std::move(source)), cure_(std::move(cure)) {}

  Error wrong(const std::string& what) const;
  Json parse(std::string_view content) const;
  const Json& get(const Json& object, const char* key) const;
  const Json& object(const Json& parent, const char* key) const;
  const Json& array(const Json& parent, const char* key) const;
  std::string text(const Json& parent, const char* key) const;
  bool truth(const Json& parent, const char* key) const;
  std::int64_t natural(const Json& value, const std::string& where, std::int64_t least,
                       std::int64_t most = std::numeric_limits<std::int64_t>::max()) const;
  std::string sha256(const Json& parent, const char* key) const;

  const std::string& source() const { return source_; }

 private:
  const Json& typed(const Json& value, const char* key, bool right, const char* expected) const;

  const std::string source_, cure_;
};

}  // namespace tarflow::internal
