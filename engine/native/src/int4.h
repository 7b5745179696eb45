// Weights of four bits: how they are stored, and how a row of them is chosen.
//
// A weight is what an int8 weight would be, (number - zero) * step, times the float scale of its
// column; number (0 to 15) is its own, step (1 to 15) and zero (0 to 15) are shared by a group of 32
// inputs of a column. So groups have scales of their own, products stay sums of integers, and whoever has
// many rows unpacks a panel into int8 and goes on as if it had been that. (The two levels are those of
// QServe, Lin et al. 2024, 4.1.)
//
// A panel is a sequence of blocks of 64 inputs, two groups:
//   [2][32]     of each group and column: step, and zero in the upper four bits
//   [8][32][4]  numbers: input i of the first group, and input i of the second in the upper four bits
#pragma once

#include <cstdint>

#include "gemm.h"

namespace baton {

constexpr int kGroup = 32;                // inputs that share step and zero
constexpr int kBlockInputs = 2 * kGroup;  // and kDepth, so that a panel is whole blocks
constexpr int kBlockBytes = 2 * kPanel + kGroup * kPanel;

static_assert(kBlockInputs == kDepth);

// Writes one row of the source, `k` finite weights, as one column of a panel; its scale; and 128
// times the sum of its int8 weights. Step and zero of each group are those, of the ones it tries,
// with the least squared error.
void put_int4(const float* row, int64_t k, uint8_t* panel, int column, float* scale, int32_t* sum);

}  // namespace baton
