#include "json_reader.hpp"

namespace tarflow::internal {
namespace {

constexpr int kDeepest = 64;  // levels; ours have five

}  // namespace

std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 80) + "...";
}

Error JsonReader::wrong(const std::string& what) const {
  return bundle_error("'" + source_ + "': " + what + ". It is damaged or was edited; " + cure_);
}

Json JsonReader::parse(std::string_view content) const {
  const auto limit_depth = [this](int depth, Json::parse_event_t, Json&) {
    if (depth >= kDeepest) throw wrong("it is nested more than " + std::to_string(kDeepest) + " levels deep");
    return true;
  };
  try {
    if (content.substr(0, 3) == "\xEF\xBB\xBF") throw wrong("it begins with a byte order mark");
    return Json::parse(content.begin(), content.end(), limit_depth);
  } catch (const Json::exception& error) {
    throw wrong("it cannot be parsed (" + std::string(error.what()).substr(0, 120) + ")");
  }
}

const Json& JsonReader::get(const Json& object, const char* key) const {
  if (!object.is_object()) throw wrong("'" + std::string(key) + "' is asked of what is no object");
  const auto found = object.find(key);
  if (found == object.end()) throw wrong("'" + std::string(key) + "' is missing");
  return *found;
}

const Json& JsonReader::typed(const Json& value, const char* key, bool right, const char* expected) const {
  if (!right) throw wrong("'" + std::string(key) + "' is " + value.type_name() + "; expected " + expected);
  return value;
}

const Json& JsonReader::object(const Json& parent, const char* key) const {
  const Json& value = get(parent, key);
  return typed(value, key, value.is_object(), "an object");
}

const Json& JsonReader::array(const Json& parent, const char* key) const {
  const Json& value = get(parent, key);
  return typed(value, key, value.is_array(), "an array");
}

std::string JsonReader::text(const Json& parent, const char* key) const {
  const Json& value = get(parent, key);
  return typed(value, key, value.is_string(), "a string").get<std::string>();
}

bool JsonReader::truth(const Json& parent, const char* key) const {
  const Json& value = get(parent, key);
  return typed(value, key, value.is_boolean(), "a boolean").get<bool>();
}

std::int64_t JsonReader::natural(const Json& value, const std::string& where, std::int64_t least,
                                 std::int64_t most) const {
  constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  const bool counted =
      value.is_number_integer() && (!value.is_number_unsigned() || value.get<std::uint64_t>() <= largest);
  if (!counted || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most) {
    throw wrong("'" + where + "' is " + shown(value) + "; expected an integer of " + std::to_string(least) +
                " or more");
  }
  return value.get<std::int64_t>();
}

std::string JsonReader::sha256(const Json& parent, const char* key) const {
  const std::string hash = text(parent, key);
  if (hash.size() != 64 || hash.find_first_not_of("0123456789abcdef") != std::string::npos) {
    throw wrong("'" + hash.substr(0, 70) + "' is no SHA-256 in lower-case hexadecimal");
  }
  return hash;
}

}  // namespace tarflow::internal
