#include <nanobind/ndarray.h>

#include <stdexcept>

#include "bindings.h"
#include "experts.h"

namespace nb = nanobind;
using namespace expertmesh;

namespace {

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void compute_experts(uintptr_t gate_up, uintptr_t down, size_t experts, size_t hidden, size_t intermediate, uintptr_t x,
                     size_t num_rows, const Column<int32_t>& rows, const Column<int32_t>& pair_experts,
                     const Column<float>& weights, const Column<int32_t>& slots, uintptr_t sums) {
  if (pair_experts.size() != rows.size() || weights.size() != rows.size()) {
    throw std::invalid_argument("columns of unequal length");
  }
  if (hidden % 32 || intermediate % 32) throw std::invalid_argument("sizes that are no multiples of 32");
  const experts::Layer layer{reinterpret_cast<const uint16_t*>(gate_up), reinterpret_cast<const uint16_t*>(down),
                             experts, hidden, intermediate};
  const experts::Pairs pairs{rows.data(), pair_experts.data(), weights.data(), rows.size(), slots.data(), slots.size()};
  const nb::gil_scoped_release released;
  experts::compute(layer, reinterpret_cast<const uint16_t*>(x), num_rows, pairs, reinterpret_cast<uint16_t*>(sums));
}

}  // namespace

void bind_experts(nb::module_& module) {
  module.def("can_compute_experts", &experts::supported);
  module.def("compute_experts", &compute_experts, nb::arg("gate_up_address"), nb::arg("down_address"),
             nb::arg("num_experts"), nb::arg("hidden_size"), nb::arg("intermediate_size"), nb::arg("x_address"),
             nb::arg("num_rows"), nb::arg("rows"), nb::arg("experts"), nb::arg("weights"), nb::arg("slots"),
             nb::arg("sums_address"));
}
