// int4 weights unpacked with AVX-512, and products of few rows with VNNI, unpacked in registers.
#include "gemm_int4.h"
#include "int4.h"

#if defined(BATON_X86)

#include <immintrin.h>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#include "target_begin.inc"

namespace baton {
namespace {

#include "unpack_int4_avx512.inc"

}  // namespace

void unpack_avx512(const char* panel, int64_t depth, char* to) {
  constexpr int kLine = 4 * kPanel, kHalf = kGroup * kPanel;
  for (int64_t k = 0; k < depth; k += kBlockInputs, panel += kBlockBytes, to += 2 * kHalf) {
    const Groups left(panel, 0), right(panel, 1);
    const char* numbers = panel + 2 * kPanel;
    BATON_UNROLL
    for (int line = 0; line < kGroup / 4; line++) {
      __m512i a = _mm512_loadu_si512(numbers + line * kLine);
      __m512i b = _mm512_loadu_si512(numbers + line * kLine + 64);
      char* at = to + line * kLine;
      _mm512_storeu_si512(at, left.first(a));
      _mm512_storeu_si512(at + 64, right.first(b));
      _mm512_storeu_si512(at + kHalf, left.second(a));
      _mm512_storeu_si512(at + kHalf + 64, right.second(b));
    }
  }
}

}  // namespace baton

#include "target_end.inc"

#endif
#if defined(BATON_X86_NEW)

#undef BATON_TARGET
#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#include "target_begin.inc"

namespace baton {
namespace vnni {
namespace {

#include "rows_in_tiles.inc"
#include "scale_avx512.inc"
#include "unpack_int4_avx512.inc"

constexpr int64_t kAhead = 2 * kBlockBytes;  // by which weights are prefetched

struct Int4 {
  static constexpr int kRows = kFewRowsInt4;

  template <int R>
  static void tile(const Packed& w, const Rows& x, int panel, int first, float* y) {
    constexpr int kChains = R <= 4 ? 2 : 1;  // sums that do not wait for each other
    const char* block = panel_of<char>(w, panel);
    const char* rows = row_of(x, first);
    __m512i sums[R][2][kChains];
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int c = 0; c < kChains; c++) sums[r][0][c] = sums[r][1][c] = _mm512_setzero_si512();
    for (int64_t k = 0; k < w.depth; k += kBlockInputs, block += kBlockBytes, rows += kBlockInputs) {
      const Groups left(block, 0), right(block, 1);
      const char* numbers = block + 2 * kPanel;
      _mm_prefetch(block + kAhead, _MM_HINT_T0);
      BATON_UNROLL
      for (int line = 0; line < kGroup / 4; line++, numbers += 4 * kPanel) {
        _mm_prefetch(numbers + kAhead, _MM_HINT_T0);
        _mm_prefetch(numbers + kAhead + 64, _MM_HINT_T0);
        __m512i a = _mm512_loadu_si512(numbers), b = _mm512_loadu_si512(numbers + 64);
        add<R, 0>(rows + 4 * line, x.stride, left.first(a), right.first(b), sums);
        add<R, kChains - 1>(rows + kGroup + 4 * line, x.stride, left.second(a), right.second(b), sums);
      }
    }
    BATON_UNROLL
    for (int r = 0; r < R; r++) {
      BATON_UNROLL
      for (int c = 1; c < kChains; c++) {
        sums[r][0][0] = _mm512_add_epi32(sums[r][0][0], sums[r][0][c]);
        sums[r][1][0] = _mm512_add_epi32(sums[r][1][0], sums[r][1][c]);
      }
      scale(w, panel, x.scales[first + r], sums[r][0][0], sums[r][1][0], y + r * kPanel);
    }
  }

  template <int R, int kChain, int kChains>
  static void add(const char* rows, int64_t stride, __m512i left, __m512i right,
                  __m512i (&sums)[R][2][kChains]) {
    BATON_UNROLL
    for (int r = 0; r < R; r++) {
      __m512i a = _mm512_set1_epi32(four_bytes(rows + r * stride));
      sums[r][0][kChain] = _mm512_dpbusd_epi32(sums[r][0][kChain], a, left);
      sums[r][1][kChain] = _mm512_dpbusd_epi32(sums[r][1][kChain], a, right);
    }
  }
};

}  // namespace
}  // namespace vnni

void int4_few_rows_vnni(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  vnni::rows_in_tiles<vnni::Int4>(w, x, first, count, sink);
}

}  // namespace baton

#include "target_end.inc"

#endif
