// Zero-computation experts: activations are read once, forward and backward.
//
// Shapes: T tokens, D channels, C constant experts, P parts of the tokens.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "elements.h"

namespace moebius {
namespace {

// What a token's constant experts make of its input, and of each constant.
struct Mixture {
  float input;
  std::vector<float> constants;

  explicit Mixture(int64_t count) : constants(count) {}
  // The softmax of two logits is a sigmoid of their difference.
  void mix(float copy_weight, const float* weights, const float* logits) {
    input = copy_weight;
    for (size_t c = 0; c < constants.size(); ++c) {
      input += weights[c] * sigmoid(logits[2 * c] - logits[2 * c + 1]);
      constants[c] = weights[c] * sigmoid(logits[2 * c + 1] - logits[2 * c]);
    }
  }
};

// y_TD = a_T * x_TD + b_TC @ constants_CD with the mixture (a, b) of each token; all but x and y
// are fp32.
void affine_experts(Tensor x_TD, Tensor copy_weight_T, Tensor weight_TC, Tensor logits_TC2,
                    Tensor constants_CD, Tensor y_TD) {
  const int64_t width = x_TD.sizes()[1], count = weight_TC.sizes()[1];
  const float *copies = data<float>(copy_weight_T), *weights = data<float>(weight_TC);
  const float *logits = data<float>(logits_TC2), *constants = data<float>(constants_CD);
  by_type(x_TD, [&]<class T>(T*) {
    const T* xs = data<T>(x_TD);
    T* ys = data<T>(y_TD);
    by_rows(x_TD.sizes()[0], width * (count + 1), [=](int64_t begin, int64_t end) {
      Mixture mixture(count);
      std::vector<float> sums(width);
      float* __restrict sum = sums.data();
      for (int64_t token = begin; token < end; ++token) {
        mixture.mix(copies[token], weights + token * count, logits + 2 * token * count);
        const T* __restrict x = xs + token * width;
        T* __restrict y = ys + token * width;
        const float a = mixture.input;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) sum[d] = a * load(x[d]);
        for (int64_t c = 0; c < count; ++c) {
          const float* __restrict constant = constants + c * width;
          const float b = mixture.constants[c];
#pragma omp simd
          for (int64_t d = 0; d < width; ++d) sum[d] += b * constant[d];
        }
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) store(y[d], sum[d]);
      }
    });
  });
}

// Gradients of `affine_experts`. Those of the constants from the p-th `part` tokens are added to
// d_constants_PCD[p]: sums that do not depend on the number of threads.
void affine_experts_backward(Tensor dy_TD, Tensor x_TD, Tensor copy_weight_T, Tensor weight_TC,
                             Tensor logits_TC2, Tensor constants_CD, int64_t part, Tensor dx_TD,
                             Tensor d_copy_weight_T, Tensor d_weight_TC, Tensor d_logits_TC2,
                             Tensor d_constants_PCD) {
  const int64_t tokens = x_TD.sizes()[0], width = x_TD.sizes()[1], count = weight_TC.sizes()[1];
  const float *copies = data<float>(copy_weight_T), *weights = data<float>(weight_TC);
  const float *logits = data<float>(logits_TC2), *constants = data<float>(constants_CD);
  float *d_copies = data<float>(d_copy_weight_T), *d_weights = data<float>(d_weight_TC);
  float *d_logits = data<float>(d_logits_TC2), *d_constants = data<float>(d_constants_PCD);
  by_type(x_TD, [&]<class T>(T*) {
    const T *dys = data<T>(dy_TD), *xs = data<T>(x_TD);
    T* dxs = data<T>(dx_TD);
    const int64_t parts = d_constants_PCD.sizes()[0];
    by_rows(parts, part * width * (count + 1), [=](int64_t first, int64_t last) {
      Mixture mixture(count);
      for (int64_t token = first * part; token < std::min(tokens, last * part); ++token) {
        mixture.mix(copies[token], weights + token * count, logits + 2 * token * count);
        const T *__restrict dy = dys + token * width, *__restrict x = xs + token * width;
        T* __restrict dx = dxs + token * width;
        const float a = mixture.input;
        float da = 0;
#pragma omp simd reduction(+ : da)
        for (int64_t d = 0; d < width; ++d) {
          da += load(dy[d]) * load(x[d]);
          store(dx[d], a * load(dy[d]));
        }
        d_copies[token] = da;
        for (int64_t c = 0; c < count; ++c) {
          const float* __restrict constant = constants + c * width;
          float* __restrict d_constant = d_constants + (token / part * count + c) * width;
          const float b = mixture.constants[c];
          float db = 0;
#pragma omp simd reduction(+ : db)
          for (int64_t d = 0; d < width; ++d) {
            db += load(dy[d]) * constant[d];
            d_constant[d] += b * load(dy[d]);
          }
          const int64_t at = token * count + c;
          const float of_input = sigmoid(logits[2 * at] - logits[2 * at + 1]);
          const float of_constant = sigmoid(logits[2 * at + 1] - logits[2 * at]);
          d_weights[at] = of_input * da + of_constant * db;
          d_logits[2 * at] = weights[at] * of_input * of_constant * (da - db);
          d_logits[2 * at + 1] = -d_logits[2 * at];
        }
      }
    });
  });
}

}  // namespace
}  // namespace moebius

STABLE_TORCH_LIBRARY_FRAGMENT(moebius_cpp, library) {
  library.def(
      "affine_experts(Tensor x, Tensor copy_weight, Tensor weight, Tensor logits, "
      "Tensor constants, Tensor(a!) y) -> ()");
  library.def(
      "affine_experts_backward(Tensor dy, Tensor x, Tensor copy_weight, Tensor weight, "
      "Tensor logits, Tensor constants, int part, Tensor(a!) dx, Tensor(b!) d_copy_weight, "
      "Tensor(c!) d_weight, Tensor(d!) d_logits, Tensor(e!) d_constants) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moebius_cpp, CPU, library) {
  library.impl("affine_experts", TORCH_BOX(&moebius::affine_experts));
  library.impl("affine_experts_backward", TORCH_BOX(&moebius::affine_experts_backward));
}
