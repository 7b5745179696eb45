// Sampling kernels for AVX-512.
#include "sample_kernels.h"

#if BATON_X86

#include <immintrin.h>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#include "target_begin.inc"

#define WIDTH 16

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "sample.inc"

// Whole vectors are written: storing a part of one takes some processors many times as long.
int64_t collect(const float* x, const float* w, int64_t n, float low, float high, float* to_x,
                float* to_w) {
  int64_t count = 0;
  __m512 least = _mm512_set1_ps(low), end = _mm512_set1_ps(high);
  for (int64_t i = 0; i < n; i += WIDTH) {
    __m512 value = _mm512_loadu_ps(x + i), weight = _mm512_loadu_ps(w + i);
    __mmask16 taken = _mm512_cmp_ps_mask(value, least, _CMP_GE_OQ);
    taken = _mm512_mask_cmp_ps_mask(taken, value, end, _CMP_LT_OQ);
    if (taken == 0) continue;
    _mm512_storeu_ps(to_x + count, _mm512_maskz_compress_ps(taken, value));
    _mm512_storeu_ps(to_w + count, _mm512_maskz_compress_ps(taken, weight));
    count += __builtin_popcount(taken);
  }
  return count;
}

}  // namespace

const SampleKernels sample_avx512 = {largest, weigh, cut, collect, masses};

}  // namespace baton

#include "target_end.inc"

#endif  // BATON_X86
