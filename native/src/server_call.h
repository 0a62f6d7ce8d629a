// One call of a client, whatever its method: reads one message at a time, writes answers in the order they were given.
#pragma once

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <deque>
#include <string>

#include "protobuf.h"

namespace expertmesh::server {

enum class Method { kDispatch, kDescribe, kHealthCheck, kHealthWatch, kReflection, kOther };

/// The server's lock guards all of it. gRPC allows one read and one write at a time; each operation under way is known
/// to the completion queue by the address of a Tag in here, so that a call must stay until `over()`.
class Call {
 public:
  enum class Operation { kAccept, kDone, kRead, kWrite, kExchange, kFinish };
  struct Tag {
    Call* call;
    Operation operation;
  };

  /// No operation is begun once `*open` is false: the completion queue takes none any more.
  explicit Call(const bool* open) : open_(open) { context.AsyncNotifyWhenDone(&done_); }

  Tag* accept_tag() { return &accept_; }

  /// A caller that leaves more rows than this unread is not read from either.
  void limit_open_rows(uint64_t rows) { max_open_rows_ = rows; }

  void read() {
    if (reading_ || gone_ || ending_ || !*open_) return;
    if (open_rows_ > max_open_rows_) {
      paused_ = true;
      return;
    }
    reading_ = true;
    rpc_.Read(&received_, &read_);
  }

  /// Reads once what is waiting has been answered, in one operation with the last answer: gRPC announces the room for
  /// the next message in a packet of its own where it is asked for that message alone, and that wakes the caller.
  void read_with_answer() { read_deferred_ = true; }

  /// Reads at once what was to be read later.
  void read_deferred() {
    if (!read_deferred_) return;
    read_deferred_ = false;
    read();
  }

  /// A request of `rows` rows came, and will be answered.
  void expect(uint32_t rows) {
    ++waiting_;
    open_rows_ += cost(rows);
  }

  /// Answers a request that was expected.
  void answer(const grpc::ByteBuffer& message, uint32_t rows, uint64_t now) {
    --waiting_;
    if (may_exchange()) {
      exchange(message, cost(rows));
      exchanged_at_ = now;
    } else {
      send(message, cost(rows));
      if (waiting_ == 0) read_deferred();
    }
    if (half_closed_ && waiting_ == 0) end(grpc::Status::OK);
  }

  void send(const grpc::ByteBuffer& message, uint64_t cost = 0) {
    if (gone_ || ending_) return;
    unsent_.push_back({message, cost});
    write_next();
  }

  /// Ends the call once what is already answered has been sent.
  void end(const grpc::Status& status) {
    if (gone_ || ending_) return;
    ending_ = true;
    status_ = status;
    write_next();
  }

  /// The caller will send no more; what was asked is still answered.
  void half_close() {
    half_closed_ = true;
    if (waiting_ == 0) end(grpc::Status::OK);
  }

  void on_accept() { started_ = true; }

  void on_done() {
    started_ = false;
    leave();
  }

  /// The message that was read; false at the end of the caller's messages.
  bool on_read(bool ok, Slices* message) {
    reading_ = false;
    if (!ok) return false;
    const bool whole = received_.Dump(message).ok();
    received_.Clear();
    return whole;
  }

  void on_write(bool ok) {
    writing_ = false;
    if (!ok) {
      leave();
      return;
    }
    if (unsent_.empty()) return;
    open_rows_ -= unsent_.front().cost;
    unsent_.pop_front();
    write_next();
    if (paused_ && open_rows_ <= max_open_rows_) {
      paused_ = false;
      read();
    }
  }

  /// As on_read: the answer is away, and a message or the end of messages came.
  bool on_exchange(bool ok, Slices* message) {
    on_write(true);
    return on_read(ok, message);
  }

  /// Of the last exchange, on the clock of who called answer().
  uint64_t exchanged_at() const { return exchanged_at_; }

  void on_finish() { finishing_ = false; }

  /// Nobody waits for its answers any more.
  bool gone() const { return gone_; }
  /// Nothing is under way that names it.
  bool over() const { return !started_ && !reading_ && !writing_ && !finishing_; }
  bool reading() const { return reading_; }
  size_t waiting() const { return waiting_; }
  uint64_t open_rows() const { return open_rows_; }

  grpc::GenericServerContext context;
  grpc::GenericServerAsyncReaderWriter* rpc() { return &rpc_; }
  Method method = Method::kOther;
  /// Of a health watch: the service it asks about, and what it was told last.
  std::string watched;
  int told = -1;

 private:
  struct Answer {
    grpc::ByteBuffer message;
    uint64_t cost;
  };

  /// One row at least for each request, so that none is free.
  static uint64_t cost(uint32_t rows) { return rows > 0 ? rows : 1; }

  void write_next() {
    if (writing_ || gone_ || !*open_) return;
    if (!unsent_.empty()) {
      writing_ = begun_ = true;
      rpc_.Write(unsent_.front().message, &write_);
    } else if (ending_) {
      finishing_ = true;
      gone_ = true;
      rpc_.Finish(status_, &finish_);
    }
  }

  /// The first answer goes alone, since grpc++ sends the call's metadata with it.
  bool may_exchange() const {
    return read_deferred_ && waiting_ == 0 && begun_ && !half_closed_ && !reading_ && !writing_ && unsent_.empty() &&
           !gone_ && !ending_ && *open_ && open_rows_ <= max_open_rows_;
  }

  void exchange(const grpc::ByteBuffer& message, uint64_t cost) {
    read_deferred_ = false;
    reading_ = writing_ = true;
    unsent_.push_back({message, cost});
    grpc::internal::Call call(context.c_call(), &hook_, nullptr);
    if (!exchange_.SendMessage(message).ok()) return leave();
    exchange_.RecvMessage(&received_);
    exchange_.set_output_tag(&exchanged_);
    exchange_.FillOps(&call);
  }

  void leave() {
    gone_ = true;
    unsent_.clear();
  }

  /// grpc++ has no public way to send and receive in one operation; this is how its own streams begin theirs.
  struct Hook final : grpc::internal::CallHook {
    void PerformOpsOnCall(grpc::internal::CallOpSetInterface* operations, grpc::internal::Call* call) override {
      operations->FillOps(call);
    }
  };

  grpc::GenericServerAsyncReaderWriter rpc_{&context};
  Hook hook_;
  grpc::internal::CallOpSet<grpc::internal::CallOpSendMessage, grpc::internal::CallOpRecvMessage<grpc::ByteBuffer>>
      exchange_;
  grpc::ByteBuffer received_;
  std::deque<Answer> unsent_;
  grpc::Status status_;
  const bool* const open_;
  uint64_t max_open_rows_ = UINT64_MAX;
  uint64_t open_rows_ = 0;
  uint64_t exchanged_at_ = 0;
  size_t waiting_ = 0;
  bool started_ = false, reading_ = false, writing_ = false, finishing_ = false;
  bool read_deferred_ = false, begun_ = false;
  bool paused_ = false, half_closed_ = false, ending_ = false, gone_ = false;
  Tag accept_{this, Operation::kAccept}, done_{this, Operation::kDone}, read_{this, Operation::kRead},
      write_{this, Operation::kWrite}, exchanged_{this, Operation::kExchange}, finish_{this, Operation::kFinish};
};

}  // namespace expertmesh::server
