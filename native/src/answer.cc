#include "answer.h"

namespace expertmesh {
namespace {

bool parse_status(Bytes bytes, Answer* answer) {
  Reader reader(bytes);
  while (reader.next()) {
    if (reader.is(1, kVarint)) answer->code = reader.uint32();
    if (reader.is(2, kBytes)) answer->message = reader.bytes().text();
  }
  return reader.ok();
}

bool parse_output(Bytes bytes, Answer* answer) {
  Reader reader(bytes);
  while (reader.next()) {
    if (reader.is(1, kVarint)) answer->dtype = reader.uint32();
    if (reader.is(2, kVarint)) answer->rows = reader.uint32();
    if (reader.is(3, kVarint)) answer->width = reader.uint32();
    if (reader.is(4, kBytes)) answer->output = reader.bytes();
  }
  return reader.ok();
}

bool parse_timings(Bytes bytes, Answer* answer) {
  Reader reader(bytes);
  while (reader.next()) {
    if (reader.is(1, kVarint)) answer->queue_us = reader.uint32();
    if (reader.is(2, kVarint)) answer->compute_us = reader.uint32();
  }
  return reader.ok();
}

bool parse_load(Bytes bytes, Answer* answer) {
  Reader reader(bytes);
  while (reader.next()) {
    if (reader.is(1, kVarint)) answer->queued_rows = reader.uint32();
  }
  return reader.ok();
}

}  // namespace

bool parse_answer(const Slices& slices, Answer* answer) {
  Reader reader{Bytes(slices)};
  bool ok = true;
  while (ok && reader.next()) {
    if (reader.is(1, kVarint)) answer->id = reader.varint();
    if (reader.is(2, kBytes)) ok = parse_status(reader.bytes(), answer);
    if (reader.is(3, kBytes)) ok = parse_output(reader.bytes(), answer);
    if (reader.is(4, kBytes)) ok = parse_timings(reader.bytes(), answer);
    if (reader.is(5, kBytes)) ok = parse_load(reader.bytes(), answer);
    if (reader.is(6, kFixed32)) answer->checksum = reader.uint32();
  }
  return ok && reader.ok();
}

}  // namespace expertmesh
