#include "isa.h"

#include "gemm_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace baton {
namespace {

#if defined(__x86_64__)

// Tiles are 8 KiB of state per thread, which Linux gives to processes that ask for it.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBf16 | kTile | kInt8;
  return (d & kAll) == kAll && may_use_tiles();
}

BatonIsa of_processor() {
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return BATON_PORTABLE;
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return BATON_AVX2;
  bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (!bf16) return BATON_AVX512;
  return has_tiles() ? BATON_AMX : BATON_AVX512_BF16;
}

#else

BatonIsa of_processor() { return BATON_PORTABLE; }

#endif

BatonIsa of_processor_and_library() {
  BatonIsa isa = of_processor();
  return isa < compiled_isa() ? isa : compiled_isa();
}

}  // namespace

BatonIsa best_isa() {
  static const BatonIsa best = of_processor_and_library();
  return best;
}

}  // namespace baton

int32_t baton_isa() { return baton::best_isa(); }

const char* baton_isa_name(int32_t isa) {
  switch (isa) {
    case BATON_PORTABLE: return "portable";
    case BATON_AVX2: return "avx2";
    case BATON_AVX512: return "avx512";
    case BATON_AVX512_BF16: return "avx512-bf16";
    case BATON_AMX: return "amx";
    default: return "unknown";
  }
}
