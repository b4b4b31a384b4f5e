//! What `dmaload cat` writes is the file.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod common;

use std::process::{Command, Stdio};

use common::{MIB, ROUTES, SMALL_SEGMENTS, dmaload, finish, folder, random_file, run};

#[test]
fn cmp_finds_no_difference_between_the_file_and_what_cat_writes() {
    let folder = folder();
    for size in [0, 1, 4095, 4097, 2 * MIB, 9 * MIB + 777] {
        let path = random_file(folder.path(), "model.bin", size);
        for route in ROUTES {
            let mut cat = dmaload(["cat", "--route", route]);
            let mut cat = cat.args(SMALL_SEGMENTS).arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let mut cmp = Command::new("cmp");
            let cmp = cmp.arg("-").arg(&path).stdin(cat.stdout.take().unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let cmp = cmp.spawn().unwrap();
            finish(format!("dmaload cat, {size} bytes by {route}"), cat).succeeds();
            finish(format!("cmp, {size} bytes by {route}"), cmp).succeeds();
        }
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 64 * MIB);
    let mut cat = dmaload(["cat"]).arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let head = Command::new("head").args(["-c", "10"]).stdin(cat.stdout.take().unwrap()).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(finish("head".to_owned(), head).stdout.len(), 10);
    finish("dmaload cat | head".to_owned(), cat).succeeds();
}

#[test]
fn a_missing_file_writes_nothing() {
    run(dmaload(["cat"]).arg("/nonexistent/model.bin")).fails(1, &["/nonexistent/model.bin", "ENOENT"]);
}
