// The least that a round trip takes here: C++ gRPC's generic streams, with no work of ours at either end, beside TCP.
//
// floor ROUNDS CALLS REQUEST:ANSWER ...   bytes to and from each replica, of which each is a process of its own. The
// caller has the first core, replicas take turns from the second on, as in `python -m benchmarks dispatch`.
#include <arpa/inet.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Sizes {
  size_t request, answer;
};

void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

void bind_to_core(size_t number) {
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) fail("sched_getaffinity");
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &allowed)) cores.push_back(core);
  CPU_ZERO(&one);
  CPU_SET(cores[number % cores.size()], &one);
  if (sched_setaffinity(0, sizeof one, &one)) fail("sched_setaffinity");
}

void exchange(ssize_t (*move)(int, void*, size_t), int socket, char* bytes, size_t count) {
  while (count) {
    const ssize_t moved = move(socket, bytes, count);
    if (moved <= 0) std::exit(0);  // the caller has gone
    bytes += moved;
    count -= moved;
  }
}

ssize_t take(int socket, void* into, size_t count) { return ::recv(socket, into, count, 0); }
ssize_t give(int socket, void* from, size_t count) { return ::send(socket, from, count, MSG_NOSIGNAL); }

void no_delay(int socket) {
  const int on = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

grpc::ByteBuffer buffer_of(const std::string& bytes) {
  grpc::Slice slice(bytes.data(), bytes.size(), grpc::Slice::STATIC_SLICE);
  return grpc::ByteBuffer(&slice, 1);
}

// Answers one stream for ever. The next message is asked for before the answer is written, as expertmesh does.
void serve_grpc(grpc::ServerCompletionQueue* queue, grpc::AsyncGenericService* service, const std::string& answer) {
  grpc::GenericServerContext context;
  grpc::GenericServerAsyncReaderWriter rpc(&context);
  grpc::ByteBuffer request;
  void* const accepted = &context;
  void* const read = &request;
  void* const written = &rpc;
  service->RequestCall(&context, &rpc, queue, queue, accepted);
  void* tag;
  bool ok;
  while (queue->Next(&tag, &ok)) {
    if (!ok) std::exit(0);
    if (tag == accepted) rpc.Read(&request, read);
    if (tag == read) {
      request.Clear();
      rpc.Read(&request, read);
      rpc.Write(buffer_of(answer), written);
    }
  }
}

[[noreturn]] void be_replica(size_t number, Sizes sizes, int ports_to) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  bind_to_core(number + 1);
  const std::string answer(sizes.answer, 'a');
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = loopback(0);
  socklen_t length = sizeof address;
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), length) || listen(listener, 1)) fail("listen");
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length);
  int ports[2] = {ntohs(address.sin_port), 0};
  grpc::AsyncGenericService service;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &ports[1]);
  builder.RegisterAsyncGenericService(&service);
  builder.SetMaxReceiveMessageSize(-1);
  auto queue = builder.AddCompletionQueue();
  auto server = builder.BuildAndStart();
  std::thread([&] { serve_grpc(queue.get(), &service, answer); }).detach();
  if (write(ports_to, ports, sizeof ports) != sizeof ports) fail("write");
  const int caller = accept(listener, nullptr, nullptr);
  no_delay(caller);
  std::string request(sizes.request, 0), back = answer;
  for (;;) {
    exchange(take, caller, request.data(), request.size());
    exchange(give, caller, back.data(), back.size());
  }
}

struct Replica {
  Sizes sizes;
  std::string request, answer;
  int tcp;
  grpc::ClientContext context;
  std::unique_ptr<grpc::GenericStub> stub;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> rpc;
  grpc::ByteBuffer received;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

double microseconds(int calls, const std::function<void()>& call) {
  std::vector<double> each;
  for (int one = 0; one < calls; ++one) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    each.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  return median(std::move(each));
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "floor ROUNDS CALLS REQUEST:ANSWER ...\n");
    return 2;
  }
  const int rounds = std::atoi(arguments[1]), calls = std::atoi(arguments[2]);
  std::vector<Sizes> all;
  std::vector<int> ports_of;
  for (int number = 3; number < count; ++number) {
    Sizes sizes{};
    if (std::sscanf(arguments[number], "%zu:%zu", &sizes.request, &sizes.answer) != 2) {
      std::fprintf(stderr, "floor: %s is not REQUEST:ANSWER\n", arguments[number]);
      return 2;
    }
    all.push_back(sizes);
    int ends[2];
    if (pipe(ends)) fail("pipe");
    // before anything of gRPC's runs here: its threads do not survive a fork
    const pid_t child = fork();
    if (child < 0) fail("fork");
    if (!child) be_replica(number - 3, sizes, ends[1]);
    ports_of.push_back(ends[0]);
  }
  bind_to_core(0);
  grpc::CompletionQueue queue;
  const auto next = [&] {
    void* tag;
    bool ok;
    if (!queue.Next(&tag, &ok) || !ok) {
      std::fprintf(stderr, "floor: a stream broke\n");
      std::exit(1);
    }
  };
  std::vector<std::unique_ptr<Replica>> replicas;
  for (size_t number = 0; number < all.size(); ++number) {
    int ports[2];
    if (read(ports_of[number], ports, sizeof ports) != sizeof ports) fail("a replica ended");
    auto one = std::make_unique<Replica>();
    one->sizes = all[number];
    one->request.assign(one->sizes.request, 'r');
    one->answer.assign(one->sizes.answer, 0);
    one->tcp = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = loopback(ports[0]);
    if (connect(one->tcp, reinterpret_cast<sockaddr*>(&address), sizeof address)) fail("connect");
    no_delay(one->tcp);
    grpc::ChannelArguments options;
    options.SetMaxReceiveMessageSize(-1);
    options.SetInt("grpc.use_local_subchannel_pool", 1);
    one->stub = std::make_unique<grpc::GenericStub>(grpc::CreateCustomChannel(
        "127.0.0.1:" + std::to_string(ports[1]), grpc::InsecureChannelCredentials(), options));
    one->rpc = one->stub->PrepareCall(&one->context, "/benchmarks.Echo/Exchange", &queue);
    one->rpc->StartCall(nullptr);
    next();
    replicas.push_back(std::move(one));
  }
  const auto by_tcp = [&] {
    for (auto& one : replicas) exchange(give, one->tcp, one->request.data(), one->request.size());
    for (auto& one : replicas) exchange(take, one->tcp, one->answer.data(), one->answer.size());
  };
  const auto by_grpc = [&] {
    for (auto& one : replicas) {
      one->received.Clear();
      one->rpc->Read(&one->received, nullptr);
      one->rpc->Write(buffer_of(one->request), nullptr);
    }
    for (size_t events = 0; events < 2 * replicas.size(); ++events) next();
  };
  std::vector<double> tcp, grpc_times, ratios;
  for (int round = -1; round < rounds; ++round) {
    const double plain = microseconds(calls, by_tcp), streamed = microseconds(calls, by_grpc);
    if (round < 0) continue;  // a warm-up
    tcp.push_back(plain);
    grpc_times.push_back(streamed);
    ratios.push_back(streamed / plain);
  }
  std::printf("{\"replicas\": %zu, \"tcp_us_p50\": %.0f, \"grpc_us_p50\": %.0f, \"ratio_to_tcp_p50\": %.2f}\n",
              replicas.size(), median(tcp), median(grpc_times), median(ratios));
  std::fflush(stdout);
  std::_Exit(0);
}
