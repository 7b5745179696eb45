// The arithmetic of attention, one tile and one run at a time, for each instruction set.
#pragma once

#include <cstdint>

#include "baton.h"
#include "gemm_kernels.h"
#include "memory.h"

namespace baton {

constexpr int kRun = 128;       // positions of a run
constexpr int kStep = 32;       // positions are padded to a multiple of it with rows of zeros
constexpr int kMostRows = 256;  // most query rows of a tile

// A softmax over some positions, not yet divided by its sum. Exponents are to base 2.
struct Partial {
  float* largest;  // [rows]
  float* sums;     // [rows]
  float* mixed;    // [rows, head_dim]
};

// Memory that the next run reads. Kernels ask for it bit by bit while they compute on this one: blocks
// lie apart, where the processor does not foresee them.
struct Ahead {
  int next = 0, count = 0;  // of the ranges
  int total = 0;            // lines of all
  int share = 0;            // lines to ask for at a time
  const char* at[4 * kRun];
  int lines[4 * kRun];
};

// Queries of one token: [kv_heads, group, head_dim].
struct DecodeShape {
  int kv_heads, group, dim;
  BatonFormat format;
  int64_t row_bytes;    // of one head; the heads of a position are contiguous
  int64_t plane_bytes;  // from keys to values
};

// What one thread works in.
struct AttentionScratch {
  AttentionScratch(int max_rows, const DecodeShape& shape);

  Memory memory;
  void* queries;        // [rows, head_dim], as the kernel wants them
  void* keys;           // one run, as the kernel wants it
  void* values;
  float* scores;        // [rows, kRun]
  void* weights;        // [rows, kRun] bfloat16, where the kernel wants that
  Partial run, total;
  const char* zeros;    // a position of the pool with nothing in it
  const float** query_rows;  // [rows]
  // The run that is to be attended.
  int count;                          // positions, a multiple of kStep
  const char* key_rows[kRun];         // where each lies in the pool
  const char* value_rows[kRun];
  float key_scales[kRun];             // INT8
  float value_scales[kRun];
  const char* key_scale_rows[kRun];
  Ahead ahead;
  int begin, end;                     // positions of the run that some row sees
  // The same run for `decode`: 16 positions at a time, where the keys of each lie. Those that nobody
  // sees lie there too, and may be anything.
  const char* groups[kRun / 16];
  const char* scales[kRun / 16];      // INT8: of those keys
  void* decode_queries;               // [kv_heads, head_dim / 32] tiles; zero where nobody wrote
  int32_t* decode_weights;            // [16 and more][2][kRun] pairs
  int* from;                          // [rows]: positions [from, to) of the run are visible
  int* to;
};

struct AttentionKernels {
  // Queries [rows, head_dim] into scratch.
  void (*queries)(const float* const* from, int rows, int dim, AttentionScratch& scratch);
  // The run in scratch into scratch.run, for `rows` rows from row `first` on. `scale`: of the scores,
  // times log2(e).
  void (*attend)(int first, int rows, int dim, BatonFormat format, float scale, AttentionScratch& scratch);
  // total = total and `run` together; total = nothing yet; mixed = total, divided by its sum.
  void (*merge)(const Partial& total, const Partial& run, int rows, int dim);
  void (*clear)(const Partial& total, int rows, int dim);
  void (*finish)(const Partial& total, int rows, int dim);
  // Once per thread before its first `attend` of a phase, and after its last.
  void (*begin)();
  void (*end)();
  // `queries` and `attend` for all key heads of one token at once. Null where there is nothing better
  // than head by head; for head_dim in multiples of 32, groups up to 16 and blocks in multiples of 16.
  void (*decode_queries)(const float* from, const DecodeShape& shape, AttentionScratch& scratch);
  void (*decode)(const DecodeShape& shape, float scale, AttentionScratch& scratch);
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
