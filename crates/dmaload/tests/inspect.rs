//! Tests that the async inspection functions do not block their caller, need no runtime, and
//! return the same results as the blocking functions.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use common::{block_on, file, folder};
use dmaload::{ErrorKind, Format, LoadOptions, inspect, inspect_blocking, inspect_model, inspect_model_blocking};
use dmaload_testing::{safetensors, safetensors_of};

/// Tests that start or count inspecting threads hold this lock, because the count includes threads
/// that other tests in this process have started.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Writes a model whose header takes far more than 10 ms to parse, so a test can count 10 ticks of
/// 1 ms meanwhile.
fn write_slow_model(folder: &Path) -> PathBuf {
    const TENSORS: usize = 250_000;
    let entry = |number| format!(r#""t{number:06}":{{"dtype":"U8","shape":[0,1,2],"data_offsets":[0,0]}}"#);
    let entries: Vec<String> = (0..TENSORS).map(entry).collect();
    file(folder, "slow.safetensors", &safetensors(format!("{{{}}}", entries.join(",")).as_bytes(), b""))
}

fn count_inspecting_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim_end() == "dmaload-inspect").count()
}

fn wait_until(condition: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test]
async fn inspecting_a_file_does_not_block_the_runtime() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let path = write_slow_model(folder.path());
    let mut ticks = 0_u32;
    let mut inspecting = pin!(inspect(&path, Format::Auto));
    let inspected = loop {
        match tokio::time::timeout(Duration::from_millis(1), &mut inspecting).await {
            Ok(inspected) => break inspected.unwrap(),
            Err(_) => ticks += 1,
        }
    };
    assert_eq!(inspected.tensors.unwrap().len(), 250_000);
    assert!(ticks >= 10, "the timer ran only {ticks} times during the inspection");
}

#[test]
fn async_and_blocking_inspection_agree_without_a_runtime() {
    let _alone = ALONE.blocking_lock();
    let folder = folder();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let first = file(&model, "model-00001-of-00002.safetensors", &safetensors_of(2, 100, 1));
    let other = br#"{"other":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}"#;
    let second = file(&model, "model-00002-of-00002.safetensors", &safetensors(other, &[7; 12]));
    let raw = file(folder.path(), "raw.bin", b"not a model");
    let broken = file(folder.path(), "broken.safetensors", &safetensors_of(1, 100, 1)[..90]);
    for (path, tensors) in [(&first, Some(2)), (&second, Some(1)), (&raw, None)] {
        let inspected = block_on(inspect(path, Format::Auto)).unwrap();
        assert_eq!(inspected, inspect_blocking(path, Format::Auto).unwrap());
        let (bytes, seen) = (std::fs::metadata(path).unwrap().len(), inspected.tensors.map(|map| map.len()));
        assert_eq!((&inspected.path, inspected.file_bytes, seen), (path, bytes, tensors));
    }
    for path in [&broken, &folder.path().join("missing"), &folder.path().to_owned()] {
        let error = block_on(inspect(path, Format::Auto)).unwrap_err();
        assert_eq!(error, inspect_blocking(path, Format::Auto).unwrap_err());
        let error = block_on(inspect_model(path, Format::Auto)).unwrap_err();
        assert_eq!(error, inspect_model_blocking(path, Format::Auto).unwrap_err());
    }
    let files = block_on(inspect_model(&model, Format::Auto)).unwrap();
    assert_eq!(files, inspect_model_blocking(&model, Format::Auto).unwrap());
    let paths: Vec<_> = files.iter().map(|file| &file.path).collect();
    assert_eq!(paths, [&first, &second]);
    let shape = files[1].tensors.as_ref().unwrap().get("other").unwrap().shape.as_slice();
    assert_eq!(shape, [2_usize, 3]);
}

#[test]
fn inspecting_a_load_follows_its_options() {
    let folder = folder();
    let header = |name: &str| format!(r#"{{"{name}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#);
    for name in ["a", "b"] {
        file(folder.path(), &format!("{name}.safetensors"), &dmaload_testing::safetensors(header(name).as_bytes(), &[0; 4]));
    }
    let index = r#"{"weight_map":{"a":"a.safetensors","b":"b.safetensors","c":"c.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let names = |options: LoadOptions| {
        let files = dmaload::inspect_load_blocking([folder.path()], &options)?;
        let tensors = files.iter().flat_map(|file| file.tensors.iter().flatten());
        Ok::<Vec<_>, dmaload::Error>(tensors.map(|tensor| tensor.name.clone()).collect())
    };
    assert_eq!(names(LoadOptions::new()).unwrap_err().kind(), ErrorKind::Incomplete);
    assert_eq!(names(LoadOptions::new().allow_missing(true)).unwrap(), ["a", "b"]);
    assert_eq!(names(LoadOptions::new().tensors(["b"])).unwrap(), ["b"]);
    assert_eq!(names(LoadOptions::new().tensors(["b", "c"])).unwrap_err().kind(), ErrorKind::Incomplete);
    assert_eq!(names(LoadOptions::new().format(Format::Gguf)).unwrap_err().kind(), ErrorKind::NotFound);
    let several = file(folder.path(), "several.safetensors", &safetensors_of(3, 4, 1));
    let selected = dmaload::inspect_load_blocking([&several], &LoadOptions::new().tensors(["t2"])).unwrap();
    let selected: Vec<_> = selected[0].tensors.iter().flatten().map(|tensor| &*tensor.name).collect();
    assert_eq!(selected, ["t2"]);
    let two = [folder.path().join("a.safetensors"), folder.path().join("b.safetensors")];
    assert_eq!(dmaload::inspect_load_blocking(&two, &LoadOptions::new()).unwrap().len(), 2);
    assert_eq!(dmaload::inspect_load_blocking(&two[..1], &LoadOptions::new().format(Format::Raw)).unwrap()[0].tensors, None);
}

#[test]
fn dropped_inspection_leaves_no_thread() {
    let _alone = ALONE.blocking_lock();
    let folder = folder();
    let path = write_slow_model(folder.path());
    wait_until(|| count_inspecting_threads() == 0, "a thread of an earlier test is still running");
    {
        let mut inspecting = pin!(inspect(&path, Format::Auto));
        let mut context = Context::from_waker(Waker::noop());
        assert!(inspecting.as_mut().poll(&mut context).is_pending());
        // A thread sets its name shortly after it starts.
        wait_until(|| count_inspecting_threads() == 1, "no thread is reading the file");
    }
    wait_until(|| count_inspecting_threads() == 0, "the thread is still running after the drop");
}
