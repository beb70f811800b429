"""Checks what is deployed, as far as that goes without a container engine and a cluster.

Run by `cargo xtask test` with an environment that holds the packages named in xtask/src/setup.rs. Prints a line for each part
that holds, and ends with 1 and a line for each defect otherwise.
"""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import kubernetes_validate
import promql_parser
import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
GUIDE = DEPLOY / "OPERATIONS.md"
BIN = Path(sys.executable).parent
# The oldest cluster the manifests are meant for, and the newest whose schemas are at hand.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
# What a worker needs at least: the trainer's minute, and the upload of a checkpoint.
WORKER_GRACE_SECONDS = 300
PROVIDERS = ("AWS_", "AZURE_", "GOOGLE_", "OMP_NUM_THREADS")
# Labels that the scrape gives every series.
SCRAPED = {"job", "instance", "namespace", "pod"}

defects = []


def check(holds, where, what):
    if not holds:
        defects.append(f"{where}: {what}")
    return holds


def relative(path):
    return str(path.relative_to(ROOT))


def source(folder):
    return "\n".join(path.read_text() for path in sorted((ROOT / folder).rglob("*.rs")))


def settings():
    """The names of the environment that the program reads, and its subcommands."""
    wired = source("crates/holdfast/src")
    names = set(re.findall(r'env = "(\w+)"', wired)) | set(re.findall(r"\bHOLDFAST_LOG\b", wired))
    commands = re.search(r"enum Command \{(.*?)\n\}", wired, re.S).group(1)
    return names, {re.sub(r"(?<=.)([A-Z])", r"-\1", name).lower() for name in re.findall(r"^    ([A-Z]\w*)", commands, re.M)}


def metrics():
    """The metrics that the code exports, each with its labels."""
    found = {}
    code = source("crates")
    for kind, name, labels in re.findall(r'metrics::(counter|histogram|gauge)!\(\s*"(holdfast_\w+)"([^;]*?)\)\s*\.', code):
        labels = set(re.findall(r'"(\w+)" =>', labels))
        if kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    # Gauges are written out line by line, from a list whose labels stand where it is made.
    made = {}
    for variable, label, name, given in re.findall(
        r'let (\w+)[^=\n]*= [\w.]+\.iter\(\)[^;]*?format!\("\{\{(\w+)=|gauge\("(holdfast_\w+)", "[^"]*", &(\w+)', code
    ):
        if variable:
            made[variable] = {label}
        else:
            found[name] = made.get(given, set())
    return found


# Kubernetes


def merge(base, patch):
    """A strategic merge, as far as these patches use it: maps by key, lists of named things by name, other lists whole."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merge(base.get(key), value) for key, value in patch.items()}

    def is_named(items):
        return isinstance(items, list) and all(isinstance(item, dict) and "name" in item for item in items)

    if is_named(base) and is_named(patch):
        merged = {item["name"]: item for item in base}
        for item in patch:
            merged[item["name"]] = merge(merged.get(item["name"]), item)
        return list(merged.values())
    return patch


def key_of(manifest):
    return manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]


def build(folder):
    """What `kubectl kustomize FOLDER` gives, as far as these kustomizations go."""
    where = folder / "kustomization.yaml"
    kustomization = yaml.safe_load(where.read_text())
    known = {"apiVersion", "kind", "resources", "images", "patches"}
    check(set(kustomization) <= known, relative(where), f"this check knows nothing of {sorted(set(kustomization) - known)}")
    manifests = {}
    for resource in kustomization["resources"]:
        path = (folder / resource).resolve()
        if not check(path.exists(), relative(where), f"{resource} is not there"):
            continue
        loaded = build(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
        for manifest in loaded:
            check(key_of(manifest) not in manifests, relative(path), f"{key_of(manifest)} stands twice")
            manifests[key_of(manifest)] = manifest
    for patch in kustomization.get("patches", []):
        change = yaml.safe_load((folder / patch["path"]).read_text())
        if check(key_of(change) in manifests, relative(folder / patch["path"]), f"patches {key_of(change)}, which is not there"):
            manifests[key_of(change)] = merge(manifests[key_of(change)], change)
    used = set()
    for manifest in manifests.values():
        for container in (pod_of(manifest) or {}).get("containers", []):
            name = container["image"].split(":")[0]
            for image in kustomization.get("images", []):
                if image["name"] == name:
                    used.add(name)
                    container["image"] = f"{image.get('newName', name)}:{image['newTag']}"
    for image in kustomization.get("images", []):
        check(image["name"] in used, relative(where), f"no container has the image {image['name']}")
    return list(manifests.values())


def template_of(manifest):
    is_workload = manifest["kind"] in ("Deployment", "StatefulSet", "Job")
    return manifest["spec"]["template"] if is_workload else None


def pod_of(manifest):
    template = template_of(manifest)
    return template and template["spec"]


def is_in(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def check_schemas(where, manifests):
    before = len(defects)
    for manifest in manifests:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                who, path = f"{manifest['kind']} {manifest['metadata']['name']}", ".".join(str(part) for part in error.path)
                check(False, where, f"{who}, Kubernetes {version}, {path}: {error.message}")
                break
        check("namespace" not in manifest["metadata"], where, f"{key_of(manifest)} names a namespace")
    return len(defects) == before


def check_pod(where, manifest, manifests, names, commands):
    pod, who = pod_of(manifest), f"{manifest['kind']} {manifest['metadata']['name']}"
    accounts = {m["metadata"]["name"] for m in manifests if m["kind"] == "ServiceAccount"}
    check(pod.get("serviceAccountName") in accounts, where, f"{who}: its service account is not there")
    check(pod.get("automountServiceAccountToken") is False, where, f"{who} mounts a token")
    security = pod.get("securityContext", {})
    check(security.get("runAsNonRoot") is True, where, f"{who} may run as root")
    check(security.get("seccompProfile", {}).get("type") == "RuntimeDefault", where, f"{who} has no seccomp profile")
    claims = manifest["spec"].get("volumeClaimTemplates", [])
    volumes = {volume["name"] for volume in pod.get("volumes", [])} | {claim["metadata"]["name"] for claim in claims}
    for container in pod["containers"]:
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        inside = container.get("securityContext", {})
        check(inside.get("readOnlyRootFilesystem") is True, where, f"{who} may write its root")
        check({"/tmp", "/var/lib/holdfast"} <= set(mounts), where, f"{who} lacks a place to write")
        check(set(mounts.values()) <= volumes, where, f"{who} mounts a volume that is not there")
        check(inside.get("allowPrivilegeEscalation") is False, where, f"{who} may gain privileges")
        check(inside.get("capabilities", {}).get("drop") == ["ALL"], where, f"{who} keeps capabilities")
        check("memory" in container["resources"]["limits"], where, f"{who} has no limit of memory")
        check(":" in container["image"], where, f"{who}: no kustomization gives {container['image']} a tag")
        check(set(container["args"][:1]) <= commands, where, f"{who}: holdfast has no command {container['args']}")
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container:
                call = container[probe]["httpGet"]
                check(call["port"] in ports, where, f"{who}: the {probe} asks a port that it has not")
                check(is_route(call["path"]), where, f"{who}: there is no {call['path']}")
        for variable in container.get("env", []):
            check(is_setting(variable["name"], names), where, f"{who}: nothing reads {variable['name']}")
        for read in container.get("envFrom", []):
            there = {(m["kind"], m["metadata"]["name"]) for m in (*manifests, *secrets())}
            for reference, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if reference in read:
                    check((kind, read[reference]["name"]) in there, where, f"{who} reads a {kind} that is not there")


def value_of(setting, container):
    return next((variable.get("value") for variable in container["env"] if variable["name"] == setting), None)


def check_signing_key(where, worker):
    """Workers sign with one key, and it outlives them."""
    pod = pod_of(worker)
    given = {secret["metadata"]["name"]: secret["stringData"] for secret in secrets()}
    mounted = {
        f"{mount['mountPath']}/{key}"
        for mount in pod["containers"][0]["volumeMounts"]
        for volume in pod["volumes"]
        if volume["name"] == mount["name"] and "secret" in volume
        for key in given.get(volume["secret"]["secretName"], {})
    }
    key = value_of("HOLDFAST_SIGNING_KEY", pod["containers"][0])
    check(key in mounted, where, f"workers sign with {key}, which no Secret of secret.yaml.template is mounted at")


def is_route(path):
    return f'path = "{path}"' in source("crates/api/src/handlers")


def is_setting(name, names):
    return name in names or name.startswith(PROVIDERS)


def secrets():
    return list(yaml.safe_load_all((KUBERNETES / "base/secret.yaml.template").read_text()))


def check_kubernetes(names, commands):
    check_schemas("deploy/kubernetes/base/secret.yaml.template", secrets())
    for name in secrets()[0]["stringData"]:
        check(is_setting(name, names), "deploy/kubernetes/base/secret.yaml.template", f"nothing reads {name}")
    for folder in [KUBERNETES / "base", *sorted((KUBERNETES / "overlays").iterdir())]:
        where, manifests = relative(folder), build(folder)
        # What has another shape than expected cannot be looked into.
        if not check_schemas(where, manifests):
            continue
        check(all(m["kind"] != "Secret" for m in manifests), where, "a Secret would be applied")
        pods = [template["metadata"]["labels"] for template in map(template_of, manifests) if template]
        for manifest in manifests:
            kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest.get("spec", {})
            selector = spec.get("podSelector", spec.get("selector", {}))
            selector = selector.get("matchLabels", selector)
            check(not selector or any(is_in(selector, labels) for labels in pods), where, f"{kind} {name} selects no pod")
            if kind in ("Deployment", "StatefulSet"):
                own = template_of(manifest)["metadata"]["labels"]
                check(is_in(selector, own), where, f"{kind} {name} does not select its own pods")
            if kind == "ConfigMap":
                for setting in manifest["data"]:
                    check(is_setting(setting, names), where, f"ConfigMap {name}: nothing reads {setting}")
            if pod_of(manifest):
                check_pod(where, manifest, manifests, names, commands)
        worker = next(m for m in manifests if m["kind"] == "StatefulSet")
        check_signing_key(where, worker)
        grace = pod_of(worker).get("terminationGracePeriodSeconds", 30)
        check(grace >= WORKER_GRACE_SECONDS, where, f"{grace} s are too few for a worker to drain")
        if folder.name == "gpu":
            container = pod_of(worker)["containers"][0]
            check("nvidia.com/gpu" in container["resources"]["limits"], where, "workers ask for no GPU")
            device = value_of("HOLDFAST_DEVICE", container)
            check(device == "cuda", where, f"workers compute on {device}")
        say(where, f"{len(manifests)} manifests, against the schemas of Kubernetes {' and '.join(VERSIONS)}")


# Compose


def resolve(path, environment):
    """What podman-compose makes of the file; it asks for an engine's version first, which a stand-in answers."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder, "podman")
        engine.write_text("#!/bin/sh\necho podman version 5.0.0\n")
        engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
        path_variable = f"{folder}:{os.environ['PATH']}"
        command = [sys.executable, "-m", "podman_compose", "--env-file", "/dev/null", "-f", str(path), "config"]
        return subprocess.run(command, env={"PATH": path_variable, "HOME": folder, **environment}, capture_output=True, text=True)


def check_compose(names, commands):
    path = DEPLOY / "compose.yaml"
    where, text = relative(path), path.read_text()
    needed = sorted(set(re.findall(r"\$\{(\w+):\?", text)))
    values = {name: "secretsecret" for name in needed}
    for missing in needed:
        refused = resolve(path, {name: value for name, value in values.items() if name != missing})
        named = f"required variable {missing}" in refused.stderr
        check(refused.returncode != 0 and named, where, f"it resolves without {missing}")
    resolved = resolve(path, values)
    if not check(resolved.returncode == 0, where, f"it does not resolve: {resolved.stderr.strip().splitlines()[-1:]}"):
        return
    project = yaml.safe_load(resolved.stdout)
    services, volumes = project["services"], set(project["volumes"])
    for name, service in services.items():
        check("@" in service["image"] or ":" in service["image"], where, f"{name}: {service['image']} has no tag")
        for after, how in service.get("depends_on", {}).items():
            if check(after in services, where, f"{name} waits for {after}, which is not there"):
                is_told = how["condition"] != "service_healthy" or "test" in services[after].get("healthcheck", {})
                check(is_told, where, f"{name} waits for the health of {after}, which has no check")
        for volume in service.get("volumes", []):
            check(volume.split(":")[0] in volumes, where, f"{name}: the volume of {volume} is not there")
        if service.get("build"):
            check(service.get("read_only") is True and "/tmp" in service.get("tmpfs", []), where, f"{name} may write its root")
            check(set(service["command"][:1]) <= commands, where, f"{name}: holdfast has no command {service['command']}")
            for setting in service["environment"]:
                check(is_setting(setting, names), where, f"{name}: nothing reads {setting}")
    say(where, f"{len(services)} services; without {', '.join(needed)} it says which is missing")


# Monitoring


def check_query(where, query, exported):
    """A query is well formed, and asks only for what is exported, by labels that it has."""
    plain = query.replace("$__rate_interval", "5m").replace("$job", "holdfast").replace("$route", ".*")
    try:
        tree = promql_parser.parse(plain)
    except ValueError as error:
        check(False, where, f"{query!r} is no query: {error}")
        return
    labels, asked = set(), set()

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            if node.name != "up" and check(node.name in exported, where, f"nothing exports {node.name}"):
                labels.update(exported[node.name])
                for matcher in node.matchers.matchers:
                    known = exported[node.name] | SCRAPED | {"__name__"}
                    check(matcher.name in known, where, f"{node.name} has no label {matcher.name}")
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            asked.update(node.modifier.labels)

    promql_parser.walk(tree, visit)
    check(asked <= labels | SCRAPED, where, f"no metric of {query!r} has a label {sorted(asked - labels - SCRAPED)}")


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}


def check_alerts(exported):
    path = DEPLOY / "monitoring/alerts.yaml"
    where, known = relative(path), anchors(GUIDE)
    rules = [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    for rule in rules:
        name = rule["alert"]
        check_query(f"{where}, {name}", rule["expr"], exported)
        check(rule.get("labels", {}).get("severity") in ("warning", "critical"), where, f"{name} has no severity")
        check(rule.get("annotations", {}).get("summary"), where, f"{name} has no summary")
        file, _, anchor = rule.get("annotations", {}).get("runbook", "").partition("#")
        there = file == relative(GUIDE) and anchor in known
        check(there, where, f"the runbook of {name} leads to {file}#{anchor}, which is not there")
    named = {rule["alert"] for rule in rules}
    for heading in known.values():
        check(not heading.startswith("Holdfast") or heading in named, relative(GUIDE), f"there is no alert {heading}")
    say(where, f"{len(rules)} alerts, each with its section in {relative(GUIDE)}")


def check_dashboard(exported):
    path = DEPLOY / "monitoring/holdfast.json"
    where, dashboard = relative(path), json.loads(path.read_text())
    for key in ("uid", "title", "schemaVersion", "panels", "templating", "time"):
        check(key in dashboard, where, f"it has no {key}")
    numbers, places, queries = set(), set(), 0
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for variable in dashboard["templating"]["list"]:
        for name in re.findall(r"label_values\((\w+)", variable.get("definition", "")):
            check(name in exported, where, f"nothing exports {name}")
    for panel in dashboard["panels"]:
        title, grid = panel.get("title"), panel["gridPos"]
        check(title, where, f"panel {panel['id']} has no title")
        check(panel["id"] not in numbers, where, f"two panels have the number {panel['id']}")
        numbers.add(panel["id"])
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        check(grid["x"] + grid["w"] <= 24 and not cells & places, where, f"{title}: its place is taken, or there is none")
        places |= cells
        check(panel["type"] == "row" or panel.get("targets"), where, f"{title} asks nothing")
        for target in panel.get("targets", []):
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            check(used <= variables, where, f"{title}: there is no variable {sorted(used - variables)}")
            check_query(f"{where}, {title}", target["expr"], exported)
            queries += 1
    text = path.read_text() + (DEPLOY / "monitoring/alerts.yaml").read_text()
    for name in {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}:
        check(name in text, where, f"{name} is exported and shown nowhere")
    say(where, f"{queries} queries over what the code exports")


def check_scraping():
    path = DEPLOY / "monitoring/prometheus.yaml"
    where, configuration = relative(path), yaml.safe_load(path.read_text())
    for file in configuration["rule_files"]:
        check((path.parent / file).exists(), where, f"{file} is not there")
    jobs = {job["job_name"] for job in configuration["scrape_configs"]}
    for job in set(re.findall(r'job="(\w+)"', (DEPLOY / "monitoring/alerts.yaml").read_text())):
        check(job in jobs, where, f"the alerts look at the job {job}, which is not there")
    say(where, "an example of how they are read")


# The image and the guide


def check_dockerfile(commands):
    path = ROOT / "Dockerfile"
    where, text = relative(path), path.read_text()
    found = subprocess.run([BIN / "hadolint", "--no-color", path], capture_output=True, text=True, cwd=ROOT)
    for line in (found.stdout + found.stderr).splitlines():
        check(False, where, line)
    check(re.findall(r"^USER (\d+)", text, re.M)[-1:] not in ([], ["0"]), where, "it runs as root, or its user has no number")
    for command in re.findall(r'"holdfast", "(\w+)"|^CMD \["(\w+)"\]', text, re.M):
        check(set(filter(None, command)) <= commands, where, f"holdfast has no command {' '.join(filter(None, command))}")
    say(where, "hadolint has nothing to say")


def check_guide(names, commands):
    where, text = relative(GUIDE), GUIDE.read_text()
    for name in set(re.findall(r"\bHOLDFAST_[A-Z_]+|\bOTEL_[A-Z_]+", text)):
        check(is_setting(name, names), where, f"nothing reads {name}")
    for command in set(re.findall(r"(?:^    |`)holdfast ([\w-]+)", text, re.M)):
        check(command in commands, where, f"holdfast has no command {command}")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = DEPLOY / file if file else GUIDE
        if check(target.exists(), where, f"{link} leads nowhere") and anchor:
            check(anchor in anchors(target), where, f"{link} leads nowhere")
    for path in re.findall(r"\s/?(/v1/[\w/{}]+|/admin/\w+)`", text):
        check(is_route(path), where, f"there is no {path}")
    say(where, "its settings, commands and links are there")


said = 0


def say(where, what):
    """One line for a part without defects."""
    global said
    if len(defects) == said:
        print(f"{where}: {what}")
    said = len(defects)


def main():
    names, commands = settings()
    exported = metrics()
    check_dockerfile(commands)
    check_compose(names, commands)
    check_kubernetes(names, commands)
    check_alerts(exported)
    check_dashboard(exported)
    check_scraping()
    check_guide(names, commands)
    for defect in defects:
        print(f"DEFECT {defect}", file=sys.stderr)
    sys.exit(1 if defects else 0)


if __name__ == "__main__":
    main()
