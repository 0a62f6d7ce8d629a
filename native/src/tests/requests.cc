// Random and damaged DispatchRequests, cut into slices at random, for sanitizers. What is parsed must not depend on the
// cuts, a request that is accepted must be consistent, and no byte outside the message may be read.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../checksum.h"
#include "../server_call.h"
#include "../server_request.h"

using namespace expertmesh;
using namespace expertmesh::server;

namespace {

constexpr uint32_t kWidth = 3;

Served make_served() {
  Served served;
  served.hidden_size = kWidth;
  served.held[0] = std::string("\1\1\0\1", 4);
  served.held[7] = std::string("\1", 1);
  served.layers_text = "0,7";
  served.max_rows = 6;
  served.max_pairs = 8;
  return served;
}

void put_tensor(Writer& request, Checksum& sum, uint32_t field, uint32_t dtype, uint32_t rows, uint32_t width,
                std::mt19937& random) {
  std::string data(size_t{rows} * width * (dtype == 2 || dtype == 3 ? 2 : 4), '\0');
  // small numbers, so that many rows and experts exist
  for (size_t i = 0; i < data.size(); i += 4) data[i] = static_cast<char>(random() % 4);
  request.tensor_header(field, dtype, rows, width, data.size());
  request.raw(data.data(), data.size());
  sum.add_tensor(dtype, rows, width, data.data(), data.size());
}

std::string made_request(std::mt19937& random) {
  const uint32_t rows = random() % 7, pairs = rows == 0 ? 0 : random() % 9;
  const uint64_t id = uint64_t{random()} << random() % 33, timeout_us = uint64_t{random()} << random() % 33;
  const uint32_t layer = random() % 3 == 0 ? 7 : 0, output_dtype = 1 + random() % 3;
  Checksum sum = Checksum::of_request(id, timeout_us, layer, output_dtype);
  Writer request;
  request.varint(1, id);
  request.varint(2, layer);
  put_tensor(request, sum, 3, 1 + random() % 4, rows, random() % 16 == 0 ? 4 : kWidth, random);
  put_tensor(request, sum, 4, 4, pairs, 1, random);
  put_tensor(request, sum, 5, 4, pairs, 1, random);
  put_tensor(request, sum, 6, 1, pairs, 1, random);
  request.varint(7, output_dtype);
  request.varint(8, timeout_us);
  if (random() % 2 == 0) request.fixed32(9, sum.value() + (random() % 8 == 0));
  return request.data();
}

void damage(std::string& bytes, std::mt19937& random) {
  for (uint32_t count = random() % 4; count > 0 && !bytes.empty(); --count) {
    const size_t at = random() % bytes.size();
    switch (random() % 5) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
        bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8);
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.insert(at, random() % 12, '\xff');
        break;
      default:
        bytes.insert(at, 1 + random() % 150, static_cast<char>(8 * (1 + random() % 10) + 3));  // groups in groups
    }
  }
}

Slices cut(const std::string& bytes, std::mt19937& random) {
  Slices slices;
  for (size_t at = 0; at < bytes.size();) {
    const size_t length = std::min<size_t>(bytes.size() - at, random() % 7);
    slices.emplace_back(bytes.data() + at, length);  // a copy, so that its ends are guarded
    at += length;
  }
  return slices;
}

bool same(const Job& a, const Job& b) {
  return a.id == b.id && a.checked == b.checked && a.layer == b.layer && a.rows == b.rows && a.dtype == b.dtype &&
         a.output_dtype == b.output_dtype && a.hidden_states.text() == b.hidden_states.text() &&
         a.pairs.rows == b.pairs.rows && a.pairs.experts == b.pairs.experts && a.deadline == b.deadline &&
         std::equal(a.pairs.weights.begin(), a.pairs.weights.end(), b.pairs.weights.begin(), b.pairs.weights.end(),
                    [](float one, float other) { return std::memcmp(&one, &other, sizeof one) == 0; });
}

bool consistent(const Job& job, const Served& served) {
  const size_t pairs = job.pairs.rows.size();
  bool good = job.rows <= served.max_rows && pairs <= served.max_pairs && pairs == job.pairs.experts.size() &&
              pairs == job.pairs.weights.size() && job.deadline >= job.arrived_at &&
              job.hidden_states.size() == size_t{job.rows} * kWidth * (job.dtype == 1 ? 4 : 2);
  const std::string& held = served.held.at(job.layer);
  for (size_t i = 0; i < pairs; ++i) {
    good = good && job.pairs.rows[i] >= 0 && static_cast<uint32_t>(job.pairs.rows[i]) < job.rows;
    good = good && job.pairs.experts[i] >= 0 && static_cast<size_t>(job.pairs.experts[i]) < held.size() &&
           held[static_cast<size_t>(job.pairs.experts[i])] == 1;
  }
  return good;
}

/// Ends the program where the cuts matter, or where what is accepted is not consistent.
Parsed checked(const std::string& bytes, const Served& served, std::mt19937& random) {
  Job one, other;
  Refusal why, other_why;
  const Parsed parsed = parse({grpc::Slice(bytes)}, served, 5, &one, &why);
  const bool agree = parsed == parse(cut(bytes, random), served, 5, &other, &other_why);
  if (!agree || (parsed == Parsed::kJob && !same(one, other)) || why.message != other_why.message) {
    std::fprintf(stderr, "requests: the cuts matter\n");
    std::abort();
  }
  if (parsed == Parsed::kJob && !consistent(one, served)) {
    std::fprintf(stderr, "requests: accepted, but not consistent\n");
    std::abort();
  }
  return parsed;
}

}  // namespace

#ifdef EXPERTMESH_FUZZ
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

/// Now and then a whole request, so that mutations begin from some.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  std::mt19937 random(seed);
  if (random() % 16 != 0) return LLVMFuzzerMutate(data, size, max_size);
  const std::string made = made_request(random);
  if (made.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::copy(made.begin(), made.end(), data);
  return made.size();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Served served = make_served();
  std::mt19937 random(static_cast<uint32_t>(size));
  checked(std::string(reinterpret_cast<const char*>(data), size), served, random);
  return 0;
}
#else
int main(int argc, char** argv) {
  std::mt19937 random(11);
  const Served served = make_served();
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200'000;
  int jobs = 0, refused = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = made_request(random);
    if (round % 8 != 0) damage(bytes, random);
    const Parsed parsed = checked(bytes, served, random);
    if (round % 8 == 0 && parsed == Parsed::kMalformed) {
      std::fprintf(stderr, "round %d: a whole message is malformed\n", round);
      return 1;
    }
    jobs += parsed == Parsed::kJob;
    refused += parsed == Parsed::kRefused;
  }
  std::printf("requests: %d messages, %d of them accepted, %d refused\n", rounds, jobs, refused);
  return jobs > 0 && refused > 0 ? 0 : 1;
}
#endif
