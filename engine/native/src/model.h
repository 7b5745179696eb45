// A model's weights, packed.
#pragma once

#include <cstdint>
#include <vector>

#include "baton.h"
#include "pack.h"
#include "team.h"

namespace baton {

struct LayerWeights {
  PackedMatrix matrices[BATON_HEAD];               // by BatonMatrix
  std::vector<float> vectors[BATON_FINAL_NORM];    // by BatonVector, empty where there is none
  int window = 0;                                  // 0: full attention

  const float* vector(BatonVector which) const {
    return vectors[which].empty() ? nullptr : vectors[which].data();
  }
};

class Model {
 public:
  // Throws std::invalid_argument where the shape cannot be served, and std::bad_alloc.
  explicit Model(const BatonShape& shape);

  // As their namesakes in baton.h; 0, or what `fail` returns.
  int pack(int layer, int matrix, int64_t first, int64_t rows, const void* source, BatonFormat format,
           Team& team);
  int set(int layer, int vector, int64_t first, int64_t count, const float* source);
  int set_embedding(const void* source, int format);
  int set_window(int layer, int window);
  // 0 if everything is there that a pass cannot do without.
  int check() const;

  int64_t bytes() const;

  const BatonShape shape;

 private:
  Arena memory_;  // of the layers' matrices, in the order in which a pass reads them

 public:
  std::vector<LayerWeights> layers;
  PackedMatrix head;
  std::vector<float> final_norm;
  const void* embedding = nullptr;
  BatonFormat embedding_format = BATON_F32;
};

}  // namespace baton
