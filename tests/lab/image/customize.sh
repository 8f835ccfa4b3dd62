#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Turns a bare Debian tree ($1) into a lab hypervisor. Run by mmdebstrap as its customize hook; everything
# it reads besides $1 comes through the environment: LAB_KEYS (folder of the lab's keys), LAB_HERE (this folder).
set -eu
root=$1

# Identity comes from the kernel command line (systemd.hostname=, systemd.machine_id=), so that one image serves
# all hosts.
: > "$root/etc/machine-id"
rm -f "$root/etc/hostname"
cp -r "$LAB_HERE/rootfs/." "$root/"

# One host key for the whole lab: hosts know each other without a question asked, and so does the controller.
install -d -m 700 "$root/root/.ssh"
rm -f "$root"/etc/ssh/ssh_host_*
install -m 600 "$LAB_KEYS/host" "$root/etc/ssh/ssh_host_ed25519_key"
install -m 644 "$LAB_KEYS/host.pub" "$root/etc/ssh/ssh_host_ed25519_key.pub"
install -m 600 "$LAB_KEYS/peer" "$root/root/.ssh/id_ed25519"
cat "$LAB_KEYS/peer.pub" "$LAB_KEYS/control.pub" > "$root/root/.ssh/authorized_keys"
chmod 600 "$root/root/.ssh/authorized_keys"
printf '* %s\n' "$(cut -d' ' -f1,2 "$LAB_KEYS/host.pub")" > "$root/root/.ssh/known_hosts"

# The initramfs holds what a lab host or a guest with a disk needs to mount its root, and no more: it is
# unpacked by an emulated CPU at each boot.
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=zstd/' "$root/etc/initramfs-tools/initramfs.conf"
printf 'virtio_pci\nvirtio_blk\nvirtio_net\next4\ncrc32c_generic\n' >> "$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u -k all
kernel=$(basename "$(readlink -f "$root"/boot/vmlinuz-*)")
ln -sf "$kernel" "$root/boot/vmlinuz"
ln -sf "initrd.img-${kernel#vmlinuz-}" "$root/boot/initrd.img"

# Of the kernel's source, the drivers that the roles build from: an emulated CPU takes minutes to get at them in all of it.
for archive in "$root"/usr/src/linux-source-*.tar.xz; do
	name=$(basename "$archive" .tar.xz)
	chroot "$root" tar -C /usr/src -xJf "/usr/src/$name.tar.xz" --wildcards '*/drivers/infiniband/sw'
	chroot "$root" tar -C /usr/src -cJf "/usr/src/$name.tar.xz" "$name"
	rm -r "$root/usr/src/$name"
done
# What looks for disks, tokens and tasks that a lab host has not: programs that each start of systemd waits for.
mkdir -p "$root/etc/systemd/system-generators"
for generator in gpt-auto hibernate-resume import rc-local ssh system-update tpm2; do
	ln -s /dev/null "$root/etc/systemd/system-generators/systemd-$generator-generator"
done

chroot "$root" systemctl enable systemd-networkd ssh libvirtd lab-ready >/dev/null 2>&1
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
	dpkg-db-backup.timer man-db.timer systemd-networkd-wait-online.service getty@tty1.service serial-getty@ttyS0.service \
	libvirt-guests.service virtlockd.socket dkms.service; do
	chroot "$root" systemctl mask "$unit" >/dev/null 2>&1
done
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
