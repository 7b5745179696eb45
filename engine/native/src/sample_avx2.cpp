// Sampling kernels for AVX2 with FMA.
#include "sample_kernels.h"

#if BATON_X86

#define BATON_TARGET "avx2,fma"
#include "target_begin.inc"

#define WIDTH 8

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "sample.inc"

}  // namespace

const SampleKernels sample_avx2 = {largest, weigh, cut, collect_one_by_one, masses};

}  // namespace baton

#include "target_end.inc"

#endif  // BATON_X86
