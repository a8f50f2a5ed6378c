// Sessions of ONNX Runtime: a bundle's graphs, each opened when it is first used, and run with errors that name it.
#pragma once

#include <map>
#include <mutex>

#include "../backend.hpp"
#include "bundle.hpp"
#include "opening.hpp"
#include "ort/tensors.hpp"

namespace tarflow::internal {

using Session = std::shared_ptr<OrtSession>;

// The sizes that a session is opened for, where known shapes fold away what the host would compute; 0: any.
struct Fixed {
  std::int64_t batch = 0, branches = 0;
};

class Sessions {
 public:
  // Throws Error(TARFLOW_MACHINE) if the library or the provider is not to be had.
  Sessions(const Bundle& bundle, const Opening& opening);

  // The session of one graph, which is opened again for other sizes. With `one_block`, those of other blocks are let
  // go of.
  Session get(std::size_t block, Kind kind, const Fixed& fixed = {});

  // One run from the host's memory to the host's.
  void run(const Pass& pass, Kind kind, const std::vector<Place>& inputs, const std::vector<Place>& outputs);

  // Throws what a run's status says, unless it is fine: Cancelled, or an Error that names the graph.
  void check_run(OrtStatus* status, const Pass& pass, Kind kind) const;

  std::string description() const;

  const Bundle& bundle;
  const Opening opening;
  const Library library;

 private:
  struct Open {
    Fixed fixed;
    Session session;
  };

  Session open(std::size_t block, Kind kind, const Fixed& fixed) const;
  Owned<OrtSessionOptions> options(Kind kind, const Fixed& fixed) const;
  void append_cuda(OrtSessionOptions* options) const;

  std::mutex mutex_;
  std::map<std::pair<std::size_t, Kind>, Open> open_;
};

}  // namespace tarflow::internal
