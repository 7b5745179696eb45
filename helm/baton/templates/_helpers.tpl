{{- define "baton.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "baton.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "baton.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "baton.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "baton.selector" . }}
{{- end -}}

{{- define "baton.selector" -}}
app.kubernetes.io/name: {{ include "baton.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "baton.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "baton.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "baton.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* Ports by role; the only place that has numbers. */}}
{{- define "baton.port" -}}
{{- get (dict "gateway" 50051 "prefill" 50061 "decode" 50071 "kv" 50062 "metrics" 9090 "redis" 6379) . -}}
{{- end -}}

{{/* Where the model lies in the container; empty for the demo model. */}}
{{- define "baton.modelPath" -}}
{{- if eq .Values.model.source "image" -}}
{{- required "model.path is needed when model.source is image" .Values.model.path -}}
{{- else if ne .Values.model.source "demo" -}}
{{- printf "/models/%s" .Values.model.path | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* Name and key of the secret with the Redis URL. */}}
{{- define "baton.redisSecret" -}}
{{- if and (eq .Values.redis.mode "external") .Values.redis.existingSecret.name -}}
name: {{ .Values.redis.existingSecret.name }}
key: {{ .Values.redis.existingSecret.key }}
{{- else -}}
name: {{ include "baton.fullname" . }}-redis
key: url
{{- end -}}
{{- end -}}

{{/* The configuration file of one role: what the values say, and what the chart knows better. */}}
{{- define "baton.config" -}}
{{- $config := deepCopy (get .root.Values .role).config -}}
{{- range $name, $value := .root.Values.scheduling -}}
{{- if not (hasKey $config $name) -}}
{{- $_ := set $config $name $value -}}
{{- end -}}
{{- end -}}
{{- if and (eq .role "gateway") .root.Values.gateway.lengths.claimName -}}
{{- $_ := set $config "length_state" "/var/lib/baton/lengths" -}}
{{- end -}}
{{- $_ := set $config "address" (printf "0.0.0.0:%s" (include "baton.port" .role)) -}}
{{- $_ := set $config "metrics_address" (printf "0.0.0.0:%s" (include "baton.port" "metrics")) -}}
{{- $_ := set $config "insecure_network" true -}}
{{- with include "baton.modelPath" .root -}}
{{- $_ := set $config "model" . -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* "true" for a role whose workers are several ranks on GPUs; each rank needs one of its own. */}}
{{- define "baton.ranks" -}}
{{- $tensor := get .config "tensor_parallel" | default 1 | int -}}
{{- $ranks := mul $tensor (get .config "pipeline_parallel" | default 1 | int) -}}
{{- if and (gt $ranks 1) (hasPrefix "cuda" (get .config "device" | default "cpu")) -}}
{{- $gpus := dig "limits" "nvidia.com/gpu" $ranks .resources | int64 -}}
{{- if lt $gpus $ranks -}}
{{- fail (printf "%d ranks (tensor_parallel, pipeline_parallel) need as many nvidia.com/gpu in resources.limits, not %d" $ranks $gpus) -}}
{{- end -}}
true
{{- end -}}
{{- end -}}
