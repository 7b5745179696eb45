// The row kernels of each instruction set, for rows.cpp to choose from.
#pragma once

#include "gemm_kernels.h"
#include "rows.h"

namespace baton {

extern const RowKernels rows_portable;
#if BATON_X86
extern const RowKernels rows_avx2;
extern const RowKernels rows_avx512;
#endif
#if BATON_X86_NEW
extern const RowKernels rows_avx512_bf16;
#endif

}  // namespace baton
