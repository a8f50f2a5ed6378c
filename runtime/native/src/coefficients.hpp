// Printed by bench/elementary.py, lowest power first.
#pragma once

namespace tarflow::native {

constexpr float kExp[5] = {0.49999994f, 0.166665211f, 0.041668389f, 0.00836872403f, 0.00138145837f};
constexpr float kGeluAbove[6] = {0.398942262f,    0.0334587917f,   0.0046514757f,
                                 0.000164572688f, 6.30157683e-06f, 2.29311894e-08f};
constexpr float kGeluBelow[6] = {1.0f, 0.25053516f, 0.0284160729f, 0.00186064001f, 7.21666584e-05f, 1.19902836e-06f};

}  // namespace tarflow::native
