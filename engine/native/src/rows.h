// What a step does to single rows between its products: norms, conversions, rope, activations.
//
// Lengths are multiples of 16. A row's result depends on nothing but the row.
#pragma once

#include <cstdint>

#include "baton.h"

namespace baton {

struct RowKernels {
  // A row of F32, BF16 or F16 as float32.
  void (*widen)(const void* from, BatonFormat format, int n, float* to);
  // x / rms(x) * weight. `to` may be x.
  void (*norm)(const float* x, const float* weight, float eps, int n, float* to);
  // A row as a product's kernels want it (gemm.h, Rows): F32, BF16, or INT8 with its scale.
  void (*narrow)(const float* x, int n, BatonFormat format, void* to, float* scale);
  // Keys or values of one token and head as the pool keeps them: F32, BF16, or INT8 with its scale.
  void (*keep)(const float* x, int n, BatonFormat format, void* to, float* scale);
  // Turn the pairs (i, i + n / 2) by a row of BatonBatch.rotations, in place.
  void (*rotate)(float* x, const float* rotation, int n);
  // What sinks do with tiles [rows][kPanel] of a product, of which `columns` count. bias may be null.
  // to += tile + bias; to = tile + bias. stride: floats from one row of `to` to the next.
  void (*add)(const float* tile, int rows, int columns, const float* bias, float* to, int64_t stride);
  void (*copy)(const float* tile, int rows, int columns, const float* bias, float* to, int64_t stride);
  // activation(gate + gate_bias) * (up + up_bias) of 16 gates and their 16 ups in a row, as F32 or
  // BF16. stride: bytes.
  void (*gate)(BatonActivation activation, const float* tile, int rows, const float* gate_bias,
               const float* up_bias, BatonFormat format, void* to, int64_t stride);
  // The largest of each row that is not NaN, -inf if there is none.
  void (*largest)(const float* tile, int rows, float* to);
};

const RowKernels& row_kernels(BatonIsa isa);

}  // namespace baton
