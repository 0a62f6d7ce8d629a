#include "server.h"

#include <grpc/support/log.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

#include "checksum.h"
#include "numbers.h"

namespace expertmesh::server {
namespace {

/// A computation that takes longer leaves the queue to the watcher.
constexpr int64_t kPatienceNs = 2'000'000;
/// Without a batch for this long the watcher sleeps until the next one.
constexpr int64_t kIdleNs = 20'000'000;
/// Completions handled before a batch is formed, at most, so that a flood cannot hold it back.
constexpr int kMaxCompletions = 256;
/// Rows of larger batches get memory of their own, which is given back after the next small one.
constexpr size_t kKeptBytes = 8 << 20;

constexpr char kDispatch[] = "/expertmesh.v1.ExpertService/Dispatch";
constexpr char kDescribe[] = "/expertmesh.v1.ExpertService/Describe";
constexpr char kHealthCheck[] = "/grpc.health.v1.Health/Check";
constexpr char kHealthWatch[] = "/grpc.health.v1.Health/Watch";
constexpr char kReflection[] = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
constexpr char kService[] = "expertmesh.v1.ExpertService";
constexpr char kFingerprintKey[] = "expertmesh-fingerprint";

/// Of grpc.health.v1.HealthCheckResponse.
enum Health { kServing = 1, kNotServing = 2, kServiceUnknown = 3 };

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

gpr_timespec never() { return gpr_inf_future(GPR_CLOCK_MONOTONIC); }
gpr_timespec at_once() { return gpr_inf_past(GPR_CLOCK_MONOTONIC); }

Method method_of(const std::string& path) {
  if (path == kDispatch) return Method::kDispatch;
  if (path == kDescribe) return Method::kDescribe;
  if (path == kHealthCheck) return Method::kHealthCheck;
  if (path == kHealthWatch) return Method::kHealthWatch;
  if (path == kReflection) return Method::kReflection;
  return Method::kOther;
}

grpc::ByteBuffer one_slice(const std::string& message) {
  const grpc::Slice slice(message);
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace

Server::Server(Settings settings)
    : settings_(std::move(settings)),
      computing_since_(now_ns()),
      waiting_(settings_.max_queued_rows, settings_.max_batch_rows),
      meter_(computing_since_) {
  for (const auto& [layer, held] : settings_.served.held) meter_.add_layer(layer, held.size());
}

Server::~Server() { stop(0); }

int Server::listen(const std::string& host, int first, int last) {
  for (int port = first; port <= last; ++port) {
    if (!try_listen(host + ":" + std::to_string(port))) continue;
    const std::lock_guard lock(mutex_);
    open_ = true;
    accept();
    watcher_ = std::thread([this] { watch(); });
    return port_;
  }
  return 0;
}

bool Server::try_listen(const std::string& address) {
  credentials_ = grpc::InsecureServerCredentials();
  if (settings_.tls) credentials_ = std::make_shared<TlsCredentials>(settings_.tls);
  service_ = std::make_unique<grpc::AsyncGenericService>();
  grpc::ServerBuilder builder;
  for (const auto& [key, value] : settings_.options) {
    // grpc++ sends the builder's own limits over the arguments'
    if (key == GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH) builder.SetMaxReceiveMessageSize(value);
    if (key == GRPC_ARG_MAX_SEND_MESSAGE_LENGTH) builder.SetMaxSendMessageSize(value);
    builder.AddChannelArgument(key, value);
  }
  builder.AddListeningPort(address, credentials_, &port_);
  builder.RegisterAsyncGenericService(service_.get());
  queue_ = builder.AddCompletionQueue();
  server_ = builder.BuildAndStart();
  if (server_ != nullptr && port_ != 0) return true;
  if (server_ != nullptr) server_->Shutdown();
  queue_->Shutdown();
  void* tag;
  bool ok;
  while (queue_->Next(&tag, &ok)) {
  }
  server_.reset();
  queue_.reset();
  return false;
}

void Server::accept() {
  auto call = std::make_shared<Call>(&open_);
  service_->RequestCall(&call->context, call->rpc(), queue_.get(), queue_.get(), call->accept_tag());
  calls_.emplace(call.get(), std::move(call));
}

// ---- completions -----------------------------------------------------------------------------------------------------

grpc::CompletionQueue::NextStatus Server::poll(Lock& lock, gpr_timespec deadline) {
  void* tag = nullptr;
  bool ok = false;
  lock.unlock();
  const auto status = queue_->AsyncNext(&tag, &ok, deadline);
  lock.lock();
  if (status == grpc::CompletionQueue::GOT_EVENT) {
    if (tag == &alarm_) {
      alarm_pending_ = false;
    } else {
      handle(*static_cast<const Call::Tag*>(tag), ok);
      if (!reflections_.empty()) answer_reflections(lock);
    }
  }
  return status;
}

void Server::handle(const Call::Tag& tag, bool ok) {
  const auto found = calls_.find(tag.call);
  const std::shared_ptr<Call> call = found->second;
  Slices message;
  switch (tag.operation) {
    case Call::Operation::kAccept:
      if (ok) {
        call->on_accept();
        if (open_ && !stopping_) accept();
        begin(call);
      }
      break;
    case Call::Operation::kDone:
      call->on_done();
      break;
    case Call::Operation::kRead:
      if (call->on_read(ok, &message)) {
        receive(call, std::move(message));
      } else {
        call->half_close();
      }
      break;
    case Call::Operation::kExchange:
      if (call->on_exchange(ok, &message)) {
        receive(call, std::move(message));
      } else {
        call->half_close();
      }
      break;
    case Call::Operation::kWrite:
      call->on_write(ok);
      break;
    case Call::Operation::kFinish:
      call->on_finish();
      break;
  }
  if (call->over()) calls_.erase(call.get());
}

void Server::begin(const std::shared_ptr<Call>& call) {
  call->method = method_of(call->context.method());
  if (stopping_) {
    call->end({grpc::StatusCode::UNAVAILABLE, "replica " + settings_.replica_id + " is stopping"});
    return;
  }
  if (call->method == Method::kOther) {
    call->end({grpc::StatusCode::UNIMPLEMENTED, "Method not found!"});
    return;
  }
  if (call->method == Method::kDispatch) {
    std::string asked = "none";
    const auto [first, last] = call->context.client_metadata().equal_range(kFingerprintKey);
    for (auto entry = first; entry != last; ++entry) asked.assign(entry->second.data(), entry->second.size());
    if (asked.empty()) asked = "none";
    if (asked != settings_.fingerprint) {
      call->end({grpc::StatusCode::FAILED_PRECONDITION,
                 "replica " + settings_.replica_id + " of group " + settings_.group +
                     " serves the model with fingerprint " + settings_.fingerprint + ", the caller asks for " + asked});
      return;
    }
    // one batch that is computed and a full queue: what comes on top is pushed back in band, not left unread
    call->limit_open_rows(2 * settings_.max_queued_rows);
  }
  call->read();
}

void Server::receive(const std::shared_ptr<Call>& call, Slices message) {
  switch (call->method) {
    case Method::kDispatch:
      receive_dispatch(call, std::move(message));
      // where the next message was there before anybody waited for it, more may be: those should join the batch
      if (call->waiting() == 1 && call->exchanged_at() != waits_ && poller_ == Poller::kExecutor) {
        call->read_with_answer();
      } else {
        call->read();
      }
      break;
    case Method::kDescribe: {
      Writer described;
      described.raw(settings_.description.data(), settings_.description.size());
      described.varint(8, state_);
      put_load(&described, 9, now_ns());
      call->send(one_slice(described.data()));
      call->end(grpc::Status::OK);
      break;
    }
    case Method::kHealthCheck:
    case Method::kHealthWatch:
      receive_health(call.get(), message);
      break;
    case Method::kReflection:
      reflections_.emplace_back(call, Bytes(message).text());
      break;
    case Method::kOther:
      break;
  }
}

void Server::receive_dispatch(const std::shared_ptr<Call>& call, Slices message) {
  const int64_t now = now_ns();
  Job job;
  Refusal refusal;
  const Parsed parsed = parse(std::move(message), settings_.served, now, &job, &refusal);
  if (parsed == Parsed::kMalformed) {
    call->end({grpc::StatusCode::INVALID_ARGUMENT, "a message is no DispatchRequest"});
    return;
  }
  last_request_at_ = now;
  const uint32_t rows = job.rows;
  if (parsed == Parsed::kJob) {
    job.call = call;
    const Code code = waiting_.submit(&job);
    if (code == kOk) {
      call->expect(rows);
      return;
    }
    if (code == kResourceExhausted) {
      refusal = {code, "no room for " + std::to_string(rows) + " rows: " + std::to_string(waiting_.queued_rows()) +
                           " rows wait in a queue for " + std::to_string(waiting_.max_queued_rows)};
    } else {
      refusal = {code, "replica " + settings_.replica_id + " is stopping"};
    }
  }
  call->expect(0);
  call->answer(refused(job, refusal.code, refusal.message, now), 0, waits_);
}

// ---- health, reflection ----------------------------------------------------------------------------------------------

void Server::receive_health(Call* call, const Slices& message) {
  Reader reader{Bytes(message)};
  while (reader.next()) {
    if (reader.is(1, kBytes)) call->watched = reader.bytes().text();
  }
  if (!reader.ok()) {
    call->end({grpc::StatusCode::INVALID_ARGUMENT, "the message is no HealthCheckRequest"});
    return;
  }
  if (call->method == Method::kHealthCheck && !call->watched.empty() && call->watched != kService) {
    call->end({grpc::StatusCode::NOT_FOUND, ""});
    return;
  }
  tell_watcher_of_health(call);
  if (call->method == Method::kHealthCheck) call->end(grpc::Status::OK);
}

void Server::tell_watcher_of_health(Call* call) {
  const bool known = call->watched.empty() || call->watched == kService;
  const int status = !known ? kServiceUnknown : serving_ ? kServing : kNotServing;
  if (status == call->told) return;
  call->told = status;
  Writer response;
  response.varint(1, static_cast<uint64_t>(status));
  call->send(one_slice(response.data()));
}

void Server::answer_reflections(Lock& lock) {
  auto reflections = std::move(reflections_);
  reflections_.clear();
  for (auto& [call, message] : reflections) {
    lock.unlock();
    const std::optional<std::string> answer = settings_.reflect(message);
    lock.lock();
    if (answer) {
      call->send(one_slice(*answer));
      call->read();
    } else {
      call->end({grpc::StatusCode::INVALID_ARGUMENT, "the message is no ServerReflectionRequest"});
    }
  }
}

// ---- who polls -------------------------------------------------------------------------------------------------------

void Server::wake_poller() {
  if (!open_ || alarm_pending_) return;
  alarm_pending_ = true;
  alarm_.Set(queue_.get(), gpr_time_0(GPR_CLOCK_MONOTONIC), &alarm_);
}

void Server::become_poller(Lock& lock) {
  while (poller_ == Poller::kWatcher) {
    role_wanted_ = true;
    wake_poller();
    role_free_.wait(lock);
  }
  role_wanted_ = false;
  poller_ = Poller::kExecutor;
}

bool Server::may_watch(int64_t now) const {
  return poller_ == Poller::kNone && (executor_left_ || now - computing_since_ >= kPatienceNs);
}

void Server::watch() {
  Lock lock(mutex_);
  while (true) {
    const int64_t now = now_ns();
    if (may_watch(now) || !open_) {
      poller_ = Poller::kWatcher;
      role_wanted_ = false;
      for (const auto& [address, call] : calls_) call->read_deferred();
      while (!role_wanted_ || !open_) {
        if (poll(lock, never()) == grpc::CompletionQueue::SHUTDOWN) return;
      }
      // given away at once: were it free, this thread could take it again before the other one runs
      poller_ = Poller::kExecutor;
      role_free_.notify_all();
    } else if (poller_ == Poller::kExecutor && now - computing_since_ >= kIdleNs) {
      watcher_parked_ = true;
      watcher_wakes_.wait(lock);
      watcher_parked_ = false;
    } else {
      watcher_wakes_.wait_for(lock, std::chrono::nanoseconds(kPatienceNs));
    }
  }
}

// ---- batches ---------------------------------------------------------------------------------------------------------

void Server::wait(Lock& lock) {
  ++waits_;
  const int64_t until = now_ns() + polling_time(pauses_.usual());
  while (now_ns() < until) {
    if (poll(lock, at_once()) != grpc::CompletionQueue::TIMEOUT) return;
    lock.unlock();
    sched_yield();
    lock.lock();
  }
  poll(lock, never());
}

bool Server::more_may_be_there() const {
  return waiting_.empty() || std::any_of(calls_.begin(), calls_.end(), [](const auto& entry) {
           return entry.second->method == Method::kDispatch && entry.second->reading();
         });
}

void Server::compute_with(std::shared_ptr<Computation> computation) {
  const Lock lock(mutex_);
  computation_.swap(computation);
}

std::optional<Taken> Server::take() {
  while (true) {
    std::shared_ptr<Computation> computation;
    const std::optional<Taken> taken = take_next(&computation);
    if (!taken || !computation) return taken;
    compute(*computation);
  }
}

void Server::compute(Computation& computation) {
  const Buffers& of = *buffers_;
  const BatchView batch{batch_.layer, batch_.dtype, of.hidden_states.get(), batch_.rows, settings_.served.hidden_size,
                        of.rows.data(), of.experts.data(), of.weights.data(), batch_.pairs};
  Sums sums;
  try {
    sums = computation.run(batch);
  } catch (const std::exception& error) {  // whatever fails in a kernel becomes a status
    gpr_log(GPR_ERROR, "layer %u: a batch of %u rows failed: %s", batch_.layer, batch_.rows, error.what());
    fail(error.what());
    return;
  }
  reply(sums.data, sums.dtype);
}

std::optional<Taken> Server::take_next(std::shared_ptr<Computation>* computation) {
  Lock lock(mutex_);
  if (!open_) return std::nullopt;
  become_poller(lock);
  batch_ = Batch();
  while (true) {
    for (int handled = 0; handled < kMaxCompletions && more_may_be_there(); ++handled) {
      if (poll(lock, at_once()) != grpc::CompletionQueue::GOT_EVENT) break;
    }
    const int64_t now = now_ns();
    while (batch_.jobs.empty() && waiting_.take(now, &batch_)) {
      note_waits(now);
      fail_jobs(&batch_.expired, kDeadlineExceeded, "the timeout passed in the queue", now);
    }
    if (!batch_.jobs.empty() || (waiting_.closed() && waiting_.empty())) break;
    wait(lock);
  }
  began_at_ = now_ns();
  pauses_.note(began_at_ - computing_since_);
  computing_since_ = began_at_;
  poller_ = Poller::kNone;
  if (batch_.jobs.empty()) {
    executor_left_ = true;
    watcher_wakes_.notify_all();
    return std::nullopt;
  }
  meter_.begin(began_at_);
  if (watcher_parked_) watcher_wakes_.notify_all();
  *computation = computation_;
  lock.unlock();
  gather();
  return Taken{batch_.layer, batch_.rows, batch_.dtype, batch_.pairs};
}

void Server::note_waits(int64_t now) {
  meter_.waits.took(now);
  for (const Job& job : batch_.jobs) meter_.waits.add(now, microseconds(now - job.arrived_at));
  for (const Job& job : batch_.expired) meter_.waits.add(now, microseconds(now - job.arrived_at));
}

void Server::gather() {
  const size_t row_bytes = settings_.served.hidden_size * element_size(batch_.dtype);
  const size_t bytes = batch_.rows * row_bytes;
  const bool too_large = buffers_->hidden_bytes > kKeptBytes && bytes <= kKeptBytes;
  if (bytes > buffers_->hidden_bytes || batch_.pairs > buffers_->rows.size() || too_large) {
    // the next powers of two, so that growing batches seldom move them
    size_t room = 4096, pairs = 256;
    while (room < bytes) room *= 2;
    while (pairs < batch_.pairs) pairs *= 2;
    buffers_ = std::make_shared<Buffers>();
    buffers_->hidden_states.reset(static_cast<uint8_t*>(std::aligned_alloc(64, room)));
    if (!buffers_->hidden_states) throw std::bad_alloc();
    buffers_->hidden_bytes = room;
    buffers_->rows.resize(pairs);
    buffers_->experts.resize(pairs);
    buffers_->weights.resize(pairs);
    ++buffers_version_;
  }
  Buffers& into = *buffers_;
  size_t pair = 0;
  uint32_t row = 0;
  for (Job& job : batch_.jobs) {
    job.hidden_states.copy(into.hidden_states.get() + row * row_bytes, job.hidden_states.size());
    const size_t count = job.pairs.rows.size();
    for (size_t i = 0; i < count; ++i) into.rows[pair + i] = job.pairs.rows[i] + static_cast<int32_t>(row);
    std::copy(job.pairs.experts.begin(), job.pairs.experts.end(), into.experts.begin() + static_cast<long>(pair));
    std::copy(job.pairs.weights.begin(), job.pairs.weights.end(), into.weights.begin() + static_cast<long>(pair));
    job.message.clear();
    pair += count;
    row += job.rows;
  }
}

void Server::reply(const void* output, uint32_t dtype) {
  const int64_t ended_at = now_ns();
  const auto* from = static_cast<const uint8_t*>(output);
  const uint32_t width = settings_.served.hidden_size;
  std::vector<grpc::Slice> sums;
  sums.reserve(batch_.jobs.size());
  for (Job& job : batch_.jobs) {
    const size_t elements = static_cast<size_t>(job.rows) * width;
    grpc_slice sum = grpc_slice_malloc(elements * element_size(job.output_dtype));
    convert(GRPC_SLICE_START_PTR(sum), job.output_dtype, from, dtype, elements);
    if (job.checked) {
      Checksum checksum = Checksum::of_answer(job.id, kOk);
      checksum.add_tensor(job.output_dtype, job.rows, width, GRPC_SLICE_START_PTR(sum), GRPC_SLICE_LENGTH(sum));
      job.checksum = checksum.value();
    }
    sums.emplace_back(sum, grpc::Slice::STEAL_REF);
    from += elements * element_size(dtype);
  }

  const Lock lock(mutex_);
  meter_.end(ended_at, batch_.rows);
  Writer load;
  put_load(&load, 5, ended_at);
  for (size_t i = 0; i < sums.size(); ++i) {
    Job& job = batch_.jobs[i];
    meter_.count(job.layer, job.pairs.experts);
    Writer answer = header(job.id, kOk, "");
    Writer timings;
    timings.varint(1, microseconds(began_at_ - job.arrived_at));
    timings.varint(2, microseconds(ended_at - began_at_));
    timings.varint(3, batch_.rows);
    answer.message(4, timings);
    answer.raw(load.data().data(), load.data().size());
    if (job.checked) answer.fixed32(6, job.checksum);
    answer.tensor_header(3, job.output_dtype, job.rows, width, sums[i].size());
    const grpc::Slice slices[] = {grpc::Slice(answer.data()), sums[i]};
    job.call->answer(grpc::ByteBuffer(slices, 2), job.rows, waits_);
  }
  batch_ = Batch();
}

void Server::fail(const std::string& message) {
  const int64_t now = now_ns();
  const Lock lock(mutex_);
  meter_.end(now, 0);
  fail_jobs(&batch_.jobs, kInternal, message, now);
}

void Server::fail_jobs(std::vector<Job>* jobs, Code code, const std::string& message, int64_t now) {
  for (Job& job : *jobs) {
    job.call->answer(refused(job, code, message, now), job.rows, waits_);
  }
  jobs->clear();
}

Writer Server::header(uint64_t id, Code code, const std::string& message) const {
  Writer status;
  status.varint(1, code);
  if (!message.empty()) status.bytes(2, message.data(), message.size());
  Writer answer;
  answer.varint(1, id);
  answer.message(2, status);
  return answer;
}

grpc::ByteBuffer Server::refused(const Job& job, Code code, const std::string& message, int64_t now) {
  Writer answer = header(job.id, code, message);
  put_load(&answer, 5, now);
  if (job.checked) {
    Checksum sum = Checksum::of_answer(job.id, code);
    sum.add_tensor(0, 0, 0, nullptr, 0);
    answer.fixed32(6, sum.value());
  }
  return one_slice(answer.data());
}

void Server::put_load(Writer* message, uint32_t field, int64_t now) {
  const Load load = load_at(now);
  Writer inner;
  inner.varint(1, load.queued_rows);
  inner.float32(2, static_cast<float>(load.busy));
  inner.varint(3, load.rows_total);
  inner.float32(4, static_cast<float>(load.rows_per_s));
  message->message(field, inner);
}

// ---- what others ask and tell ----------------------------------------------------------------------------------------

Load Server::load_at(int64_t now) {
  return {waiting_.queued_rows(), meter_.busy(now), meter_.rows_total(), meter_.rows_per_s(now)};
}

Load Server::load() {
  const Lock lock(mutex_);
  return load_at(now_ns());
}

std::map<uint32_t, std::vector<int64_t>> Server::expert_rows() {
  const Lock lock(mutex_);
  return meter_.expert_rows();
}

std::pair<uint32_t, uint32_t> Server::queue_wait() {
  const Lock lock(mutex_);
  return meter_.waits.quantiles(now_ns(), waiting_.oldest());
}

Server::Streams Server::streams() {
  const Lock lock(mutex_);
  Streams all;
  for (const auto& [address, call] : calls_) {
    if (call->method != Method::kDispatch || call->gone()) continue;
    ++all.count;
    all.waiting += call->waiting();
    all.open_rows = std::max(all.open_rows, call->open_rows());
  }
  return all;
}

int64_t Server::last_request_at() {
  const Lock lock(mutex_);
  return last_request_at_;
}

void Server::set_state(uint32_t state) {
  const Lock lock(mutex_);
  state_ = state;
}

void Server::set_serving(bool serving) {
  const Lock lock(mutex_);
  serving_ = serving;
  for (const auto& [address, call] : calls_) {
    if (call->method == Method::kHealthWatch && call->told >= 0) tell_watcher_of_health(call.get());
  }
}

void Server::close() {
  const Lock lock(mutex_);
  waiting_.close();
  wake_poller();
}

void Server::stop(double grace_s) {
  const std::lock_guard once(stopping_mutex_);
  if (server_ == nullptr) return;
  close();
  {
    const Lock lock(mutex_);
    stopping_ = true;
    const grpc::Status away(grpc::StatusCode::UNAVAILABLE, "replica " + settings_.replica_id + " is stopping");
    for (const auto& [address, call] : calls_) {
      if (call->method == Method::kDispatch) call->end(grpc::Status::OK);
      if (call->method != Method::kDispatch && call->method != Method::kOther) call->end(away);
    }
  }
  server_->Shutdown(std::chrono::system_clock::now() + std::chrono::microseconds(static_cast<int64_t>(grace_s * 1e6)));
  {
    const Lock lock(mutex_);
    open_ = false;
    queue_->Shutdown();
    watcher_wakes_.notify_all();
  }
  watcher_.join();
  const Lock lock(mutex_);
  calls_.clear();
  server_.reset();
}

}  // namespace expertmesh::server
