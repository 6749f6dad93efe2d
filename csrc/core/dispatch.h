// Compiles a function for AVX-512, AVX2 and the baseline; the loader picks one at start.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KL_TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KL_TARGET_CLONES
#endif
