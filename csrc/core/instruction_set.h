// Which of the compiled instruction sets runs.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KL_X86 1
#endif

namespace kl {

enum class Set { baseline, avx2, avx512, avx512bf16 };

// The best set of this processor, or the one that KERNELAB_CPU_SET names where that is less.
inline Set instruction_set() {
  Set set = Set::baseline;
#ifdef KL_X86
  if (__builtin_cpu_supports("x86-64-v3")) set = Set::avx2;
  if (__builtin_cpu_supports("x86-64-v4")) set = __builtin_cpu_supports("avx512bf16") ? Set::avx512bf16 : Set::avx512;
#endif
  const char* names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  const char* wish = std::getenv("KERNELAB_CPU_SET");
  for (int i = 0; wish != nullptr && i < static_cast<int>(set); ++i)
    if (std::strcmp(wish, names[i]) == 0) return static_cast<Set>(i);
  return set;
}

}  // namespace kl
