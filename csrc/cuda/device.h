// What every CUDA kernel needs: launch on torch's stream, 16-byte vectors, warp sums, the tensor-core product.
// With VQ_EMULATED the same file is C++ for the CPU (tests/emulation).
#pragma once
#ifdef VQ_EMULATED
#include "cuda_emulation.h"
#define VQ_CUDA_KEY CPU
#else
#include <cuda_runtime.h>
#include <dlfcn.h>
#define VQ_CUDA_KEY CUDA
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/checks.h"

namespace vqfast {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kVectorBytes = 16;  // the widest access of a thread

// N values that are loaded and stored at once.
template <class T, int N = kVectorBytes / int(sizeof(T))>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

template <class T>
bool aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Sum over the warp, the same in every thread.
__device__ __forceinline__ float warp_sum(float value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

// d += a b of one warp, [16, 16] x [16, 8], T Half or BFloat16: mma.sync.m16n8k16 with the fragments of PTX.
// With g = lane / 4 and t = lane % 4: a[i] holds row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next; b[i] column g,
// rows 2t + 8 i and the next; d[i] row g + 8 (i / 2), column 2t + i % 2.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef VQ_EMULATED
  emulation::mma_m16n8k16<T>(d, a, b);
#else
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The block's shared memory, as the launch sized it.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef VQ_EMULATED
  return emulation::block->shared;
#else
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
#endif
}

#ifdef VQ_EMULATED

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, const Tensor&,
            Arguments... arguments) {
  if (grid.count() > 0) emulation::launch(kernel, grid, dim3(unsigned(threads)), size_t(shared_bytes), arguments...);
}

#else

using DeviceGuardBase = torch::stable::accelerator::DeviceGuard;
struct DeviceGuard : DeviceGuardBase {
  explicit DeviceGuard(const Tensor& tensor) : DeviceGuardBase(tensor.get_device_index()) {}
};

// torch's current stream. Looked up at run time, so that the library loads beside a torch built without CUDA, too.
inline cudaStream_t current_stream(const Tensor& tensor) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA streams: install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// Runs kernel(arguments...) on the stream and device of `tensor`; nothing where the grid is empty.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, const Tensor& tensor,
            Arguments... arguments) {
  if (int64_t(grid.x) * grid.y * grid.z == 0) return;
  constexpr int64_t kDefaultShared = 48 << 10;
  if (shared_bytes > kDefaultShared)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)));
  // clang-format off
  kernel<<<grid, threads, size_t(shared_bytes), current_stream(tensor)>>>(arguments...);
  // clang-format on
  check(cudaGetLastError());
}

#endif

}  // namespace vqfast
