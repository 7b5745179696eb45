// The C interface of the compiled CPU backend: all that Python calls, through ctypes, which
// releases the interpreter lock for the length of a call.
//
// One Model belongs to one Team of threads, and one thread at a time calls into it. Functions that
// can fail return 0 for success, else a negative number, and `baton_error` tells why.
#pragma once

#include <cstdint>

#define BATON_EXPORT extern "C" __attribute__((visibility("default")))

// Numbers as they are stored. int8: per row or column a float32 scale beside them; int4, of weights
// only: groups of 32 have integer scales below that (int4.h).
enum BatonFormat : int32_t {
  BATON_F32 = 0,
  BATON_BF16 = 1,
  BATON_F16 = 2,
  BATON_INT8 = 3,
  BATON_INT4 = 4,
};

// The instruction sets that kernels exist for, each one including those before it.
enum BatonIsa : int32_t {
  BATON_PORTABLE = 0,
  BATON_AVX2 = 1,         // with FMA and F16C
  BATON_AVX512 = 2,       // F, BW, DQ, VL
  BATON_AVX512_BF16 = 3,  // and VNNI
  BATON_AMX = 4,          // tiles of bfloat16 and int8
};

enum BatonActivation : int32_t { BATON_SILU = 0, BATON_GELU = 1, BATON_GELU_TANH = 2, BATON_RELU = 3 };

// The matrices of a layer, as [out, in]. QKV: queries, keys and values below one another.
// GATE_UP: gate above up. HEAD belongs to no layer.
enum BatonMatrix : int32_t { BATON_QKV = 0, BATON_OUTPUT = 1, BATON_GATE_UP = 2, BATON_DOWN = 3, BATON_HEAD = 4 };

// The vectors of a layer; biases in the order of their matrix's rows. FINAL_NORM belongs to none.
enum BatonVector : int32_t {
  BATON_INPUT_NORM = 0,   // [hidden]
  BATON_MLP_NORM = 1,     // [hidden]
  BATON_Q_NORM = 2,       // [head_dim], absent in most families
  BATON_K_NORM = 3,       // [head_dim]
  BATON_QKV_BIAS = 4,     // [(heads + 2 kv_heads) head_dim]
  BATON_OUTPUT_BIAS = 5,  // [hidden]
  BATON_GATE_UP_BIAS = 6, // [2 intermediate]
  BATON_DOWN_BIAS = 7,    // [hidden]
  BATON_FINAL_NORM = 8,   // [hidden]
};

// What never changes. head_dim is a multiple of 16, hidden and intermediate multiples of 16.
struct BatonShape {
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
  int32_t activation;  // BatonActivation
  int32_t weights;     // BatonFormat: F32, BF16, INT8 or INT4, what packed matrices hold
  int32_t head;        // the same, of the output head
  int32_t kv;          // BatonFormat: F32, BF16 or INT8
  int32_t block_size;  // positions of a KV block
  int32_t max_tokens;  // most tokens of one pass
  float eps;           // of the RMS norms
  float scale;         // of attention scores
};

// One pass: the tokens of all chunks one after another (engine/attention/contract.py, Batch).
//
// The pool is [blocks, layers, 2, plane], block-major; plane is [block_size, kv_heads, head_dim] of
// the KV format, and for INT8 [block_size, kv_heads] float32 scales after it.
struct BatonBatch {
  int32_t tokens;     // T
  int32_t sequences;  // S
  int32_t rows;       // R, rows of the flat batch whose logits are wanted
  int32_t width;      // B, blocks in a row of `tables`
  const int64_t* token_ids;     // [T]
  const int64_t* slots;         // [T], block * block_size + offset
  const int32_t* starts;        // [S]
  const int32_t* lengths;       // [S]
  const int64_t* tables;        // [S, B]
  const float* rotations;       // [*, head_dim]: head_dim / 2 cosines, then as many sines
  const int32_t* rotation_rows; // [T], each token's row of `rotations`
  const int64_t* logit_rows;    // [R]
  const int32_t* logit_targets; // [R], row of `logits` to write, or -1 for none
  void* kv;
  float* logits;                // [max(logit_targets) + 1, vocabulary], or null if there is none
  int64_t* best;                // [R], the token with the largest logit, the lowest if they tie;
                                // -1 if all are NaN
  float* best_logits;           // [R], its logit
};

// Seconds that a pass spent in each part, for profiles; `sync` is waiting for other threads, as
// seen by the first one.
struct BatonTimes {
  double embed, norm, qkv, rope, attention, output, gate_up, down, head, sync;
};

struct BatonTeam;
struct BatonModel;

// The last error of this thread, for people.
BATON_EXPORT const char* baton_error();
// What this file was when the library was built, as setup.py names it; empty where that is not known.
BATON_EXPORT const char* baton_abi();
// The best instruction set of this machine, and its name.
BATON_EXPORT int32_t baton_isa();
BATON_EXPORT const char* baton_isa_name(int32_t isa);

// `threads` threads in all, the caller of each pass among them. cpus [threads]: where each is
// pinned, or null to leave that to the kernel.
BATON_EXPORT BatonTeam* baton_team_new(int32_t threads, const int32_t* cpus);
BATON_EXPORT void baton_team_free(BatonTeam*);
// Let so many of the team's threads take part in what follows, at least one; the others sleep.
BATON_EXPORT void baton_team_use(BatonTeam*, int32_t threads);

// Null where the shape or the instruction set cannot be served.
BATON_EXPORT BatonModel* baton_model_new(const BatonShape*, BatonTeam*, int32_t isa);
BATON_EXPORT void baton_model_free(BatonModel*);
// Pack `rows` rows of a matrix, from row `first` of it on. source: [rows, in] of `format` (F32, BF16 or
// F16), contiguous; it is not needed any more afterwards.
BATON_EXPORT int32_t baton_model_pack(BatonModel*, int32_t layer, int32_t matrix, int64_t first,
                                      int64_t rows, const void* source, int32_t format);
// Copy `count` numbers of a vector, from `first` of it on.
BATON_EXPORT int32_t baton_model_vector(BatonModel*, int32_t layer, int32_t vector, int64_t first,
                                        int64_t count, const float* source);
// The embedding [vocabulary, hidden] is read where it lies and must outlive the model.
BATON_EXPORT int32_t baton_model_embedding(BatonModel*, const void* source, int32_t format);
// Sliding window of a layer in positions; 0 for full attention, as at the start.
BATON_EXPORT int32_t baton_model_window(BatonModel*, int32_t layer, int32_t window);
// Bytes that the packed weights take.
BATON_EXPORT int64_t baton_model_bytes(const BatonModel*);
// Run one pass. Reads and writes the pool; `times` may be null.
BATON_EXPORT int32_t baton_step(BatonModel*, const BatonBatch*, BatonTimes* times);

// y [m, n] = x [m, k] times w [n, k] transposed, through packing and kernels as a step uses them: for
// tests and benchmarks. Repeats go round copies of the packed weights, 512 MiB of them at most, so
// that few rows read memory. `seconds` [repeats], or null, gets the time of each, packing left out.
BATON_EXPORT int32_t baton_multiply(BatonTeam*, int32_t isa, int32_t weights, int64_t m, int64_t n,
                                    int64_t k, const float* x, const float* w, float* y,
                                    int32_t repeats, double* seconds);
// Bytes per second that the team reads from `bytes` of memory, best of `repeats`.
BATON_EXPORT double baton_read_bandwidth(BatonTeam*, int64_t bytes, int32_t repeats);

// Rows of logits to choose a token from, each by what its own request asks for; see
// engine/model/logits.py and engine/model/sampler.py for what the fields mean. NaN counts as -inf
// and inf as the largest float.
struct BatonDraws {
  int32_t rows;               // R
  int32_t vocabulary;         // V
  const float* logits;        // [R, V]
  const float* temperatures;  // [R], 0 for the largest logit, the first one if they tie
  const int32_t* top_ks;      // [R], 0 for no limit
  const float* top_ps;        // [R], 1 for no limit
  const double* min_ps;       // [R], 0 for no limit
  const uint64_t* seeds;      // [R]
  const uint32_t* streams;    // [R], index of the sequence in its request
  const uint32_t* positions;  // [R], of the token to choose
  int64_t* tokens;            // [R], the choice, -1 where all logits are -inf
};

// Choose the tokens, rows shared out over the team.
BATON_EXPORT int32_t baton_sample(BatonTeam*, int32_t isa, const BatonDraws*);

// Log probabilities of tokens, and of the likeliest ones, under rows of logits. NaN and inf count as
// above; a row in which no token is possible gives -inf for all.
struct BatonReports {
  int32_t rows;             // R
  int32_t vocabulary;       // V
  int32_t width;            // K, the most that a row asks for
  const float* logits;      // [*, V]
  const int64_t* places;    // [R], rows of `logits`
  const int64_t* targets;   // [R], tokens
  const int32_t* counts;    // [R], how many of the likeliest, from 0 to min(K, V)
  float* shares;            // [R], log probability of the target
  int64_t* ranks;           // [R], 1 + how many tokens have a larger logit
  int64_t* top_tokens;      // [R, K], the likeliest first, the lowest first where logits tie
  float* top_shares;        // [R, K]
};

// Fill in the last four, rows shared out over the team.
BATON_EXPORT int32_t baton_report(BatonTeam*, int32_t isa, const BatonReports*);
