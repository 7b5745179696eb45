{{/* The pod of a gateway, a prefill worker or a decode worker. */}}
{{- define "baton.pod" -}}
{{- $root := .root -}}
{{- $values := get $root.Values .role -}}
{{- $shm := include "baton.ranks" $values -}}
{{- $drain := get $values.config "drain_seconds" | default 10 | float64 -}}
metadata:
  labels:
    {{- include "baton.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
  annotations:
    checksum/config: {{ include "baton.config" . | sha256sum }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "baton.serviceAccount" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  # What requests may take to finish, and time to leave the cluster in order.
  terminationGracePeriodSeconds: {{ add $values.preStopSeconds (ceil $drain) 15 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: {{ include "baton.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args: [{{ .role }}, --config, /etc/baton/config.yaml]
      env:
        - name: BATON_REDIS_URL
          valueFrom:
            secretKeyRef:
              {{- include "baton.redisSecret" $root | nindent 14 }}
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        {{- if eq .role "gateway" }}
        - name: BATON_GATEWAY_ID
          value: $(POD_NAME)
        {{- with $values.lengths.saltSecret }}
        {{- if .name }}
        - name: BATON_LENGTH_SALT
          valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
        {{- end }}
        {{- end }}
        {{- else }}
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        - name: BATON_WORKER_ID
          value: $(POD_NAME)
        - name: BATON_ADVERTISE_ADDRESS
          value: $(POD_IP):{{ include "baton.port" .role }}
        {{- if eq .role "prefill" }}
        - name: BATON_KV_ADDRESS
          value: $(POD_IP):{{ include "baton.port" "kv" }}
        {{- end }}
        {{- if and (not (hasKey $values.config "threads")) (dig "limits" "cpu" "" $values.resources) }}
        - name: BATON_THREADS
          valueFrom: {resourceFieldRef: {resource: limits.cpu}}
        {{- end }}
        {{- end }}
        - name: HOME
          value: /tmp
        - name: XDG_CACHE_HOME
          value: /tmp/cache
        - name: HF_HOME
          value: /tmp/cache/huggingface
        - name: HF_HUB_OFFLINE
          value: "1"
        - name: TRITON_CACHE_DIR
          value: /tmp/cache/triton
        - name: TORCHINDUCTOR_CACHE_DIR
          value: /tmp/cache/inductor
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: grpc
          containerPort: {{ include "baton.port" .role }}
        {{- if eq .role "prefill" }}
        - name: kv
          containerPort: {{ include "baton.port" "kv" }}
        {{- end }}
        - name: metrics
          containerPort: {{ include "baton.port" "metrics" }}
      startupProbe:
        grpc: {port: {{ include "baton.port" .role }}}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: {{ div (add $values.startSeconds 1) 2 }}
      readinessProbe:
        grpc: {port: {{ include "baton.port" .role }}}
        periodSeconds: 5
        timeoutSeconds: 2
        failureThreshold: 2
      # Slow to judge: a busy process is not a dead one.
      livenessProbe:
        grpc: {port: {{ include "baton.port" .role }}}
        periodSeconds: 15
        timeoutSeconds: 10
        failureThreshold: 4
      {{- if $values.preStopSeconds }}
      lifecycle:
        preStop:
          sleep: {seconds: {{ $values.preStopSeconds }}}
      {{- end }}
      resources:
        {{- toYaml $values.resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      volumeMounts:
        - {name: config, mountPath: /etc/baton, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        {{- if $shm }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if has $root.Values.model.source (list "pvc" "hostPath") }}
        - {name: model, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if and (eq .role "gateway") $root.Values.gateway.lengths.claimName }}
        - {name: lengths, mountPath: /var/lib/baton}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ include "baton.fullname" $root }}-{{ .role }}}
    - name: tmp
      emptyDir: {}
    {{- if $shm }}
    - name: shm # NCCL's, where GPUs cannot reach each other's memory
      emptyDir: {medium: Memory, sizeLimit: 1Gi}
    {{- end }}
    {{- if eq $root.Values.model.source "pvc" }}
    - name: model
      persistentVolumeClaim:
        claimName: {{ required "model.claimName is needed when model.source is pvc" $root.Values.model.claimName }}
        readOnly: true
    {{- else if eq $root.Values.model.source "hostPath" }}
    - name: model
      hostPath:
        path: {{ required "model.hostPath is needed when model.source is hostPath" $root.Values.model.hostPath }}
        type: Directory
    {{- end }}
    {{- with $root.Values.gateway.lengths.claimName }}
    {{- if eq $.role "gateway" }}
    - name: lengths
      persistentVolumeClaim:
        claimName: {{ . }}
    {{- end }}
    {{- end }}
{{- end -}}
