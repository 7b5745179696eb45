#include "int4.h"

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace baton {
namespace {

constexpr int kMost = 15;        // of number, step and zero
constexpr int kMostWeight = 127;

// In the compiler's own vectors: additions in one order, whatever it makes of them.
typedef float Floats __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kVectors = kGroup / kWidth;

// A group of weights in units of their column's scale, zeros after the last one.
struct Weights {
  Floats values[kVectors] = {};
  float lowest = 0, highest = 0;  // and zero

  Weights(const float* from, int count, float inverse) {
    for (int i = 0; i < count; i++) {
      float value = from[i] * inverse;
      values[i / kWidth][i % kWidth] = value;
      lowest = std::min(lowest, value);
      highest = std::max(highest, value);
    }
  }
};

struct Grid {
  int step = 1, zero = 0;
};

Floats bounded(Floats x, float least, float most) {
  x = x < least ? Floats{} + least : x;
  return x > most ? Floats{} + most : x;
}

// The nearest numbers of a grid.
Floats numbers_of(Floats weights, Grid grid) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: no place left for a fraction
  Floats rounded = (weights * (1.0f / static_cast<float>(grid.step)) + magic) - magic;
  return bounded(rounded + static_cast<float>(grid.zero), 0, kMost);
}

float squared_error(const Weights& weights, Grid grid) {
  Floats sum = {};
  for (Floats values : weights.values) {
    Floats found = (numbers_of(values, grid) - static_cast<float>(grid.zero)) * static_cast<float>(grid.step);
    sum += (found - values) * (found - values);
  }
  float total = 0;
  for (int i = 0; i < kWidth; i++) total += sum[i];
  return total;
}

struct Choice {
  Grid grid;
  float error = 0;
};

bool fits(Grid grid) {
  return grid.step * std::max(grid.zero, kMost - grid.zero) <= kMostWeight;
}

// Steps from the one that spans the group down to half of it, which cuts off the ends for a finer grid.
Choice choose(const Weights& weights) {
  float span = (weights.highest - weights.lowest) / kMost;
  int widest = std::clamp(static_cast<int>(std::ceil(span)), 1, kMost);
  Choice best{{1, 8}, INFINITY};
  for (int step = widest; step >= 1 && (2 * step >= widest || std::isinf(best.error)); step--) {
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
  double matched = 0, squares = 0;
  for (int64_t first = 0; first < k; first += kGroup) {
    int count = static_cast<int>(std::min<int64_t>(kGroup, k - first));
    Weights weights(row + first, count, inverse);
    Grid grid = choose(weights).grid;
    uint8_t* block = panel + first / kBlockInputs * kBlockBytes;
    int half = static_cast<int>(first / kGroup % 2);
    block[half * kPanel + column] = static_cast<uint8_t>(grid.step | grid.zero << 4);
    uint8_t* numbers = block + 2 * kPanel + 4 * column;
    for (int i = 0; i < kGroup; i++) {
      if (i % kWidth != 0) continue;
      Floats found = numbers_of(weights.values[i / kWidth], grid);
      for (int j = 0; j < kWidth; j++) {
        int number = static_cast<int>(found[j]), weight = (number - grid.zero) * grid.step;
        uint8_t& at = numbers[(i + j) / 4 * (4 * kPanel) + (i + j) % 4];
        at = static_cast<uint8_t>(half == 0 ? (at & 0xf0) | number : (at & 0x0f) | number << 4);
        total += weight;
        matched += static_cast<double>(weight) * weights.values[i / kWidth][j];
        squares += static_cast<double>(weight) * weight;
      }
    }
  }
  // The scale that suits what was chosen best.
  *scale = squares > 0 && inverse > 0 ? static_cast<float>(first_scale * (matched / squares)) : 0;
  *sum = 128 * total;
}

}  // namespace baton
