//! The restored disk starts a machine by itself: boot sector, boot loader, kernel, root file system, as far as the login prompt.
//!
//! In QEMU with software emulation. The ordinary disk has the distribution's kernel and a busybox; with `CDP_DEBIAN_BOOT` a Debian with systemd
//! is made, and the restored one has an agent that goes on by itself.

use crate::machine::{Office, partitioned, text};
use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{Daemon, program, tool, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// A machine that is emulated beside other tests takes its time.
const BOOT: Duration = Duration::from_secs(600);
/// Code of the first sector, and of a boot loader in a file system: Debian's `extlinux`.
const BOOT_CODE: &str = "/usr/lib/EXTLINUX/mbr.bin";

/// The newest file of a folder whose name begins so.
fn newest(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let names = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    let is_it = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    names.into_iter().filter(is_it).max().with_context(|| format!("a {prefix}* in {}", folder.display()))
}

/// A file system that the boot loader can read, in the disk's one partition, with the loader and what it is to start.
fn with_loader(disk: &LoopDevice, folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let code = format!("if={BOOT_CODE}");
    tool("dd", &[&code, &format!("of={}", disk.node().display()), "bs=440", "count=1", "conv=notrunc", "status=none"])?;
    let root = disk.partition(1)?;
    // It knows no newer ext4.
    tool("mkfs.ext4", &["-q", "-O", "^64bit,^metadata_csum", "-E", "nodiscard", &text(&root)?])?;
    let uuid = tool("blkid", &["-s", "UUID", "-o", "value", &text(&root)?])?;
    let mount = Mount::new(&root, &folder.join("root"), "rw")?;
    fill(mount.folder())?;
    let loader = mount.folder().join("boot/extlinux");
    std::fs::create_dir_all(&loader)?;
    let append = format!("root=UUID={} ro console=ttyS0 quiet", uuid.trim());
    let script = format!(
        "SERIAL 0 115200\nDEFAULT linux\nLABEL linux\n LINUX /boot/vmlinuz\n INITRD /boot/initrd\n APPEND {append}\n"
    );
    std::fs::write(loader.join("extlinux.conf"), script)?;
    tool("extlinux", &["--install", &text(&loader)?])?;
    mount.unmount()
}

/// The smallest root file system with a login: a busybox.
fn busybox(root: &Path) -> Result<()> {
    for folder in ["bin", "sbin", "etc", "proc", "sys", "dev", "run", "tmp", "root", "boot"] {
        std::fs::create_dir_all(root.join(folder))?;
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    for name in ["sh", "mount", "login"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    std::os::unix::fs::symlink("../bin/busybox", root.join("sbin/init"))?;
    // The kernel of this machine's distribution, and what it starts with.
    std::fs::copy(newest(Path::new("/boot"), "vmlinuz-")?, root.join("boot/vmlinuz"))?;
    std::fs::copy(newest(Path::new("/boot"), "initrd.img-")?, root.join("boot/initrd"))?;
    let inittab = "::sysinit:/bin/busybox mount -t proc proc /proc\n\
        ::sysinit:/bin/busybox hostname branch-office\n\
        ttyS0::respawn:/bin/busybox getty -L 115200 ttyS0 vt100\n";
    std::fs::write(root.join("etc/inittab"), inittab)?;
    Ok(std::fs::write(root.join("etc/passwd"), "root::0:0:root:/root:/bin/sh\n")?)
}

/// A Debian with systemd, as small as it comes, from the distribution's mirror.
fn debian(root: &Path) -> Result<()> {
    let packages = "--include=systemd-sysv,udev,initramfs-tools,linux-image-cloud-amd64";
    tool("mmdebstrap", &["--quiet", "--variant=minbase", packages, "bookworm", &text(root)?])?;
    for (name, link) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd")] {
        std::fs::copy(newest(&root.join("boot"), name)?, root.join("boot").join(link))?;
    }
    Ok(std::fs::write(root.join("etc/hostname"), "branch-office\n")?)
}

/// Starts a machine from a disk, as QEMU names it, and waits for its login prompt; gives what it said on its serial line.
fn boot(disk: &str, folder: &Path, memory_mib: u32) -> Result<String> {
    let serial = folder.join("serial.log");
    // Of the machine before.
    let _ = std::fs::remove_file(&serial);
    let mut command = Command::new(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-machine", "pc", "-accel", "tcg", "-cpu", "max", "-no-reboot"]);
    command.args(["-m", &memory_mib.to_string(), "-display", "none", "-serial", &format!("file:{}", serial.display())]);
    command.args(["-drive", &format!("file={disk},format=raw,if=virtio")]);
    let mut machine = Daemon::start(&mut command)?;
    let said = || std::fs::read(&serial).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let prompt = wait_for("a login prompt", BOOT, || {
        ensure!(machine.is_running()?, "the machine has ended: {}", machine.log());
        Ok(said().contains("login: ").then_some(()))
    });
    machine.kill()?;
    prompt.with_context(said)?;
    Ok(said())
}

/// A machine whose disk has such a root file system: protected, restored to an empty disk, and started from there.
fn restored_boots(fill: fn(&Path) -> Result<()>, disk_bytes: u64, memory_mib: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    partitioned(&image, disk_bytes, "label: dos\nstart=1MiB, type=83, bootable\n")?;
    let mut office = Office::new(folder, &image)?;
    with_loader(&office.disk, office.folder.path(), fill)?;
    let told = office.protect()?;
    ensure!(told.contains("MBR partition table in sectors of 512 bytes, with boot code"), "{told}");
    office.site.start_source()?;
    let mount = FileSystem::Ext4.mount(&office.disk.partition(1)?, &office.folder.path().join("root"))?;
    // Told with the prompt: written after the first copy has begun.
    std::fs::write(mount.folder().join("etc/issue"), "this is the point of \\n\n")?;
    mount.unmount()?;
    office.site.wait_for_points(1, BOOT)?;
    office.site.point_now()?;
    office.site.kill_source()?;
    let is_the_point = |said: String| -> Result<()> {
        ensure!(
            said.contains("this is the point of branch-office") && said.contains("branch-office login: "),
            "{said}"
        );
        Ok(())
    };
    is_the_point(boot_from_the_point(&office, memory_mib).context("straight from the point")?)?;
    let rescue = office.rescue()?;
    let new = LoopDevice::new(&office.folder.path().join("new.img"), disk_bytes + 64 * MIB)?;
    rescue.restore(new.node(), &["--at", "latest"])?;
    is_the_point(boot(&text(new.file())?, office.folder.path(), memory_mib).context("from the restored disk")?)
}

/// The same machine without any restore: its disk is the point over NBD, and what it writes an overlay.
fn boot_from_the_point(office: &Office, memory_mib: u32) -> Result<String> {
    let folder = office.folder.path();
    let (socket, overlay) = (folder.join("point.sock"), folder.join("point.overlay"));
    let listen = format!("unix:{}", socket.display());
    let mut command = Command::new(program("cdp-target"));
    command.args(["nbd", "office/main", "--at", "latest", "--listen", &listen, "--writable"]).arg(&overlay);
    let mut server = Daemon::start(command.env("CDP_TARGET_DATA", &office.site.data))?;
    server.wait_for_line("listening on", BOOT)?;
    boot(&format!("nbd+unix:///{}?socket={}", office.volume(), socket.display()), folder, memory_mib)
}

/// Whether all is there that it takes.
fn may_run(test: &str, programs: &[&str]) -> bool {
    cdp_tests::privileged(test) && [QEMU, BOOT_CODE].iter().chain(programs).all(|program| cdp_tests::has(test, program))
}

#[test]
fn a_restored_disk_boots_to_its_login_prompt() -> Result<()> {
    if !may_run("a_restored_disk_boots_to_its_login_prompt", &["/bin/busybox"]) {
        return Ok(());
    }
    restored_boots(busybox, 128 * MIB, 256)
}

#[test]
fn a_restored_debian_boots_to_its_login_prompt() -> Result<()> {
    // It is fetched from a mirror, and takes minutes: `scripts/test --long`.
    if std::env::var_os("CDP_DEBIAN_BOOT").is_none()
        || !may_run("a_restored_debian_boots_to_its_login_prompt", &["/usr/bin/mmdebstrap"])
    {
        return Ok(());
    }
    restored_boots(debian, 2048 * MIB, 512)
}
