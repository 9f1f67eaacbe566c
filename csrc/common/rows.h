// What every loop shares, whatever the instruction set: the length of a vector, rows between dtypes, which target runs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace vqfast {

constexpr int64_t kLanes = 16;  // floats of a Vec: one register of AVX-512, two of AVX2, four of SSE or NEON

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Scratch memory that starts on a cache line: a load of a whole vector then never touches two.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const CacheLineAllocator&) const { return true; }
};

template <class T>
using Buffer = std::vector<T, CacheLineAllocator<T>>;

// A matrix [rows, width] whose rows are whole vectors: the tensor itself, or a copy with zeros behind every row.
template <class T>
class Rows {
 public:
  int64_t stride;
  T* data;

  Rows(T* tensor, int64_t rows, int64_t width)
      : stride(whole_vectors(width)), data(tensor), tensor_(tensor), rows_(rows), width_(width) {
    if (stride == width) return;
    copy_.assign(rows * stride, T(0.f));
    for (int64_t m = 0; m < rows; ++m) std::copy_n(tensor + m * width, width, copy_.data() + m * stride);
    data = copy_.data();
  }
  Rows(const Rows&) = delete;
  void write_back() const {
    if (data != tensor_)
      for (int64_t m = 0; m < rows_; ++m) std::copy_n(data + m * stride, width_, tensor_ + m * width_);
  }
  T* row(int64_t m) const { return data + m * stride; }

 private:
  T* tensor_;
  int64_t rows_, width_;
  Buffer<T> copy_;
};

inline void load_row(const float* source, float* row, int64_t n) { std::memcpy(row, source, n * sizeof(float)); }
inline void store_row(const float* row, float* target, int64_t n) { std::memcpy(target, row, n * sizeof(float)); }

template <class T>
inline void load_row(const T* source, float* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = static_cast<float>(source[i]);
}

template <class T>
inline void store_row(const float* row, T* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(row[i]);
}

enum class Target { kPortable, kAvx2, kAvx512 };

// The widest instruction set of this processor, no wider than VQFAST_CPU_TARGET says (vqfast/_native.py checks its
// value).
inline Target target() {
  static const Target found = [] {
    Target widest = Target::kPortable;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (__builtin_cpu_supports("x86-64-v3")) widest = Target::kAvx2;
    if (__builtin_cpu_supports("x86-64-v4")) widest = Target::kAvx512;
#endif
    const char* limit = std::getenv("VQFAST_CPU_TARGET");
    if (limit && !std::strcmp(limit, "portable")) return Target::kPortable;
    if (limit && !std::strcmp(limit, "avx2")) return std::min(widest, Target::kAvx2);
    return widest;
  }();
  return found;
}

}  // namespace vqfast
