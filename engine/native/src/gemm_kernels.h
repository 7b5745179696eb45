// The kernels of each instruction set, for gemm.cpp to choose from.
//
// Their files switch the compiler to instructions that other processors lack. So they use no inline
// function or template of anyone else after the switch: the linker keeps one copy of such a
// function for the whole library, and it may be theirs.
#pragma once

#include <cstddef>

#include "gemm.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define BATON_X86 1
#if (defined(__clang__) && __clang_major__ >= 15) || (!defined(__clang__) && __GNUC__ >= 12)
#define BATON_X86_NEW 1  // the compiler knows AVX-512 BF16 and AMX
#endif
#endif

namespace baton {

// All rows of `count` panels, from panel `first` on.
using PanelsKernel = void (*)(const Packed& w, const Rows& x, int first, int count, const Sink& sink);

constexpr int kMostFewRows = 4;

#define BATON_KERNEL(name) \
  void name(const Packed& w, const Rows& x, int first, int count, const Sink& sink)

BATON_KERNEL(f32_portable);
BATON_KERNEL(bf16_portable);
BATON_KERNEL(int8_portable);
BATON_KERNEL(f32_avx2);
BATON_KERNEL(bf16_avx2);
BATON_KERNEL(int8_avx2);
BATON_KERNEL(f32_avx512);
BATON_KERNEL(bf16_avx512);
BATON_KERNEL(int8_avx512);
BATON_KERNEL(bf16_avx512_bf16);
BATON_KERNEL(int8_avx512_vnni);
BATON_KERNEL(bf16_amx);
BATON_KERNEL(int8_amx);
BATON_KERNEL(int4_portable);
BATON_KERNEL(int4_avx2);
BATON_KERNEL(int4_avx512);
BATON_KERNEL(int4_avx512_vnni);
BATON_KERNEL(int4_amx);
BATON_KERNEL(bf16_amx_few);  // of up to kMostFewRows
BATON_KERNEL(int8_amx_few);
void begin_amx();
void end_amx();

#undef BATON_KERNEL

// Memory of this thread, at least so much, until it asks again. Aligned to pages.
void* scratch(size_t bytes);

// The best instruction set that this library was compiled with kernels for.
BatonIsa compiled_isa();

}  // namespace baton
