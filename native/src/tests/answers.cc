// Random and damaged DispatchResponses, cut into slices at random, for sanitizers. What is parsed must not depend on the
// cuts, and no byte outside the message may be read.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../answer.h"
#include "../checksum.h"

using namespace expertmesh;

namespace {

std::string made_answer(std::mt19937& random) {
  const uint32_t rows = random() % 5, width = random() % 9;
  const std::string data(4 * rows * width, 'x');
  Writer status, timings, load, answer;
  status.varint(1, random() % 8);
  status.bytes(2, "why", random() % 4);
  timings.varint(1, random());
  timings.varint(2, random());
  load.varint(1, random());
  load.float32(2, 0.5f);
  answer.varint(1, (uint64_t{random()} << 32 | random()) >> random() % 64);
  answer.message(2, status);
  answer.tensor_header(3, 1, rows, width, data.size());
  answer.raw(data.data(), data.size());
  answer.message(4, timings);
  answer.message(5, load);
  if (random() % 2 == 0) answer.fixed32(6, random());
  return answer.data();
}

void damage(std::string& bytes, std::mt19937& random) {
  for (uint32_t count = random() % 4; count > 0 && !bytes.empty(); --count) {
    const size_t at = random() % bytes.size();
    switch (random() % 4) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
        bytes.resize(at);
        break;
      case 2:
        bytes.insert(at, random() % 12, '\xff');
        break;
      default:
        bytes.insert(at, 1 + random() % 150, static_cast<char>(8 * (1 + random() % 7) + 3));  // groups in groups
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

uint32_t checksum(const Answer& answer) {
  Checksum sum = Checksum::of_answer(answer.id, answer.code);
  sum.add_tensor(answer.dtype, answer.rows, answer.width, answer.output);
  return sum.value();
}

bool same(const Answer& a, const Answer& b) {
  return a.id == b.id && a.code == b.code && a.message == b.message && a.dtype == b.dtype && a.rows == b.rows &&
         a.width == b.width && a.output.text() == b.output.text() && a.queue_us == b.queue_us &&
         a.compute_us == b.compute_us && a.queued_rows == b.queued_rows && a.checksum == b.checksum &&
         checksum(a) == checksum(b);
}

/// Whether it is well-formed; ends the program where the cuts matter.
bool checked(const std::string& bytes, std::mt19937& random) {
  const Slices whole{grpc::Slice(bytes)}, pieces = cut(bytes, random);
  Answer one, other;
  const bool ok = parse_answer(whole, &one);
  if (ok != parse_answer(pieces, &other) || (ok && !same(one, other))) {
    std::fprintf(stderr, "answers: the cuts matter\n");
    std::abort();
  }
  return ok;
}

}  // namespace

#ifdef EXPERTMESH_FUZZ
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

/// Now and then a whole answer, so that mutations begin from some.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  std::mt19937 random(seed);
  if (random() % 16 != 0) return LLVMFuzzerMutate(data, size, max_size);
  const std::string made = made_answer(random);
  if (made.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::copy(made.begin(), made.end(), data);
  return made.size();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::mt19937 random(static_cast<uint32_t>(size));
  checked(std::string(reinterpret_cast<const char*>(data), size), random);
  return 0;
}
#else
int main(int argc, char** argv) {
  std::mt19937 random(7);
  int parsed = 0;
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300'000;
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = made_answer(random);
    if (round % 8 != 0) damage(bytes, random);
    const bool ok = checked(bytes, random);
    if (round % 8 == 0 && !ok) {
      std::fprintf(stderr, "round %d: a whole message is malformed\n", round);
      return 1;
    }
    parsed += ok;
  }
  std::printf("answers: %d messages, %d of them well-formed\n", rounds, parsed);
}
#endif
