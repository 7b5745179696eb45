#include "gemm.h"

#include "gemm_kernels.h"
#include "memory.h"
#include "team.h"

namespace baton {
namespace {

BatonFormat widened(BatonFormat weights) {
  return weights == BATON_INT8 || weights == BATON_INT4 ? BATON_INT8 : BATON_F32;
}

BatonFormat as_weights(BatonFormat weights) { return weights == BATON_INT4 ? BATON_INT8 : weights; }

void nothing() {}

template <PanelsKernel f32, PanelsKernel bf16, PanelsKernel int8, PanelsKernel int4>
void panels_of(const Packed& w, const Rows& x, int first, int count, const Sink& sink) {
  switch (w.format) {
    case BATON_BF16: return bf16(w, x, first, count, sink);
    case BATON_INT8: return int8(w, x, first, count, sink);
    case BATON_INT4: return int4(w, x, first, count, sink);
    default: return f32(w, x, first, count, sink);
  }
}

template <PanelsKernel f32, PanelsKernel bf16, PanelsKernel int8, PanelsKernel int4>
constexpr GemmKernels kernels_of(BatonFormat (*rows_format)(BatonFormat), void (*begin)() = nothing,
                                 void (*end)() = nothing) {
  return {rows_format, panels_of<f32, bf16, int8, int4>, begin, end};
}

constexpr GemmKernels kPortable =
    kernels_of<f32_portable, bf16_portable, int8_portable, int4_portable>(widened);
#if defined(BATON_X86)
constexpr GemmKernels kAvx2 = kernels_of<f32_avx2, bf16_avx2, int8_avx2, int4_avx2>(widened);
constexpr GemmKernels kAvx512 =
    kernels_of<f32_avx512, bf16_avx512, int8_avx512, int4_avx512>(widened);
#endif
#if defined(BATON_X86_NEW)
constexpr GemmKernels kAvx512Bf16 =
    kernels_of<f32_avx512, bf16_avx512_bf16, int8_avx512_vnni, int4_avx512_vnni>(as_weights);
constexpr GemmKernels kAmx =
    kernels_of<f32_avx512, bf16_amx, int8_amx, int4_amx>(as_weights, begin_amx, end_amx);
#endif

// Panels are handed out in pieces that shrink: long ones first, which memory streams best, single
// ones at the end, so that nobody waits for long.
struct Piece {
  int first, count;
};

Piece piece(int index, int panels, int threads) {
  Piece piece{0, 0};
  for (int i = 0; i <= index; i++) {
    piece.first += piece.count;
    int share = (panels - piece.first) / (2 * threads);
    piece.count = share > 1 ? share : 1;
  }
  return piece;
}

}  // namespace

BatonIsa compiled_isa() {
#if defined(BATON_X86_NEW)
  return BATON_AMX;
#elif defined(BATON_X86)
  return BATON_AVX512;
#else
  return BATON_PORTABLE;
#endif
}

const GemmKernels& gemm_kernels(BatonIsa isa) {
  switch (isa) {
#if defined(BATON_X86_NEW)
    case BATON_AMX: return kAmx;
    case BATON_AVX512_BF16: return kAvx512Bf16;
#endif
#if defined(BATON_X86)
    case BATON_AVX512: return kAvx512;
    case BATON_AVX2: return kAvx2;
#endif
    default: return kPortable;
  }
}

void multiply(const GemmKernels& kernels, const Packed& w, const Rows& x, Team& team, const Sink& sink) {
  int panels = w.panels_count();
  if (team.threads() == 1) return kernels.panels(w, x, 0, panels, sink);
  for (int index; (index = team.next(panels)) >= 0;) {
    Piece mine = piece(index, panels, team.threads());
    if (mine.first >= panels) return;  // there are fewer pieces than panels
    kernels.panels(w, x, mine.first, mine.count, sink);
  }
}

int64_t row_stride(int64_t depth, BatonFormat rows) {
  int64_t bytes = depth * (rows == BATON_F32 ? 4 : rows == BATON_INT8 ? 1 : 2);
  return bytes % 512 == 0 ? bytes + 64 : bytes;
}

void* scratch(size_t bytes) {
  thread_local Memory memory;
  if (memory.bytes() < bytes) memory = Memory(bytes);
  return memory.as<void>();
}

}  // namespace baton
