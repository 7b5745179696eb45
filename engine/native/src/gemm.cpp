#include "gemm.h"

#include "gemm_kernels.h"

namespace baton {
namespace {

BatonFormat as_float(BatonFormat weights) { return weights == BATON_INT8 ? BATON_INT8 : BATON_F32; }

void nothing() {}

template <PanelKernel f32, PanelKernel bf16, PanelKernel int8>
void panel_of(const Packed& w, const Rows& x, int panel, const Sink& sink) {
  switch (w.format) {
    case BATON_BF16: return bf16(w, x, panel, sink);
    case BATON_INT8: return int8(w, x, panel, sink);
    default: return f32(w, x, panel, sink);
  }
}

const GemmKernels portable = {
    as_float, panel_of<f32_portable, bf16_portable, int8_portable>, nothing, nothing};

}  // namespace

BatonIsa compiled_isa() { return BATON_AMX; }

const GemmKernels& gemm_kernels(BatonIsa) { return portable; }

}  // namespace baton
