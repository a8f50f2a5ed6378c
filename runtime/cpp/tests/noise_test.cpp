#include "noise.hpp"

#include <doctest/doctest.h>

#include <array>
#include <vector>

using tarflow::internal::kSampling;
using tarflow::internal::normal;

TEST_CASE("noise is the table of FORMAT.md to the last bit") {
  struct Row {
    std::uint64_t seed, sample;
    std::array<float, 4> numbers;
  };
  const Row rows[] = {{0, 0, {-0.255815983F, 0.630183637F, 1.91480327F, 0.507023752F}},
                      {1, 5, {1.30868185F, -0.00310914963F, 0.374738097F, -0.333844066F}},
                      {18446744073709551615U, 4294967296U, {-0.715427637F, -2.34181929F, -0.425857753F, 0.725597858F}}};
  for (const Row& row : rows) {
    std::array<float, 4> found{};
    normal(row.seed, row.sample, kSampling, 4, found.data());
    CHECK(found == row.numbers);
  }
}

TEST_CASE("a prefix of a sample's noise does not depend on how much is asked for, nor streams on each other") {
  std::vector<float> all(101), few(7), other(101);
  normal(3, 9, kSampling, all.size(), all.data());
  normal(3, 9, kSampling, few.size(), few.data());
  normal(3, 9, 1, other.size(), other.data());
  CHECK(std::equal(few.begin(), few.end(), all.begin()));
  CHECK(other != all);
}
