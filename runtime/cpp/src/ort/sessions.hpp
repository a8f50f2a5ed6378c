// Sessions of ONNX Runtime: a bundle's graphs, each opened when it is first used, and run with errors that name it.
#pragma once

#include <map>
#include <mutex>
#include <set>

#include "../backend.hpp"
#include "bundle.hpp"
#include "opening.hpp"
#include "ort/device.hpp"
#include "ort/tensors.hpp"
#include "ort/weights.hpp"

namespace tarflow::internal {

using Session = std::shared_ptr<OrtSession>;
class ResidentSteps;

// On a GPU whoever has a session, or opens or runs one, touches the device.
class Sessions {
 public:
  // Throws Error(TARFLOW_MACHINE) if the library or the provider is not to be had.
  Sessions(const Bundle& bundle, const Opening& opening);
  ~Sessions();

  // The session of one graph. With `one_block`, those of other blocks are let go of.
  Session get(std::size_t block, Kind kind);

  // The session of steps of one graph, and a number that no capture in it has yet; 0 where none is captured. ONNX
  // Runtime destroys captures with their session alone: one that is full of them is opened anew.
  std::pair<Session, int> to_capture(std::size_t block, Kind kind);

  // A tensor in memory of the device, which must outlive it.
  Owned<OrtValue> tensor(void* address, const Shape& shape, ONNXTensorElementDataType type) const;

  // One run from the host's memory to the host's.
  void run(const Pass& pass, Kind kind, const std::vector<Place>& inputs, const std::vector<Place>& outputs);

  // Throws what a run's status says, unless it is fine: Cancelled, or an Error that names the graph.
  void check_run(OrtStatus* status, const Pass& pass, Kind kind) const;

  std::string description() const;

  const Bundle& bundle;
  const Opening opening;
  const Library library;
  const Device device;
  std::set<ResidentSteps*> holders;  // of captures

 private:
  Session open(std::size_t block, Kind kind);
  OrtStatus* create(std::size_t block, Kind kind, bool captured, Session& made);
  Owned<OrtSessionOptions> options(Kind kind) const;
  void append_cuda(OrtSessionOptions* options, bool captured) const;

  std::mutex mutex_;
  bool captures_;
  std::string why_not_;  // it captures nothing, if that was asked for
  DeviceWeights weights_;
  std::map<std::pair<std::size_t, Kind>, int> captured_;
  std::map<std::pair<std::size_t, Kind>, Session> open_;
};

}  // namespace tarflow::internal
