// What goes wrong, by who can mend it: the statuses of the C API as exceptions, which end at its boundary.
#pragma once

#include <stdexcept>
#include <string>

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

}  // namespace tarflow::internal
