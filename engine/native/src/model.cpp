#include "model.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_kernels.h"
#include "error.h"

namespace baton {
namespace {

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

const BatonShape& checked(const BatonShape& shape) {
  for (int32_t size : {shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads,
                       shape.head_dim, shape.vocabulary, shape.block_size, shape.max_tokens})
    require(size > 0, "all sizes of a shape must be positive");
  require(shape.head_dim % 16 == 0, "head_dim must be a multiple of 16");
  require(shape.hidden % 16 == 0, "hidden must be a multiple of 16");
  require(shape.intermediate % 16 == 0, "intermediate must be a multiple of 16");
  require(shape.heads % shape.kv_heads == 0, "kv_heads must divide heads");
  require(shape.heads / shape.kv_heads <= kMostRows, "at most 64 heads can share a key head");
  require((shape.block_size & (shape.block_size - 1)) == 0, "block_size must be a power of two");
  require(shape.kv == BATON_F32 || shape.kv == BATON_BF16 || shape.kv == BATON_INT8,
          "KV is kept as float32, bfloat16 or int8");
  require(shape.activation >= BATON_SILU && shape.activation <= BATON_RELU, "unknown activation");
  return shape;
}

int64_t vector_size(const BatonShape& shape, BatonVector which) {
  switch (which) {
    case BATON_Q_NORM:
    case BATON_K_NORM: return shape.head_dim;
    case BATON_QKV_BIAS: return int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim;
    case BATON_GATE_UP_BIAS: return 2 * int64_t{shape.intermediate};
    default: return shape.hidden;
  }
}

}  // namespace

Model::Model(const BatonShape& given) : shape(checked(given)) {
  auto weights = static_cast<BatonFormat>(shape.weights);
  int64_t queries = int64_t{shape.heads} * shape.head_dim;
  int64_t qkv = int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim;
  layers.resize(static_cast<size_t>(shape.layers));
  for (LayerWeights& layer : layers) {
    layer.matrices[BATON_QKV] = PackedMatrix(weights, qkv, shape.hidden, Columns::kInOrder, &memory_);
    layer.matrices[BATON_OUTPUT] = PackedMatrix(weights, shape.hidden, queries, Columns::kInOrder, &memory_);
    layer.matrices[BATON_GATE_UP] =
        PackedMatrix(weights, 2 * int64_t{shape.intermediate}, shape.hidden, Columns::kPaired, &memory_);
    layer.matrices[BATON_DOWN] =
        PackedMatrix(weights, shape.hidden, shape.intermediate, Columns::kInOrder, &memory_);
  }
  head = PackedMatrix(static_cast<BatonFormat>(shape.head), shape.vocabulary, shape.hidden);
}

int Model::pack(int layer, int matrix, int64_t first, int64_t rows, const void* source,
                BatonFormat format, Team& team) {
  if (matrix == BATON_HEAD) return head.pack(first, rows, source, format, team);
  if (layer < 0 || layer >= shape.layers) return fail("no layer " + std::to_string(layer));
  if (matrix < 0 || matrix > BATON_HEAD) return fail("no matrix " + std::to_string(matrix));
  return layers[static_cast<size_t>(layer)].matrices[matrix].pack(first, rows, source, format, team);
}

int Model::set(int layer, int vector, int64_t first, int64_t count, const float* source) {
  bool final = vector == BATON_FINAL_NORM;
  if (vector < 0 || vector > BATON_FINAL_NORM) return fail("no vector " + std::to_string(vector));
  if (!final && (layer < 0 || layer >= shape.layers)) return fail("no layer " + std::to_string(layer));
  int64_t size = vector_size(shape, static_cast<BatonVector>(vector));
  if (first < 0 || count < 0 || first + count > size) return fail("numbers outside of the vector");
  auto& values = final ? final_norm : layers[static_cast<size_t>(layer)].vectors[vector];
  values.resize(static_cast<size_t>(size));
  std::copy(source, source + count, values.begin() + first);
  return 0;
}

int Model::set_embedding(const void* source, int format) {
  if (format != BATON_F32 && format != BATON_BF16 && format != BATON_F16)
    return fail("an embedding is float32, bfloat16 or float16");
  embedding = source;
  embedding_format = static_cast<BatonFormat>(format);
  return 0;
}

int Model::set_window(int layer, int window) {
  if (layer < 0 || layer >= shape.layers) return fail("no layer " + std::to_string(layer));
  if (window < 0) return fail("a window cannot be negative");
  layers[static_cast<size_t>(layer)].window = window;
  return 0;
}

int Model::check() const {
  if (embedding == nullptr) return fail("the model has no embedding");
  if (final_norm.empty()) return fail("the model has no final norm");
  for (const LayerWeights& layer : layers) {
    if (layer.vectors[BATON_INPUT_NORM].empty() || layer.vectors[BATON_MLP_NORM].empty())
      return fail("a layer lacks a norm");
    if (layer.vectors[BATON_Q_NORM].empty() != layer.vectors[BATON_K_NORM].empty())
      return fail("a layer has only one of the norms of queries and keys");
  }
  return 0;
}

int64_t Model::bytes() const {
  int64_t sum = head.bytes();
  for (const LayerWeights& layer : layers)
    for (const PackedMatrix& matrix : layer.matrices) sum += matrix.bytes();
  return sum;
}

}  // namespace baton
