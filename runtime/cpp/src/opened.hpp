// An open bundle: what handles that share weights have in common.
#pragma once

#include <memory>
#include <string>

#include "backend.hpp"
#include "bundle.hpp"
#include "opening.hpp"

namespace tarflow::internal {

class Opened {
 public:
  // On the provider asked for; on "auto" the first that works here, and `description` says why not the others.
  Opened(const std::string& folder, const Opening& opening);

  // Tells the log. Throws Cancelled if it says so.
  void say(int level, const std::string& message) const;

  const Opening opening;
  const Bundle bundle;
  std::unique_ptr<Backend> backend;  // refers to the bundle
  std::string description;           // of the backend, for people
};

}  // namespace tarflow::internal
