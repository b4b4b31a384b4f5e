//! What every guest is to have: without it, the other suites would prove something else, or nothing.

#![allow(clippy::unwrap_used, reason = "a test that can't make its file has failed")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use dmaload_guest::{BAD_LEN, BadDisk, SECTOR, bad_bytes, command, kernel};
use dmaload_testing::random_bytes;

/// Memory that is aligned as `O_DIRECT` wants it.
#[repr(align(4096))]
struct Page([u8; 4096]);

fn has(device: &str) -> bool {
    Path::new(device).exists()
}

fn direct(path: &Path) -> File {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

#[test]
fn devices_are_there() {
    let id = kernel();
    let makes_dma_bufs = match id.as_str() {
        "6.12-cloud" | "6.12-full" => true,
        "6.1-cloud" => false,
        _ => panic!("smoke does not know what the kernel {id} should have"),
    };
    for device in ["/dev/udmabuf", "/dev/dma_heap/system"] {
        assert_eq!(has(device), makes_dma_bufs, "{device} on {id}");
    }
    assert!(has("/dev/nvme0n1"));
}

#[test]
fn importers_are_there() {
    let expected = kernel() == "6.12-full";
    for device in ["/dev/video0", "/dev/video1", "/dev/dri/card0"] {
        assert_eq!(has(device), expected, "{device}");
    }
}

#[test]
fn the_kernel_is_the_one_that_was_asked_for() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let (version, flavour) = match kernel().as_str() {
        "6.12-cloud" => ("6.12.", "-cloud-amd64"),
        "6.12-full" => ("6.12.", "-amd64"),
        _ => ("6.1.", "-cloud-amd64"),
    };
    assert!(release.starts_with(version) && release.trim().ends_with(flavour), "{release}");
    assert_eq!(release.contains("-cloud"), flavour.contains("-cloud"), "{release}");
}

#[test]
fn io_uring_works() {
    // The switch came with 6.6.
    let switch = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
    assert_eq!(switch.as_deref().map(str::trim), (kernel() != "6.1-cloud").then_some("0"));
    io_uring::IoUring::new(8).unwrap();
}

#[test]
fn the_disk_is_a_writable_ext4_that_reads_directly() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/disk")).unwrap();
    assert!(mount.starts_with("/dev/nvme") && mount.contains(" ext4 rw"), "{mount}");

    let tests = Path::new(env!("CARGO_TARGET_TMPDIR"));
    assert_eq!(tests.canonicalize().unwrap(), Path::new("/disk/tests"));
    assert_eq!(tests.metadata().unwrap().permissions().mode() & 0o7777, 0o1777);
    let folder = tempfile::tempdir_in(tests).unwrap();
    let (path, bytes) = (folder.path().join("file"), random_bytes(1 << 20, 1));
    fs::write(&path, &bytes).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    let mut page = Page([0; 4096]);
    assert_eq!(direct(&path).read_at(&mut page.0, 8192).unwrap(), 4096);
    assert_eq!(page.0, bytes[8192..12288]);
}

#[test]
fn the_command_runs() {
    let output = command(&["--version"]);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.starts_with(b"dmaload "), "{output:?}");
}

#[test]
fn scratch_folders_are_in_memory_and_open_to_all() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    for folder in ["/tmp", "/dev/shm"] {
        assert!(mounts.contains(&format!(" {folder} tmpfs ")), "{mounts}");
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o7777, 0o1777, "{folder}");
    }
    assert!(mounts.contains(" /sys/fs/cgroup cgroup2 "), "{mounts}");
    assert!(fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap().contains("memory"));
}

#[test]
fn bad_disks_fail_at_their_sector_only() {
    if kernel() != "6.12-cloud" {
        assert!(!has("/bad-nvme/bad.bin") && !has("/bad-virtio/bad.bin"));
        return;
    }
    let bytes = bad_bytes();
    for disk in [BadDisk::nvme(), BadDisk::virtio()] {
        let (file, bad) = (direct(&disk.file), usize::try_from(disk.offset).unwrap());
        assert_eq!(file.metadata().unwrap().len(), BAD_LEN as u64);
        let mut page = Page([0; 4096]);
        let mut read = |offset: usize| -> io::Result<()> {
            let sector = &mut page.0[..SECTOR];
            file.read_exact_at(sector, offset as u64)?;
            assert_eq!(sector, &bytes[offset..offset + SECTOR], "{disk:?} at {offset}");
            Ok(())
        };
        for _ in 0..2 {
            let error = read(bad).expect_err("the sector can't be read");
            assert_eq!(error.raw_os_error(), Some(disk.errno), "{disk:?}: {error}");
        }
        for offset in [0, bad - SECTOR, bad + SECTOR, BAD_LEN - SECTOR] {
            read(offset).unwrap_or_else(|error| panic!("{disk:?} at {offset}: {error}"));
        }
        // Through the page cache the kernel says EIO, whatever the disk said.
        let error = File::open(&disk.file).unwrap().read_exact_at(&mut page.0[..SECTOR], disk.offset).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{disk:?}: {error}");
    }
}
