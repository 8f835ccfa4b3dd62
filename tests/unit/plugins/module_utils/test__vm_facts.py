# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import pathlib
import shlex

import pytest
from ansible_collections.hecaton.fleet.plugins.module_utils import _vm_facts
from ansible_collections.hecaton.fleet.plugins.module_utils._host_facts import Storage

DOMAINS = pathlib.Path(__file__).parent / "domains"
MOUNTS = """\
/dev/vda1 / ext4 rw,relatime 0 0
tmpfs /dev/shm tmpfs rw 0 0
filer:/images /mnt/nfs nfs4 rw,vers=4.2 0 0
none /run/remote_ram remote_ram rw 0 0
hugetlbfs /dev/hugepages hugetlbfs rw 0 0
"""
FIELDS = [
    "name", "uuid", "driver", "state", "job", "memory_mib", "memory_resident_mib", "vcpus", "machine", "cpu", "disks", "host_devices", "memory_backend",
    "dirty_rate_mib_s", "dirty_rate_error", "networks", "groups", "migration", "blockers", "engines", "onboarding", "notes",
]  # fmt: skip


def domain(name, state="running", job=None, shared_paths=(), change=None, **more):
    xml = (DOMAINS / f"{name}.xml").read_text()
    if change:
        assert change[0] in xml
        xml = xml.replace(*change)
    return _vm_facts.facts_from_domain_xml(xml, state, job, Storage(MOUNTS, shared_paths), **more)


def codes(blockers):
    return [blocker["code"] for blocker in blockers]


def messages(vm, code):
    return [blocker["message"] for blocker in vm["blockers"] if blocker["code"] == code]


# ---- libvirt


def test_a_domain_without_ties_can_leave_by_every_engine():
    vm = domain("web1")
    assert sorted(vm) == sorted(FIELDS)
    assert vm["blockers"] == []
    assert {name: (engine["usable"], [entry["code"] for entry in engine["blockers"]]) for name, engine in vm["engines"].items()} == {
        "precopy": (True, []),
        "userfault": (True, []),
        "remote_ram": (False, ["driver_unsupported"]),
    }


def test_the_facts_of_a_domain():
    vm = domain("web1")
    assert (vm["name"], vm["uuid"], vm["driver"]) == ("web1", "7d0c1f5e-6a2b-4d8e-9c55-0f3a4b7de921", "libvirt")
    # What it may grow to, not what its balloon leaves it with now.
    assert (vm["memory_mib"], vm["vcpus"], vm["machine"]) == (256, 2, "pc-q35-10.0")
    assert vm["cpu"] == {"mode": "custom", "model": "EPYC-Rome", "features": ["hypervisor", "x2apic"], "migratable": True}
    assert vm["disks"] == [
        {
            "target": "vda",
            "source": "nbd://10.77.1.100:10809/web1",
            "kind": "network",
            "format": "raw",
            "shared": True,
            "readonly": False,
            "backing": [],
        },
        {"target": "sda", "source": None, "kind": "file", "format": None, "shared": True, "readonly": True, "backing": []},
    ]
    assert vm["memory_backend"] == {"kind": "memfd", "path": None, "file_system": None, "shared": True}
    assert vm["networks"] == [
        {"kind": "bridge", "source": "br0", "mac": "52:54:00:6b:3c:58"},
        {"kind": "network", "source": "virbr0", "mac": "52:54:00:6b:3c:59"},
    ]
    assert vm["groups"] == {"affinity": ["shop"], "anti_affinity": ["web", "database"]}


def test_firmware_variables_an_emulated_tpm_and_own_shared_memory_move_along():
    assert domain("web1")["host_devices"] == []


def test_every_device_of_the_host_is_named():
    vm = domain("gpu1")
    found = {(device["kind"], device["id"]) for device in vm["host_devices"]}
    assert found == {
        ("pci", "0000:81:00.0"),
        ("pci", "0000:3b:02.1"),
        ("pci", "0000:3b:02.2"),
        ("vdpa", "/dev/vhost-vdpa-0"),
        ("pci", "0000:65:00.0"),
        ("usb", "0529:0001"),
        ("mdev", "c2177883-f1bb-47f0-914d-32a22e3a8804"),
        ("scsi", "scsi_host0"),
        ("virtiofs", "/srv/models"),
        ("9p", "/srv/scratch"),
        ("tpm", "/dev/tpm0"),
        ("pci", "0000:66:00.0"),
    }
    text = " ".join(messages(vm, "host_device"))
    assert "pci 0000:65:00.0" in text and "usb 0529:0001" in text and "pci 0000:66:00.0" in text
    assert codes(vm["blockers"]).count("host_filesystem") == 2
    assert vm["engines"]["precopy"]["usable"] is False


def test_a_name_that_cannot_be_part_of_a_unit_is_a_blocker():
    vm = domain("web1", change=("<name>web1<", "<name>web+1<"))
    assert codes(vm["blockers"]) == ["bad_name"]
    assert "'web+1'" in vm["blockers"][0]["message"] and "rename the VM" in vm["blockers"][0]["message"]


def test_a_passthrough_device_that_is_unplugged_to_migrate_is_no_blocker():
    vm = domain("gpu1")
    assert [device["id"] for device in vm["host_devices"] if device["failover"]] == ["0000:3b:02.2"]
    assert "0000:3b:02.2" not in " ".join(messages(vm, "host_device"))


def test_an_invariant_tsc_is_a_blocker_unless_its_frequency_is_fixed():
    assert "cpu_not_migratable" in codes(domain("gpu1")["blockers"])
    invtsc = "<feature policy='require' name='invtsc'/></cpu>"
    assert codes(domain("web1", change=("</cpu>", invtsc))["blockers"]) == ["cpu_not_migratable"]
    fixed = "</cpu><clock offset='utc'><timer name='tsc' frequency='2500000000'/></clock>"
    assert domain("web1", change=("</cpu>", invtsc.replace("</cpu>", fixed)))["blockers"] == []


def test_encrypted_memory_is_a_blocker():
    assert codes(domain("web1", change=("</cpu>", "</cpu><launchSecurity type='sev'/>"))["blockers"]) == ["encrypted_memory"]


def test_huge_pages_are_a_note_and_no_blocker():
    vm = domain("web1", change=("<source type='memfd'/>", "<hugepages/>"))
    assert vm["memory_backend"]["kind"] == "hugetlb"
    assert vm["blockers"] == [] and vm["engines"]["userfault"]["usable"]
    assert codes(vm["notes"]) == ["hugetlb_memory"]


@pytest.mark.parametrize(
    ("shared_paths", "local"),
    [
        ((), ["vda", "vdc", "vdd", "hda", "vde", "vdf", "vdh"]),
        (("/dev/mapper/",), ["vda", "vdc", "vde", "vdf", "vdh", "hda"]),
        (("/var/lib/libvirt/images", "/srv/iso"), ["vdd", "vde", "vdf", "vdh"]),
        (("nbd://localhost:10809", "nbd:///run/nbd.sock", "default"), ["vda", "vdc", "vdd", "hda"]),
        (("/var/lib/libvirt/image",), ["vda", "vdc", "vdd", "hda", "vde", "vdf", "vdh"]),
        (("/",), ["vde", "vdf", "vdh"]),
    ],
)
def test_disks_that_only_this_host_has(shared_paths, local):
    vm = domain("files1", shared_paths=shared_paths, volumes={("ceph", "files1"): ("rbd", "ceph/files1")})
    assert sorted(disk["target"] for disk in vm["disks"] if not disk["shared"]) == sorted(local)
    assert codes(vm["blockers"]).count("local_disk") == len(local)


def test_a_local_disk_is_named_with_what_it_is_an_overlay_of():
    text = " ".join(messages(domain("files1"), "local_disk"))
    assert "vdc" in text and "/mnt/nfs/images/overlay.qcow2, over /var/lib/libvirt/images/base.qcow2" in text
    assert "the medium in hda" in text


def test_a_volume_of_a_pool_on_a_shared_file_system_is_shared():
    vm = domain("files1", volumes={("default", "gone.img"): ("dir", "/mnt/nfs/pool/gone.img")})
    assert [disk["shared"] for disk in vm["disks"] if disk["target"] == "vdh"] == [True]


def test_a_block_job_is_a_blocker():
    vm = domain("files1")
    assert vm["job"] == "block_job" and "job_active" in codes(vm["blockers"])


@pytest.mark.parametrize(
    ("folder", "kind", "usable"),
    [
        ("/var/lib/libvirt/qemu/ram", "file", False),
        ("/dev/shm/ram", "file", True),
        ("/run/remote_ram", "remote_ram", False),
        ("/dev/hugepages", "hugetlb", True),
    ],
)
def test_post_copy_wants_memory_files_on_tmpfs(folder, kind, usable):
    vm = domain("web1", change=("<source type='memfd'/>", "<source type='file'/>"), memory_dir=folder)
    assert (vm["memory_backend"]["kind"], vm["memory_backend"]["path"]) == (kind, folder)
    assert vm["engines"]["userfault"]["usable"] is usable
    assert vm["engines"]["precopy"]["usable"] is True
    assert codes(vm["engines"]["userfault"]["blockers"]) == ([] if usable else ["memory_file"])


def test_a_vhost_user_interface_keeps_a_vm_from_post_copy_only():
    vm = domain("web1", change=("<interface type='bridge'>", "<interface type='vhostuser'>"))
    assert vm["engines"]["precopy"]["usable"] is True
    assert codes(vm["engines"]["userfault"]["blockers"]) == ["vhost_user"]


def test_a_paused_vm_moves_by_pre_copy():
    vm = domain("web1", state="paused")
    assert vm["blockers"] == [] and vm["engines"]["precopy"]["usable"] is True
    assert codes(vm["engines"]["userfault"]["blockers"]) == ["vm_paused"]


@pytest.mark.parametrize(
    ("state", "job", "code"),
    [
        ("shutoff", None, "not_running"),
        ("crashed", None, "not_running"),
        ("running", "migration_out", "already_migrating"),
        ("incoming", "migration_in", "already_migrating"),
        ("incoming", None, "already_migrating"),
        ("running", "backup", "job_active"),
    ],
)
def test_states_and_jobs_that_keep_a_vm(state, job, code):
    vm = domain("web1", state=state, job=job)
    assert codes(vm["blockers"]) == [code]
    assert vm["engines"]["precopy"]["usable"] is False and vm["engines"]["userfault"]["usable"] is False


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((1, 1, 0), ("running", None)),
        ((1, 1, 5), ("running", "migration_out")),
        ((1, 10, 0), ("running", "migration_in")),
        ((1, 11, 0), ("running", "migration_in")),
        ((3, 1, 0), ("paused", None)),
        ((3, 2, 5), ("paused", "migration_out")),
        ((3, 2, 4), ("incoming", "migration_in")),
        ((3, 12, 0), ("paused", "migration_out")),
        ((3, 13, 5), ("paused", "migration_out")),
        ((4, 0, 0), ("shutoff", None)),
        ((5, 6, 0), ("shutoff", None)),
        ((6, 1, 0), ("crashed", None)),
        ((1, 1, 9), ("running", "backup")),
    ],
)
def test_what_libvirts_numbers_mean(numbers, expected):
    assert _vm_facts.domain_state(*numbers) == expected


def test_where_libvirt_keeps_memory_files():
    assert _vm_facts.memory_backing_dir('#memory_backing_dir = "/x"\n') == "/var/lib/libvirt/qemu/ram"
    assert _vm_facts.memory_backing_dir('a = 1\nmemory_backing_dir = "/run/remote_ram"\n') == "/run/remote_ram"


def test_a_minimal_domain():
    vm = _vm_facts.facts_from_domain_xml("<domain><name>x</name><memory unit='GiB'>1</memory></domain>", "shutoff", None)
    assert (vm["name"], vm["memory_mib"], vm["vcpus"], vm["machine"], vm["disks"]) == ("x", 1024, 1, None, [])


# ---- QMP

CONF = {
    "QEMU_ARGS": "-machine q35,accel=kvm -cpu EPYC,-svm,+avx2,x2apic=on,enforce=off -smp 2,cores=2 -m 256"
    " -drive file=nbd://10.77.1.100:10809/web2,if=virtio,format=raw,id=root"
    " -netdev bridge,id=n0,br=br0 -device virtio-net-pci,netdev=n0,mac=52:54:00:11:22:33",
    "VM_GROUPS_ANTI_AFFINITY": "web  database",
}


def image(filename, **more):
    return {"filename": filename, "format": "raw", "virtual-size": 8388608, "actual-size": 4096, "dirty-flag": False, **more}


def block(device, filename, qdev="/machine/peripheral-anon/device[1]/virtio-backend", ro=False, **more):
    return {
        "device": device,
        "qdev": qdev,
        "type": "unknown",
        "locked": False,
        "removable": False,
        "io-status": "ok",
        "inserted": {"ro": ro, "drv": "raw", "file": filename, "node-name": "#block1", "image": image(filename, **more)},
    }


def queries(**change):
    """What QEMU 10.0 answers about the VM of CONF."""
    answers = {
        "query-status": {"status": "running", "running": True},
        "query-uuid": {"UUID": "00000000-0000-0000-0000-000000000000"},
        "query-memory-size-summary": {"base-memory": 268435456, "plugged-memory": 134217728},
        "query-cpus-fast": [
            {"cpu-index": 0, "qom-path": "/machine/unattached/device[0]", "target": "x86_64"},
            {"cpu-index": 1, "qom-path": "/machine/unattached/device[2]", "target": "x86_64"},
        ],
        "query-block": [
            block("root", "nbd://10.77.1.100:10809/web2"),
            {"device": "", "qdev": "/machine/peripheral-anon/device[0]", "removable": True, "locked": False, "type": "unknown"},
        ],
        "query-migrate": {},
        "query-block-jobs": [],
        "arguments": ["-name", "guest=web2", *CONF["QEMU_ARGS"].split()],
        "machine": "pc-q35-10.0-machine",
        "cpu": "EPYC-x86_64-cpu",
        "memory": [{"type": "memory-backend-memfd", "mem-path": None, "share": True, "hugetlb": False}],
        "objects": ["memory-backend-memfd"],
        "devices": [{"type": "ide-cd"}, {"type": "virtio-net-pci"}, {"type": "virtio-blk-pci"}],
    }
    answers.update(change)
    return answers


def qmp(conf=None, error=None, job=None, shared_paths=(), asked=None, **change):
    return _vm_facts.facts_from_qmp("web2", conf or CONF, asked or queries(**change), Storage(MOUNTS, shared_paths), error, job)


def test_the_facts_of_a_qemu():
    vm = qmp()
    assert sorted(vm) == sorted(FIELDS)
    assert (vm["name"], vm["uuid"], vm["driver"], vm["state"]) == ("web2", None, "qmp", "running")
    assert (vm["memory_mib"], vm["vcpus"], vm["machine"]) == (384, 2, "pc-q35-10.0")
    assert vm["cpu"] == {"mode": "custom", "model": "EPYC", "features": ["avx2", "x2apic"], "migratable": True}
    assert vm["disks"][0]["source"] == "nbd://10.77.1.100:10809/web2" and vm["disks"][0]["shared"]
    assert (vm["disks"][1]["target"], vm["disks"][1]["source"]) == ("device[0]", None)
    assert vm["networks"] == [{"kind": "bridge", "source": "br0", "mac": "52:54:00:11:22:33"}]
    assert vm["groups"] == {"affinity": [], "anti_affinity": ["web", "database"]}
    assert vm["memory_backend"] == {"kind": "memfd", "path": None, "file_system": None, "shared": True}
    assert vm["blockers"] == [] and vm["engines"]["userfault"]["usable"]


@pytest.mark.parametrize(
    ("status", "migrate", "state", "job", "code"),
    [
        ("running", {"status": "active", "ram": {}}, "running", "migration_out", "already_migrating"),
        ("running", {"status": "setup"}, "running", "migration_out", "already_migrating"),
        ("finish-migrate", {"status": "postcopy-active", "ram": {}}, "paused", "migration_out", "already_migrating"),
        ("postmigrate", {"status": "postcopy-paused", "ram": {}}, "paused", "migration_out", "already_migrating"),
        ("postmigrate", {"status": "completed", "ram": {}}, "shutoff", None, "not_running"),
        ("inmigrate", {}, "incoming", None, "already_migrating"),
        ("inmigrate", {"status": "active"}, "incoming", "migration_in", "already_migrating"),
        ("running", {"status": "postcopy-active"}, "running", "migration_in", "already_migrating"),
        ("running", {"status": "cancelled"}, "running", None, None),
        ("running", {"status": "failed", "error-desc": "x"}, "running", None, None),
        ("shutdown", {}, "shutoff", None, "not_running"),
        ("guest-panicked", {}, "crashed", None, "not_running"),
        ("paused", {}, "paused", None, None),
        ("io-error", {}, "paused", None, None),
        ("a state of tomorrow", {}, "paused", None, None),
    ],
)
def test_what_qemus_states_mean(status, migrate, state, job, code):
    vm = qmp(**{"query-status": {"status": status}, "query-migrate": migrate})
    assert (vm["state"], vm["job"], codes(vm["blockers"])) == (state, job, [code] if code else [])


@pytest.mark.parametrize(("resident", "mib"), [(None, None), (200 << 20, 200), (500 << 20, 384)])
def test_what_a_vm_holds_of_its_memory_is_no_more_than_that(resident, mib):
    assert qmp(resident=resident)["memory_resident_mib"] == mib


def test_a_vm_whose_memory_the_kernel_module_still_fetches_can_not_leave():
    vm = qmp(arriving=True, **{"query-migrate": {"status": "completed"}})
    assert (vm["state"], vm["job"], codes(vm["blockers"])) == ("running", "migration_in", ["already_migrating"])


def test_a_vm_of_whose_memory_pages_are_lost_stays_with_every_engine():
    vm = qmp(pages_lost=3, memory=[{"id": "pc.ram", **THERE}])
    assert codes(vm["blockers"]) == ["memory_lost"] and vm["blockers"][0]["message"].startswith("3 pages")
    assert not any(engine["usable"] for engine in vm["engines"].values()) and "pages_lost" not in vm


def test_what_qemu_itself_objects_to_is_passed_on():
    vm = qmp(**{"query-migrate": {"blocked-reasons": ["Migration is disabled when VirtFS export path is mounted"]}})
    assert codes(vm["blockers"]) == ["qemu_refuses"]
    assert "VirtFS export path" in vm["blockers"][0]["message"]


def test_devices_of_the_host_are_found_by_what_qemu_has_not_by_what_it_was_started_with():
    vm = qmp(
        devices=[
            {"type": "vfio-pci", "host": "0000:65:00.0", "id": "gpu"},
            {"type": "vfio-pci", "sysfsdev": "/sys/bus/mdev/devices/c2177883-f1bb-47f0-914d-32a22e3a8804"},
            {"type": "vfio-pci", "host": "0000:3b:02.2", "failover_pair_id": "net1"},
            {"type": "usb-host", "vendorid": 1321, "productid": 1},
            {"type": "virtio-9p-pci", "fsdev": "fs0", "mount_tag": "share"},
            {"type": "vhost-user-fs-pci", "tag": "models"},
            {"type": "usb-tablet"},
        ],
        arguments=["-fsdev", "local,id=fs0,path=/srv/share,security_model=none", "-netdev", "vhost-vdpa,id=n1,vhostdev=/dev/vhost-vdpa-0"],
    )
    assert [(device["kind"], device["id"], device["failover"]) for device in vm["host_devices"]] == [
        ("pci", "0000:65:00.0", False),
        ("mdev", "/sys/bus/mdev/devices/c2177883-f1bb-47f0-914d-32a22e3a8804", False),
        ("pci", "0000:3b:02.2", True),
        ("usb", "0529:0001", False),
        ("9p", "/srv/share", False),
        ("virtiofs", "models", False),
        ("vdpa", "/dev/vhost-vdpa-0", False),
    ]
    assert codes(vm["blockers"]) == ["host_device", "host_device", "host_device", "host_filesystem", "host_filesystem", "host_device"]


def test_vhost_user_storage_and_network_keep_from_post_copy():
    for change in ({"devices": [{"type": "vhost-user-blk-pci", "id": "b"}]}, {"arguments": ["-netdev", "vhost-user,id=n0,chardev=c0"]}):
        vm = qmp(**change)
        assert "vhost_user" in codes(vm["engines"]["userfault"]["blockers"])


def test_disks_of_a_qemu():
    overlay = image("/mnt/nfs/base.qcow2")
    vm = qmp(
        **{
            "query-block": [
                block("d0", "/srv/vm/d0.img"),
                block("d1", "/mnt/nfs/d1.qcow2", **{"backing-image": overlay, "full-backing-filename": "/mnt/nfs/base.qcow2"}),
                block("d2", "/mnt/nfs/d2.qcow2", **{"backing-image": image("base.qcow2"), "full-backing-filename": "/srv/vm/base.qcow2"}),
                block("", "/dev/sdb", qdev="/machine/peripheral/vd1/virtio-backend"),
                block("cd", "/srv/iso/x.iso", ro=True),
                block("pflash0", "/usr/share/OVMF/OVMF_CODE_4M.fd", ro=True),
                block("r", 'json:{"driver":"raw","file":{"driver":"rbd","pool":"p","image":"i","server":[{"host":"m","port":"1"}]}}'),
                block("u", "nbd+unix:///x?socket=/run/nbd.sock"),
                block("rel", "disk.img"),
            ]
        }
    )
    assert [(disk["target"], disk["shared"]) for disk in vm["disks"]] == [
        ("d0", False),
        ("d1", True),
        ("d2", False),
        ("vd1", False),
        ("cd", False),
        ("r", True),
        ("u", False),
        ("rel", False),
    ]
    assert vm["disks"][5]["source"] == "rbd:p/i"


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("/mnt/nfs/a.img", ("/mnt/nfs/a.img", "file", True)),
        ("file:/srv/a.img", ("/srv/a.img", "file", False)),
        ("nbd://10.0.0.1:10809/x", ("nbd://10.0.0.1:10809/x", "network", True)),
        ("nbd://127.0.0.1/x", ("nbd://127.0.0.1/x", "network", False)),
        ("nbd:localhost:10809:exportname=x", ("nbd:localhost:10809:exportname=x", "network", False)),
        ("nbd:unix:/run/s", ("nbd:unix:/run/s", "network", False)),
        ("nbd://[::1]:10809/x", ("nbd://[::1]:10809/x", "network", False)),
        ("nbd://[2001:db8::5]:10809/x", ("nbd://[2001:db8::5]:10809/x", "network", True)),
        ("https://boot.example.com/x.iso", ("https://boot.example.com/x.iso", "network", True)),
        ("null-co://", ("null-co://", "null", True)),
        ("fat:rw:/srv/x", ("fat:rw:/srv/x", "dir", False)),
        ("nvme://0000:81:00.0/1", ("nvme://0000:81:00.0/1", "nvme", False)),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/mnt/nfs/a"}}', ("/mnt/nfs/a", "file", True)),
        (
            'json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"inet","host":"10.0.0.1","port":"1"},"export":"e"}}',
            ("nbd://10.0.0.1:1/e", "network", True),
        ),
        ('json:{"driver":"nbd","server":{"type":"unix","path":"/s"},"export":"e"}', ("nbd+unix:///e?socket=/s", "network", False)),
        ("json:{garbage", ("json:{garbage", "file", False)),
    ],
)
def test_where_a_disk_is(filename, expected):
    assert _vm_facts.qemu_source(filename, Storage(MOUNTS)) == expected


def test_a_disk_over_two_files_is_shared_only_when_both_are():
    def quorum(*paths):
        children = {str(number): {"driver": "file", "filename": path} for number, path in enumerate(paths)}
        return "json:" + json.dumps({"driver": "quorum", "children": children})

    assert _vm_facts.qemu_source(quorum("/mnt/nfs/a", "/mnt/nfs/b"), Storage(MOUNTS))[2] is True
    assert _vm_facts.qemu_source(quorum("/mnt/nfs/a", "/srv/b"), Storage(MOUNTS))[2] is False


@pytest.mark.parametrize(
    ("memory", "kind", "userfault"),
    [
        ([], "anonymous", True),
        ([{"type": "memory-backend-ram", "mem-path": None, "share": False}], "anonymous", True),
        ([{"type": "memory-backend-memfd", "mem-path": None, "share": True, "hugetlb": True}], "hugetlb", True),
        ([{"type": "memory-backend-file", "mem-path": "/run/remote_ram/web2.ram", "share": True}], "remote_ram", False),
        ([{"type": "memory-backend-file", "mem-path": "/srv/web2.ram", "share": True}], "file", False),
        ([{"type": "memory-backend-file", "mem-path": "/dev/shm/web2.ram", "share": True}], "file", True),
    ],
)
def test_where_a_guests_memory_is(memory, kind, userfault):
    vm = qmp(memory=memory)
    assert (vm["memory_backend"]["kind"], vm["engines"]["userfault"]["usable"]) == (kind, userfault)
    assert vm["engines"]["precopy"]["usable"] is True


ANONYMOUS = {"type": "memory-backend-ram", "mem-path": None, "share": False}
THERE = {"type": "memory-backend-file", "mem-path": "/run/remote_ram/web2.ram", "share": True}


@pytest.mark.parametrize(
    ("memory", "arguments", "code"),
    [
        ([ANONYMOUS], "", None),
        ([THERE], "-object memory-backend-file,id=pc.ram,mem-path=/run/remote_ram/web2.ram,share=on,size=256M", "memory_remote_ram"),
        ([ANONYMOUS, ANONYMOUS], "", "memory_defined"),
        ([ANONYMOUS], "-machine q35,memory-backend=ram0 -object memory-backend-ram,id=ram0,size=256M", "memory_defined"),
        ([ANONYMOUS], "-numa node", "memory_defined"),
        ([{**ANONYMOUS, "type": "memory-backend-file", "mem-path": "/dev/shm/x"}], "-mem-path /dev/shm", "memory_defined"),
    ],
)
def test_whose_memory_can_be_put_on_remote_ram_by_its_next_move(memory, arguments, code):
    vm = qmp(memory=memory, arguments=[*shlex.split(CONF["QEMU_ARGS"]), *shlex.split(arguments)])
    assert (vm["onboarding"]["usable"], codes(vm["onboarding"]["blockers"])) == (code is None, [code] if code else [])


def test_a_domain_of_libvirts_and_a_vm_that_can_not_leave_are_not_onboarded():
    assert codes(domain("web1")["onboarding"]["blockers"]) == ["driver_unsupported"]
    assert qmp(objects=["memory-backend-ram", "sev-guest"])["onboarding"] == {"usable": False, "blockers": []}


@pytest.mark.parametrize(
    ("second", "code"),
    [
        ({"id": "vmem0", "type": "memory-backend-ram", "mem-path": None, "share": False}, ["memory_mixed"]),
        ({"id": "vmem0", "type": "memory-backend-file", "mem-path": "/dev/shm/vmem0", "share": True}, ["memory_mixed"]),
        ({"id": "vmem0", "type": "memory-backend-file", "mem-path": "/run/remote_ram/vmem0", "share": False}, ["memory_mixed"]),
        ({"id": "vmem0", "type": "memory-backend-file", "mem-path": "/run/remote_ram/vmem0", "share": True}, []),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_all_of_a_guests_memory_has_to_be_on_remote_ram(second, code, order):
    conf = {"QEMU_ARGS": "-machine q35,memory-backend=pc.ram -object memory-backend-file,id=pc.ram,mem-path=/run/remote_ram/web2.ram,share=on,size=256M "
                         "-object memory-backend-ram,id=vmem0,size=1G -device virtio-mem-pci,memdev=vmem0"}  # fmt: skip
    vm = qmp(conf, memory=[{"id": "pc.ram", **THERE}, second][::order])
    assert codes(vm["engines"]["remote_ram"]["blockers"]) == code and vm["blockers"] == []
    assert not code or "(vmem0)" in messages(vm["engines"]["remote_ram"], code[0])[0]
    assert codes(vm["engines"]["userfault"]["blockers"]) == ["memory_file"]


@pytest.mark.parametrize(
    ("arguments", "running", "plugged"),
    [
        ("-machine q35", ["pc.ram"], []),
        ("-machine q35", ["pc.ram", "dimm0"], ["dimm0"]),
        ("-machine q35", ["dimm0", "pc.ram"], ["dimm0"]),
        ("-machine q35 -object memory-backend-ram,id=vmem0,size=1G", ["pc.ram", "vmem0"], []),
        ("-machine q35,memory-backend=m -object memory-backend-ram,id=m,size=1G", ["m"], []),
        ("-machine q35,memory-backend=m -object memory-backend-ram,id=m,size=1G", ["m", "dimm0"], ["dimm0"]),
        ("-object memory-backend-ram,id=m,size=1G -numa node,memdev=m", ["m", "dimm0"], ["dimm0"]),
        ("-m 1G -numa node,cpus=0", ["pc.ram"], []),
    ],
)
def test_memory_that_was_plugged_in_while_it_ran_keeps_a_vm(arguments, running, plugged):
    vm = qmp({"QEMU_ARGS": arguments}, memory=[{"id": name, **ANONYMOUS} for name in running])
    assert codes(vm["blockers"]) == ["memory_hotplugged"] * bool(plugged)
    assert all(name in vm["blockers"][0]["message"] for name in plugged)


@pytest.mark.parametrize(("balloon", "code"), [({}, []), ({"free-page-hint": False}, []), ({"free-page-hint": True}, ["free_page_hint"])])
def test_a_balloon_that_hints_at_free_pages_keeps_a_vm_from_the_kernel_engine_only(balloon, code):
    vm = qmp(memory=[{"id": "pc.ram", **THERE}], devices=[{"type": "virtio-balloon-pci", **balloon}])
    assert codes(vm["engines"]["remote_ram"]["blockers"]) == code
    assert vm["blockers"] == [] and vm["engines"]["precopy"]["usable"]


@pytest.mark.parametrize(("hints", "code"), [(False, []), (True, ["free_page_hint"])])
def test_who_could_not_leave_remote_ram_by_the_kernel_engine_is_not_brought_there(hints, code):
    vm = qmp(memory=[{"id": "pc.ram", **ANONYMOUS}], devices=[{"type": "virtio-balloon-pci", "free-page-hint": hints}])
    assert (vm["onboarding"]["usable"], codes(vm["onboarding"]["blockers"])) == (not hints, code)


def test_an_encrypted_guest_stays():
    assert codes(qmp(objects=["memory-backend-ram", "sev-guest"])["blockers"]) == ["encrypted_memory"]


@pytest.mark.parametrize(("cpu", "mode", "model"), [("host-x86_64-cpu", "host-passthrough", None), ("max-x86_64-cpu", "maximum", None)])
def test_cpus_without_a_model(cpu, mode, model):
    vm = qmp(cpu=cpu)
    assert (vm["cpu"]["mode"], vm["cpu"]["model"]) == (mode, model)


def test_a_vm_that_does_not_run_is_known_from_its_file():
    vm = _vm_facts.facts_from_qmp("web2", dict(CONF, QEMU_ARGS=CONF["QEMU_ARGS"] + " -uuid 7d0c1f5e-6a2b-4d8e-9c55-0f3a4b7de921"), None, Storage(MOUNTS))
    assert (vm["state"], vm["memory_mib"], vm["vcpus"], vm["machine"]) == ("shutoff", 256, 2, "q35")
    assert vm["uuid"] == "7d0c1f5e-6a2b-4d8e-9c55-0f3a4b7de921"
    assert [disk["source"] for disk in vm["disks"]] == ["nbd://10.77.1.100:10809/web2"]
    assert codes(vm["blockers"]) == ["not_running"]


def test_a_qemu_that_gives_no_answer_is_no_vm_without_blockers():
    vm = _vm_facts.facts_from_qmp("web2", CONF, None, Storage(MOUNTS), error="gave no answer for 5 s")
    assert (vm["state"], codes(vm["blockers"])) == ("running", ["unreachable"])
    assert "gave no answer for 5 s" in vm["blockers"][0]["message"]
    assert vm["engines"]["precopy"]["usable"] is False


@pytest.mark.parametrize(("job", "state"), [("migration_out", "running"), ("migration_in", "incoming")])
def test_a_qemu_whose_migration_is_driven_is_busy_not_broken(job, state):
    vm = _vm_facts.facts_from_qmp("web2", CONF, None, Storage(MOUNTS), error="gave no answer", job=job)
    assert (vm["state"], vm["job"], codes(vm["blockers"])) == (state, job, ["already_migrating"])


def test_blockdev_and_memory_of_a_stopped_vm():
    arguments = '-blockdev driver=qcow2,node-name=a,file.driver=file,file.filename=/srv/a.qcow2 -object memory-backend-file,id=m,mem-path=/dev/shm/m,share=on'
    arguments += " -m size=2G -device vfio-pci,host=01:00.0"
    arguments += ' -blockdev \'{"driver":"raw","node-name":"b","file":{"driver":"host_device","filename":"/dev/sdb"}}\''
    vm = _vm_facts.facts_from_qmp("x", {"QEMU_ARGS": arguments}, None, Storage(MOUNTS))
    assert [(disk["target"], disk["source"]) for disk in vm["disks"]] == [("a", "/srv/a.qcow2"), ("b", "/dev/sdb")]
    assert vm["memory_backend"] == {"kind": "file", "path": "/dev/shm/m", "file_system": "tmpfs", "shared": True}
    assert vm["memory_mib"] == 2048
    assert vm["host_devices"] == [{"kind": "pci", "id": "01:00.0", "failover": False}]


# ---- environment files


def test_environment_files_are_read_as_systemd_reads_them():
    text = """\
# a comment
; another one
QEMU_ARGS="-m 256 \\
  -append 'a b' \\"c\\""
PLAIN = a b \t
SINGLE='it\\s'
MULTI="one
two"
ESCAPED=a\\ b
not a variable
1X=no
EMPTY=
"""
    assert _vm_facts.parse_environment(text) == {
        "QEMU_ARGS": "-m 256   -append 'a b' \"c\"",
        "PLAIN": "a b",
        "SINGLE": "it\\s",
        "MULTI": "one\ntwo",
        "ESCAPED": "a b",
        "EMPTY": "",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", []), ("-m 256  -name 'a b'\n-x", ["-m", "256", "-name", "a b", "-x"]), ("-m 'open", ["-m", "'open"])],
)
def test_arguments_are_split_at_white_space(text, expected):
    assert _vm_facts.split_arguments(text) == expected
