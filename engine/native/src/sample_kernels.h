// The sampling kernels of each instruction set, for sample.cpp to choose from.
#pragma once

#include "gemm_kernels.h"
#include "sample.h"

namespace baton {

extern const SampleKernels sample_portable;
#if BATON_X86
extern const SampleKernels sample_avx2;
extern const SampleKernels sample_avx512;
#endif

}  // namespace baton
