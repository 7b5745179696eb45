// From a row of logits to a token: what engine/model/logits.py (warp) and engine/model/sampler.py
// define in torch, without sorting or writing a vocabulary.
//
// A row is read in blocks of kBlock logits, the blocks that the draw is defined over.
#pragma once

#include <cstdint>

#include "baton.h"

namespace baton {

constexpr int kBlock = 256;
constexpr int kCuts = 8;      // thresholds that `masses` compares with at once
constexpr int kSlack = 16;    // places after the last number that `collect` may write to
constexpr int kChunk = 4096;  // most numbers that `masses` adds up in float32

struct SampleKernels {
  // The largest of a block; NaN if there is a NaN in it.
  float (*largest)(const float* x);
  // w = exp2((x - most) * factor) where x >= floor, else 0, for a block. Returns the sum of w.
  float (*weigh)(const float* x, float most, float factor, float floor, float* w);
  // w = 0 where x < floor, for a block. Returns the sum of w.
  float (*cut)(const float* x, float floor, float* w);
  // Append x and w to two lists where low <= x < high, and return how many were. n is a multiple of
  // 16. The lists may be x and w themselves; they are written up to kSlack past what they hold.
  int64_t (*collect)(const float* x, const float* w, int64_t n, float low, float high, float* to_x,
                     float* to_w);
  // sums[i] += the sum of w where x >= cuts[i]. n is a multiple of 16 and at most kChunk.
  void (*masses)(const float* x, const float* w, int64_t n, const float* cuts, double* sums);
};

const SampleKernels& sample_kernels(BatonIsa isa);

}  // namespace baton
