// The engines that were built from a bundle: which of its folders of engines runs here. Needs no TensorRT.
#pragma once

#include "bundle.hpp"
#include "tensorrt/record.hpp"

namespace tarflow::internal {

struct Built {
  std::string folder;
  Record record;
};

// The first that runs here, in the order of their names; one that is damaged keeps no other from running. Throws
// Error(TARFLOW_BUNDLE) with the reason for each.
Built choose_built(const Bundle& bundle, const Here& here);

}  // namespace tarflow::internal
