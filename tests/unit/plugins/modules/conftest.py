# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args


class Ended(Exception):
    """How a module ends here instead of by leaving the process."""


@pytest.fixture
def outcome(monkeypatch):
    """Runs a module's main() with arguments and returns its result; what fails has ``failed`` set."""

    def ends(failed):
        def end(self, **result):
            raise Ended({**result, "failed": failed})

        return end

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", ends(False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", ends(True))

    def outcome(main, args):
        with patch_module_args(args), pytest.raises(Ended) as raised:
            main()
        return raised.value.args[0]

    return outcome
