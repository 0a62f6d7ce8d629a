"""Engines that run the trunk, besides vLLM (`router_service.vllm_plugin`)."""
