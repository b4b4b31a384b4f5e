//! Tests for `dmaload doctor` on kernels with and without devices that create dma-bufs.
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]

mod common;

use common::{MIB, SizeLimit, file, format_sizes};
use dmaload_guest::{has_udmabuf_bug, makes_dma_bufs, record_row, run_dmaload};
use serde_json::Value;

fn doctor(arguments: &[&str]) -> Value {
    // Pass a file, because a load would refuse a folder that contains no model.
    let place = file(4097);
    let mut all = vec!["doctor", "--json", place.to_str().unwrap()];
    all.extend(arguments);
    let output = run_dmaload(&all);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn heap<'a>(doctor: &'a Value, name: &str) -> &'a Value {
    let heaps = doctor["heaps"].as_array().unwrap();
    heaps.iter().find(|heap| heap["name"] == name).unwrap_or_else(|| panic!("{name} is not in {doctor:#}"))
}

#[test]
fn doctor_names_the_heap_that_works_and_its_route() {
    let limited = makes_dma_bufs().then(|| SizeLimit::set_mib(64));
    let found = doctor(&[]);
    assert_eq!(heap(&found, "memfd")["route"], "uring-fixed-direct", "{found:#}");
    assert_eq!(found["load"]["works"], true);
    assert_eq!(found["dma_buf"]["works"], makes_dma_bufs(), "{found:#}");
    let udmabuf = heap(&found, "udmabuf");
    assert_eq!(udmabuf["usable"], makes_dma_bufs());
    if makes_dma_bufs() {
        // On small pages, staged reads are faster, so the loader chooses them and reports no
        // fallback.
        let (route, page) = if has_udmabuf_bug() { ("bounce", 4096) } else { ("uring-fixed-direct", 2 << 20) };
        assert_eq!((&udmabuf["route"], &udmabuf["page_size_bytes"]), (&route.into(), &page.into()), "{found:#}");
        assert_eq!((&udmabuf["fallbacks"], &found["dma_buf"]["route"]), (&[0; 0].into(), &route.into()), "{found:#}");
        assert_eq!(udmabuf["limit_bytes"], 64 << 20);
        assert_eq!(found["dma_buf"]["heap"], "udmabuf");
        let system = heap(&found, "dma-heap:system");
        assert_eq!((&system["usable"], &system["route"]), (&true.into(), &"bounce".into()), "{found:#}");
        assert_eq!(system["fallbacks"][0]["errno"], "EFAULT", "{found:#}");
        drop(limited);
        let _raised = SizeLimit::set_mib(256);
        assert_eq!(heap(&doctor(&[]), "udmabuf")["limit_bytes"], 256 << 20);
    } else {
        assert!(udmabuf["error"].as_str().unwrap().contains("ENOENT"), "{found:#}");
        record_row("missing", &["doctor", "exit 0: memfd works; reports that both devices are missing"]);
    }
}

#[test]
fn doctor_predicts_heap_route_and_pages_of_load_dma_buf() {
    for len in [4097, 2 * MIB, 24 * MIB + 777] {
        let path = file(len);
        let path = path.to_str().unwrap();
        let predicted: Value = serde_json::from_slice(&run_dmaload(&["doctor", "--json", path]).stdout).unwrap();
        let predicted = &predicted["dma_buf"];
        let output = run_dmaload(&["load", "--json", "--dma-buf", "--cache", "bypass", path]);
        let what = format!("{len} bytes: {predicted:#}");
        assert_eq!(predicted["works"].as_bool(), Some(output.status.success()), "{what}");
        if !makes_dma_bufs() {
            assert!(predicted["reason"].as_str().unwrap().contains("/dev/udmabuf"), "{what}");
            continue;
        }
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        for field in ["heap", "route", "page_size_bytes"] {
            assert_eq!(predicted[field], report[field], "{field}: {what}");
        }
        let page = match report["page_size_bytes"].as_u64() {
            Some(4096) => "4 KiB",
            Some(0x20_0000) => "2 MiB",
            other => panic!("{other:?}: {report:#}"),
        };
        let text = |field: &str| report[field].as_str().unwrap();
        record_row("doctor", &[&format_sizes(&[len]), text("heap"), text("route"), page, "as predicted"]);
    }
}

/// On a kernel without devices that create dma-bufs, the advice depends on which modules are
/// installed.
#[test]
fn doctor_names_the_module_that_is_missing() {
    if makes_dma_bufs() {
        let change = doctor(&[])["advice"].to_string();
        assert!(!change.contains("modprobe"), "{change}");
        return;
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let folder = std::path::Path::new("/lib/modules").join(release.trim());
    std::fs::create_dir_all(&folder).unwrap();
    for (modules, expected) in [
        ("kernel/drivers/dma-buf/heaps/system_heap.ko.xz:\n", "sudo modprobe system_heap"),
        ("kernel/drivers/dma-buf/udmabuf.ko: kernel/other.ko\n", "sudo modprobe udmabuf"),
        ("kernel/fs/ext4/ext4.ko:\n", "uname -r"),
    ] {
        std::fs::write(folder.join("modules.dep"), modules).unwrap();
        let advice = doctor(&[])["advice"].to_string();
        assert!(advice.contains(expected), "{expected}: {advice}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn doctor_prints_heaps_and_routes() {
    let output = run_dmaload(&["doctor", file(4097).to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for word in ["memfd", "udmabuf", "dma-heap", "ext4", "uring-fixed-direct"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    let expected = if makes_dma_bufs() { "bounce" } else { "/dev/udmabuf" };
    assert!(text.contains(expected), "{expected} is not in:\n{text}");
}

#[test]
fn doctor_without_permission_names_mode_and_remedy() {
    use std::os::unix::process::CommandExt;
    let output = std::process::Command::new("/bin/dmaload")
        .args(["doctor", "--json"])
        .uid(65534)
        .gid(65534)
        .current_dir("/disk/tests")
        .output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((heap(&found, "memfd")["usable"].as_bool(), found["dma_buf"]["works"].as_bool()), (Some(true), Some(false)));
    if makes_dma_bufs() {
        let error = heap(&found, "udmabuf")["error"].as_str().unwrap();
        assert!(error.contains("EACCES") && error.contains("0600"), "{error}");
        let advice = found["advice"].to_string();
        assert!(advice.contains("setfacl"), "{advice}");
    }
}
