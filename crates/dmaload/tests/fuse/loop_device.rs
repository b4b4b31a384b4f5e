//! Tests a local file system on a loop device whose backing file is on FUSE.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dmaload::{Attempt, Errno, Route};
use dmaload_testing::mounted::tool;
use tempfile::TempDir;

use crate::common::{assert_same, folder, random_bytes};
use crate::file_system::{Manners, SILENCE, may_mount};
use crate::silent::SilentServer;
use crate::{BYTES, loader, options, small_loader};

const IMAGE_BYTES: u64 = 64 << 20;

/// A read-only loop device over a file on FUSE, with its ext4 file system mounted.
struct LoopMounted {
    device: String,
    folder: TempDir,
    /// Dropped before the file system is unmounted, so that requests waiting for the server fail.
    server: Option<SilentServer>,
}

impl LoopMounted {
    /// Serves an ext4 image that contains these files, and mounts it.
    fn serving(files: &[(&str, &[u8])]) -> Result<Self, String> {
        let source = folder();
        let content = source.path().join("content");
        fs::create_dir(&content).unwrap();
        for (name, bytes) in files {
            fs::write(content.join(name), bytes).unwrap();
        }
        let image = source.path().join("image");
        fs::File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        tool(Command::new("mkfs.ext4").args(["-q", "-d"]).args([&content, &image]))?;
        let server = SilentServer::serving(&image, Manners::NeverAnswersAfterSilence);
        let device = attach(&server.path)?;
        let mounted = LoopMounted { device, folder: folder(), server: Some(server) };
        let mount =
            Command::new("mount").args(["-t", "ext4", "-o", "ro,noload", &mounted.device]).arg(mounted.folder.path()).status();
        assert!(mount.is_ok_and(|status| status.success()), "cannot mount ext4 on {}", mounted.device);
        Ok(mounted)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes the server stop answering reads.
    fn silence(&self) {
        assert!(!self.server.as_ref().unwrap().served.path().join(SILENCE).exists());
    }
}

impl Drop for LoopMounted {
    fn drop(&mut self) {
        // Detach first. The device then disappears as soon as its last user, which is the mount or
        // a hanging read, is gone.
        let detached = Command::new("losetup").args(["-d", &self.device]).status();
        self.server = None;
        let unmounted = Command::new("umount").arg("-l").arg(self.folder.path()).status();
        let ended = [detached, unmounted].into_iter().all(|ended| ended.is_ok_and(|status| status.success()));
        assert!(ended || std::thread::panicking());
    }
}

/// Attaches a loop device to a file and returns the device's path.
fn attach(file: &Path) -> Result<String, String> {
    let output = Command::new("losetup").args(["--find", "--show", "--read-only"]).arg(file).output();
    let output = output.map_err(|error| format!("losetup: {error}"))?;
    if !output.status.success() {
        return Err(format!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

/// The file system is local, but the storage behind its loop device is not. If the device's queue
/// is full, a read blocks inside `io_uring_enter`.
#[tokio::test]
async fn silent_loop_device_does_not_stop_other_file_systems() {
    if !may_mount() {
        return;
    }
    let [first, second] = [15, 16].map(|seed| random_bytes(BYTES, seed));
    let mounted = match LoopMounted::serving(&[("first.bin", &first), ("second.bin", &second)]) {
        Ok(mounted) => mounted,
        Err(reason) => return eprintln!("skipped: {reason}"),
    };
    // Shorten the queue: filling the usual queue of 128 requests would need a larger file.
    let name = mounted.device.strip_prefix("/dev/").unwrap();
    fs::write(format!("/sys/block/{name}/queue/nr_requests"), "4").unwrap();
    let folder = folder();
    let plain = folder.path().join("plain.bin");
    fs::write(&plain, &first).unwrap();
    for route in [Route::UringFixedDirect, Route::UringDirect, Route::Bounce, Route::UringBuffered] {
        let loader = loader().load_options(options().route(route)).build().unwrap();
        let image = loader.load(mounted.path("first.bin")).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &first, &route.to_string());
        let steps: Vec<_> = image.report().fallbacks.iter().map(|step| (step.to, step.attempt, step.errno)).collect();
        let by_threads = if route == Route::UringBuffered { Route::Buffered } else { Route::PreadDirect };
        assert_eq!(steps, [(by_threads, Attempt::RingOnDevice, Errno::EOPNOTSUPP)], "{route}");
        loader.shutdown().await.unwrap();
    }
    // Cache the second file's block map, so finding its blocks does not need the server.
    fs::File::open(mounted.path("second.bin"))
        .and_then(|file| std::os::unix::fs::FileExt::read_exact_at(&file, &mut [0], 0))
        .unwrap();
    mounted.silence();
    for route in [Route::UringFixedDirect, Route::UringDirect, Route::PreadDirect, Route::Bounce] {
        let loader = small_loader(route);
        let mut silent = [loader.load(mounted.path("second.bin")).start(), loader.load(mounted.path("second.bin")).start()];
        for load in &mut silent {
            let ended = tokio::time::timeout(Duration::from_millis(500), async { while load.next().await.is_some() {} }).await;
            assert!(ended.is_err(), "{route}: the server answered");
        }
        let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(&plain)).await;
        let image = ended.unwrap_or_else(|_| panic!("{route}: another load is waiting for the silent device")).unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &first, &route.to_string());
        loader.shutdown().await.unwrap_err();
    }
}
