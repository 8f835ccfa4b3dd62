# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps what Python compiled from a zip archive until the host starts again.

Each task of Ansible comes as an archive of sources, which Python compiles anew: about half of a short task on an emulated CPU.
Started by keep_compiled.pth with each Python. It changes nothing but the time; without its folder it does nothing.
"""

import _imp
import marshal
import os
import zipimport

FOLDER = "/run/keep-compiled"
compile_source = zipimport._compile_source


def compile_once(path, source):
    """As zipimport's own: the code of a module from its path and its source, as bytes."""
    # The folder is gone after a start, and with it what another version of Python has left.
    file = f"{FOLDER}/{_imp.source_hash(0, source).hex()}-{len(source)}"
    try:
        with open(file, "rb") as stream:
            code = marshal.load(stream)
    except OSError:
        # Not there, or not for this user.
        code = compile_source(path, source)
        keep(file, code)
    else:
        _imp._fix_co_filename(code, path)
    return code


def keep(file, code):
    own = f"{file}.{os.getpid()}"
    try:
        os.makedirs(FOLDER, mode=0o700, exist_ok=True)
        with open(own, "wb") as stream:
            marshal.dump(code, stream)
        # Whole, or not there.
        os.replace(own, file)
    except OSError:
        # A user who may not, or a file system that is full: compiled again the next time.
        return


if os.access("/run", os.W_OK):
    zipimport._compile_source = compile_once
