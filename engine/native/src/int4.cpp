#include "int4.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace baton {
namespace {

constexpr int kMost = 15;        // of number, step and zero
constexpr int kMostWeight = 127;

// In the compiler's own vectors: additions in one order, whatever it makes of them.
typedef float Floats __attribute__((vector_size(16)));
constexpr int kWidth = 4;  // also the inputs of a line
constexpr int kVectors = kGroup / kWidth;

#if defined(__x86_64__)
Floats smaller(Floats a, Floats b) { return _mm_min_ps(a, b); }
Floats larger(Floats a, Floats b) { return _mm_max_ps(a, b); }
#else
Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
Floats larger(Floats a, Floats b) { return a > b ? a : b; }
#endif

// A group of weights in units of their column's scale, zeros after the last one.
struct Weights {
  Floats values[kVectors] = {};
  float lowest = 0, highest = 0;  // and zero

  Weights(const float* from, int count, float inverse) {
    std::memcpy(values, from, static_cast<size_t>(count) * sizeof(float));
    Floats least = {}, most = {};
    for (Floats& value : values) {
      value *= inverse;
      least = smaller(value, least);
      most = larger(value, most);
    }
    for (int i = 0; i < kWidth; i++) {
      lowest = std::min(lowest, least[i]);
      highest = std::max(highest, most[i]);
    }
  }
};

struct Grid {
  int step = 1, zero = 0;
};

// The nearest number of a grid, less its zero.
Floats rounded(Floats weights, Grid grid) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: no place left for a fraction
  float zero = magic + static_cast<float>(grid.zero);
  return smaller(larger(weights * (1.0f / static_cast<float>(grid.step)) + zero, Floats{} + magic),
                 Floats{} + (magic + kMost)) -
         zero;
}

float sum_of(Floats values) { return (values[0] + values[1]) + (values[2] + values[3]); }

float squared_error(const Weights& weights, Grid grid) {
  Floats sum = {};
  for (Floats values : weights.values) {
    Floats error = rounded(values, grid) * static_cast<float>(grid.step) - values;
    sum += error * error;
  }
  return sum_of(sum);
}

struct Choice {
  Grid grid;
  float error = 0;
};

bool fits(Grid grid) {
  return grid.step * std::max(grid.zero, kMost - grid.zero) <= kMostWeight;
}

// Steps from the one that spans the group down to two thirds of it: they cut off the ends for a finer
// grid.
Choice choose(const Weights& weights) {
  float span = (weights.highest - weights.lowest) / kMost;
  int widest = std::clamp(static_cast<int>(std::ceil(span)), 1, kMost);
  Choice best{{1, 8}, INFINITY};
  for (int step = widest; step >= 1 && (3 * step >= 2 * widest || std::isinf(best.error)); step--) {
    // What is cut off is cut off at both ends.
    float cut = std::max(0.0f, (span - static_cast<float>(step)) * kMost / 2);
    float zero = -(weights.lowest + cut) / static_cast<float>(step);
    Grid grid{step, std::clamp(static_cast<int>(std::nearbyint(zero)), 0, kMost)};
    if (!fits(grid)) continue;
    float error = squared_error(weights, grid);
    if (error < best.error) best = {grid, error};
  }
  return best;
}

// The scale at which the widest group of the row has the largest step.
float scale_of(const float* row, int64_t k) {
  float scale = 0;
  for (int64_t first = 0; first < k; first += kGroup) {
    Weights weights(row + first, static_cast<int>(std::min<int64_t>(kGroup, k - first)), 1);
    float span = (weights.highest - weights.lowest) / (kMost * kMost);
    float end = std::max(weights.highest, -weights.lowest) / (8 * kMost);
    scale = std::max({scale, span, end});
  }
  return scale;
}

}  // namespace

void put_int4(const float* row, int64_t k, uint8_t* panel, int column, float* scale, int32_t* sum) {
  float first_scale = scale_of(row, k), inverse = first_scale > 0 ? 1 / first_scale : 0;
  if (!std::isfinite(inverse)) inverse = 0;  // all of them next to nothing
  int32_t total = 0;
  double matched = 0, squares = 0;  // of the integers, with the weights and with themselves
  for (int64_t first = 0; first < k; first += kGroup) {
    int count = static_cast<int>(std::min<int64_t>(kGroup, k - first));
    Weights weights(row + first, count, inverse);
    Grid grid = choose(weights).grid;
    uint8_t* block = panel + first / kBlockInputs * kBlockBytes;
    int half = static_cast<int>(first / kGroup % 2);
    block[half * kPanel + column] = static_cast<uint8_t>(grid.step | grid.zero << 4);
    Floats sums[3] = {};
    uint8_t* line = block + 2 * kPanel + 4 * column;  // of four inputs
    for (Floats values : weights.values) {
      Floats numbers = rounded(values, grid), integers = numbers * static_cast<float>(grid.step);
      sums[0] += integers;
      sums[1] += integers * values;
      sums[2] += integers * integers;
      for (int i = 0; i < 4; i++) {
        int number = static_cast<int>(numbers[i]) + grid.zero;
        line[i] = static_cast<uint8_t>(half == 0 ? number : line[i] | number << 4);
      }
      line += 4 * kPanel;
    }
    total += static_cast<int32_t>(sum_of(sums[0]));
    matched += sum_of(sums[1]);
    squares += sum_of(sums[2]);
  }
  // The scale that suits what was chosen best.
  *scale = squares > 0 && inverse > 0 ? static_cast<float>(first_scale * (matched / squares)) : 0;
  *sum = 128 * total;
}

}  // namespace baton
