"""Pods on GKE: the manifest that is submitted, hosts and chips of a topology."""

import pytest
import yaml
from tpu_cloud import TPU, TRAIN, Cloud

SUBMIT = ("--name", "a", "--image", "eu-docker.pkg.dev/p/r/t:1", "--bucket", "bu", "--topology")


def submitted(cloud: Cloud, topology: str, *more: str) -> dict:
    done = cloud.run("gke/submit.sh", *SUBMIT, topology, *more, "--", "tsopsd", "eval", 'a "b" \\c')
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(cloud.calls_file.with_name("manifest.yaml").read_text())


def test_the_template_is_yaml_and_every_gap_is_filled(cloud):
    assert yaml.safe_load((TPU / "gke" / "jobset.yaml").read_text())["kind"] == "JobSet"
    submitted(cloud, "v5p:4x4x4")
    assert "${" not in cloud.calls_file.with_name("manifest.yaml").read_text().split("apiVersion", 1)[1]
    assert cloud.calls[0].startswith("kubectl create --filename=")


def test_the_manifest_says_what_a_run_needs(cloud):
    manifest = submitted(cloud, "v5p:4x4x4", "--slices", "2", "--spot", "--service-account", "sa")
    assert (manifest["apiVersion"], manifest["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "a")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    [slices] = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (16, 16, 0)  # 64 chips, 4 a host
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3, 6])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
    assert pod["terminationGracePeriodSeconds"] == 1800
    assert pod["serviceAccountName"] == "sa"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["image"] == "eu-docker.pkg.dev/p/r/t:1"
    assert container["command"] == ["tsopsd", "eval", 'a "b" \\c']
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bu"


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
    ],
)
def test_hosts_and_chips_of_a_topology(cloud, topology, accelerator, hosts, chips):
    job = submitted(cloud, topology)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    assert pod["nodeSelector"] == selector
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v7:4x4",), "expected v4, v5e, v5p or v6e before the colon, got v7"),
        (("v5p:4x4",), "expected 3 numbers for v5p, got 4x4"),
        (("v5p",), "expected KIND:SHAPE such as v5p:4x4x4, got v5p"),
        (("v5e:3x3",), "expected a multiple of 4 chips, got 3x3: 9"),
        (("v5e:4x4", "--slices", "x"), "--slices: expected a number from 1, got x"),
        (("v5e:4x4", "--bucket", "gs://bu"), "--bucket: expected its name without gs://, got gs://bu"),
        (("v5e:4x4", "--image", "a b"), "--image: expected an image's name, got a b"),
        (("v5e:4x4", "--name", "A"), "--name: expected lower-case letters"),
    ],
)
def test_submit_refuses_bad_input(cloud, arguments, message):
    done = cloud.run("gke/submit.sh", *SUBMIT, *arguments, *TRAIN)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.calls == []


def test_logs_and_delete_on_gke(cloud):
    assert cloud.run("gke/logs.sh", "--name", "a", "--slice", "1", "--namespace", "n").returncode == 0
    assert cloud.run("gke/delete.sh", "--name", "a").returncode == 0
    of = "jobset.sigs.k8s.io/jobset-name=a,jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=0"
    assert cloud.calls == [
        f"kubectl logs --follow --prefix --tail=100 --max-log-requests=1000 --selector={of} --namespace=n",
        "kubectl delete jobset a --cascade=foreground",
    ]
