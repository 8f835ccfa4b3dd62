#!/bin/sh
# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Turns a bare Debian tree ($1) into the valkey guest. Run by mmdebstrap as its customize hook; $GUEST_HERE is the
# folder of the files it takes.
set -eu
root=$1

install -m 755 "$GUEST_HERE/lab-init" "$root/sbin/lab-init"
install -m 644 "$GUEST_HERE/valkey.conf" "$root/etc/valkey/lab.conf"
install -d "$root/var/lib/valkey"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
