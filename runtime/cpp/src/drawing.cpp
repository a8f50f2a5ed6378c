#include "drawing.hpp"

#include <algorithm>

#include "noise.hpp"
#include "patches.hpp"

namespace tarflow::internal {
namespace {

constexpr std::uint32_t kRedraws = 8;

}  // namespace

// `rows` samples from index `start` on, computed together. Those that are wanted are `inside` of them from row `before`
// on, and go to row `output` of the result.
struct Drawing::Tile {
  std::uint64_t start;
  std::int64_t rows, before, inside, output;
};

Drawing::Drawing(const Chain& chain, const Request& request, float* images)
    : certificate(request.certify ? size(request.n) : 0),
      log_prob(certificate.size()),
      chain_(chain),
      request_(request),
      shape_(chain.shape),
      images_(images) {}

void Drawing::draw() {
  const auto tile = static_cast<std::uint64_t>(request_.tile), n = static_cast<std::uint64_t>(request_.n);
  const std::uint64_t first = request_.first_sample, last = first + (n - 1);  // no index is above 2^64 - 1
  std::uint64_t start = request_.reproducible ? first / tile * tile : first;
  total_ = static_cast<std::int64_t>((last - start) / tile + 1) * shape_.blocks * (shape_.tokens() - 1);
  for (;; start += tile) {
    const bool whole = request_.reproducible || last - start >= tile;
    Tile one{start, whole ? request_.tile : static_cast<std::int64_t>(last - start + 1), 0, 0, 0};
    if (start < first) one.before = static_cast<std::int64_t>(first - start);
    if (start > first) one.output = static_cast<std::int64_t>(start - first);
    one.inside = std::min(one.rows - one.before, request_.n - one.output);
    draw(one);
    if (last - start < tile) return;
  }
}

void Drawing::draw(const Tile& tile) {
  const std::int64_t numbers = shape_.numbers();
  Patches z(size(tile.rows * numbers), 0.0F);
  fill(tile, z);
  std::vector<std::int64_t> classes(size(tile.rows), shape_.classes);
  std::copy_n(request_.classes.begin() + tile.output, tile.inside, classes.begin() + tile.before);
  const Branches branches = request_.guidance.branches(shape_, classes);
  Patches x = chain_.decode(z, branches, watch(tile));
  if (request_.redraw_nonfinite) redraw(tile, z, branches, x);
  std::vector<Patches> states;
  if (request_.certify) {
    Chain::Encoded found = chain_.states(x, branches);
    const std::vector<float> errors = chain_.round_trip(found.states.back(), z);
    const std::vector<double> nats = chain_.log_prob(found.states.back(), found.log_det);
    std::copy_n(errors.begin() + tile.before, tile.inside, certificate.begin() + tile.output);
    std::copy_n(nats.begin() + tile.before, tile.inside, log_prob.begin() + tile.output);
    states = std::move(found.states);
  }
  if (request_.strength) {  // an unguided certificate has encoded what the gradient starts from
    if (!request_.guidance.none()) states.clear();
    chain_.denoise(x, plain(shape_, std::move(classes)), *request_.strength, std::move(states));
  }
  unpatchify(shape_, tile.inside, x.data() + tile.before * numbers, images_ + tile.output * numbers);
}

// The noise of the samples that are wanted; zeros stay elsewhere.
void Drawing::fill(const Tile& tile, Patches& z) const {
  const std::int64_t numbers = shape_.numbers();
  if (request_.noise != nullptr) {
    std::copy_n(request_.noise + tile.output * numbers, tile.inside * numbers, z.data() + tile.before * numbers);
    return;
  }
  for (std::int64_t row = tile.before; row < tile.before + tile.inside; ++row) {
    chain_.call.check();
    normal(request_.seed, tile.start + static_cast<std::uint64_t>(row), kSampling, size(numbers),
           z.data() + row * numbers);
  }
}

// Replaces samples that are not finite by later attempts of the same sample; the tile keeps its shape.
void Drawing::redraw(const Tile& tile, Patches& z, const Branches& branches, Patches& x) const {
  const std::int64_t numbers = shape_.numbers();
  for (std::uint32_t attempt = 1; attempt <= kRedraws; ++attempt) {
    std::vector<std::int64_t> broken;
    for (std::int64_t row = tile.before; row < tile.before + tile.inside; ++row) {
      if (!finite(x.data() + row * numbers, numbers)) broken.push_back(row);
    }
    if (broken.empty()) return;
    for (const std::int64_t row : broken) {
      normal(request_.seed, tile.start + static_cast<std::uint64_t>(row), attempt, size(numbers),
             z.data() + row * numbers);
    }
    const Patches again = chain_.decode(z, branches, {});
    for (const std::int64_t row : broken) std::copy_n(again.data() + row * numbers, numbers, x.data() + row * numbers);
  }
}

// Tells the caller of steps and blocks.
Watch Drawing::watch(const Tile& tile) {
  Watch watch;
  if (request_.progress != nullptr) {
    watch.on_step = [this](std::size_t block, std::int64_t position) {
      const int step = static_cast<int>(position);
      if (request_.progress(request_.user, ++done_, total_, static_cast<int>(block), step) != 0) throw Cancelled();
    };
  }
  if (request_.preview != nullptr) {
    watch.on_block = [this, &tile](std::size_t block, const Patches& x) { show(tile, block, x); };
  }
  return watch;
}

void Drawing::show(const Tile& tile, std::size_t block, const Patches& x) const {
  const std::int64_t numbers = shape_.numbers();
  std::vector<float> images(size(tile.inside * numbers));
  unpatchify(shape_, tile.inside, x.data() + tile.before * numbers, images.data());
  const std::uint64_t first = request_.first_sample + static_cast<std::uint64_t>(tile.output);
  if (request_.preview(request_.user, static_cast<int>(block), first, tile.inside, images.data()) != 0) {
    throw Cancelled();
  }
}

}  // namespace tarflow::internal
