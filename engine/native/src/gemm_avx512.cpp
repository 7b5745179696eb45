// AVX-512 without its later additions: float32, bfloat16 weights that are widened in registers (their
// way from memory is what costs), and int8 in 16-bit products, which are exact.
#include "gemm_kernels.h"

#if defined(BATON_X86)

#include <immintrin.h>

#include <cstdint>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#include "target_begin.inc"

namespace baton {
namespace {

#include "rows_in_tiles.inc"
#include "scale_avx512.inc"

template <int R>
inline void store(const __m512 (&sums)[R][2], float* y) {
  BATON_UNROLL
  for (int r = 0; r < R; r++) {
    _mm512_storeu_ps(y + r * kPanel, sums[r][0]);
    _mm512_storeu_ps(y + r * kPanel + 16, sums[r][1]);
  }
}

struct F32 {
  static constexpr int kRows = 12;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const float* weights = panel_of<float>(w, panel);
    const char* rows = row_of(x, first);
    __m512 sums[R][2];
    BATON_UNROLL
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.depth; k++, weights += kPanel, rows += 4) {
      __m512 left = _mm512_loadu_ps(weights), right = _mm512_loadu_ps(weights + 16);
      BATON_UNROLL
      for (int r = 0; r < R; r++) {
        __m512 a = _mm512_set1_ps(one_float(rows + r * x.stride));
        sums[r][0] = _mm512_fmadd_ps(a, left, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(a, right, sums[r][1]);
      }
    }
    store(sums, y);
  }
};

// The even inputs are the lower halves of 32 bits, the odd ones the upper halves.
inline __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
}

struct Bf16 {
  static constexpr int kRows = 12;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const uint16_t* weights = panel_of<uint16_t>(w, panel);
    const char* rows = row_of(x, first);
    __m512 sums[R][2];
    BATON_UNROLL
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.depth; k += 2, weights += 2 * kPanel, rows += 8) {
      __m512i left = _mm512_loadu_si512(weights), right = _mm512_loadu_si512(weights + 32);
      __m512 left_even = even(left), left_odd = odd(left);
      __m512 right_even = even(right), right_odd = odd(right);
      BATON_UNROLL
      for (int r = 0; r < R; r++) {
        __m512 a = _mm512_set1_ps(one_float(rows + r * x.stride));
        sums[r][0] = _mm512_fmadd_ps(a, left_even, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(a, right_even, sums[r][1]);
        __m512 b = _mm512_set1_ps(one_float(rows + r * x.stride + 4));
        sums[r][0] = _mm512_fmadd_ps(b, left_odd, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(b, right_odd, sums[r][1]);
      }
    }
    store(sums, y);
  }
};

// Adds up the two halves that a column's sums are in.
inline __m512i pairs_added(__m512i left, __m512i right) {
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_permutex2var_epi32(left, evens, right),
                          _mm512_permutex2var_epi32(left, odds, right));
}

// A product of uint8 and int8 fits into 16 bits and the sum of two into 32 (vpmaddwd). The shorter
// vpmaddubsw saturates at 16 bits.
struct Int8 {
  static constexpr int kRows = 6;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    const char* weights = panel_of<char>(w, panel);
    const char* rows = row_of(x, first);
    __m512i sums[R][4];  // 8 columns each, two sums per column
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_si512();
    for (int64_t k = 0; k < w.depth; k += 4, weights += 4 * kPanel, rows += 4) {
      BATON_UNROLL
      for (int c = 0; c < 4; c++) {
        __m512i wide = _mm512_cvtepi8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32 * c)));
        BATON_UNROLL
        for (int r = 0; r < R; r++) {
          __m512i a = _mm512_cvtepu8_epi16(_mm256_set1_epi32(four_bytes(rows + r * x.stride)));
          sums[r][c] = _mm512_add_epi32(sums[r][c], _mm512_madd_epi16(a, wide));
        }
      }
    }
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      scale(w, panel, x.scales[first + r], pairs_added(sums[r][0], sums[r][1]),
            pairs_added(sums[r][2], sums[r][3]), y + r * kPanel);
  }
};

}  // namespace

void f32_avx512(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<F32>(w, x, first, count, sink);
}

void bf16_avx512(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<Bf16>(w, x, first, count, sink);
}

void int8_avx512(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  rows_in_tiles<Int8>(w, x, first, count, sink);
}

}  // namespace baton

#include "target_end.inc"

#endif
