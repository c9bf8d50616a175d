{{- define "kcm.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}
