// Includes VQ_LOOPS, a header of loops over Vec, once per instruction set; VQ_CALL(f, ...) runs the best f there is.
//   #define VQ_LOOPS "cpu/<op>_loops.h"
//   #include "common/each_target.h"
// Everything in VQ_LOOPS may be a template; what all instruction sets share is declared before the inclusion.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/rows.h"

namespace vqfast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VQ_X86_TARGETS 1

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define VQ_REGISTER_BYTES 64
#include "common/vector.h"
#include VQ_LOOPS
#undef VQ_REGISTER_BYTES
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define VQ_REGISTER_BYTES 32
#include "common/vector.h"
#include VQ_LOOPS
#undef VQ_REGISTER_BYTES
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace portable {
#define VQ_REGISTER_BYTES 16
#include "common/vector.h"
#include VQ_LOOPS
#undef VQ_REGISTER_BYTES
}  // namespace portable

#ifdef VQ_X86_TARGETS
#define VQ_CALL(function, ...)                                    \
  [&] {                                                           \
    switch (target()) {                                           \
      case Target::kAvx512: return avx512::function(__VA_ARGS__); \
      case Target::kAvx2: return avx2::function(__VA_ARGS__);     \
      default: return portable::function(__VA_ARGS__);            \
    }                                                             \
  }()
#else
#define VQ_CALL(function, ...) portable::function(__VA_ARGS__)
#endif

}  // namespace
}  // namespace vqfast
