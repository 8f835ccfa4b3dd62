# SPDX-FileCopyrightText: The hecaton.fleet authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control node's part of a build: sends a source that is there to the host, as one archive."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible_collections.hecaton.fleet.plugins.module_utils._kmod import is_source


def pack(folder: str, exclude: list) -> bytes:
    """A folder as a tar archive that is the same for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for root, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(root, name)
                relative = os.path.relpath(path, folder)
                if not os.path.isfile(path) or not is_source(relative, exclude):
                    continue
                member = tarfile.TarInfo(relative)
                member.size = os.path.getsize(path)
                member.mode = 0o755 if os.access(path, os.X_OK) else 0o644
                with open(path, "rb") as stream:
                    archive.addfile(member, stream)
    return buffer.getvalue()


class ActionModule(ActionBase):
    TRANSFERS_FILES = True
    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        del tmp
        args = dict(self._task.args)
        try:
            if args.get("state", "present") == "present" and args.get("src") and not boolean(args.get("remote_src", False)):
                args["src"] = self._send(args)
            if args.get("state", "present") == "present" and args.get("built"):
                args["built"] = self._send_built(args["built"])
            result.update(self._execute_module(module_name="hecaton.fleet.kmod_build", module_args=args, task_vars=task_vars or {}))
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result

    def _send(self, args: dict) -> str:
        try:
            source = self._find_needle("files", args["src"])
        except AnsibleError as err:
            raise AnsibleActionFail(f"src can't be found on the control node: {err}") from err
        exclude = args.get("exclude") or []
        exclude = exclude.split(",") if isinstance(exclude, str) else exclude
        if os.path.isdir(source):
            content = pack(os.path.join(source, args.pop("src_path", None) or ""), exclude)
        else:
            with open(source, "rb") as stream:
                content = stream.read()
        return self._put(content, "source.tar")

    def _send_built(self, paths: str | list) -> list:
        sent = []
        for number, path in enumerate(paths.split(",") if isinstance(paths, str) else paths):
            try:
                with open(self._find_needle("files", path), "rb") as stream:
                    sent.append(self._put(stream.read(), f"built{number}.tar"))
            except (AnsibleError, OSError) as err:
                raise AnsibleActionFail(f"{path} in built can't be found or read on the control node: {err}") from err
        return sent

    def _put(self, content: bytes, name: str) -> str:
        """Writes a file on the host, beside what this task has there."""
        if not self._connection._shell.tmpdir:
            self._make_tmp_path()
        remote = self._connection._shell.join_path(self._connection._shell.tmpdir, name)
        with tempfile.NamedTemporaryFile(prefix="hecaton-kmod-") as local:
            local.write(content)
            local.flush()
            self._transfer_file(local.name, remote)
        self._fixup_perms2((self._connection._shell.tmpdir, remote))
        return remote
