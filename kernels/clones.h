// PBE_CLONES in front of a function compiles it once per instruction set and picks one at load time, so that a wheel
// built for the baseline still runs AVX-512 loops where the processor has them.
#pragma once

// Clones need gcc and glibc's indirect functions. On aarch64 NEON is the baseline, so nothing is left to choose.
// Keep the loop in the marked function itself or in PBE_INLINE helpers: a call that stays a call runs baseline code.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__GLIBC__)
#define PBE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PBE_CLONES
#endif

#if defined(__GNUC__) || defined(__clang__)
#define PBE_INLINE inline __attribute__((always_inline))
#else
#define PBE_INLINE inline
#endif
