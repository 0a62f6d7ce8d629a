{{/*
The Serve config: what expertmesh/deployment.py's serve_config makes of the same cluster. Replica bounds and resources
stand under `deployments`, where a change restarts nothing; args hold the rest, whose change restarts one application.
*/}}

{{- define "expertmesh.serveConfig" -}}
{{- $cluster := .Values.cluster -}}
{{- $applications := list (include "expertmesh.directoryApplication" . | fromJson) -}}
{{- range $cluster.groups -}}
{{- $applications = append $applications (include "expertmesh.groupApplication" (list $ .) | fromJson) -}}
{{- end -}}
{{- $applications = append $applications (include "expertmesh.routerApplication" . | fromJson) -}}
{{- $servicer := "expertmesh.directory.secure_port.add_directory" -}}
{{- $config := dict "proxy_location" "EveryNode"
  "http_options" (dict "host" "0.0.0.0" "port" (int64 $cluster.server.http_port))
  "grpc_options" (dict "port" (int64 $cluster.server.grpc_port) "grpc_servicer_functions" (list $servicer))
  "applications" $applications -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "expertmesh.directoryApplication" -}}
{{- $args := dict -}}
{{- if ne .Values.tls.mode "off" -}}
{{- $_ := set $args "require_certificate" true -}}
{{- end -}}
{{- $options := dict "num_cpus" 0 "resources" .Values.cluster.directory.resources -}}
{{- dict "name" "directory" "import_path" "expertmesh.directory.app:build" "route_prefix" "/-/directory" "args" $args
  "deployments" (list (dict "name" "Directory" "ray_actor_options" $options)) | toJson -}}
{{- end -}}

{{/* Takes (root, group). */}}
{{- define "expertmesh.groupApplication" -}}
{{- $root := index . 0 -}}
{{- $defaults := include "expertmesh.defaults" $root | fromJson -}}
{{- $group := include "expertmesh.over" (list $defaults.group (index . 1)) | fromJson -}}
{{- $args := dict
  "artifact" $root.Values.cluster.model.artifact
  "group" $group.name
  "experts" (include "expertmesh.experts" $group.experts | fromJson).experts
  "num_threads" (max 1 (floor $group.num_cpus | int64) | int64)
  "device" (ternary "cuda" "cpu" (gt ($group.num_gpus | float64) 0.0))
  "host" "auto"
  "ports" (include "expertmesh.replicaPorts" $root | fromJsonArray)
  "directory" (include "expertmesh.directoryAddress" $root)
  "lease_ms" (int64 $root.Values.cluster.directory.lease_ms)
  "max_queued_rows" (int64 $group.max_queued_rows)
  "emulated" (include "expertmesh.emulated" $group | fromJson).emulated
  "tls" (include "expertmesh.tlsFiles" $root | fromJson).tls -}}
{{- $args = include "expertmesh.over" (list $defaults.groupArgs $args) | fromJson -}}
{{- $resources := dict "num_cpus" $group.num_cpus "num_gpus" $group.num_gpus "resources" $group.resources -}}
{{- $deployment := dict "autoscaling_config" (include "expertmesh.groupAutoscaling" (list $root $group) | fromJson) -}}
{{- $_ := set $deployment "name" "ExpertReplica" -}}
{{- $_ := set $deployment "ray_actor_options" $resources -}}
{{- $given := $root.Values.cluster.scaling -}}
{{- if not (kindIs "invalid" $group.scaling) -}}
{{- $given = $group.scaling -}}
{{- end -}}
{{- $targets := include "expertmesh.over" (list $defaults.scaling $given) | fromJson -}}
{{- $_ := set $deployment "user_config" (dict "scaling" $targets) -}}
{{- dict "name" (printf "experts-%s" $group.name) "import_path" "expert_service.app:build" "route_prefix" nil
  "args" $args "deployments" (list $deployment) | toJson -}}
{{- end -}}

{{- define "expertmesh.routerApplication" -}}
{{- $defaults := include "expertmesh.defaults" . | fromJson -}}
{{- /* values.yaml has the key, and where null is given for it, Helm takes it away */}}
{{- $never := dict "dbo_token_threshold" nil -}}
{{- $engine := include "expertmesh.over" (list $defaults.engine $never .Values.cluster.engine) | fromJson -}}
{{- $bounds := dict "min_replicas" (int64 $engine.min_replicas) "max_replicas" (int64 $engine.max_replicas) -}}
{{- $keys := ternary "/etc/expertmesh/api-keys/keys" nil .Values.apiKeys.enabled -}}
{{- $args := dict
  "artifact" .Values.cluster.model.artifact
  "name" .Values.cluster.model.name
  "engine" (omit $engine "min_replicas" "max_replicas")
  "directory" (include "expertmesh.directoryAddress" .)
  "tls" (include "expertmesh.tlsFiles" . | fromJson).tls
  "api_keys" $keys -}}
{{- $args = include "expertmesh.over" (list $defaults.routerArgs $args) | fromJson -}}
{{- dict "name" "router" "import_path" "router_service.app:build" "route_prefix" "/" "args" $args
  "deployments" (list (dict "name" "LLMServer:Router" "autoscaling_config" $bounds)) | toJson -}}
{{- end -}}

{{/* Takes (root, group): our policy decides, within the bounds, also where both are the same. */}}
{{- define "expertmesh.groupAutoscaling" -}}
{{- $root := index . 0 -}}
{{- $group := index . 1 -}}
{{- $defaults := include "expertmesh.defaults" $root | fromJson -}}
{{- $kwargs := dict "group" $group.name "directory" (include "expertmesh.directoryAddress" $root) -}}
{{- with (include "expertmesh.tlsFiles" $root | fromJson).tls -}}
{{- $_ := set $kwargs "tls" . -}}
{{- end -}}
{{- $bounds := dict "min_replicas" (int64 $group.min_replicas) "max_replicas" (int64 $group.max_replicas)
  "policy" (dict "policy_function" $defaults.policy "policy_kwargs" $kwargs) -}}
{{- include "expertmesh.over" (list $defaults.groupAutoscaling $bounds) -}}
{{- end -}}

{{/* Takes a group: its modelled accelerator, with what is left out, or null. */}}
{{- define "expertmesh.emulated" -}}
{{- $found := dict "emulated" nil -}}
{{- if .emulated -}}
{{- $defaults := include "expertmesh.defaults" . | fromJson -}}
{{- $_ := set $found "emulated" (include "expertmesh.over" (list $defaults.emulated .emulated) | fromJson) -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/* `experts: 3` and {4: 0} are numbers to YAML. */}}
{{- define "expertmesh.experts" -}}
{{- if kindIs "map" . -}}
{{- $texts := dict -}}
{{- range $layers, $experts := . -}}
{{- $_ := set $texts $layers (toString $experts) -}}
{{- end -}}
{{- dict "experts" $texts | toJson -}}
{{- else -}}
{{- dict "experts" (toString .) | toJson -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.replicaPorts" -}}
{{- $ports := .Values.cluster.server.replica_ports -}}
{{- list (int64 (index $ports 0)) (int64 (index $ports 1)) | toJson -}}
{{- end -}}

{{/* Serve's gRPC proxy runs on every node. */}}
{{- define "expertmesh.directoryAddress" -}}
{{- printf "127.0.0.1:%s" (include "expertmesh.directoryPort" .) -}}
{{- end -}}

{{- define "expertmesh.directoryPort" -}}
{{- $server := .Values.cluster.server -}}
{{- ternary $server.grpc_port $server.grpc_tls_port (eq .Values.tls.mode "off") | int64 -}}
{{- end -}}

{{- define "expertmesh.tlsFiles" -}}
{{- $found := dict "tls" nil -}}
{{- if ne .Values.tls.mode "off" -}}
{{- $_ := set $found "tls" (dict "ca" "/etc/expertmesh/tls/ca.crt" "certificate" "/etc/expertmesh/tls/tls.crt"
  "key" "/etc/expertmesh/tls/tls.key" "server_name" (include "expertmesh.tlsServerName" .)) -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/* Takes (defaults, given): the given keys over the defaults, also where their value is 0, false or null. */}}
{{- define "expertmesh.over" -}}
{{- $merged := dict -}}
{{- range . -}}
{{- range $key, $value := . -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $merged -}}
{{- end -}}
