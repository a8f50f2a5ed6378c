// Printed by bench/elementary.py, lowest power first.
#pragma once

namespace tarflow::native {

constexpr float kExp[5] = {0.49999994f, 0.166665211f, 0.041668389f, 0.00836872403f, 0.00138145837f};
constexpr float kGeluAbove[6] = {0.398942262f,    0.033458773f,    0.0046514743f,
                                 0.000164572528f, 6.30158092e-06f, 2.29312356e-08f};
constexpr float kGeluBelow[6] = {1.0f,           0.250535101f,    0.0284160618f,
                                 0.00186063896f, 7.21666365e-05f, 1.19902995e-06f};

}  // namespace tarflow::native
