{{/* The pod of the Job that makes the artifact. */}}
{{- define "expertmesh.prepareTemplate" -}}
{{- with .Values.model.prepare }}
{{- $artifact := $.Values.cluster.model.artifact }}
{{- $remote := not (hasPrefix "/" .source) }}
metadata:
  labels:
    {{- include "expertmesh.labels" $ | nindent 4 }}
    app.kubernetes.io/component: prepare
spec:
  restartPolicy: OnFailure
  serviceAccountName: {{ include "expertmesh.workerAccount" $ }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with include "expertmesh.pullSecrets" $ }}
  {{- . | trim | nindent 2 }}
  {{- end }}
  {{- with include "expertmesh.placement" . }}
  {{- . | trim | nindent 2 }}
  {{- end }}
  securityContext:
    {{- include "expertmesh.podSecurity" $ | nindent 4 }}
  containers:
    - name: prepare
      {{- include "expertmesh.containerImage" $ | nindent 6 }}
      command: [/bin/sh, -ec]
      args:
        - |
          if [ -f "$2/manifest.json" ]; then echo "$2 is complete"; exit 0; fi
          {{- if $remote }}
          python -m expertmesh.artifact.fetch "$0" "$1"
          {{- else }}
          {{- /* the claim is made with the release, so that nothing can be on it before */}}
          until [ -e "$1" ]; do echo "waiting for $1, which is not on the volume yet"; sleep 5; done
          {{- end }}
          exec expertmesh prepare "$1" "$2"
        - {{ .source | quote }}
        - {{ ternary .download .source $remote | quote }}
        - {{ $artifact | quote }}
      env:
        {{- include "expertmesh.env" $ | nindent 8 }}
        {{- with .env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .credentialsSecret }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      securityContext:
        {{- include "expertmesh.containerSecurity" $ | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: model, mountPath: {{ $.Values.model.mountPath }}}
  volumes:
    {{- include "expertmesh.commonVolumes" $ | nindent 4 }}
{{- end }}
{{- end -}}

{{/* A Job cannot be changed: another one is made where its pod would differ. An artifact that is complete stays. */}}
{{- define "expertmesh.prepareJob" -}}
{{- printf "%s-prep-%s" (include "expertmesh.fullname" .) (include "expertmesh.prepareTemplate" . | sha256sum | trunc 8) -}}
{{- end -}}
