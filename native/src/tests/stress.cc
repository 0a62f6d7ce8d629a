// Routers against replicas in one process, for sanitizers: threads that step at once, steps that are dropped, replicas
// that are stopped and started again, streams that are closed, timeouts. Every sum that arrives must be exact.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

#include "../client.h"
#include "../server.h"

using namespace expertmesh;
using Clock = std::chrono::steady_clock;

namespace {

constexpr uint32_t kWidth = 96;
constexpr uint32_t kExperts = 8;
constexpr uint32_t kLayers = 2;
constexpr size_t kTopK = 2;
constexpr char kFingerprint[] = "f00d";
// sanitizers make everything slow, so only absence of answers is a failure
constexpr auto kPatience = std::chrono::seconds(120);

#define REQUIRE(condition)                                                          \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);          \
      std::abort();                                                                 \
    }                                                                               \
  } while (false)

/// Expert e multiplies by e + 1.
class Replica {
 public:
  Replica(uint32_t first, uint32_t last, uint64_t max_queued_rows) : server_(settings(first, last, max_queued_rows)) {
    port_ = server_.listen("127.0.0.1", 0, 0);
    REQUIRE(port_ > 0);
    executor_ = std::thread([this] { compute(); });
    exchanger_ = std::thread([this] { exchange(); });
  }

  ~Replica() {
    ending_ = true;
    exchanger_.join();
    server_.close();
    executor_.join();
    server_.stop(0.05);
  }

  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }

 private:
  static server::Settings settings(uint32_t first, uint32_t last, uint64_t max_queued_rows) {
    server::Settings settings;
    settings.replica_id = "replica";
    settings.group = "group";
    settings.fingerprint = kFingerprint;
    settings.served.hidden_size = kWidth;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      std::string held(kExperts, 0);
      for (uint32_t expert = first; expert <= last; ++expert) held[expert] = 1;
      settings.served.held[layer] = held;
    }
    settings.served.layers_text = "0-1";
    settings.served.max_rows = 64;
    settings.served.max_pairs = 64 * kTopK;
    settings.max_queued_rows = max_queued_rows;
    settings.max_batch_rows = 64;
    settings.reflect = [](const std::string&) { return std::nullopt; };
    return settings;
  }

  /// The same, computed by the server itself.
  class Multiply final : public Computation {
   public:
    Sums run(const BatchView& batch) override {
      if (++number_ % 97 == 0) throw std::runtime_error("on purpose");
      if (number_ % 31 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      multiply(batch);
      return {sums_.data(), kFloat32};
    }

    const std::vector<float>& multiply(const BatchView& batch) {
      const auto* rows = static_cast<const float*>(batch.hidden_states);
      sums_.assign(batch.rows * batch.width, 0.0f);
      for (size_t pair = 0; pair < batch.pairs; ++pair) {
        const size_t row = batch.pair_rows[pair] * batch.width;
        const float factor = batch.pair_weights[pair] * static_cast<float>(batch.pair_experts[pair] + 1);
        for (size_t i = 0; i < batch.width; ++i) sums_[row + i] += factor * rows[row + i];
      }
      return sums_;
    }

   private:
    std::vector<float> sums_;
    uint64_t number_ = 0;
  };

  /// Who computes changes again and again.
  void compute() {
    Multiply own;
    for (uint64_t number = 0; const auto taken = server_.take(); ++number) {
      if (number % 97 == 96) {
        server_.fail("on purpose");
        continue;
      }
      if (number % 31 == 30) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      const auto buffers = server_.buffers();
      const auto& sums = own.multiply({taken->layer, taken->dtype, buffers->hidden_states.get(), taken->rows, kWidth,
                                       buffers->rows.data(), buffers->experts.data(), buffers->weights.data(),
                                       taken->pairs});
      server_.reply(sums.data(), kFloat32);
    }
  }

  void exchange() {
    for (uint64_t turn = 0; !ending_; ++turn) {
      server_.compute_with(turn % 2 == 0 ? std::make_shared<Multiply>() : nullptr);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  server::Server server_;
  int port_ = 0;
  std::thread executor_, exchanger_;
  std::atomic<bool> ending_{false};
};

/// A router and the streams it has; replicas come and go under its feet.
class Router {
 public:
  Router(uint64_t timeout_us, bool checksums) : client_(std::make_shared<Client>(options(timeout_us, checksums))) {}
  ~Router() { client_->close(); }

  void connect(const std::string& address, const std::string& name, uint32_t first, uint32_t last) {
    std::map<uint32_t, std::vector<uint32_t>> experts;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (uint32_t expert = first; expert <= last; ++expert) experts[layer].push_back(expert);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    streams_[name] = client_->open(address, name, 64, std::move(experts));
    use();
  }

  void disconnect(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int stream = streams_.at(name);
    streams_.erase(name);
    use();
    client_->close_stream(stream);
  }

  /// True where all was answered, rightly.
  bool step(std::mt19937& random) {
    const size_t tokens = random() % 90;
    std::vector<float> rows(tokens * kWidth), weights(tokens * kTopK, 1.0f), sums(tokens * kWidth, -1.0f);
    for (auto& value : rows) value = static_cast<float>(random() % 64);
    std::vector<int32_t> ids(tokens * kTopK);
    for (size_t i = 0; i < ids.size(); i += kTopK) {
      ids[i] = static_cast<int32_t>(random() % kExperts);
      ids[i + 1] = random() % 8 == 0 ? -1 : static_cast<int32_t>((ids[i] + 1 + random() % (kExperts - 1)) % kExperts);
    }
    auto step = client_->scatter(random() % kLayers, {rows.data(), tokens, kWidth, kFloat32},
                                 {ids.data(), sizeof(int32_t), weights.data(), kTopK});
    const uint32_t fate = random() % 16;
    if (fate == 0) return false;  // dropped while under way
    if (fate == 1) client_->events();
    if (!step->gather(sums.data())) {
      while (!step->wait(random() % 2000)) {  // what is late has come by its deadline
        if (random() % 8 == 0) return false;
      }
      for (const Part& part : step->parts) REQUIRE(part.answered && part.answer.code != kDataLoss);
      return false;
    }
    for (size_t token = 0; token < tokens; ++token) {
      float factor = 0;
      for (size_t k = 0; k < kTopK; ++k) factor += static_cast<float>(ids[token * kTopK + k] + 1);
      for (size_t i = 0; i < kWidth; ++i) REQUIRE(sums[token * kWidth + i] == factor * rows[token * kWidth + i]);
    }
    return true;
  }

  void expect_nothing_under_way() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [name, stream] : streams_) REQUIRE(client_->load(stream).rows_under_way == 0);
  }

  void close() { client_->close(); }

 private:
  static ClientOptions options(uint64_t timeout_us, bool checksums) {
    ClientOptions options;
    options.fingerprint = kFingerprint;
    options.timeout_us = timeout_us;
    options.checksums = checksums;
    return options;
  }

  void use() {
    std::vector<int> numbers;
    for (const auto& [name, stream] : streams_) numbers.push_back(stream);
    client_->use(numbers);
  }

  std::shared_ptr<Client> client_;
  std::mutex mutex_;
  std::map<std::string, int> streams_;
};

void run(double seconds) {
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  const auto give_up = end + kPatience;
  // two of each half, so that one may be away
  const std::pair<uint32_t, uint32_t> halves[] = {{0, 3}, {4, 7}, {0, 3}, {4, 7}};
  std::vector<std::unique_ptr<Replica>> replicas;
  for (const auto& [first, last] : halves) replicas.push_back(std::make_unique<Replica>(first, last, 256));

  std::vector<std::unique_ptr<Router>> routers;
  for (const uint64_t timeout_us : {60'000'000, 60'000'000, 2'000}) {
    routers.push_back(std::make_unique<Router>(timeout_us, routers.size() % 2 == 0));
    for (size_t i = 0; i < replicas.size(); ++i) {
      routers.back()->connect(replicas[i]->address(), "r" + std::to_string(i), halves[i].first, halves[i].second);
    }
  }
  std::atomic<uint64_t> steps{0}, succeeded{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 2 * routers.size(); ++i) {
    threads.emplace_back([&, i] {
      std::mt19937 random(static_cast<uint32_t>(i));
      while (Clock::now() < end) {
        ++steps;
        succeeded += routers[i / 2]->step(random);
      }
    });
  }
  std::mt19937 random(99);
  while (Clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const size_t i = random() % replicas.size();
    const std::string name = "r" + std::to_string(i);
    if (random() % 2 == 0) {  // a kill: its routers notice by themselves
      replicas[i] = std::make_unique<Replica>(halves[i].first, halves[i].second, 256);
    }
    for (auto& router : routers) {
      router->disconnect(name);
      router->connect(replicas[i]->address(), name, halves[i].first, halves[i].second);
    }
  }
  for (auto& thread : threads) thread.join();
  REQUIRE(Clock::now() < give_up);
  for (auto& router : routers) router->expect_nothing_under_way();
  std::printf("stress: %llu steps, %llu of them answered in full\n", static_cast<unsigned long long>(steps),
              static_cast<unsigned long long>(succeeded));
  REQUIRE(succeeded > 0);

  // a router that is closed under a step's feet
  replicas[0].reset();
  std::thread closing([&] { routers[0]->close(); });
  for (int i = 0; i < 20; ++i) routers[0]->step(random);
  closing.join();
}

}  // namespace

int main(int argc, char** argv) { run(argc > 1 ? std::atof(argv[1]) : 10.0); }
