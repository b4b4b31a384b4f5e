//! Progress bars on the terminal, for loads and for writing a model.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Result;
use dmaload::{Image, Load};
use dmaload_bench::scratch::ScratchFile;
use dmaload_bench::synth::Model;
use indicatif::{ProgressBar, ProgressStyle};

/// Returns whether standard error is not a terminal. If so, no progress bar is shown.
pub(crate) fn is_quiet() -> bool {
    !std::io::stderr().is_terminal()
}

/// Waits for a load, and shows a progress bar on the terminal unless `quiet`.
pub(crate) async fn finish(mut load: Load, quiet: bool) -> dmaload::Result<Image> {
    if quiet {
        return load.await;
    }
    let bar = progress_bar("loading");
    // Show the bar at once: before the first segment arrives, files must be opened and memory must
    // be allocated.
    bar.tick();
    loop {
        // `next` is cancel-safe.
        match tokio::time::timeout(Duration::from_millis(50), load.next()).await {
            Ok(Some(Ok(_))) | Err(_) => {}
            // `finish` returns the same error.
            Ok(Some(Err(_)) | None) => break,
        }
        // Updates the bar even if segments arrive faster than the timeout.
        let progress = load.progress();
        bar.set_length(progress.planned_bytes);
        bar.set_position(progress.read_bytes);
    }
    bar.finish_and_clear();
    load.finish().await
}

/// Creates a progress bar that shows the rate and the remaining time.
fn progress_bar(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:10} [{bar:32}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
    );
    let bar = ProgressBar::new(0).with_message(what);
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Writes a generated model, and shows a progress bar if standard error is a terminal.
pub(crate) fn write_model(model: &Model, file: &ScratchFile) -> Result<()> {
    let bar = if std::io::stderr().is_terminal() { progress_bar("writing") } else { indicatif::ProgressBar::hidden() };
    bar.set_length(model.bytes);
    model.write(file.file(), file.path(), |written| bar.set_position(written))?;
    bar.finish_and_clear();
    Ok(())
}
