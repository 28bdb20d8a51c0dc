// Which of the hand-written AVX-512 paths this processor can take. Everything else is left to PBE_CLONES.
#pragma once

#include <atomic>

#if defined(__x86_64__) && defined(__GNUC__)
#define PBE_X86 1
#endif

namespace pbe {

// Each level has the instructions of those below it.
enum class Level : int {
  clones = 0,  // what the compiler makes of plain loops
  avx512 = 1,  // F, BW, DQ and VL, that is x86-64-v4
  vbmi = 2,    // and VBMI: Ice Lake
  bf16 = 3,    // and BF16: Zen 4, Sapphire Rapids
};

inline Level level_of_processor() {
#ifdef PBE_X86
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!v4) return Level::clones;
  if (!__builtin_cpu_supports("avx512vbmi")) return Level::avx512;
  return __builtin_cpu_supports("avx512bf16") ? Level::bf16 : Level::vbmi;
#else
  return Level::clones;
#endif
}

inline std::atomic<Level>& current_level() {
  static std::atomic<Level> level{level_of_processor()};
  return level;
}

inline Level level() { return current_level().load(std::memory_order_relaxed); }

// For tests, which go through all levels: at most this one from now on. Returns the level that is then in force.
inline Level limit_level(Level most) {
  const Level own = level_of_processor();
  current_level().store(most < own ? most : own, std::memory_order_relaxed);
  return level();
}

}  // namespace pbe
