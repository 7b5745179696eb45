// Attention for AVX-512 BF16.
#include "attention_kernels.h"

#if BATON_X86_NEW

#include <immintrin.h>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#include "target_begin.inc"

#define WIDTH 16

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "attention_softmax.inc"

#include "attention_bf16.inc"

template <int R, int B>
INLINE void product(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_step,
                    int64_t w_block, int depth, float* y, int64_t y_stride) {
  __m512 sum[R][B];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) sum[r][b] = _mm512_setzero_ps();
  for (int k = 0; k < depth / 2; k++) {
    __m512bh pairs[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
      pairs[r] = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const Pair*>(x + r * x_stride + 2 * k));
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) {
      __m512bh weight = (__m512bh)_mm512_loadu_si512(w + k * w_step + b * w_block);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], weight, pairs[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) _mm512_storeu_ps(y + r * y_stride + b * 16, sum[r][b]);
}

template <int R>
void product_rows(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_step,
                  int64_t w_block, int depth, int blocks, float* y, int64_t y_stride) {
  int b = 0;
  for (; b + 4 <= blocks; b += 4)
    product<R, 4>(x, x_stride, w + b * w_block, w_step, w_block, depth, y + b * 16, y_stride);
  for (; b < blocks; b++)
    product<R, 1>(x, x_stride, w + b * w_block, w_step, w_block, depth, y + b * 16, y_stride);
}

void products(int rows, const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_step,
              int64_t w_block, int depth, int blocks, float* y, int64_t y_stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    product_rows<4>(x + r * x_stride, x_stride, w, w_step, w_block, depth, blocks, y + r * y_stride, y_stride);
  const uint16_t* rest = x + r * x_stride;
  float* to = y + r * y_stride;
  switch (rows - r) {
    case 3: return product_rows<3>(rest, x_stride, w, w_step, w_block, depth, blocks, to, y_stride);
    case 2: return product_rows<2>(rest, x_stride, w, w_step, w_block, depth, blocks, to, y_stride);
    case 1: return product_rows<1>(rest, x_stride, w, w_step, w_block, depth, blocks, to, y_stride);
    default: return;
  }
}

void nothing() {}

}  // namespace

const AttentionKernels attention_avx512_bf16 = {queries, attend, merge, clear, finish, nothing, nothing,
                                         nullptr, nullptr};

}  // namespace baton

#include "target_end.inc"

#endif
