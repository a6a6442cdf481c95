{{- define "regionspot.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What never changes of a pod's labels. Takes (dict "root" $ "part" "triton"). */}}
{{- define "regionspot.selector" -}}
app.kubernetes.io/name: regionspot
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "regionspot.labels" -}}
{{ include "regionspot.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: regionspot
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* By digest, where one is given, and else by tag. Takes (dict "root" $ "image" .Values.triton.image). */}}
{{- define "regionspot.image" -}}
{{- if contains "@" .image.repository -}}
{{ .image.repository }}
{{- else if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The user of the images; files of volumes and secrets belong to its group. */}}
{{- define "regionspot.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "regionspot.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Labels and annotations of a part's pods. Takes (dict "root" $ "part" "triton" "values" .Values.triton). */}}
{{- define "regionspot.podMetadata" -}}
labels:
  {{- include "regionspot.labels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What both parts' pods begin with. Takes the same. */}}
{{- define "regionspot.podStart" -}}
serviceAccountName: {{ include "regionspot.fullname" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "regionspot.podSecurity" .root | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- $class := ternary (include "regionspot.priorityClass" .root) "" .root.Values.priorityClass.enabled }}
{{- with .values.priorityClassName | default $class }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* A PriorityClass belongs to the whole cluster, so its name says which release it is of. */}}
{{- define "regionspot.priorityClass" -}}
{{ .Release.Namespace }}-{{ include "regionspot.fullname" . }}
{{- end -}}

{{/* Where a part's pods run. Takes the same as regionspot.podMetadata. */}}
{{- define "regionspot.placement" -}}
topologySpreadConstraints: {{- include "regionspot.spread" . | trim | nindent 2 }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Environment of a part's container; nothing where there is none. Takes the part's values. */}}
{{- define "regionspot.environment" -}}
{{- with .env }}
env: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .envFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Pods of one kind on different nodes, and zones, where there are any. */}}
{{- define "regionspot.spread" -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "regionspot.selector" $ | nindent 6 }}
{{- end }}
{{- end -}}

{{/* A volume of some keys of a Secret. Takes (list NAME SECRET KEY...). */}}
{{- define "regionspot.secretVolume" -}}
- name: {{ index . 0 }}
  secret:
    secretName: {{ index . 1 | quote }}
    defaultMode: 288 # 0440, which YAML 1.1 and 1.2 read differently
    items:
      {{- range slice . 2 }}
      - {key: {{ . | quote }}, path: {{ . | quote }}}
      {{- end }}
{{- end -}}

{{/* A quantity of Kubernetes as a plain number. */}}
{{- define "regionspot.number" -}}
{{- if kindIs "string" . -}}
{{- $digits := regexFind "^[0-9.]+" . -}}
{{- $units := dict "" 1.0 "n" 1e-9 "u" 1e-6 "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 -}}
{{- $units = merge $units (dict "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0) -}}
{{- mulf (float64 $digits) (get $units (trimPrefix $digits .)) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{/* A probe of the gateway. Takes (list $ "/healthz"). The kubelet has no certificate: where clients must show one, it can
     only see that the port is open. */}}
{{- define "regionspot.gatewayProbe" -}}
{{- $gateway := (index . 0).Values.gateway -}}
{{- if $gateway.tls.clientCa -}}
tcpSocket: {port: http}
{{- else -}}
httpGet:
  path: {{ index . 1 }}
  port: http
  {{- if $gateway.tls.existingSecret }}
  scheme: HTTPS
  {{- end }}
{{- end -}}
{{- end -}}

{{/* How fast servers are added and removed. Takes triton.autoscaling. */}}
{{- define "regionspot.scaling" -}}
scaleUp:
  stabilizationWindowSeconds: 30
  policies: [{type: Pods, value: 2, periodSeconds: 60}]
scaleDown:
  stabilizationWindowSeconds: {{ .scaleDownSeconds }}
  policies: [{type: Pods, value: 1, periodSeconds: 120}]
{{- end -}}
