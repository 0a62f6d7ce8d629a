// Ragged (row, expert) pairs as one dense [R, K] table: what expert_service/topk.py does, for the case that it is one
// table with every row in it.
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "bindings.h"

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

}  // namespace

void bind_topk(nb::module_& module) {
  module.def("fill_table", &fill_table, nb::arg("rows"), nb::arg("experts"), nb::arg("weights"), nb::arg("slots"),
             nb::arg("num_rows"), nb::arg("pairs_per_read"), nb::arg("capacity"), nb::arg("ids_address"),
             nb::arg("topk_weights_address"));
}
