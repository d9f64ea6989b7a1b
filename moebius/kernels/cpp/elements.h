// Elements of tensors in fp32, whatever their precision. Compilers turn loops over a row into vector
// instructions; that takes an exponential without a call.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace moebius {

using torch::stable::Tensor;

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

inline void store(float& to, float x) { to = x; }
inline void store(BFloat16& to, float x) {  // to the nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// 2^n exp(r) with |r| <= log(2) / 2, the polynomial of Cephes (Moshier 1992): relative error 2e-7.
// Saturates at exp(-87) and exp(88) and passes NaN on.
inline float exponential(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * bit_cast<float>(uint32_t(int32_t(n) + 127) << 23);
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

// exp(value - largest value) of a row, which may be written over the values, and their sum.
template <class T>
inline float powers_of(const T* values, int64_t count, float& largest, float* powers) {
  float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
  for (int64_t v = 0; v < count; ++v) most = std::max(most, load(values[v]));
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < count; ++v) {
    powers[v] = exponential(load(values[v]) - most);
    sum += powers[v];
  }
  largest = most;
  return sum;
}

// `function(begin, end)` for ranges of rows, on torch's threads; rows of `width` elements. What the
// function needs it holds by value: compilers do not keep what they read through a reference in
// registers, and loops took twice as long.
template <class Function>
void by_rows(int64_t rows, int64_t width, const Function& function) {
  const int64_t elements_of_a_task = 1 << 15;
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, elements_of_a_task / std::max<int64_t>(1, width)), function);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls `function` with a null pointer to the elements' type.
template <class Function>
void by_type(const Tensor& tensor, const Function& function) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16) {
    function(static_cast<BFloat16*>(nullptr));
  } else {
    STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, "neither fp32 nor bf16");
    function(static_cast<float*>(nullptr));
  }
}

}  // namespace moebius
