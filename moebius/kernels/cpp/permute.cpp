// Rows of tokens to rows of experts and back. Both ways every row of the result is written once, by
// the map that knows where it comes from: no atomics, the same sum each time.
//
// Shapes: T tokens, K assignments of a token, R rows sorted by expert, E experts, D channels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "elements.h"

namespace moebius {
namespace {

// A counting sort. `assignment_R` is as long as R may be and becomes -1 where a row is padding;
// row_TK is -1 for assignments to nobody here. Returns R.
int64_t sort_by_expert(Tensor ids_TK, int64_t alignment, Tensor assignment_R, Tensor row_TK,
                       Tensor ends_E) {
  const int64_t total = ids_TK.sizes()[0] * ids_TK.sizes()[1], experts = ends_E.sizes()[0];
  STD_TORCH_CHECK(ids_TK.scalar_type() == torch::headeronly::ScalarType::Long, "ids are not int64");
  const int64_t* ids = data<int64_t>(ids_TK);
  int64_t *assignments = data<int64_t>(assignment_R), *rows = data<int64_t>(row_TK);
  int32_t* ends = data<int32_t>(ends_E);
  std::vector<int64_t> next(experts, 0);  // at first how many an expert has, then its next row
  for (int64_t a = 0; a < total; ++a) {
    if (ids[a] >= 0 && ids[a] < experts) ++next[ids[a]];
  }
  int64_t end = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t begin = end;
    end += (next[expert] + alignment - 1) / alignment * alignment;
    next[expert] = begin;
    ends[expert] = int32_t(end);
  }
  std::fill(assignments, assignments + end, -1);
  for (int64_t a = 0; a < total; ++a) {
    rows[a] = ids[a] >= 0 && ids[a] < experts ? next[ids[a]]++ : -1;
    if (rows[a] >= 0) assignments[rows[a]] = a;
  }
  return end;
}

// out_RD[r] = x_TD[source_R[r] / share], zeros where there is no source.
void gather_rows(Tensor x_TD, Tensor source_R, int64_t share, Tensor out_RD) {
  const int64_t width = out_RD.sizes()[1];
  const int64_t* sources = data<int64_t>(source_R);
  by_type(out_RD, [&]<class T>(T*) {
    const T* xs = data<T>(x_TD);
    T* outs = data<T>(out_RD);
    by_rows(out_RD.sizes()[0], width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* out = outs + row * width;
        if (sources[row] < 0) {
          std::fill(out, out + width, T{});
        } else {
          const T* x = xs + sources[row] / share * width;
          std::copy(x, x + width, out);
        }
      }
    });
  });
}

// out_TD[t] = base_TD[t] + sum of rows_RD[row_TK[t]]; without a base from 0 on.
void sum_rows(Tensor rows_RD, Tensor row_TK, std::optional<Tensor> base_TD, Tensor out_TD) {
  const int64_t width = out_TD.sizes()[1], top_k = row_TK.sizes()[1];
  const int64_t* sources = data<int64_t>(row_TK);
  by_type(out_TD, [&]<class T>(T*) {
    const T *rows = data<T>(rows_RD), *bases = base_TD ? data<T>(*base_TD) : nullptr;
    T* outs = data<T>(out_TD);
    by_rows(out_TD.sizes()[0], width * (top_k + 1), [=](int64_t begin, int64_t end) {
      std::vector<float> sums(width);
      float* __restrict sum = sums.data();
      for (int64_t token = begin; token < end; ++token) {
        const T* __restrict base = bases + token * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) sum[d] = bases ? load(base[d]) : 0.f;
        for (int64_t k = 0; k < top_k; ++k) {
          if (sources[token * top_k + k] < 0) continue;
          const T* __restrict row = rows + sources[token * top_k + k] * width;
#pragma omp simd
          for (int64_t d = 0; d < width; ++d) sum[d] += load(row[d]);
        }
        T* __restrict out = outs + token * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) store(out[d], sum[d]);
      }
    });
  });
}

}  // namespace
}  // namespace moebius

STABLE_TORCH_LIBRARY_FRAGMENT(moebius_cpp, library) {
  library.def(
      "sort_by_expert(Tensor ids, int alignment, Tensor(a!) assignment, Tensor(b!) row, "
      "Tensor(c!) ends) -> int");
  library.def("gather_rows(Tensor x, Tensor source, int share, Tensor(a!) out) -> ()");
  library.def("sum_rows(Tensor rows, Tensor row, Tensor? base, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moebius_cpp, CPU, library) {
  library.impl("sort_by_expert", TORCH_BOX(&moebius::sort_by_expert));
  library.impl("gather_rows", TORCH_BOX(&moebius::gather_rows));
  library.impl("sum_rows", TORCH_BOX(&moebius::sum_rows));
}
