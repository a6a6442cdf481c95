{{/* The containers that make the model repository in a pod, out of the artefacts of `regionspot-export`. */}}
{{- define "regionspot.init" -}}
{{- $init := .Values.modelRepository.init -}}
{{- with $init.artifacts.image }}
- name: artifacts
  image: {{ . | quote }}
  command: [cp, -R, {{ printf "%s/." $init.artifacts.path | quote }}, /staging/]
  resources: {{- toYaml $init.resources | nindent 4 }}
  securityContext: {{- include "regionspot.containerSecurity" $ | nindent 4 }}
  volumeMounts:
    - {name: artifacts, mountPath: /staging}
{{- end }}
- name: init
  image: {{ include "regionspot.image" (dict "root" . "image" $init.image) | quote }}
  imagePullPolicy: {{ $init.image.pullPolicy }}
  command: [regionspot-serve, init]
  args:
    - --artifacts
    - /artifacts
    - --out
    - /models
    - --target
    - {{ .Values.triton.target | quote }}
    {{- with $init.args }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources: {{- toYaml $init.resources | nindent 4 }}
  securityContext: {{- include "regionspot.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: artifacts
      mountPath: /artifacts
      readOnly: true
      {{- if $init.artifacts.existingClaim }}
      {{- with $init.artifacts.subPath }}
      subPath: {{ . | quote }}
      {{- end }}
      {{- end }}
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /var/lib/regionspot}
{{- end -}}
