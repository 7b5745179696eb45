// Attention over paged KV: ragged chunks and single tokens, grouped heads, sliding windows.
//
// A tile is some tokens of one chunk with the query heads that share a key head: token by token, head
// by head. A run is kRun positions of the context, counted from position 0. For every run a tile gets
// the softmax over that run alone; runs are then merged from the first to the last (FlashAttention's
// online softmax). Threads may share out the runs of a tile: the additions stay the same.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_kernels.h"
#include "baton.h"
#include "memory.h"
#include "model.h"
#include "team.h"

namespace baton {

// The first position that one sees.
inline int seen_from(int position, int window) {
  return window > 0 && position >= window ? position + 1 - window : 0;
}

// One layer's share of the pool.
struct LayerKv {
  const char* keys;      // of block 0; values are `plane` bytes behind them
  int64_t block_bytes;   // from one block to the next
};

class Attention {
 public:
  // Takes a tile's finished rows: [heads of the group, head_dim] of one token, contiguous.
  struct Sink {
    void (*take)(void* self, const float* mixed, int token, int kv_head);
    void* self;
  };

  Attention(const BatonShape& shape, BatonIsa isa, int threads);

  // Bytes of a plane of the pool (baton.h, BatonBatch).
  static int64_t plane_bytes(const BatonShape& shape);

  // What a pass has to do under each of the model's windows.
  void plan(const BatonBatch& batch, const std::vector<LayerWeights>& layers);
  // Inside `team.run`, between two meetings. queries: of token 0, `stride` floats from token to token,
  // rotated.
  void run(Team& team, int thread, const BatonBatch& batch, int window, const LayerKv& kv,
           const float* queries, int64_t stride, const Sink& sink);

 private:
  struct Item {
    int sequence, kv_head, kv_heads;  // key heads from kv_head on
    int first, tokens;  // rows of the flat batch
    int position;       // of the first of them
    int begin, end;     // runs
    int group;          // of the items of one tile, whoever is last merges; -1 for a whole tile
  };
  struct Seen {
    int start, begin, end;  // of a run: its first position in the context; from that, [begin, end)
  };
  struct Group {
    int runs;
    int64_t partial;  // where in partials_ the results of its runs begin
  };
  struct Plan {
    int window = 0;
    bool current = false;  // made for this pass
    int tile_tokens = 1;   // most tokens of a tile
    std::vector<Item> items;
    std::vector<Group> groups;
    int64_t partial_floats = 0;
    std::unique_ptr<std::atomic<int>[]> left;  // runs still to come, by group
    size_t left_size = 0;
  };

  Plan* find_plan(int window);
  int tile_tokens(const BatonBatch& batch) const;
  void fill(Plan& plan, const BatonBatch& batch);
  void plan_chunk(Plan& plan, const BatonBatch& batch, int sequence, int first, int most_work);
  void plan_tile(Plan& plan, Item item, int most_runs);
  void attend(const Plan& plan, const Item& item, const Item* next, const BatonBatch& batch,
              const LayerKv& kv, const float* queries, int64_t stride, AttentionScratch& scratch);
  void gather(const Item& item, const BatonBatch& batch, const LayerKv& kv, int run, int window,
              AttentionScratch& scratch) const;
  void attend_run(const Item& item, AttentionScratch& scratch);
  void next_head(AttentionScratch& scratch) const;
  void gather_groups(const Item& item, const BatonBatch& batch, const LayerKv& kv, int run, int window,
                     AttentionScratch& scratch) const;
  Seen seen_of(const Item& item, int run, int window) const;
  void append_lines(const Seen& seen, const int64_t* table, const LayerKv& kv, int skip, int most,
                    Ahead& ahead) const;
  void look_ahead(const Item& item, int run, const Item* next, int next_run, const BatonBatch& batch,
                  const LayerKv& kv, int window, Ahead& ahead) const;
  int rows_of(const Item& item) const { return item.tokens * item.kv_heads * group_; }
  Partial partial_of(const Plan& plan, const Item& item, int run);
  bool merge_group(Plan& plan, const Item& item, AttentionScratch& scratch);
  int64_t partial_floats(int rows) const { return rows * (int64_t{shape_.head_dim} + 2); }

  BatonShape shape_;
  const AttentionKernels* kernels_;
  int threads_, group_, block_shift_;
  int64_t row_bytes_, plane_bytes_, scales_at_;
  DecodeShape decode_shape_;
  bool all_heads_;  // the kernels take all key heads of a single token at once
  std::vector<std::unique_ptr<AttentionScratch>> scratch_;
  std::vector<Plan> plans_;
  std::vector<float> partials_;
};

}  // namespace baton
