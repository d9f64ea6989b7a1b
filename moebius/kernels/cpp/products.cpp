// Products of groups of rows: groups go to torch's threads side by side, each product on one of
// them. Threads that share small products wait for each other more than they compute.
//
// Shapes: R rows sorted by group, E groups, I input and O output channels.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace {

using torch::stable::narrow;
using torch::stable::select;
using torch::stable::Tensor;

// Rows of a group that a thread multiplies at a time: as fast as more of them, and the numbers of
// rows that oneDNN prepares itself for are few, whatever the sizes of groups.
constexpr int64_t most_rows = 512;
constexpr int64_t alignment = 32;

struct Piece {
  int64_t group, begin, size;
};

// The rows of each group, at most `most` at a time, largest pieces first; of an empty group one.
std::vector<Piece> cut(const Tensor& ends_E, int64_t most) {
  const int32_t* ends = static_cast<const int32_t*>(ends_E.data_ptr());
  std::vector<Piece> pieces;
  int64_t begin = 0;
  for (int64_t group = 0; group < ends_E.sizes()[0]; ++group) {
    do {
      const int64_t size = std::min(most, ends[group] - begin);
      pieces.push_back({group, begin, size});
      begin += size;
    } while (begin < ends[group]);
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.size > b.size; });
  return pieces;
}

// Each thread takes the next piece when it is done with one; who takes it changes no number.
template <class Function>
void side_by_side(const std::vector<Piece>& pieces, const Function& function) {
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t at = next++; at < pieces.size(); at = next++) function(pieces[at]);
  });
}

Tensor rows_of(Tensor tensor, const Piece& piece) {
  return narrow(tensor, 0, piece.begin, piece.size);
}

void multiply(const Tensor& out, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

// out_RO = rows_RI @ weight_EIO[group of the row]; rows behind the last group are not written.
void grouped_product(Tensor rows_RI, Tensor weight_EIO, Tensor ends_E, Tensor out_RO) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = rows_RI.sizes()[0] / (2 * threads) / alignment * alignment;
  const int64_t most = std::clamp(share, alignment, most_rows);
  side_by_side(cut(ends_E, threads == 1 ? most_rows : most), [&](const Piece& piece) {
    if (piece.size == 0) return;
    multiply(rows_of(out_RO, piece), rows_of(rows_RI, piece), select(weight_EIO, 0, piece.group));
  });
}

// d_weight_EOI[e] = grad_RO.T @ rows_RI over the rows of group e.
void grouped_weight_gradient(Tensor grad_RO, Tensor rows_RI, Tensor ends_E, Tensor d_weight_EOI) {
  const int64_t all = rows_RI.sizes()[0] + 1;
  side_by_side(cut(ends_E, all), [&](const Piece& piece) {
    Tensor d_weight_OI = select(d_weight_EOI, 0, piece.group);
    if (piece.size == 0) {
      torch::stable::zero_(d_weight_OI);
      return;
    }
    const Tensor grad_ON = torch::stable::transpose(rows_of(grad_RO, piece), 0, 1);
    multiply(d_weight_OI, grad_ON, rows_of(rows_RI, piece));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(moebius_cpp, library) {
  library.def("grouped_product(Tensor rows, Tensor weight, Tensor ends, Tensor(a!) out) -> ()");
  library.def(
      "grouped_weight_gradient(Tensor grad, Tensor rows, Tensor ends, Tensor(a!) d_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moebius_cpp, CPU, library) {
  library.impl("grouped_product", TORCH_BOX(&grouped_product));
  library.impl("grouped_weight_gradient", TORCH_BOX(&grouped_weight_gradient));
}
