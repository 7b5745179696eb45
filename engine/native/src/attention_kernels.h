// The arithmetic of attention, one tile and one run at a time, for each instruction set.
#pragma once

#include <cstdint>

#include "baton.h"
#include "gemm_kernels.h"
#include "memory.h"

namespace baton {

constexpr int kRun = 128;       // positions of a run
constexpr int kStep = 32;       // positions are padded to a multiple of it with rows of zeros
constexpr int kMostRows = 64;  // most query rows of a tile

// A softmax over some positions, not yet divided by its sum. Exponents are to base 2.
struct Partial {
  float* largest;  // [rows]
  float* sums;     // [rows]
  float* mixed;    // [rows, head_dim]
};

// What one thread works in.
struct AttentionScratch {
  AttentionScratch(int max_rows, int head_dim);

  Memory memory;
  void* queries;        // [rows, head_dim], as the kernel wants them
  void* keys;           // one run, as the kernel wants it
  void* values;
  float* scores;        // [rows, kRun]
  void* weights;        // [rows, kRun] bfloat16, where the kernel wants that
  Partial run, total;
  const void* zeros;    // a row of the pool with nothing in it
  // The run that is to be attended.
  int count;                          // positions, a multiple of kStep
  const void* key_rows[kRun];         // where each lies in the pool
  const void* value_rows[kRun];
  float key_scales[kRun];             // INT8
  float value_scales[kRun];
  int* from;                          // [rows]: positions [from, to) of the run are visible
  int* to;
};

struct AttentionKernels {
  // Queries [rows, head_dim] into scratch.
  void (*queries)(const float* const* from, int rows, int dim, AttentionScratch& scratch);
  // The run in scratch into scratch.run. `scale`: of the scores, times log2(e).
  void (*attend)(int rows, int dim, BatonFormat format, float scale, AttentionScratch& scratch);
  // total = total and `run` together; total = nothing yet; mixed = total, divided by its sum.
  void (*merge)(const Partial& total, const Partial& run, int rows, int dim);
  void (*clear)(const Partial& total, int rows, int dim);
  void (*finish)(const Partial& total, int rows, int dim);
  // Once per thread before its first `attend` of a phase, and after its last.
  void (*begin)();
  void (*end)();
};

// For a pool of `format`.
const AttentionKernels& attention_kernels(BatonIsa isa, BatonFormat format);

extern const AttentionKernels attention_portable;
#if BATON_X86
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
#endif
#if BATON_X86_NEW
extern const AttentionKernels attention_avx512_bf16;
extern const AttentionKernels attention_amx;
#endif

}  // namespace baton
