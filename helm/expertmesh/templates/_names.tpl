{{/* Names and labels. */}}

{{- define "expertmesh.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name -}}
{{- end -}}
{{- end -}}

{{/* Without the chart's version: KubeRay would take a new one on a pod for another cluster. */}}
{{- define "expertmesh.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: expertmesh
{{- end -}}

{{/* Of objects that are no Ray pods. KubeRay's head service selects pods by app.kubernetes.io/name: they keep its own. */}}
{{- define "expertmesh.labels" -}}
{{ include "expertmesh.selectorLabels" . }}
app.kubernetes.io/name: expertmesh
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "expertmesh.chartLabels" -}}
{{ include "expertmesh.labels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "expertmesh.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- $gpus := int64 .Values.router.gpu.count -}}
{{- range .Values.expertPools -}}
{{- $gpus = add $gpus (int64 (dig "gpu" "count" 0 .)) -}}
{{- end -}}
{{- $built := printf "%s-%s" .Chart.AppVersion (ternary "gpu" "cpu" (gt $gpus 0)) -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default $built) -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.headAccount" -}}
{{- .Values.serviceAccount.headName | default (printf "%s-head" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.workerAccount" -}}
{{- .Values.serviceAccount.workerName | default (printf "%s-worker" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.rebalancerAccount" -}}
{{- printf "%s-rebalancer" (include "expertmesh.fullname" .) -}}
{{- end -}}

{{- define "expertmesh.authSecret" -}}
{{- .Values.ray.authSecret | default (printf "%s-ray-auth" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.apiKeysSecret" -}}
{{- .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.testKeySecret" -}}
{{- if .Values.apiKeys.testSecret -}}
{{- .Values.apiKeys.testSecret -}}
{{- else if not .Values.apiKeys.existingSecret -}}
{{- printf "%s-api-keys" (include "expertmesh.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.tlsSecret" -}}
{{- if eq .Values.tls.mode "existing" -}}
{{- .Values.tls.existingSecret -}}
{{- else if eq .Values.tls.mode "certManager" -}}
{{- printf "%s-tls-issued" (include "expertmesh.fullname" .) -}}
{{- else -}}
{{- printf "%s-tls" (include "expertmesh.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.tlsServerName" -}}
{{- .Values.tls.serverName | default (printf "%s-experts" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{- define "expertmesh.claim" -}}
{{- .Values.model.existingClaim | default (printf "%s-model" (include "expertmesh.fullname" .)) -}}
{{- end -}}

{{/* KubeRay's service in front of the proxies that are ready. */}}
{{- define "expertmesh.serveService" -}}
{{- printf "%s-serve-svc" (include "expertmesh.fullname" .) -}}
{{- end -}}
