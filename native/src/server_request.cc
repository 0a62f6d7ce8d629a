#include "server_request.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "checksum.h"
#include "numbers.h"

namespace expertmesh::server {
namespace {

struct Tensor {
  int32_t dtype = 0;
  uint32_t rows = 0;
  uint32_t width = 0;
  Bytes data;

  /// What comes later replaces what came before, field by field, as protobuf merges a message that comes twice.
  bool merge(Bytes bytes) {
    Reader reader(bytes);
    while (reader.next()) {
      if (reader.is(1, kVarint)) dtype = static_cast<int32_t>(reader.uint32());
      if (reader.is(2, kVarint)) rows = reader.uint32();
      if (reader.is(3, kVarint)) width = reader.uint32();
      if (reader.is(4, kBytes)) data = reader.bytes();
    }
    return reader.ok();
  }
};

struct Request {
  uint64_t id = 0;
  uint32_t layer = 0;
  Tensor hidden_states, pair_rows, pair_experts, pair_weights;
  int32_t output_dtype = 0;
  uint64_t timeout_us = 0;
  std::optional<uint32_t> checksum;

  bool read(const Slices& message) {
    Reader reader{Bytes(message)};
    bool whole = true;
    while (whole && reader.next()) {
      if (reader.is(1, kVarint)) id = reader.varint();
      if (reader.is(2, kVarint)) layer = reader.uint32();
      if (reader.is(3, kBytes)) whole = hidden_states.merge(reader.bytes());
      if (reader.is(4, kBytes)) whole = pair_rows.merge(reader.bytes());
      if (reader.is(5, kBytes)) whole = pair_experts.merge(reader.bytes());
      if (reader.is(6, kBytes)) whole = pair_weights.merge(reader.bytes());
      if (reader.is(7, kVarint)) output_dtype = static_cast<int32_t>(reader.uint32());
      if (reader.is(8, kVarint)) timeout_us = reader.varint();
      if (reader.is(9, kFixed32)) checksum = reader.uint32();
    }
    return whole && reader.ok();
  }

  /// Whether it is what its checksum was made of; true where it has none.
  bool unchanged() const {
    if (!checksum) return true;
    Checksum sum = Checksum::of_request(id, timeout_us, layer, static_cast<uint32_t>(output_dtype));
    for (const Tensor* tensor : {&hidden_states, &pair_rows, &pair_experts, &pair_weights}) {
      sum.add_tensor(static_cast<uint32_t>(tensor->dtype), tensor->rows, tensor->width, tensor->data);
    }
    return sum.value() == *checksum;
  }
};

std::string text(unsigned __int128 value) {
  std::string digits;
  do {
    digits.insert(digits.begin(), static_cast<char>('0' + static_cast<int>(value % 10)));
    value /= 10;
  } while (value > 0);
  return digits;
}

std::string text(int64_t value) { return std::to_string(value); }

bool is_row_type(int32_t dtype) { return dtype >= 0 && is_floating(static_cast<uint32_t>(dtype)); }

const char* torch_name(int32_t dtype) {
  switch (dtype) {
    case kFloat32:
      return "torch.float32";
    case kBFloat16:
      return "torch.bfloat16";
    case kFloat16:
      return "torch.float16";
    default:
      return "torch.int32";
  }
}

/// Each check returns true, or false with the refusal filled.
class Checks {
 public:
  explicit Checks(Refusal* refusal) : refusal_(refusal) {}

  bool hidden_states(const Tensor& tensor, const Served& served) {
    const std::string name = "hidden_states: ";
    const size_t size = tensor.dtype < 0 ? 0 : element_size(static_cast<uint32_t>(tensor.dtype));
    if (size == 0) return invalid(name + "unknown dtype " + text(int64_t{tensor.dtype}));
    const std::string shape = text(int64_t{tensor.rows}) + " x " + text(int64_t{tensor.width});
    const auto expected = static_cast<unsigned __int128>(tensor.rows) * tensor.width * size;
    if (tensor.data.size() != expected) {
      return invalid(name + shape + " " + torch_name(tensor.dtype) + " takes " + text(expected) + " bytes, got " +
                     std::to_string(tensor.data.size()));
    }
    if (!is_row_type(tensor.dtype)) return invalid(name + "INT32 is no floating-point type");
    if (tensor.width != served.hidden_size) {
      return invalid(name + "width " + std::to_string(tensor.width) + ", the model's hidden size is " +
                     std::to_string(served.hidden_size));
    }
    if (tensor.rows > served.max_rows) {
      return invalid(name + std::to_string(tensor.rows) + " rows, at most " + std::to_string(served.max_rows) +
                     " are accepted");
    }
    return true;
  }

  bool column(const Tensor& tensor, int32_t dtype, const char* dtype_name, const std::string& name) {
    if (tensor.dtype != dtype) {
      return invalid(name + ": dtype " + text(int64_t{tensor.dtype}) + ", " + dtype_name + " is expected");
    }
    if (tensor.width != 1 || tensor.data.size() != uint64_t{4} * tensor.rows) {
      return invalid(name + ": " + std::to_string(tensor.rows) + " x " + std::to_string(tensor.width) + " in " +
                     std::to_string(tensor.data.size()) + " bytes is no column of 4-byte elements");
    }
    return true;
  }

  bool columns(const Request& request, const Served& served) {
    const uint32_t count = request.pair_rows.rows;
    const uint32_t experts = request.pair_experts.rows, weights = request.pair_weights.rows;
    if (count != experts || count != weights) {
      return invalid("pair_rows, pair_experts and pair_weights have " + std::to_string(count) + ", " +
                     std::to_string(experts) + " and " + std::to_string(weights) + " rows");
    }
    if (count > served.max_pairs) {
      return invalid(std::to_string(count) + " pairs, at most " + std::to_string(served.max_pairs) + " are accepted");
    }
    return true;
  }

  bool values(const Pairs& pairs, const std::string& held, uint32_t layer, uint32_t rows) {
    if (pairs.rows.empty()) return true;
    const auto [lowest, highest] = std::minmax_element(pairs.rows.begin(), pairs.rows.end());
    if (*lowest < 0 || *highest >= static_cast<int64_t>(rows)) {
      return invalid("pair_rows: " + std::to_string(*lowest) + " to " + std::to_string(*highest) +
                     ", but hidden_states has " + std::to_string(rows) + " rows");
    }
    const int32_t first = *std::min_element(pairs.experts.begin(), pairs.experts.end());
    if (first < 0) return invalid("pair_experts: expert " + std::to_string(first) + " cannot exist");
    int64_t absent = std::numeric_limits<int64_t>::max();
    for (const int32_t expert : pairs.experts) {
      const auto index = static_cast<size_t>(expert);
      if (index >= held.size() || !held[index]) absent = std::min<int64_t>(absent, expert);
    }
    if (absent == std::numeric_limits<int64_t>::max()) return true;
    return refuse(kNotFound,
                  "layer " + std::to_string(layer) + ": expert " + std::to_string(absent) + " is not held here");
  }

  bool invalid(std::string message) { return refuse(kInvalidArgument, std::move(message)); }

  bool refuse(Code code, std::string message) {
    *refusal_ = {code, std::move(message)};
    return false;
  }

 private:
  Refusal* refusal_;
};

template <typename T>
std::vector<T> copied(Tensor column) {
  std::vector<T> values(column.rows);
  column.data.copy(values.data(), column.data.size());
  return values;
}

bool check(const Request& request, const Served& served, Job* job, Refusal* refusal) {
  Checks checks(refusal);
  if (!request.unchanged()) {
    return checks.refuse(kDataLoss, "the request's checksum differs: bytes changed on the way");
  }
  const auto held = served.held.find(request.layer);
  if (held == served.held.end()) {
    return checks.refuse(kNotFound, "layer " + std::to_string(request.layer) + " is not served here (layers: " +
                                        served.layers_text + ")");
  }
  if (!is_row_type(request.output_dtype)) {
    return checks.invalid("output_dtype " + text(int64_t{request.output_dtype}) + " is no floating-point type");
  }
  if (!checks.hidden_states(request.hidden_states, served) ||
      !checks.column(request.pair_rows, kInt32, "DTYPE_INT32", "pair_rows") ||
      !checks.column(request.pair_experts, kInt32, "DTYPE_INT32", "pair_experts") ||
      !checks.column(request.pair_weights, kFloat32, "DTYPE_FLOAT32", "pair_weights") ||
      !checks.columns(request, served)) {
    return false;
  }
  job->pairs = {copied<int32_t>(request.pair_rows), copied<int32_t>(request.pair_experts),
                copied<float>(request.pair_weights)};
  return checks.values(job->pairs, held->second, request.layer, request.hidden_states.rows);
}

}  // namespace

Parsed parse(Slices message, const Served& served, int64_t now, Job* job, Refusal* refusal) {
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  job->message = std::move(message);
  Request request;
  if (!request.read(job->message)) return Parsed::kMalformed;
  job->id = request.id;
  job->checked = request.checksum.has_value();
  if (!check(request, served, job, refusal)) return Parsed::kRefused;
  job->layer = request.layer;
  job->rows = request.hidden_states.rows;
  job->dtype = static_cast<uint32_t>(request.hidden_states.dtype);
  job->output_dtype = static_cast<uint32_t>(request.output_dtype);
  job->hidden_states = request.hidden_states.data;
  job->arrived_at = now;
  const bool ends = request.timeout_us != 0 && request.timeout_us < static_cast<uint64_t>((kNever - now) / 1000);
  job->deadline = ends ? now + static_cast<int64_t>(request.timeout_us) * 1000 : kNever;
  return Parsed::kJob;
}

}  // namespace expertmesh::server
