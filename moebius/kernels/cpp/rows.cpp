// Row by row in fp32 whatever the precision of the tensors: what torch does in several passes over
// memory. Tensors come from Python, which has made them contiguous, equal in precision and as large
// as they have to be.
//
// Shapes: R rows, F width of an expert, V vocabulary, D channels, H heads of C channels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "elements.h"

namespace moebius {
namespace {

// out_RF = silu(gate_RF) * up_RF * weights_R. Rows of gate and up may lie apart; weights are fp32.
void swiglu(Tensor gate_RF, Tensor up_RF, std::optional<Tensor> weights_R, Tensor out_RF) {
  const int64_t width = out_RF.sizes()[1];
  const int64_t gate_step = gate_RF.strides()[0], up_step = up_RF.strides()[0];
  const float* weights = weights_R ? data<float>(*weights_R) : nullptr;
  by_type(out_RF, [&]<class T>(T*) {
    const T *gates = data<T>(gate_RF), *ups = data<T>(up_RF);
    T* outs = data<T>(out_RF);
    by_rows(out_RF.sizes()[0], width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* __restrict gate = gates + row * gate_step;
        const T* __restrict up = ups + row * up_step;
        T* __restrict out = outs + row * width;
        const float weight = weights ? weights[row] : 1.f;
#pragma omp simd
        for (int64_t f = 0; f < width; ++f) {
          const float g = load(gate[f]);
          store(out[f], g * sigmoid(g) * load(up[f]) * weight);
        }
      }
    });
  });
}

// Gradients of `swiglu`; rows of d_gate and d_up lie apart as those of gate and up may.
void swiglu_backward(Tensor grad_RF, Tensor gate_RF, Tensor up_RF, std::optional<Tensor> weights_R,
                     Tensor d_gate_RF, Tensor d_up_RF, std::optional<Tensor> d_weights_R) {
  const int64_t width = grad_RF.sizes()[1];
  const int64_t gate_step = gate_RF.strides()[0], up_step = up_RF.strides()[0];
  const int64_t d_gate_step = d_gate_RF.strides()[0], d_up_step = d_up_RF.strides()[0];
  const float* weights = weights_R ? data<float>(*weights_R) : nullptr;
  float* d_weights = weights_R ? data<float>(*d_weights_R) : nullptr;
  by_type(grad_RF, [&]<class T>(T*) {
    const T *grads = data<T>(grad_RF), *gates = data<T>(gate_RF), *ups = data<T>(up_RF);
    T *d_gates = data<T>(d_gate_RF), *d_ups = data<T>(d_up_RF);
    by_rows(grad_RF.sizes()[0], width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* __restrict grad = grads + row * width;
        const T* __restrict gate = gates + row * gate_step;
        const T* __restrict up = ups + row * up_step;
        T* __restrict d_gate = d_gates + row * d_gate_step;
        T* __restrict d_up = d_ups + row * d_up_step;
        const float weight = weights ? weights[row] : 1.f;
        float d_weight = 0;
#pragma omp simd reduction(+ : d_weight)
        for (int64_t f = 0; f < width; ++f) {
          const float g = load(gate[f]), u = load(up[f]), dy = load(grad[f]);
          const float s = sigmoid(g), silu = g * s;
          d_weight += dy * silu * u;
          store(d_gate[f], dy * weight * u * (s + silu * (1.f - s)));
          store(d_up[f], dy * weight * silu);
        }
        if (weights) d_weights[row] = d_weight;
      }
    });
  });
}

// losses_R = -log softmax(logits_RV)[labels_R]; with gradients logits become softmax, less 1 at the
// label.
void row_losses(Tensor logits_RV, Tensor labels_R, Tensor losses_R, bool with_gradients) {
  const int64_t rows = logits_RV.sizes()[0], vocabulary = logits_RV.sizes()[1];
  STD_TORCH_CHECK(labels_R.scalar_type() == torch::headeronly::ScalarType::Long, "labels are not int64");
  const int64_t* labels = data<int64_t>(labels_R);
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(labels[row] >= 0 && labels[row] < vocabulary, "index ", labels[row],
                    " is out of bounds for dimension 1 with size ", vocabulary);
  }
  float* losses = data<float>(losses_R);
  by_type(logits_RV, [&]<class T>(T*) {
    T* all = data<T>(logits_RV);
    by_rows(rows, vocabulary, [=](int64_t begin, int64_t end) {
      std::vector<float> powers(vocabulary);
      float* __restrict power = powers.data();
      for (int64_t row = begin; row < end; ++row) {
        T* __restrict logits = all + row * vocabulary;
        float largest;
        const float sum = powers_of(logits, vocabulary, largest, power);
        const int64_t label = labels[row];
        losses[row] = std::log(sum) - (load(logits[label]) - largest);
        if (!with_gradients) continue;
        const float share = 1.f / sum;
#pragma omp simd
        for (int64_t v = 0; v < vocabulary; ++v) store(logits[v], power[v] * share);
        store(logits[label], power[label] * share - 1.f);
      }
    });
  });
}

// y_RD = x_RD * rstd_R * gain_D with rstd = 1 / sqrt(mean(x^2) + eps); gain and rstd are fp32.
void rms_norm(Tensor x_RD, Tensor gain_D, double eps, Tensor y_RD, Tensor rstd_R) {
  const int64_t width = x_RD.sizes()[1];
  const float* __restrict gain = data<float>(gain_D);
  float* rstds = data<float>(rstd_R);
  by_type(x_RD, [&]<class T>(T*) {
    const T* xs = data<T>(x_RD);
    T* ys = data<T>(y_RD);
    by_rows(x_RD.sizes()[0], width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* __restrict x = xs + row * width;
        T* __restrict y = ys + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; ++d) squares += load(x[d]) * load(x[d]);
        const float rstd = 1.f / std::sqrt(squares / float(width) + float(eps));
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) store(y[d], load(x[d]) * rstd * gain[d]);
        rstds[row] = rstd;
      }
    });
  });
}

// Gradients of `rms_norm`. Row p of d_gain_PD is that of the gain from the p-th `part` rows: sums
// that do not depend on the number of threads.
void rms_norm_backward(Tensor dy_RD, Tensor x_RD, Tensor gain_D, Tensor rstd_R, Tensor dx_RD,
                       Tensor d_gain_PD, int64_t part) {
  const int64_t rows = x_RD.sizes()[0], width = x_RD.sizes()[1];
  const float *__restrict gain = data<float>(gain_D), *rstds = data<float>(rstd_R);
  float* d_gains = data<float>(d_gain_PD);
  by_type(x_RD, [&]<class T>(T*) {
    const T *dys = data<T>(dy_RD), *xs = data<T>(x_RD);
    T* dxs = data<T>(dx_RD);
    by_rows(d_gain_PD.sizes()[0], part * width, [=](int64_t first, int64_t last) {
      for (int64_t row = first * part; row < std::min(rows, last * part); ++row) {
        const T *__restrict dy = dys + row * width, *__restrict x = xs + row * width;
        T* __restrict dx = dxs + row * width;
        float* __restrict d_gain = d_gains + row / part * width;
        const float rstd = rstds[row];
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < width; ++d) along += load(dy[d]) * gain[d] * load(x[d]);
        along *= rstd * rstd / float(width);
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) {
          const float own = load(x[d]), grad = load(dy[d]);
          d_gain[d] += grad * own * rstd;
          store(dx[d], (grad * gain[d] - own * along) * rstd);
        }
      }
    });
  });
}

// Turns each head's halves (a, b) to (a cos - b sin, b cos + a sin); backward is the transpose of
// that. Cosines and sines are fp32.
void rope(Tensor x_RHC, Tensor cos_RC, Tensor sin_RC, Tensor y_RHC, bool backward) {
  const int64_t heads = x_RHC.sizes()[1], width = x_RHC.sizes()[2], half = width / 2;
  const float sign = backward ? -1.f : 1.f;
  const float *cosines = data<float>(cos_RC), *sines = data<float>(sin_RC);
  by_type(x_RHC, [&]<class T>(T*) {
    const T* xs = data<T>(x_RHC);
    T* ys = data<T>(y_RHC);
    by_rows(x_RHC.sizes()[0], heads * width, [=](int64_t begin, int64_t end) {
      for (int64_t head = begin * heads; head < end * heads; ++head) {
        const float* cos_a = cosines + head / heads * width;
        const float* cos_b = cos_a + half;
        const float* sin_a = sines + head / heads * width + (backward ? half : 0);
        const float* sin_b = sines + head / heads * width + (backward ? 0 : half);
        const T *__restrict a = xs + head * width, *__restrict b = a + half;
        T *__restrict to_a = ys + head * width, *__restrict to_b = to_a + half;
#pragma omp simd
        for (int64_t c = 0; c < half; ++c) {
          const float x = load(a[c]), y = load(b[c]);
          store(to_a[c], x * cos_a[c] - y * (sign * sin_a[c]));
          store(to_b[c], y * cos_b[c] + x * (sign * sin_b[c]));
        }
      }
    });
  });
}

}  // namespace
}  // namespace moebius

STABLE_TORCH_LIBRARY(moebius_cpp, library) {
  library.def("swiglu(Tensor gate, Tensor up, Tensor? weights, Tensor(a!) out) -> ()");
  library.def(
      "swiglu_backward(Tensor grad, Tensor gate, Tensor up, Tensor? weights, Tensor(a!) d_gate, "
      "Tensor(b!) d_up, Tensor(c!)? d_weights) -> ()");
  library.def(
      "row_losses(Tensor(a!) logits, Tensor labels, Tensor(b!) losses, bool with_gradients) -> ()");
  library.def(
      "rms_norm(Tensor x, Tensor gain, float eps, Tensor(a!) y, Tensor(b!) rstd) -> ()");
  library.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor gain, Tensor rstd, Tensor(a!) dx, "
      "Tensor(b!) d_gain, int part) -> ()");
  library.def(
      "rope(Tensor x, Tensor cos, Tensor sin, Tensor(a!) y, bool backward) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moebius_cpp, CPU, library) {
  library.impl("swiglu", TORCH_BOX(&moebius::swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&moebius::swiglu_backward));
  library.impl("row_losses", TORCH_BOX(&moebius::row_losses));
  library.impl("rms_norm", TORCH_BOX(&moebius::rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&moebius::rms_norm_backward));
  library.impl("rope", TORCH_BOX(&moebius::rope));
}
