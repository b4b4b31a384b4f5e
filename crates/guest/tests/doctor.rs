//! `dmaload doctor` on machines that have what others lack, and the other way round.
#![allow(clippy::unwrap_used, reason = "what fails here has failed the test")]

mod common;

use common::{RaisedLimit, file};
use dmaload_guest::{command, kernel, row};
use serde_json::Value;

fn doctor(arguments: &[&str]) -> Value {
    // A file: a folder without a model is one that `load` refuses, and doctor says so.
    let place = file(4097);
    let mut all = vec!["doctor", "--json", place.to_str().unwrap()];
    all.extend(arguments);
    let output = command(&all);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn heap<'a>(doctor: &'a Value, name: &str) -> &'a Value {
    let heaps = doctor["heaps"].as_array().unwrap();
    heaps.iter().find(|heap| heap["name"] == name).unwrap_or_else(|| panic!("no {name} in {doctor:#}"))
}

#[test]
fn doctor_tells_which_heap_works_and_by_which_route() {
    let told = doctor(&[]);
    let newer = kernel().starts_with("6.12");
    assert_eq!(heap(&told, "memfd")["route"], "uring-fixed-direct", "{told:#}");
    assert_eq!(told["load"]["works"], true);
    assert_eq!(told["dma_buf"]["works"], newer, "{told:#}");
    let udmabuf = heap(&told, "udmabuf");
    assert_eq!(udmabuf["usable"], newer);
    if newer {
        // On small pages staged reads are the faster ones: chosen, so no step down.
        assert_eq!((&udmabuf["route"], &udmabuf["page_size_bytes"]), (&"bounce".into(), &4096.into()), "{told:#}");
        assert_eq!((&udmabuf["fallbacks"], &told["dma_buf"]["route"]), (&[0; 0].into(), &"bounce".into()), "{told:#}");
        assert_eq!(udmabuf["limit_bytes"], 64 << 20);
        assert_eq!(told["dma_buf"]["heap"], "udmabuf");
        let system = heap(&told, "dma-heap:system");
        assert_eq!((&system["usable"], &system["route"]), (&true.into(), &"bounce".into()), "{told:#}");
        assert_eq!(system["fallbacks"][0]["errno"], "EFAULT", "{told:#}");
        let _raised = RaisedLimit::to(256);
        assert_eq!(heap(&doctor(&[]), "udmabuf")["limit_bytes"], 256 << 20);
    } else {
        assert!(udmabuf["error"].as_str().unwrap().contains("ENOENT"), "{told:#}");
        row("missing", &["doctor", "exit 0: memfd works; both devices are told to be missing"]);
    }
}

#[test]
fn the_screen_says_the_same() {
    let output = command(&["doctor", file(4097).to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for word in ["memfd", "udmabuf", "dma-heap", "ext4", "uring-fixed-direct"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    let expected = if kernel().starts_with("6.12") { "bounce" } else { "/dev/udmabuf" };
    assert!(text.contains(expected), "{expected} is not in:\n{text}");
}

#[test]
fn doctor_without_permission_says_whose_the_devices_are() {
    use std::os::unix::process::CommandExt;
    let output = std::process::Command::new("/bin/dmaload")
        .args(["doctor", "--json"])
        .uid(65534)
        .gid(65534)
        .current_dir("/disk/tests")
        .output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((heap(&told, "memfd")["usable"].as_bool(), told["dma_buf"]["works"].as_bool()), (Some(true), Some(false)));
    if kernel().starts_with("6.12") {
        let error = heap(&told, "udmabuf")["error"].as_str().unwrap();
        assert!(error.contains("EACCES") && error.contains("0600"), "{error}");
        let advice = told["advice"].to_string();
        assert!(advice.contains("setfacl"), "{advice}");
    }
}
