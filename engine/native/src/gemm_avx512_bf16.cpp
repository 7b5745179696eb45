// AVX-512 with BF16 and VNNI: products of two bfloat16 or four int8 inputs, added up in one go.
#include "gemm_kernels.h"

#if defined(BATON_X86_NEW)

#include <immintrin.h>

#include <cstdint>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"
#include "target_begin.inc"

namespace baton {
namespace {

#include "rows_in_tiles.inc"
#include "scale_avx512.inc"

constexpr int64_t kAhead = 2048;  // bytes by which few rows prefetch weights
constexpr int kFewRows = 4;

struct Bf16 {
  static constexpr int kRows = 12;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const char* weights = panel_of<char>(w, panel);
    const char* rows = row_of(x, first);
    __m512 sums[R][2];
    BATON_UNROLL
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.depth; k += 2, weights += 4 * kPanel, rows += 4) {
      if (R <= kFewRows) {
        _mm_prefetch(weights + kAhead, _MM_HINT_T0);
        _mm_prefetch(weights + kAhead + 64, _MM_HINT_T0);
      }
      __m512bh left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights));
      __m512bh right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights + 64));
      BATON_UNROLL
      for (int r = 0; r < R; r++) {
        __m512bh a =
            reinterpret_cast<__m512bh>(_mm512_set1_epi32(four_bytes(rows + r * x.stride)));
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, a);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, a);
      }
    }
    BATON_UNROLL
    for (int r = 0; r < R; r++) {
      _mm512_storeu_ps(y + r * kPanel, sums[r][0]);
      _mm512_storeu_ps(y + r * kPanel + 16, sums[r][1]);
    }
  }
};

struct Int8 {
  static constexpr int kRows = 12;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const char* weights = panel_of<char>(w, panel);
    const char* rows = row_of(x, first);
    __m512i sums[R][2];
    BATON_UNROLL
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < w.depth; k += 4, weights += 4 * kPanel, rows += 4) {
      if (R <= kFewRows) {
        _mm_prefetch(weights + kAhead, _MM_HINT_T0);
        _mm_prefetch(weights + kAhead + 64, _MM_HINT_T0);
      }
      __m512i left = _mm512_loadu_si512(weights), right = _mm512_loadu_si512(weights + 64);
      BATON_UNROLL
      for (int r = 0; r < R; r++) {
        __m512i a = _mm512_set1_epi32(four_bytes(rows + r * x.stride));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], a, left);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], a, right);
      }
    }
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      scale(w, panel, x.scales[first + r], sums[r][0], sums[r][1], y + r * kPanel);
  }
};

}  // namespace

void bf16_avx512_bf16(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<Bf16>(w, x, first, count, sink);
}

void int8_avx512_vnni(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<Int8>(w, x, first, count, sink);
}

}  // namespace baton

#include "target_end.inc"

#endif
