//! The Helm chart `helm/kcm`, made from the manifests.
//!
//! Owns which parts of a manifest become values. A replacement whose text is not in the manifest as often as it should be
//! fails the test, so that a change of a manifest cannot pass by the chart. Does not know how Helm renders: a test of
//! `tests/it` renders the chart and compares.

use serde_json::{Value, json};

use super::device_plugin::{Additions, additions};
use super::{admission, crds, daemon_set, rbac, yaml};

/// A part of a manifest, how often it is there, and what stands for it in the chart.
type Replacement = (&'static str, usize, &'static str);

const GENERATED: &str =
    "# Generated from src/kubernetes/objects/deploy/helm.rs; golden.rs says how to do it again.\n";

const CHART: &str = "\
apiVersion: v2
name: kcm
description: CPU pools of nodes as a live filesystem, with exclusive CPU lists for pods
type: application
version: VERSION
appVersion: VERSION
kubeVersion: \">=1.30.0-0\"
";

const VALUES: &str = "\
# The image of deploy/Dockerfile.
image:
  repository: kcm
  tag: latest
  pullPolicy: IfNotPresent

# Pools are made on nodes that have none.
pools:
  # A number of cores, or auto.
  dataplane: auto
  controlplane: auto
  # affinity, or isolated: nothing else runs on the CPUs of a claimed list (cgroup v2, Linux 6.8).
  mode: affinity
# The text of layouts.yaml: pools for single nodes (kcm init --layouts). Without it, the ConfigMap kcm-layouts is used if
# there is one.
layouts: \"\"

# The taint of the nodes, key=value:effect; empty: no taint.
taint: kcm=true:NoSchedule

# Serve the mount. Without it, the unit of `kcm install --systemd` on each node does, which an update does not interrupt.
mount: true
# Give pods lists by their resource requests, without hostPath (Kubernetes 1.29, a runtime with CDI).
devicePlugin: false

# The nodes that run kcm. {} means all.
nodeSelector:
  kcm.intel.com/enabled: \"true\"
tolerations:
- operator: Exists
priorityClassName: system-node-critical

resources:
  # The container that serves the mount.
  mount:
    requests:
      cpu: 10m
      memory: 32Mi
  # Each of the others.
  tools:
    requests:
      cpu: 10m
      memory: 16Mi

# Seconds between two runs of reconcile, node-report and discover.
interval: 60

serviceAccount:
  # Make the account of the DaemonSet with its role.
  create: true
  name: kcm-node
# Make the accounts kcm-cluster-init and kcm-cluster-uninstall for the commands of these names.
commandAccounts: false
# Tie the account of the DaemonSet to its own node.
admissionPolicy: true

monitoring:
  # The alert rules as a PrometheusRule of the Prometheus operator.
  rules: false
  # The dashboard as a ConfigMap for the sidecar of Grafana.
  dashboard: false
";

/// Helm refuses values that this does not allow, so that a misspelt one is not ignored.
fn schema() -> String {
    let map = json!({ "type": "object" });
    let text = json!({ "type": "string" });
    let cores = json!({ "anyOf": [{ "const": "auto" }, { "type": "integer", "minimum": 0 }] });
    let object = |properties: Value| json!({ "type": "object", "additionalProperties": false, "properties": properties });
    let mut schema = object(json!({
        "image": object(json!({
            "repository": text, "tag": text,
            "pullPolicy": { "enum": ["Always", "IfNotPresent", "Never"] },
        })),
        "pools": object(json!({
            "dataplane": cores, "controlplane": cores, "mode": { "enum": ["affinity", "isolated"] },
        })),
        "layouts": text,
        "taint": { "type": "string", "pattern": "^$|^[^=:]+(=[^:]*)?:(NoSchedule|PreferNoSchedule|NoExecute)$" },
        "mount": { "type": "boolean" },
        "devicePlugin": { "type": "boolean" },
        "nodeSelector": map,
        "tolerations": { "type": "array" },
        "priorityClassName": text,
        "resources": object(json!({ "mount": map, "tools": map })),
        "interval": { "type": "number", "exclusiveMinimum": 0 },
        "serviceAccount": object(json!({ "create": { "type": "boolean" }, "name": text })),
        "commandAccounts": { "type": "boolean" },
        "admissionPolicy": { "type": "boolean" },
        "monitoring": object(json!({ "rules": { "type": "boolean" }, "dashboard": { "type": "boolean" } })),
        // Helm itself adds it.
        "global": map,
    }));
    schema["$schema"] = "http://json-schema.org/draft-07/schema#".into();
    serde_json::to_string_pretty(&schema).unwrap() + "\n"
}

const HELPERS: &str = "\
{{- define \"kcm.image\" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}
";

const NOTES: &str = "\
kcm runs on the nodes that have the labels of nodeSelector:
{{- if .Values.nodeSelector }}
{{- range $label, $value := .Values.nodeSelector }}
  kubectl label node NODE {{ $label }}={{ $value }}
{{- end }}
{{- else }}
  all nodes
{{- end }}
Its pods are privileged. If the namespace enforces a lower level:
  kubectl label namespace {{ .Release.Namespace }} pod-security.kubernetes.io/enforce=privileged
Then: kubectl get nodereports
";

const LAYOUTS: &str = "\
{{- if .Values.layouts }}
apiVersion: v1
kind: ConfigMap
metadata:
  name: kcm-layouts
  namespace: {{ .Release.Namespace }}
data:
  layouts.yaml: {{ .Values.layouts | quote }}
{{- end }}
";

const RULES: &str = "\
{{- if .Values.monitoring.rules }}
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  labels:
    app.kubernetes.io/name: kcm
  name: kcm
  namespace: {{ .Release.Namespace }}
spec:
  {{- .Files.Get \"files/alerts.yaml\" | nindent 2 }}
{{- end }}
";

/// As the component `monitoring` makes it.
const DASHBOARD: &str = "\
{{- if .Values.monitoring.dashboard }}
apiVersion: v1
kind: ConfigMap
metadata:
  labels:
    grafana_dashboard: \"1\"
  name: kcm-dashboard
  namespace: {{ .Release.Namespace }}
data:
  kcm.json: {{ .Files.Get \"files/dashboard.json\" | quote }}
{{- end }}
";

fn replaced(text: &str, replacements: &[Replacement]) -> String {
    replacements.iter().fold(text.to_owned(), |text, (part, count, value)| {
        assert_eq!(text.matches(part).count(), *count, "{part:?} in the manifest");
        text.replace(part, value)
    })
}

/// A manifest without its first comment, which is about `deploy/`.
fn body(manifest: &str) -> String {
    manifest.split_inclusive('\n').skip_while(|line| line.starts_with('#')).collect()
}

const NAMESPACE: &str = "namespace: kcm-system\n";
const RELEASE: &str = "namespace: {{ .Release.Namespace }}\n";
const TOOLS: &str =
    "        resources:\n          requests:\n            cpu: 10m\n            memory: 16Mi\n";
const MOUNT: &str =
    "        resources:\n          requests:\n            cpu: 10m\n            memory: 32Mi\n";

/// Items of a list in the pod, with this many spaces before them, if a value is set.
fn items_if<T: serde::Serialize>(value: &str, spaces: usize, items: &[T]) -> String {
    let text: String = yaml(&items).lines().map(|line| format!("{:spaces$}{line}\n", "")).collect();
    format!("{:spaces$}{{{{- if .Values.{value} }}}}\n{text}{:spaces$}{{{{- end }}}}\n", "", "")
}

/// The manifest with the parts that are there only if a value is set.
fn daemon_set_with_choices() -> String {
    let Additions { init_container, containers, volumes } = additions();
    let add = |before: &'static str, items: String| (before, items + before);
    let parts = [
        ("      initContainers:\n", "      initContainers:\n      {{- if .Values.mount }}\n".to_owned()),
        add("      - args:\n        - init\n", "      {{- end }}\n".into()),
        add("      hostPID: true\n", items_if("devicePlugin", 6, &containers)),
        add("      nodeSelector:\n", items_if("devicePlugin", 6, &[init_container])),
        add("  updateStrategy:\n", items_if("devicePlugin", 6, &volumes)),
    ];
    parts.iter().fold(body(&daemon_set::manifest()), |text, (at, with)| {
        assert_eq!(text.matches(at).count(), 1, "{at:?} in the manifest");
        text.replace(at, with)
    })
}

fn daemon_set_template() -> String {
    replaced(
        &daemon_set_with_choices(),
        &[
            (NAMESPACE, 1, RELEASE),
            ("image: kcm\n", 8, "image: {{ include \"kcm.image\" . }}\n"),
            ("imagePullPolicy: IfNotPresent\n", 8, "imagePullPolicy: {{ .Values.image.pullPolicy }}\n"),
            ("- --interval=60\n", 3, "- --interval={{ .Values.interval }}\n"),
            ("--num-dp-cores=auto\n", 1, "--num-dp-cores={{ .Values.pools.dataplane }}\n"),
            ("--num-cp-cores=auto\n", 1, "--num-cp-cores={{ .Values.pools.controlplane }}\n"),
            (
                "        - --if-empty\n",
                1,
                "        - --if-empty\n        {{- if eq .Values.pools.mode \"isolated\" }}\n        - --isolated\n        {{- end }}\n",
            ),
            (
                "        - --resource-name=extended\n",
                1,
                "        - --resource-name={{ if .Values.devicePlugin }}none{{ else }}extended{{ end }}\n        {{- if not .Values.taint }}\n        - --no-taint\n        {{- else if ne .Values.taint \"kcm=true:NoSchedule\" }}\n        - --taint={{ .Values.taint }}\n        {{- end }}\n",
            ),
            (
                "      nodeSelector:\n        kcm.intel.com/enabled: \"true\"\n",
                1,
                "      {{- with .Values.nodeSelector }}\n      nodeSelector:\n        {{- toYaml . | nindent 8 }}\n      {{- end }}\n",
            ),
            (
                "      tolerations:\n      - operator: Exists\n",
                1,
                "      tolerations:\n        {{- toYaml .Values.tolerations | nindent 8 }}\n",
            ),
            (
                "priorityClassName: system-node-critical\n",
                1,
                "priorityClassName: {{ .Values.priorityClassName }}\n",
            ),
            ("serviceAccountName: kcm-node\n", 1, "serviceAccountName: {{ .Values.serviceAccount.name }}\n"),
            (TOOLS, 7, "        resources:\n          {{- toYaml .Values.resources.tools | nindent 10 }}\n"),
            (MOUNT, 1, "        resources:\n          {{- toYaml .Values.resources.mount | nindent 10 }}\n"),
        ],
    )
}

/// The accounts. The namespace is not a part of a chart: Helm keeps the release in it.
fn rbac_template() -> String {
    let text = body(&rbac());
    let documents: Vec<&str> = text.split("---\n").skip(1).collect();
    let (node, commands) = documents.split_at(3);
    let [node, commands] = [node, commands].map(|documents| documents.join("---\n"));
    let node = replaced(
        &node,
        &[(NAMESPACE, 2, RELEASE), ("name: kcm-node\n", 5, "name: {{ .Values.serviceAccount.name }}\n")],
    );
    let commands = replaced(&commands, &[(NAMESPACE, 4, RELEASE)]);
    format!(
        "{{{{- if .Values.serviceAccount.create }}}}\n{node}{{{{- end }}}}\n{{{{- if .Values.commandAccounts }}}}\n---\n{commands}{{{{- end }}}}\n"
    )
}

fn admission_template() -> String {
    let text = replaced(
        &body(&admission::policies()),
        &[(
            "system:serviceaccount:kcm-system:kcm-node",
            2,
            "system:serviceaccount:{{ .Release.Namespace }}:{{ .Values.serviceAccount.name }}",
        )],
    );
    format!("{{{{- if .Values.admissionPolicy }}}}\n{text}{{{{- end }}}}\n")
}

pub(super) fn files() -> Vec<(String, String)> {
    let chart = CHART.replace("VERSION", env!("CARGO_PKG_VERSION"));
    let alerts = include_str!("../../../../deploy/monitoring/alerts.yaml");
    let dashboard = include_str!("../../../../deploy/monitoring/dashboard.json");
    [
        ("Chart.yaml", GENERATED.to_owned() + &chart),
        ("values.yaml", GENERATED.to_owned() + VALUES),
        ("values.schema.json", schema()),
        ("crds/crds.yaml", crds()),
        ("files/alerts.yaml", alerts.to_owned()),
        ("files/dashboard.json", dashboard.to_owned()),
        ("templates/_helpers.tpl", HELPERS.to_owned()),
        ("templates/NOTES.txt", NOTES.to_owned()),
        ("templates/admission.yaml", admission_template()),
        ("templates/daemonset.yaml", daemon_set_template()),
        ("templates/dashboard.yaml", DASHBOARD.to_owned()),
        ("templates/layouts.yaml", LAYOUTS.to_owned()),
        ("templates/rbac.yaml", rbac_template()),
        ("templates/rules.yaml", RULES.to_owned()),
    ]
    .map(|(name, text)| (format!("helm/kcm/{name}"), text))
    .into()
}
