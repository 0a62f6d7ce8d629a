// What Python sees: each half binds its own classes.
#pragma once

#include <nanobind/nanobind.h>

void bind_client(nanobind::module_& module);
void bind_server(nanobind::module_& module);
void bind_topk(nanobind::module_& module);
void bind_experts(nanobind::module_& module);
