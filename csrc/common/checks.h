// Argument checks and the dtype switch shared by every operator.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <type_traits>

namespace vqfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_float32(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
}

// Calls body(T{}) with T the element type of an activation: float, Half or BFloat16.
template <class Body>
void for_activation_dtype(const Tensor& tensor, const char* name, Body body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Half: return body(torch::headeronly::Half{});
    case ScalarType::BFloat16: return body(torch::headeronly::BFloat16{});
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

}  // namespace vqfast
