#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.h"
#include "int4.h"
#include "numbers.h"

namespace baton {
namespace {

constexpr int64_t kMaxInt8Depth = 65536;  // 255 * 127 * depth must fit into 31 bits

bool is_integer(BatonFormat format) { return format == BATON_INT8 || format == BATON_INT4; }

int64_t panel_bytes(BatonFormat format, int64_t depth) {
  switch (format) {
    case BATON_F32: return 4 * depth * kPanel;
    case BATON_BF16: return 2 * depth * kPanel;
    case BATON_INT8: return depth * kPanel;
    case BATON_INT4: return depth / kBlockInputs * kBlockBytes;
    default: throw std::invalid_argument("weights are packed as float32, bfloat16, int8 or int4");
  }
}

void read_row(const void* source, BatonFormat format, int64_t row, int64_t k, float* out) {
  if (format == BATON_F32) {
    const float* from = static_cast<const float*>(source) + row * k;
    std::copy(from, from + k, out);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source) + row * k;
  if (format == BATON_BF16)
    for (int64_t i = 0; i < k; i++) out[i] = float_of_bf16(from[i]);
  else
    for (int64_t i = 0; i < k; i++) out[i] = float_of_f16(from[i]);
}

// Writes one row of the source as one column of a panel.
void put_f32(const float* row, int64_t k, float* panel, int column) {
  for (int64_t i = 0; i < k; i++) panel[i * kPanel + column] = row[i];
}

void put_bf16(const float* row, int64_t k, uint16_t* panel, int column) {
  for (int64_t i = 0; i < k; i++)
    panel[i / 2 * (2 * kPanel) + 2 * column + i % 2] = bf16_of_float(row[i]);
}

bool finite(const float* row, int64_t k) {
  bool all = true;
  for (int64_t i = 0; i < k; i++) all &= std::isfinite(row[i]);
  return all;
}

void put_int8(const float* row, int64_t k, int8_t* panel, int column, float* scale, int32_t* sum) {
  float largest = 0;
  for (int64_t i = 0; i < k; i++) largest = std::max(largest, std::fabs(row[i]));
  *scale = largest / 127;
  float inverse = *scale > 0 ? 127 / largest : 0;
  if (!std::isfinite(inverse)) *scale = inverse = 0;  // all of them next to nothing
  int32_t total = 0;
  for (int64_t i = 0; i < k; i++) {
    int value = static_cast<int>(std::nearbyint(row[i] * inverse));
    total += value;
    panel[i / 4 * (4 * kPanel) + 4 * column + i % 4] = static_cast<int8_t>(value);
  }
  *sum = 128 * total;
}

}  // namespace

PackedMatrix::PackedMatrix(BatonFormat format, int64_t n, int64_t k, Columns columns, Arena* arena)
    : format_(format), n_(n), k_(k), columns_(columns) {
  if (n <= 0 || k <= 0) throw std::invalid_argument("a matrix without rows or columns");
  if (columns == Columns::kPaired && n % kPanel != 0)
    throw std::invalid_argument("paired columns need a multiple of 32 rows");
  if (is_integer(format) && k > kMaxInt8Depth)
    throw std::invalid_argument("integer weights need at most 65536 inputs");
  depth_ = (k + kDepth - 1) / kDepth * kDepth;
  panel_bytes_ = panel_bytes(format, depth_);
  int64_t panels = (n + kPanel - 1) / kPanel;
  auto bytes = static_cast<size_t>(panels * panel_bytes_);
  panels_ = arena != nullptr ? arena->take(bytes) : Memory(bytes);
  if (is_integer(format))
    columns_data_ = Memory(static_cast<size_t>(panels * kPanel) * (sizeof(float) + sizeof(int32_t)));
}

int64_t PackedMatrix::row_of(int64_t column) const {
  if (columns_ == Columns::kInOrder) return column;
  constexpr int64_t kHalf = kPanel / 2;
  int64_t row = column / kPanel * kHalf + column % kHalf;
  return column % kPanel < kHalf ? row : n_ / 2 + row;
}

Packed PackedMatrix::view() const {
  Packed packed;
  packed.format = format_;
  packed.n = n_;
  packed.k = k_;
  packed.depth = depth_;
  packed.panels = panels_.as<void>();
  packed.panel_bytes = panel_bytes_;
  if (is_integer(format_)) {
    packed.scales = columns_data_.as<float>();
    packed.sums = columns_data_.as<int32_t>() + packed.panels_count() * kPanel;
  }
  return packed;
}

int PackedMatrix::pack(int64_t first, int64_t rows, const void* source, BatonFormat source_format,
                       Team& team) {
  if (first < 0 || rows < 0 || first + rows > n_) return fail("rows outside of the matrix");
  if (source_format != BATON_F32 && source_format != BATON_BF16 && source_format != BATON_F16)
    return fail("weights come as float32, bfloat16 or float16");
  Packed packed = view();
  std::atomic<int64_t> broken{-1};
  team.run([&](int) {
    std::vector<float> row(static_cast<size_t>(k_));
    for (int panel; (panel = team.next(packed.panels_count())) >= 0;) {
      char* to = panels_.as<char>() + panel * panel_bytes_;
      for (int column = 0; column < kPanel; column++) {
        int64_t packed_column = int64_t{panel} * kPanel + column;
        int64_t from = row_of(packed_column);
        if (from < first || from >= first + rows) continue;
        read_row(source, source_format, from - first, k_, row.data());
        if (format_ == BATON_F32) put_f32(row.data(), k_, reinterpret_cast<float*>(to), column);
        if (format_ == BATON_BF16) put_bf16(row.data(), k_, reinterpret_cast<uint16_t*>(to), column);
        if (!is_integer(format_)) continue;
        auto* scale = const_cast<float*>(packed.scales) + packed_column;
        auto* sum = const_cast<int32_t*>(packed.sums) + packed_column;
        if (!finite(row.data(), k_))
          broken = from;
        else if (format_ == BATON_INT8)
          put_int8(row.data(), k_, reinterpret_cast<int8_t*>(to), column, scale, sum);
        else
          put_int4(row.data(), k_, reinterpret_cast<uint8_t*>(to), column, scale, sum);
      }
    }
  });
  if (broken >= 0)
    return fail("row " + std::to_string(broken.load()) + " has weights that are not finite");
  return 0;
}

}  // namespace baton
