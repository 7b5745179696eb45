// Few rows, where AMX is: plain vectors follow memory faster than tiles do, two panels at a time and
// asking ahead (1.2 times on Sapphire Rapids). They add up in the order of the tiles, to the same bits.
#include "gemm_kernels.h"

#if defined(BATON_X86_NEW)

#include <immintrin.h>

#include <cstdint>

#define BATON_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#include "target_begin.inc"

namespace baton {
namespace {

#include "scale_avx512.inc"

constexpr int kAhead = 1024;        // bytes by which weights are asked for
constexpr int kLines = 16;          // pairs of lines of a panel in a step of a tile
constexpr int kStepBytes = 64 * kPanel;
constexpr int kTogether = 2;        // panels, and for bfloat16 rows

inline void ask_ahead(const char* weights) {
  _mm_prefetch(weights + kAhead, _MM_HINT_T0);
  _mm_prefetch(weights + kAhead + 64, _MM_HINT_T0);
}

// A step's inputs of a row as floats, those with even and those with odd numbers.
struct alignas(64) Inputs {
  float even[16], odd[16];
};

inline __m512 upper_halves(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
}

inline __m512 lower_halves(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

// What TDPBF16PS does (Intel's manual): from zero, products of even inputs and of odd ones are added up
// apart, each in one rounding; then one to the other, and both to the sum. `tile` [P][rows][kPanel],
// from its first row on that counts.
template <int P, int R, bool kAsk>
inline void bf16_step(const char* weights, int64_t panel_bytes, const Inputs* x, float* tile, int rows) {
  __m512 even[P][R][2], odd[P][R][2];
  BATON_UNROLL
  for (int p = 0; p < P; p++)
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      even[p][r][0] = even[p][r][1] = odd[p][r][0] = odd[p][r][1] = _mm512_setzero_ps();
  BATON_UNROLL
  for (int k = 0; k < kLines; k++)
    BATON_UNROLL
    for (int p = 0; p < P; p++) {
      const char* line = weights + p * panel_bytes + k * 128;
      if (kAsk) ask_ahead(line);
      __m512i left = _mm512_loadu_si512(line), right = _mm512_loadu_si512(line + 64);
      __m512 left_even = lower_halves(left), right_even = lower_halves(right);
      __m512 left_odd = upper_halves(left), right_odd = upper_halves(right);
      BATON_UNROLL
      for (int r = 0; r < R; r++) {
        __m512 a = _mm512_set1_ps(x[r].even[k]), b = _mm512_set1_ps(x[r].odd[k]);
        even[p][r][0] = _mm512_fmadd_ps(left_even, a, even[p][r][0]);
        odd[p][r][0] = _mm512_fmadd_ps(left_odd, b, odd[p][r][0]);
        even[p][r][1] = _mm512_fmadd_ps(right_even, a, even[p][r][1]);
        odd[p][r][1] = _mm512_fmadd_ps(right_odd, b, odd[p][r][1]);
      }
    }
  BATON_UNROLL
  for (int p = 0; p < P; p++)
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      BATON_UNROLL
      for (int half = 0; half < 2; half++) {
        float* sum = tile + (p * rows + r) * kPanel + 16 * half;
        __m512 both = _mm512_add_ps(even[p][r][half], odd[p][r][half]);
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), both));
      }
}

// While it lives numbers below the normal ones count as zeros, as they do in tiles.
struct NoSubnormals {
  NoSubnormals() { _mm_setcsr(before | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before); }
  const unsigned before = _mm_getcsr();
};

template <int P>
void bf16_panels(const Packed& w, const Rows& x, int panel, float* tile) {
  NoSubnormals mode;
  const char* weights = static_cast<const char*>(w.panels) + panel * w.panel_bytes;
  for (int i = 0; i < P * x.count * kPanel; i += 16) _mm512_storeu_ps(tile + i, _mm512_setzero_ps());
  for (int64_t at = 0; at < w.panel_bytes; at += kStepBytes, weights += kStepBytes) {
    Inputs inputs[kMostFewRows];
    for (int r = 0; r < x.count; r++) {
      const char* row = static_cast<const char*>(x.data) + r * x.stride + at / kPanel;
      __m512i pairs = _mm512_loadu_si512(row);
      _mm512_store_ps(inputs[r].even, lower_halves(pairs));
      _mm512_store_ps(inputs[r].odd, upper_halves(pairs));
    }
    if (x.count == 1) {
      bf16_step<P, 1, true>(weights, w.panel_bytes, inputs, tile, 1);
      continue;
    }
    bf16_step<P, kTogether, true>(weights, w.panel_bytes, inputs, tile, x.count);
    for (int r = kTogether; r < x.count; r += kTogether)
      if (r + 1 < x.count)
        bf16_step<P, kTogether, false>(weights, w.panel_bytes, inputs + r, tile + r * kPanel, x.count);
      else
        bf16_step<P, 1, false>(weights, w.panel_bytes, inputs + r, tile + r * kPanel, x.count);
  }
}

template <int P, int R>
void int8_panels(const Packed& w, const Rows& x, int panel, float* tile) {
  const char* weights = static_cast<const char*>(w.panels) + panel * w.panel_bytes;
  const char* row = static_cast<const char*>(x.data);
  __m512i sums[P][R][2];
  BATON_UNROLL
  for (int p = 0; p < P; p++)
    BATON_UNROLL
    for (int r = 0; r < R; r++) sums[p][r][0] = sums[p][r][1] = _mm512_setzero_si512();
  for (int64_t at = 0; at < w.panel_bytes; at += 128, weights += 128, row += 4)
    BATON_UNROLL
    for (int p = 0; p < P; p++) {
      const char* line = weights + p * w.panel_bytes;
      ask_ahead(line);
      __m512i left = _mm512_loadu_si512(line), right = _mm512_loadu_si512(line + 64);
      BATON_UNROLL
      for (int r = 0; r < R; r++) {
        int four;
        __builtin_memcpy(&four, row + r * x.stride, sizeof four);
        __m512i a = _mm512_set1_epi32(four);
        sums[p][r][0] = _mm512_dpbusd_epi32(sums[p][r][0], a, left);
        sums[p][r][1] = _mm512_dpbusd_epi32(sums[p][r][1], a, right);
      }
    }
  BATON_UNROLL
  for (int p = 0; p < P; p++)
    BATON_UNROLL
    for (int r = 0; r < R; r++)
      scale(w, panel + p, x.scales[r], sums[p][r][0], sums[p][r][1], tile + (p * R + r) * kPanel);
}

template <int P>
void int8_panels(const Packed& w, const Rows& x, int panel, float* tile) {
  static_assert(kMostFewRows == 4);
  switch (x.count) {
    case 1: return int8_panels<P, 1>(w, x, panel, tile);
    case 2: return int8_panels<P, 2>(w, x, panel, tile);
    case 3: return int8_panels<P, 3>(w, x, panel, tile);
    default: return int8_panels<P, 4>(w, x, panel, tile);
  }
}

using Compute = void (*)(const Packed& w, const Rows& x, int panel, float* tile);

inline void panels(const Packed& w, const Rows& x, int first, int count, const Sink& sink, Compute two,
                   Compute one) {
  alignas(64) float tile[kTogether * kMostFewRows * kPanel];
  for (int end = first + count; first < end;) {
    int together = end - first >= kTogether ? kTogether : 1;
    (together == kTogether ? two : one)(w, x, first, tile);
    for (int p = 0; p < together; p++, first++)
      sink.take(sink.self, tile + p * x.count * kPanel, 0, x.count, first);
  }
}

}  // namespace

void bf16_amx_few(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  panels(w, x, first, count, sink, bf16_panels<kTogether>, bf16_panels<1>);
}

void int8_amx_few(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  panels(w, x, first, count, sink, int8_panels<kTogether>, int8_panels<1>);
}

}  // namespace baton

#include "target_end.inc"

#endif
