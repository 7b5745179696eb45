// Sampling kernels for any processor.
#include "sample_kernels.h"

#define WIDTH 4

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "sample.inc"

}  // namespace

const SampleKernels sample_portable = {largest, weigh, cut, collect_one_by_one, masses};

}  // namespace baton
