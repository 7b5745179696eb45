// What the kernels for int4 weights are made of; see int4.h for how these are stored.
#pragma once

#include <cstdint>

#include "gemm_kernels.h"

namespace baton {

// Up to so many rows numbers are multiplied as they come, else a panel is unpacked first.
constexpr int kFewRowsInt4 = 8;  // with VNNI
constexpr int kFewRowsInt4Avx2 = 3;

// One panel of `depth` inputs as one of INT8.
using UnpackPanel = void (*)(const char* panel, int64_t depth, char* to);

void unpack_portable(const char* panel, int64_t depth, char* to);
void unpack_avx2(const char* panel, int64_t depth, char* to);
void unpack_avx512(const char* panel, int64_t depth, char* to);

// All rows of `count` panels from panel `first` on.
void through_int8(const Packed& w, const Rows& x, int first, int count, const Sink& sink,
                  UnpackPanel unpack, PanelsKernel int8);
void int4_few_rows_avx2(const Packed& w, const Rows& x, int first, int count, const Sink& sink);
void int4_few_rows_vnni(const Packed& w, const Rows& x, int first, int count, const Sink& sink);

}  // namespace baton
