// Ragged (row, expert) pairs as one dense [R, K] table, or each as a row of its own: what expert_service/topk.py does,
// for the case that it is one table with every row in it, and expert_service/packed.py for single pairs.
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "numbers.h"

namespace nb = nanobind;

namespace {

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

/// Pairs of each row, checked; their experts are marked in `touched`.
std::vector<int32_t> count_pairs(const Column<int32_t>& rows, const Column<int32_t>& experts,
                                 const Column<int32_t>& slots, size_t num_rows, std::vector<bool>& touched) {
  std::vector<int32_t> count(num_rows, 0);
  for (size_t pair = 0; pair < rows.size(); ++pair) {
    const auto row = static_cast<size_t>(rows.data()[pair]);
    const auto expert = static_cast<size_t>(experts.data()[pair]);
    if (row >= num_rows || expert >= slots.size() || slots.data()[expert] < 0) {
      throw std::out_of_range("a pair names a row that is not there, or an expert that is not held");
    }
    ++count[row];
    touched[expert] = true;
  }
  return count;
}

/// Fills ids and topk_weights, both [capacity], as [num_rows, K] and returns K; 0 where it is not to be one table.
uint32_t fill_table(const Column<int32_t>& rows, const Column<int32_t>& experts, const Column<float>& weights,
                    const Column<int32_t>& slots, size_t num_rows, size_t pairs_per_read, size_t capacity,
                    uintptr_t ids_address, uintptr_t topk_weights_address) {
  const size_t pairs = rows.size();
  if (experts.size() != pairs || weights.size() != pairs) throw std::invalid_argument("columns of unequal length");
  if (pairs == 0 || pairs < num_rows) return 0;
  std::vector<bool> touched(slots.size(), false);
  std::vector<int32_t> filled = count_pairs(rows, experts, slots, num_rows, touched);
  const auto [fewest, most] = std::minmax_element(filled.begin(), filled.end());
  const size_t width = *most;
  const size_t reads = std::count(touched.begin(), touched.end(), true);
  if (*fewest == 0 || num_rows * width > capacity || num_rows * width - pairs > pairs_per_read * reads) return 0;

  auto* ids = reinterpret_cast<int32_t*>(ids_address);
  auto* topk_weights = reinterpret_cast<float*>(topk_weights_address);
  std::fill(filled.begin(), filled.end(), 0);
  for (size_t pair = 0; pair < pairs; ++pair) {
    const size_t start = rows.data()[pair] * width;
    const int32_t slot = slots.data()[experts.data()[pair]];
    size_t place = start + filled[rows.data()[pair]]++;
    for (; place > start && ids[place - 1] > slot; --place) {
      ids[place] = ids[place - 1];
      topk_weights[place] = topk_weights[place - 1];
    }
    ids[place] = slot;
    topk_weights[place] = weights.data()[pair];
  }
  for (size_t row = 0; row < num_rows; ++row) {
    for (size_t column = filled[row]; column < width; ++column) {
      ids[row * width + column] = ids[row * width];
      topk_weights[row * width + column] = 0;
    }
  }
  return width;
}

/// Lays the pairs out by row, then slot: their rows, slots and weights, all [P], and what x [num_rows] holds of their
/// rows, of row_bytes each, at `spread` [P].
void spread_pairs(const Column<int32_t>& rows, const Column<int32_t>& experts, const Column<float>& weights,
                  const Column<int32_t>& slots, size_t num_rows, uintptr_t x, size_t row_bytes, uintptr_t pair_rows,
                  uintptr_t ids_address, uintptr_t weights_address, uintptr_t spread) {
  const size_t pairs = rows.size();
  if (experts.size() != pairs || weights.size() != pairs) throw std::invalid_argument("columns of unequal length");
  std::vector<bool> touched(slots.size(), false);
  const std::vector<int32_t> count = count_pairs(rows, experts, slots, num_rows, touched);
  std::vector<size_t> starts(num_rows + 1, 0), ends(num_rows);
  for (size_t row = 0; row < num_rows; ++row) ends[row] = starts[row], starts[row + 1] = starts[row] + count[row];

  auto* row_of = reinterpret_cast<int32_t*>(pair_rows);
  auto* ids = reinterpret_cast<int32_t*>(ids_address);
  auto* topk_weights = reinterpret_cast<float*>(weights_address);
  for (size_t pair = 0; pair < pairs; ++pair) {
    const auto row = static_cast<size_t>(rows.data()[pair]);
    const int32_t slot = slots.data()[experts.data()[pair]];
    size_t place = ends[row]++;
    for (; place > starts[row] && ids[place - 1] > slot; --place) {
      ids[place] = ids[place - 1];
      topk_weights[place] = topk_weights[place - 1];
    }
    ids[place] = slot;
    topk_weights[place] = weights.data()[pair];
  }
  for (size_t row = 0; row < num_rows; ++row) {
    for (size_t pair = starts[row]; pair < starts[row + 1]; ++pair) {
      row_of[pair] = static_cast<int32_t>(row);
      std::memcpy(reinterpret_cast<uint8_t*>(spread) + pair * row_bytes,
                  reinterpret_cast<const uint8_t*>(x) + row * row_bytes, row_bytes);
    }
  }
}

/// Sums of outputs [pairs, width] by row, in fp32 and in their order, rounded once into sums [num_rows, width];
/// pair_rows ascend.
void sum_pairs(size_t pairs, size_t width, uint32_t dtype, uintptr_t pair_rows, uintptr_t outputs, size_t num_rows,
               uintptr_t sums) {
  if (!expertmesh::is_floating(dtype)) throw std::invalid_argument("no sums of this type");
  const size_t row_bytes = width * expertmesh::element_size(dtype);
  const auto* row_of = reinterpret_cast<const int32_t*>(pair_rows);
  std::vector<float> total(width);
  size_t pair = 0;
  for (size_t row = 0; row < num_rows; ++row) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (; pair < pairs && static_cast<size_t>(row_of[pair]) == row; ++pair) {
      expertmesh::add(total.data(), reinterpret_cast<const uint8_t*>(outputs) + pair * row_bytes, dtype, width);
    }
    expertmesh::round_to(reinterpret_cast<uint8_t*>(sums) + row * row_bytes, dtype, total.data(), width);
  }
}

}  // namespace

void bind_topk(nb::module_& module) {
  module.def("fill_table", &fill_table, nb::arg("rows"), nb::arg("experts"), nb::arg("weights"), nb::arg("slots"),
             nb::arg("num_rows"), nb::arg("pairs_per_read"), nb::arg("capacity"), nb::arg("ids_address"),
             nb::arg("topk_weights_address"));
  module.def("spread_pairs", &spread_pairs, nb::arg("rows"), nb::arg("experts"), nb::arg("weights"), nb::arg("slots"),
             nb::arg("num_rows"), nb::arg("x_address"), nb::arg("row_bytes"), nb::arg("pair_rows_address"),
             nb::arg("ids_address"), nb::arg("topk_weights_address"), nb::arg("spread_address"),
             nb::call_guard<nb::gil_scoped_release>());
  module.def("sum_pairs", &sum_pairs, nb::arg("pairs"), nb::arg("width"), nb::arg("dtype"),
             nb::arg("pair_rows_address"), nb::arg("outputs_address"), nb::arg("num_rows"), nb::arg("sums_address"),
             nb::call_guard<nb::gil_scoped_release>());
}
