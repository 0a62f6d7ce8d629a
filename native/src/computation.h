// What computes a replica's batches without Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expertmesh {

/// Rows [rows, width] of one layer that lie densely, and columns of (row, expert) pairs with the gate's weights.
struct BatchView {
  uint32_t layer, dtype;
  const void* hidden_states;
  size_t rows, width;
  const int32_t *pair_rows, *pair_experts;
  const float* pair_weights;
  size_t pairs;
};

struct Sums {
  const void* data = nullptr;
  uint32_t dtype = 0;
};

class Computation {
 public:
  virtual ~Computation() = default;

  /// The rows' sums [rows, width], which stay where they are until the next call. Called by one thread at a time; what
  /// it throws is the answer to the batch.
  virtual Sums run(const BatchView& batch) = 0;
};

/// Answers with the rows as they came: what the wire alone takes.
class Echo final : public Computation {
 public:
  Sums run(const BatchView& batch) override { return {batch.hidden_states, batch.dtype}; }
};

}  // namespace expertmesh
