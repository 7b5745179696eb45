// Row kernels for any processor.
#include "numbers.h"
#include "rows_kernels.h"

#define WIDTH 4

namespace baton {
namespace {

#include "rows_vectors.inc"

#include "rows.inc"

}  // namespace

const RowKernels rows_portable = {widen, norm, narrow, keep, rotate, add, copy, gate, largest};

}  // namespace baton
