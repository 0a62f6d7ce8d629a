{{/* Takes (root, name of a Secret, key): what it holds already, in base64; else nothing. What the chart generates stays
as it is when a release is upgraded. `helm template` cannot look: what it renders is new each time. */}}
{{- define "expertmesh.kept" -}}
{{- $root := index . 0 -}}
{{- $found := lookup "v1" "Secret" $root.Release.Namespace (index . 1) -}}
{{- get ($found.data | default dict) (index . 2) -}}
{{- end -}}

{{- define "expertmesh.serverNameKey" -}}expertmesh.io/tls-server-name{{- end -}}

{{/* Takes (root, name of a Secret): the name that the certificate in it was generated for. */}}
{{- define "expertmesh.keptServerName" -}}
{{- $root := index . 0 -}}
{{- $found := lookup "v1" "Secret" $root.Release.Namespace (index . 1) -}}
{{- dig "metadata" "annotations" (include "expertmesh.serverNameKey" $root) "" ($found | default dict) -}}
{{- end -}}

{{- define "expertmesh.secretHead" -}}
apiVersion: v1
kind: Secret
metadata:
  name: {{ index . 1 }}
  namespace: {{ (index . 0).Release.Namespace }}
  labels:
    {{- include "expertmesh.chartLabels" (index . 0) | nindent 4 }}
{{- end -}}
