#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bindings.h"
#include "client.h"

namespace nb = nanobind;
using namespace expertmesh;

namespace {

Rows make_rows(uintptr_t data, size_t tokens, size_t width, uint32_t dtype) {
  if (!is_floating(dtype)) throw std::invalid_argument("hidden states of a type that is not on the wire");
  return {reinterpret_cast<const void*>(data), tokens, width, dtype};
}

std::shared_ptr<Client> make_client(std::vector<std::pair<std::string, int>> channel_options, std::string fingerprint,
                                    double timeout_s, std::string server_name, bool checksums) {
  ClientOptions options;
  options.channel = std::move(channel_options);
  options.fingerprint = std::move(fingerprint);
  options.timeout_us = static_cast<uint64_t>(timeout_s * 1e6);
  options.server_name = std::move(server_name);
  options.checksums = checksums;
  return std::make_shared<Client>(std::move(options));
}

int open(Client& client, const std::string& address, const std::string& replica, size_t max_rows,
         std::map<uint32_t, std::vector<uint32_t>> experts,
         const std::optional<std::tuple<nb::bytes, nb::bytes, nb::bytes>>& pem) {
  std::optional<Tls> tls;
  if (pem) {
    const auto text = [](const nb::bytes& bytes) { return std::string(bytes.c_str(), bytes.size()); };
    tls = Tls{text(std::get<0>(*pem)), text(std::get<1>(*pem)), text(std::get<2>(*pem))};
  }
  return client.open(address, replica, max_rows, std::move(experts), tls);
}

std::shared_ptr<Step> scatter(Client& client, uint32_t layer, uintptr_t hidden_states, size_t tokens, size_t width,
                              uint32_t dtype, uintptr_t topk_ids, size_t id_bytes, uintptr_t topk_weights,
                              size_t top_k) {
  if (id_bytes != 4 && id_bytes != 8) throw std::invalid_argument("ids of neither 4 nor 8 bytes");
  const Routing routing{reinterpret_cast<const void*>(topk_ids), id_bytes,
                        reinterpret_cast<const float*>(topk_weights), top_k};
  return client.scatter(layer, make_rows(hidden_states, tokens, width, dtype), routing);
}

template <typename T>
std::vector<T> from_bytes(const nb::bytes& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.c_str(), values.size() * sizeof(T));
  return values;
}

template <typename T>
nb::bytes to_bytes(const std::vector<T>& values) {
  return nb::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

/// (stream, replica, rows int64, pair_rows int32, pair_experts int32, pair_weights float32)
using PartBytes = std::tuple<int, std::string, nb::bytes, nb::bytes, nb::bytes, nb::bytes>;

std::shared_ptr<Step> send(Client& client, uint32_t layer, uintptr_t hidden_states, size_t tokens, size_t width,
                           uint32_t dtype, const std::vector<PartBytes>& columns) {
  std::vector<Part> parts;
  for (const auto& [stream, replica, rows, pair_rows, pair_experts, pair_weights] : columns) {
    Part part;
    part.stream = stream;
    part.replica = replica;
    part.rows = from_bytes<int64_t>(rows);
    part.pair_rows = from_bytes<int32_t>(pair_rows);
    part.pair_experts = from_bytes<int32_t>(pair_experts);
    part.pair_weights = from_bytes<float>(pair_weights);
    for (const int64_t row : part.rows) {
      if (row < 0 || static_cast<size_t>(row) >= tokens) throw std::out_of_range("a row that the hidden states lack");
    }
    parts.push_back(std::move(part));
  }
  return client.send(layer, make_rows(hidden_states, tokens, width, dtype), std::move(parts));
}

nb::list parts_of(const Step& step) {
  const auto lock = step.lock();
  nb::list parts;
  for (const Part& part : step.parts) {
    parts.append(nb::make_tuple(part.replica, to_bytes(part.rows), to_bytes(part.pair_rows),
                                to_bytes(part.pair_experts), to_bytes(part.pair_weights), part.answer.code,
                                nb::bytes(part.answer.message.data(), part.answer.message.size()),
                                part.round_trip_ns / 1000, part.answer.queue_us, part.answer.compute_us,
                                part.answered));
  }
  return parts;
}

nb::tuple unserved_of(const Step& step) {
  return nb::make_tuple(to_bytes(step.unserved.tokens), to_bytes(step.unserved.experts),
                        to_bytes(step.unserved.weights));
}

nb::list events_of(Client& client) {
  nb::list events;
  for (const auto& event : client.events()) {
    nb::object reason = nb::none();
    if (!event.open) reason = nb::bytes(event.reason.data(), event.reason.size());
    events.append(nb::make_tuple(event.stream, reason));
  }
  return events;
}

nb::dict timings_of(Client& client) {
  nb::dict layers;
  for (const auto& [layer, t] : client.timings()) {
    layers[nb::int_(layer)] = nb::make_tuple(t.steps, t.messages, t.rows, t.scatter_ns / 1000, t.wait_ns / 1000,
                                             t.combine_ns / 1000, t.round_trip_ns / 1000, t.queue_us, t.compute_us);
  }
  return layers;
}

nb::tuple load_of(Client& client, int stream) {
  const auto load = client.load(stream);
  return nb::make_tuple(load.queued_rows, load.rows_under_way, load.rows_sent);
}

/// counts: (expert, rows) with ascending experts; candidates: (experts, rows, sent) in the order of their names.
std::vector<int32_t> choose_owners(const std::vector<std::pair<uint32_t, int64_t>>& counts,
                                   const std::vector<std::tuple<std::vector<uint32_t>, int64_t, uint64_t>>& made) {
  Coverage coverage;
  std::vector<CandidateLoad> loads;
  for (const auto& [experts, rows, sent] : made) {
    for (const uint32_t expert : experts) {
      if (expert >= coverage.size()) coverage.resize(expert + 1);
      coverage[expert].push_back(static_cast<uint32_t>(loads.size()));
    }
    loads.push_back({rows, sent});
  }
  std::vector<uint32_t> experts;
  std::vector<int64_t> rows_of;
  for (const auto& [expert, rows] : counts) {
    experts.push_back(expert);
    rows_of.push_back(rows);
  }
  std::vector<int32_t> owners;
  choose(coverage, experts, rows_of, loads, owners);
  return owners;
}

}  // namespace

void bind_client(nb::module_& module) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Latency>(module, "Latency")
      .def(nb::init<>())
      .def("note", &Latency::note)
      .def("late_after", &Latency::late_after);
  nb::class_<Step>(module, "Step")
      .def("wait", &Step::wait, Release())
      .def("late_after_us", &Step::late_after_us)
      .def("gather", [](Step& step, uintptr_t out) { return step.gather(reinterpret_cast<void*>(out)); }, Release())
      .def("parts", &parts_of)
      .def("unserved", &unserved_of)
      .def("copy_output",
           [](const Step& step, size_t part, uintptr_t out) { step.copy_output(part, reinterpret_cast<void*>(out)); });
  nb::class_<Client>(module, "Client")
      .def(nb::new_(&make_client))
      .def("event_fd", &Client::event_fd)
      .def("events", &events_of)
      .def("open", &open, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
      .def("close_stream", &Client::close_stream)
      .def("use", &Client::use)
      .def("load", &load_of)
      .def("scatter", &scatter)
      .def("send", &send)
      .def("timings", &timings_of)
      .def("close", &Client::close, Release());
  module.def("choose_owners", &choose_owners);
}
