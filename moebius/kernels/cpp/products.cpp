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

// Rows of a group that a thread multiplies at a time: enough for a fast product, and the numbers of
// rows that oneDNN prepares itself for are few, whatever the sizes of groups.
constexpr int64_t most_rows = 512;
constexpr int64_t alignment = 32;

int64_t round_up(int64_t size) { return (size + alignment - 1) / alignment * alignment; }

struct Piece {
  int64_t group;
  int64_t begin, size;              // rows
  int64_t channel = 0, channels = 0;  // outputs, where not all of them
};

// How many pieces of equal work each thread should find: the last ones to finish are then short.
constexpr int64_t pieces_of_a_thread = 2;

// The rows of each group, at most `most` at a time, largest pieces first; of an empty group one.
std::vector<Piece> cut(const Tensor& ends_E, int64_t most) {
  STD_TORCH_CHECK(ends_E.scalar_type() == torch::headeronly::ScalarType::Int, "ends are not int32");
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
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

// Rows whose products are one of so many equal pieces of the work; at least a few.
int64_t share(int64_t rows) {
  const int64_t pieces = pieces_of_a_thread * torch::stable::get_num_threads();
  return round_up(std::max<int64_t>(1, rows / pieces));
}

// out_RO = rows_RI @ weight_EIO[group of the row]; rows behind the last group are not written.
void grouped_product(Tensor rows_RI, Tensor weight_EIO, Tensor ends_E, Tensor out_RO) {
  const bool alone = torch::stable::get_num_threads() == 1;
  const int64_t most = alone ? most_rows : std::min(most_rows, share(rows_RI.sizes()[0]));
  side_by_side(cut(ends_E, most), [&](const Piece& piece) {
    if (piece.size == 0) return;
    multiply(rows_of(out_RO, piece), rows_of(rows_RI, piece), select(weight_EIO, 0, piece.group));
  });
}

// d_weight_EOI[e] = grad_RO.T @ rows_RI over the rows of group e. A group that is more than a share
// of the work is cut by output channels: sums over rows stay whole.
void grouped_weight_gradient(Tensor grad_RO, Tensor rows_RI, Tensor ends_E, Tensor d_weight_EOI) {
  const bool alone = torch::stable::get_num_threads() == 1;
  const int64_t rows = rows_RI.sizes()[0], channels = d_weight_EOI.sizes()[1];
  const int64_t most = alone ? rows + 1 : share(rows);
  std::vector<Piece> pieces;
  for (Piece piece : cut(ends_E, rows + 1)) {
    const int64_t count = std::clamp<int64_t>((piece.size + most - 1) / most, 1, channels);
    const int64_t width = round_up((channels + count - 1) / count);
    for (; piece.channel < channels; piece.channel += width) {
      piece.channels = std::min(width, channels - piece.channel);
      pieces.push_back(piece);
    }
  }
  side_by_side(pieces, [&](const Piece& piece) {
    Tensor d_weight_OI = select(d_weight_EOI, 0, piece.group);
    d_weight_OI = narrow(d_weight_OI, 0, piece.channel, piece.channels);
    if (piece.size == 0) {
      torch::stable::zero_(d_weight_OI);
      return;
    }
    Tensor grad_NO = rows_of(grad_RO, piece);
    grad_NO = narrow(grad_NO, 1, piece.channel, piece.channels);
    multiply(d_weight_OI, torch::stable::transpose(grad_NO, 0, 1), rows_of(rows_RI, piece));
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
