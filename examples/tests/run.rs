//! Runs the examples on small models, and checks that the README shows the code of `hello.rs`.
#![allow(clippy::disallowed_methods, reason = "prints only paths that this code created")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

/// Returns a command that runs an example. Cargo built the example along with this test.
fn example(name: &str) -> Command {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is not built: run cargo test without --test, so that it builds the examples", path.display());
    Command::new(path)
}

/// Writes a model with one tensor `w`, whose `bytes` bytes all have the value `value`.
fn write_model(folder: &Path, name: &str, bytes: usize, value: u8) -> PathBuf {
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + bytes, value);
    let path = folder.join(name);
    std::fs::write(&path, file).unwrap();
    path
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn readme_shows_the_hello_example_verbatim() {
    let readme = include_str!("../../README.md");
    let (_, hello) = include_str!("../hello.rs").split_once("use ").expect("hello.rs should have code after its comment");
    let (_, block) = readme.split_once("```rust\nuse ").expect("the README should have a Rust block");
    let (block, _) = block.split_once("```").expect("the Rust block should be closed");
    assert_eq!(block, hello);
}

#[test]
fn hello_stream_and_share_run() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = write_model(folder.path(), "model.safetensors", 30_000_000, 7);
    let hello = run(example("hello").arg(&path));
    assert!(hello.contains("w U8 [30000000]: 30000000 bytes") && hello.contains("bytes by "), "{hello}");
    let stream = run(example("stream").arg(&path));
    assert_eq!(stream.lines().count(), 3, "{stream}");
    let share = run(example("share").arg(&path));
    let sums: Vec<_> = share.lines().map(|line| line.rsplit(' ').next().unwrap().to_owned()).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{share}");
}

struct Service {
    child: Child,
    address: String,
    rest: BufReader<std::process::ChildStdout>,
}

impl Service {
    fn start() -> Self {
        let mut child = example("service").arg("127.0.0.1:0").stdout(Stdio::piped()).spawn().unwrap();
        let mut rest = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        rest.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        Service { child, address, rest }
    }

    /// Sends a request, and returns the status and the body of the response.
    fn request(&self, method: &str, path: &str, body: &str) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        let kind = "content-type: application/json";
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{kind}\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).unwrap();
        let end = response.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let status = String::from_utf8_lossy(&response[9..12]).parse().unwrap();
        (status, response.split_off(end + 4))
    }

    fn request_json(&self, method: &str, path: &str, body: &str) -> Value {
        let (status, body) = self.request(method, path, body);
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, text) = self.request("GET", "/metrics", "");
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("dmaload_{name} ")));
        line.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().unwrap()
    }

    fn count_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

/// Evicts a file from the page cache, so the next load reads it from storage.
fn evict(path: &Path) {
    let of = format!("of={}", path.display());
    let dd = Command::new("dd").args([&of, "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"]).status();
    assert!(dd.unwrap().success());
}

/// Swaps two models a hundred times, with requests in between. Checks that the bytes are right,
/// and that neither descriptors nor memory accumulate. At first, one model is in the page cache
/// and the other is not.
#[test]
fn service_loads_swaps_and_serves_models() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let paths = [1, 2].map(|value| write_model(folder.path(), &format!("{value}.safetensors"), 20_000_000, value));
    evict(&paths[1]);
    let mut service = Service::start();
    assert_eq!(service.request_json("GET", "/models", ""), json!([]));
    let (mut descriptors, mut memory) = (0, 0);
    for round in 0..100 {
        let which = round % 2;
        let body = json!({ "path": paths[which] }).to_string();
        let reported = service.request_json("PUT", "/models/m", &body);
        assert_eq!((reported["tensors"].as_u64(), reported["bytes"].as_u64() > Some(20_000_000)), (Some(1), true));
        let (status, bytes) = service.request("GET", "/models/m/tensors/w", "");
        assert_eq!((status, bytes.len()), (200, 20_000_000));
        assert!(bytes.iter().all(|&byte| usize::from(byte) == which + 1), "round {round}: wrong bytes");
        if round == 9 {
            (descriptors, memory) = (service.count_descriptors(), service.metric("memory_bytes"));
        }
    }
    let after = (service.count_descriptors(), service.metric("memory_bytes"));
    assert!(after.0 <= descriptors + 4 && after.1 <= memory + (32 << 20), "{after:?} after {:?}", (descriptors, memory));
    assert_eq!(service.metric("loads_finished_total"), 100);
    assert!(service.metric("in_kernel_seconds_count") > 0);
    assert_eq!(service.request("GET", "/models/m/tensors/z", "").0, 404);
    assert_eq!(service.request("PUT", "/models/x", r#"{"path":"/missing"}"#).0, 404);
    assert_eq!(service.request("PUT", "/models/x", "{}").0, 400);
    assert_eq!(service.request("DELETE", "/models/m", "").0, 204);
    assert_eq!(service.request("DELETE", "/models/m", "").0, 404);
    // SIGINT shuts the service down gracefully.
    assert!(Command::new("kill").args(["-INT", &service.child.id().to_string()]).status().unwrap().success());
    let mut rest = String::new();
    service.rest.read_to_string(&mut rest).unwrap();
    assert!(service.child.wait().unwrap().success() && rest.contains("ended"), "{rest}");
}
