// Protobuf's wire format, as far as expertmesh/v1/expert.proto needs it, over bytes that lie in several gRPC slices.
//
// The reader copies nothing, never reads outside its slices and allocates nothing, whatever the bytes are. Fields it is
// not asked about are skipped, groups included, as protobuf's own parsers do.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace expertmesh {

using Slices = std::vector<grpc::Slice>;

/// A run of bytes in slices that outlive it.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(const Slices& slices) : slices_(slices.data()) {
    for (const auto& slice : slices) size_ += slice.size();
  }

  size_t size() const { return size_; }

  /// The bytes that lie together at the front: at least one unless the run is empty.
  const uint8_t* front(size_t* length) {
    if (size_ == 0) {
      *length = 0;
      return nullptr;
    }
    while (offset_ == slices_->size()) next_slice();
    *length = std::min(size_, slices_->size() - offset_);
    return slices_->begin() + offset_;
  }

  /// Drops `count` bytes, at most size(), from the front.
  void skip(size_t count) {
    size_ -= count;
    while (count > 0) {
      const size_t here = std::min(count, slices_->size() - offset_);
      offset_ += here;
      count -= here;
      if (count > 0) next_slice();
    }
  }

  /// Copies `count` bytes, at most size(), from the front and drops them.
  void copy(void* target, size_t count) {
    auto* out = static_cast<uint8_t*>(target);
    while (count > 0) {
      size_t here;
      const uint8_t* from = front(&here);
      here = std::min(here, count);
      std::memcpy(out, from, here);
      out += here;
      count -= here;
      skip(here);
    }
  }

  /// The first `count` bytes, at most size().
  Bytes first(size_t count) const {
    Bytes part = *this;
    part.size_ = count;
    return part;
  }

  std::string text() const {
    std::string all(size_, '\0');
    Bytes(*this).copy(all.data(), size_);
    return all;
  }

 private:
  void next_slice() {
    ++slices_;
    offset_ = 0;
  }

  const grpc::Slice* slices_ = nullptr;
  size_t offset_ = 0;
  size_t size_ = 0;
};

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kGroup = 3, kGroupEnd = 4, kFixed32 = 5 };

/// Steps through the fields of one message:
///   while (reader.next()) if (reader.is(3, kBytes)) ... reader.bytes() ...
///   if (!reader.ok()) the bytes are no protobuf message
class Reader {
 public:
  explicit Reader(Bytes bytes) : left_(bytes) {}

  /// Moves to the next field; false at the end, and where the bytes are malformed.
  bool next() {
    if (!ok_ || left_.size() == 0) return false;
    return ok_ = read_tag() && field_ != 0 && type_ != kGroupEnd && read_value();
  }

  bool ok() const { return ok_; }

  /// The present field's number and type; a known number with another type is to be treated as unknown.
  bool is(uint32_t field, WireType type) const { return field_ == field && type_ == type; }

  uint64_t varint() const { return value_; }
  uint32_t uint32() const { return static_cast<uint32_t>(value_); }
  float float32() const {
    const auto bits = static_cast<uint32_t>(value_);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  Bytes bytes() const { return bytes_; }

 private:
  static constexpr int kMaxGroupDepth = 100;
  /// Of tags and lengths, which have 32 bits.
  static constexpr int kMaxTagBytes = 5;

  bool read_tag() {
    uint64_t tag;
    if (!read_varint(&tag, kMaxTagBytes) || tag > UINT32_MAX) return false;
    field_ = static_cast<uint32_t>(tag >> 3);
    type_ = static_cast<WireType>(tag & 7);
    return true;
  }

  bool read_value() {
    switch (type_) {
      case kVarint:
        return read_varint(&value_);
      case kFixed64:
        return read_fixed(8);
      case kFixed32:
        return read_fixed(4);
      case kBytes:
        return read_bytes();
      case kGroup:
        return skip_group();
      default:
        return false;
    }
  }

  /// As protobuf's own parsers do, bits beyond 64 are dropped, and more than `max_bytes` bytes refused.
  bool read_varint(uint64_t* value, int max_bytes = 10) {
    *value = 0;
    for (int shift = 0; shift < 7 * max_bytes; shift += 7) {
      size_t length;
      const uint8_t* byte = left_.front(&length);
      if (length == 0) return false;
      const uint8_t bits = *byte;
      left_.skip(1);
      *value |= static_cast<uint64_t>(bits & 0x7f) << shift;
      if (bits < 0x80) return true;
    }
    return false;
  }

  bool read_fixed(size_t width) {
    if (left_.size() < width) return false;
    value_ = 0;
    left_.copy(&value_, width);  // little-endian on both sides
    return true;
  }

  bool read_bytes() {
    uint64_t length;
    if (!read_varint(&length, kMaxTagBytes) || length > left_.size()) return false;
    bytes_ = left_.first(length);
    left_.skip(length);
    return true;
  }

  /// Skips to the end of the group just begun; groups may nest, and field 0 may stand in them.
  bool skip_group() {
    uint32_t open[kMaxGroupDepth];
    int depth = 0;
    open[depth++] = field_;
    while (depth > 0) {
      if (!read_tag()) return false;
      if (type_ == kGroup) {
        if (depth == kMaxGroupDepth) return false;
        open[depth++] = field_;
      } else if (type_ == kGroupEnd) {
        if (field_ != open[--depth]) return false;
      } else if (!read_value()) {
        return false;
      }
    }
    type_ = kGroup;
    return true;
  }

  Bytes left_;
  Bytes bytes_;
  uint64_t value_ = 0;
  uint32_t field_ = 0;
  WireType type_ = kVarint;
  bool ok_ = true;
};

inline size_t varint_size(uint64_t value) {
  size_t size = 1;
  while (value >= 0x80) {
    value >>= 7;
    ++size;
  }
  return size;
}

/// Appends fields to a header; what is zero is left out, as in proto3. The bytes of large fields are put behind the
/// header by who builds the slice.
class Writer {
 public:
  void varint(uint32_t field, uint64_t value) {
    if (value == 0) return;
    raw_varint(field << 3 | kVarint);
    raw_varint(value);
  }

  void float32(uint32_t field, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (bits != 0) fixed32(field, bits);
  }

  /// An optional field: zero is written too.
  void fixed32(uint32_t field, uint32_t value) {
    raw_varint(field << 3 | kFixed32);
    raw(&value, sizeof value);
  }

  void bytes(uint32_t field, const void* data, size_t size) {
    bytes_header(field, size);
    raw(data, size);
  }

  /// A field of `size` bytes that the caller appends.
  void bytes_header(uint32_t field, size_t size) {
    raw_varint(field << 3 | kBytes);
    raw_varint(size);
  }

  void message(uint32_t field, const Writer& message) { bytes(field, message.data_.data(), message.data_.size()); }

  /// A field of type Tensor up to its data, which the caller appends.
  void tensor_header(uint32_t field, uint32_t dtype, uint32_t rows, uint32_t width, size_t data_size) {
    Writer inner;
    inner.varint(1, dtype);
    inner.varint(2, rows);
    inner.varint(3, width);
    inner.bytes_header(4, data_size);
    bytes_header(field, inner.data_.size() + data_size);
    raw(inner.data_.data(), inner.data_.size());
  }

  void raw(const void* data, size_t size) { data_.append(static_cast<const char*>(data), size); }

  void clear() { data_.clear(); }
  const std::string& data() const { return data_; }

 private:
  void raw_varint(uint64_t value) {
    while (value >= 0x80) {
      data_.push_back(static_cast<char>(value | 0x80));
      value >>= 7;
    }
    data_.push_back(static_cast<char>(value));
  }

  std::string data_;
};

}  // namespace expertmesh
