{{/* What the schema cannot say: one clear line each. */}}

{{/* Takes the line. `helm lint` only takes note of `fail`, and goes on; a template that does not exist stops it. */}}
{{- define "expertmesh.refuse" -}}
{{- fail . -}}
{{- include . nil -}}
{{- end -}}

{{- define "expertmesh.checks" -}}
{{- include "expertmesh.checkNames" . -}}
{{- include "expertmesh.checkCluster" . -}}
{{- include "expertmesh.checkPools" . -}}
{{- include "expertmesh.checkGroups" . -}}
{{- include "expertmesh.checkSecrets" . -}}
{{- include "expertmesh.checkKinds" . -}}
{{- end -}}

{{- define "expertmesh.checkNames" -}}
{{- $name := include "expertmesh.fullname" . -}}
{{- if gt (len $name) 47 -}}
{{- include "expertmesh.refuse" (printf "fullnameOverride: the RayService would be named %q, %d characters; KubeRay takes 47 at most" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- include "expertmesh.refuse" (printf "fullnameOverride: the RayService would be named %q; KubeRay takes small letters, digits and -, a letter first" $name) -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.checkCluster" -}}
{{- $cluster := .Values.cluster -}}
{{- if not $cluster.model.name -}}
{{- include "expertmesh.refuse" "cluster.model.name: the name of the model in the OpenAI API is missing" -}}
{{- end -}}
{{- if not (hasPrefix (printf "%s/" .Values.model.mountPath) $cluster.model.artifact) -}}
{{- include "expertmesh.refuse" (printf "cluster.model.artifact: %s is not on the model volume, which is mounted at %s" $cluster.model.artifact .Values.model.mountPath) -}}
{{- end -}}
{{- if not $cluster.groups -}}
{{- include "expertmesh.refuse" "cluster.groups: has no group of experts" -}}
{{- end -}}
{{- $ports := $cluster.server.replica_ports -}}
{{- $rayPorts := include "expertmesh.rayPorts" $ | fromJson -}}
{{- if gt (int64 (index $ports 0)) (int64 (index $ports 1)) -}}
{{- include "expertmesh.refuse" (printf "cluster.server.replica_ports: %v does not ascend" $ports) -}}
{{- end -}}
{{- $keys := list "http_port" "grpc_port" -}}
{{- if ne .Values.tls.mode "off" -}}
{{- $keys = append $keys "grpc_tls_port" -}}
{{- end -}}
{{- range $key := $keys -}}
{{- $port := int64 (get $cluster.server $key) -}}
{{- if and (ge $port (int64 (index $ports 0))) (le $port (int64 (index $ports 1))) -}}
{{- include "expertmesh.refuse" (printf "cluster.server.%s: %d lies within replica_ports" $key $port) -}}
{{- end -}}
{{- range $what, $taken := $rayPorts -}}
{{- if eq $port (int64 $taken) -}}
{{- include "expertmesh.refuse" (printf "cluster.server.%s: %d is Ray's own (%s)" $key $port $what) -}}
{{- end -}}
{{- end -}}
{{- if and (ge $port (int64 $rayPorts.minWorker)) (le $port (int64 $rayPorts.maxWorker)) -}}
{{- include "expertmesh.refuse" (printf "cluster.server.%s: %d is one of those of Ray's workers" $key $port) -}}
{{- end -}}
{{- end -}}
{{- range $what, $taken := $rayPorts -}}
{{- if and (ge (int64 $taken) (int64 (index $ports 0))) (le (int64 $taken) (int64 (index $ports 1))) -}}
{{- include "expertmesh.refuse" (printf "cluster.server.replica_ports: %v hold %d, which is Ray's own (%s)" $ports (int64 $taken) $what) -}}
{{- end -}}
{{- end -}}
{{- if and (ge (int64 (index $ports 0)) (int64 $rayPorts.minWorker)) (le (int64 (index $ports 0)) (int64 $rayPorts.maxWorker)) -}}
{{- include "expertmesh.refuse" (printf "cluster.server.replica_ports: %v lie among those of Ray's workers" $ports) -}}
{{- end -}}
{{- range $index, $key := $keys -}}
{{- range $other := slice $keys 0 $index -}}
{{- if eq (int64 (get $cluster.server $key)) (int64 (get $cluster.server $other)) -}}
{{- include "expertmesh.refuse" (printf "cluster.server: %s and %s are both %d" $other $key (int64 (get $cluster.server $key))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "expertmesh.checkBounds" (list "cluster.engine" (int64 $cluster.engine.min_replicas) (int64 $cluster.engine.max_replicas) "_replicas") -}}
{{- $engine := $cluster.engine -}}
{{- if not (kindIs "invalid" $engine.degrade_after_s) -}}
{{- if gt (float64 $engine.degrade_after_s) (float64 $engine.wait_for_experts_s) -}}
{{- include "expertmesh.refuse" (printf "cluster.engine: degrade_after_s %v > wait_for_experts_s %v" $engine.degrade_after_s $engine.wait_for_experts_s) -}}
{{- end -}}
{{- end -}}
{{- $pods := .Values.pods -}}
{{- if le (int64 $pods.terminationGracePeriodSeconds) (add (int64 $pods.preStopSeconds) (int64 $pods.drainSeconds)) -}}
{{- include "expertmesh.refuse" (printf "pods.terminationGracePeriodSeconds: %d is no more than preStopSeconds and drainSeconds together" (int64 $pods.terminationGracePeriodSeconds)) -}}
{{- end -}}
{{- end -}}

{{/* Takes (where, low, high, suffix of the keys). */}}
{{- define "expertmesh.checkBounds" -}}
{{- if gt (index . 1) (index . 2) -}}
{{- include "expertmesh.refuse" (printf "%s: max%s %d < min%s %d" (index . 0) (index . 3) (index . 2) (index . 3) (index . 1)) -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.checkPools" -}}
{{- $seen := dict "router" true "headgroup" true -}}
{{- range $index, $pool := .Values.expertPools -}}
{{- if hasKey $seen $pool.name -}}
{{- include "expertmesh.refuse" (printf "expertPools[%d].name: %q stands twice, or is the name of Ray's head or of the router pool" $index $pool.name) -}}
{{- end -}}
{{- $_ := set $seen $pool.name true -}}
{{- include "expertmesh.checkBounds" (list (printf "expertPools[%d]" $index) (int64 $pool.minReplicas) (int64 $pool.maxReplicas) "Replicas") -}}
{{- end -}}
{{- include "expertmesh.checkBounds" (list "router" (int64 .Values.router.minReplicas) (int64 .Values.router.maxReplicas) "Replicas") -}}
{{- range $section, $amount := dict "engine" "1" "directory" "0.001" -}}
{{- $resources := (get $.Values.cluster $section).resources -}}
{{- range $name, $_ := $resources -}}
{{- if ne $name "router" -}}
{{- include "expertmesh.refuse" (printf "cluster.%s.resources: it runs in the pool router, not in %q" $section $name) -}}
{{- end -}}
{{- end -}}
{{- if not (hasKey $resources "router") -}}
{{- include "expertmesh.refuse" (printf "cluster.%s.resources: {router: %s} is missing, by which it finds its pool" $section $amount) -}}
{{- end -}}
{{- end -}}
{{- include "expertmesh.checkRoom" (list "cluster.engine" "router" .Values.cluster.engine .Values.router 1.0) -}}
{{- end -}}

{{- define "expertmesh.checkGroups" -}}
{{- $pools := dict -}}
{{- range .Values.expertPools -}}
{{- $_ := set $pools .name . -}}
{{- end -}}
{{- $seen := dict -}}
{{- $defaults := include "expertmesh.defaults" . | fromJson -}}
{{- range $index, $given := .Values.cluster.groups -}}
{{- $where := printf "cluster.groups[%d]" $index -}}
{{- $group := include "expertmesh.over" (list $defaults.group $given) | fromJson -}}
{{- if hasKey $seen $group.name -}}
{{- include "expertmesh.refuse" (printf "%s.name: %q stands twice" $where $group.name) -}}
{{- end -}}
{{- $_ := set $seen $group.name true -}}
{{- include "expertmesh.checkBounds" (list $where (int64 $group.min_replicas) (int64 $group.max_replicas) "_replicas") -}}
{{- if and $group.emulated (gt (float64 $group.num_gpus) 0.0) -}}
{{- include "expertmesh.refuse" (printf "%s: emulated is for CPUs, num_gpus is %v" $where $group.num_gpus) -}}
{{- end -}}
{{- include "expertmesh.checkExperts" (list (printf "%s.experts" $where) $group.experts) -}}
{{- range $name, $amount := $group.resources -}}
{{- if not (hasKey $pools $name) -}}
{{- include "expertmesh.refuse" (printf "%s.resources: there is no pool %q; expertPools has: %s" $where $name (keys $pools | sortAlpha | join ", " | default "none")) -}}
{{- end -}}
{{- include "expertmesh.checkRoom" (list $where $name $group (get $pools $name) 0.0) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Takes (where, experts as written): what `expertmesh.experts.parse_indices` asks beyond the schema. */}}
{{- define "expertmesh.checkExperts" -}}
{{- $where := index . 0 -}}
{{- $written := list -}}
{{- if kindIs "map" (index . 1) -}}
{{- range $layers, $experts := index . 1 -}}
{{- $written = concat $written (list $layers (toString $experts)) -}}
{{- end -}}
{{- else -}}
{{- $written = list (toString (index . 1)) -}}
{{- end -}}
{{- range $part := splitList "," (join "," $written) -}}
{{- $ends := splitList "-" (trim $part) -}}
{{- if or (gt (float64 (first $ends)) (float64 (last $ends))) (gt (float64 (last $ends)) 1048575.0) -}}
{{- include "expertmesh.refuse" (printf "%s: %q is not an ascending range of indices below 2^20" $where (trim $part)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Takes (where, name of the pool, what runs there, the pool, more CPUs that it takes). */}}
{{- define "expertmesh.checkRoom" -}}
{{- $where := index . 0 -}}
{{- $name := index . 1 -}}
{{- $what := index . 2 -}}
{{- $pool := index . 3 -}}
{{- $cpus := addf (float64 ($what.num_cpus | default 1)) (index . 4) -}}
{{- $has := include "expertmesh.podCpus" $pool | float64 -}}
{{- if gt $cpus $has -}}
{{- include "expertmesh.refuse" (printf "%s: takes %v CPUs, a pod of pool %s requests %v" $where $cpus $name $has) -}}
{{- end -}}
{{- $gpus := float64 (dig "gpu" "count" 0 $pool) -}}
{{- if gt (float64 ($what.num_gpus | default 0)) $gpus -}}
{{- include "expertmesh.refuse" (printf "%s: takes %v GPUs, a pod of pool %s has %v" $where $what.num_gpus $name $gpus) -}}
{{- end -}}
{{- end -}}

{{/* As Ray counts them: requests, or limits where there are some, rounded up. */}}
{{- define "expertmesh.podCpus" -}}
{{- $cpu := toString (coalesce .resources.limits.cpu .resources.requests.cpu 0) -}}
{{- if hasSuffix "m" $cpu -}}
{{- ceil (divf (float64 (trimSuffix "m" $cpu)) 1000.0) -}}
{{- else -}}
{{- ceil (float64 $cpu) -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.checkSecrets" -}}
{{- $kept := .Values.ray.gcsFaultTolerance -}}
{{- if and $kept.passwordSecret (not $kept.redisAddress) -}}
{{- include "expertmesh.refuse" "ray.gcsFaultTolerance.redisAddress: a password is given, but no Redis is named" -}}
{{- end -}}
{{- if and (eq .Values.tls.mode "existing") (not .Values.tls.existingSecret) -}}
{{- include "expertmesh.refuse" "tls.existingSecret: tls.mode is existing, but no Secret is named" -}}
{{- end -}}
{{- $issued := .Values.tls.certManager -}}
{{- $lasts := include "expertmesh.seconds" $issued.duration | atoi -}}
{{- $renewed := include "expertmesh.seconds" $issued.renewBefore | atoi -}}
{{- if and (eq .Values.tls.mode "certManager") (or (lt $lasts 3600) (lt $renewed 300) (ge $renewed $lasts)) -}}
{{- include "expertmesh.refuse" (printf "tls.certManager: cert-manager wants a duration of 1h at least, and a renewBefore of 5m at least that is shorter; they are %s and %s" $issued.duration $issued.renewBefore) -}}
{{- end -}}
{{- if and .Values.model.prepare.enabled (not .Values.model.prepare.source) -}}
{{- include "expertmesh.refuse" "model.prepare.source: the checkpoint is missing; name it, or switch model.prepare.enabled off where the artifact exists" -}}
{{- end -}}
{{- $prepare := .Values.model.prepare -}}
{{- $key := ternary "source" "download" (hasPrefix "/" $prepare.source) -}}
{{- $path := get $prepare $key -}}
{{- if and $prepare.enabled (not (hasPrefix (printf "%s/" .Values.model.mountPath) $path)) -}}
{{- include "expertmesh.refuse" (printf "model.prepare.%s: %s is not on the model volume, which is mounted at %s" $key $path .Values.model.mountPath) -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- include "expertmesh.refuse" "ingress.host: the host name is missing" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- include "expertmesh.refuse" "httpRoute.parentRefs: no Gateway is named" -}}
{{- end -}}
{{- end -}}

{{/* Of a duration such as 8h30m. */}}
{{- define "expertmesh.seconds" -}}
{{- $total := 0 -}}
{{- range $unit, $seconds := dict "h" 3600 "m" 60 "s" 1 -}}
{{- $total = add $total (mul $seconds (regexFind (printf "[0-9]+%s" $unit) $ | trimSuffix $unit | default "0" | atoi)) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{- define "expertmesh.checkKinds" -}}
{{- if and .Values.ray.requireKubeRay (not (.Capabilities.APIVersions.Has "ray.io/v1/RayService")) -}}
{{- fail "the cluster has no kind RayService of ray.io/v1: install the KubeRay operator (1.6 or newer) first; offline, pass --api-versions ray.io/v1/RayService or set ray.requireKubeRay=false" -}}
{{- end -}}
{{- $kinds := list
  (list (eq .Values.tls.mode "certManager") "cert-manager.io/v1/Certificate" "tls.mode: certManager")
  (list .Values.httpRoute.enabled "gateway.networking.k8s.io/v1/HTTPRoute" "httpRoute.enabled")
  (list .Values.monitoring.podMonitor.enabled "monitoring.coreos.com/v1/PodMonitor" "monitoring.podMonitor.enabled")
  (list .Values.monitoring.rules.enabled "monitoring.coreos.com/v1/PrometheusRule" "monitoring.rules.enabled") -}}
{{- range $kinds -}}
{{- if and (index . 0) $.Values.ray.requireKubeRay (not ($.Capabilities.APIVersions.Has (index . 1))) -}}
{{- fail (printf "%s: the cluster has no kind %s" (index . 2) (index . 1)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
