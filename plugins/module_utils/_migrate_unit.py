# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Private to this collection: it may change in any release.
"""The transient systemd unit that drives one side of a migration, and how it is started.

A migration must not depend on the control node, so what drives it can't be the module that Ansible runs. The module
copies the few files that the unit needs to the host (named by their content) and starts them with systemd-run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import traceback

from ansible_collections.hecaton.fleet.plugins.module_utils import _libvirt, _migrate_libvirt, _migrate_qmp, _migrate_remote_ram, _migration, _qmp, _remote_ram
from ansible_collections.hecaton.fleet.plugins.module_utils._migration import Aborted, MigrationError, Record, write_json

PACKAGE = "ansible_collections.hecaton.fleet.plugins.module_utils"
SHIPPED = (_migration, _qmp, _libvirt, _remote_ram, _migrate_qmp, _migrate_remote_ram, _migrate_libvirt)


def adopt(vm: str, look_only: bool = False) -> bool:
    """Whether a VM is here that arrived after the unit that followed it was killed; then this host is its home. See ``_migrate_qmp.adopt``."""
    return not _migrate_qmp.is_active(unit_name(vm, True)) and _migrate_qmp.adopt(vm, look_only)


def runs_here(vm: str, look_only: bool = False) -> bool:
    """Whether a VM of the driver ``qmp`` runs on this host, and is not one that is still to arrive. See ``adopt``."""
    return _migrate_qmp.is_active(_migrate_qmp.vm_unit(vm)) and (not os.path.exists(_migrate_qmp.incoming_env(vm)) or adopt(vm, look_only))


def unit_name(vm: str, incoming: bool = False) -> str:
    return f"hecaton-{'incoming' if incoming else 'migrate'}-{vm}.service"


def _source(module) -> str:
    """A module's text, also when it was imported from the archive that Ansible sends."""
    return module.__loader__.get_source(module.__name__)


def install(state_dir: str) -> str:
    """Puts the unit's code on this host and returns its folder.

    :raises MigrationError: the folder can't be written.
    """
    files = {f"{module.__name__.rsplit('.', 1)[1]}.py": _source(module) for module in (*SHIPPED, sys.modules[__name__])}
    key = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    library = os.path.join(state_dir, "lib")
    root = os.path.join(library, key)
    if os.path.isdir(root):
        return root
    try:
        os.makedirs(library, mode=0o755, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".", dir=library)
        os.chmod(work, 0o755)
        package = os.path.join(work, *PACKAGE.split("."))
        os.makedirs(package)
        for name, text in files.items():
            with open(os.path.join(package, name), "w") as out:
                out.write(text)
        try:
            os.rename(work, root)
        except OSError:
            shutil.rmtree(work)  # somebody else was faster with the same content
            if not os.path.isdir(root):
                raise
    except OSError as err:
        raise MigrationError(f"the migration unit can't be installed in {library}: {err}") from err
    return root


def start(job: dict, state_dir: str) -> None:
    """Starts the unit for ``job`` (see the drivers for what is in it; ``side`` is ``outgoing`` or ``incoming``).

    :raises MigrationError: systemd refused.
    """
    incoming = job["side"] == "incoming"
    root = install(state_dir)
    path = os.path.join(state_dir, "jobs", f"{job['vm']}.{job['side']}.json")
    write_json(path, job)
    os.chmod(path, 0o600)
    unit = unit_name(job["vm"], incoming)
    subprocess.run(["systemctl", "reset-failed", unit], capture_output=True, check=False)
    done = subprocess.run(
        ["systemd-run", "--quiet", "--collect", f"--unit={unit}", "--service-type=exec", f"--setenv=PYTHONPATH={root}",
         f"--description=Migration of {job['vm']} ({job['side']})", sys.executable, "-B", "-m", f"{PACKAGE}._migrate_unit", path, state_dir],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise MigrationError(f"systemd-run could not start {unit}: {done.stdout.strip()}")


def drive(job: dict, state_dir: str) -> int:
    """What the unit does. Whatever happens, the record says so at the end."""
    remote = job["engine"] == "remote_ram"
    if job["side"] == "incoming":
        (_migrate_remote_ram if remote else _migrate_qmp).Incoming(job, state_dir).run()
        return 0
    record = Record(state_dir, job)
    record.save()
    driver = _migrate_remote_ram if remote else _migrate_libvirt if job["driver"] == "libvirt" else _migrate_qmp
    try:
        driver.Outgoing(job, record).run()
    except Aborted as err:
        record.finish("aborted", str(err), on=record.data["on"])
    except (MigrationError, _qmp.QmpError) as err:
        record.finish("failed", str(err), on=record.data["on"])
        return 1
    except Exception as err:  # a bug of ours must not leave a record that says "running"
        record.finish("failed", f"internal error: {err!r}; the trace is in journalctl -u {unit_name(job['vm'])}", on=record.data["on"])
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    import json

    with open(sys.argv[1]) as handle:
        raise SystemExit(drive(json.load(handle), sys.argv[2]))
