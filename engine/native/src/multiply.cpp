// The products by themselves, for tests and benchmarks.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "baton.h"
#include "error.h"
#include "gemm.h"
#include "isa.h"
#include "numbers.h"
#include "pack.h"
#include "team.h"

namespace baton {
namespace {

constexpr int64_t kRotation = int64_t{512} << 20;  // bytes of weights that repeats go round

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Rows of x as the kernels want them.
struct RowBuffer {
  Memory data;
  std::vector<float> scales;
  Rows rows;

  RowBuffer(const float* x, int64_t m, int64_t k, int64_t depth, BatonFormat format)
      : scales(static_cast<size_t>(m)) {
    rows.stride = row_stride(depth, format);
    data = Memory(static_cast<size_t>(m * rows.stride));
    for (int64_t row = 0; row < m; row++) {
      char* to = data.as<char>() + row * rows.stride;
      const float* from = x + row * k;
      if (format == BATON_F32) std::memcpy(to, from, static_cast<size_t>(k) * sizeof(float));
      if (format == BATON_BF16)
        for (int64_t i = 0; i < k; i++) reinterpret_cast<uint16_t*>(to)[i] = bf16_of_float(from[i]);
      if (format == BATON_INT8)
        scales[static_cast<size_t>(row)] = quantize(from, k, reinterpret_cast<uint8_t*>(to));
    }
    rows.data = data.as<void>();
    rows.scales = scales.data();
    rows.count = static_cast<int>(m);
  }

  static float quantize(const float* from, int64_t k, uint8_t* to) {
    float largest = 0;
    for (int64_t i = 0; i < k; i++) largest = std::max(largest, std::fabs(from[i]));
    float inverse = largest > 0 ? 127 / largest : 0;
    for (int64_t i = 0; i < k; i++)
      to[i] = static_cast<uint8_t>(std::nearbyint(from[i] * inverse) + 128);
    return largest / 127;
  }
};

struct Output {
  float* y;
  int64_t n;

  static void take(void* self, const float* tile, int first_row, int rows, int panel) {
    const Output& output = *static_cast<const Output*>(self);
    int64_t column = int64_t{panel} * kPanel;
    int64_t columns = std::min<int64_t>(kPanel, output.n - column);
    for (int r = 0; r < rows; r++)
      std::memcpy(output.y + (first_row + r) * output.n + column, tile + r * kPanel,
                  static_cast<size_t>(columns) * sizeof(float));
  }
};

int multiply_packed(Team& team, BatonIsa isa, BatonFormat format, int64_t m, int64_t n, int64_t k,
                    const float* x, const float* w, float* y, int repeats, double* seconds) {
  const GemmKernels& kernels = gemm_kernels(isa);
  std::vector<PackedMatrix> copies;
  do {
    copies.emplace_back(format, n, k);
    if (int error = copies.back().pack(0, n, w, BATON_F32, team)) return error;
  } while (static_cast<int>(copies.size()) < repeats &&
           static_cast<int64_t>(copies.size()) * copies.back().bytes() < kRotation);
  Packed packed = copies[0].view();
  RowBuffer rows(x, m, k, packed.depth, kernels.rows_format(format));
  Output output{y, n};
  for (int i = 0; i < repeats; i++) {
    double start = seconds_now();
    Packed copy = copies[static_cast<size_t>(i) % copies.size()].view();
    team.run([&](int) {
      kernels.begin();
      baton::multiply(kernels, copy, rows.rows, team, {Output::take, &output});
      kernels.end();
    });
    if (seconds != nullptr) seconds[i] = seconds_now() - start;
  }
  return 0;
}

}  // namespace
}  // namespace baton

int32_t baton_multiply(BatonTeam* team, int32_t isa, int32_t weights, int64_t m, int64_t n, int64_t k,
                       const float* x, const float* w, float* y, int32_t repeats, double* seconds) {
  using namespace baton;
  if (isa < BATON_PORTABLE || isa > best_isa())
    return fail("this machine lacks the instruction set " + std::string(baton_isa_name(isa)));
  if (m <= 0 || repeats <= 0) return fail("nothing to multiply");
  try {
    return multiply_packed(team->team, static_cast<BatonIsa>(isa), static_cast<BatonFormat>(weights), m,
                           n, k, x, w, y, repeats, seconds);
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}

double baton_read_bandwidth(BatonTeam* team, int64_t bytes, int32_t repeats) {
  using namespace baton;
  try {
    Memory memory(static_cast<size_t>(std::max<int64_t>(bytes, 1)));
    std::memset(memory.as<void>(), 1, memory.bytes());
    constexpr int64_t kPiece = int64_t{1} << 20;
    int pieces = static_cast<int>((static_cast<int64_t>(memory.bytes()) + kPiece - 1) / kPiece);
    std::vector<uint64_t> sums(static_cast<size_t>(team->team.threads()) * 8);
    double best = 0;
    for (int i = 0; i < repeats; i++) {
      double start = seconds_now();
      team->team.run([&](int thread) {
        uint64_t sum[8] = {};
        for (int piece; (piece = team->team.next(pieces)) >= 0;) {
          const uint64_t* from = memory.as<uint64_t>() + piece * (kPiece / 8);
          int64_t count = std::min(kPiece, static_cast<int64_t>(memory.bytes()) - piece * kPiece) / 8;
          for (int64_t j = 0; j < count; j += 8)
            for (int c = 0; c < 8; c++) sum[c] += from[j + c];
        }
        for (int c = 0; c < 8; c++) sums[static_cast<size_t>(thread) * 8] += sum[c];
      });
      best = std::max(best, static_cast<double>(memory.bytes()) / (seconds_now() - start));
    }
    return best;
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
