// Causal attention inside documents, as FlashAttention 2 has it (Dao 2023, arXiv 2307.08691): pairs
// of queries and keys are in memory for one block of queries at a time, and once more in the
// backward pass. Only tiles of pairs that see each other are computed, all of them in fp32.
//
// Tensors come from Python, which has made them contiguous and equal in precision. A task is a
// document with the query heads of one key-value head, or forward one of them where there are few
// documents; who takes it changes no number.
//
// Shapes: B rows, S slots, H query heads, G key-value heads of C channels; in a document J keys and
// M queries of a block.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elements.h"
#include "tiles.h"

namespace moebius {
namespace {

constexpr int64_t block = 64;  // queries

// So many at least, for threads to be busy to the end.
constexpr int64_t tasks_of_a_thread = 4;

struct Document {
  int64_t row, begin, size;
};

// Longest first: the tasks that end last are then short.
std::vector<Document> documents_of(const Tensor& begins_BS) {
  const int64_t rows = begins_BS.sizes()[0], slots = begins_BS.sizes()[1];
  const bool* begins = data<bool>(begins_BS);
  std::vector<Document> documents;
  for (int64_t row = 0; row < rows; ++row, begins += slots) {
    for (int64_t begin = 0, end; begin < slots; begin = end) {
      for (end = begin + 1; end < slots && !begins[end];) ++end;
      documents.push_back({row, begin, end - begin});
    }
  }
  std::stable_sort(documents.begin(), documents.end(),
                   [](const Document& a, const Document& b) { return a.size > b.size; });
  return documents;
}

struct Shape {
  int64_t slots, heads, groups, channels;
  int64_t padded = round_up(channels, tile_columns);
  int64_t q_step = heads * channels, k_step = groups * channels;  // from slot to slot

  Shape(const Tensor& q_BSHC, const Tensor& k_BSGC, const Tensor& v_BSGC)
      : slots(q_BSHC.sizes()[1]),
        heads(q_BSHC.sizes()[2]),
        groups(k_BSGC.sizes()[2]),
        channels(q_BSHC.sizes()[3]) {
    const auto q = q_BSHC.sizes(), k = k_BSGC.sizes(), v = v_BSGC.sizes();
    const bool fit = q[0] == k[0] && slots == k[1] && channels == k[3] && heads % groups == 0;
    STD_TORCH_CHECK(fit, "queries and keys do not fit together");
    STD_TORCH_CHECK(std::equal(k.begin(), k.end(), v.begin()), "keys and values differ in shape");
  }
  int64_t slot(const Document& document) const { return document.row * slots + document.begin; }
};

// Memory of a thread for its matrices, zeros at first.
class Workspace {
 public:
  Matrix matrix(int64_t rows, int64_t columns) {
    return {memory.emplace_back(rows * columns).data(), columns};
  }

 private:
  std::vector<std::vector<float>> memory;
};

// `begin(workspace, keys)` makes what a thread runs on tasks of up to so many keys, of which each
// document has `parts`.
template <class Begin>
void run_tasks(const std::vector<Document>& documents, int64_t parts, const Begin& begin) {
  const int64_t tasks = documents.size() * parts;
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t keys = round_up(documents.empty() ? 0 : documents[0].size, tile_columns);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Workspace workspace;
    const auto run = begin(workspace, keys);
    for (int64_t task = next++; task < tasks; task = next++)
      run(documents[task / parts], task % parts);
  });
}

// Rows to a matrix whose rows and columns are filled up with zeros.
template <class T>
void take(const T* from, int64_t step, int64_t rows, float factor, const Shape& shape, Matrix to,
          int64_t padded_rows) {
  for (int64_t r = 0; r < padded_rows; ++r, from += step) {
    float* __restrict row = to.row(r);
    const T* __restrict own = from;
    const int64_t channels = r < rows ? shape.channels : 0;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) row[c] = load(own[c]) * factor;
    for (int64_t c = channels; c < shape.padded; ++c) row[c] = 0;
  }
}

// Rows to matrices [C, tile_columns] of as many of them, below each other.
template <class T>
void take_turned(const T* from, int64_t step, int64_t rows, const Shape& shape, Matrix to) {
  for (int64_t r = 0; r < round_up(rows, tile_columns); ++r, from += step) {
    float* column = to.row(r / tile_columns * shape.channels) + r % tile_columns;
    for (int64_t c = 0; c < shape.channels; ++c)
      column[c * tile_columns] = r < rows ? load(from[c]) : 0.f;
  }
}

template <class T>
void give_row(const float* __restrict row, float factor, const Shape& shape, T* __restrict to) {
#pragma omp simd
  for (int64_t c = 0; c < shape.channels; ++c) store(to[c], row[c] * factor);
}

template <class T>
void give(Matrix from, int64_t rows, float factor, const Shape& shape, T* to, int64_t step) {
  for (int64_t r = 0; r < rows; ++r) give_row(from.row(r), factor, shape, to + r * step);
}

// A block of queries, which see `before` keys and as many more as their number in the block says.
struct Block {
  int64_t before, queries;

  int64_t keys() const { return before + queries; }
  int64_t seen(int64_t query) const { return before + query + 1; }
};

// products_MJ = rows_MC @ turned.T of the pairs that see each other; others may be overwritten.
void multiply_keys(Matrix rows_MC, Matrix turned, Block span, const Shape& shape,
                   Matrix products_MJ) {
  for (int64_t j = 0; j < span.keys(); j += tile_columns) {
    const Matrix keys = turned.from(j / tile_columns * shape.channels, 0);
    int64_t m = std::max<int64_t>(0, j - span.before) / tile_rows * tile_rows;
    for (; m < span.queries; m += tile_rows)
      multiply_tile<false>(rows_MC.from(m, 0), keys, products_MJ.from(m, j), shape.channels);
  }
}

// out_MC = weights_MJ @ rows_JC, where weights of pairs that do not see each other are 0.
void mix_keys(Matrix weights_MJ, Matrix rows_JC, Block span, const Shape& shape, Matrix out_MC) {
  for (int64_t m = 0; m < span.queries; m += tile_rows) {
    const int64_t seen = span.seen(std::min(m + tile_rows, span.queries) - 1);
    for (int64_t c = 0; c < shape.padded; c += tile_columns)
      multiply_tile<false>(weights_MJ.from(m, 0), rows_JC.from(0, c), out_MC.from(m, c), seen);
  }
}

// out_JC += weights_MJ.T @ rows_MC, where weights of pairs that do not see each other are 0.
void mix_queries(Matrix weights_MJ, Matrix rows_MC, Block span, const Shape& shape,
                 Matrix out_JC) {
  for (int64_t j = 0; j < span.keys(); j += tile_rows) {
    const int64_t m = std::max<int64_t>(0, j - span.before);
    const Matrix weights_JM = weights_MJ.from(m, j).transposed();
    for (int64_t c = 0; c < shape.padded; c += tile_columns)
      multiply_tile<true>(weights_JM, rows_MC.from(m, c), out_JC.from(j, c), span.queries - m);
  }
}

// Scores become exp(score - largest score) of the first `seen` ones and 0 behind; the sum of them.
float powers_of_seen(float* scores, int64_t seen, int64_t keys, float& largest) {
  const int64_t whole = round_up(seen, tile_columns);  // vectors without a rest are faster
  std::fill(scores + seen, scores + whole, -INFINITY);
  const float sum = powers_of(scores, whole, largest, scores);
  std::fill(scores + seen, scores + keys, 0.f);
  return sum;
}

// Scores become probabilities, and gradients of probabilities those of scores; 0 behind `seen`.
void scores_backward(float* __restrict scores, float* __restrict grads, int64_t seen, int64_t keys,
                     float log_sum, float mean) {
#pragma omp simd
  for (int64_t j = 0; j < round_up(seen, tile_columns); ++j) {
    scores[j] = exponential(scores[j] - log_sum);
    grads[j] = scores[j] * (grads[j] - mean);
  }
  for (int64_t j = seen; j < keys; ++j) scores[j] = grads[j] = 0;
}

template <class T>
float dot(const T* __restrict a, const T* __restrict b, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < size; ++c) sum += load(a[c]) * load(b[c]);
  return sum;
}

// out = softmax(scale * q k.T) v over the earlier slots of a document and the own one, and the
// logarithms of the sums of exponentials, in fp32. `begins` is true where a document begins.
void attention(Tensor q_BSHC, Tensor k_BSGC, Tensor v_BSGC, Tensor begins_BS, double scale,
               Tensor out_BSHC, Tensor log_sums_BSH) {
  const Shape shape(q_BSHC, k_BSGC, v_BSGC);
  float* all_log_sums = data<float>(log_sums_BSH);
  by_type(q_BSHC, [&]<class T>(T*) {
    const T *q = data<T>(q_BSHC), *k = data<T>(k_BSGC), *v = data<T>(v_BSGC);
    T* out = data<T>(out_BSHC);
    const std::vector<Document> documents = documents_of(begins_BS);
    const int64_t in_groups = documents.size() * shape.groups;
    const bool few = in_groups < tasks_of_a_thread * torch::stable::get_num_threads();
    const int64_t parts = few ? shape.heads : shape.groups;
    run_tasks(documents, parts, [=](Workspace& workspace, int64_t longest) {
      const Matrix k_turned = workspace.matrix(longest / tile_columns * shape.channels, tile_columns);
      const Matrix v_JC = workspace.matrix(longest, shape.padded);
      const Matrix q_MC = workspace.matrix(block, shape.padded);
      const Matrix out_MC = workspace.matrix(block, shape.padded);
      const Matrix scores_MJ = workspace.matrix(block, longest);
      return [=](const Document& document, int64_t part) {
        const int64_t slot = shape.slot(document), share = shape.heads / parts;
        const int64_t group = part * shape.groups / parts;
        const int64_t key = slot * shape.k_step + group * shape.channels, keys = document.size;
        take_turned(k + key, shape.k_step, keys, shape, k_turned);
        take(v + key, shape.k_step, keys, 1.f, shape, v_JC, keys);
        for (int64_t start = 0; start < keys; start += block) {
          const Block span{start, std::min(block, keys - start)};
          for (int64_t head = part * share; head < (part + 1) * share; ++head) {
            const int64_t query = (slot + start) * shape.q_step + head * shape.channels;
            float* log_sums = all_log_sums + (slot + start) * shape.heads + head;
            take(q + query, shape.q_step, span.queries, float(scale), shape, q_MC, block);
            multiply_keys(q_MC, k_turned, span, shape, scores_MJ);
            float sums[block];
            for (int64_t m = 0; m < span.queries; ++m) {
              float largest;
              sums[m] = powers_of_seen(scores_MJ.row(m), span.seen(m), span.keys(), largest);
              log_sums[m * shape.heads] = largest + std::log(sums[m]);
            }
            mix_keys(scores_MJ, v_JC, span, shape, out_MC);
            for (int64_t m = 0; m < span.queries; ++m)
              give_row(out_MC.row(m), 1.f / sums[m], shape, out + query + m * shape.q_step);
          }
        }
      };
    });
  });
}

// Gradients of `attention`.
void attention_backward(Tensor grad_BSHC, Tensor q_BSHC, Tensor k_BSGC, Tensor v_BSGC,
                        Tensor begins_BS, double scale, Tensor out_BSHC, Tensor log_sums_BSH,
                        Tensor dq_BSHC, Tensor dk_BSGC, Tensor dv_BSGC) {
  const Shape shape(q_BSHC, k_BSGC, v_BSGC);
  const float* all_log_sums = data<float>(log_sums_BSH);
  by_type(q_BSHC, [&]<class T>(T*) {
    const T *q = data<T>(q_BSHC), *k = data<T>(k_BSGC), *v = data<T>(v_BSGC);
    const T *grad = data<T>(grad_BSHC), *out = data<T>(out_BSHC);
    T *dq = data<T>(dq_BSHC), *dk = data<T>(dk_BSGC), *dv = data<T>(dv_BSGC);
    run_tasks(documents_of(begins_BS), shape.groups, [=](Workspace& workspace, int64_t longest) {
      const int64_t turned = longest / tile_columns * shape.channels;
      const Matrix k_turned = workspace.matrix(turned, tile_columns);
      const Matrix v_turned = workspace.matrix(turned, tile_columns);
      const Matrix k_JC = workspace.matrix(longest, shape.padded);
      const Matrix dk_JC = workspace.matrix(longest, shape.padded);
      const Matrix dv_JC = workspace.matrix(longest, shape.padded);
      const Matrix q_MC = workspace.matrix(block, shape.padded);
      const Matrix grad_MC = workspace.matrix(block, shape.padded);
      const Matrix dq_MC = workspace.matrix(block, shape.padded);
      const Matrix scores_MJ = workspace.matrix(block, longest);
      const Matrix grads_MJ = workspace.matrix(block, longest);
      return [=](const Document& document, int64_t group) {
        const int64_t slot = shape.slot(document), share = shape.heads / shape.groups;
        const int64_t key = slot * shape.k_step + group * shape.channels, keys = document.size;
        take_turned(k + key, shape.k_step, keys, shape, k_turned);
        take_turned(v + key, shape.k_step, keys, shape, v_turned);
        take(k + key, shape.k_step, keys, 1.f, shape, k_JC, keys);
        std::fill_n(dk_JC.data, round_up(keys, tile_rows) * shape.padded, 0.f);
        std::fill_n(dv_JC.data, round_up(keys, tile_rows) * shape.padded, 0.f);
        for (int64_t start = 0; start < keys; start += block) {
          const Block span{start, std::min(block, keys - start)};
          for (int64_t head = group * share; head < (group + 1) * share; ++head) {
            const int64_t query = (slot + start) * shape.q_step + head * shape.channels;
            const float* log_sums = all_log_sums + (slot + start) * shape.heads + head;
            take(q + query, shape.q_step, span.queries, float(scale), shape, q_MC, block);
            take(grad + query, shape.q_step, span.queries, 1.f, shape, grad_MC, block);
            multiply_keys(q_MC, k_turned, span, shape, scores_MJ);
            multiply_keys(grad_MC, v_turned, span, shape, grads_MJ);
            for (int64_t m = 0; m < span.queries; ++m) {
              const int64_t at = query + m * shape.q_step;
              scores_backward(scores_MJ.row(m), grads_MJ.row(m), span.seen(m),
                              round_up(span.keys(), tile_rows), log_sums[m * shape.heads],
                              dot(grad + at, out + at, shape.channels));
            }
            mix_keys(grads_MJ, k_JC, span, shape, dq_MC);
            give(dq_MC, span.queries, float(scale), shape, dq + query, shape.q_step);
            mix_queries(scores_MJ, grad_MC, span, shape, dv_JC);
            mix_queries(grads_MJ, q_MC, span, shape, dk_JC);
          }
        }
        give(dk_JC, keys, 1.f, shape, dk + key, shape.k_step);
        give(dv_JC, keys, 1.f, shape, dv + key, shape.k_step);
      };
    });
  });
}

}  // namespace
}  // namespace moebius

STABLE_TORCH_LIBRARY_FRAGMENT(moebius_cpp, library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor begins, float scale, Tensor(a!) out, "
      "Tensor(b!) log_sums) -> ()");
  library.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor begins, float scale, "
      "Tensor out, Tensor log_sums, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moebius_cpp, CPU, library) {
  library.impl("attention", TORCH_BOX(&moebius::attention));
  library.impl("attention_backward", TORCH_BOX(&moebius::attention_backward));
}
