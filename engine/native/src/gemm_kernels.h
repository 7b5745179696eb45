// The kernels of each instruction set, for gemm.cpp to choose from.
//
// Their files switch the compiler to instructions that other processors lack. So they use no inline
// function or template of anyone else after the switch: the linker keeps one copy of such a
// function for the whole library, and it may be theirs.
#pragma once

#include "gemm.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define BATON_X86 1
#if (defined(__clang__) && __clang_major__ >= 15) || (!defined(__clang__) && __GNUC__ >= 12)
#define BATON_X86_NEW 1  // the compiler knows AVX-512 BF16 and AMX
#endif
#endif

namespace baton {

// Computes all rows of one panel.
using PanelKernel = void (*)(const Packed& w, const Rows& x, int panel, const Sink& sink);

void f32_portable(const Packed& w, const Rows& x, int panel, const Sink& sink);
void bf16_portable(const Packed& w, const Rows& x, int panel, const Sink& sink);
void int8_portable(const Packed& w, const Rows& x, int panel, const Sink& sink);

// The best instruction set that this library was compiled with kernels for.
BatonIsa compiled_isa();

}  // namespace baton
