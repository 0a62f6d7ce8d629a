"""A deployment on Kubernetes: KubeRay's RayService, read and patched with the official client. `bounds`, `serve_text`,
`groups`, `service` and `progress` are pure; the rest calls the API server."""
