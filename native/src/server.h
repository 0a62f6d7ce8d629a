// The replica's side of the wire: accepts streams, queues requests by layer, hands whole batches to the executor's thread
// and writes its answers.
//
// Threads: the executor's thread polls the completion queue itself while it has nothing to compute, so that a request
// wakes nobody else. A second thread, the watcher, takes over only while a computation lasts longer than kPatience, and
// once the executor's thread has left. Exactly one of them polls at any time; one mutex guards all state and is never
// held while polling, copying rows or running Python; the checksum of a request that has one is verified under it.
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "computation.h"
#include "polling.h"
#include "server_call.h"
#include "server_load.h"
#include "server_queue.h"
#include "server_tls.h"

namespace expertmesh::server {

struct Settings {
  std::string replica_id, group, fingerprint;
  Served served;
  uint64_t max_queued_rows = 0;
  uint64_t max_batch_rows = 0;
  /// A DescribeResponse without state and load.
  std::string description;
  /// Answers one message of server reflection with another; none where it is malformed.
  std::function<std::optional<std::string>(const std::string&)> reflect;
  std::vector<std::pair<std::string, int>> options;
  /// Asked before each handshake, on any thread; without it, plain text.
  ReadTls tls;
};

/// A batch as the executor sees it: where its rows and pairs lie until the next take().
struct Taken {
  uint32_t layer = 0, rows = 0, dtype = 0;
  size_t pairs = 0;
};

struct Load {
  uint64_t queued_rows;
  double busy;
  uint64_t rows_total;
  double rows_per_s;
};

/// What take() copies a batch into; replaced by larger ones as batches grow.
struct Buffers {
  /// Aligned for the widest vector instructions.
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> hidden_states;
  size_t hidden_bytes = 0;
  std::vector<int32_t> rows, experts;
  std::vector<float> weights;
};

class Server {
 public:
  explicit Server(Settings settings);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// Listens on the first free port of first..last, or on any where first is 0, and serves; 0 where none is free.
  int listen(const std::string& host, int first, int last);

  /// Batches are computed by this from the next one on; null: by whoever takes them.
  void compute_with(std::shared_ptr<Computation> computation);

  /// The executor's thread asks for the next batch that it is to compute itself; computes all others and polls until
  /// there is one. Nothing once closed and empty.
  std::optional<Taken> take();

  /// Answers the batch that was taken last with its rows' sums, [rows, hidden_size] of `dtype`.
  void reply(const void* output, uint32_t dtype);

  /// Answers the batch that was taken last with CODE_INTERNAL.
  void fail(const std::string& message);

  /// Nothing more is accepted; what waits is still taken.
  void close();

  /// Ends all streams, then cancels what is not over after `grace_s`. More calls do nothing.
  void stop(double grace_s);

  void set_state(uint32_t state);
  void set_serving(bool serving);

  Load load();
  std::map<uint32_t, std::vector<int64_t>> expert_rows();
  /// Median and 95th percentile of how long requests waited, microseconds.
  std::pair<uint32_t, uint32_t> queue_wait();
  /// Requests that are not answered yet, Dispatch streams, and most rows that one of them has open.
  struct Streams {
    size_t waiting = 0, count = 0;
    uint64_t open_rows = 0;
  };
  Streams streams();
  /// Nanoseconds of the monotonic clock; 0: none came yet.
  int64_t last_request_at();

  /// Those of the batch taken last; only the executor's thread asks.
  std::shared_ptr<Buffers> buffers() const { return buffers_; }
  /// Counts how often they were replaced.
  uint64_t buffers_version() const { return buffers_version_; }

 private:
  using Lock = std::unique_lock<std::mutex>;
  enum class Poller { kNone, kExecutor, kWatcher };

  bool try_listen(const std::string& address);
  void accept();

  grpc::CompletionQueue::NextStatus poll(Lock& lock, gpr_timespec deadline);
  void handle(const Call::Tag& tag, bool ok);
  void begin(const std::shared_ptr<Call>& call);
  void receive(const std::shared_ptr<Call>& call, Slices message);
  void receive_dispatch(const std::shared_ptr<Call>& call, Slices message);
  void receive_health(Call* call, const Slices& message);
  void answer_reflections(Lock& lock);
  void tell_watcher_of_health(Call* call);

  void wait(Lock& lock);
  bool more_may_be_there() const;
  void become_poller(Lock& lock);
  void wake_poller();
  void watch();
  bool may_watch(int64_t now) const;

  std::optional<Taken> take_next(std::shared_ptr<Computation>* computation);
  void compute(Computation& computation);
  void gather();
  void note_waits(int64_t now);
  void fail_jobs(std::vector<Job>* jobs, Code code, const std::string& message, int64_t now);
  Writer header(uint64_t id, Code code, const std::string& message) const;
  grpc::ByteBuffer refused(const Job& job, Code code, const std::string& message, int64_t now);
  void put_load(Writer* message, uint32_t field, int64_t now);
  Load load_at(int64_t now);

  const Settings settings_;
  std::shared_ptr<grpc::ServerCredentials> credentials_;
  std::unique_ptr<grpc::AsyncGenericService> service_;
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;

  std::mutex mutex_;
  std::condition_variable role_free_, watcher_wakes_;
  Poller poller_ = Poller::kNone;
  bool role_wanted_ = false;
  bool watcher_parked_ = false;
  bool executor_left_ = false;
  int64_t computing_since_;
  grpc::Alarm alarm_;
  bool alarm_pending_ = false;

  bool open_ = false;
  bool stopping_ = false;
  std::unordered_map<Call*, std::shared_ptr<Call>> calls_;
  std::vector<std::pair<std::shared_ptr<Call>, std::string>> reflections_;
  Queue waiting_;
  LoadMeter meter_;
  std::shared_ptr<Computation> computation_;
  uint32_t state_ = 0;
  bool serving_ = true;
  int64_t last_request_at_ = 0;
  /// How often the executor's thread has waited for something to happen.
  uint64_t waits_ = 1;

  // of the executor's thread alone
  Batch batch_;
  int64_t began_at_ = 0;
  /// From one batch's begin to the next.
  Pauses pauses_;
  std::shared_ptr<Buffers> buffers_ = std::make_shared<Buffers>();
  uint64_t buffers_version_ = 0;

  std::mutex stopping_mutex_;
  std::thread watcher_;
};

}  // namespace expertmesh::server
