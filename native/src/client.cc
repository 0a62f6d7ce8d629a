#include "client.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "checksum.h"

namespace expertmesh {
namespace {

constexpr char kMethod[] = "/expertmesh.v1.ExpertService/Dispatch";
constexpr char kFingerprintKey[] = "expertmesh-fingerprint";
/// Bytes of a request's checksum, its tag included.
constexpr size_t kChecksumField = 5;
constexpr auto kIdlePause = std::chrono::milliseconds(100);
/// While streams open or end, which nobody waits for in a step.
constexpr auto kBusyPause = std::chrono::milliseconds(1);

uint64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

gpr_timespec after_us(uint64_t us) {
  return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_micros(us, GPR_TIMESPAN));
}

std::chrono::microseconds until(gpr_timespec deadline) {
  const auto left = gpr_time_sub(deadline, gpr_now(GPR_CLOCK_MONOTONIC));
  return std::chrono::microseconds(std::max<int64_t>(0, gpr_timespec_to_micros(left)));
}

const char* code_name(grpc::StatusCode code) {
  static const char* const names[] = {"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED",
                                      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
                                      "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL",
                                      "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};
  return code >= 0 && code <= 16 ? names[code] : "UNKNOWN";
}

std::shared_ptr<grpc::ChannelCredentials> make_credentials(const std::optional<Tls>& tls) {
  if (!tls) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = tls->ca;
  options.pem_private_key = tls->key;
  options.pem_cert_chain = tls->certificate;
  return grpc::SslCredentials(options);
}

/// What is wrong with an answer to `rows` x `width` elements of `dtype`; empty: nothing.
std::string find_fault(const Answer& answer, size_t rows, size_t width, uint32_t dtype) {
  const size_t element = element_size(answer.dtype);
  if (element == 0) return "output: unknown dtype " + std::to_string(answer.dtype);
  const std::string shape = std::to_string(answer.rows) + " x " + std::to_string(answer.width);
  const uint64_t elements = static_cast<uint64_t>(answer.rows) * answer.width;
  if (answer.output.size() % element != 0 || answer.output.size() / element != elements) {
    return "output: " + shape + " of dtype " + std::to_string(answer.dtype) + " does not fit " +
           std::to_string(answer.output.size()) + " bytes";
  }
  if (answer.rows != rows || answer.width != width || answer.dtype != dtype) {
    return "answered " + shape + " of dtype " + std::to_string(answer.dtype) + " for " + std::to_string(rows) + " x " +
           std::to_string(width) + " rows";
  }
  return {};
}

/// What is wrong with an answer's checksum; empty: nothing.
std::string find_change(const Answer& answer) {
  if (!answer.checksum) return "answered without a checksum";
  Checksum sum = Checksum::of_answer(answer.id, answer.code);
  sum.add_tensor(answer.dtype, answer.rows, answer.width, answer.output);
  return sum.value() == *answer.checksum ? "" : "the answer's checksum differs: bytes changed on the way";
}

/// Copies the rows of `tokens`, each run of neighbours at once.
void pack(uint8_t* target, const Rows& rows, const std::vector<int64_t>& tokens) {
  const auto* source = static_cast<const uint8_t*>(rows.data);
  const size_t row = rows.row_bytes();
  for (size_t first = 0; first < tokens.size();) {
    size_t last = first + 1;
    while (last < tokens.size() && tokens[last] == tokens[last - 1] + 1) ++last;
    std::memcpy(target, source + tokens[first] * row, (last - first) * row);
    target += (last - first) * row;
    first = last;
  }
}

template <typename T>
void column(Writer& writer, uint32_t field, uint32_t dtype, const std::vector<T>& values) {
  static_assert(sizeof(T) == 4);
  writer.tensor_header(field, dtype, static_cast<uint32_t>(values.size()), 1, 4 * values.size());
  writer.raw(values.data(), 4 * values.size());
}

template <typename T>
void add_column(Checksum& sum, uint32_t dtype, const std::vector<T>& values) {
  sum.add_tensor(dtype, static_cast<uint32_t>(values.size()), 1, values.data(), 4 * values.size());
}

void add_pair(std::vector<Part>& pieces, int64_t token, int32_t expert, float weight, size_t max_rows) {
  if (pieces.empty() || (pieces.back().rows.size() == max_rows && pieces.back().rows.back() != token)) {
    Part piece;
    if (!pieces.empty()) {
      piece.stream = pieces.back().stream;
      piece.replica = pieces.back().replica;
    }
    pieces.push_back(std::move(piece));
  }
  Part& part = pieces.back();
  if (part.rows.empty() || part.rows.back() != token) part.rows.push_back(token);
  part.pair_rows.push_back(static_cast<int32_t>(part.rows.size()) - 1);
  part.pair_experts.push_back(expert);
  part.pair_weights.push_back(weight);
  part.smallest_expert = std::min(part.smallest_expert, expert);
}

}  // namespace

Step::Step(std::shared_ptr<Client> owner, uint32_t layer, const Rows& rows)
    : client(std::move(owner)),
      layer(layer),
      tokens(rows.tokens),
      width(rows.width),
      dtype(rows.dtype),
      deadline(after_us(client->options_.timeout_us)) {}

Step::~Step() {
  Client::Lock lock(client->mutex_);
  client->forget(*this);
}

bool Step::wait(uint64_t patience_us) {
  Client::Lock lock(client->mutex_);
  client->wait(lock, *this, after_us(patience_us));
  return unanswered == 0;
}

uint64_t Step::late_after_us() const {
  const uint64_t now = now_ns();
  return late_at_ns > now ? (late_at_ns - now) / 1000 : 0;
}

bool Step::gather(void* out) {
  const uint64_t began = now_ns();
  Client::Lock lock(client->mutex_);
  client->wait(lock, *this, after_us(late_after_us()));
  const uint64_t arrived = now_ns();
  client->timings_[layer].wait_ns += arrived - began;
  if (unanswered > 0 || !unserved.tokens.empty()) return false;
  for (const Part& part : parts) {
    if (!part.succeeded()) return false;
  }
  lock.unlock();
  const bool finite = combine(out);
  const uint64_t combined = now_ns();
  lock.lock();
  client->timings_[layer].combine_ns += combined - arrived;
  return finite;
}

bool Step::combine(void* out) const {
  struct Source {
    const Part* part;
    Bytes bytes;
    size_t next = 0;
  };
  std::vector<Source> sources;
  sources.reserve(parts.size());
  for (const Part& part : parts) sources.push_back({&part, part.answer.output});
  const size_t row_bytes = width * element_size(dtype);
  std::vector<float> total(width);
  std::vector<uint8_t> scratch(row_bytes);
  auto* target = static_cast<uint8_t*>(out);
  bool finite = true;
  for (size_t token = 0; token < tokens; ++token, target += row_bytes) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (Source& source : sources) {
      const auto& rows = source.part->rows;
      if (source.next == rows.size() || rows[source.next] != static_cast<int64_t>(token)) continue;
      ++source.next;
      size_t together;
      const uint8_t* row = source.bytes.front(&together);
      if (together >= row_bytes) {
        source.bytes.skip(row_bytes);
      } else {  // the row lies in more than one slice
        source.bytes.copy(scratch.data(), row_bytes);
        row = scratch.data();
      }
      add(total.data(), row, dtype, width);
    }
    for (const float sum : total) finite &= std::isfinite(sum);
    round_to(target, dtype, total.data(), width);
  }
  return finite;
}

std::unique_lock<std::mutex> Step::lock() const { return std::unique_lock<std::mutex>(client->mutex_); }

void Step::copy_output(size_t part, void* out) const {
  Bytes bytes = parts.at(part).answer.output;
  bytes.copy(out, bytes.size());
}

Client::Client(ClientOptions options)
    : options_(std::move(options)),
      event_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (event_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  idle_thread_ = std::thread([this] { idle(); });
}

Client::~Client() {
  close();
  ::close(event_fd_);
}

std::vector<Client::Event> Client::events() {
  Lock lock(mutex_);
  uint64_t count;
  while (::read(event_fd_, &count, sizeof count) > 0) {
  }
  return std::exchange(events_, {});
}

void Client::notify(Event event) {
  events_.push_back(std::move(event));
  const uint64_t one = 1;
  // a full counter is readable already
  if (::write(event_fd_, &one, sizeof one) < 0 && errno != EAGAIN) std::abort();
}

int Client::open(const std::string& address, const std::string& replica, size_t max_rows,
                 std::map<uint32_t, std::vector<uint32_t>> experts, const std::optional<Tls>& tls) {
  grpc::ChannelArguments arguments;
  for (const auto& [key, value] : options_.channel) arguments.SetInt(key, value);
  if (tls && !options_.server_name.empty()) arguments.SetSslTargetNameOverride(options_.server_name);
  auto stream = std::make_unique<Stream>();
  stream->replica = replica;
  stream->max_rows = std::max<size_t>(1, max_rows);
  stream->experts = std::move(experts);
  for (const Op op : {Op::start, Op::read, Op::write, Op::finish}) {
    stream->tags[static_cast<size_t>(op)] = {stream.get(), op};
  }
  const auto channel = grpc::CreateCustomChannel(address, make_credentials(tls), arguments);
  stream->stub = std::make_unique<grpc::GenericStub>(channel);
  stream->context.AddMetadata(kFingerprintKey, options_.fingerprint);

  Lock lock(mutex_);
  const int number = stream->number = next_stream_++;
  if (closing_) {
    notify({number, false, "this router is closing"});
    return number;
  }
  for (const auto& other : streams_) {  // until it has answered itself, it is expected to be like its peers
    const Stream& peer = *other.second;
    if (peer.latency.known() && peer.experts == stream->experts) stream->latency = peer.latency;
  }
  stream->rpc = stream->stub->PrepareCall(&stream->context, kMethod, &queue_);
  stream->rpc->StartCall(stream->tag(Op::start));
  streams_[number] = std::move(stream);
  idle_woken_ = true;
  idle_.notify_one();
  return number;
}

void Client::close_stream(int number) {
  Lock lock(mutex_);
  const auto found = streams_.find(number);
  if (found == streams_.end()) return;
  Stream& stream = *found->second;
  stream.closed = true;
  drop_from_table(&stream);
  fail_all(stream, kUnavailable, "its stream was closed");
  stream.context.TryCancel();
  idle_woken_ = true;
  idle_.notify_one();
}

void Client::use(const std::vector<int>& numbers) {
  Lock lock(mutex_);
  Table table;
  for (const int number : numbers) {
    const auto found = streams_.find(number);
    if (found != streams_.end() && found->second->usable()) table.streams.push_back(found->second.get());
  }
  std::sort(table.streams.begin(), table.streams.end(),
            [](const Stream* a, const Stream* b) { return a->replica < b->replica; });
  for (uint32_t i = 0; i < table.streams.size(); ++i) {
    for (const auto& [layer, experts] : table.streams[i]->experts) {
      Coverage& coverage = table.coverage[layer];
      for (const uint32_t expert : experts) {
        if (expert >= coverage.size()) coverage.resize(expert + 1);
        coverage[expert].push_back(i);
      }
    }
  }
  table_ = std::move(table);
}

void Client::drop_from_table(const Stream* stream) {
  for (size_t i = 0; i < table_.streams.size(); ++i) {
    if (table_.streams[i] != stream) continue;
    table_.streams[i] = nullptr;
    for (auto& [layer, coverage] : table_.coverage) {
      for (auto& candidates : coverage) {
        candidates.erase(std::remove(candidates.begin(), candidates.end(), i), candidates.end());
      }
    }
  }
}

Client::Load Client::load(int number) {
  Lock lock(mutex_);
  const auto found = streams_.find(number);
  return found == streams_.end() ? Load{} : found->second->load;
}

std::map<uint32_t, LayerTimings> Client::timings() {
  Lock lock(mutex_);
  return timings_;
}

std::shared_ptr<Step> Client::scatter(uint32_t layer, const Rows& rows, const Routing& routing) {
  auto step = std::make_shared<Step>(shared_from_this(), layer, rows);
  const uint64_t began = now_ns();
  Lock lock(mutex_);
  divide(*step, routing);
  submit(*step, rows);
  LayerTimings& timings = timings_[layer];
  ++timings.steps;
  timings.scatter_ns += now_ns() - began;
  return step;
}

std::shared_ptr<Step> Client::send(uint32_t layer, const Rows& rows, std::vector<Part> parts) {
  auto step = std::make_shared<Step>(shared_from_this(), layer, rows);
  step->parts = std::move(parts);
  Lock lock(mutex_);
  submit(*step, rows);
  return step;
}

void Client::divide(Step& step, const Routing& routing) {
  if (routing.id_bytes == 4) {
    divide_as(step, static_cast<const int32_t*>(routing.ids), routing);
  } else {
    divide_as(step, static_cast<const int64_t*>(routing.ids), routing);
  }
}

template <typename Id>
void Client::divide_as(Step& step, const Id* ids, const Routing& routing) {
  static const Coverage nobody;
  const auto found = table_.coverage.find(step.layer);
  const Coverage& coverage = found == table_.coverage.end() ? nobody : found->second;
  const size_t pairs = step.tokens * routing.top_k;

  std::vector<int64_t> rows_of(coverage.size());
  for (size_t i = 0; i < pairs; ++i) {
    if (ids[i] >= 0 && static_cast<size_t>(ids[i]) < rows_of.size()) ++rows_of[ids[i]];
  }
  std::vector<uint32_t> experts;
  std::vector<int64_t> counts;
  for (uint32_t expert = 0; expert < rows_of.size(); ++expert) {
    if (rows_of[expert] == 0) continue;
    experts.push_back(expert);
    counts.push_back(rows_of[expert]);
  }
  std::vector<CandidateLoad> loads(table_.streams.size());
  for (size_t i = 0; i < loads.size(); ++i) {
    if (const Stream* stream = table_.streams[i]) {
      loads[i] = {stream->load.queued_rows + stream->load.rows_under_way, stream->load.rows_sent};
    }
  }
  std::vector<int32_t> owners;
  choose(coverage, experts, counts, loads, owners);

  std::vector<int32_t> slot_of_stream(table_.streams.size(), -1), slot_of_expert(coverage.size(), -1);
  std::vector<std::vector<Part>> slots;
  std::vector<size_t> max_rows;
  for (size_t i = 0; i < experts.size(); ++i) {
    if (owners[i] < 0) continue;
    int32_t& slot = slot_of_stream[owners[i]];
    if (slot < 0) {
      const Stream& stream = *table_.streams[owners[i]];
      slot = static_cast<int32_t>(slots.size());
      max_rows.push_back(stream.max_rows);
      slots.emplace_back(1);
      slots.back().back().stream = stream.number;
      slots.back().back().replica = stream.replica;
    }
    slot_of_expert[experts[i]] = slot;
  }
  for (size_t token = 0, i = 0; token < step.tokens; ++token) {
    for (size_t k = 0; k < routing.top_k; ++k, ++i) {
      if (ids[i] < 0) continue;
      const int32_t slot = static_cast<size_t>(ids[i]) < slot_of_expert.size() ? slot_of_expert[ids[i]] : -1;
      if (slot >= 0) {
        add_pair(slots[slot], token, static_cast<int32_t>(ids[i]), routing.weights[i], max_rows[slot]);
      } else {
        step.unserved.tokens.push_back(token);
        step.unserved.experts.push_back(static_cast<int32_t>(ids[i]));
        step.unserved.weights.push_back(routing.weights[i]);
      }
    }
  }
  for (auto& slot : slots) {
    for (auto& part : slot) step.parts.push_back(std::move(part));
  }
  // the order of addition, which must depend on experts and rows alone
  std::stable_sort(step.parts.begin(), step.parts.end(), [](const Part& a, const Part& b) {
    return std::make_pair(a.smallest_expert, a.rows.front()) < std::make_pair(b.smallest_expert, b.rows.front());
  });
}

void Client::submit(Step& step, const Rows& rows) {
  LayerTimings& timings = timings_[step.layer];
  step.unanswered = step.parts.size();
  for (size_t i = 0; i < step.parts.size(); ++i) {
    Part& part = step.parts[i];
    const auto found = streams_.find(part.stream);
    if (found == streams_.end() || !found->second->usable()) {
      part.answer.code = kUnavailable;
      part.answer.message = "no stream to it";
      part.answered = true;
      --step.unanswered;
      continue;
    }
    timings.messages += 1;
    timings.rows += part.rows.size();
    write(*found->second, step, i, rows);
  }
}

void Client::write(Stream& stream, Step& step, size_t index, const Rows& rows) {
  Part& part = step.parts[index];
  part.id = next_id_++;
  const size_t payload = part.rows.size() * rows.row_bytes();
  Writer writer;
  writer.varint(1, part.id);
  writer.varint(2, step.layer);
  column(writer, 4, kInt32, part.pair_rows);
  column(writer, 5, kInt32, part.pair_experts);
  column(writer, 6, kFloat32, part.pair_weights);
  writer.varint(7, rows.dtype);
  writer.varint(8, options_.timeout_us);
  writer.tensor_header(3, rows.dtype, static_cast<uint32_t>(part.rows.size()), static_cast<uint32_t>(rows.width),
                       payload);
  const std::string& header = writer.data();
  const size_t trailer = options_.checksums ? kChecksumField : 0;
  grpc::Slice slice(grpc_slice_malloc(header.size() + payload + trailer), grpc::Slice::STEAL_REF);
  auto* target = const_cast<uint8_t*>(slice.begin());
  std::memcpy(target, header.data(), header.size());
  target += header.size();
  pack(target, rows, part.rows);
  if (options_.checksums) {
    Checksum sum = Checksum::of_request(part.id, options_.timeout_us, step.layer, rows.dtype);
    sum.add_tensor(rows.dtype, static_cast<uint32_t>(part.rows.size()), static_cast<uint32_t>(rows.width), target,
                   payload);
    add_column(sum, kInt32, part.pair_rows);
    add_column(sum, kInt32, part.pair_experts);
    add_column(sum, kFloat32, part.pair_weights);
    Writer field;
    field.fixed32(9, sum.value());
    std::memcpy(target + payload, field.data().data(), kChecksumField);
  }

  const auto count = static_cast<int64_t>(part.rows.size());
  stream.load.rows_under_way += count;
  stream.load.rows_sent += count;
  stream.waiting[part.id] = {&step, index};
  part.written_ns = now_ns();
  step.late_at_ns = std::max(step.late_at_ns, part.written_ns + stream.latency.late_after(part.rows.size()));
  const int64_t polling = polling_time(stream.latency.usual(part.rows.size()));
  step.awake_until_ns = std::max(step.awake_until_ns, part.written_ns + polling);
  stream.outbox.push_back({part.id, grpc::ByteBuffer(&slice, 1)});
  stream.wrote = true;
  flush(stream);
}

void Client::flush(Stream& stream) {
  if (stream.writing || stream.outbox.empty()) return;
  stream.writing = true;
  stream.rpc->Write(stream.outbox.front().bytes, stream.tag(Op::write));
  stream.outbox.pop_front();
  // with the read, gRPC 1.51 sends a window update: here it travels behind the message; alone it would wake the replica
  read(stream);
}

void Client::read(Stream& stream) {
  if (std::exchange(stream.reading, true)) return;
  stream.rpc->Read(&stream.incoming, stream.tag(Op::read));
}

void Client::wait(Lock& lock, Step& step, gpr_timespec patience) {
  const gpr_timespec wake = gpr_time_min(patience, step.deadline);
  const uint64_t patient_until = now_ns() + 1000 * static_cast<uint64_t>(until(wake).count());
  const uint64_t awake_until = std::min(step.awake_until_ns, patient_until);
  bool polled = false;  // what has arrived already is seen without any patience
  while (step.unanswered > 0) {
    if (until(step.deadline).count() == 0) {
      const std::string message = "no answer within " + std::to_string(options_.timeout_us / 1000) + " ms";
      for (Part& part : step.parts) {
        if (part.answered) continue;
        part.answer.code = kDeadlineExceeded;
        part.answer.message = message;
      }
      forget(step);
      break;
    }
    if (until(wake).count() == 0 && polled) break;
    if (!polling_) {
      polled = !poll(lock, wake, awake_until);
    } else {
      ++waiters_;
      turn_.wait_for(lock, until(wake));
      --waiters_;
      polled = true;
    }
  }
  if (waiters_ > 0) turn_.notify_all();
}

bool Client::poll(Lock& lock, gpr_timespec deadline, uint64_t awake_until) {
  polling_ = true;
  lock.unlock();
  void* tag;
  bool ok;
  auto status = grpc::CompletionQueue::TIMEOUT;
  while (status == grpc::CompletionQueue::TIMEOUT && now_ns() < awake_until) {
    status = queue_.AsyncNext(&tag, &ok, gpr_inf_past(GPR_CLOCK_MONOTONIC));
    if (status == grpc::CompletionQueue::TIMEOUT) sched_yield();
  }
  if (status == grpc::CompletionQueue::TIMEOUT) status = queue_.AsyncNext(&tag, &ok, deadline);
  lock.lock();
  polling_ = false;
  if (status != grpc::CompletionQueue::GOT_EVENT) return false;
  handle(*static_cast<Tag*>(tag), ok);
  return true;
}

void Client::handle(const Tag& tag, bool ok) {
  Stream& stream = *tag.stream;
  switch (tag.op) {
    case Op::start:
      stream.writing = false;
      stream.opening = false;
      if (ok) {
        if (!stream.closed) notify({stream.number, true, {}});
        flush(stream);
        read(stream);
      } else {
        finish(stream);
      }
      break;
    case Op::read:
      stream.reading = false;
      if (ok) {
        deliver(stream);
        if (!stream.waiting.empty() || !stream.usable()) read(stream);
      } else {
        finish(stream);
      }
      break;
    case Op::write:
      stream.writing = false;
      if (ok) {
        flush(stream);
      } else {
        stream.outbox.clear();
      }
      break;
    case Op::finish:
      end(stream);
      break;
  }
  if (--stream.operations > 0 || !stream.ended) return;
  const int number = stream.number;
  streams_.erase(number);
}

void Client::deliver(Stream& stream) {
  Slices slices;
  Answer answer;
  if (!stream.incoming.Dump(&slices).ok() || !parse_answer(slices, &answer)) {
    stream.broken = "it sent an answer that is no DispatchResponse";
    drop_from_table(&stream);
    stream.context.TryCancel();
    return;
  }
  const auto found = stream.waiting.find(answer.id);
  if (found == stream.waiting.end()) return;  // nobody waits for it any more
  const auto [step, index] = found->second;
  Part& part = step->parts[index];
  if (options_.checksums) {
    std::string change = find_change(answer);
    if (!change.empty()) {
      answer.code = kDataLoss;
      answer.message = std::move(change);
    }
  }
  if (answer.code == kOk) {
    std::string fault = find_fault(answer, part.rows.size(), step->width, step->dtype);
    if (!fault.empty()) {
      answer.code = kInternal;
      answer.message = std::move(fault);
    }
  }
  const uint64_t now = now_ns();
  part.answer = std::move(answer);
  part.slices = std::move(slices);
  part.round_trip_ns = now - part.written_ns;
  stream.waiting.erase(found);
  stream.load.rows_under_way -= static_cast<int64_t>(part.rows.size());
  stream.load.queued_rows = std::max<int64_t>(0, part.answer.queued_rows - stream.load.rows_under_way);
  if (part.answer.code == kOk) {
    stream.latency.note(part.rows.size(), part.round_trip_ns);
    LayerTimings& timings = timings_[step->layer];
    timings.round_trip_ns += part.round_trip_ns;
    timings.queue_us += part.answer.queue_us;
    timings.compute_us += part.answer.compute_us;
  }
  settle(*step, part);
}

void Client::settle(Step& step, Part& part) {
  part.answered = true;
  if (--step.unanswered == 0 && waiters_ > 0) turn_.notify_all();
}

void Client::forget(Step& step) {
  for (Part& part : step.parts) {
    if (part.answered) continue;
    part.answered = true;
    const auto found = streams_.find(part.stream);
    if (found == streams_.end()) continue;
    Stream& stream = *found->second;
    if (stream.waiting.erase(part.id) == 0) continue;
    stream.load.rows_under_way -= static_cast<int64_t>(part.rows.size());
    auto& outbox = stream.outbox;
    outbox.erase(std::remove_if(outbox.begin(), outbox.end(), [&](const Message& m) { return m.id == part.id; }),
                 outbox.end());
  }
  step.unanswered = 0;
}

void Client::finish(Stream& stream) {
  drop_from_table(&stream);
  if (std::exchange(stream.finishing, true)) return;
  stream.rpc->Finish(&stream.status, stream.tag(Op::finish));
}

void Client::end(Stream& stream) {
  stream.ended = true;
  std::string reason = stream.broken;
  if (reason.empty()) {
    reason = stream.status.ok() ? "the replica ended the stream"
                                : code_name(stream.status.error_code()) + (": " + stream.status.error_message());
  }
  fail_all(stream, kUnavailable, reason);
  if (!stream.closed) notify({stream.number, false, reason});
}

void Client::fail_all(Stream& stream, uint32_t code, const std::string& message) {
  for (const auto& [id, waiting] : stream.waiting) {
    Part& part = waiting.first->parts[waiting.second];
    part.answer.code = code;
    part.answer.message = message;
    settle(*waiting.first, part);
  }
  stream.waiting.clear();
  stream.outbox.clear();
  stream.load.rows_under_way = 0;
}

void Client::idle() {
  Lock lock(mutex_);
  while (!closing_ || !streams_.empty()) {
    if (!polling_) {
      while (poll(lock, gpr_inf_past(GPR_CLOCK_MONOTONIC))) {
      }
      if (waiters_ > 0) turn_.notify_all();
    }
    for (auto& [number, stream] : streams_) {  // lets the end of a stream be seen that nobody uses
      if (!std::exchange(stream->wrote, false) && !stream->opening && !stream->finishing) read(*stream);
    }
    const bool changing = closing_ || std::any_of(streams_.begin(), streams_.end(), [](const auto& entry) {
      return entry.second->opening || entry.second->closed || entry.second->finishing;
    });
    idle_.wait_for(lock, changing ? kBusyPause : kIdlePause, [this] { return idle_woken_; });
    idle_woken_ = false;
  }
}

void Client::close() {
  {
    Lock lock(mutex_);
    if (std::exchange(closing_, true)) return;
    for (auto& [number, stream] : streams_) {
      stream->closed = true;
      drop_from_table(stream.get());
      fail_all(*stream, kUnavailable, "its stream was closed");
      stream->context.TryCancel();
    }
    idle_woken_ = true;
    idle_.notify_one();
  }
  idle_thread_.join();
  queue_.Shutdown();
  void* tag;
  bool ok;
  while (queue_.Next(&tag, &ok)) {
  }
}

}  // namespace expertmesh
