//! Tests that `dmaload doctor` reports what loads do, with and without privileges, io_uring, huge
//! pages, locked memory, and a usable path.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(unsafe_code, reason = "limits are set between fork and exec")]

mod agreement;
#[path = "../common/mod.rs"]
mod common;

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use common::{MIB, allow, as_nobody, base, dmaload, folder, is_root, load_json, random_file, run, skip};
use dmaload_testing::seccomp::refusing;
use serde_json::{Value, json};

const SETUP: u32 = 425;
const REGISTER: u32 = 427;

fn doctor(path: Option<&Path>) -> Command {
    let mut command = dmaload(["doctor", "--json"]);
    command.args(path);
    command
}

#[test]
fn trial_without_descriptors_leaves_loads_unknown() {
    let mut unknown = 0;
    for limit in 9..=14 {
        let done = run(&mut common::limited(&dmaload(["doctor"]), &format!("-n {limit}")));
        let text = String::from_utf8_lossy(&done.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(!text.contains(" load would fail"), "{limit}: {done}");
        unknown += usize::from(text.contains("load doctor can't tell"));
    }
    assert!(unknown > 0, "at least one limit should be too low for the trial");
    // Doctor never reports that a working load would fail. It always reports that loading a
    // damaged model would fail.
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let broken = common::file(folder.path(), "lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\nsize 5\n");
    for limit in 8..=16 {
        let limited = |command: &Command| run(&mut common::limited(command, &format!("-n {limit}")));
        let load = limited(dmaload(["load"]).arg(&path));
        let reported = limited(&doctor(Some(&path)));
        match &reported.json()["load"]["works"] {
            Value::Null => drop(reported.exits(1)),
            works => assert_eq!((works.as_bool(), reported.code), (Some(load.code == Some(0)), load.code), "{limit}: {load}"),
        }
        assert_eq!(limited(&doctor(Some(&broken))).exits(1).json()["load"]["works"], false, "{limit}");
    }
}

#[test]
fn file_larger_than_the_address_space_would_fail() {
    let folder = folder();
    let path = folder.path().join("sparse.bin");
    fs::File::create(&path).unwrap().set_len(3 << 30).unwrap();
    let limited = |command| run(&mut common::limited(&command, "-v 2000000"));
    let json = limited(doctor(Some(&path))).exits(1).json();
    let reason = json["load"]["reason"].as_str().unwrap();
    assert!(reason.contains("ulimit -v") || reason.contains("available"), "{json:#}");
    let small = random_file(folder.path(), "small.bin", MIB);
    limited(doctor(Some(&small))).succeeds();
}

/// Makes a command run without huge pages.
fn on_small_pages(mut command: Command) -> Command {
    let deny = || {
        // SAFETY: PR_SET_THP_DISABLE takes numbers only.
        let denied = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
        if denied == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(deny) };
    command
}

fn with_memlock(mut command: Command, bytes: u64) -> Command {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    let set = move || {
        // SAFETY: the limit lives as long as the closure.
        let set = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(set) };
    command
}

#[track_caller]
fn heap<'a>(json: &'a Value, name: &str) -> &'a Value {
    let heaps = json["heaps"].as_array().unwrap();
    heaps.iter().find(|heap| heap["name"] == name).unwrap_or_else(|| panic!("no heap {name}: {json:#}"))
}

fn advises(json: &Value, command: &str) -> bool {
    json["advice"].as_array().unwrap().iter().any(|advice| advice["command"].as_str().unwrap().contains(command))
}

/// Returns whether this test can open the file with `O_DIRECT`.
fn has_direct(path: &Path) -> bool {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

#[test]
fn doctor_reports_what_a_load_does() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 40 * MIB + 777);
    let reported = run(&mut doctor(Some(&path))).succeeds().json();
    let got = load_json(&path, &[]);
    assert_eq!(reported["load"]["works"], true);
    assert_eq!((&reported["load"]["heap"], &reported["load"]["route"]), (&got["heap"], &got["route"]), "{reported:#}");
    assert_eq!(reported["huge_pages"]["obtained_bytes"], got["page_size_bytes"]);
    assert_eq!(heap(&reported, "memfd")["fallbacks"], load_json(&random_file(folder.path(), "small", 4 * MIB), &[])["fallbacks"]);
    let anon = load_json(&path, &["--heap", "anon"]);
    assert_eq!(heap(&reported, "anon")["usable"], true);
    assert_eq!(heap(&reported, "anon")["page_size_bytes"], anon["page_size_bytes"]);
    let about = &reported["path"];
    assert_eq!((about["kind"].as_str(), about["bytes"].as_u64()), (Some("file"), Some(40 * MIB as u64 + 777)));
    assert_eq!((&about["o_direct"], &about["first_read"]), (&json!(has_direct(&path)), &json!(true)));
    assert_eq!(about["fits_memory"], true);
    let stat = run(Command::new("stat").args(["-c", "%m"]).arg(&path)).succeeds().text();
    assert_eq!(about["mount_point"], stat.trim());
    let findmnt = run(Command::new("findmnt").args(["-no", "FSTYPE", "-T"]).arg(&path)).succeeds().text();
    assert_eq!(about["file_system"], findmnt.trim());
    assert_eq!(reported["kernel"], run(Command::new("uname").arg("-sr")).succeeds().text().trim());
    assert_eq!(reported["trial"]["folder"], fs::canonicalize(folder.path()).unwrap().to_str().unwrap());
    let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["model.bin", "small"]);
}

#[test]
fn doctor_lists_the_ways_that_a_load_measures() {
    let folder = folder();
    let half_gib = 512 * MIB as u64;
    for (bytes, ways) in [(half_gib - 4096, json!([])), (half_gib - 1, json!(["direct", "staged"]))] {
        let path = folder.path().join("model.bin");
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        let reported = run(&mut doctor(Some(&path))).succeeds().json();
        assert_eq!(reported["load"]["measures"], ways, "{reported:#}");
        let got = load_json(&path, &[]);
        assert_eq!(got["measured"].is_null(), ways == json!([]), "{got:#}");
    }
    let screen = run(dmaload(["doctor"]).arg(folder.path().join("model.bin"))).succeeds().text();
    let screen = screen.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(screen.contains("; also measures staged reads, and continues with the fastest"), "{screen}");
}

#[test]
fn output_fits_on_one_screen() {
    let folder = folder();
    let screen = run(dmaload(["doctor"]).arg(folder.path())).exits(1).text();
    for word in
        ["kernel ", "io_uring ", "memlock ", "memory ", "huge pages ", "memfd ", "anon ", "udmabuf ", "load ", "--dma-buf "]
    {
        assert!(screen.lines().any(|line| line.trim_start().starts_with(word)), "{word}: {screen}");
    }
    assert!(screen.lines().count() <= 40, "{screen}");
    // Commands and paths are never broken across lines.
    let is_text = |line: &&str| !line.contains("/") && !line.starts_with("       ");
    assert!(screen.lines().filter(is_text).all(|line| line.chars().count() <= 80), "{screen}");
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
}

#[test]
fn missing_devices_are_reported_with_a_remedy() {
    let json = run(&mut doctor(None)).succeeds().json();
    assert_eq!(json["path"], Value::Null);
    let mut missing = 0;
    for (name, device) in [("udmabuf", "/dev/udmabuf"), ("dma-heap", "/dev/dma_heap")] {
        if Path::new(device).exists() {
            continue;
        }
        missing += 1;
        let heap = heap(&json, name);
        assert_eq!((&heap["usable"], &heap["route"]), (&json!(false), &Value::Null));
        let error = heap["error"].as_str().unwrap();
        assert!(error.contains(device) && error.contains("ENOENT"), "{error}");
        assert_eq!(advises(&json, "modprobe udmabuf"), !Path::new("/dev/udmabuf").exists(), "{json:#}");
    }
    let required = run(dmaload(["load", "--dma-buf"]).arg(random_file(folder().path(), "a", 1)));
    if missing == 2 {
        assert_eq!((&json["dma_buf"]["works"], &json["dma_buf"]["heap"]), (&json!(false), &Value::Null));
        assert!(json["dma_buf"]["reason"].as_str().unwrap().contains("/dev/udmabuf"), "{json:#}");
        required.fails(1, &["/dev/udmabuf"]);
    }
}

#[test]
fn refused_io_uring_is_explained_and_the_load_works() {
    let folder = folder();
    let small = random_file(folder.path(), "small.bin", 5000);
    for (call, errno, name, route) in [
        (SETUP, libc::EPERM, "EPERM", "pread-direct"),
        (SETUP, libc::ENOSYS, "ENOSYS", "pread-direct"),
        (REGISTER, libc::EPERM, "EPERM", "uring-direct"),
    ] {
        let json = run(&mut refusing(doctor(Some(&small)), &[call], errno)).succeeds().json();
        let (ring, table) = (&json["io_uring"], &json["io_uring"]["features"]["buffer_table"]);
        assert_eq!(ring["cause"], "seccomp", "{json:#}");
        assert_eq!(ring["available"], call != SETUP);
        assert_eq!(ring["errno"], if call == SETUP { json!(name) } else { Value::Null });
        assert_eq!((&table["available"], table["errno"].as_str()), (&json!(false), Some(name)));
        assert_eq!(json["memlock"]["registrable_bytes"], 0);
        assert_eq!((&json["load"]["works"], json["load"]["route"].as_str()), (&json!(true), Some(route)));
        let fallback = &heap(&json, "memfd")["fallbacks"][0];
        assert_eq!((fallback["to"].as_str(), fallback["errno"].as_str()), (Some(route), Some(name)));
        assert!(json["advice"][0]["change"].as_str().unwrap().contains("seccomp"), "{json:#}");
        let screen = run(&mut refusing(dmaload(["doctor"]), &[call], errno)).succeeds().text();
        assert!(screen.contains(name) && screen.contains("seccomp"), "{screen}");
    }
    let unfiltered = run(&mut doctor(None)).succeeds().json();
    if unfiltered["io_uring"]["available"] == true {
        assert_eq!((&unfiltered["io_uring"]["errno"], &unfiltered["io_uring"]["cause"]), (&Value::Null, &Value::Null));
    }
}

#[test]
fn small_memlock_limit_is_reported_with_its_consequences() {
    let folder = folder();
    allow(folder.path(), 0o777);
    let path = random_file(folder.path(), "model.bin", 20 * MIB);
    for bytes in [64 << 10, 8 << 20] {
        let command = match as_nobody(doctor(Some(&path))) {
            Ok(command) => with_memlock(command, bytes),
            Err(reason) => return skip(reason),
        };
        let json = run(&mut { command }).succeeds().json();
        if json["io_uring"]["available"] == false {
            return skip("io_uring is refused here");
        }
        let memlock = &json["memlock"];
        assert_eq!((memlock["soft_bytes"].as_u64(), memlock["cap_ipc_lock"].as_bool()), (Some(bytes), Some(false)));
        // Other tests running as the same user may have memory locked at the same time, so the
        // value can be below the limit.
        let registrable = memlock["registrable_bytes"].as_u64().unwrap();
        assert!(registrable <= bytes && registrable.is_multiple_of(64 << 10), "{json:#}");
        assert_eq!(json["io_uring"]["features"]["register_16_mib"]["errno"], "ENOMEM");
        assert!(advises(&json, "ulimit -l unlimited"), "{json:#}");
        // The trial's 4 MiB fit under a limit of 8 MiB, but the file's 20 MiB do not.
        let load = with_memlock(as_nobody(dmaload(["load", "--json", "--cache", "bypass"])).unwrap(), bytes);
        let got = run({ load }.arg(&path)).succeeds().json();
        assert_eq!(json["load"]["route"], got["route"], "{json:#}");
        assert_eq!(json["load"]["route"], "uring-direct");
    }
}

#[test]
fn memlock_limit_does_not_affect_root() {
    if !is_root() {
        return skip("only root has CAP_IPC_LOCK");
    }
    let json = run(&mut with_memlock(doctor(None), 64 << 10)).succeeds().json();
    let memlock = &json["memlock"];
    assert_eq!(memlock["soft_bytes"], 64 << 10);
    if memlock["cap_ipc_lock"] == true && json["io_uring"]["available"] == true {
        assert_eq!(memlock["registrable_bytes"], 16 * MIB);
        assert!(!advises(&json, "ulimit"), "{json:#}");
    }
}

#[test]
fn small_pages_are_reported_with_a_remedy() {
    let folder = folder();
    let small = random_file(folder.path(), "small.bin", 5000);
    let json = run(&mut on_small_pages(doctor(Some(&small)))).succeeds().json();
    assert_eq!(json["huge_pages"]["obtained_bytes"], 4096, "{json:#}");
    assert_eq!(json["huge_pages"]["denied_to_process"], true);
    assert_eq!(heap(&json, "memfd")["page_size_bytes"], 4096);
    assert!(json["advice"][0]["change"].as_str().unwrap().contains("PR_SET_THP_DISABLE"), "{json:#}");
}

#[test]
fn folder_in_memory_is_recognized_by_its_file_system() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return skip("no /dev/shm") };
    let path = random_file(folder.path(), "model.bin", 5 * MIB);
    // The folder contains no model, so doctor reports that a load would fail, but still reports
    // the file system.
    for (path_to_try, status) in [(folder.path(), 1), (&path, 0)] {
        let json = run(&mut doctor(Some(path_to_try))).exits(status).json();
        let about = &json["path"];
        assert_eq!((about["file_system"].as_str(), about["mount_point"].as_str()), (Some("tmpfs"), Some("/dev/shm")), "{json:#}");
        assert_eq!(json["trial"]["folder"], folder.path().to_str().unwrap());
        assert_eq!(about["o_direct"], has_direct(&path), "{json:#}");
        if status == 0 {
            assert_eq!(json["load"]["route"], load_json(&path, &[])["route"]);
        }
    }
}

#[test]
fn file_system_without_direct_reads_is_reported() {
    // sysfs contains no model, and no file can be created there.
    let path = Path::new("/sys/kernel/mm/transparent_hugepage/enabled");
    if !path.exists() {
        return skip("no such file in sysfs");
    }
    // The file is shorter than the length that sysfs reports.
    let json = run(&mut doctor(Some(path))).exits(1).json();
    let about = &json["path"];
    assert_eq!((about["file_system"].as_str(), about["o_direct"].as_bool()), (Some("sysfs"), Some(false)), "{json:#}");
    assert_eq!((about["o_direct_errno"].as_str(), about["first_read"].as_bool()), (Some("EINVAL"), Some(true)));
    assert!(json["load"]["reason"].as_str().unwrap().contains("ends before offset"), "{json:#}");
    assert!(json["trial"]["not_beside_path"].is_string(), "{json:#}");
    assert!(json["advice"][0]["change"].as_str().unwrap().contains("O_DIRECT"), "{json:#}");
}

#[test]
fn missing_special_or_unreadable_path_is_an_error() {
    let folder = folder();
    for arguments in [&["doctor"][..], &["doctor", "--json"]] {
        let missing = folder.path().join("missing");
        run(dmaload(arguments).arg(&missing)).fails(1, &["missing", "ENOENT", "check the path"]);
        run(dmaload(arguments).arg("/dev/null")).fails(1, &["/dev/null", "character device"]);
    }
    run(&mut dmaload(["doctor", "--jsno"])).fails(2, &["--jsno"]);
    let path = random_file(folder.path(), "closed", 10);
    allow(&path, 0o600);
    match as_nobody(doctor(Some(&path))) {
        Ok(mut command) => drop(run(&mut command).fails(1, &["closed", "EACCES"])),
        Err(reason) => skip(reason),
    }
}

#[test]
fn doctor_exits_with_status_1_if_a_load_would_fail() {
    let folder = folder();
    // A sparse file that does not fit into memory.
    let path = folder.path().join("huge");
    fs::File::create(&path).unwrap().set_len(8 << 40).unwrap();
    let json = run(&mut doctor(Some(&path))).exits(1).json();
    assert_eq!((&json["load"]["works"], &json["path"]["fits_memory"]), (&json!(false), &json!(false)), "{json:#}");
    assert!(json["load"]["reason"].as_str().unwrap().contains("8.00 TiB"), "{json:#}");
    assert!(json["advice"][0]["change"].as_str().unwrap().starts_with("free "), "{json:#}");
    // If only memfds are refused, doctor reports everything else as usual.
    let memfd_create = u32::try_from(libc::SYS_memfd_create).unwrap();
    let json = run(&mut refusing(doctor(None), &[memfd_create], libc::EPERM)).exits(1).json();
    assert_eq!((&json["load"]["works"], &heap(&json, "memfd")["usable"]), (&json!(false), &json!(false)), "{json:#}");
    assert!(json["load"]["reason"].as_str().unwrap().contains("EPERM"), "{json:#}");
    assert_eq!(heap(&json, "anon")["usable"], true);
    let screen = run(&mut refusing(dmaload(["doctor"]), &[memfd_create], libc::EPERM)).exits(1).text();
    assert!(screen.contains("would fail: "), "{screen}");
    // The file size limit also applies to memfds: a small file loads, a large one does not.
    let json = run(&mut common::limited(&doctor(None), "-f 8")).exits(1).json();
    assert_eq!(json["load"]["works"], false);
    assert!(json["load"]["reason"].as_str().unwrap().contains("ulimit -f"), "{json:#}");
    let small = common::file(folder.path(), "small", b"abc");
    let json = run(&mut common::limited(&doctor(Some(&small)), "-f 8")).succeeds().json();
    assert_eq!(json["load"]["works"], true, "{json:#}");
}

#[test]
fn doctor_does_not_panic_without_a_writable_folder() {
    let folder = folder();
    let path = common::file(folder.path(), "model.bin", &[7; 5000]);
    let mut command = doctor(Some(&path));
    command.env("TMPDIR", "/sys").current_dir("/sys");
    match as_nobody(command) {
        Ok(command) => {
            // Every user can write to /var/tmp, so a file size limit of 0 prevents doctor from
            // writing there.
            let done = run(common::limited(&command, "-f 0")
                .uid(common::NOBODY)
                .gid(common::NOBODY)
                .env("TMPDIR", "/sys")
                .current_dir("/sys"));
            assert!(!done.stderr.contains("panicked"), "{done}");
            assert_eq!(done.json()["load"]["works"], false, "{done}");
        }
        Err(reason) => skip(reason),
    }
}

#[test]
fn unreadable_folder_is_an_error() {
    let folder = folder();
    let closed = folder.path().join("closed");
    fs::create_dir(&closed).unwrap();
    common::allow(&closed, 0);
    match as_nobody(doctor(Some(&closed))) {
        Ok(mut command) => drop(run(&mut command).fails(1, &[closed.to_str().unwrap(), "EACCES"])),
        Err(reason) => skip(reason),
    }
}

/// A user who can write to the folder replaces the scratch file with a link. Doctor must not write
/// to the link's target.
#[test]
fn scratch_file_is_written_through_its_own_descriptor() {
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};
    let folder = folder();
    let victim = common::file(folder.path(), "victim", b"precious");
    let shared = folder.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for entry in fs::read_dir(&shared).unwrap().flatten() {
                    let path = entry.path();
                    if fs::remove_file(&path).is_ok() {
                        let _ = symlink(&victim, &path);
                    }
                }
            }
        });
        for _ in 0..30 {
            run(&mut doctor(Some(&shared)));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn trial_in_an_unwritable_folder_moves_to_another() {
    let folder = folder();
    match as_nobody(doctor(Some(folder.path()))) {
        Ok(mut command) => {
            let json = run(command.env("TMPDIR", base())).json();
            assert!(json["trial"]["not_beside_path"].as_str().unwrap().contains("EACCES"), "{json:#}");
            assert_ne!(json["trial"]["folder"], folder.path().to_str().unwrap());
            assert_eq!(json["path"]["first_read"], Value::Null);
        }
        Err(reason) => skip(reason),
    }
}

/// Returns a command that runs the given command in a mount namespace in which a tmpfs hides
/// procfs.
fn without_proc(command: &Command) -> Command {
    let mut hidden = Command::new("unshare");
    hidden.args(["-m", "sh", "-c", "mount -t tmpfs none /proc && exec \"$@\"", "sh"]).arg(command.get_program());
    hidden.args(command.get_args()).env_remove("DMALOAD_LOG").env("LC_ALL", "C");
    hidden
}

#[test]
fn without_procfs_doctor_works_as_load_does() {
    if !is_root() || run(&mut without_proc(&Command::new("true"))).code != Some(0) {
        return skip("procfs can't be hidden here");
    }
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 20 * MIB + 5);
    let got = run(without_proc(&dmaload(["load", "--json", "--cache", "bypass"])).arg(&path)).succeeds().json();
    let reported = run(&mut without_proc(&doctor(Some(&path)))).succeeds().json();
    assert_eq!((&reported["load"]["works"], &reported["load"]["route"]), (&json!(true), &got["route"]), "{reported:#}");
    // If doctor can't write a file and can't open a memfd through procfs, it loads the beginning
    // of the file at the path.
    let mut closed = without_proc(&doctor(Some(&path)));
    closed.env("TMPDIR", "/nonexistent");
    let mut without_space = Command::new("sh");
    without_space
        .args(["-c", "ulimit -f 0 && exec \"$@\"", "sh", "unshare"])
        .args(closed.get_args())
        .env("TMPDIR", "/nonexistent");
    let reported = run(&mut without_space);
    assert!(!reported.stderr.contains("panicked"), "{reported}");
    assert_eq!(heap(&reported.json(), "anon")["usable"], true, "{reported}");
    let broken = common::file(folder.path(), "lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\nsize 5\n");
    run(&mut without_proc(&doctor(Some(&broken)))).exits(1);
}

#[test]
fn refused_memfd_is_reported_with_the_heap_anon_as_remedy() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let memfd_create = u32::try_from(libc::SYS_memfd_create).unwrap();
    for (errno, name) in [(libc::EPERM, "EPERM"), (libc::EACCES, "EACCES"), (libc::ENOSYS, "ENOSYS")] {
        let load = || {
            let mut command = dmaload(["load", "--json"]);
            command.arg(&path);
            command
        };
        run(&mut refusing(load(), &[memfd_create], errno)).fails(1, &[name, "--heap anon"]);
        let anon = ["--heap", "anon"];
        run(refusing(load(), &[memfd_create], errno).args(anon)).succeeds();
    }
}
