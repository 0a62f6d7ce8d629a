#include <nanobind/ndarray.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings.h"
#include "experts.h"

namespace nb = nanobind;
using namespace expertmesh;

namespace {

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
/// [experts, out, in], bf16 as its bits.
using Matrices = nb::ndarray<const uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

/// Keeps the weights.
class Experts final : public experts::Held {
 public:
  void add_layer(uint32_t number, const Matrices& gate_up, const Matrices& down, const Column<int32_t>& slots) {
    const size_t experts = down.shape(0), hidden = down.shape(1), intermediate = down.shape(2);
    if (hidden % 32 || intermediate % 32) throw std::invalid_argument("sizes that are no multiples of 32");
    if (gate_up.shape(0) != experts || gate_up.shape(1) != 2 * intermediate || gate_up.shape(2) != hidden) {
      throw std::invalid_argument("gate_up and down that do not fit each other");
    }
    std::vector<int32_t> places(slots.data(), slots.data() + slots.size());
    for (const int32_t place : places) {
      if (place >= static_cast<int64_t>(experts)) throw std::out_of_range("a slot that no expert has");
    }
    add(number, {gate_up.data(), down.data(), experts, hidden, intermediate}, std::move(places));
    kept_.push_back(gate_up);
    kept_.push_back(down);
  }

  void run_rows(uint32_t number, uintptr_t x, size_t num_rows, const Column<int32_t>& rows,
                const Column<int32_t>& pair_experts, const Column<float>& weights, uintptr_t sums) const {
    if (pair_experts.size() != rows.size() || weights.size() != rows.size()) {
      throw std::invalid_argument("columns of unequal length");
    }
    const experts::Pairs pairs{rows.data(), pair_experts.data(), weights.data(), rows.size(), nullptr, 0};
    const nb::gil_scoped_release released;
    compute(number, reinterpret_cast<const uint16_t*>(x), num_rows, pairs, reinterpret_cast<uint16_t*>(sums));
  }

 private:
  std::vector<Matrices> kept_;
};

}  // namespace

void bind_experts(nb::module_& module) {
  nb::class_<Computation>(module, "Computation");
  nb::class_<Echo, Computation>(module, "Echo").def(nb::init<>());
  nb::class_<Experts, Computation>(module, "Experts")
      .def(nb::init<>())
      .def("add_layer", &Experts::add_layer, nb::arg("layer"), nb::arg("gate_up").noconvert(),
           nb::arg("down").noconvert(), nb::arg("slots").noconvert())
      .def("run", &Experts::run_rows, nb::arg("layer"), nb::arg("x_address"), nb::arg("num_rows"), nb::arg("rows"),
           nb::arg("experts"), nb::arg("weights"), nb::arg("sums_address"));
  module.def("can_compute_experts", &experts::supported);
}
