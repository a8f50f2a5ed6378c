// What goes wrong, by who can mend it: the statuses of the C API as exceptions, which end at its boundary.
// A message speaks of fields by their names in tarflow.h, in backquotes, and of what would help in words: whoever reads
// it may have no command line.
#pragma once

#include <charconv>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tarflow.h"

namespace tarflow::internal {

class Error : public std::runtime_error {
 public:
  Error(int status, const std::string& message) : std::runtime_error(message), status(status) {}
  const int status;
};

// A callback or tarflow_cancel ended the call.
class Cancelled : public Error {
 public:
  Cancelled() : Error(TARFLOW_CANCELLED, "cancelled") {}
};

inline Error input_error(const std::string& message) { return {TARFLOW_INPUT, message}; }
inline Error machine_error(const std::string& message) { return {TARFLOW_MACHINE, message}; }
inline Error bundle_error(const std::string& message) { return {TARFLOW_BUNDLE, message}; }

// The shortest text that means this number.
template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
std::string text_of(Number number) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, number).ptr};
}

// The error of one field: "`n` is 0; expected 1 or more".
inline Error field_error(const std::string& field, const std::string& found, const std::string& expected) {
  return input_error("`" + field + "` is " + found + "; expected " + expected);
}

template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
Error field_error(const std::string& field, Number found, const std::string& expected) {
  return field_error(field, text_of(found), expected);
}

}  // namespace tarflow::internal
