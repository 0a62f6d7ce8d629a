// The router's side of the wire: a stream to every replica; one step scatters rows over them and gathers their sums.
//
// All state is behind one mutex. The thread that waits for a step polls the completion queue itself, so that an answer
// wakes nobody else; where several wait, one polls for all. Between steps a thread of the client's own looks at the
// queue ten times a second, which notices breaks and answers pings.
#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "answer.h"
#include "choice.h"
#include "latency.h"
#include "numbers.h"
#include "polling.h"
#include "protobuf.h"

namespace expertmesh {

class Client;
struct Step;

/// PEM text.
struct Tls {
  std::string ca, certificate, key;
};

struct ClientOptions {
  std::vector<std::pair<std::string, int>> channel;
  std::string fingerprint;
  /// The name on the replicas' certificates; empty: the address.
  std::string server_name;
  /// Until a step gives up waiting for an answer.
  uint64_t timeout_us = 30'000'000;
  /// Requests get a checksum, and an answer without the right one is a failure.
  bool checksums = false;
};

/// Rows [tokens, width] that lie densely in the caller's memory.
struct Rows {
  const void* data;
  size_t tokens;
  size_t width;
  uint32_t dtype;

  size_t row_bytes() const { return width * element_size(dtype); }
};

/// A gate's choice, [tokens, top_k] each: ids of 4 or 8 bytes, below 0 for none, and fp32 weights.
struct Routing {
  const void* ids;
  size_t id_bytes;
  const float* weights;
  size_t top_k;
};

/// Sums over all steps of a layer since the client began.
struct LayerTimings {
  uint64_t steps = 0, messages = 0, rows = 0;
  /// Choosing replicas, copying rows into messages, writing them.
  uint64_t scatter_ns = 0;
  /// Waiting in gather.
  uint64_t wait_ns = 0;
  uint64_t combine_ns = 0;
  /// Over messages: written to answered, and of that what the replica reports.
  uint64_t round_trip_ns = 0, queue_us = 0, compute_us = 0;
};

/// What one replica gets in one message, and what it answers.
struct Part {
  int stream = -1;
  std::string replica;
  /// [R], tokens of the rows sent, ascending.
  std::vector<int64_t> rows;
  /// [P]
  std::vector<int32_t> pair_rows, pair_experts;
  std::vector<float> pair_weights;

  int32_t smallest_expert = INT32_MAX;
  uint64_t id = 0;
  uint64_t written_ns = 0;
  bool answered = false;
  Answer answer;
  uint64_t round_trip_ns = 0;
  /// Hold the answer's output.
  Slices slices;

  bool succeeded() const { return answered && answer.code == kOk; }
};

/// Pairs that nobody serves.
struct Unserved {
  std::vector<int64_t> tokens;
  std::vector<int32_t> experts;
  std::vector<float> weights;
};

/// One layer's rows under way. Its methods are called by one thread at a time; it may be dropped at any time.
struct Step {
  Step(std::shared_ptr<Client> client, uint32_t layer, const Rows& rows);
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  /// Returns once every part is answered, of which failures are one kind, or after `patience_us`: whether all are.
  bool wait(uint64_t patience_us);

  /// Waits until an answer is late, then writes the sums over all parts to `out` [tokens, width], of the rows' type, in
  /// the order of their smallest experts. False where a part failed or is late, a pair is not served, or a sum is not
  /// finite; what is late may then be waited for.
  bool gather(void* out);

  /// Microseconds from now until an answer is late that has not come yet; 0: one is.
  uint64_t late_after_us() const;

  /// While it is held no answer arrives.
  std::unique_lock<std::mutex> lock() const;

  /// Copies the output [R, width] of a part that succeeded.
  void copy_output(size_t part, void* out) const;

  std::shared_ptr<Client> client;
  uint32_t layer;
  size_t tokens, width;
  uint32_t dtype;
  gpr_timespec deadline;
  /// When the last of its answers should be there; of the monotonic clock, nanoseconds.
  uint64_t late_at_ns = 0;
  /// Until then its answers are polled for without going to sleep.
  uint64_t awake_until_ns = 0;
  std::vector<Part> parts;
  Unserved unserved;
  size_t unanswered = 0;

 private:
  /// Whether all sums are finite.
  bool combine(void* out) const;
};

class Client : public std::enable_shared_from_this<Client> {
 public:
  explicit Client(ClientOptions options);
  ~Client();

  /// Becomes readable when `events` has something.
  int event_fd() const { return event_fd_; }

  struct Event {
    int stream;
    /// True: open; false: it has ended, and why.
    bool open;
    std::string reason;
  };
  std::vector<Event> events();

  /// Begins to open a stream; its number is never used again. An event tells that it is open or has ended. Each has a
  /// connection of its own, which shows and trusts `tls`.
  int open(const std::string& address, const std::string& replica, size_t max_rows,
           std::map<uint32_t, std::vector<uint32_t>> experts, const std::optional<Tls>& tls = std::nullopt);
  /// Ends a stream; who waits for answers on it is told so. No event follows.
  void close_stream(int stream);
  /// From now on rows go to these streams only.
  void use(const std::vector<int>& streams);

  struct Load {
    int64_t queued_rows = 0, rows_under_way = 0;
    uint64_t rows_sent = 0;
  };
  Load load(int stream);

  /// Sends each token's row to the replicas that serve its experts.
  std::shared_ptr<Step> scatter(uint32_t layer, const Rows& rows, const Routing& routing);
  /// Sends parts that the caller has made.
  std::shared_ptr<Step> send(uint32_t layer, const Rows& rows, std::vector<Part> parts);

  std::map<uint32_t, LayerTimings> timings();

  /// Ends all streams; what is still under way fails. More calls do nothing.
  void close();

 private:
  friend struct Step;
  struct Stream;
  enum class Op { start, read, write, finish };
  struct Tag {
    Stream* stream;
    Op op;
  };
  struct Message {
    uint64_t id;
    grpc::ByteBuffer bytes;
  };
  struct Stream {
    int number;
    std::string replica;
    size_t max_rows;
    std::map<uint32_t, std::vector<uint32_t>> experts;
    grpc::ClientContext context;
    std::unique_ptr<grpc::GenericStub> stub;
    std::unique_ptr<grpc::GenericClientAsyncReaderWriter> rpc;
    std::array<Tag, 4> tags;
    int operations = 0;
    grpc::ByteBuffer incoming;
    grpc::Status status;
    std::string broken;
    std::deque<Message> outbox;
    bool writing = true;  // until the call has begun
    bool reading = false;
    bool wrote = false;  // since the idle thread last looked
    bool opening = true;
    bool finishing = false;
    bool closed = false;
    bool ended = false;
    std::unordered_map<uint64_t, std::pair<Step*, size_t>> waiting;
    Load load;
    Latency latency;

    bool usable() const { return !finishing && !closed && broken.empty(); }
    void* tag(Op op) {
      ++operations;
      return &tags[static_cast<size_t>(op)];
    }
  };
  /// The streams in use, ordered by their replicas' names, and who covers what.
  struct Table {
    std::vector<Stream*> streams;
    std::unordered_map<uint32_t, Coverage> coverage;
  };
  using Lock = std::unique_lock<std::mutex>;

  bool poll(Lock& lock, gpr_timespec deadline, uint64_t awake_until = 0);
  /// Until all is answered or `until` has come, which the step's own deadline may do first.
  void wait(Lock& lock, Step& step, gpr_timespec until);
  void handle(const Tag& tag, bool ok);
  /// Asks for the next answer, unless that is done already.
  void read(Stream& stream);
  void deliver(Stream& stream);
  void flush(Stream& stream);
  void finish(Stream& stream);
  void end(Stream& stream);
  void fail_all(Stream& stream, uint32_t code, const std::string& message);
  void settle(Step& step, Part& part);
  void forget(Step& step);
  void write(Stream& stream, Step& step, size_t part, const Rows& rows);
  void submit(Step& step, const Rows& rows);
  void notify(Event event);
  void drop_from_table(const Stream* stream);
  void divide(Step& step, const Routing& routing);
  template <typename Id>
  void divide_as(Step& step, const Id* ids, const Routing& routing);
  void idle();

  const ClientOptions options_;
  grpc::CompletionQueue queue_;
  int event_fd_;

  std::mutex mutex_;
  std::condition_variable turn_;
  std::condition_variable idle_;
  bool polling_ = false;
  int waiters_ = 0;
  bool idle_woken_ = false;
  bool closing_ = false;
  int next_stream_ = 1;
  uint64_t next_id_ = 1;
  std::map<int, std::unique_ptr<Stream>> streams_;
  Table table_;
  std::vector<Event> events_;
  std::map<uint32_t, LayerTimings> timings_;
  std::thread idle_thread_;
};

}  // namespace expertmesh
