#include <absl/synchronization/mutex.h>
#include <grpc/support/log.h>

#include <cstdlib>

#include "bindings.h"

NB_MODULE(_core, module) {
  nanobind::set_leak_warnings(false);  // what a daemon thread still holds at exit is no news to users
  // a peer that goes away is reported by whoever used it
  if (std::getenv("GRPC_VERBOSITY") == nullptr) gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
  // Debian's abseil looks for deadlocks at every lock of gRPC's, which costs some microseconds per message
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  bind_client(module);
  bind_server(module);
  bind_topk(module);
  bind_experts(module);
}
