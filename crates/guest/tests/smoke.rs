//! Checks the environment that every guest must provide. The other suites rely on this
//! environment.

#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use dmaload_guest::{
    BAD_LEN, BadDisk, SECTOR, bad_bytes, has_bad_disks, is_full, kernel_id, kernel_line, makes_dma_bufs, run_dmaload,
};
use dmaload_testing::random_bytes;

/// Memory aligned for `O_DIRECT`.
#[repr(align(4096))]
struct Page([u8; 4096]);

fn exists(device: &str) -> bool {
    Path::new(device).exists()
}

fn open_direct(path: &Path) -> File {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

#[test]
fn devices_exist_where_the_kernel_makes_dma_bufs() {
    for device in ["/dev/udmabuf", "/dev/dma_heap/system"] {
        assert_eq!(exists(device), makes_dma_bufs(), "{device} on {}", kernel_id());
    }
    assert!(exists("/dev/nvme0n1"));
}

/// A CMA heap would need a separate suite, because its mappings can be pinned on some kernels. All
/// guests reserve memory for a CMA heap (`cma=64M`), so this test fails as soon as a kernel
/// provides one.
#[test]
fn system_heap_is_the_only_dma_heap() {
    let expected: &[&str] = if makes_dma_bufs() { &["system"] } else { &[] };
    assert_eq!(dmabuf::DmaHeap::names(), expected);
    assert!(fs::read_to_string("/proc/cmdline").unwrap().contains("cma=64M"));
}

#[test]
fn importers_exist_on_full_kernels() {
    for device in ["/dev/video0", "/dev/video1", "/dev/dri/card0"] {
        assert_eq!(exists(device), is_full(), "{device}");
    }
}

#[test]
fn kernel_is_the_requested_one() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let (major, minor) = kernel_line();
    let rest = release.strip_prefix(&format!("{major}.{minor}")).unwrap_or_default();
    assert!(rest.starts_with(['.', '-']) && release.trim().ends_with("-amd64"), "{release}");
    assert_eq!(release.contains("-cloud-"), !is_full(), "{release}");
}

#[test]
fn io_uring_works() {
    // Linux 6.6 added this setting.
    let switch = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
    assert_eq!(switch.as_deref().map(str::trim), (kernel_line() >= (6, 6)).then_some("0"));
    io_uring::IoUring::new(8).unwrap();
}

#[test]
fn disk_is_a_writable_ext4_with_direct_reads() {
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
    assert_eq!(open_direct(&path).read_at(&mut page.0, 8192).unwrap(), 4096);
    assert_eq!(page.0, bytes[8192..12288]);
}

#[test]
fn command_runs() {
    let output = run_dmaload(&["--version"]);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.starts_with(b"dmaload "), "{output:?}");
}

#[test]
fn scratch_folders_are_tmpfs_and_writable_by_all() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    for folder in ["/tmp", "/dev/shm"] {
        assert!(mounts.contains(&format!(" {folder} tmpfs ")), "{mounts}");
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o7777, 0o1777, "{folder}");
    }
    assert!(mounts.contains(" /sys/fs/cgroup cgroup2 "), "{mounts}");
    assert!(fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap().contains("memory"));
}

#[test]
fn bad_disks_fail_only_at_their_sector() {
    if !has_bad_disks() {
        assert!(!exists("/bad-nvme/bad.bin") && !exists("/bad-virtio/bad.bin"));
        return;
    }
    let bytes = bad_bytes();
    for disk in [BadDisk::nvme(), BadDisk::virtio()] {
        let (file, bad) = (open_direct(&disk.file), usize::try_from(disk.offset).unwrap());
        assert_eq!(file.metadata().unwrap().len(), BAD_LEN as u64);
        let mut page = Page([0; 4096]);
        let mut read = |offset: usize| -> io::Result<()> {
            let sector = &mut page.0[..SECTOR];
            file.read_exact_at(sector, offset as u64)?;
            assert_eq!(sector, &bytes[offset..offset + SECTOR], "{disk:?} at {offset}");
            Ok(())
        };
        for _ in 0..2 {
            let error = read(bad).expect_err("reading the bad sector should fail");
            assert_eq!(error.raw_os_error(), Some(disk.errno), "{disk:?}: {error}");
        }
        for offset in [0, bad - SECTOR, bad + SECTOR, BAD_LEN - SECTOR] {
            read(offset).unwrap_or_else(|error| panic!("{disk:?} at {offset}: {error}"));
        }
        // For a read through the page cache, the kernel reports every error as EIO.
        let error = File::open(&disk.file).unwrap().read_exact_at(&mut page.0[..SECTOR], disk.offset).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{disk:?}: {error}");
    }
}
