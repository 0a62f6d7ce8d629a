#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "server.h"

namespace nb = nanobind;
using expertmesh::server::Buffers;
using expertmesh::server::LoadMeter;
using expertmesh::server::Server;
using expertmesh::server::Settings;
using expertmesh::server::Taken;
using expertmesh::server::Tls;
using expertmesh::server::Turns;

namespace {

std::string text(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

/// May be copied and dropped on threads that do not hold the GIL.
std::shared_ptr<nb::callable> share(nb::callable call) {
  return {new nb::callable(std::move(call)), [](nb::callable* dropped) {
            const nb::gil_scoped_acquire gil;
            delete dropped;
          }};
}

std::function<std::optional<std::string>(const std::string&)> make_reflect(nb::callable call) {
  return [shared = share(std::move(call))](const std::string& message) -> std::optional<std::string> {
    const nb::gil_scoped_acquire gil;
    try {
      const nb::object answer = (*shared)(nb::bytes(message.data(), message.size()));
      if (answer.is_none()) return std::nullopt;
      return text(nb::cast<nb::bytes>(answer));
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("reflection");
      return std::nullopt;
    }
  };
}

expertmesh::server::ReadTls make_read_tls(nb::callable call) {
  return [shared = share(std::move(call))]() -> std::optional<Tls> {
    const nb::gil_scoped_acquire gil;
    try {
      const auto [ca, certificate, key] = nb::cast<std::tuple<nb::bytes, nb::bytes, nb::bytes>>((*shared)());
      return Tls{text(ca), text(certificate), text(key)};
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("security.tls");
      return std::nullopt;
    }
  };
}

/// A numpy array over memory that lives as long as the array.
template <typename T>
nb::object view(const std::shared_ptr<Buffers>& owner, T* values, size_t count) {
  const nb::capsule keeper(new std::shared_ptr<Buffers>(owner),
                           [](void* kept) noexcept { delete static_cast<std::shared_ptr<Buffers>*>(kept); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(values, {count}, keeper));
}

class PythonServer : public Server {
 public:
  using Server::Server;

  nb::object take_tuple() {
    std::optional<Taken> taken;
    {
      const nb::gil_scoped_release released;
      taken = take();
    }
    if (!taken) return nb::none();
    return nb::make_tuple(taken->layer, taken->rows, taken->pairs, taken->dtype, buffers_version());
  }

  nb::tuple buffer_arrays() {
    const auto all = buffers();
    const size_t pairs = all->rows.size();
    return nb::make_tuple(view(all, all->hidden_states.get(), all->hidden_bytes),
                          view(all, all->rows.data(), pairs), view(all, all->experts.data(), pairs),
                          view(all, all->weights.data(), pairs));
  }
};

/// What the server records of a batch whose requests came at `arrived`, `times` over; for tests and benchmarks.
void record(LoadMeter& meter, int64_t now, uint32_t layer, const std::vector<int64_t>& arrived,
            const std::vector<int32_t>& experts, uint32_t rows, uint32_t times) {
  for (uint32_t i = 0; i < times; ++i) {
    meter.waits.took(now);
    for (const int64_t at : arrived) meter.waits.add(now, expertmesh::server::microseconds(now - at));
    meter.begin(now);
    meter.end(now, rows);
    meter.count(layer, experts);
  }
}

}  // namespace

void bind_server(nb::module_& module) {
  nb::class_<Turns>(module, "Turns")
      .def(nb::init<>())
      .def("rows_of", &Turns::rows_of)
      .def("callers_with", &Turns::callers_with)
      .def("join", &Turns::join)
      .def("leave", &Turns::leave)
      .def("advance", &Turns::advance, nb::arg().none());
  module.def("may_wait", &expertmesh::server::may_wait);
  nb::class_<LoadMeter>(module, "LoadMeter")
      .def(
          "__init__",
          [](LoadMeter* meter, const std::map<uint32_t, size_t>& experts_per_layer, int64_t now) {
            new (meter) LoadMeter(now);
            for (const auto& [layer, experts] : experts_per_layer) meter->add_layer(layer, experts);
          },
          nb::arg("experts_per_layer"), nb::arg("now"))
      .def("record", &record, nb::arg("now"), nb::arg("layer"), nb::arg("arrived"), nb::arg("experts"), nb::arg("rows"),
           nb::arg("times") = 1)
      .def(
          "queue_wait",
          [](const LoadMeter& meter, int64_t now, int64_t oldest) { return meter.waits.quantiles(now, oldest); },
          nb::arg("now"), nb::arg("oldest"));
  nb::class_<PythonServer>(module, "Server")
      .def(
          "__init__",
          [](PythonServer* server, std::string replica_id, std::string group, std::string fingerprint,
             uint32_t hidden_size, const std::map<uint32_t, nb::bytes>& held, std::string layers_text,
             uint32_t max_rows, uint32_t max_pairs, uint64_t max_queued_rows, uint64_t max_batch_rows,
             const nb::bytes& description, nb::callable reflect, std::vector<std::pair<std::string, int>> options,
             std::optional<nb::callable> tls) {
            Settings settings;
            settings.replica_id = std::move(replica_id);
            settings.group = std::move(group);
            settings.fingerprint = std::move(fingerprint);
            for (const auto& [layer, mask] : held) settings.served.held[layer] = text(mask);
            settings.served.hidden_size = hidden_size;
            settings.served.layers_text = std::move(layers_text);
            settings.served.max_rows = max_rows;
            settings.served.max_pairs = max_pairs;
            settings.max_queued_rows = max_queued_rows;
            settings.max_batch_rows = max_batch_rows;
            settings.description = text(description);
            settings.reflect = make_reflect(std::move(reflect));
            settings.options = std::move(options);
            if (tls) settings.tls = make_read_tls(std::move(*tls));
            new (server) PythonServer(std::move(settings));
          },
          nb::kw_only(), nb::arg("replica_id"), nb::arg("group"), nb::arg("fingerprint"), nb::arg("hidden_size"),
          nb::arg("held"), nb::arg("layers_text"), nb::arg("max_rows"), nb::arg("max_pairs"),
          nb::arg("max_queued_rows"), nb::arg("max_batch_rows"), nb::arg("description"), nb::arg("reflect"),
          nb::arg("options"), nb::arg("tls").none())
      .def("listen", &PythonServer::listen, nb::arg("host"), nb::arg("first"), nb::arg("last"),
           nb::call_guard<nb::gil_scoped_release>())
      .def("compute_with", &PythonServer::compute_with, nb::arg("computation").none())
      .def("take", &PythonServer::take_tuple)
      .def("buffers", &PythonServer::buffer_arrays)
      .def(
          "reply",
          [](PythonServer& server, uintptr_t address, uint32_t dtype) {
            server.reply(reinterpret_cast<const void*>(address), dtype);
          },
          nb::arg("address"), nb::arg("dtype"))
      .def("fail", &PythonServer::fail, nb::arg("message"))
      .def("close", &PythonServer::close)
      .def("stop", &PythonServer::stop, nb::arg("grace_s"), nb::call_guard<nb::gil_scoped_release>())
      .def("set_state", &PythonServer::set_state, nb::arg("state"))
      .def("set_serving", &PythonServer::set_serving, nb::arg("serving"))
      .def("load",
           [](PythonServer& server) {
             const auto load = server.load();
             return nb::make_tuple(load.queued_rows, load.busy, load.rows_total, load.rows_per_s);
           })
      .def("expert_rows", &PythonServer::expert_rows)
      .def("queue_wait", &PythonServer::queue_wait)
      .def("streams",
           [](PythonServer& server) {
             const auto streams = server.streams();
             return nb::make_tuple(streams.waiting, streams.count, streams.open_rows);
           })
      .def("last_request_at", [](PythonServer& server) { return 1e-9 * static_cast<double>(server.last_request_at()); });
}
