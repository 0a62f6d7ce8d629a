{{/* Ray's own ports, all fixed, so that network policies can name them. */}}
{{- define "expertmesh.rayPorts" -}}
{"gcs": 6379, "dashboard": 8265, "metrics": 8080, "agent": 52365, "agentGrpc": 52366, "runtimeEnvAgent": 52367, "nodeManager": 52368, "objectManager": 52369, "client": 10001, "minWorker": 10002, "maxWorker": 19999, "autoscalerMetrics": 44217, "dashboardMetrics": 44227}
{{- end -}}

{{/* What `ray start` of every node is told. */}}
{{- define "expertmesh.rayStartParams" -}}
{{- $ports := include "expertmesh.rayPorts" . | fromJson -}}
dashboard-agent-grpc-port: {{ $ports.agentGrpc | quote }}
dashboard-agent-listen-port: {{ $ports.agent | quote }}
max-worker-port: {{ $ports.maxWorker | quote }}
metrics-export-port: {{ $ports.metrics | quote }}
min-worker-port: {{ $ports.minWorker | quote }}
node-manager-port: {{ $ports.nodeManager | quote }}
object-manager-port: {{ $ports.objectManager | quote }}
runtime-env-agent-port: {{ $ports.runtimeEnvAgent | quote }}
{{- end -}}
