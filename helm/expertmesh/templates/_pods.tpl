{{/* Parts of pods. Nothing here may change from one version of the chart to the next without need: KubeRay answers a
changed pod with another cluster, or not at all. */}}

{{- define "expertmesh.podLabels" -}}
{{ include "expertmesh.selectorLabels" . }}
{{- with .Values.pods.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "expertmesh.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.pods.runAsUser }}
runAsGroup: {{ int64 .Values.pods.runAsUser }}
fsGroup: {{ int64 .Values.pods.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "expertmesh.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "expertmesh.containerImage" -}}
image: {{ include "expertmesh.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{- define "expertmesh.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Takes an object with nodeSelector, tolerations and so on. */}}
{{- define "expertmesh.placement" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with get $ $key }}
{{ $key }}: {{- if kindIs "string" . }} {{ . }}{{ else }}
  {{- toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Of Ray's containers: by it Serve's gRPC proxies ask for certificates, see expertmesh/directory/secure_port.py. */}}
{{- define "expertmesh.rayEnv" -}}
{{ include "expertmesh.env" . }}
{{- with (include "expertmesh.tlsFiles" . | fromJson).tls }}
- name: EXPERTMESH_GRPC_TLS
  value: {{ dict "port" (int64 $.Values.cluster.server.grpc_tls_port) "tls" . | toJson | quote }}
{{- end }}
{{- end -}}

{{/* Of who shows the cluster's certificate; empty where there is none. */}}
{{- define "expertmesh.tlsMount" -}}
{{- if ne .Values.tls.mode "off" -}}
- name: tls
  mountPath: /etc/expertmesh/tls
  readOnly: true
{{- end -}}
{{- end -}}

{{- define "expertmesh.tlsVolume" -}}
{{- if ne .Values.tls.mode "off" -}}
- name: tls
  secret:
    secretName: {{ include "expertmesh.tlsSecret" . }}
    defaultMode: 0440
{{- end -}}
{{- end -}}

{{/* What a client of the directory is told besides its address. */}}
{{- define "expertmesh.tlsArguments" -}}
{{- if ne .Values.tls.mode "off" -}}
- --tls=/etc/expertmesh/tls
- --tls-name={{ include "expertmesh.tlsServerName" . }}
{{- end -}}
{{- end -}}

{{/* Of every container. The image keeps all that is written below /tmp: the root file system is read-only. */}}
{{- define "expertmesh.env" -}}
- name: HF_HUB_OFFLINE
  value: "1"
- name: OMP_NUM_THREADS
  value: "1"
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
  value: {{ .Values.pods.drainSeconds | quote }}
{{- /* else Ray lowers a worker's priority once it has started: one that starts would take the cores of those that serve */}}
- name: RAY_worker_niceness
  value: "0"
{{- /* Serve replaces a proxy that has failed three checks: by default that takes 30 s */}}
- name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S
  value: "2"
- name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
  value: router_service.early_refusal:middlewares
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: VLLM_NO_USAGE_STATS
  value: "1"
{{- end -}}

{{- define "expertmesh.commonVolumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.pods.scratchSize }}
- name: model
  persistentVolumeClaim:
    claimName: {{ include "expertmesh.claim" . }}
{{- end -}}

{{- define "expertmesh.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: model
  mountPath: {{ .Values.model.mountPath }}
  readOnly: true
{{- end -}}

{{/* Replicas read the artifact when they start; `prepare` writes its manifest last. */}}
{{- define "expertmesh.waitForArtifact" -}}
- name: wait-for-artifact
  {{- include "expertmesh.containerImage" . | nindent 2 }}
  command: [/bin/sh, -c]
  args:
    - |
      until [ -f "$0/manifest.json" ]; do echo "waiting for $0/manifest.json"; sleep 5; done
    - {{ .Values.cluster.model.artifact }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  securityContext:
    {{- include "expertmesh.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: model
      mountPath: {{ .Values.model.mountPath }}
      readOnly: true
{{- end -}}

{{/* Takes (root, name, pool): one of KubeRay's worker groups. */}}
{{- define "expertmesh.workerGroup" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $pool := index . 2 -}}
{{- $isRouter := eq $name "router" -}}
{{- $server := $root.Values.cluster.server -}}
{{- $ports := include "expertmesh.rayPorts" $root | fromJson -}}
- groupName: {{ $name }}
  replicas: {{ int64 $pool.minReplicas }}
  minReplicas: {{ int64 $pool.minReplicas }}
  maxReplicas: {{ int64 $pool.maxReplicas }}
  {{- with $pool.idleTimeoutSeconds }}
  idleTimeoutSeconds: {{ int64 . }}
  {{- end }}
  rayStartParams:
    {{- include "expertmesh.rayStartParams" $root | nindent 4 }}
    {{- /* Ray's autoscaler counts GPUs only of resources whose names end in "gpu" */}}
    {{- with dig "gpu" "count" 0 $pool }}
    num-gpus: {{ int64 . | quote }}
    {{- end }}
    {{- /* by this resource applications find the pool; it goes through a shell, hence the quotes */}}
    resources: {{ printf "'%s'" (dict $name 1000 | toJson) | quote }}
  template:
    metadata:
      labels:
        {{- include "expertmesh.podLabels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ ternary "router" "experts" $isRouter }}
      {{- with $root.Values.pods.annotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      restartPolicy: Never
      serviceAccountName: {{ include "expertmesh.workerAccount" $root }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ int64 $root.Values.pods.terminationGracePeriodSeconds }}
      {{- with include "expertmesh.pullSecrets" $root }}
      {{- . | trim | nindent 6 }}
      {{- end }}
      {{- with include "expertmesh.placement" $pool }}
      {{- . | trim | nindent 6 }}
      {{- end }}
      securityContext:
        {{- include "expertmesh.podSecurity" $root | nindent 8 }}
      initContainers:
        {{- include "expertmesh.waitForArtifact" $root | nindent 8 }}
      containers:
        - name: ray-worker
          {{- include "expertmesh.containerImage" $root | nindent 10 }}
          env:
            {{- include "expertmesh.rayEnv" $root | nindent 12 }}
            {{- with $pool.env }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: serve, containerPort: {{ int64 $server.http_port }}}
            - {name: serve-grpc, containerPort: {{ int64 $server.grpc_port }}}
            {{- if ne $root.Values.tls.mode "off" }}
            - {name: serve-grpc-tls, containerPort: {{ int64 $server.grpc_tls_port }}}
            {{- end }}
            - {name: metrics, containerPort: {{ $ports.metrics }}}
          livenessProbe:
            httpGet: {path: /api/local_raylet_healthz, port: {{ $ports.agent }}}
            initialDelaySeconds: 30
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 60
          {{- /* ready: its Serve proxy takes requests */}}
          readinessProbe:
            httpGet: {path: /-/healthz, port: serve}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 1
          lifecycle:
            preStop:
              exec:
                command: [sleep, {{ $root.Values.pods.preStopSeconds | quote }}]
          resources:
            {{- include "expertmesh.podResources" $pool | nindent 12 }}
          securityContext:
            {{- include "expertmesh.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            {{- include "expertmesh.mounts" $root | nindent 12 }}
            {{- with include "expertmesh.tlsMount" $root }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- if and $isRouter $root.Values.apiKeys.enabled }}
            - name: api-keys
              mountPath: /etc/expertmesh/api-keys
              readOnly: true
            {{- end }}
      volumes:
        {{- include "expertmesh.commonVolumes" $root | nindent 8 }}
        {{- with include "expertmesh.tlsVolume" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- if and $isRouter $root.Values.apiKeys.enabled }}
        - name: api-keys
          secret:
            secretName: {{ include "expertmesh.apiKeysSecret" $root }}
            defaultMode: 0440
            items: [{key: keys, path: keys}]
        {{- end }}
{{- end -}}

{{/* Takes a pool: its resources with its GPUs. */}}
{{- define "expertmesh.podResources" -}}
{{- $requests := deepCopy .resources.requests -}}
{{- $limits := deepCopy .resources.limits -}}
{{- $gpus := int64 (dig "gpu" "count" 0 .) -}}
{{- if $gpus -}}
{{- $resource := dig "gpu" "resource" "nvidia.com/gpu" . -}}
{{- $_ := set $requests $resource $gpus -}}
{{- $_ := set $limits $resource $gpus -}}
{{- end -}}
requests:
  {{- toYaml $requests | nindent 2 }}
limits:
  {{- toYaml $limits | nindent 2 }}
{{- end -}}

{{/* What Kubernetes mounts by itself where a token is mounted automatically. */}}
{{- define "expertmesh.apiAccess" -}}
- name: api-access
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap:
          name: kube-root-ca.crt
          items: [{key: ca.crt, path: ca.crt}]
      - downwardAPI:
          items: [{path: namespace, fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}]
{{- end -}}
