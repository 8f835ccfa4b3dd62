#!/bin/sh
# SPDX-FileCopyrightText: The hecaton.fleet authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Lists what the roles rdma and remote_ram could leave on a host: files, units, devices, MTUs, loaded drivers.
export LC_ALL=C
ls -1 /usr/src
find /etc /usr/local /var/lib/dkms /var/lib/hecaton /lib/modules/*/updates -mindepth 1 \
	! -name '*.bak' ! -name 'mok.*' ! -path '/etc/libibverbs.d/*' ! -path '/etc/udev/hwdb.bin' ! -path '/var/lib/dkms/dkms_dbversion' 2>/dev/null | sort
systemctl list-unit-files --no-legend 'hecaton-*' 'run-remote*' 'wg-quick@*' | awk '{print $1}'
rdma -j link 2>/dev/null | tr ',' '\n' | grep ifname
ls -1 /sys/kernel/config/rdma_cm 2>/dev/null
ip -o link | awk '{print $2, $5}' | sort
lsmod | awk '$1 ~ /^(siw|rdma_rxe|remote_ram|hecaton_test|hecaton_user)$/ {print $1}'
