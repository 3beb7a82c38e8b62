#!/bin/bash
# A machine started by a real systemd: namespaces of its own, on an overlay of this machine's root that goes when it ends.
#   STATE, DATA     folders of an office's state and of a store
#   DISK            what the office protects; systemd mounts it at /srv/data
#   BIN, UNITS      folders of the programs, and of the units as they are packaged
#   BOOT_ID         a file with the id of this boot
#   ROOT            an empty folder
# To be run by `unshare --pid --fork --mount --uts --ipc --cgroup`.
set -euo pipefail

mount --make-rprivate /
mount -t tmpfs tmpfs "$ROOT"
mkdir "$ROOT"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$ROOT/upper,workdir=$ROOT/work" "$ROOT/root"
cd "$ROOT/root"
mount -t proc proc proc
mount --rbind /sys sys
# What was pinned before this boot is not there any more.
mount -t bpf bpf sys/fs/bpf
mount --rbind /dev dev
mount -t tmpfs tmpfs run

mkdir -p var/lib/cdp-source var/lib/cdp-target srv/data etc/sysusers.d
mount --bind "$STATE" var/lib/cdp-source
mount --bind "$DATA" var/lib/cdp-target
cp "$BIN"/cdp-source "$BIN"/cdp-target usr/bin/
cp "$UNITS"/*.service etc/systemd/system/
cp "$UNITS"/cdp-target.sysusers etc/sysusers.d/cdp-target.conf
chroot . systemd-sysusers
chroot . chown -R cdp-target: /var/lib/cdp-target

# The unit has a /proc of its own: the id of this boot is put there.
cp "$BOOT_ID" etc/boot-id
mkdir -p etc/systemd/system/cdp-source.service.d
cat >etc/systemd/system/cdp-source.service.d/boot-id.conf <<'UNIT'
[Service]
BindReadOnlyPaths=/etc/boot-id:/proc/sys/kernel/random/boot_id
UNIT

# Nothing of this machine's own is started, and there is no udev: a mount that waits for a device of its names waits for ever.
echo -n >etc/fstab
rm -rf etc/systemd/system/*.wants
ln -sf /dev/null etc/systemd/system/systemd-udevd.service
ln -sf /dev/null etc/systemd/system/systemd-udev-trigger.service
ln -sf "$DISK" var/lib/disk
cat >etc/systemd/system/srv-data.mount <<'UNIT'
[Mount]
What=/var/lib/disk
Where=/srv/data
Type=ext4
[Install]
WantedBy=local-fs.target
UNIT
cat >etc/systemd/system/office.target <<'UNIT'
[Unit]
Requires=sysinit.target
Wants=cdp-target.service
UNIT
chroot . systemctl --quiet enable cdp-source.service srv-data.mount

# Not chroot: no namespace of users is made inside one, and the store's unit asks for that.
mkdir before
pivot_root . before
cd /
umount --lazy /before
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=office.target
